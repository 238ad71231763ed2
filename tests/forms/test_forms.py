"""Canonical forms by themselves, against what they stand for, written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms import limits, sides, sums
from backpack.forms import outer as outer_forms
from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout, Patches
from backpack.forms.lookup import Lookup
from backpack.forms.outer import Outer
from backpack.forms.several import Pullback, merge
from backpack.forms.sums import Sum
from backpack.quantities.base import BackpropExtension, Context
from backpack.rules.convolution import unfold
from backpack.sources.columns import ColumnSource
from backpack.sources.table import ExactRoot, LossGradient
from tests.cases import CASES, LOSSES, Apply, Case


class Written(TorchDispatchMode):
    """Adds up the numbers of entries that operations write to fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in held:
                self.entries += each.numel()
        return out


def convolutions(count: int, keep: bool = False) -> list[Outer]:
    """A convolution used several times: forms of inputs of several sizes."""
    torch.manual_seed(0)
    forms = []
    for length in range(6, 6 + count):
        x = torch.rand(3, 2, length, 7).double()
        windows = unfold(x, (2, 3), (1, 2), ((1, 0), (1, 1)), (1, 1)).unflatten(1, (1, -1))
        a = Patches(windows, 2, keep)
        g = torch.rand(2, 3, 1, a.shape[2], 5).double()
        forms.append(Outer(a, g, Layout(torch.Size((5, 2, 2, 3)))))
    return forms


def test_patches_of_several_uses_are_written_once() -> None:
    for keep in (False, True):
        forms = convolutions(2, keep)
        if keep:
            for form in forms:
                form.inputs.written()
        size = sum(form.inputs.shape.numel() + form.g.numel() for form in forms)
        with torch.no_grad(), Written() as written:
            merged = merge(forms)
        assert written.entries <= size
        torch.testing.assert_close(merged.dense(), sum(form.dense() for form in forms))
    differentiable = merge(forms)  # in grad mode
    torch.testing.assert_close(differentiable.dense(), merged.dense())


def test_convolution_used_twice_in_half_precision_inputs() -> None:
    """Autocast leaves inputs in another precision than gradients."""
    torch.manual_seed(0)
    model = extend(
        Apply(lambda m, x: m.l(m.l(x).tanh()).flatten(1), l=nn.Conv1d(2, 2, 3, padding=1, bias=False))
    )
    X, y = torch.rand(4, 2, 5), torch.zeros(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(X)
    with backpack(E.BatchGrad(), E.BatchL2Grad()):
        nn.functional.mse_loss(output.float(), y).backward()
    weight = model.l.weight
    torch.testing.assert_close(weight.grad_batch.sum(0), weight.grad, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        weight.batch_l2, weight.grad_batch.flatten(1).square().sum(1), rtol=1e-2, atol=1e-4
    )


class Held:
    """Bytes of what a graph saves, each storage once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # alive, so that no two have one address

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        storages = (tensor.untyped_storage() for tensor in self.tensors)
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


@pytest.mark.parametrize("block", [2**12, 2**26], ids=["single columns", "all together"])
def test_a_graph_holds_patches_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for each block of columns, with `create_graph`."""
    monkeypatch.setitem(limits.BLOCK_BYTES, "cpu", block)
    torch.manual_seed(0)
    x = torch.rand(2, 3, 200).double().requires_grad_()
    windows = unfold(x, (10,), (1,), ((0, 0),), (1,)).unflatten(1, (1, -1))
    inputs = Patches(windows, 1)
    g = torch.rand(40, 2, 1, inputs.shape[2], 1).double().requires_grad_()
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held, lambda tensor: tensor):
        form = Outer(inputs, g, Layout(torch.Size((1, 3, 10))))
        form.square_sum().sum().backward(create_graph=True)
    products = g.shape[0] * g.shape[1] * 30
    assert held.bytes < 8 * (4 * inputs.shape.numel() + 4 * g.numel() + 12 * products)


# --------------------------------------------------------------------------------------
# Primitives


def close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * scale + 1e-14)


def flat(form: Form) -> Tensor:
    """``[v N, p]``."""
    return form.dense().reshape(form.columns * form.samples, form.shape.numel())


def agree(form: Form) -> None:
    """All primitives of one form, against the form written out."""
    v, n, rows = form.columns, form.samples, flat(form)
    for k in (1, 3, 40):
        u = torch.randn(k, *form.shape, dtype=rows.dtype)
        w = torch.randn(k, v, n, dtype=rows.dtype)
        close(form.project(u), (u.reshape(k, rows.shape[1]) @ rows.mT).reshape(k, v, n))
        close(form.combine(w), (w.reshape(k, len(rows)) @ rows).reshape(u.shape))
    close(form.inner(form), rows @ rows.mT)
    largest = rows.abs().max() if rows.numel() else 1.0
    for edges in (torch.linspace(-0.7, 0.5, 7) * largest, torch.tensor([-torch.inf, 0, torch.inf])):
        expected = torch.histogram(rows.flatten(), edges.to(rows).clamp(-1e300, 1e300))[0]
        assert torch.equal(form.histogram(edges).to(rows), expected)


