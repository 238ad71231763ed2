"""Values of single samples of several batches, which go to a function or into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from backpack.dataset.totals import Batches, Individual
from backpack.quantities.base import BackpropExtension
from backpack.quantities.combining import Joined, Rule
from backpack.quantities.parts import Entry


class PutAway(Batches):
    """Batches whose individual values do not stay in memory, if that is asked for."""

    def __init__(
        self,
        extensions: Sequence[BackpropExtension],
        rules: Sequence[Rule],
        individual: Individual,
        samples: int | None,
        model: nn.Module | None,
    ) -> None:
        super().__init__(extensions, rules)
        if individual is not None and samples is None:
            raise ValueError("individual values are scaled and placed by the number of all `samples`")
        if individual is not None and not callable(individual) and model is None:
            raise ValueError("files are named by parameters; pass the `model`")
        self.individual, self.expected = individual, samples
        self._names: dict[Tensor, str] | None = None
        if model is not None:
            self._names = {p: name for name, p in model.named_parameters()}
        self._files: dict[tuple[Tensor, str], Tensor] = {}

    def _put_away(self, batch: dict[Tensor, dict[str, Entry]], samples: int) -> None:
        """Hand individual values to the function, or write them to files."""
        if self.individual is None:
            return
        rows = slice(self.totals.samples, self.totals.samples + samples)
        assert self.expected is not None
        if rows.stop > self.expected:
            raise RuntimeError(
                f"there are more samples than the {self.expected} that individual values were scaled "
                "for; pass the right number of `samples`"
            )
        found = [
            (p, field, fields.pop(field))
            for p, fields in batch.items()
            for field in [*fields]
            if isinstance(fields[field].rule, Joined)
        ]
        if not callable(self.individual):
            for p, field, entry in found:
                self._write(p, field, entry, rows)
            return
        for p, field, entry in found:
            setattr(p, field, entry.value())
        try:
            self.individual(rows)
        finally:
            for p, field, _ in found:
                p.__dict__.pop(field, None)

    def _write(self, p: Tensor, field: str, entry: Entry, rows: slice) -> None:
        assert isinstance(entry.rule, Joined)
        value, axis = entry.value(), entry.rule.axis
        shape = [*value.shape]
        shape[axis] = self.expected or 0
        if not value.numel():
            return
        if (p, field) not in self._files:
            self._place(p, field).unlink(missing_ok=True)
            self._files[p, field] = self._open(p, field, shape, value.dtype)
        file = self._files[p, field]
        if list(file.shape) != shape:
            raise ValueError(
                f"{field} of parameter '{self._name(p)}' has the shape {tuple(value.shape)}, which "
                f"does not fit those of earlier batches, {tuple(file.shape)} with all samples"
            )
        file[(slice(None),) * axis + (rows,)] = value.to(file.device)

    def _place(self, p: Tensor, field: str) -> Path:
        assert isinstance(self.individual, (str, Path))
        folder = Path(self.individual)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self._name(p)}.{field}"

    def _open(self, p: Tensor, field: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        file = torch.from_file(str(self._place(p, field)), shared=True, size=size, dtype=dtype)
        return file.reshape(tuple(shape))

    def _name(self, p: Tensor) -> str:
        if self._names is None:
            raise ValueError("parameters need names here; pass the `model`")
        if p not in self._names:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not in the model that was given"
            )
        return self._names[p]
