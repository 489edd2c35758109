"""The options of a method of fine-tuning, and the parameters that it chooses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastadv.models import Target


@dataclass(frozen=True)
class Options:
    """The arguments of `trainable` that methods heed, under the same names.

    Attributes:
        head: name of the classifier.
        example: images (N, C, H, W) as the model takes them, or None.
        rank: of LoRA's factors.
        alpha: of LoRA: an update is alpha / rank times the product of its two factors.
        lora_targets: layers for LoRA; None means those that the structure gives.
        adapter_reduction: the width of a layer over that of its adapter; None means 8.
        prompt_tokens: of a block; None means 10.
    """

    head: str
    example: torch.Tensor | None
    rank: int
    alpha: float
    lora_targets: Sequence[str | Target] | None
    adapter_reduction: int | None
    prompt_tokens: int | None

    def images(self, what: str) -> torch.Tensor:
        """The images of `example`.

        Args:
            what: needs them, for the error, such as "prompt finds its tokens".

        Raises:
            ValueError: there is no example.
        """
        if self.example is None:
            raise ValueError(f"{what} in a forward pass: pass example=, images")
        return self.example


@dataclass(frozen=True)
class Chosen:
    """What trains beside the head.

    Attributes:
        parameters: of the model, or of what the method added to it.
        fixed: how many of their numbers are kept where they are.
    """

    parameters: Sequence[nn.Parameter] = ()
    fixed: int = 0
