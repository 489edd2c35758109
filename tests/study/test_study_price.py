"""A study's prices, against loops by hand: training time as a multiple of standard training, accuracy beside FGSM's."""

import re
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
IMAGES = 64
# The names in a grid: the trainer's attack, its settings, and the mean time of an epoch and its units.
ATTACKS = {
    "none": ("none", {}, 10.0, 3.0),
    "fgsm": ("fgsm", {}, 17.0, 5.0),
    "fgsm-long": ("fgsm", {"epochs": 7}, 17.0, 5.0),
    "a-big-step": ("fgsm", {"alpha": 0.06}, 17.0, 5.0),
    "a-long-none": ("none", {"epochs": 7}, 10.0, 3.0),
    "stale": ("stale", {}, 10.4, 3.0),
    "stale-2": ("stale", {"refresh": 2}, 13.0, 4.0),
    "stale-long": ("stale", {"epochs": 6}, 10.4, 3.0),
    "nfgsm": ("nfgsm", {}, 16.9, 5.0),
    "none-crops": ("none", {"augment": True}, 12.0, 3.0),
    "fgsm-crops": ("fgsm", {"augment": True}, 18.0, 5.0),
    "stale-crops": ("stale", {"augment": True}, 12.6, 3.0),
}
FULL = "Full fine-tuning at eps 4 and 8, 3 seeds"
PLAIN = ("none", "fgsm", "stale", "stale-2", "stale-long")


def cell(rng, name, right=None, images=IMAGES, **chosen):
    """The record of a cell. The first `right` images are right under PMA; without that every verdict is a coin's."""
    attack, changes, seconds, units = ATTACKS[name]
    count = changes.get("epochs", EPOCHS)
    record = studied.record_of(rng, epochs=count, images=images, **chosen)
    record["cell"]["attack"] = name
    record["settings"] |= {"trained_with": attack, **changes}
    record["train_cpu_s"] = count * seconds * (1 + (0.01 * rng.random() if right is None else 0))
    record["cost"]["units"] = units
    for judge in record["verdicts"]:
        record["verdicts"][judge] = "".join("01"[int(v)] for v in rng.random(images) < rng.uniform(0.4, 0.6))
    if right is not None:
        record["verdicts"]["pma"] = "1" * right + "0" * (images - right)
    return record


def grid(rng, names=ATTACKS, right=None, eps=(4.0, 8.0), seeds=3, **chosen):
    """The records of a grid; `right` is a dict of names."""
    return [
        cell(rng, name, right=right and right[name], eps=each, seed=seed, **chosen)
        for each in eps
        for name in right or names
        for seed in range(seeds)
    ]


def share(record, judge):
    return record["verdicts"][judge].count("1") / IMAGES


def told(folder, records):
    """(the sentences of the first screen that are about prices; results.json)."""
    for each in records:
        studied.write(folder, each)
    page, numbers = written(folder)
    return [words for words in page.answer if "times as long as" in words], numbers


# ---------------------------------------------------------------------- numbers


def test_each_attack_is_compared_with_cells_that_have_its_other_settings(rng):
    """And with those that have an attack's own name and default settings, though others come before them."""
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
        assert each.time == pytest.approx(statistics.median(ratios))
        assert each.predicted == pytest.approx(ATTACKS[each.attack][3] / 3 * each.epochs / EPOCHS)
        assert each.clean == pytest.approx(sum(share(r, "clean") for r in mine) / 3)
        assert each.robust == pytest.approx(sum(share(r, "pma") for r in mine) / 3)
        assert (each.standard, each.against) == (f"none{crops}", f"fgsm{crops}")
        if ATTACKS[each.attack][0] == "none" or each.attack == each.against:
            assert each.difference is None
        else:
            by_hand = sum(share(a, "pma") - share(b, "pma") for a, b in zip(mine, fgsm, strict=True)) / 3
            assert each.difference.mean == pytest.approx(by_hand)
            assert each.difference.low <= by_hand <= each.difference.high


