"""What attacks and evaluations refuse: options, images and labels that cannot be meant."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from fastadv.attacks.losses import LOSSES
from fastadv.names import instead
from fastadv.nn.frozen import TRAINING_MODES
from fastadv.nn.logits import AnyModel

CHOSEN = ("random", "least_likely")  # targets that the attack chooses, for labels that it knows
TARGETED = (False, True, *CHOSEN)  # or a callable


def device_of(model: AnyModel) -> torch.device | None:
    """The device of the model's parameters; None where it has none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((parameter.device for parameter in parameters), None)


BOX = (0.0, 1.0)
DARK = 2 / 255  # images of [0, 255] that were divided by 255 twice have no brighter pixel
SHORT, LONG = 16.5 / 255, 32.0  # in L2: budgets of L-inf are up to 16/255, and those in 255ths, such as 128, beyond 32
ENOUGH = 8  # images whose logits are not probabilities by chance
SLACK = 1e-6  # what resizing and denormalising leave beyond a bound


def box_of(clip: tuple[float, float] | None) -> tuple[float, float]:
    """(lo, hi) of an attack's `clip`, where None is no box."""
    return (-math.inf, math.inf) if clip is None else (float(clip[0]), float(clip[1]))


def check_whole(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_switch(name: str, value: object) -> None:
    """Refuse what is no bool: any text is true, "no" and "false" too."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_options(
    targeted: object,
    loss: Any,
    target_classes: object,
    restarts: object,
    eot: object,
    training_mode: object,
    autocast: object,
    memory_format: object,
    best_iterate: object,
    compile: object,
    graph: object,
    chunk: object,
) -> None:
    if not callable(targeted) and (not isinstance(targeted, (bool, str)) or targeted not in TARGETED):
        raise ValueError(
            f"targeted must be one of {', '.join(map(repr, TARGETED))}, or a callable from (images, labels) to target "
            f"labels, got {targeted!r}"
        )
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}: pass an object of it, such as {loss.__name__}(...)")
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r} (neither a name nor callable){instead(loss, LOSSES)}")
    if targeted and not callable(loss) and LOSSES[loss].compares in ("clean", "pairs"):
        why = "has no target class" if loss == "kl" else "chooses its target classes itself"
        raise ValueError(f"the loss {loss} {why}: leave targeted at False, or choose another loss")
    if targeted in CHOSEN and loss == "bce":
        raise ValueError(
            f"targeted={targeted!r} chooses a class other than the label, and the labels of the loss bce name none: "
            "pass targets of your own, 0 or 1 for each logit, with targeted=True"
        )
    check_whole("target_classes", target_classes)
    check_whole("restarts", restarts)
    check_whole("eot", eot)
    check_whole("chunk", 1 if chunk is None else chunk)
    if autocast is not None and not isinstance(autocast, torch.dtype):
        raise TypeError(f"autocast must be a dtype such as torch.bfloat16, or None, got {autocast!r}")
    if memory_format is not None and not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format must be one of torch's, such as torch.channels_last, got {memory_format!r}")
    for name, value in (("best_iterate", best_iterate), ("compile", compile), ("graph", graph)):
        check_switch(name, value)
    if training_mode not in TRAINING_MODES:
        raise ValueError(f"unknown training_mode {training_mode!r}{instead(training_mode, TRAINING_MODES)}")
    if graph and not torch.cuda.is_available():
        raise RuntimeError("graph=True captures a CUDA graph, and there is no GPU here: use compile=True, or neither")


def check_clip(clip: Any) -> None:
    if clip is None:
        return
    try:
        lo, hi = clip
    except (TypeError, ValueError):
        raise TypeError(f"clip must be (lo, hi), or None for inputs without a box, got {clip!r}") from None
    for bound in (lo, hi):
        if isinstance(bound, bool) or not isinstance(bound, Real):
            raise TypeError(f"clip must be two numbers (lo, hi), got {clip!r}")
    if not lo < hi:
        raise ValueError(f"clip must be (lo, hi) with lo below hi, got {clip!r}")


def _has_unit(norm: str, clip: tuple[float, float] | None) -> bool:
    """Whether lengths are on the images' scale [0, 1], so that one of 8 is in a wrong unit."""
    return norm == "Linf" and box_of(clip) == BOX


def check_eps(eps: float, norm: str, clip: tuple[float, float] | None = BOX) -> None:
    if isinstance(eps, Real) and _has_unit(norm, clip) and not 0 <= eps <= 1:
        raise ValueError(
            f"eps is on the images' scale [0, 1] (8/255, not 8), got {eps}, which is {255 * float(eps):g}/255"
        )
    check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def length_in_l2(eps: object, clip: tuple[float, float] | None = BOX) -> str | None:
    """Say that a radius in L2 of images in [0, 1] is in another unit; None where it may be meant, or is a tensor."""
    if not isinstance(eps, Real) or box_of(clip) != BOX or SHORT < float(eps) < LONG or not 0 < float(eps) < math.inf:
        return None
    wrong = (
        f"{255 * float(eps):.4g}/255, a length for L-inf" if float(eps) <= SHORT else f"{eps:g}, of no image in [0, 1]"
    )
    return f"its eps is {wrong}. In L2 eps is the length of a whole perturbation, and 0.5 is usual: give such a length"


def check_length(name: str, length: object, eps: float, norm: str, clip: tuple[float, float] | None = BOX) -> None:
    """Refuse a step or a noise that is wider than the box and more than twice eps: it is in a wrong unit."""
    if isinstance(length, Real) and _has_unit(norm, clip) and float(length) > max(1, 2 * eps):
        raise ValueError(f"{name} is on the images' scale [0, 1] (8/255, not 8), got {length}")


DOWN = "a negative step goes down the loss; to go towards classes, pass targeted"


def check_alpha(alpha: object) -> None:
    """Refuse what is neither a finite number of at least 0 nor a float tensor."""
    if not isinstance(alpha, torch.Tensor):
        check_number("alpha", alpha)
        if alpha < 0:  # type: ignore[operator]
            raise ValueError(f"alpha must be at least 0, got {alpha}: {DOWN}")
    elif not alpha.is_floating_point():
        raise TypeError(f"alpha must be a number or a float tensor, got {alpha.dtype}")
    elif alpha.requires_grad:
        raise ValueError("alpha requires grad, and an attack has no derivative with respect to it: detach it")


def check_alpha_of(alpha: torch.Tensor, images: torch.Tensor, *, look: bool) -> None:
    """Refuse step sizes that do not go with the images.

    Args:
        alpha: step sizes.
        images: (N, C, ...).
        look: refuse values that are negative or not finite, which waits for the device.

    Raises:
        ValueError: a wrong device, shape or value.
    """
    if alpha.device != images.device:
        raise ValueError(f"alpha must be on the images' device {images.device}, got {alpha.device}")
    wanted = (*images.shape[:2], *(1,) * (images.ndim - 2))
    fits = alpha.ndim == len(wanted) and all(size in (1, w) for size, w in zip(alpha.shape, wanted, strict=True))
    if alpha.shape not in ((), images.shape[:1]) and (alpha.ndim < 2 or not fits):
        raise ValueError(
            f"alpha must be a number, a 0-dim tensor, one of shape ({len(images)},), one per image, or of the images' "
            f"rank as (N, 1, 1, 1), (1, C, 1, 1) or (N, C, 1, 1); got {tuple(alpha.shape)} for images "
            f"{tuple(images.shape)}"
        )
    if look and not bool((alpha.isfinite() & (alpha >= 0)).all()):
        raise ValueError(f"alpha must be finite and at least 0, and some of it is not: {DOWN}")


def check_images(images: torch.Tensor, clip: tuple[float, float] | None = BOX) -> None:
    if not _is_image(images):
        raise TypeError(f"images must be a float or uint8 tensor, got {_kind(images)}")
    if images.dtype == torch.uint8 and box_of(clip) != BOX:
        raise TypeError(f"uint8 images mean images / 255, in [0, 1], and clip is {clip}: pass floats")
    if images.ndim < 2:
        raise ValueError(f"images must be a batch (N, ...) with pixels, got a tensor of shape {tuple(images.shape)}")


def check_device(device: torch.device, model: AnyModel) -> None:
    if device_of(model) not in (None, device):
        raise ValueError(f"images are on {device} and the model is on {device_of(model)}: move one of them")


def check_start(x_init: torch.Tensor, images: torch.Tensor) -> None:
    if not isinstance(x_init, torch.Tensor) or x_init.shape != images.shape:
        raise ValueError(f"x_init must be a tensor of the images' shape {tuple(images.shape)}")
    if x_init.device != images.device:
        raise ValueError(f"x_init must be on the images' device {images.device}, got {x_init.device}")
    if not _is_image(x_init):
        raise TypeError(f"x_init must be a float or uint8 tensor, got {x_init.dtype}")


def check_has_classes(labels: torch.Tensor, targeted: object) -> None:
    if targeted in CHOSEN and not (labels.dtype == torch.int64 and labels.ndim == 1):
        raise ValueError(
            f"targeted={targeted!r} chooses a class other than the label, and labels of {labels.dtype} and shape "
            f"{tuple(labels.shape)} name no class: pass int64 labels (N,), such as soft_labels.argmax(1), or targets "
            "of your own with targeted=True"
        )


def check_labels(
    labels: torch.Tensor, images: torch.Tensor, *, soft: bool = False, any_kind: bool = False, name: str = "labels"
) -> None:
    """Refuse labels that are not int64 (N,).

    Args:
        labels: what was passed.
        images: (N, ...).
        soft: whether floats (N, C) are right too.
        any_kind: whether any tensor with N rows is right.
        name: the labels', for the message.

    Raises:
        TypeError: they are no tensor, or one of another dtype.
        ValueError: a wrong shape or device.
    """
    is_tensor = isinstance(labels, torch.Tensor)
    rows = any_kind or (soft and is_tensor and labels.is_floating_point() and labels.ndim == 2)
    if not is_tensor or not (rows or labels.dtype == torch.int64):
        raise TypeError(f"{name} must be an int64 tensor, got {_kind(labels)}")
    if (labels.shape[:1] if rows else labels.shape) != images.shape[:1]:
        raise ValueError(
            f"{name} must be of shape (N,), one for each of images {tuple(images.shape)}, got {tuple(labels.shape)}"
        )
    if labels.device != images.device:
        raise ValueError(f"{name} must be on the images' device {images.device}, got {labels.device}")


def beyond_the_box(images: torch.Tensor, clip: tuple[float, float] | None = BOX) -> str | None:
    """Say what is wrong with the images' range; None where it is right. Waits for the device."""
    if not images.is_floating_point() or not images.numel():
        return None
    low, high = torch.stack(images.aminmax()).tolist()
    lo, hi = box_of(clip)
    if lo - SLACK <= low and high <= hi + SLACK:
        return None
    wrong = f"images must be in [{lo:g}, {hi:g}], got [{low:.9g}, {high:.9g}]"
    if low != low:
        return f"{wrong}: some are NaN"
    if box_of(clip) != BOX:
        return wrong
    return (
        f"{wrong}: divide those of [0, 255] by 255; if they are normalised, pass them as they were before, and "
        "Normalized(model, mean, std) as the model; for inputs with another range or none an attack takes "
        "clip=(lo, hi) or clip=None"
    )


def too_dark(images: torch.Tensor) -> str:
    """What may be wrong with images without a bright pixel, in words; "" where there is one. Waits for the device."""
    eight_bit = images.dtype == torch.uint8
    brightest = float(images.max()) / (255 if eight_bit else 1) if images.numel() else 1.0
    if brightest > DARK:
        return ""
    why = "uint8 means images / 255: are these of 0 and 1?" if eight_bit else "were they divided by 255 twice?"
    return f"no pixel of the images is above {brightest:.2g} on the scale [0, 1]: {why}"


def in_box(images: torch.Tensor, clip: tuple[float, float] | None = BOX, slack: float = SLACK) -> torch.Tensor:
    """Whether all pixels are in the box, 0-dim bool; NaN is not. Floats in any layout are read once."""
    (low, high), (lo, hi) = images.aminmax(), box_of(clip)
    return (low >= lo - slack) & (high <= hi + slack)


def in_ball(
    adv: torch.Tensor, images: torch.Tensor, eps: float | torch.Tensor, norm: str, clip: tuple[float, float] | None
) -> torch.Tensor:
    """Which adversarial images are in the ball and in the box, up to rounding, (N,) bool."""
    distance = (adv - images).flatten(1).double()
    length = distance.norm(dim=1) if norm == "L2" else distance.abs().amax(1)
    eps = eps.flatten() if isinstance(eps, torch.Tensor) else eps
    slack, (lo, hi) = SLACK + torch.finfo(adv.dtype).eps, box_of(clip)
    low, high = adv.flatten(1).amin(1), adv.flatten(1).amax(1)
    return (length <= eps + slack) & (low >= lo - slack) & (high <= hi + slack)


def eps_fits(eps: torch.Tensor, norm: str, clip: tuple[float, float] | None = BOX) -> torch.Tensor:
    """Which budgets `check_eps` allows, bool like `eps`."""
    most = 1.0 if _has_unit(norm, clip) else torch.finfo(eps.dtype).max
    return (eps >= 0) & (eps <= most)


def are_probabilities(labels: torch.Tensor) -> torch.Tensor:
    """Which rows of soft labels (N, C) are probabilities, (N,) bool."""
    return (labels >= 0).all(1) & ((labels.double().sum(1) - 1).abs() <= 1e-2)


def of_probabilities(outputs: torch.Tensor, loss: str) -> str:
    """What is wrong with outputs that are probabilities, in words; "" where they are logits. Waits for the device.

    Args:
        outputs: of the model (N, C); of a few images nobody can tell.
        loss: the name of the loss, one that squashes them.
    """
    if len(outputs) < ENOUGH:
        return ""
    low, high = outputs.aminmax()
    if not (low >= 0 and high <= 1):
        return ""
    what, last = "all of the model's outputs are in [0, 1], as a sigmoid's are", "sigmoid"
    if bool(are_probabilities(outputs).all()):
        what, last = "the model returns probabilities, not logits", "softmax"
    elif low > 0.1 or high < 0.9:  # an untrained network may have such logits; a trained one's sigmoid goes further
        return ""
    verdict = ", and the verdict is the sign of a logit, here always a yes" if loss == "bce" else ""
    return (
        f"{what}: the loss {loss} takes a {LOSSES[loss].squashes} of them once more, its gradients vanish, and the "
        f"attack is weaker{verdict}. Pass the model without its {last}"
    )


def are_signs(labels: torch.Tensor) -> torch.Tensor:
    """Which labels are 0 or 1, bool like `labels`."""
    return (labels == 0) | (labels == 1)


def check_soft(labels: torch.Tensor) -> None:
    """Refuse rows that are no probabilities. Waits for the device."""
    if are_probabilities(labels).all():
        return
    sums = labels.double().sum(1)
    raise ValueError(
        f"soft labels (N, C) must be probabilities, rows that sum to 1; got sums from "
        f"{float(sums.min()):.4g} to {float(sums.max()):.4g}, and a lowest value of {float(labels.min()):.4g}. For "
        "several labels a sample pass loss='bce'"
    )


def check_signs(labels: torch.Tensor) -> None:
    """Refuse labels that are neither 0 nor 1. Waits for the device."""
    if not are_signs(labels).all():
        raise ValueError(
            f"labels {tuple(labels.shape)} are several a sample, 0 or 1 for each logit, and some are neither: pass "
            "int64 labels (N,) where a sample has one class"
        )


def check_samples(images: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse what is no set of images in [0, 1] with a class, or several labels, each. Waits for the device."""
    check_images(images)
    several = isinstance(labels, torch.Tensor) and labels.ndim == 2
    check_labels(labels, images, any_kind=several)
    if several:
        check_signs(labels)
    wrong = beyond_the_box(images)
    if wrong:
        raise ValueError(wrong)


def check_one_class(labels: torch.Tensor) -> None:
    """Refuse labels that are not one class for each sample."""
    if not (isinstance(labels, torch.Tensor) and labels.dtype == torch.int64 and labels.ndim == 1):
        shape = f" of shape {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else ""
        raise TypeError(f"labels must be an int64 tensor (N,), got {_kind(labels)}{shape}")


def highest(labels: torch.Tensor) -> int:
    """The highest of int64 labels. Waits for the device.

    Raises:
        ValueError: one is negative; cross_entropy skips a label of -100 without a word.
    """
    low, high = map(int, torch.stack(labels.aminmax()).tolist())
    if low < 0:
        raise ValueError(f"labels must not be negative, got {low}")
    return high


def _is_image(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.dtype == torch.uint8)


def _kind(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype}: pass torch.from_numpy(array)"
    return type(value)
