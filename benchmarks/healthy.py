"""Ten training runs without a fault, of different problems and optimizers, in which no alarm is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn, optim

from backpack.cockpit import History, watch

STEPS = 150


class Run(NamedTuple):
    """A problem and its optimizer.

    Args:
        build: the network.
        data: inputs and targets of all samples.
        lossfunc: of the network's output and targets.
        optimizer: of its parameters.
        batch: number of samples of a step.
        schedule: the learning rate's factor at each step.
        clip: the gradient's norm, at most.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    lossfunc: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], optim.Optimizer]
    batch: int = 64
    schedule: Callable[[int], float] = lambda step: 1.0
    clip: float | None = None


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[N, 64]`` and classes."""
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def _table(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    X, y = (torch.as_tensor(each, dtype=torch.float32) for each in found)
    return (X - X.mean(0)) / X.std(0), y.unsqueeze(1)


def diabetes() -> tuple[Tensor, Tensor]:
    """Ten features, and a number to predict."""
    X, y = _table(load_diabetes(return_X_y=True))
    return X, (y - y.mean()) / y.std()


def cancer() -> tuple[Tensor, Tensor]:
    """Thirty features, and one of two classes."""
    return _table(load_breast_cancer(return_X_y=True))


def counting() -> tuple[Tensor, Tensor]:
    """Sequences that count in steps of one, two or three; and the next number at each place."""
    starts, steps = torch.randint(16, (2000, 1)), torch.randint(1, 4, (2000, 1))
    rows = (starts + steps * torch.arange(13)) % 16
    return rows[:, :-1], rows[:, 1:]


def itself() -> tuple[Tensor, Tensor]:
    """Images, to be drawn again."""
    X, _ = digits()
    return X, X


def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of ``[N, T, C]``."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def chain(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with something between."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Two of them, each followed by a normalisation."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), norm(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


class Recurrent(nn.Module):
    """An LSTM that predicts the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(16, 16), nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[N, T, 16]``."""
        return self.head(self.lstm(self.words(ids))[0])


class Transformer(nn.Module):
    """One block of attention that predicts the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(16, 32), nn.Embedding(12, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[N, T, 16]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.block(x, src_mask=mask, is_causal=True))


class Residual(nn.Module):
    """Layers beside which their input goes on, with layer normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 48), nn.Linear(48, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 48))
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 10]``."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def warmup(step: int) -> float:
    """Up over twenty steps, then down in a cosine."""
    rest = torch.tensor((step - 20) / (STEPS - 20) * torch.pi)
    return (step + 1) / 20 if step < 20 else float(0.5 * (1 + rest.cos()))


HEALTHY = {
    "digits, MLP, SGD": Run(
        lambda: chain(64, 64, 64, 10), digits, F.cross_entropy, lambda p: optim.SGD(p, 0.2)
    ),
    "digits, MLP with tanh, Adam": Run(
        *(lambda: chain(64, 64, 64, 10, act=nn.Tanh), digits, F.cross_entropy),
        lambda p: optim.Adam(p, 3e-3),
    ),
    "digits, CNN with group norm, momentum": Run(
        *(lambda: convolutions(lambda c: nn.GroupNorm(2, c)), digits, F.cross_entropy),
        lambda p: optim.SGD(p, 0.05, momentum=0.9),
    ),
    "digits, CNN with batch norm, Adam": Run(
        lambda: convolutions(nn.BatchNorm2d), digits, F.cross_entropy, lambda p: optim.Adam(p, 3e-3)
    ),
    "digits, residual network, AdamW, warm-up and cosine": Run(
        *(Residual, digits, F.cross_entropy, lambda p: optim.AdamW(p, 3e-3, weight_decay=0.05)),
        schedule=warmup,
    ),
    "digits, autoencoder, Adam": Run(
        lambda: chain(64, 32, 8, 32, 64), itself, F.mse_loss, lambda p: optim.Adam(p, 3e-3)
    ),
    "diabetes, regression, Nesterov": Run(
        *(lambda: chain(10, 32, 1, act=nn.Tanh), diabetes, F.mse_loss),
        lambda p: optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
    ),
    "breast cancer, logistic regression, SGD": Run(
        *(lambda: nn.Linear(30, 1), cancer, F.binary_cross_entropy_with_logits),
        *(lambda p: optim.SGD(p, 0.1), 32),
    ),
    "counting, LSTM, RMSprop, clipped": Run(
        Recurrent, counting, tokens, lambda p: optim.RMSprop(p, 3e-3), 32, clip=1.0
    ),
    "counting, transformer, AdamW, warm-up and cosine": Run(
        Transformer, counting, tokens, lambda p: optim.AdamW(p, 3e-3), 32, warmup
    ),
}


def train(name: str, seed: int = 0) -> History:
    """One of the runs, with each step tracked and all alarms on."""
    given = HEALTHY[name]
    torch.manual_seed(seed)
    X, y = given.data()
    model = given.build()
    optimizer = given.optimizer(model.parameters())
    schedule = optim.lr_scheduler.LambdaLR(optimizer, given.schedule)
    with watch(model, optimizer, every=1, alarms="all") as monitor:
        for _ in range(STEPS):
            chosen = torch.randint(len(X), (given.batch,))
            optimizer.zero_grad()
            given.lossfunc(model(X[chosen]), y[chosen]).backward()
            if given.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), given.clip)
            optimizer.step()
            schedule.step()
    return monitor.history()
