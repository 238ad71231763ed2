"""Where operations say the samples are, and where they are: every mover is tried.

The sample that an entry of a result belongs to is found by changing the entries of one sample of the
argument: what changes in the result is that sample's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from backpack.samples.axis import NOBODY, Rows, SampleAxis, axis_of, mark, owners_of, solo_axis
from backpack.samples.entries import ENTRIES
from backpack.samples.movers import MOVERS, spellings
from backpack.samples.propagate import ELEMENTWISE, POINTWISE, propagate

N = 3
CPU = torch.device("cpu")


def _rows(*samples: int) -> Rows:
    return Rows(torch.tensor(samples), N)


# Sizes of other axes are the number of samples now and then.
LAYOUTS: dict[str, tuple[SampleAxis, tuple[int, ...]]] = {
    "first": (SampleAxis(N), (N, 3, 2)),
    "first-2d": (SampleAxis(N), (N, 3)),
    "first-1d": (SampleAxis(N), (N,)),
    "first-4d": (SampleAxis(N), (N, 4, 3, 2)),
    "middle": (SampleAxis(N, 1), (3, N, 2)),
    "middle-4d": (SampleAxis(N, 1), (2, N, 4, 4)),
    "last": (SampleAxis(N, 2), (2, 3, N)),
    "last-2d": (SampleAxis(N, 1), (4, N)),
    "square": (SampleAxis(N, 1), (N, N)),
    "inner": (SampleAxis(N, 0, 1, 2), (2 * N, 3, 2)),
    "outer": (SampleAxis(N, 1, 2, 1), (3, 2 * N)),
    "both": (SampleAxis(N, 0, 2, 2), (4 * N, 3)),
    "permuted": (SampleAxis(N, 0, picked=_rows(2, 0, 1)), (N, 3)),
    "picked": (SampleAxis(N, 1, picked=_rows(2, 0, 0, 1)), (2, 4, 3)),
    "solo": (solo_axis(1, N, (3, 2), CPU), (3, 2)),
    "solo-1d": (solo_axis(2, N, (3,), CPU), (3,)),
    "number": (solo_axis(1, N, (), CPU), ()),
}

# Calls of operations with a tensor, as positional and keyword arguments. Those that a tensor does not
# allow are passed over.
Arguments = tuple[tuple, dict[str, Any]]
CALLS: dict[str, Callable[[Tensor], Iterable[Arguments]]] = {}


def calls(names: str, make: Callable[[Tensor], Iterable[tuple]]) -> None:
    """Calls ``f(x, *rest)`` for each ``rest`` that is made; a dictionary at its end is of keywords."""

    def whole(x: Tensor) -> Iterator[Arguments]:
        for rest in make(x):
            named = rest[-1] if rest and isinstance(rest[-1], dict) else {}
            yield (x, *(rest[:-1] if named else rest)), named

    for name in names.split():
        before = CALLS.get(name, lambda x: ())
        CALLS[name] = lambda x, before=before: [*before(x), *whole(x)]


def whole(names: str, make: Callable[[Tensor], Iterable[tuple]]) -> None:
    """Calls ``f(*args)`` for each ``args`` that is made."""
    for name in names.split():
        before = CALLS.get(name, lambda x: ())
        CALLS[name] = lambda x, before=before: [*before(x), *((args, {}) for args in make(x))]


def dims(x: Tensor) -> range:
    return range(-1, x.dim())


def along(*rest: Any) -> Callable[[Tensor], list[tuple]]:
    """Each axis in turn, followed by more."""
    return lambda x: [(d, *rest) for d in dims(x)]


def count(x: Tensor) -> Tensor:
    return torch.arange(x.numel()).reshape(x.shape)


def places(x: Tensor, dim: int, size: int | None = None) -> Tensor:
    """Places along an axis, one for each entry, without order."""
    return count(x) * 7 % 5 % (x.shape[dim] if x.dim() else 1)


def backwards(x: Tensor, dim: int) -> Tensor:
    return torch.arange(x.shape[dim] if x.dim() else 1).flip(0)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.1


_generator = torch.Generator()


def values(shape: tuple[int, ...]) -> Tensor:
    """Numbers between zero and one."""
    return torch.rand(shape, dtype=torch.float64, generator=_generator) * 0.9 + 0.05


def nothing(x: Tensor) -> list[tuple]:
    return [()]


# --------------------------------------------------------------------------------------
# Moving

calls(
    "transpose swapaxes swapdims movedim moveaxis", lambda x: [(a, b) for a in dims(x) for b in dims(x)]
)
calls("t T H mT mH adjoint ravel flipud fliplr msort atleast_1d atleast_2d atleast_3d", nothing)
calls("permute", lambda x: [(tuple(range(x.dim()))[::-1],), tuple(range(-1, x.dim() - 1))])
calls(
    "reshape view",
    lambda x: [
        (shape,)
        for shape in [(-1,), (x.numel(), 1), (1, x.numel()), (2, -1), (-1, 2), (N, -1), (-1, N)]
        + [(3, 2, -1), (2, -1, 2), (N, 2, -1), (*x.shape, 1), (1, *x.shape), (-1, *x.shape[2:])]
    ],
)
calls("view_as reshape_as", lambda x: [(rand(*x.shape[::-1]),), (rand(x.numel()),)])
calls("flatten", lambda x: [(), (1,), (0, 1), (-2,)])
calls("unflatten", lambda x: [(d, s) for d in dims(x) for s in ((N, -1), (-1, N), (2, -1), (-1, 2))])
calls("squeeze", lambda x: [(), *((d,) for d in dims(x))])
calls("unsqueeze", lambda x: [(d,) for d in range(-x.dim() - 1, x.dim() + 1)])
calls("expand broadcast_to", lambda x: [((k, *x.shape),) for k in (1, 2, N)])
calls("expand_as", lambda x: [(rand(k, *x.shape),) for k in (1, 2, N)])
calls(
    "repeat tile",
    lambda x: [([2] * (x.dim() + 1),), ([2, *[1] * x.dim()],), ([N] * x.dim(),), ([1] * x.dim(),)],
)
calls(
    "repeat_interleave",
    lambda x: [(2,), *((r, d) for d in dims(x) for r in (1, 2, N, backwards(x, d) + 1))],
)


def _indices(x: Tensor) -> Iterator[tuple]:
    """Forms of indices along each axis, alone and together."""
    yield from ((i,) for i in (..., None, (None, ...), (..., None), (), (..., slice(None))))
    for d in range(x.dim()):
        before, n = (slice(None),) * d, x.shape[d]
        ints = torch.arange(n).flip(0)
        for i in (
            *(0, -1, torch.tensor(1), slice(1, None), slice(None, None, 2), None, ints, ints[:, None]),
            *([0, 1], [1, 0, 0], range(2), (1, 0), ints.numpy()[:2], ints.numpy()[0], ints[:0], []),
            *(torch.arange(n) % 2 == 0, [True] + [False] * (n - 1), [[0, 1], [1, 0]]),
        ):
            yield from (((*before, i),), ((*before, i, ...),), ((None, ..., i),), ((..., i),))
            if d == 0:
                yield (i,)
            for e in range(d + 1, x.dim()):
                between = (slice(None),) * (e - d - 1)
                for j in (0, [1, 0], torch.tensor([[0], [1]]), None, slice(1), torch.tensor([0])):
                    yield ((*before, i, *between, j),)
    for mask in (count(x) % 2 == 0, count(x) >= 0):
        yield (mask,)
        if x.dim() > 1:
            yield from ((mask[0],), (mask.select(-1, 0),), ((slice(None), mask[0]),), ((..., mask[0]),))
    if x.dim() > 1:
        rows, columns = torch.arange(len(x)), backwards(x, 1)
        yield from (((rows[:, None], columns),), ((rows, slice(None), rows * 0),), ((rows, rows * 0),))
        yield from ((rows[:, None].tolist(), columns.tolist()),)


calls("__getitem__", _indices)
calls("select select_copy", lambda x: [(d, i) for d in dims(x) for i in (0, -1)])
calls("unbind", lambda x: [(), *along()(x)])
calls("narrow", lambda x: [(d, *part) for d in dims(x) for part in ((0, 1), (0, 2), (1, 1), (1, 2))])
calls("chunk", lambda x: [(2,), *((2, d) for d in dims(x))])
calls("split", lambda x: [(2,), *((s, d) for d in dims(x) for s in (1, 2, N, [1, x.shape[d] - 1]))])
calls("split_with_sizes", lambda x: [([1, x.shape[d] - 1], d) for d in dims(x)])
calls("tensor_split", lambda x: [(s, d) for d in dims(x) for s in (2, (1,), torch.tensor([1]))])
calls("hsplit vsplit dsplit", lambda x: [([1],), (1,), ([1, 2],)])
calls("flip", lambda x: [*along()(x), ((0, -1),), (0, 1)])
calls("roll", lambda x: [(1,), *((k, d) for d in dims(x) for k in (1, -1, 2)), ((1, 2), (0, 1))])
calls("rot90", lambda x: [(k, (a, b)) for k in (1, 2, 3) for a in dims(x) for b in dims(x)])
calls("index_select", lambda x: [(d, torch.tensor(i)) for d in dims(x) for i in ([1, 0, 1], [0], 1)])
calls(
    "gather", lambda x: [(d, places(x, d)) for d in dims(x)] + [(d, places(x, d)[:2]) for d in dims(x)]
)
calls(
    "take_along_dim",
    lambda x: (
        [(torch.tensor([1, 0]),)]
        + [(i, d) for d in range(x.dim()) for i in (places(x, d), _line(x, d), _line(x, d)[:1])]
    ),
)
calls("take", lambda x: [(torch.tensor([1, 0, 2]),), (torch.tensor([[2, 1], [0, 0]]),), (count(x),)])
calls(
    "masked_select", lambda x: [(count(x) % 2 == 0,), (count(x) >= 0,), (torch.ones(x.shape[-1:]) > 0,)]
)
calls("diagonal", lambda x: [(), *((o, a, b) for o in (0, 1) for a in dims(x) for b in dims(x))])
calls("diag diagflat tril triu", lambda x: [(), (1,)])
calls("diag_embed", lambda x: [(), (1,), (0, 0, 1), (0, 0, 2)])
calls("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle", lambda x: [(2,)])
calls(
    "pad",
    lambda x: [
        ((1, 0),),
        ((1, -1, 0, 1),),
        ((1, 1), "circular"),
        ((0, 0, 1, 1),),
        ((0, 1), {"value": 2.0}),
    ],
)
calls("unfold", lambda x: [*along(2, 1)(x), *along(1, 1)(x), (2,), ((2, 1),), ((2, 2), {"padding": 1})])
calls(
    "as_strided",
    lambda x: (
        [(x.shape, x.stride()), ((2,), (1,)), ((2, 2), (0, 1)), ((2, 2), (x.stride(0), 1), 1)]
        + [((*x.shape[:-1], x.shape[-1] - 1), x.stride())]
    ),
)


def _line(x: Tensor, dim: int) -> Tensor:
    return backwards(x, dim).reshape([-1 if d == dim else 1 for d in range(x.dim())])


def _lists(x: Tensor) -> list[list[Tensor]]:
    return [[x, x], [x, x, x], [x, rand(*x.shape)], [rand(*x.shape), x], [x]]


whole("cat concat concatenate stack", lambda x: [(parts, d) for parts in _lists(x) for d in dims(x)])
whole("hstack vstack dstack column_stack row_stack", lambda x: [(parts,) for parts in _lists(x)])
whole("broadcast_tensors cartesian_prod meshgrid block_diag", lambda x: [tuple(p) for p in _lists(x)])
whole("broadcast_tensors", lambda x: [(x, rand(2, *x.shape)), (rand(N, *x.shape), x)])
calls("combinations", nothing)


def _both(make: Callable[[Tensor], Iterable[tuple]]) -> Callable[[Tensor], list[tuple]]:
    """What is written is a constant, or the target itself."""
    return lambda x: [args for source in (rand(*x.shape), x) for args in make(source)]


def _writes(names: str, make: Callable[[Tensor, Tensor], Iterable[tuple]]) -> None:
    """``f(target, ...)``, where target, source or both depend on the data."""

    def each(x: Tensor) -> Iterator[tuple]:
        for target, source in ((x, rand(*x.shape)), (rand(*x.shape), x), (x, x)):
            yield from ((target, *rest) for rest in make(target, source))

    whole(names, each)


_writes("index_add index_copy", lambda t, s: [(d, backwards(t, d), s) for d in dims(t)])
_writes("index_reduce", lambda t, s: [(d, backwards(t, d), s, "amax") for d in dims(t)])
calls("index_fill", lambda x: [(d, torch.tensor([0]), 1.0) for d in dims(x)])
_writes("index_put", lambda t, s: [((backwards(t, 0),), s, adds) for adds in (False, True)])
_writes(
    "scatter scatter_add",
    lambda t, s: [
        (d, i, s) for d in dims(t) for i in (places(t, d), places(t, d)[:2], places(t, d)[..., :1])
    ],
)
_writes("scatter_reduce", lambda t, s: [(d, places(t, d), s, "sum") for d in dims(t)])
whole("select_scatter", lambda x: [(x, rand(*x.shape).select(d, 0), d, 1) for d in dims(x)])
whole("select_scatter", lambda x: [(rand(2, *x.shape), x, 0, 1), (rand(*x.shape, 2), x, -1, 0)])
_writes("slice_scatter", lambda t, s: [(s, d, 0, None) for d in dims(t)])
_writes("diagonal_scatter", lambda t, s: [(s,)])
_writes("masked_scatter", lambda t, s: [(count(t) % 2 == 0, s), (count(t) >= 0, s)])
_writes("put", lambda t, s: [(count(t).flip(0), s), (count(t), s), (count(t) // 2, s, True)])

# --------------------------------------------------------------------------------------
# Along an axis

calls("sum mean prod nansum var std nanmean", lambda x: [(), *along()(x), *along(True)(x)])
calls("sum mean amax amin logsumexp nansum", lambda x: [(d, True) for d in dims(x)] + [((0, -1),)])
calls("var std any all argmax argmin median count_nonzero nanmean", lambda x: [(), *along()(x)])
calls("max min", lambda x: [(), *along()(x), (rand(*x.shape),), (rand(2, *x.shape),)])
calls("prod cumsum cumprod logcumsumexp cummax cummin sort argsort", along())
calls("softmax log_softmax softmin", lambda x: [*along()(x), *([()] if x.dim() else [])])
calls("norm vector_norm", lambda x: [(), *((2, d) for d in dims(x))])
calls("quantile nanquantile", lambda x: [(0.3,), *((q, d) for d in dims(x) for q in (0.3, rand(2)))])
calls("kthvalue topk", lambda x: [(1,), *((1, d) for d in dims(x))])
calls("mode", lambda x: [(), *along()(x)])
calls("normalize", lambda x: [(), *((2.0, d) for d in dims(x))])
calls("renorm", lambda x: [(2, d, 0.5) for d in dims(x)])
calls("layer_norm rms_norm", lambda x: [(x.shape[d:],) for d in range(x.dim())])

# --------------------------------------------------------------------------------------
# Products


def _right(x: Tensor) -> list[tuple]:
    size = x.shape[-1]
    found = [(rand(size, k),) for k in (2, N, size)] + [(rand(size),), (x,)]
    return found + [(rand(*x.shape[:-2], size, 2),), (rand(2, *[1] * (x.dim() - 2), size, 2),)]


calls("matmul __matmul__ bmm mm mv dot", _right)
whole("matmul __matmul__ mm bmm", lambda x: [(*a,) for a in _left(x)] + [(x, *r) for r in _right(x)])
calls("__rmatmul__", lambda x: [(a,) for a, _ in _left(x)])
calls(
    "linear", lambda x: [(rand(k, x.shape[-1]), rand(k)) for k in (2, N)] + [(rand(x.shape[-1]),), (x,)]
)
whole(
    "addmm",
    lambda x: [
        *((rand(k), x, rand(x.shape[-1], k)) for k in (2, N)),
        *((rand(k, 1), rand(k, len(x)), x) for k in (2, N)),
        (x, rand(len(x), 2), rand(2, x.shape[-1])),
        *((x, x, rand(x.shape[-1], x.shape[-1])), (x, rand(len(x), len(x)), x), (x, x, x)),
    ],
)
whole("addmv", lambda x: [(rand(len(x)), x, rand(x.shape[-1])), (rand(2), rand(2, len(x)), x)])
whole("baddbmm", lambda x: [(rand(2), x, rand(len(x), x.shape[-1], 2)), (x, x, x)])
calls("scaled_dot_product_attention", lambda x: [(x, x), (rand(*x.shape), rand(*x.shape))])


def _left(x: Tensor) -> list[tuple]:
    return [(rand(k, x.shape[-2 if x.dim() > 1 else 0]), x) for k in (2, N)] + [(x, x)]


EQUATIONS = """
    ...i,ij->...j   i...,ij->j...   ...i, ij -> j...   i...,ij   ...i,ij   ...,ij->ij...
    ...i,...i->...       i->i  i->   i,i->i   i,i   i,j->ij   i,j->ji   i,j->i   i
    ij->ji   ij->i   ij   ji   ba   ii->i   ii   ij,ij->j   ij,ij->ij   ij,jk   ij,jk->ki   ij,kj->ik
    ij,ik->kj   ab,ax->xa   ab,ax->bxa   ij,i   aXb,X->bX   aXb,bX   abc->cab   abc->ca   abc,c->ab
    abc,ac->abc   abc,ab->c   abc,bd->adc   ...ii->...i   a...->...a   ...ab->...ba   a...b->b...a
    abcd,cd->ab   abcd,be->aecd   ab...,b->...a   abc,abd->acd   abc,adc->abd   abbc->abc   a...,a->a...
