"""The one line that is added to a training program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from backpack.cockpit.alarms import Alarm
from backpack.cockpit.grouping import Per
from backpack.cockpit.measures import Measure
from backpack.cockpit.monitor import Monitor


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    quantities: str | Sequence[str | Measure] = "economy",
    every: int | Callable[[int], bool] = 10,
    per: Per = "layer",
    include: str | None = None,
    log: Any = (),
    path: Any = None,
    budget: float | None = None,
    alarms: str | Alarm | Iterable[str | Alarm] = (),
    batch_dim: int = 0,
    hold: int = 2**30,
    closure: Callable[[], Any] | None = None,
    together: bool = False,
) -> Monitor:
    """Watch a training run; the training loop is not touched.

    Example:
        >>> import torch
        >>> model, lossfunc = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = watch(model, optimizer, quantities=["loss", "grad_norm", "norm_test"], every=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     lossfunc(model(torch.rand(5, 4)), torch.tensor([0, 1, 2, 1, 0])).backward()
        ...     _ = optimizer.step()
        >>> monitor.close()
        >>> monitor.history().steps, monitor.history().names()[:3]
        ([0, 2], ['time', 'loss', 'grad_norm'])

    Args:
        model: the module that is called in training; of a parallel wrapper the module inside.
        optimizer: its steps are the run's steps; of a wrapper such as Accelerate's, those of the one
            inside. With none, write ``with monitor.step(): ...``.
        quantities: ``"economy"``, ``"business"``, ``"full"``, or a list of names and measures.
        every: an interval, or a function that says of a step whether it is tracked. The first is.
        per: numbers for the whole model and besides for each ``"layer"`` or ``"parameter"``, for the
            groups that a function of a parameter's name gives, or (``"model"``) for nothing else.
        include: look only at parameters whose names match this regular expression.
        log: functions ``log(dict, step)`` (``wandb.log``, ``mlflow.log_metrics``, a logger's
            ``log_metrics``), or a ``SummaryWriter``.
        path: a file of JSON lines to which each tracked step is added; ``History.read`` reads it.
        budget: the part of the time so far that tracking may take; the interval is stretched for it.
        alarms: ``"all"``, or names and instances of :mod:`backpack.cockpit.alarms`.
        batch_dim: the axis of the model's inputs that holds the samples.
        hold: number of bytes of layers' inputs and output gradients that may be kept until a step is
            over, where projections on its update are wanted.
        closure: gives the loss of the last batch again, for ``critical_sharpness`` only.
        together: whether all processes of torch's default group train the model, averaging gradients;
            needless where ``model`` is the parallel wrapper.

    Returns:
        The monitor.

    Raises:
        NotImplementedError: for parameters that are kept in parts by several processes.
        TypeError: for a model, an optimizer or a target of ``log`` that is none.
        ValueError: for a model without trained parameters, an ``every``, ``per`` or ``budget`` that
            there is not.
        KeyError: for a quantity, a configuration or an alarm that there is not.
    """
    return Monitor(
        model,
        optimizer,
        quantities=quantities,
        every=every,
        per=per,
        include=include,
        log=log,
        path=path,
        budget=budget,
        alarms=alarms,
        batch_dim=batch_dim,
        hold=hold,
        closure=closure,
        together=together,
    )
