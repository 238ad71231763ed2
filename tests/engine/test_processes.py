"""Quantities of a batch that is spread over processes, against those of one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backpack import backpack as block_of
from backpack import extend, optim
from backpack import extensions as E
from backpack.forms.base import Form
from backpack.own import Rule
from tests.dataset.test_accumulate import QUANTITIES
from tests.processes import spawn


class GradientMax(E.BackpropExtension):
    """A quantity of one's own whose rule is one's own, too: its parts are gathered."""

    class Largest(Rule):
        def weigh(self, part: Tensor, factor: float) -> Tensor:
            return part * factor

        def add(self, part: Tensor, other: Tensor) -> Tensor:
            return torch.maximum(part, other)

    savefield = "grad_max"
    combine = Largest()

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.dense()[0].abs().amax(0)


class Model(nn.Module):
    """Two branches, of which a pass may take one; or each sample, by ``masks [2, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor, branches: str = "both", masks: Tensor | None = None) -> Tensor:
        x = self.words(x).mean(1)
        if masks is not None:
            one, two = masks.unsqueeze(-1)
            return self.last(torch.tanh(one * self.first(one * x) + two * self.second(two * x)))
        first = self.first(x) if branches != "second" else 0
        second = self.second(x) if branches != "first" else 0
        return self.last(torch.tanh(first + second))


def model() -> nn.Module:
    torch.manual_seed(0)
    return extend(Model().double())


def data(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randint(6, (3 * size, 2), generator=generator)
    return X, torch.arange(len(X)) % 3


def parts(size: int, even: bool = True) -> list[slice]:
    """The samples of each process."""
    sizes = [3] * size if even else [1, 3 * size - 1 - (size - 2), *[1] * (size - 2)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]


def taken(net: nn.Module, fields: list[str]) -> dict[str, Any]:
    """All fields, and those of functions by their products with one matrix."""
    found = {}
    for name, p in net.named_parameters():
        for field in (*fields, "grad"):
            value = vars(p).pop(field, None) if field != "grad" else p.grad
            if callable(value):
                matrix = torch.ones(2, *p.shape, dtype=p.dtype).cumsum(0)
                value = value(matrix)
            if value is not None:
                kind = list if isinstance(value, list) else tuple if isinstance(value, tuple) else None
                found[f"{name}.{field}"] = value.clone() if kind is None else value
        p.grad = None
    return found


def quantities() -> list[E.BackpropExtension]:
    """One of each field; products share a rule, and PCHMP asks for another model."""
    unique = {ext.savefield: ext for ext in (make() for make in QUANTITIES.values())}
    del unique["pchmp"]
    return [*unique.values(), GradientMax()]


# Ways to train: options of the wrapper and the block, sizes of batches, the branch of each process.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven": {"even": False},
    "no_sync": {"sync": False},
    "static": {"wrapper": {"static_graph": True}},
    "unused": {"wrapper": {"find_unused_parameters": True}, "branches": ["both", "first"]},
    "unused in the first": {
        "wrapper": {"find_unused_parameters": True},
        "branches": ["second", "both"],
    },
    "unused in all": {"wrapper": {"find_unused_parameters": True}, "branches": ["second"]},
    "without gradient": {"block": {"gradient": False}},
    "gradient from forms": {"block": {"gradient": "forms"}},
    "forms, static": {"wrapper": {"static_graph": True}, "block": {"gradient": "forms"}},
    "forms, unused": {
        "wrapper": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
        **{"branches": ["both", "first"], "block": {"gradient": "forms"}},
    },
    "local": {"block": {"gather": False}},
    "some parameters": {"some": True},
    "not wrapped": {"wrapped": False},
    "buckets as views": {"wrapper": {"gradient_as_bucket_view": True}},
}


def branch(way: dict[str, Any], rank: int) -> str:
    branches = way.get("branches", ["both"])
    return branches[rank % len(branches)]