""".split("   ")


def _einsums(x: Tensor) -> Iterator[tuple]:
    for equation in map(str.strip, EQUATIONS):
        left, *rest = equation.replace(" ", "").split("->")[0].split(",")
        before, dots, after = left.partition("...")
        if len(before + after) > x.dim() or not dots and len(before + after) < x.dim():
            continue
        sizes = dict(zip(before, x.shape, strict=False))
        sizes |= dict(zip(after[::-1], x.shape[::-1], strict=False))
        under = x.shape[len(before) : x.dim() - len(after)]
        others = []
        for term in rest:
            front, dots, back = term.partition("...")
            letters = [[sizes.get(c, N) for c in part] for part in (front, back)]
            others.append(rand(*letters[0], *(under if dots else ()), *letters[1]))
        yield (equation, x, *others)
        yield (equation, [x, *others])
        if rest:
            yield (equation, x, x)
            yield (
                ",".join((rest[0], left)) + equation.replace(" ", "")[len(left + rest[0]) + 1 :],
                *others,
                x,
            )


whole("einsum", _einsums)

# --------------------------------------------------------------------------------------
# Entry by entry

_TWO = (
    "add sub mul div true_divide divide multiply subtract rsub pow maximum minimum fmod add_ sub_ mul_ "
    "div_ pow_ eq ne lt le gt ge __radd__ __rmul__ __rsub__ __rdiv__ __rtruediv__ __rpow__ __eq__ "
    "__ne__ __lt__ __le__ __gt__ __ge__ __floordiv__ __rfloordiv__ floor_divide remainder __mod__ "
    "__rmod__ atan2 arctan2 hypot xlogy xlog1py logaddexp logaddexp2 fmax fmin float_power copysign "
    "heaviside logical_and logical_or logical_xor isclose not_equal greater greater_equal less "
    "less_equal clip clamp clamp_min clamp_max copy_ type_as"
)
_WHOLE_NUMBERS = (
    "ldexp bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ bitwise_not __invert__"
)
_ONE = (
    "abs absolute neg negative positive __neg__ __pos__ __abs__ square sqrt reciprocal exp exp2 expm1 "
    "log log2 log10 log1p sin cos tan asin acos atan sinh cosh rsqrt tanh asinh acosh atanh erf erfc "
    "erfinv lgamma digamma logit expit sigmoid sinc relu relu6 leaky_relu elu selu celu gelu silu mish "
    "hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink softsign softplus logsigmoid "
    "log_sigmoid rrelu round floor ceil trunc fix frac sign sgn nan_to_num isnan isinf isfinite "
    "logical_not angle conj resolve_conj real imag dropout alpha_dropout feature_dropout "
    "feature_alpha_dropout dropout1d dropout2d dropout3d float double half bfloat16 int long bool "
    "short byte contiguous clone detach cpu alias zero_ normal_ uniform_ exponential_ bernoulli "
    "bernoulli_ random_ requires_grad_"
)
calls(
    _TWO,
    lambda x: (
        [(rand(*x.shape),), (rand(2, *x.shape),), (rand(N, *x.shape),), (rand(),), (x,)]
        + [(rand(*x.shape[-1:]),), (x.unsqueeze(0) if False else rand(*x.shape[-2:]),)]
    ),
)
calls("lerp", lambda x: [(rand(*x.shape), 0.3), (x, rand(*x.shape)), (rand(2, *x.shape), 0.3)])
calls("addcmul addcdiv", lambda x: [(rand(*x.shape), rand(*x.shape)), (x, rand(2, *x.shape))])
calls("masked_fill masked_fill_", lambda x: [(count(x) % 2 == 0, 1.0), (rand(2, *x.shape) > 0.5, 1.0)])
whole("where", lambda x: [(count(x) % 2 == 0, x, rand()), (rand(2, *x.shape) > 0.5, rand(), x)])
calls(_ONE, nothing)
calls("dropout alpha_dropout feature_dropout feature_alpha_dropout", lambda x: [(0.5, True)])
calls("threshold", lambda x: [(0.1, 0.2)])
calls("to type", lambda x: [(torch.float32,)])
calls("fill fill_", lambda x: [(1.0,)])

# What is selected depends on the values: these are tried at several.
_SELECT = (
    "max min amax amin median mode sort argsort msort topk kthvalue argmax argmin cummax cummin "
    "quantile nanquantile index_reduce clip clamp clamp_min clamp_max maximum minimum fmax fmin "
    "floor_divide __floordiv__ __rfloordiv__ remainder __mod__ __rmod__ fmod"
).split()
# Of whole numbers; of other places or devices; of shapes only; losses; tables.
OTHERS = (
    _WHOLE_NUMBERS
    + """
    cuda zero embedding embedding_bag nll_loss cross_entropy zeros_like ones_like full_like empty_like
    rand_like randn_like randint_like new_zeros new_ones new_full new_empty
