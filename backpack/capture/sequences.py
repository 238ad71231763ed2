"""Recurrent layers and packed sequences: where their results have samples, and their taps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from backpack.capture.in_place import InPlaceTracker
from backpack.graph.making import lost_form, store_tap
from backpack.graph.taps import of_sample
from backpack.rules.base import SEVERAL_OUTPUTS
from backpack.rules.fallback import fallback
from backpack.rules.packed import PACKED, packed_axes
from backpack.rules.recurrent import recurrent_axis
from backpack.samples.axis import SampleAxis, mark
from backpack.samples.propagate import settled


class SequenceTracker(InPlaceTracker):
    """Sees to operations on sequences."""

    def _pack(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Packing and padding of sequences: of the results only the first is data."""
        out = func(*args, **kwargs)
        try:
            marked, sources, faint = self.sort_arguments(args[:1], kwargs)
            self.note_result(func, args, kwargs, out[0], 0, marked, sources, faint)
        except Exception as error:
            self.give_up(func, out[0], error)
        return out

    def _recurrent(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: tuple[Tensor, ...],
        marked: list[tuple[Tensor, SampleAxis]],
        sources: list[Tensor],
        faint: list[SampleAxis],
    ) -> None:
        """A recurrent layer of one layer and direction, whose outputs are hidden and last states."""
        packed = isinstance(args[3], (list, tuple))
        hx, rules = args[2 if packed else 1], PACKED if packed else SEVERAL_OUTPUTS
        states = hx if isinstance(hx, (list, tuple)) else (hx,)
        if packed:
            axis, last, demoted = packed_axes(args[0], args[1], states, marked)
        else:
            axis, demoted = recurrent_axis(args[0], states, marked, bool(args[-1]))
            last = axis.moved(1)
        sources = sources + [t for t in demoted if t.requires_grad]
        data = [t for t, _ in marked if t.requires_grad and not any(t is s for s in demoted)]
        inputs = tuple(t.grad_fn or get_gradient_edge(t).node for t in data)
        hidden = out[0].detach()
        for place, each in enumerate(out):
            here = last if place else axis
            batch, whole = settled(func, each, here, self.recording.batch_dim, marked)
            if batch.tentative and faint and not batch.lost and each.requires_grad:
                batch = self.settle_doubt(func, batch, each, args, faint)
            if batch.lost:
                self.lose(func, each, batch)
                if batch.tentative:
                    continue
            else:
                mark(each, batch)
            if each.grad_fn is not None and sources:
                own = batch.single()
                if whole:
                    found = fallback(own, place, func, args, kwargs, sources, True)
                elif batch.lost:
                    found = [(s, lost_form) for s in sources]
                else:
                    found = rules[func](axis.single(), place, hidden, *args)
                pairs = [(t, f) for t, f in found if t is not None and any(t is s for s in sources)]
                if own is not batch:
                    pairs = [(t, of_sample(f, batch)) for t, f in pairs]
                store_tap(
                    self.recording,
                    func,
                    each.grad_fn,
                    each.output_nr,
                    batch,
                    pairs,
                    inputs,
                    False,
                    [t for t, _ in marked],
                )
