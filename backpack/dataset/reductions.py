"""What a loss is a mean of, or that it is a sum, as its nodes in the graph tell."""

from __future__ import annotations

from torch.autograd.graph import Node

from backpack.graph.nodes import walk


def reduction_of(root: Node) -> tuple[str | None, list[float]]:
    """Whether a loss is a mean or a sum, if its node tells, and what each mean in it divides by."""
    kind = "mean" if _divides_by(root) is not None else None
    if getattr(root, "_saved_reduction", None) == 2:
        kind = "sum"
    divisors = (_divides_by(node) for node in walk([root], _numbers_below))
    return kind, [divisor for divisor in divisors if divisor is not None]


def _numbers_below(node: Node) -> list[Node]:
    """The children that compute a number, below one that is no mean."""
    found: list[Node] = []
    for child, place in node.next_functions if _divides_by(node) is None else ():
        about = getattr(child, "_input_metadata", ())
        if child is not None and len(about) > place and not len(about[place].shape):
            found.append(child)
    return found


def _divides_by(node: Node) -> float | None:
    """What a mean divides by; ``None`` for other nodes."""
    if getattr(node, "_saved_reduction", None) == 1:
        weight = getattr(node, "_saved_total_weight", None)
        return float(node._saved_self.numel() if weight is None else weight)  # type: ignore[attr-defined]
    if node.name().startswith("MeanBackward"):
        number = getattr(node, "_saved_self_sym_numel", None)
        return None if number is None else float(number)
    return None


def alike(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-12 * abs(b)