"""
)


# --------------------------------------------------------------------------------------
# The truth


def _samples(
    owners: Tensor, x: Tensor, call: Callable[[Tensor], Any], draws: int = 1
) -> list[Tensor] | None:
    """Whose each entry of each result is, ``[*shape, N]``; ``None`` if the call is not allowed."""

    def run(x: Tensor) -> list[Tensor]:
        torch.default_generator.manual_seed(0)
        out = call(x)
        return [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]

    try:
        found = [torch.zeros(*out.shape, N, dtype=torch.bool) for out in run(x)]
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None
    for _ in range(draws):
        x = values(x.shape)
        before = run(x)
        for n in range(N):
            other = torch.where(owners == n, values(x.shape), x)
            for each, out, after in zip(found, before, run(other), strict=True):
                same = (out == after) | (out.isnan() & after.isnan())
                each[..., n] |= ~same
    return found


def _verdict(axis: SampleAxis | None, found: Tensor, out: Tensor) -> str:
    """``right``, ``wrong``, ``lost`` or ``none`` (rightly lost)."""
    if not found.any():
        return "none"
    if axis is None or axis.lost:
        owners = torch.where(found.any(-1), found.int().argmax(-1), NOBODY)
        there = found.sum(-1).amax() <= 1 if found.numel() else False
        alone = bool(there) and len(owners[owners >= 0].unique()) == 1
        return "lost" if alone or (there and axis_of(owners, N) is not None) else "none"
    if not axis.fits(out.shape):
        return "wrong"
    claimed = owners_of(axis, out.shape, CPU)
    return "wrong" if bool((found & (torch.arange(N) != claimed.unsqueeze(-1))).any()) else "right"


def _tried(func: Any, name: str, layout: str) -> list[str]:
    """What comes out for all calls of an operation on a tensor with that layout."""
    axis, shape = LAYOUTS[layout]
    _generator.manual_seed(1)
    x = values(shape)
    mark(x, axis)
    owners = owners_of(axis, shape, CPU)
    bad = []
    try:
        made = list(CALLS[name](x))
    except (IndexError, TypeError):
        assert layout == "number"  # some arguments are parts of an axis
        return []
    for at, (args, kwargs) in enumerate(made):

        def call(value: Tensor, args: tuple = args, kwargs: dict = kwargs) -> Any:
            copy = value.clone() if name.endswith("_") and not name.endswith("__") else value
            return func(*_with(args, x, copy), **kwargs)

        found = _samples(owners, x, call, 6 if name in _SELECT else 1)
        if found is None:
            continue
        torch.default_generator.manual_seed(0)
        out = call(x)
        results = [out] if isinstance(out, Tensor) else out
        for place, (each, samples) in enumerate(zip(results, found, strict=False)):
            marked = [(x, axis)] * max(1, sum(a is x for a in _flat(args)))
            claim, _ = propagate(func, args, kwargs, each, marked, place)
            verdict = _verdict(claim, samples, each)
            if verdict in ("wrong", "lost"):
                what = f"call {at} {_shown(args)} -> {place} {tuple(each.shape)}"
                bad.append(f"{verdict}: {name} {what}: {claim}")
    return bad


def _flat(args: Any) -> Iterator[Any]:
    for a in args:
        if isinstance(a, (list, tuple)):
            yield from _flat(a)
        else:
            yield a


def _packs(x: Tensor) -> Iterator[tuple]:
    """Sequences of other lengths, in either order of axes."""
    for first in (True, False) if x.dim() > 1 else ():
        sequences, steps = x.shape[:2] if first else (x.shape[1], x.shape[0])
        yield torch.full((sequences,), steps), first
        yield torch.tensor([max(steps - n, 1) for n in range(sequences)]), first


def _segments(x: Tensor) -> Iterator[tuple]:
    """Rows in one segment, in one each, and in two."""
    rows = len(x) if x.dim() else 0
    for lengths in ([rows], [1] * rows, [rows - 1, 1], [0, *([rows // 3] * 3)]):
        if rows > 1 and sum(lengths) == rows:
            yield from (("sum", {"lengths": torch.tensor(lengths)}),)


def _pads(x: Tensor) -> Iterator[tuple]:
    """Rows as steps of some sequences."""
    rows = len(x) if x.dim() else 0
    for sizes in ([rows], [1] * rows, [rows - 1, 1], [rows // 2] * 2):
        if rows > 1 and sum(sizes) == rows:
            yield from ((torch.tensor(sizes), first, 0.0, -1) for first in (True, False))


calls("_pack_padded_sequence", _packs)
calls("segment_reduce", _segments)
calls("_pad_packed_sequence", _pads)


def _with(args: Any, x: Tensor, value: Tensor) -> Any:
    """The arguments with another tensor in place of ``x``."""
    if isinstance(args, (list, tuple)):
        return type(args)(_with(a, x, value) for a in args) if type(args) in (list, tuple) else args
    return value if args is x else args


def _shown(args: tuple) -> list[Any]:
    return [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]


# --------------------------------------------------------------------------------------
# Two tensors that depend on the data, with axes that agree or do not

SHAPE = (N, N, N)
AXES = {
    **{f"dim {d}": SampleAxis(N, d) for d in range(3)},
    "permuted": SampleAxis(N, 0, picked=_rows(2, 0, 1)),
    "picked": SampleAxis(N, 1, picked=_rows(0, 0, 2)),
    "solo": solo_axis(1, N, SHAPE, CPU),
    "other": solo_axis(2, N, SHAPE, CPU),
}
ORDER = torch.tensor([1, 2, 0])
PAIRS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda x, y: (torch.add, x, y),
    "fmax": lambda x, y: (torch.fmax, x, y),
    "where": lambda x, y: (torch.where, count(x) % 2 == 0, x, y),
    "broadcast": lambda x, y: (torch.mul, x, y.unsqueeze(0)),
    "matmul": lambda x, y: (torch.matmul, x, y),
    "bmm": lambda x, y: (torch.bmm, x, y),
    "baddbmm": lambda x, y: (torch.baddbmm, rand(N), x, y),
    "baddbmm-input": lambda x, y: (torch.baddbmm, x, y, rand(N, N, N)),
    "linear": lambda x, y: (torch.nn.functional.linear, x, y[0]),
    "attention": lambda x, y: (torch.nn.functional.scaled_dot_product_attention, x, y, y),
    "attention-values": lambda x, y: (torch.nn.functional.scaled_dot_product_attention, x, x, y),
    "layer_norm": lambda x, y: (torch.nn.functional.layer_norm, x, SHAPE[1:], y[0], None),
    **{
        f"einsum {equation}": lambda x, y, equation=equation: (torch.einsum, equation, x, y)
        for equation in (
            *("abc,abc->abc", "abc,abd->acd", "abc,dbc->ad"),
            *("abc,bcd->abcd", "a...,a...->a", "...a,b...->b...a"),
        )
    },
    **{f"cat {d}": lambda x, y, d=d: (torch.cat, [x, y], d) for d in range(3)},
    **{f"cat 1 {d}": lambda x, y, d=d: (torch.cat, [x, rand(*SHAPE), y], d) for d in range(3)},
    **{f"stack {d}": lambda x, y, d=d: (torch.stack, (x, y), d) for d in range(4)},
    "vstack": lambda x, y: (torch.vstack, (x, y)),
    "broadcast_tensors": lambda x, y: (torch.broadcast_tensors, x, y),
    "meshgrid": lambda x, y: (torch.meshgrid, [x[0, 0], y[0, 0]]),
    "index_put": lambda x, y: (torch.index_put, x, (ORDER,), y),
    "index_put-add": lambda x, y: (torch.index_put, x, (ORDER,), y, True),
    **{f"index_copy {d}": lambda x, y, d=d: (torch.index_copy, x, d, ORDER, y) for d in range(3)},
    **{f"index_add {d}": lambda x, y, d=d: (torch.index_add, x, d, ORDER, y) for d in range(3)},
    "scatter": lambda x, y: (torch.scatter, x, 0, places(x, 0), y),
    "scatter_add": lambda x, y: (torch.scatter_add, x, 1, places(x, 1)[:2], y),
    "masked_scatter": lambda x, y: (Tensor.masked_scatter, x, count(x) % 2 == 0, y),
    "put": lambda x, y: (torch.Tensor.put, x, count(x).flip(0), y),
    "cdist": lambda x, y: (torch.cdist, x, y),
    "bilinear": lambda x, y: (torch.nn.functional.bilinear, x, y, rand(2, N, N)),
    "cosine": lambda x, y: (torch.nn.functional.cosine_similarity, x, y),
    "cross": lambda x, y: (torch.linalg.cross, x, y),
    "kron": lambda x, y: (torch.kron, x, y),
    "tensordot": lambda x, y: (torch.tensordot, x, y, 1),
    "outer": lambda x, y: (torch.outer, x.reshape(-1), y.reshape(-1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_axes(name: str) -> None:
    bad = []
    for first in AXES:
        for second in AXES:
            _generator.manual_seed(1)
            x, y = values(SHAPE), values(SHAPE)
            axes = AXES[first], AXES[second]
            owners = torch.stack([owners_of(axis, SHAPE, CPU) for axis in axes])
            mark(x, axes[0])
            mark(y, axes[1])
            func, *args = PAIRS[name](x, y)
            if not any(a is x for a in _flat(args)) or not any(a is y for a in _flat(args)):
                continue
            found = _samples(
                owners,
                torch.stack([x, y]),
                lambda both, args=args, func=func, x=x, y=y: func(
                    *_with(_with(args, x, both[0]), y, both[1])
                ),
            )
            assert found is not None
            out = func(*args)
            for place, each in enumerate([out] if isinstance(out, Tensor) else out):
                claim, _ = propagate(
                    func, tuple(args), {}, each, list(zip((x, y), axes, strict=True)), place
                )
                verdict = _verdict(claim, found[place], each)
                if verdict in ("wrong", "lost"):
                    bad.append(f"{verdict}: {first}, {second} -> {place} {tuple(each.shape)}: {claim}")
    assert not bad, "\n".join(bad[:40])


@pytest.mark.parametrize("name", CALLS)
def test_the_axis_is_where_the_samples_are(name: str) -> None:
    bad = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for func in dict.fromkeys(spellings(name)):
            for layout in LAYOUTS:
                bad += [f"{layout} {line}" for line in _tried(func, name, layout)]
    assert not bad, "\n".join(bad[:40])


def test_every_operation_is_tried() -> None:
    tried = {func for name in [*CALLS, *OTHERS.split()] for func in spellings(name)}
    missing = {f for table in (MOVERS, ELEMENTWISE, POINTWISE, ENTRIES) for f in table} - tried
    assert not missing, sorted(str(func) for func in missing)
