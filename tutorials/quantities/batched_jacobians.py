"""
Jacobians of the model output
=============================

The Jacobian of every sample's output in the parameters, ``[N, C, *p]``, in two ways: one backward
pass with ``BatchGrad`` for each of the ``C`` outputs, or a single one with ``SqrtGGNExact`` and a
loss whose Hessian is the identity. The Jacobians give the neural tangent kernel.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, SqrtGGNExact

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = labels[:30].argsort(kind="stable")
X = torch.tensor(images[order]).reshape(-1, 1, 8, 8) / 16
layers = (nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
model = extend(nn.Sequential(*layers).double())
names = [name for name, _ in model.named_parameters()]

# %%
# One output at a time
# --------------------
#
# The sum over samples of one output is a "loss" whose individual gradients are rows of the
# Jacobians.


def by_output() -> dict[str, Tensor]:
    """Jacobians ``[N, C, *p]``."""
    output = model(X)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for c in range(output.shape[1]):
        with backpack(BatchGrad()):
            output[:, c].sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            rows[name].append(p.grad_batch)
    return {name: torch.stack(each, 1) for name, each in rows.items()}


# %%
# All outputs at once
# -------------------
#
# The GGN is ``J^T H J``. For half the summed squared error ``H`` is the identity, and the square
# root ``sqrt_ggn_exact [C, N, *p]`` the Jacobian. What is subtracted does not matter.

squared_error = extend(nn.MSELoss(reduction="sum"))


def at_once() -> dict[str, Tensor]:
    """Jacobians ``[N, C, *p]``."""
    output = model(X)
    with backpack(SqrtGGNExact()):
        (squared_error(output, torch.zeros_like(output)) / 2).backward()
    return {name: p.sqrt_ggn_exact.transpose(0, 1) for name, p in model.named_parameters()}


# %%
# The same by ``torch.func``, which differentiates a function of the parameters for one sample.


def of_one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Output for one sample."""
    return torch.func.functional_call(model, parameters, (x.unsqueeze(0),)).squeeze(0)


parameters = {name: p.detach() for name, p in model.named_parameters()}
reference = torch.func.vmap(torch.func.jacrev(of_one), (None, 0))(parameters, X)
loop, single = by_output(), at_once()
for name in names:
    print(f"{name:10} {list(single[name].shape)}")
    torch.testing.assert_close(loop[name], reference[name])
    torch.testing.assert_close(single[name], reference[name])

# %%
# Neural tangent kernel
# ---------------------
#
# Scalar products of Jacobians over all parameters (Jacot et al., 2018, arXiv:1806.07572); here its
# trace over outputs, for digits in order.

kernel = sum(torch.einsum("ncp,mcp->nm", j, j) for j in (each.flatten(2) for each in single.values()))
smallest = torch.linalg.eigvalsh(kernel)[0]
print(f"smallest eigenvalue {smallest:.3f}")
assert smallest > 0

figure, axes = plt.subplots(figsize=(5, 4))
shown = axes.imshow(kernel.numpy(), cmap="viridis")
axes.set(xlabel="sample", ylabel="sample", title="neural tangent kernel")
figure.colorbar(shown)
plt.show()
