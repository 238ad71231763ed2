"""Operations on nested tensors (jagged layout), done on the rows of all their components.

A nested tensor ``[B, j, *]`` is a tensor of rows, ``[rows, *]``, and where each of its ``B`` components
begins. Each function here computes what the operation of the same signature does from those rows, by
operations in which taps can be found, also where torch has no derivative of it on nested tensors. It
returns ``NotImplemented`` where rows would meet those of other components in ways it does not know.

Axis ``d`` of a nested tensor is axis ``d - 1`` of its rows; ``axis`` is that of the latter which counts
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack._torch import (
    NestedParts,
    nested_padded,
    nested_parts,
    nested_rows,
    nested_view,
    without_torch_function,
)
from backpack.rules.components import ROWS, Places, alike, made_of, rows_of
from backpack.samples.movers import LIKE, argument, dims_of, spellings
from backpack.samples.propagate import ELEMENTWISE, POINTWISE

_Rule = Callable[..., Any]
JAGGED: dict[Any, _Rule] = {}


def _opens(*functions: Any) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        JAGGED.update(dict.fromkeys(functions, function))
        return function

    return register


def opens(func: Any) -> bool:
    """Whether something is known of an operation; what asks for attributes is none."""
    return func in JAGGED or func in ELEMENTWISE or func in POINTWISE or func in LIKE


def opened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` computes from nested tensors; ``NotImplemented`` where that is not known."""
    rule = JAGGED.get(func)
    nested = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_nested]
    if any(nested_parts(x).holes for x in nested):
        return NotImplemented
    if rule is not None:
        return rule(func, *args, **kwargs)
    first = nested_parts(nested[0])
    if any(not alike(nested_parts(x), first) for x in nested[1:]):
        return NotImplemented
    places = Places.of(nested[0])
    given = [_beside(x, nested[0], places) for x in args]
    named = {name: _beside(x, nested[0], places) for name, x in kwargs.items()}
    if any(x is NotImplemented for x in (*given, *named.values())):
        return NotImplemented
    rows = rows_of(nested[0])
    made = func(*given, **named)
    fits = isinstance(made, Tensor) and made.dim() == rows.dim()
    return made_of(made, first) if fits else NotImplemented


def _beside(x: Any, nested: Tensor, places: Places) -> Any:
    """An argument, as it meets the rows of a nested tensor."""
    if not isinstance(x, Tensor):
        return x
    axis, inner = nested_parts(nested).axis, nested.dim() - 1
    if x.is_nested:
        return rows_of(x)
    if x.dim() < nested.dim():
        # A tensor with fewer axes must not meet rows by its place among them.
        at = x.dim() - inner + axis
        return x if at < 0 or x.shape[at] == 1 else NotImplemented
    if x.dim() > nested.dim() or x.shape[axis + 1] != 1:
        return NotImplemented
    if x.shape[0] == 1:
        return x.squeeze(0)
    return x.squeeze(axis + 1).index_select(0, places.component).movedim(0, axis)


def _own(x: Any, dim: int) -> tuple[Tensor, NestedParts, int] | None:
    """Rows, and an axis of theirs; ``None`` for that of components, or of rows."""
    if not isinstance(x, Tensor) or not x.is_nested:
        return None
    parts, inner = nested_parts(x), dims_of(dim, x.dim())[0] - 1
    return None if inner < 0 or inner == parts.axis else (rows_of(x), parts, inner)


# ------------------------------------------------------------------------------------ the tensors


@_opens(nested_view)
def _made(func: Any, values: Tensor, *args: Any, **kwargs: Any) -> Any:
    made = func(values, *args, **kwargs)
    if not values.is_nested and not nested_parts(made).holes:
        setattr(made, ROWS, values)
    return made


@_opens(nested_rows, Tensor.values)
def _values(func: Any, x: Tensor) -> Tensor:
    return rows_of(x)


