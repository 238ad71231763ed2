"""The Triton kernel against torch's operations, in Triton's interpreter; its choice, without Triton.

Tests marked `triton` need Triton and TRITON_INTERPRET=1; `make test-triton` runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms import triton as kernels
from backpack.forms.layout import Layout, Patches
from backpack.forms.outer import Outer
from backpack.rules.convolution import unfold

NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
# Columns, samples, groups, positions, outputs, inputs; at edges of tiles and chunks and beyond.
SIZES = [
    (1, 3, 1, 2, 16, 16),
    (2, 3, 1, 5, 17, 15),
    (1, 2, 3, 4, 3, 5),
    (3, 2, 2, 33, 7, 20),
    (1, 2, 1, 16, 65, 130),
    (4, 5, 1, 2, 1, 1),
    (1, 1, 1, 17, 64, 64),
    (4, 5, 2, 2, 2, 3),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_broken", False)
    monkeypatch.delenv("BACKPACK_TRITON", raising=False)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    cached = kernels._kernel, kernels._compare
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is used on CPUs, and for all shapes."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "MULTIPLICATIONS", {torch.float32: INF, torch.float64: INF})


def products(form: Outer) -> Tensor:
    """``[v, n, q, o, i]``."""
    return torch.einsum("vnqso,nqsi->vnqoi", form.g, form.a)


def outer(sizes: tuple[int, ...], dtype: torch.dtype) -> Outer:
    v, n, q, s, o, i = sizes
    a, g = torch.randn(n, q, s, i, dtype=dtype), torch.randn(v, n, q, s, o, dtype=dtype)
    return Outer(a, g, Layout(torch.Size((q * o, i))))


def lazy(ndim: int, groups: int, outputs: int, dtype: torch.dtype) -> Outer:
    """A convolution's form, its patches a view and its columns channels first."""
    x = torch.randn(2, 3 * groups, *(7, 6, 5)[:ndim], dtype=dtype)
    kernel, stride = (3, 2, 2)[:ndim], (2, 1, 2)[:ndim]
    windows = unfold(x, kernel, stride, [(1, 2)] * ndim, (1,) * ndim)
    windows = windows.unflatten(1, (groups, 3))
    patches = Patches(windows, ndim)
    g = torch.randn(2, 2, groups, outputs, patches.shape[2], dtype=dtype).mT
    return Outer(patches, g, Layout(torch.Size((groups * outputs, 3, *kernel))))


def agree(form: Outer, sign: Tensor | None, tolerance: float) -> None:
    """The kernel's results are those of products written out, in double precision."""
    exact = products(form).double().square()
    signed = exact if sign is None else exact * sign.double()[..., None, None, None]
    kernel, (windows, ndim) = kernels._kernel(), form._windows
    ours = kernels._contract(kernel, windows, ndim, form.g, sign, norms=False)
    norms = kernels._contract(kernel, windows, ndim, form.g, None, norms=True)
    assert ours.dtype == norms.dtype == form.g.dtype
    for got, want in ((ours, signed.sum((0, 1))), (norms, exact.sum((0, 2, 3, 4)))):
        assert got.shape == want.shape
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * float(exact.sum())
        )


@pytest.mark.triton
@DTYPES
@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes: tuple[int, ...], signed: bool, dtype: torch.dtype, tolerance: float) -> None:
    sign = torch.randn(sizes[1], sizes[0], dtype=dtype).T.sign() if signed else None
    v, n, *rest = sizes
    more = outer((v, n + 1, *rest), dtype)  # what is read beyond the end shows
    agree(more.take(slice(None), slice(0, n)), sign, tolerance)


