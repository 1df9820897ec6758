"""A report as something to read: nothing from evidence acts on the reader's screen or spreadsheet."""

from __future__ import annotations

import csv
import html.parser
import io
import json

import pytest

import qcow2_forensics
from qcow2_forensics.findings import Evidence, Finding, Report, Severity
from qcow2_forensics.render import FORMATS, render
from qcow2_forensics.render.plain import evidence_line
from qcow2_forensics.render.state_tree import STATES
from qcow2_forensics.text import TOOL, cell, columns, shown_value, size, wrap
from tests.pages import check_page

HOSTILE = "\x1b[31m<script>alert(1)</script>\u202egpj\x00=cmd|'/C calc'!A0 & \"q\" \udcff"


def report(*findings: Finding, **image: object) -> Report:
    facts = {"path": "disk.qcow2", "name": "disk.qcow2", "version": 3, "virtual_size": 1 << 30, **image}
    return Report(facts, findings, {"check-errors": 0, "total-clusters": 8, "allocated-clusters": 2}, "standard")


def hostile_report() -> Report:
    evidence = (Evidence("backing_file", HOSTILE, 504, 12, HOSTILE, 0, HOSTILE, HOSTILE),)
    finding = Finding("QCOW2-X", Severity.HIGH, HOSTILE, HOSTILE, evidence, explained_by=(HOSTILE,))
    states = [
        {"kind": "snapshot", "id": HOSTILE, "name": HOSTILE, "date": HOSTILE, "note": HOSTILE, "parent": None}
    ] * 2
    picture = {
        "cluster_size": 512,
        "per_cell": 1,
        "owners": [["snapshot:" + HOSTILE, HOSTILE]],
        "counts": [1],
        "cells": [[[0, 1]]],
    }
    facts = {"path": HOSTILE, "name": HOSTILE, "version": 3, "encryption": HOSTILE, "backing_file": HOSTILE}
    return Report(facts, (finding,), None, "deep", {"map": picture, "lineage": {"states": states}})


@pytest.mark.parametrize("as_format", FORMATS)
def test_text_from_evidence_carries_no_control_or_bidi_characters_into_any_format(as_format: str) -> None:
    shown = render(hostile_report(), as_format)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\r") or c == "\u202e" or 0xD800 <= ord(c) < 0xE000]
    shown.encode("utf-8")


def test_page_escapes_markup_and_runs_no_script() -> None:
    page = render(hostile_report(), "html")
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page


