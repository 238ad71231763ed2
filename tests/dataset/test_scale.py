"""Every quantity of batches, processes and parts, against one process and one batch: one table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from backpack import accumulate, accumulating, extend
from backpack import backpack as block_of
from backpack import extensions as E
from backpack.sources.table import HessianRoot
from tests.dataset.test_accumulate import QUANTITIES as _QUANTITIES
from tests.engine.test_processes import same
from tests.engine.test_sharded import taken as taken_parts
from tests.processes import spawn

# "=": as one process and one batch, to 1e-10; "no": an error that names the quantity.
TABLE = """
    quantity             data set   micro-batches   processes   data set of processes   fully_shard
    BatchGrad            =          =               =           =                       =
    BatchL2Grad          =          =               =           =                       =
    SumGradSquared       =          =               =           =                       =
    Variance             =          =               =           =                       =
    DiagGGNExact         =          =               =           =                       =
    DiagGGNMC            =          =               =           =                       =
    BatchDiagGGNExact    =          =               =           =                       =
    BatchDiagGGNMC       =          =               =           =                       =
    DiagHessian          =          =               =           =                       =
    BatchDiagHessian     =          =               =           =                       =
    DiagHessianMC        =          =               =           =                       =
    BatchDiagHessianMC   =          =               =           =                       =
    SqrtGGNExact         =          =               =           =                       =
    SqrtGGNMC            =          =               =           =                       =
    KFLR                 =          =               =           =                       =
    KFAC                 =          =               =           =                       =
    EmpiricalKFAC        =          =               =           =                       =
    EKFLR                =          no              =           =                       =
    EKFAC                =          no              =           =                       =
    GGNMP                =          =               =           =                       no
    HMP                  =          =               =           =                       no
    PCHMP                =          =               =           =                       no
    KFRA                 no         no              no          no                      no
"""
ROWS = [re.split(r"\s{2,}", line.strip()) for line in TABLE.strip().splitlines()]
COLUMNS = ROWS[0][1:]
CELLS = {
    (row[0], column): cell for row in ROWS[1:] for column, cell in zip(COLUMNS, row[1:], strict=True)
}


def _exactly(quantity: Callable[[], E.BackpropExtension]) -> E.BackpropExtension:
    """All columns of the Hessian in place of draws, which processes do not share."""
    ext: Any = quantity()
    ext.source = HessianRoot()
    return ext


QUANTITIES: dict[str, Callable[[], E.BackpropExtension]] = {
    **_QUANTITIES,
    "DiagHessianMC": partial(_exactly, E.DiagHessianMC),
    "BatchDiagHessianMC": partial(_exactly, E.BatchDiagHessianMC),
    "KFRA": E.KFRA,
}
SIZES = (4, 3)  # samples of each process


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)
    return extend(nn.Sequential(*layers).double())


def data() -> TensorDataset:
    X = torch.randint(6, (sum(SIZES), 2), generator=torch.Generator().manual_seed(1))
    return TensorDataset(X, torch.arange(len(X)) % 3)


def part(rank: int) -> tuple[Subset[Any], slice, float]:
    """A process's samples, and the weight of its loss in the mean of those of all processes."""
    rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    share = SIZES[rank] * len(SIZES) / sum(SIZES)
    return Subset(data(), range(rows.start, rows.stop)), rows, share


def whole(exts: list[E.BackpropExtension], rank: int) -> nn.Module:
    net, (X, y) = model(), data().tensors
    with block_of(*exts):
        F.cross_entropy(net(X), y).backward()
    return net


def data_set(exts: list[E.BackpropExtension], rank: int) -> nn.Module:
    net = model()
    accumulate(net, F.cross_entropy, DataLoader(data(), batch_size=3), exts, reduction="mean")
    return net


def micro_batches(exts: list[E.BackpropExtension], rank: int) -> nn.Module:
    """As in training: losses whose sum is that of the batch."""
    net, (X, y) = model(), data().tensors
    with accumulating(*exts, reduction="sum"):
        for rows in torch.arange(len(X)).split(3):
            (F.cross_entropy(net(X[rows]), y[rows]) * len(rows) / len(X)).backward()
    return net


def processes(exts: list[E.BackpropExtension], rank: int) -> nn.Module:
    (net, (X, y)), (_, rows, share) = (model(), data().tensors), part(rank)
    parallel = DistributedDataParallel(net)
    with block_of(*exts, process_group=distributed.group.WORLD):
        (share * F.cross_entropy(parallel(X[rows]), y[rows])).backward()
    return net


