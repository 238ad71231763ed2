"""The sample axis of an operation's result, from those of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from backpack.samples.axis import SampleAxis, regular_axis, solo_axis
from backpack.samples.contractions import aligned
from backpack.samples.entries import ENTRIES, entry_axis
from backpack.samples.movers import JOINS, LIKE, MOVERS, Mover, joined, spellings
from backpack.samples.separability import is_sample_separable, remembers

# Several arguments, broadcast, entry by entry.
ELEMENTWISE: set[Any] = set(
    spellings(
        *"add sub mul div true_divide divide multiply subtract rsub pow maximum minimum fmod".split(),
        *"add_ sub_ mul_ div_ pow_ lerp addcmul addcdiv masked_fill masked_fill_".split(),
        *"eq ne lt le gt ge where __radd__ __rmul__ __rsub__ __rdiv__ __rtruediv__ __rpow__".split(),
        *"__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __floordiv__ __rfloordiv__ floor_divide".split(),
        *"remainder __mod__ __rmod__ atan2 arctan2 hypot xlogy xlog1py logaddexp logaddexp2".split(),
        *"fmax fmin float_power ldexp copysign heaviside clamp clip clamp_min clamp_max".split(),
        *"logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__".split(),
        *"__xor__ isclose not_equal greater greater_equal less less_equal".split(),
    )
)
# One argument, entry by entry (or as good as, for samples).
POINTWISE: set[Any] = set(
    spellings(
        *"abs absolute neg negative positive __neg__ __pos__ __abs__ __invert__ square".split(),
        *"sqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan".split(),
        *"sinh cosh rsqrt tanh asinh acosh atanh erf erfc erfinv lgamma digamma logit".split(),
        *"expit sigmoid sinc relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh".split(),
        *"hardswish hardsigmoid hardshrink softshrink tanhshrink softsign softplus".split(),
        *"logsigmoid log_sigmoid threshold rrelu round floor ceil trunc fix frac sign sgn".split(),
        *"nan_to_num isnan isinf isfinite logical_not bitwise_not angle conj resolve_conj".split(),
        *"real imag dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d".split(),
        *"dropout2d dropout3d bernoulli to type float double half bfloat16 int long bool".split(),
        *"short byte contiguous clone detach cpu cuda requires_grad_ type_as alias zero".split(),
        *"zero_ fill fill_ normal_ uniform_ random_ bernoulli_ exponential_ nll_loss".split(),
        *"cross_entropy".split(),
    )
)
# Layers that mix their last axes, so many of them, and no others.
_LAST_AXES: dict[Any, int] = {
    func: ndim + channels
    for ndim in (1, 2, 3)
    for channels, names in (
        (1, "conv{}d conv_transpose{}d"),
        (0, "avg_pool{}d max_pool{}d adaptive_avg_pool{}d lp_pool{}d"),
    )
    for func in spellings(*names.format(*4 * (ndim,)).split())
}
# Layers whose samples come first; these do something else where they do not.
_SAMPLES_FIRST = frozenset(spellings("batch_norm", "instance_norm", "group_norm", "interpolate"))


def known(func: Any, batch: SampleAxis, old: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether an operation without a mover is known to leave samples where they are, and apart."""
    if func in POINTWISE or func in ELEMENTWISE:
        return True
    if not args or old is not args[0] or not old.dim() > 1:
        return False
    if func in _SAMPLES_FIRST:
        return batch.dim == 0
    last = _LAST_AXES.get(func)
    return last is not None and batch.dim < old.dim() - last


