"""The bound of private training, by finite changes of one sample.

One sample is replaced: the sum of clipped gradients may move by ``2 C``. And that sum is compared with
the one of each sample's own gradient, clipped.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack import extend, optim
from tests.fuzz.building import Built, build
from tests.fuzz.draft import NoSuchProgram
from tests.fuzz.trial import ERRORS, Verdict

SLACK = 1 + 1e-6


def _squares(f: Tensor) -> Tensor:
    return F.mse_loss(f, torch.ones_like(f), reduction="none").mean(1)


def _entropy(f: Tensor) -> Tensor:
    return F.cross_entropy(f, torch.arange(len(f)) % f.shape[1], reduction="none")


def _weighted(f: Tensor) -> Tensor:
    return _squares(f) * torch.arange(1.0, len(f) + 1).to(f)


def _order(f: Tensor) -> Tensor:
    return torch.arange(len(f)).roll(1)


# Losses of rows ``[R, F] -> [R]``; those of the second table mix rows.
OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": _squares,
    "entropy": _entropy,
    "weighted": _weighted,
    "logsumexp": lambda f: f.logsumexp(1),
    "sorted rows": lambda f: _squares(f[_order(f)]),
    "sorted losses": lambda f: _entropy(f)[_order(f)],
    "transposed": lambda f: F.mse_loss(f.t(), torch.ones_like(f.t()), reduction="none").mean(0),
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda f: _squares(f - f.mean(0)),
    "gram": lambda f: F.cross_entropy(f @ f.t(), torch.arange(len(f)), reduction="none"),
    "relative": lambda f: _squares(f) / (1 + _squares(f).mean()),
    "cumulative": lambda f: _entropy(f).cumsum(0),
}


class Private:
    """A program in private training.

    Args:
        built: the program.
        losses: of its output's rows.
    """

    def __init__(self, built: Built, losses: Callable[[Tensor], Tensor]) -> None:
        self.built, self.of_rows, self.bound = built, losses, 1.0
        self.parameters = list(built.program.parameters())

    def losses(self, inputs: tuple[Tensor, ...]) -> Tensor:
        output = self.built.program(*inputs)
        return self.of_rows(output.movedim(self.built.axis, 0).flatten(1))

    def gradients(self) -> list[Tensor]:
        """Gradients of all losses, ``[P]`` each, and the bound that clips half of them."""
        values = self.losses(self.built.inputs)
        found = [
            torch.autograd.grad(v, self.parameters, retain_graph=True, allow_unused=True)
            for v in values
        ]
        pairs = ((self.parameters, each) for each in found)
        flat = [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(*pair, strict=True)
                ]
            )
            for pair in pairs
        ]
        self.bound = 0.7 * float(torch.stack([g.norm() for g in flat]).median())
        if 0 < self.bound < 1e-9:
            raise NoSuchProgram  # rounding errors of gradients that are zero
        return flat

    def clipped(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The sum that the optimizer takes."""
        before = [p.detach().clone() for p in self.parameters]
        optimizer = optim.DPSGD(
            self.built.program,
            1.0,
            noise_multiplier=0.0,
            max_grad_norm=self.bound,
            expected_batch_size=1.0,
        )
        optimizer.backward(self.losses(inputs))
        optimizer.step()
        with torch.no_grad():
            moved = torch.cat([(b - p).flatten() for b, p in zip(before, self.parameters, strict=True)])
            for b, p in zip(before, self.parameters, strict=True):
                p.copy_(b)
        return moved

    def expected(self, gradients: list[Tensor], owners: list[int]) -> Tensor:
        """The sum of each sample's gradient, clipped."""
        total = torch.zeros_like(gradients[0])
        for n in set(owners):
            own = sum(
                (g for g, o in zip(gradients, owners, strict=True) if o == n), torch.zeros_like(total)
            )
            total = total + own * min(1.0, self.bound / max(float(own.norm()), 1e-12))
        return total

    def owners(self) -> list[int] | None:
        """The sample that each loss depends on, if it is one; by finite changes.

        A loss that no change of a sample moves is its own.
        """
        built = self.built
        with torch.no_grad():
            base = self.losses(built.inputs)
            moved = torch.zeros(built.samples, len(base), dtype=torch.bool)
            for n in range(built.samples):
                for shift in (0.7, -1.3, 2.1):
                    moved[n] |= (self.losses(built.changed(n, shift)) - base).abs() > 1e-12
        if int(moved.sum(0).max()) > 1:
            return None
        return [int(m.int().argmax()) if bool(m.any()) else -1 - i for i, m in enumerate(moved.T)]


