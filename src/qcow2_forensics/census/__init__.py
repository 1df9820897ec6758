"""One pass over all metadata: who claims each host cluster against what its refcount says.

::

    census = take_census(image)
    census.check                         what ``qemu-img check --output=json`` prints, None where it aborts
    census.owner_runs()                  (starts, stops, Owner bits) of clusters with the same owners: the allocation map
    census.free(), census.leaked()       (offset, length) of unclaimed clusters, refcount 0 or not
    census.seen(Subscriber)              a fact gathered while every L2 table was walked, each once

Only version 2 and 3 images of known geometry can be counted.
"""

from __future__ import annotations

from .census import Census
from .index_map import IndexMap
from .owners import GUEST_DATA, METADATA, Owner, Range
from .refcount_check import structure_of
from .survey import take_census
from .walk import Subscriber, Tables

__all__ = [
    "GUEST_DATA",
    "METADATA",
    "Census",
    "IndexMap",
    "Owner",
    "Range",
    "Subscriber",
    "Tables",
    "structure_of",
    "take_census",
]