def agree_with(form: Form, other: Form) -> None:
    expected = flat(form) @ flat(other).mT
    close(form.inner(other), expected)
    close(other.inner(form), expected.mT)


class Examine(BackpropExtension):
    """Has every form looked at that arrives, and together with those that came before it."""

    every_column = True

    def __init__(
        self, source: ColumnSource, look: Callable[[Form, list[Form]], None], known: dict
    ) -> None:
        self.savefield, self.source = f"seen_{type(source).__name__}", source
        self.look, self.known = look, known

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        before = self.known.setdefault(form.shape, [])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.look(form, before)
        # The graph of a derived tensor goes when backward has passed it.
        before.append(Dense(form.dense()) if isinstance(form, Pullback) else form)
        return torch.zeros(())

    def zero(self, context: Context) -> Tensor:
        return torch.zeros(())


def look(form: Form, before: list[Form]) -> None:
    subset = torch.tensor([form.samples - 1, 0, 0])
    parts = [form.take(slice(None), slice(0, 1)), form.take(slice(1, None), subset)]
    for each in (form, *parts):
        agree(each)
    for other in (*parts, *before):
        agree_with(form, other)


def run(case: Case, **options: Any) -> set[type[Form]]:
    """All forms of a model: of the columns of its loss, and of its gradient."""
    torch.manual_seed(0)
    model, inputs = case.model().double(), case.inputs()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    known: dict[torch.Size, list[Form]] = {}
    sources = (ExactRoot(), LossGradient())
    loss = LOSSES[0]
    seen: set[type[Form]] = set()

    def examine(form: Form, before: list[Form]) -> None:
        seen.add(type(form))
        look(form, before)

    with backpack(*(Examine(source, examine, known) for source in sources), **options):
        output = extend(model, batch_dim=case.batch_dim)(*inputs)
        lossfunc = extend(loss.loss(), batch_dim=case.output_dim)
        lossfunc(output, loss.target(output)).backward()
    return seen


