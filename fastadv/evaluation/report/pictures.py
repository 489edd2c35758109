"""Pictures of a report: images, the perturbations of an attack, and the model's predictions."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fastadv._extras import require
from fastadv.attacks import create_attack
from fastadv.attacks.verdicts import NONE, predicted
from fastadv.data.share import Samples
from fastadv.evaluation.report import html
from fastadv.functional import to_float
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits

SHOWN = 8  # images at most
SIDE = 224  # pixels: an image with a longer side is made smaller


def under_attack(model: nn.Module, test: Samples, classes: Sequence[str], eps: float) -> str:
    """A table of images, spread over the classes, each with its perturbation and its adversarial image under PGD-10.

    Args:
        model: from images in [0, 1] to logits.
        test: images (N, C, H, W) and labels int64 (N,).
        classes: a name for each label.
        eps: radius of the ball, in the images' units, [0, 1].

    Returns:
        HTML.
    """
    device = next((parameter.device for parameter in model.parameters()), test[0].device)
    count = min(SHOWN, len(test[0]))
    spread = test[1].argsort(stable=True)[torch.arange(count) * len(test[0]) // count]  # over all classes
    images, labels = to_float(test[0][spread].to(device)), test[1][spread].to(device)
    x_adv = create_attack("pgd-10", model, eps)(images, labels, seed=0)
    with torch.no_grad(), frozen(model):
        says = [predicted(find_logits(model(x), len(x))).tolist() for x in (images, x_adv)]
    perturbation = (x_adv - images) / (2 * max(eps, 1e-6)) + 0.5
    columns = list(zip(images, perturbation, x_adv, labels.tolist(), *says, strict=True))
    rows = [
        [f"{_shown(x, 'image')}{_said(before, label, classes)}" for x, _, _, label, before, _ in columns],
        [_shown(change, "perturbation") for _, change, *_ in columns],
        [f"{_shown(adv, 'under attack')}{_said(after, label, classes)}" for _, _, adv, label, _, after in columns],
    ]
    head = [html.name(label, classes) for label in labels.tolist()]
    words = "Above each column its class, below each image what the model says of it. Between them what the attack adds"
    words += f", on grey and enlarged, so that black and white are eps. {_channels(images.shape[1])}"
    return html.paragraph(words) + html.table(head, rows, "pictures")


def _said(number: int, label: int, classes: Sequence[str]) -> str:
    right = number == label
    said = "no prediction" if number == NONE else html.name(number, classes)
    return f'<div class="{"right" if right else "wrong"}">{"✓" if right else "✗"} {said}</div>'


def _channels(count: int) -> str:
    if count == 2:
        return "The two channels are shown as red and green."
    return f"Of the {count} channels the first three are shown, as red, green and blue." if count > 3 else ""


def _shown(image: torch.Tensor, words: str) -> str:
    return html.image(encoded(image), words)


def encoded(image: torch.Tensor) -> bytes:
    """An image (C, H, W) with values in [0, 1] as a PNG file: one channel as grey, else the first three as RGB."""
    codes = (
        (255 * image.detach().float().nan_to_num().clamp(0, 1)).round().byte().cpu().permute(1, 2, 0).numpy()[..., :3]
    )
    if codes.shape[2] == 2:
        codes = np.concatenate((codes, np.zeros_like(codes[..., :1])), 2)
    picture = require("PIL.Image").fromarray(np.ascontiguousarray(codes[..., 0] if codes.shape[2] == 1 else codes))
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
