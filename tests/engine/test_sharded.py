"""Quantities of models that ``fully_shard`` keeps in parts, against those of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from backpack import accumulate, extend, optim
from backpack import backpack as block_of
from backpack import extensions as E
from backpack.cockpit import watch
from backpack.kronecker.eigen import KroneckerEigen
from backpack.vivit import LowRank
from tests.dataset.test_accumulate import QUANTITIES
from tests.engine.test_processes import GradientMax, local, parts, same
from tests.processes import spawn

SIZES = (2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = x + torch.tanh(self.linear(self.norm(x)))
        return out if scale is None else out * scale


class Model(nn.Module):
    """Sizes that two and four processes cannot divide, a block of two inputs, words used again."""

    def __init__(self, tied: bool = False, checkpoints: bool = False) -> None:
        super().__init__()
        self.words, self.checkpoints = nn.Embedding(6, 5), checkpoints
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pool, self.head = nn.Conv1d(5, 5, 2, bias=False), nn.Linear(5, 6 if tied else 3)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = x if x.is_floating_point() else self.words(x)
        first, second = self.blocks
        if self.checkpoints:
            h = checkpoint(second, checkpoint(first, h, use_reentrant=False), h, use_reentrant=False)
        else:
            h = second(first(h), scale=h.sigmoid())
        out = self.head(self.pool(h.movedim(1, 2)).squeeze(-1))
        return out if y is None else F.cross_entropy(out, y)


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return extend(Model(**options).double())


def data(size: int) -> tuple[Tensor, Tensor]:
    X = torch.randint(6, (3 * size, 2), generator=torch.Generator().manual_seed(1))
    return X, torch.arange(len(X)) % 3


def quantities(few: bool = False) -> list[E.BackpropExtension]:
    """One of each field, but for products; a few of them are one for each way of combining."""
    unique = {ext.savefield: ext for ext in (make() for make in QUANTITIES.values())}
    if few:
        fields = "batch_l2 grad_batch variance diag_ggn_exact kflr ekflr diag_h"
        return [unique[field] for field in fields.split()]
    products = ("ggnmp", "hmp", "pchmp")
    return [ext for field, ext in unique.items() if field not in products] + [GradientMax()]


# Ways to wrap and to train: which modules are wrapped, options, sizes of batches.
WAYS: dict[str, dict[str, Any]] = {
    "root and blocks": {"all": True, "passes": 2},
    "root": {"wrap": "root"},
    "uneven": {"all": True, "even": False},
    "kept after forward": {"options": {"reshard_after_forward": False}},
    "root let go": {"options": {"reshard_after_forward": True}, "passes": 2},
    "blocks together": {"wrap": "together"},
    "tied": {"model": {"tied": True}},
    "checkpoints": {"model": {"checkpoints": True}},
    "loss inside": {"inside": True, "inputs": True},
    "other axis": {"all": True, "other": True},
    "certified always": {"block": {"certify": "always"}},
    "without gradient": {"block": {"gradient": False}, "passes": 2},
    "local": {"block": {"gather": False}},
    "some parameters": {"some": True},
    "fewer processes between": {"options": {"reshard_after_forward": 2}},
    "two axes": {"mesh": (2, 2), "group": True},
}
OF_FOUR = ("uneven", "fewer processes between", "two axes")


def ways_of(size: int) -> list[str]:
    return [name for name in WAYS if name not in OF_FOUR[1:]] if size == 2 else [*OF_FOUR]


def wrapped(net: Model, way: dict[str, Any], size: int) -> Model:
    shape = way.get("mesh", (size,))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    options = {"mesh": mesh, **way.get("options", {})}
    if way.get("other"):
        options["shard_placement_fn"] = _last_axis
    if way.get("wrap") == "together":
        fully_shard([*net.blocks], **options)
    elif way.get("wrap") != "root":
        for block in net.blocks:
            fully_shard(block, **options)
    fully_shard(net, **options)
    return net


def _last_axis(parameter: nn.Parameter) -> Any:
    divisible = parameter.shape[-1] % distributed.get_world_size() == 0
    return Shard(parameter.dim() - 1) if divisible else None


def run(way: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    net = wrapped(model(**way.get("model", {})), way, size)
    (X, y), mine = data(size), parts(size, way.get("even", True))[rank]
    options = dict(way.get("block", {}))
    if way.get("group"):
        options["process_group"] = distributed.group.WORLD
    if way.get("some"):
        options["parameters"] = [net.head.weight, net.blocks[0].linear.bias]
    exts = quantities(not way.get("all"))
    for _ in range(way.get("passes", 1)):
        net.zero_grad()
        given = inputs(X[mine]) if way.get("inputs") else X[mine]
        with block_of(*exts, **options):
            loss = net(given, y[mine]) if way.get("inside") else F.cross_entropy(net(given), y[mine])
            loss.backward()
    return taken(net, [ext.savefield for ext in exts])


def inputs(X: Tensor) -> Tensor:
    """Vectors for words, which require a gradient themselves."""
    return torch.eye(6, 5, dtype=torch.float64)[X].requires_grad_()


def taken(net: nn.Module, fields: list[str], whole: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, p in net.named_parameters():
        for field in (*fields, "grad"):
            value = vars(p).get(field) if field != "grad" else p.grad
            if isinstance(value, DTensor):
                kept = value.to_local()
                # A part holds no memory of the whole.
                assert field == "grad" or kept.untyped_storage().nbytes() <= kept.nbytes, (name, field)
                lead = value.dim() - p.dim()
                assert isinstance(p, DTensor)
                assert kept.shape[lead:] == p.to_local().shape, (name, field)
                value = value.full_tensor()
            if isinstance(value, KroneckerEigen):
                value = value.to_dense()
            if value is not None:
                found[f"{name}.{field}"] = value
    return found


def expected(way: dict[str, Any], size: int) -> dict[str, Any]:
    """One process, and the mean of the same losses."""
    net, (X, y) = model(**way.get("model", {})), data(size)
    slices = parts(size, way.get("even", True))
    sizes = [s.stop - s.start for s in slices]
    weights = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in sizes])
    exts = quantities(not way.get("all"))
    chosen = [net.head.weight, net.blocks[0].linear.bias] if way.get("some") else None
    losses = F.cross_entropy(net(inputs(X) if way.get("inputs") else X), y, reduction="none")
    with block_of(*exts, parameters=chosen):
        (losses * weights).sum().div(size).backward()
    return taken(net, [ext.savefield for ext in exts])


def memory(rank: int, size: int) -> tuple[list[int], int]:
    """How many of six blocks are whole, in all passes for first-order quantities; and after them."""
    net = extend(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).double())
    seen: list[int] = []

    def look(gradient: Tensor | None = None) -> None:
        seen.append(sum(not isinstance(block.weight, DTensor) for block in net))

    def listen(block: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(look)

    for block in net:
        fully_shard(block)
        block.register_forward_hook(listen)
    fully_shard(net)
    with block_of(E.BatchL2Grad(), E.Variance()):
        net(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    passes = [*seen]
    look()
    return passes, seen[-1]


def draws(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Sampled values, and the means over processes of those of each one's own samples."""
    found = []
    (X, y), mine = data(size), parts(size)[rank]
    for ext in (E.DiagGGNMC(mc_samples=2), E.KFAC()):
        values = []
        for net in (wrapped(model(), {}, size), model()):
            torch.manual_seed(rank)
            loss = F.cross_entropy(net(X[mine]), y[mine])
            with block_of(ext):
                loss.backward()
            values.append([getattr(p, ext.savefield) for p in net.parameters()])
        for one, two in zip(*values, strict=True):
            one, two = (v[0] if isinstance(v, list) else v for v in (one, two))
            distributed.all_reduce(two)
            found.append((one.full_tensor() if isinstance(one, DTensor) else one, two / size))
    return found


