"""Exact steps with the whole GGN, against a dense solve."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import extend, optim
from backpack import extensions as E
from tests.optim.problems import Problem
from tests.vivit.dense import Brute, flat, near


def brute(problem: Problem) -> Brute:
    return Brute(copy.deepcopy(problem.model), nn.CrossEntropyLoss(), problem.X, problem.y)


def dense(problem: Problem, gamma: float, l2: float) -> Tensor:
    """The direction of all parameters together."""
    case = brute(problem)
    G = case.ggns.sum(0)
    theta = flat([p.detach() for p in problem.parameters])
    eye = torch.eye(len(G), dtype=torch.float64)
    return torch.linalg.solve(G + gamma * eye, case.gradients.sum(0) + l2 * theta)


@pytest.mark.parametrize("l2", [0.0, 0.2])
def test_steps(l2: float) -> None:
    problem = Problem()
    optimizer = optim.GramNewton(problem.model, 0.7, 0.1, l2, momentum=0.5)
    expected = flat([p.detach() for p in problem.parameters])
    m = torch.zeros_like(expected)
    for _ in range(3):
        m = 0.5 * m + dense(problem, 0.1 + l2, l2)
        expected = expected - 0.7 * m
        problem.step(optimizer)
        near(flat([p.detach() for p in problem.parameters]), expected)
    assert not any(name.startswith("_vivit") for p in problem.parameters for name in vars(p))


def test_groups() -> None:
    """Each has a matrix of its own."""
    problem = Problem()
    model = extend(problem.model)
    first, last = list(model[0].parameters()), list(model[3].parameters())
    optimizer = optim.GramNewton([{"params": first, "damping": 0.5}, {"params": last}], 1.0, 0.1)
    case, before = brute(problem), [p.detach().clone() for p in problem.parameters]
    names = list(case.parameters.values())
    problem.step(optimizer)
    for here, gamma in (([0, 1], 0.5), ([2, 3], 0.1)):
        at = case.entries([names[j] for j in here])
        G = case.ggns.sum(0)[at][:, at]
        eye = torch.eye(len(G), dtype=torch.float64)
        direction = torch.linalg.solve(G + gamma * eye, case.gradients.sum(0)[at])
        moved = flat([before[j] - problem.parameters[j].detach() for j in here])
        near(moved, direction)


def test_parts_of_a_batch() -> None:
    """As one step with the whole batch."""
    whole, parts = Problem(), Problem()
    whole.step(optim.GramNewton(whole.model, 1.0, 0.1))
    optimizer = optim.GramNewton(parts.model, 1.0, 0.1)
    optimizer.zero_grad()
    for here in (slice(0, 2), slice(2, 5)):
        loss = parts.lossfunc(parts.model(parts.X[here]), parts.y[here])
        with optimizer.backpack():
            (loss * ((here.stop - here.start) / 5)).backward()
    optimizer.step()
    near(flat([p.detach() for p in parts.parameters]), flat([p.detach() for p in whole.parameters]))


def test_random_columns_and_other_quantities() -> None:
    problem = Problem()
    optimizer = optim.GramNewton(problem.model, 1.0, 0.1, columns="mc", mc_samples=2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = problem.loss()
        with optimizer.backpack(E.BatchL2Grad()):
            loss.backward()
        assert problem.parameters[0].batch_l2.shape == (5,)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_scaler() -> None:
    """With and without gradients that are unscaled before, a step is the plain one."""
    plain = Problem()
    plain.step(optim.GramNewton(plain.model, 1.0, 0.1))
    for unscales in (False, True):
        problem = Problem()
        optimizer = optim.GramNewton(problem.model, 1.0, 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer.zero_grad()
        loss = problem.loss()
        with optimizer.backpack(scale=scaler.get_scale() if unscales else None):
            scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        near(
            flat([p.detach() for p in problem.parameters]), flat([p.detach() for p in plain.parameters])
        )


def test_unscaled_without_being_told() -> None:
    problem = Problem()
    optimizer = optim.GramNewton(problem.model, 1.0, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    loss = problem.loss()
    with optimizer.backpack():
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"scale=scaler.get_scale\(\)"):
        scaler.step(optimizer)


def test_refusals() -> None:
    problem = Problem()
    options: dict[str, Any]
    for options in ({"damping": 0.0}, {"damping": -1.0}, {"lr": -1.0}, {"columns": "all"}):
        with pytest.raises(ValueError):
            optim.GramNewton(problem.model, **{"lr": 1.0, "damping": 0.1, **options})
    optimizer = optim.GramNewton(problem.model, 1.0, 0.1)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step()
    problem.loss().backward()
    with pytest.raises(RuntimeError, match="before every step"):
        optimizer.step()
    with optimizer.backpack():
        problem.loss().backward()
    with pytest.raises(ValueError, match="this one has 2.0"), optimizer.backpack(scale=2.0):
        pass
    problem.step(optimizer)
    with pytest.raises(RuntimeError, match="'0.weight' has a gradient, but no curvature"):
        optimizer.step()


def test_frozen_and_copies() -> None:
    problem = Problem()
    problem.model[0].weight.requires_grad_(False)
    before = problem.model[0].weight.detach().clone()
    optimizer = optim.GramNewton(problem.model, 1.0, 0.1, momentum=0.9)
    problem.step(optimizer)
    assert torch.equal(problem.model[0].weight, before)
    state = optimizer.state_dict()
    other = pickle.loads(pickle.dumps(optimizer))
    assert other.state_dict()["param_groups"] == state["param_groups"]
