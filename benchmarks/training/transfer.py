"""Robust transfer: from one robust backbone, every method with every attack, over several seeds.

    python benchmarks/training/transfer.py --data cifar10 --classes 6-9 --epochs 20 --out results.json

Do fast attacks train as robust a model as PGD does, and in which part of the time? ("Are Fast Methods Stable in
Adversarially Robust Transfer Learning?", 2025.) All runs have the same images; the seed is that of the new head, of the
order and of the random starts. Weights are chosen on validation images under PGD-10 and judged on test images by it and
by PMA, at any iterate; the first so many of these also by AutoAttack, each attack on what those before it left. A run
that is finished is in the file, and is skipped the next time.
"""

import argparse
import itertools
import json
import shlex
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev

import torch

from fastadv import data
from fastadv.attacks import PRESETS, Ensemble, create_attack
from fastadv.commands.arguments import adder, class_list, eps_budget, model_source
from fastadv.evaluation import evaluate
from fastadv.files import write_atomically
from fastadv.training import Trainer

sys.path.append(str(Path(__file__).resolve().parent.parent))

import environment
import report

LEARNING_RATES = {"full": 1e-3, "linear": 1e-2, "bias": 3e-3, "lora": 1e-3}
ACCURACIES = ("clean_accuracy", "robust_accuracy", "pma_accuracy")
# What a file's rows must have in common, besides the learning rates.
SETTINGS = (
    *("model", "data", "classes", "eps", "epochs", "batch_size", "validation"),
    *("train_limit", "val_limit", "test_limit", "autoattack", "precision", "channels_last"),
)


def among(known):
    """A parser of comma-separated names, each one of `known`."""

    def parse(text):
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; there are {', '.join(known)}")
        return names

    return parse


def parser():
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = adder(made)
    add("--model", default="robust-resnet", help="the backbone, as for fastadv finetune")
    add("--data", required=True, help="as for fastadv finetune")
    add("--data-folder", Path, help="where cifar10 is")
    add("--classes", class_list, help="labels or names to keep, such as 6-9 (all if not given)")
    add("--methods", among(LEARNING_RATES), "linear,full")
    add("--attacks", among((*PRESETS, "none")), "fgsm,pgd")
    add("--seeds", int, 3, help="how many, from 0")
    add("--eps", eps_budget, "8", help="budget in units of 1/255")
    add("--epochs", int, 20)
    add("--batch-size", int, 128)
    for method, lr in LEARNING_RATES.items():
        add(f"--lr-{method}", float, lr, help="peak learning rate (AdamW)")
    add("--validation", float, 0.1, help="share of the training images to choose weights on")
    for part in ("train", "val", "test"):
        add(f"--{part}-limit", int, help="so many images, the first of an order that is always the same")
    add("--autoattack", int, 0, help="test images that AutoAttack judges, the first of the same order")
    add("--precision", help="of attack and update", choices=("no", "bf16"))
    made.add_argument("--channels-last", action="store_true", help="memory format of the model and the images")
    add("--device", torch.device, "cuda" if torch.cuda.is_available() else "cpu")
    add("--out", Path, required=True, help="the JSON file")
    return made


def limited(part, count):
    """The first `count` images, of a random order that is always the same."""
    images, labels = part
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return images[chosen], labels[chosen]


def settings_of(args):
    """What a file's rows have in common; times of different machines do not belong in one table."""
    facts = environment.facts()
    chosen = {name: getattr(args, name) for name in SETTINGS}
    rates = {method: getattr(args, f"lr_{method}") for method in LEARNING_RATES}
    device = facts["cpu"] if args.device.type == "cpu" else facts["device"]
    return {**chosen, "lr": rates, "device": device, "threads": facts["threads"]}


