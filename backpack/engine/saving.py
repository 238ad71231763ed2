"""What a pass does last: it saves values, calls the extension hook, and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backpack._torch import current_task
from backpack.engine.collect import Leaf, form_of_zeros
from backpack.engine.exchange import Exchange, samples_of
from backpack.engine.layer_io import LayerIO, passes_its_input_on
from backpack.engine.left_out import REFUSALS
from backpack.engine.pass_state import PassState
from backpack.engine.refusals import Names
from backpack.engine.state import ExtensionHook, Nested
from backpack.forms.complex_pairs import from_pairs
from backpack.kronecker.block import KroneckerBlock
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.reading import note_found


class Saving(PassState):
    """Puts the values of quantities on parameters."""

    def _save_on_gradient(self, leaf: Leaf) -> None:
        """Save a parameter's quantities when its gradient is complete."""
        if self.task is None:
            return
        self.handles.append(leaf.parameter.register_hook(partial(self.complete, leaf)))

    def complete(self, leaf: Leaf, gradient: Tensor) -> None:
        """A parameter's gradient is complete: save its quantities."""
        if self.block.nested or current_task() != self.task:
            return
        self.save(leaf, gradient)

    def save(self, leaf: Leaf, gradient: Tensor | None = None) -> None:
        """Save a parameter's quantities, and call the extension hook."""

        def total() -> Tensor:
            if leaf.total is not None:
                return from_pairs(leaf.total) if parameter.is_complex() else leaf.total
            found = gradient
            if found is None:
                raise RuntimeError(
                    "a quantity asks for the gradient where it is not known: its class does not say "
                    "needs_gradient = True, or it is in `zero`, or of second order in a pass with "
                    "gradient=False"
                )
            return found.to_dense() if found.is_sparse else found

        parameter, states = leaf.parameter, leaf.states
        context = Context(parameter, leaf.samples, total, partial(form_of_zeros, self.block, leaf))
        detaches = not torch.is_grad_enabled()
        for ext in self.block.owner.extensions:
            field = ext.savefield
            if field in leaf.without:
                continue
            reached = field in states
            try:
                state = states.pop(field, None)
                value = ext.conclude(state, context, reached)
            except REFUSALS as error:
                self._refuse_one(leaf, ext, error)
                continue
            if self.exchange is not None and field in self.exchange.rules:
                self.exchange.take(ext, value, context, reached)
            else:
                self._set(parameter, field, _detached(value) if detaches else value)
        leaf.let_go()
        if self.shards is not None and self.exchange is not None:
            # At once, for whole values of all parameters are what nobody has room for.
            with torch.no_grad(), Nested(self.block):
                self._exchange(self.exchange, {parameter: Names(self.graph.recordings)(parameter)})
        if self.block.owner.extension_hook is not None:
            self._call_hook(leaf, self.block.owner.extension_hook)

    def _set(self, parameter: Tensor, field: str, value: Any) -> None:
        if self.shards is not None and self.exchange is not None:
            value = self.shards.own(parameter, self.exchange.rules[field], value, self.exchange.gathers)
            parameter = self.shards.part(parameter)
        setattr(parameter, field, value)
        note_found(parameter, field)
        self.saved.append((parameter, field))
        self.block.saved.add((id(parameter), field))

    def _call_hook(self, leaf: Leaf, hook: ExtensionHook) -> None:
        """Call the extension hook with modules all of whose parameters have their quantities."""
        for module, waiting in self.modules:
            if leaf.parameter in waiting:
                waiting.discard(leaf.parameter)
                if not waiting:
                    own = module.parameters(recurse=False)
                    inputs = [self.inputs.pop(p) for p in own if p in self.inputs]
                    exposed = inputs and passes_its_input_on(module)
                    with LayerIO(module, inputs[:1]) if exposed else nullcontext():
                        hook(module)

    def _share(self, exts: Sequence[BackpropExtension]) -> None:
        assert self.exchange is not None
        self.exchange.share(exts, self.leaves.values(), self._known())

    def _known(self) -> dict[Tensor, str]:
        """Parameters that may have values here or in other processes, with names."""
        names = Names(self.graph.recordings).all()
        if self.shards is not None:
            return {p: names.get(p, "") for p in self.leaves}
        return {p: names.get(p, "") for p in (*self.block.expected.values(), *self.leaves)}

    def _exchange(self, exchange: Exchange, known: Mapping[Tensor, str]) -> None:
        """Put values together with those of other processes."""
        owner = self.block.owner
        samples = samples_of(self.leaves.values())
        for p, field, value, why in exchange.run(known, samples, self.without):
            if why is None:
                self._set(p, field, value)
                continue
            reason = f"{why} (in another process)"
            owner.left_out.note(self.part(p), known[p], [field], reason)
            if owner.unsupported != "skip":
                owner.left_out.warn([field], reason)

    def end(self) -> None:
        """The backward pass is over."""
        if self.exchange is not None and self.shards is None:
            with torch.no_grad(), Nested(self.block):
                self._exchange(self.exchange, self._known())
        self.done = True
        self.watch.print(Names(self.graph.recordings))
        self._clear()
        if self.task is not None:
            self.block.runs.pop(self.task, None)

    def abort(self) -> None:
        """The backward pass raised: take back what was saved."""
        if not self.done:
            for parameter, field in self.saved:
                parameter.__dict__.pop(field, None)
            if self.shards is not None:
                self.shards.reset()
        self._clear()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, KroneckerBlock):
        return value.detach() if any(t.requires_grad for t in value._tensors()) else value
    if isinstance(value, list):
        return [_detached(each) for each in value]
    return value
