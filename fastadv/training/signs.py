"""Packs signs into bits, eight signs in a byte."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """Pack the signs of numbers into bits: 1 where a number is above 0, else 0. Zeros count as negative.

    Args:
        values: (N, ...), such as gradients, of any real dtype.

    Returns:
        uint8 (N, ceil(M / 8)) for M numbers in a sample, on the same device. Number i is the bit of value 2^(i mod 8)
        in byte i // 8; number 10 is the bit of value 4 in byte 1. Unused bits are 0.

    Raises:
        ValueError: values have no dimension beside N.
    """
    if values.dim() < 2:
        raise ValueError(f"values must be (N, ...), got the shape {tuple(values.shape)}")
    bits = (values > 0).flatten(1).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    packed: torch.Tensor = bits[..., 7]
    for i in range(6, -1, -1):
        packed = packed * 2 + bits[..., i]
    return packed


def unpack_signs(packed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unpack signs: 1 and -1, never 0. `fgsm_step` takes them in place of a gradient.

    Args:
        packed: uint8 (N, ceil(M / 8)), from `pack_signs`.
        shape: the shape of a sample, with M numbers in all.
        dtype: the dtype of the result.

    Returns:
        (N, *shape), on the same device.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `packed` has more or fewer bytes than the shape needs.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed signs are uint8, got {packed.dtype}")
    count = math.prod(shape)
    if packed.dim() != 2 or packed.shape[1] != -(-count // 8):
        raise ValueError(
            f"{count} signs a sample are {-(-count // 8)} bytes a sample, got the shape {tuple(packed.shape)}"
        )
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> places & 1).flatten(1)[:, :count]
    signs: torch.Tensor = bits.to(dtype).mul_(2).sub_(1).unflatten(1, tuple(shape))
    return signs
