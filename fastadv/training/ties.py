"""Tied tensors: those with the same numbers in memory, be it one parameter in two places or two over the same data."""

from collections.abc import Hashable

import torch


def place(tensor: torch.Tensor) -> Hashable:
    """What tied tensors have in common, and no others: where their numbers begin in memory."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a sparse tensor, and some subclasses, have no memory of their own
        address = 0
    return (tensor.device, address) if address else id(tensor)
