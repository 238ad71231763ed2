"""State that is not passed along as arguments: one object, with one way to change it for a while.

A thread has its own of everything but of what :class:`Ambient` calls shared. What is valid for the time
of a call is entered by :func:`within`, which puts back what was there, whatever happens. What is valid
for a forward pass begins and ends with the hooks of the extended module (``capture/hooks.py``).

No ambient state is what rooms remember from pass to pass (verdicts, places of axes): that changes no
answer, and is looked up by all that the answer depends on.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # this file stands before all rooms
    from torch import Tensor

    from backpack.capture.passages import Passages
    from backpack.capture.recorder import Recorder
    from backpack.engine.state import Block
    from backpack.forms.layout import Patches
    from backpack.samples.axis import Memory, SampleAxis


class Ambient(threading.local):
    """All of it, of the thread that asks.

    Attributes:
        recorder: what sees the forward pass that is under way.
        passages: modules of that pass whose inputs and outputs are told apart.
        axes: sample axes of its inputs, by the inputs' ids. They belong to the user, who may pass
            them elsewhere too: their axes are not noted on them.
        ids: ids of all its inputs.
        written: memory that was written through one of several tensors, by its address and whether
            who look at it require grad.
        stated: axes that the user has stated. Rows that nobody has written to may belong to any sample.
        nested: nested tensors among the inputs on which their rows are noted.
        grams: Gram matrices of columns at one place, while they are reduced for several parameters.
        patches: patches of inputs of convolutions, while they are kept.
        patch_bytes: what these take.
        blocks: open blocks of all threads (shared, since autograd's threads for devices ask).
        switched_off: how often each thread has switched capture off (shared for the same reason).
    """

    recorder: Recorder | None = None
    passages: Passages | None = None
    axes: dict[int, SampleAxis] = {}
    ids: frozenset[int] = frozenset()
    written: dict[tuple[int, bool], Memory] = {}
    stated: tuple[SampleAxis, ...] = ()
    nested: tuple[Tensor, ...] = ()
    grams: list[tuple[Tensor, Tensor]] | None = None
    patches: dict[Any, Tensor | Patches] | None = None
    patch_bytes: int = 0
    blocks: ClassVar[list[Block]] = []
    switched_off: ClassVar[dict[int, int]] = {}

    def forget_forward(self) -> None:
        """What is known of tensors in a forward pass goes with it."""
        self.axes, self.ids, self.written, self.stated = {}, frozenset(), {}, ()


ambient = Ambient()


class within:  # noqa: N801
    """Within the block, this is so: ``with within(grams=[]):``; afterwards it is as it was before.

    Args:
        **values: attributes of :class:`Ambient`, of this thread.
    """

    __slots__ = ("_before", "_values")

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: getattr(ambient, name) for name in self._values}
        ambient.__dict__.update(self._values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ambient.__dict__.update(self._before)
