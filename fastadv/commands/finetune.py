"""fastadv finetune: a robust model of one's own classes."""

import argparse
import dataclasses
import functools
import platform
from pathlib import Path
from typing import Any

import torch

from fastadv import data, models
from fastadv._warnings import warn
from fastadv.attacks import PRESETS
from fastadv.commands.arguments import (
    Add,
    Kind,
    Renamed,
    add_data,
    add_trust,
    adder,
    check_folder,
    check_new,
    load_data,
    model_source,
    overlap,
)
from fastadv.commands.speech import is_quiet, say
from fastadv.commands.values import Listed, budget, eps_budget, names
from fastadv.data.share import Samples, Share
from fastadv.data.trained import TrainedOn
from fastadv.evaluation.report import write_report
from fastadv.models.checkpoints import Facts, check_storable, preprocessing_of, read_facts, trained_on_of
from fastadv.team import Team
from fastadv.training import Trainer
from fastadv.training.fast import FAST
from fastadv.training.processes import of_first, one_run, processes, team_of
from fastadv.training.progress import Record
from fastadv.training.settings import RENAMED, Settings, kind_of
from fastadv.version import __version__


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    add = adder(parser)
    add_data(parser, add)
    add("--validation", float, 0.1, help="share of the training images to choose weights on, where none are set apart")
    add("--model", default="robust-resnet", help=f"{', '.join(models.CHOICES)}, or a checkpoint.safetensors")
    add_trust(parser)
    add("--init", help="safetensors file with weights for the model; a head for other classes is replaced")
    add(
        "--attack",
        default="fgsm",
        choices=(*PRESETS, *FAST, "none"),
        help=f"{', '.join(FAST)} are training attacks, with a step of their own; stale: FGSM along the last epoch's "
        "signs; cached: linear probing on features of attacked images that are kept for some epochs",
    )
    add("--eps", eps_budget, "8", help="budget in units of 1/255: 8 or 8/255")
    _add_settings(add, parser)
    add("--out", Path, required=True, help="folder for model.safetensors, report.html, log.jsonl and the state")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out, if there is one")


def _add_settings(add: Add, parser: argparse.ArgumentParser) -> None:
    """Add every setting by its own name; lengths are in units of 1/255."""
    kinds: dict[str, Kind] = {"alpha": budget, "noise": budget, "lora_targets": names}
    old = {new: f"--{name.replace('_', '-')}" for name, new in RENAMED.items()}
    for field in dataclasses.fields(Settings):
        option, facts = "--" + field.name.replace("_", "-"), field.metadata
        if field.name == "seed":  # of the data too
            continue
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=facts["help"])
            continue
        kind = kinds.get(field.name, kind_of(field))
        choices = facts["limits"].get("choices")
        help = facts["help"].replace("on the scale [0, 1]", "in units of 1/255")
        add(option, kind, field.default, help=help, **({"action": Listed} if kind is names else {"choices": choices}))
        if field.name in old:
            parser.add_argument(old[field.name], dest=field.name, type=kind, choices=choices, action=Renamed)


def run(arguments: argparse.Namespace) -> None:
    Settings(**_settings(arguments))  # refuses wrong ones before pictures are decoded
    here = processes()
    team = team_of(here)
    team.from_first(lambda: check_folder(arguments.out))
    with one_run(arguments.out, team):
        _run(arguments, here.device, team)


def _run(arguments: argparse.Namespace, device: torch.device, team: Team) -> None:
    weights = arguments.out / "model.safetensors"
    team.from_first(lambda: check_new(weights, arguments.resume))
    source = functools.cache(lambda: model_source(arguments.model, arguments.trust_code))  # where it is asked for
    preprocessing = team.from_first(lambda: source().preprocessing)
    dataset = load_data(arguments, preprocessing, validation=arguments.validation, team=team)
    model = of_first(team, lambda: build(arguments, source(), dataset))
    overlap(model, dataset.digests["test"])
    model.trained_on += (TrainedOn.of(dataset),)
    records = train(arguments, model, dataset)
    images, labels = dataset.test
    test = (images.whole(device) if isinstance(images, Share) else images), labels
    team.from_first(lambda: _finish(arguments, weights, model, dataset, records, test))


