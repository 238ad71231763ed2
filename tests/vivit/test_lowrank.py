"""Spectrum, directional derivatives, steps and influence against dense matrices, on the case table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backpack.vivit import LowRank
from tests.cases import CASES, LOSSES, Case, LossCase
from tests.vivit.dense import Brute, flat, near

# Every case with one loss, and each with another one.
GRID = [(case, LOSSES[0]) for case in CASES]
GRID += [(case, LOSSES[1 + i % (len(LOSSES) - 1)]) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(
    ("case", "loss"), GRID, ids=[f"{case.name}-{loss.name}" for case, loss in GRID]
)
def test_case(case: Case, loss: LossCase) -> None:
    brute = Brute.of(case, loss)
    with LowRank() as curvature:
        brute.loss().backward()
    parameters = curvature.parameters
    assert parameters == [p for p in brute.model.parameters() if p.grad is not None]
    groups = [parameters] if loss is not LOSSES[0] else [parameters, parameters[::2], parameters[1::2]]
    for group in groups:
        if group:
            agrees(curvature, brute, group)


def agrees(curvature: LowRank, brute: Brute, group: list[Tensor]) -> None:
    """All that is exact of one group."""
    at = brute.entries(group)
    ggns, gradients = brute.ggns[:, at][:, :, at], brute.gradients[:, at]
    G, g, N = ggns.sum(0), gradients.sum(0), brute.samples
    values = curvature.eigvalsh(group)
    expected = torch.zeros_like(values)
    size = min(len(values), len(G))
    expected[:size] = torch.linalg.eigvalsh(G).flip(0)[:size]
    near(values, expected)

    largest = float(expected[0])
    pairs = curvature.eigh(group=group, criterion=lambda v: (v > 1e-6 * largest).nonzero()[:, 0])
    vectors = flat(pairs.vectors, 1)
    eye = torch.eye(len(vectors), dtype=torch.float64)
    near(vectors @ vectors.T, eye, 1e-6)
    near(vectors @ G, vectors * pairs.values.unsqueeze(1))

    found = curvature.derivatives(pairs)
    near(found.gammas, N * gradients @ vectors.T, 1e-6)
    near(found.lambdas, N * torch.einsum("kp,npq,kq->nk", vectors, ggns, vectors), 1e-6)
    near(found.gammas.mean(0), vectors @ g, 1e-6)
    near(found.lambdas.mean(0), pairs.values)
    again = curvature.derivatives(pairs.vectors, group)
    near(again.gammas, found.gammas, 1e-6)
    near(again.lambdas, found.lambdas, 1e-6)

    delta = 1e-2 * largest
    inverse = torch.linalg.inv(G + delta * torch.eye(len(G), dtype=torch.float64))
    near(flat(curvature.solve(delta, group=group)), inverse @ g)
    vector = [torch.rand_like(p) for p in group]
    near(flat(curvature.solve(delta, vector, group=group)), inverse @ flat(vector))
    step = (vectors @ g) / (pairs.values + delta)
    near(flat(curvature.newton(pairs, delta)), -step @ vectors, 1e-6)
    near(curvature.influence(damping=delta, group=group), gradients @ inverse @ gradients.T)
    near(curvature.trace(group), G.trace())
    dimension = (G @ inverse).trace()
    near(curvature.effective_dimension(delta, group), dimension)
    near(curvature.logdet(delta, group), -torch.logdet(inverse))
