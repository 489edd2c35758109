"""A pass under its own torch.autocast, whatever the caller's is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Run under torch.autocast with `dtype`, or without autocast where it is None.

    A caller's autocast changes nothing. It would keep the cast copies of the weights until its own end, and a step that
    changes the weights would not change the copies. So the copies are forgotten at the beginning and at the end.

    Args:
        device: where the model runs.
        dtype: such as torch.bfloat16.
    """
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield
    finally:
        torch.clear_autocast_cache()
