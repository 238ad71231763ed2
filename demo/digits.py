"""Watch a small network learn handwritten digits, through its individual gradients and curvature.

Every training step makes one backward pass, which yields the gradient the optimizer needs and,
beside it, three quantities of each parameter:

- ``variance`` tells how much of a layer's gradient is signal (:func:`signal_to_noise`),
- ``batch_l2`` tells which digits pull hardest on the network (:func:`gradient_norms`),
- ``diag_ggn_mc`` tells how strongly the loss is curved (:func:`mean_curvature`).

Run it with ``python -m demo.digits``; it prints a table and writes ``demo/output/digits.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchL2Grad, DiagGGNMC, Variance

OUTPUT = Path(__file__).parent / "output" / "digits.png"


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    samples: int | None = None
    output: Path = OUTPUT


class Data(NamedTuple):
    """Images ``[N, 1, 8, 8]`` in [0, 1] and labels ``[N]``; every fifth digit is a test digit."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class History:
    """What was seen, one entry per training step unless it says otherwise.

    Attributes:
        layers: names of the layers.
        loss: mini-batch loss.
        snr: per layer, :func:`signal_to_noise`.
        curvature: per layer, :func:`mean_curvature`.
        norms: individual gradient norms, ``[layers, batch_size]``.
        indices: training samples in the mini-batch, ``[batch_size]``.
        accuracy: on the test digits, one entry per epoch.
    """

    layers: list[str]
    loss: list[float] = field(default_factory=list)
    snr: list[list[float]] = field(default_factory=list)
    curvature: list[list[float]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    @property
    def epoch_length(self) -> int:
        """Number of steps in an epoch."""
        return len(self.loss) // len(self.accuracy)

    def total_norms(self, steps: slice) -> Tensor:
        """Norms of individual gradients in all parameters of the network, over some steps."""
        return torch.cat([norms.square().sum(0).sqrt() for norms in self.norms[steps]])


# --------------------------------------------------------------------------------------
# What a backward pass tells about a layer


def signal_to_noise(layer: nn.Module) -> float:
    """Squared norm of a layer's gradient over what noise alone would make of it.

    Let ``g_n`` be the gradient of the n-th sample's own loss, so that ``p.grad`` is the mean of N
    of them. ``p.variance`` is the biased variance of ``g_n / N``; hence ``g_n`` has the (unbiased)
    variance ``N^2 * N / (N - 1) * p.variance``, and the mean of N of them an N-th of that. Summed
    over the layer, this is what the squared norm of ``p.grad`` would be on average if the true
    gradient were zero: a ratio of 1 cannot be told from noise.
    """
    parameters = list(layer.parameters())
    count = parameters[0].batch_l2.numel()
    signal = sum(p.grad.square().sum() for p in parameters)
    noise = sum(p.variance.sum() for p in parameters) * count**2 / (count - 1)
    return float(signal / noise.clamp(min=1e-30))


def gradient_norms(layer: nn.Module) -> Tensor:
    """Norms of the gradients of each sample's own loss in a layer, ``[N]``.

    ``p.batch_l2`` holds squared norms of gradients that carry the mean's factor ``1/N``.
    """
    squares = torch.stack([p.batch_l2 for p in layer.parameters()]).sum(0)
    return squares.sqrt() * squares.numel()


def mean_curvature(layer: nn.Module) -> float:
    """Mean over a layer's parameters of the diagonal of the generalized Gauss-Newton matrix."""
    return float(torch.cat([p.diag_ggn_mc.flatten() for p in layer.parameters()]).mean())


# --------------------------------------------------------------------------------------
# Training


def load(samples: int | None = None) -> Data:
    """Scikit-learn's handwritten digits, the first ``samples`` of them."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:samples], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels[:samples])
    test = torch.arange(len(y)) % 5 == 4
    return Data(x[~test], y[~test], x[test], y[test])


def network() -> nn.Sequential:
    """Two convolutions and a linear layer."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(1, 16, 3, padding=1))
    model.add_module("relu1", nn.ReLU())
    model.add_module("conv2", nn.Conv2d(16, 32, 3, padding=1))
    model.add_module("relu2", nn.ReLU())
    model.add_module("pool", nn.MaxPool2d(2))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(32 * 4 * 4, 10))
    return model


