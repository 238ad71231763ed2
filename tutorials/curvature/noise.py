"""
Curvature and its noise during training
=======================================

The loss of a mini-batch is curved along few directions only: as many as the network has outputs, or
somewhat more. This script looks at them while a small network learns digits. How large is the curvature
along each, how much do slope and curvature differ from sample to sample, how much of the gradient lies
in their space, and does that space stay where it is? The pictures are those of Dangel, Tatzel, Hennig,
ViViT (arXiv:2106.02624).
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from backpack import extend
from backpack.vivit import GGN, LowRank, draw_noise, draw_overlaps, draw_spectrum, overlap

images, labels = load_digits(return_X_y=True)
X = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
SIZE, K = 64, 10

torch.manual_seed(0)
model = extend(
    nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
)
lossfunc = extend(nn.CrossEntropyLoss())

# %%
# One backward pass
# -----------------
#
# ``LowRank`` keeps what a backward pass has seen, in a form that takes as much memory as activations,
# and not that of a matrix. Everything else is asked for afterwards.

with LowRank() as curvature:
    lossfunc(model(X[:SIZE]), y[:SIZE]).backward()

pairs = curvature.eigh(k=K)
print("leading eigenvalues", [f"{value:.3g}" for value in pairs.values])
print(f"trace {curvature.trace():.3g}, kept {curvature.memory / 2**20:.1f} MB")
draw_spectrum(curvature.eigvalsh())
plt.show()

# %%
# They are eigenpairs of the matrix that products with plain autograd give:

ggn = GGN(model, nn.CrossEntropyLoss(), [(X[:SIZE], y[:SIZE])])
vectors = ggn.join(pairs.vectors).T
assert torch.allclose(ggn @ vectors, vectors * pairs.values, atol=1e-4 * float(pairs.values[0]))
assert torch.allclose(vectors.T @ vectors, torch.eye(K), atol=1e-4)

# %%
# Slope and curvature of every sample
# -----------------------------------
#
# Along each direction every sample's own loss has a slope and a curvature. Their means are those of the
# mini-batch's loss; how far they scatter says what a mini-batch can know.

found = curvature.derivatives(pairs)
gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
assert torch.allclose(found.gammas.mean(0), vectors.T @ gradient, atol=1e-4)
assert torch.allclose(found.lambdas.mean(0), pairs.values, rtol=1e-3)
draw_noise(found, pairs.values)
plt.show()

# %%
# During training
# ---------------

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
STEPS, LOOKS = 150, {0, 5, 10, 20, 40, 80, 149}
history, spaces = [], []
for step in range(STEPS):
    index = torch.randint(len(X), (SIZE,))
    optimizer.zero_grad()
    loss = lossfunc(model(X[index]), y[index])
    if step in LOOKS:
        with LowRank() as curvature:
            loss.backward()
        pairs = curvature.eigh(k=K)
        slopes, curvatures = curvature.derivatives(pairs).snr
        share = curvature.share(pairs).sum()
        history.append((step, pairs.values, slopes, curvatures, share))
        spaces.append(pairs.vectors)
        print(f"step {step}: loss {loss.item():.2f}, share of the gradient {share:.0%}")
    else:
        loss.backward()
    optimizer.step()

figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
steps = [each[0] for each in history]
axes[0].semilogy(steps, torch.stack([each[1] for each in history]), "o-", ms=3, color="C0")
axes[0].set(xlabel="step", ylabel="eigenvalues")
axes[1].semilogy(steps, torch.stack([each[2] for each in history]).mean(1), "o-", label="slopes")
axes[1].semilogy(steps, torch.stack([each[3] for each in history]).mean(1), "o-", label="curvatures")
axes[1].set(xlabel="step", ylabel="signal-to-noise ratio")
axes[1].legend()
table = torch.tensor([[overlap(a, b) for b in spaces] for a in spaces])
draw_overlaps(table, [str(step) for step in steps], axes[2])
plt.show()

# %%
# Curvature is far better known than slope: every sample is curved along these directions, but samples
# pull to either side. The spaces at neighbouring steps overlap much more than random ones would.

assert all(curvatures.mean() > slopes.mean() for _, _, slopes, curvatures, _ in history)
random = K / len(gradient)
assert all(overlap(a, b) > 20 * random for a, b in zip(spaces[1:], spaces[2:], strict=False))

# %%
# The gradient lies in the leading space to a large part. Do not read too much into that: the space is
# made from the same samples, whose gradients are sums of the same rows. Directions of another
# mini-batch are a fairer question.

with LowRank() as curvature:
    lossfunc(model(X[:SIZE]), y[:SIZE]).backward()
own = curvature.share(curvature.eigh(k=K)).sum()
with LowRank() as other:
    lossfunc(model(X[SIZE : 2 * SIZE]), y[SIZE : 2 * SIZE]).backward()
foreign = curvature.share(other.eigh(k=K)).sum()
print(f"share in the batch's own space {own:.0%}, in another batch's {foreign:.0%}")
assert random < foreign < own

# %%
# Random columns instead of exact ones
# ------------------------------------
#
# One random column for each sample in place of nine makes it cheaper, and finds nearly the same space.

with LowRank("mc", mc_samples=4, generator=torch.Generator().manual_seed(0)) as sampled:
    lossfunc(model(X[:SIZE]), y[:SIZE]).backward()
agreement = overlap(sampled.eigh(k=K), curvature.eigh(k=K))
print(f"overlap of sampled and exact space {agreement:.0%}")
assert agreement > 0.5
