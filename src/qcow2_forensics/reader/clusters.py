"""Compressed clusters, decoded once, in parallel, and ahead of sequential readers.

The codecs release the interpreter lock, so a few threads decode as fast as the machine can. What
is decoded ahead is bounded, and an error there is raised only to whoever reads that cluster.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import FormatError, Qcow2Error
from ..format.image import Image
from ..limits import KiB, MiB
from .cache import Fifo
from .mapping import Kind, Mapping, Run

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_WORKERS = min(4, os.cpu_count() or 1)
_TASK_MIN = 128 * KiB  # decoded by one task: smaller ones cost more to hand over than to do
_TASK_MAX = 512 * KiB
_AHEAD_MIN = 256 * KiB  # decoded ahead of a sequential reader at first, then twice as much each time
_AHEAD_MAX = 4 * MiB

_Key = tuple[int, int]  # host offset and size of a stream
_Batch = dict[_Key, bytes | FormatError]

_pool: ThreadPoolExecutor | None = None
_thread = threading.local()  # ``is_worker`` is set in the threads of the pool


def _shared_pool() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool for the process, made on first use
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor  # imports logging: not before it is needed

        _pool = ThreadPoolExecutor(_WORKERS, "qcow2-inflate", initializer=decode_here)
    return _pool


def decode_here() -> None:
    """Make the calling thread decode what it reads itself, without the pool: for threads that read in parallel anyway."""
    _thread.is_worker = True


def _in_worker() -> bool:
    # An image inside an image: the worker that decodes a cluster of the inner one reads the outer
    # one. Waiting for the pool there could wait for itself.
    return getattr(_thread, "is_worker", False)


def _forget_pool() -> None:
    global _pool  # noqa: PLW0603
    _pool = None  # its threads stayed in the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


class Clusters:
    """The decompressed clusters of one mapping.

    ``decode`` turns stream bytes into exactly one cluster or raises ``ValueError``. ``filled`` is
    called with how many bytes past the end of the file were taken for zeros to decode a cluster; without
    it a stream that needs such bytes is an error.
    """

    def __init__(
        self,
        image: Image,
        mapping: Mapping,
        decode: Callable[[bytes, int], bytes],
        filled: Callable[[int], None] | None = None,
    ) -> None:
        self._image = image
        self._mapping = mapping
        self._decode = decode
        self._filled = filled
        self._size = image.cluster_size
        self._parallel = _WORKERS > 1 and not getattr(image.source, "single_threaded", False)
        self._process = os.getpid()
        kept = max(4, image.limits.cluster_cache_bytes // self._size)
        self._cache: Fifo[_Key, bytes] = Fifo(kept)
        self.window = kept // 2  # runs that one call of prepare() may be given
        # Streams being decoded: first in, first out, so that what nobody fetches goes away.
        self._pending: Fifo[_Key, Future[_Batch]] = Fifo(kept)
        self._next = 2**64  # the guest offset at which a sequential reader goes on; nobody does yet
        self._horizon = 0  # up to where decoding ahead was started
        self._ahead = _AHEAD_MIN

    def read(self, run: Run) -> bytes:
        """Return the bytes of a COMPRESSED run."""
        inside = run.offset & (self._size - 1)
        cluster = self._cluster((run.host_offset or 0, run.size), run.offset - inside)
        return cluster if len(cluster) == run.length else cluster[inside : inside + run.length]

    def prepare(self, runs: list[Run]) -> None:
        """Start decoding what a read of ``runs`` needs, and what a sequential reader needs next.

        At most :attr:`window` runs: what is decoded must still be kept when its turn comes.
        """
        if not self._parallel or _in_worker():
            return
        wanted = [run for run in runs if run.kind == Kind.COMPRESSED]
        if not wanted:
            return
        first, last = wanted[0].offset, wanted[-1].offset + wanted[-1].length
        sequential = 0 <= first - self._next <= _AHEAD_MAX  # stored clusters may lie between
        self._next = last
        if len(wanted) > 1:
            self._start(wanted)
        if not sequential:
            self._horizon, self._ahead = last, _AHEAD_MIN
            return
        self._horizon = max(self._horizon, last)
        most = min(_AHEAD_MAX, self._image.limits.cluster_cache_bytes // 2)
        ahead = min(most, max(self._ahead, last - first, self._size))
        if self._horizon - last <= ahead // 2:
            start, self._horizon = -(-self._horizon // self._size) * self._size, last + ahead
            self._start(self._compressed_runs(start, self._horizon))
            self._ahead = 2 * ahead

    def _compressed_runs(self, start: int, end: int) -> Iterator[Run]:
        end = min(end, self._mapping.l1_size * self._mapping.table_span)
        if start < end:
            try:
                yield from (run for run in self._mapping.runs(start, end - start) if run.kind == Kind.COMPRESSED)
            except (Qcow2Error, OSError):
                return  # the read itself reports it

    def _start(self, runs: Iterable[Run]) -> None:
        if self._process != os.getpid():
            # After a fork: tasks of the parent will never finish here.
            self._process = os.getpid()
            self._pending.clear()
        wanted = {(run.host_offset or 0, run.size): run.offset & ~(self._size - 1) for run in runs}
        known = (self._cache.entries, self._pending.entries)
        todo = [(key, guest) for key, guest in wanted.items() if not any(key in entries for entries in known)]
        share = -(-len(todo) // _WORKERS) * self._size
        per_task = max(1, min(_TASK_MAX, max(_TASK_MIN, share)) // self._size)
        for first in range(0, len(todo), per_task):
            self._submit(todo[first : first + per_task])

    def _submit(self, batch: list[tuple[_Key, int]]) -> None:
        try:
            future = _shared_pool().submit(self._decode_batch, batch)
        except RuntimeError:  # at interpreter exit, or where no thread can be had: whoever reads it decodes it
            self._parallel = False
            return
        for key, _ in batch:
            self._pending.add(key, future)

    def _decode_batch(self, batch: list[tuple[_Key, int]]) -> _Batch:
        done: _Batch = {}
        for key, guest in batch:
            try:
                done[key] = self._load(key, guest)
            except FormatError as error:
                done[key] = error
            except Exception:  # noqa: BLE001, S112 - a failing source fails again for whoever reads this cluster
                continue
        return done

    def _cluster(self, key: _Key, guest: int) -> bytes:
        cluster = self._cache.entries.get(key)
        if cluster is not None:
            return cluster
        usable = self._process == os.getpid() and not _in_worker()
        future = self._pending.take(key) if usable else None
        if future is None:
            cluster = self._load(key, guest)
        else:
            for other, result in future.result().items():
                if isinstance(result, bytes):
                    self._cache.add(other, result)
                elif other == key:
                    raise result
            cluster = self._cache.entries.get(key) or self._load(key, guest)
        self._cache.add(key, cluster)
        return cluster

    def _load(self, key: _Key, guest: int) -> bytes:
        host, size = key
        stored = self._image.read(host, size)
        missing = size - len(stored)
        try:
            # Never padded at first: a cut stream with zeros after it can decode to wrong bytes.
            return self._decode(stored, self._size)
        except ValueError as error:
            why = error
        if missing and self._filled is not None:
            try:
                cluster = self._decode(stored.ljust(size, b"\0"), self._size)
            except ValueError as error:
                why = error
            else:
                self._filled(missing)
                return cluster
        cut = f", {missing} bytes past the end of the file" if missing else ""
        raise FormatError(
            f"the compressed cluster of guest offset {guest:#x} cannot be decoded: {why}{cut}",
            offset=host,
            field="compressed cluster",
        )
