"""Curvature of low rank, its noise, and steps with it, from forms that one backward pass leaves.

Letters: ``N`` samples, ``D`` numbers of a group of parameters, ``R`` rows of ``V^T`` (columns times
samples), ``K`` directions, ``l_n`` the n-th sample's share of the loss.

``G = V V^T`` has the non-zero eigenvalues of the Gram matrix ``V^T V``, ``[R, R]``; with that and the
products of ``V`` with individual gradients, all else is algebra of small matrices. Idea and scales:
Dangel, Tatzel, Hennig, ViViT, arXiv:2106.02624.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from backpack import backpack
from backpack.own import (
    BackpropExtension,
    ColumnSource,
    Dense,
    ExactRoot,
    LeadingRoot,
    LossGradient,
    OutputBasis,
    SampledRoot,
)
from backpack.vivit.kept import (
    Beside,
    Keep,
    Kept,
    Numbered,
    Rows,
    combine,
    inner,
    memory_of,
    project,
    squared_norms,
    total_count,
)
from backpack.vivit.lanczos import lanczos
from backpack.vivit.operators import Operator

Group = nn.Module | Iterable[Tensor] | None
# Damping of directions: one number, one for each, or a function of pairs and their derivatives.
Damping = "float | Tensor | Callable[[Pairs, Derivatives], Tensor]"
COLUMN_FIELD, GRADIENT_FIELD = "_vivit_columns", "_vivit_gradients"


class Noise(NamedTuple):
    """Signal-to-noise ratios of directions: squared mean over variance, over samples.

    Attributes:
        slopes: of slopes, ``[K]``.
        curvatures: of curvatures, ``[K]``.
    """

    slopes: Tensor
    curvatures: Tensor


class Derivatives(NamedTuple):
    """Slope and curvature of every sample's loss along directions.

    Attributes:
        gammas: ``e_k^T g_n`` with ``g_n`` the gradient of ``N l_n``, ``[N, K]``. The sign of a
            direction is arbitrary.
        lambdas: ``e_k^T G_n e_k`` with ``G_n`` the GGN of ``N l_n``, ``[N, K]``.
    """

    gammas: Tensor
    lambdas: Tensor

    @property
    def snr(self) -> Noise:
        """Signal-to-noise ratios of slopes and of curvatures."""
        return Noise(*(x.mean(0).square() / x.var(0, unbiased=False) for x in self))


@dataclass(eq=False)
class Pairs:
    """Leading eigenvalues of the GGN of a group of parameters, and their eigenvectors.

    Attributes:
        values: ``[K]``, largest first.
        parameters: the group.
        curvature: where they come from.
        coefficients: the Gram matrix's eigenvectors, ``[R, K]``: those of the rows in ``vectors``.
    """

    values: Tensor
    parameters: list[Tensor]
    curvature: LowRank = field(repr=False)
    coefficients: Tensor = field(repr=False)
    _state: int = field(repr=False, default=0)

    @property
    def current(self) -> bool:
        """Whether the rows are still those that the coefficients are about."""
        return self._state == self.curvature._state

    @cached_property
    def vectors(self) -> list[Tensor]:
        """For each parameter of the group ``[K, *p]``; orthonormal over the group."""
        if not self.current:
            raise RuntimeError(
                "the curvature has changed since these eigenpairs were computed (a further pass, or "
                "merge); ask for their vectors before, or compute them anew"
            )
        found = self.curvature._combine_columns(self.coefficients.mT, self.parameters)
        squares = self.values.new_zeros(len(self), dtype=torch.float64)
        for v in found:
            squares += (
                torch.linalg.vector_norm(v.reshape(len(v), v.shape[1:].numel()), dim=1)
                .double()
                .square()
            )
        lengths = squares.sqrt().clamp(min=float(torch.finfo(torch.float32).tiny))
        return [v.div_(lengths.to(v).reshape(-1, *(1 for _ in v.shape[1:]))) for v in found]

    def __len__(self) -> int:
        return len(self.values)


class _Collected(NamedTuple):
    """What one backward pass leaves of each parameter."""

    columns: dict[Tensor, Kept]
    gradients: dict[Tensor, Kept]

    def take(self, place: str, parameter: Tensor, kept: Kept) -> None:
        found: dict[Tensor, Kept] = getattr(self, place)
        if parameter in found:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} was reached by two backward passes "
                "inside one block of LowRank; enter the block once for each pass (their samples are "
                "then joined), or call backward on the sum of the losses"
            )
        found[parameter] = kept


@dataclass
class _Pass:
    """Rows of one backward pass, by parameter and then by number of samples."""

    samples: dict[Tensor, int] = field(default_factory=dict)
    columns: dict[int, Rows] = field(default_factory=dict)
    gradients: dict[int, Rows] = field(default_factory=dict)


class LowRank:
    """The generalized Gauss-Newton matrix as a product of thin matrices, ``G = V V^T``.

    Example:
        >>> from backpack import extend
        >>> model, lossfunc = extend(nn.Linear(4, 3)), extend(nn.CrossEntropyLoss())
        >>> loss = lossfunc(model(torch.rand(5, 4)), torch.tensor([0, 1, 2, 1, 0]))
        >>> with LowRank() as curvature:
        ...     loss.backward()
        >>> pairs = curvature.eigh(k=2)
        >>> pairs.values.shape, [v.shape for v in pairs.vectors]
        (torch.Size([2]), [torch.Size([2, 3, 4]), torch.Size([2, 3])])
        >>> curvature.derivatives(pairs).gammas.shape
        torch.Size([5, 2])

    The block may be entered several times, once for each backward pass: the samples of all count, and
    the loss is the sum of theirs.

    Results are about a *group* of parameters: a list of them, or a module; all by default, in the order
    of ``curvature.parameters``, which is that of the model. They are plain numbers without a graph.

    In the backward pass forms are kept, which take as much memory as the activations and these times
    the number of columns. They refer to activations, which must not be overwritten before the last
    result is asked for (an error says so).

    Args:
        columns: the columns of ``V``. ``"exact"``: a square root of the loss's Hessian; ``"mc"``:
            random ones, whose expected square it is; ``"top"``: those of the leading eigenpairs of each
            sample's Hessian of the loss; ``"jacobian"``: the Jacobian of the model's output, for which
            ``G = J^T J``; ``None``: no curvature, for gradients alone; or a source of your own.
        mc_samples: number of random columns for each sample.
        top: number of leading eigenpairs of each sample's Hessian.
        generator: source of randomness.
        subsampling: samples whose curvature is taken, all by default. ``G`` is then scaled up, to stand
            for that of all.
        subsampling_grad: samples whose gradients are taken, all by default.
        gradients: whether individual gradients are kept.
        precision: of the products between rows. By default that of the model, and double where terms
            cancel: in all that divides by a damping.
        extensions: further quantities to compute in the same passes; may be changed between these.
        options: what else :class:`backpack.backpack` takes (``gradient=False``, ``chunk_size``).

    Raises:
        ValueError: for unknown columns, or numbers of them that are not positive.
    """

    def __init__(
        self,
        columns: Literal["exact", "mc", "top", "jacobian"] | ColumnSource | None = "exact",
        *,
        mc_samples: int = 1,
        top: int = 1,
        generator: torch.Generator | None = None,
        subsampling: Sequence[int] | None = None,
        subsampling_grad: Sequence[int] | None = None,
        gradients: bool = True,
        precision: torch.dtype | None = None,
        extensions: Sequence[BackpropExtension] = (),
        **options: Any,
    ) -> None:
        self._source = Numbered(source_of(columns, mc_samples, top, generator))
        self._subsampling = _checked(subsampling), _checked(subsampling_grad)
        self._precision = precision
        self._keeps_gradients, self.extensions, self.options = gradients, tuple(extensions), options
        self._passes: list[_Pass] = []
        self._open: tuple[backpack, _Collected] | None = None
        self._order: dict[Tensor, None] = {}
        self._known: dict[Any, Any] = {}
        # Counts changes of the rows.
        self._state = 0
        # Whether samples are no longer known one by one, and the trace of what was left out.
        self._merged, self._lost = False, 0.0

    # ----------------------------------------------------------------------------------
    # Collecting

    def __enter__(self) -> LowRank:
        if self._open is not None:
            raise RuntimeError("this block of LowRank is open already")
        self._source.restart()
        collected = _Collected({}, {})
        columns, gradients = self._subsampling
        exts: list[BackpropExtension] = [
            Keep(COLUMN_FIELD, self._source, columns, _delivery(collected, "columns"))
        ]
        if self._keeps_gradients:
            deliver = _delivery(collected, "gradients")
            exts.append(Keep(GRADIENT_FIELD, LossGradient(), gradients, deliver))
        block = backpack(*exts, *self.extensions, **self.options)
        self._open = block, collected
        block.__enter__()
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        assert self._open is not None
        (block, collected), self._open = self._open, None
        block.__exit__(kind, *exc)
        for parameter in {**collected.columns, **collected.gradients}:
            for name in (COLUMN_FIELD, GRADIENT_FIELD):
                parameter.__dict__.pop(name, None)
        if kind is None and (collected.columns or collected.gradients):
            self._take(collected, self._source.sizes)

    def _take(self, collected: _Collected, sizes: Sequence[int]) -> None:
        """Make rows of the forms of one backward pass, whose chunks have so many columns."""
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        found = _Pass()
        for parameter, (samples, pieces) in collected.columns.items():
            kept = samples if self._subsampling[0] is None else len(self._subsampling[0])
            scale = (samples / kept) ** 0.5 if kept else 1.0
            rows = found.columns.setdefault(samples, Rows(sum(sizes), kept, scale))
            rows.add(parameter, pieces, firsts)
            found.samples[parameter] = samples
        for parameter, (samples, pieces) in collected.gradients.items():
            kept = samples if self._subsampling[1] is None else len(self._subsampling[1])
            weight = samples / kept if kept else 1.0
            rows = found.gradients.setdefault(samples, Rows(1, kept, weight=weight))
            rows.add(parameter, pieces, [0])
            found.samples[parameter] = samples
        for samples, rows in found.gradients.items():
            if samples in found.columns and self._subsampling == (None, None):
                rows.share(found.columns[samples])
        self._passes.append(found)
        self._order |= {p: None for p in self._source.order if p in found.samples}
        self._order |= dict.fromkeys(found.samples)
        self._changed()

    def _changed(self) -> None:
        self._known.clear()
        self._state += 1

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that took part, in the order of the models that hold them."""
        return list(self._order)

    def release(self) -> None:
        """Let go of everything that was kept."""
        self._passes.clear()
        self._order.clear()
        self._merged, self._lost = False, 0.0
        self._changed()

    @property
    def samples(self) -> int:
        """Number of samples of all passes (the largest, where groups differ in it)."""
        return sum(max(each.samples.values(), default=0) for each in self._passes)

    @property
    def memory(self) -> int:
        """Bytes of what is kept, activations of the model among it."""
        sides = [r for p in self._passes for r in (*p.columns.values(), *p.gradients.values())]
        return memory_of(sides)

    @property
    def lost(self) -> float:
        """Trace of the part of ``G`` that :meth:`merge` has left out."""
        return self._lost

    def merge(self, rank: int | None = None) -> None:
        """Replace what is kept by leading eigenvectors of ``G``, and the gradient.

        Memory is then ``rank`` times that of the parameters, and no longer grows with the number of
        passes. Spectrum and steps stay what they were, up to eigenvalues that are left out
        (:attr:`lost` is their sum). Single samples are no longer known: :meth:`derivatives` and the
        like raise errors, see :func:`backpack.vivit.derivatives_over`.

        Args:
            rank: number of eigenvectors; all above :meth:`resolution` by default.
        """
        parameters = self._group(None)
        values, vectors = self._spectrum(parameters)
        count = int((values > self._resolution(values, parameters)).sum())
        count = count if rank is None else min(rank, count)
        weights = vectors[:, :count].mT
        samples, basis = self._samples(parameters), self._combine_columns(weights, parameters)
        columns = Rows(count, 1)
        for p, b in zip(parameters, basis, strict=True):
            columns.forms[p] = [(slice(0, count), Dense(b.unsqueeze(1)))]
        gradients = Rows(1, 1)
        if self._keeps_gradients:
            for p, g in zip(parameters, self._total(parameters, True), strict=True):
                gradients.forms[p] = [(slice(0, 1), Dense(g[None, None]))]
        self._lost += float(values[count:].clamp(min=0).sum())
        self._merged = True
        sizes = dict.fromkeys(parameters, samples)
        self._passes = [_Pass(sizes, {samples: columns}, {samples: gradients})]
        self._changed()

    def _refuse_merged(self, what: str) -> None:
        if self._merged:
            raise RuntimeError(
                f"{what} are of single samples, which are no longer known after merge(); ask before, "
                "give more memory, or go through the data again (backpack.vivit.derivatives_over)"
            )

    def scale(self, factor: float) -> None:
        """Make the loss ``factor`` times what it was, ``G`` and gradients with it."""
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor!r}")
        for each in self._passes:
            for rows in each.columns.values():
                rows.scale *= factor**0.5
            for rows in each.gradients.values():
                rows.scale *= factor
        self._lost *= factor
        self._changed()

    # ----------------------------------------------------------------------------------
    # Groups and their matrices

    def _group(self, group: Group) -> list[Tensor]:
        if not self._passes:
            raise RuntimeError("no backward pass has run inside this block of LowRank")
        if group is None:
            return self.parameters
        if isinstance(group, nn.Module):
            group = [p for p in group.parameters() if p in self._order]
        parameters = list(group)
        if not parameters:
            raise ValueError("a group has no parameters")
        if len(set(parameters)) < len(parameters):
            raise ValueError("a group names a parameter twice")
        for parameter in parameters:
            if parameter not in self._order:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} took no part in the backward pass "
                    "(frozen, unused, or of another model); leave it out of the group"
                )
        return parameters

    def _sides(self, place: str, parameters: list[Tensor]) -> tuple[list[Rows], list[int]]:
        """Rows of each pass, and its number of samples."""
        if place == "gradients" and not self._keeps_gradients:
            raise RuntimeError("individual gradients are asked for, but gradients=False was given")
        rows, samples = [], []
        for each in self._passes:
            sizes = {each.samples[p] for p in parameters if p in each.samples}
            if len(sizes) > 1:
                raise ValueError(
                    f"parameters of one group meet batches of different sizes, {sorted(sizes)}: their "
                    "samples cannot be matched; ask for groups of one size each"
                )
            for size in sizes:
                rows.append(getattr(each, place)[size])
                samples.append(size)
        return rows, samples

    def _columns(self, parameters: list[Tensor]) -> list[Rows]:
        return self._sides("columns", parameters)[0]

    def _gradients(self, parameters: list[Tensor]) -> list[Rows]:
        return self._sides("gradients", parameters)[0]

    def _samples(self, parameters: list[Tensor]) -> int:
        return sum(self._sides("columns", parameters)[1])

    def _once(
        self, what: str, parameters: list[Tensor], exact: bool, make: Callable[[Any], Any]
    ) -> Any:
        """A matrix of a group, computed once; ``exact``: in double, unless told otherwise."""
        dtype, group = self._precision or (torch.float64 if exact else None), frozenset(parameters)
        for precision in {dtype, torch.float64}:
            if (what, group, precision) in self._known:
                return self._known[what, group, precision]
        found = self._known[what, group, dtype] = make(dtype)
        return found

    def _gram(self, parameters: list[Tensor], exact: bool = False) -> Tensor:
        """``V^T V [R, R]``, in double precision."""
        rows = self._columns(parameters)

        def make(dtype: torch.dtype | None) -> Tensor:
            if not self._joins(parameters):
                return inner(rows, rows, parameters, dtype)
            # The gradient is one more column.
            (mine,), (gradients,) = rows, self._gradients(parameters)
            both = [Beside(mine, gradients)]
            whole, group = inner(both, both, parameters, dtype), frozenset(parameters)
            self._known["slopes", group, dtype] = whole[: mine.count, mine.count :]
            self._known["gradients", group, dtype] = whole[mine.count :, mine.count :]
            return whole[: mine.count, : mine.count]

        return self._once("gram", parameters, exact, make)

    def _joins(self, parameters: list[Tensor]) -> bool:
        """Whether products with individual gradients cost little beside those of columns."""
        if not self._keeps_gradients:
            return False
        rows = self._columns(parameters) + self._gradients(parameters)
        same = len(rows) == 2 and len({(each.samples, each.scale) for each in rows}) == 1
        return same and rows[0].scale == 1 and rows[0].columns > 2

    def _slopes(self, parameters: list[Tensor], exact: bool = False) -> Tensor:
        """``V^T g_n [R, N]``."""
        rows, gradients = self._columns(parameters), self._gradients(parameters)
        make = lambda d: inner(rows, gradients, parameters, d)  # noqa: E731
        return self._once("slopes", parameters, exact, make)

    def _gradient_gram(self, parameters: list[Tensor], exact: bool = False) -> Tensor:
        """``g_n^T g_m [N, N]``."""
        rows = self._gradients(parameters)
        return self._once("gradients", parameters, exact, lambda d: inner(rows, rows, parameters, d))

    def _spectrum(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the Gram matrix, largest first, and its eigenvectors."""

        def make(_: Any) -> tuple[Tensor, Tensor]:
            values, vectors = torch.linalg.eigh(self._gram(parameters))
            return values.flip(0), vectors.flip(1)

        found: tuple[Tensor, Tensor] = self._once("spectrum", parameters, False, make)
        return found

    def _shares(self, parameters: list[Tensor]) -> Tensor:
        """Weights of individual gradients in the gradient, ``[N]``: those of a subset count more."""
        parts = [
            torch.full((rows.samples,), rows.weight, dtype=torch.float64)
            for rows in self._gradients(parameters)
        ]
        return torch.cat(parts).to(parameters[0].device)

    def _combine_columns(
        self, weights: Tensor, parameters: list[Tensor], exact: bool = False
    ) -> list[Tensor]:
        dtype = self._precision or (torch.float64 if exact else None)
        return combine(self._columns(parameters), parameters, weights, dtype)

    def _total(self, parameters: list[Tensor], exact: bool = False) -> list[Tensor]:
        """The gradient, from individual ones."""
        dtype = self._precision or (torch.float64 if exact else None)
        weights = self._shares(parameters).unsqueeze(0)
        found = combine(self._gradients(parameters), parameters, weights, dtype)
        return [each[0] for each in found]

    # ----------------------------------------------------------------------------------
    # Spectrum

    def gram(self, group: Group = None) -> Tensor:
        """``V^T V``, ``[R, R]``; rows are columns times samples, columns first."""
        return self._out(self._gram(self._group(group)), group)

    def gradient_gram(self, group: Group = None, centred: bool = False) -> Tensor:
        """Inner products of individual gradients ``g_n`` (of shares ``l_n``), ``[N, N]``.

        Args:
            group: the parameters.
            centred: whether their mean is subtracted before.
        """
        self._refuse_merged("inner products of gradients")
        parameters = self._group(group)
        found = self._gradient_gram(parameters, exact=centred)
        if centred:
            found = found - found.mean(0)
            found = found - found.mean(1, keepdim=True)
        return self._out(found, parameters)

    def eigvalsh(self, group: Group = None) -> Tensor:
        """Eigenvalues of ``G``, largest first, ``[R]``: all but zeros, and zeros up to that number.

        Those below :meth:`resolution` are rounding noise about zero.
        """
        parameters = self._group(group)

        def make(_: Any) -> Tensor:
            return torch.linalg.eigvalsh(self._gram(parameters)).flip(0)

        if any(key[:2] == ("spectrum", frozenset(parameters)) for key in self._known):
            return self._out(self._spectrum(parameters)[0], parameters)
        return self._out(self._once("values", parameters, False, make), parameters)

    def resolution(self, group: Group = None) -> float:
        """The size below which eigenvalues cannot be told from zero, in their precision."""
        parameters = self._group(group)
        return self._resolution(self.eigvalsh(parameters), parameters)

    def _resolution(self, values: Tensor, parameters: list[Tensor]) -> float:
        largest = float(values[0].clamp(min=0)) if len(values) else 0.0
        count = total_count(self._columns(parameters))
        return count * torch.finfo(self._dtype(parameters)).eps * largest

    def _dtype(self, parameters: list[Tensor]) -> torch.dtype:
        return self._precision or torch.promote_types(parameters[0].dtype, torch.float32)

    def eigh(
        self,
        k: int | None = None,
        group: Group = None,
        *,
        criterion: Callable[[Tensor], Sequence[int]] | None = None,
        method: Literal["gram", "lanczos"] = "gram",
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Leading eigenpairs of ``G``.

        Args:
            k: how many; all above :meth:`resolution` by default.
            group: the parameters.
            criterion: chooses among the eigenvalues, largest first, by their places, in place of ``k``.
            method: ``"gram"`` decomposes the Gram matrix; ``"lanczos"`` multiplies with kept forms,
                for a few pairs where the Gram matrix is too large, or takes too long.
            generator: source of randomness of ``"lanczos"``.

        Returns:
            Pairs; their vectors are computed when they are asked for.

        Warns:
            UserWarning: if a chosen eigenvalue is below :meth:`resolution`; its vector is noise.
        """
        parameters = self._group(group)
        if method == "lanczos":
            if k is None:
                raise ValueError("eigh: method 'lanczos' needs k")
            found = lanczos(_RowProducts(self, parameters), k, generator=generator)
            values, vectors = found.values.double(), found.vectors.mT.double()
            chosen = torch.arange(len(values), device=values.device)
        elif method == "gram":
            values, vectors = self._spectrum(parameters)
            chosen = self._choose(values, k, criterion, parameters)
        else:
            raise ValueError(f"eigh: method must be 'gram' or 'lanczos', got {method!r}")
        least = self._resolution(values, parameters)
        values, vectors = values[chosen], vectors[:, chosen]
        noise = int((values <= least).sum())
        if noise:
            warnings.warn(
                f"{noise} of {len(values)} eigenvalues are not above {least:.1e}, the resolution of "
                "the Gram matrix, and cannot be told from zero: their eigenvectors are rounding noise. "
                "Ask for fewer, or give precision=torch.float64",
                stacklevel=2,
            )
        return Pairs(self._out(values, parameters), parameters, self, vectors, self._state)

    def _choose(
        self,
        values: Tensor,
        k: int | None,
        criterion: Callable[[Tensor], Sequence[int]] | None,
        parameters: list[Tensor],
    ) -> Tensor:
        """Places of eigenvalues."""
        if criterion is not None:
            places = [int(place) for place in criterion(self._out(values, parameters))]
            return torch.tensor(places, dtype=torch.long, device=values.device)
        least = self._resolution(values, parameters)
        count = int((values > least).sum()) if k is None else min(k, len(values))
        return torch.arange(count, device=values.device)

    def trace(self, group: Group = None) -> Tensor:
        """Trace of ``G``."""
        parameters = self._group(group)
        norms = squared_norms(self._columns(parameters), parameters, self._precision)
        return self._out(norms.sum(), parameters)

    def logdet(self, damping: float, group: Group = None) -> Tensor:
        """``log det(G + damping I)``, of the whole ``[D, D]`` matrix."""
        parameters = self._group(group)
        values = torch.linalg.eigvalsh(self._gram(parameters, exact=True)).clamp(min=0)
        size = sum(p.numel() for p in parameters)
        delta = _positive(damping)
        rest = (size - len(values)) * values.new_tensor(delta).log()
        return self._out((values + delta).log().sum() + rest, parameters)

    def effective_dimension(self, damping: float, group: Group = None) -> Tensor:
        """``sum_i lambda_i / (lambda_i + damping)``: how many directions the data determine."""
        parameters = self._group(group)
        values = torch.linalg.eigvalsh(self._gram(parameters, exact=True)).clamp(min=0)
        return self._out((values / (values + _positive(damping))).sum(), parameters)

    # ----------------------------------------------------------------------------------
    # Directions

    def derivatives(self, directions: Pairs | Sequence[Tensor], group: Group = None) -> Derivatives:
        """Slope and curvature of every sample's loss along directions.

        They are of ``N`` times each sample's share of the loss, which is that sample's own loss where
        the loss is a mean: so their means over samples are ``e^T g`` and ``e^T G e``.

        Args:
            directions: eigenpairs, or tensors ``[K, *p]`` for each parameter of the group.
            group: the parameters, where directions are tensors.
        """
        self._refuse_merged("slopes and curvatures")
        parameters, slopes, roots = self._along(directions, group)
        count = self._samples(parameters)
        gammas = slopes * count
        parts, first = [], 0
        for rows in self._columns(parameters):
            part = roots[first : first + rows.count].unflatten(0, (rows.columns, rows.samples))
            parts.append(part.square().sum(0) * (count / rows.scale**2))
            first += rows.count
        return Derivatives(self._out(gammas, parameters), self._out(torch.cat(parts), parameters))

    def _along(
        self, directions: Pairs | Sequence[Tensor], group: Group
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Parameters, ``g_n^T e_k [N, K]`` and ``V^T e_k [R, K]``."""
        if isinstance(directions, Pairs) and directions.curvature is self and directions.current:
            parameters = directions.parameters
            lengths = directions.values.double().clamp(min=0).sqrt()
            roots = directions.coefficients * lengths
            slopes = self._slopes(parameters).mT @ directions.coefficients
            tiny = torch.finfo(torch.float64).tiny
            return parameters, slopes / lengths.clamp(min=tiny), roots
        if isinstance(directions, Pairs):
            parameters, vectors = self._group(directions.parameters), directions.vectors
        else:
            parameters, vectors = self._group(group), list(directions)
        _fit(vectors, parameters, 1)
        slopes = project(self._gradients(parameters), parameters, vectors, self._precision)
        roots = project(self._columns(parameters), parameters, vectors, self._precision)
        return parameters, slopes.mT, roots.mT

    def share(self, directions: Pairs) -> Tensor:
        """The part of the gradient along each direction, ``(e_k^T g)^2 / |g|^2``, ``[K]``."""
        parameters, slopes, _ = self._along(directions, None)
        shares = self._shares(parameters)
        whole = shares @ self._gradient_gram(parameters) @ shares
        return self._out((shares @ slopes).square() / whole, parameters)

    def newton(self, pairs: Pairs, damping: Any, *, bulk: float | None = None) -> list[Tensor]:
        """The damped Newton step in the space of some eigenvectors.

        ``s = sum_k -gamma_k / (lambda_k + delta_k) e_k``, with means of slopes and curvatures over
        samples; with ``bulk`` a gradient step ``-1/bulk`` times what is left of the gradient is added.

        Args:
            pairs: eigenpairs of this curvature.
            damping: ``delta``: a number, ``[K]``, or a function of pairs and their derivatives.
            bulk: the damping outside of their space.

        Returns:
            One tensor for each parameter of the group.
        """
        if pairs.curvature is not self or not pairs.current:
            raise ValueError("newton takes eigenpairs of the same curvature, as it is now")
        parameters, slopes, _ = self._along(pairs, None)
        gammas = self._shares(parameters) @ slopes
        delta = damping(pairs, self.derivatives(pairs)) if callable(damping) else damping
        lambdas = pairs.values.double()
        along = -gammas / (lambdas + torch.as_tensor(delta).to(lambdas))
        if bulk is not None:
            along = along + gammas / _positive(bulk)
        lengths = pairs.values.double().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        weights = (pairs.coefficients @ (along / lengths)).unsqueeze(0)
        step = [each[0] for each in self._combine_columns(weights, parameters, bulk is not None)]
        if bulk is not None:
            gradient = self._total(parameters, True)
            step = [s - g / bulk for s, g in zip(step, gradient, strict=True)]
        return _like(step, parameters)

    # ----------------------------------------------------------------------------------
    # Solving

    def solve(
        self, damping: float, vectors: Sequence[Tensor] | None = None, group: Group = None
    ) -> list[Tensor]:
        """``(G + damping I)^-1 g``, exactly, by the matrix inversion lemma.

        ``[g - V (damping I + V^T V)^-1 V^T g] / damping``.

        Args:
            damping: positive.
            vectors: one tensor for each parameter of the group in place of the gradient ``g``.
            group: the parameters.

        Returns:
            One tensor for each parameter of the group.
        """
        parameters, delta = self._group(group), _positive(damping)
        if vectors is None:
            right = [g.double() for g in self._total(parameters, True)]
            products = self._slopes(parameters, True) @ self._shares(parameters)
        else:
            right = [v.double() for v in vectors]
            _fit(right, parameters, 0)
            lifted = [v.unsqueeze(0) for v in right]
            dtype = self._precision or torch.float64
            products = project(self._columns(parameters), parameters, lifted, dtype)[0]
        weights = self._inverse(parameters, delta, products.unsqueeze(1)).mT
        inside = self._combine_columns(weights, parameters, True)
        return _like([(g - v[0]) / delta for g, v in zip(right, inside, strict=True)], parameters)

    def _inverse(self, parameters: list[Tensor], delta: float, right: Tensor) -> Tensor:
        """``(delta I + V^T V)^-1`` times columns."""
        gram = self._gram(parameters, exact=True)
        damped = gram + delta * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            raise ValueError(
                f"damping {delta:g} is below the rounding errors of the Gram matrix; take a larger "
                "one, or precision=torch.float64"
            )
        return torch.cholesky_solve(right, factor)

    def influence(
        self,
        test: LowRank | Sequence[int] | None = None,
        train: Sequence[int] | None = None,
        damping: float = 1e-3,
        group: Group = None,
    ) -> Tensor:
        """``g_t^T (G + damping I)^-1 g_s`` of individual gradients, ``[tests, trains]``.

        To first order, the loss of ``t`` rises by that much if ``s`` is left out (Koh, Liang, 2017).
        Gradients are those of shares of the loss: of a mean over ``N``, ``1/N`` of each sample's own.

        Args:
            test: the curvature whose samples are tests (``columns=None`` suffices), or places of
                samples of this one; all by default.
            train: places of samples of this one; all by default.
            damping: positive.
            group: the parameters.
        """
        self._refuse_merged("influences")
        parameters, delta = self._group(group), _positive(damping)
        slopes = self._slopes(parameters, True)
        if isinstance(test, LowRank):
            test._refuse_merged("influences")
            dtype = self._precision or torch.float64
            others = test._gradients(test._group(parameters))
            direct = inner(others, self._gradients(parameters), parameters, dtype)
            left = inner(self._columns(parameters), others, parameters, dtype)
        else:
            direct, left = self._gradient_gram(parameters, True), slopes
            if test is not None:
                direct, left = direct[list(test)], left[:, list(test)]
        if train is not None:
            direct, slopes = direct[:, list(train)], slopes[:, list(train)]
        found = (direct - left.mT @ self._inverse(parameters, delta, slopes)) / delta
        return self._out(found, parameters)

    def covariance(self, test: LowRank, damping: float, group: Group = None) -> Tensor:
        """Covariance of a network's outputs if its parameters have covariance ``(G + damping I)^-1``.

        The predictive covariance of a linearized Laplace approximation, for a loss that is the negative
        log likelihood of all data (``N`` times a mean) and a prior of precision ``damping``.

        Args:
            test: ``LowRank("jacobian")`` of the inputs to predict at.
            damping: positive.
            group: the parameters.

        Returns:
            ``[tests, C, C]``.
        """
        parameters, delta = self._group(group), _positive(damping)
        dtype = self._precision or torch.float64
        outputs, mine = test._columns(test._group(parameters)), self._columns(parameters)
        parts, first = [], 0
        left = inner(mine, outputs, parameters, dtype)
        solved = self._inverse(parameters, delta, left)
        for rows in outputs:
            here = slice(first, first + rows.count)
            first += rows.count
            shape = rows.columns, rows.samples
            direct = inner([rows], [rows], parameters, dtype).reshape(*shape, *shape)
            a, b = (x[:, here].reshape(-1, *shape) for x in (left, solved))
            part = direct.diagonal(0, 1, 3).movedim(2, 0) - torch.einsum("rcn,rdn->ncd", a, b)
            parts.append(part / delta)
        return self._out(torch.cat(parts), parameters)

    def operator(self, group: Group = None) -> Operator:
        """``G`` as a linear map, from kept forms: two contractions for each product, and no graph."""
        return _Products(self, self._group(group))

    def _out(self, x: Tensor, group: Any) -> Tensor:
        """A result, in the precision of the parameters."""
        parameters = group if isinstance(group, list) else self._group(group)
        return x.to(torch.promote_types(parameters[0].dtype, torch.float32))


class _Products(Operator):
    """``V V^T``."""

    def __init__(self, curvature: LowRank, parameters: list[Tensor]) -> None:
        self.curvature, self.parameters = curvature, parameters

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        rows = self.curvature._columns(self.parameters)
        weights = project(rows, self.parameters, vectors, self.curvature._precision)
        return combine(rows, self.parameters, weights, self.curvature._precision)


class _RowProducts:
    """``V^T V``, which is smaller."""

    def __init__(self, curvature: LowRank, parameters: list[Tensor]) -> None:
        self.curvature, self.parameters = curvature, parameters
        count = total_count(curvature._columns(parameters))
        self.shape = count, count
        self.like = parameters[0].new_zeros((), dtype=curvature._dtype(parameters))

    def __matmul__(self, x: Tensor) -> Tensor:
        rows, precision = self.curvature._columns(self.parameters), self.curvature._precision
        vectors = combine(rows, self.parameters, x.unsqueeze(0), precision)
        return project(rows, self.parameters, vectors, precision)[0].to(x)


# --------------------------------------------------------------------------------------
# Arguments


def source_of(
    columns: Any, mc_samples: int = 1, top: int = 1, generator: torch.Generator | None = None
) -> ColumnSource | None:
    """The source that is called so.

    Raises:
        ValueError: if there is none.
    """
    for name, count in (("mc_samples", mc_samples), ("top", top)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
    if columns is None or isinstance(columns, ColumnSource):
        return columns
    known = {
        "exact": ExactRoot(),
        "mc": SampledRoot(mc_samples, generator),
        "top": LeadingRoot(top),
        "jacobian": OutputBasis(),
    }
    if columns not in known:
        raise ValueError(f"columns must be one of {[*known]}, None or a source, got {columns!r}")
    return known[columns]


def _checked(subsampling: Sequence[int] | None) -> list[int] | None:
    if subsampling is None:
        return None
    found = [int(each) for each in subsampling]
    if len(set(found)) < len(found):
        raise ValueError(f"subsampling {found} names a sample twice")
    return found


def _positive(damping: float) -> float:
    delta = float(damping)
    if not delta > 0:
        raise ValueError(f"damping must be positive, got {damping!r}")
    return delta


def _fit(vectors: Sequence[Tensor], parameters: Sequence[Tensor], lead: int) -> None:
    shapes = [v.shape[lead:] for v in vectors]
    counts = {v.shape[:lead] for v in vectors}
    if shapes != [p.shape for p in parameters] or len(counts) > 1:
        before = "K, " if lead else ""
        raise ValueError(
            f"vectors of shapes {[list(v.shape) for v in vectors]} do not fit the parameters of the "
            f"group, [{before}*p] for p of {[list(p.shape) for p in parameters]}"
        )


def _like(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(p.dtype) for t, p in zip(tensors, parameters, strict=True)]


def assembled(
    columns: dict[Tensor, Kept],
    gradients: dict[Tensor, Kept],
    sizes: Sequence[int],
    first: int,
    subsampling: tuple[list[int] | None, list[int] | None],
) -> LowRank:
    """Curvature from forms that were kept otherwise.

    Args:
        columns: of each parameter.
        gradients: of each parameter, or of none.
        sizes: number of columns of each chunk.
        first: the first chunk that counts.
        subsampling: the samples of either.
    """
    found = LowRank(None, gradients=bool(gradients))
    found._subsampling = subsampling
    shifted = {
        p: kept._replace(pieces=[each._replace(chunk=each.chunk - first) for each in kept.pieces])
        for p, kept in columns.items()
    }
    found._take(_Collected(shifted, gradients), sizes[first:])
    return found


def _delivery(collected: _Collected, place: str) -> Callable[[Tensor, Kept], None]:
    """Where :class:`Keep` brings forms; refers to nothing but what one pass leaves."""

    def deliver(parameter: Tensor, kept: Kept) -> None:
        collected.take(place, parameter, kept)

    return deliver