def accumulated(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Gradients of two micro-batches that are exchanged with the second; curvature in both passes."""
    (X, y), net, plain = data(size), wrapped(model(), {}, size), model()
    for i in (1, 2):
        net.set_requires_gradient_sync(i == 2)
        rows = slice(rank, rank + i)
        with block_of(E.DiagGGNExact(), certify="always"):
            F.cross_entropy(net(X[rows]), y[rows]).backward()
        F.cross_entropy(plain(X[rows]), y[rows]).backward()
    found = []
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        distributed.all_reduce(q.grad)
        found.append((p.grad.full_tensor(), q.grad / size))
    return found


def precision(rank: int, size: int) -> list[tuple[Any, Tensor, Tensor]]:
    """Values where the model computes in half the precision of the parameters."""
    (X, y), found = data(size), []
    for policy in (MixedPrecisionPolicy(param_dtype=torch.bfloat16), MixedPrecisionPolicy()):
        net = wrapped(model().float(), {"options": {"mp_policy": policy}}, size)
        with block_of(E.SumGradSquared()):
            F.cross_entropy(net(X).float(), y).backward()
        found.append([p.sum_grad_squared for p in net.parameters()])
    return [(a.dtype, a.full_tensor(), b.full_tensor()) for a, b in zip(*found, strict=True)]


def _product(net: Model, loss: Callable[..., Tensor]) -> None:
    with block_of(E.GGNMP()):
        loss(net).backward()


def _graph(net: Model, loss: Callable[..., Tensor]) -> None:
    with block_of(E.Variance()):
        loss(net).backward(create_graph=True)


def _hook(net: Model, loss: Callable[..., Tensor]) -> None:
    with block_of(E.Variance(), extension_hook=print):
        loss(net).backward()


def _together(net: Model, loss: Callable[..., Tensor]) -> None:
    X, y = data(2)
    accumulate(net, F.cross_entropy, [(X, y)], [E.Variance()], reduction="mean")


def _optimizer(net: Model, loss: Callable[..., Tensor]) -> None:
    optim.KFAC(net, lr=0.1, damping=1.0)


def _monitor(net: Model, loss: Callable[..., Tensor]) -> None:
    watch(net)


def _no_rule(net: Model, loss: Callable[..., Tensor]) -> None:
    with LowRank():
        loss(net).backward()


def _unseen(net: Model, loss: Callable[..., Tensor]) -> None:
    with block_of(E.Variance()):
        torch.autograd.backward(loss(net))


def _other_parameters(net: Model, loss: Callable[..., Tensor]) -> None:
    other = model()
    other.head.bias.requires_grad_(distributed.get_rank() == 0)
    value = loss(wrapped(other, {"wrap": "root"}, 2))
    with block_of(E.Variance()):
        value.backward()


def _other_group(net: Model, loss: Callable[..., Tensor]) -> None:
    alone = [distributed.new_group([each]) for each in range(2)][distributed.get_rank()]
    with block_of(E.Variance(), process_group=alone):
        loss(net).backward()


def _mixed(net: Model, loss: Callable[..., Tensor]) -> None:
    def flip(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda gradient: gradient.flip(0))

    handle = net.blocks[1].linear.register_forward_hook(flip)
    try:
        with block_of(E.Variance(), certify="always"):
            loss(net).backward()
    finally:
        handle.remove()


def _part_of_it(net: Model, loss: Callable[..., Tensor]) -> None:
    inner = extend(nn.Sequential(nn.Linear(4, 4)))
    outer = nn.Sequential(inner, nn.Linear(4, 2))
    fully_shard(outer)
    with block_of(E.Variance()):
        outer(torch.ones(2, 4)).sum().backward()


def _tensor_parallel(net: Model, loss: Callable[..., Tensor]) -> None:
    spread = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    parallelize_module(extend(spread), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with block_of(E.Variance()):
        spread[0](torch.ones(2, 4)).sum().backward()


# What is refused, and what the error says.
REFUSALS: list[tuple[Callable[..., None], str]] = [
    (_product, "ggnmp: products with curvature"),
    (_graph, "create_graph"),
    (_hook, "extension_hook"),
    (_together, "use a block backpack"),
    (_optimizer, "KFAC: parameter 'words.weight' is kept in parts"),
    (_monitor, "parameter 'words.weight' is kept in parts"),
    (_no_rule, "(fully_shard). what backpack.vivit keeps does not say how"),
    (_unseen, "must be loss.backward()"),
    (_other_parameters, "differs in 'head.bias'"),
    (_other_group, "process_group has 1"),
    (_mixed, "found by scaling each sample's share"),
    (_part_of_it, "parameter '0.weight' is kept in parts by fully_shard of a module that the extended"),
    (_tensor_parallel, "parameter 'weight' is spread over processes as a DTensor"),
]


def refusals(rank: int, size: int) -> tuple[list[str], float]:
    """What is said; and how far the same model's gradient is from a fresh model's after that."""
    (X, y), mine = data(size), parts(size)[rank]

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(X[mine]), y[mine])

    said, net = [], wrapped(model(), {}, size)
    for case, _ in REFUSALS:
        try:
            case(net, loss)
            said.append("")
        except (NotImplementedError, RuntimeError) as error:
            said.append(str(error))
        net.zero_grad()
    fresh = wrapped(model(), {}, size)
    with block_of(E.Variance(), E.GGNMP(), unsupported="skip") as block:
        loss(net).backward()
    assert {each.savefield for each in block.left_out} == {"ggnmp"}
    assert all(hasattr(p, "variance") for p in net.parameters())
    loss(fresh).backward()
    pairs = zip(net.parameters(), fresh.parameters(), strict=True)
    return said, max(float((p.grad - q.grad).full_tensor().abs().max()) for p, q in pairs)


def process(rank: int, size: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # wrapped modules that return views
    found: dict[str, Any] = {name: run(WAYS[name], rank, size) for name in ways_of(size)}
    if size == 2:
        for function in (memory, draws, accumulated, precision, refusals):
            found[function.__name__] = function(rank, size)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {size: spawn(process, size, tmp_path_factory.mktemp("sharded")) for size in SIZES}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in ways_of(size)])
def test_values_are_those_of_one_process(
    size: int, name: str, runs: dict[int, list[dict[str, Any]]]
) -> None:
    way = WAYS[name]
    whole, slices = expected(way, size), parts(size, way.get("even", True))
    for rank, values in enumerate(each[name] for each in runs[size]):
        if not way.get("block", {}).get("gradient", True):
            whole = {key: value for key, value in whole.items() if not key.endswith(".grad")}
        assert values.keys() == whole.keys(), name
        for key, value in values.items():
            reference = whole[key]
            if not way.get("block", {}).get("gather", True):
                reference = local(key, reference, slices[rank])
            same(key, value, reference)


def test_parameters_are_let_go(runs: dict[int, list[dict[str, Any]]]) -> None:
    for each in runs[2]:
        passes, left = each["memory"]
        assert len(passes) == 3 * 6  # two that find samples apart, and the gradient's
        assert max(passes) <= 2  # torch gathers the next while one is in use
        assert not left


def test_draws(runs: dict[int, list[dict[str, Any]]]) -> None:
    for each in runs[2]:
        assert each["draws"]
        for value, reference in each["draws"]:
            same("draws", value, reference)
            assert value.any()


def test_gradients_that_are_exchanged_later(runs: dict[int, list[dict[str, Any]]]) -> None:
    for each in runs[2]:
        for value, reference in each["accumulated"]:
            same("gradient", value, reference)


def test_lower_precision(runs: dict[int, list[dict[str, Any]]]) -> None:
    for dtype, value, reference in runs[2][0]["precision"]:
        assert dtype == torch.float32
        assert 0 < float((value - reference).norm()) <= 2**-4 * float(reference.norm())


def test_refusals(runs: dict[int, list[dict[str, Any]]]) -> None:
    for each in runs[2]:
        said, difference = each["refusals"]
        for (case, what), text in zip(REFUSALS, said, strict=True):
            assert what in text, (case.__name__, text)
        assert difference == 0
