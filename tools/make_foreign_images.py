#!/usr/bin/env python3
"""Make small images with writers other than QEMU, to see what the auditor reports of them.

    tools/make_foreign_images.py FOLDER

Needs e2fsprogs (mkfs.ext4, e2image), Node.js with npm, which gets @xen-orchestra/qcow2 from the npm
registry, and FreeBSD's mkimg, which no Linux distribution packages (usr.bin/mkimg of its sources). A writer
that is absent is skipped with its name. The disk of each image holds an ext4 file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_XEN_ORCHESTRA = """
import { open } from 'node:fs/promises'
import { createWriteStream } from 'node:fs'
import { pipeline } from 'node:stream/promises'
import { RandomAccessDisk } from '@xen-orchestra/disk-transform'
import { toQcow2Stream } from '@xen-orchestra/qcow2'

class RawFile extends RandomAccessDisk {
  constructor(handle, size, data) { super(); this.handle = handle; this.size = size; this.data = data }
  getBlockSize() { return 65536 }
  getVirtualSize() { return this.size }
  async init() {}
  async close() {}
  isDifferencing() { return false }
  getBlockIndexes() { return this.data }
  hasBlock(index) { return this.data.includes(index) }
  async readBlock(index) {
    const data = Buffer.alloc(65536)
    await this.handle.read(data, 0, 65536, index * 65536)
    return { index, data }
  }
}

const [raw, target] = process.argv.slice(2)
const handle = await open(raw)
const { size } = await handle.stat()
const data = []
for (let index = 0; index * 65536 < size; index++) {
  const block = Buffer.alloc(65536)
  await handle.read(block, 0, 65536, index * 65536)
  if (block.some(byte => byte !== 0)) data.push(index)
}
await pipeline(toQcow2Stream(new RawFile(handle, size, data)), createWriteStream(target))
await handle.close()
"""


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


def file_system(path: Path, block_size: int, size: str) -> Path:
    """Make a raw ext4 file system."""
    path.unlink(missing_ok=True)
    _run("truncate", "-s", size, path)
    _run("mkfs.ext4", "-q", "-F", "-b", str(block_size), path)
    return path


def e2image(folder: Path) -> None:
    """Make images of file systems with 1 KiB and 4 KiB blocks: cluster sizes of e2image."""
    for block_size in (1024, 4096):
        raw = file_system(folder / f"ext4-{block_size}.raw", block_size, "64M")
        _run("e2image", "-Q", raw, folder / f"e2image-{block_size}.qcow2")


def xen_orchestra(folder: Path) -> None:
    """Make an image with Xen Orchestra's streaming writer."""
    work = folder / "npm"
    work.mkdir(exist_ok=True)
    (work / "package.json").write_text("{}", encoding="utf-8")  # else npm installs into a folder further up
    _run("npm", "install", "--silent", "--no-audit", "--no-fund", "@xen-orchestra/qcow2", "@vates/read-chunk", cwd=work)
    (work / "make.mjs").write_text(_XEN_ORCHESTRA, encoding="utf-8")
    raw = file_system(folder / "ext4-xo.raw", 4096, "2G")
    _run("node", "make.mjs", raw.resolve(), (folder / "xen-orchestra.qcow2").resolve(), cwd=work)


def mkimg(folder: Path) -> None:
    """Make images of both versions with FreeBSD's mkimg."""
    raw = file_system(folder / "ext4-mkimg.raw", 4096, "64M")
    for kind in ("qcow", "qcow2"):
        _run("mkimg", "-s", "gpt", "-f", kind, "-p", f"freebsd-ufs:={raw}", "-o", folder / f"mkimg.{kind}")


def main() -> int:
    """Make every image whose writer is there."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] += ":/sbin:/usr/sbin"
    for tool, make in (("e2image", e2image), ("npm", xen_orchestra), ("mkimg", mkimg)):
        if shutil.which(tool):
            make(folder)
        else:
            print(f"skipped: {tool} is absent", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
