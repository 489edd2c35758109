"""PGD by several hands, all with the same start, step and number of steps."""

import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F

from fastadv.attacks import PGD

EPS, ALPHA = 8 / 255, 2 / 255


def backward_loop(model, images, labels, steps):
    """As written by hand, and by foolbox and ART at their core: `backward()` makes the weights' gradients too."""
    adv = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        F.cross_entropy(model(adv), labels).backward()
        adv = adv.detach() + ALPHA * adv.grad.sign()
        adv = (images + (adv - images).clamp(-EPS, EPS)).clamp(0, 1)
        model.zero_grad()
    return adv


def torchattacks_pgd(model, steps):
    """None where torchattacks is not installed."""
    if importlib.util.find_spec("torchattacks") is None:
        return None
    return importlib.import_module("torchattacks").PGD(model, eps=EPS, alpha=ALPHA, steps=steps)


def fast(model, steps, **options):
    return PGD(model, EPS, ALPHA, steps, **options)


def contenders(model, steps, device, quick):
    """name -> attack(images, labels)."""
    found = {
        "fastadv": fast(model, steps),
        "torchattacks": torchattacks_pgd(model, steps),
        "backward": functools.partial(backward_loop, model, steps=steps),
        "fastadv bf16": fast(model, steps, autocast=torch.bfloat16),
    }
    if not quick:
        found["fastadv compile"] = fast(model, steps, compile=True)
        found["fastadv bf16 compile"] = fast(model, steps, autocast=torch.bfloat16, compile=True)
    if device.type == "cuda":
        found["fastadv graph"] = fast(model, steps, graph=True)
        found["fastadv bf16 graph"] = fast(model, steps, autocast=torch.bfloat16, graph=True)
    return {name: attack for name, attack in found.items() if attack is not None}
