"""How values of several batches make the value of all of them: one rule for each quantity.

A batch has a loss of its own, and the loss of all batches is a weighted sum of theirs: each has weight
one if losses are sums over samples, its part of all samples if they are means. A rule says what a batch
contributes (a *part*), how a part changes with the weight of its loss, how parts are put together, and
which value they make. Parts are never changed, only replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from backpack.forms.complex_pairs import as_pairs
from backpack.kronecker.block import KroneckerBlock
from backpack.kronecker.eigen import KroneckerEigen
from backpack.kronecker.factored import KroneckerFactored

# Gives tensors that are to be summed up over processes, gets the sums, and returns a part.
Sums = Generator[list[Tensor], list[Tensor], Any]
# Sums up tensors over processes.
SumUp = Callable[[list[Tensor]], list[Tensor]]


class Rule(ABC):
    """How values of batches combine.

    Args:
        degree: the power of a loss's factor that the value has: 1 for gradients and curvature, 2 for
            squares of gradients.
    """

    # Whether all processes must have a part, where several exchange theirs.
    everywhere = False

    def __init__(self, degree: float = 1) -> None:
        self.degree = degree

    def take(self, value: Any, context: Any) -> Any:
        """What a batch contributes.

        Args:
            value: what the quantity saves.
            context: the :class:`~backpack.quantities.Context` of the backward pass.
        """
        return value.detach()

    @abstractmethod
    def weigh(self, part: Any, factor: float) -> Any:
        """The part, had the loss been multiplied with ``factor``."""

    @abstractmethod
    def add(self, part: Any, other: Any) -> Any:
        """The part of both sets of samples, those of ``other`` last."""

    def absent(self, part: Any, seen: int, samples: int) -> Any:
        """The part of samples that do not reach the parameter; ``None`` if it adds nothing.

        Args:
            part: that of samples which do, for its shape.
            seen: their number.
            samples: the number of those that do not.
        """
        return None

    def across(self, part: Any, samples: Sequence[int], sum_up: SumUp) -> Sums | None:
        """The part of the samples of several processes, by sums over processes of tensors.

        ``None``, which is the default: parts are gathered, and :meth:`add` puts them together.

        Args:
            part: that of this process.
            samples: numbers of samples in each process.
            sum_up: for sums that are asked for later, by all processes at once.
        """
        return None

    def value(self, part: Any) -> Any:
        """The value to save."""
        return part

    def pack(self, part: Any) -> Any:
        """The part as tensors, numbers, strings, lists and dictionaries, for a ``state_dict``."""
        return part

    def unpack(self, data: Any) -> Any:
        """The part that :meth:`pack` was given."""
        return data


class Added(Rule):
    """Sums over samples: values are added, each with its weight to the power of ``degree``."""

    def take(self, value: Tensor, context: Any) -> Tensor:
        return wide(value.detach())

    def weigh(self, part: Tensor, factor: float) -> Tensor:
        return part if factor == 1 else part * factor**self.degree

    def add(self, part: Tensor, other: Tensor) -> Tensor:
        return part + other

    def across(self, part: Any, samples: Sequence[int], sum_up: SumUp) -> Sums | None:
        return self._sum(part)

    def _sum(self, part: Tensor) -> Sums:
        (total,) = yield [part]
        return total


class Joined(Rule):
    """Values of single samples: they are concatenated, each with its weight to the power of ``degree``.

    Args:
        degree: see :class:`Rule`.
        axis: the axis of samples.
    """

    def __init__(self, degree: float = 1, axis: int = 0) -> None:
        super().__init__(degree)
        self.axis = axis

    def take(self, value: Tensor, context: Any) -> list[Tensor]:
        return [value.detach()]

    def weigh(self, part: list[Tensor], factor: float) -> list[Tensor]:
        return part if factor == 1 else [each * factor**self.degree for each in part]

    def add(self, part: list[Tensor], other: list[Tensor]) -> list[Tensor]:
        # Columns that were left out are zero: no column reaches the parameter from some batch.
        found, more = part[0].shape[: self.axis], other[0].shape[: self.axis]
        if found != more and 0 not in (found.numel(), more.numel()):
            raise ValueError(
                f"values of batches have shapes {tuple(part[0].shape)} and {tuple(other[0].shape)}, "
                f"which do not fit together along axis {self.axis}"
            )
        lead = max(found, more)
        return [self._filled(each, lead) for each in (*part, *other)]

    def _filled(self, value: Tensor, lead: torch.Size) -> Tensor:
        if value.shape[: self.axis] == lead:
            return value
        return value.new_zeros(*lead, *value.shape[self.axis :])

    def absent(self, part: list[Tensor], seen: int, samples: int) -> list[Tensor]:
        shape = list(part[0].shape)
        shape[self.axis] = samples
        return [part[0].new_zeros(()).expand(shape)]

    def value(self, part: list[Tensor]) -> Tensor:
        if len(part) > 1:
            part[:] = [torch.cat(part, self.axis)]  # the same part, in one piece
        return part[0]


class Moments(Rule):
    """Variances over samples, from means and variances of batches (Chan, Golub, LeVeque, 1979).

    With ``N = n + m`` samples and ``d`` the difference of the means, ``N var = n var_n + m var_m +
    n m / N d^2``: squares are of differences, so that nothing cancels.
    """

    Part = tuple[int, Tensor, Tensor]

    def take(self, value: Tensor, context: Any) -> Part:
        mean = wide(context.gradient().detach()) / max(context.samples, 1)
        return context.samples, mean, wide(value.detach())

    def weigh(self, part: Part, factor: float) -> Part:
        if factor == 1:
            return part
        count, mean, variance = part
        return count, mean * factor, variance * factor**2

    def add(self, part: Part, other: Part) -> Part:
        (n, mean, variance), (m, more, its) = part, other
        if not n or not m:
            return part if n else other
        total, difference = n + m, more - mean
        spread = variance.lerp(its, m / total).add(_square(difference), alpha=n * m / total**2)
        return total, mean + difference * (m / total), spread

    def absent(self, part: Part, seen: int, samples: int) -> Part:
        return samples, torch.zeros_like(part[1]), torch.zeros_like(part[2])

    def across(self, part: Part, samples: Sequence[int], sum_up: SumUp) -> Sums:
        (count, mean, variance), total = part, sum(samples)
        share = count / max(total, 1)
        (centre,) = yield [share * mean]
        (spread,) = yield [share * (variance + _square(mean - centre))]
        return total, centre, spread

    def value(self, part: Part) -> Tensor:
        return part[2]

    def pack(self, part: Part) -> list[Any]:
        return list(part)

    def unpack(self, data: Sequence[Any]) -> Part:
        count, mean, variance = data
        return count, mean, variance


class Counted(Added):
    """Sums over samples multiplied with their number."""

    def take(self, value: Tensor, context: Any) -> Any:
        return context.samples, super().take(value, context) / max(context.samples, 1)

    def weigh(self, part: Any, factor: float) -> Any:
        return part[0], super().weigh(part[1], factor)

    def add(self, part: Any, other: Any) -> Any:
        return part[0] + other[0], part[1] + other[1]

    def absent(self, part: Any, seen: int, samples: int) -> Any:
        return samples, torch.zeros_like(part[1])

    def across(self, part: Any, samples: Sequence[int], sum_up: SumUp) -> Sums:
        total = yield from self._sum(part[1])
        return sum(samples), total

    def value(self, part: Any) -> Tensor:
        return part[0] * part[1]

    def pack(self, part: Any) -> list[Any]:
        return list(part)

    def unpack(self, data: Any) -> Any:
        return tuple(data)


class Blocks(Rule):
    """Kronecker factors, and eigenvalues in one basis.

    The factor ``B`` is a sum over samples and has the scale of the loss: it is added. ``A`` is an
    average over samples and has none: it is averaged, by numbers of samples. Eigenvalues are added.
    """

    def take(self, value: KroneckerBlock, context: Any) -> KroneckerBlock:
        like = value[-1]  # type: ignore[index]
        found = value.detach()
        return found.to(torch.float32) if _narrow(like) else found

    def weigh(self, part: KroneckerBlock, factor: float) -> KroneckerBlock:
        return part if factor == 1 else part.scale(factor**self.degree)

    def add(self, part: Any, other: Any) -> Any:
        return part.add(other)

    def absent(self, part: KroneckerBlock, seen: int, samples: int) -> KroneckerBlock | None:
        if not isinstance(part, KroneckerFactored):
            return None
        rows = round(part.averaged_over * samples / max(seen, 1))
        zeros = [torch.zeros_like(factor) for factor in part]
        return KroneckerFactored(zeros, part.shape, part.layout, rows)

    def across(self, part: Any, samples: Sequence[int], sum_up: SumUp) -> Sums:
        return self._factors(part) if isinstance(part, KroneckerFactored) else self._eigen(part)

    def _factors(self, part: KroneckerFactored) -> Sums:
        rows = torch.tensor(part.averaged_over, device=part[0].device)
        weighed = [f if i == part.grows else f * part.averaged_over for i, f in enumerate(part)]
        *found, total = yield [*weighed, rows]
        factors = [f if i == part.grows else f / max(int(total), 1) for i, f in enumerate(found)]
        return KroneckerFactored(factors, part.shape, part.layout, int(total))

    def _eigen(self, part: KroneckerEigen) -> Sums:
        probes = [_probe(basis) for basis in part.eigenvectors]
        one = torch.ones((), device=part.eigenvalues.device, dtype=torch.int64)
        values, *found, size = yield [part.eigenvalues, *probes, one]
        for probe, total in zip(probes, found, strict=True):
            tolerance = 1e3 * len(probe) * torch.finfo(probe.dtype).eps
            if bool((total / size - probe).abs().max() > tolerance * (1 + probe.abs().max())):
                raise RuntimeError(
                    "processes have eigenvalues in different bases, which do not add up: their "
                    "eigenvectors of the same factors differ (other hardware or libraries?); pass "
                    "`bases` to the quantity, the same in all processes"
                )
        return KroneckerEigen(part.eigenvectors, values, part.shape, part.layout)

    def pack(self, part: KroneckerBlock) -> dict[str, Any]:
        return part.state_dict()

    def unpack(self, data: dict[str, Any]) -> KroneckerBlock:
        kind = KroneckerFactored if "factors" in data else KroneckerEigen
        return kind.from_state_dict(data)


class Functions(Rule):
    """Linear functions, such as products with curvature blocks: their sum, each with its weight.

    The graphs of all batches are kept for it.
    """

    Part = tuple[tuple[float, Callable[[Tensor], Tensor]], ...]

    def take(self, value: Callable[[Tensor], Tensor], context: Any) -> Part:
        return ((1.0, value),)

    def weigh(self, part: Part, factor: float) -> Part:
        return tuple((weight * factor**self.degree, function) for weight, function in part)

    def add(self, part: Part, other: Part) -> Part:
        return part + other

    def across(self, part: Part, samples: Sequence[int], sum_up: SumUp) -> Sums:
        function = self.value(part)
        yield []
        return ((1.0, lambda mat: sum_up([function(mat)])[0]),)

    def value(self, part: Part) -> Callable[[Tensor], Tensor]:
        if len(part) == 1 and part[0][0] == 1:
            return part[0][1]

        def product(mat: Tensor) -> Tensor:
            total = torch.zeros_like(mat)
            for weight, function in part:
                total = total + weight * function(mat)
            return total

        return product

    def pack(self, part: Part) -> Any:
        raise NotImplementedError(
            "functions with graphs cannot be saved; leave products (GGNMP, HMP, PCHMP) out of what is "
            "resumed"
        )


class Never(Rule):
    """Values of batches do not combine.

    Args:
        why: the reason, for the error.
    """

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why

    def weigh(self, part: Any, factor: float) -> Any:
        return part

    def add(self, part: Any, other: Any) -> Any:
        raise NotImplementedError(self.why)


def _probe(basis: Tensor) -> Tensor:
    """A vector that differs where eigenvectors do."""
    rows = torch.linspace(1, 2, basis.shape[-1], dtype=basis.dtype, device=basis.device)
    return basis * rows if basis.dim() == 1 else basis @ rows


def _square(x: Tensor) -> Tensor:
    """``|x|^2``."""
    return as_pairs(x).square().sum(-1) if x.is_complex() else x * x


def wide(value: Tensor) -> Tensor:
    """In a precision in which many terms can be added."""
    return value.to(torch.float32) if _narrow(value) else value


def _narrow(value: Tensor) -> bool:
    return value.dtype in (torch.float16, torch.bfloat16)
