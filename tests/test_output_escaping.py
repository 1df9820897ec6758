"""Text from evidence comes out escaped at every edge: terminal, logs, JSON, CSV, HTML, rows and lines.

One image holds the same hostile text wherever an image can hold text: backing name and format,
snapshot IDs and names, feature names, an unknown extension, a bitmap, former snapshots in free space.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fuzz.targets import run_command

import qcow2_forensics as q
from qcow2_forensics.errors import Qcow2Error, reason
from qcow2_forensics.text import printable
from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, Builder, Poke
from tests.tiers import quick

TEXTS = {
    "terminal": b"\x1b[2J\x1b]0;owned\x07",
    "c1": b"\xc2\x9b2J",
    "lines": b"a\nqcow2-forensics: fine\r\n\x0b\x0c\x85",
    "bidi": "\u202egpj.exe\u2066\u200f\u061c".encode(),
    "separators": "a\u2028b\u2029c\u00a0\ufeff".encode(),
    "formula": b'=HYPERLINK("http://x","y")',
    "plus": b"+1+1",
    "minus": b"-2+3",
    "at": b"@SUM(1)",
    "space": b" \t=1+1",
    "spaces": b"  =1+1",
    "dde": b"|cmd /c calc",
    "percent": b"%s%n%x",
    "markup": b"<script>alert(1)</script>",
    "attribute": b'" onmouseover="alert(1)" x=\'',
    "entity": b"&lt;b&gt;&#x1b;",
    "closing": b"</title></style><img src=x>",
    "bytes": b"\xff\xfe\x80\xc0\xaf",
    "surrogate": b"\xed\xa0\x80",
    "nul": b"a\0b",
    "backslash": b"\\x1b\\u202e",
    "body": b"a|b|0|0",
    "braces": b"{0}{a!r}",
    "markdown": b"[x](http://y)",
    "wide": "日本語のスナップショット".encode() * 3,
    "zalgo": ("a" + "\u0301" * 60).encode(),
    "long": b"A" * 250,
}


# One of each kind of danger; the rest is left to the slow tests.
REPRESENTATIVE = ["terminal", "lines", "bidi", "formula", "markup", "bytes", "nul", "body", "long"]


@pytest.fixture(params=quick(TEXTS, REPRESENTATIVE))
def text(request: pytest.FixtureRequest) -> bytes:
    return TEXTS[request.param]


@pytest.fixture
def image(text: bytes, tmp_path: Path) -> Path:
    """An image with ``text`` in every place."""
    features = b"".join(bytes([kind, 5]) + text[:46].ljust(46, b"\0") for kind in range(3))
    builder = Builder(
        cluster_bits=16,
        size=1 << 20,
        backing=text,
        extensions=[(EXT_BACKING_FORMAT, text[:15]), (EXT_FEATURE_NAMES, features), (0x12345678, text)],
    )
    builder.data(0, b"\x11" * 65536)
    builder.compatible = builder.autoclear = 1 << 5
    table = builder.put(bytes(65536))
    for number in range(2):
        builder.snapshot(text, text + b"%d" % number, l1_offset=table, l1_size=1)
    return builder.write(tmp_path / "hostile.qcow2")


def assert_plain(shown: str, text: bytes, what: object) -> None:
    """No control character, no invisible mark, nothing that is not text for people."""
    for line in shown.split("\n"):
        bad = [
            character
            for character in line
            if not character.isprintable() or printable(character) not in (character, "\\\\")
        ]
        assert not bad, (what, bad, line[:200])


COMMANDS = [
    ["info"],
    ["info", "--format", "json"],
    ["snapshots"],
    ["snapshots", "--format", "json"],
    ["snapshots", "--deleted", "--format", "jsonl"],
    ["map"],
    ["map", "--format", "json", "--no-backing"],
    ["audit"],
    ["audit", "-v", "--depth", "deep"],
    ["audit", "--format", "json", "--depth", "deep"],
    ["audit", "--format", "jsonl", "--depth", "deep"],
    ["timeline", "--no-files"],
    ["timeline", "--no-files", "--format", "jsonl"],
    ["timeline", "--no-backing"],
    ["diff"],
    ["diff", "--no-backing"],
    ["diff", "--no-backing", "--format", "json"],
    ["diff", "--no-backing", "--from", "index:0", "--to", "index:1"],
    ["diff", "--from", "no such state"],
    ["export", "--snapshot", "no such state"],
]


# Of commands that print much the same in another way; the others are quick.
SIMILAR = [
    ["snapshots", "--format", "json"],
    ["audit", "--format", "jsonl", "--depth", "deep"],
    ["timeline", "--no-backing"],
    ["diff", "--no-backing"],
    ["diff", "--no-backing", "--from", "index:0", "--to", "index:1"],
]


@pytest.mark.parametrize("command", quick(COMMANDS, [one for one in COMMANDS if one not in SIMILAR]), ids=" ".join)
def test_commands_print_plain_text(command: list[str], text: bytes, image: Path, tmp_path: Path) -> None:
    name, *options = command
    positional = [str(image), *([str(tmp_path / "out.raw")] if name == "export" else [])]
    code, out, err = run_command([name, *positional, *options])
    assert code in (0, 2)
    assert_plain(out, text, command)
    assert_plain(err, text, command)
    assert len(err.splitlines()) <= 3
    if code == 0 and "json" in options:
        json.loads(out)
    if "jsonl" in options:
        assert all(isinstance(json.loads(line), dict) for line in out.splitlines())
    if command[:1] == ["timeline"] and "jsonl" not in options:
        assert all(line.count("|") == 10 for line in out.splitlines()), "a body file has eleven fields"


def test_json_is_ascii_and_holds_the_text_of_the_evidence(text: bytes, image: Path) -> None:
    _, out, _ = run_command(["snapshots", str(image), "--format", "json"])
    assert out.isascii()
    assert [row["name"] for row in json.loads(out)] == [
        (text + b"%d" % number).decode("utf-8", "surrogateescape") for number in range(2)
    ]


@pytest.mark.parametrize("depth", ["standard", "deep"])
def test_csv_cells_start_no_formula(depth: str, text: bytes, image: Path) -> None:
    code, out, _ = run_command(["audit", str(image), "--format", "csv", "--depth", depth])
    assert code == 0
    rows = list(csv.reader(io.StringIO(out)))
    assert len({len(row) for row in rows}) == 1
    for row in rows:
        for cell in row:
            assert not re.match(r"\s*[=+@|%\t\r\n]", cell), cell
            assert not re.match(r"\s*-(\D|\d+[^\d.])", cell), cell
            assert_plain(cell, text, "csv")


def test_residue_index_starts_no_formula(text: bytes, image: Path, tmp_path: Path) -> None:
    code, out, err = run_command(["residue", str(image), str(tmp_path / "residue")])
    assert code == 0, err
    assert_plain(out + err, text, "residue")
    with (tmp_path / "residue" / "index.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.reader(stream):
            for cell in row:
                assert not re.match(r"\s*[=+@|%-]", cell), cell
                assert_plain(cell, text, "csv")
    assert (tmp_path / "residue" / "index.json").read_text(encoding="utf-8").isascii()
    for path in (tmp_path / "residue").iterdir():
        assert re.fullmatch(r"[\w.-]+", path.name), path


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str | None] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name in ("href", "src", "action")}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_has_only_its_own_tags(text: bytes, image: Path) -> None:
    code, out, _ = run_command(["audit", str(image), "--format", "html", "--depth", "deep"])
    assert code == 0
    parser = _Tags()
    parser.feed(out)
    assert not parser.tags & {"script", "img", "iframe", "object", "link", "b", "form", "base"}
    assert all(link is not None and re.fullmatch(r"#[\w-]+", link) for link in parser.links)  # within the page
    assert not {name for name in parser.attributes if name.startswith("on")} | parser.attributes & {"src", "action"}
    assert_plain("".join(parser.text), text, "html")
    assert "default-src 'none'" in out


def test_errors_and_findings_are_one_plain_line(text: bytes, image: Path) -> None:
    for work in (
        lambda: q.open_disk(image),
        lambda: q.open_disk(image, text.decode("utf-8", "surrogateescape")),
        lambda: q.open_vm_state(image),
        lambda: q.open_guest_memory(image, text.decode("utf-8", "surrogateescape")),
    ):
        with pytest.raises(Qcow2Error) as caught:
            work()
        assert "\n" not in str(caught.value)
        assert_plain(str(caught.value), text, "error")
    with q.open_image(image) as opened:
        for problem in opened.problems:
            assert "\n" not in problem.message
            assert_plain(problem.message, text, "problem")
    for finding in q.audit(image, depth="deep"):
        for words in (finding.title, finding.note, finding.code):
            assert "\n" not in words
            assert_plain(words, text, "finding")


def test_a_report_round_trips_as_json(image: Path) -> None:
    report = q.audit(image, depth="deep")
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))


@qemu.requires_qemu
def test_a_hostile_bitmap_name_is_escaped(text: bytes, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "bitmap.qcow2", "1M")
    qemu.img("bitmap", "--add", path, "n" * len(text))
    data = path.read_bytes()
    Poke(path).write(data.index(b"n" * len(text)), text)
    for command in (["info"], ["audit"], ["timeline", "--no-files"], ["audit", "--depth", "deep"]):
        code, out, err = run_command([command[0], str(path), *command[1:]])
        assert code == 0
        assert_plain(out + err, text, command)


# --- adapters ------------------------------------------------------------------------------------


def test_volatility_rows_and_warnings_are_plain(text: bytes, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("volatility3.framework", reason="volatility3 is absent")
    from tests import volatility_tools as tools

    with tools.warnings_of(caplog) as warnings:
        for name in ("snapshots.Snapshots", "info.Info", "audit.Audit"):
            for row in tools.plugin_rows(name, image):
                for value in row.values():
                    if isinstance(value, str):
                        assert_plain(value, text, name)
        tools.stack(image)
    for warning in warnings:
        assert_plain(warning, text, "warning")


def test_dfvfs_names_and_logs_are_plain(text: bytes, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("dfvfs", reason="dfvfs is absent")
    from dfvfs.lib import definitions
    from dfvfs.path import factory
    from dfvfs.resolver import resolver

    import dfvfs_qcow2
    from dfvfs_qcow2.names import label, snapshot_of

    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=str(image))
    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=spec)
    with caplog.at_level(logging.DEBUG):
        specs = dfvfs_qcow2.snapshot_path_specs(spec)
        assert len(specs) == 2
        for wanted in (spec, *specs):
            assert wanted.comparable.replace("\n", "").isprintable()
            try:
                file_object = resolver.Resolver.OpenFileObject(wanted)
                file_object.seek(0x80000)
                file_object.read(4096)
            except OSError as error:
                assert_plain(str(error), text, "error")
        for wanted in specs:
            key = snapshot_of(wanted)
            assert key is not None
            assert_plain(label(key), text, "label")
    for record in caplog.records:
        if "qcow2" in record.name:
            assert_plain(record.getMessage(), text, "log")


def test_img_info_errors_are_plain(text: bytes, image: Path) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    import pytsk3_qcow2

    with pytest.raises(OSError, match="not followed|missing") as caught:
        pytsk3_qcow2.Img_Info(str(image))
    assert_plain(str(caught.value), text, "error")
    found = pytsk3_qcow2.Img_Info(str(image), snapshot="index:0", missing="zeros")
    assert_plain(repr(found), text, "repr")


@qemu.requires_qemu
def test_the_reason_of_an_img_info_error_is_escaped_once_by_who_shows_it(tmp_path: Path) -> None:
    """The chain's error is none that pytsk3 scripts catch, so it is translated; what it says of a name stays as stored."""
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    import pytsk3_qcow2

    base = qemu.create(tmp_path / "ba\\se.qcow2", 1 << 20)
    overlay = qemu.create(tmp_path / "overlay.qcow2", 1 << 20, backing=base.name, backing_format="qcow2", cwd=tmp_path)
    extension = overlay.read_bytes().index(bytes.fromhex("e2792aca00000005") + b"qcow2")
    Poke(overlay).write(extension + 4, (4).to_bytes(4, "big") + b"qcow\0\0\0\0")
    with pytest.raises(OSError, match="is recorded as qcow") as failure:
        pytsk3_qcow2.Img_Info(overlay)
    assert "ba\\se.qcow2 is recorded" in reason(failure.value)


