"""
Influence of training samples
=============================

How would the loss on a test sample ``q`` change, had a training sample ``n`` more weight? By influence
functions (Koh and Liang, 2017), by ``- g_q^T (G + lambda I)^-1 g_n``, with ``g`` gradients of the
samples' losses and ``G`` the curvature of the training loss. ``EKFAC`` makes that feasible for large
networks (Grosse et al., 2023, arXiv:2308.03296): one pass over the data for its factors, one for its
eigenvalues, and one for the gradients of the training samples, none of which is kept.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from backpack import accumulate, backpack, extend
from backpack.extensions import EKFAC, EKFLR, BackpropExtension, BatchGrad
from backpack.hessianfree import ggn_vector_product_from_plist


def scores(
    model: nn.Module,
    queries: tuple[Tensor, Tensor],
    loader: DataLoader,
    curvature: BackpropExtension,
    damping: float,
) -> Tensor:
    """Influence of every training sample on every query, ``[Q, N]``."""
    lossfunc, parameters = nn.CrossEntropyLoss(), list(extend(model).parameters())
    accumulate(model, lossfunc, loader, [curvature], gradient=False)
    inputs, targets = queries
    with backpack(BatchGrad(), gradient=False):
        F.cross_entropy(model(inputs), targets, reduction="sum").backward()
    solved = {
        p: getattr(p, curvature.savefield).solve(p.grad_batch, damping).flatten(1) for p in parameters
    }
    found = torch.zeros(len(targets), len(loader.dataset), dtype=inputs.dtype)

    def add(rows: slice) -> None:
        for p in parameters:
            found[:, rows] -= solved[p] @ p.grad_batch.flatten(1).T

    summed = nn.CrossEntropyLoss(reduction="sum")
    accumulate(model, summed, loader, [BatchGrad()], individual=add, gradient=False)
    return found


# %%
# A small problem, by dense matrices
# ----------------------------------
#
# The Gauss-Newton matrix of each parameter comes from plain autograd, its diagonal in the eigenbasis of
# the factors is put in place of it, and gradients are those of one sample after the other.

torch.manual_seed(0)
X, y = torch.randn(20, 3).double(), torch.randint(3, (20,))
tiny = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
found = scores(
    tiny, (X[:5], y[:5]), DataLoader(TensorDataset(X[5:], y[5:]), batch_size=4), EKFLR(), 0.01
)
expected = torch.zeros(5, 15).double()
for p in tiny.parameters():
    output = tiny(X[5:])
    loss, size = F.cross_entropy(output, y[5:]), p.numel()
    columns = [
        ggn_vector_product_from_plist(loss, output, [p], [v.reshape(p.shape)])[0].flatten()
        for v in torch.eye(size).double()
    ]
    vectors = p.ekflr.eigenvectors
    Q = torch.kron(*vectors) if len(vectors) == 2 else vectors[0]
    corrected = Q @ torch.diag((Q.T @ torch.stack(columns) @ Q).diagonal()) @ Q.T
    inverse = torch.linalg.inv(corrected + 0.01 * torch.eye(size))
    losses = F.cross_entropy(tiny(X), y, reduction="none")
    gradients = [torch.autograd.grad(each, p, retain_graph=True)[0].flatten() for each in losses]
    g = torch.stack(gradients)
    expected -= g[:5] @ inverse @ g[5:].T
torch.testing.assert_close(found, expected)
print("influences agree with dense matrices")

# %%
# Digits
# ------
#
# A network is trained, some labels of the training set are wrong.

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images).float() / 16, torch.tensor(labels)
train, test, WRONG = slice(0, 1200), slice(1200, 1240), 60
given = y.clone()
given[:WRONG] = (y[:WRONG] + torch.randint(1, 10, (WRONG,))) % 10
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
for _ in range(150):
    optimizer.zero_grad()
    F.cross_entropy(model(X[train]), given[train]).backward()
    optimizer.step()

loader = DataLoader(TensorDataset(X[train], given[train]), batch_size=256)
curvature = EKFAC(mc_samples=2, generator=torch.Generator().manual_seed(0))
influences = scores(model, (X[test], y[test]), loader, curvature, damping=1e-3)

# %%
# The samples that help a query most, those with the most negative influence on its loss:

helpful = (-influences).topk(5, dim=1).indices
same = (given[train][helpful] == y[test].unsqueeze(1)).double().mean()
print(f"{same:.0%} of the five most helpful samples have the label of the query")
assert same > 0.8

# %%
# Samples that have a harmful influence on all queries together are worth a look: most labels that were
# changed are among them.

harmful = influences.sum(0).topk(2 * WRONG).indices
caught = (harmful < WRONG).sum().item()
print(f"{caught} of {WRONG} wrong labels are among the {2 * WRONG} most harmful samples")
assert caught > 0.6 * WRONG

figure, axes = plt.subplots(3, 6, figsize=(6, 3.2), layout="constrained")
for row, query in zip(axes, (0, 1, 2), strict=True):
    shown = [X[test][query], *X[train][helpful[query]]]
    for place, image in zip(row, shown, strict=True):
        place.imshow(image.reshape(8, 8).tolist(), cmap="gray_r")
        place.axis("off")
    row[0].set_title("query", fontsize=8)
plt.show()
