"""Positions: which 16 random bits an element gets (contract.md, "Random bits")."""

import torch


def position_strides(x: torch.Tensor, per_sample: bool = False) -> tuple[int, ...]:
    """The strides by which an element's position is counted: those of `torch.empty_like(x)`. Allocates nothing.

    Args:
        x: images.
        per_sample: whether each sample has a seed. A position then counts within its sample, by the strides of
            `torch.empty_like(x[n])`, and the stride of dimension 0 is a sample's size.

    Returns:
        One stride for each dimension: (192, 64, 8, 1) for contiguous images of shape (N, 3, 8, 8).
    """
    if x.is_contiguous():
        return x.stride()
    if not per_sample:
        return torch.empty_like(x, device="meta").stride()
    sample = torch.empty_strided(x.shape[1:], x.stride()[1:], device="meta")
    return (sample.numel(), *torch.empty_like(sample).stride())
