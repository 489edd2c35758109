"""fastadv: adversarial training and fine-tuning, with the steps of its attacks as fused kernels."""

from fastadv.functional import (
    Normalization,
    fgsm_step,
    fgsm_step_,
    new_seed,
    pgd_step,
    pgd_step_,
    random_init,
    sample_seeds,
    to_float,
)
from fastadv.installation import info
from fastadv.ops import backend
from fastadv.version import __version__

__all__ = [
    "Normalization",
    "__version__",
    "backend",
    "fgsm_step",
    "fgsm_step_",
    "info",
    "new_seed",
    "pgd_step",
    "pgd_step_",
    "random_init",
    "sample_seeds",
    "to_float",
]
