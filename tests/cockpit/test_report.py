"""Reports, figures, tables: everything that a history holds is in them."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpack import extend
from backpack.cockpit import Cockpit, CockpitPlotter, History, watch
from backpack.cockpit.__main__ import main
from backpack.cockpit.findings import statements
from backpack.cockpit.instruments import GROUPS, panels
from backpack.cockpit.monitor import Monitor
from backpack.cockpit.report import compared, html, write
from backpack.cockpit.terminal import sparkline, text
from backpack.cockpit.utils.configuration import configuration


@pytest.fixture(autouse=True)
def _seed() -> None:
    matplotlib.use("Agg")
    torch.manual_seed(0)


def run(path: Path | None = None, steps: int = 24, lr: float = 0.1) -> Monitor:
    layers = (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    truth = torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = watch(model, optimizer, quantities="full", every=1, path=path, alarms="all")
        for step in range(steps):
            X = torch.randn(32, 4)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), (X @ truth).argmax(1))
            (loss * (40 if step == 15 else 1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        monitor.close()
    return monitor


@cache
def finished() -> History:
    """A run that several tests look at."""
    torch.manual_seed(0)
    return run().history()


class Page(HTMLParser):
    """Looks whether tags are closed, and what they are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "th", "td", "tr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("th", "td", "tr"):
            assert self.open.pop() == tag, tag


def test_a_page() -> None:
    """One file, without scripts and without anything from elsewhere; every instrument is in it."""
    page = html(finished(), "A & B <run>")
    tags = Page(page).seen
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert (
        "http" not in page and "url(" not in page and "nan" not in re.sub(r"<text.*?/text>", "", page)
    )
    assert page.count("<svg") == page.count("<figure") == len(panels(finished()))
    assert "A &amp; B &lt;run&gt;" in page
    for name in """Loss|Alpha|Gradient norm|Gradient tests|Individual gradients|Largest eigenvalue|TIC
    |Gradient norm by layer|Gradients and parameters|Silent inputs by layer""".split("|"):
        assert f"<h3>{name.strip()}</h3>" in page
    assert (
        "prefers-color-scheme:dark" in page and "width=device-width" in page and "@media print" in page
    )
    # It begins with what the numbers say.
    assert page.index('<ul class="says">') < page.index("<svg")
    assert "There is a spike." in page and 'class="event"' in page


def test_it_stays_small() -> None:
    """Long runs of many layers make no endless pages."""
    history = History()
    for step in range(3000):
        values = {f"grad_norm/layer.{k}.weight": 1.0 + k + step for k in range(200)}
        history.add(step, {"loss": 1 / (1 + step), "grad_norm": 1.0, **values})
    assert len(html(history)) < 1.5e6


@pytest.mark.parametrize("values", [[], [1.0], [math.nan, math.inf], [0.0, 0.0], [-1.0, 2.0]])
def test_odd_histories(values: list[float], tmp_path: Path) -> None:
    history = History()
    for step, value in enumerate(values):
        history.add(step, {"loss": value, "grad_norm": value, "alpha": value, "dead_units/a": value})
    Page(html(history))
    text(history)
    write(history, tmp_path / "run.png")
    assert statements(history)


