"""A study's prices, against loops by hand: training time as a multiple of standard training, accuracy beside FGSM's."""

import statistics

import numpy as np
import pytest
import studied
from studied import rng as rng
from test_study_page import written

from fastadv.study.price import prices, summaries
from fastadv.study.results import result_of
from fastadv.study.statistics import bootstrap

EPOCHS = 4
# The names in a grid: the trainer's attack, its settings, and the mean time of an epoch and its units.
ATTACKS = {
    "none": ("none", {}, 10.0, 3.0),
    "fgsm": ("fgsm", {}, 17.0, 5.0),
    "fgsm-long": ("fgsm", {"epochs": 7}, 17.0, 5.0),
    "stale": ("stale", {}, 10.4, 3.0),
    "stale-2": ("stale", {"refresh": 2}, 13.0, 4.0),
    "stale-long": ("stale", {"epochs": 6}, 10.4, 3.0),
    "none-crops": ("none", {"augment": True}, 12.0, 3.0),
    "fgsm-crops": ("fgsm", {"augment": True}, 18.0, 5.0),
    "stale-crops": ("stale", {"augment": True}, 12.6, 3.0),
}


def cell(rng, name, **chosen):
    """The record of a cell; each of its verdicts is one of a coin, so that every pair of cells differs."""
    attack, changes, seconds, units = ATTACKS[name]
    count = changes.get("epochs", EPOCHS)
    record = studied.record_of(rng, epochs=count, **chosen)
    record["cell"]["attack"] = name
    record["settings"] |= {"trained_with": attack, **changes}
    record["train_cpu_s"] = count * seconds * (1 + 0.01 * rng.random())
    record["cost"]["units"] = units
    for judge in record["verdicts"]:
        record["verdicts"][judge] = "".join("01"[int(v)] for v in rng.random(64) < rng.uniform(0.4, 0.6))
    return record


def grid(rng, names=ATTACKS, **chosen):
    return [cell(rng, name, eps=eps, seed=seed, **chosen) for eps in (4.0, 8.0) for name in names for seed in range(3)]


def share(record, judge):
    return record["verdicts"][judge].count("1") / 64


def test_each_attack_is_compared_with_cells_that_have_its_other_settings(rng):
    records = grid(rng)
    found, problems = prices(map(result_of, records))
    assert problems == []
    assert len(found) == 2 * len(ATTACKS)
    by_key = {(r["cell"]["eps"], r["cell"]["attack"], r["cell"]["seed"]): r for r in records}
    for each in found:
        crops = "-crops" if each.attack.endswith("-crops") else ""
        mine, none, fgsm = (
            [by_key[each.row.eps, name, seed] for seed in range(3)]
            for name in (each.attack, f"none{crops}", f"fgsm{crops}")
        )
        assert (each.seeds, each.epochs) == ((0, 1, 2), ATTACKS[each.attack][1].get("epochs", EPOCHS))
        ratios = [a["train_cpu_s"] / b["train_cpu_s"] for a, b in zip(mine, none, strict=True)]
        assert each.time == each.times == pytest.approx(statistics.median(ratios))
        assert each.predicted == pytest.approx(ATTACKS[each.attack][3] / 3 * each.epochs / EPOCHS)
        assert each.clean == pytest.approx(sum(share(r, "clean") for r in mine) / 3)
        assert each.robust == pytest.approx(sum(share(r, "pma") for r in mine) / 3)
        assert each.against == f"fgsm{crops}"
        if each.attack in ("none", "none-crops", "fgsm", "fgsm-crops"):
            assert each.difference is None
        else:
            by_hand = sum(share(a, "pma") - share(b, "pma") for a, b in zip(mine, fgsm, strict=True)) / 3
            assert each.difference.mean == pytest.approx(by_hand)
            assert each.difference.low < by_hand < each.difference.high


def test_a_price_needs_cells_without_an_attack_and_says_less_without_fgsm(rng):
    assert prices(map(result_of, grid(rng, ["fgsm", "stale"])))[0] == []
    of_standard, _ = prices(map(result_of, grid(rng, ["none", "stale", "fgsm-long"])))
    assert len(of_standard) == 6
    assert all(each.difference is None and each.against is None and each.time for each in of_standard)
    assert {each.to_fgsm for each in summaries(of_standard)} == {None}
    shared_a_gpu = [cell(rng, name) for name in ("none", "stale")]
    for each in shared_a_gpu:
        each["machine"] = {"device": "a GPU", "sharing": 12}
    assert [(p.time, p.times) for p in prices(map(result_of, shared_a_gpu))[0]] == [(None, 1.0)] * 2