def finished(path, settings):
    """The rows that the file has.

    Raises:
        ValueError: they are of other settings.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    other = [name for name, value in settings.items() if found.get("settings", {}).get(name) != value]
    if other:
        raise ValueError(f"{path} has runs with another {' and '.join(other)}: choose another --out")
    return found["rows"]


def run(args, source, dataset, method, attack, seed):
    """Train and judge one model: its row."""
    torch.manual_seed(seed)  # the new head
    model = source.build(dataset.classes, dataset.shape)
    lr = getattr(args, f"lr_{method}")
    trainer = Trainer(
        model.on_pixels,
        args.eps,
        attack=None if attack == "none" else attack,
        device=args.device,
        measure_backbone=False,
        method=method,
        lr=lr,
        epochs=args.epochs,
        batch_size=args.batch_size,
        precision=args.precision,
        channels_last=args.channels_last,
        seed=seed,
    )
    train = limited(dataset.train, args.train_limit)
    test = limited(dataset.test, args.test_limit)
    records = trainer.fit(train, limited(dataset.val, args.val_limit), test)
    kept = ("clean_accuracy", "robust_accuracy", "pma_accuracy", "train_s", "best_epoch", "eval_attack")
    few = tuple(part[: args.autoattack] for part in test)
    return {
        "method": method,
        "attack": attack,
        "seed": seed,
        **{name: records[-1][name] for name in kept},
        "alarms": sum(record.get("alarm") is not None for record in records),
        "trainable": records[0]["trainable"],
        "judged": judged(model.on_pixels, few, args.eps, seed) if args.autoattack else None,
    }


def judged(model, test, eps, seed):
    """{"clean", then attack -> the share of the images that it and those before it leave}, and which fooled each."""
    graph = next(model.parameters()).is_cuda
    attacks = {title: [create_attack(title.lower(), model, eps, graph=graph)] for title in ("PGD-10", "PMA")}
    attacks["AutoAttack"] = [attack for _, attack in Ensemble(model, eps=eps, graph=graph).attacks()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is in the report
        report = evaluate(
            model,
            test,
            [attack for parts in attacks.values() for attack in parts],
            seed=seed,
            batch_size=256,
            progress=False,
        )
    verdicts = ["robust" if right else "misclassified" for right in report["clean_correct"]]
    found, results = {"clean": report["clean_accuracy"]}, iter(report["attacks"])
    for name, parts in attacks.items():
        for result in itertools.islice(results, len(parts)):
            verdicts = [name if fell else said for fell, said in zip(result["fooled"], verdicts, strict=True)]
        found[name] = verdicts.count("robust") / len(verdicts)
    return {"accuracy": found, "verdicts": verdicts, "warnings": report["warnings"]}


def mean_and_spread(values):
    """Mean and standard deviation; of a single value there is none."""
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None}


def judged_by(found):
    """Mean and spread under each attack, of the images that AutoAttack judged; None where there are none."""
    if not found:
        return None
    names = found[0]["accuracy"]
    accuracies = {name: mean_and_spread([each["accuracy"][name] for each in found]) for name in names}
    return {"images": len(found[0]["verdicts"]), "seeds": len(found), **accuracies}


def summary(rows):
    """A row for each method and attack: means and spreads over the seeds, and the time over FGSM's."""
    groups = {}
    for row in rows:
        groups.setdefault((row["method"], row["attack"]), []).append(row)
    seconds = {key: mean(row["train_s"] for row in group) for key, group in groups.items()}
    return [
        {
            "kind": "transfer",
            "method": method,
            "attack": attack,
            "seeds": len(group),
            "trainable": group[0]["trainable"],
            **{name: mean_and_spread([r[name] for r in group]) for name in ACCURACIES if all(name in r for r in group)},
            "judged": judged_by([r["judged"] for r in group if r.get("judged")]),
            "train_s": seconds[method, attack],
            "time_over_fgsm": seconds[method, attack] / seconds[method, "fgsm"] if (method, "fgsm") in groups else None,
            "alarms": sum(row["alarms"] for row in group),
        }
        for (method, attack), group in groups.items()
    ]


def save(path, settings, rows):
    result = {"part": "transfer", "command": shlex.join(sys.argv), "settings": settings, "rows": rows}
    result |= {"summary": summary(rows), "environment": environment.facts()}
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def main(argv=None):
    made = parser()
    args = made.parse_args(argv)
    settings = settings_of(args)
    try:
        rows = finished(args.out, settings)
        source = model_source(args.model, trust_code=False)
        dataset = data.load(
            args.data,
            preprocessing=source.preprocessing,
            classes=args.classes,
            validation=args.validation,
            folder=args.data_folder,
        )
    except (ImportError, OSError, ValueError) as error:
        made.error(str(error))
    done = {(row["method"], row["attack"], row["seed"]) for row in rows}
    wanted = [(m, a, seed) for seed in range(args.seeds) for m in args.methods for a in args.attacks]
    for method, attack, seed in wanted:
        if (method, attack, seed) in done:
            print(f"{method}, {attack}, seed {seed}: done already")
            continue
        rows.append(run(args, source, dataset, method, attack, seed))
        save(args.out, settings, rows)
        row = rows[-1]
        print(
            f"{method}, {attack}, seed {seed}: {row['clean_accuracy']:.1%} clean, {row['robust_accuracy']:.1%} under "
            f"PGD-10, {row['pma_accuracy']:.1%} under PMA, {row['judged'] and row['judged']['accuracy']}, "
            f"{row['train_s']:.1f} s",
            flush=True,
        )
    for title, header, table in report.tables(summary(rows)):
        print(f"\n{title[0].upper()}{title[1:]}:")
        print("\n".join(report.aligned(header, table)))


if __name__ == "__main__":
    main()
