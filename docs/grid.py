"""The tables of docs/support.md as coloured grids, with a summary of all of them in front."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from docutils import nodes

KINDS = ("ok", "runs", "error", "differs", "untried")
SIGNS = {"ok": "✓", "runs": "○", "error": "✗", "differs": "≠", "untried": "·"}


def kind(text: str) -> str | None:
    """What a cell says; ``None`` if it is no result."""
    if text in ("ok", "runs", "differs"):
        return text
    if text == "-":
        return "untried"
    return "error" if text.endswith("Error") and text.isidentifier() else None


def _colour(table: nodes.table) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in table.findall(nodes.tbody):
        for entry in row.findall(nodes.entry):
            text = entry.astext().strip()
            found = kind(text)
            if found is None:
                continue
            counts[found] += 1
            entry["classes"].append(f"is-{found}")
            said = f'<span title="{escape(text)}">{SIGNS[found]}</span>'
            entry.children = [nodes.raw("", said, format="html")]
    return counts


def _row(cells: list[str]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", each)) for each in cells))


def _summary(lines: list[tuple[str, Counter[str]]]) -> nodes.table:
    head = ["", *(f"{SIGNS[each]} {each}" for each in KINDS)]
    rows = [_row([title, *(f"{counts[each]:,}" for each in KINDS)]) for title, counts in lines]
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += [nodes.thead("", _row(head)), nodes.tbody("", *rows)]
    return nodes.table("", group, classes=["summary"])


def _pages(app: Any, doctree: nodes.document, page: str) -> None:
    if page != "support":
        return
    lines = []
    for table in list(doctree.findall(nodes.table)):
        counts = _colour(table)
        if not counts:
            continue
        table["classes"].append("grid")
        section = table.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        lines.append((section.next_node(nodes.title).astext(), counts))
    title = doctree.next_node(nodes.title)
    title.parent.insert(1, _summary(lines))


def setup(app: Any) -> dict[str, bool]:
    """Once the page is read."""
    app.connect("doctree-resolved", _pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
