"""One pass over all metadata: who claims each host cluster against what its refcount says.

::

    census = take_census(image)
    census.check                         what ``qemu-img check --output=json`` prints, None where it aborts
    census.owner_runs()                  (starts, stops, Owner bits) of clusters with the same owners: the allocation map
    census.free(), census.leaked()       (offset, length) of unclaimed clusters, refcount 0 or not
    census.seen(Subscriber)              a fact gathered while every L2 table was walked, each once

Only version 2 and 3 images of known geometry can be counted.
"""

from typing import TYPE_CHECKING

from .. import at_first_use

if TYPE_CHECKING:
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

# Comparing two states takes the decoder of L2 tables from this package, and nothing else.
__getattr__ = at_first_use(
    __name__,
    {
        "GUEST_DATA": "owners",
        "METADATA": "owners",
        "Census": "census",
        "IndexMap": "index_map",
        "Owner": "owners",
        "Range": "owners",
        "Subscriber": "walk",
        "Tables": "walk",
        "structure_of": "refcount_check",
        "take_census": "survey",
    },
)
