"""Finds the logits in a model's output."""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch

AnyModel = Callable[..., Any]
"""An `nn.Module` or any other callable from images (N, ...) to outputs."""


def find_logits(outputs: object, n: int) -> torch.Tensor:
    """Find the logits in a model's output.

    Args:
        outputs: the logits; or an object with the attribute or key `logits`; or a mapping with the key `out`, as
            torchvision has; or a mapping, tuple or list with a single float matrix among its entries.
        n: the number of samples.

    Returns:
        The logits, a float tensor (n, C).

    Raises:
        TypeError: there is no float tensor (n, C), or there are several.
    """
    if are_logits(outputs, n):
        return outputs
    found, several = outputs, ""
    if not isinstance(found, torch.Tensor):
        if (logits := getattr(outputs, "logits", None)) is not None:
            found = logits
        elif isinstance(outputs, Mapping) and ("logits" in outputs or "out" in outputs):
            found = outputs["logits"] if "logits" in outputs else outputs["out"]
        elif isinstance(outputs, (Mapping, tuple, list)) and outputs:
            entries = list(outputs.values() if isinstance(outputs, Mapping) else outputs)
            fitting = [t for t in entries if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim == 2]
            found = fitting[0] if fitting else entries[0]
            if len(fitting) > 1:
                several = f", in which {' and '.join(map(describe, fitting))} may be the logits or features"
    if several or not are_logits(found, n):
        taken = "" if several or found is outputs else f", of which the logits would be {describe(found)}"
        raise TypeError(
            f"the model must return logits, a float tensor of shape ({n}, classes), alone or under the attribute or "
            f"key `logits`; it returned {describe(outputs)}{several}{taken}. For other outputs an attack takes loss=, "
            "a callable from (outputs, targets) to one value per sample"
        )
    return found


def are_logits(outputs: object, n: int) -> TypeGuard[torch.Tensor]:
    """Whether `outputs` is a float tensor (n, classes)."""
    return (
        isinstance(outputs, torch.Tensor)
        and outputs.is_floating_point()
        and outputs.ndim == 2
        and outputs.shape[0] == n
    )


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32 where their dtype is narrower, such as bfloat16; else as they are."""
    return logits if logits.dtype == torch.float32 else logits.to(torch.promote_types(logits.dtype, torch.float32))


def describe(value: object) -> str:
    """The type of an output with its shape, keys or length, in words: "a float32 tensor of shape (8, 10)"."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"a {type(value).__name__}"