@pytest.mark.parametrize("ending", ["html", "png", "pdf", "svg"])
def test_files(ending: str, tmp_path: Path) -> None:
    path = write(finished(), tmp_path / f"run.{ending}")
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="a report is .html, .png, .pdf or .svg"):
        write(finished(), tmp_path / "run.doc")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(a, 8)
    run(b, 8, lr=0.5)
    main(["report", str(a), "-o", str(tmp_path / "out.html")])
    assert "<h1>a</h1>" in (tmp_path / "out.html").read_text()
    main(["report", str(b)])
    assert (tmp_path / "b.html").exists()
    main(["show", str(a)])
    assert "grad norm" in capsys.readouterr().out
    main(["compare", str(a), str(b), "-o", str(tmp_path / "both.html")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["a", "b"] and any(line.startswith("loss ") for line in lines)
    Page((tmp_path / "both.html").read_text())


def test_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = run(steps=16)
    monitor.show()
    shown = capsys.readouterr().out
    assert "loss" in shown and "spike" in shown
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monitor.show()
    assert "loss" in capsys.readouterr().out
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁ █" and sparkline([]) == ""


def test_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda block: shown.append(plt.gcf()))
    run(steps=6).show(window=True)
    assert len(shown) == 1
    plt.close("all")


def test_several_runs() -> None:
    page = compared([("slow", finished()), ("fast", run(steps=8, lr=1.0).history())])
    assert page.count(">slow<") >= 2 and page.count(">fast<") >= 2


def test_instruments_have_captions() -> None:
    for panel in panels(finished()):
        assert panel.group in GROUPS and len(panel.caption) > 20 and panel.title


# --------------------------------------------------------------------------------------
# What the numbers say


def said(rows: list[dict[str, float]], **header: str) -> list[str]:
    history = History()
    history.begin(**header)
    for step, values in enumerate(rows):
        history.add(step, values)
    return [s.text for s in statements(history)]


def constant(**values: float) -> list[dict[str, float]]:
    return [dict(values) for _ in range(20)]


def test_statements() -> None:
    assert said([{"loss": 2.0 * 0.95**k} for k in range(20)]) == ["The loss falls."]
    assert said([{"loss": 1.0 + k} for k in range(20)]) == ["The loss is higher than at the start."]
    assert said(constant(loss=1.0)) == ["The loss does not move."]
    assert said([{"loss": 1.0}, {"loss": math.nan}])[0] == "The loss is not a finite number."
    assert said(constant(alpha=1.5))[0].startswith("Steps are too large")
    assert said(constant(alpha=0.7))[0].startswith("Steps are large")
    assert said(constant(alpha=-0.9))[0].startswith("Steps are small")
    assert said(constant(alpha=0.1))[0].startswith("Steps end near the bottom")
    assert said(constant(norm_test=0.95)) == ["The mini-batch gradient is mostly noise."]
    assert said(constant(update_ratio=1e-7)) == ["Parameters hardly move."]
    assert said(constant(early_stopping=0.5)) == ["Gradients can no longer be told from noise."]
    assert said(constant(hard_samples=0.02)) == ["There is too little to say anything yet."]
    assert said(constant(hard_samples=0.1))[0].startswith("10 % of the samples stay hard")
    dead = {"dead_units/a": 0.1, "dead_units/b": 0.97}
    assert said(constant(**dead))[0].startswith("97 % of what layer b is given")
    vanishing = {f"output_grad_rms/{k}": 10.0**-k for k in range(5)}
    assert said(constant(**vanishing)) == ["Gradients vanish on the way to layer 4."]
    edge = constant(hess_max_ev=19.0, learning_rate=0.1)
    assert said(edge, optimizer="SGD") == ["Training is at the edge of stability."]
    assert said([]) == ["There is too little to say anything yet."]


# --------------------------------------------------------------------------------------
# The original's plotter


def test_the_originals_plotter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda block: None)
    model, lossfunc = extend(nn.Linear(4, 3)), extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cp, plotter = Cockpit(model.parameters(), configuration("full")), CockpitPlotter()
    for step in range(6):
        loss = lossfunc(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        optimizer.zero_grad()
        with cp(step, info={"loss": loss, "optimizer": optimizer, "batch_size": 8}):
            loss.backward(create_graph=cp.create_graph(step))
        optimizer.step()
    cp.log(5, 0, 1.0, 1.1, 1.2, 0.5, 0.4, 0.3, 0.1)
    plotter.plot(cp)
    live = {ax.get_title(loc="left") for ax in plotter.figure.axes}
    path = tmp_path / "problem" / "SGD" / "setting" / "log"
    cp.write(path)
    plotter.plot(path, show_plot=False, save_plot=True, savename_append="epoch__0")
    written = {ax.get_title(loc="left") for ax in plotter.figure.axes}
    assert live == written
    names = "Loss|Alpha|Gradient tests|Largest eigenvalue|Trace of the curvature|TIC|Update size"
    assert set(names.split("|")) <= live and "Gradients and parameters" in live
    assert (path.parent / "cockpit__primary__epoch__0.png").exists()
    plotter.plot(
        cp, False, save_plot=True, savedir=path.parent, savename="log", savename_append="epoch__1"
    )
    plotter.build_animation(path)
    assert (path.parent / "log__primary.gif").exists()
    with pytest.raises(ValueError, match="say where"):
        plotter.plot(cp, show_plot=False, save_plot=True)
    with pytest.raises(ValueError, match="neither a Cockpit nor"):
        plotter.plot(tmp_path / "nothing")
    plt.close("all")
