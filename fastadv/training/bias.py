"""Every bias trains (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.training.options import Chosen, Options


@contextmanager
def bias(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Parameters that are called a bias, such as `bias`, `in_proj_bias`, `q_bias` and `bias_ih_l0`."""
    # A tied one may be a bias by one of its names.
    named = model.named_parameters(remove_duplicate=False)
    yield Chosen([parameter for name, parameter in named if _is_bias(name)])


def _is_bias(name: str) -> bool:
    """Not a table of biases that are added to attention."""
    words = name.rpartition(".")[2].split("_")
    return "bias" in (words[0], words[-1])
