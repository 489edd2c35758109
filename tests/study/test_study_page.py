"""A study's page, tables and figures: with no results, with some and with all."""

import csv
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import studied
from PIL import Image
from studied import rng as rng

from fastadv.study.answer import TITLE
from fastadv.study.overfitting import failed
from fastadv.study.reading import read_study
from fastadv.study.words import points
from fastadv.study.writing import write_study

GRID = {
    "epochs": 5,
    "lr": 1e-3,
    "data": ["digits", "cifar10"],
    "methods": ["linear", "full"],
    "attacks": ["fgsm", "pgd"],
    "eps": [4, 8],
    "seeds": 2,
}
CELLS = [
    {"data": data, "method": method, "attack": attack, "eps": eps, "seed": seed}
    for data in ("digits", "cifar10")
    for method in ("linear", "full")
    for attack in ("fgsm", "pgd")
    for eps in (4.0, 8.0)
    for seed in range(2)
]


class Page(HTMLParser):
    """The words and attributes of a page, and its answer; every element must be closed."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.answer = [], [], [], []
        self.feed(text)
        assert self.open in ([], ["html"])

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.kind = dict(attrs).get("class") or ""

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.words.append(data.strip())
            if self.kind.startswith(("answer", "lead")):
                self.answer.append(data.strip())


def written(folder):
    write_study(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    # The page loads nothing: every address in it is the name of a namespace.
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<)]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:"))
    assert not re.search(r"@import|<script|<link|<iframe", text)
    return page, json.loads((folder / "results.json").read_text())


def study(folder, rng, cells=CELLS, collapsing=lambda cell: None):
    studied.write_grid(folder, GRID)
    for cell in cells:
        record = studied.record_of(rng, collapse=collapsing(cell), labels=cell["data"], **cell)
        studied.write(folder, record)


def test_nothing_is_not_measured_yet(tmp_path):
    studied.write_grid(tmp_path, GRID)
    page, numbers = written(tmp_path)
    assert page.words[:3] == [TITLE, TITLE, "Not measured yet."]
    assert any("0 of 32 cells are finished" in words for words in page.answer)
    assert numbers["answer"]["kind"] == "open"
    assert len(numbers["missing"]["cells"]) == 32
    assert numbers["rows"] == numbers["differences"] == []
    assert not (tmp_path / "figures").exists()
    assert len(read_study(tmp_path).paper_table.splitlines()) == 4  # only the paper's rows


def test_a_folder_without_a_grid_says_so(tmp_path, rng):
    studied.write(tmp_path, studied.record_of(rng))
    page, numbers = written(tmp_path)
    assert any("no study.yaml" in words for words in page.words)
    assert (numbers["answer"]["kind"], numbers["answer"]["headline"]) == ("open", "Not measured yet.")  # no PGD
    assert "The one run of transfer learning with FGSM (1 data set; full fine-tuning; eps 8) did not" in page.answer[1]
    studied.write(tmp_path, studied.record_of(rng, collapse=2))
    assert written(tmp_path)[0].answer[1].startswith("The one run of transfer learning with FGSM (")


def test_a_part_says_what_is_missing(tmp_path, rng):
    grid = {**GRID, "blocks": [{}, {"methods": "full", "seeds": 1, "judges": ["autoattack"]}]}
    study(tmp_path, rng, CELLS[:13])
    studied.write_grid(tmp_path, grid)
    failed = tmp_path / "cells" / next(iter(read_study(tmp_path).absent))
    failed.mkdir()
    (failed / "error.txt").write_text("Traceback\nMemoryError: <no room>\n")
    *_, warned = (tmp_path / "cells").glob("*/cell.json")
    record = json.loads(warned.read_text())
    warned.write_text(json.dumps(record | {"warnings": ["the model was trained on <3> of the test images"]}))
    damaged = next((tmp_path / "cells").glob("*/cell.json"))
    damaged.write_text("{")
    page, numbers = written(tmp_path)
    words = " ".join(page.words)
    assert "12 of 32 cells are finished; what is missing stands at the end." in page.answer
    assert "20 cells are not finished; 1 of them failed." in words
    assert "MemoryError: <no room>" in words
    assert f"{damaged} is damaged" in words
    assert "the model was trained on <3> of the test images" in page.words
    assert "AutoAttack in" in words
    assert numbers["answer"]["headline"] in ("So far, yes.", "Not measured yet.")


def test_all_of_it_stable(tmp_path, rng):
    study(tmp_path, rng)
    page, numbers = written(tmp_path)
    assert page.words[2] == "Yes, as far as this study goes."
    assert page.answer[1].startswith("None of the 16 runs of transfer learning with FGSM (2 data sets; ")
    assert "32 of 32 cells are finished." in page.answer
    assert "What is missing" not in page.words
    # The page has the numbers of the cells.
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "cells").glob("*/cell.json"))]
    rows = {tuple(row[name] for name in CELLS[0]): row for row in numbers["rows"]}
    table = {
        row["data"] + row["method"] + row["attack"] + row["eps"] + row["seed"]: row
        for row in csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    }
    assert len(rows) == len(table) == len(records) == 32
    for record in records:
        cell = record["cell"]
        row = rows[tuple(cell[name] for name in CELLS[0])]
        for judge, said in record["verdicts"].items():
            assert row[judge] == pytest.approx(said.count("1") / len(said))
            line = table["".join(str(cell[name]) for name in ("data", "method", "attack", "eps", "seed"))]
            assert float(line[judge]) == pytest.approx(row[judge])
    assert len(numbers["differences"]) == 2 * 2 * 2 * len(studied.JUDGES)
    # README's table has these numbers too.
    means = {}
    for each in numbers["averages"]:
        means[each["judge"], each["eps"], tuple(each["methods"])] = each
    table = read_study(tmp_path).paper_table
    assert table == numbers["paper_table"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    assert cells[2] == ["the paper, ImageNet backbones at 224 px", "4", "", "-0.39", "", "0.25"]
    assert cells[3] == ["the paper, ImageNet backbones at 224 px", "8", "", "-1.39", "", "0.25"]
    assert [row[:2] for row in cells[4:]] == [
        ["mean of linear and full, 2 seeds", "4"],
        ["mean of linear and full, 2 seeds", "8"],
        ["linear probing, 2 seeds", "8"],
        ["full fine-tuning, 2 seeds", "8"],
    ]
    for row, methods in zip(cells[4:], [("linear", "full")] * 2 + [("linear",), ("full",)], strict=True):
        of_pgd = [each for each in numbers["rows"] if (each["attack"], each["eps"]) == ("pgd", float(row[1]))]
        assert row[2] == f"{100 * np.mean([each['pma'] for each in of_pgd if each['method'] in methods]):.1f} %"
        for cell, judge in zip(row[3:5], ("pgd-10", "pma"), strict=True):
            each = means[judge, float(row[1]), methods]
            assert cell == f"{points(each['mean'])} ({points(each['low'])} to {points(each['high'])})"
        assert 0.28 < float(row[5]) < 0.31  # 17 s of 58 s


@pytest.mark.parametrize("every", [False, True])
def test_collapses_are_told_plainly(tmp_path, rng, every):
    def collapsing(cell):
        return 2 if cell["attack"] == "fgsm" and (every or (cell["method"], cell["eps"]) == ("full", 8.0)) else None

    study(tmp_path, rng, collapsing=collapsing)
    page, numbers = written(tmp_path)
    if every:
        assert page.words[2] == "No."
        assert page.answer[1].startswith("16 of the 16 runs of transfer learning with FGSM")
    else:
        assert page.words[2] == "Up to eps 4 none of 8 runs collapsed. At eps 8 4 of 8 did."
        assert page.answer[1].startswith("4 of the 16 runs of transfer learning with FGSM")
        assert page.answer[1].endswith("full fine-tuning with FGSM at eps 8 (4 of 4: cifar10 and digits).")
        assert page.answer[2] == "At eps 8 that is 4 of 8, at every other eps 0 of 8."
    runs = {(run["attack"], run["method"], run["eps"], run["collapse"]) for run in numbers["overfitting"]["runs"]}
    assert {run[:3] for run in runs if run[3] == 2} == {
        ("fgsm", method, eps)
        for method in ("linear", "full")
        for eps in (4.0, 8.0)
        if every or (method, eps) == ("full", 8)
    }
    assert {run[3] for run in runs if run[0] == "pgd"} == {None}


def test_a_run_that_overfitted_partly_is_named(tmp_path, rng):
    for attack in ("fgsm", "pgd"):
        record = studied.record_of(rng, attack=attack)
        if attack == "fgsm":
            record["records"][-2] |= {"robust_accuracy": 0.3, "probe_pgd": 0.5, "probe_attack": 0.8}
        studied.write(tmp_path, record)
    page, numbers = written(tmp_path)
    assert page.words[2] == "Not everywhere."
    assert page.answer[1].startswith("The one run of transfer learning with FGSM")
    where = "full fine-tuning with FGSM at eps 8 (1 of 1: eurosat)."
    assert page.answer[2] == f"1 run overfitted partly, losing more than 10 points: {where}"
    assert {run["attack"]: run["partly"] for run in numbers["overfitting"]["runs"]} == {"fgsm": 4, "pgd": None}


@pytest.mark.parametrize("why", ["no robust image", "one class"])
def test_where_pgd_is_not_robust_either_a_collapse_would_not_show(tmp_path, rng, why):
    """Such a run is no stable one: it is counted neither there nor among the sound runs of the detectors."""
    for seed, attack in itertools.product(range(3), ("fgsm", "pgd")):
        record = studied.record_of(rng, attack=attack, seed=seed, images=200)
        if (seed, attack, why) == (0, "pgd", "no robust image"):
            record["verdicts"]["pma"] = "1" * 9 + "0" * 191  # 4.5 %
        elif (seed, attack) == (0, "pgd"):
            record["records"][-1]["confusion"] = {"clean": [[0, 1, 3], [1, 1, 2]]}
        studied.write(tmp_path, record)
    page, numbers = written(tmp_path)
    assert page.answer[1].startswith("None of the 2 runs of transfer learning with FGSM (1 data set; full")
    assert page.answer[3].startswith("1 more run is not counted: PGD's model is not robust there either (PMA leaves")
    runs = numbers["overfitting"]["runs"]
    assert {(r["attack"], r["seed"]) for r in runs if not r["shows"]} == {("fgsm", 0), ("pgd", 0)}
    assert {each["sound"] for each in numbers["overfitting"]["detectors"]} == {2}
    courses = [each for each in read_study(tmp_path).courses if each.result.fast]
    assert (failed(courses), len(courses)) == ((0, 0, 0, 2), 3)  # what the map has


def test_runs_that_are_not_counted_are_told_for_each_eps(tmp_path, rng):
    for eps, attack in itertools.product((8.0, 16.0, 32.0), ("fgsm", "fgsm-rs", "pgd")):
        record = studied.record_of(rng, attack=attack, eps=eps)
        if eps > 8 and attack == "pgd":
            record["verdicts"]["pma"] = "0" * 64
        if (eps, attack) != (32.0, "fgsm-rs"):
            studied.write(tmp_path, record)
    (said,) = (words for words in written(tmp_path)[0].answer if "not counted" in words)
    assert said.startswith("3 more runs are not counted (2 at eps 16 and 1 at eps 32): PGD's model is not robust")


def test_a_collapse_from_its_own_best_shows_without_pgd(tmp_path, rng):
    fallen, not_robust = studied.record_of(rng, collapse=2), studied.record_of(rng, attack="pgd")
    not_robust["verdicts"]["pma"] = "0" * 64
    for record in (fallen, not_robust):
        studied.write(tmp_path, record)
    page, _ = written(tmp_path)
    assert page.answer[1].startswith("The one run of transfer learning with FGSM")
    assert page.answer[1].endswith("full fine-tuning with FGSM at eps 8 (1 of 1: eurosat).")


def test_what_did_not_run_where_others_collapsed_is_said(tmp_path, rng):
    cells = [("full", "fgsm", 8.0, 2), ("full", "fgsm", 4.0, None), ("full", "fgsm-rs", 4.0, None)]
    for method, attack, eps, collapse in [*cells, ("lora", "fgsm-rs", 4.0, None), ("full", "pgd", 8.0, None)]:
        studied.write(tmp_path, studied.record_of(rng, collapse, method=method, attack=attack, eps=eps))
    page, _ = written(tmp_path)
    assert page.answer[2] == "At eps 8 that is 1 of 1, at every other eps 0 of 3."
    assert page.answer[3] == "FGSM-RS and LoRA were not run at eps 8."


def test_the_best_detectors_are_named_with_their_times(tmp_path, rng):
    for seed in range(3):
        record = studied.record_of(rng, 3, seed=seed)
        for epoch in record["records"][1:-1]:
            epoch["alignment"] = 0.9 if epoch["epoch"] < 1 + seed else 0.1  # two, one and no epoch before
            epoch |= {"gap": 0.0, "alarm": None, "abnormal": 0.5 if seed == 0 else 0.0}  # never, and in one run
        studied.write(tmp_path, record)
        studied.write(tmp_path, studied.record_of(rng, attack="pgd", seed=seed))
    studied.write(tmp_path, studied.record_of(rng, seed=3))
    page, _ = written(tmp_path)
    (said,) = (words for words in page.answer if "detectors" in words)
    assert said == (
        "The detectors that saw most collapses, 3 of 3 (too few to rank detectors by), are “alignment” (in the median "
        "1 epoch before the collapse; false alarms in 0 of 1 sound run) and “PGD probe” (in the median in the epoch of "
        "the collapse; false alarms in 0 of 1 sound run)."
    )


def test_the_time_of_several_methods_is_not_that_of_some(tmp_path, rng):
    for method, attack in itertools.product(("linear", "full"), ("fgsm", "pgd")):
        record = studied.record_of(rng, method=method, attack=attack)
        if method == "linear":
            record["machine"] |= {"device": "a GPU", "sharing": 12}
        studied.write(tmp_path, record)
    lines = [line for line in read_study(tmp_path).paper_table.splitlines() if line.startswith("|")][4:]
    times = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines}
    full = times["full fine-tuning, 1 seed"]
    assert times == {
        "mean of linear and full, 1 seed": "",
        "linear probing, 1 seed": "",
        "full fine-tuning, 1 seed": full,
    }
    assert 0.28 < float(full) < 0.31


def test_the_table_says_of_how_many_seeds_a_judge_is(tmp_path, rng):
    accuracy = {}
    for seed, attack in itertools.product(range(3), ("fgsm", "pgd")):
        more = {"apgd": 0.5} if seed == 0 else {}
        record = studied.record_of(rng, judges=studied.JUDGES | more, attack=attack, seed=seed)
        accuracy[attack, seed] = record["verdicts"]["pma"].count("1") / 64
        studied.write(tmp_path, record)
    line = read_study(tmp_path).paper_table.splitlines()[4]
    what, *_, pma, apgd, _ = (cell.strip() for cell in line.strip("|").split("|"))
    assert what == "full fine-tuning"
    assert apgd.endswith(f"), 1 seed (PMA of these: {points(accuracy['fgsm', 0] - accuracy['pgd', 0])})")
    assert pma.endswith(")")


@pytest.mark.parametrize(
    ("fallen", "headline"),
    [
        ({32: 1}, "Up to eps 16 none of 4 runs collapsed. At eps 32 1 of 2 did."),
        ({16: 2, 32: 1}, "Up to eps 8 none of 2 runs collapsed. From eps 16 on 3 of 4 did."),
        ({8: 1, 32: 1}, "Not everywhere."),
    ],
)
def test_the_headline_says_up_to_which_eps_no_run_collapsed(tmp_path, rng, fallen, headline):
    for eps, seed in itertools.product((8, 16, 32), range(2)):
        collapse = 2 if seed < fallen.get(eps, 0) else None
        studied.write(tmp_path, studied.record_of(rng, eps=float(eps), seed=seed, collapse=collapse))
        studied.write(tmp_path, studied.record_of(rng, eps=float(eps), seed=seed, attack="pgd"))
    answer = read_study(tmp_path).answer
    assert (answer.kind, answer.headline) == ("mixed", headline)


def test_what_a_mean_hides_is_said(tmp_path, rng):
    """One data set where FGSM loses, one where it gains, and one where PGD's model is not robust."""
    images = 400
    for data, fgsm, pgd in (("a", 0.3, 0.5), ("b", 0.5, 0.4), ("c", 0.03, 0.04), ("d", 0.4, 0.4)):
        for attack, share in (("fgsm", fgsm), ("pgd", pgd)):
            record = studied.record_of(rng, attack=attack, data=data, labels=data, images=images)
            record["verdicts"]["pma"] = ("1" * round(images * share)).ljust(images, "0")
            studied.write(tmp_path, record)
    said = (
        "Of the pairs of a data set and a method, models trained with FGSM are below PGD's by more than the pair's own "
        "95 % interval in 1 of 4 at eps 8, and above them in 1. Where PGD's model is robust the mean difference is "
        f"{points((-0.2 + 0.1 + 0) / 3)} at eps 8 (3 pairs)."
    )
    study = read_study(tmp_path)
    assert said in study.answer.sentences


