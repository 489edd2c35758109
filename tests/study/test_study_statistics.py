"""A study's differences, intervals, collapses, detectors and times, against loops by hand and closed forms."""

import dataclasses
import itertools
import statistics
from math import sqrt

import numpy as np
import pytest
import studied
from scipy import stats
from studied import rng as rng

from fastadv.study import attack_table
from fastadv.study.overfitting import DETECTORS, collapse, courses, failed, partly, scores
from fastadv.study.results import result_of, row_of
from fastadv.study.statistics import Difference, Row, average, averages, bootstrap, compare, paired, t_interval
from fastadv.study.timing import times
from fastadv.study.words import points


def verdicts(rng, seeds, images, *, of_seed, of_image, noise, gap=0.05, level=0.3):
    """Differences of verdicts (seeds, images) of two models by the probit model, and their expectation.

    An image is equally hard for all seeds. `of_image` scales how much its difficulty differs between the two models.
    """
    hard, found = rng.normal(size=images), []
    for mean in (level - gap, level):
        score = mean + hard + of_image * rng.normal(size=images) + of_seed * rng.normal(size=(seeds, 1))
        found.append(score + noise * rng.normal(size=(seeds, images)) > 0)
    spread = sqrt(1 + of_image**2 + of_seed**2 + noise**2)
    return found[0].astype(float) - found[1], stats.norm.cdf((level - gap) / spread) - stats.norm.cdf(level / spread)


# ---------------------------------------------------------------------- the interval


def test_an_interval_contains_its_mean(rng):
    """Also where the seeds happen to agree, so that it is short: it has two images more, which move the mean."""
    for _ in range(200):
        verdicts = rng.integers(0, 2, (2, 64)) - rng.integers(0, 2, (2, 64))
        verdicts[1] = rng.permutation(verdicts[0])
        low, high = bootstrap(verdicts, int(rng.integers(1000)), draws=200)
        assert low <= verdicts.mean() <= high


def by_hand(differences, draws, rng):
    """The interval of `bootstrap` by a loop over the draws, with plain sums."""
    own = float(np.mean(differences))  # without the two images
    rows = [[*map(float, row), 1.0, -1.0] for row in differences]
    seeds, images = len(rows), len(rows[0])
    mean = sum(map(sum, rows)) / (seeds * images)
    of_seed = [sum(row) / images for row in rows]
    of_image = [sum(row[i] for row in rows) / seeds for i in range(images)]
    between_seeds = images * sum((m - mean) ** 2 for m in of_seed) / max(seeds - 1, 1)
    between_images = seeds * sum((m - mean) ** 2 for m in of_image) / (images - 1)
    rest = sum((rows[s][i] - of_seed[s] - of_image[i] + mean) ** 2 for s in range(seeds) for i in range(images)) / max(
        (seeds - 1) * (images - 1), 1
    )
    shrunk = sqrt(max(1 - rest / between_images, 0)) if seeds > 1 else 1.0
    share = between_seeds / (between_seeds + max(between_images - rest, 0)) if seeds > 1 and between_seeds else 0.0
    found = []
    for _ in range(draws):
        drawn = statistics.fmean(of_image[i] for i in rng.integers(images, size=images)) - mean
        t = 0.0
        if share:
            freedom = (seeds - 1) / sqrt(share)
            t = rng.normal() / sqrt(rng.chisquare(freedom) / freedom)
        found.append(mean + shrunk * drawn + t * sqrt(between_seeds / (seeds * images)))
    low, high = np.quantile(found, [0.025, 0.975])
    return np.array([min(low, own), max(high, own)])


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_interval_is_that_of_a_loop(rng, seeds):
    differences, _ = verdicts(rng, seeds, 60, of_seed=0.1, of_image=0.4, noise=0.4)
    expected = by_hand(differences, 20_000, rng)
    found = bootstrap(differences, seed=int(rng.integers(2**32)), draws=200_000)
    # The standard error of a quantile of 20,000 draws is 1 % of the width; 2 % for t with few degrees of freedom.
    # With one seed the means of draws are multiples of 1 / 62, and a quantile may fall on either of two neighbours.
    atol = 0.08 * np.diff(expected)[0] + (1.01 / 62 if seeds == 1 else 0.0)
    np.testing.assert_allclose(found, expected.clip(-1, 1), rtol=0, atol=atol)


