"""How strong the attacks are on real images: the robust accuracy under each attack, and its time.

First our attacks beside torchattacks' with as many steps and restarts; then our attack with each of the options that
make it faster, beside the attack without options.

    python benchmarks/attacks/strength.py CIFAR10_FOLDER --out strength.json

CIFAR10_FOLDER is a folder that `fastadv.data.load("cifar10", folder=...)` reads. A small network is trained
adversarially first (FGSM-RS, a minute or two on a CPU), then attacked on the first test images. All of it runs on the
GPU if there is one.
"""

import argparse
import copy
import functools
import json
import time
from pathlib import Path

import contenders
import environment
import networks
import real_images
import torch
import torchattacks
from cases import DEVICE

from fastadv.attacks import PGD
from fastadv.training import Trainer

EPS, ALPHA = contenders.EPS, contenders.ALPHA
BATCH = 250


def timed(call):
    start = time.perf_counter()
    result = call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def accuracy(model, attack, images, labels):
    """The share of images that are classified correctly after the attack: its last iterate, or the best restart's."""
    right = 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        adv = attack(x, y)
        with torch.no_grad():
            right += int((model(adv).argmax(1) == y).sum())
    return right / len(labels)


def compare(model, images, labels, steps, restarts):
    ours = PGD(model, EPS, ALPHA, steps, restarts=restarts)
    one = [torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps) for _ in range(restarts)]
    theirs = one[0] if restarts == 1 else torchattacks.MultiAttack(one)
    row = {"attack": f"PGD-{steps}" + (f"-{restarts}" if restarts > 1 else "")}
    for name, attack in (("fastadv", ours), ("torchattacks", theirs)):
        row[name], row[f"{name}_s"] = timed(lambda attack=attack: accuracy(model, attack, images, labels))
    return row


def variants(model, images, labels, steps):
    """The same attack from the same starts with each of the faster options; the float32 model judges the results."""
    options = {
        "as it is": {},
        "bf16": {"autocast": torch.bfloat16},
        "compile": {"compile": True},
        "bf16 compile": {"autocast": torch.bfloat16, "compile": True},
        "channels last": {"memory_format": torch.channels_last},
    }
    if DEVICE.type == "cuda":
        options["graph"] = {"graph": True}
    for name, chosen in options.items():
        made = copy.deepcopy(model).to(memory_format=chosen.get("memory_format", torch.contiguous_format))
        attack = functools.partial(PGD(made, EPS, ALPHA, steps, **chosen), seed=0)
        attack(images[:BATCH], labels[:BATCH])  # compiles, if the options say so
        left, seconds = timed(lambda attack=attack: accuracy(model, attack, images, labels))
        yield {"attack": f"PGD-{steps}", "options": name, "fastadv": left, "fastadv_s": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--test", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    parts = real_images.cifar10(args.cifar10, args.train, args.test)
    train, test = ([t.to(DEVICE) for t in part] for part in parts)
    torch.manual_seed(0)
    model = networks.strided().to(DEVICE)
    settings = {"attack": "fgsm-rs", "epochs": args.epochs, "batch_size": 64, "lr": 1e-3, "warmup": 100}
    records, seconds = timed(lambda: Trainer(model, EPS, **settings).fit(train, test))
    model.eval()
    images, labels = test[0].float() / 255, test[1]
    with torch.no_grad():
        clean = float((model(images).argmax(1) == labels).float().mean())
    rows = []
    for steps, restarts in ((10, 1), (20, 1), (50, 1), (10, 5)):
        rows.append(compare(model, images, labels, steps, restarts))
        print(rows[-1], flush=True)
    faster = []
    for row in variants(model, images, labels, 20):
        faster.append(row)
        print(row, flush=True)
    training = {**settings, "images": len(train[1]), "seconds": seconds, "final": records[-1]}
    result = {"part": "strength", "training": training, "clean": clean, "attacks": rows, "faster": faster}
    args.out.write_text(json.dumps({**result, "environment": environment.facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