@pytest.mark.triton
@DTYPES
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_patches_are_not_written(
    monkeypatch: pytest.MonkeyPatch, ndim: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    form = lazy(ndim, groups, 5, dtype)
    written = Outer(form.inputs.written(), form.g, form.layout)
    monkeypatch.setattr(Patches, "written", lambda self: pytest.fail("patches were written out"))
    kernel = kernels._kernel()
    for norms in (False, True):
        ours, want = (
            kernels._contract(kernel, *each._windows, form.g, None, norms) for each in (form, written)
        )
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    agree(written, None, tolerance)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from backpack.forms import triton as kernels

dtype, signed, norms, ones = sys.argv[1], *(each == "True" for each in sys.argv[2:])
kernel = kernels._kernel()
constants = dict(SIGNED=signed, NORMS=norms, R=16, C=64, S=16, PRECISION="ieee")
pointers = dict.fromkeys("GAW", "*" + dtype) | {"out": "*" + dtype, "P": "*i64", "I": "*i64"}
sizes = {name: "i32" for name in kernel.arg_names if name not in (*pointers, *constants)}
if ones:  # Triton takes arguments that are 1 for constants
    constants, sizes = constants | dict.fromkeys(sizes, 1), {}
signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.triton
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("dtype", "signed"), [("fp32", True), ("fp64", False)])
def test_compiles(dtype: str, signed: bool, norms: bool, ones: bool) -> None:
    """For a GPU that need not be there: the interpreter takes more than the compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    given = map(str, (signed, norms, ones))
    subprocess.run([sys.executable, "-c", COMPILE, dtype, *given], check=True, env=environment)


@pytest.mark.triton
@DTYPES
def test_strides(dtype: torch.dtype, tolerance: float) -> None:
    """Columns and inputs may be any views: reversed order, steps, expanded."""
    v, n, q, s, o, i = 2, 3, 2, 5, 6, 7
    layout = Layout(torch.Size((q * o, i)))
    g = torch.randn(o, s, q, n, v, dtype=dtype).permute(4, 3, 2, 1, 0)
    a = torch.randn(i, 2 * s, n, q, dtype=dtype).permute(2, 3, 1, 0)[:, :, ::2]
    agree(Outer(a, g, layout), None, tolerance)
    agree(Outer(a, g[:1].expand(v, -1, -1, -1, -1), layout), None, tolerance)
    agree(Outer(a[:, :, :1].expand(-1, -1, s, -1), g, layout), None, tolerance)
    backwards = torch.randn(n, q, s, i, dtype=dtype) * 1j
    agree(Outer(backwards.conj().imag, g, layout), None, tolerance)


@pytest.mark.triton
def test_inputs_of_another_precision() -> None:
    form = outer((2, 3, 1, 4, 5, 6), torch.float32)
    for a in (form.a.bfloat16(), form.a.double()):
        agree(Outer(a, form.g, form.layout), None, 1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["rows", "columns", "convt"])
def test_layouts(everywhere: None, kind: str) -> None:
    """The methods of a form give the same numbers with the kernel and without."""
    shape = {"rows": (9, 6), "columns": (6, 9), "convt": (2, 9, 3)}[kind]
    form = outer((2, 3, 1, 4, 9, 6), torch.float64)
    form = Outer(form.a, form.g, Layout(torch.Size(shape), kind))
    sign = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]], dtype=torch.float64)
    dense = form.dense().square()
    signed = (dense * sign.reshape(2, 3, *[1] * len(shape))).sum((0, 1))
    torch.testing.assert_close(form.square_sum(), dense.sum((0, 1)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(form.square_sum(sign), signed, rtol=1e-10, atol=1e-10)
    wide = outer((2, 3, 1, 9, 9, 6), torch.float64)  # no Gram matrices
    want = wide.dense().square().sum((0, 2, 3))
    torch.testing.assert_close(wide.squared_norms(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of 0 * inf
@pytest.mark.parametrize("value", [INF, NAN])
def test_not_finite(value: float) -> None:
    """One sample's infinite input is its own, and no padding makes it NaN."""
    form = outer((1, 3, 1, 2, 5, 6), torch.float64)
    form.a[1, 0, 0, 2] = value
    kernel = kernels._kernel()
    norms = kernels._contract(kernel, *form._windows, form.g, None, norms=True)
    sums = kernels._contract(kernel, *form._windows, form.g, None, norms=False)
    squares = products(form).square()
    torch.testing.assert_close(norms, squares.sum((0, 2, 3, 4)), equal_nan=True)
    torch.testing.assert_close(sums, squares.sum((0, 1)), equal_nan=True)
    assert norms[[0, 2]].isfinite().all()