def trial(seed: int, length: tuple[int, int] = (1, 5), direct: bool = False) -> Verdict:
    """Draw a program and losses of its rows, and look for a change that is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rng = random.Random(seed + 2)
        try:
            built = build(seed, length)
            private, name = _drawn(rng, built, direct)
            gradients, owners = private.gradients(), private.owners()
        except (NoSuchProgram, *ERRORS, IndexError):
            return Verdict("no program")
        what = f"{built} | {name}"
        extend(built.program, batch_dim=built.batch_dim)
        try:
            found = private.clipped(built.inputs)
        except ERRORS as error:
            return Verdict("refused mixing" if owners is None else "refused apart", str(error), what)
        except Exception as error:  # noqa: BLE001
            return Verdict("crash", f"{type(error).__name__}: {error}", what)
        expected = private.expected(gradients, owners or list(range(len(gradients))))
        if float((found - expected).abs().max()) > 1e-7 * max(private.bound, 1e-3):
            return Verdict("WRONG", f"another sum; {_moved(private, rng, found)}", what)
        if owners is None:
            return Verdict("mixed without a gradient", what=what)
        moved = _moved(private, rng, found)
        return Verdict("WRONG" if moved.startswith("moves") else "agree", moved, what)


def _drawn(rng: random.Random, built: Built, direct: bool) -> tuple[Private, str]:
    output = built.program(*built.inputs)
    if built.reordered or output.shape[built.axis] != built.samples:
        raise NoSuchProgram
    name = rng.choice(list(MIXING)) if rng.random() < 0.15 and not direct else rng.choice(list(OWN))
    name = "squares" if direct else name
    private = Private(built, (OWN | MIXING)[name])
    if private.losses(built.inputs).dim() != 1:
        raise NoSuchProgram
    return private, name


def _left_out(private: Private, base: Tensor, n: int) -> float:
    """How much the sum moves when a sample is left out; 0 if the program needs all of them."""
    built = private.built
    keep = torch.arange(built.samples) != n
    if not bool(keep.any()):
        return 0.0
    inputs = [
        x.movedim(built.batch_dim, 0)[keep].movedim(0, built.batch_dim) if i in built.data() else x
        for i, x in enumerate(built.inputs)
    ]
    try:
        with torch.no_grad():
            all_losses, some = private.losses(built.inputs), private.losses(tuple(inputs))
        if some.shape != all_losses[keep].shape or not torch.allclose(some, all_losses[keep]):
            return 0.0
        return float((private.clipped(tuple(inputs)) - base).norm()) / private.bound
    except (*ERRORS, IndexError):
        return 0.0


def _moved(private: Private, rng: random.Random, base: Tensor) -> str:
    """How much the sum moves when one sample is replaced, if that is too much."""
    built = private.built
    worst = max((_left_out(private, base, n) for n in range(built.samples)), default=0.0)
    if worst > SLACK:
        return f"moves by {worst:.3f} C without a sample"
    for n in range(built.samples):
        try:
            other = private.clipped(built.changed(n, rng.choice([-2.0, 0.8, 5.0]), seed=n))
        except ERRORS:
            continue
        worst = max(worst, float((other - base).norm()) / private.bound)
    return f"moves by {worst:.3f} C" if worst > 2 * SLACK else ""
