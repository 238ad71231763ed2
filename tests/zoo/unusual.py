"""Transformers of torch.nn, and models that use their parameters in unusual ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.cases import Apply, P, norm
from tests.zoo.setting import N, Setting, classifier, named, regression

D, HEADS, WIDTH, T = 4, 2, 5, 4
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.arange(T) >= torch.tensor([T, 2, 3]).unsqueeze(1)


def tokens(time_first: bool = False) -> Tensor:
    """Sequences of ``T`` vectors."""
    return torch.randn(*((T, N) if time_first else (N, T)), D)


def _weights(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add, for masks of two kinds are deprecated."""
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf)


def _encoder(
    *, causal: bool = False, padding: bool = False, final: bool = False, **options: Any
) -> Setting:
    layer = nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.0, batch_first=True, **options)
    last = nn.LayerNorm(D) if final else None
    model = nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=False)

    def call(model: nn.Module, src: Tensor) -> Tensor:
        attend = _weights(CAUSAL, src) if causal else None
        keys = _weights(PADDING, src) if padding else None
        return model(src, mask=attend, src_key_padding_mask=keys, is_causal=causal)

    return regression(model, tokens(), call=call)


def _decoder(**options: Any) -> Setting:
    layer = nn.TransformerDecoderLayer(D, HEADS, WIDTH, 0.0, batch_first=True, **options)
    model = nn.TransformerDecoder(layer, 2, nn.LayerNorm(D))

    def call(model: nn.Module, tgt: Tensor, memory: Tensor) -> Tensor:
        return model(tgt, memory, tgt_mask=CAUSAL, memory_key_padding_mask=PADDING, tgt_is_causal=True)

    return regression(model, tokens(), tokens(), call=call)


def _transformer(time_first: bool, **options: Any) -> Setting:
    model = nn.Transformer(D, HEADS, 1, 1, WIDTH, 0.0, batch_first=not time_first, **options)

    def call(model: nn.Module, src: Tensor, tgt: Tensor) -> Tensor:
        return model(src, tgt, tgt_mask=CAUSAL, src_key_padding_mask=PADDING)

    inputs = tokens(time_first), tokens(time_first)
    return regression(model, *inputs, call=call, batch_dim=int(time_first))


TORCH: dict[str, Callable[[], Setting]] = {
    "encoder": _encoder,
    "encoder, gelu": partial(_encoder, activation="gelu"),
    "encoder, causal": partial(_encoder, causal=True),
    "encoder, padding": partial(_encoder, padding=True, final=True),
    "encoder, causal, padding, norm first": partial(
        _encoder, causal=True, padding=True, norm_first=True
    ),
    "encoder, no bias": partial(_encoder, bias=False, final=True),
    "decoder": _decoder,
    "decoder, norm first": partial(_decoder, norm_first=True),
    "transformer": partial(_transformer, False),
    "transformer, norm first": partial(_transformer, False, norm_first=True),
    "transformer, time first": partial(_transformer, True),
}


# --------------------------------------------------------------------------------------
# Parameters used in unusual ways


def _mlp(first: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(first or nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _perceptron(wrap: Callable[[nn.Module], Any]) -> Setting:
    """Two layers, the first and the second of which are wrapped."""
    model = _mlp()
    wrap(model[0])
    wrap(model[2])
    return classifier(model.eval(), torch.randn(N, 4))


def _convolutional(wrap: Callable[[nn.Module], Any]) -> Setting:
    conv = nn.Conv2d(2, 3, 2)
    wrap(conv)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return classifier(model.eval(), torch.randn(N, 2, 3, 3))


def _recurrent(wrap: Callable[[nn.Module, str], Any]) -> Setting:
    lstm = nn.LSTM(2, 3, batch_first=True)
    wrap(lstm, "weight_hh_l0")
    return regression(lstm, torch.randn(N, 3, 2), outputs=lambda o: o[0])


class LoRA(nn.Module):
    """A frozen layer and a trained product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = P(rank, base.in_features), P(base.out_features, rank)

    def forward(self, a: Tensor) -> Tensor:
        return self.base(a) + 2 * F.linear(F.linear(a, self.down), self.up)


class MergedLoRA(LoRA):
    """The same, with the product added to the frozen weight before it meets data."""

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.base.weight + 2 * self.up @ self.down, self.base.bias)


class Tied(nn.Module):
    """A language model whose output weight is its embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(ids)).tanh())