class _Tags(html.parser.HTMLParser):
    VOID = frozenset({"meta", "rect", "circle", "path", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in {"meta", "circle", "path", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_tag_of_the_page_is_closed_in_order_and_none_has_a_handler() -> None:
    parser = _Tags()
    parser.feed(render(hostile_report(), "html"))
    assert parser.open == []


def test_rows_of_folded_findings_lead_to_the_states_and_squares_that_are_drawn() -> None:
    number = STATES + 5
    states = [{"kind": "snapshot", "id": f"id{n}", "name": f"n{n}", "parent": None} for n in range(number)]
    picture = {"cluster_size": 512, "per_cell": 1, "owners": [["free", "Free"]], "counts": [4], "cells": [[[0, 1]]] * 4}
    findings = [
        Finding("QCOW2-SNAPSHOT", Severity.LOW, "t", "n", (Evidence("id", f"id{n}", 512, 8, snapshot=f"id{n}"),))
        for n in range(number)
    ]
    other = Finding("QCOW2-X", Severity.HIGH, "t", "n", (Evidence("host", 1, 1024, 8, snapshot=f"id{number - 1}"),))
    details = {"map": picture, "lineage": {"states": states}}
    page = check_page(render(Report({"path": "disk"}, (other, *findings), None, "deep", details), "html"))
    assert "#s0" in page.links
    assert f"#s{STATES - 1}" in page.links
    assert "#c2" in page.links
    assert "#f0" in page.links


def test_healthy_image_fits_on_one_screen() -> None:
    shown = render(report(Finding("QCOW2-WRITER-PROFILE", Severity.INFO, "Written by QEMU 5.2 or later", "note")))
    assert len(shown.splitlines()) <= 12
    assert "no errors" in shown
    assert "1 Info" in shown


def test_findings_are_grouped_worst_first() -> None:
    shown = render(
        report(
            Finding("QCOW2-LOW", Severity.LOW, "low", ""),
            Finding("QCOW2-CRITICAL", Severity.CRITICAL, "critical", ""),
            Finding("QCOW2-MEDIUM", Severity.MEDIUM, "medium", ""),
        )
    )
    assert shown.index("CRITICAL") < shown.index("MEDIUM") < shown.index("LOW")


def test_text_keeps_within_the_width_also_with_wide_characters() -> None:
    shown = render(report(Finding("QCOW2-X", Severity.HIGH, "漢字" * 60, "long " * 60)), width=60)
    assert max(columns(line) for line in shown.splitlines()) <= 60


def test_wrap_loses_no_character() -> None:
    line = "a" * 55 + " 漢字漢字漢字漢字漢字漢字漢字 short " + "b" * 7
    assert "".join("".join(wrap(line, 24)).split()) == "".join(line.split())


def test_no_colour_codes_unless_asked_for() -> None:
    finding = Finding("QCOW2-X", Severity.HIGH, "title", "")
    assert "\x1b" not in render(report(finding))
    assert "\x1b[1;31m" in render(report(finding), colour=True)


def test_capped_evidence_says_how_much_more_there_is() -> None:
    items = tuple(Evidence("host", n) for n in range(100))
    assert "and 4995 more" in render(report(Finding("QCOW2-X", Severity.HIGH, "t", "n", items, count=5000)))
    assert "and 4980 more" in render(report(Finding("QCOW2-X", Severity.HIGH, "t", "n", items, count=5000)), "html")


def test_a_shortened_list_of_evidence_is_mentioned_once_with_the_way_to_see_all() -> None:
    items = tuple(Evidence("host", n) for n in range(6))
    shown = render(report(*[Finding("QCOW2-X", Severity.HIGH, "t", "n", items)] * 3))
    assert shown.count("-v shows more of the evidence") == 1
    assert "-v shows" not in render(report(Finding("QCOW2-X", Severity.HIGH, "t", "n", items[:5])))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("entry, pointing at 0x20000", 1 << 62, "0x4000000000000000"),
        ("L2 entry mapping host cluster 0x20000", 0x20000, "0x20000"),
        ("copied flag disagrees with the refcount: entry", 9, "0x9"),
        ("places: copied flag disagrees with the refcount", 9, "9"),
        ("l1_table_offset", 4096, "0x1000"),
        ("snapshot table at 0x1000000, bytes", 1 << 20, "1048576 (1 MiB)"),
        ("vm_clock_nsec", 4_332_881_785, "4332881785 (4.332 s)"),
        ("nb_snapshots", 65536, "65536"),
        ("readable_fraction", 0.5, "0.50"),
    ],
)
def test_values_are_written_as_an_examiner_would_look_for_them(field: str, value: float, shown: str) -> None:
    assert shown_value(field, value) == shown


def test_evidence_gives_its_offset_and_how_many_bytes_it_is() -> None:
    assert evidence_line(Evidence("id", "1", 0x40, 1, "snapshot table", snapshot="1")) == (
        "id = 1  (at 0x40, 1 byte, snapshot table, snapshot 1)"
    )
    assert evidence_line(Evidence("the bitmap is cut", None, 0x40)) == "the bitmap is cut  (at 0x40)"


@pytest.mark.parametrize(
    ("check", "shown"), [({"corruptions": 1, "leaks": 2}, "1 corruption, 2 leaks"), ({}, "no err")]
)
def test_counters_are_counted_in_words(check: dict[str, int], shown: str) -> None:
    assert shown in render(Report({"path": "x"}, (), check, "standard"))


def test_reports_name_the_tool_and_its_version() -> None:
    assert TOOL in render(report(), "html")
    assert json.loads(render(report(), "json"))["tool"] == TOOL == f"qcow2-forensics {qcow2_forensics.__version__}"


def test_a_disk_with_one_state_has_no_tree() -> None:
    states = [{"kind": "active", "name": "active state"}]
    page = render(Report({"path": "x"}, (), None, "deep", {"lineage": {"states": states}}), "html")
    assert "States of the disk" not in page


def test_json_line_is_one_line_and_leaves_the_pictures_out() -> None:
    line = render(hostile_report(), "jsonl")
    assert line.count("\n") == 1
    data = json.loads(line)
    assert data["details"] == {}
    assert data["findings"][0]["evidence"][0]["value"] == HOSTILE


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "|calc", "%0A"])
def test_csv_text_never_starts_a_formula(text: str) -> None:
    shown = str(cell(text))
    assert not shown.startswith(("=", "+", "-", "@", "\t", "\r", "|", "%"))
    assert not shown.lstrip().startswith(("=", "+", "-", "@"))