def test_what_seeds_and_images_do_not_share_counts_once(rng):
    """All seeds have the same mean. The variance between images counts only as far as it exceeds the rest."""
    # No whole numbers: means of these lie on a grid, whose steps are wider than the tolerance.
    row = np.concatenate([rng.uniform(0.6, 1, 12), rng.uniform(-1, -0.6, 6), np.zeros(42)])
    differences = rng.permuted(np.tile(row, (3, 1)), axis=1)
    expected = by_hand(differences, 20_000, rng)
    found = bootstrap(differences, seed=int(rng.integers(2**32)), draws=200_000)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.diff(expected)[0] + 1e-9)


@pytest.mark.parametrize(
    "spreads",
    [
        {"of_seed": 0.0, "of_image": 0.0, "noise": 0.3},
        {"of_seed": 0.02, "of_image": 0.3, "noise": 0.1},
        {"of_seed": 0.1, "of_image": 0.1, "noise": 0.3},
    ],
    ids=["rest", "images", "seeds"],
)
def test_95_of_100_intervals_have_the_mean(rng, spreads):
    covered = []
    for _ in range(800):
        differences, mean = verdicts(rng, 3, 512, **spreads)
        low, high = bootstrap(differences, seed=int(rng.integers(2**32)), draws=2000)
        covered.append(low <= mean <= high)
    assert right(covered)


def right(covered):
    """Whether 93 to 97 % of the intervals have the mean, within four standard errors. All of them are too many."""
    least, most = (p + side * 4 * sqrt(p * (1 - p) / len(covered)) for p, side in ((0.93, -1), (0.97, 1)))
    return least <= np.mean(covered) <= most < 1


def test_an_interval_is_that_of_its_row_alone(rng):
    records = [
        studied.record_of(rng, attack=attack, seed=seed, method=method)
        for method in ("full", "linear")
        for attack in ("fgsm", "pgd")
        for seed in range(3)
    ]
    first, _ = compare(map(result_of, records))
    second, _ = compare(map(result_of, reversed(records[:6])))
    found = {each.judge: (each.low, each.high) for each in first if each.row.method == "full"}
    assert found == {each.judge: (each.low, each.high) for each in second}


def test_no_difference_anywhere_is_no_certainty():
    low, high = bootstrap(np.zeros((3, 512)), seed=0)
    assert -0.01 < low < 0 < high < 0.01  # by the rule of three the true share may be up to 3 / 512


def test_the_t_interval_is_student_s(rng):
    means = rng.normal(size=6) / 100
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    np.testing.assert_allclose(t_interval(means), (expected.low, expected.high))


# ---------------------------------------------------------------------- pairs


def test_differences_are_those_of_pairs(rng):
    cells = [studied.record_of(rng, attack=a, seed=s) for a in ("none", "fgsm", "pgd") for s in (0, 1, 2, 7)]
    del cells[-1]  # seed 7 has no partner
    found, refused = compare(map(result_of, cells))
    assert refused == []
    assert {each.attack for each in found} == {"fgsm"}
    assert {each.judge for each in found} == set(studied.JUDGES)
    said = {(c["cell"]["attack"], c["cell"]["seed"]): c["verdicts"] for c in cells}
    for each in found:
        assert each.seeds == (0, 1, 2)
        pairs = [
            [int(a) - int(b) for a, b in zip(said["fgsm", s][each.judge], said["pgd", s][each.judge], strict=True)]
            for s in (0, 1, 2)
        ]
        assert each.verdicts.tolist() == pairs
        assert each.mean == pytest.approx(sum(map(sum, pairs)) / (3 * 64))
        assert each.low <= each.mean <= each.high


