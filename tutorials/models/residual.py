"""
Residual networks
=================

Functions, additions and branches in ``forward`` need no rewriting: the block below is written as in
any model zoo. Batch norm has to be in evaluation mode, for in training mode it mixes samples, whose
individual gradients then have no meaning; group norm has no such limit.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, check, extend
from backpack.extensions import BatchGrad, DiagGGNExact, Variance

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:100]).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels[:100])


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut."""
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += identity
        return self.relu(x)


class ResNet(nn.Module):
    """Two blocks and a classifier."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block1 = BasicBlock(width, width)
        self.block2 = BasicBlock(width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.block2(self.block1(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


# %%
# A few steps of training with batch norm's own mode, without quantities.

model, lossfunc = ResNet().double(), nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(30):
    optimizer.zero_grad()
    loss = lossfunc(model(X), y)
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.2f}")

# %%
# Quantities in evaluation mode
# -----------------------------

model, lossfunc = extend(model.eval()), extend(lossfunc)
with backpack(Variance(), DiagGGNExact()):
    lossfunc(model(X), y).backward()

report = check(model, nn.CrossEntropyLoss(), X[:3], y[:3], [BatchGrad(), Variance(), DiagGGNExact()])
print(report)
assert report.ok

# %%
# Mean curvature and mean variance of each parameter tensor.

names = [name for name, _ in model.named_parameters()]
curvature = [p.diag_ggn_exact.mean().item() for p in model.parameters()]
variance = [p.variance.mean().item() for p in model.parameters()]
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.semilogx(curvature, names, "o", label="GGN diagonal")
axes.semilogx(variance, names, "s", label="variance of gradients")
axes.invert_yaxis()
axes.set(xlabel="mean over entries")
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
plt.show()

# %%
# Training mode
# -------------
#
# The error says which module mixes samples, and what to do.

try:
    with backpack(Variance()):
        lossfunc(model.train()(X), y).backward()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
else:
    raise AssertionError("batch norm in training mode has no variance of individual gradients")
