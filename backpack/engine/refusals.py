"""What is refused before anything is computed, and names of parameters for the errors that say so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from torch import Tensor, nn
from torch.autograd.graph import Node

from backpack._torch import twins
from backpack.graph.survey import Graph, leaves_below
from backpack.graph.taps import Recording, Source, Tap
from backpack.quantities.base import BackpropExtension
from backpack.quantities.matrix_products import Product
from backpack.sources.table import AveragedRoot, HessianRoot, OutputBasis, RandomSigns


class Names:
    """Names of parameters, for messages; looked up when one is asked for."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings

    def __call__(self, parameter: Tensor) -> str:
        for recording in self.recordings:
            module = recording.module()
            for name, each in _named(module) if module is not None else ():
                if each is parameter:
                    return f"'{name}'"
        return f"of shape {tuple(parameter.shape)}"

    def all(self) -> dict[Tensor, str]:
        """Names of all parameters of the extended models."""
        modules = [module for r in self.recordings if (module := r.module()) is not None]
        return {p: f"'{name}'" for module in reversed(modules) for name, p in _named(module)}

    def owns(self, parameter: Tensor) -> bool:
        """Whether a parameter belongs to one of the extended models."""
        modules = [module for r in self.recordings if (module := r.module()) is not None]
        return any(p is parameter for module in modules for _, p in _named(module))

    def of(self, tap: Tap) -> str:
        """The names of the parameters of a tap."""
        return ", ".join(self(p) for source in tap.sources for p in parameters_of(source))

    def unseen(self, unseen: Sequence[tuple[Tensor, str]]) -> str:
        parameter, where = unseen[0]
        # Losses are recorded too; the model's own operations come first.
        modules = {r: r.module() for r in self.recordings if r.lost is not None}
        own = (
            r
            for r, m in modules.items()
            if m is not None and any(p is parameter for p in m.parameters())
        )
        lost = next((r.lost for r in (*own, *modules)), None)
        if lost is not None:
            return (
                f"parameter {self(parameter)} takes part in the loss (at {where}), but with data of "
                f"which backpack cannot tell which axis holds the samples. They were lost first at "
                f"{lost}. Keep samples on one axis, or freeze the parameter with "
                "requires_grad_(False). (Nor can backpack see inside a scripted or compiled module)"
            )
        return (
            f"parameter {self(parameter)} takes part in the loss in a way that backpack cannot see "
            f"(at {where}): inside a scripted or compiled module, a transform (torch.vmap), a custom "
            "autograd.Function, code that ran outside the extended module, or with data in which "
            "samples are mixed. Write that part with ordinary torch functions inside the extended "
            "module, give a custom Function a rule (backpack.own.op_rule), or freeze the parameter "
            "with requires_grad_(False)"
        )

    def above(self, parameter: Tensor, where: str, why: str) -> str:
        """Of a parameter above the model's outputs, whose share in each sample's loss is not known."""
        return (
            f"parameter {self(parameter)} is used above the model's output (at {where}), {why}, so "
            "that backpack cannot see its share in each sample's loss. Use it where samples are "
            "apart (before a loss is reduced), or "
            "inside of an extended module whose forward computes all of this; or leave it out: "
            "requires_grad_(False), backpack(..., parameters=model.parameters())"
        )

    def complex(self, parameter: Tensor, ext: BackpropExtension) -> Exception:
        """Of a quantity that complex parameters do not have."""
        return NotImplementedError(
            f"parameter {self(parameter)} is complex, for which {ext!r} is not defined "
            "(docs/complex.md says why); make it from a real one with an axis of two "
            "(torch.view_as_complex), ask for diagonals, square roots or products in its place "
            "(DiagGGNExact, SqrtGGNExact, GGNMP), or leave the parameter out: "
            "requires_grad_(False), backpack(..., unsupported='skip')"
        )

    def sizes(self, parameter: Tensor, one: int, other: int) -> Exception:
        """Of a parameter that meets batches of two sizes."""
        return RuntimeError(
            f"parameter {self(parameter)} meets batches of {one} and of {other} samples in one "
            "backward pass; individual samples cannot be matched. "
            "If each forward pass has samples of its own, say backpack(..., forwards='further')"
        )

    def samples(self, recording: Recording) -> str:
        """How many samples there are, and why, if the user has not said which row belongs to which."""
        if recording.size is None or recording.stated:
            return ""
        return (
            f"By axis {recording.batch_dim} of the input there are {recording.size} samples; one "
            f"without such an axis needs it, x.unsqueeze({recording.batch_dim}). "
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


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters with their names, and whatever else stands for them."""
    other = twins(module)
    for name, parameter in module.named_parameters():
        for each in (parameter, *other.get(parameter, ())):
            yield name, each


def parameters_of(source: Source) -> list[Tensor]:
    """The parameters that a tap is taken with respect to, directly or through a derived tensor."""
    return [source.leaf] if source.leaf is not None else leaves_below(source.edge)


class Refuse(Protocol):
    """What happens to a refusal: it is raised, or quantities are left out."""

    def __call__(
        self,
        error: Exception,
        parameters: Sequence[Tensor] | None = None,
        exts: Sequence[BackpropExtension] | None = None,
        foreign: bool = False,
    ) -> None:
        """Refuse quantities of parameters (``None``: all); ``foreign``: of no extended model."""


def check(
    graph: Graph,
    fresh: Sequence[tuple[Node, Tap]],
    names: Names,
    extensions: Sequence[BackpropExtension],
    rooted: bool,
    refuse: Refuse,
) -> None:
    """Refuse what cannot be computed, before anything is.

    Args:
        graph: what lies below the root.
        fresh: its taps, with their nodes.
        names: names of parameters.
        extensions: the quantities.
        rooted: whether the call of ``backward`` was seen.
        refuse: what to do with a refusal of some quantities; others are errors in any case.
    """
    second_order = [ext for ext in extensions if ext.source.second_order]
    for recording in graph.recordings:
        if recording.doubt is not None:
            raise RuntimeError(
                f"cannot tell which input carries the batch: of {names.inputs(recording)} one was "
                f"taken for {recording.size} samples on axis {recording.batch_dim}, but an output of "
                f"the model has shape {tuple(recording.doubt)}. Say which, extend(model, "
                "samples='its name'), or which row belongs to which sample (backpack.mark); or keep "
                "masks and tables as attributes or buffers of the module"
            )
        if recording.contest is not None and not recording.stated:
            raise RuntimeError(
                f"cannot tell which input carries the batch: of {names.inputs(recording)} two may, and "
                f"{recording.contest}. Say which, extend(model, samples='its name'), or which row "
                "belongs to which sample (backpack.mark)"
            )
    for unseen in graph.unseen:
        refuse(RuntimeError(names.unseen([unseen])), [unseen[0]])
    for parameter in _hidden(fresh):
        text = (
            f"parameter {names(parameter)} takes part in the forward pass only through "
            "'.data', which autograd does not see: it has no gradient and no quantities. Use "
            "the parameter itself, or requires_grad_(False) if it is meant to be constant"
        )
        refuse(RuntimeError(text), [parameter])
    for parameter, where, why in graph.refused:
        error = RuntimeError(names.above(parameter, where, why))
        refuse(error, [parameter], foreign=not names.owns(parameter))
    for _, tap in fresh:
        if tap.released:
            raise RuntimeError(
                f"the graph of {tap.op} was already backpropagated through; call the earlier "
                "backward with retain_graph=True, or run the forward pass again"
            )
        if tap.batch.lost:
            text = (
                f"cannot tell which axis of the output of {tap.op} (parameters {names.of(tap)}) holds "
                f"the samples: {tap.batch.lost}. {names.samples(tap.recording)}Keep samples on one "
                "axis, pass the right batch_dim to extend, or say which row belongs to which sample "
                "(backpack.mark)"
            )
            refuse(RuntimeError(text), [p for s in tap.sources for p in parameters_of(s)])
        for ext in second_order if tap.above and not tap.within else ():
            why = _why_not_above(ext, tap in graph.uncovered)
            for parameter in [p for s in tap.sources for p in parameters_of(s)] if why else ():
                text = f"{ext.savefield}: {names.above(parameter, tap.op, why)}"
                refuse(NotImplementedError(text), [parameter], [ext], not names.owns(parameter))
    if graph.mixed and fresh:
        raise RuntimeError(
            f"cannot tell which axis of the model's output holds the samples: {graph.mixed}. Keep "
            "samples on one axis, say which row belongs to which sample (backpack.mark), or compute a "
            "loss that compares samples inside the model"
        )
    if graph.mixing:
        _refuse_mixing(graph.mixing, extensions, refuse)
    for ext in second_order if graph.within else ():
        if why := _why_not_within(ext, graph):
            text = (
                f"{ext.savefield}: the loss contains derivatives of the model "
                "(torch.autograd.grad(..., create_graph=True)), or what a transform in its forward "
                "computes (torch.vmap), or other things from inside of it, "
                f"{why}"
            )
            refuse(NotImplementedError(text), None, [ext])
    products = [ext for ext in second_order if isinstance(ext, Product)]
    if products and not rooted:
        text = (
            "products with curvature (GGNMP, HMP, PCHMP) keep the graph, for which the call must "
            "be loss.backward(), not torch.autograd.backward(loss)"
        )
        refuse(RuntimeError(text), None, products)
    if second_order and (graph.bare or (graph.outputs and not rooted)):
        fields = ", ".join(ext.savefield for ext in second_order)
        text = f"{fields} need a loss that is a function of the model's outputs, but " + (
            "a term of it is computed inside of the model, from what forward does not return: "
            "return that too (return out, hidden), and compute the term from it outside"
            if graph.bare
            else "the call does not tell where backward starts: call loss.backward() (or extend the "
            "loss, lossfunc = extend(CrossEntropyLoss()))"
        )
        refuse(RuntimeError(text), None, second_order)


def _hidden(fresh: Sequence[tuple[Node, Tap]]) -> list[Tensor]:
    """Parameters that are read through ``.data`` only."""
    found: list[Tensor] = []
    for recording in {id(tap.recording): tap.recording for _, tap in fresh}.values():
        hidden = [p for ref in recording.unseen if (p := ref()) is not None and p.requires_grad]
        if hidden:
            reached = {p for _, tap in fresh for s in tap.sources for p in parameters_of(s)}
            found += [p for p in hidden if p not in reached]
    return found


def _why_not_within(ext: BackpropExtension, graph: Graph) -> str:
    """Why a quantity of a loss that contains derivatives of the model is not known, if it is not."""
    curvature = ext.curvature if isinstance(ext, Product) else None
    if curvature == "hessian":
        return ""
    if isinstance(ext.source, HessianRoot | RandomSigns):
        couples = "in which samples are coupled: its Hessian is no sum over samples; use HMP"
        return couples if graph.coupled else ""
    if isinstance(ext.source, AveragedRoot | OutputBasis) or curvature == "positive":
        return "for which this quantity is not defined; use KFAC, DiagGGNExact, GGNMP or HMP"
    if graph.bent_by is not None:
        return (
            f"and is curved (at {graph.bent_by}) above the residuals in a way without a rule. Write it "
            "as a sum or mean over samples of a function of torch.nn.functional (mse_loss, ...) or of "
            "squares of residuals (residual ** 2); or use first-order quantities, DiagHessian or HMP"
        )
    return ""


def _why_not_above(ext: BackpropExtension, uncovered: bool) -> str:
    """Why a quantity is not defined for parameters above the model's outputs, if it is not."""
    curvature = ext.curvature if isinstance(ext, Product) else "ggn"
    if isinstance(ext.source, HessianRoot | RandomSigns) or curvature == "hessian":
        return ""
    if isinstance(ext.source, AveragedRoot) or curvature != "ggn":
        return "for which this quantity is not defined"
    if uncovered:
        return (
            "below no loss that has a rule, so that the Hessian to take the square root of is not known"
        )
    return ""


def _refuse_mixing(why: str, extensions: Sequence[BackpropExtension], refuse: Refuse) -> None:
    text = (
        f"{why} mixes the samples of a batch, so that quantities of individual samples are not "
        "defined; call model.eval(), or use a norm that keeps samples apart (GroupNorm)"
    )
    for ext in extensions:
        if not ext.mixed:
            refuse(NotImplementedError(f"{ext.savefield}: {text}"), None, [ext])
    fields = ", ".join(ext.savefield for ext in extensions if ext.mixed and ext.per_sample)
    if fields:
        warnings.warn(f"{text}. {fields} holds each row's contribution to the gradient", stacklevel=2)
