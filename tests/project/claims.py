"""Sentences of the pages, with numbers as the results have them: what ``test_numbers.py`` looks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from benchmarks import pages
from benchmarks.libraries import FIRST_ORDER
from benchmarks.pages import ALONE, OURS, ROOT, entry, fastest, multiple, results
from benchmarks.report import cell, number
from experiments import store

Claims = Iterator[tuple[str, str]]
# Beside this library on a GPU.
BESIDE = (OURS, "backpack-for-pytorch", "opacus", "torch.func", "curvlinops")


def of(problem: str, quantity: str, library: str = OURS, field: str = "ratio") -> float:
    """What a library takes on a network at its standard size, in multiples of the gradient."""
    return cell(entry(problem), library, quantity)[field]


def swept(key: str, quantity: str, library: str = OURS) -> str:
    return multiple(cell(results()["problems"][key], library, quantity))


def short(value: float) -> str:
    return f"{value:.2g}"


def seconds(problem: str, quantity: str) -> float:
    """In milliseconds."""
    return 1e3 * of(problem, quantity, field="minimum")


def memory(problem: str, quantity: str, library: str = OURS) -> str:
    return number(of(problem, quantity, library, "bytes") / of(problem, "gradient", field="bytes"))


def of_readme() -> Claims:
    quantities = {"norms": "BatchL2Grad", "variance": "Variance", "KFAC": "KFAC"}
    for library, shown in ((OURS, quantities), (pages.ORIGINAL, quantities)):
        said = [f"{word} {number(of('3c3d', name, library))}" for word, name in shown.items()]
        yield "README.md", ", ".join(said)
    norms, noise = (multiple(fastest("3c3d", name)) for name in ("BatchL2Grad", "Variance"))
    yield "README.md", f"norms {norms}, variance {noise} (the faster of the two)"
    yield "README.md", f"KFAC {number(of('3c3d', 'KFAC', 'curvlinops'))} |"


def of_costs() -> Claims:
    page = "docs/costs.md"
    three = [number(of("3c3d", name)) for name in ("Variance", "BatchL2Grad", "DiagGGNMC")]
    together = number(of("3c3d", pages.COMBINED))
    yield page, f"cost 3C3D {together} gradients, and {three[0]}, {three[1]} and {three[2]} each alone"
    alone, norms = (number(of("mlp", "BatchL2Grad", library)) for library in (ALONE, OURS))
    yield page, f"`BatchL2Grad` of the MLP: {alone} instead of {norms}"
    limits = entry("3c3d")["limits"]
    over = max(of("3c3d", name) / limits[name]["limit"] for name in limits if name != "gradient")
    yield (
        page,
        f"within {number(over)} times its limit throughout; what is left is `extend` ({of('3c3d', 'extend') - 1:.2f})",
    )
    ahead = [
        " against ".join(number(of("logreg", name, library)) for library in (OURS, pages.ORIGINAL))
        for name in ("DiagGGNExact", "KFLR")
    ]
    ahead += [
        " against ".join(swept(key, "DiagGGNExact", library) for library in (OURS, pages.ORIGINAL))
        for key in ("3c3d:batch=4,classes=10:batch", "mlp:batch=64,classes=10:batch")
    ]
    yield (
        page,
        (
            f"`DiagGGNExact` ({ahead[0]}) and `KFLR` ({ahead[1]}), and `DiagGGNExact` of 3C3D with 4 images "
            f"({ahead[2]}) and of the MLP with 64 samples ({ahead[3]})"
        ),
    )
    extra = [seconds(name, "extend") - seconds(name, "gradient") for name in ("logreg", "mlp")]
    gradient = number(seconds("logreg", "gradient"))
    yield (
        page,
        (
            f"{number(extra[0])} ms for logistic regression, whose gradient takes {gradient} ms, "
            f"and {number(extra[1])} ms for the MLP"
        ),
    )
    yield page, f"gradient takes {short(seconds('mlp', 'gradient'))} ms"
    limit = number(entry("mlp")["limits"]["BatchL2Grad"]["limit"])
    many = swept("mlp:batch=1024,classes=10:batch", "BatchL2Grad")
    yield page, f"with a limit of {limit}, takes {norms} here, but {many} with 1024 samples"
    size = 4 * entry("mlp")["batch"] * entry("mlp")["parameters"] / 1e6
    yield page, f"of the MLP writes {size:.0f} MB"
    written = [number(of("mlp", "BatchGrad", library)) for library in (pages.ORIGINAL, OURS)]
    yield page, f"{written[0]} gradients for the original, {written[1]} with huge pages"
    theirs, norms = (
        number(of("gpt2", "BatchL2Grad", "torch.func")),
        number(of("gpt2", "BatchL2Grad", ALONE)),
    )
    yield page, f"GPT-2 ({norms} against {theirs})"
    yield page, f"a gradient of {short(seconds('gpt2', 'gradient'))} ms for"
    peaks = [memory("allcnnc", "DiagGGNExact", library) for library in (OURS, pages.ORIGINAL)]
    yield (
        page,
        (
            f"peaks at {peaks[0]} times the gradient's memory ({peaks[1]} for the original), "
            f"`KFLR` at {memory('allcnnc', 'KFLR')}"
        ),
    )


def of_device() -> Claims:
    """Of the run on a GPU."""
    page = "docs/costs.md"
    found = json.loads((ROOT / "benchmarks/results/devices/2026-11-26-nvidia-h200.json").read_text())
    several = [
        each
        for each in found["products"]
        if each["sizes"][0] == 10 and each["sizes"][3] <= 16 and each["dtype"] == "torch.float32"
    ]
    ours, torchs = ([each[kind] / 1e3 for each in several] for kind in ("kernel", "torch"))
    yield (
        page,
        (
            f"it took {min(ours):.2f} to {max(ours):.2f} ms where torch's own operations took "
            f"{min(torchs):.2f} to {max(torchs):.2f} ("
        ),
    )
    most = max(row["bytes"] for row in found["limits"])
    times = {
        row["quantity"]: f"{row['columns'] / 1e3:.1f}"
        for row in found["limits"]
        if row["problem"] == "3c3d" and (row["bytes"] == most or not row["quantity"])
    }
    yield (
        page,
        (
            f"a gradient took {times[None]} ms, `SumGradSquared` {times['SumGradSquared']}, `DiagGGNExact` "
            f"{times['DiagGGNExact']}, `KFLR` {times['KFLR']} and `DiagHessian` {times['DiagHessian']} with room"
        ),
    )


def beside_on_device() -> Claims:
    """Of the run on a GPU beside other libraries: the rows of a table."""
    path = ROOT / "benchmarks/results/devices/2026-11-27-nvidia-h200-beside.json"
    problems = json.loads(path.read_text())["problems"].values()
    for quantity in (*FIRST_ORDER, "DiagGGNMC", "KFAC", "DiagGGNExact"):
        row = []
        for problem in problems:
            cells = [problem["libraries"].get(name, {}).get(quantity, {}) for name in BESIDE]
            row.append(", ".join(_ratio(each) for each in cells))
        yield "docs/costs.md", f"| `{quantity}` | {' | '.join(row)} |"


def _ratio(found: dict[str, Any]) -> str:
    """A multiple of the gradient; no number where there is none, or it is of wrong values."""
    agrees = not isinstance(found.get("error"), float) or found["error"] < 0.01
    return f"{found['ratio_median']:.1f}" if "ratio_median" in found and agrees else "-"


class Training:
    """A problem's chosen runs, by optimizer."""

    def __init__(self, problem: str, epochs: int, batch: int, samples: int | None = None) -> None:
        runs, _ = store.read(pages.TRAINING)
        self.runs = runs
        self.budget = {"problem": problem, "epochs": epochs, "batch": batch, "samples": samples}
        chosen = store.choose(runs)[problem, epochs, batch, samples]
        self.chosen = {each.setting["optimizer"]: each for each in chosen}

    def final(self, name: str, curve: str = "train_loss") -> float:
        return self.chosen[name].final(curve)

    def curve(self, name: str, curve: str) -> Any:
        curves = [run["curves"][curve] for run in self.chosen[name].runs]
        return np.median(np.array(curves), 0)

    def reaches(self, name: str, loss: float) -> int:
        return int((self.curve(name, "train_loss") <= loss).argmax())

    def test(self, name: str, kind: str = "accuracy") -> float:
        return median(run["test"][kind] for run in self.chosen[name].runs)

    def diverged(self, *names: str) -> tuple[int, int]:
        """Of all settings that were tried, with the first seed."""
        tried = [
            run
            for run in self.runs
            if run["setting"]["optimizer"] in names
            and run["setting"]["seed"] == store.SEARCH_SEED
            and all(run["setting"][key] == value for key, value in self.budget.items())
        ]
        return sum(run["diverged"] is not None for run in tried), len(tried)


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def of_digits() -> Claims:
    page = "docs/experiments.md"
    short_run, long_run = Training("digits-cnn", 10, 64), Training("digits-cnn", 80, 64)
    target = short_run.final("Adam")
    epochs = {name: short_run.reaches(name, target) for name in ("KFLR", "KFAC", "Adam")}
    times = {name: short_run.curve(name, "seconds")[epoch] for name, epoch in epochs.items()}
    yield (
        page,
        (
            f"training loss after {epochs['KFLR']} epochs, KFAC after {epochs['KFAC']}; Adam itself takes "
            f"{epochs['Adam']}. In seconds these are "
            + "{:.2f}, {:.2f} and {:.2f}.".format(*times.values())
        ),
    )
    took, pace = short_run.curve("KFLR", "seconds")[-1], short_run.curve("SGD", "seconds")[-1] / 10
    yield (
        page,
        f"KFLR's ten epochs took {took:.1f} s, in which SGD makes about {round(took / pace, -1):.0f}.",
    )
    reached = [long_run.reaches(name, short_run.final("KFLR")) for name in ("SGD", "Adam")]
    yield (
        page,
        f"KFLR's final loss after {reached[0]} and {reached[1]} epochs ({reached[0] * pace:.1f} s at the pace above)",
    )
    ends = [percent(long_run.final(name, "validation_accuracy")) for name in ("SGD", "Adam")]
    tests = [percent(long_run.test(name)) for name in ("SGD", "Adam")]
    theirs = [percent(short_run.test(name)) for name in ("KFLR", "KFAC")]
    yield (
        page,
        (
            f"end at {ends[0]} and {ends[1]} on the validation and {tests[0]} and {tests[1]} on the test set, "
            f"where KFLR has {theirs[0]} and KFAC {theirs[1]}"
        ),
    )
    which = (short_run, "KFLR"), (short_run, "KFAC"), (long_run, "Adam"), (long_run, "SGD")
    losses = [short(each.final(name, "validation_loss")) for each, name in which]
    tests = [short(each.test(name, "loss")) for each, name in which]
    yield (
        page,
        (
            f"{losses[0]} (KFLR) and {losses[1]} (KFAC) after 10 epochs, {losses[2]} (Adam) and {losses[3]} (SGD) "
            f"after 80; on the test set {', '.join(tests)}."
        ),
    )
    count, tried = short_run.diverged("KFAC", "KFLR")
    yield page, f"{({9: 'Nine'})[count]} of the {tried} settings of KFAC and KFLR diverged"


