"""The zoo: published architectures in tiny sizes, and models that use parameters in unusual ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.zoo.packages import TIMM, TORCHVISION, TRANSFORMERS
from tests.zoo.setting import Setting
from tests.zoo.unusual import REUSE, TORCH


class Entry(NamedTuple):
    """One model of the zoo."""

    family: str
    make: Callable[[], Setting]
    hessian: bool = False  # small enough for the Hessian's diagonal

    @property
    def kinds(self) -> list[str]:
        """What is compared: methods of ``compare.Trial``."""
        return ["first", "second"] + ["hessian", "hessian_by_sample"] * self.hessian

    def quick(self, kind: str) -> bool:
        """Whether it needs torch alone and less than a second."""
        return self.family == "reuse" or (self.family == "torch.nn" and not kind.startswith("hessian"))


HESSIAN = "transformers: LLaMA", "transformers: T5", "transformers: ViT"
ZOO = {
    (key := f"{family}: {name}"): Entry(family, make, family in ("torch.nn", "reuse") or key in HESSIAN)
    for family, table in {
        "torch.nn": TORCH,
        "reuse": REUSE,
        "transformers": TRANSFORMERS,
        "torchvision": TORCHVISION,
        "timm": TIMM,
    }.items()
    for name, make in table.items()
}
