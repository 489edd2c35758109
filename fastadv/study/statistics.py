"""The difference in accuracy between models trained with some attack and models trained with PGD, and its interval.

A difference is the first model's accuracy minus the second's, as a share: 0.02 is two points. It is computed image by
image. Both models have the same seed, and the same attack judges them from the same random starts. Only the training
attack should differ; where another setting does, such as the number of epochs, `Difference.unlike` names it.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadv._extras import require
from fastadv.study.grid import OF_THE_ATTACK, SCRATCH, differences
from fastadv.study.partners import DEFAULTS, pgd_of
from fastadv.study.results import Result, Row, row_of
from fastadv.study.together import LATER, settings_of
from fastadv.study.words import distinct

DRAWS = 10_000
MADE_BY = ("device", "cpu", "threads", "fastadv", "torch", "python")  # facts of a machine, and what runs there
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The difference between the cells of one row that were trained with `attack` and those trained with PGD.

    Attributes:
        row: what the cells have in common.
        attack: the training attack of the first cells.
        judge: the attack that judges both.
        seeds: the seeds that both have.
        verdicts: int8 (seeds, images): 1 where `judge` fools the second cell's model alone, -1 where it fools the first
            one's alone, else 0.
        mean: the mean of the verdicts, in [-1, 1].
        low: the lower bound of the mean's 95 % interval.
        high: the upper bound of that interval.
        reference: the share of the images on which the second cells are right under `judge`: where it is next to
            nothing, a difference cannot be large.
        robust: whether PGD's models are: a model that is not tells nothing, and hides what the first one lacks.
        unlike: {setting: both values, such as "30 and 40"}, for each setting that differs and is not the attack's own.
        images: a digest of the test images.
    """

    row: Row
    attack: str
    judge: str
    seeds: tuple[int, ...]
    verdicts: npt.NDArray[np.int8]
    mean: float
    low: float
    high: float
    reference: float
    robust: bool
    unlike: dict[str, str]
    images: str


@dataclass(frozen=True)
class Average:
    """The mean difference over the data sets, of one method or of the mean of several.

    Attributes:
        model: the name of the model.
        methods: the methods that every data set has.
        attack: the training attack that is compared with PGD.
        judge: the attack that judges.
        eps: the budget in units of 1/255.
        data_sets: the number of data sets.
        seeds: the most seeds that a method has on a data set.
        least_seeds: the fewest.
        mean: the mean over the data sets, a share in [-1, 1].
        low: the lower bound of the mean's 95 % interval: for several data sets Student's interval of their means, for
            one data set from the bootstrap over its seeds and images.
        high: the upper bound of that interval.
        reference: the mean of the differences' own.
    """

    model: str
    methods: tuple[str, ...]
    attack: str
    judge: str
    eps: float
    data_sets: int
    seeds: int
    least_seeds: int
    mean: float
    low: float
    high: float
    reference: float


def paired(first: Sequence[Result], second: Sequence[Result], judge: str) -> npt.NDArray[np.int8]:
    """The verdicts of the first cells minus those of the second, seed by seed and image by image.

    Args:
        first: cells of one row, one for each seed.
        second: the cells to compare with, in the same order of seeds.
        judge: the attack whose verdicts are compared.

    Returns:
        int8 (seeds, images): 1, 0 or -1.

    Raises:
        ValueError: the cells are no pairs. They have different rows or seeds, or were judged on different images.
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


def compare(results: Iterable[Result], reference: str | None = None) -> tuple[list[Difference], list[str]]:
    """All differences to the cells that were trained with `reference`.

    Args:
        results: the finished cells.
        reference: the training attack to compare with, by its name in the grid; None: PGD, as `pgd_of` finds it.

    Returns:
        The differences, in the order of `results`; and a sentence for each row that cannot be compared.
    """
    rows: dict[Row, dict[str, dict[int, Result]]] = {}
    for each in results:
        rows.setdefault(row_of(each), {}).setdefault(each.cell.attack, {})[each.cell.seed] = each
    found, refused = [], []
    for row, attacks in rows.items():
        other = reference or pgd_of([each for cells in attacks.values() for each in cells.values()])
        if other is None or other not in attacks:
            continue
        for attack, cells in attacks.items():
            if attack == other or any(each.attack == "none" for each in cells.values()):
                continue
            try:
                found += list(_differences(row, attack, cells, attacks[other]))
            except ValueError as error:
                refused.append(str(error))
    return found, refused


def bootstrap(
    differences: npt.NDArray[Any], seed: int, draws: int = DRAWS, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of the mean over all seeds and all images.

    All seeds judge the same images, so the design is crossed: d = mean + seed + image + rest. Each of the `draws` draws
    adds two parts to the mean.

    - The images' part is an ordinary bootstrap: columns are drawn with replacement. Their deviation from the mean is
      multiplied by sqrt(1 - MS_rest / MS_image). So the rest counts once, with the seeds.
    - The seeds' part is t sqrt(MS_seed / (seeds images)). Here t is Student's with (seeds - 1) / sqrt(r) degrees of
      freedom, and r is the seeds' share of the estimated variance. Seeds cannot be drawn like images: with three of
      them even the widest percentile interval, [least, greatest], covers only 75 %. With one seed this part is left
      out, and the interval says nothing of other seeds.

    Coverage at level 0.95, by normal theory, whatever the shares of the variance:

        degrees of freedom                              three seeds or more     two seeds
        (seeds - 1) / sqrt(r), as here                  93.9 to 95.7 %          90.9 to 95.8 %
        seeds - 1 (Behrens and Fisher)                  up to 97.6 %
        (seeds - 1) / r (Welch and Satterthwaite)       as little as 92.2 %

    Simulated verdicts of three seeds on 512 images gave 93.6 to 96.4 %. The percentile bootstrap of seeds, then images,
    covers 70 to 99 % there.

    Two images are added, one with the difference 1 and one with -1, as in Bonett and Price 2012 ("Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data", J. Educ. Behav. Stat. 37).
    Without them the interval would be too narrow where few verdicts differ, and a point where none does. With them it
    covers more than 97 % where fewer than one verdict in a hundred differs.

    Args:
        differences: (seeds, images) in [-1, 1].
        seed: the seed of the draws; the same seed gives the same interval.
        draws: the number of draws.
        level: the coverage: the share of such intervals that contain the true mean.

    Returns:
        (low, high) in [-1, 1].
    """
    d = _with_sides(differences)
    (seeds, images), columns, mean = d.shape, d.mean(0), d.mean()
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
    own = differences.mean()  # the two images more move the mean: where seeds happen to agree, out of the interval
    return float(min(low, own)), float(max(high, own))


