"""Values of quantities, with their types: beside the attributes of parameters.

In: a parameter or a model, and a quantity. Out: values, or an error that says why there is none.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, Protocol, TypeVar, cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")

# Why parameters have no value of a quantity, by fields, where the last block left it out.
_reasons: Any = WeakTensorKeyDictionary()


def note_missing(parameter: Tensor, savefield: str, reason: str) -> None:
    """Remember why a parameter has no value."""
    _reasons.setdefault(parameter, {})[savefield] = reason


def note_found(parameter: Tensor, savefield: str) -> None:
    """Forget it, for there is a value."""
    if len(_reasons) and parameter in _reasons:
        _reasons[parameter].pop(savefield, None)


class Reader(Generic[Value]):
    """Reads a quantity's value from a parameter: ``Variance.of(p)``.

    A class attribute of quantities, or of an instance with a field of its own.
    """

    def __init__(self, savefield: str = "", name: str = "") -> None:
        self.savefield, self.name = savefield, name

    def __get__(self, instance: Any, owner: type) -> Reader[Value]:
        field = getattr(owner if instance is None else instance, "savefield", "")
        return Reader(field, owner.__name__)

    def __call__(self, parameter: Tensor) -> Value:
        """The value.

        Args:
            parameter: of an extended model, after a backward pass in a block.

        Raises:
            TypeError: if it is no tensor.
            AttributeError: if there is no value; it says why.
        """
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{self.name}.of expects a parameter, but got {type(parameter).__name__}")
        if self.savefield in parameter.__dict__:
            return parameter.__dict__[self.savefield]
        raise AttributeError(f"{self.name}: {self._why(parameter)}")

    def _why(self, parameter: Tensor) -> str:
        about = f"a parameter of shape {list(parameter.shape)} has no {self.savefield!r}"
        reason = _reasons.get(parameter, {}).get(self.savefield)
        if reason is not None:
            return f"{about}, which the last block left out: {reason}"
        if not parameter.requires_grad:
            return f"{about}, for it does not require grad"
        if not parameter.is_leaf:
            return f"{about}, for it is no parameter but computed from others"
        return (
            f"{about}: no backward pass in a block backpack({self.name}(...)) has reached it. Call "
            "loss.backward() in such a block, of a loss that depends on it and an extended model; the "
            "next block that asks for the same field deletes it where the loss does not depend on it"
            + ("; it has no gradient either" if parameter.grad is None else "")
        )


class Readable(Protocol[Value]):
    """A quantity."""

    @property
    def of(self) -> Reader[Value]:
        """Reads its value from a parameter."""


def collect(
    model: nn.Module,
    quantity: type[Readable[Value]] | Readable[Value],
    *,
    missing: Literal["raise", "skip"] = "raise",
) -> dict[str, Value]:
    """The values of a quantity, by the names of a model's parameters that require grad.

    The type is that of the quantity: ``dict[str, Tensor]`` for most of them,
    ``dict[str, KroneckerFactored]`` for Kronecker factors.

    Example:
        >>> import torch
        >>> from backpack import backpack, collect, extend
        >>> from backpack.extensions import Variance
        >>> model = extend(nn.Linear(4, 3))
        >>> with backpack(Variance()):
        ...     model(torch.rand(5, 4)).sum().backward()
        >>> {name: value.shape for name, value in collect(model, Variance).items()}
        {'weight': torch.Size([3, 4]), 'bias': torch.Size([3])}

    Args:
        model: the model.
        quantity: its class, or an instance (where that has a field of its own).
        missing: ``"skip"``: leave out parameters that have no value.

    Raises:
        ValueError: for another ``missing``.
        AttributeError: if a parameter has no value; it says which, and why.
    """
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing must be 'raise' or 'skip', got {missing!r}")
    found, read = {}, cast("Reader[Value]", quantity.of)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        try:
            found[name] = read(parameter)
        except AttributeError as error:
            if missing == "raise":
                raise AttributeError(f"{name!r}: {error}") from None
    return found
