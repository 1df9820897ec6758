"""Every way the library can fail.

::

    Qcow2Error
    ├── NotQcow2(ValueError)             wrong magic, too short
    ├── FormatError                      offset, field: the bytes contradict the specification
    │   └── LimitExceeded                name, value, limit
    ├── Unsupported(NotImplementedError) feature: valid, not handled
    ├── SnapshotNotFound(LookupError)    wanted, choices: no such snapshot, or several of that name
    ├── MissingFile(FileNotFoundError)   role "backing" | "data", name, where it was looked for
    ├── ForbiddenReference               name, why: the policy refused to follow it
    ├── Locked(PermissionError)          method: needs a key, or the key is wrong
    └── ReadError(OSError)               offset, length: the evidence itself could not be read

``message`` is one sentence that holds names as the evidence has them; ``str(error)`` is that sentence
escaped by :func:`.text.printable`, safe on a terminal. What becomes part of another message, of a
finding or of JSON takes :func:`reason`, so that nothing is escaped twice. All errors survive
pickling, because they cross process borders in worker pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .text import cut, listed, printable, quoted

_MESSAGE_SHOWN = 8192  # characters: room for every choice that is listed
_CHOICES_SHOWN = 20  # snapshots listed in a message: an image may hold 65536


class Qcow2Error(Exception):
    """The root: catch this to catch everything the library raises on purpose."""

    def __init__(self, message: str) -> None:
        # ``args`` holds the message alone, also for the OSError family, whose own constructor
        # would read two arguments as errno and strerror.
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return printable(self.message, _MESSAGE_SHOWN)

    def __reduce__(self) -> tuple[Callable[..., Qcow2Error], tuple[object, ...]]:
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(kind: type[Qcow2Error], state: dict[str, object]) -> Qcow2Error:
    error = kind.__new__(kind, state.get("message"))
    error.args = (state.get("message"),)
    error.__dict__.update(state)
    return error


def reason(error: BaseException, limit: int = 1023) -> str:
    """Return the sentence of an error as the evidence has it, not escaped: to be part of data or of another message.

    Knows our errors also where an adapter has translated them to an OSError.
    """
    for origin in (error, error.__cause__):
        if isinstance(origin, Qcow2Error) and str(origin) == str(error):
            return cut(origin.message, limit)
    return cut(str(error), limit)


class NotQcow2(Qcow2Error, ValueError):
    """The file does not start as a QCOW image does."""


class FormatError(Qcow2Error):
    """The bytes contradict the specification; ``offset`` is a file offset in bytes or None."""

    def __init__(self, message: str, *, offset: int | None = None, field: str = "") -> None:
        where = "" if offset is None else f" (file offset {offset:#x})"
        super().__init__(f"{message}{where}")
        self.offset = offset
        self.field = field


class LimitExceeded(FormatError):
    """A number chosen by the image is above what we, or QEMU, accept."""

    def __init__(self, name: str, value: int, limit: int, *, offset: int | None = None) -> None:
        super().__init__(f"{name} is {value}, the limit is {limit}", offset=offset, field=name)
        self.name = name
        self.value = value
        self.limit = limit


class Unsupported(Qcow2Error, NotImplementedError):
    """Valid, but not handled here; ``feature`` says what."""

    def __init__(self, feature: str) -> None:
        super().__init__(f"not supported: {feature}")
        self.feature = feature


class SnapshotNotFound(Qcow2Error, LookupError):
    """No state, or more than one, is meant; ``choices`` lists spellings that mean one, as ``id (name)``.

    ``lack`` are words for what is missing where it is not a name; the choices follow them.
    """

    def __init__(self, wanted: str, choices: Iterable[str], *, ambiguous: bool = False, lack: str = "") -> None:
        self.choices = tuple(choices)
        held = listed(self.choices, _CHOICES_SHOWN) or "none"
        if lack:
            message = f"{lack}: {held}"
        elif ambiguous:
            message = f"{quoted(wanted)} is ambiguous; write one of: {held}"
        else:
            message = f"no snapshot {quoted(wanted)}; the image holds: {held}"
        super().__init__(message)
        self.wanted = wanted
        self.ambiguous = ambiguous


class MissingFile(Qcow2Error, FileNotFoundError):
    """A backing or data file the image names is not there; ``tried`` lists where we looked.

    ``member`` is the file that holds the name, ``remedy`` what the caller can do about it.
    """

    def __init__(self, role: str, name: str, tried: Iterable[str] = (), *, member: str = "", remedy: str = "") -> None:
        self.tried = tuple(tried)
        looked = f", looked for at {', '.join(map(cut, self.tried))}" if self.tried else ""
        super().__init__(f"{role} file {quoted(name)}{_named_by(member)} is missing{looked}{_then(remedy)}")
        self.role = role
        self.name = name
        self.member = member
        self.remedy = remedy


class ForbiddenReference(Qcow2Error):
    """The policy refused to follow a name found in an image; ``member`` is that image's file.

    ``remedy`` says what the caller can do to have it followed.
    """

    def __init__(self, name: str, why: str, *, member: str = "", remedy: str = "") -> None:
        super().__init__(f"reference {quoted(name)}{_named_by(member)} is not followed: {why}{_then(remedy)}")
        self.name = name
        self.why = why
        self.member = member
        self.remedy = remedy


def _named_by(member: str) -> str:
    return f" of {cut(member.rpartition('/')[2])}" if member else ""


def _then(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


class Locked(Qcow2Error, PermissionError):
    """The content is encrypted and no key, or the wrong one, was given."""

    def __init__(
        self, method: str, why: str = "a passphrase is needed", *, member: str = "", is_final: bool = False
    ) -> None:
        what = cut(member.rpartition("/")[2]) if member else "the image"
        super().__init__(f"{what} is encrypted ({method}): {why}")
        self.method = method
        self.member = member
        self.is_final = is_final  # no passphrase can open it


class ReadError(Qcow2Error, OSError):
    """The evidence itself could not be read."""

    def __init__(self, message: str, *, offset: int, length: int) -> None:
        super().__init__(f"{message} (file offset {offset:#x}, {length} bytes)")
        self.offset = offset
        self.length = length
