"""Blocks that are open: one entry of a ``with`` statement each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from backpack._ambient import ambient
from backpack.capture.switch import captures
from backpack.engine.left_out import LeftOut, Mode
from backpack.graph.retained import Made, Untouched
from backpack.quantities.base import BackpropExtension
from backpack.quantities.combining import Rule
from backpack.quantities.processes import Processes

# How the rows of several forward passes belong together.
Forwards = Literal["same", "further"]
FORWARDS: tuple[Forwards, ...] = ("same", "further")
ExtensionHook = Callable[[nn.Module], None]
# What comes of ``p.grad``: autograd computes it, nobody does, or it comes from the forms of parameters.
Gradient = bool | Literal["forms"]


class Options(Protocol):
    """What the user asked for."""

    extensions: tuple[BackpropExtension, ...]
    extension_hook: ExtensionHook | None
    debug: bool
    retain_graph: bool
    chunk_size: int | None
    gradient: Gradient
    parameters: frozenset[Tensor] | None
    certify: Literal["once", "always", "never"]
    unsupported: Mode
    left_out: LeftOut
    forwards: Forwards | None
    collects: bool
    processes: Processes | None
    group_size: int | None
    gather: bool
    rules: Mapping[str, Rule]
    quiet: bool

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""


class Block:
    """One entry of a ``with`` statement: its thread, its runs, and the roots of backward calls.

    Attributes:
        owner: what the user asked for.
        thread: the thread that entered it.
        runs: the backward passes under way, by their numbers.
        roots: where a backward call starts, with the gradients there, while one is seen.
        hooked: whether hooks may change the gradients there.
        wanted: what it differentiates with respect to, as far as that is known.
        complete: whether it computes the gradients of all leaves.
        nested: how many times the library itself is differentiating.
        used: whether a backward pass was seen, in it or in a block inside.
        expected: parameters that took part in its passes, by ids; their earlier values go at its end.
        saved: fields that were saved in it, with ids of their parameters.
        wrappers: ``DistributedDataParallel`` models whose first backward pass this may be.
        made: tensors that were made in it, weakly.
        retaining: those inside of models that keep their gradients, while a pass runs.
    """

    def __init__(self, owner: Options) -> None:
        self.owner = owner
        self.thread = threading.get_ident()
        self.runs: dict[int, Any] = {}
        self.roots: list[tuple[GradientEdge, Tensor]] | None = None
        self.hooked = True
        self.wanted: set[Tensor] | None = None
        self.complete = False
        self.nested = 0
        self.used = False
        self.expected: dict[int, Tensor] = {}
        self.saved: set[tuple[int, str]] = set()
        self.wrappers: list[Any] = []
        self.made = Made()
        self.retaining: list[Tensor] = []

    def expect(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """Parameters whose values will be this block's.

        Returns:
            One of which another thread's open block saves the same field, if there is any; then nothing
            has changed.
        """
        new = {id(p): p for p in parameters}
        with _expecting:
            for other in [block for block in ambient.blocks if block.thread != self.thread]:
                fields = {ext.savefield for ext in self.owner.extensions}
                if fields & {ext.savefield for ext in other.owner.extensions}:
                    taken = next((p for key, p in new.items() if key in other.expected), None)
                    if taken is not None:
                        return taken
            self.expected.update(new)
        return None

    def forget_earlier(self) -> None:
        """Values of earlier passes are not left where this block's should be."""
        for field in [ext.savefield for ext in self.owner.extensions]:
            for key, parameter in self.expected.items():
                if (key, field) not in self.saved:
                    parameter.__dict__.pop(field, None)
        self.expected.clear()

    @property
    def listens(self) -> bool:
        """Whether there is anything to do, and the block's thread has not switched it off."""
        return self.owner.active and captures(self.thread)


# Held while a block looks at what those of other threads expect.
_expecting = threading.Lock()


def current_block() -> Block | None:
    """The innermost block of this thread; autograd's device threads share the only thread's."""
    if not ambient.blocks:
        return None
    ident = threading.get_ident()
    for block in reversed(ambient.blocks):
        if block.thread == ident:
            return block
    for thread in threading.enumerate():
        if thread.ident == ident and not isinstance(thread, threading._DummyThread):
            return None
    if len({block.thread for block in ambient.blocks}) > 1:
        raise RuntimeError(
            "several threads have entered backpack(...), and a backward pass on a device cannot be "
            "told apart between them; let one thread at a time use backpack"
        )
    return ambient.blocks[-1]


def mark_used(thread: int) -> None:
    """A backward pass runs in this thread."""
    for block in ambient.blocks:
        if block.thread == thread:
            block.used = True


class Nested:
    """Hooks that fire while backpack itself differentiates are not meant for it.

    Nor is its pass the one at whose end ``DistributedDataParallel`` exchanges gradients, where a static
    graph is to be learned. Tensors that keep their gradients (``retain_grad()``) keep none of it.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.asleep: list[Any] = []
        self.untouched = Untouched(block.retaining) if block.retaining else None

    def __enter__(self) -> None:
        self.block.nested += 1
        if self.untouched is not None:
            self.untouched.__enter__()
        for each in self.block.wrappers:
            if not each._static_graph_delay_allreduce_enqueued:
                each._static_graph_delay_allreduce_enqueued = True
                self.asleep.append(each)

    def __exit__(self, *exc: object) -> None:
        self.block.nested -= 1
        if self.untouched is not None:
            self.untouched.__exit__(*exc)
        for each in self.asleep:
            each._static_graph_delay_allreduce_enqueued = False
        self.asleep.clear()
