"""
LoRA fine-tuning of a transformer
=================================

A small transformer reads digits row by row. It is trained on digits and fine-tuned on mirrored
digits, by low-rank adapters (Hu et al., 2021, arXiv:2106.09685): only these require grad, and only
they get quantities.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack.extensions import KFAC, BatchGrad, DiagGGNExact, DiagGGNMC, Variance

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
digits = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16
mirrored = digits.flip(2)
y = torch.tensor(labels)
TRAIN = 1200


class Classifier(nn.Module):
    """Eight rows of eight pixels are eight tokens; class logits from their mean."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


def accuracy(model: nn.Module, x: Tensor) -> float:
    """On the digits that were not trained with."""
    with torch.no_grad():
        return (model(x[TRAIN:]).argmax(1) == y[TRAIN:]).float().mean().item()


# %%
# Pre-training, without quantities.

model, lossfunc = Classifier(), extend(nn.CrossEntropyLoss())
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(5):
    for index in torch.randperm(TRAIN).split(100):
        optimizer.zero_grad()
        lossfunc(model(digits[index]), y[index]).backward()
        optimizer.step()
print(f"accuracy: as they are {accuracy(model, digits):.0%}, mirrored {accuracy(model, mirrored):.0%}")

# %%
# Adapters
# --------
#
# ``W + B A`` in place of the weights of each feed-forward layer and of the input. All else is
# frozen.


class LoRA(nn.Module):
    """A frozen linear layer plus a product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The layer and its adapter."""
        return self.base(x) + F.linear(F.linear(x, self.A), self.B)


model.requires_grad_(False)
model.embed = LoRA(model.embed)
for layer in model.encoder.layers:
    layer.linear1, layer.linear2 = LoRA(layer.linear1), LoRA(layer.linear2)
adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
total = sum(p.numel() for p in model.parameters())
print(f"{sum(p.numel() for p in adapters.values()):,} of {total:,} parameters require grad")

# %%
# Fine-tuning
# -----------
#
# How noisy the gradient of each step is: the expected squared norm of the noise of a mean over N
# samples, over the squared norm of the gradient. (``variance`` is that of gradients which carry
# 1/N.)

model = extend(model)
optimizer = torch.optim.Adam(adapters.values(), lr=1e-2)
losses, noise = [], []
for _ in range(5):
    for index in torch.randperm(TRAIN).split(100):
        optimizer.zero_grad()
        loss = lossfunc(model(mirrored[index]), y[index])
        with backpack(Variance()):
            loss.backward()
        optimizer.step()
        n = len(index)
        variance = sum(p.variance.sum() for p in adapters.values()) * n**2 / (n - 1)
        losses.append(loss.item())
        noise.append((variance / sum(p.grad.square().sum() for p in adapters.values())).item())
print(f"accuracy: mirrored {accuracy(model, mirrored):.0%}")
assert accuracy(model, mirrored) > 0.7

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.semilogy(losses, label="loss")
axes.semilogy(noise, label="noise over gradient, squared norms")
axes.set(xlabel="step")
axes.legend()
plt.show()

# %%
# Curvature of the adapters
# -------------------------

with backpack(DiagGGNMC(), KFAC()):
    lossfunc(model(mirrored[:100]), y[:100]).backward()
for name, p in adapters.items():
    factors = " x ".join(str(len(factor)) for factor in p.kfac)
    print(f"{name:26} mean GGN diagonal {p.diag_ggn_mc.mean():.1e}, Kronecker factors {factors}")
assert not any(hasattr(p, "kfac") for p in model.parameters() if not p.requires_grad)

# %%
# Brute force, with a batch of two.

quantities = [BatchGrad(), Variance(), DiagGGNExact()]
report = check(model, nn.CrossEntropyLoss(), mirrored[:2], y[:2], quantities)
print(report)
assert report.ok
