"""A study's results as numbers: results.json and results.csv."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastadv.study.overfitting import DEFINITION
from fastadv.study.paper_table import PAPER
from fastadv.study.price import Price
from fastadv.study.reading import Study
from fastadv.study.results import Result
from fastadv.study.statistics import Difference

FORMAT = 1


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each finished cell: its names, its accuracies (shares in [0, 1]), its training, how it was made."""
    return [
        {
            **asdict(each.cell),
            **each.accuracies,
            "train_s": each.record["train_s"],
            "trained_with": each.attack,
            "epochs": each.settings["epochs"],
            "train_cpu_s": each.record.get("train_cpu_s"),
            "device": each.record["machine"]["device"],
            "alone": each.time_counts,
            "constant": each.constant,
            "commit": each.record.get("commit"),
        }
        for each in results
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The content of results.csv. A judge that did not judge a cell leaves an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def numbers(study: Study) -> dict[str, Any]:
    """The content of results.json. Differences are shares (with the attack minus with PGD), and epochs count from 0."""
    runs = [
        {**asdict(each.result.cell), "collapse": each.collapse, "partly": each.partly, "weak": each.weak}
        | {"how": each.how, "shows": each.shows, "detectors": each.seen}
        for each in study.courses
    ]
    return {
        "format": FORMAT,
        "answer": asdict(study.answer),
        "rows": rows(study.results),
        "differences": [_difference(each) for each in study.differences],
        "averages": [asdict(each) for each in study.averages],
        "paper": {f"{eps:g}": mean for eps, mean in PAPER.items()},
        "overfitting": {
            "definition": DEFINITION,
            "runs": runs,
            "detectors": [{**asdict(each), "lead": each.lead} for each in study.scores],
        },
        "times": [asdict(each) for each in study.times],
        "prices": [_price(each) for each in study.prices],
        "missing": {"cells": study.absent, "judges": study.unjudged, "problems": study.problems},
        "paper_table": study.paper_table,
        "attack_table": study.attack_table,
        "price_sentences": study.price_sentences,
        "price_summaries": [{**asdict(each.row), **asdict(each)} for each in study.summaries],
        "price_table": study.price_table,
    }


def _difference(each: Difference) -> dict[str, Any]:
    about = {"attack": each.attack, "judge": each.judge, "seeds": list(each.seeds), "images": each.verdicts.shape[1]}
    return {**asdict(each.row), **about, **_named(each, "mean", "low", "high", "reference", "robust", "unlike")}


def _price(each: Price) -> dict[str, Any]:
    found = _named(each, "attack", "standard", "against", "epochs", "seeds", "clean", "robust", "time", "predicted")
    to_fgsm = None if each.difference is None else _named(each.difference, "mean", "low", "high")
    return {**asdict(each.row), **found, "shared": json.loads(each.shared), "to_fgsm": to_fgsm}


def _named(of: object, *names: str) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}
