"""Values are read with their types, or an error says why there are none."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, collect, extend
from backpack import extensions as E
from backpack.own import BackpropExtension, Form

X, Y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor([0, 1, 2, 1])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.softmax, self.head = nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 3)
        self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.softmax(self.frozen(self.used(x))))


class Counts(BackpropExtension):
    savefield = "counts"

    def reduce(self, form: Form, sign: Tensor | None = None) -> int:
        return form.samples


def after(*exts: BackpropExtension, **options: str) -> Model:
    torch.manual_seed(0)
    model = extend(Model())
    with backpack(*exts, **options):
        F.cross_entropy(model(X), Y).backward()
    return model


def test_every_quantity() -> None:
    names = [
        n for n in dir(E) if isinstance(getattr(E, n), type) and hasattr(getattr(E, n), "savefield")
    ]
    exts = [getattr(E, name)() for name in names if name not in ("KFRA", "PCHMP")]
    model = after(*exts, Counts())
    assert len(exts) > 20
    for ext in [*exts, Counts()]:
        for p in model.used.parameters():
            assert type(ext).of(p) is ext.of(p) is getattr(p, ext.savefield)
        values = collect(model, type(ext), missing="skip")
        assert list(values) == ["used.weight", "used.bias", "head.weight", "head.bias"]
        assert values["used.bias"] is type(ext).of(model.used.bias)


def test_a_field_of_its_own() -> None:
    ext = E.HMP("product")
    model = after(ext)
    assert ext.of(model.used.bias) is model.used.bias.product
    assert collect(model, ext, missing="skip").keys() == {
        f"{m}.{p}" for m in ("used", "head") for p in ("weight", "bias")
    }
    with pytest.raises(AttributeError, match=r"no 'hmp'.*backpack\(HMP"):
        E.HMP.of(model.used.bias)


def test_why_there_is_none() -> None:
    model = after(E.PCHMP(), E.BatchGrad(), unsupported="skip")
    for parameter, quantity, why in (
        (
            model.frozen.weight,
            E.BatchGrad,
            r"BatchGrad: a parameter of shape \[4, 4\].*not require grad",
        ),
        (model.used.weight, E.PCHMP, "the last block left out: PCHMP is defined where"),
        (model.used.weight, E.Variance, r"no backward pass in a block backpack\(Variance\(...\)\)"),
        (model.unused.weight, E.BatchGrad, "it has no gradient either"),
        (model.used.weight * 2, E.BatchGrad, "computed from others"),
    ):
        with pytest.raises(AttributeError, match=why):
            quantity.of(parameter)
    with pytest.raises(AttributeError, match="^'unused.weight': BatchGrad: a parameter of shape"):
        collect(model, E.BatchGrad)
    with pytest.raises(TypeError, match="expects a parameter, but got Linear"):
        E.BatchGrad.of(model.used)
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        collect(model, E.BatchGrad, missing="no")
    assert E.PCHMP.of(model.head.weight)(torch.zeros(3, 4)).shape == (3, 4)


def test_reasons_are_of_the_last_block() -> None:
    model = after(E.PCHMP(), unsupported="skip")
    weight = model.used.weight
    with pytest.raises(AttributeError, match="left out"):
        E.PCHMP.of(weight)
    plain = extend(nn.Sequential(model.used))
    with backpack(E.PCHMP()):
        F.cross_entropy(plain(X), Y).backward()
    E.PCHMP.of(weight)
    del weight.pchmp
    with pytest.raises(AttributeError, match="no backward pass"):
        E.PCHMP.of(weight)


def test_reasons_keep_nothing_alive() -> None:
    class Never(Counts):
        def reduce(self, form: Form, sign: Tensor | None = None) -> int:
            raise ValueError("never")

    model = after(Never(), unsupported="skip")
    with pytest.raises(AttributeError, match="left out: never"):
        Never.of(model.used.bias)
    alive = weakref.ref(model.used.bias)
    del model
    gc.collect()
    assert alive() is None


TYPED = """
from torch import nn
from backpack import collect
from backpack.extensions import EKFAC, GGNMP, KFLR, BackpropExtension, Variance

class Mine(BackpropExtension):
    savefield = "mine"

model = nn.Linear(2, 3)
reveal_type(Variance.of(model.weight))
reveal_type(collect(model, Variance))
reveal_type(collect(model, Variance()))
reveal_type(collect(model, KFLR))
reveal_type(EKFAC.of(model.weight))
reveal_type(GGNMP.of(model.weight))
reveal_type(collect(model, Mine))
"""


@pytest.mark.slow
def test_it_type_checks(tmp_path: Path) -> None:
    from mypy import api

    file = tmp_path / "typed.py"
    file.write_text(TYPED)
    text, _, status = api.run(["--strict", "--follow-imports=silent", "--config-file=", str(file)])
    found = [line.split('"')[1] for line in text.splitlines() if "Revealed" in line]
    short = [each.replace("torch._tensor.", "").split(", fallback")[0] for each in found]
    assert not status, text
    assert short[:4] == ["Tensor", "dict[str, Tensor]", "dict[str, Tensor]", found[3]]
    assert found[3].endswith("KroneckerFactored]") and "KroneckerEigen" in found[4]
    assert short[5] == "def (Tensor) -> Tensor" or "Reader" not in short[5]
    assert short[6] == "dict[str, Any]"
