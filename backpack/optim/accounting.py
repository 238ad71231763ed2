"""What differentially private training has spent, and whether batches are drawn as that assumes."""

from __future__ import annotations

import torch

# So unlikely are batches of one size in a row before they are called strange.
UNLIKELY = 1e-9


class BatchSizes:
    """Looks at the sizes of batches, which tell a shuffled loader from Poisson sampling.

    If each sample is in a batch with a small probability, by itself, the size of a batch is nearly a
    Poisson variable of mean ``B``, and two batches have the same size with probability ``exp(-2 B)
    I_0(2 B)``, about ``1 / (2 sqrt(pi B))``. A loader that cuts a permutation into batches gives one
    size again and again.

    Args:
        expected: the mean size ``B``.
    """

    def __init__(self, expected: float) -> None:
        twice = torch.tensor(2.0 * expected, dtype=torch.float64)
        self.chance = float(torch.special.i0e(twice))
        self.size, self.alike, self.said = -1, 0, False

    def note(self, size: int) -> str | None:
        """The batch of one more step; what there is to say of it and of those before, once."""
        self.alike = self.alike + 1 if size == self.size else 1
        self.size = size
        if self.said or self.chance ** (self.alike - 1) > UNLIKELY:
            return None
        self.said = True
        return (
            f"DPSGD: {self.alike} batches in a row had {size} samples, as those of a shuffled loader. "
            "epsilon() is for Poisson sampling, where each sample is in each batch with the same "
            "probability, by itself, and sizes differ; the privacy of other batches is another. Give "
            "the DataLoader such a batch_sampler (docs/howto/private-training.md has one). Where each "
            "batch is the whole data set (sample_rate=1), all is well"
        )


def epsilon(*, steps: int, sample_rate: float, noise_multiplier: float, delta: float) -> float:
    """The privacy that :class:`~backpack.optim.DPSGD` has spent, as ``epsilon`` at a given ``delta``.

    By Renyi differential privacy of the subsampled Gaussian mechanism (Mironov, Talwar, Zhang, 2019,
    arXiv:1908.10530), for data sets that differ by one sample added or removed. Computed by the package
    ``dp-accounting``, which the extra ``privacy`` installs.

    Args:
        steps: number of steps.
        sample_rate: probability of a sample to be in a batch (Poisson sampling).
        noise_multiplier: of :class:`~backpack.optim.DPSGD`.
        delta: between 0 and 1; below one over the size of the data set, as a rule.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if an argument is out of its range.
    """
    for name, value, fits in (
        ("steps", steps, steps >= 0 and steps == int(steps)),
        ("sample_rate", sample_rate, 0 < sample_rate <= 1),
        ("noise_multiplier", noise_multiplier, 0 <= noise_multiplier < float("inf")),
        ("delta", delta, 0 < delta < 1),
    ):
        if not fits:
            raise ValueError(f"epsilon: {name} is out of range, got {value!r}")
    if not steps:
        return 0.0
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ImportError(
            "the privacy accountant is in the package dp-accounting; install the extra 'privacy' "
            "(pip install 'backpack-anew[privacy]')"
        ) from error
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), int(steps))
    return float(accountant.get_epsilon(delta))
