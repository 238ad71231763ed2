"""What is measured: each library's way to each quantity.

A library turns a network, a loss and a batch into steps, functions that run forward and backward passes
once and leave ``p.grad`` and the quantity. ``values`` brings what a step left into the form of this
library's fields, for comparison; it is not timed.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Step = Callable[[], Any]
Values = dict[str, list[Tensor]]

GRADIENT, EXTEND = "gradient", "extend"
COMBINED = "Variance+BatchL2Grad+DiagGGNMC"
FIRST_ORDER = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
QUANTITIES = (
    *(GRADIENT, EXTEND, *FIRST_ORDER, "DiagGGNMC", "DiagGGNExact"),
    *("KFAC", "KFLR", "DiagHessian", COMBINED),
)
SAMPLED = ("DiagGGNMC", "KFAC")
HUGE = 1e30  # an error that JSON can hold


class Library:
    """A network prepared by a library, and an untouched one beside it."""

    distribution = ""
    quantities: tuple[str, ...] = ()
    found: Any = None

    def __init__(self, model: nn.Module, X: Tensor, y: Tensor) -> None:
        self.plain, self.X, self.y = model, X, y
        self.lossfunc = nn.CrossEntropyLoss()
        # Parameters keep their values, whatever a library renames or converts.
        self.originals = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.model = self.prepare(copy.deepcopy(model))

    @classmethod
    def version(cls) -> str:
        """Of the distribution."""
        return version(cls.distribution)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The library's own form of a network."""
        return model

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of both networks."""
        yield from self.plain.parameters()
        yield from self.model.parameters()

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The prepared network's parameters under the names they had, known by their values."""
        left = dict(self.originals)
        for p in self.model.parameters():
            same = [name for name, value in left.items() if torch.equal(value, p.detach())]
            if same:
                del left[same[0]]
                yield same[0], p

    def reset(self) -> None:
        """Forget what a step left."""
        self.found = None
        for p in self.parameters():
            p.grad = None

    def gradient(self) -> None:
        """The plain gradient, of the untouched network."""
        self.lossfunc(self.plain(self.X), self.y).backward()

    def step(self, quantity: str) -> Step:
        """A function that computes a quantity."""
        return self.gradient if quantity == GRADIENT else self.steps(quantity)

    def steps(self, quantity: str) -> Step:
        """The same for all but the plain gradient."""
        raise NotImplementedError

    def values(self, quantity: str) -> Values:
        """What the last step computed, in the scale and form of this library."""
        raise NotImplementedError


class Backpack(Library):
    """This library."""

    distribution = "backpack-anew"
    quantities: tuple[str, ...] = QUANTITIES[1:]
    options: dict[str, Any] = {}

    def prepare(self, model: nn.Module) -> nn.Module:
        backpack = importlib.import_module("backpack")
        self.context, self.extensions = backpack.backpack, backpack.extensions
        self.extended = backpack.extend(nn.CrossEntropyLoss())
        return self.extend(backpack.extend, model)

    def extend(self, function: Callable[..., nn.Module], model: nn.Module) -> nn.Module:
        """Call ``extend`` as a program would."""
        return function(model)

    def fields(self, quantity: str) -> list[str]:
        """Where a quantity is saved."""
        names = [] if quantity == EXTEND else quantity.split("+")
        return [getattr(self.extensions, name)().savefield for name in names]

    def reset(self) -> None:
        super().reset()
        for p in self.model.parameters():
            for name in [name for name in vars(p) if not name.startswith("_")]:
                delattr(p, name)

    def steps(self, quantity: str) -> Step:
        def forward_backward() -> None:
            self.extended(self.model(self.X), self.y).backward()

        if quantity == EXTEND:
            return forward_backward
        classes = [getattr(self.extensions, name) for name in quantity.split("+")]

        def step() -> None:
            with self.context(*(each() for each in classes), **self.options):
                forward_backward()

        return step

    def values(self, quantity: str) -> Values:
        found: Values = {}
        for name, p in self.named():
            for part in quantity.split("+"):
                if part not in SAMPLED:
                    value = p.grad if part == EXTEND else getattr(p, *self.fields(part))
                    found[f"{name}.{part}"] = (
                        value if isinstance(value, list) else [cast(Tensor, value)]
                    )
        return found


class Alone(Backpack):
    """This library, without ``p.grad``."""

    quantities = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "DiagGGNMC", "KFAC")
    options = {"gradient": False}


class FromForms(Backpack):
    """This library, ``p.grad`` from what the quantities are made from."""

    quantities = FIRST_ORDER
    options = {"gradient": "forms"}


class Original(Backpack):
    """backpack-for-pytorch; what is no chain of modules goes through its converter."""

    distribution = "backpack-for-pytorch"

    def extend(self, function: Callable[..., nn.Module], model: nn.Module) -> nn.Module:
        chain = isinstance(model, nn.Sequential) and all(
            type(each).__module__.startswith("torch.") for each in model
        )
        return function(model, use_converter=not chain)


def reduce(quantity: str, each: Tensor) -> Tensor:
    """A first-order quantity from individual gradients."""
    if quantity == "BatchL2Grad":
        return each.flatten(1).square().sum(1)
    if quantity == "SumGradSquared":
        return each.square().sum(0)
    return each.var(0, unbiased=False) if quantity == "Variance" else each


