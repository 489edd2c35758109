"""The options of a fine-tuning method, and the parameters that it chooses to train."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastadv.models import Target


@dataclass(frozen=True)
class Options:
    """The arguments of `trainable` that methods use, under the same names.

    Attributes:
        heads: the names of the classifiers, mostly one.
        example: images (N, C, H, W) as the model takes them, or None.
        rank: the rank of LoRA's factors.
        alpha: for LoRA: an update is alpha / rank times the product of its two factors.
        lora_targets: the layers that LoRA adapts; None means those that `fastadv.models.lora_targets` finds.
        adapter_reduction: the width of a layer divided by the width of its adapter; None means 8.
        prompt_tokens: the number of prompts in a block; None means 10.
    """

    heads: Sequence[str]
    example: torch.Tensor | None
    rank: int
    alpha: float
    lora_targets: Sequence[str | Target] | None
    adapter_reduction: int | None
    prompt_tokens: int | None

    def images(self, what: str) -> torch.Tensor:
        """The images of `example`.

        Args:
            what: the beginning of the error's message, such as "prompt finds its tokens".

        Raises:
            ValueError: there is no example.
        """
        if self.example is None:
            raise ValueError(f"{what} in a forward pass: pass example=, images")
        return self.example


@dataclass(frozen=True)
class Chosen:
    """The parameters that train beside the head.

    Attributes:
        parameters: parameters of the model, or of modules that the method added to it.
        fixed: how many of their numbers do not train all the same, see `fastadv.training.factors.merged`.
    """

    parameters: Sequence[nn.Parameter] = ()
    fixed: int = 0
