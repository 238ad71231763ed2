"""What gives one sample an influence on the gradients of others, in a model and in losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, islice
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from backpack.graph.nodes import children_of, walk
from backpack.graph.survey import Graph
from backpack.graph.taps import MODEL_OUTPUT, TAPS, notes
from backpack.samples.axis import SampleAxis

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


def check_model(graph: Graph) -> None:
    """Refuse what gives one sample an influence on the gradients of others, or on what is kept.

    Below the first trained parameter there is no graph that tells of it, hence the look at the modules.
    """
    models = {id(m): m for recording in graph.recordings if (m := recording.module()) is not None}
    for model in models.values():
        watch_changes(model)
        changed = model.__dict__.pop("_backpack_changed", ())
        for name, module in model.named_modules():
            if isinstance(module, _NormBase):
                _check_norm(name, module)
            elif getattr(module, "max_norm", None) is not None and isinstance(module, _LOOKUPS):
                raise NotImplementedError(
                    f"'{name}' ({type(module).__name__}) has max_norm, which changes the rows that "
                    "samples look up, without noise; leave it out, and normalize what is looked up"
                )
        if changed:
            raise NotImplementedError(
                f"{', '.join(map(repr, changed))} of {type(model).__name__} was changed by its forward "
                "pass, which DPSGD cannot make private; call .eval() on the layer that does so, or "
                "change it outside of the forward pass, and not by the data"
            )
    for node in graph.nodes:
        if getattr(node, "_saved_scale_grad_by_freq", False):
            raise NotImplementedError(
                "an embedding has scale_grad_by_freq, by which a sample's gradient depends on the "
                "words of the others; leave it out"
            )


def _check_norm(name: str, module: _NormBase) -> None:
    mixes = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    if mixes or (module.training and module.track_running_stats):
        what = "mixes the samples of a batch" if mixes else "keeps statistics of the samples"
        raise NotImplementedError(
            f"'{name}' ({type(module).__name__}) {what}, which DPSGD cannot make private; call "
            ".eval() on it, or use a norm that keeps samples apart (GroupNorm)"
        )


def watch_changes(model: nn.Module) -> None:
    """Note which parameters and buffers each forward pass of a model changes."""
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before)
        model.register_forward_hook(_after, always_call=True)


# Functions, not methods, so that copies and pickles of the model hold nothing else.
def _before(model: nn.Module, args: Any) -> None:
    model.__dict__.setdefault("_backpack_values", _values(model))


def _after(model: nn.Module, args: Any, output: Any) -> None:
    before, now = model.__dict__.pop("_backpack_values", None), _values(model)
    if before is not None and before != now:
        names = [name for name in now if before.get(name) != now[name]]
        known = model.__dict__.get("_backpack_changed", ())
        model.__dict__["_backpack_changed"] = tuple(dict.fromkeys((*known, *names)))


def _values(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor is where in a model, and how often it was written to."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, _SpectralNorm):  # whose buffers follow the weight
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                version = -1 if tensor.is_inference() else tensor._version
                found[f"{prefix}.{name}" if prefix else name] = id(tensor), version
    return found


def check_losses(losses: Tensor) -> None:
    """Check that each sample's loss depends on the model's output for that sample only.

    The gradient of some samples' losses must vanish at the outputs of all others, and be that of all
    losses at their own. Sets are chosen such that for any two samples there is one with the first and
    without the second. That holds in exact arithmetic: what is zero is zero.

    Raises:
        NotImplementedError: if samples are mixed.
        ValueError: if there is not one loss for each sample, or a gradient is not finite.
    """
    count = len(losses)
    assert losses.grad_fn is not None
    places = {(edge.node, edge.output_nr): axis for edge, axis in _met(losses.grad_fn)}
    for axis in places.values():
        if axis.size != count:
            raise ValueError(
                f"there are {count} losses, but the model saw {axis.size} samples; give one loss for "
                "each sample, and all samples to one forward pass"
            )
        if axis.lost is not None and count > 1:
            raise NotImplementedError(
                f"the losses depend on a model output in which samples are mixed ({axis.lost}); leave "
                "it out"
            )
    if count < 2 or not places:
        return
    edges = [GradientEdge(*key) for key in places]
    steps = torch.arange(1, count + 1, dtype=losses.dtype, device=losses.device)
    weights = 0.5 + (12.9898 * steps).sin().mul(437.585453).frac().abs()

    def gradients(weights: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(losses, edges, weights, retain_graph=True, allow_unused=True)

    whole = gradients(weights)
    if not all(g is None or bool(torch.isfinite(g).all()) for g in whole):
        raise ValueError("the gradient of a sample is not finite")
    sets = _sets(count).to(losses)
    owned = [_along(axis, sets) for axis in places.values()]
    for k, chosen in enumerate(sets):
        found = zip(gradients(weights * chosen), whole, owned, places.values(), strict=True)
        for part, full, own, axis in found:
            if part is not None and full is not None and part.numel():
                shape = [-1 if d == axis.dim else 1 for d in range(part.dim())]
                mask = own[k].reshape(shape).to(part.dtype)
                # Nearly always equal to the last bit: a sample is computed as it is among all.
                if not torch.equal(part, full * mask):
                    _check_rows(part, full, axis, own[k] > 0)


def _met(root: Node) -> Iterator[tuple[GradientEdge, SampleAxis]]:
    """Where losses meet the model: at its outputs, and at operations within that they use directly."""
    met: dict[Node, Sequence[Any]] = {}

    def further(node: Node) -> list[Node]:
        return [] if met[node] else children_of(node)

    def ends(node: Node) -> Sequence[Any]:
        borders = notes(node).get(MODEL_OUTPUT, ())
        known = [b for b in borders if b.recording.taps and b.batch is not None]
        return known or notes(node).get(TAPS, ())

    for node in walk([root], further):
        met[node] = ends(node)
        for each in met[node]:
            yield GradientEdge(node, each.place), each.batch


@lru_cache(64)
def _sets(count: int) -> Tensor:
    """Few sets of samples such that for any two there is one with the first and without the second.

    Each sample is in half of the sets, and no two in the same ones (Sperner, 1928).

    Returns:
        Ones for members, ``[sets, count]``.
    """
    size = next(k for k in range(2, count + 2) if comb(k, k // 2) >= count)
    codes = islice(combinations(range(size), size // 2), count)
    return torch.tensor(
        [[float(each in code) for each in range(size)] for code in codes]
    ).T.contiguous()


def _along(axis: SampleAxis, sets: Tensor) -> Tensor:
    """Sets of samples as sets of entries of a sample axis."""
    return sets if axis.plain else sets[:, axis.sample_ids(sets.device)]


def _check_rows(part: Tensor, full: Tensor, axis: SampleAxis, own: Tensor) -> None:
    """Refuse a gradient of some samples' losses that is not theirs alone."""
    others = [d for d in range(part.dim()) if d != axis.dim]

    def largest(tensor: Tensor) -> Tensor:
        return tensor.abs().amax(others) if others else tensor.abs()

    samples = axis.sample_ids(part.device)
    # A comparison with nan is false.
    strange = ~own & ~(largest(part) == 0)
    if bool(strange.any()):
        raise NotImplementedError(
            f"losses of some samples depend on the model's output for another (sample "
            f"{int(samples[strange][0])} of the batch), so that clipping bounds nobody's influence; "
            "compute each sample's loss from its own output, in the batch's order"
        )
    eps = torch.finfo(part.dtype).eps
    changed = own & ~(largest(part - full) <= eps**0.5 * largest(full))
    if bool(changed.any()):
        raise NotImplementedError(
            f"the gradient of a sample's loss (sample {int(samples[changed][0])} of the batch) depends "
            "on those of other samples' losses, as by a hook that normalizes the gradient of a batch; "
            "remove the hook"
        )
