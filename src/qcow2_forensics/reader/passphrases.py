"""Passphrases: where a front door finds them, and which one opens which member of a chain.

Every member may have its own. A caller gives one, several, or a function that is asked for each member
by name; each is tried on each encrypted member, in the order given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import Locked, Qcow2Error
from ..limits import KEY_FILE_BYTES
from ..text import cut

Secret = str | bytes
Passphrase = Secret | Sequence[Secret] | Callable[[str], "Secret | Sequence[Secret] | None"] | None

PASSPHRASE_VARIABLE = "QCOW2_PASSPHRASE"  # noqa: S105 - the name of a variable, not a secret
KEY_FILE_VARIABLE = "QCOW2_PASSPHRASE_FILE"  # one file, or several separated as in PATH


def secrets(given: Passphrase, member: str) -> Iterator[bytes]:
    """Yield the passphrases to try on a member, each once."""
    answer = given(member) if callable(given) else given
    several: Iterable[Secret] = () if answer is None else [answer] if isinstance(answer, (str, bytes)) else answer
    seen: set[bytes] = set()
    for item in several:
        secret = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else bytes(item)
        if secret not in seen:
            seen.add(secret)
            yield secret


def from_file(path: str | os.PathLike[str]) -> list[bytes]:
    """Return what a key file holds: without the end of its line (CR LF or LF), then as it is.

    The second is what QEMU takes from a file. Raises OSError, and :class:`Qcow2Error` for a file that is too long.
    """
    with open(path, "rb") as file:
        content = file.read(KEY_FILE_BYTES + 1)
    if len(content) > KEY_FILE_BYTES:
        raise Qcow2Error(f"{cut(os.fspath(path))} is too long for a passphrase")
    line = content.removesuffix(b"\n")
    if line != content:
        line = line.removesuffix(b"\r")
    return [line] if line == content else [line, content]


def passphrases_from_files(paths: Iterable[str | os.PathLike[str]]) -> list[bytes]:
    """Return what several key files hold: every file's line, then every file as it is."""
    found = [from_file(path) for path in paths]
    return [item[0] for item in found] + [item[1] for item in found if len(item) > 1]


def passphrases_from_environment() -> list[bytes]:
    """Return the passphrases that ``QCOW2_PASSPHRASE_FILE`` and ``QCOW2_PASSPHRASE`` give; empty without."""
    named = os.environ.get(KEY_FILE_VARIABLE, "")
    paths = [named] if os.path.exists(named) else [item for item in named.split(os.pathsep) if item]
    value = os.environ.get(PASSPHRASE_VARIABLE)
    return [*passphrases_from_files(paths), *([os.fsencode(value)] if value is not None else [])]


def none_fits(method: str, member: str, tried: int) -> Locked:
    """Return the error of a member that no passphrase opens."""
    why = "it needs a passphrase" if tried == 0 else "no key slot accepts this passphrase"
    return Locked(method, why if tried < 2 else f"no key slot accepts any of the {tried} passphrases", member=member)
