"""psort words the events about snapshots; the stock psort lists their attributes."""

from __future__ import annotations

import os
from typing import Any

from plaso.output import mediator as stock

from .wrapping import wrap_method

_FORMATTERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "formatters.yaml")
_DATA_TYPE = "qcow2:snapshot"


def _read_formatters(stock_method: Any, mediator: Any, path: str) -> None:
    stock_method(mediator, path)
    if mediator.GetMessageFormatter(_DATA_TYPE) is None:
        mediator.ReadMessageFormattersFromFile(_FORMATTERS)


def register() -> None:
    """Wrap the method, once."""
    wrap_method(stock.OutputMediator, "ReadMessageFormattersFromDirectory", _read_formatters)


register()
