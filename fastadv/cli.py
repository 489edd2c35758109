"""The command line: fastadv finetune | evaluate | info."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastadv
from fastadv import data, models
from fastadv.attacks import PRESETS, by_name
from fastadv.evaluation import evaluate
from fastadv.evaluation.robustness import ITERATES
from fastadv.training import Trainer
from fastadv.training.methods import METHODS
from fastadv.training.trainer import OPTIMIZERS


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv` (without the program's name; None means the process's own arguments).

    Raises:
        SystemExit: bad arguments, or a file, a package or a number that the command cannot work with.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ArithmeticError, ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"fastadv: error: {error}") from error


def budget(text: str) -> float:
    """A length in 1/255 units, "8" or "8/255", as a float in [0, 1].

    Raises:
        argparse.ArgumentTypeError: not such a number, or outside [0, 255].
    """
    number, slash, unit = text.partition("/")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 255 or (slash and unit.strip() != "255"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1/255, such as 8 or 8/255")
    return value / 255


def eps_budget(text: str) -> float:
    """As `budget`; below 0.5 it must be spelt out as a fraction of 255, because it is probably in [0, 1].

    Only --eps is read so strictly: a step or a noise of a fraction of 1/255 is nothing unusual.
    """
    value = budget(text)
    if "/" not in text and 0 < float(text) < 0.5:
        raise argparse.ArgumentTypeError(
            f"eps is in units of 1/255, and {text} of them is next to nothing; "
            f"{text} of the range [0, 1] is --eps {255 * float(text):.4g}. To mean it, write {text}/255"
        )
    return value


def class_list(text: str) -> list[int]:
    """Labels such as "5-9" or "0,3,5-7", as a list."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        return [label for end in ends for label in range(end[0], end[-1] + 1)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of labels, such as 5-9 or 0,3,5-7") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastadv", description="Fast adversarial training and fine-tuning.")
    commands = parser.add_subparsers(required=True, metavar="finetune | evaluate | info")
    _add_finetune(commands.add_parser("finetune", help="train a model adversarially"))
    _add_evaluate(commands.add_parser("evaluate", help="measure a model's clean and robust accuracy"))
    info = commands.add_parser("info", help="what runs on which device here, and why")
    info.set_defaults(run=_info)
    return parser


