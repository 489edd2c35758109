"""What training costs, in passes of the model: forward, backward to its input, and from there to its weights."""

# A pass backward to the input costs as much as one forward, and the gradients of all weights as much again.
ATTACK = 2  # FGSM's: forward, and backward to the input


def standard(method: str) -> int:
    """A step of standard training, in forward passes: what is not the head alone has to be reached through all layers.

    Adapters, biases and low-rank factors are few weights: their own gradients cost nothing here.
    """
    return {"full": 3, "linear": 1}.get(method, 2)


def stale_price(method: str, copies: int = 1) -> float:
    """Time of a step with kept signs over that of a standard step.

    The gradient at the input costs nothing where the update's backward pass goes through all layers, and such a pass
    where it ends at the head.

    Args:
        copies: of each image that the update learns from: 2 with clean images.
    """
    return copies * (standard(method) + (method == "linear")) / standard(method)


def fgsm_price(method: str, copies: int = 1) -> float:
    """Time of a step with FGSM over that of a standard step."""
    return copies + ATTACK / standard(method)


def fresh_share(price: float, method: str, copies: int = 1) -> float:
    """The share of the images that FGSM attacks, and kept signs serve for the others, so that a step costs `price`."""
    share = (price - stale_price(method, copies)) * standard(method) / ATTACK
    return min(max(share, 0.0), 1.0)
