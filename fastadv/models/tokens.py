"""Finds the tokens of a plain vision transformer: the blocks that pass them on, and where the patches begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastadv.functional import to_float
from fastadv.models.added import Prompt, attach
from fastadv.models.structure import find_blocks, other_image
from fastadv.nn.eager import eager
from fastadv.nn.frozen import frozen


@dataclass(frozen=True)
class Tokens:
    """The tokens of a plain vision transformer.

    Attributes:
        blocks: the names of the blocks, in order.
        prefix: the number of tokens before the patches, such as the class token.
        width: the channels of a token.
        pixels: the pixels of a patch, H x W.
    """

    blocks: tuple[str, ...]
    prefix: int
    width: int
    pixels: int


def find_tokens(module: nn.Module, example: torch.Tensor) -> Tokens:
    """The tokens of a plain vision transformer: ViT, DeiT, DINOv2, the towers of CLIP and SigLIP.

    A network is one if

    - all its blocks (`find_blocks`) take and return the same number of tokens for each image, (N, T, width);
    - the first tokens that enter its blocks are the same for two images, and all others, the patches, differ;
    - it runs with more tokens, and they change the others.

    Args:
        module: a network, wrapped or not.
        example: images (N, C, H, W) as `module` takes them, or uint8; the first one is used.

    Raises:
        ValueError: the network is something else; the message says why.
    """
    x = to_float(example[:1])
    x = torch.cat((x, other_image(x)))
    with torch.no_grad(), frozen(module), eager():
        try:
            blocks = find_blocks(module)
        except ValueError as error:
            raise _refusal(str(error)) from error
        first, last = _tokens(module, blocks, x)
        same = torch.isclose(first[0], first[1]).all(-1)
        prefix = int(same.cumprod(0).sum())
        if same[prefix:].any() or prefix == len(same):
            raise _refusal(f"of the tokens that enter {blocks[0]} it is not clear which are the patches'")
        pixels = x.shape[-2] * x.shape[-1] // (len(same) - prefix)
        found = Tokens(tuple(blocks), prefix, first.shape[-1], pixels)
        _check_effect(module, found, x, last)
    return found


def _refusal(why: str) -> ValueError:
    return ValueError(
        "prompt works on plain vision transformers (ViT, DeiT, DINOv2, the towers of CLIP and SigLIP), whose blocks "
        f"pass on the same tokens: {why}. Choose another method, such as adapter"
    )


def _tokens(module: nn.Module, blocks: Sequence[str], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (N, T, width) that enter the first block, and the tokens that leave the last one.

    Raises:
        ValueError: the blocks do not all take and return the same number of tokens for each image.
    """
    entered: list[Any] = []  # in a plain vision transformer tensors (N, T, width)
    left: list[Any] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(next(iter((*args, *kwargs.values())), None))

    def note_out(block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        left.append(out[0] if isinstance(out, tuple) and out else out)

    layers = [module.get_submodule(name) for name in blocks]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for layer in layers]
    hooks += [layer.register_forward_hook(note_out) for layer in layers]
    try:
        module(x)
    finally:
        for hook in hooks:
            hook.remove()
    shapes = {tuple(getattr(each, "shape", ())) for each in (*entered, *left)}
    shape = next(iter(shapes), ())
    if len(entered) != len(blocks) or len(shapes) != 1 or len(shape) != 3 or shape[0] != len(x):
        raise _refusal(f"{blocks[0]} to {blocks[-1]} do not all take and return one number of tokens for each image")
    return entered[0], left[-1]


def _check_effect(module: nn.Module, found: Tokens, x: torch.Tensor, before: torch.Tensor) -> None:
    """Refuse a network that does not run with three more tokens in each block, or whose tokens ignore them."""
    undo = []
    try:
        for name in found.blocks:
            prompt = Prompt(3, found.width, found.prefix, found.pixels)
            torch.nn.init.normal_(prompt.tokens, generator=torch.Generator().manual_seed(0))
            undo.append(attach(module, name, prompt.to(x.device)))
        after = _tokens(module, found.blocks, x)[1]
    except Exception as error:
        raise _refusal(f"with more tokens it does not run ({type(error).__name__}: {error})") from error
    finally:
        for each in undo:
            each()
    if torch.equal(before, after):
        raise _refusal("its blocks do not see tokens that are added")
