#!/usr/bin/env python3
"""Hash every file in every state of a QCOW2 image, and report content that only one state holds.

pytsk3_hash_states.py case.qcow2
"""

import sys
from collections import defaultdict

import pytsk3_qcow2
from pytsk3_qcow2.files import NoFileSystem, file_systems
from qcow2_forensics.text import printable


def hashes(state: pytsk3_qcow2.Img_Info) -> dict[str, list[str]]:
    """Return the paths of each SHA-256 in one state; deleted and empty files are left out."""
    found: dict[str, list[str]] = defaultdict(list)
    for system in file_systems(state):
        for record in system.records():
            if record.type == "r" and record.allocated and record.size and not record.sparse:
                try:
                    found[system.sha256(record)].append(record.full_path)
                except OSError as error:
                    print(f"{printable(record.full_path)}: {error}", file=sys.stderr)
    return found


def main(path: str) -> None:
    """Print state, SHA-256 and path of what is in one state only."""
    by_state: list[tuple[str, dict[str, list[str]]]] = []
    for state in pytsk3_qcow2.states(path):
        try:
            by_state.append((state.state, hashes(state)))
        except NoFileSystem as error:
            print(f"{printable(state.state)}: {error}", file=sys.stderr)
    for at, (name, found) in enumerate(by_state):
        elsewhere = {digest for other, (_, theirs) in enumerate(by_state) if other != at for digest in theirs}
        for digest, paths in found.items():
            if digest not in elsewhere:
                print(f"{printable(name)}  {digest}  {', '.join(map(printable, paths))}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