def test_verdicts_of_different_images_are_no_pairs(rng):
    same, other = (result_of(studied.record_of(rng, attack="pgd", labels=labels)) for labels in ("images", "others"))
    mine = result_of(studied.record_of(rng))
    paired([mine], [same], "pma")
    with pytest.raises(ValueError, match="different images") as error:
        paired([mine], [other], "pma")
    assert mine.cell.id in str(error.value)
    assert other.cell.id in str(error.value)
    shorter = result_of(studied.record_of(rng, attack="pgd", images=63))
    with pytest.raises(ValueError, match="different images"):
        paired([mine], [shorter], "pma")
    found, refused = compare([mine, other])
    assert (found, len(refused)) == ([], 1)
    # All seeds must have the same images.
    later = [result_of(studied.record_of(rng, attack=a, seed=1, labels="others")) for a in ("fgsm", "pgd")]
    with pytest.raises(ValueError, match="different images"):
        paired([mine, later[0]], [same, later[1]], "pma")


@pytest.mark.parametrize("change", [{"seed": 1}, {"eps": 4.0}, {"method": "lora"}, {"model": "b"}, {"data": "c"}])
def test_cells_that_differ_in_more_are_no_pairs(rng, change):
    mine, other = result_of(studied.record_of(rng)), result_of(studied.record_of(rng, attack="pgd", **change))
    with pytest.raises(ValueError, match="more than the training attack"):
        paired([mine], [other], "pma")
    assert compare([mine, other]) == ([], [])


def test_settings_that_are_not_the_attack_s_own_are_said_where_pairs_differ_in_them(rng):
    cells = [studied.record_of(rng, attack=a, seed=s) for a in ("fgsm", "nfgsm", "pgd") for s in (0, 1)]
    same, later = {"max_grad_norm": None}, {"file": "of a later version"}  # the default equals no max_grad_norm
    others = ({"epochs": 9}, {"epochs": 9}, {"noise": 0.1}, {"noise": 0.1} | same | later, {}, same)
    for each, changes in zip(cells, others, strict=True):
        each["settings"] |= changes
    found, _ = compare(map(result_of, cells))
    assert {each.attack: each.unlike for each in found} == {"fgsm": {"epochs": "9 and 5"}, "nfgsm": {}}
    for each in cells[4:]:
        each["settings"]["steps"], each["machine"]["fastadv"] = 3, "2"
    found, _ = compare(map(result_of, cells))
    of_pgd = {"steps of pgd": "3, not the default", "fastadv": "1 and 2"}
    assert {each.attack: each.unlike for each in found} == {"fgsm": {"epochs": "9 and 5"} | of_pgd, "nfgsm": of_pgd}


@pytest.mark.parametrize(("number", "changes"), [(0, {"epochs": 9}), (3, {"steps": 2}), (3, {"train_limit": 20})])
def test_seeds_of_other_settings_are_not_one_sample(rng, number, changes):
    cells = [studied.record_of(rng, attack=attack, seed=seed) for attack in ("fgsm", "pgd") for seed in (0, 1)]
    cells[number]["settings"] |= changes
    found, refused = compare(map(result_of, cells))
    (name,) = changes
    assert not found
    assert len(refused) == 1
    assert f"differ in {name} (" in refused[0]


def test_pgd_by_another_name_is_what_attacks_are_compared_with(rng):
    cells = [studied.record_of(rng, attack=attack) for attack in ("fgsm", "pgd")]
    cells[1]["settings"]["trained_with"], cells[1]["cell"]["attack"] = "pgd", "pgd-7"
    found, refused = compare(map(result_of, cells))
    by_hand = result_of(cells[0]).verdicts["pma"].mean() - result_of(cells[1]).verdicts["pma"].mean()
    assert not refused
    assert next(each.mean for each in found if each.judge == "pma") == pytest.approx(by_hand)
    assert {each.attack for each in found} == {"fgsm"}


