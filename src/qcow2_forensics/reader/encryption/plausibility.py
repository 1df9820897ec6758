"""Whether a key of legacy AES, which nothing verifies, decrypts to what a disk can hold.

With a wrong key every sector decrypts to random bytes. A sector of 512 random bytes has 221 different
values, give or take 5; text, tables, code and zeros have far fewer. One such sector is enough.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ...errors import Qcow2Error
from ...format.header import SECTOR
from ...limits import KEY_CHECK_RUNS, KEY_CHECK_SECTORS
from ..mapping import Kind

if TYPE_CHECKING:
    from ..disk import Disk
    from . import Decryptor

_RANDOM = 185  # different values in a sector from which on it counts as random: eight standard deviations below


class Sample(NamedTuple):
    """How many sectors were decrypted, and how many of them are not random bytes."""

    sectors: int
    plain: int


def sample(disk: Disk, decryptor: Decryptor) -> Sample:
    """Decrypt some of the sectors that a disk stores; those whose stored bytes are not random are skipped."""
    sectors = plain = 0
    try:
        for run in islice(disk.mapping.runs(0, disk.size), KEY_CHECK_RUNS):
            if run.kind != Kind.DATA or run.host_offset is None:
                continue
            step = max(SECTOR, run.length // 16 // SECTOR * SECTOR)  # over the whole run
            for at in range(0, run.length - SECTOR + 1, step):
                stored = disk.host.read(run.host_offset + at, SECTOR)
                if len(stored) < SECTOR or len(set(stored)) < _RANDOM:
                    continue  # never written, or not encrypted: any key makes something of it
                sectors += 1
                data = decryptor.decrypt(stored, run.host_offset + at, run.offset + at)
                plain += len(set(data)) < _RANDOM
                if sectors == KEY_CHECK_SECTORS:
                    return Sample(sectors, plain)
    except Qcow2Error:  # what cannot be read is for the reads to report
        pass
    return Sample(sectors, plain)