def test_the_accuracies_of_a_summary_are_of_the_cells_whose_difference_it_has(rng):
    """An eps that has more seeds than another moves neither alone."""
    records = grid(rng, PLAIN, eps=(4.0,), seeds=1) + grid(rng, PLAIN, eps=(8.0,), seeds=3)
    found = {each.attack: each for each in summaries(prices(map(result_of, records))[0])}
    assert len(found) == len(PLAIN)
    for name, each in found.items():
        cells = [r for r in records if (r["cell"]["attack"], r["cell"]["seed"]) == (name, 0)]
        assert each.robust == pytest.approx(sum(share(r, "pma") for r in cells) / 2)
        assert each.clean == pytest.approx(sum(share(r, "clean") for r in cells) / 2)
        assert each.runs == 2
        if each.to_fgsm:
            assert each.to_fgsm[0] == pytest.approx(each.robust - found["fgsm"].robust)
    apart = [*records[: len(PLAIN)], *(r for r in records if (r["cell"]["eps"], r["cell"]["seed"]) == (8.0, 1))]
    assert [(e.runs, e.to_fgsm) for e in summaries(prices(map(result_of, apart))[0])] == [(2, None)] * len(PLAIN)


def test_a_loss_at_one_eps_is_told_beside_the_mean(tmp_path, rng):
    records = grid(rng, ["none", "fgsm", "stale"])
    for each in records:
        if each["cell"]["attack"] != "none":
            right = 40 if each["cell"]["attack"] == "fgsm" else 41 if each["cell"]["eps"] == 4 else 39
            for name, count in (("pma", right), ("pgd-10", right)):
                each["verdicts"][name] = "1" * count + "0" * (IMAGES - count)
        if each["cell"]["attack"] == "stale":
            for number, epoch in enumerate(e for e in each["records"] if "epoch" in e):
                epoch["agreement"] = 0.5 if number == 0 else 0.625 + 0.125 * each["cell"]["seed"]
    (found,) = (each for each in summaries(prices(map(result_of, records))[0]) if each.attack == "stale")
    assert found.to_fgsm[0] == pytest.approx(0)
    assert found.by_eps == pytest.approx((1 / IMAGES, -1 / IMAGES))
    assert found.agreement == pytest.approx(0.75)  # the mean of three seeds, without the first epoch
    (said,), numbers = told(tmp_path, records)
    least = f"{-100 / IMAGES:.2f}"
    assert "is stale (0.00 (" in said
    assert f", the least {least} at eps 8 on eurosat; clean" in said
    (row,) = (line for line in numbers["price_table"].splitlines() if "| stale |" in line)
    assert row.endswith(f"| +{100 / IMAGES:.2f} and {least} | 75 % |")