def test_csv_keeps_numbers_as_numbers_and_has_one_row_per_evidence_item() -> None:
    finding = Finding("QCOW2-X", Severity.HIGH, "t", "n", (Evidence("a", -5, 16), Evidence("b", "text")), count=2)
    bare = Finding("QCOW2-Y", Severity.LOW, "t", "n")
    rows = list(csv.DictReader(io.StringIO(render(report(finding, bare), "csv"))))
    assert [(row["code"], row["field"], row["value"], row["offset"]) for row in rows] == [
        ("QCOW2-X", "a", "-5", "16"),
        ("QCOW2-X", "b", "text", ""),
        ("QCOW2-Y", "", "", ""),
    ]


def test_unknown_format_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="text, json, jsonl, csv, html"):
        render(report(), "xml")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 40, "1 TiB"), (1 << 70, "1024 EiB")],
)
def test_sizes_read_as_people_write_them(count: int, shown: str) -> None:
    assert size(count) == shown


def test_cell_shared_by_many_owners_still_shows_the_rarest() -> None:
    picture = {
        "cluster_size": 512,
        "per_cell": 1001,
        "owners": [["active", "Active data"], ["leaked", "Leaked"]],
        "counts": [1000, 1],
        "cells": [[[0, 1000], [1, 1]]],
    }
    page = render(Report({"path": "x"}, (), None, "deep", {"map": picture}), "html")
    heights = [float(part.split('"')[0]) for part in page.split('height="')[1:] if 'class="o-leaked"' in page]
    leaked = page.split('class="o-leaked"')[1].split('height="')[1].split('"')[0]
    assert heights
    assert float(leaked) >= 1.0


def test_branches_of_the_tree_have_columns_of_their_own() -> None:
    states = [
        {"kind": "snapshot", "id": str(number), "parent": parent} for number, parent in enumerate([None, 0, 0, 1, 2])
    ]
    page = render(Report({"path": "x"}, (), None, "deep", {"lineage": {"states": states}}), "html")
    columns_used = [part.split('"')[0] for part in page.split('cx="')[1:]]
    assert columns_used[0] == columns_used[1] == columns_used[3]
    assert columns_used[2] == columns_used[4] != columns_used[0]


def test_states_that_the_tree_does_not_have_are_counted() -> None:
    states = [{"kind": "snapshot", "id": str(number), "parent": None} for number in range(STATES + 5)]
    lineage = {"states": states, "left_out": 7}
    page = render(Report({"path": "x"}, (), None, "deep", {"lineage": lineage}), "html")
    assert f"{STATES + 12} states" in page
    assert "and 12 more states" in page


def test_tree_with_crafted_parents_is_drawn_all_the_same() -> None:
    states = [{"kind": "snapshot", "id": "1", "parent": parent} for parent in (5, -1, "x", 2, None)] * 100
    page = render(Report({"path": "x"}, (), None, "deep", {"lineage": {"states": states}}), "html")
    assert "and 300 more states" in page


# --- the page as part of a case ------------------------------------------------------------------


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: set[str] = set()

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name == "href":
                self.targets.add((value or "").removeprefix("#"))

    handle_startendtag = handle_starttag


