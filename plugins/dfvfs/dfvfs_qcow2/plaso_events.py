"""Events from a snapshot or an inner image carry their display name, so that the stock psort shows it too.

The stock psort and Timesketch derive a display name from the path specification, and know nothing
of our snapshots and images. An event that has the attribute keeps it; other events are not
touched, and stay byte for byte what they are.
"""

from __future__ import annotations

from typing import Any

from plaso.engine import path_helper
from plaso.parsers import mediator as stock

from .names import labels_of
from .wrapping import wrap_method


def _produce_event_data(stock_method: Any, mediator: Any, event_data: Any, *args: Any, **kwargs: Any) -> None:
    if not getattr(event_data, "display_name", None):
        source = mediator._event_data_stream or mediator._file_entry
        path_spec = getattr(source, "path_spec", None)
        if labels_of(path_spec):
            event_data.display_name = path_helper.PathHelper.GetDisplayNameForPathSpec(path_spec)
    stock_method(mediator, event_data, *args, **kwargs)


wrap_method(stock.ParserMediator, "ProduceEventData", _produce_event_data)