class TiedTranspose(nn.Module):
    """An autoencoder whose decoder is the encoder, transposed, at inputs of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encode = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.encode(self.embedding(ids)).tanh()
        return hidden @ self.encode.weight @ self.embedding.weight.t()


def _language(model: nn.Module) -> Setting:
    ids, target = torch.randint(7, (N, 3)), torch.randint(7, (N, 3))
    return classifier(model, ids, target=target, outputs=lambda f: f.mT)


def _both(model: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return model(a), model(b)


def _siamese(loss: Callable[[Tensor, Tensor], Tensor]) -> Setting:
    return Setting(
        _mlp(),
        (torch.randn(N, 4), torch.randn(N, 4)),
        lambda f: loss(f[:, :3], f[:, 3:]),
        _both,
        lambda pair: torch.cat(pair, 1),
        lambda pair: loss(*pair),
    )


class Checkpointed(nn.Module):
    """Blocks whose activations are computed anew in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
        self.outer, self.reentrant = nn.Linear(4, 3), reentrant

    def forward(self, a: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, a, use_reentrant=self.reentrant)
        return self.outer(hidden + a)


def _frozen(*names: str) -> Setting:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        norm(nn.BatchNorm1d(3)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(9, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(names))
    return classifier(model.eval(), torch.randn(N, 2, 4))


@dataclass
class Result:
    """Output of a model as a dataclass."""

    logits: Tensor
    hidden: Tensor


def _structured(make: Callable[[Tensor, Tensor], Any], get: Callable[[Any], Tensor]) -> Setting:
    model = Apply(
        lambda m, a: make(m.o(h := m.i(a).tanh()), h),
        i=nn.Linear(4, 5),
        o=nn.Linear(5, 3),
    )
    return classifier(model, torch.randn(N, 4), outputs=get)


def _two_outputs() -> Setting:
    made = _structured(Result, lambda o: torch.cat([o.logits, o.hidden], 1))
    made.loss = lambda o: o.logits.logsumexp(1).mean() + o.hidden.pow(2).sum()
    made.criterion = lambda f: f[:, :3].logsumexp(1).mean() + f[:, 3:].pow(2).sum()
    return made


class Several(nn.Module):
    """Inputs of different kinds, with an optional one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image, self.number = nn.Embedding(5, 3), nn.Conv2d(1, 3, 2), nn.Linear(2, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, image: Tensor, *, words: Tensor, number: Tensor | None = None) -> Tensor:
        hidden = self.image(image).flatten(2).mean(2) + self.words(words).mean(1)
        if number is not None:
            hidden = hidden * self.number(number).sigmoid()
        return self.head(hidden.tanh())


class Keyword(nn.Module):
    """No positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp()

    def forward(self, *, features: Tensor) -> Tensor:
        return self.layers(features)


def _several(*extra: Tensor) -> Setting:
    def call(model: nn.Module, image: Tensor, words: Tensor, *number: Tensor) -> Tensor:
        return model(image, words=words, **dict(zip(["number"], number, strict=False)))

    return classifier(Several(), torch.randn(N, 1, 3, 3), torch.randint(5, (N, 2)), *extra, call=call)


def _parts(forward: Callable[..., Tensor], **parts: Any) -> Setting:
    """A function of parameters and of three sequences."""
    return regression(Apply(forward, **parts), torch.randn(N, T, D))


def _last_token(m: Any, a: Tensor) -> Tensor:
    """One token of each sample is picked, as classifiers that read a text to its end do."""
    return m.o(m.i(a).tanh()[torch.arange(len(a)), torch.tensor([1, 0, 3])])


def _keyword_products(m: Any, a: Tensor) -> Tensor:
    q = m.q(a)
    scores = q.new_zeros(len(a), T, T).baddbmm(batch1=q, batch2=q.mT, alpha=0.5).softmax(-1)
    return torch.bmm(input=scores, mat2=torch.matmul(input=q, other=m.w))


def _expanded_constant(m: Any, a: Tensor) -> Tensor:
    """Positions, repeated for every sample before they meet parameters, time first."""
    h = a.transpose(0, 1)
    place = torch.linspace(0, 1, T * D, dtype=a.dtype).reshape(T, 1, D).expand(-1, len(a), -1)
    k, q = torch.einsum("ibh,hnd->ibnd", place, m.k), torch.einsum("ibh,hnd->ibnd", h, m.q)
    return torch.einsum("ibnd,jbnd->bnij", q, k).softmax(-1)


def _view_in_place(m: Any, a: Tensor) -> Tensor:
    """Part of a product is changed in place; one factor is a parameter that met constants only."""
    place = torch.linspace(0, 1, 2 * T * D, dtype=a.dtype).reshape(2 * T, D)
    q, k = m.q(a).unflatten(2, (2, 2)), torch.einsum("td,dnh->tnh", place, m.k)
    scores = torch.einsum("binh,tnh->bnit", q, k)[..., :T]
    scores *= torch.linspace(0, 1, T, dtype=a.dtype)
    return scores


def _all_tokens_to_one_expert(m: Any, a: Tensor) -> Tensor:
    """Two experts of three for each token: one expert is always among them."""
    tokens = a.flatten(0, 1)
    scores = m.gate(tokens).softmax(-1)
    _, chosen = torch.topk(scores + torch.tensor([9.0, 0.0, 0.0], dtype=a.dtype), 2)
    weight = scores.gather(1, chosen)
    out = torch.zeros_like(tokens)
    for expert in range(3):
        place, token = torch.where((chosen == expert).T)
        hidden = F.linear(tokens[token], m.w[expert]).tanh()
        out.index_add_(0, token, hidden * weight[token, place, None])
    return out.reshape(a.shape)


REUSE: dict[str, Callable[[], Setting]] = {
    "weight norm": lambda: _perceptron(parametrizations.weight_norm),
    "weight norm, convolution": lambda: _convolutional(partial(parametrizations.weight_norm, dim=1)),
    "spectral norm": lambda: _perceptron(parametrizations.spectral_norm),
    "spectral norm, convolution": lambda: _convolutional(parametrizations.spectral_norm),
    "orthogonal": lambda: _perceptron(
        partial(parametrizations.orthogonal, orthogonal_map="matrix_exp")
    ),
    "orthogonal, cayley": lambda: _perceptron(
        partial(parametrizations.orthogonal, orthogonal_map="cayley", use_trivialization=False)
    ),
    "orthogonal, householder": lambda: _perceptron(
        partial(parametrizations.orthogonal, orthogonal_map="householder")
    ),
    "weight norm, recurrent": lambda: _recurrent(parametrizations.weight_norm),
    "pruned at random": lambda: _perceptron(lambda m: prune.random_unstructured(m, "weight", 0.4)),
    "pruned rows": lambda: _perceptron(lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0)),
    "pruned convolution": lambda: _convolutional(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "LoRA": lambda: classifier(_mlp(LoRA(nn.Linear(4, 5), 2)), torch.randn(N, 4)),
    "LoRA, merged": lambda: classifier(_mlp(MergedLoRA(nn.Linear(4, 5), 2)), torch.randn(N, 4)),
    "tied embedding": lambda: _language(Tied()),
    "tied and transposed": lambda: _language(TiedTranspose()),
    "siamese, distance": lambda: _siamese(F.mse_loss),
    "siamese, log-cosh": lambda: _siamese(lambda a, b: (a - b).cosh().log().mean()),
    "checkpointed": lambda: classifier(Checkpointed(), torch.randn(N, 4)),
    "frozen trunk": lambda: _frozen("0", "1"),
    "frozen head": lambda: _frozen("4", "6"),
    "frozen between": lambda: _frozen("1", "4.weight"),
    "dictionary": lambda: _structured(lambda f, h: {"logits": f, "hidden": h}, lambda o: o["logits"]),
    "tuple": lambda: _structured(lambda f, h: (h, (f,)), lambda o: o[1][0]),
    "dataclass": lambda: _structured(Result, lambda o: o.logits),
    "two outputs of a dataclass": _two_outputs,
    "keyword input": lambda: classifier(Keyword(), torch.randn(N, 4), call=named("features")),
    "several inputs": lambda: _several(),
    "several inputs, optional one": lambda: _several(torch.randn(N, 2)),
    "last token": lambda: _parts(_last_token, i=nn.Linear(4, 3), o=nn.Linear(3, 3)),
    "products with keywords": lambda: _parts(_keyword_products, q=nn.Linear(4, 3), w=P(3, 2)),
    "expanded constant": lambda: _parts(_expanded_constant, k=P(4, 2, 2), q=P(4, 2, 2)),
    "view in place": lambda: _parts(_view_in_place, k=P(4, 2, 2), q=nn.Linear(4, 4)),
    "all tokens to one expert": lambda: _parts(
        _all_tokens_to_one_expert, gate=nn.Linear(4, 3), w=P(3, 4, 4)
    ),
}
