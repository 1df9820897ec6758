"""The page of an examination: what was found, what was not looked at and why, and the way to every part.

Takes what ``examination.json`` holds. Files of the parts lie beside the page; their names are ours, nothing from
evidence is part of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..findings import Severity
from ..memory.model import REGISTERS_SHOWN
from ..text import cut, html_only, listed, markup, plural, sentence, shown_value, size
from .fleet_page import render_fleet
from .page import Row, badge, fact_table, page, run_facts, severity_class, table

_FOLDED = 40  # rows of a table that are still shown unfolded
_ROWS = 2000  # of a table; the files of the part have all of them
_PARTS = 12  # shown unfolded
_NAMED = 5  # parts that have one reason in common

Part = Mapping[str, Any]


def render_examination(data: Mapping[str, Any]) -> str:
    """Return the page of one image."""
    parts: Sequence[Part] = data["parts"]
    audit = next((part for part in parts if part["kind"] == "audit"), None)
    title = markup(str(data["image"]).rpartition("/")[2] or data["image"], 200)
    shown = [
        f"<h1>{title}</h1>",
        *_head(audit),
        f"<p>{_pages(parts)}</p>",
        *run_facts(data["run"]),
        *_not_looked_at(data),
        *_findings(audit),
        *_states(parts),
        *_changes(parts),
        *_memories(parts),
        *_residue(parts),
        *_next(data["next"]),
        *_parts(parts),
    ]
    found = audit["facts"].get("findings", ()) if audit is not None else ()
    return page(f"Examination of {title}", shown, (Severity.parse(finding["severity"]) for finding in found))


def render_examinations(images: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> str:
    """Return the page over several images, each with its own page in a folder."""
    links = {image["image"]: f"{image['folder']}/index.html" for image in images}
    rows = [
        Row((f'<a href="{links[image["image"]]}">{markup(image["image"], 4096)}</a>', *_unseen(row)))
        for image in images
        for row in by_reason(image["not_looked_at"])
    ]
    extra = [*run_facts(run), *_warning(("image", "what", "why"), rows)]
    return render_fleet([image["report"] or _without_report(image) for image in images], links=links, extra=extra)


def _without_report(image: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"image": {"path": image["image"]}, "findings": []}


def by_reason(items: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what was not looked at and why, those with one reason together; the names are as the evidence has them."""
    grouped: dict[str, list[str]] = {}
    for item in items:
        grouped.setdefault(item["why"], []).append(item["part"])
    return [(listed([cut(name, 100) for name in names], _NAMED), why) for why, names in grouped.items()]


# --- what was found --------------------------------------------------------------------------------


def _head(audit: Part | None) -> Iterator[str]:
    facts = audit["facts"] if audit is not None else {}
    if not facts:
        yield "<p>The audit gave nothing.</p>"
        return
    yield f"<p>{markup(facts['heading'])}</p>"
    if facts["check"]:
        yield f"<p>Check: {html_only(facts['check'])}</p>"
    found = [(Severity.parse(name), count) for name, count in facts["severities"].items() if count]
    badges = [badge(level, f"{count} {level.label}") for level, count in sorted(found, reverse=True)]
    yield f"<p>{' '.join(badges) or badge(None, 'no findings')}</p>"


def _pages(parts: Sequence[Part]) -> str:
    """Return links to the pages of the parts that every image has, and to this page as data."""
    kinds = (("audit", "audit"), ("timeline", "timeline"))
    shown = [f"{label}: {_links(parts, kind)}" for kind, label in kinds]
    return "; ".join([*shown, '<a href="examination.json">this page as data</a>'])


def _not_looked_at(data: Mapping[str, Any]) -> Iterator[str]:
    yield from _warning(("what", "why"), [Row(_unseen(row)) for row in by_reason(data["not_looked_at"])])
    if not data["not_looked_at"]:
        yield "<p>Everything that was asked for was looked at.</p>"
    if data["left_out"]:
        yield f"<p class='quiet'>Left out by the options: {'; '.join(markup(item) for item in data['left_out'])}.</p>"


def _unseen(row: tuple[str, str]) -> tuple[str, str]:
    what, why = row
    return markup(what), html_only(why)