class Functional(Library):
    """torch.func: ``vmap`` over ``grad``."""

    distribution = "torch"
    quantities = FIRST_ORDER

    def steps(self, quantity: str) -> Step:
        scale = 1 / len(self.X)

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return scale * self.lossfunc(functional_call(self.model, values, x[None]), y[None])

        each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")

        def step() -> None:
            parameters = dict(self.model.named_parameters())
            values = {name: p.detach() for name, p in parameters.items()}
            self.found = {}
            for name, gradients in each(values, self.X, self.y).items():
                parameters[name].grad = gradients.sum(0)
                self.found[name] = reduce(quantity, gradients)

        return step

    def values(self, quantity: str) -> Values:
        return {f"{name}.{quantity}": [value] for name, value in self.found.items()}


class Opacus(Library):
    """opacus: ``grad_sample``, and what follows from it; recurrent layers replaced by its own."""

    distribution = "opacus"
    quantities: tuple[str, ...] = FIRST_ORDER
    wrapper, field = "GradSampleModule", "grad_sample"

    def prepare(self, model: nn.Module) -> nn.Module:
        logging.disable(logging.WARNING)
        grad_sample = importlib.import_module("opacus.grad_sample")
        validators = importlib.import_module("opacus.validators")
        if any(isinstance(each, nn.RNNBase) for each in model.modules()):
            model = validators.ModuleValidator.fix(model)
        return getattr(grad_sample, self.wrapper)(model, loss_reduction="mean")

    def reset(self) -> None:
        super().reset()
        for p in self.model.parameters():
            vars(p)["grad_sample"] = None

    def forward_backward(self) -> None:
        """Both passes through the prepared network."""
        self.lossfunc(self.model(self.X), self.y).backward()

    def steps(self, quantity: str) -> Step:
        def step() -> None:
            self.forward_backward()
            self.found = {p: reduce(quantity, vars(p)[self.field]) for p in self.model.parameters()}

        return step

    def values(self, quantity: str) -> Values:
        # Its loss is that of one sample: not divided by the number of samples.
        power = 1 if quantity == "BatchGrad" else 2
        scale = len(self.X) ** -power
        return {f"{name}.{quantity}": [self.found[p] * scale] for name, p in self.named()}


class Ghost(Opacus):
    """opacus: norms without individual gradients ("ghost clipping"), without the clipping."""

    quantities: tuple[str, ...] = ("BatchL2Grad",)
    wrapper, field = "GradSampleModuleFastGradientClipping", "_norm_sample"

    def steps(self, quantity: str) -> Step:
        def step() -> None:
            self.forward_backward()
            self.found = {p: vars(p)[self.field].square() for p in self.model.parameters()}

        return step


class Curvlinops(Library):
    """curvlinops: the factors of ``KFACLinearOperator``, in passes of its own after the gradient's."""

    distribution = "curvlinops-for-pytorch"
    quantities = ("KFAC", "KFLR")

    def prepare(self, model: nn.Module) -> nn.Module:
        self.operator = importlib.import_module("curvlinops").KFACLinearOperator
        return model

    def steps(self, quantity: str) -> Step:
        def step() -> None:
            self.lossfunc(self.model(self.X), self.y).backward()
            self.found = self.operator(
                *(self.model, self.lossfunc, list(self.model.parameters()), [(self.X, self.y)]),
                fisher_type="mc" if quantity == "KFAC" else "type-2",
                check_deterministic=False,
                num_data=len(self.X),
                num_per_example_loss_terms=self.y[0].numel(),
            )
            self.found.compute_kronecker_factors()

        return step

    def values(self, quantity: str) -> Values:
        # Where positions share a weight its second factor is another one ("expand"): not compared.
        shared = {name for name, each in self.model.named_modules() if isinstance(each, nn.Conv2d)}
        return {
            f"{name}.weight.{quantity}": [B, self.found._input_covariances[name]]
            for name, B in self.found._gradient_covariances.items()
            if name not in shared
        }


LIBRARIES: dict[str, type[Library]] = {
    "backpack-for-pytorch": Original,
    "ours": Backpack,
    "ours-no-gradient": Alone,
    "ours-forms": FromForms,
    "torch.func": Functional,
    "opacus": Opacus,
    "opacus-ghost": Ghost,
    "curvlinops": Curvlinops,
}
# The folder that a library is installed in; the others come with the environment.
FOLDERS = {
    **{"opacus-ghost": "opacus", "torch.func": "", "low-rank": "", "lanczos": "curvlinops"},
    **{"ours": "", "ours-no-gradient": "", "ours-forms": ""},
}


def distance(found: Values, expected: Values) -> tuple[float, int]:
    """The largest relative error of a parameter's value, and how many parameters were compared.

    Kronecker factors are compared up to numbers that cancel in their product. What only one has is left
    out.
    """
    worst, count = 0.0, 0
    for name in found.keys() & expected.keys():
        a, b = ([t.double().cpu() for t in each[name]] for each in (found, expected))
        if len(a) != len(b):
            return HUGE, count
        if len(a) == 2:
            norms = [s.norm() * t.norm() for s, t in (a, b)]
            a, b = ([t / t.norm() for t in each] for each in (a, b))
            a, b = [*a, norms[0]], [*b, norms[1]]
        for s, t in zip(a, b, strict=True):
            error = (s.reshape(t.shape) - t).abs().max() / t.abs().max().clamp(min=1e-30)
            worst = max(worst, min(float(error.nan_to_num(HUGE)), HUGE))
        count += 1
    return worst, count
