"""What rules may look at: one image, and what can be worked out about it, each thing once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from ..errors import Qcow2Error
from ..findings import Evidence
from ..format.header import Header
from ..format.header_rules import Problem
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import DEFAULT_LIMITS, REPORTED_CHARACTERS, Limits
from ..reader.resolver import Resolver
from ..text import Value
from .rules import Depth

if TYPE_CHECKING:
    from ..census import Census, Subscriber

T = TypeVar("T")


def shortened(text: str) -> str:
    """Return a text from evidence for a report: a very long one is cut and says so."""
    return text if len(text) <= REPORTED_CHARACTERS else f"{text[:REPORTED_CHARACTERS]}... ({len(text)} characters)"


def snapshot_field(entry: SnapshotEntry, name: str, value: Value, place: str = "") -> Evidence:
    """Return a field of a snapshot table entry as evidence; ``place`` is the field meant, where ``name`` is not its name."""
    at, length = entry.place_of(place or name)
    return Evidence(name, value, at, length, "snapshot table", snapshot=shortened(entry.id))


def snapshot_fields(entry: SnapshotEntry, values: Mapping[str, Value]) -> Iterator[Evidence]:
    """Yield fields of a snapshot table entry as evidence, those that it has."""
    snapshot = shortened(entry.id)
    for name, value in values.items():
        if value is not None:
            at, length = entry.place_of(name)
            yield Evidence(name, value, at, length, "snapshot table", snapshot=snapshot)


# What rules want to see of every L2 table while the census is taken: from which depth on, and of which images.
_SUBSCRIBERS: list[tuple[type[Subscriber], Depth, Callable[[Image], bool]]] = []
K = TypeVar("K", bound="type[Subscriber]")


def subscribes(
    depth: Depth = Depth.STANDARD, wanted: Callable[[Image], bool] = lambda _image: True
) -> Callable[[K], K]:
    """Have a class see every L2 table while the census is taken; ``facts.census.seen(Class)`` is what it saw."""

    def register(kind: K) -> K:
        _SUBSCRIBERS.append((kind, depth, wanted))
        return kind

    return register


class _Failure(NamedTuple):
    """What remains of a question that ended in an error."""

    error: Qcow2Error | OSError


class Facts:
    """One image under audit. Everything expensive is computed on first use and kept.

    ``path`` is the host path of the image where there is one, else None: rules about backing
    and data files need it. What only some rules share they compute with :meth:`once`.
    """

    def __init__(
        self,
        image: Image,
        *,
        path: Path | None = None,
        depth: Depth = Depth.STANDARD,
        resolver: Resolver | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.image = image
        self.path = path
        self.depth = depth
        self.resolver = resolver
        self.limits = limits
        self.left_out: list[Evidence] = []
        self._memory: dict[Callable[[Facts], object], object] = {}

    @property
    def header(self) -> Header:
        """The header of the image."""
        return self.image.header

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster; sound where the image has a known geometry."""
        return self.image.header.cluster_size

    @property
    def has_census(self) -> bool:
        """Whether tables can be walked: version 2 or 3 with known geometry."""
        return self.image.has_geometry and self.header.version in (2, 3)

    @property
    def census(self) -> Census:
        """Who claims each host cluster, and what its refcount says; costs a pass over all metadata.

        Raises, each time, the error that stopped the pass; see :attr:`census_error`.
        """
        taken = self._census
        if not isinstance(taken, Exception):
            return taken
        raise taken

    @property
    def census_error(self) -> Qcow2Error | OSError | None:
        """Why the census could not be taken, None when it was."""
        taken = self._census
        return taken if isinstance(taken, Exception) else None

    @cached_property
    def _census(self) -> Census | Qcow2Error | OSError:
        from ..census import take_census

        wanted = [kind for kind, depth, is_wanted in _SUBSCRIBERS if depth <= self.depth and is_wanted(self.image)]
        if self.depth >= Depth.DEEP:
            from ..residue.hidden import subscribers

            wanted += subscribers(self.image)
        try:
            return take_census(self.image, wanted)
        except (Qcow2Error, OSError) as error:
            return error.with_traceback(None)  # its frames hold arrays

    def once(self, function: Callable[[Facts], T]) -> T:
        """Return ``function(self)``, computed once per audit and shared between rules; its error too."""
        if function not in self._memory:
            try:
                self._memory[function] = function(self)
            except (Qcow2Error, OSError) as error:
                self._memory[function] = _Failure(error.with_traceback(None))
        result = self._memory[function]
        if isinstance(result, _Failure):
            raise result.error
        return cast(T, result)

    def read(self, offset: int, length: int) -> bytes:
        """Return host bytes, fewer only at the end of the file."""
        return self.image.read(offset, length)

    def leave_out(self, what: str, count: int) -> None:
        """Note that the audit does not look at ``count`` of something, or does not list them."""
        if count > 0:
            self.left_out.append(Evidence(what, count, structure="left out"))

    # --- evidence ------------------------------------------------------------------------------

    def field(self, name: str, value: Value = None) -> Evidence:
        """Return a header field as evidence, with another reading of its value if given."""
        header = self.header
        place = next((field for field in header.fields if field.name == name), None)
        stored = getattr(header, name) if value is None else value
        if place is None:
            return Evidence(name, stored, structure="header")
        return Evidence(name, stored, place.offset, place.length, "header")

    def problems(self, code: str) -> tuple[Problem, ...]:
        """Return the problems of the image that belong to one code."""
        return tuple(problem for problem in self.image.problems if problem.code == code)

    def problem_evidence(self, problem: Problem, structure: str = "header") -> Evidence:
        """Return a problem as evidence: the field is what is wrong, the value is what is there."""
        what = f"{problem.field}: {problem.message}" if problem.field else problem.message
        place = next((field for field in self.header.fields if field.name == problem.field), None)
        length = place.length if place is not None and place.offset == problem.offset else None
        return Evidence(what, problem.value, problem.offset, length, structure)
