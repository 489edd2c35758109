"""Small models to be judged, and their images. Both come from this code and the files beside it, on every machine.

    python benchmarks/peers/judged.py --train

There are networks for 2 to 100 classes, which were trained robustly, with catastrophic overfitting, or on clean images;
networks that hide their gradient; and fastadv's own backbone, which needs CIFAR-10. --train trains the stored weights
again: then the verdicts in benchmarks/results/autoattack must be made again too.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, softmax

from fastadv import data, models, to_float
from fastadv.attacks.presets import create_attack
from fastadv.data.cifar10 import CLASSES

FOLDER = Path(__file__).resolve().parent / "models"
IMAGES = 500


@dataclass(frozen=True)
class Recipe:
    """How a model was trained, and the budget at which it is judged: there some of its images are robust, but not all.

    Attributes:
        classes: up to 10, the class is the digit modulo `classes`; 100 are the pairs of digits, side by side.
        attack: the preset that made its training images; None: they were clean.
        trained_at, eps: budgets of training and of judgement, in the images' units, [0, 1].
    """

    classes: int
    attack: str | None
    trained_at: float
    eps: float
    epochs: int


TRAINED = {
    "fgsm-rs": Recipe(10, "fgsm-rs", 0.25, 0.25, 40),
    "pgd": Recipe(10, "pgd", 0.25, 0.25, 40),
    # Catastrophic overfitting: at its training budget the robust accuracy is 67 % under FGSM, and 0 % under PGD-20.
    "collapsed": Recipe(10, "fgsm", 0.4, 0.06, 100),
    "clean": Recipe(10, None, 0.0, 0.12, 40),
    "two-classes": Recipe(2, "pgd", 0.15, 0.22, 40),
    "three-classes": Recipe(3, "fgsm-rs", 0.2, 0.23, 40),
    "six-classes": Recipe(6, "pgd", 0.2, 0.25, 40),
    "hundred-classes": Recipe(100, "fgsm-rs", 0.15, 0.15, 30),
}


def network(classes):
    """Three convolutions and a linear layer, for grey images of 8x8 or, side by side, 8x16."""
    places = 8 if classes == 100 else 4
    layers = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 48, 3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(48, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * places, classes)]
    return nn.Sequential(*layers)


# ------------------------------------------------------------------ images


def pairs(images, labels, count):
    """`count` pairs of digits, side by side; the class of the digits a and b is 10 a + b."""
    left, right = torch.randint(len(labels), (2, count), generator=torch.Generator().manual_seed(0))
    return torch.cat((images[left], images[right]), 3), 10 * labels[left] + labels[right]


def digits(classes):
    """(training images, labels), (test images, labels): float32 (N, 1, 8, 8 or 16)."""
    parts = data.load("digits", validation=0, test=0.3)
    (x_train, y_train), (x_test, y_test) = parts.train, parts.test
    if classes == 100:
        return pairs(x_train, y_train, 10_000), pairs(x_test, y_test, IMAGES)
    return (x_train, y_train % classes), (x_test[:IMAGES], y_test[:IMAGES] % classes)


def cifar10():
    """The first 512 test images of the backbone's classes, and their labels. The stored verdicts used a JPEG copy."""
    folder = os.environ.get("FASTADV_CIFAR10")
    if not folder:
        raise FileNotFoundError("the backbone is judged on CIFAR-10: set FASTADV_CIFAR10 to the folder that has it")
    images, labels = data.load("cifar10", folder=folder, classes=range(6), validation=0).test
    return to_float(images[:512]), labels[:512]


# ------------------------------------------------------------------ models that hide their gradient


class Quantised(nn.Module):
    """A model that rounds its input to five grey levels: its gradient is zero."""

    def forward(self, x):
        return torch.round(4 * x) / 4


class Randomised(nn.Module):
    """A model with new noise in every call."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Saturated(nn.Module):
    """A model that returns probabilities, which are 0 or 1 in float32: the gradient of the loss is zero."""

    def forward(self, logits):
        return softmax(1000 * logits, 1)


MASKING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quantised": lambda net: nn.Sequential(Quantised(), net),
    "randomised": lambda net: nn.Sequential(Randomised(), net),
    "saturated": lambda net: nn.Sequential(net, Saturated()),
}
MASKED = "pgd"  # the model that they are made of

NAMES = (*TRAINED, "backbone")


def built(name):
    """(model, eps) for one of NAMES or MASKING; the model is in eval mode, its parameters are frozen."""
    if name == "backbone":
        model, eps = models.source("robust-resnet").build(CLASSES[:6]).on_pixels, 8 / 255
        return model.eval().requires_grad_(False), eps
    with safe_open(FOLDER / f"{MASKED if name in MASKING else name}.safetensors", "pt") as file:
        recipe = Recipe(**json.loads(file.metadata()["recipe"]))
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (no mapping)
    model = network(recipe.classes)
    model.load_state_dict(weights)
    model = MASKING.get(name, lambda net: net)(model)
    return model.eval().requires_grad_(False), recipe.eps


def judged(name):
    """(model, images, labels, eps) of one of NAMES or MASKING.

    Raises:
        FileNotFoundError: "backbone", and FASTADV_CIFAR10 does not name the folder that has CIFAR-10.
    """
    model, eps = built(name)
    recipe = TRAINED.get(name, TRAINED[MASKED])
    images, labels = cifar10() if name == "backbone" else digits(recipe.classes)[1]
    return model, images, labels, eps


def digest(tensors):
    """A digest of the bytes of some tensors, in their order."""
    hashed = blake2b(digest_size=16)
    for tensor in tensors:
        hashed.update(tensor.contiguous().numpy())
    return hashed.hexdigest()


# ------------------------------------------------------------------ training


def train(recipe):
    """Train a network by a recipe: Adam, with a learning rate that falls to 0, on attacked images alone."""
    torch.manual_seed(0)
    images, labels = digits(recipe.classes)[0]
    model = network(recipe.classes)
    attack = create_attack(recipe.attack, model, recipe.trained_at) if recipe.attack else lambda images, labels: images
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    batches = -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, recipe.epochs * batches)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(labels)).split(64):
            x, y = images[index], labels[index]
            loss = cross_entropy(model(attack(x, y)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def store(name):
    """Train a model, and store it with its weights rounded to float16."""
    recipe = TRAINED[name]
    weights = {key: value.half() for key, value in train(recipe).state_dict().items()}
    FOLDER.mkdir(exist_ok=True)
    save_file(weights, FOLDER / f"{name}.safetensors", {"recipe": json.dumps(asdict(recipe))})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", action="store_true", required=True, help="train the stored weights again")
    parser.add_argument("--models", nargs="+", choices=TRAINED, default=TRAINED, help="only these models")
    for name in parser.parse_args().models:
        store(name)
        model, images, labels, _ = judged(name)
        print(f"{name}: {(model(images).argmax(1) == labels).float().mean():.1%} clean", flush=True)


if __name__ == "__main__":
    main()