# --- files' names in the file systems inside -----------------------------------------------------


@qemu.requires_qemu
def test_file_names_inside_are_escaped(tmp_path: Path) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    if not shutil.which("mke2fs"):
        pytest.skip("mke2fs is absent")
    root = tmp_path / "root"
    root.mkdir()
    made = []
    for name, text in TEXTS.items():
        if b"/" in text or b"\0" in text or len(text) > 200:
            continue
        path = bytes(root) + b"/" + text
        with open(path, "wb") as stream:
            stream.write(b"content of " + name.encode())
        made.append(text)
    raw, image = tmp_path / "fs.raw", tmp_path / "fs.qcow2"
    raw.write_bytes(bytes(2 << 20))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext2", "-d", str(root), str(raw)], check=True, capture_output=True)
    qemu.img("convert", "-O", "qcow2", raw, image)
    qemu.img("snapshot", "-c", "s", image)
    qemu.io(image, "write -z 1M 64k")
    for command in (
        ["timeline"],
        ["timeline", "--format", "jsonl"],
        ["diff", "--files"],
        ["diff", "--files", "--format", "json"],
        ["diff", "--files", "--format", "body"],
    ):
        code, out, err = run_command([command[0], str(image), *command[1:]])
        assert code == 0, err
        assert_plain(out, b"", command)
        assert_plain(err, b"", command)
        if command == ["timeline"]:
            assert all(line.count("|") == 10 for line in out.splitlines())
            assert all(printable(text).replace("|", "\\x7c") in out for text in made)
