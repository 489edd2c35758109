"""PGD by fastadv, by hand and by other libraries, with the same start, step and number of steps."""

import functools
import importlib

import torch
import torch.nn.functional as F

from fastadv.attacks import PGD


def installed(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


torchattacks, foolbox, art = map(installed, ("torchattacks", "foolbox", "art.estimators.classification"))
if art:
    ART_PGD = importlib.import_module("art.attacks.evasion").ProjectedGradientDescentPyTorch

EPS, ALPHA = 8 / 255, 2 / 255


def backward_loop(model, images, labels, steps):
    """PGD by hand, and as foolbox and ART do it: `backward()` also computes the gradients of the weights."""
    adv = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        F.cross_entropy(model(adv), labels).backward()
        adv = adv.detach() + ALPHA * adv.grad.sign()
        adv = (images + (adv - images).clamp(-EPS, EPS)).clamp(0, 1)
        model.zero_grad()
    return adv


def torchattacks_pgd(model, steps):
    return torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps)


def foolbox_pgd(model, steps):
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=steps, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    return lambda images, labels: attack(wrapped, images, labels, epsilons=EPS)[1]


def art_pgd(model, steps):
    """ART takes and returns NumPy arrays; the copies from and to the device are part of its time."""
    device = next(model.parameters()).device.type
    kind = "gpu" if device == "cuda" else "cpu"
    wrapped = art.PyTorchClassifier(model, F.cross_entropy, (3, 32, 32), 10, clip_values=(0, 1), device_type=kind)
    options = {"eps": EPS, "eps_step": ALPHA, "max_iter": steps, "num_random_init": 1, "verbose": False}

    def attack(images, labels):
        made = ART_PGD(wrapped, batch_size=len(images), **options)
        return torch.from_numpy(made.generate(images.cpu().numpy(), labels.cpu().numpy())).to(images.device)

    return attack


def autocast(attack, device):
    """Another library's attack in bfloat16, as its user would write it."""

    def run(images, labels):
        with torch.autocast(device.type, torch.bfloat16):
            return attack(images, labels)

    return run


def fast(model, steps, **options):
    return PGD(model, EPS, ALPHA, steps, **options)


def peers(model, steps, device):
    """{name: attack} of the libraries that are installed."""
    found = {}
    if torchattacks:
        found["torchattacks"] = torchattacks_pgd(model, steps)
        if device.type == "cuda":
            found["torchattacks bf16"] = autocast(found["torchattacks"], device)
    if foolbox:
        found["foolbox"] = foolbox_pgd(model, steps)
    if art:
        found["ART"] = art_pgd(model, steps)
    return found


def contenders(model, steps, device):
    """{name: a function from (images, labels) to adversarial images}."""
    found = {
        "fastadv": fast(model, steps),
        **peers(model, steps, device),
        "backward": functools.partial(backward_loop, model, steps=steps),
        "fastadv bf16": fast(model, steps, autocast=torch.bfloat16),
    }
    if device.type == "cuda":
        found["fastadv graph"] = fast(model, steps, graph=True)
        found["fastadv bf16 graph"] = fast(model, steps, autocast=torch.bfloat16, graph=True)
    return found


def compiled(model, steps, device):
    """The attacks under torch.compile, which takes longer than all other rounds; ours also without it."""
    found = {
        "fastadv": fast(model, steps),
        "fastadv compile": fast(model, steps, compile=True),
        "fastadv bf16 compile": fast(model, steps, autocast=torch.bfloat16, compile=True),
        "backward compile": functools.partial(backward_loop, torch.compile(model), steps=steps),
    }
    if torchattacks:
        found["torchattacks"] = torchattacks_pgd(model, steps)
        found["torchattacks compile"] = torchattacks_pgd(torch.compile(model), steps)
    if device.type == "cuda":
        found["fastadv bf16 graph"] = fast(model, steps, autocast=torch.bfloat16, graph=True)
        found["fastadv bf16 compile graph"] = fast(model, steps, autocast=torch.bfloat16, compile=True, graph=True)
    return found
