#!/usr/bin/env python3
"""Make the demo image with the real tools: QEMU, sfdisk, mkfs.ext4 and debugfs.

    tools/make_demo.py src/qcow2_forensics/data/demo.qcow2.xz

The machine is a 16 MiB PC that runs the boot sector below and halts. Its disk has one ext4
partition. Three states: snapshot ``baseline`` (disk only), snapshot ``intrusion`` (with the
machine's memory), and the active state, in which the intruder has cleaned up.
"""

from __future__ import annotations

import lzma
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DISK_SIZE = 12 * 2**20
PARTITION = 2048 * 512
CHUNK = 64 * 2**10
MESSAGE = (
    b"Linux version 0.0.0 (no kernel: the demo of qcow2-forensics put this line across a page border of guest memory)"
)
CLOCK = "20260504090000"

STATES = {
    "baseline": {
        "write": {
            "/home/alice/plan.txt": b"Quarterly plan: audit every image before it is archived.\n",
            "/home/alice/secret_key.txt": b"-----BEGIN DEMO KEY-----\nnot a real key\n-----END DEMO KEY-----\n",
            "/var/log/syslog": b"May  4 08:59:01 demo cron[214]: (root) CMD (run-parts /etc/cron.hourly)\n",
        },
        "remove": [],
    },
    "intrusion": {
        "write": {
            "/home/alice/.cache_helper": b"#!/bin/sh\n# C2-CALLBACK demo\nwhile :; do sleep 60; done\n",
            "/var/log/dropper.log": b"May  4 09:12:40 demo dropper: unpacked .cache_helper\n",
        },
        "remove": ["/home/alice/secret_key.txt"],
    },
    "active": {
        "write": {"/home/alice/readme.txt": b"Nothing to see here.\n"},
        "remove": ["/home/alice/.cache_helper", "/var/log/dropper.log"],
    },
}


def boot_sector() -> bytes:
    """Code that copies MESSAGE to 0x10ff0, across a page border, and halts."""
    head = bytes.fromhex("31c0 8ed8 be0000 b80010 8ec0 bff00f b90000 f3a4 fa f4 ebfd")
    code = bytearray(head + MESSAGE)
    struct.pack_into("<H", code, 5, 0x7C00 + len(head))
    struct.pack_into("<H", code, 16, len(MESSAGE))
    return bytes(code)


def run(*command: str | Path, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]


def debugfs(file_system: Path, state: dict[str, object], folder: Path, minute: int) -> None:
    commands = []
    for number, (path, content) in enumerate(state["write"].items()):  # type: ignore[attr-defined]
        source = folder / f"content{minute}-{number}"
        source.write_bytes(content)
        commands.append(f"write {source} {path}")
    commands += [f"rm {path}" for path in state["remove"]]  # type: ignore[attr-defined]
    stamp = int(time.mktime(time.strptime(CLOCK, "%Y%m%d%H%M%S"))) + minute * 60
    run(
        "debugfs",
        "-w",
        "-f",
        "/dev/stdin",
        file_system,
        input="\n".join(commands).encode(),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "E2FSPROGS_FAKE_TIME": str(stamp), "TZ": "UTC"},
    )


def write_changes(image: Path, before: bytes, after: bytes, folder: Path) -> None:
    """Write into the qcow2, through QEMU, the chunks that differ."""
    for at in range(0, len(after), CHUNK):
        piece = after[at : at + CHUNK]
        if piece != before[at : at + CHUNK]:
            source = folder / "chunk"
            source.write_bytes(piece)
            run("qemu-io", "-f", "qcow2", "-c", f"write -q -s {source} {at} {len(piece)}", image)


def save_memory(image: Path, name: str, folder: Path) -> None:
    """Start the machine on the image, let it run its boot sector, and ``savevm``."""
    monitor = folder / "monitor"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults", "-net", "none"]
    command += ["-drive", f"file={image},if=ide,format=qcow2", "-rtc", "base=2026-05-04T09:12:00"]
    command += ["-monitor", f"unix:{monitor},server,nowait"]
    machine = subprocess.Popen(command)
    try:
        time.sleep(4)
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(30)
            control.connect(str(monitor))
            control.sendall(f"stop\nsavevm {name}\nquit\n".encode())
            while control.recv(65536):
                pass
        machine.wait(timeout=30)
    finally:
        machine.kill()


def main(target: Path) -> None:
    os.environ["TZ"] = "UTC"
    time.tzset()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, file_system, image = folder / "disk.raw", folder / "fs.raw", folder / "demo.qcow2"
        tree = folder / "tree"
        for path in ("home/alice", "var/log", "etc"):
            (tree / path).mkdir(parents=True)
        (tree / "etc/hostname").write_text("demo\n")
        stamp = int(time.mktime(time.strptime(CLOCK, "%Y%m%d%H%M%S")))
        for path in (tree, *tree.rglob("*")):
            os.utime(path, (stamp, stamp))
        file_system.touch()
        os.truncate(file_system, DISK_SIZE - PARTITION)
        run("mkfs.ext4", "-q", "-L", "DEMO", "-U", "6f2a1f0e-0000-4000-8000-646f6d650001", "-O", "^has_journal",
            "-E", "hash_seed=6f2a1f0e-0000-4000-8000-646f6d650002", "-N", "256", "-d", tree, file_system,
            env={**os.environ, "E2FSPROGS_FAKE_TIME": str(stamp)})  # fmt: skip
        raw.touch()
        os.truncate(raw, DISK_SIZE)
        run("sfdisk", "-q", raw, input=b"label: dos\nlabel-id: 0x646f6d65\n2048,,83,*\n")
        content = bytearray(raw.read_bytes())
        code = boot_sector()
        content[: len(code)] = code
        before = bytes(DISK_SIZE)
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(DISK_SIZE))
        for minute, (state, changes) in enumerate(STATES.items()):
            debugfs(file_system, changes, folder, minute * 10)
            content[PARTITION:] = file_system.read_bytes()
            write_changes(image, before, bytes(content), folder)
            before = bytes(content)
            if state == "baseline":
                run("qemu-img", "snapshot", "-c", state, image)
            elif state == "intrusion":
                save_memory(image, state, folder)
        run("qemu-img", "check", "-q", image)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(lzma.compress(image.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{target}: {target.stat().st_size} bytes, {image.stat().st_size} unpacked")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
