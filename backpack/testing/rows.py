"""A model, a loss and a batch: the forward pass, and whose the rows of its output are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from backpack.testing.outputs import Outputs


class Rows:
    """A model, a loss and a batch.

    Args:
        model: the model, in the mode it is to be judged in.
        lossfunc: ``lossfunc(output, y)``; values that are no scalar are summed.
        X: the model's input, or a tuple of inputs.
        y: the targets.
        batch_dim: sample axis of the first input and of the output.
        seed: random seed of every forward pass (dropout).
        output_dim: sample axis of the output, if it is another.
        sample_of_row: the sample that each row of the output belongs to. Without it, each row belongs
            to the sample whose replacement by another changes it; where none or several do, samples
            have their rows one after the other, as many each.
        samples: number of samples, if it is not that of rows of the first input.
    """

    def __init__(
        self,
        model: nn.Module,
        lossfunc: Callable[[Any, Any], Tensor],
        X: Any,
        y: Any,
        batch_dim: int = 0,
        seed: int = 0,
        output_dim: int | None = None,
        sample_of_row: Tensor | Sequence[int] | None = None,
        samples: int | None = None,
    ) -> None:
        self.model, self.lossfunc, self.y = model, lossfunc, y
        self.inputs = X if isinstance(X, tuple) else (X,)
        self.seed, self.batch_dim, self.sample_of_row = seed, batch_dim, sample_of_row
        self.output_dim = batch_dim if output_dim is None else output_dim
        self._outputs = Outputs(self.output_dim)
        self.samples: int = self.inputs[0].shape[batch_dim] if samples is None else samples
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def output(self) -> Tensor:
        """One forward pass."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            output = self._outputs.join(self.model(*self.inputs))
        self.output_dim = self.output_dim if self._outputs.alone else 0
        return output

    def loss(self, output: Tensor) -> Tensor:
        """The loss, summed if it is not reduced."""
        return self.lossfunc(self._outputs.split(output), self.y).sum()

    @cached_property
    def owners(self) -> Tensor:
        """The sample of each row of the output, ``[rows]``.

        Raises:
            ValueError: if it was not said, and cannot be found, or the loss takes numbers without rows
                that depend on the data.
        """
        output = self.output().detach()
        length = output.shape[self.output_dim]
        self._look_at_numbers(output)
        if self.sample_of_row is not None:
            owners = torch.as_tensor(self.sample_of_row, device=output.device)
            if owners.shape != (length,):
                raise ValueError(
                    f"sample_of_row has shape {tuple(owners.shape)}, but the output {length} rows"
                )
            return owners
        changed = torch.stack([self._changed(output, n) for n in range(self.samples)])
        known = changed.sum(0) == 1
        if length % self.samples and not known.all():
            raise ValueError(
                f"cannot tell which of the {length} rows of the output belongs to which of "
                f"{self.samples} samples: pass sample_of_row"
            )
        in_order = torch.arange(length, device=output.device) * self.samples // max(length, 1)
        return torch.where(known, changed.int().argmax(0), in_order)

    def _look_at_numbers(self, output: Tensor) -> None:
        """Refuse numbers beside the rows of which nobody can tell each sample's share."""
        held = [x.detach().requires_grad_() for x in self._outputs.held]
        value = self.lossfunc(self._outputs.split(output, held), self.y).sum() if held else None
        if value is None or not value.requires_grad:
            return
        used = torch.autograd.grad(value, held, allow_unused=True)
        for n in range(self.samples):
            self._with_another(n)
            if any(
                g is not None and bool((g != 0).any()) and not torch.equal(before, after)
                for g, before, after in zip(used, held, self._outputs.held, strict=False)
            ):
                raise ValueError(
                    "the loss takes a number that the model has computed from all samples (an output "
                    "without rows), of which check cannot tell each sample's share. Return what it is "
                    "computed from, with a row for each sample (h.square().mean(1), and its mean in "
                    "the loss)"
                )
        self.output()

    def _with_another(self, n: int) -> Tensor | None:
        """The output with another sample in the place of the n-th; ``None`` if there can be none."""
        inputs = self.inputs
        order = torch.arange(self.samples)
        order[n] = (n + 1) % self.samples
        dim = self.batch_dim
        replaced = [
            x.index_select(dim, order.to(x.device))
            if isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == self.samples
            else x
            for x in inputs
        ]
        try:
            self.inputs = tuple(replaced)
            return self.output().detach()
        except (RuntimeError, ValueError, IndexError):  # lengths that must be sorted, and the like
            return None
        finally:
            self.inputs = inputs

    def _changed(self, output: Tensor, n: int) -> Tensor:
        """Which rows of the output another sample in the place of the n-th changes, ``[rows]``."""
        other = self._with_another(n)
        if other is None:
            length = output.shape[self.output_dim]
            return torch.zeros(length, dtype=torch.bool, device=output.device)
        if other.shape != output.shape:
            raise ValueError(
                f"the number of rows of the output depends on the data, {tuple(output.shape)} or "
                f"{tuple(other.shape)}, so that check cannot find whose they are: pass sample_of_row"
            )
        apart = ~torch.isclose(output, other, rtol=1e-12, atol=0, equal_nan=True)
        others = [d for d in range(output.dim()) if d != self.output_dim]
        return apart.any(others) if others else apart

    def _mask(self, output: Tensor, n: int) -> Tensor:
        length = output.shape[self.output_dim]
        shape = [length if d == self.output_dim else 1 for d in range(output.dim())]
        return (self.owners == n).reshape(shape)
