"""What the bytes mean: header, extensions, tables and their entries, and the rules they must meet.

No numpy and no policy. :class:`~qcow2_forensics.format.image.Image` is one file's metadata, read leniently.
"""
