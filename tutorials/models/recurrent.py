"""
Recurrent networks
==================

A character-level language model: embedding, two LSTM layers, a linear layer, and cross-entropy over
all steps. A sample is a sequence. ``nn.LSTM`` keeps its fast kernel.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack.extensions import KFAC, BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, Variance

torch.manual_seed(0)

# %%
# Text
# ----
#
# A counting rhyme, made here; the model learns which character comes next.

THINGS = "pipers drummers dancers milkers swimmers layers rings birds hens doves"
NUMBERS = "ten nine eight seven six five four three two one".split()
verses = [
    f"{a} {b} and {c} more. "
    for a, c in zip(NUMBERS[:-1], NUMBERS[1:], strict=True)
    for b in THINGS.split()
]
text = "".join(verses)
characters = sorted(set(text))
codes = torch.tensor([characters.index(each) for each in text])
STEPS, N = 25, 16


def batch() -> tuple[Tensor, Tensor]:
    """Sequences ``[N, STEPS]`` and, for each step, the character that follows."""
    starts = torch.randint(len(codes) - STEPS, (N, 1))
    index = starts + torch.arange(STEPS)
    return codes[index], codes[index + 1]


class CharRNN(nn.Module):
    """Characters in, logits of the next character out, ``[N, classes, STEPS]`` as torch has it."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for all steps."""
        hidden, _ = self.lstm(self.embedding(x))
        return self.linear(hidden).transpose(1, 2)


# %%
# Training, and what it costs to look
# -----------------------------------
#
# Norms of the sequences' gradients and their variance, in each step of training.

model = extend(CharRNN(len(characters), 32))
lossfunc = extend(nn.CrossEntropyLoss())
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
losses, norms = [], []
for _ in range(80):
    X, y = batch()
    optimizer.zero_grad()
    loss = lossfunc(model(X), y)
    with backpack(BatchL2Grad(), Variance()):
        loss.backward()
    optimizer.step()
    losses.append(loss.item())
    norms.append(torch.stack([p.batch_l2 for p in model.parameters()]).sum(0).sqrt() * N)
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
assert losses[-1] < 1

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.semilogy(losses, label="loss")
axes.semilogy(torch.stack(norms).median(1).values, label="median norm of a sequence's gradient")
axes.set(xlabel="step")
axes.legend()
plt.show()

# %%
# Curvature
# ---------
#
# An LSTM's parameters are used at every step; their Kronecker factors are as large as one step's.

with backpack(DiagGGNMC(), KFAC()):
    lossfunc(model(X), y).backward()
for name, p in model.named_parameters():
    factors = " x ".join(str(len(factor)) for factor in p.kfac)
    print(f"{name:18} {list(p.diag_ggn_mc.shape)!s:10} Kronecker factors {factors}")

# %%
# Brute force on a smaller copy: two sequences of four steps.

small = CharRNN(len(characters), 3).double()
quantities = [BatchGrad(), BatchL2Grad(), Variance(), DiagGGNExact()]
report = check(small, nn.CrossEntropyLoss(), X[:2, :4], y[:2, :4], quantities)
print(report)
assert report.ok
