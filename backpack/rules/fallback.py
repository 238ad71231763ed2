"""Operations without a rule, differentiated sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backpack._torch import shows, tree_flatten, tree_unflatten
from backpack.forms.base import Dense, Form
from backpack.rules.base import ParameterForms, ToForm
from backpack.samples.axis import SampleAxis, sample_axis_of
from backpack.samples.separability import spare


def fallback(
    batch: SampleAxis,
    place: int,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sources: Sequence[Tensor],
    at_once: bool = False,
) -> ParameterForms:
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
    axes = [sample_axis_of(x) if isinstance(x, Tensor) else None for x in leaves]
    versions = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
    name = getattr(func, "__name__", str(func))

    def make(source: Tensor) -> ToForm:
        where = [j for j, x in enumerate(leaves) if x is source]

        def alike(x: Any) -> Any:
            """In the source's precision, which autocast may have left."""
            other = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != source.dtype
            return x.to(source.dtype) if other else x

        def argument(x: Any, axis: SampleAxis | None) -> Any:
            """An argument for another call of the operation."""
            constant = isinstance(x, Tensor) and axis is None and not x.requires_grad
            return alike(spare(x) if constant else x)

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
                here = [
                    next(rest) if axis else argument(x, axis)
                    for axis, x in zip(axes, leaves, strict=True)
                ]

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
                here = [
                    p if j in where else argument(x, axis)
                    for j, (x, axis) in enumerate(zip(leaves, axes, strict=True))
                ]
                new_args, new_kwargs = tree_unflatten(here, spec)
                result = func(*new_args, **new_kwargs)
                return result if isinstance(result, Tensor) else result[place]

            try:
                return torch.func.vjp(run, source)[1]
            except RuntimeError:  # operations of torch.library need not know transforms
                return _recorded(run, source)

        def whole(g: Tensor) -> Tensor:
            """The operation on the whole batch, once for each sample's columns."""
            vjp, ids, found = pullback(), batch.sample_ids(g.device), []
            for n in range(batch.size):
                if not shows((ids == n).any(), True):
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
            return found if shows((agree | total.isnan()).all(), True) else whole(g)

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


def _recorded(run: Callable[[Tensor], Tensor], source: Tensor) -> Callable[[Tensor], tuple[Tensor]]:
    """The VJP of a function by autograd itself."""
    point = source.detach().requires_grad_()
    with torch.enable_grad():
        out = run(point)

    def vjp(c: Tensor) -> tuple[Tensor]:
        create = torch.is_grad_enabled()
        (found,) = torch.autograd.grad(
            out, point, c, retain_graph=True, create_graph=create, allow_unused=True
        )
        return (torch.zeros_like(point) if found is None else found,)

    return vjp


def _samples_apart(axis: SampleAxis, x: Tensor, lead: int = 0, copies: bool = False) -> Tensor:
    """``[*lead, *shape] -> [*lead, N, *shape with k rows on the sample axis]``.

    Samples with fewer rows are filled up with zeros or, for arguments, with
    ``copies`` of a row that is there.
    """
    split = axis.split(x, lead, copies)
    return split.squeeze(lead + 1) if axis.bare else split.movedim(lead + 1, lead + 1 + axis.dim)
