"""Prompts (VPT-deep: Jia et al. 2022, arXiv 2203.12119): tokens that each block gets beside its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.models.added import Prompt, added_to, attach
from fastadv.models.tokens import find_tokens
from fastadv.training.options import Chosen, Options

COUNT = 10


@contextmanager
def prompt(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Put prompts between the class token, where there is one, and the patches. They stay in the model; those that it
    has already train on.

    Raises:
        ValueError: the model is no plain vision transformer, or has other prompts.
    """
    count = options.prompt_tokens
    if count is not None and count < 1:
        raise ValueError(f"prompt_tokens must be at least 1, got {count}")
    present = [each for _, each in added_to(model) if isinstance(each, Prompt)]
    if present and count not in (None, present[0].count):
        raise ValueError(
            f"the model has prompts of {present[0].count} tokens already, and prompt_tokens={count} makes others: "
            "leave it out (--prompt-tokens), and they train on"
        )
    added = present or _add(model, options, count or COUNT)
    yield Chosen([each.tokens for each in added])


def _add(model: nn.Module, options: Options, count: int) -> list[Prompt]:
    example = options.images("prompt finds its tokens")
    found = find_tokens(model, example)
    added = [Prompt(count, found.width, found.prefix, found.pixels).to(example.device) for _ in found.blocks]
    for name, each in zip(found.blocks, added, strict=True):
        attach(model, name, each)
    return added