def _adder(parser: argparse.ArgumentParser) -> Callable:
    """`add(name, kind, default, **options)` for a parser whose help shows the defaults."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter

    def add(name: str, kind: Callable = str, default: object = None, **options) -> None:
        # A help text, if only a blank, is what makes argparse print the default.
        parser.add_argument(name, type=kind, default=default, **{"help": " ", **options})

    add("--data", required=True, help="digits, or an .npz file with x_train, y_train, x_test, y_test")
    add("--classes", class_list, help="labels to keep, such as 5-9 (all if not given)")
    add("--model", default="conv", help=f"{', '.join(models.MODELS)}, or your own as module:function")
    add("--head", help="name of the head module (the last nn.Linear if not given)")
    add("--seed", int, 0)
    add("--device", torch.device, "cuda" if torch.cuda.is_available() else "cpu")
    return add


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_finetune)
    add = _adder(parser)
    add("--init", help="safetensors file to start from; a head for other classes is replaced")
    add("--method", default="full", choices=METHODS)
    add("--attack", default="fgsm", choices=(*PRESETS, "none"))
    add("--eps", eps_budget, "8", help="budget in units of 1/255: 8 or 8/255")
    add("--alpha", budget, help="step of the attack in units of 1/255 (the attack's own if not given)")
    add("--noise", budget, help="random start of fgsm-rs and nfgsm, in units of 1/255 (theirs if not given)")
    add("--steps", int, help="steps of pgd (7 if not given)")
    add("--epochs", int, 20)
    add("--batch-size", int, 64)
    add("--lr", float, 1e-3, help="peak learning rate")
    add("--optimizer", default="adamw", choices=tuple(OPTIMIZERS))
    add("--warmup", int, 0, help="steps of linear warm-up")
    add("--eval-every", int, 1, help="epochs between evaluations; 0: at the end only")
    add("--out", Path, required=True, help="folder for model.safetensors and log.jsonl")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_evaluate)
    add = _adder(parser)
    add("--init", required=True, help="safetensors file with the weights")
    add("--attacks", default="fgsm,pgd-20,pgd-50-10", help=f"some of {', '.join(PRESETS)}")
    add("--eps", eps_budget, [8 / 255], nargs="+", help="budgets in units of 1/255: 4 8 or 8/255")
    add("--iterate", default="any", choices=ITERATES, help="which iterates are judged, start included; any is stronger")
    add("--limit", int, help="test images to evaluate, from the first (all if not given)")
    add("--slots", int, 128, help="images under attack at a time")
    parser.add_argument(
        "--save-images", action="store_true", help="write adversarial images to the folder images in --out"
    )
    add(
        "--out",
        Path,
        required=True,
        help="folder for report.json; a run that was cut is continued from its state there",
    )


def _finetune(arguments: argparse.Namespace) -> None:
    weights = arguments.out / "model.safetensors"
    if weights.exists():
        raise FileExistsError(f"{weights} exists; choose another --out")
    dataset = data.load(arguments.data, classes=arguments.classes)
    model = _model(arguments, dataset).to(arguments.device)
    attack = None
    if arguments.attack != "none":
        changes = {name: getattr(arguments, name) for name in ("alpha", "noise", "steps")}
        attack = by_name(arguments.attack, model, arguments.eps, **changes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = ["method", "head", "epochs", "batch_size", "lr", "optimizer"]
    options += ["warmup", "eval_every", "seed", "device"]
    settings = {name: getattr(arguments, name) for name in options}
    trainer = Trainer(model, arguments.eps, attack=attack, log=arguments.out / "log.jsonl", **settings)
    final = trainer.fit(dataset.train, dataset.test)[-1]
    models.save(model, weights, classes=dataset.classes)
    print(f"clean accuracy  {final['clean_accuracy']:.1%}")
    print(f"PGD-10 accuracy {final['robust_accuracy']:.1%} at eps {255 * arguments.eps:g}/255")
    print(f"saved {weights} ({final['train_s']:.1f} s of training)")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    dataset = data.load(arguments.data, classes=arguments.classes)
    model = _model(arguments, dataset, whole=True).to(arguments.device)
    images, labels = (part[: arguments.limit] for part in dataset.test)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = evaluate(
        model,
        (images, labels),
        arguments.attacks.split(","),
        eps=arguments.eps,
        iterate=arguments.iterate,
        slots=arguments.slots,
        seed=arguments.seed,
        state=arguments.out / "state.safetensors",
        save_images=arguments.out / "images" if arguments.save_images else None,
    )
    (arguments.out / "report.json").write_text(json.dumps(report) + "\n")
    print(f"clean accuracy {report['clean_accuracy']:.1%} of {len(labels)} images")
    print(f"{'attack':12}{'eps':>8}{'robust':>9}{'passes':>12}{'seconds':>10}")
    for result in report["attacks"]:
        accuracy, eps = result["robust_accuracy"], f"{255 * result['eps']:g}/255"
        print(f"{result['attack']:12}{eps:>8}{accuracy:9.1%}{result['passes']:12,}{result['seconds']:10.1f}")
    print(f"saved {arguments.out / 'report.json'}")


def _model(arguments: argparse.Namespace, dataset: data.Data, *, whole: bool = False) -> torch.nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # module:function may lie in the working folder, as with python -m
    torch.manual_seed(arguments.seed)
    model = models.build(arguments.model, dataset.shape, len(dataset.classes))
    if arguments.init:
        kept = models.load(model, arguments.init, classes=dataset.classes, head=arguments.head)
        if whole and not kept:
            raise ValueError(f"the head in {arguments.init} is for other classes: give the --classes it was trained on")
        print(f"loaded {arguments.init}, {'with its head' if kept else 'with a new head'}")
    return model


def _info(arguments: argparse.Namespace) -> None:
    for name, value in fastadv.info().items():
        print(f"{name}: {'' if isinstance(value, dict) else value}")
        for key, item in value.items() if isinstance(value, dict) else ():
            facts = item.items() if isinstance(item, dict) else ()
            print(f"  {key}: {', '.join(f'{k} {v}' for k, v in facts) if facts else item}")