def run(way: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    net = model()
    outer: Any = net
    if way.get("wrapped", True):
        outer = DistributedDataParallel(net, **way.get("wrapper", {}))
    (X, y), mine = data(size), parts(size, way.get("even", True))[rank]
    exts = quantities()
    options = {"process_group": distributed.group.WORLD, **way.get("block", {})}
    if way.get("some"):
        options["parameters"] = [net.last.weight]
    for _ in range(2):  # a static graph is known after the first pass
        net.zero_grad()
        with nullcontext() if way.get("sync", True) else outer.no_sync():
            loss = F.cross_entropy(outer(X[mine], branch(way, rank)), y[mine])
            with block_of(*exts, **options) as block:
                loss.backward()
    assert not block.left_out
    return taken(net, [ext.savefield for ext in exts])


def expected(way: dict[str, Any], size: int) -> dict[str, Any]:
    """One process, and the mean of the same losses."""
    net, (X, y) = model(), data(size)
    slices = parts(size, way.get("even", True))
    exts = quantities()
    taking = [branch(way, rank) for rank in range(size)]
    masks = torch.cat(
        [
            torch.tensor([[float(b != "second")], [float(b != "first")]]).expand(2, s.stop - s.start)
            for s, b in zip(slices, taking, strict=True)
        ],
        dim=1,
    ).double()
    weights = torch.cat(
        [torch.full((s.stop - s.start,), 1 / (s.stop - s.start), dtype=torch.float64) for s in slices]
    )
    losses = F.cross_entropy(net(X, masks=masks), y, reduction="none")
    with block_of(*exts, parameters=[net.last.weight] if way.get("some") else None):
        (losses * weights).sum().div(size).backward()
    found = taken(net, [ext.savefield for ext in exts])
    if way.get("some"):
        return found
    nobody = [
        name
        for name, other in (
            ("first.weight", "second"),
            ("first.bias", "second"),
            ("second.weight", "first"),
        )
        if set(taking) == {other}
    ]
    return {key: value for key, value in found.items() if key.rpartition(".")[0] not in nobody}


def process(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: run(WAYS[name], rank, size) for name in ways_of(size)}
    if size == 2:
        found["refusals"] = {name: refusal(case, rank) for name, case in REFUSALS.items()}
        page = Path(__file__).parents[2] / "docs" / "distributed.md"
        exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)), {})
        found["sampled"], found["left out"] = sampled(rank), left_out(rank)
    return found


class NoRule(E.BatchL2Grad):
    savefield = "no_rule"

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        return form.squared_norms()


class Picky(GradientMax):
    """Refused where there are few samples."""

    savefield = "picky"
    combine = GradientMax.Largest()

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        if form.samples < 3 and len(form.shape) == 1:
            raise NotImplementedError("too few samples")
        return super().reduce(form, sign)


# Quantities, options of the block and of backward, and what the error says; in all processes.
REFUSALS: dict[str, tuple[Callable[[int], list[Any]], dict[str, Any], dict[str, Any], str]] = {
    "no rule": (lambda rank: [NoRule()], {}, {}, "combine"),
    "never": (lambda rank: [E.KFRA()], {}, {}, "KFLR"),
    "subsampling": (lambda rank: [E.BatchGrad([0])], {}, {}, "several processes"),
    "hook": (lambda rank: [E.BatchGrad()], {"extension_hook": print}, {}, "extension_hook"),
    "graph": (lambda rank: [E.BatchGrad()], {}, {"create_graph": True}, "create_graph"),
    "others": (lambda rank: [[E.Variance(), E.DiagGGNExact()][rank]], {}, {}, "process 1 diag_ggn"),
    "models": (lambda rank: [E.Variance()], {"models": True}, {}, "4, 6 parameters"),
}


def loss_of(rank: int, samples: int = 3, net: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    net, (X, y) = net or model(), data(2)
    mine = slice(3 * rank, 3 * rank + samples)
    return net, F.cross_entropy(net(X[mine]), y[mine])


def refusal(case: tuple[Any, dict[str, Any], dict[str, Any], str], rank: int) -> str:
    make, options, call, _ = case
    net, loss = loss_of(rank)
    if options.get("models") and rank:
        net, loss = loss_of(
            rank,
            net=extend(
                nn.Sequential(
                    nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 3), nn.Linear(3, 3, bias=False)
                ).double()
            ),
        )
    options = {key: value for key, value in options.items() if key != "models"}
    try:
        with block_of(*make(rank), process_group=distributed.group.WORLD, **options):
            loss.backward(**call)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        fields = [ext.savefield for ext in make(rank)]
        assert not any(field in vars(p) for p in net.parameters() for field in fields)
        return str(error)
    return ""


