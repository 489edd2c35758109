"""What trains: everything, or the head alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv.attacks.state import flags_kept, frozen
from fastadv.models import find_head

METHODS = ("full", "linear")


@contextmanager
def trainable(model: nn.Module, method: str, head: str | None = None) -> Iterator[list[nn.Parameter]]:
    """The parameters that `method` trains, with `model` set up for it; its flags are put back at the end.

    With "full" the model is in train mode and every parameter that requires grad trains. With "linear" only
    the head does: the rest stays in eval mode, so that batch-norm buffers keep their bits, and requires no
    grad, so that autograd records nothing before the head and runs no backward through the backbone.

    Raises:
        ValueError: no such head, or nothing that trains.
    """
    with flags_kept(model) if method == "full" else frozen(model):
        part = model if method == "full" else find_head(model, head)[1]
        part.train()
        if method == "linear":
            part.requires_grad_(True)
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("no parameter requires grad: there is nothing to train")
        yield parameters
