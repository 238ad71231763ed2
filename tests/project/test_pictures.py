"""The benchmark's pictures are drawn from its results, and its tables are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import pictures, report, vivit

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("2*-cores.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_results(path: Path) -> None:
    assert path.with_suffix(".md").read_text() == report.markdown(json.loads(path.read_text()))


def test_tables_of_low_rank_curvature() -> None:
    path = RESULTS[-1].with_name("vivit.json")
    assert path.with_suffix(".md").read_text() == vivit.markdown(json.loads(path.read_text()))


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text lies on another, all is inside the picture, and no library has a name of the code's."""
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(pictures, "save", lambda figure, path, dpi: drawn.update({path.stem: figure}))
    pictures.draw(json.loads(RESULTS[-1].read_text()), tmp_path / "some")
    assert set(drawn) == {
        f"some-{each}"
        for each in ("3c3d", "allcnnc", "first-order", "second-order", "memory", "scaling")
    }
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axes in figure.axes:
            low, high = sorted(axes.get_ylim())
            ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            # An axis also holds ticks beyond its ends, which are not drawn.
            texts += [*axes.texts, axes.title, *(each for at, each in ticks if low <= at <= high)]
        shown = [text for text in texts if text.get_text() and text.get_visible()]
        boxes = [text.get_window_extent() for text in shown]
        for j, box in enumerate(boxes):
            where = shown[j].get_text()
            # Lines of text have some space of their own above and below.
            inner = box.padded(0, -2)
            assert not any(inner.overlaps(other.padded(0, -2)) for other in boxes[:j]), (name, where)
            inside = min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, (name, where)
            assert not where.startswith("ours"), name
