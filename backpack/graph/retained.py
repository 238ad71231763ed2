"""Tensors inside of models that keep the gradient which arrives at them.

``retain_grad()``, and ``backward(inputs=[h])`` for them, make autograd add to ``h.grad`` what arrives
at ``h`` in every pass through the graph. Passes of the library's own are no gradients: after them
``h.grad`` is what it was. Autograd does not tell which tensors these are; so what a model makes is
noted, weakly.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor


class Made(list["weakref.ref[Tensor]"]):
    """Tensors of one thread that may come to keep their gradients."""

    __slots__ = ("__weakref__", "limit", "thread")

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.limit = 1024
        _made[next(_numbers)] = self

    def note(self, result: object) -> None:
        """Note the result of an operation: a tensor, or several."""
        if isinstance(result, Tensor):
            if result.requires_grad:
                self.append(weakref.ref(result))
                if len(self) > self.limit:
                    self.let_go()
                    self.limit = 1024 + 2 * len(self)
        elif isinstance(result, (tuple, list)):
            for each in result:
                self.note(each)

    def note_written(self, args: Sequence[object]) -> None:
        """Note what an operation has written to: its first argument, maybe a view of another tensor."""
        target = args[0] if args else None
        if isinstance(target, Tensor):
            self.note(target)
            self.note(target._base)

    def let_go(self) -> None:
        """Forget tensors that nobody holds any more."""
        self[:] = [ref for ref in self if ref() is not None]


_made: weakref.WeakValueDictionary[int, Made] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def retaining(thread: int) -> list[Tensor]:
    """The tensors made in a thread that keep their gradients."""
    found: dict[int, Tensor] = {}
    for each in _made.valuerefs():  # a list, whatever other threads do
        made = each()
        if made is not None and made.thread == thread:
            alive = []
            for ref in made:
                tensor = ref()
                if tensor is not None:
                    alive.append(ref)
                    if tensor.retains_grad:
                        found[id(tensor)] = tensor
            made[:] = alive
    return list(found.values())


class Untouched:
    """While it is entered, tensors may collect what is none of their gradient; then it is gone."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = tensors
        self.kept: list[tuple[Tensor, Tensor | None]] = []

    def __enter__(self) -> None:
        self.kept = [(tensor, tensor.grad) for tensor in self.tensors]

    def __exit__(self, *exc: object) -> None:
        for tensor, gradient in self.kept:
            tensor.grad = gradient
        self.kept.clear()