def test_the_mean_over_methods_is_of_those_with_the_most_seeds(tmp_path, rng):
    for method, seeds in (("linear", 2), ("full", 2), ("adapter", 1)):
        for seed, attack in itertools.product(range(seeds), ("fgsm", "pgd")):
            studied.write(tmp_path, studied.record_of(rng, method=method, attack=attack, seed=seed))
    names = [
        line.split("|")[1].strip() for line in read_study(tmp_path).paper_table.splitlines() if line.startswith("|")
    ]
    assert "mean of linear and full, 2 seeds" in names
    assert "adapters, 1 seed" in names


def test_pairs_from_two_devices_or_commits_are_told(tmp_path, rng):
    for attack, device, commit in (("fgsm", "cpu", "1234567"), ("pgd", "a GPU", "89abcde")):
        record = studied.record_of(rng, attack=attack) | {"commit": commit}
        record["machine"] |= {"device": device}
        studied.write(tmp_path, record)
    page, _ = written(tmp_path)
    (said,) = (words for words in page.answer if "differ in more than the training attack" in words)
    assert "device (cpu and a GPU)" in said
    assert "commit (1234567 and 89abcde)" in said


def test_from_scratch_is_no_transfer(tmp_path, rng):
    for seed in range(2):
        for attack in ("fgsm", "pgd"):
            cell = {"method": "scratch", "attack": attack, "seed": seed}
            studied.write(tmp_path, studied.record_of(rng, collapse=1 if attack == "fgsm" else None, **cell))
    page, numbers = written(tmp_path)
    assert numbers["answer"]["kind"] == "open"
    assert "From scratch, for comparison, 2 of 2 runs did, at eps 8." in page.answer
    assert "scratch" not in numbers["paper_table"]


