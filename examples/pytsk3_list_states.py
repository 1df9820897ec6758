#!/usr/bin/env python3
"""List a directory in every state of a QCOW2 image: each snapshot, then the active state.

pytsk3_list_states.py case.qcow2 /home/alice
"""

import sys

import pytsk3

import pytsk3_qcow2
from qcow2_forensics.text import printable


def first_file_system(image: pytsk3.Img_Info) -> pytsk3.FS_Info:
    """Return the file system of the first partition that has one, or of the whole disk."""
    try:
        offsets = [part.start * 512 for part in pytsk3.Volume_Info(image) if int(part.flags) == 1]
    except OSError:
        offsets = [0]  # no partition table
    for offset in offsets:
        try:
            return pytsk3.FS_Info(image, offset)
        except OSError:
            continue
    raise OSError("no file system was found")


def shown(entry: pytsk3.File) -> str:
    """Return a name from the image, safe for a terminal; deleted names are listed too, and say so."""
    name = printable(entry.info.name.name)
    deleted = int(entry.info.name.flags) == int(pytsk3.TSK_FS_NAME_FLAG_UNALLOC)
    return f"{name} (deleted)" if deleted else name


def main(path: str, directory: str = "/") -> None:
    """Print one line per state."""
    for state in pytsk3_qcow2.states(path):
        try:
            entries = first_file_system(state).open_dir(directory)
        except OSError as error:
            print(f"{printable(state.state)}: {error}")
            continue
        print(
            f"{printable(state.state)}: {', '.join(shown(entry) for entry in entries if entry.info.name.name not in (b'.', b'..'))}"
        )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
