"""A report of a run: one file, read anywhere, that begins with what the numbers say."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from backpack.cockpit.findings import Statement, statements
from backpack.cockpit.history import History
from backpack.cockpit.instruments import GROUPS, Panel, number, panels, words
from backpack.cockpit.svg import drawn

STYLE = """
:root{--paper:#fbfbfa;--card:#fff;--ink:#1c1f23;--faint:#68707a;--line:#dfe2e6;--good:#187a48;
--note:#2f6690;--warning:#9a6200;--severe:#b3261e;--performance:#2b6cb0;--step:#11806a;
--gradients:#7a4bb5;--curvature:#b5542b;--layers:#a33c6b;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1c2024;--ink:#e8eaec;--faint:#9aa3ad;
--line:#333a41;--good:#5fc48d;--note:#7fb4dd;--warning:#e0ac4b;--severe:#f2857c;--performance:#6aa8e8;
--step:#4fc3a5;--gradients:#b794ec;--curvature:#ee9a70;--layers:#e585b0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1400px;margin:0 auto;padding:1.5rem clamp(.8rem,3vw,2.5rem) 4rem}
h1{font-size:1.7rem;margin:0 0 .2rem}
h2{font-size:1.15rem;margin:2.2rem 0 .8rem}
h2:not(.run)::first-letter{text-transform:uppercase}
h3{font-size:1rem;margin:0}.about{color:var(--faint);margin:0 0 1.2rem}
.says{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));
padding:0;margin:0;list-style:none}
.says li{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--c);
border-radius:6px;padding:.7rem .9rem}
.says strong{display:block}.says b{color:var(--c);font-weight:600;font-size:.78rem;
text-transform:uppercase;letter-spacing:.05em}
.says p{margin:.25rem 0 0;font-size:.92rem}.evidence{color:var(--faint)}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.8rem 1rem;break-inside:avoid}
figure header{display:flex;justify-content:space-between;align-items:baseline;gap:1rem}
figure output{color:var(--c);font-variant-numeric:tabular-nums;font-weight:600}
figcaption{color:var(--faint);font-size:.88rem;margin-top:.3rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.85rem;color:var(--faint)}
.legend i{display:inline-block;width:1.4rem;border-top:3px solid var(--c);margin-right:.35rem;
vertical-align:middle}
svg{display:block;width:100%;height:auto;margin-top:.3rem}
svg text{font:12px system-ui,sans-serif;fill:var(--faint)}svg .layer{fill:var(--ink)}
.grid line.grid,svg .grid{stroke:var(--line);stroke-width:1}
.rule{stroke:var(--faint);stroke-dasharray:2 3}.event{stroke:var(--severe);stroke-width:1.5;
stroke-dasharray:4 3}
.raw,.line,.curve{fill:none;stroke:var(--c);stroke-linejoin:round}.raw{opacity:.28}
.line{stroke-width:2}.curve{stroke:var(--faint);stroke-width:1.5}
.line.s1,.i1{stroke-dasharray:7 4}.line.s2,.i2{stroke-dasharray:2 4}.line.s3{stroke-dasharray:9 3 2 3}
.legend .i1{border-top-style:dashed}.legend .i2{border-top-style:dotted}
.runs .s0{--c:var(--performance)}.runs .s1{--c:var(--curvature);stroke-dasharray:none}
.runs .s2{--c:var(--step);stroke-dasharray:none}.runs .s3{--c:var(--gradients);stroke-dasharray:none}
.runs .s4{--c:var(--layers)}.runs .legend i{border-top-style:solid}
.dot{fill:var(--c)}.dot.old{fill:none;stroke:var(--c);opacity:.55}.bar,.cell{fill:var(--c)}
.bad{fill:var(--severe)}
details{margin-top:2rem}summary{cursor:pointer}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .9rem .2rem 0;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--faint:#444;--line:#ccc}body{font-size:11px}
.grid{grid-template-columns:1fr 1fr}details{display:none}}
"""
_COLOURS = {group: f"--{group.split()[0]}" for group in GROUPS}


def html(history: History, title: str = "Training run") -> str:
    """The report as one page that needs nothing else."""
    found = panels(history)
    alarms = [e for e in history.events if e["event"] != "left out"]
    events = [(e["step"], f"{e['event']}: {e['message']}") for e in alarms]
    parts = [f"<h1>{escape(title)}</h1>", _about(history), _says(statements(history))]
    for group in GROUPS:
        figures = [_figure(panel, events) for panel in found if panel.group == group]
        if figures:
            parts.append(f'<h2>{group}</h2><div class="grid">{"".join(figures)}</div>')
    parts += [_alarms(alarms), _numbers(history)]
    return _page(title, "".join(parts))


def compared(runs: Sequence[tuple[str, History]], title: str = "Runs compared") -> str:
    """Several runs laid over each other."""
    figures = {panel.title: panel for panel in panels(runs[0][1], runs)}
    parts = [f"<h1>{escape(title)}</h1>"]
    for name, history in runs:
        parts.append(f"<h2 class=run>{escape(name)}</h2>{_about(history)}{_says(statements(history))}")
    parts.append('<h2>Side by side</h2><div class="grid runs">')
    parts += [_figure(panel, ()) for panel in figures.values()]
    parts.append("</div>")
    return _page(title, "".join(parts))


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _about(history: History) -> str:
    head, steps = history.header, history.steps
    parts = [str(head["model"])] if head.get("model") else []
    if head.get("parameters"):
        parts.append(f"{head['parameters']:,} parameters".replace(",", " "))
    if head.get("optimizer"):
        parts.append(str(head["optimizer"]))
    if steps:
        parts.append(f"{len(steps)} tracked steps, {steps[0]} to {steps[-1]}")
    if head.get("began"):
        parts.append("begun " + time.strftime("%Y-%m-%d %H:%M", time.localtime(head["began"])))
    return f'<p class="about">{escape(" · ".join(parts))}</p>'


def _says(found: Sequence[Statement]) -> str:
    items = []
    for each in found:
        advice = f"<p>{escape(each.advice)}</p>" if each.advice else ""
        items.append(
            f'<li style="--c:var(--{each.severity})"><b>{each.severity}</b>'
            f"<strong>{escape(each.text)}</strong>"
            f'<p class="evidence">{escape(each.evidence)}</p>{advice}</li>'
        )
    return f'<ul class="says">{"".join(items)}</ul>'


def _figure(panel: Panel, events: Sequence[tuple[int, str]]) -> str:
    legend = ""
    if len(panel.series) > 1:
        names = [
            f'<span class="s{k % 5}"><i class="i{k % 5}"></i>{escape(each.name)}</span>'
            for k, each in enumerate(panel.series)
        ]
        legend = f'<div class="legend">{"".join(names)}</div>'
    last = f"<output>{number(panel.last)}</output>" if len(panel.series) == 1 else ""
    return (
        f'<figure style="--c:var({_COLOURS[panel.group]})"><header><h3>{escape(panel.title)}</h3>{last}'
        f"</header>{legend}{drawn(panel, events)}"
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def _alarms(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = "".join(
        f"<tr><td>{escape(e['event'])}</td><td>{e['step']}</td><td>{escape(e['message'])}</td></tr>"
        for e in found[:200]
    )
    return (
        f"<h2>alarms</h2><div class=wide><table><tr><th>alarm<th>step<th>what</tr>{rows}</table></div>"
    )


def _numbers(history: History) -> str:
    """First, median and last value of every number of the whole model."""
    rows = []
    for key in history.names():
        _, values = history.column(key)
        known = sorted(v for v in values if isinstance(v, (int, float)) and v == v)
        if "/" in key or key == "time" or not known:
            continue
        first, last = (number(float(values[k])) for k in (0, -1))
        middle = number(float(known[len(known) // 2]))
        rows.append(
            f"<tr><td>{escape(words(key))}<td>{first}<td>{middle}<td>{last}<td>{len(values)}</tr>"
        )
    return (
        "<details><summary>All numbers of the whole model</summary><div class=wide><table>"
        f"<tr><th>quantity<th>first<th>median<th>last<th>steps</tr>{''.join(rows)}</table></div></details>"
    )


def show_in_notebook(history: History, title: str) -> bool:
    """Show the report in the cell that runs, and say whether there is one."""
    shell = sys.modules.get("IPython")
    current = shell.get_ipython() if shell is not None else None
    if current is None or not hasattr(current, "kernel"):
        return False
    from IPython.display import HTML, display

    page = escape(html(history, title), quote=True)
    frame = f'<iframe srcdoc="{page}" style="width:100%;height:80vh;border:0"></iframe>'
    display(HTML(frame), display_id="backpack-cockpit")
    return True


def show_window(history: History, title: str) -> None:
    """Show the figure in a window."""
    from backpack.cockpit.figure import figure

    show_figure(figure(history, title))


def show_figure(drawing: Any, block: bool = False) -> None:
    """Put a figure into a window."""
    import matplotlib.pyplot as plt

    window = plt.figure("backpack.cockpit", figsize=drawing.get_size_inches())
    drawing.set_canvas(window.canvas)
    window.canvas.figure = drawing
    plt.show(block=block)


def write(history: History, path: Any, title: str | None = None) -> Path:
    """Write a report; its kind by the ending: ``.html``, or ``.png``, ``.pdf``, ``.svg`` by matplotlib.

    Raises:
        ValueError: for another ending.
    """
    place = Path(path)
    title = title or place.stem
    if place.suffix == ".html":
        place.write_text(html(history, title))
    elif place.suffix in (".png", ".pdf", ".svg"):
        from backpack.cockpit.figure import figure

        figure(history, title).savefig(place, dpi=150)
    else:
        raise ValueError(f"a report is .html, .png, .pdf or .svg, not {place.suffix!r}")
    return place
