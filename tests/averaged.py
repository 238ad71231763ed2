"""KFRA by brute force: a matrix that is averaged over the samples below each operation.

At the model's output it is ``M = sum_n H_n`` (Botev, Ritter, Barber, 2017), below an operation whose
Jacobian for sample ``n`` is ``J_n`` it is ``1/N sum_n J_n^T M J_n``, and so is a parameter's block with
the Jacobians of what it meets the data in. Jacobians are taken entry by entry, for one sample after the
other. Where parameters meet data is taken from the library.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack.engine.refusals import parameters_of
from backpack.graph.nodes import walk
from backpack.graph.taps import TAPS, notes


def loss_hessian(loss: Callable[[Tensor], Tensor], output: Tensor, samples: int) -> Tensor:
    """``sum_n H_n``, ``[d, d]``."""
    f = output.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(f), f, create_graph=True)
    size = f.numel() // samples
    total = torch.zeros(size, size, dtype=f.dtype)
    for n, rows in enumerate(gradient.reshape(samples, size)):
        for row, entry in zip(total, rows, strict=True):
            if entry.requires_grad:
                (second,) = torch.autograd.grad(entry, f, retain_graph=True)
                row += second.reshape(samples, size)[n]
    return total


def jacobians(start: GradientEdge, below: Tensor | GradientEdge, samples: int) -> list[Tensor]:
    """Of the numbers of each sample at ``start``, by those of the same sample or by a parameter."""
    shape = torch.Size(start.node._input_metadata[start.output_nr].shape)
    found = []
    for n in range(samples):
        rows = []
        for unit in torch.eye(shape.numel() // samples, dtype=torch.float64):
            column = torch.zeros(samples, len(unit), dtype=torch.float64)
            column[n] = unit
            (row,) = torch.autograd.grad(
                [start], [below], [column.reshape(shape)], retain_graph=True, allow_unused=True
            )
            assert row is not None
            rows.append(row.flatten() if isinstance(below, Tensor) else row.reshape(samples, -1)[n])
        found.append(torch.stack(rows))
    return found


def averaged_blocks(
    model: nn.Module, loss: Callable[[Tensor], Tensor], output: Tensor, samples: int
) -> dict[str, Tensor]:
    """``[P, P]`` of each parameter, from one forward pass of an extended model."""
    place: GradientEdge | None = get_gradient_edge(output)
    names = {p: name for name, p in model.named_parameters()}
    found = {name: torch.zeros(p.numel(), p.numel(), dtype=p.dtype) for p, name in names.items()}
    matrix = loss_hessian(loss, output, samples)
    met: set[Tensor] = set()

    def leads_on(node: Node | None) -> bool:
        """Whether further parameters meet data below."""
        return node is not None and any(
            not met.issuperset(parameters_of(source))
            for each in walk([node])
            for tap in notes(each).get(TAPS, ())
            for source in tap.sources
        )

    while place is not None:
        for tap in notes(place.node).get(TAPS, ()):
            for p in [p for source in tap.sources for p in parameters_of(source)]:
                parts = [J.T @ matrix @ J for J in jacobians(place, p, samples)]
                found[names[p]] = torch.stack(parts).mean(0)
                met.add(p)
        below = [GradientEdge(node, nr) for node, nr in place.node.next_functions if leads_on(node)]
        assert len(below) <= 1, "no chain"
        if below:
            parts = [J.T @ matrix @ J for J in jacobians(place, below[0], samples)]
            matrix = torch.stack(parts).mean(0)
        place = below[0] if below else None
    return found
