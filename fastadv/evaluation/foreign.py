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
        finite, far = measured(adv, images)
        seen = Reach.of([self, Reach.read(far, images.dtype)])
        vars(self).update(vars(seen))
        return finite

    @property
    def looked(self) -> bool:
        """Whether there was a batch."""
        return self.ulp > 0

    @classmethod
    def read(cls, far: torch.Tensor, dtype: torch.dtype) -> "Reach":
        """The reach of batches of images of `dtype`, from what `measured` found; this waits for the device."""
        linf, l2, low, high, nonfinite = far.tolist()
        return cls(linf, l2, min(-low, 0.0), max(high, 1.0), int(nonfinite), torch.finfo(dtype).eps)

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
            norm: "L2" or "Linf". None where it is not known: then L-inf counts, the smallest of all distances, and L2
                where eps is above 1, which bounds nothing in L-inf.
        """
        if eps is None:
            return False
        by_l2 = norm == "L2" or (norm is None and eps > 1)
        return (self.l2 if by_l2 else self.linf) > eps + self.slack


def measured(adv: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far a batch of adversarial images reaches; nothing here waits for the device.

    Args:
        adv: the images that the attack returned, floats (N, ...).
        images: the clean images in [0, 1], likewise.

    Returns:
        Which images of `adv` are finite, (N,) bool; and of these float64 (5,), on the images' device: the largest L-inf
        distance, the largest L2 distance, minus the smallest pixel, the largest pixel, and how many images are not
        finite. `farther` takes two batches together.
    """
    finite = adv.flatten(1).isfinite().all(1)
    adv, images = adv.flatten(1).double(), images.flatten(1).double()
    adv = torch.where(finite[:, None], adv, images)
    distance = adv - images
    low, high = adv.aminmax()
    far = (distance.abs().amax(), distance.norm(dim=1).amax(), -low, high, (~finite).sum().double())
    return finite, torch.stack(far)


def farther(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of two batches together what `measured` returns of each, float64 (5,)."""
    return torch.cat((torch.maximum(first[:4], second[:4]), first[4:] + second[4:]))


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
