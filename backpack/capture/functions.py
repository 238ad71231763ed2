"""Custom ``autograd.Function``s: where samples are in their results.

``Function.apply`` is no operation that can be seen, and what runs inside ``forward`` need not be what
``backward`` differentiates. So a result is known by its node, and the node's own ``backward`` is tried.
Where parameters enter beside data the node is a tap, whose ``backward`` is called for one sample after
another.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from backpack._torch import leaf_of, packs_saved_tensors
from backpack.graph.node_rules import source_of
from backpack.graph.nodes import walk
from backpack.graph.taps import TAPS, Recording, Tap, notes
from backpack.samples.axis import SampleAxis, regular_axis, sample_axis_of, solo_axis
from backpack.samples.separability import axis_by_backward

_FUNCTION = "backpack_function"
# By what else is known of a Function: whether it saves what may say where rows go, or are mixed.
_saves_more: dict[Any, bool] = {}
_MOST = 2**12


def is_custom(tensor: Tensor) -> bool:
    """Whether a custom Function has made this tensor."""
    return tensor.requires_grad and isinstance(tensor.grad_fn, BackwardCFunction)


def settle(tensor: Tensor, axis: SampleAxis | None) -> None:
    """The axis of a Function's result is known: it was called through an operation that was seen."""
    assert tensor.grad_fn is not None
    notes(tensor.grad_fn).setdefault(_FUNCTION, {})[tensor.output_nr] = axis


class Functions:
    """The custom Functions of one forward pass."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        # Sample axes of tensors that were touched without grad, by their places in the graph.
        self.touched: dict[tuple[Node, int], SampleAxis] = {}
        # Whether parameters were.
        self.read = False

    def touch(self, tensor: Tensor, axis: SampleAxis) -> None:
        """Data was read where grad mode is off: inside a Function, perhaps."""
        if tensor.grad_fn is None and tensor._base is not None:
            return  # a view of which autograd knows nothing
        with torch.enable_grad():
            edge = get_gradient_edge(tensor)
        self.touched[edge.node, edge.output_nr] = axis

    def axis(self, tensor: Tensor, noted: SampleAxis | None) -> SampleAxis | None:
        """The sample axis of a Function's result.

        Args:
            tensor: the result.
            noted: what the operations inside ``forward`` have left on it.

        Returns:
            ``None`` if it is made from parameters only.
        """
        node = tensor.grad_fn
        assert node is not None
        if node in self.recording.entries:
            return noted  # an input: what it was made from is none of this forward pass's
        known = notes(node).setdefault(_FUNCTION, {})
        if tensor.output_nr not in known:
            ruled = any(tap.place == tensor.output_nr for tap in notes(node).get(TAPS, ()))
            found = noted if ruled else self._find(tensor, node, noted)
            known[tensor.output_nr] = found
            if found is not None and not ruled:
                self._note_parameters(node, tensor.output_nr, found)
        return known[tensor.output_nr]

    def _note_parameters(self, node: Node, number: int, axis: SampleAxis) -> None:
        """Note a tap, where parameters enter beside data."""
        places, inputs = [], []
        for place, (child, nr) in enumerate(node.next_functions):
            if child is None:
                continue
            if (child, nr) in self.touched or _holds_data(child, self.recording.entries):
                inputs.append(child)
            elif any(leaf_of(each) is not None for each in walk([child])):
                places.append(place)
        if places:
            sources = [source_of(node, number, place, axis) for place in places]
            tap = Tap(node.name(), number, axis, tuple(inputs), self.recording, sources)
            tap.by_node = True
            notes(node).setdefault(TAPS, []).append(tap)
            self.recording.taps.append(weakref.ref(tap))

    def _find(self, tensor: Tensor, node: Node, noted: SampleAxis | None) -> SampleAxis | None:
        name = node.name().removesuffix("Backward")
        edges = [GradientEdge(child, nr) for child, nr in node.next_functions if child is not None]
        axes = [self.touched.get((edge.node, edge.output_nr)) for edge in edges]
        data = [(edge, axis) for edge, axis in zip(edges, axes, strict=True) if axis is not None]
        unknown = [edge.node for edge in edges if (edge.node, edge.output_nr) not in self.touched]
        size = next((axis.size for _, axis in data), noted.size if noted is not None else 0)
        lost = next((axis for _, axis in data if axis.lost), None)
        if lost is not None:
            return lost
        if any(_holds_data(each, self.recording.entries) for each in unknown):
            return SampleAxis(
                size, lost=f"{name}, a custom autograd.Function, hides what it does to data"
            )
        if not data:
            return noted
        if size == 1:
            return solo_axis(0, 1, tensor.shape, tensor.device)
        tentative = min(axis.tentative for _, axis in data)
        candidates = [axis for axis in (noted, *(axis for _, axis in data)) if axis is not None]
        for d, length in enumerate(tensor.shape):
            if length % size == 0:
                candidates += [regular_axis(size, d, 1, length // size)]
                candidates += [regular_axis(size, d, length // size, 1)]
        fit = [axis.certain() for axis in candidates if not axis.lost and axis.fits(tensor.shape)]
        entries_of_data, known = [edge for edge, _ in data], [axis for _, axis in data]
        verdict = axis_by_backward(tensor, entries_of_data, known, list(dict.fromkeys(fit)), _key(node))
        found = verdict if isinstance(verdict, SampleAxis) else None
        if found is None:
            found = SampleAxis(size, lost=f"{name}, a custom autograd.Function, {verdict}")
        return replace(found, tentative=tentative) if tentative else found


def _key(node: Any) -> Any:
    """What the way in which a Function moves samples may depend on; ``None`` if that cannot be told.

    That is what it keeps for its backward besides data, and settings of its class. Whole numbers may
    say where rows go, and numbers that are no data how they are mixed: then it is tried out each time.
    """
    kept, settings = vars(node), _settings(node._forward_cls)
    if settings is None or not all(map(_plain, kept.values())):
        return None
    key = type(node), str(kept), str(settings)
    if key not in _saves_more or not packs_saved_tensors():
        try:  # what is packed, inside of a checkpoint, is computed once more to be read
            saves = any(x is not None and not _is_data(x) for x in node.saved_tensors)
        except RuntimeError:
            saves = True
        if len(_saves_more) >= _MOST:
            _saves_more.clear()
        _saves_more[key] = saves
    return None if _saves_more[key] else key


def _is_data(saved: Tensor) -> bool:
    """Whether a tensor that a Function has saved is known to hold samples, or parameters."""
    numbers = saved.is_floating_point() or saved.is_complex()
    return numbers and (saved.requires_grad or sample_axis_of(saved) is not None)


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return isinstance(value, (int, float, bool, str, type(None)))


def _settings(function: type) -> list[Any] | None:
    """Attributes of a class and what its methods have closed over; ``None`` if there are tensors."""
    found: list[Any] = []
    for each in function.__mro__[: function.__mro__.index(torch.autograd.Function)]:
        for name, value in vars(each).items():
            method = value.__func__ if isinstance(value, staticmethod) else value
            cells = getattr(method, "__closure__", None) or ()
            contents = [cell.cell_contents for cell in cells if _filled(cell)]
            if any(isinstance(x, Tensor) for x in (value, *contents)):
                return None
            found += [(name, x) for x in (value, *contents) if _plain(x)]
    return found


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _holds_data(node: Node, entries: set[Node]) -> bool:
    """Whether taps, or inputs, lie at a node or below it."""
    return any(here in entries or TAPS in notes(here) for here in walk([node]))