@pytest.fixture(params=["usual", "tiles", "written", "factored"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way of computing, whatever it costs here; in many pieces or in one."""
    if request.param != "usual":
        monkeypatch.setattr(sides, "FEW", 0)
    if request.param == "tiles":
        for limit in (limits.PATCH_BYTES, limits.TILE_BYTES):
            monkeypatch.setitem(limit, "cpu", 8 * 50)
        monkeypatch.setattr(outer_forms, "ROWS_BYTES", 8 * 50)
    if request.param in ("written", "factored"):
        written = request.param == "written"
        monkeypatch.setattr(Outer, "_writes", lambda form, vectors: written)
        monkeypatch.setattr(Outer, "_similar_cost_less", lambda form, other: not written)
        monkeypatch.setattr(Outer, "_cancels", lambda form: False)
    yield request.param


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_primitives(case: Case, way: str) -> None:
    assert run(case)


def test_all_kinds_of_forms_are_met() -> None:
    names = "linear embedding lora tied-embedding conv2d-plain convt2d-groups matmul".split()
    kinds = set().union(*(run(case) for case in CASES if case.name in names))
    assert kinds >= {Outer, Dense, Lookup, Pullback, Sum}


FORMS: dict[str, Callable[[], Form]] = {
    "single": lambda: outer(3, 1, 1),
    "groups": lambda: outer(3, 4, 1),
    "positions": lambda: outer(3, 1, 6),
    "grouped positions": lambda: outer(2, 2, 5),
    "columns": lambda: Outer(rand(3, 1, 4, 5), rand(2, 3, 1, 4, 2), layout("in_out", 5, 2)),
    "vector": lambda: Outer(rand(3, 1, 4, 5), rand(2, 3, 1, 4, 1), layout("in_out", 5)),
    "convt": lambda: Outer(rand(3, 2, 4, 6), rand(2, 3, 2, 4, 5), layout("convt", 6, 5, 2)),
    "patches": lambda: convolutions(1)[0],
    "kept patches": lambda: convolutions(1, keep=True)[0],
    "lookup": lambda: Lookup(torch.randint(4, (3, 5)), rand(2, 3, 5, 2), torch.Size((4, 2))),
    "dense": lambda: Dense(rand(2, 3, 4, 5)),
    "scalar": lambda: Dense(rand(2, 3)),
    "pullback": lambda: Pullback(outer(3, 1, 2), lambda m: 2 * m.mT, torch.Size((3, 4))),
    "sum": lambda: Sum((outer(3, 1, 4), Dense(rand(3, 3, 4, 3)), outer(3, 1, 1))),
}  # fmt: skip


def layout(kind: str, *shape: int) -> Layout:
    return Layout(torch.Size(shape), kind)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def outer(columns: int, groups: int, positions: int) -> Outer:
    a, g = rand(3, groups, positions, 3), rand(columns, 3, groups, positions, 4)
    return Outer(a, g, Layout(torch.Size((4 * groups, 3))))


@pytest.mark.parametrize("name", FORMS)
def test_primitives_of_small_forms(name: str, way: str) -> None:
    torch.manual_seed(0)
    form = FORMS[name]()
    other = FORMS[name]()
    look(form, [other, Dense(rand(1, 5, *form.shape)), other.take(slice(0, 1), slice(2))])


@pytest.mark.parametrize("name", FORMS)
def test_primitives_without_columns_or_samples(name: str) -> None:
    form = FORMS[name]()
    for part in (form.take(slice(0, 0), slice(None)), form.take(slice(None), slice(0, 0))):
        if name != "pullback":
            agree(part)
            agree_with(form, part)


@pytest.mark.parametrize("name", FORMS)
def test_primitives_are_differentiable(name: str, way: str) -> None:
    """With `create_graph` the graph of `g` goes through them."""
    torch.manual_seed(0)
    form = FORMS[name]()
    if not isinstance(form, (Outer, Lookup, Dense)):
        return
    leaf = (form.values if isinstance(form, Dense) else form.g).requires_grad_()
    u, w = rand(3, *form.shape), rand(3, form.columns, form.samples)
    rows = flat(form)
    for found, expected in (
        (form.inner(form), rows @ rows.mT),
        (form.project(u), (u.reshape(3, -1) @ rows.mT).reshape(w.shape)),
        (form.combine(w), (w.flatten(1) @ rows).reshape(u.shape)),
    ):
        weight = rand(*found.shape)
        (one,) = torch.autograd.grad((found * weight).sum(), leaf, retain_graph=True)
        (two,) = torch.autograd.grad((expected * weight).sum(), leaf, retain_graph=True)
        close(one, two)


def test_forms_of_other_parameters() -> None:
    with pytest.raises(ValueError, match="forms of parameters"):
        outer(1, 1, 1).inner(outer(1, 2, 1))


def test_groups_that_differ() -> None:
    """One weight, in a convolution with groups and in one without."""
    plain = Outer(rand(3, 1, 5, 6), rand(2, 3, 1, 5, 4), Layout(torch.Size((4, 2, 3))))
    grouped = Outer(rand(3, 2, 5, 6), rand(2, 3, 2, 5, 2), Layout(torch.Size((4, 2, 3))))
    agree_with(plain, grouped)


def test_edges_and_what_is_no_number() -> None:
    values = torch.tensor([-1.0, 0, 0.5, 1, 2, torch.nan, torch.inf, -torch.inf]).reshape(1, 1, -1)
    form = Dense(values)
    assert form.histogram(torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 2]
    assert form.histogram(torch.tensor([-torch.inf, 0.5, torch.inf])).tolist() == [3, 4]


def test_cancelling_positions() -> None:
    """In single precision, where products of positions are a thousand times their sum."""
    torch.manual_seed(0)
    a, g = torch.randn(4, 1, 2, 40), torch.randn(3, 4, 1, 2, 30)
    a[:, :, 1], g[:, :, :, 1] = a[:, :, 0], -g[:, :, :, 0] * (1 + 1e-4 * torch.randn(3, 4, 1, 30))
    form = Outer(a, g, Layout(torch.Size((30, 40))))
    exact = flat(Outer(a.double(), g.double(), form.layout))
    exact = exact @ exact.mT
    assert float((form.inner(form) - exact).abs().max() / exact.abs().max()) < 1e-2


def large_matrices(v: int) -> dict[str, Form]:
    """Weights of several strips; with rows that are read several times, by some samples, by none."""
    o, i, n, s = 30, 7, 3, 5
    index = torch.randint(o // 2, (n, s))
    index[0] = index[0, 0]
    reads = torch.rand(n, s) < 0.7
    table = Lookup(index, rand(v, n, s, i), torch.Size((o, i)), reads)
    head = Outer(rand(n, 1, s, i), rand(v, n, 1, s, o), layout("out_in", o, i))
    turned = Outer(rand(n, 1, s, o), rand(v, n, 1, s, i), layout("in_out", o, i))
    pixels = rand(n, 1, i, s + 2).unfold(3, 3, 1).movedim(4, 3)
    convolution = Outer(Patches(pixels, 1), rand(v, n, 1, s, o), layout("out_in", o, i, 3))
    half = Outer(head.inputs, head.g.float(), head.layout)
    tied = {"tied": (head, table), "tied the other way": (table, turned), "autocast": (half, table)}
    return {"head": head, "turned": turned, "convolution": convolution} | {
        name: Sum(parts) for name, parts in tied.items()
    }


@pytest.mark.parametrize("v", [1, 2])
@pytest.mark.parametrize("strip", [1, 8 * 7 * 4, 2**20])
def test_large_matrices_in_strips(v: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (limits.STRIP_BYTES, limits.PATCH_BYTES):
        monkeypatch.setitem(limit, "cpu", strip)
    monkeypatch.setattr(sums, "SMALL", 0)
    monkeypatch.setattr(sides, "SMALL_BYTES", 0)
    torch.manual_seed(0)
    for name, form in large_matrices(v).items():
        dense, sign = form.dense(), rand(v, form.samples)
        exact = dense * dense * sign.reshape(v, -1, *(1 for _ in form.shape))
        with torch.no_grad():
            centre, squares = form.centred_square_sum()
            found = form.square_sum(), form.square_sum(sign), form.squared_norms(), squares
        centred = dense - (0 if centre is None else centre)
        rows = (dense * dense).sum(0).flatten(1).sum(1)
        expected = (dense * dense).sum((0, 1)), exact.sum((0, 1)), rows, (centred**2).sum((0, 1))
        digits = 1e-5 if name == "autocast" else 1e-9
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=digits, atol=digits, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_tied_matrix_whose_uses_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sample, in single precision: its norm is a thousandth of those of the uses."""
    monkeypatch.setattr(sums, "SMALL", 0)
    torch.manual_seed(0)
    head = Outer(torch.randn(3, 1, 1, 40), torch.randn(1, 3, 1, 1, 30), layout("out_in", 30, 40))
    head.g[:, 1] = 0
    head.g[:, 1, 0, 0, 7] = 1
    g = torch.randn(1, 3, 1, 40)
    g[0, 1, 0] = -head.inputs[1, 0, 0] * (1 + 1e-3 * torch.randn(40))
    form = Sum((head, Lookup(torch.tensor([[3], [7], [0]]), g, torch.Size((30, 40)))))
    exact = replace(head, inputs=head.inputs.double(), g=head.g.double()).dense()
    exact = exact + replace(form.forms[1], g=g.double()).dense()
    with torch.no_grad():
        torch.testing.assert_close(
            form.squared_norms(), exact.square().flatten(2).sum((0, 2)).float(), rtol=1e-4, atol=0
        )


class Largest(TorchDispatchMode):
    """The most numbers that one result has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("positions", [1, 9])
@pytest.mark.parametrize("name", ["outer", "patches", "lookup", "sum", "pullback"])
def test_memory_is_bounded(name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of columns times samples times parameter: results, inputs, and pieces of some size."""
    room, size = 20000, 4000
    for limit in (limits.PATCH_BYTES, limits.TILE_BYTES):
        monkeypatch.setitem(limit, "cpu", 8 * room)
    n, v, s = 12, 8, positions
    o, i = 40, 100
    form: Form = Outer(rand(n, 1, s, i), rand(v, n, 1, s, o), Layout(torch.Size((o, i))))
    if name == "patches":
        windows = rand(n, 1, 10, s + 9).unfold(3, 10, 1).movedim(4, 3)
        form = Outer(Patches(windows, 1), rand(v, n, 1, s, o), form.layout)
    if name == "lookup":
        form = Lookup(torch.randint(o, (n, s)), rand(v, n, s, i), form.shape)
    if name == "sum":
        form = Sum((form, Lookup(torch.randint(o, (n, s)), rand(v, n, s, i), form.shape)))
    if name == "pullback":
        form = Pullback(form, lambda m: 2 * m, form.shape)
    if name in ("outer", "sum") and positions > 1:
        monkeypatch.setitem(limits.STRIP_BYTES, "cpu", 8 * 500)
        monkeypatch.setattr(sums, "SMALL", size)
        with torch.no_grad(), Largest() as squares:
            form.square_sum()
            form.centred_square_sum()
            form.squared_norms()
        assert squares.numbers <= max(v * n * s * i, v * n * s * o, size) < v * n * size
    k, largest = 5, Largest()
    u, w = rand(k, *form.shape), rand(k, v, n)
    with torch.no_grad(), largest:
        form.inner(form)
        form.project(u)
        form.combine(w)
        form.histogram(torch.linspace(-1, 1, 5).double())
    given = v * n * s * (i if name in ("lookup", "sum") else o)
    bound = max(room, (v * n) ** 2, n * s * i, given)
    assert v * n * size > 4 * bound
    assert largest.numbers <= 1.2 * max(bound, k * size)
