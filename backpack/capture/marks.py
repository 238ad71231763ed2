"""``backpack.mark``: the user says which sample each row of a tensor belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from backpack.capture.hooks import current_recorder
from backpack.capture.said import axis_of_rows, state
from backpack.samples.axis import MARK


def mark(
    x: Tensor,
    sample_of_row: Tensor | Sequence[int] | int | None,
    samples: int | None = None,
    dim: int = 0,
) -> Tensor:
    """Say which sample each row of a tensor belongs to.

    For data whose rows are not samples: nodes of several graphs, instances of bags, tokens of
    sequences one after the other, examples of users. Quantities are then those of the samples that the
    numbers name: of ``N`` of them ``grad_batch`` is ``[N, *p]``, and its ``n``-th entry the gradient of
    the share that sample ``n`` has in the loss, from all its rows.

        >>> import torch
        >>> from backpack import backpack, extend, mark
        >>> from backpack.extensions import BatchGrad
        >>> model = extend(torch.nn.Linear(3, 1))
        >>> x = mark(torch.randn(5, 3), [0, 0, 1, 1, 1])
        >>> with backpack(BatchGrad()):
        ...     model(x).mean().backward()
        >>> model.weight.grad_batch.shape
        torch.Size([2, 1, 3])

    Call it on the inputs before an extended model is called with them, or on a tensor inside of the
    model's forward. It holds for the tensor object, and for what the model computes from it; a copy
    that is made outside of the model (on another device, say) has to be marked itself. An input with
    rows that is not marked is a constant for all samples: that is right too, but slower where
    parameters meet it.

    Args:
        x: the tensor.
        sample_of_row: ``[rows]``, the sample of each, counted from 0, in any order; one number, if all
            of ``x`` belongs to one sample; ``None`` takes an earlier mark back.
        samples: the number of samples; by default one more than the largest in ``sample_of_row``. To be
            given where the last samples may have no rows.
        dim: the axis of ``x`` that holds the rows.

    Returns:
        ``x`` itself.

    Raises:
        ValueError: if the numbers do not fit the rows.
        RuntimeError: inside of a forward pass in which parameters have met another number of samples.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"mark expects a tensor, but got {type(x).__name__}")
    if sample_of_row is None:
        if hasattr(x, MARK):
            delattr(x, MARK)
        return x
    axis = axis_of_rows(x, sample_of_row, samples, dim)
    recorder = current_recorder()
    if recorder is None:
        setattr(x, MARK, axis)
        return x
    recording = recorder.recording
    for ref in recording.taps:
        tap = ref()
        if tap is not None and tap.batch.size != axis.size:
            raise RuntimeError(
                f"mark(...) speaks of {axis.size} samples, but {tap.op} has met {tap.batch.size} "
                "before: call it on the inputs, before any parameter meets them"
            )
    state(recording, x, axis)
    return x