def test_other_images_are_not_compared_and_that_is_said(tmp_path, rng):
    for attack in ("fgsm", "pgd"):
        studied.write(tmp_path, studied.record_of(rng, attack=attack, labels=attack))
    page, numbers = written(tmp_path)
    assert numbers["differences"] == []
    assert any("judged on different images" in words for words in page.words)


def test_the_table_says_fewer_data_sets_and_has_judges_that_one_method_alone_met(tmp_path, rng):
    for cell in CELLS:
        if (cell["data"], cell["eps"]) == ("cifar10", 4.0):
            continue
        more = {"apgd": 0.5} if cell["method"] == "full" and cell["eps"] == 4 else {}
        studied.write(tmp_path, studied.record_of(rng, judges=studied.JUDGES | more, labels=cell["data"], **cell))
    lines = read_study(tmp_path).paper_table.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][2:6] == ["PGD's under PMA", "PGD-10", "PMA", "APGD"]
    assert [(*row[:2], bool(row[5])) for row in rows[4:]] == [
        ("mean of linear and full, 1 of 2 data sets, 2 seeds", "4", False),
        ("mean of linear and full, 2 seeds", "8", False),
        ("linear probing, 2 seeds", "8", False),
        ("full fine-tuning, 1 of 2 data sets, 2 seeds", "4", True),
        ("full fine-tuning, 2 seeds", "8", False),
    ]


