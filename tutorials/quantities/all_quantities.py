"""
Every quantity on one model
===========================

Each quantity is a class in ``backpack.extensions``. Its instance is given to ``backpack(...)``, and
the backward pass saves its value to every parameter, beside ``.grad``. This page computes all of
them on a small convolutional network, and checks the numbers with plain autograd.
"""

# sphinx_gallery_thumbnail_path = "_static/thumbs/all_quantities.svg"

import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import backpack, check, extend, extensions
from backpack.utils.kroneckers import kfacs_to_mat

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X = torch.tensor(images[:8]).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels[:8])

model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 10)).double()
model, lossfunc = extend(model), extend(nn.CrossEntropyLoss())

# %%
# Tensors
# -------
#
# All of them in one backward pass. ``N`` is 8 here; the loss is a mean, so that every sample's
# gradient carries the factor ``1/8`` and their sum is ``p.grad``.

first_order = [
    extensions.BatchGrad(),
    extensions.BatchL2Grad(),
    extensions.SumGradSquared(),
    extensions.Variance(),
]
curvature = [
    extensions.DiagGGNExact(),
    extensions.DiagGGNMC(mc_samples=100),
    extensions.BatchDiagGGNExact(),
    extensions.BatchDiagGGNMC(),
    extensions.SqrtGGNExact(),
    extensions.SqrtGGNMC(),
    extensions.DiagHessian(),
    extensions.BatchDiagHessian(),
    extensions.DiagHessianMC(mc_samples=100),
    extensions.BatchDiagHessianMC(),
]

with backpack(*first_order, *curvature):
    lossfunc(model(X), y).backward()


def short(value: torch.Tensor) -> str:
    """Shape and first numbers of a tensor."""
    numbers = ", ".join(f"{number: .1e}" for number in value.flatten()[:3])
    return f"{str(list(value.shape)):17} {numbers}, ..."


weight = model[0].weight
for quantity in (*first_order, *curvature):
    value = getattr(weight, quantity.savefield)
    print(f"{type(quantity).__name__:18} {quantity.savefield:20} {short(value)}")

# %%
# ``check`` computes the same quantities of a copy of the model by brute force, sample by sample and
# entry by entry, and compares. Square roots are compared by the matrix they are a root of,
# Monte-Carlo estimates of the GGN with exact columns in place of the draws.

exact = [q for q in (*first_order, *curvature) if "HessianMC" not in type(q).__name__]
report = check(model, nn.CrossEntropyLoss(), X, y, exact)
print(report)
assert report.ok

estimate, diagonal = weight.diag_h_mc, weight.diag_h
error = (estimate - diagonal).norm() / diagonal.norm()
print(f"DiagHessianMC of 100 draws differs from DiagHessian by {error:.0%}")
assert error < 0.5

# %%
# Kronecker factors
# -----------------
#
# A list of matrices: ``[B, A]`` for a weight, whose block of the GGN is approximated by ``kron(B,
# A)``, and ``[B]`` for a bias. EKFAC and EKFLR give the eigenvectors of the factors, and
# eigenvalues.

kronecker = [
    extensions.KFAC(mc_samples=100),
    extensions.KFLR(),
    extensions.KFRA(),
    extensions.EmpiricalKFAC(),
]
corrected = [extensions.EKFAC(mc_samples=100), extensions.EKFLR()]

with backpack(*kronecker, *corrected, extensions.DiagGGNExact(), extensions.BatchGrad()):
    lossfunc(model(X), y).backward()

last = model[3]
for quantity in kronecker:
    factors = getattr(last.weight, quantity.savefield)
    print(f"{type(quantity).__name__:18} {quantity.savefield:16} {[list(f.shape) for f in factors]}")
for quantity in corrected:
    vectors, values = getattr(last.weight, quantity.savefield)
    shapes = f"{[list(v.shape) for v in vectors]}, eigenvalues {list(values.shape)}"
    print(f"{type(quantity).__name__:18} {quantity.savefield:16} {shapes}")

# %%
# They approximate, but parts of them are exact and can be checked: the factor of a bias, traces,
# and the last layer in KFRA.

torch.testing.assert_close(last.bias.kflr[0].diag(), last.bias.diag_ggn_exact)
torch.testing.assert_close(last.weight.ekflr.eigenvalues.sum(), last.weight.diag_ggn_exact.sum())
torch.testing.assert_close(kfacs_to_mat(last.weight.kfra), kfacs_to_mat(last.weight.kflr))
gradients = last.bias.grad_batch
torch.testing.assert_close(last.bias.kfac_empirical[0], gradients.T @ gradients)
error = (last.bias.kfac[0] - last.bias.kflr[0]).norm() / last.bias.kflr[0].norm()
print(f"KFAC of 100 draws differs from KFLR by {error:.1%}")
assert error < 0.3

# %%
# Products
# --------
#
# Functions, ``[K, *p] -> [K, *p]``. Multiplied with unit vectors, they give the whole block.

products = [extensions.GGNMP(), extensions.HMP(), extensions.PCHMP()]
with backpack(*products, extensions.DiagGGNExact(), extensions.DiagHessian()):
    lossfunc(model(X), y).backward()

units = torch.eye(weight.numel(), dtype=X.dtype).reshape(-1, *weight.shape)
ggn, hessian, positive = (
    getattr(weight, quantity.savefield)(units).flatten(1) for quantity in products
)
torch.testing.assert_close(ggn.diag(), weight.diag_ggn_exact.flatten())
torch.testing.assert_close(hessian.diag(), weight.diag_h.flatten())
for name, matrix in {"GGN": ggn, "Hessian": hessian, "positive curvature": positive}.items():
    values = torch.linalg.eigvalsh(matrix)
    print(f"{name:18} eigenvalues from {values[0]: .4f} to {values[-1]: .4f}")
assert torch.linalg.eigvalsh(positive - hessian)[0] > 0

# %%
# These are all there are: the other two names are the base class, and a name of the original
# library that says what to use instead.

used = {type(q).__name__ for q in (*first_order, *curvature, *kronecker, *corrected, *products)}
assert used == set(extensions.__all__) - {"BackpropExtension", "HBP"}