def data_set_of_processes(exts: list[E.BackpropExtension], rank: int) -> nn.Module:
    """Two batches here, one there."""
    net, (mine, *_) = model(), part(rank)
    parallel, group = DistributedDataParallel(net), distributed.group.WORLD
    loader = DataLoader(mine, batch_size=3)
    accumulate(parallel, F.cross_entropy, loader, exts, reduction="mean", process_group=group)
    return net


def sharded(exts: list[E.BackpropExtension], rank: int) -> nn.Module:
    (net, (X, y)), (_, rows, share) = (model(), data().tensors), part(rank)
    fully_shard(net[1])
    fully_shard(net)
    with block_of(*exts):
        (share * F.cross_entropy(net(X[rows]), y[rows])).backward()
    return net


WAYS: dict[str, Callable[[list[E.BackpropExtension], int], nn.Module]] = {
    "data set": data_set,
    "micro-batches": micro_batches,
    "processes": processes,
    "data set of processes": data_set_of_processes,
    "fully_shard": sharded,
}


def column(name: str, rank: int = 0) -> dict[str, Any]:
    """Values of the quantities that there are, and errors of others."""
    cells = {quantity: cell for (quantity, where), cell in CELLS.items() if where == name}
    found: dict[str, Any] = {}
    fields = {QUANTITIES[each]().savefield: each for each, cell in cells.items() if cell == "="}
    again = [each for each, cell in cells.items() if cell == "=" and each not in fields.values()]
    for names in ([*fields.values()], again):  # two of one field are not asked for together
        exts = [QUANTITIES[each]() for each in names]
        values = _values(WAYS.get(name, whole)(exts, rank), [ext.savefield for ext in exts])
        for each, ext in zip(names, exts, strict=True):
            found[each] = values[ext.savefield]
        found["grad"] = values["grad"]
    for each in [each for each, cell in cells.items() if cell == "no"]:
        try:
            WAYS[name]([getattr(E, each)()], rank)
            found[each] = ""
        except NotImplementedError as error:
            found[each] = str(error)
    return found


def _values(net: nn.Module, fields: list[str]) -> dict[str, dict[str, Any]]:
    """By fields and names of parameters; products with curvature applied to one matrix."""
    for p in net.parameters():
        for field, value in [*vars(p).items()]:
            if callable(value) and field in fields:
                setattr(p, field, value(torch.ones(2, *p.shape, dtype=p.dtype).cumsum(0)))
    found: dict[str, dict[str, Any]] = {}
    for key, value in taken_parts(net, fields).items():
        name, _, field = key.rpartition(".")
        found.setdefault(field, {})[name] = value
    return found


def process(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: column(name, rank) for name in COLUMNS[2:]}
    found["errors"] = errors(rank)
    found["local"] = local(rank)
    found["volume"] = volume(rank)
    return found


