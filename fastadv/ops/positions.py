"""Positions: which 16 random bits an element gets (contract.md, "Random bits")."""

import torch


def position_strides(x: torch.Tensor, per_sample: bool = False) -> tuple[int, ...]:
    """Strides of an element's position: those of `torch.empty_like(x)`, as torch itself computes them.

    With per-sample seeds a position counts within its sample, `torch.empty_like(x[n])`, and the stride of
    dimension 0 is a sample's size. Allocates nothing.
    """
    if x.is_contiguous():
        return x.stride()
    if not per_sample:
        return torch.empty_like(x, device="meta").stride()
    sample = torch.empty_strided(x.shape[1:], x.stride()[1:], device="meta")
    return (sample.numel(), *torch.empty_like(sample).stride())
