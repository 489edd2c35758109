"""Prompts: trained tokens beside the tokens of each block (VPT-deep: Jia et al. 2022, arXiv 2203.12119)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.attacks.checks import check_whole
from fastadv.models.added import Prompt, added_to, attach, weight_in
from fastadv.models.tokens import find_tokens
from fastadv.training.options import Chosen, Options

COUNT = 10  # prompts of a block


@contextmanager
def prompt(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Put prompts before the patches in each block, after the class token where there is one.

    The prompts stay in the model. A model that has prompts already gets no new ones: its own train.

    Args:
        model: the network.
        options: `prompt_tokens` and `example` are used.

    Yields:
        The prompts.

    Raises:
        TypeError: the number is no whole one.
        ValueError: the model is no plain vision transformer; it has another number of prompts; or the number is below
            1.
    """
    count = options.prompt_tokens
    if count is not None:
        check_whole("prompt_tokens", count)
    present = [each for _, each in added_to(model) if isinstance(each, Prompt)]
    if present and count not in (None, present[0].count):
        raise ValueError(
            f"the model has prompts of {present[0].count} tokens already, and prompt_tokens={count} means others: "
            "leave it out (--prompt-tokens) to train these"
        )
    added = present or _add(model, options, count or COUNT)
    yield Chosen([each.tokens for each in added])


def _add(model: nn.Module, options: Options, count: int) -> list[Prompt]:
    example = options.images("prompt finds its tokens")
    found = find_tokens(model, example)
    added = []
    for name in found.blocks:
        added.append(Prompt(count, found.width, found.prefix, found.pixels).to(weight_in(model, name)))
        attach(model, name, added[-1])
    return added
