"""What the thresholds for devices rest on: ``python -m benchmarks.devices [--device cuda]``.

The Triton kernel beside torch's own operations, for products of several sizes; and quantities of whole
networks with different limits on the memory that columns and patches may take. Times are medians, in
microseconds, of runs that wait for the device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from backpack import backpack, extend
from backpack import extensions as E
from backpack.forms import triton as kernels
from backpack.forms.layout import Layout
from backpack.forms.outer import Outer
from benchmarks.problems import make, setting

# Columns, samples, groups, positions, outputs, inputs.
SIZES = [
    *((10, 128, 1, positions, side, side) for side in (16, 64, 256) for positions in (2, 4, 9, 16, 36)),
    *((1, 128, 1, positions, 64, 576) for positions in (2, 4, 9, 16, 36, 144)),
    *((1, 1024, 1, 2, side, side) for side in (32, 128, 512)),
]
QUANTITIES = E.DiagGGNExact, E.SumGradSquared, E.DiagHessian, E.KFLR
BYTES = [2**25, 2**27, 2**29, 2**31]


def seconds(step: Callable[[], Any], device: str, span: float = 0.15) -> float:
    """The median of runs that fill a span of time, after two to warm up."""
    found: list[float] = []
    while len(found) < 7 or (sum(found) < span and len(found) < 50):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[2:])


def products(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The kernel, and torch without it."""
    rows = []
    for sizes in SIZES:
        v, n, q, s, o, i = sizes
        if v * n * q * o * i * dtype.itemsize > 2**33 or device == "cpu" and v * n * o * i > 2**24:
            continue
        a = torch.randn(n, q, s, i, dtype=dtype, device=device)
        g = torch.randn(v, n, q, s, o, dtype=dtype, device=device)
        form = Outer(a, g, Layout(torch.Size((q * o, i))))
        row: dict[str, Any] = {"sizes": sizes, "dtype": str(dtype)}
        with torch.no_grad():
            for name, limit in (("torch", 0), ("kernel", 10**9)):
                with patch.dict(kernels.MULTIPLICATIONS, {dtype: limit}):
                    row[name] = 1e6 * seconds(form.square_sum, device, 0.03)
                    row[name + "-norms"] = 1e6 * seconds(form.squared_norms, device, 0.03)
        rows.append(row)
        print(*sizes, str(dtype)[6:], *(f"{k} {v:.0f}" for k, v in row.items() if isinstance(v, float)))
    return rows


def limits(device: str, problem: str) -> list[dict[str, Any]]:
    """Quantities with each limit on memory."""
    model, X, y = make(setting(problem, device))
    X, y = X.to(device), y.to(device)
    model, lossfunc = extend(model.to(device)), extend(nn.CrossEntropyLoss())

    def step(*extensions: Any) -> None:
        model.zero_grad()
        loss = lossfunc(model(X), y)
        with backpack(*(each() for each in extensions)):
            loss.backward()

    rows = []
    for quantity in (None, *QUANTITIES):
        for size in BYTES:
            places = limits.COLUMN_BYTES, limits.BLOCK_BYTES, limits.PATCH_BYTES
            row: dict[str, Any] = {"problem": problem, "quantity": quantity and quantity.__name__}
            for place, name in zip(places, ("columns", "blocks", "patches"), strict=True):
                with patch.dict(place, {device: size}):
                    row[name] = 1e6 * seconds(lambda q=quantity: step(*([q] if q else [])), device)
                if quantity is None:
                    break
            rows.append({**row, "bytes": size})
            print(
                problem,
                row["quantity"],
                size,
                *(f"{k} {v:.0f}" for k, v in row.items() if k in ("columns", "blocks", "patches")),
            )
            if quantity is None:
                break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--problems", nargs="+", help="by default three, of which one on a CPU")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    problems = given.problems or ["mlp", "3c3d", "allcnnc"][: 1 if given.device == "cpu" else None]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {
        "device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
        "products": [r for d in (torch.float32, torch.float64) for r in products(given.device, d)],
        "limits": [row for problem in problems for row in limits(given.device, problem)],
    }
    if given.output:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
