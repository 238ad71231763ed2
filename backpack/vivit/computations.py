"""The computations of vivit-for-pytorch, by its names, with its shapes and orders.

A computation gives extensions and a hook to ``backpack(...)``, and results afterwards:

    computation, groups = EighComputation(), [{"params": [...], "criterion": lambda evals: [-1]}]
    with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook(groups)):
        loss.backward()
    evals, evecs = computation.get_result(groups[0])

Letters: ``N`` samples, ``C`` columns (model outputs, or random ones), ``K`` directions. Eigenvalues are
in ascending order, the zeros among the ``C N`` included; results of a group are there as soon as
backward has passed its last parameter. Here losses may have any reduction, and any number of random
columns serves all computations. :class:`~backpack.vivit.LowRank` does the same and more, without groups
that are fixed before the pass. The idea: Dangel, Tatzel, Hennig, ViViT, arXiv:2106.02624.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backpack.own import BackpropExtension, LossGradient
from backpack.vivit.kept import Keep, Kept, Numbered
from backpack.vivit.lowrank import Eigenpairs, LowRank, assembled, source_of

ParameterGroup = dict[str, Any]
Hook = Callable[[nn.Module], None]


class _Computation:
    """What the computations share: extensions, checks of groups, the hook, results.

    Attributes:
        keys: what a group must have.
    """

    keys: ClassVar[tuple[str, ...]] = ("params", "criterion")

    def __init__(
        self,
        subsampling_grad: Sequence[int] | None,
        subsampling_ggn: Sequence[int] | None,
        mc_samples: int,
        verbose: bool,
        warn_small_eigvals: float = 0.0,
    ) -> None:
        for name, subsampling in (("gradients", subsampling_grad), ("the GGN", subsampling_ggn)):
            if subsampling is not None and len(set(subsampling)) < len(subsampling):
                raise ValueError(f"subsampling of {name} must be unique, got {list(subsampling)}")
        if isinstance(mc_samples, bool) or not isinstance(mc_samples, int) or mc_samples < 0:
            raise ValueError(f"mc_samples must be an integer, zero for exact, got {mc_samples!r}")
        self._subsampling = (
            None if subsampling_ggn is None else list(subsampling_ggn),
            None if subsampling_grad is None else list(subsampling_grad),
        )
        self._mc_samples, self._verbose = mc_samples, verbose
        self._warn_small_eigvals = warn_small_eigvals
        self._field = "vivit_ggn_mc" if mc_samples else "vivit_ggn_exact"
        self._fields: tuple[str, ...] = (self._field,)
        self._source: Numbered | None = None
        self._results: dict[int, Any] = {}

    def _columns(self) -> BackpropExtension:
        source = source_of("mc" if self._mc_samples else "exact", self._mc_samples or 1)
        self._source = Numbered(source, every_column=True)
        return Keep(self._field, self._source, self._subsampling[0])

    def get_extension_hook(self, param_groups: Sequence[ParameterGroup]) -> Hook:
        """The hook for ``backpack(..., extension_hook=...)``, good for one backward pass.

        Args:
            param_groups: groups of parameters, dictionaries with ``"params"`` and what else the
                computation needs. Parameters in none are left out.

        Raises:
            ValueError: if a group lacks a key, or a parameter is in two groups.
        """
        groups = list(param_groups)
        for group in groups:
            missing = [key for key in self.keys if key not in group]
            if missing:
                raise ValueError(f"a parameter group lacks {missing}; it has {sorted(group)}")
        parameters = [p for group in groups for p in group["params"]]
        if len(set(parameters)) < len(parameters):
            raise ValueError("a parameter is in two groups, or twice in one")
        for group in groups:
            self._results.pop(id(group), None)
        return _Collector(self, groups)

    def get_result(self, param_group: ParameterGroup) -> Any:
        """The result for a group.

        Raises:
            KeyError: if there is none: the hook has not seen all parameters of the group.
        """
        try:
            return self._results[id(param_group)]
        except KeyError as error:
            raise KeyError("No results available for this group") from error

    def _finish(self, group: ParameterGroup, found: dict[str, dict[Tensor, Kept]]) -> None:
        """All parameters of a group are there."""
        columns, sizes = found[self._field], self._source.sizes if self._source else []
        begun = self._source.begun if self._source else 0
        used = [piece.chunk for kept in columns.values() for piece in kept.pieces]
        curvature = assembled(
            columns, found.get(GRADIENTS, {}), sizes, min([begun, *used]), self._subsampling
        )
        if self._verbose:
            shapes = [list(p.shape) for p in group["params"]]
            print(f"{type(self).__name__}: a group is complete, parameters of shapes {shapes}")
        self._results[id(group)] = self._result(group, curvature)

    def _result(self, group: ParameterGroup, curvature: LowRank) -> Any:
        raise NotImplementedError

    def _pairs(self, group: ParameterGroup, curvature: LowRank) -> Eigenpairs:
        """The pairs that a group's criterion keeps, in its order."""
        parameters = list(group["params"])
        values, vectors = curvature._spectrum(parameters)
        values, vectors = values.flip(0), vectors.flip(1)
        shown = curvature._out(values, parameters)
        keep = [int(place) for place in group["criterion"](shown)]
        chosen = torch.tensor(keep, dtype=torch.long, device=values.device)
        if self._warn_small_eigvals:
            small = shown[chosen].abs() < self._warn_small_eigvals
            if bool(small.any()):
                warnings.warn(
                    f"{int(small.sum())} of the kept eigenvalues are smaller than "
                    f"{self._warn_small_eigvals:g} ({shown[chosen][small].tolist()[:5]}): eigenvectors "
                    "and all that is divided by them are unstable",
                    stacklevel=2,
                )
        if self._verbose:
            print(f"{type(self).__name__}: {len(keep)} of {len(values)} eigenvalues are kept")
        return Eigenpairs(shown[chosen], parameters, curvature, vectors[:, chosen], curvature._state)


