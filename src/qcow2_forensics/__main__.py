"""The command ``qcow2-forensics``, and ``python -m qcow2_forensics``: the command line, imported where Ctrl-C is handled."""

import sys


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C while its modules are imported is no traceback either."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("qcow2-forensics: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
