"""Differentially private gradient descent, by the norms of individual gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from backpack.backprop import Graph, survey
from backpack.engine import backpack
from backpack.extensions import BatchL2Grad
from backpack.optim.base import BackpackOptimizer, Params, State


class DPSGD(BackpackOptimizer):
    """Differentially private SGD (Abadi et al., 2016, arXiv:1607.00133, algorithm 1).

        ``theta <- theta - lr (1/B (sum_n min(1, C / |g_n|) g_n + sigma C z) + l2 theta)``

    ``g_n`` is the gradient of the n-th sample's own loss in all parameters together (of all groups),
    ``C`` is ``max_grad_norm``, ``sigma`` the ``noise_multiplier``, ``z`` standard normal, ``B`` the
    ``expected_batch_size``. No individual gradient is written out: norms come with one backward pass,
    and a second one of the weighted losses gives the clipped sum (Li et al., 2022, arXiv:2110.05679).

        >>> model, X, y = torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0])
        >>> optimizer = DPSGD(
        ...     model, lr=0.1, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=64
        ... )
        >>> losses = torch.nn.functional.cross_entropy(model(X), y, reduction="none")
        >>> norms = optimizer.backward(losses)
        >>> optimizer.step()

    :meth:`backward` may be called several times before :meth:`step`, for parts of a batch, and must be
    called once for an empty batch (``losses`` of no entries), whose step is noise alone. ``p.grad`` is
    neither read nor written, so that nothing private enters by ``loss.backward()``.

    The guarantee needs Poisson sampling with rate ``q = B / (size of the data set)`` (each sample is in
    the batch with probability ``q``, by itself), and counts one step for each call of :meth:`step`; see
    :func:`epsilon`. Noise has the precision of the parameters, and is torch's, which is no
    cryptographic source. Clipped gradients have norms up to ``max_grad_norm``, but for rounding in the
    precision that the model computes in: 0.5 % in bfloat16.

    Every loss must depend on its own sample only. Batch normalization in training mode, and layers that
    keep statistics of the data, are errors, below frozen layers too; what else mixes samples before the
    first trained parameter leaves no trace and is not seen.

    Args:
        params: a model (extended in place unless it is already), or parameters of extended models as
            any ``torch.optim.Optimizer`` takes them, groups included.
        lr: learning rate.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``; at least 0.
        max_grad_norm: the norm that gradients of samples are clipped to.
        expected_batch_size: the mean number of samples in a batch, whatever a batch holds.
        l2: weight of ``l2 / 2 |theta|^2``, which is added to the loss, and needs no privacy.
        momentum: factor of the last step's direction, ``m <- momentum m + d``.
        generator: source of the noise, on the parameters' device; default torch's own.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        l2: float = 0.0,
        momentum: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value, fits in (
            ("noise_multiplier", noise_multiplier, noise_multiplier >= 0),
            ("max_grad_norm", max_grad_norm, max_grad_norm > 0),
            ("expected_batch_size", expected_batch_size, expected_batch_size > 0),
        ):
            if not fits or value == float("inf"):
                raise ValueError(f"DPSGD: {name} is out of range, got {value!r}")
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.expected_batch_size = expected_batch_size
        self.generator = generator
        # Sums of clipped gradients since the last step; None before the first backward pass.
        self._sums: dict[Tensor, Tensor] | None = None
        super().__init__(params, {"lr": lr, "l2": l2, "momentum": momentum})

    def _own(self) -> tuple[str, ...]:
        options = "noise_multiplier", "max_grad_norm", "expected_batch_size", "generator", "_sums"
        return (*super()._own(), *options)

    def backward(self, losses: Tensor) -> Tensor:
        """Add the samples' clipped gradients to those of the next step.

        Frees the graph. If it raises, nothing is added.

        Args:
            losses: each sample's own loss, ``[N]`` (``reduction="none"``); ``N`` may be 0.

        Returns:
            Norms of the samples' gradients before clipping, ``[N]``. They are not private.

        Raises:
            ValueError: if ``losses`` is not one finite number for each sample, or is not in single or
                double precision.
            RuntimeError: if a parameter enters the losses other than through an extended model, or has
                a hook that would change its clipped gradient.
            NotImplementedError: if the model mixes samples, or keeps statistics of them.
        """
        if losses.dim() != 1:
            raise ValueError(
                f"DPSGD.backward expects one loss for each sample, [N], but got {list(losses.shape)}; "
                "use reduction='none', and add up what belongs to one sample"
            )
        if losses.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"losses in {losses.dtype} are too coarse to be weighted; compute them in float32"
            )
        if not len(losses):
            self._sums = {} if self._sums is None else self._sums
            return losses.detach()
        parameters = [p for p, _ in self._trained()]
        nothing = "the losses do not depend on any parameter that is trained"
        if losses.grad_fn is None or not parameters:
            raise ValueError(nothing)
        graph = survey([losses.grad_fn], curvature=False)
        _check_statistics(graph)
        for p in parameters:
            if p._backward_hooks:
                raise RuntimeError(
                    f"parameter {self._name(p)} has a gradient hook, which would change its "
                    "clipped gradient; remove the hook"
                )
            if p in graph.outside:
                raise RuntimeError(
                    f"parameter {self._name(p)} enters the losses outside of an extended model, where "
                    "no sample's share is seen; extend the model before its forward pass, and use the "
                    "argument l2 for weight decay"
                )
        try:
            with torch.enable_grad(), backpack(BatchL2Grad(), gradient=False):
                losses.sum().backward(retain_graph=True, inputs=parameters)
            used = [p for p in parameters if hasattr(p, "batch_l2")]
            if not used:
                raise ValueError(nothing)
            norms = self._norms(used, losses)
        finally:
            for p in parameters:
                p.__dict__.pop("batch_l2", None)
        factors = self.max_grad_norm / norms.clamp(min=self.max_grad_norm)
        clipped = torch.autograd.grad(losses, used, factors)
        sums = dict(self._sums or {})
        for p, g in zip(used, clipped, strict=True):
            g = g.to_dense() if g.is_sparse else g
            sums[p] = sums[p] + g if p in sums else g
        self._sums = sums
        return norms

    def _norms(self, used: list[Tensor], losses: Tensor) -> Tensor:
        squares = losses.new_zeros(len(losses)).detach()
        for p in used:
            found: Tensor = p.batch_l2  # type: ignore[attr-defined]
            if len(found) != len(losses):
                raise ValueError(
                    f"there are {len(losses)} losses, but the model saw {len(found)} samples; give one "
                    "loss for each sample"
                )
            squares = squares + found.to(squares)
        if not bool(torch.isfinite(squares).all()):
            raise ValueError("the gradient of a sample is not finite")
        # A sum of products of terms that cancel may come out below zero.
        return squares.clamp(min=0).sqrt()

    def _directions(self) -> list[tuple[Tensor, Tensor, dict[str, Any], State]]:
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "DPSGD clips the gradients of the losses it is given, which a gradient scaler would "
                "change; train in float32 or bfloat16 without a scaler"
            )
        if self._sums is None:
            raise RuntimeError("call optimizer.backward(losses) before optimizer.step()")
        moves: list[tuple[Tensor, Tensor, dict[str, Any], State]] = []
        for p, group in self._trained():
            gradient = torch.zeros_like(p) if p not in self._sums else self._sums[p].clone()
            # Every parameter gets noise, whether the batch has reached it or not: which ones it has
            # reached is not private.
            if self.noise_multiplier:
                noise = torch.empty_like(p).normal_(generator=self.generator)
                gradient.add_(noise, alpha=self.noise_multiplier * self.max_grad_norm)
            gradient = gradient / self.expected_batch_size
            moves.append((p, gradient.add(p, alpha=group["l2"]), group, {}))
        return moves

    _step_supports_amp_scaling = True  # torch: so that a scaler comes as far as the error

    def _discard(self) -> None:
        self._sums = None


