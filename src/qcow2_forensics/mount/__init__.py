"""The states of an image as read-only files of a FUSE mount.

::

    files        one file: its name, times, bytes, and which ranges of it may hold anything but zeros
    folder       one image becomes a folder: a file per state, guest memory, the audit, a README
    filesystem   folders become a mounted file system, through mfusepy and libfuse

Only ``filesystem`` needs FUSE. Nothing here writes anywhere.
"""
