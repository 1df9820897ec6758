"""What must hold of every page: it is well formed, runs nothing, asks for nothing, and shows what it escapes."""

from __future__ import annotations

import html.parser

_VOID = frozenset({"meta", "circle", "path", "br", "input"})


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look_at(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look_at(tag, attrs)

    def _look_at(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "iframe", "object", "embed", "img", "link", "form", "base"}, tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(page: str) -> _Tags:
    """Check a page and return its anchors, links and words."""
    assert not [c for c in page if (ord(c) < 32 and c != "\n") or c == "\u202e" or 0xD800 <= ord(c) < 0xE000]
    page.encode("utf-8")
    parser = _Tags()
    parser.feed(page)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert "default-src 'none'" in page
    for link in parser.links:
        assert "://" not in link
        if link.startswith("#"):
            assert link[1:] in parser.ids, link
    return parser