GRADIENTS = "vivit_grad_batch"


class _Collector:
    """The extension hook: takes what is kept of each parameter, until a group is complete."""

    def __init__(self, computation: _Computation, groups: list[ParameterGroup]) -> None:
        self.computation = computation
        self.waiting = [(group, set(group["params"])) for group in groups]
        self.found: dict[int, dict[str, dict[Tensor, Kept]]] = {
            id(group): {name: {} for name in computation._fields} for group in groups
        }

    def __call__(self, module: nn.Module) -> None:
        own = set(module.parameters(recurse=False))
        for group, waiting in self.waiting:
            fields = self.found.get(id(group))
            for parameter in own & waiting:
                if fields is not None and all(name in vars(parameter) for name in fields):
                    for name, kept in fields.items():
                        kept[parameter] = vars(parameter).pop(name)
                    waiting.discard(parameter)
            if fields is not None and not waiting:
                del self.found[id(group)]
                self.computation._finish(group, fields)


class EigvalshComputation(_Computation):
    """Eigenvalues of the GGN of groups of parameters: ``{"params": [...]}``.

    Results are vectors ``[C N]``, ascending.

    Args:
        subsampling: samples of which the GGN is taken; it is scaled to stand for that of all.
        mc_samples: number of random columns; zero for exact ones.
        verbose: whether to print what is done.
    """

    keys = ("params",)

    def __init__(
        self,
        subsampling: Sequence[int] | None = None,
        mc_samples: int = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(None, subsampling, mc_samples, verbose)

    def get_extension(self) -> BackpropExtension:
        """The extension for ``backpack(...)``."""
        return self._columns()

    def _result(self, group: ParameterGroup, curvature: LowRank) -> Tensor:
        return curvature.eigvalsh(group["params"]).flip(0)


class EighComputation(_Computation):
    """Eigenvalues and eigenvectors of the GGN of groups: ``{"params": [...], "criterion": f}``.

    ``criterion`` is given all eigenvalues, ascending, and names the places of those to keep. Results
    are pairs ``(evals [K], evecs)``, with a tensor ``[K, *p]`` in ``evecs`` for each parameter.

    Args:
        subsampling: samples of which the GGN is taken.
        mc_samples: number of random columns; zero for exact ones.
        verbose: whether to print what is done.
        warn_small_eigvals: warn if a kept eigenvalue is smaller; zero: never.
    """

    def __init__(
        self,
        subsampling: Sequence[int] | None = None,
        mc_samples: int = 0,
        verbose: bool = False,
        warn_small_eigvals: float = 1e-4,
    ) -> None:
        super().__init__(None, subsampling, mc_samples, verbose, warn_small_eigvals)

    def get_extension(self) -> BackpropExtension:
        """The extension for ``backpack(...)``."""
        return self._columns()

    def _result(self, group: ParameterGroup, curvature: LowRank) -> tuple[Tensor, list[Tensor]]:
        pairs = self._pairs(group, curvature)
        return pairs.values, pairs.vectors


class _Directional(_Computation):
    def __init__(
        self,
        subsampling_grad: Sequence[int] | None = None,
        subsampling_ggn: Sequence[int] | None = None,
        mc_samples_ggn: int = 0,
        verbose: bool = False,
        warn_small_eigvals: float = 1e-4,
    ) -> None:
        super().__init__(subsampling_grad, subsampling_ggn, mc_samples_ggn, verbose, warn_small_eigvals)
        self._fields = (self._field, GRADIENTS)

    def get_extensions(self) -> list[BackpropExtension]:
        """The extensions for ``backpack(*...)``: individual gradients, and columns of the GGN."""
        gradients = Keep(GRADIENTS, LossGradient(), self._subsampling[1])
        return [gradients, self._columns()]


class DirectionalDerivativesComputation(_Directional):
    """Slopes and curvatures along eigenvectors: ``{"params": [...], "criterion": f}``.

    Results are pairs ``(gammas [N, K], lambdas [N, K])``, of each sample of either subset; their means
    are slope and curvature of the loss. Signs of ``gammas`` are arbitrary.

    Args:
        subsampling_grad: samples whose gradients are taken.
        subsampling_ggn: samples of which the GGN is taken.
        mc_samples_ggn: number of random columns; zero for exact ones.
        verbose: whether to print what is done.
        warn_small_eigvals: warn if a kept eigenvalue is smaller; zero: never.
    """

    def _result(self, group: ParameterGroup, curvature: LowRank) -> tuple[Tensor, Tensor]:
        found = curvature.derivatives(self._pairs(group, curvature))
        return found.gammas, found.lambdas


class DirectionalDampedNewtonComputation(_Directional):
    """Damped Newton steps ``sum_k -gamma_k / (lambda_k + delta_k) e_k`` along eigenvectors.

    Groups are ``{"params": [...], "criterion": f, "damping": d}``. ``d(evals [K], gram_evecs [C N, K],
    gammas [N, K], lambdas [N, K])`` gives a damping for each direction, ``[K]``. Results are lists of
    tensors, one for each parameter of the group.

    Args:
        subsampling_grad: samples whose gradients are taken.
        subsampling_ggn: samples of which the GGN is taken.
        mc_samples_ggn: number of random columns; zero for exact ones.
        verbose: whether to print what is done.
        warn_small_eigvals: warn if a kept eigenvalue is smaller; zero: never.
    """

    keys = ("params", "criterion", "damping")

    def _result(self, group: ParameterGroup, curvature: LowRank) -> list[Tensor]:
        pairs = self._pairs(group, curvature)

        def damping(pairs: Eigenpairs, found: Any) -> Tensor:
            vectors = pairs.coefficients.to(pairs.values)
            return group["damping"](pairs.values, vectors, found.gammas, found.lambdas)

        return curvature.newton(pairs, damping)