def test_an_attack_of_another_name_is_what_it_was_trained_with(rng):
    cells = [studied.record_of(rng, attack=a) for a in ("none", "fgsm", "pgd")]
    for each, name in zip(cells, ("none-crops", "kept", "pgd"), strict=True):
        each["settings"]["trained_with"], each["cell"]["attack"] = each["cell"]["attack"], name
    cells.append(studied.record_of(rng, attack="pgd"))
    cells[-1]["cell"]["attack"], cells[-1]["settings"]["trained_with"] = "strong", "pgd"
    results = [result_of(each) for each in cells]
    assert {each.attack for each in compare(results)[0]} == {"kept", "strong"}
    assert [each.result.cell.attack for each in courses(results)] == ["kept", "pgd", "strong"]
    assert [each.fast for each in results[1:]] == [True, False, False]


def test_verdicts_of_one_cell_are_of_the_same_images(rng):
    record = studied.record_of(rng)
    record["verdicts"]["pma"] += "1"
    with pytest.raises(ValueError, match="not all of the same images"):
        result_of(record)


def test_an_average_is_over_the_methods_that_all_data_sets_have(rng):
    common = [(data, method) for data in ("a", "b") for method in ("full", "lora", "scratch")]
    cells = [("a", "linear"), *common, ("b", "bias")]
    records = [
        studied.record_of(rng, data=data, method=method, attack=attack, labels=data, seed=seed)
        for data, method in cells
        for attack in ("fgsm", "pgd")
        for seed in range(2)
    ]
    differences, _ = compare(map(result_of, records))
    means = {(each.row.data, each.row.method): each.mean for each in differences if each.judge == "pma"}
    found = {each.methods: each for each in averages(differences) if each.judge == "pma"}
    assert found.keys() == {("full",), ("lora",), ("linear",), ("bias",), ("scratch",), ("full", "lora")}
    both = found["full", "lora"]
    of_sets = [(means[data, "full"] + means[data, "lora"]) / 2 for data in ("a", "b")]
    assert (both.data_sets, both.mean) == (2, pytest.approx(np.mean(of_sets)))
    assert (both.low, both.high) == pytest.approx(t_interval(of_sets))
    # With one data set the interval is the row's.
    (alone,) = (each for each in differences if each.row.method == "linear" and each.judge == "pma")
    linear = found[("linear",)]
    assert (linear.data_sets, linear.low, linear.high) == (1, alone.low, alone.high)


def test_data_sets_that_agree_by_chance_are_no_certainty(rng):
    """With equal means Student's interval is a point, so the interval must come from the images."""
    records = [studied.record_of(rng, data=data, attack=attack) for data in "ab" for attack in ("fgsm", "pgd")]
    for a, b in zip(records[:2], records[2:], strict=True):
        b["verdicts"] = a["verdicts"]
    differences, _ = compare(map(result_of, records))
    two = [each for each in differences if each.judge == "pma"]
    (found,) = (each for each in averages(differences) if each.judge == "pma")
    assert found.data_sets == 2
    assert found.low == pytest.approx((two[0].low + two[1].low) / 2)
    assert found.high == pytest.approx((two[0].high + two[1].high) / 2)
    assert found.low < found.mean < found.high


@pytest.mark.parametrize(
    ("of_seeds", "of_sets"),
    [((0.01,), 0.0), ((0.05, *[0.002] * 5), 0.0), ((0.0,), 0.0), ((0.01,), 0.02)],
    ids=["seeds", "one set's seeds", "images", "sets"],
)
def test_the_interval_over_data_sets_covers_the_mean(rng, of_seeds, of_sets):
    """Six data sets, three seeds, 512 images; of one image in ten the verdicts differ. The true mean is 0."""
    row = result_of(studied.record_of(rng))
    covered = []
    for _ in range(1000):
        sets = []
        for number in range(6):
            shift = rng.normal(0, of_sets) + rng.normal(0, of_seeds[number % len(of_seeds)], 3)
            up, down = (np.clip(0.05 + side * shift / 2, 0, 1)[:, None] for side in (1, -1))
            drawn = rng.random((3, 512))
            verdicts = (drawn < up).astype(np.int8) - (drawn > 1 - down).astype(np.int8)
            mean, of = float(verdicts.mean()), dataclasses.replace(row_of(row), data=str(number))
            sets.append(Difference(of, "fgsm", "pma", (0, 1, 2), verdicts, mean, 0.0, 0.0, 0.5, True, {}, "images"))
        found = average(sets, [row.cell.method])
        covered.append(found.low <= 0 <= found.high)
    assert right(covered)
    assert np.mean(covered) > 0.92