def test_a_run_that_was_stopped_is_still_the_reference(rng):
    records = grid(rng, ["none", "fgsm", "stale", "fgsm-long"])
    for each in records:
        if each["cell"]["attack"].startswith("fgsm"):
            each["records"] = [
                each["records"][0],
                *studied.epochs_of(EPOCHS // 2 if "long" not in each["cell"]["attack"] else EPOCHS),
                each["records"][-1],
            ]
    assert {each.against for each in prices(map(result_of, records))[0]} == {"fgsm"}


def test_two_that_could_be_the_reference_are_refused_in_words(rng):
    records = grid(rng, ["none", "fgsm", "stale"], eps=(8.0,))
    for each in grid(rng, ["fgsm"], eps=(8.0,)):
        each["cell"]["attack"] = "fgsm-again"
        records.append(each)
    for each in records:
        if each["cell"]["attack"] == "fgsm":
            each["cell"]["attack"] = "fgsm-once"
    found, (problem,) = prices(map(result_of, records))
    assert problem == (
        "eurosat robust-resnet full eps 8: fgsm-again, fgsm-once are all fgsm; give one of them that name, to compare "
        "with it"
    )
    assert all(each.against is None and each.difference is None for each in found)


def test_a_price_needs_cells_without_an_attack_and_says_less_without_fgsm(rng):
    assert prices(map(result_of, grid(rng, ["fgsm", "stale"]))) == ([], [])
    of_standard, _ = prices(map(result_of, grid(rng, ["none", "stale", "fgsm-long", "a-big-step"])))
    assert len(of_standard) == 8
    assert all(each.difference is None and each.against is None and each.time for each in of_standard)
    assert {each.to_fgsm for each in summaries(of_standard)} == {None}
    crops_alone, problems = prices(map(result_of, grid(rng, ["none", "stale-crops"], eps=(8.0,))))
    assert [each.attack for each in crops_alone] == ["none"]
    assert problems == [
        "eurosat-robust-resnet-full-stale-crops-eps8-seed0: no cell without an attack has the same settings"
    ]


def test_accuracies_are_of_the_seeds_that_are_compared(rng):
    records = [
        r
        for r in grid(rng, ["none", "fgsm", "stale"], eps=(8.0,))
        if r["cell"]["attack"] != "fgsm" or r["cell"]["seed"] == 1
    ]
    by_attack = {each.attack: each for each in prices(map(result_of, records))[0]}
    (mine,) = [r for r in records if r["cell"]["attack"] == "stale" and r["cell"]["seed"] == 1]
    assert by_attack["stale"].seeds == (1,)
    assert by_attack["stale"].robust == share(mine, "pma")
    assert by_attack["none"].seeds == (0, 1, 2)


def test_a_summary_is_the_mean_over_eps_of_one_data_set(rng):
    records = grid(rng) + grid(rng, data="cifar10") + grid(rng, method="linear")
    found, _ = prices(map(result_of, records))
    summed = summaries(found)
    assert len(summed) == 3 * len(ATTACKS)
    for each in summed:
        row = each.row.data, each.row.method
        mine = [p for p in found if (p.row.data, p.row.method, p.attack) == (*row, each.attack)]
        assert (each.budgets, each.runs) == ((4.0, 8.0), 6)
        assert each.time == statistics.median(p.time for p in mine)
        assert each.predicted == statistics.median(p.predicted for p in mine)
        assert each.robust == pytest.approx(np.mean([p.robust for p in mine]))
        assert each.clean == pytest.approx(np.mean([p.clean for p in mine]))
        if mine[0].difference is None:
            assert each.to_fgsm is None
        else:
            mean, low, high = each.to_fgsm
            assert mean == pytest.approx(np.mean([p.difference.mean for p in mine]))
            verdicts = np.mean([p.difference.verdicts for p in mine], 0)
            again = bootstrap(verdicts, int(rng.integers(1000)))  # other draws, and heavy tails with three seeds
            assert (low - mean, high - mean) == pytest.approx((again[0] - mean, again[1] - mean), rel=0.3, abs=0.01)


def test_a_summary_has_a_time_only_if_each_eps_has_one(rng):
    records = grid(rng, ["none", "stale"])
    for each in records:
        if each["cell"]["eps"] == 8:
            each["machine"] = {"device": "a GPU", "sharing": 12}
    found, _ = prices(map(result_of, records))
    assert {(p.row.eps, p.time is None) for p in found} == {(4.0, False), (8.0, True)}
    assert {each.time for each in summaries(found)} == {None}


# ---------------------------------------------------------------------- words


def test_the_first_screen_names_the_cheapest_and_the_best(tmp_path, rng):
    right = {"none": 3, "fgsm": 40, "stale": 32, "stale-2": 40, "stale-long": 41}
    (said,), numbers = told(tmp_path, grid(rng, right=right) + grid(rng, right=right, data="gtsrb"))
    assert said.startswith(
        f"{FULL}: fgsm takes 1.7 times as long as training without an attack (none), and PMA leaves 62.5 % on eurosat "
        "and 62.5 % on gtsrb. The cheapest attack that loses at most 1 point to it on each data set is stale-2 (0.00 ("
    )
    assert "; 1.3 times). The most robust that takes no longer is stale-long (+1.56 (" in said
    clean = {}
    for row in numbers["rows"]:
        clean.setdefault((row["data"], row["attack"]), []).append(row["clean"])
    changes = [100 * (np.mean(clean[of, "stale-2"]) - np.mean(clean[of, "fgsm"])) for of in ("eurosat", "gtsrb")]
    told_changes = re.search(r"; clean accuracy (\S+) and (\S+); 1\.3 times\)", said).groups()
    assert list(map(float, told_changes)) == pytest.approx(changes, abs=0.011)  # either way from half a hundredth
    chosen = [each for each in numbers["price_summaries"] if each["attack"] in ("stale-2", "stale-long")]
    low = any(each["to_fgsm"][1] < -0.01 for each in chosen)
    caution = "; an interval that goes below -1 leaves a larger loss open" if low else ""
    assert said.endswith(f"; 1.6 times). The choice among 4 attacks was made on the images that judge{caution}.")
    assert not any("no cell has a partner trained with PGD" in words for words in numbers["answer"]["sentences"])
    assert [each["to_fgsm"]["mean"] for each in numbers["prices"] if each["attack"] == "stale"] == [-0.125] * 4
    assert {each["against"] for each in numbers["prices"]} == {"fgsm"}
    lines = [[cell.strip() for cell in line.split("|")] for line in numbers["price_table"].splitlines()]
    assert lines[0][1:-1] == [
        "data",
        "method",
        "attack",
        "eps",
        "cells",
        "time",
        "clean",
        "PMA",
        "minus FGSM's",
        *("at each eps", "signs that stay"),
    ]
    (of_stale,) = [line for line in lines if line[1:4] == ["gtsrb", "full fine-tuning", "stale"]]
    assert of_stale[4:7] == ["4 and 8", "6", "1.04"]
    assert of_stale[8] == "50.0 %"
    assert of_stale[9].startswith("-12.50 (")
    assert of_stale[10:12] == ["-12.50 and -12.50", ""]
    assert {path.stem for path in (tmp_path / "figures").glob("price-*")} == {"price-0", "price-1"}


def test_fgsm_is_the_best_where_it_is(tmp_path, rng):
    (said,), _ = told(tmp_path, grid(rng, right={"none": 3, "fgsm": 40, "stale": 32, "nfgsm": 40}))
    # N-FGSM's time is next to FGSM's: it is no cheaper.
    assert said.endswith(
        "Every cheaper attack loses more than 1 point to it. None that takes no longer is more robust."
    )


def test_prices_without_pgd_are_no_answer_about_stability(tmp_path, rng):
    _, numbers = told(tmp_path, grid(rng, right={"none": 3, "fgsm": 40, "stale": 41}))
    assert (numbers["answer"]["kind"], numbers["answer"]["headline"]) == (
        "open",
        "Not asked: there is no PGD to compare with.",
    )


def test_the_cheapest_that_is_also_the_best_is_named_once(tmp_path, rng):
    (said,), _ = told(tmp_path, grid(rng, right={"none": 3, "fgsm": 40, "stale": 41, "stale-2": 38}))
    assert said.count("stale") == 1
    assert "loses at most 1 point to it is stale (+1.56 (" in said
    assert "; none that takes no longer than fgsm is more robust. The choice among 3 attacks was made" in said


def test_crops_have_a_sentence_of_their_own(tmp_path, rng):
    right = {"none": 3, "fgsm": 40, "stale": 40, "none-crops": 3, "fgsm-crops": 30, "stale-crops": 20}
    plain, crops = told(tmp_path, grid(rng, right=right))[0]
    assert plain.startswith(
        f"{FULL}: fgsm takes 1.7 times as long as training without an attack (none), and PMA leaves"
    )
    assert crops.startswith(
        f"{FULL}: fgsm-crops takes 1.5 times as long as training without an attack (none-crops), and"
    )
    assert "Every cheaper attack loses more than 1 point" in crops


def test_each_data_set_has_its_eps_where_they_differ(tmp_path, rng):
    records = grid(rng, right={"none": 3, "fgsm": 40, "stale": 41})
    others = [record | {"cell": record["cell"] | {"data": "gtsrb"}} for record in records if record["cell"]["eps"] == 8]
    for each in others:
        each["settings"] = each["settings"] | {"contents": "other images"}
    (said,), _ = told(tmp_path, records + others)
    place = f"{records[0]['cell']['data']} at eps 4 and 8 and"
    assert said.startswith("Full fine-tuning, 3 seeds: fgsm takes")
    assert said.count(place) == 2  # in what PMA leaves, and in the difference of the cheapest
    assert said.count("on gtsrb at eps 8") == 2


def test_what_is_not_measured_everywhere_is_named_and_not_compared(tmp_path, rng):
    right = {"none": 3, "fgsm": 40, "stale": 60, "stale-2": 41}
    records = [r for r in grid(rng, right=right) if r["cell"]["attack"] != "stale" or r["cell"]["eps"] == 4]
    for each in records:
        if each["cell"]["attack"] == "stale":  # without a measured time: no reason to doubt those of the others
            each["machine"] = each["machine"] | {"cpu": "another"}
    (said,), numbers = told(tmp_path, records)
    assert "by the cost model" not in said
    assert "1 point to it is stale-2 (+1.56 (" in said
    assert said.endswith("Not measured everywhere and with as many seeds, and not compared: stale.")
    eps = {line.split("|")[3].strip(): line.split("|")[4].strip() for line in numbers["price_table"].splitlines()[2:]}
    assert eps == {"none": "4 and 8", "fgsm": "4 and 8", "stale": "4", "stale-2": "4 and 8"}


def test_an_attack_of_fewer_seeds_is_not_beside_those_of_more(tmp_path, rng):
    records = grid(rng, right={"none": 3, "fgsm": 40, "stale": 41, "stale-2": 60})
    (said,), _ = told(tmp_path, [r for r in records if r["cell"]["attack"] != "stale-2" or r["cell"]["seed"] == 0])
    assert said.startswith(f"{FULL}: fgsm takes")
    assert "stale-2 (" not in said
    assert "is stale (+1.56 (" in said
    assert said.endswith("and with as many seeds, and not compared: stale-2.")


@pytest.mark.parametrize("sharing", [12, None], ids=["a shared GPU", "another machine"])
def test_measured_and_foretold_times_are_not_compared(tmp_path, rng, sharing):
    records = grid(rng, right={"none": 3, "fgsm": 40, "nfgsm": 40})
    for each in records:
        each["train_cpu_s"] *= 2 if each["cell"]["attack"] == "fgsm" else 1
        if sharing:
            each["machine"] = {"device": "a GPU", "sharing": sharing}
        elif each["cell"]["attack"] == "nfgsm":
            each["machine"] = each["machine"] | {"cpu": "another"}
    (said,), numbers = told(tmp_path, records)
    assert said.startswith(
        f"{FULL}: fgsm takes 1.67 times as long as training without an attack (none) by the cost model"
    )
    assert "No other attack is cheaper." in said
    assert "| 1.67 foretold |" in numbers["price_table"]


def test_an_attack_whose_time_was_not_measured_leaves_the_others_with_theirs(tmp_path, rng):
    records = grid(rng, right={"none": 3, "fgsm": 40, "stale": 40, "stale-2": 40})
    for each in records:
        each["train_cpu_s"] *= {"fgsm": 2, "stale": 1.5}.get(each["cell"]["attack"], 1)
        if each["cell"]["attack"] == "stale-2":
            each["machine"] = each["machine"] | {"cpu": "another"}
    ((said,), _) = told(tmp_path, records)
    assert "by the cost model" not in said
    assert said.endswith("Not measured everywhere and with as many seeds, and not compared: stale-2.")


def test_models_and_classes_are_named(tmp_path, rng):
    right = {"none": 3, "fgsm": 40, "stale": 40}
    records = grid(rng, right=right, classes="0-3", labels="a") + grid(rng, right=right, classes="4-7", labels="b")
    first, second = told(tmp_path, records + grid(rng, right=right, model="conv", method="scratch"))[0]
    assert {words.partition(":")[0] for words in (first, second)} == {
        "Full fine-tuning of robust-resnet at eps 4 and 8, 3 seeds",
        "From scratch of conv at eps 4 and 8, 3 seeds",
    }
    assert any("on eurosat 0-3 and" in words and "on eurosat 4-7; clean" in words for words in (first, second))


def test_other_test_images_for_each_eps_are_said_and_not_averaged(tmp_path, rng):
    names = ("none", "fgsm", "stale")
    records = grid(rng, names, eps=(4.0,), labels="a") + grid(rng, names, eps=(8.0,), labels="b", images=32)
    for each in records:
        each["settings"]["contents"] = "images"
    said, numbers = told(tmp_path, records)
    assert said == []
    assert (
        "Not all cells of eurosat were judged on the same images: means over them are left out."
        in (numbers["missing"]["problems"])
    )


def test_prices_stand_beside_differences_to_pgd(tmp_path, rng):
    records = grid(rng, right={"none": 3, "fgsm": 40, "stale": 40})
    for eps in (4.0, 8.0):
        records += [studied.record_of(rng, attack="pgd", eps=eps, seed=seed, epochs=EPOCHS) for seed in range(3)]
    (said,), numbers = told(tmp_path, records)
    assert "stale (0.00" in said
    assert any("minus that of models trained with PGD" in words for words in numbers["answer"]["sentences"])
