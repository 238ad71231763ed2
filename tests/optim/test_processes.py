"""Steps of several processes that train one model, against those of one process."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backpack import extend, optim
from backpack.optim import kronecker
from backpack.testing.copies import exactly
from tests.processes import spawn

PRIVATE = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, "expected_batch_size": 8.0, "momentum": 0.5}
COMMON = {"damping": 0.1, "l2": 0.01, "momentum": 0.5}
AVERAGED = {**COMMON, "ema_decay": 0.9}
# Optimizers with options, and ways to train.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{
        name: (name, AVERAGED, {})
        for name in ("DiagGGNExact DiagGGNMC DiagHessian SumGradSquared KFAC KFLR EKFAC EKFLR").split()
    },
    "CGNewton": ("CGNewton", {**COMMON, "tol": 1e-13, "atol": 1e-13}, {}),
    "every second": ("KFLR", {**AVERAGED, "update_every": 2, "kl_clip": 1e-3}, {}),
    "micro-batches": ("KFLR", AVERAGED, {"micro": 2}),
    "micro-batches in one basis": ("EKFLR", AVERAGED, {"micro": 2}),
    "uneven": ("KFLR", AVERAGED, {"even": False}),
    "uneven squares": ("SumGradSquared", {**AVERAGED, "reduction": "mean"}, {"even": False}),
    "DPSGD": ("DPSGD", PRIVATE, {}),
    "DPSGD, uneven": ("DPSGD", PRIVATE, {"even": False}),
}
N = 8


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    X = torch.randn(N, 1, 4, generator=generator, dtype=torch.float64)
    return X, torch.randint(3, (N,), generator=generator)


def optimizer_of(name: str, params: Any, options: dict[str, Any], **more: Any) -> Any:
    if name.startswith("EK") and more.pop("micro", False):
        options = {**options, "micro_batches": True}
    more.pop("micro", None)
    made = getattr(optim, name)(params, 0.1, **options, **more)
    if name in ("KFAC", "EKFAC", "DiagGGNMC"):  # without draws, which processes do not share
        made._extension = exactly(made._extension)
    return made


def train(case: str, rank: int, size: int) -> dict[str, Any]:
    name, options, way = CASES[case]
    net: Any = network()
    outer = DistributedDataParallel(net) if size > 1 else extend(net)
    optimizer = optimizer_of(name, outer, options, micro=way.get("micro"))
    ends = [0, *range(N // size, N, N // size), N] if way.get("even", True) else [0, *range(1, size), N]
    for step in range(3):
        X, y = (each[ends[rank] : ends[rank + 1]] for each in batch(step))
        if name == "DPSGD":
            optimizer.backward(F.cross_entropy(outer(X), y, reduction="none"))
            optimizer.step()
            continue
        optimizer.zero_grad()
        micro = way.get("micro", 1)
        for i in range(micro):
            part = slice(i * len(X) // micro, (i + 1) * len(X) // micro)
            last = i == micro - 1 or size == 1
            with nullcontext() if last else outer.no_sync(), optimizer.backpack():
                share = len(X[part]) * size / N
                (share * F.cross_entropy(outer(X[part]), y[part])).backward()
        optimizer.step()
    return {
        "parameters": [p.detach() for p in net.parameters()],
        "state": [optimizer.state[p] for p in net.parameters()],
        "left": [hasattr(p, optimizer._extension.savefield) for p in net.parameters()]
        if name != "DPSGD"
        else [],
    }


def noise(rank: int) -> list[Tensor]:
    """One draw for all."""
    torch.manual_seed(rank)
    net = DistributedDataParallel(network())
    optimizer = optim.DPSGD(net, 0.1, **{**PRIVATE, "noise_multiplier": 1.0})
    X, y = batch(0)
    # One of the processes has an empty batch.
    optimizer.backward(
        F.cross_entropy(net(X), y, reduction="none") if rank else torch.zeros(0, dtype=X.dtype)
    )
    optimizer.step()
    return [p.detach() for p in net.parameters()]


def refusals(rank: int) -> dict[str, str]:
    group, found = distributed.group.WORLD, {}

    def attempt(what: str, *, wrapped: bool = True, sync: bool = True, **options: Any) -> None:
        net: Any = network()
        outer = DistributedDataParallel(net) if wrapped else net
        name = options.pop("name", "KFLR")
        try:
            optimizer = getattr(optim, name)(outer, 0.1, 0.1, **options)
            X, y = batch(rank)
            block = nullcontext() if what == "outside" and rank else optimizer.backpack()
            with nullcontext() if sync else outer.no_sync(), block:
                F.cross_entropy(outer(X), y).backward()
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            found[what] = str(error)
            if "before" in locals():
                assert all(map(torch.equal, before, net.parameters()))

    attempt("gradients", wrapped=False, process_group=group)
    attempt("no_sync", sync=False)
    attempt("nothing", wrapped=False)
    attempt("both", process_local=True, process_group=group)
    attempt("never", name="KFRA")
    attempt("gram", name="GramNewton")
    inverse = kronecker.damped_inverse

    def fails(*args: Any) -> Tensor:
        raise ValueError("not positive definite")

    kronecker.damped_inverse = fails if rank else inverse
    attempt("inverse")
    kronecker.damped_inverse = inverse
    net = network()
    optimizer = optim.KFLR(net, 0.1, 0.1, process_group=group)
    found["copies"] = str(
        [c.processes for c in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))]
    )
    return found


def process(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {case: train(case, rank, size) for case in cases_of(size)}
    if size == 2:
        found["noise"], found["refusals"] = noise(rank), refusals(rank)
    return found


def cases_of(size: int) -> list[str]:
    return [*CASES] if size == 2 else ["KFAC", "EKFLR", "DPSGD"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {size: spawn(process, size, tmp_path_factory.mktemp("processes")) for size in (2, 4)}


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in (2, 4) for case in cases_of(size)])
def test_steps_are_those_of_one_process(
    size: int, case: str, runs: dict[int, list[dict[str, Any]]]
) -> None:
    alone = train(case, 0, 1)
    first = runs[size][0][case]["parameters"]
    for each in runs[size]:
        assert not any(each[case]["left"])
        assert all(map(torch.equal, each[case]["parameters"], first))
        for value, reference, before in zip(
            each[case]["parameters"], alone["parameters"], network().parameters(), strict=True
        ):
            change = reference - before.detach()
            assert float((value - reference).abs().max()) <= 1e-9 * float(change.abs().max())


def test_one_draw_of_noise(runs: dict[int, list[dict[str, Any]]]) -> None:
    first, second = (each["noise"] for each in runs[2])
    assert all(map(torch.equal, first, second))
    torch.manual_seed(0)
    net = extend(network())
    optimizer = optim.DPSGD(net, 0.1, **{**PRIVATE, "noise_multiplier": 1.0})
    X, y = batch(0)
    optimizer.backward(F.cross_entropy(net(X), y, reduction="none"))
    torch.manual_seed(0)
    network()
    optimizer.step()
    torch.testing.assert_close(first, [p.detach() for p in net.parameters()])


def test_refusals_are_those_of_all_processes(runs: dict[int, list[dict[str, Any]]]) -> None:
    first, second = (each["refusals"] for each in runs[2])
    assert first.pop("inverse") == f"in process 1 of the process_group: {second.pop('inverse')}"
    assert first == second
    assert "gradients differ" in first["gradients"] and "gradients differ" in first["no_sync"]
    assert "process_group=torch.distributed.group.WORLD" in first["nothing"]
    assert "pass one of the two" in first["both"]
    assert "KFLR" in first["never"]
    assert "does not exchange" in first["gram"]
    assert first["copies"] == "[None, None]"
