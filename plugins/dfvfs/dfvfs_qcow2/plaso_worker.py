"""What workers of log2timeline do with QCOW images: leave out what repeats, and look into images in file systems."""

from . import plaso_archives, plaso_changed

plaso_archives.register()
plaso_changed.register()
