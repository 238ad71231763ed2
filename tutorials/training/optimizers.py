"""
Optimizers
==========

The optimizers of ``backpack.optim`` take curvature, Kronecker factors or products from the backward
pass. All are used the same way: ``optimizer.backpack()`` is the block for the backward pass, and
asks for what the step needs.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import extend, optim
from backpack.extensions import BatchL2Grad
from backpack.hessianfree import ggn_vector_product_from_plist

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
TRAIN, SIZE, STEPS = 1400, 128, 30
lossfunc = extend(nn.CrossEntropyLoss())


def network() -> nn.Sequential:
    """A convolution and two linear layers; the same parameters each time."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 24), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(24, 10)).double()


# %%
# One step
# --------
#
# An optimizer extends the model it is given. ``step`` deletes what was computed for it; further
# quantities can be asked for in the same pass, and stay.

model = network()
optimizer = optim.KFAC(model, lr=0.3, damping=0.01, momentum=0.5)
loss = lossfunc(model(X[:SIZE]), y[:SIZE])
with optimizer.backpack(BatchL2Grad()):
    loss.backward()
optimizer.step()
weight = model[0].weight
assert hasattr(weight, "batch_l2")
assert not hasattr(weight, "kfac")

# %%
# What a step solves
# ------------------
#
# The step is ``-lr (C + damping I)^-1 grad`` with one block ``C`` per parameter. ``CGNewton``
# solves with products of the exact block. Put back into the equation, with products by plain
# autograd:

model = network()
optimizer = optim.CGNewton(model, lr=1.0, damping=0.01, tol=1e-10)
parameters = list(model.parameters())
before = [p.detach().clone() for p in parameters]
with optimizer.backpack():
    lossfunc(model(X[:SIZE]), y[:SIZE]).backward()
optimizer.step()
steps = [old - p.detach() for old, p in zip(before, parameters, strict=True)]
reference = network()
output = reference(X[:SIZE])
loss = nn.functional.cross_entropy(output, y[:SIZE])
for p, step in zip(reference.parameters(), steps, strict=True):
    (product,) = ggn_vector_product_from_plist(loss, output, p, step)
    (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
    torch.testing.assert_close(product + 0.01 * step, gradient, rtol=1e-6, atol=1e-9)

# %%
# Several optimizers
# ------------------
#
# On the same batches, each with one setting that was found by trying a few. They are not tuned with
# care: the curves show how the optimizers are used, and not which one is best.

choices = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9),
    "DiagGGNExact": lambda m: optim.DiagGGNExact(m, lr=0.03, damping=0.01),
    "DiagGGNMC": lambda m: optim.DiagGGNMC(m, lr=0.03, damping=0.01, ema_decay=0.9),
    "KFAC": lambda m: optim.KFAC(m, lr=0.3, damping=0.1, ema_decay=0.9),
    "KFLR": lambda m: optim.KFLR(m, lr=0.3, damping=0.1, ema_decay=0.9),
    "EKFAC": lambda m: optim.EKFAC(m, lr=0.3, damping=0.1, ema_decay=0.9),
    "CGNewton": lambda m: optim.CGNewton(m, lr=0.3, damping=0.1, max_iter=4),
}


def train(name: str) -> list[float]:
    """Losses of the mini-batches; prints the accuracy reached."""
    model = network()
    optimizer = choices[name](model)
    torch.manual_seed(1)
    losses = []
    for _ in range(STEPS):
        index = torch.randint(TRAIN, (SIZE,))
        optimizer.zero_grad()
        loss = lossfunc(model(X[index]), y[index])
        if name == "SGD":
            loss.backward()
        else:
            with optimizer.backpack():
                loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(X[TRAIN:]).argmax(1) == y[TRAIN:]).double().mean().item()
    print(f"{name:14} accuracy {accuracy:.1%}")
    assert accuracy > 0.8
    return losses


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name in choices:
    axes.semilogy(train(name), label=name)
axes.set(xlabel="step", ylabel="loss")
axes.legend(loc="lower left", ncols=2)
plt.show()