def t_interval(means: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of at least two numbers, clipped to [-1, 1].

    Args:
        means: the numbers.
        level: the coverage, as in `bootstrap`.

    Returns:
        (low, high).

    Raises:
        ImportError: scipy is not installed.
    """
    count, mean = len(means), np.mean(means)
    half = require("scipy.stats").t.ppf((1 + level) / 2, count - 1) * np.std(means, ddof=1) / np.sqrt(count)
    return float(max(mean - half, -1)), float(min(mean + half, 1))


def average(differences: Sequence[Difference], methods: Sequence[str]) -> Average | None:
    """The average over the data sets of the mean over the methods.

    Only methods that every data set has count: with ("full", "lora") on one data set and ("full",) on another, full.
    Of a single data set only seeds that all these methods have count.

    Args:
        differences: differences of one model, attack, judge and eps.
        methods: the methods to average over, in the order in which they are named.

    Returns:
        The average; None where the data sets have no method, or the methods no seed, in common, or were judged on
        different images of one data set.
    """
    differences = [each for each in differences if each.row.method in methods]
    sets: dict[tuple[str, str | None], dict[str, Difference]] = {}
    for each in differences:
        sets.setdefault((each.row.data, each.row.classes), {})[each.row.method] = each
    if not sets:
        return None
    common = [method for method in methods if all(method in of for of in sets.values())]
    if not common or any(len({of[method].images for method in common}) > 1 for of in sets.values()):
        return None
    one, means = differences[0], [float(np.mean([of[method].mean for method in common])) for of in sets.values()]
    seeds = [len(of[method].seeds) for of in sets.values() for method in common]
    facts = (one.row.model, tuple(common), one.attack, one.judge, one.row.eps, len(means), max(seeds), min(seeds))
    reference = float(np.mean([of[method].reference for of in sets.values() for method in common]))
    if len(means) > 1:
        interval = t_interval(means)
        if len(set(means)) == 1:  # by chance: that is no certainty, and seeds and images leave an interval
            low, high = zip(*((of[m].low, of[m].high) for of in sets.values() for m in common), strict=True)
            interval = float(np.mean(low)), float(np.mean(high))
        return Average(*facts, float(np.mean(means)), *interval, reference)
    pooled = of_one_set([next(iter(sets.values()))[method] for method in common])
    return None if pooled is None else Average(*facts, *pooled, reference)


def cut(each: Difference, seeds: Sequence[int]) -> Difference | None:
    """The difference with these seeds alone; None without any. Its interval stays that of all seeds: do not use it."""
    chosen = [i for i, seed in enumerate(each.seeds) if seed in seeds]
    if not chosen:
        return None
    verdicts = each.verdicts[chosen]
    return replace(each, seeds=tuple(each.seeds[i] for i in chosen), verdicts=verdicts, mean=float(verdicts.mean()))


def of_one_set(differences: Sequence[Difference]) -> tuple[float, float, float] | None:
    """The mean of differences on the same test images, and its 95 % interval.

    For each image and seed there is one number: the mean over the differences. Only seeds that all have count.

    Args:
        differences: differences of one data set.

    Returns:
        (mean, low, high); None where the differences have no seed in common, or are of different images.
    """
    if len({each.images for each in differences}) > 1:
        return None
    seeds = sorted(set.intersection(*(set(each.seeds) for each in differences)))
    if not seeds:
        return None
    verdicts = np.mean([each.verdicts[[each.seeds.index(s) for s in seeds]] for each in differences], 0)
    interval = bootstrap(verdicts, _number(*((each.row, each.attack, each.judge) for each in differences)))
    return float(verdicts.mean()), *interval


def averages(differences: Iterable[Difference]) -> list[Average]:
    """All averages over data sets.

    For each model, attack, judge and eps there is one for each method, and one for the mean over the methods that start
    from pretrained weights, if there are several. The mean leaves out methods that have fewer seeds than others have:
    their chance would weigh as much as what the others know better.
    """
    found = []
    for _, alike in itertools.groupby(sorted(differences, key=_setting), _setting):
        group = list(alike)
        methods = list(dict.fromkeys(each.row.method for each in group))
        found += [average(group, [method]) for method in methods]
        of_all = average(group, _best_known(group))
        found += [of_all] if of_all is not None and len(of_all.methods) > 1 else []
    return [each for each in found if each is not None]


# ---------------------------------------------------------------------- parts


def _best_known(group: Sequence[Difference]) -> list[str]:
    """The methods that start from pretrained weights, and have as many seeds as any of them on some data set."""
    seeds: dict[str, int] = {}
    for each in group:
        if each.row.method != SCRATCH:
            seeds[each.row.method] = max(len(each.seeds), seeds.get(each.row.method, 0))
    return [method for method, count in seeds.items() if count == max(seeds.values())]


def _differences(row: Row, attack: str, first: dict[int, Result], second: dict[int, Result]) -> Iterable[Difference]:
    for cells in (first, second):
        one, *others = ((each.cell.id, settings_of(each.cell, each.settings)) for each in cells.values())
        for id, settings in others:
            if other := differences(one[1], settings):
                raise ValueError(f"the seeds {one[0]} and {id} differ in {other}: they are not compared")
    for judge in dict.fromkeys(judge for each in first.values() for judge in each.verdicts):
        both = [s for s in sorted(first.keys() & second.keys()) if _judged(judge, first[s], second[s])]
        if both:
            verdicts = paired([first[s] for s in both], [second[s] for s in both], judge)
            low, high = bootstrap(verdicts, _number((row, attack, judge)))
            mean, unlike = float(verdicts.mean()), _unlike([(first[s], second[s]) for s in both])
            reference = float(np.mean([second[s].verdicts[judge].mean() for s in both]))
            robust, images = all(second[s].robust for s in both), first[both[0]].record["labels"]
            about = (row, attack, judge, tuple(both), verdicts, mean, low, high)
            yield Difference(*about, reference, robust, unlike, images)


def _unlike(pairs: Iterable[tuple[Result, Result]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for a, b in pairs:
        found |= _made_unlike(a, b)
        one, other = a.settings, b.settings
        for name in one.keys() | other.keys():
            untold = name in LATER and (name not in one or name not in other)
            if name not in OF_THE_ATTACK and not untold and one.get(name) != other.get(name):
                values = (str(each.get(name))[:20] for each in (one, other))  # 20 characters tell two digests apart
                found[name] = " and ".join(values)
        for name, usual in DEFAULTS.items():
            if other[name] != usual and a.attack != b.attack:
                found[f"{name} of {b.cell.attack}"] = f"{other[name]}, not the default"
    return dict(sorted(found.items()))


def _made_unlike(a: Result, b: Result) -> dict[str, str]:
    """{fact: both values} of what two cells were made by and differ in."""
    one, other = _made(a), _made(b)
    return {name: f"{value} and {other[name]}" for name, value in one.items() if value != other[name]}


def _made(result: Result) -> dict[str, str]:
    """By what a cell was made: its last bits depend on the machine, and a version of the source may have had a fault.

    Of a cell that several machines trained, each fact has the values of all of them.
    """
    machine = result.record["machine"]
    machines = [*machine.get("before", ()), machine]
    facts = {name: ", then ".join(distinct(str(each.get(name)) for each in machines)) for name in MADE_BY}
    return facts | {"commit": str(result.record.get("commit"))}


def _judged(judge: str, *results: Result) -> bool:
    return all(judge in each.verdicts for each in results)


def _with_sides(differences: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The differences and two images more, see `bootstrap`."""
    sides = np.broadcast_to([1.0, -1.0], (len(differences), 2))
    return np.concatenate([differences, sides], 1)


def _mean_squares(d: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean squares (MS_seed, MS_image, MS_rest) of a two-way layout (seeds, images) without repetition."""
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
    """A seed for draws that follows from `words` alone."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little")


def _setting(each: Difference) -> tuple[str, str, str, float]:
    return each.row.model, each.attack, each.judge, each.row.eps
