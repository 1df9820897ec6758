"""Records as lines of The Sleuth Kit's tools. The formats themselves are part of the core package."""

from qcow2_forensics.files import body_line, fls_line, mode_text

__all__ = ["body_line", "fls_line", "mode_text"]
