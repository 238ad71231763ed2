"""
Two mistakes that a monitor sees
================================

A learning rate that does not fit, a spoiled batch in the middle of a run:
:func:`backpack.cockpit.watch` finds the first without looking at the loss, and switches on more
instruments when the second arrives.
(The first is a case of Schneider, Dangel, Hennig, 2021, arXiv:2102.06604.)
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack.cockpit import Spike, watch

images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)

# %%
# A learning rate by alpha
# ------------------------
#
# A network with two layers and a range of learning rates. Alpha is -1 where a step begins, 0 at the
# bottom of the valley that it crosses, 1 as high up on the other side. Where learning rates are too
# small, its median stays low (not at -1, as the two ends of a step are seen with different batches);
# it is near the bottom, or a little beyond, for the runs with the least loss. Only where training has
# failed it says nothing: there are no valleys.

RATES, STEPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 120


def train(lr: float) -> tuple[float, float]:
    """Final loss and median alpha."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with watch(model, optimizer, quantities=["alpha"], every=2) as monitor:
        for _ in range(STEPS):
            index = torch.randint(len(X), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(X[index]), y[index]).backward()
            optimizer.step()
    alphas = torch.tensor(monitor.history().column("alpha")[1])
    with torch.no_grad():
        return float(F.cross_entropy(model(X), y)), float(alphas.median())


runs = {lr: train(lr) for lr in RATES}
for lr, (loss, alpha) in runs.items():
    print(f"learning rate {lr:5}: loss {loss:.3f}, median alpha {alpha:+.2f}")
best = min(runs, key=lambda lr: runs[lr][0])
fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.semilogy([alpha for _, alpha in runs.values()], [loss for loss, _ in runs.values()], "o")
ax.set(xlabel="median alpha", ylabel="final loss")

assert all(runs[lr][1] < -0.5 and runs[lr][0] > 5 * runs[best][0] for lr in (0.003, 0.01, 0.03))
assert -0.3 < runs[best][1] < 0.7

# %%
# A transformer, and a spike
# --------------------------
#
# A small language model learns to count. One batch is spoiled. The alarm comes with that step, and for
# the ten steps after it the curvature is looked at too, which would be too much for the whole run.

WORDS, LENGTH = 16, 12


class Language(nn.Module):
    """Predicts the next of some numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 32), nn.Embedding(LENGTH, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[N, T, WORDS]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.block(x, src_mask=mask, is_causal=True))


torch.manual_seed(0)
language = Language()
optimizer = torch.optim.AdamW(language.parameters(), lr=3e-3)
chosen = ["loss", "grad_norm", "update_ratio"]
alarm = Spike(deeper=([*chosen, "hess_trace", "noise_scale"], 10))
monitor = watch(language, optimizer, quantities=chosen, every=2, alarms=alarm)
for step in range(90):
    ids = (torch.randint(WORDS, (32, 1)) + torch.arange(LENGTH + 1)) % WORDS
    if step == 60:
        ids = torch.randint(WORDS, ids.shape)
    optimizer.zero_grad()
    logits = language(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
monitor.close()
monitor.show()

(event,) = [e for e in monitor.history().events if e["event"] == "spike"]
print(event["message"])
assert event["step"] == 60
assert monitor.history().column("hess_trace")[0] == list(range(61, 71))
