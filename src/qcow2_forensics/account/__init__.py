"""Every byte of an image accounted for: structure, shown to some state, or a remainder that is looked at."""
