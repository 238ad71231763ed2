"""Models to measure with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_cnn(classes: int = 10) -> nn.Module:
    """Three convolutions and a linear layer, for images ``[N, 3, 32, 32]``."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 16, classes)),
    )


class Projection(nn.Module):
    """GPT-2's ``Conv1D``: a linear layer whose weight is ``[in, out]``."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside) * 0.02)
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = Projection(width, 3 * width), Projection(width, width)
        self.fc, self.out = Projection(width, 4 * width), Projection(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        split = self.attn(self.ln_1(x)).split(d, dim=2)
        q, k, v = (z.view(n, t, self.heads, d // self.heads).transpose(1, 2) for z in split)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """A language model (Radford et al., 2019): token ids ``[N, T]`` to logits ``[N, T, words]``."""

    def __init__(
        self, words: int = 512, tokens: int = 64, width: int = 64, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.h = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.lm_head(self.ln_f(self.h(x)))


def conv(*args: Any, **kwargs: Any) -> list[nn.Module]:
    """A convolution and a ReLU."""
    return [nn.Conv2d(*args, **kwargs), nn.ReLU()]


def pool3() -> list[nn.Module]:
    """3x3 max-pooling with stride 2 that halves an even side; behind a ReLU, zeros pad well."""
    return [nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)]


def logreg(classes: int = 10) -> nn.Module:
    """One linear layer, for rows of 784."""
    return nn.Sequential(nn.Linear(784, classes))


def mlp(classes: int = 10) -> nn.Module:
    """784-512-256-classes."""
    return nn.Sequential(
        *(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes))
    )


def net_2c2d(classes: int = 10) -> nn.Module:
    """DeepOBS's 2C2D, for images ``[N, 1, 28, 28]``."""
    return nn.Sequential(
        *(*conv(1, 32, 5, padding=2), nn.MaxPool2d(2), *conv(32, 64, 5, padding=2), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, classes)),
    )


def net_3c3d(classes: int = 10) -> nn.Module:
    """DeepOBS's 3C3D, for images ``[N, 3, 32, 32]``."""
    return nn.Sequential(
        *(
            *conv(3, 64, 5),
            *pool3(),
            *conv(64, 96, 3),
            *pool3(),
            *conv(96, 128, 3, padding=1),
            *pool3(),
        ),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()),
        nn.Linear(256, classes),
    )


def all_cnn_c(classes: int = 100, dropout: bool = False) -> nn.Module:
    """All-CNN-C, by default without its dropout, for images ``[N, 3, 32, 32]``."""

    def drop(rate: float) -> list[nn.Module]:
        return [nn.Dropout(rate)] if dropout else []

    return nn.Sequential(
        *(*drop(0.2), *conv(3, 96, 3, padding=1), *conv(96, 96, 3, padding=1)),
        *(*conv(96, 96, 3, padding=1, stride=2), *drop(0.5)),
        *(*conv(96, 192, 3, padding=1), *conv(192, 192, 3, padding=1)),
        *(*conv(192, 192, 3, padding=1, stride=2), *drop(0.5)),
        *(*conv(192, 192, 3), *conv(192, 192, 1), *conv(192, classes, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU, beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn_1, self.bn_2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.relu_1, self.relu_2 = nn.ReLU(), nn.ReLU()
        self.conv_1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu_1(self.bn_1(x))
        return self.shortcut(x) + self.conv_2(self.relu_2(self.bn_2(self.conv_1(x))))


def wide_resnet(classes: int = 10) -> nn.Module:
    """WideResNet 16-4, for images ``[N, 3, 32, 32]``."""
    blocks = [(16, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        *(Residual(*each) for each in blocks),
        *(nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(256, classes),
    )


def resnet_32(classes: int = 10) -> nn.Module:
    """ResNet-32 of modules that branch, as the original library takes it, for ``[N, 3, 32, 32]``."""
    from backpack.custom_module.branching import Parallel

    def block(inside: int, outside: int, stride: int) -> list[nn.Module]:
        same = inside == outside and stride == 1
        shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)
        first = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outside)
        second = nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        return [Parallel(shortcut, nn.Sequential(*first, nn.ReLU(), *second)), nn.ReLU()]

    widths = [16] * 6 + [32] * 5 + [64] * 5
    pairs = zip(widths, widths[1:], strict=False)
    blocks = [each for a, b in pairs for each in block(a, b, 1 if a == b else 2)]
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks),
        *(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, classes)),
    )


class CharLSTM(nn.Module):
    """DeepOBS's character model: ids ``[N, T]`` to logits ``[N, characters, T]``."""

    def __init__(self, characters: int = 83, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.dense = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dense(self.lstm(self.embedding(ids))[0]).permute(0, 2, 1)


class TokensLast(nn.Module):
    """Logits ``[N, T, words]`` as ``[N, words, T]``, which ``nn.CrossEntropyLoss`` takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).permute(0, 2, 1)


class ViT(nn.Module):
    """A small vision transformer without dropout: images ``[N, 3, 32, 32]`` in patches of 4 x 4."""

    def __init__(self, classes: int = 10, width: int = 64, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            *(width, heads, 4 * width, 0.0, "gelu"), batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(1))