def train(settings: Settings, data: Data, console: Console) -> tuple[nn.Sequential, History]:
    """Train a network and record what every backward pass tells about it."""
    torch.manual_seed(settings.seed)
    model, loss_function = extend(network()), extend(nn.CrossEntropyLoss())
    layers = {name: layer for name, layer in model.named_children() if list(layer.parameters())}
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    history = History(list(layers))
    size = min(settings.batch_size, len(data.train_y))

    columns = (
        TextColumn("[bold]training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  test accuracy {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
    )
    steps = settings.epochs * (len(data.train_y) // size)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"), accuracy=0.0)
        for _ in range(settings.epochs):
            order = torch.randperm(len(data.train_y))
            for index in order.split(size):
                if len(index) < size:
                    continue
                optimizer.zero_grad()
                loss = loss_function(model(data.train_x[index]), data.train_y[index])
                with backpack(Variance(), BatchL2Grad(), DiagGGNMC()):
                    loss.backward()
                optimizer.step()

                history.loss.append(loss.item())
                history.indices.append(index)
                history.snr.append([signal_to_noise(layer) for layer in layers.values()])
                history.curvature.append([mean_curvature(layer) for layer in layers.values()])
                history.norms.append(torch.stack([gradient_norms(x) for x in layers.values()]))
                progress.update(task, advance=1, loss=loss.item())
            history.accuracy.append(accuracy(model, data.test_x, data.test_y))
            progress.update(task, accuracy=history.accuracy[-1])
    return model, history


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Most probable classes."""
    return model(x).argmax(1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Fraction of digits classified correctly."""
    return (predict(model, x) == y).float().mean().item()


# --------------------------------------------------------------------------------------
# What there is to see

COLORS = ("#0072b2", "#d55e00", "#009e73")
EARLY, LATE = "#9aa5b1", "#6a3d9a"
INK, FAINT = "#222b36", "#d9dee4"
STRIP = 7


def table(model: nn.Sequential, history: History) -> Table:
    """Each layer in the first and the last epoch."""
    length = history.epoch_length
    first, last = slice(0, length), slice(-length, None)
    view = Table(title="First epoch \N{RIGHTWARDS ARROW} last epoch (medians)")
    view.add_column("layer", style="bold")
    for heading in ("parameters", "signal / noise", "gradient norm", "mean GGN diagonal"):
        view.add_column(heading, justify="right")
    snr, curvature = np.array(history.snr), np.array(history.curvature)
    norms = torch.stack(history.norms).numpy()
    for j, name in enumerate(history.layers):
        pairs = [
            [float(np.median(values[steps])) for steps in (first, last)]
            for values in (snr[:, j], norms[:, j], curvature[:, j])
        ]
        size = sum(p.numel() for p in model.get_submodule(name).parameters())
        cells = [f"{a:.2g} \N{RIGHTWARDS ARROW} {b:.2g}" for a, b in pairs]
        view.add_row(name, f"{size:,}", *cells)
    return view


def figure(model: nn.Module, history: History, data: Data) -> Figure:
    """Loss, signal-to-noise, gradient norms, curvature, and the quietest and loudest digits."""
    canvas = Figure(figsize=(12, 10), dpi=130, facecolor="white")
    panels, strip = canvas.add_gridspec(
        2, 1, height_ratios=(5.8, 0.92), left=0.075, right=0.965, top=0.862, bottom=0.06, hspace=0.2
    )
    grid = panels.subgridspec(2, 2, hspace=0.38, wspace=0.2)
    canvas.text(
        0.075, 0.968, "What one backward pass knows", size=20, weight="bold", color=INK, va="center"
    )
    canvas.text(
        0.075,
        0.927,
        "A small CNN learns handwritten digits. All but the test error comes out of the backward "
        "passes that train it.\n"
        "Thin lines: every step. Thick lines: geometric running mean over half an epoch.",
        size=11.5,
        color=INK,
        va="center",
    )
    _loss_panel(canvas.add_subplot(grid[0, 0]), history)
    snr = canvas.add_subplot(grid[0, 1])
    _layer_panel(snr, history, history.snr, "How much of the gradient is signal?")
    snr.set_ylabel("signal / noise")
    snr.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    snr.annotate("noise alone", (0, 1), (4, -4), textcoords="offset points", va="top", size=9)
    _norm_panel(canvas.add_subplot(grid[1, 0]), history)
    curvature = canvas.add_subplot(grid[1, 1])
    _layer_panel(curvature, history, history.curvature, "How strongly is the loss curved?")
    curvature.set_ylabel("mean GGN diagonal")
    _digits(canvas, strip, model, history, data)
    return canvas


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=12.5, weight="bold", color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(True, which="major", color=FAINT, lw=0.7)
    axes.set_axisbelow(True)


def _epochs(history: History) -> np.ndarray:
    return (np.arange(len(history.loss)) + 0.5) / history.epoch_length


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Geometric running mean, shorter at the ends."""
    logs, kernel = np.log(np.maximum(values, 1e-30)), np.ones(min(width, len(values)))
    weights = np.convolve(np.ones_like(logs), kernel, "same")
    return np.exp(np.convolve(logs, kernel, "same") / weights)


def _loss_panel(axes: Axes, history: History) -> None:
    _style(axes, f"The network learns: {history.accuracy[-1]:.1%} of test digits right")
    x, loss = _epochs(history), np.array(history.loss)
    axes.semilogy(x, loss, color=COLORS[0], lw=0.8, alpha=0.3)
    axes.semilogy(x, _smooth(loss, history.epoch_length // 2), color=COLORS[0], lw=2)
    error = 1 - np.array(history.accuracy)
    shown = np.where(error > 0, error, np.nan)
    axes.semilogy(np.arange(len(error)) + 1, shown, "o-", color=COLORS[1], ms=5, lw=1.5)
    axes.plot([], [], color=COLORS[0], lw=2, label="training loss")
    axes.plot([], [], "o-", color=COLORS[1], ms=5, lw=1.5, label="test error (fraction wrong)")
    axes.legend(frameon=False, fontsize=9.5, loc="upper right")
    axes.set_xlabel("epoch")


def _layer_panel(axes: Axes, history: History, rows: list[list[float]], title: str) -> None:
    _style(axes, title)
    x, values = _epochs(history), np.array(rows)
    for name, color, line in zip(history.layers, COLORS, values.T, strict=True):
        axes.semilogy(x, line, color=color, lw=0.7, alpha=0.25)
        axes.semilogy(x, _smooth(line, history.epoch_length // 2), color=color, lw=2, label=name)
    axes.set_ylim(top=2.5 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=len(history.layers))
    axes.set_xlabel("epoch")


def _norm_panel(axes: Axes, history: History) -> None:
    _style(axes, "Who still pulls? Norms of individual gradients")
    length = history.epoch_length
    parts = [history.total_norms(slice(0, length)), history.total_norms(slice(-length, None))]
    logs = [part.clamp(min=1e-7).log10().numpy() for part in parts]
    low, high = np.quantile(np.concatenate(logs), (0.002, 1))
    bins = np.linspace(low, high, 45)
    labels = ("first epoch", "last epoch")
    for values, color, label in zip(logs, (EARLY, LATE), labels, strict=True):
        axes.hist(10 ** np.maximum(values, low), 10**bins, color=color, alpha=0.65, label=label)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=9.5, loc="upper left")
    axes.set_xlabel("norm of one digit's gradient")
    axes.set_ylabel("digits")


def _short(value: float) -> str:
    """One or two digits, as mathematics: 48, 0.3, 6 x 10^-6."""
    if value >= 0.01:
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    digit, exponent = f"{value:.0e}".split("e")
    return rf"${digit}\cdot10^{{{int(exponent)}}}$"


def _digits(canvas: Figure, place: SubplotSpec, model: nn.Module, history: History, data: Data) -> None:
    """Training digits with the smallest and the largest gradients in the last epoch."""
    steps = slice(-history.epoch_length, None)
    norms, index = history.total_norms(steps), torch.cat(history.indices[steps])
    order = norms.argsort()
    count = min(STRIP, len(order) // 2)
    chosen = [*order[:count], *order[-count:].flip(0)]
    ratios = [1.0] * count + [0.35] + [1.0] * count
    grid = place.subgridspec(1, 2 * count + 1, wspace=0.12, width_ratios=ratios)
    predictions = predict(model, data.train_x[index])
    for j, sample in enumerate(chosen):
        axes = canvas.add_subplot(grid[0, j + (j >= count)])
        axes.imshow(data.train_x[index[sample], 0].numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(EARLY if j < count else LATE)
        axes.spines[:].set_linewidth(1.5)
        label, guess = int(data.train_y[index[sample]]), int(predictions[sample])
        verdict = f"{label}" if label == guess else f"{label} (not {guess})"
        axes.set_xlabel(f"{verdict}\n{_short(float(norms[sample]))}", size=9, color=INK)
        if j in (0, count):
            kind = ("Smallest", "Largest")[j // count]
            axes.set_title(
                f"{kind} gradients in the last epoch",
                loc="left",
                size=10.5,
                weight="bold",
                color=INK,
            )


def run(settings: Settings, console: Console | None = None) -> History:
    """Train, print the table, draw the figure."""
    console = console or Console()
    data = load(settings.samples)
    model, history = train(settings, data, console)
    console.print(table(model, history))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    figure(model, history, data).savefig(settings.output)
    console.print(f"Test accuracy [bold]{history.accuracy[-1]:.1%}[/]; figure: {settings.output}")
    return history


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--samples", type=int, default=None, help="use fewer digits")
    parser.add_argument("--output", type=Path, default=defaults.output, help="the figure")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.batch_size < 2:
        parser.error("there must be at least one epoch, and a variance needs batches of two")
    run(Settings(**vars(options)))


if __name__ == "__main__":
    # The tensors are small: threads would spend their time waiting for each other.
    torch.set_num_threads(1)
    main()