@pytest.mark.triton
def test_quantities(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's quantities, with kernel and without; the kernel is what ran."""
    calls, contract = [], kernels._contract
    monkeypatch.setattr(
        kernels, "_contract", lambda *args, **kw: calls.append(1) or contract(*args, **kw)
    )
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Sigmoid(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    model, loss = extend(model.double()), extend(nn.CrossEntropyLoss())
    x, y = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    names = "batch_l2", "sum_grad_squared", "diag_ggn_exact", "diag_h"

    def run() -> list[Tensor]:
        with backpack(E.BatchL2Grad(), E.SumGradSquared(), E.DiagGGNExact(), E.DiagHessian()):
            loss(model(x), y).backward()
        return [getattr(p, name) for p in model.parameters() for name in names]

    with_kernel, used = run(), len(calls)
    monkeypatch.setenv("BACKPACK_TRITON", "0")
    torch.testing.assert_close(with_kernel, run(), rtol=1e-10, atol=1e-12)
    assert used >= 6 and len(calls) == used


@pytest.fixture
def chosen(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stands in for the kernel: a call gives sevens, and is noted."""
    calls: list[bool] = []

    def contract(
        kernel: Any, windows: Tensor, ndim: int, g: Tensor, sign: Tensor | None, norms: bool
    ) -> Tensor:
        calls.append(norms)
        shape = (g.shape[1],) if norms else (g.shape[2], g.shape[4], windows.shape[2])
        return g.new_full(shape, 7.0)

    monkeypatch.setattr(kernels, "_kernel", object)
    monkeypatch.setattr(kernels, "_contract", contract)
    monkeypatch.setattr(kernels, "_compare", lambda *_: None)
    return calls


def plain(form: Outer) -> None:
    """Both methods of the form give torch's results."""
    squares = products(form).square()
    torch.testing.assert_close(form.square_sum(), form.layout.store(squares.sum((0, 1))))
    torch.testing.assert_close(form.squared_norms(), squares.sum((0, 2, 3, 4)))


FORM = (2, 3, 1, 9, 8, 8)  # Gram matrices would be larger


def test_chosen(chosen: list[bool]) -> None:
    form = outer(FORM, torch.float64)
    with torch.no_grad():
        assert (form.square_sum() == 7).all() and (form.squared_norms() == 7).all()
    assert form.square_sum().shape == (8, 8) and chosen == [False, True]


@pytest.mark.parametrize("why", ["variable", "device", "grad mode", "half", "shape", "empty", "absent"])
def test_not_chosen(chosen: list[bool], monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    form = outer(FORM, torch.bfloat16 if why == "half" else torch.float64)
    if why == "variable":
        monkeypatch.setenv("BACKPACK_TRITON", "0")
    elif why == "device":
        monkeypatch.setattr(kernels, "DEVICES", ("cuda",))
    elif why == "shape":
        monkeypatch.setattr(kernels, "MULTIPLICATIONS", {torch.float64: 16 * 4 - 1})
    elif why == "empty":
        form = outer((2, 0, *FORM[2:]), torch.float64)
    elif why == "absent":
        monkeypatch.setattr(kernels, "_kernel", lambda: None)
    with torch.set_grad_enabled(why == "grad mode"):
        plain(form)
    assert not chosen


def test_wrong_results_are_noticed(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outer(FORM, torch.float64).square_sum()
    monkeypatch.setattr(kernels, "_kernel", object)
    monkeypatch.setattr(kernels, "_contract", lambda *_: torch.full_like(right, 7.0)[0, 0])
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="its results differ"):
        plain(outer(FORM, torch.float64))


def test_absent_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels._kernel() is None


@pytest.mark.parametrize("step", ["_kernel", "_contract"])
def test_failure_is_said_once(everywhere: None, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "_kernel", object)
    monkeypatch.setattr(kernels, step, fail)
    form = outer(FORM, torch.float64)
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="RuntimeError: no compiler.*BACKPACK_TRITON=0"):
            plain(form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain(form)


@pytest.mark.parametrize(
    ("sizes", "dtype", "expected"),
    [
        ((1, 2, 1, 16, 64, 64), torch.float32, True),
        ((1, 2, 1, 17, 64, 64), torch.float32, False),
        ((1, 2, 1, 2, 64, 48), torch.float32, True),  # a third more, for a tile of 64
        ((1, 2, 1, 2, 64, 40), torch.float32, False),
        ((1, 2, 1, 2, 16, 8), torch.float32, False),
        ((1, 2, 1, 4, 128, 32), torch.float64, True),
        ((1, 2, 1, 4, 128, 48), torch.float64, False),
    ],
    ids=str,
)
def test_few_positions(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], dtype: torch.dtype, expected: bool
) -> None:
    """Where memory traffic dominates, as the constants have it."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    form = outer(sizes, dtype)
    with torch.no_grad():
        assert kernels._suits(*form._windows, form.g) is expected


class Arguments:
    """Stands in for the kernel and notes what it is launched with."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args: setattr(self, "args", args)


@pytest.mark.parametrize(
    ("dtype", "allowed", "expected"),
    [(torch.float32, "ieee", "ieee"), (torch.float32, "tf32", "tf32"), (torch.float64, "tf32", "ieee")],
)
def test_precision_is_torchs(dtype: torch.dtype, allowed: str, expected: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    kernel, form = Arguments(), outer(FORM, dtype)
    try:
        torch.backends.cuda.matmul.fp32_precision = allowed
        kernels._contract(kernel, *form._windows, form.g, None, norms=False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert kernel.args[-1] == expected
