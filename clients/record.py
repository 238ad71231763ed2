"""What the programs of this folder have in common: named cases, and the numbers each gives."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch


def plain(value: Any) -> Any:
    """Tensors and arrays in nested containers as lists of numbers."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    return value.tolist() if hasattr(value, "tolist") else value


def main(cases: dict[str, Callable[[], Any]]) -> None:
    """Run every case, and write what it gives or how it fails.

    Usage: ``python <program>.py OUTPUT.json [PATTERN]``; PATTERN picks the cases that contain it.
    """
    warnings.simplefilter("ignore")
    pattern = sys.argv[2] if len(sys.argv) > 2 else ""
    found: dict[str, Any] = {}
    torch.set_default_dtype(torch.float64)
    for name, case in cases.items():
        if pattern not in name:
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            found[name] = {"numbers": plain(case())}
        except Exception as error:  # compared like any other outcome
            where = "".join(traceback.format_exception(error)) if pattern else ""
            found[name] = {"error": f"{type(error).__name__}: {error}", "traceback": where}
        found[name]["seconds"] = time.perf_counter() - start
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
