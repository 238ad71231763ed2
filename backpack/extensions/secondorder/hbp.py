"""Kronecker-factored curvature, and the original's names of its variants."""

from backpack.extensions import HBP, KFAC, KFLR, KFRA


class LossHessianStrategy:
    """What is carried backwards from the loss: its Hessian's root, samples of it, or the sum."""

    EXACT = "exact"
    SAMPLING = "sampling"
    SUM = "sum"
    CHOICES = (EXACT, SAMPLING, SUM)


class BackpropStrategy:
    """Whether a root is carried backwards, or the batch average of the matrix."""

    BATCH_AVERAGE = "average"
    SQRT = "sqrt"
    CHOICES = (BATCH_AVERAGE, SQRT)


class ExpectationApproximation:
    """Where the batch average is taken (Botev et al., 2017; Chen et al., 2019)."""

    BOTEV_MARTENS = "E[J^T E(H) J]"
    CHEN = "E(J^T) E(H) E(J)"
    CHOICES = (BOTEV_MARTENS, CHEN)


__all__ = [
    "HBP",
    "KFAC",
    "KFLR",
    "KFRA",
    "BackpropStrategy",
    "ExpectationApproximation",
    "LossHessianStrategy",
]
