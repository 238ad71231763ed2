"""What may be refused in the table of idioms, by which words; everything else has to be right."""

from __future__ import annotations

import re

from tests.idioms.cells import Cell

# The groups that need a square root of the loss's Hessian.
ROOTS = ("ggn", "ekflr", "kfra")
SECOND = (*ROOTS, "hessian", "ggnmp", "hmp")

# Losses whose Hessian in the model's output is indefinite: tanh bends against them.
NOT_CONVEX = {
    "tanh": (
        "ce ce-weight ce-ignore ce-smooth ce-smooth-weight ce-soft ce-soft-weight mse bce-logits "
        "bce-logits-weight poisson gaussian huber smooth-l1 soft-margin multilabel-soft-margin "
        "multi-margin-1 multi-margin-2 multilabel-margin l1 nll kl hinge-embedding"
    ).split(),
}
# Torch has no second derivative of these. Their rules have, where the loss is extended.
NOT_TWICE = ("multi-margin-1", "multi-margin-2", "multilabel-margin")
# Two losses that have rules come one after the other.
SEVERAL_LOSSES = ("two-losses", "twice", "part-too", "heads")
# What is no chain of operations that keep rows of samples.
NO_CHAIN = (
    *("cat", "stack", "two-losses", "heads", "times-first", "times-outside", "t", "t-back"),
    *("sorted", "mask", "mask-rows"),
)


def refusal(cell: Cell, group: str) -> str | None:
    """The words with which a group of quantities may be refused; None if it has to be right."""
    idiom, loss = cell.idiom.name, cell.loss.name
    reasons = []
    if group in ROOTS and loss in NOT_CONVEX.get(idiom, ()):
        reasons.append("not convex")
    if group in SECOND and loss in NOT_TWICE and not _by_rule(cell, group):
        reasons.append("cannot (be differentiated|differentiate it) twice")
    if group == "ekflr" and idiom in SEVERAL_LOSSES and cell.way == "extended":
        reasons.append("ekflr has eigenvectors of one loss")
    if group == "kfra" and idiom in NO_CHAIN:
        reasons.append("kfra")
    return "|".join(reasons) or None


def fine(cell: Cell, group: str, text: str) -> bool:
    """Whether an outcome is right, or refused as it may be."""
    allowed = refusal(cell, group)
    return not text or bool(text.startswith("refused:") and allowed and re.search(allowed, text))


def _by_rule(cell: Cell, group: str) -> bool:
    """Whether a rule of the loss is enough: it is extended, and nothing bends before it."""
    return cell.way == "extended" and group not in ("ggnmp", "hmp") and cell.idiom.name != "tanh"