def moved(
    move: Mover,
    batch: SampleAxis,
    old: Tensor,
    new: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> SampleAxis:
    """The axis of a result by a mover; a call that the mover cannot read must not stop the user's."""
    try:
        return move(batch, old, new, args, kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return batch.losing(f"a call that cannot be followed ({error})")


FACTORIES = frozenset(
    spellings(*"zeros ones empty full rand randn randint arange eye linspace tensor".split())
)
EXPANSIONS = frozenset(spellings("expand", "expand_as", "broadcast_to", "repeat", "tile"))


def propagate(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Tensor,
    marked: list[tuple[Tensor, SampleAxis]],
    place: int = 0,
) -> tuple[SampleAxis, list[Tensor]]:
    """The sample axis of an operation's result.

    Args:
        func: the function as the torch-function protocol reports it.
        args: its positional arguments.
        kwargs: its keyword arguments.
        new: one result tensor.
        marked: the arguments that have a sample axis.
        place: which of the results.

    Returns:
        The result's axis, and the arguments that are taken for constants after all: those whose
        tentative axis disagrees with a certain one, or gets lost. An axis that is tentative and lost
        is that of a constant.
    """
    batch, demoted = traced(func, args, kwargs, new, marked, place)
    if batch.lost and (sample := _single(func, marked)) is not None:
        batch = solo_axis(sample, batch.size, new.shape, new.device, batch.tentative)
    return batch, demoted


def traced(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Tensor,
    marked: list[tuple[Tensor, SampleAxis]],
    place: int = 0,
) -> tuple[SampleAxis, list[Tensor]]:
    """The same, as far as an axis of the arguments can be followed to one of the result."""
    if len(marked) == 1 and func not in MOVERS:  # nearly all calls
        old, batch = marked[0]
        same = func not in ELEMENTWISE or new.dim() == old.dim()
        if same and batch.lost is None and batch.fits(new.shape) and known(func, batch, old, args):
            return batch, []
    if len(marked) > 1 and func in JOINS and (axis := joined(func, args, kwargs, new, marked)):
        return axis, []
    batch, demoted = _propagate(func, args, kwargs, new, marked)
    single = None
    if marked[0][1].picked is not None and (batch.lost or func not in MOVERS):
        single = _single(func, marked)
    if batch.lost is None and func not in MOVERS and single is None:
        data = [(old, axis) for old, axis in marked if not any(old is each for each in demoted)]
        if not (func in ELEMENTWISE or all(known(func, axis, old, args) for old, axis in data)):
            # What cannot be differentiated is not tried out, but entries can be followed.
            follows = func in ENTRIES and not (new.is_floating_point() or new.is_complex())
            if follows or not is_sample_separable(func, args, kwargs, place, data, batch):
                batch = batch.losing(f"{name_of(func)} mixes samples")
    if batch.lost and single is None and not any(axis.lost for _, axis in marked):
        if func in ENTRIES:
            certain = [(old, axis) for old, axis in marked if not axis.tentative]
            for those in (marked, certain) if 0 < len(certain) < len(marked) else (marked,):
                axis = entry_axis(func, args, kwargs, new, those, place)
                if axis is not None:
                    return axis, [old for old, _ in marked if not any(old is x for x, _ in those)]
        elif func not in MOVERS and func not in ELEMENTWISE:
            axis = _axis_tried_out(func, args, kwargs, new, marked, place)
            if axis is not None:
                return axis, []
    if batch.lost and batch.tentative and single is None and batch.size > 1:
        return batch, [tensor for tensor, _ in marked]
    return batch, demoted


def _single(func: Any, marked: Sequence[tuple[Tensor, SampleAxis]]) -> int | None:
    """The one sample that all arguments belong to, if they do; the result then does too."""
    samples = {axis.solo if axis.lost is None else None for _, axis in marked}
    return next(iter(samples)) if len(samples) == 1 and func not in LIKE else None


def _axis_tried_out(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Tensor,
    marked: list[tuple[Tensor, SampleAxis]],
    place: int,
) -> SampleAxis | None:
    """An axis of the result on which samples are apart, where they are not on the argument's."""
    axes = [axis for _, axis in marked]
    size = axes[0].size
    # A guess that holds beside what is certain is none any more.
    if all(axis.tentative for axis in axes) or any(axis.size != size for axis in axes):
        return None
    if not remembers(func, args, kwargs):
        return None
    candidates = [
        regular_axis(size, dim, outer, length // (outer * size))
        for dim, length in enumerate(new.shape)
        for outer in range(1, length // size + 1)
        if length and length % (outer * size) == 0
    ]
    candidates += [axes[0].moved(dim) for dim in range(new.dim()) if axes[0].picked is not None]
    for axis in sorted(candidates, key=lambda axis: axis.width):
        if axis.fits(new.shape) and is_sample_separable(func, args, kwargs, place, marked, axis):
            return axis
    return None


def _propagate(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new: Tensor,
    marked: list[tuple[Tensor, SampleAxis]],
) -> tuple[SampleAxis, list[Tensor]]:
    move = MOVERS.get(func)
    aligns = move is not None or func in ELEMENTWISE
    chosen: SampleAxis | None = None
    best = marked[0][0]
    demoted: list[Tensor] = []
    # Certain axes come before tentative ones, then those with grad, and lost ones first.
    for old, batch in sorted(marked, key=_rank):
        if chosen is not None and chosen.lost:
            break
        here = batch
        if batch.lost is None:
            if move is not None:
                here = moved(move, batch, old, new, args, kwargs)
            elif func in ELEMENTWISE:
                here = aligned(batch, old, new)
            if not here.lost and not here.fits(new.shape):
                here = here.losing(f"{name_of(func)} gave shape {tuple(new.shape)}")
        if chosen is None:
            chosen, best = here, old
        elif not chosen.agrees(here):
            conflict = chosen.losing(f"{name_of(func)} combines different sample axes")
            if chosen.tentative and chosen.tentative >= batch.tentative:
                chosen = conflict  # one guess is as good as another
            elif batch.tentative:
                demoted.append(old)
            elif old.requires_grad or (aligns and not best.requires_grad):
                chosen = conflict
            # Otherwise `old` is a constant, for all that gradients know.
    assert chosen is not None
    return chosen, demoted


def _rank(pair: tuple[Tensor, SampleAxis]) -> tuple[int, bool, bool]:
    tensor, batch = pair
    return batch.tentative, not tensor.requires_grad, batch.lost is None


def settled(
    func: Any,
    new: Tensor,
    axis: SampleAxis,
    dim: int,
    marked: Sequence[tuple[Tensor, SampleAxis]] = (),
) -> tuple[SampleAxis, bool]:
    """What the axis of a result is after all, where an operation has lost it.

    What belongs to one sample cannot be mixed with others. Where no gradient flows nothing is mixed
    either: a row counts as the sample of its number if there is one row for each, unless it is made
    from features that were mixed where gradients flow: that is a constant.

    Args:
        func: the operation.
        new: its result.
        axis: what is known of it.
        dim: the sample axis of the model's inputs.
        marked: the arguments that have a sample axis.

    Returns:
        The axis (one that is tentative and lost is that of a constant), and whether it is that of a
        whole sample.
    """
    if axis.lost is None:
        # A sample that all may look at is no sample of its own as long as no parameter depends on it.
        solo = axis.solo
        if axis.size > 1 and solo is not None and axis.dim and not axis.bare:
            # All of it is that sample's: layers expect samples in front.
            axis = solo_axis(solo, axis.size, new.shape, new.device, axis.tentative)
        common = axis.size > 1 and solo is not None and not new.requires_grad
        axis = replace(axis, tentative=max(1, axis.tentative)) if common else axis
        certain = [each for _, each in marked if not each.tentative and not each.lost]
        if axis.tentative and certain and not common and func not in LIKE:
            # Constants are written to places that depend on the data.
            fits = certain[0].fits(new.shape)
            axis = certain[0] if fits else axis.losing("constants written to places of the data's")
        return axis, False
    only = 0 if axis.size == 1 else _single(func, marked)
    if only is not None:
        return solo_axis(only, axis.size, new.shape, new.device, axis.tentative), True
    if new.requires_grad:
        return axis, False
    if any(each.lost and not each.tentative and old.requires_grad for old, each in marked):
        return replace(axis, tentative=True), False  # features that were mixed have no rows to count
    return _counted(func, new, axis, dim, marked), False


def _counted(
    func: Any, new: Tensor, lost: SampleAxis, dim: int, marked: Sequence[tuple[Tensor, SampleAxis]]
) -> SampleAxis:
    if not marked and func not in EXPANSIONS:
        return replace(lost, tentative=True)
    places: list[int] = []
    tentative = min((axis.tentative for _, axis in marked), default=1)
    if func in ELEMENTWISE:
        certain = [(old, axis) for old, axis in marked if axis.tentative == tentative]
        places = [axis.dim + new.dim() - old.dim() for old, axis in certain]
    elif len(marked) == 1 and marked[0][0].shape == new.shape:
        places = [marked[0][1].dim]
    for place in places:
        if 0 <= place < new.dim() and new.shape[place] == lost.size:
            return regular_axis(lost.size, place, tentative=tentative)
    # Statistics have no rows, whatever their length, until they are given some.
    rows = func in EXPANSIONS or (func not in LIKE and new.dim() >= max(x.dim() for x, _ in marked))
    if rows and dim < new.dim() and new.shape[dim] == lost.size:
        return regular_axis(lost.size, dim, tentative=max(1, tentative))
    return replace(lost, tentative=True)


def name_of(func: Any) -> str:
    """Name of an operation, for messages."""
    return getattr(func, "__name__", str(func))
