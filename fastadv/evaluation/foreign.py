"""For attacks of other libraries: a seed for each batch, and checks of the images that they return."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastadv.attacks.checks import SLACK
from fastadv.evaluation.samples import as_tensor
from fastadv.functional import to_float


@dataclass
class Reach:
    """How far the images that an attack returned are from the clean images, over all batches so far.

    Attributes:
        linf: the largest L-inf distance of an image from its clean image, in the images' units, [0, 1].
        l2: the largest L2 distance, likewise.
        low: the smallest pixel; 0 where no pixel is below 0.
        high: the largest pixel; 1 where no pixel is above 1.
        nonfinite: the number of images with a NaN or an infinite pixel; the other attributes leave them out.
        ulp: the spacing of the images' dtype at 1.
    """

    linf: float = 0.0
    l2: float = 0.0
    low: float = 0.0
    high: float = 1.0
    nonfinite: int = 0
    ulp: float = 0.0

    def add(self, adv: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Add a batch.

        Args:
            adv: the images that the attack returned, floats (N, ...).
            images: the clean images, likewise.

        Returns:
            Which images of `adv` are finite, (N,) bool.
        """
        self.ulp = torch.finfo(images.dtype).eps
        finite = adv.flatten(1).isfinite().all(1)
        self.nonfinite += int((~finite).sum())
        adv, images = (each[finite].flatten(1).double() for each in (adv, images))
        if adv.numel():
            distance = adv - images
            self.linf = max(self.linf, float(distance.abs().max()))
            self.l2 = max(self.l2, float(distance.norm(dim=1).max()))
            self.low, self.high = min(self.low, float(adv.min())), max(self.high, float(adv.max()))
        return finite

    @classmethod
    def of(cls, parts: Sequence["Reach"]) -> "Reach":
        """The reach over all batches, from the reaches over parts of them."""
        most = {name: max(getattr(part, name) for part in parts) for name in ("linf", "l2", "high", "ulp")}
        nonfinite = sum(part.nonfinite for part in parts)
        return cls(**most, low=min(part.low for part in parts), nonfinite=nonfinite)

    @property
    def slack(self) -> float:
        """How far rounding alone may move a pixel beyond the budget or [0, 1]."""
        return SLACK + self.ulp

    def leaves_box(self) -> bool:
        """Whether a pixel is beyond [0, 1] by more than rounding."""
        return self.low < -self.slack or self.high > 1 + self.slack

    def exceeds(self, eps: float | None, norm: str | None) -> bool:
        """Whether an image is further away than eps.

        Args:
            eps: the budget; None where it is not known.
            norm: "L2" or "Linf". None where it is not known: then L-inf counts, the smallest of all distances.
        """
        return eps is not None and (self.l2 if norm == "L2" else self.linf) > eps + self.slack


def as_images(returned: object, images: torch.Tensor) -> torch.Tensor:
    """The adversarial images that an attack returned, as a tensor with the dtype and the device of `images`.

    Args:
        returned: a tensor or a NumPy array, or a pair that begins with one, such as (adversarial, success).
        images: the clean images, floats (N, ...).

    Raises:
        TypeError: `returned` is something else, or is neither floats nor uint8.
        ValueError: the shape differs from that of `images`.
    """
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        returned = returned[0]
    returned = as_tensor(returned)
    wanted = f"an attack must return the adversarial images, a float or uint8 tensor of shape {tuple(images.shape)}"
    wanted += " (or a NumPy array, or a pair that begins with one)"
    if not isinstance(returned, torch.Tensor):
        raise TypeError(f"{wanted}; it returned a {type(returned).__name__}")
    if not (returned.is_floating_point() or returned.dtype == torch.uint8):
        raise TypeError(f"{wanted}; it returned {returned.dtype}")
    if returned.shape != images.shape:
        raise ValueError(f"{wanted}; it returned the shape {tuple(returned.shape)}")
    return to_float(returned.detach()).to(images)


def one_seed(seeds: torch.Tensor) -> int:
    """One seed for a batch, from the seeds of its samples.

    It has 32 bits: NumPy's generators, and torch's on the CPU, use no more.

    Args:
        seeds: int64 (N,).
    """
    return int.from_bytes(hashlib.blake2b(seeds.cpu().numpy().tobytes(), digest_size=4).digest(), "little")
