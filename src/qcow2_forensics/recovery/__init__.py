"""States nobody lists any more, opened again: lost headers, lost L1 tables, former active states.

::

    for state in recovered_states("damaged.qcow2"):
        state.label, state.what, state.size, state.confidence
    disk, state = open_recovered("damaged.qcow2", 1)
    for piece in state.ranges(disk):        # tiles the disk: offset, length, confidence, reason
        ...
"""

from .assumptions import ASSUMPTIONS, assumed
from .confidence import Confidence, SureRange
from .recovered_states import has_tables, open_recovered, recovered_states, select_recovered
from .state import RecoveredState

__all__ = [
    "ASSUMPTIONS",
    "Confidence",
    "RecoveredState",
    "SureRange",
    "assumed",
    "has_tables",
    "open_recovered",
    "recovered_states",
    "select_recovered",
]
