"""The least that a quantity can cost beside the gradient: multiply-adds and bytes, counted per layer.

Everything is counted for one forward and one backward pass in which autograd computes the gradient, as
it always does, and the quantity comes on top. A part of the work takes the longer of its arithmetic and
its memory traffic, at rates measured on the machine (``machine_rates``); parts do not overlap. Nothing
else is counted: no calls, no Python, no caches that spare traffic. So this is a model, not a
proof, and a measured ratio may lie below it where caches hold what it counts as traffic.

A product layer has ``R`` positions per sample, ``I`` inputs and ``O`` outputs at each:

| layer | R | I | O |
|---|---|---|---|
| ``Linear`` on ``[N, *, I]`` | size of ``*`` | in_features | out_features |
| ``Conv2d`` | output pixels | in_channels / groups * kernel pixels | out_channels |
| one layer of ``LSTM``: two products | steps | input size; hidden size | 4 * hidden size |

With ``x`` elements in the input, ``g`` in the output, ``w = I O`` in the weight and ``F = N R I O``:

| part | multiply-adds | elements moved |
|---|---|---|
| forward | F | x + w + g |
| gradient of the weight | F | x + g + w |
| gradient of the input (not in the first layer) | F | g + w + x |
| ``BatchGrad`` | F | x + g + N w |
| ``BatchL2Grad``, ``R = 1``: norms multiply | N (I + O) | x + g |
| ``BatchL2Grad`` else, the cheaper of blocks and pairs | F + N w; N R (R + 1) / 2 (I + O) | x + g |
| ``SumGradSquared``, ``R = 1``: product of squares | N w | x + g + w |
| ``SumGradSquared`` else: blocks | F + N w | x + g + w |
| ``Variance`` | as above | as above + 2 w |
| columns carried to the layers before, each of ``M`` | M F | M (g + x) + w |
| diagonal from columns, ``R = 1``: squares first | N w + M N O | x + M g + w |
| diagonal from columns else | as ``SumGradSquared``, ``M`` times | x + M g + w |
| Kronecker factors, symmetric halves | N R I^2 / 2 + M N O^2 / 2 | x + I^2 + M g + O^2 |
| of convolutions with kernels of ``K`` places | N R I^2 / (K + 1) + M N O^2 / 2 | as above |

Sampled curvature has ``M = 1`` column, exact curvature of cross-entropy one less than classes. Layers
that act elementwise (also pooling and batch norm in evaluation mode) only move elements; columns
through an LSTM take both of its products. An embedding moves what it looks up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.libraries import COMBINED, EXTEND, GRADIENT, QUANTITIES


class Work(NamedTuple):
    """Multiply-adds and elements moved."""

    macs: float
    elements: float


class Layer(NamedTuple):
    """A layer as counted: ``products`` are pairs ``(I, O)``, empty for all but product layers.

    ``overlap``: places of a kernel's axis along which each input meets all of them.
    """

    samples: int
    positions: int
    x: int
    g: int
    products: tuple[tuple[int, int], ...] = ()
    rows: int = 0
    first: bool = False
    overlap: int = 1

    @property
    def weights(self) -> int:
        """Elements of the weights."""
        return sum(i * o for i, o in self.products) + self.rows

    @property
    def forward(self) -> float:
        """Multiply-adds of the forward pass."""
        return sum(self.samples * self.positions * i * o for i, o in self.products)

    def gradient(self) -> list[Work]:
        """The plain gradient."""
        if self.rows:
            return [Work(0, 2 * self.g), Work(0, self.g + self.rows)]
        parts = [Work(self.forward, self.x + self.weights + self.g)]
        if self.products:
            parts.append(Work(self.forward, self.x + self.g + self.weights))
        return parts if self.first else parts + self.carry(1)

    def carry(self, columns: int) -> list[Work]:
        """Columns at the output carried to the input."""
        if self.first:
            return []
        mask = 0 if self.products else self.g
        moved = columns * (self.g + self.x) + self.weights + mask
        return [Work(columns * self.forward, moved)]

    def individual(self) -> list[Work]:
        """``BatchGrad``."""
        if not self.weights:
            return []
        return [Work(self.forward, self.x + self.g + self.samples * self.weights)]

    def norms(self) -> list[Work]:
        """``BatchL2Grad``."""
        if self.rows:
            return [Work(self.g, self.g)]
        macs = 0.0
        for i, o in self.products:
            r = self.positions
            pairs = self.samples * (r * (r + 1) / 2 if r > 1 else 1) * (i + o)
            macs += min(pairs, self.samples * (r + 1) * i * o)
        return [Work(macs, self.x + self.g)] if self.products else []

    def squares(self, columns: int = 1) -> list[Work]:
        """``SumGradSquared``, and the same of columns."""
        if self.rows:
            return [Work(columns * self.g, columns * self.g + self.rows)]
        if not self.products:
            return []
        blocks = self.samples * self.weights
        macs = columns * (self.forward + blocks)
        if self.positions == 1:
            macs = blocks + columns * self.samples * sum(o for _, o in self.products)
        return [Work(macs, self.x + columns * self.g + self.weights)]

    def variance(self) -> list[Work]:
        """``Variance``."""
        return [Work(work.macs, work.elements + 2 * self.weights) for work in self.squares()]

    def factors(self, columns: int) -> list[Work]:
        """``KFAC`` and ``KFLR``; a lookup's first factor is diagonal."""
        if self.rows:
            width = self.g / (self.samples * self.positions)
            macs = columns * self.samples * width**2 / 2
            return [Work(macs, columns * self.g + width**2 + self.rows / width)]
        if not self.products:
            return []
        share = 2 / (self.overlap + 1)
        sides = ((share * self.positions * i * i, columns * o * o) for i, o in self.products)
        macs = self.samples * sum(map(sum, sides)) / 2
        factors = sum(i * i + o * o for i, o in self.products)
        return [Work(macs, self.x + columns * self.g + factors)]


