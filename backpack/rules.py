"""Operations in which parameters meet data: one function per operation, giving canonical forms.

Letters: ``v`` columns, ``n`` samples, ``s`` shared positions, ``q`` groups, ``o``/``i`` output and
input features.

A rule is called with the sample axis of the result followed by the operation's own arguments: when its
operation runs or, for plain layers, whose taps keep their arguments, when a backward pass asks for it.
It returns pairs ``(tensor, function)``: the function turns columns at the output,
``g [v, *output.shape]``, into the :class:`~backpack.factors.Form` of that tensor. A function must hold
on to nothing but what it needs (autograd holds the same tensors). A rule that does not cover the
arguments it got returns ``None``; then, as for operations without a rule, the fallback differentiates
the operation sample by sample.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from backpack import recurrent
from backpack.batch import Batch, axis_of, batch_of, owners_of, solo_axis
from backpack.factors import Dense, Form, Layout, Lookup, Outer, Patches

ToForm = Callable[[Tensor], Form]
Pairs = list[tuple["Tensor | None", ToForm]]
Rule = Callable[..., "Pairs | None"]

RULES: dict[Any, Rule] = {}


def op_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations (as the torch-function protocol reports them).

    Example:
        >>> def scale(input, weight):
        ...     if torch.overrides.has_torch_function((input, weight)):
        ...         return torch.overrides.handle_torch_function(scale, (input, weight), input, weight)
        ...     return input * weight
        >>> @op_rule(scale)
        ... def rule(batch, input, weight):
        ...     return [(weight, lambda g: reduce_to(batch, g * input, weight.shape))]
        >>> RULES.pop(scale) is rule  # forget it again
        True
    """

    def register(function: Rule) -> Rule:
        for func in functions:
            RULES[func] = function
        return function

    return register


# --------------------------------------------------------------------------------------
# Linear maps


def _outer(batch: Batch, a: Tensor, g: Tensor, layout: Layout) -> Outer:
    """Ungrouped, from rows ``a`` and columns ``g`` at the rows of the result."""
    a, g = batch.rows(a), batch.rows(g, 1)
    return Outer(a.unsqueeze(1), g.unsqueeze(2), layout, positions(batch, g.shape[2]))