def linked(page: str) -> _Links:
    links = _Links()
    links.feed(page)
    assert len(links.ids) == len(set(links.ids))
    assert links.targets <= set(links.ids)
    return links


def snapshots_report(count: int) -> Report:
    """A report of many snapshots, with both pictures."""
    findings = [
        Finding(
            "QCOW2-SNAPSHOT",
            Severity.LOW,
            "internal snapshot",
            "note",
            (Evidence("id", str(n), 4096 + n * 64, 1, "snapshot table", None, str(n)), Evidence("name", f"name {n}")),
            2,
        )
        for n in range(count)
    ]
    states = [{"kind": "snapshot", "id": str(n), "name": f"name {n}", "parent": None} for n in range(count)]
    picture = {
        "cluster_size": 4096,
        "per_cell": 1,
        "owners": [["header", "Header"], ["tables", "Tables"]],
        "counts": [1, 9],
        "cells": [[[0, 1]], *[[[1, 1]]] * 9],
    }
    return Report(
        {"path": "x.qcow2", "cluster_size": 4096},
        tuple(findings),
        None,
        "deep",
        {"map": picture, "lineage": {"states": states}},
    )


def test_findings_squares_and_states_lead_to_each_other() -> None:
    links = linked(render(snapshots_report(3), "html"))
    assert {"f0", "c1", "s0", "s2"} <= links.targets


def test_many_snapshots_fold_into_one_table_and_stay_linked() -> None:
    page = render(snapshots_report(300), "html")
    links = linked(page)
    assert page.count("<article") == 1
    assert "300 findings" in page
    assert "f299" in links.ids
    assert "name 299" in page


def test_a_finding_names_the_next_command_with_the_path_quoted() -> None:
    finding = Finding("QCOW2-INTERNAL-SNAPSHOTS", Severity.LOW, "title", "note")
    page = render(report(finding, path="my disk; rm -rf x.qcow2"), "html")
    assert "qcow2-forensics snapshots &#x27;my disk; rm -rf x.qcow2&#x27;" in page or (
        "qcow2-forensics snapshots 'my disk; rm -rf x.qcow2'" in page
    )


def test_a_snapshot_id_from_evidence_becomes_no_part_of_a_command_unless_it_is_a_number() -> None:
    from qcow2_forensics.render.next_commands import next_command

    def command(ident: str) -> str:
        items = (Evidence("id", ident, snapshot=ident),)
        return next_command(Finding("QCOW2-SNAPSHOT", Severity.LOW, "t", "n", items), "d.qcow2")

    assert command("7").endswith("--snapshot 7")
    assert command("7; reboot") == "qcow2-forensics export d.qcow2 snapshot.raw"


def test_more_clusters_than_the_disk_has_are_not_a_share_of_it() -> None:
    check = {"check-errors": 0, "total-clusters": 16, "allocated-clusters": 24579}
    page = render(Report({"path": "x"}, (), check, "standard"), "html")
    assert "24579 clusters allocated, more than the 16 of the disk" in page


def test_the_facts_of_a_run_are_on_the_page_escaped() -> None:
    run = {"case": HOSTILE, "examiner": "E", "files": [{"path": "/x", "sha256": "ab" * 32}]}
    page = render(Report({"path": "x"}, (), None, "standard", {"run": run}), "html")
    assert "&lt;script&gt;" in page
    assert "ab" * 32 in page


def test_a_fleet_is_one_page_worst_first() -> None:
    from qcow2_forensics.render.fleet_page import render_fleet

    bad = report(Finding("QCOW2-BAD", Severity.CRITICAL, HOSTILE, "n"), path=HOSTILE)
    page = render_fleet([report(path="good.qcow2").to_dict(), bad.to_dict(), hostile_report().to_dict()])
    linked(page)
    assert "<script" not in page.lower()
    assert page.index("Critical</span>") < page.index("good.qcow2")
    parser = _Tags()
    parser.feed(page)
    assert parser.open == []
