"""
Curvature of a language model, and its noise
============================================

A transformer of four layers reads text letter by letter. Its loss has a term for each position, its GGN
a column for each letter of the alphabet at each position: exact columns are too many. Random columns
give eigenvalues, eigenvectors, and what each *text* says about slope and curvature along them.
"""

import argparse
import inspect

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from backpack import extend
from backpack.vivit import LowRank

text = inspect.getsource(argparse)[:20_000]
letters = sorted(set(text))
ids = torch.tensor([letters.index(letter) for letter in text])
STEPS, SIZE, WIDTH = 24, 16, 32


class Transformer(nn.Module):
    """Four layers; each position sees itself and those before it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, WIDTH), nn.Embedding(STEPS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, words)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        h = self.word(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            h = block(h, src_mask=mask)
        return self.head(h)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Texts, and the letter that follows each letter."""
    starts = torch.randint(len(ids) - STEPS - 1, (SIZE,), generator=torch.Generator().manual_seed(seed))
    rows = torch.stack([ids[s : s + STEPS + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


torch.manual_seed(0)
model, lossfunc = extend(Transformer(len(letters))), nn.CrossEntropyLoss()


def loss(seed: int) -> Tensor:
    X, y = batch(seed)
    return lossfunc(model(X).flatten(0, 1), y.flatten())


# %%
# Two looks, before and after training
# ------------------------------------
#
# One sample is one text: its gradient is the sum over positions. Random columns are drawn for each
# position, so that with ``mc_samples=4`` every text has four columns.


def look(title: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues of each layer, and the signal-to-noise ratio of slopes along the top of all."""
    model.zero_grad()
    torch.manual_seed(1)
    with LowRank(columns="mc", mc_samples=4) as curvature:
        loss(0).backward()
    pairs = curvature.eigh(k=8)
    slopes = curvature.derivatives(pairs).gammas
    # The mean over texts of each one's slope is that of the gradient.
    for k, e in enumerate(zip(*pairs.vectors, strict=True)):
        slope = sum((v * p.grad).sum() for v, p in zip(e, curvature.parameters, strict=True))
        assert torch.isclose(slopes[:, k].mean(), slope, rtol=1e-2, atol=1e-4)
    top = torch.stack([curvature.eigvalsh(block)[0] for block in model.blocks])
    noise = slopes.mean(0).square() / slopes.var(0, unbiased=False)
    print(
        f"{title}: loss {loss(0).item():.2f}, largest eigenvalue {pairs.values[0]:.2f}, of layers",
        end=" ",
    )
    print([round(each, 2) for each in top.tolist()])
    return top, noise


tops, noises = {}, {}
tops["before"], noises["before"] = look("before training")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for seed in range(1, 101):
    optimizer.zero_grad()
    loss(seed).backward()
    optimizer.step()
tops["after"], noises["after"] = look("after training")

# %%
# Signal and noise
# ----------------
#
# Before training texts agree on where the loss falls: how often each letter occurs is the same in all
# of them. Later each text has something else to say, and the slope along the same number of leading
# directions is mostly noise.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for name in tops:
    left.plot(range(1, 5), tops[name], "o-", label=f"{name} training")
    right.semilogy(range(1, 9), noises[name], "o-", label=f"{name} training")
left.set(xlabel="layer", ylabel="largest eigenvalue", xticks=range(1, 5))
right.set(xlabel="direction", ylabel="signal-to-noise of slopes")
right.axhline(1, color="gray", linewidth=0.8)
left.legend()
plt.show()
print({name: f"{noise[0]:.2g}" for name, noise in noises.items()})
assert noises["after"].max() < noises["before"].max()
