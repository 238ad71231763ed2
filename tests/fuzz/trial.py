"""One program, against brute force."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from backpack import backpack, extend
from backpack import extensions as E
from backpack.quantities.base import BackpropExtension
from tests.fuzz import losses
from tests.fuzz.building import Built, build, settle_order
from tests.fuzz.draft import NoSuchProgram
from tests.idioms.compare import Comparison, Outcome
from tests.idioms.reference import Expanded, Truth, rows_of

TOLERANCE, FLOOR = 1e-7, 1e-11
SMALL, FEW = 70, 0.6  # parameters that allow for Hessians, and how often these are asked for
MOST_ORDERS = 5000
ERRORS = (RuntimeError, ValueError, NotImplementedError)
GROUPS: dict[str, tuple[BackpropExtension, ...]] = {
    "first": (E.BatchGrad(), E.BatchL2Grad(), E.SumGradSquared(), E.Variance()),
    "ggn": (E.DiagGGNExact(),),
    "ggn per sample": (E.BatchDiagGGNExact(), E.SqrtGGNExact()),
    "ggnmp": (E.GGNMP(),),
}
HESSIANS: dict[str, tuple[BackpropExtension, ...]] = {
    "hessian": (E.DiagHessian(),),
    "hessian per sample": (E.BatchDiagHessian(),),
    "hmp": (E.HMP(),),
}


@dataclass
class Verdict:
    """What came out.

    Attributes:
        kind: ``"agree"``, ``"WRONG"``, ``"crash"``, ``"refused apart"``, ...
        why: words of an error, or what is wrong.
        what: the program.
    """

    kind: str
    why: str = ""
    what: str = ""

    @property
    def fault(self) -> bool:
        """Whether it is a defect of the library."""
        return self.kind in ("WRONG", "crash")


@dataclass
class Case:
    """A program, what comes after it, and its inputs for every forward pass."""

    built: Built
    above: losses.Above
    inputs: list[tuple[Tensor, ...]]

    def __str__(self) -> str:
        frozen = [n for n, p in self.built.program.named_parameters() if not p.requires_grad]
        return f"{self.built}{f' | frozen {frozen}' if frozen else ''} | {self.above}"

    def outputs(self) -> list[Tensor]:
        return [self.built.program(*each) for each in self.inputs]


def draw(seed: int, length: tuple[int, int], direct: bool) -> tuple[Case, random.Random]:
    """Draw a program and its loss.

    Args:
        seed: of all choices.
        length: fewest and most operations.
        direct: whether one loss takes the output as it is.

    Raises:
        NoSuchProgram: if nothing came of it.
    """
    rng = random.Random(seed + 1)
    built = build(seed, length)
    output = built.program(*built.inputs)
    classes = output.dim() > 1 and output.shape[1] > 1
    above = losses.draw(rng, output.dim(), classes, direct)
    inputs = [built.inputs]
    if above.forwards == 2:
        inputs.append(tuple(x.flip(built.batch_dim) * 0.8 for x in built.inputs))
    if rng.random() < 0.15:
        _freeze(rng, built)
    return Case(built, above, inputs), rng


def _freeze(rng: random.Random, built: Built) -> None:
    """Some parameters are not trained."""
    some = [p for p in built.program.parameters() if rng.random() < 0.4]
    for p in some:
        p.requires_grad_(False)
    if not built.program(*built.inputs).requires_grad:
        for p in some:
            p.requires_grad_(True)
    settle_order(built)


def truths_of(case: Case) -> list[Truth]:
    """By the input's samples, and by the output's rows."""
    outputs, program = case.outputs(), case.built.program
    parameters = {n: p for n, p in program.named_parameters() if p.requires_grad}
    found = []
    for owner in (case.built.by_sample, case.built.by_row):
        if owner is not None:
            at = Expanded(parameters, outputs, owner.repeat(len(outputs)), case.built.samples)
            found.append(Truth(at, case.above.truth))
            assert at.jacobian  # which torch may refuse
    if not found or not bool(found[0].loss.isfinite()) or not bool(found[0].hessian.isfinite().all()):
        raise NoSuchProgram
    return found


def trial(seed: int, length: tuple[int, int] = (3, 8), direct: bool = False) -> Verdict:
    """Draw a program and compare all quantities; see :func:`draw`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case, rng = draw(seed, length, direct)
            truths = truths_of(case)
        except NoSuchProgram:
            return Verdict("no program")
        except (RuntimeError, ValueError, IndexError) as error:
            return Verdict("no reference", str(error))
        return _judged(case, truths, rng)


