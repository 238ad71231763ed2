"""
Your own operations
===================

A module of your own needs nothing: operations without a rule are differentiated sample by sample,
with the same numbers, and so is a ``torch.autograd.Function``. A rule of a few lines makes an
operation fast. The page on :doc:`own operations, losses and quantities </own>` explains what a rule
returns.

The example is a layer with a circulant matrix ``W[i, j] = w[(i - j) mod d]``. Its product with a
vector is a circular convolution, ``W x = ifft(fft(w) * fft(x))``.
"""

# sphinx_gallery_thumbnail_path = "_static/thumbs/custom_operations.svg"

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from backpack import SampleAxis, backpack, check, extend, op_rule
from backpack.extensions import BatchGrad, DiagGGNExact, DiagHessian, Variance
from backpack.forms.base import Dense

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
X, y = torch.tensor(images[:16]) / 16, torch.tensor(labels[:16])
quantities = [BatchGrad(), Variance(), DiagGGNExact(), DiagHessian()]

# %%
# Without a rule
# --------------


class Circulant(nn.Module):
    """Product with a circulant matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``W x`` for every sample, with the matrix written out."""
        d = torch.arange(len(self.weight))
        return x @ self.weight[d[:, None] - d].T


def network(layer: nn.Module) -> nn.Module:
    """The layer, a curved activation, a classifier."""
    torch.manual_seed(1)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 10)).double()


small = X[:3].reshape(3, 8, 8).mean(1)
report = check(network(Circulant(8)), nn.CrossEntropyLoss(), small, y[:3], quantities)
print(report)
assert report.ok

# %%
# A function with a backward pass of its own
# ------------------------------------------
#
# The same by Fourier transforms, with a backward pass written by hand. The parameter meets the data
# inside, where nothing can be seen: its backward pass is called once for each sample.


class CircularConvolution(torch.autograd.Function):
    """``ifft(fft(w) * fft(x))`` and its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """The product."""
        return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(weight), n=x.shape[-1])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep both inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        """Correlations of the output's gradient with weight and input."""
        x, weight = ctx.saved_tensors
        return correlate(g, weight), correlate(g, x).sum(0)


def correlate(g: Tensor, x: Tensor) -> Tensor:
    """``ifft(fft(g) * conj(fft(x)))``: the transposed product."""
    return torch.fft.irfft(torch.fft.rfft(g) * torch.fft.rfft(x).conj(), n=g.shape[-1])


class ByHand(Circulant):
    """The layer by the hand-written function."""

    def forward(self, x: Tensor) -> Tensor:
        """Circular convolution with the weight."""
        return CircularConvolution.apply(x, self.weight)


report = check(network(ByHand(8)), nn.CrossEntropyLoss(), small, y[:3], quantities)
print(report)
assert report.ok

# %%
# With a rule
# -----------
#
# The two lines with ``torch.overrides`` make it one operation that can be seen. The rule says what
# columns ``g [v, N, 64]`` at its output are at the weight, sample by sample: ``[v, N, 64]``.


def circular(x: Tensor, weight: Tensor) -> Tensor:
    """Circular convolution."""
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(circular, (x, weight), x, weight)
    return CircularConvolution.apply(x, weight)


@op_rule(circular)
def _(batch: SampleAxis, x: Tensor, weight: Tensor) -> list:
    return [(weight, lambda g: Dense(correlate(g, x)))]


class Seen(Circulant):
    """The layer by the operation with a rule."""

    def forward(self, x: Tensor) -> Tensor:
        """Circular convolution with the weight."""
        return circular(x, self.weight)


report = check(network(Seen(8)), nn.CrossEntropyLoss(), small, y[:3], quantities)
print(report)
assert report.ok

# %%
# ``debug=True`` prints how each operation is treated.

model = extend(nn.Sequential(Seen(64), nn.Tanh(), nn.Linear(64, 10)).double())
lossfunc = extend(nn.CrossEntropyLoss())
with backpack(Variance(), debug=True):
    lossfunc(model(X), y).backward()
