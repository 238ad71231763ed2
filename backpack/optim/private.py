"""Differentially private gradient descent, by the norms of individual gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backpack.engine.block import backpack
from backpack.extensions import BatchL2Grad
from backpack.graph.survey import survey
from backpack.optim.accounting import BatchSizes
from backpack.optim.base import BackpackOptimizer, Params, State
from backpack.optim.bounds import check_losses, check_model, watch_changes


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
    :func:`epsilon`. How batches were drawn is not seen; where their sizes are as alike as a shuffled
    loader's, there is a warning. Noise has the precision of the parameters, and is torch's, which is no
    cryptographic source. Clipped gradients have norms up to ``max_grad_norm``, but for rounding in the
    precision that the model computes in: 0.5 % in bfloat16.

    Every loss must depend on its own sample only. That the n-th loss depends on the n-th sample's model
    output and on no other (unlike losses that centre, contrast or rank outputs) is tried out in each
    :meth:`backward`, at the values that it is given: gradients of some samples' losses must vanish at
    all other samples. Refused are too: batch normalization in training mode, layers that keep
    statistics of the data, also below frozen layers, embeddings with ``scale_grad_by_freq`` or
    ``max_norm``, and whatever else of a model's parameters and buffers its forward pass has changed
    (from the second pass on, if parameters are given instead of the model).

    What leaves no trace on the autograd graph is not seen, and is the caller's to leave out: a value
    that depends on other samples but is no differentiable function of the model's output (``f -
    f.detach().mean(0)``, a weight or a threshold from the whole batch, a division by the number of
    samples), and what mixes samples before the first trained parameter.

    Args:
        params: a model (extended in place unless it is already), or parameters of extended models as
            any ``torch.optim.Optimizer`` takes them, groups included.
        lr: learning rate.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``; at least 0.
        max_grad_norm: the norm that gradients of samples are clipped to.
        expected_batch_size: the mean number of samples in a batch, whatever a batch holds; in a batch
            of all processes, where there is a ``process_group``. The first of them draws the noise.
        l2: weight of ``l2 / 2 |theta|^2``, which is added to the loss, and needs no privacy.
        momentum: factor of the last step's direction, ``m <- momentum m + d``.
        generator: source of the noise, on the parameters' device; default torch's own.
        process_local: say that each process trains a model of its own, see
            :class:`backpack.optim.BackpackOptimizer`.
        process_group: processes that train one model, see there.

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
        process_local: bool = False,
        process_group: Any = None,
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
        self._samples = 0
        defaults = {"lr": lr, "l2": l2, "momentum": momentum}
        super().__init__(params, defaults, process_local=process_local, process_group=process_group)
        size = 1 if self.processes is None else self.processes.size
        self._sizes = BatchSizes(expected_batch_size / size)
        if isinstance(params, nn.Module):
            watch_changes(params.module if isinstance(params, DistributedDataParallel) else params)

    def _own(self) -> tuple[str, ...]:
        options = "noise_multiplier", "max_grad_norm", "expected_batch_size", "generator"
        return (*super()._own(), *options, "_sums", "_samples", "_sizes")

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
            NotImplementedError: if the model or the losses mix samples, or the model keeps statistics
                of them or changes with them.
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
        check_model(graph)
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
        check_losses(losses)
        try:
            # There is one loss for each sample, whichever forward passes it comes from.
            options = {"gradient": False, "certify": "always", "forwards": "same"}
            with torch.enable_grad(), backpack(BatchL2Grad(), **options):  # type: ignore[arg-type]
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
        self._samples += len(losses)
        return norms

    def _norms(self, used: list[Tensor], losses: Tensor) -> Tensor:
        squares = losses.new_zeros(len(losses)).detach()
        for p in used:
            found: Tensor = p.batch_l2  # type: ignore[attr-defined]
            if len(found) != len(losses):
                raise ValueError(
                    f"there are {len(losses)} losses, but the model saw {len(found)} samples; give one "
                    "loss for each sample, and all samples to one forward pass"
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
        error = None
        if self._sums is None:
            error = RuntimeError("call optimizer.backward(losses) before optimizer.step()")
        if self.processes is not None:
            self.processes.agree(error)
            self._check_copies()
        elif error is not None:
            raise error
        strange = self._sizes.note(self._samples)
        if strange:
            warnings.warn(strange, stacklevel=4)
        trained = list(self._trained())
        noisy = self._noisy([p for p, _ in trained])
        moves: list[tuple[Tensor, Tensor, dict[str, Any], State]] = []
        for (p, group), gradient in zip(trained, noisy, strict=True):
            gradient = gradient / self.expected_batch_size
            moves.append((p, gradient.add(p, alpha=group["l2"]), group, {}))
        return moves

    def _noisy(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Sums of clipped gradients, of all processes, and noise."""
        sums, found = self._sums or {}, []
        draws = self.noise_multiplier and (self.processes is None or self.processes.rank == 0)
        for p in parameters:
            gradient = torch.zeros_like(p) if p not in sums else sums[p].clone()
            # Every parameter gets noise, whether the batch has reached it or not: which ones it has
            # reached is not private.
            if draws:
                noise = torch.empty_like(p).normal_(generator=self.generator)
                gradient.add_(noise, alpha=self.noise_multiplier * self.max_grad_norm)
            found.append(gradient)
        return found if self.processes is None else self.processes.sums(found)

    _takes_gradients = False
    _local = "clipped gradients of its own part of the batch and noise of its own"

    _step_supports_amp_scaling = True  # torch: so that a scaler comes as far as the error

    def _discard(self) -> None:
        self._sums, self._samples = None, 0