def test_an_average_over_methods_of_one_data_set_is_over_the_seeds_that_all_have(rng):
    cells = [("full", 0), ("full", 1), ("lora", 1), ("lora", 2)]
    records = [studied.record_of(rng, method=m, seed=s, attack=a) for m, s in cells for a in ("fgsm", "pgd")]
    differences, _ = compare(map(result_of, records))
    of = {each.row.method: each.verdicts for each in differences if each.judge == "pma"}
    found = {each.methods: each for each in averages(differences) if each.judge == "pma"}
    both = (of["full"][1] + of["lora"][0]) / 2
    assert found["full", "lora"].mean == pytest.approx(both.mean())
    assert found["full", "lora"].low < both.mean() < found["full", "lora"].high
    apart, _ = compare(map(result_of, records[:2] + records[4:6]))
    assert {each.methods for each in averages(apart)} == {("full",), ("lora",)}


# ---------------------------------------------------------------------- collapses


def changed(epochs, **changes):
    """Epochs made from {field: list of its values}."""
    return [each | {name: values[i] for name, values in changes.items()} for i, each in enumerate(epochs)]


def test_a_collapse_is_a_fall_under_pgd_alone():
    sound, fallen = studied.epochs_of(5), studied.epochs_of(5, collapse=3)
    assert collapse(sound) is None
    assert collapse(fallen) == 3
    assert collapse(fallen, sound) == 3
    # A collapse in the first epoch shows only beside PGD's run or the accuracy under the attack itself.
    assert collapse(studied.epochs_of(5, collapse=0), sound) == 0
    assert collapse(studied.epochs_of(5, collapse=0)) == 0
    # The run is as weak as PGD's: the eps is large, and no accuracy fell.
    weak = changed(sound, robust_accuracy=[0.1] * 5, probe_pgd=[0.12] * 5, probe_attack=[0.4] * 5)
    assert collapse(weak, weak) is None
    # A run that forgets: both accuracies fall.
    forgets = changed(sound, robust_accuracy=[0.5, 0.5, 0.1, 0.1, 0.1], probe_pgd=[0.5, 0.5, 0.1, 0.1, 0.1])
    forgets = changed(forgets, probe_attack=[0.55, 0.55, 0.12, 0.12, 0.12])
    assert collapse(forgets, sound) is None
    # A run that overfits as any training does: only the accuracy on validation images falls.
    overfits = changed(sound, robust_accuracy=[0.5, 0.4, 0.3, 0.24, 0.2], probe_pgd=[0.6, 0.7, 0.8, 0.85, 0.9])
    assert collapse(overfits, sound) is None
    # PGD-5 leaves less than half of what FGSM leaves, of next to nothing: 2 and 12 of 256 images.
    untrained = changed(sound, robust_accuracy=[0.01] * 5, probe_pgd=[2 / 256] * 5, probe_attack=[12 / 256] * 5)
    assert collapse(untrained, sound) is None
    # So low an accuracy may fall by chance.
    hopeless = changed(sound, robust_accuracy=[0.04, 0.01, 0.0, 0.0, 0.0], probe_pgd=[0.01] * 5)
    assert collapse(hopeless, hopeless) is None


