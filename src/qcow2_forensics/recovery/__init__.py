"""States nobody lists any more, opened again: lost headers, lost L1 tables, former active states.

::

    for state in recovered_states("damaged.qcow2"):
        state.label, state.what, state.size, state.confidence
    disk, state = open_recovered("damaged.qcow2", 1)
    for piece in confidence_of(disk):       # tiles the disk: offset, length, confidence, reason
        ...                                 # of a deleted snapshot too
"""

from ..reader.damage_options import ASSUMPTIONS
from .assumptions import assumed
from .confidence import Confidence, SureRange
from .range_confidence import confidence_of
from .recovered_states import choose_recovered, has_tables, open_recovered, recovered_states, select_recovered
from .state import RecoveredState

__all__ = [
    "ASSUMPTIONS",
    "Confidence",
    "RecoveredState",
    "SureRange",
    "assumed",
    "choose_recovered",
    "confidence_of",
    "has_tables",
    "open_recovered",
    "recovered_states",
    "select_recovered",
]
