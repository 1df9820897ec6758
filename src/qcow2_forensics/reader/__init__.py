"""Bytes as the guest saw them: mapping, codecs, encryption, backing files and states.

No numpy, but for long reads of encrypted images (``encryption.bulk``), which work without it.
"""
