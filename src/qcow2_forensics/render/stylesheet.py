"""The page's style sheet: system fonts, light and dark, and sensible pages on paper."""

from __future__ import annotations

from ..findings import Severity

_DIFFERENCES = (
    "changed",
    "written",
    "zeroed",
    "added",
    "removed",
    "marked",
    "unreadable",
    "renamed",
    "content",
    "metadata",
    "deleted",
)
_DATED_FACTS = ("snapshot", "deleted_snapshot", "bitmap", "qcow1_mtime", "file")
KINDS = (*_DIFFERENCES, *_DATED_FACTS)  # what a page may have a filter for, besides severities

_BASE = """
:root{--bg:#fff;--fg:#1b1f24;--quiet:#5c6570;--line:#d8dde3;--card:#f7f8fa;
--header:#22303c;--tables:#3366aa;--refcounts:#6f86b5;--active:#6fb98f;--compressed:#3f8f6b;--shared:#b7d7a8;
--vmstate:#a678c9;--bitmaps:#c9a13b;--leaked:#d9534f;--residue:#f0883e;--free:#e9ecef;--zeros:#d5dbe1;--other:#999}
@media (prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e4e8ec;--quiet:#97a2ad;--line:#323a42;--card:#1c2228;
--header:#c8d3dd;--free:#2a3138;--shared:#86a878}}
@media print{:root{--bg:#fff;--fg:#000;--quiet:#444;--line:#bbb;--card:#fff;--free:#eee;--header:#22303c}
body{max-width:none!important;font-size:9.5pt}section,tr,svg{break-inside:avoid}thead{display:table-header-group}h2,h3,h4{break-after:avoid}
.scroll{overflow:visible!important}table{font-size:.75em}th,td{padding-right:.5rem}rect{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:70rem;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:1.8rem 0 .6rem}
h3{margin:1.2rem 0 .5rem;font-size:1rem}h4{margin:0 0 .25rem;font-size:1rem;font-weight:600;overflow-wrap:anywhere}
p{margin:.25rem 0 .5rem}.quiet{color:var(--quiet);font-size:.87em}
code{font:.82em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;color:var(--quiet);font-weight:400}
table{border-collapse:collapse;font-size:.87em}th,td{text-align:left;padding:.15rem .9rem .15rem 0;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}th{color:var(--quiet);font-weight:500}
td{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}.facts{margin-top:.6rem}.facts th,.badge{white-space:nowrap}td.w{min-width:14rem}
.n,thead th{white-space:nowrap}.scroll{overflow-x:auto}.scroll table{width:100%}
article{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--quiet);border-radius:4px;
padding:.6rem .9rem;margin:0 0 .6rem}
.warning{border-left:4px solid #e0a030;padding:.1rem 0 .1rem .9rem;margin:1rem 0}.warning h2{margin-top:.4rem}.warning td:first-child{min-width:14rem}
article.s-critical{border-left-color:#8b1a1a}article.s-high{border-left-color:#d9534f}
article.s-medium{border-left-color:#e0a030}article.s-low{border-left-color:#4a90c2}
.badge{display:inline-block;border-radius:1rem;padding:.1rem .7rem;font-size:.87em;color:#fff;background:#68727d}
.badge.s-critical{background:#8b1a1a}.badge.s-high{background:#c0392b}.badge.s-medium{background:#a86a00}
.badge.s-low{background:#2f6f9f}.badge.s-none{background:#2e7d4f}
svg.map,svg.tree{display:block;width:100%;height:auto;min-width:36rem}.wide{overflow-x:auto}:target{outline:2px solid #e0a030;outline-offset:2px}
svg :target rect{stroke:#e0a030;stroke-width:2}svg a:hover{opacity:.7}a{color:inherit;text-underline-offset:.15em}
.hash{overflow-wrap:anywhere}kbd{font:.82em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;user-select:all;overflow-wrap:anywhere}
summary{cursor:pointer;overflow-wrap:anywhere;font-weight:600}section>details>summary{font-weight:400}
.filters,.filter,.filter+label{display:inline-block;margin:0 .3rem .6rem 0;font-size:.87em}.filter+label{margin-right:.8rem}
svg text{fill:var(--fg);font:10px ui-monospace,monospace}
svg.tree text{font:13px system-ui,sans-serif}svg text.quiet{fill:var(--quiet);font-size:11px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.7rem 0 .2rem;font-size:.9em}
.legend svg{width:.8em;height:.8em;margin-right:.4em}
.edge{fill:none;stroke:var(--quiet);stroke-width:1.5}
.n-backing{fill:var(--bg);stroke:var(--quiet);stroke-width:2}.n-snapshot{fill:#4a90c2}.n-active{fill:#2e9e5b}
.n-deleted{fill:var(--bg);stroke:#d9534f;stroke-width:2;stroke-dasharray:3 2}
.o-header{fill:var(--header)}.o-tables{fill:var(--tables)}.o-refcounts{fill:var(--refcounts)}
.o-active{fill:var(--active)}.o-compressed{fill:var(--compressed)}.o-shared{fill:var(--shared)}
.o-vmstate{fill:var(--vmstate)}.o-bitmaps{fill:var(--bitmaps)}.o-leaked{fill:var(--leaked)}
.o-residue,.o-unaccounted{fill:var(--residue)}.o-zeros{fill:var(--zeros)}.o-free{fill:var(--free)}.o-other{fill:var(--other)}.o-encryption{fill:#555f8a}
.o-snap0{fill:#8e7cc3}.o-snap1{fill:#5b9bd5}.o-snap2{fill:#c27ba0}.o-snap3{fill:#76a5af}
.o-snap4{fill:#a68a64}.o-snap5{fill:#9fc5e8}.o-snap6{fill:#d5a6bd}.o-snap7{fill:#7f8fa6}
@media (max-width:600px){body{padding:.8rem}.scroll{overflow:visible}.scroll table,.scroll tbody,.scroll tr,.scroll td,.facts,.facts tbody,.facts tr,.facts th,.facts td{display:block;width:auto}
.scroll thead{display:none}.scroll tr{padding:.3rem 0;border-bottom:1px solid var(--line)}.scroll td,.facts th,.facts td{border:0;padding:.05rem 0;white-space:normal}
.scroll td:empty{display:none}.scroll td::before{content:attr(data-l) ": ";color:var(--quiet);font-family:system-ui,sans-serif}.facts th{padding-top:.3rem}
svg.map{min-width:62rem}svg.tree{min-width:56rem}div.filters{display:none}.filter+label{margin-right:.3rem;font-size:.8em}}
@media print{.filters,.filter,.filter+label{display:none}}
"""

_HIDDEN = "".join(
    f"#show-{name}:not(:checked)~main .s-{name}:not(.badge){{display:none}}"
    for name in dict.fromkeys([*(severity.label.lower() for severity in Severity), *KINDS])
)
CSS = f"{_BASE}{_HIDDEN}\n"