def of_logistic_regression() -> Claims:
    page = "docs/experiments.md"
    run = Training("digits-logreg", 10, 64)
    loss = {name: run.final(name) for name in run.chosen}
    right = {name: percent(run.final(name, "validation_accuracy")) for name in run.chosen}
    yield (
        page,
        (
            f"training loss of {short(loss['SGD'])} and {right['SGD']} on the validation set, KFLR at "
            f"{short(loss['KFLR'])} and {right['KFLR']}, EKFLR at {short(loss['EKFLR'])} and {right['EKFLR']}, "
            f"Adam at {short(loss['Adam'])}, diagonals between {short(loss['DiagGGNMC'])} (DiagGGNMC) and "
            f"{loss['DiagGGNExact']:.3g} (DiagGGNExact)."
        ),
    )
    epoch = run.reaches("EKFLR", loss["SGD"])
    taken = run.curve("EKFLR", "seconds")[epoch], run.curve("SGD", "seconds")[-1]
    yield (
        page,
        f"loss after {epoch} epochs, but takes {taken[0]:.2f} s for them, SGD {taken[1]:.2f} s for all ten",
    )
    run = Training("mnist-logreg", 5, 128)
    loss = {name: run.final(name) for name in run.chosen}
    tests = sorted(run.test(name) for name in run.chosen)
    yield (
        page,
        (
            f"Adam (training loss {loss['Adam']:.3g}) and KFAC ({loss['KFAC']:.3g}) are level by epoch, SGD "
            f"({loss['SGD']:.3g}) and DiagGGNMC ({loss['DiagGGNMC']:.3g}) a little behind; all are between "
            f"{percent(tests[0])} and {percent(tests[-1])} on the test set. KFAC takes "
            f"{run.curve('KFAC', 'seconds')[-1]:.0f} s, Adam {run.curve('Adam', 'seconds')[-1]:.1f} s"
        ),
    )


def of_characters() -> Claims:
    run = Training("tolstoi-char-rnn", 5, 50, 1000)
    right = {name: percent(run.final(name, "validation_accuracy")) for name in run.chosen}
    yield (
        "docs/experiments.md",
        (
            f"({right['Adam']} of the validation characters), then SGD ({right['SGD']}) and KFAC ({right['KFAC']})"
        ),
    )


def claims() -> Claims:
    """All of them, as page and sentence."""
    for part in (
        of_readme,
        of_costs,
        of_device,
        beside_on_device,
        of_digits,
        of_logistic_regression,
        of_characters,
    ):
        yield from part()
