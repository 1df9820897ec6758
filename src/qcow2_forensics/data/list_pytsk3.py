"""List /home/alice in every state of a QCOW2 image, with pytsk3: list_pytsk3.py demo.qcow2."""

import sys

import pytsk3
import pytsk3_qcow2
from qcow2_forensics.text import printable

for image in pytsk3_qcow2.states(sys.argv[1]):
    file_system = pytsk3.FS_Info(image, offset=2048 * 512)
    entries = [entry.info.name for entry in file_system.open_dir("/home/alice")]
    names = [printable(name.name) for name in entries if name.flags == pytsk3.TSK_FS_NAME_FLAG_ALLOC]
    print(f"{printable(image.state)}: {', '.join(sorted(set(names) - {'.', '..'}))}")