def test_a_run_that_loses_a_third_to_its_own_step_overfitted_partly(rng):
    """For example full fine-tuning at eps 16: accuracy under PGD-10 falls from 68 to 50 %, and PGD's run has 82 %."""
    sound = studied.epochs_of(4)
    course = {"robust_accuracy": [0.68, 0.56, 0.5, 0.56], "probe_pgd": [0.69, 0.7, 0.63, 0.63]}
    course["probe_attack"] = [0.71, 0.82, 0.86, 0.85]
    fell, with_pgd = changed(sound, **course), changed(sound, robust_accuracy=[0.72, 0.77, 0.82, 0.82])
    assert collapse(fell, with_pgd) is None
    assert [partly(fell, partner) for partner in (with_pgd, [], None)] == [1, 1, 1]
    assert partly(changed(fell, robust_accuracy=[0.56, 0.57, 0.57, 0.55]), with_pgd) == 1  # only PGD's run shows it
    assert [partly(changed(fell, robust_accuracy=[0.56, 0.57, 0.57, 0.55]), none) for none in ([], None)] == [None] * 2
    # The accuracy under the training attack is no better: such a run forgets, or overfits as any training does.
    assert partly(changed(fell, probe_attack=course["probe_pgd"]), with_pgd) is None
    assert partly(changed(fell, robust_accuracy=[0.72, 0.7, 0.75, 0.74]), with_pgd) is None

    records = [studied.record_of(rng, epochs=4, attack=attack) for attack in ("fgsm", "pgd")]
    for record, epochs in zip(records, (fell, with_pgd), strict=True):
        record["records"][1:-1] = epochs
    by_attack = {each.result.attack: each for each in courses(map(result_of, records))}
    assert (by_attack["fgsm"].collapse, by_attack["fgsm"].partly, by_attack["pgd"].sound) == (None, 1, True)
    gap = next(each for each in scores(by_attack.values()) if each.name == "gap")
    assert (gap.collapsed, gap.false, gap.sound) == (
        0,
        0,
        1,
    )  # firing on partial overfitting is no false alarm


@pytest.mark.parametrize(("share", "weak"), [(0.24, True), (0.26, False)])
def test_a_run_that_never_became_robust_is_weak_and_no_collapse(rng, share, weak):
    """As with GradAlign at eps 32, whose penalty keeps the network from learning: PMA leaves half of PGD's 50 %."""
    records = [studied.record_of(rng, attack=attack) for attack in ("nfgsm", "pgd")]
    for record, accuracy in zip(records, (share, 0.5), strict=True):
        record["verdicts"]["pma"] = ("1" * round(64 * accuracy)).ljust(64, "0")
    for epoch in records[0]["records"][1:-1]:
        epoch |= {"robust_accuracy": 0.01, "probe_pgd": 0.0, "probe_attack": 0.06}
    found = {each.result.attack: each for each in courses(map(result_of, records))}
    assert found["nfgsm"].how == ("weak" if weak else None)
    assert found["pgd"].how is None
    assert failed(found.values()) == (0, 0, int(weak), 2)
    records[1]["records"][-1]["confusion"] = {"clean": [[0, 1, 3], [1, 1, 2]]}  # one class: nothing shows
    assert [each.how for each in courses(map(result_of, records))] == [None, None]


def test_a_model_that_predicts_one_class_is_no_measure(rng):
    """The robust accuracy of such a model is the share of that class, although the model is not robust."""
    low, share = studied.record_of(rng), studied.record_of(rng, attack="pgd")
    for epoch in low["records"][1:-1]:
        epoch |= {"robust_accuracy": 0.03, "probe_pgd": 0.06, "probe_attack": 0.2}
    for epoch in share["records"][1:-1]:
        epoch |= {"robust_accuracy": 0.25, "clean_accuracy": 0.25, "probe_pgd": 0.25, "probe_attack": 0.25}
    share["records"][-1]["confusion"] = {"clean": [[0, 1, 3], [1, 1, 2]]}
    found = {each.result.attack: each for each in courses(map(result_of, (low, share)))}
    assert found["fgsm"].collapse is None
    assert [found[attack].result.constant for attack in ("pgd", "fgsm")] == [True, False]
    share["records"][-1]["confusion"] = {"clean": [[0, 1, 3], [1, 0, 2]]}
    assert next(each for each in courses(map(result_of, (low, share))) if each.result.attack == "fgsm").collapse == 0


