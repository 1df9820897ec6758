"""The two sides of ``diff``: states of one image, states of two, other disks, and what a dirty bitmap marks.

::

    disk.qcow2 --from A --to B             two states of one image
    one.qcow2 two.raw --from A --to B      a state of each of two files
    disk.qcow2 --from bitmap:NAME          the active state, and what was written to since the bitmap began
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

from ..compare.ranges import Change, Difference, compare
from ..errors import Qcow2Error
from ..format.bitmap_directory import BitmapEntry, BitmapFlag
from ..format.image import Image
from ..format.source import FileSource
from ..reader.bitmaps import dirty_ranges
from ..reader.disk import Disk, Layer, RawDisk
from ..reader.foreign import open_foreign, probe
from ..reader.states import BITMAP, Backing, Choice, choose, find_bitmap, labels
from ..text import cut
from .options import chosen, open_layer


class Side(NamedTuple):
    """One side of the comparison: what to call it, the file it is in, and its disk."""

    label: str
    path: str
    disk: Layer


class Sides(NamedTuple):
    """Both sides. ``is_marked``: ranges are what a bitmap marks, and only the second side is a state."""

    before: Side
    after: Side
    is_marked: bool = False
    bitmap: BitmapEntry | None = None

    def ranges(self, progress: Callable[[int], None]) -> Iterator[Difference]:
        """Yield the ranges that differ, or may."""
        disk = self.after.disk
        if self.bitmap is None:
            yield from compare(self.before.disk, disk, progress=progress)
        elif isinstance(disk, Disk):
            for offset, length in dirty_ranges(disk.image, self.bitmap):
                yield Difference(offset, length, Change.MARKED)

    @property
    def is_trusted(self) -> bool:
        """Whether the ranges are all there are: a bitmap that was not saved, or is stale, lacks some."""
        disk = self.after.disk
        if self.bitmap is None or not isinstance(disk, Disk):
            return True
        saved = not self.bitmap.flags & BitmapFlag.IN_USE
        cut_short = self.bitmap.is_cut_short(disk.image.cluster_size, disk.image.disk_size)
        return saved and disk.image.bitmaps_current and not cut_short

    @property
    def warnings(self) -> Iterator[str]:
        """What must be known of the ranges, in words that are safe on a terminal."""
        disks = (self.before.disk, self.after.disk)
        unbacked = next((disk.unbacked for disk in disks if isinstance(disk, Disk) and disk.unbacked), None)
        if unbacked is not None:
            yield f"{unbacked}; what both states leave to it is equal, and the rest that needs it is not compared"
        if self.bitmap is not None:
            yield f"the bitmap marks ranges of {self.bitmap.granularity} bytes in which something was written"
        if not self.is_trusted:
            yield "the bitmap was not saved, is cut short, or was not kept up to date: it may lack what was written"


def sides_of(args: argparse.Namespace, stack: ExitStack) -> Sides:
    """Open what the options mean, until ``stack`` ends."""
    if args.other is not None:
        return Sides(_side(args, args.image, args.first, stack), _side(args, args.other, args.second, stack))
    if args.first is not None:
        with Image(args.image) as image:
            bitmap = find_bitmap(image, args.first)
        if bitmap is not None:
            return _marked(args, bitmap, stack)
    second = None if args.second is None else chosen(args.image, args.second)
    with Image(args.image) as image:
        label = labels(image.snapshots)
        first = _default(image, second) if args.first is None else choose(image, args.first)
    after = Side(label(second), args.image, _open(args, second, stack))
    return Sides(Side(label(first), args.image, _open(args, first, stack)), after)


def _default(image: Image, second: Choice) -> Choice:
    """Return the earlier state where none is named."""
    image.require("snapshots")  # which one is the last, or that there is none, is otherwise unknown
    if image.snapshots:
        return image.snapshots[-1] if second is None else None
    if image.backing_name is None:
        image.require("backing")
        raise Qcow2Error(f"{cut(image.name)} holds one state only: no snapshots and no backing file")
    return Backing()


def _open(args: argparse.Namespace, state: Choice, stack: ExitStack) -> Layer:
    """Open a state; a backing file that is not there is needed only where a state is read through to it."""
    return open_layer(args, state, stack, missing="refuse" if isinstance(state, Backing) else "raise")


# --- two files ---------------------------------------------------------------------------------------


def _side(args: argparse.Namespace, path: str, state: str | None, stack: ExitStack) -> Side:
    source = FileSource(path)
    kind = probe(source)
    if kind in ("qcow", "qcow2"):
        source.close()
        own = argparse.Namespace(**{**vars(args), "image": path})
        choice = None if state is None else chosen(path, state)
        with Image(path) as image:
            label = labels(image.snapshots)(choice)
        return Side(label, path, open_layer(own, choice, stack))
    disk: Layer = RawDisk(source) if kind == "raw" else open_foreign(kind, source)
    stack.callback(disk.close)
    if state is not None:
        raise Qcow2Error(f"{cut(path)} is not a QCOW image and has no states")
    return Side(kind, path, disk)


# --- bitmaps -----------------------------------------------------------------------------------------


def _marked(args: argparse.Namespace, bitmap: BitmapEntry, stack: ExitStack) -> Sides:
    if args.second is not None and chosen(args.image, args.second) is not None:
        raise Qcow2Error("a bitmap marks what was written up to the active state: leave out --to")
    disk = _open(args, None, stack)
    before = Side(f"{BITMAP}{bitmap.name}", args.image, disk)
    return Sides(before, Side("active", args.image, disk), is_marked=True, bitmap=bitmap)