def test_the_table_has_ten_rows_and_says_of_which_data_sets_a_judge_is(tmp_path, rng):
    for data, method, eps in itertools.product(
        "ab", ("linear", "bias", "lora", "full"), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    ):
        if (data, eps) == ("b", 1.0):
            continue
        more = {"autoattack": 0.5} if (data, method) == ("a", "full") and eps in (8, 16) else {}
        for attack in ("fgsm", "pgd"):
            cell = {"data": data, "method": method, "eps": eps, "attack": attack}
            studied.write(tmp_path, studied.record_of(rng, judges=studied.JUDGES | more, labels=data, **cell))
    lines = [line for line in read_study(tmp_path).paper_table.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 10
    mean = "mean of linear, bias, lora and full, 1 seed"
    assert [tuple(row[:2]) for row in rows[2:]] == [
        *((mean, eps) for eps in ("4", "8", "16", "32")),
        *(("full fine-tuning, 1 seed", eps) for eps in ("4", "8", "16", "32")),
    ]
    assert [", 1 data set (PMA of these: " in row[5] for row in rows[2:]] == [False] * 5 + [True] * 2 + [False]
    assert not any("data set" in row[4] for row in rows)


def test_pairs_that_differ_in_more_than_the_attack_are_said_on_the_first_screen(tmp_path, rng):
    for attack, epochs in (("fgsm", 2), ("pgd", 5)):
        record = studied.record_of(rng, attack=attack)
        studied.write(tmp_path, record | {"settings": record["settings"] | {"epochs": epochs}})
    page, numbers = written(tmp_path)
    assert page.answer[-1].startswith("1 of 1 differences to PGD are of models that differ in more")
    assert page.answer[-1].endswith(": epochs (2 and 5) in 1.")
    assert {str(each["unlike"]) for each in numbers["differences"]} == {"{'epochs': '2 and 5'}"}


def test_models_that_predict_one_class_are_named_on_the_first_screen(tmp_path, rng):
    for attack, confusion in (("fgsm", [[0, 0, 3], [1, 1, 2]]), ("pgd", [[0, 1, 3], [1, 1, 2]])):
        record = studied.record_of(rng, attack=attack)
        record["records"][-1]["confusion"] = {"clean": confusion}
        studied.write(tmp_path, record)
    said = [words for words in written(tmp_path)[0].answer if "predict one class" in words]
    assert len(said) == 1
    assert said[0].startswith("1 of 2 models predict one class for all images")
    assert said[0].endswith("(eurosat-robust-resnet-full-pgd-eps8-seed0).")


def test_attacks_stand_side_by_side_for_the_method_that_has_most_of_them(tmp_path, rng):
    fallen = {("nfgsm", "digits"): 2}
    for data, method, attack in itertools.product(("digits", "cifar10"), ("linear", "full"), ("fgsm", "nfgsm", "pgd")):
        if (method, attack) != ("linear", "nfgsm"):
            chosen = {"data": data, "method": method, "attack": attack}
            collapse = fallen.get((attack, data)) if method == "full" else None
            studied.write(tmp_path, studied.record_of(rng, collapse=collapse, labels=data, **chosen))
    page, numbers = written(tmp_path)
    head, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in numbers["attack_table"].splitlines()
    )
    assert head == ["training attack", "time / PGD's", "eps 8: minus PGD's under PMA", "failed"]
    found = {line[0]: line for line in lines}
    assert found.keys() == {"FGSM", "N-FGSM"}
    assert (found["FGSM"][3], found["N-FGSM"][3]) == ("0 of 2", "1 of 2")
    for attack, words in (("fgsm", "FGSM"), ("nfgsm", "N-FGSM")):
        means = [each["mean"] for each in numbers["differences"] if differs(each, attack, "full", "pma")]
        assert found[words][2].startswith(f"{points(sum(means) / 2)} (")
        assert float(found[words][1]) == pytest.approx(studied.SECONDS[attack] / studied.SECONDS["pgd"], abs=0.02)
    assert "Fast attacks side by side" in page.words
    assert any(words.startswith("Full fine-tuning of robust-resnet.") for words in page.words)


