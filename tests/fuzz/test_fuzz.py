"""Random programs against brute force: a few in the ordinary tests, many in the slow ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from tests.fuzz import optimizers, privacy, trial
from tests.fuzz.tally import Tally
from tests.fuzz.trial import Verdict

MODES: dict[str, Callable[..., Verdict]] = {
    "programs": trial.trial,
    "privacy": privacy.trial,
    "optimizers": optimizers.trial,
}
# Refusals of programs that keep samples apart, as a share of all.
MOST_REFUSED = 0.25


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    trial.settled()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def checked(mode: str, seeds: range, length: tuple[int, int], direct: bool = False) -> Tally:
    tally = Tally().run(partial(MODES[mode], length=length, direct=direct), seeds)
    assert not tally.faults, "\n".join(
        f"{v.kind} seed {seed}: {v.why} | {v.what}" for seed, v in tally.faults
    )
    return tally


@pytest.mark.parametrize("mode, seeds", [("programs", 16), ("privacy", 12), ("optimizers", 12)])
def test_random_programs(mode: str, seeds: int) -> None:
    assert checked(mode, range(seeds), (1, 5)).kinds["agree"]


@pytest.mark.slow
@pytest.mark.parametrize("length", [(1, 3), (3, 8)], ids=str)
@pytest.mark.parametrize("first", range(1000, 5000, 500))
def test_many_random_programs(first: int, length: tuple[int, int]) -> None:
    tally = checked("programs", range(first, first + 500), length)
    assert tally.kinds["refused apart"] <= MOST_REFUSED * tally.programs, "\n".join(tally.lines())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 500))
def test_private_training_of_many_programs(first: int) -> None:
    checked("privacy", range(first, first + 500), (1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 500))
def test_optimizers_on_many_programs(first: int) -> None:
    checked("optimizers", range(first, first + 500), (1, 5), direct=True)