def positions(batch: Batch, longest: int) -> Tensor | None:
    """How many positions each sample has, where they differ, if the one that has most has so many."""
    counts = batch.counts
    return None if counts is None else counts * (longest // max(batch.width, 1))


def _position_sum(g: Tensor) -> Tensor:
    """``[v, n, s, o] -> [v, n, o]``."""
    return g.squeeze(2) if g.shape[2] == 1 else g.sum(2)


@op_rule(F.linear)
def linear(batch: Batch, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Pairs | None:
    if batch_of(input) is None or weight.dim() != 2:
        return None
    layout = Layout(weight.shape)
    if input.dim() == 2 and batch.plain and batch.dim == 0:
        return [
            (weight, lambda g: Outer(input[:, None, None], g[:, :, None, None], layout)),
            (bias, Dense),
        ]
    return [
        (weight, lambda g: _outer(batch, input, g, layout)),
        (bias, lambda g: Dense(_position_sum(batch.rows(g, 1)))),
    ]


@op_rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, Tensor.__rmatmul__)
def matmul(
    batch: Batch, input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None
) -> Pairs | None:
    right = mat2 if other is None else other
    if right is None:
        return None
    return (_times_matrix if batch_of(right) is None else _matrix_times)(batch, input, right)


def _times_matrix(batch: Batch, x: Tensor, w: Tensor, scale: float = 1.0) -> Pairs | None:
    """``x @ w`` with a matrix or vector ``w``."""
    if w.dim() > 2 or x.dim() < 2:
        return None
    layout = Layout(w.shape, "columns")

    def form(g: Tensor) -> Form:
        g = g if w.dim() == 2 else g.unsqueeze(-1)
        return _outer(batch, x, g if scale == 1 else scale * g, layout)

    return [(w, form)]


def _matrix_times(batch: Batch, w: Tensor, x: Tensor, scale: float = 1.0) -> Pairs | None:
    """``w @ x`` with a matrix ``w``: the transpose of ``x^T @ w^T``."""
    if w.dim() != 2 or x.dim() < 2:
        return None
    layout, last = Layout(w.shape), x.dim() - 1
    swapped = batch.moved({last: last - 1, last - 1: last}.get(batch.dim, batch.dim))

    def form(g: Tensor) -> Form:
        return _outer(swapped, x.mT, scale * g.mT, layout)

    return [(w, form)]


@op_rule(torch.addmm, Tensor.addmm)
def addmm(
    batch: Batch, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Pairs | None:
    product = (_times_matrix if batch_of(mat2) is None else _matrix_times)(
        batch, mat1, mat2, scale=alpha
    )
    if product is None:
        return None
    shape = input.shape
    return [(input, lambda g: reduce_to(batch, beta * g, shape)), *product]


# --------------------------------------------------------------------------------------
# Convolutions


# Patches are kept while the columns of a loss are carried, up to this many bytes.
KEPT_BYTES = {"cpu": 2**28, "cuda": 2**31}


class _Kept(threading.local):
    values: dict[Any, Tensor | Patches] | None = None
    size: int = 0


_kept = _Kept()


@contextmanager
def patches_kept() -> Iterator[None]:
    """Within the block, patches of the same input are made once, as far as memory goes."""
    outer = _kept.values, _kept.size
    _kept.values, _kept.size = {}, 0
    try:
        yield
    finally:
        _kept.values, _kept.size = outer


def kept(key: Any, compute: Callable[[], Tensor | Patches]) -> Tensor | Patches:
    """Patches, written out once at most within :func:`patches_kept`."""
    if _kept.values is None:
        return compute()
    key = key, torch.is_grad_enabled()  # those of one mode are not differentiable in the other
    if key in _kept.values:
        return _kept.values[key]
    value = compute()
    like = value.windows if isinstance(value, Patches) else value
    size = value.shape.numel() * like.element_size()
    if _kept.size + size <= KEPT_BYTES.get(like.device.type, 2**28):
        if isinstance(value, Patches):
            value.keep = True
        _kept.values[key] = value
        _kept.size += size
    return value


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * length if len(value) == 1 else value


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """Patches of ``x [n, c, *space]`` under a sliding window, ``[n, c, *kernel, *positions]``."""
    if any(lo or hi for lo, hi in padding):
        x = F.pad(x, [p for pair in reversed(padding) for p in pair])
    ndim = len(kernel)
    for d in range(ndim):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])
        x = x[..., :: dilation[d]]
    return x.movedim(tuple(range(2, 2 + ndim)), tuple(range(-ndim, 0)))


def _patches(batch: Batch, x: Tensor, ndim: int, groups: int) -> Tensor | Patches:
    """``[N k, c, *kernel, *positions] -> [n, q, s, i]``."""
    x = x.unflatten(1, (groups, -1))
    if batch.plain:
        return Patches(x, ndim)
    x = x.flatten(-ndim).flatten(2, -2)
    return batch.split(x).permute(0, 2, 1, 4, 3).flatten(2, 3)


def _channels(batch: Batch, g: Tensor, groups: int) -> Tensor:
    """``[v, N k, c, *positions] -> [v, n, q, s, o]``."""
    g = g.flatten(3).unflatten(2, (groups, -1))
    if batch.plain:
        return g.mT
    return batch.split(g, 1).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)


