"""Curvature of low rank, its noise, and steps with it, from forms that one backward pass leaves.

Letters: ``N`` samples, ``D`` numbers of a group of parameters, ``R`` rows of ``V^T`` (columns times
samples), ``K`` directions, ``l_n`` the n-th sample's share of the loss.

``G = V V^T`` has the non-zero eigenvalues of the Gram matrix ``V^T V``, ``[R, R]``; with that and the
products of ``V`` with individual gradients, all else is algebra of small matrices. Idea and scales:
Dangel, Tatzel, Hennig, ViViT, arXiv:2106.02624.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from backpack.own import BackpropExtension, ColumnSource, Dense
from backpack.vivit.eigenpairs import Derivatives, Eigenpairs, Noise
from backpack.vivit.kept import Kept
from backpack.vivit.lanczos import lanczos
from backpack.vivit.matrices import Group, fit, like, positive
from backpack.vivit.operators import Operator
from backpack.vivit.passes import Collected, Pass, checked, source_of
from backpack.vivit.rows import Rows, combine, project, squared_norms, total_count
from backpack.vivit.systems import Systems

__all__ = ["Derivatives", "LowRank", "Noise", "Eigenpairs", "assembled", "source_of"]


class LowRank(Systems):
    """The generalized Gauss-Newton matrix as a product of thin matrices, ``G = V V^T``.

    Example:
        >>> from torch import nn
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
        source = source_of(columns, mc_samples, top, generator)
        samples = checked(subsampling), checked(subsampling_grad)
        super().__init__(source, samples, gradients, precision, extensions, options)

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
        self._passes = [Pass(sizes, {samples: columns}, {samples: gradients})]
        self._changed()

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
            gram = self._gram(parameters).to(self._dtype(parameters))
            return torch.linalg.eigvalsh(gram).flip(0).double()

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

    def eigh(
        self,
        k: int | None = None,
        group: Group = None,
        *,
        criterion: Callable[[Tensor], Sequence[int]] | None = None,
        method: Literal["gram", "lanczos"] = "gram",
        generator: torch.Generator | None = None,
    ) -> Eigenpairs:
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
        return Eigenpairs(self._out(values, parameters), parameters, self, vectors, self._state)

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
        delta = positive(damping)
        rest = (size - len(values)) * values.new_tensor(delta).log()
        return self._out((values + delta).log().sum() + rest, parameters)

    def effective_dimension(self, damping: float, group: Group = None) -> Tensor:
        """``sum_i lambda_i / (lambda_i + damping)``: how many directions the data determine."""
        parameters = self._group(group)
        values = torch.linalg.eigvalsh(self._gram(parameters, exact=True)).clamp(min=0)
        return self._out((values / (values + positive(damping))).sum(), parameters)

    # ----------------------------------------------------------------------------------
    # Directions

    def derivatives(
        self, directions: Eigenpairs | Sequence[Tensor], group: Group = None
    ) -> Derivatives:
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
        self, directions: Eigenpairs | Sequence[Tensor], group: Group
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Parameters, ``g_n^T e_k [N, K]`` and ``V^T e_k [R, K]``."""
        if isinstance(directions, Eigenpairs) and directions.curvature is self and directions.current:
            parameters = directions.parameters
            lengths = directions.values.double().clamp(min=0).sqrt()
            roots = directions.coefficients * lengths
            slopes = self._slopes(parameters).mT @ directions.coefficients
            tiny = torch.finfo(torch.float64).tiny
            return parameters, slopes / lengths.clamp(min=tiny), roots
        if isinstance(directions, Eigenpairs):
            parameters, vectors = self._group(directions.parameters), directions.vectors
        else:
            parameters, vectors = self._group(group), list(directions)
        fit(vectors, parameters, 1)
        slopes = project(self._gradients(parameters), parameters, vectors, self._precision)
        roots = project(self._columns(parameters), parameters, vectors, self._precision)
        return parameters, slopes.mT, roots.mT

    def share(self, directions: Eigenpairs) -> Tensor:
        """The part of the gradient along each direction, ``(e_k^T g)^2 / |g|^2``, ``[K]``."""
        parameters, slopes, _ = self._along(directions, None)
        shares = self._shares(parameters)
        whole = shares @ self._gradient_gram(parameters) @ shares
        return self._out((shares @ slopes).square() / whole, parameters)

    def newton(self, pairs: Eigenpairs, damping: Any, *, bulk: float | None = None) -> list[Tensor]:
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
            along = along + gammas / positive(bulk)
        lengths = pairs.values.double().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        weights = (pairs.coefficients @ (along / lengths)).unsqueeze(0)
        step = [each[0] for each in self._combine_columns(weights, parameters, bulk is not None)]
        if bulk is not None:
            gradient = self._total(parameters, True)
            step = [s - g / bulk for s, g in zip(step, gradient, strict=True)]
        return like(step, parameters)

    def operator(self, group: Group = None) -> Operator:
        """``G`` as a linear map, from kept forms: two contractions for each product, and no graph."""
        return _Products(self, self._group(group))


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
    found._take(Collected(shifted, gradients), sizes[first:])
    return found