def _judged(case: Case, truths: list[Truth], rng: random.Random) -> Verdict:
    program, what = case.built.program, str(case)
    size = sum(p.numel() for p in truths[0].at.parameters.values())
    hessians = size < SMALL and rng.random() < FEW
    hessians = hessians and _has_finite_hessians(truths[0])
    gradient = rng.random() < 0.75
    extend(program, batch_dim=case.built.batch_dim)
    try:
        case.outputs()
    except Exception as error:  # noqa: BLE001
        return Verdict("crash", f"{type(error).__name__}: {error}", what)

    def backward() -> None:
        case.above.loss(case.outputs()).backward()

    outcome: Outcome = {}
    for truth in truths:
        comparison = Comparison(truth, program, backward, tolerance=TOLERANCE, floor=FLOOR)
        try:
            outcome = comparison.outcome(GROUPS | (HESSIANS if hessians else {}), gradient)
        except Exception as error:  # noqa: BLE001
            return Verdict("crash", f"in backward, {type(error).__name__}: {error}", what)
        if not any(text.startswith("wrong") for text in outcome.values()):
            kind = "agree" if truth is truths[0] else "agree by rows of the output"
            return _refused(case, truths[0], outcome, what) or Verdict(kind, what=what)
    built = case.built
    # A sample that was overwritten owns nothing, though rows may be in its place.
    gone = built.by_sample is not None and len(built.by_sample.unique()) < built.samples
    if (built.reordered or not built.apart or gone) and _consistent(case, truths[0], backward):
        return Verdict("agree by other rows", what=what)
    if built.reordered and not built.apart:
        return Verdict("nobody's rows", what=what)
    faults = {name: text for name, text in outcome.items() if text.startswith("wrong")}
    if faults.keys() <= HESSIANS.keys() and not _has_hessian(case):
        return Verdict("not twice", what=what)
    wrong = "; ".join(faults.values())
    return Verdict("WRONG", f"{wrong} (gradient={gradient})", what)


def _has_finite_hessians(truth: Truth) -> bool:
    """Whether torch has second derivatives; some are NaN: logcumsumexp of a zero cotangent."""
    try:
        return all(bool(b.isfinite().all()) for b in truth.bends.values())
    except RuntimeError:
        return False


def _has_hessian(case: Case) -> bool:
    """Whether autograd's own Hessian is finite: that of a norm at zero is NaN, for all it meets."""
    parameters = [p for p in case.built.program.parameters() if p.requires_grad]
    loss = case.above.loss(case.outputs())
    grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    each = [g for grad in grads if grad.requires_grad for g in grad.flatten()]
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in each]
    return all(bool(block.isfinite().all()) for row in rows for block in row)


def _consistent(case: Case, truth: Truth, backward: Callable[[], None]) -> bool:
    """Whether individual gradients are those of rows of the output, in some order.

    Where rows of the input are moved before any parameter, nothing says whose sample they are.
    """
    at, samples, program = truth.at, case.built.samples, case.built.program
    with backpack(E.BatchGrad(), forwards="same"):
        backward()
    found = {n: getattr(program.get_parameter(n), "grad_batch", None) for n in at.parameters}
    fields = [
        (g.reshape(len(g), -1), truth.slope.unsqueeze(1) * at.jacobian[n])
        for n, g in found.items()
        if g is not None
    ]
    if any(len(g) != samples for g, _ in fields):
        return False
    for axis in range(at.outputs[0].dim()):
        # Rows of another forward pass may be in another order: its data was picked by other numbers.
        per_pass = [rows_of(o, axis).flatten() for o in at.outputs]
        count = sum(o.shape[axis] for o in at.outputs)
        rows = torch.cat([r + i * at.outputs[0].shape[axis] for i, r in enumerate(per_pass)])
        if samples**count > MOST_ORDERS:
            continue
        shares = [
            share.new_zeros(count, share.shape[1]).index_add(0, rows, share) for _, share in fields
        ]
        for order in product(range(samples), repeat=count):
            own = torch.nn.functional.one_hot(torch.tensor(order), samples).T.to(truth.slope)
            if all(
                torch.allclose(g, own @ share) for (g, _), share in zip(fields, shares, strict=True)
            ):
                return True
    return False


def _refused(case: Case, truth: Truth, outcome: Outcome, what: str) -> Verdict | None:
    """The verdict on a program of which something is refused."""
    refused = {name: text for name, text in outcome.items() if text}
    if not refused:
        return None
    name, text = next(iter(refused.items()))
    if text.startswith("refused by torch"):
        return Verdict("unclear error", f"[{name}] {text[18:]}", what)
    if name != "first" and truth.mixes and "mix" in text:
        return Verdict("loss mixes", what=what)
    if name != "first" and "not convex" in text and not truth.convex:
        return Verdict("not convex", what=what)
    if name != "first" and "differentiated twice" in text:
        return Verdict("not twice", what=what)
    apart = case.built.apart and not truth.mixes
    return Verdict("refused apart" if apart else "refused mixing", f"[{name}] {text[9:]}", what)


def reason(text: str) -> str:
    """The words of an error without names and numbers."""
    for pattern, words in (
        (r"\(parameters? [^)]*\)", ""),
        (r"'[^']*'", "'..'"),
        (r"[\(\[][\d, ]*[\)\]]", "()"),
        (r"output of \w+", "output of OP"),
        (r"\(at [^)]*\)", "(at ..)"),
        (r"\d+", "#"),
    ):
        text = re.sub(pattern, words, text)
    return text[:150]


@torch.no_grad()
def settled() -> None:
    """Settings under which programs are drawn."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
