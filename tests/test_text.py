"""One home for words: what is escaped, how dates and sizes read, and the one table writer."""

from __future__ import annotations

import io
import json
import shutil
import subprocess

import pytest

from qcow2_forensics import text
from tests.tiers import every

# DerivedCoreProperties of the Unicode standard, Default_Ignorable_Code_Point, as ranges; the first
# test asks Perl, which has its own copy of the tables, where there is one.
DEFAULT_IGNORABLE = (
    (0x00AD, 0x00AD),
    (0x034F, 0x034F),
    (0x061C, 0x061C),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),
)
_PERL = (
    r"no warnings; for my $c (0..0x10ffff) { next if $c >= 0xd800 && $c < 0xe000;"
    r" print qq($c\n) if chr($c) =~ /\p{%s}/ }"
)


def _in_perl(name: str) -> set[int]:
    perl = shutil.which("perl")
    if perl is None:
        pytest.skip("perl is absent")
    done = subprocess.run([perl, "-e", _PERL % name], capture_output=True, text=True, check=True)
    return {int(line) for line in done.stdout.split()}


def test_the_ranges_here_are_those_of_the_standard() -> None:
    assert {code for first, last in DEFAULT_IGNORABLE for code in range(first, last + 1)} == _in_perl(
        "Default_Ignorable_Code_Point"
    )


@pytest.mark.parametrize("name", every(3, ["Bidi_Control", "White_Space", "Zs", "Cf", "Cc", "Variation_Selector"]))
def test_every_character_of_a_property_that_hides_is_escaped(name: str) -> None:
    shown = [code for code in _in_perl(name) - {0x20} if text.printable(chr(code)) == chr(code)]
    assert not shown, [f"U+{code:04X}" for code in shown]


def test_every_default_ignorable_character_is_escaped() -> None:
    for first, last in DEFAULT_IGNORABLE:
        for code in range(first, last + 1):
            assert text.printable(chr(code)).isascii(), f"U+{code:04X}"
            assert not text.is_plain(f"a{chr(code)}b")


@pytest.mark.parametrize("code", [0xA0, 0x1680, 0x2003, 0x202F, 0x205F, 0x2800, 0x3000, 0x16FE4, 0x1D159])
def test_a_blank_that_is_not_a_space_is_escaped(code: int) -> None:
    assert text.printable(f"a{chr(code)}b") != f"a{chr(code)}b"
    assert not text.is_plain(chr(code))


@pytest.mark.parametrize("shown", ["plain", "zwölf", "снимок", "スナップショット", "한글", "é", "a b", "ⵣ", "😀"])
def test_text_people_read_is_left_alone(shown: str) -> None:
    assert text.printable(shown) == shown
    assert text.is_plain(shown)


def test_what_is_plain_is_shown_as_it_is() -> None:
    for code in range(0x30000):
        character = chr(code)
        if character != "\\":
            assert text.is_plain(character) == (text.printable(character) == character), f"U+{code:04X}"


# --- dates ---------------------------------------------------------------------------------------


def test_a_date_is_shown_to_the_microsecond() -> None:
    assert text.snapshot_date(1_700_000_000, 123_456_000) == "2023-11-14T22:13:20.123456Z"
    assert text.snapshot_date(1_700_000_000, 123_456_789) == "2023-11-14T22:13:20.123456789Z"
    assert text.short_date(1_700_000_000, 123_456_789) == "2023-11-14 22:13:20"
    assert text.snapshot_time(1_700_000_000, 123_456_789) == 1_700_000_000_123_456_789


@pytest.mark.parametrize("nanoseconds", [10**9, 1_500_000_000, 2**32 - 1])
def test_a_fraction_that_is_none_is_shown_beside_the_second(nanoseconds: int) -> None:
    shown = text.snapshot_date(1_700_000_000, nanoseconds)
    assert shown == f"2023-11-14T22:13:20Z (nsec {nanoseconds} out of range)"
    assert (
        text.short_date(1_700_000_000, nanoseconds, " UTC")
        == f"2023-11-14 22:13:20 UTC (nsec {nanoseconds} out of range)"
    )
    assert text.snapshot_time(1_700_000_000, nanoseconds) == 1_700_000_000_000_000_000


def test_a_fraction_of_a_second_is_never_rounded_to_one() -> None:
    assert text.shown_value("date_nsec", 999_999_999) == "999999999 (0.999 s)"
    assert text.shown_value("vm_clock_nsec", 2**64 - 1) == "18446744073709551615 (18446744073.709 s)"


def test_every_second_an_image_can_record_is_a_date() -> None:
    assert text.snapshot_date(2**32 - 1, 0) == "2106-02-07T06:28:15.000000Z"


# --- tables --------------------------------------------------------------------------------------

_TABLE = (
    text.Column("name", "NAME"),
    text.Column("size", "SIZE", lambda row: text.size(row["size"]), right=True),
)
_ROWS = [{"name": "a\\b\x1b", "size": 10}, {"name": "=1+1", "size": 2048}, {"name": "\udcff", "size": 0, "more": None}]


def _written(as_format: str, table: tuple[text.Column, ...] = _TABLE) -> str:
    out = io.StringIO()
    text.write_table(iter(_ROWS), table, as_format, out)
    return out.getvalue()


def test_a_table_for_people_is_aligned_and_escaped() -> None:
    assert _written("text").splitlines() == [
        "NAME       SIZE",
        "a\\\\b\\x1b   10 B",
        "=1+1      2 KiB",
        "\\xff        0 B",
    ]


def test_a_table_with_widths_is_written_as_its_rows_come() -> None:
    table = (_TABLE[0]._replace(width=6), _TABLE[1]._replace(width=5))
    assert _written("text", table).splitlines()[2] == "=1+1    2 KiB"


@pytest.mark.parametrize("as_format", ["json", "jsonl"])
def test_json_holds_the_text_of_the_evidence(as_format: str) -> None:
    shown = _written(as_format)
    assert shown.isascii()
    assert (json.loads(shown) if as_format == "json" else [json.loads(line) for line in shown.splitlines()]) == _ROWS


def test_json_without_rows_is_an_empty_array() -> None:
    out = io.StringIO()
    text.write_table([], _TABLE, "json", out)
    assert json.loads(out.getvalue()) == []


def test_csv_starts_no_formula() -> None:
    assert _written("csv").split("\r\n") == ["name,size", "a\\\\b\\x1b,10", "'=1+1,2048", "\\xff,0", ""]