def build(arguments: argparse.Namespace, source: models.ModelSource, dataset: data.Data) -> models.Model:
    """The model before training, with the weights of --init where it was given."""
    torch.manual_seed(arguments.seed)
    model = source.build(dataset.classes, dataset.shape)
    if arguments.init:
        kept = models.load_weights(model.network, arguments.init, classes=dataset.classes, head=arguments.head)
        say(f"loaded {arguments.init}, {'with its head' if kept else 'with a new head'}")
        facts = read_facts(arguments.init) or {}
        model.trained_on += trained_on_of(facts)
        _warn_of_input(arguments.init, model, facts)
    check_storable(model.network)
    return model


def _warn_of_input(path: str, model: models.Model, facts: Facts) -> None:
    """Warn where the weights of a file got their input in another way than the model."""
    theirs, ours = preprocessing_of(facts) if facts else None, model.preprocessing
    if theirs is not None and ours is not None and (theirs.mean, theirs.std) != (ours.mean, ours.std):
        warn(
            f"the weights of {path} were trained on pixels with mean {theirs.mean} and std {theirs.std}, and "
            f"this model subtracts {ours.mean} and divides by {ours.std}: take the file itself as --model"
        )


def _finish(
    arguments: argparse.Namespace,
    weights: Path,
    model: models.Model,
    dataset: data.Data,
    records: list[Record],
    test: Samples,
) -> None:
    models.save(model, weights)
    final, report = records[-1], arguments.out / "report.html"
    try:
        write_report(
            report,
            f"{arguments.model}, {arguments.method}, {arguments.attack}",
            model.on_pixels,
            records,
            test,
            dataset.classes,
            arguments.eps,
            _facts(arguments, dataset, final),
        )
    except Exception as error:  # all that the run is for is on the disk
        warn(f"there is no report.html: {type(error).__name__}: {error}")
        report = None
    # Last, because the reader of a pipe may have closed it: what is said ends the command then.
    _say_result(final, len(dataset.y_test), arguments.eps)
    say(f"saved {weights} ({final['train_s']:.1f} s of training)")
    if report is not None:
        say(f"saved {report}")


def _say_result(final: Record, count: int, eps: float) -> None:
    if "clean_accuracy" not in final:
        say("there were no test and no validation images: nothing was measured")
        return
    say(f"clean accuracy  {final['clean_accuracy']:.1%} on {count} test images")
    say(f"robust accuracy {final['robust_accuracy']:.1%} under PGD-10 at eps {255 * eps:g}/255")
    say(f"                {final['pma_accuracy']:.1%} under PGD-10 and PMA together: report this")


def _facts(arguments: argparse.Namespace, dataset: data.Data, final: Record) -> dict[str, dict[str, Any]]:
    parts = {"training": dataset.y_train, "validation": dataset.y_val, "test": dataset.y_test}
    unset = {"run", "verbosity", "command_line", "classes"}  # the classes are the data's, by their names
    settings = {name: value for name, value in vars(arguments).items() if name not in unset and value is not None}
    best = final["best_epoch"]
    return {
        "Data": {
            "classes": ", ".join(dataset.classes),
            **{f"{part} images": len(labels) for part, labels in parts.items()},
            **({"notes": "\n".join(dataset.notes)} if dataset.notes else {}),
        },
        "Run": {
            "command": arguments.command_line,
            "weights of epoch": f"{final['epochs']}, the last one" if best is None else best + 1,
            "epochs": final["epochs"],
            "seconds of training": round(final["train_s"], 1),
        },
        "Settings (eps, alpha and noise on the scale [0, 1])": settings,
        "Versions": {
            "fastadv": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
        },
    }


def train(arguments: argparse.Namespace, model: models.Model, dataset: data.Data) -> list[Record]:
    """Train the model in place; return the records of `Trainer.fit`."""
    trainer = Trainer(
        model.on_pixels,
        arguments.eps,
        attack=None if arguments.attack == "none" else arguments.attack,
        folder=arguments.out,
        resume=arguments.resume,
        measure_backbone=True if model.pretrained else None,
        device=arguments.device,
        progress=not is_quiet(),
        **_settings(arguments),
    )
    records = trainer.fit(dataset.train, dataset.val, dataset.test)
    vars(arguments).update(dataclasses.asdict(trainer.settings))  # for the report: with the numbers of the method
    return records


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