def volume(rank: int) -> dict[str, int]:
    """How many numbers are exchanged, as docs/distributed.md counts them."""
    found: dict[str, int] = {}
    plain = {name: getattr(distributed, name) for name in ("all_reduce", "broadcast")}

    def counting(name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found[quantity] += tensor.numel()
            return plain[name](tensor, *args, **kwargs)

        return call

    net, (X, y), (_, rows, _) = model(), data().tensors, part(rank)
    for quantity in VOLUMES:
        found[quantity] = 0
        loss = F.cross_entropy(net(X[rows]), y[rows])
        for name in plain:
            setattr(distributed, name, counting(name))
        try:
            with block_of(getattr(E, quantity)(), process_group=distributed.group.WORLD):
                loss.backward()
        finally:
            for name, function in plain.items():
                setattr(distributed, name, function)
    return found


# Numbers that are exchanged, for a model of P entries in n parameters, factors of F entries, N samples.
VOLUMES: dict[str, Callable[[int, int, int, int], int]] = {
    "SumGradSquared": lambda P, n, F, N: P,
    "DiagGGNExact": lambda P, n, F, N: P,
    "Variance": lambda P, n, F, N: 2 * P,
    "KFLR": lambda P, n, F, N: F + n,  # and one number for each parameter, that of its rows
    "BatchL2Grad": lambda P, n, F, N: N * n,
    "BatchGrad": lambda P, n, F, N: N * P,
}


def errors(rank: int) -> list[str]:
    """What is said of samples that are repeated, of an error in one process, and without the model."""
    net, group, said = model(), distributed.group.WORLD, []
    sampler: Any = DistributedSampler(data(), shuffle=False)

    def once(model: nn.Module, batch: Any) -> Tensor:
        if rank:
            raise KeyError("a broken file")
        return F.cross_entropy(model(batch[0]), batch[1])

    ways = (
        partial(accumulate, net, F.cross_entropy, DataLoader(data(), sampler=sampler)),
        partial(accumulate, net, None, DataLoader(data()), forward=once),
    )
    for way in ways:
        try:
            way(extensions=[E.Variance()], reduction="mean", process_group=group)
        except (ValueError, RuntimeError, KeyError) as error:
            said.append(f"{type(error).__name__} {error}")
        assert not any(hasattr(p, "variance") for p in net.parameters())
    return said


def local(rank: int) -> dict[str, Any]:
    """A process without samples of its own, and values of single samples that stay where they are."""
    net, found = model(), {}
    loader: Any = [] if rank else DataLoader(data(), batch_size=4)
    exts = [E.Variance(), E.EKFLR(), E.BatchGrad()]
    options: dict[str, Any] = {"reduction": "mean", "process_group": distributed.group.WORLD}
    accumulate(net, F.cross_entropy, loader, exts, **options)
    found["alone"] = taken_parts(net, [ext.savefield for ext in exts])
    net = model()
    mine, _, _ = part(rank)
    accumulate(net, F.cross_entropy, DataLoader(mine), [E.BatchGrad()], gather=False, **options)
    found["own"] = taken_parts(net, ["grad_batch"])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(process, 2, tmp_path_factory.mktemp("scale"))


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = {}
    for name, make in QUANTITIES.items():
        ext = make()
        values = _values(whole([ext], 0), [ext.savefield])
        found[name], found["grad"] = values[ext.savefield], values["grad"]
    return found


@pytest.mark.parametrize("name", COLUMNS)
def test_column(name: str, runs: list[dict[str, Any]], references: dict[str, dict[str, Any]]) -> None:
    for values in [each[name] for each in runs] if name in runs[0] else [column(name)]:
        for quantity, found in values.items():
            if CELLS.get((quantity, name), "=") == "no":
                field = QUANTITIES[quantity]().savefield
                assert quantity in found or field in found, (quantity, found)
                continue
            assert found.keys() == references[quantity].keys()
            field = "grad" if quantity == "grad" else QUANTITIES[quantity]().savefield
            for parameter, value in found.items():
                same(f"{parameter}.{field}", value, references[quantity][parameter])


def test_table_is_whole() -> None:
    classes = {each for each in E.__all__ if inspect.isclass(getattr(E, each))}
    assert classes - {"BackpropExtension", "HBP"} == {row[0] for row in ROWS[1:]}
    assert set(CELLS.values()) == {"=", "no"}


def test_errors(runs: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(runs):
        repeated, broken = each["errors"]
        assert "repeats 1 of 7 samples" in repeated
        assert broken.startswith("KeyError") == (rank == 1)
        assert "a broken file" in broken


def test_processes_without_samples(
    runs: list[dict[str, Any]], references: dict[str, dict[str, Any]]
) -> None:
    fields = {"variance": "Variance", "ekflr": "EKFLR", "grad_batch": "BatchGrad", "grad": "grad"}
    for rank, each in enumerate(runs):
        for key, value in each["local"]["alone"].items():
            parameter, _, field = key.rpartition(".")
            same(key, value, references[fields[field]][parameter])
        for key, value in each["local"]["own"].items():
            parameter, _, field = key.rpartition(".")
            whole = references[fields[field]][parameter]
            same(key, value, whole[part(rank)[1]] if field == "grad_batch" else whole)


def test_volume(runs: list[dict[str, Any]], references: dict[str, dict[str, Any]]) -> None:
    parameters = list(model().parameters())
    entries = sum(p.numel() for p in parameters)
    factors = sum(f.numel() for value in references["KFLR"].values() for f in value)
    for each in runs:
        for quantity, expected in VOLUMES.items():
            found = each["volume"][quantity]
            assert found == expected(entries, len(parameters), factors, sum(SIZES)), quantity


def test_needs_the_model() -> None:
    with pytest.raises(ValueError, match="`model`"):
        accumulating(E.Variance(), process_group=object())
