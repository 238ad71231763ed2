"""Instruments as inline SVG: no scripts, and colours of the page, so that they suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from backpack.cockpit.instruments import Heat, Panel, Series, number, ticks

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 28
# Points of a line, columns and rows of a heat map that are drawn at most.
POINTS, COLUMNS, ROWS = 400, 80, 48
ROW, LABELS = 14, 118
Event = tuple[int, str]


def drawn(panel: Panel, events: Sequence[Event] = ()) -> str:
    """The picture of an instrument.

    Args:
        panel: the instrument.
        events: alarms, by step.
    """
    if panel.alphas:
        return _alphas(panel)
    if panel.heat is not None:
        return _heat(panel, panel.heat)
    if panel.bars is not None:
        return _bars(panel)
    if panel.image is not None:
        return _image(panel)
    return _lines(panel, events)


def _picture(content: str, title: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{content}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


class _Axes:
    """Places of values in a picture."""

    def __init__(self, low: float, high: float, log: bool, steps: tuple[int, int]) -> None:
        self.log, self.steps = log, steps
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        room = 0.04 * (b - a) or 0.5 * (abs(a) or 1.0)
        self.low, self.high = a - room, b + room

    def x(self, step: float) -> float:
        first, last = self.steps
        share = (step - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def shows(self, value: float) -> bool:
        """Whether a value has a place."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return False
        at = math.log10(value) if self.log else value
        return self.low <= at <= self.high

    def marks(self) -> list[float]:
        """Values at which the axis is marked."""
        if not self.log:
            return ticks(self.low, self.high)
        low, high = math.ceil(self.low), math.floor(self.high)
        step = max(1, -(-(high - low + 1) // 5))
        powers = [10.0**k for k in range(low, high + 1, step)]
        if len(powers) > 1:
            return powers
        return [v for v in ticks(10**self.low, 10**self.high) if v > 0]

    def drawn(self) -> str:
        found = []
        for value in self.marks():
            y = self.y(value)
            found.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            found.append(_text(LEFT - 6, y + 4, number(value), "end"))
        for step in ticks(float(self.steps[0]), float(self.steps[1]), 5):
            found.append(_text(self.x(step), HEIGHT - 8, f"{step:,.0f}".replace(",", " ")))
        return "".join(found)


def _thinned(series: Series, values: Sequence[float]) -> list[tuple[int, float]]:
    """Points of a line: of many, the lowest and highest of each piece."""
    points = list(zip(series.steps, values, strict=True))
    if len(points) <= POINTS:
        return points
    size = -(-2 * len(points) // POINTS)
    found = []
    for k in range(0, len(points), size):
        piece = points[k : k + size]
        known = [point for point in piece if math.isfinite(point[1])] or piece[:1]
        ends = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def _path(points: Sequence[tuple[int, float]], axes: _Axes) -> str:
    """A line that is broken where there is no value."""
    found, pen = [], "M"
    for step, value in points:
        if axes.shows(value):
            found.append(f"{pen}{axes.x(step):.1f} {axes.y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(found)


def _lines(panel: Panel, events: Sequence[Event]) -> str:
    known = [
        v for each in panel.series for v in each.values if math.isfinite(v) and (v > 0 or not panel.log)
    ]
    steps = [s for each in panel.series for s in each.steps]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    rules = [(v, t) for v, t in panel.lines if low / 30 <= v <= 30 * high or not panel.log]
    if not panel.log:
        rules = [(v, t) for v, t in rules if low - (high - low) <= v <= high + (high - low)]
    low, high = min([low, *(v for v, _ in rules)]), max([high, *(v for v, _ in rules)])
    axes = _Axes(low, high, panel.log, (min(steps), max(steps)))
    found = [axes.drawn()]
    for value, text in rules:
        y = axes.y(value)
        found.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(_text(WIDTH - RIGHT, y - 4, text, "end", ' class="faint"'))
    found += [_event(step, text, axes) for step, text in events if min(steps) <= step <= max(steps)]
    for k, each in enumerate(panel.series):
        found.append(f'<path class="raw s{k % 5}" d="{_path(_thinned(each, each.values), axes)}"/>')
        smooth = _path(_thinned(each, each.smoothed()), axes)
        found.append(f'<path class="line s{k % 5}" d="{smooth}"/>')
        if len(each.steps) == 1 and axes.shows(each.values[0]):
            x, y = axes.x(each.steps[0]), axes.y(each.values[0])
            found.append(f'<circle class="dot s{k % 5}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        bad = [s for s, v in zip(each.steps, each.values, strict=True) if not math.isfinite(v)]
        found += [
            f'<path class="bad" d="M{axes.x(s) - 4:.1f} {TOP}h8l-4 7z">'
            f"<title>step {s}: not finite</title></path>"
            for s in bad[:50]
        ]
    return _picture("".join(found), panel.title)


def _event(step: int, text: str, axes: _Axes) -> str:
    x = axes.x(step)
    return (
        f'<line class="event" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>step {step}: {escape(text)}</title></line>"
    )


def _bars(panel: Panel) -> str:
    """Counts of entries on a scale of powers of ten, both signs; on a logarithmic axis."""
    assert panel.bars is not None
    edges, counts = panel.bars
    most = max(counts) or 1.0
    top = math.log10(most + 1)
    size = (WIDTH - LEFT - RIGHT) / len(counts)
    floor, room = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    found = []
    for whole in range(0, math.floor(top) + 1, max(1, math.floor(top / 4))):
        y = floor - room * math.log10(10**whole + 1) / top
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(_text(LEFT - 6, y + 4, number(10.0**whole), "end"))
    for k, count in enumerate(counts):
        high = room * math.log10(count + 1) / top
        share = 100 * count / (sum(counts) or 1)
        found.append(
            f'<rect class="bar" x="{LEFT + k * size + 0.5:.1f}" y="{floor - high:.1f}" '
            f'width="{size - 1:.1f}" height="{high:.1f}"><title>{number(edges[k])} to '
            f"{number(edges[k + 1])}: {share:.2g} %</title></rect>"
        )
    for k, edge in enumerate(edges):
        power = math.log10(abs(edge)) if edge and math.isfinite(edge) else math.nan
        if power == power and round(power) % 4 == 0 and abs(k - len(counts) / 2) > 2:
            sign = "-" if edge < 0 else ""
            found.append(_text(LEFT + k * size, HEIGHT - 8, f"{sign}1e{round(power)}"))
    found.append(_text(LEFT + len(counts) * size / 2, HEIGHT - 8, "0"))
    return _picture("".join(found), panel.title)


def _image(panel: Panel) -> str:
    """Counts in two directions, on a logarithmic scale."""
    assert panel.image is not None
    across, up, counts = panel.image
    most = math.log10(1 + max(max(row) for row in counts)) or 1.0
    wide = (WIDTH - LEFT - RIGHT) / len(counts)
    high = (HEIGHT - TOP - BOTTOM) / len(counts[0])
    found = []
    for j, row in enumerate(counts):
        for k, count in enumerate(row):
            if count:
                y = HEIGHT - BOTTOM - (k + 1) * high
                place = f'x="{LEFT + j * wide:.1f}" y="{y:.1f}"'
                size = f'width="{wide + 0.2:.1f}" height="{high + 0.2:.1f}"'
                strength = math.log10(1 + count) / most
                found.append(f'<rect class="cell" {place} {size} fill-opacity="{strength:.2f}"/>')
    for edges, vertical in ((across, False), (up, True)):
        last = len(edges) - 1
        for k in (1, last // 2, last - 1):
            text = "0" if k == last // 2 and last % 2 else number(edges[k])
            at = k + 0.5 if k == last // 2 and last % 2 else k
            if vertical:
                found.append(_text(LEFT - 6, HEIGHT - BOTTOM - at * high + 4, text, "end"))
            else:
                found.append(_text(LEFT + at * wide, HEIGHT - 8, text))
    return _picture("".join(found), panel.title)


def _alphas(panel: Panel) -> str:
    """A parabola, and a dot for each step where it has landed."""
    low, high = -1.6, 1.6

    def x(a: float) -> float:
        return LEFT + (min(max(a, low), high) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(a: float) -> float:
        a = min(max(a, low), high)
        return HEIGHT - BOTTOM - 24 - a * a / (high * high) * (HEIGHT - TOP - BOTTOM - 40)

    curve = [(low + (high - low) * k / 60) for k in range(61)]
    path = "M" + "L".join(f"{x(a):.1f} {y(a):.1f}" for a in curve)
    found = [f'<path class="curve" d="{path}"/>']
    for value, text in ((-1.0, "start"), (0.0, "bottom"), (1.0, "other side")):
        found.append(_text(x(value), HEIGHT - 8, f"{value:.0f}: {text}"))
        found.append(
            f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/>'
        )
    for k, each in enumerate(panel.series):
        values = [v for v in each.values if math.isfinite(v)][-300:]
        late = len(values) - max(1, len(values) // 10)
        piles: dict[int, int] = {}
        for j, value in enumerate(values):
            place = round(x(value) / 5)
            pile = piles[place] = piles.get(place, -1) + 1
            kind = "dot" if j >= late else "dot old"
            height = y(value) - 6 - min(5 * pile, 150) - 2 * k
            found.append(
                f'<circle class="{kind} s{k % 5}" cx="{x(value):.1f}" cy="{height:.1f}" r="3"/>'
            )
    return _picture("".join(found), panel.title)


def _heat(panel: Panel, heat: Heat) -> str:
    rows = _some(range(len(heat.layers)), ROWS)
    columns = _pieces(len(heat.steps), COLUMNS)
    known = [v for row in heat.values for v in row if math.isfinite(v) and (v > 0 or not panel.log)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if not panel.log:
        low = min(low, 0.0)
    size = (WIDTH - LABELS - RIGHT) / len(columns)
    found = []
    for place, row in enumerate(rows):
        y = float(TOP + place * ROW)
        found.append(_text(LABELS - 6, y + 10.5, _short(heat.layers[row]), "end", ' class="layer"'))
        for k, piece in enumerate(columns):
            values = [v for v in heat.values[row][piece] if math.isfinite(v)]
            if not values:
                continue
            value = sum(values) / len(values)
            step = heat.steps[piece.start]
            found.append(
                f'<rect class="cell" x="{LABELS + k * size:.1f}" y="{y}" width="{size + 0.3:.1f}" '
                f'height="{ROW - 1}" fill-opacity="{_strength(value, low, high, panel.log):.2f}">'
                f"<title>{escape(heat.layers[row])}, step {step}: {number(value)}</title></rect>"
            )
    bottom = TOP + len(rows) * ROW
    for step, anchor, x in (
        (heat.steps[0], "start", LABELS),
        (heat.steps[-1], "end", WIDTH - RIGHT),
    ):
        found.append(_text(x, bottom + 14, f"step {step}", anchor))
    found.append(_scale(low, high, bottom + 22))
    return _picture("".join(found), panel.title, bottom + 44)


def _scale(low: float, high: float, y: float) -> str:
    """What light and dark stand for."""
    found = []
    for k in range(20):
        found.append(
            f'<rect class="cell" x="{LABELS + 60 + 6 * k}" y="{y}" width="6" height="8" '
            f'fill-opacity="{0.06 + 0.94 * k / 19:.2f}"/>'
        )
    found.append(_text(LABELS + 54, y + 8, number(low), "end"))
    found.append(_text(LABELS + 186, y + 8, number(high), "start"))
    return "".join(found)


def _strength(value: float, low: float, high: float, log: bool) -> float:
    if log:
        if value <= 0:
            return 0.03
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    share = (value - low) / (high - low) if high > low else 0.5
    return 0.06 + 0.94 * min(max(share, 0.0), 1.0)


def _some(items: Sequence[int], most: int) -> list[int]:
    """All, or as many as there is room for, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _pieces(length: int, most: int) -> list[slice]:
    size = max(1, -(-length // most))
    return [slice(k, k + size) for k in range(0, length, size)]


def _short(name: str, room: int = 18) -> str:
    """A name with its end, which tells layers apart.

    Example:
        >>> _short("transformer.h.11.attn.c_proj")
        '...h.11.attn.c_proj'
    """
    return name if len(name) <= room else "..." + name[-(room - 2) :]