def sampled(rank: int) -> list[Any]:
    """Draws differ by process, values do not; and those of a group of one are the process's own."""
    torch.manual_seed(rank)
    net, loss = loss_of(rank)
    with block_of(E.KFAC(), E.EKFAC(), process_group=distributed.group.WORLD):
        loss.backward()
    together = [p.kfac for p in net.parameters()], [p.ekfac for p in net.parameters()]
    alone = [distributed.new_group([each]) for each in range(2)][rank]
    net, loss = loss_of(rank)
    with block_of(E.Variance(), process_group=alone):
        loss.backward()
    found = [p.variance for p in net.parameters()]
    net, loss = loss_of(rank)
    with block_of(E.Variance()):
        loss.backward()
    assert all(map(torch.equal, found, [p.variance for p in net.parameters()]))
    return [*together, found]


def left_out(rank: int) -> tuple[str, list[str]]:
    """What one process leaves out is missing in all."""
    net, loss = loss_of(rank, samples=3 - rank)
    with block_of(Picky(), unsupported="skip", process_group=distributed.group.WORLD) as block:
        loss.backward()
    return str(block.left_out), [name for name, p in net.named_parameters() if hasattr(p, "picky")]


def ways_of(size: int) -> list[str]:
    return [*WAYS] if size == 2 else ["plain", "uneven", "unused"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {size: spawn(process, size, tmp_path_factory.mktemp("processes")) for size in (2, 4)}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 4) for name in ways_of(size)])
def test_values_are_those_of_all_samples(
    size: int, name: str, runs: dict[int, list[dict[str, Any]]]
) -> None:
    together, way = runs[size], WAYS[name]
    whole, slices = expected(way, size), parts(size, way.get("even", True))
    computed = way.get("block", {}).get("gradient", True) and "gather" not in way.get("block", {})
    averaged = way.get("wrapped", True) and way.get("sync", True) and computed
    for rank, values in enumerate(each[name] for each in together):
        if not averaged:
            whole = {key: value for key, value in whole.items() if not key.endswith(".grad")}
            values = {key: value for key, value in values.items() if not key.endswith(".grad")}
        assert values.keys() == whole.keys(), name
        for key, value in values.items():
            reference = whole[key]
            if way.get("block", {}).get("gather", True) is False:
                reference = local(key, reference, slices[rank])
            same(key, value, reference)
            assert type(value) is type(reference), key


def same(key: str, value: Any, reference: Any) -> None:
    """To 1e-10, relative to the largest entry or to rounding errors of ones."""
    if isinstance(reference, (list, tuple)):
        for i, (one, other) in enumerate(zip(value, reference, strict=True)):
            same(f"{key} {i}", one, other)
        return
    assert value.shape == reference.shape, key
    if ".sqrt_ggn" in key:  # which is unique up to rotations of each sample's columns
        value, reference = (
            torch.einsum("cni,cnj->nij", v, v) for v in map(rows_of, (value, reference))
        )
    error, scale = float((value - reference).abs().max()), float(reference.abs().max())
    assert error <= 1e-10 * scale + 1e-15, (key, error, scale)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_those_of_all_processes(name: str, runs: dict[int, list[dict[str, Any]]]) -> None:
    first, second = (each["refusals"][name] for each in runs[2])
    assert first == second
    assert REFUSALS[name][-1] in first


def test_draws(runs: dict[int, list[dict[str, Any]]]) -> None:
    (kfac, ekfac, own), (other, more, its) = (each["sampled"] for each in runs[2])
    for one, two in zip([*kfac, *ekfac], [*other, *more], strict=True):
        assert all(map(torch.equal, one._tensors(), two._tensors()))
    assert not torch.equal(own[0], its[0])


def test_left_out_in_one_process(runs: dict[int, list[dict[str, Any]]]) -> None:
    for rank, (text, having) in enumerate(each["left out"] for each in runs[2]):
        assert having == ["words.weight", "first.weight", "second.weight", "last.weight"]
        assert ("another process" in text) == (rank == 0)
        assert "'first.bias': no picky: too few samples" in text


def test_passes_of_an_optimizer() -> None:
    optimizer = optim.KFAC(extend(nn.Linear(3, 2)), lr=0.1, damping=1.0)
    with pytest.raises(NotImplementedError, match="when it is made"):
        optimizer.backpack(process_group=object()).__enter__()


def test_needs_a_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        block_of(E.Variance(), process_group=object())


def rows_of(columns: Tensor) -> Tensor:
    return columns.flatten(2)


def local(key: str, value: Any, rows: slice) -> Any:
    """Rows of one process, of values of single samples."""
    field = key.rpartition(".")[2]
    if "batch" in field:
        return value[rows]
    return value[:, rows] if field.startswith("sqrt_ggn") else value
