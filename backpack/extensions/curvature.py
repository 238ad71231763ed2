"""The original's names of curvature matrices."""


class Curvature:
    """Hessian, generalized Gauss-Newton, and positive-curvature Hessian (Chen et al., 2019)."""

    HESSIAN = "hessian"
    GGN = "ggn"
    PCH_ABS = "pch-abs"
    PCH_CLIP = "pch-clip"
    CHOICES = (HESSIAN, GGN, PCH_CLIP, PCH_ABS)
