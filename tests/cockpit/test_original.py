"""The original's names and numbers, by the formulas of its pages and plain autograd."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import extend
from backpack.cockpit import Cockpit, quantities
from backpack.cockpit.quantities.bin_adaptation import GradAbsMax, ParamAbsMax
from backpack.cockpit.quantities.quantity import SingleStepQuantity
from backpack.cockpit.utils.configuration import configuration, quantities_cls_for_configuration
from backpack.cockpit.utils.schedules import linear, logarithmic
from backpack.extensions import BatchGrad, DiagHessian
from tests.cockpit.test_quantities import (
    Problem,
    Seen,
    Truth,
    close,
    copied,
    entropies,
    hessian,
    parabola,
    places,
)

STEPS, B = 4, 6
SGD: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1)
ADAM: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=0.01)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Module:
    layers = (nn.Linear(25, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    return nn.Sequential(nn.Flatten(), *layers)


PROBLEM = Problem(
    network,
    lambda n: torch.rand(n, 1, 5, 5),
    lambda n: torch.randint(3, (n,)),
    nn.CrossEntropyLoss(),
    entropies,
)


def train(
    tracked: list[Any],
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    info: tuple[str, ...] = ("batch_size", "individual_losses", "loss", "optimizer"),
    own: tuple[Any, ...] = (),
) -> tuple[Cockpit, list[Seen]]:
    model, lossfunc = extend(network()), extend(nn.CrossEntropyLoss())
    opt = optimizer(model.parameters())
    cp = Cockpit(model.parameters(), quantities=tracked)
    seen = []
    for step in range(STEPS):
        X, y = PROBLEM.inputs(B), PROBLEM.targets(B)
        before = copied(model)
        opt.zero_grad()
        outputs = model(X)
        loss = lossfunc(outputs, y)
        known = {
            "batch_size": B,
            "individual_losses": entropies(outputs, y),
            "loss": loss,
            "optimizer": opt,
        }
        given = {name: known[name] for name in info}
        with cp(step, *(cls() for cls in own), info=given):
            loss.backward(create_graph=cp.create_graph(step))
        for p in model.parameters():
            fields = {key for key in p.__dict__ if not key.startswith("_backward")}
            assert fields == {cls.savefield for cls in own}
        opt.step()
        seen.append(Seen([(X, y, 1.0)], before, copied(model)))
    return cp, seen


def everything(curvature: str) -> list[Any]:
    names = """Alpha Distance GradNorm InnerTest Loss MeanGSNR NormTest OrthoTest Parameters Time
    UpdateSize GradHist1d GradHist2d HessMaxEV""".split()
    found = [getattr(quantities, name)(linear(1)) for name in names]
    names = ["HessTrace", "TICDiag", "TICTrace"]
    return found + [getattr(quantities, n)(linear(1), curvature=curvature) for n in names]


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("curvature", ["diag_h", "diag_ggn_exact"])
def test_values(optimizer: Any, curvature: str) -> None:
    cp, seen = train(everything(curvature), optimizer)
    output = cp.get_output()
    truths = [Truth(PROBLEM, each.before, each.batches) for each in seen]
    names = truths[0].names
    for step, (truth, (batches, before, after)) in enumerate(zip(truths, seen, strict=True)):
        values = output[step]
        g_n = truth.of(names)
        g, parameters = g_n.mean(0), [p.detach() for p in before.parameters()]
        norms, dots, total = (g_n**2).sum(1), g_n @ g, g @ g
        second, H = (g_n**2).mean(0), hessian(PROBLEM, before, batches)
        gradients = [truth.of([name]).mean(0) for name in names]
        close(values["Loss"], truth.loss)
        close(values["NormTest"], ((norms.sum() / total - B) / (B * (B - 1))).sqrt())
        close(values["InnerTest"], (((dots**2).sum() / total**2 - B) / (B * (B - 1))).sqrt())
        ortho = (norms / total - dots**2 / total**2).sum() / (B * (B - 1))
        close(values["OrthoTest"], ortho.sqrt())
        close(values["MeanGSNR"], (g**2 / (second - g**2 + 1e-5)).mean())
        for found, expected in zip(values["GradNorm"], gradients, strict=True):
            close(found, expected.norm())
        starts = seen[0].before.parameters()
        for found, p, q in zip(values["Distance"], parameters, starts, strict=True):
            close(found, (p - q.detach()).norm())
        assert values["Parameters"] == [p.tolist() for p in parameters]
        diagonal = H.diagonal()
        for found, name in zip(values["HessTrace"], names, strict=True):
            close(found, diagonal[places(before, [name])].sum(), 1e-7)
        close(values["TICTrace"], second.sum() / (diagonal.sum() + 1e-7), 1e-7)
        close(values["TICDiag"], (second / (diagonal + 1e-7)).sum(), 1e-6)
        eigenvalues = torch.linalg.eigvalsh(H)
        close(values["HessMaxEV"], eigenvalues[eigenvalues.abs().argmax()], 2e-3)
        if step + 1 < STEPS:
            moved = [q.detach() - p for p, q in zip(parameters, after.parameters(), strict=True)]
            for found, d in zip(values["UpdateSize"], moved, strict=True):
                close(found, d.norm())
            d = torch.cat([each.flatten() for each in moved])
            close(values["Alpha"], parabola(truth, truths[step + 1], d, names), 1e-6)
        else:
            assert "UpdateSize" not in values and "Alpha" not in values
        _check_histograms(values, g_n, torch.cat([p.flatten() for p in parameters]))


def _check_histograms(values: dict[str, Any], g_n: Tensor, p: Tensor) -> None:
    expected = torch.histc(g_n.clamp(-2, 2), 100, -2, 2)
    assert values["GradHist1d"]["hist"].tolist() == expected.tolist()
    assert values["GradHist1d"]["edges"].shape == (101,)
    found = values["GradHist2d"]
    joint = torch.zeros(40, 50)
    x = (g_n.clamp(-1 + 0.025, 1 - 0.025) + 1) / 0.05
    y = (p.clamp(-2 + 0.04, 2 - 0.04) + 2) / 0.08
    at = x.floor().long(), y.floor().long().expand_as(x)
    joint.index_put_(at, torch.ones(()), accumulate=True)
    assert found["hist"].tolist() == joint.tolist()
    assert [len(edges) for edges in found["edges"]] == [41, 51]


def test_plain_sgd_only() -> None:
    tracked = [quantities.CABS(linear(1)), quantities.EarlyStopping(linear(1))]
    cp, seen = train(tracked)
    for step, (batches, before, _) in enumerate(seen):
        truth = Truth(PROBLEM, before, batches)
        g_n = truth.of(truth.names)
        g, values = g_n.mean(0), cp.get_output()[step]
        close(values["CABS"], 0.1 * ((g_n**2).sum() - B * g @ g) / (B * truth.loss))
        close(values["EarlyStopping"], 1 - B * (g**2 / (g_n.var(0) + 1e-5)).mean())
    for each in tracked:
        with pytest.raises(ValueError, match="plain SGD only"):
            train([each], ADAM)


def test_info_may_be_left_out() -> None:
    """What the pass tells need not be said; individual losses are read from the graph."""
    names = "Alpha NormTest InnerTest MeanGSNR GradHist1d".split()
    torch.manual_seed(0)
    full, _ = train([getattr(quantities, name)(linear(1)) for name in names])
    torch.manual_seed(0)
    bare, _ = train([getattr(quantities, name)(linear(1)) for name in names], info=("loss",))
    for step in range(STEPS):
        for name in names:
            found, expected = (cp.get_output()[step].get(name) for cp in (bare, full))
            if name == "GradHist1d":
                assert found["hist"].tolist() == expected["hist"].tolist()
            elif expected is None:
                assert found is None and step == STEPS - 1
            else:
                close(found, expected)


def test_the_users_own_extensions() -> None:
    train(configuration("full"), own=(BatchGrad, DiagHessian))


def test_schedules() -> None:
    cp, _ = train(configuration("business", track_schedule=linear(2, offset=1)))
    output = cp.get_output()
    assert sorted(output) == [1, 3] and "Alpha" in output[1] and "Alpha" not in output[3]
    assert [k for k in range(10) if linear(3)(k)] == [0, 3, 6, 9]
    schedule = logarithmic(0, 1, steps=4)
    assert [k for k in range(12) if schedule(k)] == [0, 1, 2, 4, 10]
    assert not logarithmic(0, 1, steps=4, init=False)(0)


def test_configurations() -> None:
    sizes = [len(quantities_cls_for_configuration(x)) for x in ("economy", "business", "full")]
    assert sizes == [9, 11, 13] and len(quantities.__all__) == 19
    with pytest.raises(KeyError, match="no configuration 'other'"):
        configuration("other")
    with pytest.raises(KeyError, match="no curvature 'diag'"):
        quantities.HessTrace(linear(1), curvature="diag")


def test_bins_that_follow() -> None:
    one = quantities.GradHist1d(linear(1), adapt=GradAbsMax(linear(1), padding=0.1))
    two = quantities.GradHist2d(
        linear(1),
        adapt=(GradAbsMax(linear(1)), ParamAbsMax(linear(1))),
        keep_individual=True,
    )
    cp, seen = train([one, two])
    truth = Truth(PROBLEM, seen[0].before, seen[0].batches)
    largest = float(truth.of(truth.names).abs().max())
    output = cp.get_output()
    close(output[1]["GradHist1d"]["edges"][-1], 1.1 * largest)
    assert output[0]["GradHist2d"]["param_groups"] == 6
    parts = sum(output[0]["GradHist2d"][f"param_{j}"]["hist"] for j in range(6))
    assert parts.tolist() == output[0]["GradHist2d"]["hist"].tolist()
    close(output[1]["GradHist2d"]["edges"][0][-1], largest)


def test_what_is_written(tmp_path: Path) -> None:
    cp, _ = train(configuration("full"))
    cp.log(3, 0, 1.0, 1.1, 1.2, 0.5, 0.4, 0.3, 0.1)
    cp.write(tmp_path / "logs" / "run")
    found = json.loads((tmp_path / "logs" / "run.json").read_text())
    assert sorted(found) == ["0", "1", "2", "3"] and found["3"]["learning_rate"] == 0.1
    hist = found["0"]["GradHist2d"]["hist"]
    assert hist["shape"] == [40, 50] and hist["dtype"] == "int64" and hist["Corder"] is True
    assert len(found["0"]["HessTrace"]) == 6


def test_an_error_in_the_block() -> None:
    """It is not masked by another, and nothing stays on the parameters."""
    model, lossfunc = extend(network()), extend(nn.CrossEntropyLoss())
    cp = Cockpit(model.parameters(), configuration("full"))
    loss = lossfunc(model(PROBLEM.inputs(B)), PROBLEM.targets(B))
    with pytest.raises(ZeroDivisionError), cp(0, info={"loss": loss}):
        loss.backward()
        raise ZeroDivisionError
    assert not any(key.startswith("cockpit") for p in model.parameters() for key in p.__dict__)


def test_a_quantity_of_ones_own() -> None:
    class Largest(SingleStepQuantity):
        def extensions(self, global_step: int) -> list[Any]:
            return [BatchGrad()] if self.should_compute(global_step) else []

        def _compute(self, global_step: int, params: Any, batch_loss: Any) -> float:
            return max(float(p.grad_batch.abs().max()) for p in params)

    cp, _ = train([Largest(linear(2))])
    assert sorted(cp.get_output()) == [0, 2] and cp.get_output()[0]["Largest"] > 0


def test_what_is_refused() -> None:
    model = network()
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        Cockpit(model.parameters())
    cp = Cockpit([nn.Parameter(torch.rand(2))])
    with pytest.raises(ValueError, match="Expected instance of Quantity"):
        cp.add(F.relu)
    with pytest.raises(AssertionError):
        cp(0, BatchGrad)
