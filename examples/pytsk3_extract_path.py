#!/usr/bin/env python3
"""Extract one path from every state of a QCOW2 image that has it, in every partition.

    pytsk3_extract_path.py case.qcow2 /home/alice/diary.txt OUT

Writes OUT/0-before-incident-p1, OUT/1-during-incident-p1, OUT/2-active-p1 and prints their SHA-256.
"""

import hashlib
import re
import sys
from pathlib import Path

import pytsk3_qcow2
from pytsk3_qcow2.files import FileSystem, NoFileSystem, file_systems
from qcow2_forensics.text import printable


def extract(system: FileSystem, wanted: str, target: Path) -> str | None:
    """Write the file to ``target`` and return its SHA-256, None when this file system has no such path."""
    for record in system.records():
        if record.path == wanted and record.allocated and record.type == "r" and not record.stream:
            digest = hashlib.sha256()
            with target.open("xb") as out:
                for data in system.chunks(record):
                    digest.update(data)
                    out.write(data)
            return digest.hexdigest()
    return None


def main(path: str, wanted: str, folder: str) -> None:
    """Print one line per state and file system that has the path."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, state in enumerate(pytsk3_qcow2.states(path)):
        try:
            systems = file_systems(state)
        except NoFileSystem as error:
            print(f"{printable(state.state)}: {error}", file=sys.stderr)
            continue
        for system in systems:
            # A snapshot's name is evidence, not a file name.
            label = re.sub(r"[^A-Za-z0-9_.-]", "_", state.state)[:100]
            target = Path(folder) / f"{number}-{label}-p{system.volume.number}"
            digest = extract(system, wanted, target)
            print(f"{target}  {digest}" if digest else f"{printable(state.state)}: no such file")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
