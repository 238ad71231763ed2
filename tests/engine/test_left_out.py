"""What a parameter cannot have is raised, warned of or skipped; and no field is of another pass."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend
from backpack import extensions as E
from backpack.own import BackpropExtension, Form

X = torch.linspace(-1, 1, 12).reshape(4, 3)
Y = torch.tensor([0, 1, 2, 1])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)))


class Vectors(BackpropExtension):
    """A quantity of vectors only."""

    savefield = "of_vectors"

    def reduce(self, form: Form, sign: Tensor | None = None) -> Tensor:
        if len(form.shape) > 1:
            raise ValueError("defined for vectors only")
        return form.total()


# Each with quantities that fail and why, beside BatchGrad, which does not.
CASES = {
    "vectors only": (Vectors(), model),
    "not a chain": (E.KFRA(), lambda: extend(Twice())),
    "not piecewise linear": (E.PCHMP(), lambda: extend(nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)))),
}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.l(x))


@pytest.mark.parametrize("name", CASES)
def test_others_go_on(name: str) -> None:
    quantity, make = CASES[name]
    with pytest.raises((NotImplementedError, ValueError)) as raised, backpack(quantity, E.BatchGrad()):
        net = make()
        F.cross_entropy(net(X), Y).backward()
    reason = str(raised.value)
    for p in net.parameters():
        setattr(p, quantity.savefield, "of an earlier pass")
    block = backpack(quantity, E.BatchGrad(), E.DiagGGNExact(), unsupported="warn")
    with pytest.warns(UserWarning, match="leaves out"), block:
        F.cross_entropy(net(X), Y).backward()
    missing = [p for p in net.parameters() if not hasattr(p, quantity.savefield)]
    assert missing and {each.reason for each in block.left_out} == {reason}
    assert all(block.left_out.reasons(p) == {quantity.savefield: reason} for p in missing)
    for p in net.parameters():
        assert hasattr(p, "diag_ggn_exact") and torch.allclose(p.grad_batch.sum(0), p.grad, atol=1e-5)
        assert getattr(p, quantity.savefield, None) != "of an earlier pass"
    text = str(block.left_out)
    assert f"no {quantity.savefield}: " in text and reason in text and "'" in text
    quiet = backpack(quantity, E.BatchGrad(), unsupported="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet:
            F.cross_entropy(net(X), Y).backward()
    assert len(quiet.left_out) == len(missing)
    with quiet:
        F.cross_entropy(model()(X), Y).backward()
    assert not any(each.savefield != quantity.savefield for each in quiet.left_out)


def test_parameters_that_cannot_be_seen() -> None:
    net = extend(Unseen())
    with pytest.raises(RuntimeError, match="'w'"), backpack(E.BatchGrad()):
        net(X).sum().backward()
    block = backpack(E.BatchGrad(), E.DiagGGNExact(), unsupported="skip")
    with block:
        net(X).square().sum().backward()
    assert hasattr(net.last.weight, "diag_ggn_exact") and not hasattr(net.w, "grad_batch")
    assert set(block.left_out.reasons(net.w)) == {"grad_batch", "diag_ggn_exact"}


class Unseen(nn.Module):
    """Autograd does not see one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.l(x) * self.w.data)


def test_batch_norm_leaves_others_out() -> None:
    net = extend(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    block = backpack(E.BatchGrad(), E.Variance(), E.HMP(), unsupported="skip")
    with pytest.warns(UserWarning, match="row's contribution"), block:
        F.cross_entropy(net(X), Y).backward()
    assert hasattr(net[0].weight, "grad_batch") and not hasattr(net[0].weight, "variance")
    assert {each.savefield for each in block.left_out} == {"variance"}


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unsupported must be one of"):
        backpack(E.BatchGrad(), unsupported="ignore")


# --------------------------------------------------------------------------------------
# Whose values fields are


def test_fields_of_an_earlier_pass_go() -> None:
    net = model()
    with backpack(E.BatchGrad(), E.Variance()):
        F.cross_entropy(net(X), Y).backward()
    with backpack(E.BatchGrad()):
        F.cross_entropy(net[2](net[0](X).detach()), Y).backward(inputs=[net[2].weight])
        assert hasattr(net[0].weight, "grad_batch")
    assert hasattr(net[2].bias, "grad_batch"), "not asked for: as p.grad, it stays"
    with backpack(E.BatchGrad()):
        net[0].weight.requires_grad_(False)
        F.cross_entropy(net(X), Y).backward()
    assert not hasattr(net[0].weight, "grad_batch") and hasattr(net[0].bias, "grad_batch")
    assert hasattr(net[0].weight, "variance"), "another quantity, of which this block says nothing"


def test_fields_of_one_block_stay_together() -> None:
    """Two losses of different layers, in one block."""
    net = model()
    with backpack(E.BatchGrad()):
        hidden = net[0](X)
        hidden.square().sum().backward(retain_graph=True)
        net[2](hidden.detach().repeat(1, 1)).square().sum().backward()
    assert hasattr(net[0].weight, "grad_batch") and hasattr(net[2].weight, "grad_batch")


def test_a_block_without_a_pass_says_so() -> None:
    net = model()
    with pytest.warns(UserWarning, match="no backward pass ran"), backpack(E.BatchGrad()):
        loss = F.cross_entropy(net(X), Y)
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), backpack(E.BatchGrad()):
            raise KeyError
        with backpack(E.BatchGrad()):
            torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
        with backpack(E.Variance()), backpack(E.BatchGrad()):
            F.cross_entropy(net(X), Y).backward()
        with backpack():
            pass
        with backpack(E.BatchGrad()), disable():
            F.cross_entropy(net(X), Y).backward()