def test_a_summary_is_the_mean_over_eps_of_one_data_set(rng):
    records = grid(rng) + grid(rng, data="cifar10") + grid(rng, method="linear")
    found, _ = prices(map(result_of, records))
    summed = summaries(found)
    assert len(summed) == 3 * len(ATTACKS)
    for each in summed:
        row = each.row.data, each.row.method
        mine = [p for p in found if (p.row.data, p.row.method, p.attack) == (*row, each.attack)]
        assert each.budgets == (4.0, 8.0)
        assert each.time == statistics.median(p.times for p in mine)
        assert each.robust == pytest.approx(np.mean([p.robust for p in mine]))
        assert each.clean == pytest.approx(np.mean([p.clean for p in mine]))
        if mine[0].difference is None:
            assert each.to_fgsm is None
        else:
            mean, low, high = each.to_fgsm
            assert mean == pytest.approx(np.mean([p.difference.mean for p in mine]))
            verdicts = np.mean([p.difference.verdicts for p in mine], 0)
            again = bootstrap(verdicts, int(rng.integers(1000)))  # other draws, and heavy tails with three seeds
            assert (low - mean, high - mean) == pytest.approx((again[0] - mean, again[1] - mean), rel=0.3)


def test_the_first_screen_names_the_cheapest_attack_that_loses_little(tmp_path, rng):
    names = ["none", "fgsm", "stale", "stale-2", "stale-long"]
    records = grid(rng, names) + grid(rng, names, data="a|b")
    right = {"fgsm": 40, "stale": 32, "stale-2": 40, "stale-long": 41, "none": 3}
    for each in records:
        count = right[each["cell"]["attack"]]
        each["train_cpu_s"] = ATTACKS[each["cell"]["attack"]][2] * each["settings"]["epochs"]
        each["verdicts"]["pma"] = "1" * count + "0" * (64 - count)
        studied.write(tmp_path, each)
    page, numbers = written(tmp_path)
    (about,) = [words for words in page.answer if "times as long as" in words]
    assert "For full fine-tuning, where FGSM takes 1.70 times" in about
    assert "stale-2 (0.00 on a|b and 0.00 on eurosat; 1.30 times)" in about
    (best,) = [words for words in page.answer if "in FGSM's time" in words]
    assert "stale-long (+1.56 on a|b and +1.56 on eurosat; 1.56 times)" in best
    assert "The price of robustness" in page.words
    assert not any("no cell has a partner trained with PGD" in words for words in page.answer)
    assert [each["to_fgsm"]["mean"] for each in numbers["prices"] if each["attack"] == "stale"] == [-0.125] * 4
    lines = numbers["price_table"].splitlines()
    assert lines[0].endswith(
        "time / standard | a\\|b: clean | PMA | minus FGSM's | eurosat: clean | PMA | minus FGSM's |"
    )
    (of_stale,) = [line for line in lines if line.startswith("| full fine-tuning | stale |")]
    assert of_stale.count(" | 50.0 % | -12.50 (") == 2
    assert "a|b: clean" in page.words
    assert {path.stem for path in (tmp_path / "figures").glob("price-*")} == {"price-0", "price-1"}


def test_without_a_cheap_attack_that_is_near_the_first_screen_says_so(tmp_path, rng):
    records = grid(rng, ["none", "fgsm", "stale"])
    for each in records:
        count = {"fgsm": 40, "stale": 32, "none": 3}[each["cell"]["attack"]]
        each["verdicts"]["pma"] = "1" * count + "0" * (64 - count)
        studied.write(tmp_path, each)
    (about,) = [words for words in written(tmp_path)[0].answer if "times as long as" in words]
    assert about.endswith("no cheaper attack comes within 1 point of its accuracy under PMA.")


def test_means_over_fewer_eps_say_so_and_are_not_the_best(tmp_path, rng):
    records = [
        r
        for r in grid(rng, ["none", "fgsm", "stale", "stale-2"])
        if r["cell"]["attack"] != "stale" or r["cell"]["eps"] == 4
    ]
    for each in records:
        count = {"fgsm": 40, "stale": 60, "stale-2": 41, "none": 3}[each["cell"]["attack"]]
        each["verdicts"]["pma"] = "1" * count + "0" * (64 - count)
        studied.write(tmp_path, each)
    page, numbers = written(tmp_path)
    (said,) = [words for words in page.answer if "is the cheapest attack" in words]
    assert "stale-2 (+1.56 on eurosat" in said
    named = [line.split("|")[2].strip() for line in numbers["price_table"].splitlines()[2:]]
    assert sorted(named) == ["fgsm (eps 4 and 8)", "none (eps 4 and 8)", "stale (eps 4)", "stale-2 (eps 4 and 8)"]
