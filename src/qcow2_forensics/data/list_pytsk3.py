"""List /home/alice in every state of a QCOW2 image, with pytsk3: list_pytsk3.py demo.qcow2."""

import sys

import pytsk3
import pytsk3_qcow2

for image in pytsk3_qcow2.states(sys.argv[1]):
    file_system = pytsk3.FS_Info(image, offset=2048 * 512)
    entries = [entry.info.name for entry in file_system.open_dir("/home/alice")]
    names = [name.name.decode() for name in entries if name.flags == pytsk3.TSK_FS_NAME_FLAG_ALLOC]
    print(f"{image.state}: {', '.join(sorted(set(names) - {'.', '..'}))}")
