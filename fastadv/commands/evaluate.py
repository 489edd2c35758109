"""fastadv evaluate: a checkpoint's clean and robust accuracy."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastadv import data, models
from fastadv._warnings import warn
from fastadv.attacks import ENSEMBLES, PRESETS
from fastadv.commands.arguments import (
    TRAINED,
    Renamed,
    add_data,
    add_trust,
    adder,
    check_folder,
    check_outside,
    load_model,
    overlap,
)
from fastadv.commands.speech import is_quiet, say
from fastadv.commands.values import Listed, eps_budgets, names
from fastadv.data.judged import PARTS
from fastadv.data.parquet import Columns
from fastadv.data.splits import Split
from fastadv.data.trained import MOST_OVERLAP
from fastadv.evaluation import evaluate
from fastadv.evaluation.adversaries import adversaries
from fastadv.evaluation.report import write_curves
from fastadv.evaluation.robustness import ATTACKS, ITERATES, check_counts
from fastadv.files import write_atomically
from fastadv.study.images import NAMED

FORMAT = 1  # of report.json


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    add = adder(parser)
    add_data(parser, add, split_seed=None)
    add("--model", required=True, help=TRAINED)
    add_trust(parser)
    add(
        "--part",
        choices=PARTS,
        help="of the data: test (what the training split off, where the set has no test part) or all (not given: test, "
        "or all of a set that has no test part and that the model was not trained on)",
    )
    add("--attacks", names, ",".join(ATTACKS), action=Listed, help=f"some of {', '.join((*PRESETS, *ENSEMBLES))}")
    add(
        "--eps",
        eps_budgets,
        action=Listed,
        help="budgets in units of 1/255: 8, 8/255, or several, 4 8 or 4,8 (not given: 8, and 127.5, which is 0.5, for "
        "attacks in L2)",
    )
    parser.add_argument(
        "--independent", action="store_true", help="give each attack all images, not those that the ones before it left"
    )
    add("--iterate", default="any", choices=ITERATES, help="which iterates are judged, start included; any is stronger")
    add("--limit", int, help="so many test images, a sample that is always the same (all if not given)")
    parser.add_argument(
        "--allow-overlap", action="store_true", help="judge images of which more than 5 %% are training images too"
    )
    add("--batch-size", int, 128, help="images under attack at a time")
    parser.add_argument("--slots", dest="batch_size", type=int, action=Renamed)
    parser.add_argument(
        "--save-images", action="store_true", help="write adversarial images to the folder images in --out"
    )
    add("--out", Path, required=True, help="folder for report.json; a run that was cut goes on from its state there")


def run(arguments: argparse.Namespace) -> None:
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    check_counts(batch_size=arguments.batch_size)
    check_folder(arguments.out)
    if arguments.save_images and arguments.data not in NAMED:
        check_outside(arguments.out, Path(arguments.data))
    model = load_model(arguments.model, arguments.trust_code)
    adversaries(model.on_pixels, arguments.attacks, arguments.eps)  # refuses wrong ones before pictures are decoded
    split = model.trained_on[-1].split if model.trained_on else Split()
    chosen = data.held_out(
        arguments.data,
        model.classes,
        trained_on=model.trained_on,
        part=arguments.part,
        split=None if arguments.split_seed is None else replace(split, seed=arguments.split_seed),
        classes=arguments.classes,
        limit=arguments.limit,
        codes=model.preprocessing is not None,
        folder=arguments.data_folder,
        columns=Columns(arguments.image_column, arguments.label_column),
    )
    for note in chosen.notes:
        say(note)
    trained_on = _checked_overlap(model, chosen.part.digests, split, arguments.allow_overlap)
    images, labels = chosen.decoded(model.preprocessing, arguments.skip_corrupt, arguments.workers)
    model.check_shape(images.shape[1:])
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = evaluate(
        model.on_pixels.to(arguments.device),
        (images, labels),
        arguments.attacks,
        eps=arguments.eps,
        ensemble=not arguments.independent,
        iterate=arguments.iterate,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        state=arguments.out / "state.safetensors",
        save_images=arguments.out / "images" if arguments.save_images else None,
        progress=not is_quiet(),
    )
    facts = {"format": FORMAT, **report, "trained_on": trained_on}
    write_atomically(arguments.out / "report.json", (json.dumps(facts) + "\n").encode())
    print(f"clean accuracy {report['clean_accuracy']:.1%} of {len(labels)} images")
    _print_attacks(report["attacks"])
    for budget in report["budgets"]:
        under = ", ".join(budget["attacks"])
        print(f"robust accuracy {budget['robust_accuracy']:.1%} at eps {_budget(budget)}, under {under}")
    say(f"saved {arguments.out / 'report.json'}")
    if report["curves"]:
        _draw(arguments.out / "curve.png", report["curves"])
    else:
        (arguments.out / "curve.png").unlink(missing_ok=True)  # of an earlier evaluation


def _draw(path: Path, curves: list[dict[str, Any]]) -> None:
    try:
        write_curves(path, curves)
    except Exception as error:  # the numbers are on the disk
        warn(f"there is no {path.name}: {type(error).__name__}: {error}")
    else:
        say(f"saved {path}")


def _budget(result: dict[str, Any]) -> str:
    return f"{255 * result['eps']:g}/255" if result["norm"] == "Linf" else f"{result['eps']:g} {result['norm']}"


def _print_attacks(results: list[dict[str, Any]]) -> None:
    """Print a row for each attack: its robust accuracy, its passes, the images that it attacked, its runs, the run and
    the step that fooled the last image, and its seconds."""
    heads = f"{'attack':12}{'eps':>9}{'robust':>9}{'passes':>12}{'attacked':>10}"
    print(f"{heads}{'runs x steps':>15}{'last fooled':>14}{'s':>8}")
    for result in results:
        eps, latest, settings = _budget(result), result["latest"], result["settings"]
        runs = f"{result['runs']} x {settings.get('steps', settings.get('n_queries', 1))}"
        fell = f"run {latest['restart'] + 1}, {latest['step']}" if latest else "-"
        print(
            f"{result['attack']:12}{eps:>9}{result['robust_accuracy']:9.1%}{result['passes']:12,}{result['given']:10,}"
            f"{runs:>15}{fell:>14}{result['seconds']:8.1f}"
        )


def _checked_overlap(model: models.Model, digests: torch.Tensor, split: Split, allowed: bool) -> int | None:
    """How many of the images the model was trained on; None where its file does not say.

    Raises:
        ValueError: more than MOST_OVERLAP of them.
    """
    count = overlap(model, digests)
    if count is None:
        say("the model's file does not say which images it was trained on: see to it that these are others")
    elif count > MOST_OVERLAP * len(digests) and not allowed:
        raise ValueError(
            f"the model was trained on {count} of the {len(digests)} images that are to judge it, which says nothing "
            f"about new ones: give others (--part test --split-seed {split.seed} keeps some of the set that it was "
            "trained on), or --allow-overlap"
        )
    return count
