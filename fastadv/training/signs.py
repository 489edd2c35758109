"""Signs as bits, eight in a byte."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """One bit for each number of each sample: 1 where it is above 0, else 0, so that zeros count as negative.

    Args:
        values: (N, ...), of any dtype but complex ones, such as gradients.

    Returns:
        uint8 (N, ceil(M / 8)) for M numbers in a sample, on the same device: number i is the bit of value 2^(i mod 8)
        of byte i // 8. Bits that are left over are 0.

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
    """What `pack_signs` packed: 1 and -1, never 0, as `fgsm_step` takes them for a gradient.

    Args:
        packed: uint8 (N, ceil(M / 8)).
        shape: of a sample, of M numbers in all.
        dtype: of the result.

    Returns:
        (N, *shape), on the same device.

    Raises:
        TypeError: packed is not uint8.
        ValueError: it does not have as many bytes as the shape needs.
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