def _check_statistics(graph: Graph) -> None:
    """Refuse normalization by, or records of, statistics of a batch.

    Below the first trained parameter there is no graph that tells of it, hence the look at the modules.
    """
    models = {id(m): m for recording in graph.recordings if (m := recording.module()) is not None}
    for model in models.values():
        for name, module in model.named_modules():
            if not isinstance(module, _NormBase):
                continue
            mixes = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            if mixes or (module.training and module.track_running_stats):
                what = "mixes the samples of a batch" if mixes else "keeps statistics of the samples"
                raise NotImplementedError(
                    f"'{name}' ({type(module).__name__}) {what}, which DPSGD cannot make private; call "
                    ".eval() on it, or use a norm that keeps samples apart (GroupNorm)"
                )


def epsilon(*, steps: int, sample_rate: float, noise_multiplier: float, delta: float) -> float:
    """The privacy that :class:`DPSGD` has spent, as ``epsilon`` at a given ``delta``.

    By Renyi differential privacy of the subsampled Gaussian mechanism (Mironov, Talwar, Zhang, 2019,
    arXiv:1908.10530), for data sets that differ by one sample added or removed. Computed by the package
    ``dp-accounting``, which the extra ``privacy`` installs.

    Args:
        steps: number of steps.
        sample_rate: probability of a sample to be in a batch (Poisson sampling).
        noise_multiplier: of :class:`DPSGD`.
        delta: between 0 and 1; below one over the size of the data set, as a rule.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if an argument is out of its range.
    """
    for name, value, fits in (
        ("steps", steps, steps >= 0 and steps == int(steps)),
        ("sample_rate", sample_rate, 0 < sample_rate <= 1),
        ("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < float("inf")),
        ("delta", delta, 0 < delta < 1),
    ):
        if not fits:
            raise ValueError(f"epsilon: {name} is out of range, got {value!r}")
    if not steps:
        return 0.0
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ImportError(
            "the privacy accountant is in the package dp-accounting; install the extra 'privacy' "
            "(pip install 'backpack-anew[privacy]')"
        ) from error
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), int(steps))
    return float(accountant.get_epsilon(delta))
