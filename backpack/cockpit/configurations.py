"""Which quantities: three configurations by name, or a list of names and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backpack.cockpit.measures import EPSILON, MEASURES, Measure, Numbers, over_trace
from backpack.cockpit.step import Step

ECONOMY = tuple(
    """loss learning_rate grad_norm param_norm update_size update_ratio distance norm_test inner_test
    ortho_test noise_scale alpha hard_samples grad_hist activation_rms dead_units
    output_grad_rms""".split()
)
BUSINESS = (*ECONOMY, *"hess_trace tic_trace tic_diag mean_gsnr early_stopping cabs".split())
FULL = (*BUSINESS, *"hess_max_ev grad_hist_2d attention_logit".split())
CONFIGURATIONS = {"economy": ECONOMY, "business": BUSINESS, "full": FULL}
# Those that are not functions of one step alone, with what they need.
SPECIAL: dict[str, frozenset[str]] = {
    "alpha": frozenset({"norms", "projections", "losses", "ends", "update"}),
    "alpha_ggn": frozenset({"norms", "update", "columns"}),
    "grad_hist": frozenset({"counts"}),
    "grad_hist_2d": frozenset({"counts"}),
    "hess_max_ev": frozenset({"products"}),
    "critical_sharpness": frozenset({"update"}),
    "attention_logit": frozenset({"attention"}),
}
MATRICES = ("hessian", "ggn", "ggn_mc")


def _with_matrix(name: str, matrix: str) -> Measure:
    if matrix not in MATRICES:
        raise ValueError(f"curvature must be one of {MATRICES}, got {matrix!r}")

    def trace(step: Step) -> Numbers:
        if name == "hess_trace":
            return step.trace(matrix)
        if name == "tic_trace":
            return over_trace(step, matrix)
        return step.over_entries(
            lambda p, second, g: second / (step.diagonal(matrix, p).to(second.dtype) + EPSILON[name])
        )

    return replace(MEASURES[name], value=trace, matrix=matrix)


def hess_trace(curvature: str = "ggn_mc") -> Measure:
    """Trace of a curvature matrix.

    Args:
        curvature: ``"hessian"``, exact; ``"ggn"``, the generalized Gauss-Newton matrix, exact; or
            ``"ggn_mc"``, the same estimated with one sampled target for each sample, at the cost of one
            more backward pass instead of one for each class. In networks of piecewise linear
            operations the first two are the same.
    """
    return _with_matrix("hess_trace", curvature)


def tic_trace(curvature: str = "ggn_mc") -> Measure:
    """Takeuchi information criterion by traces; ``curvature`` as in :func:`hess_trace`."""
    return _with_matrix("tic_trace", curvature)


def tic_diag(curvature: str = "ggn_mc") -> Measure:
    """Takeuchi information criterion by diagonals; ``curvature`` as in :func:`hess_trace`."""
    return _with_matrix("tic_diag", curvature)


def chosen(quantities: str | Sequence[str | Measure]) -> tuple[list[Measure], list[str]]:
    """The measures, and the names of those in :data:`SPECIAL`.

    Raises:
        KeyError: for a name that there is not.
    """
    if isinstance(quantities, str):
        if quantities not in CONFIGURATIONS:
            raise KeyError(f"no configuration {quantities!r}; there are {list(CONFIGURATIONS)}")
        quantities = CONFIGURATIONS[quantities]
    measures: dict[str, Measure] = {}
    special: dict[str, None] = {}
    for each in quantities:
        if isinstance(each, Measure):
            measures[each.name] = each
        elif each in MEASURES:
            measures[each] = MEASURES[each]
        elif each in SPECIAL:
            special[each] = None
        else:
            known = ", ".join([*MEASURES, *SPECIAL])
            raise KeyError(f"no quantity {each!r}; there are {known}")
    return list(measures.values()), list(special)
