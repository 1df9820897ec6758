"""How two tables of a plugin are compared; ``test_volatility_evidence`` runs the plugin on two memories."""

from __future__ import annotations

import pytest

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

from volatility3.plugins.qcow2 import linux_kernel
from volatility3.plugins.qcow2.changes import Table, compared

from tests.volatility_tools import common  # loads our plugins

assert common
COLUMNS = ("PID", "Name", "State")


def table(*rows: tuple[str, str, str]) -> Table:
    return Table(COLUMNS, list(rows))


def test_rows_appear_vanish_and_change() -> None:
    before = table(("1", "init", "S"), ("2", "a", "S"), ("3", "b", "S"))
    after = table(("1", "init", "S"), ("3", "b", "R"), ("4", "\x1b[31m", "-"))
    assert list(compared(before, after, ("PID",))) == [
        ("changed", "PID=3; Name=b; State=R", "State: S -> R"),
        ("appeared", r"PID=4; Name=\x1b[31m", ""),
        ("vanished", "PID=2; Name=a; State=S", ""),
    ]


def test_without_columns_that_name_a_thing_a_change_is_one_row_less_and_one_more() -> None:
    found = list(compared(table(("1", "a", "S")), table(("1", "a", "R")), ()))
    assert [change for change, _, _ in found] == ["appeared", "vanished"]


def test_equal_rows_are_counted() -> None:
    row = ("1", "a", "S")
    assert list(compared(table(row, row), table(row, row), ())) == []
    assert len(list(compared(table(row), table(row, row, row), ()))) == 2


def test_addresses_come_out_of_a_symbol_file_whatever_the_order_of_its_fields() -> None:
    text = (
        '{"user_types": {"x": {"fields": {"init_top_pgt": {"offset": 8}}}}, "symbols": {"linux_banner": '
        '{"type": {"kind": "array", "subtype": {"kind": "base"}}, "address": 18446744071591428224},'
        '"init_top_pgt" : { "address": 7 }, "entry_SYSCALL_64": {"type": {"kind": "base"'
    )
    found = linux_kernel._find(text, ("linux_banner", "init_top_pgt", "entry_SYSCALL_64"))
    assert found == {"linux_banner": 18446744071591428224, "init_top_pgt": 7}
