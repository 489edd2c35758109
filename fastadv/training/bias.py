"""Bias tuning: only biases train (BitFit: Ben Zaken et al. 2022, arXiv 2106.10199)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.training.options import Chosen, Options


@contextmanager
def bias(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Choose the parameters that are called a bias, such as `bias`, `in_proj_bias`, `q_bias` and `bias_ih_l0`.

    Args:
        model: the network.
        options: `heads` is used.

    Yields:
        These parameters.

    Raises:
        ValueError: there is none before the head.
    """
    # A tied parameter has several names, and one of them may be a bias's.
    named = model.named_parameters(remove_duplicate=False)
    biases = {name: parameter for name, parameter in named if _is_bias(name)}
    if all(name.startswith(tuple(f"{head}." for head in options.heads)) for name in biases):
        raise ValueError("bias trains biases, and the model has none before its head: choose another method")
    yield Chosen(list(biases.values()))


def _is_bias(name: str) -> bool:
    """Whether a name is that of a bias; a table of attention biases, such as relative_position_bias_table, is none."""
    # What a bias is computed from (torch.nn.utils.parametrize) is called "parametrizations.bias.original".
    _, computed, rest = name.rpartition("parametrizations.")
    words = (rest.partition(".")[0] if computed else name.rpartition(".")[2]).split("_")
    return "bias" in (words[0], words[-1])
