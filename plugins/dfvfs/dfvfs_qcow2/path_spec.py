"""The QCOW path specification: the built-in one, which may also carry a password.

Without a password it has the attributes, the comparable string and the serialised form of the
built-in one, so hashes and ``.plaso`` files stay the same.
"""

from __future__ import annotations

from typing import Any

from dfvfs.path import factory, path_spec
from dfvfs.path import qcow_path_spec as stock

_Stock: Any = stock.QCOWPathSpec


class QCOWPathSpec(_Stock):
    """QCOW image path specification; ``password`` is an attribute only when one is given."""

    def __init__(self, password: str | None = None, parent: Any = None, **kwargs: Any) -> None:
        if not parent:
            raise ValueError("Missing parent value.")
        # Not the built-in one's: in dfVFS up to 20260411 it finds itself by its name in its module, which is ours now.
        path_spec.PathSpec.__init__(self, parent=parent, **kwargs)
        if password:
            self.password = password

    @property
    def comparable(self) -> str:
        """The key of caches and hashes; two passwords must not share an open file."""
        password = self.__dict__.get("password")
        if not password:
            # What the built-in class composes; asked for at every look-up, so written out.
            return f"{self.parent.comparable}type: QCOW\n"
        text: str = self._GetComparable(sub_comparable_string=f"password: {password}")
        return text


def register() -> None:
    """Replace the built-in class in the factory and in its own module."""
    if stock.QCOWPathSpec is not QCOWPathSpec:
        factory.Factory.DeregisterPathSpec(stock.QCOWPathSpec)
        factory.Factory.RegisterPathSpec(QCOWPathSpec)
        stock.QCOWPathSpec = QCOWPathSpec


register()
