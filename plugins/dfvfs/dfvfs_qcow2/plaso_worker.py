"""What workers of log2timeline do with QCOW images: leave out what repeats, and look into images in file systems."""

from . import plaso_archives, plaso_changed  # noqa: F401 - each registers itself, now or when it is imported to its end