def _conv(ndim: int) -> Rule:
    def convolution(
        batch: Batch,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Pairs | None:
        if batch_of(input) is None or batch.dim != 0 or input.dim() != ndim + 2:
            return None
        kernel, layout = weight.shape[2:], Layout(weight.shape)

        def weight_form(g: Tensor) -> Form:
            step, spread = _tuple(stride, ndim), _tuple(dilation, ndim)
            if padding == "same":
                widths = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
                margins = [(w // 2, w - w // 2) for w in widths]
            else:
                margins = [(p, p) for p in _tuple(0 if padding == "valid" else padding, ndim)]

            def patches() -> Tensor | Patches:
                return _patches(batch, unfold(input, kernel, step, margins, spread), ndim, groups)

            a = kept((id(input), id(weight), step, *margins, spread), patches)
            columns = _channels(batch, g, groups)
            return Outer(a, columns, layout, positions(batch, columns.shape[3]))

        return [(weight, weight_form), (bias, lambda g: _channel_sum(batch, g))]

    return convolution


def _conv_transpose(ndim: int) -> Rule:
    def transposed_convolution(
        batch: Batch,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Pairs | None:
        if batch_of(input) is None or batch.dim != 0 or input.dim() != ndim + 2:
            return None
        kernel, layout = weight.shape[2:], Layout(weight.shape, "convt")

        def weight_form(g: Tensor) -> Form:
            """A transposed convolution is a convolution of the input spread out with zeros."""
            step, spread = _tuple(stride, ndim), _tuple(dilation, ndim)
            pads, extra = _tuple(padding, ndim), _tuple(output_padding, ndim)
            size = [(n - 1) * s + 1 for n, s in zip(input.shape[2:], step, strict=True)]
            spread_out = input.new_zeros(*input.shape[:2], *size)
            places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in step))
            spread_out[places] = input
            margins = [
                (d * (k - 1) - p, d * (k - 1) - p + e)
                for d, k, p, e in zip(spread, kernel, pads, extra, strict=True)
            ]
            patches = unfold(spread_out, kernel, (1,) * ndim, margins, spread)
            patches = patches.flip(tuple(range(2, 2 + ndim)))
            columns = _channels(batch, g, groups)
            counts = positions(batch, columns.shape[3])
            return Outer(_patches(batch, patches, ndim, groups), columns, layout, counts)

        return [(weight, weight_form), (bias, lambda g: _channel_sum(batch, g))]

    return transposed_convolution


for _ndim, _forward, _transposed in (
    (1, (torch.conv1d, F.conv1d), (torch.conv_transpose1d, F.conv_transpose1d)),
    (2, (torch.conv2d, F.conv2d), (torch.conv_transpose2d, F.conv_transpose2d)),
    (3, (torch.conv3d, F.conv3d), (torch.conv_transpose3d, F.conv_transpose3d)),
):
    op_rule(*_forward)(_conv(_ndim))
    op_rule(*_transposed)(_conv_transpose(_ndim))


# --------------------------------------------------------------------------------------
# Lookups


@op_rule(F.embedding)
def embedding(
    batch: Batch,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Pairs | None:
    at = batch_of(input)
    if at is None or at.lost:
        return None
    at = at.single() if batch.size == 1 else at

    def form(g: Tensor) -> Form:
        index, g = at.split(input).flatten(1), batch.rows(g, 1)
        if scale_grad_by_freq:
            counts = torch.bincount(input.flatten(), minlength=weight.shape[0])[index]
            g = g / counts.clamp(min=1).unsqueeze(-1)
        # Rows that fill up are read by nobody; a padding row is a constant.
        there = None if at.counts is None else at.split(torch.ones_like(input)).flatten(1) > 0
        if padding_idx is not None:
            others = index != padding_idx % weight.shape[0]
            there = others if there is None else others & there
        return Lookup(index, g, weight.shape, there, positions(at, index.shape[1]))

    return [(weight, form)]


# --------------------------------------------------------------------------------------
# Broadcasting arithmetic


def reduce_to(batch: Batch, g: Tensor, shape: torch.Size) -> Dense:
    """Sum columns over the axes along which a tensor of ``shape`` was broadcast.

    Args:
        batch: sample axis of the output.
        g: columns times elementwise derivative, ``[v, *output.shape]``.
        shape: the tensor's shape; aligned with the output's from the right.
    """
    if batch.bare:
        return Dense(batch.split(g, 1).sum(2).reshape(*g.shape[:1], batch.size, *shape))
    ndim = g.dim() - 1
    padded = (1,) * (ndim - len(shape)) + tuple(shape)
    if padded[batch.dim] != 1 and batch.length != 1:
        # The tensor has an entry of its own for every sample.
        sums = [d + 1 for d in range(ndim) if padded[d] == 1 and g.shape[d + 1] != 1]
        g = (g.sum(sums, keepdim=True) if sums else g).reshape(g.shape[0], 1, *shape)
        own = torch.arange(batch.size, device=g.device).unsqueeze(1) == batch.sample_ids(g.device)
        at = batch.dim - (ndim - len(shape))
        own = own.reshape(batch.size, *(-1 if d == at else 1 for d in range(len(shape))))
        return Dense(g * own.to(g.dtype))
    g = batch.split(g, 1)
    rest = [padded[d] for d in range(ndim) if d != batch.dim]
    sums = [2] + [3 + j for j, size in enumerate(rest) if size == 1]
    return Dense(g.sum(sums).reshape(*g.shape[:2], *shape))


@op_rule(Tensor.__setitem__)
def setitem(batch: Batch, target: Tensor, index: Any, values: Any) -> Pairs | None:
    """``target[index] = values``."""
    whole = target.shape
    count = torch.arange(target.numel(), device=target.device).reshape(whole)
    # The index may be another when it is asked for.
    places = count[index]

    def kept(g: Tensor) -> Form:
        """The target, where nothing was written."""
        g = g.flatten(1).index_fill(1, places.reshape(-1), 0).reshape(g.shape)
        return reduce_to(batch, g, whole)

    if not isinstance(values, Tensor):
        return [(target, kept)]
    shape = values.shape

    def form(g: Tensor) -> Form:
        g = g.flatten(1)[:, places]
        samples = owners_of(batch, whole, g.device).reshape(-1)[places]
        axis = axis_of(samples, batch.size)
        inner = shape[max(len(shape) - places.dim(), 0) :]
        if axis is not None:
            return Dense(reduce_to(axis, g, inner).values.reshape(len(g), batch.size, *shape))
        mine = torch.arange(batch.size, device=g.device).reshape(-1, *[1] * samples.dim()) == samples
        each = g.unsqueeze(1) * mine
        return Dense(each.sum_to_size(*each.shape[:2], *inner).reshape(*each.shape[:2], *shape))

    return [(target, kept), (values, form)]


def _scaled(g: Tensor, alpha: Any) -> Tensor:
    return g if alpha == 1 else alpha * g


def _added(batch: Batch, x: Any, scale: Any) -> Pairs:
    if not isinstance(x, Tensor):
        return []
    shape = x.shape
    return [(x, lambda g: reduce_to(batch, _scaled(g, scale), shape))]


@op_rule(torch.add, Tensor.add, Tensor.__radd__)
def add(batch: Batch, input: Any, other: Any, *, alpha: Any = 1) -> Pairs | None:
    return _added(batch, input, 1) + _added(batch, other, alpha)


@op_rule(torch.sub, Tensor.sub)
def sub(batch: Batch, input: Any, other: Any, *, alpha: Any = 1) -> Pairs | None:
    return _added(batch, input, 1) + _added(batch, other, -alpha)


@op_rule(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, Tensor.__rmul__)
def mul(batch: Batch, input: Any, other: Any) -> Pairs | None:
    source, factor = (other, input) if batch_of(input) is not None else (input, other)
    if not isinstance(source, Tensor):
        return []
    shape = source.shape
    return [(source, lambda g: reduce_to(batch, g * factor, shape))]


# --------------------------------------------------------------------------------------
# Normalisation and other per-channel parameters


def _channel_sum(batch: Batch, g: Tensor) -> Dense:
    """Sum ``g [v, N k, c, *space]`` over all but columns, samples and channels."""
    g = g.flatten(3).sum(3) if g.dim() > 3 else g
    return Dense(g if batch.plain else batch.split(g, 1).sum(2))


def _per_channel(
    batch: Batch, normalized: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None
) -> Pairs | None:
    if batch.dim != 0:
        return None
    return [
        (weight, lambda g: _channel_sum(batch, g * normalized())),
        (bias, lambda g: _channel_sum(batch, g)),
    ]


@op_rule(F.layer_norm)
def layer_norm(
    batch: Batch,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pairs | None:
    if batch_of(input) is None:
        return None
    shape = torch.Size(normalized_shape)
    return [
        (weight, lambda g: reduce_to(batch, g * F.layer_norm(input, shape, eps=eps), shape)),
        (bias, lambda g: reduce_to(batch, g, shape)),
    ]


@op_rule(F.rms_norm)
def rms_norm(
    batch: Batch,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Pairs | None:
    if batch_of(input) is None:
        return None
    shape = torch.Size(normalized_shape)
    return [(weight, lambda g: reduce_to(batch, g * F.rms_norm(input, list(shape), eps=eps), shape))]


@op_rule(F.group_norm)
def group_norm(
    batch: Batch,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pairs | None:
    return _per_channel(batch, lambda: F.group_norm(input, num_groups, eps=eps), weight, bias)


@op_rule(F.instance_norm)
def instance_norm(
    batch: Batch,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pairs | None:
    if use_input_stats:
        return _per_channel(batch, lambda: F.instance_norm(input, eps=eps), weight, bias)
    return batch_norm(batch, input, running_mean, running_var, weight, bias, eps=eps)


@op_rule(F.batch_norm)
def batch_norm(
    batch: Batch,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pairs | None:
    def normalized() -> Tensor:
        if training:
            return F.batch_norm(input, None, None, training=True, eps=eps)
        return F.batch_norm(input, running_mean, running_var, eps=eps)

    return _per_channel(batch, normalized, weight, bias)


@op_rule(torch.prelu, F.prelu, Tensor.prelu)
def prelu(batch: Batch, input: Tensor, weight: Tensor) -> Pairs | None:
    if batch.dim != 0 or input.dim() < 2 or batch_of(input) is None:
        return None
    shape = weight.shape

    def form(g: Tensor) -> Form:
        form = _channel_sum(batch, g * input.clamp(max=0))
        if shape.numel() == 1:
            return Dense(form.values.sum(2, keepdim=True).reshape(*form.values.shape[:2], *shape))
        return form

    return [(weight, form)]


# --------------------------------------------------------------------------------------
# The fallback


def fallback(
    batch: Batch,
    place: int,
    func: Any,
    args: tuple,
    kwargs: dict,
    sources: Sequence[Tensor],
    at_once: bool = False,
) -> Pairs:
    """Differentiate the operation itself, sample by sample (vmap over samples, a loop if need be).

    Args:
        batch: sample axis of the output.
        place: which of the operation's outputs.
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        sources: the arguments to differentiate with respect to.
        at_once: differentiate it on the whole batch (of one sample, whose axes are not known).
    """
    leaves, spec = tree_flatten((args, kwargs))
    axes = [batch_of(x) if isinstance(x, Tensor) else None for x in leaves]
    versions = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
    name = getattr(func, "__name__", str(func))

    def make(source: Tensor) -> ToForm:
        where = [j for j, x in enumerate(leaves) if x is source]

        def alike(x: Any) -> Any:
            """In the source's precision, which autocast may have left."""
            other = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != source.dtype
            return x.to(source.dtype) if other else x

        def values(g: Tensor, own: bool) -> Tensor:
            """VJP of each sample, ``[v, n, *source]`` (``own``: each sample has its own rows)."""
            data = [
                _samples_apart(axis, alike(x), copies=True)
                for axis, x in zip(axes, leaves, strict=True)
                if axis
            ]
            cotangent = _samples_apart(batch, g, 1).movedim(1, 0)

            def one(cotangent: Tensor, point: Tensor, *data: Tensor) -> Tensor:
                rest = iter(data)
                here = [next(rest) if axis else alike(x) for axis, x in zip(axes, leaves, strict=True)]

                def run(p: Tensor) -> Tensor:
                    for j in where:
                        here[j] = p
                    new_args, new_kwargs = tree_unflatten(list(here), spec)
                    result = func(*new_args, **new_kwargs)
                    return result if isinstance(result, Tensor) else result[place]

                vjp = torch.func.vjp(run, point)[1]
                return torch.stack([vjp(c)[0] for c in cotangent])

            points = _samples_apart(batch, source) if own else source
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    axes_of_one = (0, 0 if own else None, *(0 for _ in data))
                    found = torch.func.vmap(one, axes_of_one)(cotangent, points, *data)
            except (RuntimeError, ValueError) as error:
                if "random" in str(error):
                    raise RuntimeError(
                        f"{name} draws random numbers, so that it cannot be repeated sample by "
                        "sample; call model.eval(), or take the randomness (dropout) out of it"
                    ) from error
                each = zip(cotangent, points if own else [points] * len(cotangent), *data, strict=True)
                found = torch.stack([one(*sample) for sample in each])
            return found.transpose(0, 1)

        def pullback() -> Callable[[Tensor], tuple[Tensor]]:
            """The VJP of the operation on the whole batch."""

            def run(p: Tensor) -> Tensor:
                here = [p if j in where else alike(x) for j, x in enumerate(leaves)]
                new_args, new_kwargs = tree_unflatten(here, spec)
                result = func(*new_args, **new_kwargs)
                return result if isinstance(result, Tensor) else result[place]

            return torch.func.vjp(run, source)[1]

        def whole(g: Tensor) -> Tensor:
            """The operation on the whole batch, once for each sample's columns."""
            vjp, ids, found = pullback(), batch.sample_ids(g.device), []
            for n in range(batch.size):
                if not bool((ids == n).any()):
                    found.append(g.new_zeros(len(g), *source.shape))
                    continue
                own = (ids == n).reshape([-1 if d == batch.dim else 1 for d in range(g.dim() - 1)])
                found.append(torch.stack([vjp(c * own)[0] for c in g]))
            return torch.stack(found, 1)

        def checked(found: Tensor, g: Tensor) -> Tensor:
            """Samples' VJPs must add up to the batch's.

            They do not where the operation names places along the sample axis (``index_add``), or takes
            values in order: on one sample it does something else.
            """
            with torch.no_grad():
                vjp = pullback()
                total = torch.stack([vjp(c)[0] for c in g])
                error, largest = (found.sum(1) - total).abs(), found.abs().sum(1)
                agree = error <= torch.finfo(error.dtype).eps ** 0.5 * largest.amax()
            return found if bool((agree | total.isnan()).all()) else whole(g)

        def form(g: Tensor) -> Form:
            for x, axis, version in zip(leaves, axes, versions, strict=True):
                if axis is not None and x._version != version:
                    raise RuntimeError(
                        f"an input of {name} was modified by an in-place operation after the "
                        "forward pass; use the out-of-place version of that operation"
                    )
            if at_once:
                return Dense(whole(g))
            for apart in (same_for_all, own_rows) if batch.fits(source.shape) else (same_for_all,):
                try:
                    return Dense(checked(apart(g), g))
                except IndexError:  # it names places along the sample axis, of which a sample has few
                    break
                except (RuntimeError, ValueError) as error:
                    if "random" in str(error):
                        raise
            # The source may have rows for each sample on an axis that is not known.
            return Dense(whole(g))

        def same_for_all(g: Tensor) -> Tensor:
            return values(g, own=False)

        def own_rows(g: Tensor) -> Tensor:
            """The source has rows for each sample: ``[v, n, N, k, ...]``, zero but for ``N = n``."""
            rows = values(g, own=True).movedim(2 + batch.dim, 2)
            diagonal = torch.zeros(
                (*rows.shape[:2], *rows.shape[1:]), dtype=rows.dtype, device=rows.device
            )
            n = torch.arange(batch.size, device=rows.device)
            diagonal[:, n, n] = rows
            return batch.join(diagonal, 2)

        return form

    return [(source, make(source)) for source in sources]


def _samples_apart(axis: Batch, x: Tensor, lead: int = 0, copies: bool = False) -> Tensor:
    """``[*lead, *shape] -> [*lead, N, *shape with k rows on the sample axis]``.

    Samples with fewer rows are filled up with zeros or, for arguments, with
    ``copies`` of a row that is there.
    """
    split = axis.split(x, lead, copies)
    return split.squeeze(lead + 1) if axis.bare else split.movedim(lead + 1, lead + 1 + axis.dim)


# --------------------------------------------------------------------------------------
# Recurrent layers: one layer, one direction, several outputs

SEVERAL_OUTPUTS: dict[Any, Callable[..., Pairs]] = {}


def recurrent_axis(
    input: Tensor, states: Sequence[Tensor], marked: Sequence[tuple[Tensor, Batch]], batch_first: bool
) -> tuple[Batch, list[Tensor]]:
    """The sample axis of a recurrent layer's hidden states, from its input's and its first states'.

    Args:
        input: the input.
        states: the states it begins with, which have samples on their second axis.
        marked: the arguments that have a sample axis.
        batch_first: whether samples come first in the input and the hidden states.

    Returns:
        The axis, and the arguments that are taken for constants after all: those whose tentative axis
        disagrees with a certain one.
    """
    dim = 0 if batch_first else 1
    chosen: Batch | None = None
    demoted: list[Tensor] = []
    for tensor, axis in sorted(marked, key=lambda pair: (pair[1].tentative, pair[1].lost is None)):
        place = dim if tensor is input else 1
        if axis.lost:
            here = axis
        elif tensor is not input and not any(tensor is state for state in states):
            here = axis.losing("a weight that depends on the data")
        elif axis.solo is not None or axis.size == 1:
            shape = (tensor.shape[place],) * 2
            here = solo_axis(axis.solo or 0, axis.size, shape, tensor.device, axis.tentative, dim)
        elif axis.dim == place:
            here = axis.moved(dim)
        else:
            here = axis.losing("a recurrent layer along the sample axis (see its batch_first)")
        if chosen is None:
            chosen = here
        elif not chosen.lost and not chosen.agrees(here):
            if axis.tentative:
                demoted.append(tensor)
            else:
                chosen = chosen.losing("a recurrent layer whose states belong to other samples")
    assert chosen is not None
    return chosen, demoted


def _recurrent(name: str) -> Callable[..., Pairs]:
    def layer(
        batch: Batch,
        place: int,
        output: Tensor,
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Pairs:
        """``batch`` is the hidden states' axis, whichever the place.

        ``output`` is detached: it is the hidden states, and holding on to it must not be a cycle.
        """
        weights = recurrent.Layer.of(params, has_biases)
        h0: Tensor = hx[0] if name == "lstm" else hx
        c0: Tensor | None = hx[1] if name == "lstm" else None
        first, state_axis = batch.moved(0), batch.moved(1)

        def backward(g: Tensor) -> tuple[Tensor, recurrent.Backward]:
            x, hidden = input.to(g.dtype), output.to(g.dtype)
            if not batch_first:
                x, hidden = x.transpose(0, 1), hidden.transpose(0, 1)
            if place:
                g = g.squeeze(1)
            elif not batch_first:
                g = g.transpose(1, 2)
            start, cell = h0[0].to(g.dtype), None if c0 is None else c0[0].to(g.dtype)
            if torch.is_grad_enabled():
                hidden = recurrent.hidden_states(name, weights, x, start, cell)
            if cell is not None:
                return x, recurrent.lstm(weights, x, start, cell, hidden, g, place)
            if name == "gru":
                return x, recurrent.gru(weights, x, start, hidden, g, place)
            return x, recurrent.rnn(weights, x, start, hidden, g, place, name == "rnn_relu")

        shared = _Once(backward)

        def input_weight(g: Tensor) -> Form:
            x, back = shared(g)
            return _outer(first, x, back.d_ih, Layout(weights.w_ih.shape))

        def hidden_weight(g: Tensor) -> Form:
            back = shared(g)[1]
            return _outer(first, back.previous, back.d_hh, Layout(weights.w_hh.shape))

        def projection(g: Tensor) -> Form:
            back = shared(g)[1]
            assert weights.w_hr is not None and back.unprojected is not None and back.d_hr is not None
            return _outer(first, back.unprojected, back.d_hr, Layout(weights.w_hr.shape))

        def bias(which: str) -> ToForm:
            return lambda g: Dense(first.rows(getattr(shared(g)[1], which), 1).sum(2))

        def data(g: Tensor) -> Form:
            """The input, where it is made from parameters and only the first states are data."""
            found = shared(g)[1].d_ih @ weights.w_ih
            return reduce_to(batch, found if batch_first else found.transpose(1, 2), input.shape)

        def state(shape: torch.Size, which: str) -> ToForm:
            def form(g: Tensor) -> Form:
                return reduce_to(state_axis, getattr(shared(g)[1], which).unsqueeze(1), shape)

            return form

        return [
            (weights.w_ih, input_weight),
            (weights.w_hh, hidden_weight),
            (weights.b_ih, bias("d_ih")),
            (weights.b_hh, bias("d_hh")),
            (weights.w_hr, projection),
            (h0, state(h0.shape, "d_h0")),
            (c0, state(h0.shape if c0 is None else c0.shape, "d_c0")),
            (input, data),
        ]

    return layer


class _Once:
    """Remember the last result, for as long as it is in use (several parameters ask for it)."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function
        self.key: weakref.ref[Tensor] | None = None
        self.result: Any = None

    def __call__(self, g: Tensor) -> Any:
        if self.key is None or self.key() is not g:
            self.result = self.function(g)
            self.key = weakref.ref(g, self._forget)
        return self.result

    def _forget(self, _: Any) -> None:
        self.key = self.result = None


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    SEVERAL_OUTPUTS[getattr(torch, _name)] = _recurrent(_name)