def layers(model: nn.Module, X: Tensor) -> list[Layer]:
    """All layers of a model, in order.

    Raises:
        NotImplementedError: for layers whose work is not counted here.
    """
    found: list[Layer] = []
    counted: set[nn.Parameter] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        n, x = len(X), inputs[0]
        counted.update(module.parameters())
        first = not found and x.dtype.is_floating_point
        if isinstance(module, nn.Linear):
            i, o = module.in_features, module.out_features
            found.append(Layer(n, x.numel() // (n * i), x.numel(), output.numel(), ((i, o),), 0, first))
        elif isinstance(module, nn.Conv2d):
            i, o = module.weight[0].numel(), module.out_channels
            r = output[0, 0].numel()
            # With larger steps places see other inputs.
            sizes = zip(module.kernel_size, module.stride, strict=True)
            overlap = max(size if step == 1 else 1 for size, step in sizes)
            found.append(Layer(n, r, x.numel(), output.numel(), ((i, o),), 0, first, overlap))
        elif isinstance(module, nn.LSTM):
            steps, h = x.shape[1], module.hidden_size
            for j in range(module.num_layers):
                i = module.input_size if j == 0 else h
                products = (i, 4 * h), (h, 4 * h)
                found.append(
                    Layer(n, steps, n * steps * i, n * steps * 4 * h, products, 0, first and not j)
                )
        elif isinstance(module, nn.Embedding):
            found.append(Layer(n, x.numel() // n, 0, output.numel(), (), module.weight.numel(), True))
        elif not isinstance(module, (nn.Flatten, nn.Identity)):
            found.append(Layer(n, 1, x.numel(), output.numel(), (), 0, first))

    leaves = [each for each in model.modules() if not list(each.children())]
    handles = [each.register_forward_hook(note) for each in leaves]
    with torch.no_grad():
        model(X)
    for handle in handles:
        handle.remove()
    if counted != set(model.parameters()) or any(isinstance(each, nn.LayerNorm) for each in leaves):
        raise NotImplementedError("attention is not counted")
    return found


def extra(quantity: str, stack: list[Layer], classes: int) -> list[Work]:
    """A quantity's work beside the gradient's; exact curvature has one column less than ``classes``."""

    def every(part: Callable[[Layer], list[Work]]) -> list[Work]:
        return [work for layer in stack for work in part(layer)]

    def curvature(columns: int, part: Callable[[Layer], list[Work]]) -> list[Work]:
        return every(lambda layer: part(layer) + layer.carry(columns))

    def shared_norms(layer: Layer) -> list[Work]:
        # Where the variance has blocks, their squares are summed another way.
        blocks = Work(layer.samples * layer.weights, 0)
        return layer.norms() if layer.positions == 1 else [blocks] * bool(layer.weights)

    exact = classes - 1
    ways: dict[str, Callable[[], list[Work]]] = {
        GRADIENT: lambda: [],
        EXTEND: lambda: [],
        "BatchGrad": lambda: every(Layer.individual),
        "BatchL2Grad": lambda: every(Layer.norms),
        "SumGradSquared": lambda: every(Layer.squares),
        "Variance": lambda: every(Layer.variance),
        "DiagGGNMC": lambda: curvature(1, Layer.squares),
        "DiagGGNExact": lambda: curvature(exact, lambda layer: layer.squares(exact)),
        "DiagHessian": lambda: curvature(exact, lambda layer: layer.squares(exact)),
        "KFAC": lambda: curvature(1, lambda layer: layer.factors(1)),
        "KFLR": lambda: curvature(exact, lambda layer: layer.factors(exact)),
        COMBINED: lambda: (
            every(Layer.variance) + every(shared_norms) + curvature(1, lambda layer: layer.squares(1))
        ),
    }
    return ways[quantity]()


class Rates(NamedTuple):
    """Multiply-adds and bytes per second."""

    macs: float
    bytes: float

    def seconds(self, parts: list[Work]) -> float:
        """The time of parts that follow one another, in float32."""
        return sum(max(each.macs / self.macs, 4 * each.elements / self.bytes) for each in parts)


def machine_rates(device: str = "cpu", repeats: int = 10) -> Rates:
    """The fastest matrix product and the fastest copy seen."""

    def fastest(function: Callable[[], Tensor]) -> float:
        best = math.inf
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    a = torch.rand(1024, 1024, device=device)
    b = torch.rand(2**24, device=device)
    c = torch.empty_like(b)
    return Rates(1024**3 / fastest(lambda: a @ a), 2 * 4 * 2**24 / fastest(lambda: c.copy_(b)))


def limits(model: nn.Module, X: Tensor, outputs: int, rates: Rates) -> dict[str, dict[str, float]]:
    """For every quantity its least cost as a multiple of the gradient's.

    ``limit`` is in time, ``macs`` and ``bytes`` are the counts by themselves.
    """
    try:
        stack = layers(model, X)
    except NotImplementedError:
        return {}
    base = [work for layer in stack for work in layer.gradient()]
    found = {}
    for quantity in QUANTITIES:
        more = extra(quantity, stack, outputs)
        found[quantity] = {
            "limit": 1 + rates.seconds(more) / rates.seconds(base),
            "macs": 1 + sum(w.macs for w in more) / sum(w.macs for w in base),
            "bytes": 1 + sum(w.elements for w in more) / sum(w.elements for w in base),
        }
    return found
