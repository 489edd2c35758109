"""What a method is told, and what it says of what trains."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastadv.models import Target


@dataclass(frozen=True)
class Options:
    """The arguments of `trainable` that methods heed; `head` is the name of the classifier."""

    head: str
    example: torch.Tensor | None
    rank: int
    alpha: float
    lora_targets: Sequence[str | Target] | None
    adapter_reduction: int | None
    prompt_tokens: int | None

    def images(self, what: str) -> torch.Tensor:
        """`example`.

        Raises:
            ValueError: there is none.
        """
        if self.example is None:
            raise ValueError(f"{what} in a forward pass: pass example=, images")
        return self.example


@dataclass(frozen=True)
class Chosen:
    """What trains beside the head.

    Attributes:
        parameters: of the model, or added to it.
        fixed: how many of their numbers are held where they are.
    """

    parameters: Sequence[nn.Parameter] = ()
    fixed: int = 0
