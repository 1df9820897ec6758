"""The QCOW path specification: the built-in one, which may also carry a password.

Without a password it has the attributes, the comparable string and the serialised form of the
built-in one, so hashes and ``.plaso`` files stay the same.

``dfvfs.path`` of 20260924 does not import the path specification of LUKS volumes, so psort and pinfo cannot
read a storage file that has some. Where it is missing it is imported here; docs/dfvfs.md has the patch.
"""

from __future__ import annotations

from typing import Any

from dfvfs.lib import definitions
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
            parent = self.parent
            return f"{parent.comparable}type: QCOW\n" if parent else "type: QCOW\n"
        text: str = self._GetComparable(sub_comparable_string=f"password: {password}")
        return text


def register() -> None:
    """Replace the built-in class in the factory and in its own module; register what dfVFS left out."""
    if stock.QCOWPathSpec is not QCOWPathSpec:
        factory.Factory.DeregisterPathSpec(stock.QCOWPathSpec)
        factory.Factory.RegisterPathSpec(QCOWPathSpec)
        stock.QCOWPathSpec = QCOWPathSpec
    if definitions.TYPE_INDICATOR_LUKSDE not in factory.Factory._path_spec_types:
        from dfvfs.path import luksde_path_spec  # noqa: F401 - registers itself


register()
