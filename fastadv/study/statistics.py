"""The differences between models trained with another attack and models trained with PGD, and how sure they are.

All differences are of shares in [0, 1], the first's minus the second's, image by image: both models have one seed, are
judged by the same attack from the same random starts, and everything but the training attack is the same. Where their
settings differ all the same, as in how many epochs they have, that is said beside the difference.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadv._extras import require
from fastadv.study.grid import OF_THE_ATTACK, SCRATCH
from fastadv.study.results import PGD, Result, Row, row_of

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The difference between the cells of one row that were trained with `attack` and those trained with PGD.

    Attributes:
        row: what the cells have in common.
        attack: of the first ones' training.
        judge: the attack that judges both.
        seeds: that both have.
        verdicts: int8 (seeds, images): 1 where only the first's model withstands `judge`, -1 where only the second's.
        mean: of the verdicts.
        low: the lower bound of the mean's interval.
        high: the upper bound.
        unlike: {name of a setting: both values, in words}, of the settings that differ and are not the attack's own.
    """

    row: Row
    attack: str
    judge: str
    seeds: tuple[int, ...]
    verdicts: npt.NDArray[np.int8]
    mean: float
    low: float
    high: float
    unlike: dict[str, str]


@dataclass(frozen=True)
class Average:
    """The mean difference over the data sets, of one method or of the mean of several.

    Attributes:
        model: of the cells.
        methods: those that all of the data sets have.
        attack: of the training.
        judge: the attack that judges.
        eps: in units of 1/255.
        data_sets: how many.
        mean: over the data sets.
        low: the lower bound of the t interval over data sets, which is never narrower than the data sets' own intervals
            leave it; of one data set the bound of the bootstrap over its seeds and images.
        high: the upper bound, likewise.
    """

    model: str
    methods: tuple[str, ...]
    attack: str
    judge: str
    eps: float
    data_sets: int
    mean: float
    low: float
    high: float


def paired(first: Sequence[Result], second: Sequence[Result], judge: str) -> npt.NDArray[np.int8]:
    """The first's verdicts minus the second's, seed by seed and image by image: int8 (seeds, images).

    Raises:
        ValueError: they are no pairs: of different rows or seeds, or judged on different images.
    """
    pairs = list(zip(first, second, strict=True))
    if not pairs:
        raise ValueError("there are no pairs of cells")
    if any(row_of(a) != row_of(b) or a.cell.seed != b.cell.seed for a, b in pairs):
        raise ValueError("cells are paired that differ in more than the training attack")
    one, *others = (*first, *second)
    other = next((each for each in others if _judged_on(each, judge) != _judged_on(one, judge)), None)
    if other is not None:
        raise ValueError(
            f"the cells {one.cell.id} and {other.cell.id} were judged on different images: their verdicts are no "
            "pairs. Run one of them again with the images of the other"
        )
    return np.stack([a.verdicts[judge].astype(np.int8) - b.verdicts[judge] for a, b in pairs])


def compare(results: Iterable[Result], reference: str = PGD) -> tuple[list[Difference], list[str]]:
    """All differences to the cells trained with `reference`, in the order of `results`; why others are not there."""
    rows: dict[Row, dict[str, dict[int, Result]]] = {}
    for each in results:
        rows.setdefault(row_of(each), {}).setdefault(each.cell.attack, {})[each.cell.seed] = each
    found, refused = [], []
    for row, attacks in rows.items():
        for attack, cells in attacks.items() if reference in attacks else ():
            if attack == reference or any(each.attack == "none" for each in cells.values()):
                continue
            try:
                found += list(_differences(row, attack, cells, attacks[reference]))
            except ValueError as error:
                refused.append(str(error))
    return found, refused


