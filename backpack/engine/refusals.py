"""What is refused before anything is computed, and names of parameters for the errors that say so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor
from torch.autograd.graph import Node

from backpack.graph.survey import Graph, leaves_below
from backpack.graph.taps import Recording, Source, Tap
from backpack.quantities.base import BackpropExtension
from backpack.quantities.matrix_products import Product


class Names:
    """Names of parameters, for messages; looked up when one is asked for."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings

    def __call__(self, parameter: Tensor) -> str:
        for recording in self.recordings:
            module = recording.module()
            for name, each in module.named_parameters() if module is not None else ():
                if each is parameter:
                    return f"'{name}'"
        return f"of shape {tuple(parameter.shape)}"

    def of(self, tap: Tap) -> str:
        """The names of the parameters of a tap."""
        return ", ".join(self(p) for source in tap.sources for p in parameters_of(source))

    def unseen(self, unseen: Sequence[tuple[Tensor, str]]) -> str:
        parameter, where = unseen[0]
        lost = next((r.lost for r in self.recordings if r.lost is not None), None)
        if lost is not None:
            return (
                f"parameter {self(parameter)} takes part in the loss (at {where}), but with data of "
                f"which backpack cannot tell which axis holds the samples. They were lost first at "
                f"{lost}. Keep samples on one axis, or freeze the parameter with "
                "requires_grad_(False). (Nor can backpack see inside a scripted or compiled module)"
            )
        return (
            f"parameter {self(parameter)} takes part in the loss in a way that backpack cannot see "
            f"(at {where}): inside a scripted or compiled module, a custom autograd.Function, code "
            "that ran outside the extended module, or with data in which samples are mixed. Write "
            "that part with ordinary torch functions inside the extended module, give a custom "
            "Function a rule (backpack.own.op_rule), or freeze the parameter with "
            "requires_grad_(False)"
        )

    def inputs(self, recording: Recording) -> str:
        """The inputs of a model, with their shapes."""
        module = recording.module()
        names: list[str] = []
        with suppress(TypeError, ValueError):
            names = list(inspect.signature(module.forward).parameters) if module is not None else []
        return ", ".join(
            f"'{names[at] if isinstance(at, int) and at < len(names) else at}' {tuple(shape)}"
            for at, shape in recording.inputs
        )


def parameters_of(source: Source) -> list[Tensor]:
    """The parameters that a tap is taken with respect to, directly or through a derived tensor."""
    return [source.leaf] if source.leaf is not None else leaves_below(source.edge)


def check(
    graph: Graph,
    fresh: Sequence[tuple[Node, Tap]],
    names: Names,
    extensions: Sequence[BackpropExtension],
    rooted: bool,
) -> None:
    """Raise an error for what cannot be computed, before anything is.

    Args:
        graph: what lies below the root.
        fresh: its taps, with their nodes.
        names: names of parameters.
        extensions: the quantities.
        rooted: whether the call of ``backward`` was seen.
    """
    second_order = [ext for ext in extensions if ext.source.second_order]
    if any(recording.packed for recording in graph.recordings):
        raise NotImplementedError(
            "the model packs sequences (pack_padded_sequence), which leaves no axis for samples; "
            "give recurrent layers the padded batch, and pick each sample's last valid step"
        )
    for recording in graph.recordings:
        if recording.doubt is not None:
            raise RuntimeError(
                f"cannot tell which input carries the batch: of {names.inputs(recording)} one was "
                f"taken for {recording.size} samples on axis {recording.batch_dim}, but an output of "
                f"the model has shape {tuple(recording.doubt)}. Pass the batch first, or keep masks "
                "and tables as attributes or buffers of the module"
            )
    if graph.unseen:
        raise RuntimeError(names.unseen(graph.unseen))
    for recording in {id(tap.recording): tap.recording for _, tap in fresh}.values():
        hidden = [p for ref in recording.unseen if (p := ref()) is not None and p.requires_grad]
        if hidden:
            reached = {p for _, tap in fresh for s in tap.sources for p in parameters_of(s)}
            hidden = [p for p in hidden if p not in reached]
        if hidden:
            raise RuntimeError(
                f"parameter {names(hidden[0])} takes part in the forward pass only through "
                "'.data', which autograd does not see: it has no gradient and no quantities. Use "
                "the parameter itself, or requires_grad_(False) if it is meant to be constant"
            )
    for _, tap in fresh:
        if tap.released:
            raise RuntimeError(
                f"the graph of {tap.op} was already backpropagated through; call the earlier "
                "backward with retain_graph=True, or run the forward pass again"
            )
        if tap.batch.lost:
            raise RuntimeError(
                f"cannot tell which axis of the output of {tap.op} (parameters {names.of(tap)}) holds "
                f"the samples: {tap.batch.lost}. Keep samples on one axis, or pass the right "
                "batch_dim to extend"
            )
    if graph.mixed and fresh:
        raise RuntimeError(
            f"cannot tell which axis of the model's output holds the samples: {graph.mixed}. Keep "
            "samples on one axis, or compute a loss that compares samples inside the model"
        )
    if graph.mixing:
        _refuse_mixing(graph.mixing, extensions)
    if not rooted and any(isinstance(ext, Product) for ext in second_order):
        raise RuntimeError(
            "products with curvature (GGNMP, HMP, PCHMP) keep the graph, for which the call must "
            "be loss.backward(), not torch.autograd.backward(loss)"
        )
    if second_order and (graph.bare or (graph.outputs and not rooted)):
        fields = ", ".join(ext.savefield for ext in second_order)
        raise RuntimeError(
            f"{fields} need a loss that backpack knows, but backward reached the model other "
            "than through one. Extend the loss module (lossfunc = extend(CrossEntropyLoss())), "
            "and call loss.backward()"
        )


def _refuse_mixing(why: str, extensions: Sequence[BackpropExtension]) -> None:
    text = (
        f"{why} mixes the samples of a batch, so that quantities of individual samples are not "
        "defined; call model.eval(), or use a norm that keeps samples apart (GroupNorm)"
    )
    for ext in extensions:
        if not ext.mixed:
            raise NotImplementedError(f"{ext.savefield}: {text}")
    fields = ", ".join(ext.savefield for ext in extensions)
    warnings.warn(f"{text}. {fields} holds each row's contribution to the gradient", stacklevel=2)
