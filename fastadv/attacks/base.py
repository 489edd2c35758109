"""What every attack has in common: its calling convention, its checks and its manners."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from fastadv.attacks.gradient import InputGradient
from fastadv.attacks.state import as_normal, frozen


class Attack(ABC):
    """An attack on `model` within `eps` (L-inf, in pixels of [0, 1]).

    While it runs the model is in eval mode and its parameters do not require grad, so that no weight
    gradient is computed. The model is left exactly as it was found, also when it raises: train flags,
    requires_grad, `.grad`, buffers. A model that is not an `nn.Module` is called as it is.

    Raises:
        ValueError: eps is not in [0, 1].
    """

    def __init__(self, model: Callable, eps: float):
        if not 0 <= eps <= 1:
            raise ValueError(f"eps is in pixels of [0, 1] (8/255, not 8), got {eps}")
        self.model = model
        self.eps = eps

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, *, seed: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adversarial images; `images` are not changed. Works under no_grad and inference_mode.

        Args:
            images: (N, ...) in [0, 1], any floating-point type, or uint8 meaning images / 255.
            labels: int64 (N,) on the images' device, each in [0, classes).
            seed: of the random start: an int, or an int64 tensor with one element or of shape (N,).
                None draws one from torch's generator on the images' device.

        Returns:
            A tensor like `images` (float32 for uint8), detached, within eps of them and in [0, 1].

        Raises:
            TypeError: images or labels are of a wrong type or dtype, or the model's output is.
            ValueError: labels of a wrong shape or device, or out of range.
        """
        _check_batch(images, labels)
        with torch.inference_mode(False), torch.no_grad(), frozen(self.model):
            gradient = InputGradient(self.model, as_normal(labels))
            return self.perturb(as_normal(images), gradient, seed)

    @abstractmethod
    def perturb(self, images: torch.Tensor, gradient: InputGradient, seed: int | torch.Tensor | None) -> torch.Tensor:
        """The attack itself, on checked images, under no_grad, with the model frozen."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "model")
        return f"{type(self).__name__}({settings})"


def _check_batch(images: torch.Tensor, labels: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be a float or uint8 tensor, got {getattr(images, 'dtype', type(images))}")
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels))}")
    if images.ndim == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be of shape (N,), one for each of images {tuple(images.shape)}, got {tuple(labels.shape)}"
        )
    if labels.device != images.device:
        raise ValueError(f"labels must be on the images' device {images.device}, got {labels.device}")
