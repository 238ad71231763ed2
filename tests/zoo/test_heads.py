"""Heads of transformers with their own losses: right at small sizes, bounded at real ones."""

from __future__ import annotations

import time

import pytest
import torch

from backpack import backpack, extend
from backpack import extensions as E
from benchmarks.worker import peak_bytes, reset_peak
from tests.conftest import trim
from tests.zoo.compare import Trial
from tests.zoo.heads import HEADS, REAL, SMALL
from tests.zoo.setting import Setting

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
QUANTITIES = {
    "first": (E.BatchL2Grad, E.SumGradSquared, E.Variance),
    "sampled": (E.DiagGGNMC,),
    "factors": (E.KFAC,),
}


@pytest.mark.parametrize("kind", ["first", "second", "hessian"])
@pytest.mark.parametrize("head", HEADS)
def test_small(head: str, kind: str) -> None:
    """In float64 against brute force."""
    trial = Trial(lambda: HEADS[head](SMALL))
    report = getattr(trial, kind)()
    assert report.errors and report.ok, f"\n{report}"


def compare_with_single_samples(setting: Setting) -> None:
    """Squared norms of gradients of batches of one sample."""
    model, N = setting.model, len(setting.inputs[0])
    fields = {name: p.batch_l2 for name, p in model.named_parameters() if p.grad is not None}
    for n in range(N):
        model.zero_grad()
        (setting.call(model, *(x[n : n + 1] for x in setting.inputs)).loss / N).backward()
        for name, found in fields.items():
            wanted = model.get_parameter(name).grad.square().sum()
            torch.testing.assert_close(found[n], wanted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", QUANTITIES)
@pytest.mark.parametrize("head", HEADS)
def test_real(head: str, kind: str) -> None:
    """With 50,257 words: all fields are there; time and memory are bounded by those of the gradient."""
    torch.manual_seed(0)
    setting, exts = HEADS[head](REAL), [each() for each in QUANTITIES[kind]]
    model = extend(setting.model)

    def run(*asked: E.BackpropExtension) -> tuple[float, int]:
        model.zero_grad()
        trim()  # what is taken from memory that was free already would not be seen
        held = reset_peak()
        begin = time.process_time()
        with backpack(*asked):
            setting.call(model, *setting.inputs).loss.backward()
        return time.process_time() - begin, peak_bytes() - held

    run()
    plain, memory = run()
    run(*exts)
    taken, most = run(*exts)
    values = 0
    for name, p in model.named_parameters():
        for ext in exts if p.grad is not None else ():
            found = getattr(p, ext.savefield)
            parts = found if isinstance(found, list) else [found]
            assert all(bool(part.isfinite().all()) for part in parts), (name, ext)
            values += sum(part.nbytes for part in parts)
    # Neither a word's logit as a sample's own, nor a gradient of words for each sample.
    assert most < 4 * memory + values
    assert taken < 15 * plain
    if kind == "first" and setting.alone:
        compare_with_single_samples(setting)
