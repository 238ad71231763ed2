"""The case table: models and losses that every quantity is checked on. A new op is one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Case(NamedTuple):
    """A model and its input; outputs are what the loss is made to fit."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    batch_dim: int = 0
    output_dim: int = 0


class Apply(nn.Module):
    """A module from parameters and a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(self, *inputs)


def P(*shape: int) -> nn.Parameter:
    """A parameter with random entries."""
    return nn.Parameter(torch.randn(shape) * 0.5)


def x(*shape: int) -> Callable[[], Tensor]:
    """Random input."""
    return lambda: torch.randn(shape)


def ids(high: int, *shape: int) -> Callable[[], Tensor]:
    """Random indices."""
    return lambda: torch.randint(high, shape)


def seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def flat(*modules: nn.Module) -> nn.Sequential:
    """Modules, then flatten: the output is ``[N, C]``."""
    return nn.Sequential(*modules, nn.Flatten())


def mean(*modules: nn.Module) -> nn.Module:
    """Modules, then the mean over all axes but samples and channels."""
    return nn.Sequential(*modules, Apply(lambda m, a: a.flatten(2).mean(2)))


def norm(module: nn.Module) -> nn.Module:
    """A norm with other affine parameters and running statistics than its initial ones."""
    for p in module.parameters():
        nn.init.normal_(p, 0.5)
    if getattr(module, "running_mean", None) is not None:
        nn.init.normal_(module.running_mean, 0.1)
        nn.init.uniform_(module.running_var, 0.5, 1.5)
    return module.eval()


def _conv(dim: int, transposed: bool, **kw: Any) -> Callable[[], nn.Module]:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dim}d")
    return lambda: mean(kind(4, 4, **{"kernel_size": 2, **kw}), nn.Tanh(), kind(4, 3, 1))


CONVOLUTIONS = [
    Case(f"conv{d}d-{name}", _conv(d, False, **kw), x(3, 4, *([5, 4, 3][:d])))
    for d in (1, 2, 3)
    for name, kw in {
        "plain": {},
        "stride": {"stride": 2},
        "pad": {"padding": 1, "bias": False},
        "dilate": {"dilation": 2, "padding": 1},
        "groups": {"groups": 2},
        "depthwise": {"groups": 4},
        "same": {"padding": "same", "kernel_size": 3, "dilation": 2},
        "valid": {"padding": "valid"},
        "circular": {"padding": 1, "padding_mode": "circular"},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    }.items()
] + [
    Case(f"convt{d}d-{name}", _conv(d, True, **kw), x(3, 4, *([4, 3, 2][:d])))
    for d in (1, 2, 3)
    for name, kw in {
        "plain": {},
        "stride": {"stride": 2, "output_padding": 1, "kernel_size": 3},
        "pad": {"padding": 1, "kernel_size": 3, "bias": False},
        "dilate": {"dilation": 2},
        "groups": {"groups": 2, "stride": 2},
    }.items()
]

PICKS = torch.tensor([0, 2, 2, 3, 1])
OPERATIONS = [
    Case("linear", lambda: nn.Linear(4, 3), x(5, 4)),
    Case("linear-nobias", lambda: seq(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)), x(5, 4)),
    Case("linear-3d", lambda: mean(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3)), x(4, 2, 3, 4)),
    Case("relu-inplace", lambda: seq(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), x(5, 4)),
    Case("tanh-inplace", lambda: Apply(lambda m, a: m.o(m.i(a).tanh_()), i=nn.Linear(4, 5), o=nn.Linear(5, 3)), x(5, 4)),
    Case("matmul", lambda: Apply(lambda m, a: torch.tanh(a @ m.w) @ m.v, w=P(4, 5), v=P(5, 3)), x(4, 4)),
    Case("matmul-3d", lambda: Apply(lambda m, a: (a @ m.w).tanh().sum(1), w=P(4, 3)), x(4, 2, 4)),
    Case("matmul-vector", lambda: Apply(lambda m, a: (a @ m.w).tanh(), w=P(4)), x(4, 3, 4)),
    Case("matmul-left", lambda: Apply(lambda m, a: (m.w @ a).tanh().sum(2), w=P(3, 4)), x(4, 4, 2)),
    Case("matmul-left-2d", lambda: Apply(lambda m, a: (m.w @ a.T).tanh().T, w=P(3, 4)), x(5, 4)),
    Case("matmul-transposed", lambda: Apply(lambda m, a: (a @ m.w.T).sigmoid(), w=P(3, 4)), x(5, 4)),
    Case("matmul-batched-weight", lambda: Apply(lambda m, a: (a.unsqueeze(1) @ m.w).tanh().flatten(1), w=P(2, 4, 2)), x(4, 3, 4)),
    Case("addmm", lambda: Apply(lambda m, a: torch.addmm(m.b, a, m.w, beta=0.5, alpha=2).tanh(), b=P(3), w=P(4, 3)), x(5, 4)),
    Case("einsum", lambda: Apply(lambda m, a: torch.einsum("ntd,de->ne", a, m.w).tanh(), w=P(4, 3)), x(4, 2, 4)),
    Case("bilinear", lambda: Apply(lambda m, a, b: m.l(a, b), l=nn.Bilinear(3, 2, 3)), lambda: (torch.randn(4, 3), torch.randn(4, 2))),
    Case("add", lambda: Apply(lambda m, a: (a + m.b).tanh(), b=P(3)), x(4, 3)),
    Case("add-broadcast", lambda: Apply(lambda m, a: (a + m.b + m.c).tanh().sum(1), b=P(2, 1), c=P(3)), x(4, 2, 3)),
    Case("add-scalar", lambda: Apply(lambda m, a: (m.b + a).tanh(), b=P()), x(4, 3)),
    Case("add-grows", lambda: Apply(lambda m, a: (a.unsqueeze(1) + m.b).tanh().sum(1), b=P(1, 5, 3)), x(4, 3)),
    Case("add-inplace", lambda: Apply(lambda m, a: torch.tanh(m.l(a).add_(m.b)), l=nn.Linear(3, 3), b=P(3)), x(4, 3)),
    Case("mul-inplace", lambda: Apply(lambda m, a: torch.tanh(m.l(a).mul_(m.b)), l=nn.Linear(3, 3), b=P(3)), x(4, 3)),
    Case("iadd", lambda: Apply(lambda m, a: _iadd(m.l(a), m.b), l=nn.Linear(3, 3), b=P(3)), x(4, 3)),
    Case("sub", lambda: Apply(lambda m, a: (m.b - a - m.c).tanh(), b=P(3), c=P(1)), x(4, 3)),
    Case("mul", lambda: Apply(lambda m, a: (a * m.b).tanh().sum(1), b=P(2, 1)), x(4, 2, 3)),
    Case("complex", lambda: Apply(lambda m, a: torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(m.w), n=5).tanh() @ m.v, w=P(5), v=P(5, 3)), x(4, 5)),
    Case("complex-input", lambda: Apply(lambda m, a: ((torch.fft.fft(a) * m.w).abs() + m.b.exp()).log() @ m.v, w=P(5), b=P(5), v=P(5, 3)), x(4, 5)),
    Case("div", lambda: Apply(lambda m, a: a / (m.b.exp() + 1), b=P(3)), x(4, 3)),
    Case("rdiv", lambda: Apply(lambda m, a: m.b / (a.exp() + 1), b=P(3)), x(4, 3)),
    Case("pow", lambda: Apply(lambda m, a: a.abs() ** m.b, b=P(3)), x(4, 3)),
    Case("where", lambda: Apply(lambda m, a: torch.where(a > 0, a, m.b), b=P(3)), x(4, 3)),
    Case("cat", lambda: Apply(lambda m, a: torch.cat([a, m.c.expand(len(a), -1, -1)], 1).tanh().sum(1), c=P(1, 1, 3)), x(4, 2, 3)),
    Case("expand", lambda: Apply(lambda m, a: m.l(torch.cat([m.c.expand(a.shape[0], 2, 3), a], 1)).tanh().sum(1), c=P(2, 3), l=nn.Linear(3, 3)), x(4, 2, 3)),
    Case("repeat", lambda: Apply(lambda m, a: m.l(a * m.c.repeat(a.shape[0], 2)).tanh(), c=P(3), l=nn.Linear(6, 3)), x(4, 6)),
    Case("queries", lambda: Apply(_queries, q=P(2, 3), k=nn.Linear(3, 3)), x(4, 5, 3)),
    Case("square-batch", lambda: Apply(lambda m, a: (m.l(a) + m.p(torch.arange(4, device=a.device))).tanh().sum(1), l=nn.Linear(3, 3), p=nn.Embedding(4, 3)), x(4, 4, 3)),
    Case("embedding", lambda: mean(nn.Embedding(6, 4), Apply(lambda m, a: a.mT), nn.Tanh(), nn.Conv1d(4, 3, 1)), ids(6, 4, 3)),
    Case("embedding-padding", lambda: flat(nn.Embedding(5, 2, padding_idx=1), nn.Tanh()), ids(5, 4, 3)),
    Case("embedding-1d", lambda: seq(nn.Embedding(5, 3), nn.Tanh()), ids(5, 6)),
    Case("layer-norm", lambda: seq(nn.Linear(4, 5), norm(nn.LayerNorm(5)), nn.Linear(5, 3)), x(4, 4)),
    Case("layer-norm-2d", lambda: mean(norm(nn.LayerNorm([3, 4]))), x(4, 3, 4)),
    Case("rms-norm", lambda: seq(nn.Linear(4, 5), norm(nn.RMSNorm(5)), nn.Linear(5, 3)), x(4, 4)),
    Case("group-norm", lambda: mean(nn.Conv1d(2, 4, 2), norm(nn.GroupNorm(2, 4)), nn.Tanh()), x(3, 2, 4)),
    Case("instance-norm", lambda: mean(nn.Conv1d(2, 4, 2, bias=False), norm(nn.InstanceNorm1d(4, affine=True)), nn.Tanh()), x(3, 2, 7)),
    Case("instance-norm-running", lambda: mean(norm(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), nn.Tanh()), x(3, 3, 4, 2)),
    Case("batch-norm1d", lambda: seq(nn.Linear(4, 5), norm(nn.BatchNorm1d(5)), nn.Tanh(), nn.Linear(5, 3)).eval(), x(4, 4)),
    Case("batch-norm2d", lambda: mean(nn.Conv2d(2, 3, 2), norm(nn.BatchNorm2d(3)), nn.Tanh()).eval(), x(3, 2, 4, 3)),
    Case("batch-norm3d", lambda: mean(norm(nn.BatchNorm3d(3)), nn.Tanh()).eval(), x(3, 3, 2, 3, 2)),
    Case("prelu", lambda: seq(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3), nn.PReLU()), x(4, 4)),
    Case("maxpool", lambda: flat(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2)), x(3, 1, 4, 4)),
    Case("softmax", lambda: seq(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3)), x(4, 4)),
    Case("gelu", lambda: seq(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)), x(4, 4)),
    Case("sigmoid-relu", lambda: seq(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)), x(4, 4)),
    Case("residual", lambda: Apply(lambda m, a: m.o(a + m.b(m.a(a).sigmoid())), a=nn.Linear(4, 3), b=nn.Linear(3, 4), o=nn.Linear(4, 3)), x(4, 4)),
    Case("gated", lambda: Apply(lambda m, a: m.o(m.a(a).sigmoid() * m.b(a)), a=nn.Linear(4, 3), b=nn.Linear(4, 3), o=nn.Linear(3, 3)), x(4, 4)),
    Case("attention", lambda: Apply(_attention, qkv=nn.Linear(4, 12), o=nn.Linear(4, 3)), x(3, 3, 4)),
    Case("reuse", lambda: Apply(lambda m, a: m.o(m.l(m.l(a).tanh()).tanh()), l=nn.Linear(3, 3), o=nn.Linear(3, 2)), x(4, 3)),
    Case("reuse-parallel", lambda: Apply(lambda m, a, b: m.l(a).relu() - m.l(b).relu(), l=nn.Linear(3, 3)), lambda: (torch.randn(4, 3), torch.randn(4, 3))),
    Case("tied-transpose", lambda: Apply(lambda m, a: F.linear(F.linear(a, m.w).relu(), m.w.T, m.b), w=P(2, 4), b=P(4)), x(4, 4)),
    Case("tied-embedding", lambda: Apply(lambda m, a: F.linear(m.e(a).tanh().sum(1), m.e.weight), e=nn.Embedding(4, 3)), ids(4, 3, 2)),
    Case("loop-cell", lambda: Apply(_loop, i=nn.Linear(2, 3), h=nn.Linear(3, 3)), x(3, 4, 2)),
    Case("zero-state", lambda: Apply(_zero_state, i=nn.Linear(2, 3), h=nn.Linear(3, 3)), x(3, 3, 2)),
    Case("weight-norm", lambda: seq(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), x(4, 3)),
    Case("lora", lambda: Apply(lambda m, a: F.linear(a, m.w + m.u @ m.v).tanh(), w=P(3, 4), u=P(3, 1), v=P(1, 4)), x(4, 4)),
    Case("pruned", lambda: _pruned(nn.Linear(4, 3)), x(4, 4)),
    Case("softplus-weight", lambda: Apply(lambda m, a: (a * F.softplus(m.w)).tanh(), w=P(3)), x(4, 3)),
    Case("flattened", lambda: Apply(lambda m, a: m.l(a.reshape(-1, 3)).tanh().reshape(4, 2, 3).sum(1), l=nn.Linear(3, 3)), x(4, 2, 3)),
    Case("flattened-conv", lambda: Apply(lambda m, a: m.l(a.flatten(0, 1)).tanh().unflatten(0, (3, 2)).sum((1, 3)), l=nn.Conv1d(2, 3, 2)), x(3, 2, 2, 4)),
    Case("time-first", lambda: Apply(lambda m, a: m.l(a.transpose(0, 1)).tanh().sum(0), l=nn.Linear(3, 3)), x(4, 4, 3)),
    Case("time-first-flat", lambda: Apply(lambda m, a: m.l(a.transpose(0, 1).reshape(-1, 3)).tanh().view(2, 4, 3).sum(0), l=nn.Linear(3, 3)), x(4, 2, 3)),
    Case("picked", lambda: Apply(lambda m, a: torch.zeros_like(a).index_add(0, PICKS.to(a.device), m.k(m.l(a)[PICKS].tanh())), l=nn.Linear(3, 3), k=nn.Linear(3, 3)), x(4, 3)),
    Case("siamese", lambda: Apply(lambda m, a: torch.mul(*m.l(torch.cat([a, a * a])).tanh().chunk(2)), l=nn.Linear(3, 3)), x(4, 3)),
    Case("split", lambda: Apply(lambda m, a: torch.cat([m.k(part) for part in m.l(a).tanh().split([1, 3])]), l=nn.Linear(3, 3), k=nn.Linear(3, 2)), x(4, 3)),
    Case("sliced", lambda: Apply(lambda m, a: torch.cat([m.l(a[:1]), m.k(a[1:])]).tanh(), l=nn.Linear(3, 3), k=nn.Linear(3, 3)), x(4, 3)),
    Case("experts", lambda: Apply(_experts, gate=nn.Linear(3, 2), w=P(2, 3, 3), norm=norm(nn.LayerNorm(3))), x(4, 3, 3)),
    Case("relative-bias", lambda: Apply(_relative_bias, q=nn.Linear(4, 4), table=P(5, 2)), x(3, 3, 4)),
    Case("own-rows", lambda: Apply(lambda m, a: m.l(a).tanh() * m.codes, l=nn.Linear(3, 3), codes=P(4, 3)), x(4, 3)),
    Case("frozen", lambda: _freeze(seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight", "2.bias"), x(4, 4)),
    Case("unused", lambda: Apply(lambda m, a: m.l(a), l=nn.Linear(4, 3), unused=nn.Linear(2, 2)), x(4, 4)),
    Case("one-sample", lambda: seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), x(1, 4)),
]  # fmt: skip


def _last(*modules: nn.Module) -> nn.Module:
    """A recurrent layer, its hidden states averaged over time."""
    return Apply(lambda m, a: m.l(a)[0].tanh().mean(1 if m.l.batch_first else 0), l=modules[0])


def _finals(m: Any, a: Tensor) -> Tensor:
    out, final = m.l(a)
    final = final if isinstance(final, tuple) else (final,)
    return sum((f.tanh().sum(0) for f in final), out.mean(1)[:, : final[0].shape[-1]])


def _initial(m: Any, a: Tensor) -> Tensor:
    h = m.h.expand(-1, a.shape[0], -1).contiguous()
    return m.l(a, (h, h.sin()))[0].mean(1)


def _cells(m: Any, a: Tensor) -> Tensor:
    h = torch.zeros(a.shape[0], 3, dtype=a.dtype, device=a.device)
    state = (h, h) if isinstance(m.c, nn.LSTMCell) else h
    for t in range(a.shape[1]):
        state = m.c(a[:, t], state)
    return state[0] + state[1] if isinstance(state, tuple) else state


RECURRENT = [
    Case("rnn", lambda: _last(nn.RNN(2, 3, batch_first=True)), x(3, 4, 2)),
    Case("rnn-relu", lambda: _last(nn.RNN(2, 3, nonlinearity="relu", batch_first=True)), x(3, 4, 2)),
    Case("rnn-stack", lambda: _last(nn.RNN(2, 3, num_layers=2, bidirectional=True, bias=False, batch_first=True)), x(3, 3, 2)),
    Case("lstm", lambda: _last(nn.LSTM(2, 3, batch_first=True)), x(3, 4, 2)),
    Case("lstm-nobias", lambda: _last(nn.LSTM(2, 2, bias=False, batch_first=True)), x(3, 3, 2)),
    Case("lstm-stack", lambda: _last(nn.LSTM(2, 2, num_layers=2, dropout=0.5, batch_first=True)), x(3, 3, 2)),
    Case("lstm-bidirectional", lambda: _last(nn.LSTM(2, 2, bidirectional=True, batch_first=True)), x(3, 3, 2)),
    Case("lstm-projected", lambda: _last(nn.LSTM(2, 3, proj_size=2, batch_first=True)), x(3, 3, 2)),
    Case("lstm-finals", lambda: Apply(_finals, l=nn.LSTM(2, 3, batch_first=True)), x(3, 3, 2)),
    Case("lstm-initial", lambda: Apply(_initial, l=nn.LSTM(2, 2, batch_first=True), h=P(1, 1, 2)), x(3, 3, 2)),
    Case("lstm-inner-time-first", lambda: Apply(lambda m, a: m.l(a.transpose(0, 1))[0].mean(0), l=nn.LSTM(2, 3)), x(3, 3, 2)),
    Case("lstm-time-first", lambda: Apply(lambda m, a: m.l(a)[0].tanh().mean(0), l=nn.LSTM(2, 2)), x(4, 4, 2), 1),
    Case("gru", lambda: _last(nn.GRU(2, 3, batch_first=True)), x(3, 4, 2)),
    Case("gru-stack", lambda: _last(nn.GRU(2, 2, num_layers=2, bidirectional=True, batch_first=True)), x(3, 3, 2)),
    Case("gru-finals", lambda: Apply(_finals, l=nn.GRU(2, 3, batch_first=True)), x(3, 3, 2)),
    Case("char-rnn", lambda: Apply(lambda m, a: m.o(m.l(m.e(a))[0]).mT, e=nn.Embedding(4, 2), l=nn.LSTM(2, 2, 2, batch_first=True), o=nn.Linear(2, 3)), ids(4, 3, 3)),
    Case("rnn-cell", lambda: Apply(_cells, c=nn.RNNCell(2, 3)), x(3, 3, 2)),
    Case("lstm-cell", lambda: Apply(_cells, c=nn.LSTMCell(2, 3)), x(3, 3, 2)),
    Case("gru-cell", lambda: Apply(_cells, c=nn.GRUCell(2, 3)), x(3, 3, 2)),
]  # fmt: skip


def _mha(*, cross: bool = False, **kw: Any) -> Callable[[], nn.Module]:
    call = {k: kw.pop(k) for k in list(kw) if k in ("attn_mask", "key_padding_mask", "need_weights")}

    def forward(m: Any, a: Tensor) -> Tensor:
        other = a.flip(1)[:, :2] * 2 if cross else a
        if not m.m.batch_first:
            a, other = a.transpose(0, 1), other.transpose(0, 1)
        with sdpa_kernel(SDPBackend.MATH):
            here = {k: v.to(a.device) if isinstance(v, Tensor) else v for k, v in call.items()}
            out, weights = m.m(a, other, other, **here)
        out = out if m.m.batch_first else out.transpose(0, 1)
        return out.mean(1) if weights is None else out.mean(1) + weights.mean((1, 2)).unsqueeze(1)

    return lambda: Apply(forward, m=nn.MultiheadAttention(4, 2, **kw))


CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])

ATTENTION = [
    Case("mha", _mha(batch_first=True), x(3, 3, 4)),
    Case("mha-time-first", _mha(need_weights=False), x(3, 3, 4)),
    Case("mha-masked", _mha(batch_first=True, attn_mask=CAUSAL, key_padding_mask=PADDING), x(3, 3, 4)),
    Case("mha-masked-fast", _mha(batch_first=True, attn_mask=CAUSAL, key_padding_mask=PADDING, need_weights=False), x(3, 3, 4)),
    Case("mha-cross", _mha(cross=True, batch_first=True, bias=False), x(3, 3, 4)),
    Case("mha-separate", _mha(cross=True, batch_first=True, kdim=4, vdim=4, add_bias_kv=True, add_zero_attn=True), x(3, 3, 4)),
    Case("transformer-layer", lambda: Apply(_transformer, m=nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True, norm_first=True)), x(2, 3, 4)),
]  # fmt: skip


def _transformer(m: Any, a: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return m.m(a, src_mask=CAUSAL.to(a.device), is_causal=True).mean(1)


CASES = OPERATIONS + CONVOLUTIONS + RECURRENT + ATTENTION


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a = a * 1
    a += b
    a *= 0.5
    return a.tanh()


def _queries(m: Any, a: Tensor) -> Tensor:
    q = m.q.unsqueeze(0).expand(len(a), -1, -1)
    return ((q @ m.k(a).mT).softmax(-1) @ a).sum(1)


def _attention(m: Any, a: Tensor) -> Tensor:
    n, t, d = a.shape
    q, k, v = (z.view(n, t, 2, d // 2).transpose(1, 2) for z in m.qkv(a).chunk(3, -1))
    with sdpa_kernel(SDPBackend.MATH):  # other kernels cannot be differentiated twice
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
    return m.o(out).mean(1)


def _loop(m: Any, a: Tensor) -> Tensor:
    h = m.i(a[:, 0]).tanh()
    for t in range(1, a.shape[1]):
        h = (m.i(a[:, t]) + m.h(h)).tanh()
    return h


def _zero_state(m: Any, a: Tensor) -> Tensor:
    h = torch.zeros(a.shape[0], 3, dtype=a.dtype, device=a.device)
    for t in range(a.shape[1]):
        h = (m.i(a[:, t]) + m.h(h)).tanh()
    return h


def _experts(m: Any, a: Tensor) -> Tensor:
    """Tokens are sent to one of two experts: a sample reaches each with none or several."""
    tokens = a.reshape(-1, a.shape[-1])
    scores = m.gate(tokens).softmax(-1)
    chosen = scores.argmax(-1)
    out = torch.zeros_like(tokens)
    for expert in chosen.unique():
        (places,) = torch.where(chosen == expert)
        hidden = F.linear(m.norm(tokens[places]), m.w[expert]).tanh()
        out.index_add_(0, places, hidden * scores[places, expert].unsqueeze(1))
    return out.reshape(a.shape).sum(1)


def _relative_bias(m: Any, a: Tensor) -> Tensor:
    """A table of parameters looked up by place, with a mask repeated for every sample."""
    n, t, d = a.shape
    q = m.q(a).view(n, t, 2, d // 2).transpose(1, 2)
    place = torch.arange(t, device=a.device)
    bias = m.table[place[:, None] - place[None] + t - 1].permute(2, 0, 1).unsqueeze(0)
    mask = torch.zeros(1, 1, t, t, dtype=a.dtype, device=a.device).repeat(n, 1, 1, 1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias + mask).mean((1, 2))


def _pruned(module: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.random_unstructured(module, "weight", 0.5)


def _freeze(module: nn.Module, *names: str) -> nn.Module:
    for name, p in module.named_parameters():
        p.requires_grad_(name not in names)
    return module


class LossCase(NamedTuple):
    """A loss and targets for an output."""

    name: str
    loss: Callable[[], Callable[..., Tensor]]
    target: Callable[[Tensor], Any]


def classes(f: Tensor) -> Tensor:
    """Class labels for an output ``[N, C, ...]``."""
    return torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))


LOSSES = [
    LossCase(f"{name}-{reduction}", lambda k=kind, r=reduction: k(reduction=r), target)
    for reduction in ("mean", "sum")
    for name, kind, target in (
        ("ce", nn.CrossEntropyLoss, classes),
        ("mse", nn.MSELoss, torch.randn_like),
        ("bce", nn.BCEWithLogitsLoss, torch.rand_like),
    )
]