def test_epochs_that_were_not_validated_do_not_tell():
    epochs = studied.epochs_of(6, collapse=2)
    for each in epochs[::2]:
        each["robust_accuracy"] = None
    assert collapse(epochs) == 3
    for each in epochs:
        del each["robust_accuracy"]
    assert collapse(epochs) is None


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("PGD probe", [0.3, 0.5, 0.31, 0.29], 3),
        ("PGD probe", [0.2, 0.3, 0.4, 0.5], None),
        ("gap", [0.1, 0.19, 0.21, 0.1], 2),
        ("alignment", [0.5, 0.9, 0.46, 0.44], 3),
        ("alignment", [None, 0.9, None, 0.44], 3),
        ("abnormal share", [0.0, 0.11, 0.0, 0.0], 1),
        ("SORA's cosine", [0.9, 0.2, 0.9, 0.9], 1),
        ("SORA's cosine", [-0.05, -0.2, 0.6, 0.5], None),  # half of nothing is no measure
        ("the monitor's alarm", [None, None, "it fell", None], 2),
        ("the monitor's alarm", [None] * 4, None),
    ],
)
def test_a_detector_fires_where_its_rule_says(name, values, expected):
    detector = DETECTORS[name]
    epochs = [{"epoch": i, detector.field: value} for i, value in enumerate(values)]
    assert detector.first(epochs) == expected


def test_detectors_are_judged_by_runs_that_collapse_and_by_others(rng):
    records = [
        studied.record_of(rng, collapse=when, seed=seed, attack="fgsm") for seed, when in enumerate((3, 2, None, None))
    ]
    records += [studied.record_of(rng, seed=seed, attack=a) for seed in range(4) for a in ("pgd", "none")]
    alarmed = next(each for each in records[2]["records"] if each.get("epoch") == 2)
    alarmed["abnormal"] = 0.5
    for each in records[1]["records"]:
        each["alignment"] = 0.8 if "epoch" in each else None
    found = courses(map(result_of, records))
    assert {(each.result.cell.attack, each.result.cell.seed): each.collapse for each in found} == {
        **{("fgsm", seed): when for seed, when in enumerate((3, 2, None, None))},
        **{("pgd", seed): None for seed in range(4)},
    }
    of = {each.name: dataclasses.asdict(each) for each in scores(found)}
    assert "SORA's cosine" not in of
    counts = {
        name: tuple(each[key] for key in ("found", "collapsed", "leads", "false", "sound")) for name, each in of.items()
    }
    assert counts["alignment"] == (1, 2, (1,), 0, 6)
    assert counts["abnormal share"] == (2, 2, (0, 0), 1, 6)
    assert counts["PGD probe"] == counts["gap"] == counts["the monitor's alarm"] == (2, 2, (0, 0), 0, 6)


# ---------------------------------------------------------------------- side by side


def test_attacks_side_by_side_have_the_same_data_sets_and_seeds(rng):
    """FGSM has three seeds, N-FGSM two of them, and one of its runs collapsed; ZeroGrad has one data set alone."""
    records = []
    for data, attack, seed in itertools.product(("a", "b"), ("fgsm", "nfgsm", "fgsm-rs", "pgd"), range(3)):
        if (attack, seed) == ("nfgsm", 0) or (attack, data) == ("fgsm-rs", "b"):
            continue
        collapse = 2 if (data, attack, seed) == ("a", "nfgsm", 1) else 1 if (attack, seed) == ("fgsm", 0) else None
        right = {"data": data, "attack": attack, "seed": seed, "labels": data, "collapse": collapse}
        records.append(studied.record_of(rng, **right))
    results = list(map(result_of, records))
    found = attack_table.table(results, compare(results)[0], times(results), courses(results))
    assert (found.model, found.method) == ("robust-resnet", "full")
    lines = {row[0]: row[1:] for row in found.rows}
    assert lines.keys() == {"FGSM", "N-FGSM"}
    by_key = {(r.cell.data, r.cell.attack, r.cell.seed): r.accuracies["pma"] for r in results}
    for name, attack, fallen in (("FGSM", "fgsm", "0 of 4"), ("N-FGSM", "nfgsm", "1 of 4")):
        means = [by_key[d, attack, s] - by_key[d, "pgd", s] for d in ("a", "b") for s in (1, 2)]
        assert lines[name][1].startswith(f"{points(statistics.mean(means))} (")
        assert lines[name][2] == fallen
    assert found.head[1] == "time / PGD's"
    for each in records:
        each["machine"] = {"device": "a GPU", "sharing": 2} if each["cell"]["attack"] == "nfgsm" else each["machine"]
    results = list(map(result_of, records))
    found = attack_table.table(results, compare(results)[0], times(results), courses(results))
    assert found.head[1] == "time / PGD's, by the cost model"
    assert {row[1] for row in found.rows} == {f"{5 / 17:.2f}"}
    slow = [each for each in results if each.cell.attack in ("pgd", "fgsm")]
    assert attack_table.table(slow, compare(slow)[0], times(slow), courses(slow)) is None


