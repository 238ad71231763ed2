"""The library in a few seconds: every quantity on a small network of each kind, against brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backpack import backpack, check, extend, optim
from backpack.extensions import KFLR


class Words(nn.Module):
    """An embedding, a recurrent layer, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(7, 3), nn.LSTM(3, 3, batch_first=True)
        self.attention, self.norm = nn.MultiheadAttention(3, 1, batch_first=True), nn.LayerNorm(3)
        self.head = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.rnn(self.words(ids))[0]
        h = self.norm(h + self.attention(h, h, h)[0])
        return self.head(h.mean(1))


def images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(3, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "images": (images, lambda: torch.randn(3, 2, 3, 3).double()),
    "words": (Words, lambda: torch.randint(7, (3, 4))),
}


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("name", NETWORKS)
def test_quantities(name: str, loss: nn.Module) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]
    targets = torch.tensor([0, 2, 1])
    y = targets if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(3, 3).double()
    report = check(model().double(), loss, inputs(), y)
    assert report.ok, report


def test_training() -> None:
    torch.manual_seed(0)
    model, lossfunc = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
    X, y = torch.randn(30, 4), torch.randint(3, (30,))
    model, lossfunc = extend(model), extend(lossfunc)
    optimizer = optim.KFAC(model.parameters(), lr=0.5, damping=0.1)
    losses = []
    for _ in range(20):
        loss = lossfunc(model(X), y)
        with backpack(*optimizer.extensions, KFLR()):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert [len(factor) for factor in model[0].weight.kflr] == [8, 4]
