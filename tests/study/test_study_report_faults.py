"""Sentences of a study's report that must not say more than was measured."""

import csv
import itertools

import pytest
import studied
from studied import rng as rng

from fastadv.study.answer import NOT_MEASURED
from fastadv.study.reading import read_study
from fastadv.study.results import Result, result_of
from fastadv.study.statistics import average, compare
from fastadv.study.writing import write_study


def pair(folder, rng, pma=None, confusion=None, **chosen):
    """Write cells trained with FGSM and PGD; of `pma` images in 200 each model is right under PMA."""
    for attack in ("fgsm", "pgd"):
        record = studied.record_of(rng, attack=attack, images=200, **chosen)
        if pma is not None:
            record["verdicts"]["pma"] = "1" * pma + "0" * (200 - pma)
        if confusion:
            record["records"][-1]["confusion"] = {"clean": confusion}
        studied.write(folder, record)


def said(folder, start):
    return [words for words in read_study(folder).answer.sentences if start in words]


def test_a_run_without_pgd_that_is_not_robust_is_not_stable(tmp_path, rng):
    for seed in range(2):
        record = studied.record_of(rng, seed=seed)
        record["verdicts"]["pma"] = "0" * 64
        studied.write(tmp_path, record)
    answer = read_study(tmp_path).answer
    assert (answer.kind, answer.headline) == ("open", NOT_MEASURED)
    assert said(tmp_path, "2 more runs are not counted: no run with PGD from the same seed is beside them")


def test_a_pgd_that_only_guesses_is_no_measure_of_stability(tmp_path, rng):
    pair(tmp_path, rng, pma=91, confusion=[[0, 0, 9], [0, 1, 1], [1, 0, 8], [1, 1, 2]])  # 45.5 % of two classes
    answer = read_study(tmp_path).answer
    assert (answer.kind, answer.headline) == ("open", NOT_MEASURED)
    assert said(tmp_path, "Whether they are stable stays open")


def test_all_by_which_two_cells_were_made_is_compared(rng):
    one, other = studied.record_of(rng), studied.record_of(rng, attack="pgd")
    other["machine"] |= {"cpu": "b CPU", "threads": 2, "torch": "1", "python": "4", "before": [{"device": "a GPU"}]}
    differences, _ = compare(map(result_of, (one, other)))
    assert differences[0].unlike.keys() == {"device", "cpu", "threads", "fastadv", "torch", "python"}
    assert differences[0].unlike["device"] == "cpu and a GPU, then cpu"


def test_prices_of_cells_that_were_made_otherwise_are_told(tmp_path, rng):
    for attack, torch in (("none", "2"), ("fgsm", "1"), ("nfgsm", "2")):
        record = studied.record_of(rng, attack=attack)
        record["machine"] |= {"torch": torch}
        studied.write(tmp_path, record)
    write_study(tmp_path)
    assert "1 of 1 differences to FGSM, of which prices are, are of models that differ" in (
        tmp_path / "report.html"
    ).read_text(encoding="utf-8")


def test_methods_that_were_judged_on_other_images_have_no_mean(rng):
    records = [
        studied.record_of(rng, attack=attack, method=method, data=data, labels=data + (method if data == "a" else ""))
        for attack, method, data in itertools.product(("fgsm", "pgd"), ("linear", "full"), "ab")
    ]
    differences = [each for each in compare(map(result_of, records))[0] if each.judge == "pma"]
    assert average(differences, ["linear", "full"]) is None
    assert average(differences, ["full"]) is not None


def test_where_no_attack_is_cheaper_none_is_said_to_lose(tmp_path, rng):
    for attack in ("none", "fgsm", "pgd"):
        studied.write(tmp_path, studied.record_of(rng, attack=attack))
    assert said(tmp_path, "Every other attack takes longer.")
    assert not said(tmp_path, "Every cheaper attack")


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ([{"method": "scratch"}, {"method": "scratch", "attack": "pgd"}], "only models trained from scratch have"),
        ([{}, {"attack": "pgd", "name": "a"}, {"attack": "pgd", "name": "b"}], "a, b are all pgd; give one"),
        ([{}, {"attack": "pgd", "name": "a", "steps": 2}], "a is PGD with settings of its own"),
        ([{}, {"attack": "pgd", "seed": 1}], "the cells trained with pgd have other seeds"),
        ([{}], "no cell has a partner trained with PGD"),
    ],
)
def test_why_nothing_is_compared_with_pgd_is_said(tmp_path, rng, cells, why):
    for chosen in cells:
        name, steps = chosen.pop("name", None), chosen.pop("steps", None)
        record = studied.record_of(rng, **chosen)
        record["settings"] |= {"trained_with": record["cell"]["attack"]} | ({"steps": steps} if steps else {})
        record["cell"]["attack"] = name or record["cell"]["attack"]
        studied.write(tmp_path, record)
    assert why in said(tmp_path, "What it costs in accuracy is not measured yet: ")[0]


def test_from_scratch_too_only_runs_count_that_show(tmp_path, rng):
    pair(tmp_path, rng, pma=0, method="scratch")
    (words,) = said(tmp_path, "From scratch")
    assert words.startswith("From scratch, for comparison, 1 more run is not counted")


def test_the_table_says_how_each_cell_was_made(tmp_path, rng):
    record = studied.record_of(rng) | {"commit": "abc"}
    record["machine"] |= {"device": "a GPU", "sharing": 2}
    studied.write(tmp_path, record)
    write_study(tmp_path)
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    found = {name: row[name] for name in ("trained_with", "epochs", "device", "alone", "constant", "commit")}
    assert list(found.values()) == ["fgsm", "5", "a GPU", "False", "False", "abc"]
    assert float(row["train_cpu_s"]) == record["train_cpu_s"]


@pytest.mark.parametrize(("verdicts", "constant"), [("1", False), ("0", False), ("111", False), ("110", True)])
def test_one_class_is_a_fault_only_where_there_are_several(rng, verdicts, constant):
    record = studied.record_of(rng, images=len(verdicts)) | {"classes_predicted": 1}
    record["verdicts"] = dict.fromkeys(record["verdicts"], verdicts)
    result: Result = result_of(record)
    assert result.constant is constant