def _warning(columns: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        yield "<section class='warning'><h2>Not looked at, or not completely</h2>"
        yield from _folded(columns, rows, "row")
        yield "</section>"


def _findings(audit: Part | None) -> Iterator[str]:
    found = audit["facts"].get("findings", ()) if audit is not None else ()
    if not found:
        return
    yield "<h2>Findings</h2>"
    rows = []
    for finding in found:
        severity = Severity.parse(finding["severity"])
        times = f" <span class='quiet'>×{finding['number']}</span>" if finding["number"] > 1 else ""
        link = f'<a href="{finding["link"]}">{sentence(markup(finding["title"]))}</a>{times}'
        cells = (badge(severity), f"{link}<br/><code>{markup(finding['code'])}</code>", markup(finding["note"]))
        rows.append(Row(cells, severity_class(severity)))
    yield from table(("severity", "finding", "what it may mean"), rows, narrow=("severity",))


def _states(parts: Sequence[Part]) -> Iterator[str]:
    rows = _rows_of(parts, "snapshots") or ()
    yield f"<h2>States</h2><p>{_counted(parts)}</p>"
    if rows:
        columns = ("ID", "name", "date", "disk", "memory", "what")
        yield from _folded(columns, [_snapshot(row) for row in rows], "snapshot", narrow=("ID", "date", "disk"))
    recovered = _rows_of(parts, "recovered")
    if recovered:
        yield "<h3>Recovered states</h3>"
        states = [
            Row((markup(row["open_as"]), markup(row["confidence"]), size(row["size"]), markup(row["what"])))
            for row in recovered
        ]
        yield from _folded(("open as", "confidence", "size", "what"), states, "state", narrow=("open as", "size"))


def _rows_of(parts: Sequence[Part], kind: str) -> list[Mapping[str, Any]] | None:
    """Return what a part lists; None where that is unknown."""
    found = next((part for part in parts if part["kind"] == kind), None)
    return None if found is None else found["facts"].get("rows")


def _counted(parts: Sequence[Part]) -> str:
    """Return how many states there are of each kind, with the files that list them."""
    shown = []
    for kind, one in (("snapshots", "snapshot"), ("recovered", "recovered state")):
        rows = _rows_of(parts, kind)
        deleted = sum(bool(row.get("deleted")) for row in rows or ())
        count = "" if rows is None else plural(len(rows), one) + (f", {deleted} of them deleted" if deleted else "")
        least = "at least " if rows and any(part["code"] for part in parts if part["kind"] == kind) else ""
        shown.append(f"{least}{count or f'{one}s: not known'} ({_links(parts, kind)})")
    return "; ".join(shown)


def _snapshot(row: Mapping[str, Any]) -> Row:
    what = ""
    if row.get("deleted"):
        what = f"deleted, {markup(row['left'])}" + (f"; opens as {markup(row['open_as'])}" if row["open_as"] else "")
    disk = "" if row["disk_size"] is None else size(row["disk_size"])
    memory = size(row["vm_state_size"]) if row["vm_state_size"] else ""
    return Row((markup(row["id"], 80), markup(row["name"], 300), markup(row["date"]), disk, memory, what))


def _changes(parts: Sequence[Part]) -> Iterator[str]:
    rows = [_change(part) for part in parts if part["kind"] == "diff"]
    if rows:
        yield "<h2>What changed from state to state</h2>"
        columns = ("from → to", "ranges", "bytes", "files", "pages")
        yield from _folded(columns, rows, "pair of states", "pairs of states", narrow=("ranges", "bytes"))


def _change(part: Part) -> Row:
    summary = part["facts"].get("summary")
    name = markup(part["title"], 300)
    if summary is None:
        return Row((name, "", "", "", html_only("; ".join(part["notes"]))))
    files = part["facts"]["files"]
    counts = (
        "" if files is None else ", ".join(f"{count} {markup(change)}" for change, count in files.items()) or "none"
    )
    lost, unread = summary["bytes_not_compared"], summary["changes"].get("unreadable", 0)
    total = size(summary["bytes"] - lost) + (f"<br/>{size(lost)} not compared" if lost else "")
    return Row((name, str(summary["ranges"] - unread), total, counts, _links([part])))


def _memories(parts: Sequence[Part]) -> Iterator[str]:
    memories = [part for part in parts if part["kind"] == "memory"]
    if memories:
        yield "<h2>Memory</h2>"
    for part in memories:
        yield f"<article><details open><summary>{sentence(markup(part['title'], 300))}</summary>"
        yield from _memory(part["facts"]) if part["facts"] else (f"<p>{html_only('; '.join(part['notes']))}</p>",)
        yield f"<p>{_links([part])}</p></details></article>"


def _memory(memory: Mapping[str, Any]) -> Iterator[str]:
    kernel = memory["kernel"]
    rows = [
        ("machine", markup(memory["machine"] or "not recorded")),
        ("RAM", size(memory["ram_bytes"])),
        ("stream", f"{'complete' if memory['complete'] else 'cut off'}, {size(memory['stream_bytes'])}"),
        ("processors", f"{len(memory['processors'])}, {markup(memory['architecture'] or 'unknown architecture')}"),
    ]
    if kernel is None:
        rows.append(("kernel", "neither a Linux banner nor the debug record of a Windows kernel was found"))
    else:
        rows.append(("kernel", f"{markup(kernel['identity'])} <span class='quiet'>at {kernel['address']:#x}</span>"))
        rows.append(("symbols", f"{markup(kernel['symbol_file'])} below a folder of Volatility's -s"))
        rows += [("", f"<kbd>{markup(command)}</kbd>") for command in kernel["commands"]]
    if memory["five_level_paging"]:
        rows.append(("paging", "five levels, which Volatility does not read"))
    rows += [("assumed", markup(item)) for item in memory["assumptions"]]
    rows += [("in doubt", f"{item['address']:#x}, {size(item['length'])}") for item in memory["doubts"]]
    yield from fact_table(rows)
    yield "<details><summary>Layout and registers</summary>"
    regions = [
        Row((f"{r['address']:#x}", size(r["length"]), markup(r["block"]), markup(r["reason"])))
        for r in memory["regions"]
    ]
    yield from table(("address", "length", "block", "why there"), regions[:_ROWS], narrow=("address", "length"))
    known = [name for name in REGISTERS_SHOWN if any(name in cpu["registers"] for cpu in memory["processors"])]
    cpus = [
        Row((str(cpu["index"]), *(markup(cpu["registers"].get(name, "")) for name in known)))
        for cpu in memory["processors"]
    ]
    yield from table(("processor", *known), cpus[:_ROWS])
    yield "</details>"


def _residue(parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        found = part["facts"]
        if part["kind"] != "residue" or not found:
            continue
        yield f"<h2>Residue</h2><p>{plural(found['pieces'], 'piece')} of what nothing points at; {_links([part])}</p>"
        if found["kinds"]:
            rows = [Row((markup(kind), str(c["pieces"]), size(c["bytes"]))) for kind, c in found["kinds"].items()]
            yield from table(("kind", "pieces", "bytes"), rows)


def _next(commands: Iterable[Mapping[str, str]]) -> Iterator[str]:
    yield "<h2>What to type next</h2>"
    rows = [Row((markup(item["what"]), f"<kbd>{html_only(item['command'])}</kbd>")) for item in commands]
    yield from table(("for", "command"), rows)


# --- how ---------------------------------------------------------------------------------------------


def _parts(parts: Sequence[Part]) -> Iterator[str]:
    open_ = " open" if len(parts) <= _PARTS else ""
    yield f"<h2>How it was made</h2><details{open_}><summary>{plural(len(parts), 'command')}</summary>"
    yield from table(("part", "command", "result", "seconds"), map(_part, parts), narrow=("seconds",))
    yield "</details>"


def _part(part: Part) -> Row:
    notes = "".join(f"<br/>{html_only(note)}" for note in part["notes"])
    result = f"<span class='n'>{'not complete' if part['code'] else 'complete'}</span>{notes}"
    command = f"<kbd>{markup(part['command'], 4096)}</kbd>"
    return Row((markup(part["title"], 300), command, result, shown_value("seconds", part["seconds"])))


def _links(parts: Iterable[Part], kind: str = "") -> str:
    """Return links to the files of some parts."""
    names = [name for part in parts if kind in ("", part["kind"]) for name in part["files"]]
    return " · ".join(f'<a href="{name}">{markup(name)}</a>' for name in names) or "no files"


def _folded(
    columns: Sequence[str],
    rows: Sequence[Row],
    noun: str,
    many: str = "",
    *,
    narrow: Iterable[str] = (),
) -> Iterator[str]:
    """Yield a table that is folded where it is long; ``many`` is the plural of its noun, as of :func:`.text.plural`."""
    if len(rows) > _FOLDED:
        yield f"<details><summary>{plural(len(rows), noun, many)}</summary>"
    yield from table(columns, rows[:_ROWS], narrow=narrow)
    if len(rows) > _ROWS:
        yield f"<p class='quiet'>and {len(rows) - _ROWS} more, which the data has</p>"
    if len(rows) > _FOLDED:
        yield "</details>"