@_opens(*spellings("unbind"))
def _components(func: Any, x: Tensor, dim: int = 0) -> Any:
    lengths = Places.of(x).lengths.tolist()
    return NotImplemented if dim else rows_of(x).split(lengths, nested_parts(x).axis)


@_opens(nested_padded, Tensor.to_padded_tensor)
def _padded(func: Any, x: Tensor, padding: float, output_size: Any = None) -> Any:
    parts, longest = nested_parts(x), None
    if output_size is not None:
        longest = output_size[parts.axis + 1]
        rows = rows_of(x)
        own = [size for j, size in enumerate(rows.shape) if j != parts.axis]
        asked = [size for j, size in enumerate(output_size) if j not in (0, parts.axis + 1)]
        if own != asked or output_size[0] != len(parts.offsets) - 1:
            return NotImplemented
    return Places.of(x).pad(rows_of(x), parts.axis, padding, longest).movedim(1, parts.axis + 1)


# ------------------------------------------------------------------------- the last axes, row by row


@_opens(F.linear)
def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.is_nested or _own(input, -1) is None:
        return NotImplemented
    return made_of(func(rows_of(input), weight, bias), nested_parts(input))


@_opens(*spellings("matmul", "__matmul__", "bmm"))
def _matmul(func: Any, input: Tensor, other: Tensor) -> Any:
    """With a matrix for all or for each component; or two nested tensors, over their rows."""
    if not input.is_nested or other.dim() < 2:
        return NotImplemented
    rows, parts, places = rows_of(input), nested_parts(input), Places.of(input)
    at_rows = _own(input, -1) is not None
    if other.dim() == 2:
        return made_of(func(rows, other), parts) if at_rows else NotImplemented
    full = places.pad(rows, parts.axis).movedim(1, parts.axis + 1)
    if not other.is_nested:
        if other.dim() != input.dim() or parts.axis != rows.dim() - 2:
            return NotImplemented
        return made_of(places.unpad(func(full, other).movedim(parts.axis + 1, 1), parts.axis), parts)
    theirs = nested_parts(other)
    counted = parts.axis == rows.dim() - 1 and theirs.axis == other.dim() - 3
    if not counted or input.dim() != other.dim() or not alike(parts, theirs._replace(axis=parts.axis)):
        return NotImplemented
    return func(full, places.pad(rows_of(other), theirs.axis).movedim(1, theirs.axis + 1))


