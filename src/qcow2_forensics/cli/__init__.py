"""The ``qcow2-forensics`` command: parses, calls, prints, returns an exit code.

Each subcommand is a module here with ``HELP`` for the list of commands, ``DESCRIPTION`` and ``EPILOG`` for its own help,
``add_arguments(parser)``, and ``run(args)``, which returns the exit code: 0 done, 1 findings at or above ``--fail-on``,
2 could not complete. Errors are one sentence on standard error.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import FormatError, NotQcow2, Qcow2Error
from ..format.source import remembering_sources
from ..text import TOOL, printable
from .notes import showing_notes

COMMANDS = (
    "examine",
    "info",
    "audit",
    "snapshots",
    "map",
    "export",
    "memory",
    "mount",
    "serve",
    "diff",
    "timeline",
    "residue",
    "demo",
    "doctor",
)

# They compute over whole tables. numpy is imported for them before anything else is: where many calls are under way,
# CPython may map and unmap a piece of its stack at each of thousands more, a tenth of the time of a short command.
# With any of the words beside them they do not.
_HELP = frozenset({"-h", "--help"})
_COMPUTING = {
    "audit": _HELP | {"triage", "--depth=triage"},
    "diff": _HELP,
    "examine": _HELP,
    "memory": _HELP,
    "residue": _HELP,
    "timeline": _HELP | {"--no-files"},
}

_DAMAGED = (
    "; --salvage writes what can be read, qcow2-forensics snapshots IMAGE --recovered lists what may be put together"
)

EXIT_DONE = 0
EXIT_FINDINGS = 1
EXIT_FAILED = 2
EXIT_INTERRUPTED = 130

_EPILOG = """examples:
  qcow2-forensics examine disk.qcow2 case-17/
  qcow2-forensics audit disk.qcow2
  qcow2-forensics snapshots disk.qcow2
  qcow2-forensics export disk.qcow2 state.raw --snapshot before-incident
  qcow2-forensics diff disk.qcow2 --from before-incident --to active --files
  qcow2-forensics demo

Evidence is only ever read. "qcow2-forensics COMMAND --help" shows more examples.
"""


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph, not at hyphens, and keeps the lines of one with indented lines: of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            part if "\n " in part else "\n".join(f"{indent}{line}" for line in self._split_lines(part, width))
            for part in paragraphs
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        import textwrap  # here: only help texts are wrapped

        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations: ``--passphrase SECRET`` must not pass for the option with a file name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Take positionals that may be left out after an option, too: argparse looks for them in one place only."""
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            if action.nargs == "?" and _is_positional(rest) and getattr(parsed, action.dest) == action.default:
                setattr(parsed, action.dest, rest.pop(0))
            while action.nargs == "*" and _is_positional(rest):
                setattr(parsed, action.dest, [*getattr(parsed, action.dest), rest.pop(0)])
        return parsed, rest


def _is_positional(words: list[str]) -> bool:
    return bool(words) and (words[0] == "-" or not words[0].startswith("-"))


def add_image_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional IMAGE."""
    parser.add_argument("image", metavar="IMAGE", help="a QCOW2 (or QCOW) image; it is only read")


def add_images_argument(parser: argparse.ArgumentParser, number: str = "+") -> None:
    """Add the positional IMAGE of commands that take several; ``number`` is how many, as in argparse."""
    parser.add_argument("images", metavar="IMAGE", nargs=number, help="QCOW2 (or QCOW) images; they are only read")


def add_format_argument(parser: argparse.ArgumentParser, formats: Sequence[str] = ("text", "json")) -> None:
    """Add the option for the output format, the first by default."""
    words = f"output format (default: {formats[0]})"
    parser.add_argument("--format", choices=formats, default=formats[0], help=words)


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser with the given subcommands; all of them by default."""
    parser = argparse.ArgumentParser(
        prog="qcow2-forensics",
        description="Read, audit and compare QCOW2 disk images as evidence.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=TOOL)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in commands:
        module = importlib.import_module(f".{command}", __name__)
        own = subparsers.add_parser(command, help=module.HELP, description=module.DESCRIPTION, epilog=module.EPILOG)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    # Only the module of the command asked for is imported: start-up time is part of triage.
    commands = given[:1] if given and given[0] in COMMANDS else COMMANDS
    args = argparse.Namespace()
    try:
        if all(command in _COMPUTING and _COMPUTING[command].isdisjoint(given) for command in commands):
            importlib.import_module("numpy")
        args = build_parser(commands).parse_args(given)  # imports the command's module, which takes its time
        args.given = given
        with remembering_sources(), showing_notes():
            return int(args.run(args))
    except NotQcow2 as error:
        path = getattr(args, "image", None)
        return fail(f"{error}{_data_file_hint(path) or _tables_hint(path)}")
    except FormatError as error:
        wants_all = getattr(args, "salvage", True) is False
        return fail(f"{error}{_DAMAGED if wants_all else ''}")
    except Qcow2Error as error:
        return fail(str(error))
    except BrokenPipeError:
        # The reader of our output went away; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        name = f"{printable(str(error.filename))}: " if error.filename else ""
        return fail(f"{name}{printable(str(error.strerror or error))}")
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED


def _data_file_hint(path: object) -> str:
    """Return which image beside a raw file names it as its data file; empty for any other file."""
    from ..reader.raw_data import to_open_instead

    sentence = to_open_instead(path) if isinstance(path, str) else ""
    return sentence and f"; {sentence}"


def _tables_hint(path: object) -> str:
    """Return what to try where a file has no header but the tables of a QCOW2 image; empty for any other file."""
    if not isinstance(path, str):
        return ""
    try:
        from ..recovery import has_tables

        found = has_tables(path)
    except (Qcow2Error, ImportError, OSError):
        found = False
    if not found:
        return ""
    return (
        "; tables of a QCOW2 image are here: try qcow2-forensics snapshots IMAGE --recovered, then "
        "qcow2-forensics export IMAGE OUT --snapshot recovered:1"
    )


def complain(sentence: str) -> None:
    """Print a sentence about the run on standard error."""
    print(f"qcow2-forensics: {sentence}", file=sys.stderr)


def fail(message: str) -> int:
    """Print one sentence on standard error and return the exit code for failure."""
    complain(message)
    return EXIT_FAILED
