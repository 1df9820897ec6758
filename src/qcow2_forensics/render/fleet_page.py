"""The reports of many images on one page: images by severity, and findings by the images that have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..findings import Severity
from ..text import listed, markup, plural, sentence, size
from .page import Row, badge, page, severity_class, table

_CODES = 12  # codes named per image
_IMAGES = 200  # images named per code


def render_fleet(
    reports: Iterable[Mapping[str, Any]], *, links: Mapping[str, str] | None = None, extra: Iterable[str] = ()
) -> str:
    """Return the page for reports as plain data, as in the lines of ``audit --format jsonl``.

    ``links`` are the pages of images by their path, ``extra`` what follows the head as HTML.
    """
    images = sorted(reports, key=lambda report: (-_worst(report), str(report["image"].get("path"))))
    parts = [*_head(images), *extra, *_images(images, links or {}), *_findings(images)]
    return page(
        plural(len(images), "image"), parts, {Severity.parse(f["severity"]) for r in images for f in r["findings"]}
    )


def _worst(report: Mapping[str, Any]) -> int:
    return max((int(Severity.parse(finding["severity"])) for finding in report["findings"]), default=-1)


def _head(images: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    worst = Counter(_worst(report) for report in images)
    yield f"<h1>{plural(len(images), 'image')}</h1><p>"
    for severity in sorted(Severity, reverse=True):
        if worst[severity]:
            yield badge(severity, f"{worst[severity]} with {severity.label}")
    if worst[-1]:
        yield badge(None, f"{worst[-1]} without findings")
    total = sum(report["image"].get("file_size") or 0 for report in images)
    yield f"</p><p class='quiet'>{size(total)} in all</p>"


def _images(images: Sequence[Mapping[str, Any]], links: Mapping[str, str]) -> Iterator[str]:
    yield "<h2>Images, worst first</h2>"
    columns = ("worst", "image", "file", "disk", "snapshots", "findings")
    rows = (_image(number, report, links) for number, report in enumerate(images))
    yield from table(columns, rows, narrow=("file", "disk"), wide=("image",))


def _image(number: int, report: Mapping[str, Any], links: Mapping[str, str]) -> Row:
    image, worst = report["image"], _worst(report)
    severity = Severity(worst) if worst >= 0 else None
    codes = Counter(finding["code"] for finding in report["findings"] if finding["severity"] != "Info")
    words = [f"{code.removeprefix('QCOW2-')}{f' ×{n}' if n > 1 else ''}" for code, n in codes.items()]
    cells = (
        badge(severity),
        _linked(links.get(str(image.get("path")), ""), markup(image.get("path"), 4096)) + _digest(report),
        _bytes(image.get("file_size")),
        _bytes(image.get("virtual_size")),
        markup("unknown" if image.get("snapshots", 0) is None else image.get("snapshots") or ""),
        markup(listed(words, _CODES)),
    )
    return Row(cells, severity_class(severity), f"i{number}")


def _digest(report: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the image where it was asked for."""
    files: Sequence[Mapping[str, Any]] = report.get("details", {}).get("run", {}).get("files") or ({},)
    digest = files[0].get("sha256")
    return f"<br/><span class='quiet hash'>SHA-256 {markup(digest)}</span>" if digest else ""


def _linked(page_of_image: str, shown: str) -> str:
    return f'<a href="{page_of_image}">{shown}</a>' if page_of_image else shown


def _bytes(count: Any) -> str:
    return size(count) if isinstance(count, int) else ""


def _findings(images: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each code with the images that have it, worst first."""
    found: dict[tuple[int, str, str], dict[int, int]] = {}
    for number, report in enumerate(images):
        for finding in report["findings"]:
            key = -int(Severity.parse(finding["severity"])), finding["code"], finding["title"]
            found.setdefault(key, {}).setdefault(number, 0)
            found[key][number] += 1
    yield "<h2>Findings, by the images that have them</h2>"
    for (level, code, title), where in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]), item[0])):
        severity = Severity(-level)
        words = f"{badge(severity)} {sentence(markup(title))} <code>{markup(code)}</code>"
        yield f'<article class="{severity_class(severity)}"><details><summary>{words}'
        yield f" <span class='quiet'>{len(where)} of {len(images)}</span></summary><ul>"
        for number in list(where)[:_IMAGES]:
            path = markup(images[number]["image"].get("path"), 4096)
            yield f'<li><a href="#i{number}">{path}</a></li>'
        if len(where) > _IMAGES:
            yield f"<li>and {len(where) - _IMAGES} more</li>"
        yield "</ul></details></article>"
