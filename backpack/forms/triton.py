"""Squares of per-sample products on a GPU, by one Triton kernel that does not write the products out.

For ``G[v, n, q] = sum_s g[v, n, q, s] a[n, q, s]^T`` the kernel computes ``sum_{v,n} G^2`` and
``sum_{v,q,o,i} G^2``. Each program owns a tile of one group's matrix and some products, whose sum it
writes once; torch adds what the programs wrote. Nothing is added atomically, so results are the same
each time.

The functions return ``None`` where torch's own operations are to be used: by default everywhere but on
CUDA devices where Triton can be imported, outside grad mode, for float32 and float64, where memory
traffic dominates (:data:`MULTIPLICATIONS`). ``BACKPACK_TRITON=0`` in the environment switches the
kernel off. Before its first use on a device it is compared with torch on a small problem.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cuda",)
# The kernel is used up to this many multiplications, padding of tiles included, for each number of
# the product G. For one such number torch writes the product, reads it, writes its square and reads
# that: it moves 4 numbers. While an A100 moves one number it does 50 operations in float32 (H100: 80).
# So torch takes the time of 4 * 50 + 2 s operations, and the kernel that of 2 * 24 = 48: it wins as
# long as it reaches a quarter of the device's best rate, which is an assumption. In double precision
# consumer devices do only 10 operations meanwhile, which leaves 4 * 10 + 2 s; the kernel takes at
# least 2 * 16.
MULTIPLICATIONS = {torch.float32: 24, torch.float64: 16}
# Largest tile, and the positions multiplied at a time: tl.dot takes 16 at least.
TILE, POSITIONS = 64, 16
# Sums over samples are split until there are about so many programs, several for each multiprocessor.
PROGRAMS = 512

tl: Any = None  # triton.language, as soon as the kernel is made

_broken = False


def square_sum(windows: Tensor, ndim: int, g: Tensor, sign: Tensor | None) -> Tensor | None:
    """``sum_{v,n} sign_{vn} (sum_s g[v, n, q, s, o] a[n, q, s, i])^2``, shape ``[q, o, i]``.

    Args:
        windows: the inputs ``a`` as any view ``[n, q, *inside, *positions]``; ``i`` is the axes inside.
        ndim: number of axes of the positions.
        g: columns at the outputs, ``[v, n, q, s, o]``, with any strides.
        sign: ``[v, n]``, or ``None`` for ones.

    Returns:
        ``None`` if this is left to torch.
    """
    return _tried(windows, ndim, g, sign, norms=False)


def squared_norms(windows: Tensor, ndim: int, g: Tensor) -> Tensor | None:
    """``sum_{v,q,o,i} (sum_s g[v, n, q, s, o] a[n, q, s, i])^2``, shape ``[n]``.

    Arguments are those of :func:`square_sum`.
    """
    return _tried(windows, ndim, g, None, norms=True)


def _tried(windows: Tensor, ndim: int, g: Tensor, sign: Tensor | None, norms: bool) -> Tensor | None:
    """The kernel's result. If anything fails, a warning says so, and torch is used from then on."""
    global _broken
    if not _suits(windows, ndim, g):
        return None
    try:
        kernel = _kernel()
        if kernel is None:
            return None
        _compare(kernel, g.dtype, g.device)
        return _contract(kernel, windows, ndim, g, sign, norms)
    except Exception as error:
        _broken = True
        warnings.warn(
            f"a Triton kernel failed ({type(error).__name__}: {error}); from now on torch's own "
            "operations are used. BACKPACK_TRITON=0 in the environment switches the kernel off.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _suits(windows: Tensor, ndim: int, g: Tensor) -> bool:
    """Whether the kernel may be used, and is expected to be faster."""
    if g.device.type not in DEVICES or torch.is_grad_enabled() or _broken:
        return False
    if os.environ.get("BACKPACK_TRITON") == "0" or not g.numel() or not windows.numel():
        return False
    plain = all(type(x) is Tensor and x.device == g.device for x in (windows, g))
    if not plain or not windows.is_floating_point() or g.dtype not in MULTIPLICATIONS:
        return False
    o, i = g.shape[-1], prod(windows.shape[2 : windows.dim() - ndim])
    padded = _tiles(o) * _side(o) * _tiles(i) * _side(i) * -(-g.shape[3] // POSITIONS) * POSITIONS
    return padded <= MULTIPLICATIONS[g.dtype] * o * i


def _side(size: int) -> int:
    """Side of the tiles of an axis: a power of two."""
    return min(TILE, max(16, 1 << (size - 1).bit_length()))


def _tiles(size: int) -> int:
    return -(-size // _side(size))


def _places(sizes: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the entries of some axes are in memory, in row-major order."""
    axes = [torch.arange(n, device=device) * stride for n, stride in zip(sizes, strides, strict=True)]
    return reduce(lambda left, right: (left.unsqueeze(1) + right).flatten(), axes)


def _contract(
    kernel: Any, windows: Tensor, ndim: int, g: Tensor, sign: Tensor | None, norms: bool
) -> Tensor:
    windows, g = windows.resolve_neg(), g.resolve_neg()
    (columns, samples, groups, count, o), end = g.shape, windows.dim() - ndim
    positions = _places(windows.shape[end:], windows.stride()[end:], g.device)
    inside = _places(windows.shape[2:end], windows.stride()[2:end], g.device)
    i, sides = len(inside), (_side(o), _side(len(inside)))
    tiles, products = groups * _tiles(o) * _tiles(i), columns * samples
    step = columns if norms else -(-products // min(products, max(1, PROGRAMS // tiles)))
    chunks = -(-products // step)
    out = g.new_empty((chunks, tiles) if norms else (chunks, groups, o, i))
    signs = g if sign is None else sign.to(g.dtype)
    steps = (0, 0) if sign is None else sign.stride()
    tf32 = g.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    sizes = (columns, products, groups, count, o, i, step)
    strides = (*g.stride(), *windows.stride()[:2], *steps)
    with torch.cuda.device_of(g):
        kernel[(chunks * tiles,)](
            g,
            windows,
            positions,
            inside,
            signs,
            out,
            *sizes,
            *strides,
            sign is not None,
            norms,
            *sides,
            POSITIONS,
            "tf32" if tf32 else "ieee",
        )
    return out.sum(1) if norms else out.sum(0)


@cache
def _compare(kernel: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Before its first use on a device, the kernel does a small problem that torch does too.

    Raises:
        RuntimeError: if the results differ.
    """
    g = torch.arange(2 * 3 * 5 * 20, device=device).to(dtype).cos().reshape(2, 3, 1, 5, 20)
    a = torch.arange(3 * 5 * 24, device=device).to(dtype).sin().reshape(3, 1, 24, 5)
    products = (g.mT.double() @ a.mT.double()).square()
    for norms, dims in ((False, (0, 1)), (True, (0, 2, 3, 4))):
        found, right = _contract(kernel, a, 1, g, None, norms).double(), products.sum(dims)
        if not bool((found - right).abs().amax() <= 1e-2 * right.abs().amax()):
            raise RuntimeError("its results differ from torch's")


@cache
def _kernel() -> Any:
    """The kernel, compiled when it is first called; ``None`` without Triton."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    return triton.jit(_tile)


def _tile(  # type: ignore[no-untyped-def] # noqa: D417
    G, A, P, I, W, out,  # noqa: E741
    columns, products, groups, count, rows, width, step,
    gv, gn, gq, gs, go, an, aq, wv, wn,
    SIGNED: tl.constexpr, NORMS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile ``[R, C]`` of one group: the squares of ``step`` products, summed."""
    wide = tl.cdiv(width, C)
    tiles = tl.cdiv(rows, R) * wide
    place = tl.program_id(0) % (groups * tiles)
    chunk = tl.program_id(0) // (groups * tiles)
    tile, q = place % tiles, (place // tiles).to(tl.int64)
    o = (tile // wide * R + tl.arange(0, R)).to(tl.int64)
    i = (tile % wide * C + tl.arange(0, C)).to(tl.int64)
    inside = tl.load(I + i, mask=i < width, other=0)
    total = tl.zeros([R, C], G.dtype.element_ty)
    for k in range(chunk * step, tl.minimum(chunk * step + step, products)):
        # One sample's columns follow each other, so that its inputs are still in the cache.
        n, v = (k // columns).to(tl.int64), (k % columns).to(tl.int64)
        product = tl.zeros([R, C], G.dtype.element_ty)
        for start in range(0, count, S):
            s = (start + tl.arange(0, S)).to(tl.int64)
            at = v * gv + n * gn + q * gq + s[None, :] * gs + o[:, None] * go
            g = tl.load(G + at, mask=(o[:, None] < rows) & (s[None, :] < count), other=0.0)
            at = n * an + q * aq + tl.load(P + s, mask=s < count, other=0)[:, None] + inside[None, :]
            a = tl.load(A + at, mask=(s[:, None] < count) & (i[None, :] < width), other=0.0)
            a = a.to(G.dtype.element_ty)
            product = tl.dot(g, a, product, input_precision=PRECISION, out_dtype=G.dtype.element_ty)
        square = product * product
        if SIGNED:
            square *= tl.load(W + v * wv + n * wn)
        total += square
    within = (o[:, None] < rows) & (i[None, :] < width)
    if NORMS:
        # Beyond the edge there is 0 times an input, which may be infinite.
        total = tl.where(within, total, 0.0)
        tl.store(out + chunk.to(tl.int64) * groups * tiles + place, tl.sum(tl.sum(total, 1), 0))
    else:
        at = ((chunk * groups + q) * rows + o[:, None]) * width + i[None, :]
        tl.store(out + at, total, mask=within)