@_opens(F.layer_norm, F.rms_norm)
def _norm(func: Any, input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    rows, parts = rows_of(input), nested_parts(input)
    if parts.axis >= rows.dim() - len(normalized_shape):
        return NotImplemented
    return made_of(func(rows, normalized_shape, *args, **kwargs), parts)


@_opens(F.embedding)
def _embedding(func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    if weight.is_nested:
        return NotImplemented
    return made_of(func(rows_of(input), weight, *args, **kwargs), nested_parts(input))


def _along(place: int, default: int | None, *names: str) -> None:
    """Functions of one axis, which is their argument of that place: rows stay what they are."""

    def rule(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        dim = argument((x, *args), kwargs, place, "dim", default=default)
        own = _own(x, dim) if isinstance(dim, int) else None
        if own is None:
            return NotImplemented
        rows, parts, inner = own
        rest = {name: value for name, value in kwargs.items() if name != "dim"}
        made = func(rows, *args[: place - 1], dim=inner, **rest)
        return made_of(made, parts) if isinstance(made, Tensor) else [made_of(m, parts) for m in made]

    _opens(*spellings(*names))(rule)


_along(1, -1, "glu")
_along(1, None, "cumsum", "cumprod")
_along(2, None, "normalize", "chunk", "split")


@_opens(*spellings("softmax", "log_softmax"))
def _softmax(func: Any, x: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if dim is None:
        return NotImplemented
    own = _own(x, dim)
    if own is not None:
        rows, parts, inner = own
        return made_of(func(rows, inner, *args, **kwargs), parts)
    parts = nested_parts(x)
    if dims_of(dim, x.dim())[0] != parts.axis + 1:
        return NotImplemented
    places = Places.of(x)  # over the rows of each component
    full = places.pad(rows_of(x), parts.axis, -torch.inf)
    return made_of(places.unpad(func(full, 1, *args, **kwargs), parts.axis), parts)


# --------------------------------------------------------------------------------------- reductions


def _reduced(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    dim = argument((x, *args), kwargs, 1, "dim")
    keepdim = argument((x, *args), kwargs, 2, "keepdim", default=False)
    options = {name: value for name, value in kwargs.items() if name not in ("dim", "keepdim")}
    rows, parts = rows_of(x), nested_parts(x)
    if dim is None:
        return func(rows, *args, **kwargs)
    inner = [d - 1 for d in dims_of(dim, x.dim())]
    over = [d for d in inner if d != parts.axis]
    if min(inner) < 0 or options.keys() - {"dtype"}:
        return NotImplemented
    if over:
        rows = func(rows, over, True, **options)
    found = made_of(rows, parts)
    if len(over) < len(inner):
        found = _over_rows(func, rows, parts, Places.of(x))
    if keepdim:
        return found
    if found.is_nested:
        axis = parts.axis - sum(d < parts.axis for d in over)
        return made_of(rows.squeeze(over) if over else rows, parts, axis)
    return found.squeeze([d + 1 for d in inner])


for _name in ("sum", "mean", "amax", "amin"):
    _opens(*spellings(_name))(_reduced)


def _over_rows(func: Any, rows: Tensor, parts: NestedParts, places: Places) -> Tensor:
    """Reduced over the rows of each component; their axis stays, of length one."""
    rows = rows.movedim(parts.axis, 0)
    shape, name = (len(places.lengths), *rows.shape[1:]), func.__name__
    if name in ("sum", "mean"):
        found = rows.new_zeros(shape).index_add(0, places.component, rows)
        if name == "mean":
            found = found / places.lengths.reshape(-1, *(1,) * (rows.dim() - 1))
    else:
        at = places.component.reshape(-1, *(1,) * (rows.dim() - 1)).expand_as(rows)
        found = rows.new_zeros(shape).scatter_reduce(0, at, rows, name, include_self=False)
    return found.unsqueeze(1).movedim(1, parts.axis + 1)


# ------------------------------------------------------------------------------------------- shapes


@_opens(*spellings("transpose", "swapaxes", "swapdims"))
def _transpose(func: Any, x: Tensor, dim0: int, dim1: int) -> Any:
    first, second = (d - 1 for d in dims_of([dim0, dim1], x.dim()))
    if min(first, second) < 0:
        return NotImplemented
    parts = nested_parts(x)
    axis = {first: second, second: first}.get(parts.axis, parts.axis)
    return made_of(rows_of(x).transpose(first, second), parts, axis)


@_opens(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _swapped(func: Any, x: Tensor) -> Any:
    return _transpose(func, x, -2, -1)


@_opens(*spellings("flatten"))
def _flatten(func: Any, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    first, last = (d - 1 for d in dims_of([start_dim, end_dim], x.dim()))
    parts = nested_parts(x)
    if first < 0 or first <= parts.axis <= last:
        return NotImplemented
    axis = parts.axis - (last - first if last < parts.axis else 0)
    return made_of(rows_of(x).flatten(first, last), parts, axis)


@_opens(*spellings("unflatten"))
def _unflatten(func: Any, x: Tensor, dim: int, sizes: Sequence[int]) -> Any:
    own = _own(x, dim)
    if own is None:
        return NotImplemented
    rows, parts, inner = own
    axis = parts.axis + (len(sizes) - 1 if inner < parts.axis else 0)
    return made_of(rows.unflatten(inner, sizes), parts, axis)


@_opens(*spellings("unsqueeze"))
def _unsqueeze(func: Any, x: Tensor, dim: int) -> Any:
    inner = dims_of(dim, x.dim() + 1)[0] - 1
    parts = nested_parts(x)
    if inner < 0:
        return NotImplemented
    return made_of(rows_of(x).unsqueeze(inner), parts, parts.axis + (inner <= parts.axis))


@_opens(*spellings("squeeze"))
def _squeeze(func: Any, x: Tensor, dim: int | None = None) -> Any:
    own = _own(x, dim) if isinstance(dim, int) else None
    if own is None:
        return NotImplemented
    rows, parts, inner = own
    gone = inner < parts.axis and rows.shape[inner] == 1
    return made_of(rows.squeeze(inner), parts, parts.axis - gone)


@_opens(*spellings("select"))
def _select(func: Any, x: Tensor, dim: int, index: int) -> Any:
    own = _own(x, dim)
    if own is not None:
        rows, parts, inner = own
        return made_of(rows.select(inner, index), parts, parts.axis - (inner < parts.axis))
    if dims_of(dim, x.dim())[0]:
        return NotImplemented
    return _components(func, x)[index]


@_opens(Tensor.__getitem__)
def _getitem(func: Any, x: Tensor, index: Any) -> Any:
    """A component, or parts of its rows."""
    if isinstance(index, int):
        return _components(func, x)[index]
    index = list(index) if isinstance(index, tuple) else [index]
    parts = nested_parts(x)
    if any(isinstance(each, (Tensor, list)) or each is None for each in index):
        return NotImplemented
    if Ellipsis in index:
        at, more = index.index(Ellipsis), x.dim() - len(index) + 1
        index[at : at + 1] = [slice(None)] * more
    index += [slice(None)] * (x.dim() - len(index))
    if index[0] != slice(None) or index[parts.axis + 1] != slice(None):
        return NotImplemented
    gone = sum(isinstance(each, int) for each in index[1 : parts.axis + 1])
    return made_of(rows_of(x)[tuple(index[1:])], parts, parts.axis - gone)


@_opens(*spellings("view", "reshape"))
def _reshape(func: Any, x: Tensor, *shape: Any) -> Any:
    """Axes after that of rows."""
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    rows, parts = rows_of(x), nested_parts(x)
    at = parts.axis + 1
    if len(sizes) <= at or (isinstance(sizes[at], int) and sizes[at] != -1):
        return NotImplemented
    if sizes[0] != len(parts.offsets) - 1 or sizes[1:at] != list(rows.shape[: parts.axis]):
        return NotImplemented
    return made_of(rows.reshape(*rows.shape[:at], *sizes[at + 1 :]), parts)


@_opens(*spellings("cat", "concat"))
def _cat(func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    nested = all(isinstance(x, Tensor) and x.is_nested for x in tensors)
    own = _own(tensors[0], dim) if nested else None
    if own is None or not all(alike(nested_parts(x), own[1]) for x in tensors):
        return NotImplemented
    return made_of(func([rows_of(x) for x in tensors], own[2]), own[1])


# ---------------------------------------------------------------------------------------- attention


@_opens(F.scaled_dot_product_attention)
def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    """Within each component, in a padded batch."""
    tensors = (query, key, value)
    if attn_mask is not None or not all(x.is_nested for x in tensors):
        return NotImplemented
    parts = [nested_parts(x) for x in tensors]
    if any(part.axis != x.dim() - 3 for part, x in zip(parts, tensors, strict=True)):
        return NotImplemented
    places = [Places.of(x) for x in tensors]
    full = [
        place.pad(rows_of(x), part.axis).movedim(1, -2)
        for x, part, place in zip(tensors, parts, places, strict=True)
    ]
    with without_torch_function():
        asks, sees = places[0].there(), places[1].there()
        # What fills up may look at anything: nobody reads what it finds.
        mask = sees[:, None, :] | ~asks[:, :, None]
        if is_causal:
            mask = mask & mask.new_ones(mask.shape[1:]).tril()
        mask = mask.reshape(len(mask), *(1,) * (full[0].dim() - 3), *mask.shape[1:])
    out = func(*full, attn_mask=mask, dropout_p=dropout_p, **kwargs)
    return made_of(places[0].unpad(out.movedim(-2, 1), parts[0].axis), parts[0])
