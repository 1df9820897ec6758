"""psort words the events about snapshots; the stock psort lists their attributes."""

from __future__ import annotations

import os
from typing import Any

from plaso.output import mediator as stock

from .names import DATA_TYPE
from .wrapping import wrap_method

_FORMATTERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "formatters.yaml")


def _look_up(stock_method: Any, mediator: Any, data_type: str) -> Any:
    """Answer for our data type from our file, read on first use; for all others as ever."""
    if data_type.lower() == DATA_TYPE and DATA_TYPE not in mediator._message_formatters:
        mediator.ReadMessageFormattersFromFile(_FORMATTERS)
    return stock_method(mediator, data_type)


wrap_method(stock.OutputMediator, "GetMessageFormatter", _look_up)
wrap_method(stock.OutputMediator, "GetSourceMapping", _look_up)
