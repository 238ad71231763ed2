"""Parameters and the groups of them that have numbers of their own."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

Per = str | Callable[[str], str]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """All that require gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def looked_at(model: nn.Module, include: str | None) -> dict[str, nn.Parameter]:
    """Trained parameters whose names match, each once.

    Raises:
        ValueError: if there are none.
    """
    found = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (include is None or re.search(include, name))
    }
    if not found:
        raise ValueError(
            "the model has no trained parameter"
            + ("" if include is None else f" whose name matches {include!r}")
        )
    return found


def layer_of(name: str) -> str:
    """The module that owns a parameter; of one that the model owns itself, its own name.

    Example:
        >>> layer_of("encoder.0.weight"), layer_of("bias")
        ('encoder.0', 'bias')
        >>> layer_of("0.parametrizations.weight.original")
        '0'
    """
    owner = (
        name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    )
    return owner or name


def grouped(names: list[str], per: Per) -> tuple[list[str], Tensor]:
    """Names of groups, the whole model's (an empty one) first, and rows of zeros and ones.

    Raises:
        ValueError: for a ``per`` that there is not.
    """
    ways: dict[str, Callable[[str], str] | None] = {
        "model": None,
        "layer": layer_of,
        "parameter": lambda name: name,
    }
    if isinstance(per, str) and per not in ways:
        raise ValueError(f"per must be one of {list(ways)} or a function of a name, got {per!r}")
    way = ways[per] if isinstance(per, str) else per
    labels = [] if way is None else [way(name) for name in names]
    groups = list(dict.fromkeys(labels))
    rows = torch.zeros(1 + len(groups), len(names), dtype=torch.float64)
    rows[0] = 1
    for column, label in enumerate(labels):
        rows[1 + groups.index(label), column] = 1
    return ["", *groups], rows