# ---------------------------------------------------------------------- time


def test_times_are_ratios_to_the_same_row_on_the_same_machine(rng):
    records = [studied.record_of(rng, seed=s, attack=a) for s in range(3) for a in ("none", "fgsm", "pgd")]
    for each in records:
        each["train_cpu_s"] = {"none": 2.0, "fgsm": 3.0, "pgd": 10.0}[each["cell"]["attack"]] * (
            1 + each["cell"]["seed"]
        )
    records[1]["machine"] = records[1]["machine"] | {"threads": 2}  # FGSM's run at seed 0
    records[1]["train_cpu_s"] = 1.0
    found = {each.attack: each for each in times(map(result_of, records))}
    fgsm = found["fgsm"]
    assert (fgsm.to_pgd, fgsm.to_none, fgsm.pairs) == (pytest.approx(0.3), pytest.approx(1.5), 2)
    assert (fgsm.predicted_to_pgd, fgsm.predicted_to_none) == (pytest.approx(5 / 17), pytest.approx(5 / 3))
    for each in records:
        each["machine"] = each["machine"] | {"device": "a GPU"}  # there CPU time does not count, as the CPU waits
    for sharing, pairs in (({}, 0), ({"sharing": 12}, 0), ({"sharing": 1}, 2)):  # and cells wait for each other
        for each in records:
            each["machine"] = each["machine"] | sharing
        assert {each.attack: each for each in times(map(result_of, records))}["fgsm"].pairs == pairs
    two = {**records[0]["machine"], "before": [{"device": "cpu"}]}  # the run was cut and ended on another machine
    assert times(map(result_of, [each | {"machine": two} for each in records[-2:]]))[0].to_pgd is None
    gpu = {each.attack: each for each in times(map(result_of, records))}["fgsm"]
    assert gpu.to_pgd == pytest.approx(17 / 58)
    assert times(map(result_of, records[1:2]))[0].to_pgd is None


def test_times_are_to_cells_with_the_same_settings_and_of_one_model(rng):
    seconds = {"none": 2.0, "fgsm": 3.0, "none-crops": 4.0, "fgsm-crops": 5.0}
    records = []
    for (attack, each), model in itertools.product(seconds.items(), ("robust-resnet", "conv")):
        record = studied.record_of(rng, attack=attack.removesuffix("-crops"), model=model)
        record["cell"]["attack"] = attack
        record["settings"] |= {"trained_with": attack.removesuffix("-crops"), "augment": attack.endswith("-crops")}
        record["train_cpu_s"] = each if model == "conv" or attack.startswith("none") else 2 * each
        records.append(record)
    found = {(each.model, each.attack): each.to_none for each in times(map(result_of, records))}
    assert found == pytest.approx(
        {(model, name): 1.0 for model in ("robust-resnet", "conv") for name in ("none", "none-crops")}
        | {("conv", "fgsm"): 1.5, ("conv", "fgsm-crops"): 1.25}
        | {("robust-resnet", "fgsm"): 3.0, ("robust-resnet", "fgsm-crops"): 2.5}
    )


def test_a_row_is_all_but_attack_and_seed(rng):
    record = studied.record_of(rng, classes="0-3", eps=4.0)
    difference = compare([result_of(record), result_of(studied.record_of(rng, classes="0-3", eps=4.0, attack="pgd"))])
    assert difference[0][0].row == Row("eurosat", "0-3", "robust-resnet", "full", 4.0)
