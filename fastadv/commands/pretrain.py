"""fastadv pretrain: the small robust backbone that the package contains, from CIFAR-10 alone."""

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch

from fastadv import data, models
from fastadv.attacks import create_attack
from fastadv.commands.arguments import add_data, adder, check_folder, check_new, load_data
from fastadv.commands.speech import is_quiet, say
from fastadv.data.share import Samples
from fastadv.data.trained import TrainedOn
from fastadv.evaluation import evaluate
from fastadv.evaluation.robustness import check_counts
from fastadv.files import write_atomically
from fastadv.preprocessing import Preprocessing
from fastadv.team import Team
from fastadv.training import Trainer
from fastadv.training.passes import Passes
from fastadv.training.processes import one_run, processes, team_of
from fastadv.training.progress import Record
from fastadv.training.settings import Settings

FORMAT = 1  # of the card
EPS = 8 / 255
NETWORK = "resnet?widths=[64,96,176]&blocks=2"
RECIPE: dict[str, Any] = {
    "attack": "fgsm-rs",
    "optimizer": "sgd",
    "lr": 0.2,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "batch_size": 125,  # divides the 30,000 images: one compilation
    "ema_decay": 0.998,
    "augment": True,
    "precision": "bf16",
    "compile": True,
    "channels_last": True,
    "eval_every": 0,
}
WARMUP = 0.15  # of all steps


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    add = adder(parser)
    add_data(parser, add, default="cifar10", classes="0-5")
    add("--epochs", int, 30, help="passes over the training images")
    add("--limit", int, 1000, help="test images for PGD-50-10, from the first")
    add("--out", Path, required=True, help="folder for robust-resnet.safetensors, its card and the state")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out, if there is one")


def run(arguments: argparse.Namespace) -> None:
    check_counts(limit=arguments.limit)
    Settings(epochs=arguments.epochs, seed=arguments.seed)  # refuses wrong ones before anything is read
    team = team_of(processes())
    team.from_first(lambda: check_folder(arguments.out))
    with one_run(arguments.out, team):
        _run(arguments, team)


def _run(arguments: argparse.Namespace, team: Team) -> None:
    team.from_first(lambda: check_new(arguments.out / "robust-resnet.safetensors", arguments.resume))
    dataset = team.by_all(lambda: load_data(arguments, None, validation=0))
    torch.manual_seed(arguments.seed)
    model = models.source(NETWORK).build(dataset.classes, dataset.shape)
    steps = -(-len(dataset.y_train) // RECIPE["batch_size"])
    trainer = Trainer(
        model.on_pixels,
        EPS,
        folder=arguments.out,
        resume=arguments.resume,
        device=arguments.device,
        epochs=arguments.epochs,
        warmup=int(WARMUP * arguments.epochs * steps),
        seed=arguments.seed,
        progress=not is_quiet(),
        **RECIPE,
    )
    records = trainer.fit(dataset.train)
    team.from_first(lambda: _finish(arguments, model, dataset, records))


def _finish(arguments: argparse.Namespace, model: models.Model, dataset: data.Data, records: list[Record]) -> None:
    channels, height, width = dataset.shape
    model.preprocessing = Preprocessing((height, width), channels)
    model.trained_on = (TrainedOn.of(dataset),)
    weights = arguments.out / "robust-resnet.safetensors"
    models.save(model, weights, dtype=torch.float16)
    card = measure(models.load(weights), dataset, arguments) | {"train_s": records[-1]["train_s"]}
    write_atomically(arguments.out / "robust-resnet.json", (json.dumps(card, indent=1) + "\n").encode())
    say(f"clean accuracy {card['clean_accuracy']:.1%}, PGD-50-10 {card['robust_accuracy']:.1%}; saved {weights}")


def measure(model: models.Model, dataset: data.Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """The card of the weights: what they are, how they were made, how good they are."""
    whither: dict[str, Any] = {"device": arguments.device, "memory_format": torch.channels_last}
    pixels = model.on_pixels.to(**whither)
    passes = Passes(RECIPE["batch_size"], torch.bfloat16, torch.channels_last, RECIPE["compile"])
    attack = create_attack("pgd-50-10", pixels, EPS, **passes.attack)
    images, labels = cast(Samples, dataset.test)  # of one process, which has all images
    images, labels = images[: arguments.limit], labels[: arguments.limit]
    state = arguments.out / "evaluation.safetensors"
    report = evaluate(
        pixels, (images, labels), [attack], eps=EPS, state=state, progress=not is_quiet(), **passes.evaluation
    )
    return {
        "format": FORMAT,
        "data": f"CIFAR-10, training images of {', '.join(dataset.classes)} ({len(dataset.y_train):,})",
        "command": f"fastadv pretrain --data cifar10 --epochs {arguments.epochs} --seed {arguments.seed}",
        "parameters": sum(p.numel() for p in pixels.parameters()),
        "eps": "8/255",
        "test_images": len(labels),
        "clean_accuracy": report["clean_accuracy"],
        "robust_accuracy": report["attacks"][0]["robust_accuracy"],
        "attack": report["attacks"][0]["settings"],
        "versions": report["versions"],
    }
