"""One pass over all metadata: who claims each host cluster against what its refcount says.

::

    census = take_census(image)
    census.check                         what ``qemu-img check --output=json`` prints, None where it aborts
    census.owner_runs()                  (offset, length, Owner) tiling the file: the allocation map
    census.free(), census.leaked()       (offset, length) of unclaimed clusters, refcount 0 or not
    census.tables()                      every L2 table once, in batches of entries for further rules

Only version 2 and 3 images of known geometry can be counted.
"""

from __future__ import annotations

from .census import Census
from .owners import GUEST_DATA, METADATA, Owner, Range, Tables
from .refcount_check import structure_of
from .survey import take_census

__all__ = ["GUEST_DATA", "METADATA", "Census", "Owner", "Range", "Tables", "structure_of", "take_census"]