def differs(each, attack, method, judge):
    return (each["attack"], each["method"], each["judge"]) == (attack, method, judge)


def test_any_name_is_shown_and_none_is_markup(tmp_path, rng):
    for attack in ("fgsm", "pgd"):
        name = {"data": "a<b>&\udcff\u05d0", "model": "x<script>"}
        studied.write(tmp_path, studied.record_of(rng, attack=attack, **name))
    page, numbers = written(tmp_path)
    assert "a<b>&\\xff\u05d0" in page.words
    assert numbers["rows"][0]["data"] == "a<b>&\udcff\u05d0"
    (row, _) = csv.DictReader((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines())
    assert row["data"] == "a<b>&\\udcff\u05d0"


def test_figures_are_there_as_vectors_and_as_pixels(tmp_path, rng):
    study(tmp_path, rng, CELLS[:16], lambda cell: 1 if cell["attack"] == "fgsm" and cell["eps"] == 8 else None)
    written(tmp_path)
    text = (tmp_path / "report.html").read_text()
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert names == {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {
        *(f"difference-0-fgsm-{judge}" for judge in ("pgd-10", "pma")),
        "map-0-fgsm",
        *(f"curves-0-fgsm-{method}" for method in ("linear", "full")),
    }
    for name in names:
        drawing = (tmp_path / "figures" / f"{name}.svg").read_text()
        assert ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
        assert drawing in text
        assert np.ptp(np.asarray(Image.open(tmp_path / "figures" / f"{name}.png"))) > 100
    first = text.index("<svg")
    assert text.index("judged by PMA", first) < text.index("failed runs", first) < text.index("<h2>")


def test_the_same_cells_give_the_same_files(tmp_path, rng):
    study(tmp_path, rng, CELLS[:8])
    write_study(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    write_study(tmp_path)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


def test_the_docs_have_every_entry_of_the_numbers(tmp_path, rng):
    studied.write(tmp_path, studied.record_of(rng, **CELLS[0]))
    studied.write_grid(tmp_path, GRID)
    write_study(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
    table = text.partition("`results.json` has the numbers")[2].partition("`cell.json` has")[0]
    entries = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for entry in entries for name in re.findall(r"`(\w+)`", entry)}
    assert named == json.loads((tmp_path / "results.json").read_text()).keys()