def bootstrap(
    differences: npt.NDArray[Any], seed: int, draws: int = DRAWS, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of the mean over all seeds and all images, from `draws` draws of seeds, then of images.

    An image is one unit over the seeds: the design is crossed, d = mean + seed + image + rest. The images' part is an
    ordinary bootstrap: columns are drawn, and their means' deviations shrunk by sqrt(1 - MS_rest / MS_image), so that
    the rest counts once, with the seeds. Seeds cannot be drawn so: of three the widest percentile interval, [least,
    greatest], covers 75 %. Their part of a draw is t sqrt(MS_seed / (seeds images)), t Student's with (seeds - 1) /
    sqrt(r) degrees of freedom, r the seeds' share of the estimated variance. With r left out this is Behrens' and
    Fisher's interval, which covers up to 97.6 % with three seeds; with r in place of its root Welch's and
    Satterthwaite's, as little as 92.2 %. With the root it covers 93.9 to 95.7 % with three seeds or more, whatever the
    shares of the variance, and 90.9 to 95.8 % with two, by normal theory; of verdicts on 512 images, simulated, 93.6 to
    96.4 % with three. (The percentile bootstrap of seeds, then images covers from 70 to 99 % with three.) With one seed
    it is of the images alone.

    Two images are added, one for each side, as Bonett and Price 2012 do ("Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data", J. Educ. Behav. Stat. 37): where hardly a verdict differs
    it would cover too little, and nothing at all where none does. Where fewer than one in a hundred differ, it covers
    more than 97 %.

    Args:
        differences: (seeds, images) in [-1, 1].
        seed: of the draws; the same gives the same interval.
        draws: how many.
        level: the share of intervals that are to have the mean.

    Returns:
        (low, high) in [-1, 1].
    """
    seeds, _ = differences.shape
    sides = np.broadcast_to([1.0, -1.0], (seeds, 2))
    d = np.concatenate([differences, sides], 1)
    images, columns, mean = d.shape[1], d.mean(0), d.mean()
    generator = np.random.default_rng(seed)
    values, counts = np.unique(columns, return_counts=True)
    drawn = generator.multinomial(images, counts / images, size=draws) @ values / images - mean
    if seeds > 1:
        of_seed, of_image, rest = _mean_squares(d)
        of_images = max(of_image - rest, 0.0)
        drawn *= np.sqrt(of_images / of_image)
        if of_seed > 0:
            share = of_seed / (of_seed + of_images)
            t = generator.standard_t((seeds - 1) / np.sqrt(share), draws)
            drawn += t * np.sqrt(of_seed / (seeds * images))
    low, high = np.quantile(mean + drawn, [(1 - level) / 2, (1 + level) / 2]).clip(-1, 1)
    return float(low), float(high)


def t_interval(means: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of at least two numbers, clipped to [-1, 1]."""
    count, mean = len(means), np.mean(means)
    half = require("scipy.stats").t.ppf((1 + level) / 2, count - 1) * np.std(means, ddof=1) / np.sqrt(count)
    return float(max(mean - half, -1)), float(min(mean + half, 1))


def average(differences: Sequence[Difference], methods: Sequence[str]) -> Average | None:
    """Over the data sets, of the mean of those of `methods` that all data sets have; None where there is no such.

    Of one data set it is over the seeds that all these methods have; None where there is no such either.

    Args:
        differences: of one model, attack, judge and eps.
        methods: in the order in which they are to be named.
    """
    differences = [each for each in differences if each.row.method in methods]
    sets: dict[tuple[str, str | None], dict[str, Difference]] = {}
    for each in differences:
        sets.setdefault((each.row.data, each.row.classes), {})[each.row.method] = each
    if not sets:
        return None
    common = [method for method in methods if all(method in of for of in sets.values())]
    if not common:
        return None
    one, means = differences[0], [float(np.mean([of[method].mean for method in common])) for of in sets.values()]
    facts = (one.row.model, tuple(common), one.attack, one.judge, one.row.eps, len(means))
    if len(means) > 1:
        return Average(
            *facts, float(np.mean(means)), *_over_sets(means, [[of[m] for m in common] for of in sets.values()])
        )
    of_one = [next(iter(sets.values()))[method] for method in common]
    seeds = sorted(set.intersection(*(set(each.seeds) for each in of_one)))
    if not seeds:
        return None
    # For each image and seed one number: the mean over the methods' models.
    verdicts = np.mean([each.verdicts[[each.seeds.index(s) for s in seeds]] for each in of_one], 0)
    interval = bootstrap(verdicts, _number(*((each.row, each.attack, each.judge) for each in of_one)))
    return Average(*facts, float(verdicts.mean()), *interval)


def _over_sets(means: Sequence[float], sets: Sequence[Sequence[Difference]]) -> tuple[float, float]:
    """Student's interval, or where the sets' means happen to lie close together, of the same centre the one that the
    rows' own intervals leave: as if a set's methods erred alike, and the sets each on its own."""
    low, high = t_interval(means)
    within = [np.mean([(each.high - each.low) / 2 for each in rows]) for rows in sets]
    mean, half = np.mean(means), np.linalg.norm(within) / len(sets)
    return float(max(min(low, mean - half), -1)), float(min(max(high, mean + half), 1))


def averages(differences: Iterable[Difference]) -> list[Average]:
    """For each model, attack, judge and eps: of each method, and of the mean of those that transfer, if several do."""
    found = []
    for _, alike in itertools.groupby(sorted(differences, key=_setting), _setting):
        group = list(alike)
        methods = list(dict.fromkeys(each.row.method for each in group))
        found += [average(group, [method]) for method in methods]
        of_all = average(group, [method for method in methods if method != SCRATCH])
        found += [of_all] if of_all is not None and len(of_all.methods) > 1 else []
    return [each for each in found if each is not None]


# ---------------------------------------------------------------------- parts


def _differences(row: Row, attack: str, first: dict[int, Result], second: dict[int, Result]) -> Iterable[Difference]:
    for judge in dict.fromkeys(judge for each in first.values() for judge in each.verdicts):
        both = [s for s in sorted(first.keys() & second.keys()) if _judged(judge, first[s], second[s])]
        if both:
            verdicts = paired([first[s] for s in both], [second[s] for s in both], judge)
            low, high = bootstrap(verdicts, _number((row, attack, judge)))
            mean, unlike = float(verdicts.mean()), _unlike([(first[s], second[s]) for s in both])
            yield Difference(row, attack, judge, tuple(both), verdicts, mean, low, high, unlike)


def _unlike(pairs: Iterable[tuple[Result, Result]]) -> dict[str, str]:
    found = {}
    for a, b in pairs:
        one, other = a.settings, b.settings
        for name in one.keys() | other.keys():
            if name not in OF_THE_ATTACK and one.get(name) != other.get(name):
                found[name] = f"{str(one.get(name))[:20]} and {str(other.get(name))[:20]}"  # of a digest enough
    return dict(sorted(found.items()))


def _judged(judge: str, *results: Result) -> bool:
    return all(judge in each.verdicts for each in results)


def _mean_squares(d: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Of seeds, images and the rest, of a two-way layout (seeds, images) without repetition."""
    (seeds, images), mean = d.shape, d.mean()
    of_seeds, of_images = d.mean(1) - mean, d.mean(0) - mean
    rest = d - mean - of_seeds[:, None] - of_images
    return (
        images * (of_seeds**2).sum() / (seeds - 1),
        seeds * (of_images**2).sum() / (images - 1),
        (rest**2).sum() / ((seeds - 1) * (images - 1)),
    )


def _judged_on(result: Result, judge: str) -> tuple[str, int]:
    return result.record["labels"], len(result.verdicts[judge])


def _number(*words: object) -> int:
    """The seed of a row's draws."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little")


def _setting(each: Difference) -> tuple[str, str, str, float]:
    return each.row.model, each.attack, each.judge, each.row.eps
