"""The gradient of the loss with respect to the images, and to nothing else."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


class InputGradient:
    """Gradient of the summed cross-entropy of one batch: `grad = gradient(x)`.

    The loss is summed, not averaged: the sign does not care about the scale, and in half precision a mean
    pushes small gradients to zero. Logits below float32 are raised to float32 for the same reason.

    Args:
        model: any callable from images (N, ...) to logits, a floating-point tensor (N, C).
        labels: int64 (N,), each in [0, C).

    Raises:
        ValueError: a label is negative, or (when called) not below C.
        TypeError: (when called) the model returned something else than a float tensor (N, C).
    """

    def __init__(self, model: Callable, labels: torch.Tensor):
        self.model = model
        self.labels = labels
        # The one place where an attack reads the device: cross_entropy would skip the label -100 without
        # a word, and kill the CUDA context on one that is too large.
        lowest, self.highest = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, -1)
        if lowest < 0:
            raise ValueError(f"labels must not be negative, got {lowest}")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._check(self.model(leaf))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, self.labels, reduction="sum")
            return torch.autograd.grad(loss, leaf)[0]

    def _check(self, logits: torch.Tensor) -> torch.Tensor:
        if not (
            isinstance(logits, torch.Tensor)
            and logits.is_floating_point()
            and logits.ndim == 2
            and len(logits) == len(self.labels)
        ):
            raise TypeError(
                f"the model must return logits, a float tensor of shape ({len(self.labels)}, classes); "
                f"it returned {_describe(logits)}"
            )
        if not logits.requires_grad:
            raise RuntimeError("the model's output does not depend on its input: is it under no_grad, or detached?")
        if self.highest >= logits.shape[1]:
            raise ValueError(f"labels must be below the model's {logits.shape[1]} classes, got {self.highest}")
        return logits


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a {type(value).__name__} with the keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"a {type(value).__name__}"
