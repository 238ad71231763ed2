"""The ``with`` block: what the user asks for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from backpack.capture.switch import captures
from backpack.engine import certificate
from backpack.engine.left_out import MODES, LeftOut, Mode
from backpack.engine.state import (
    FORWARDS,
    ExtensionHook,
    Forwards,
    Gradient,
    current_block,
)
from backpack.engine.watch import WatchedBlock
from backpack.quantities.base import BackpropExtension
from backpack.quantities.combining import Rule
from backpack.quantities.parts import checked_rule
from backpack.quantities.processes import Processes
from backpack.sources.columns import ColumnSource


class backpack:  # noqa: N801
    """Compute quantities during the backward passes inside the block.

    Example:
        >>> import torch
        >>> from backpack import extend
        >>> from backpack.extensions import BatchL2Grad, DiagGGNExact
        >>> model, lossfunc = extend(torch.nn.Linear(4, 3)), extend(torch.nn.CrossEntropyLoss())
        >>> loss = lossfunc(model(torch.rand(5, 4)), torch.tensor([0, 1, 2, 1, 0]))
        >>> with backpack(BatchL2Grad(), DiagGGNExact()):
        ...     loss.backward()
        >>> model.weight.batch_l2.shape, model.weight.diag_ggn_exact.shape
        (torch.Size([5]), torch.Size([3, 4]))

    Args:
        *exts: quantities, instances of the classes in :mod:`backpack.extensions`. Of two that save
            to the same field the later counts.
        extension_hook: called with every module that owns parameters as soon as their quantities are
            saved, and before that with an extended loss module. Torch's own layers (recurrent ones and
            attention aside) have ``input0`` and ``output`` during the call, its losses also ``input1``,
            the targets. (Where nobody holds the logits of a cross-entropy any more, their
            log-probabilities stand for them: of these the loss is the same.)
        debug: print what was captured.
        retain_graph: keep what was captured although ``backward`` frees the graph's buffers.
        chunk_size: number of second-order columns carried through the graph at a time; by default
            as many as fit a memory budget.
        gradient: with ``False``, ``loss.backward()`` computes the quantities only: no ``p.grad`` is
            computed or changed, which saves a third of a gradient, and hooks of parameters are not
            called. (Functions of ``torch.autograd`` compute it all the same.) Without first-order
            quantities the graph's memory is freed with the loss, not by ``backward``. For clipping,
            curvature of a trained model, attribution. With ``"forms"``, ``loss.backward()`` fills
            ``p.grad`` from what quantities of first order are made from, and autograd does not multiply
            a second time: faster for individual gradients, their squares and variances where single
            gradients are large beside the work of a sample. Equal to autograd's up to rounding; it is
            accumulated and hooks of parameters are called, once all quantities are there; until then
            output gradients of all layers are held. What has no form, or not all of its gradient in it
            (inputs, weight decay, sparse tables), gets autograd's from the same pass. The pass is an
            ordinary one without quantities of first order, while ``DistributedDataParallel`` learns a
            static graph, and where tensors inside of a model keep their gradients (``retain_grad()``).
        parameters: compute quantities of these parameters only; by default of all that have a gradient.
        certify: how often to try out, by two more passes through the graph, that below the model's
            output samples are apart as it seemed in the forward pass: ``"once"`` for each model and
            kind of graph, again at a low rate, and where samples are picked by an index; ``"always"``;
            ``"never"``. By default once (``engine.certificate.default``). A failure is an error that
            names the operation at which samples are mixed.
        unsupported: what to do where a parameter cannot have one of the quantities: ``"raise"`` the
            error that says why; ``"warn"`` or ``"skip"``: leave it out and compute the others. What
            was left out, and why, is in ``left_out``, a list that can be printed::

                with backpack(KFAC(), DiagGGNMC(), unsupported="skip") as block:
                    loss.backward()
                print(block.left_out)

            Parameters that belong to no extended model, but are used between a model's output and the
            loss, are left out with a warning by default.
        forwards: what rows of several forward passes below one loss are: with ``"same"``, row ``n`` of
            each is sample ``n`` (two views of it, the steps of a sequence); with ``"further"`` each
            pass has samples of its own, counted in the order of the calls (one pass for an episode, or
            an image, a real and a generated batch). By default ``"same"``; an error where passes meet
            the same parameters, but row ``n`` of one never meets that of the other (losses that are
            added up, ``torch.cat``), and they are not of the same tensor, for that can mean either.
        process_group: processes that work on parts of one batch (``torch.distributed.group.WORLD``, or
            ``process_group`` of a ``DistributedDataParallel`` model): fields are those of all of their
            samples, in the order of ranks, and of the loss that is the mean of their losses, whose
            gradient ``DistributedDataParallel`` leaves. All of them must call ``backward`` in such a
            block. Without it, fields are of the process's own samples and loss, but for models that
            ``fully_shard`` keeps in parts, whose processes are those of its mesh. ``p.grad`` is not
            touched. See the page on distributed training.
        gather: whether values of single samples are gathered from all processes; with ``False`` each
            process has those of its own samples, scaled as those of all.

    A field holds the value of the last block that it was asked in: what parameters of a model that took
    part have from earlier blocks, and are not given in this one, is deleted when it ends.

    Raises:
        ValueError: if ``exts`` holds anything but instances of extensions, or one of an unknown kind.
        NotImplementedError: with ``process_group``, for a quantity whose values do not combine.

    Warns:
        UserWarning: at the end of a block in which no backward pass ran.

    With ``loss.backward(create_graph=True)`` quantities are part of a graph, and can be differentiated.
    As ``p.grad`` in torch, they hold the graph that holds the parameters, so that neither is freed with
    the model; :func:`backpack.memory_cleanup` (``memory_cleanup(model)``) lets go of it.

    What is compiled (``torch.compile``) runs uncompiled inside of a block, where every operation is
    looked at; a compiled model's forward pass must be inside, then.

    Blocks may be nested (the inner one counts) and used again. A block belongs to the thread that
    entered it.
    """

    def __init__(
        self,
        *exts: BackpropExtension,
        extension_hook: ExtensionHook | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        chunk_size: int | None = None,
        gradient: Gradient = True,
        parameters: Iterable[Tensor] | None = None,
        certify: certificate.Mode | None = None,
        unsupported: Mode = "raise",
        forwards: Forwards | None = None,
        process_group: Any = None,
        gather: bool = True,
    ) -> None:
        for ext in exts:
            if isinstance(ext, type):
                raise ValueError(
                    f"backpack expects instances of extensions, but got the class {ext.__name__}; "
                    f"write backpack({ext.__name__}())"
                )
            if not isinstance(ext, BackpropExtension):
                unpack = (
                    "; unpack it, backpack(*extensions)" if isinstance(ext, (list, tuple, set)) else ""
                )
                raise ValueError(f"backpack expects instances of extensions, but got {ext!r}{unpack}")
            if not isinstance(ext.source, ColumnSource):
                raise ValueError(f"{ext!r} names no source of columns, but {ext.source!r}")
        fields = [ext.savefield for ext in exts]
        repeated = {name for name in fields if fields.count(name) > 1} if len(fields) > 1 else ()
        for name in sorted(repeated):
            warnings.warn(f"several extensions save to '{name}'; the last one counts", stacklevel=2)
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
        self.extensions = tuple({ext.savefield: ext for ext in exts}.values())
        self.extension_hook = extension_hook
        self.debug = debug
        self.retain_graph = retain_graph
        self.chunk_size = chunk_size
        if certify not in (None, *certificate.MODES):
            raise ValueError(f"certify must be one of {certificate.MODES}, got {certify!r}")
        if gradient not in (True, False, "forms"):
            raise ValueError(f"gradient must be True, False or 'forms', got {gradient!r}")
        self.gradient: Gradient = gradient if gradient == "forms" else bool(gradient)
        self.parameters = None if parameters is None else frozenset(parameters)
        self.certify: certificate.Mode = certify or certificate.default
        if unsupported not in MODES:
            raise ValueError(f"unsupported must be one of {MODES}, got {unsupported!r}")
        self.unsupported: Mode = unsupported
        if forwards not in (None, *FORWARDS):
            raise ValueError(f"forwards must be one of {FORWARDS}, got {forwards!r}")
        self.forwards: Forwards | None = forwards
        self.left_out = LeftOut()
        # Whether passes of several blocks belong together, which whoever opens them puts together.
        self.collects = False
        # Processes whose values are put together, by the rules of quantities.
        self.processes: Processes | None = None
        self.group_size: int | None = None
        self.gather = gather
        self.rules: Mapping[str, Rule] = {}
        if process_group is not None:
            self._share(Processes(process_group, gather))
        self._blocks: list[WatchedBlock] = []

    def _share(self, processes: Processes) -> None:
        """Put values of several processes together."""
        if self.extension_hook is not None:
            raise ValueError(
                "an extension_hook is called while backward runs, but values of several processes are "
                "there at its end only; leave out process_group or the hook"
            )
        self.rules = {ext.savefield: checked_rule(ext, "several processes") for ext in self.extensions}
        self.processes = processes if processes.size > 1 else None
        self.group_size = processes.size

    # Whether a pass without an extended model is passed over in silence.
    quiet = False

    @classmethod
    def beside(cls, *exts: BackpropExtension, parameters: Iterable[Tensor] | None = None) -> backpack:
        """A block with these quantities beside those of the block that is open, which it stands in for.

        For tools that look at a backward pass in which their user may compute quantities too.

        Args:
            *exts: further quantities.
            parameters: compute them for these parameters only; all are taken where a block is open.
        """
        outer = current_block()
        if outer is None:
            return cls(*exts, parameters=parameters)
        owner = outer.owner
        both = cls(
            *owner.extensions,
            *exts,
            extension_hook=owner.extension_hook,
            debug=owner.debug,
            retain_graph=owner.retain_graph,
            chunk_size=owner.chunk_size,
            gradient=owner.gradient,
            certify=owner.certify,
            unsupported=owner.unsupported,
            forwards=owner.forwards,
            gather=owner.gather,
        )
        both.processes, both.rules = owner.processes, dict(owner.rules)
        both.group_size = owner.group_size
        return both

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.extensions) or self.extension_hook is not None

    def __enter__(self) -> backpack:
        self.left_out = LeftOut()
        block = WatchedBlock(self)
        self._blocks.append(block)
        block.open()
        return self

    def __exit__(self, *exc: object) -> None:
        # Another thread may have entered the same object since.
        block = [each for each in self._blocks if each.thread == threading.get_ident()][-1]
        self._blocks.remove(block)
        block.close()
        unused = self.extensions and not self.collects and not block.used
        if unused and exc[:1] in ((), (None,)) and captures(block.thread):
            warnings.warn(
                "no backward pass ran inside of this backpack(...) block, so that it has computed "
                "nothing; fields of parameters, if there are any, are those of an earlier pass. Call "
                "loss.backward() inside the block",
                stacklevel=2,
            )
