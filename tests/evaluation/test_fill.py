"""Slots for which no sample is left take further runs. The verdicts and their cost are counted by hand.

The model is a table that says for each (sample, run, step) whether the iterate fools. The pixels of an iterate are its
sample, run and step.
"""

import random
from collections import Counter
from itertools import count

import pytest
import torch
from attacked import one_thread as one_thread
from cut import Cut
from matplotlib.image import imread
from test_gpu_attacks import SMALL, attack_of, evaluated
from torch import nn

from fastadv.attacks.base import Attack
from fastadv.evaluation import evaluate, queue
from fastadv.evaluation import run as evaluation_run
from fastadv.evaluation.queue import Queue
from fastadv.functional import to_float

# So artificial a model gives these warnings.
TOLD = ("the last", "gradients look masked", "robust accuracy rises", "the gradient is zero")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{told}") for told in TOLD]


class Table(nn.Module):
    """Predicts 1 instead of the label 0 for pixels (sample, run + 1, step) that fool. A clean image has 0 as second."""

    def __init__(self, fools, wrong):
        super().__init__()
        self.fools, self.wrong = fools, wrong

    def forward(self, x):
        sample, run, step = (x[:, :, 0, 0] * 255).round().long().unbind(1)
        step = step.clamp(max=self.fools.shape[2] - 1)  # a slot that has finished goes on until it is refilled
        says = torch.where(
            run == 0, self.wrong[sample], self.fools[sample, (run - 1).clamp(0, self.fools.shape[1] - 1), step]
        ).to(x)
        return 3 * torch.stack((1 - says, says), 1) + x.flatten(1)[:, :2] / 2**10


class Scripted(Attack):
    """An attack that writes run and step into the pixels. It begins with `first` runs and asks for the others later."""

    by_age = True

    def __init__(self, model, runs, steps, first=None):
        super().__init__(model, 1.0, restarts=first or runs)
        self.most, self.steps = runs, steps

    def start(self, slots):
        adv = to_float(slots.x).clone()
        adv[:, 1] = (slots.restart[:, None, None] + 1) / 255
        slots.adv = adv if slots.adv is None else slots.adv.copy_(adv)

    def step(self, slots, grad):
        slots.adv[:, 2] += 1 / 255

    def goes_on(self, falls, images):
        return len(falls) < self.most


class Case:
    """A random table, and the result of a loop by hand on it."""

    def __init__(self, samples=None, runs=None, steps=None, share=None):
        self.n, self.runs = samples or random.randint(1, 12), runs or random.randint(1, 9)
        self.steps = steps or random.randint(1, 4)
        share = random.choice((0, 0.02, 0.1, 0.3)) if share is None else share
        self.fools = torch.rand(self.n, self.runs, self.steps + 1) < share
        # Misclassified images, which are not attacked, allow for more slots than samples.
        self.wrong = torch.arange(80) >= self.n
        fillers = torch.zeros(80 - self.n, *self.fools.shape[1:], dtype=torch.bool)
        self.model = Table(torch.cat((self.fools, fillers)), self.wrong)
        images = torch.zeros(80, 3, 1, 1, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(80)
        self.data = images, torch.zeros(80, dtype=torch.int64)

    def evaluate(self, slots, first=None, **options):
        attack = Scripted(self.model, self.runs, self.steps, first)
        return evaluate(self.model, self.data, attack, batch_size=slots, progress=False, **options)["attacks"][0]

    def falls(self, sample, run, last):
        """The step at which a run fools the sample, or None."""
        found = [k for k in range(self.steps + 1) if self.fools[sample, run, k] and (k == self.steps or not last)]
        return found[0] if found else None

    def plain(self, last=False):
        """([(restart, step) of each sample, or None if it is not fooled], gradients with a fixed number of slots)."""
        found, passes = [], 0
        for sample in range(self.n):
            falls = [(run, self.falls(sample, run, last)) for run in range(self.runs)]
            first = next((i for i, (_, step) in enumerate(falls) if step is not None), None)
            found.append(None if first is None else falls[first])
            begun = falls if first is None else falls[: first + 1]
            passes += sum(self.steps + 1 if step is None else step + 1 for _, step in begun)
        return found + [None] * (80 - self.n), passes

    def filled(self, slots, last=False):
        """(turns, gradients, wasted gradients) where each free slot takes the next run."""
        waiting = [(run, sample) for run in range(self.runs) for sample in range(self.n)]
        best, under_way, taken, turns = dict.fromkeys(range(self.n), self.runs), {}, Counter(), 0
        while True:
            under_way = {each: step for each, step in under_way.items() if each[0] < best[each[1]]}
            waiting = [each for each in waiting if each[0] < best[each[1]]]
            while waiting and len(under_way) < slots:
                under_way[waiting.pop(0)] = 0
            if not under_way:
                break
            turns += 1
            for (run, sample), step in list(under_way.items()):
                taken[run, sample] += 1
                under_way[run, sample] += 1
                fell = self.falls(sample, run, last) == step
                if fell:
                    best[sample] = min(best[sample], run)
                if fell or step == self.steps:
                    del under_way[run, sample]
        waste = sum(passes for (run, sample), passes in taken.items() if run > best[sample])
        return turns, sum(taken.values()), waste

    def images(self, last=False):
        """[sample, run + 1, step] of the iterate that fooled each attacked sample, or of its last iterate."""
        found, _ = self.plain(last)
        ends = [each or (self.runs - 1, self.steps) for each in found[: self.n]]
        return [[sample, run + 1, step] for sample, (run, step) in enumerate(ends)]


def verdicts(result):
    columns = (result[key] for key in ("fooled", "restart", "step"))
    return [(r, s) if fooled else None for fooled, r, s in zip(*columns, strict=True)]


def saved(folder):
    return [(imread(file)[0, 0] * 255).round().astype(int).tolist() for file in sorted(folder.rglob("*.png"))]


@pytest.fixture
def turns(monkeypatch):
    """A list that gets an entry in each iteration, with a fixed number of slots as on a GPU."""
    seen, iterate = [], Queue.iterate
    monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    monkeypatch.setattr(Queue, "iterate", lambda self: seen.append(1) or iterate(self))
    return seen


# The verdict and the work


@pytest.mark.parametrize("iterate", ["any", "last"])
@pytest.mark.parametrize("case", range(20))
def test_the_verdict_is_the_plain_loops_and_the_work_as_counted_by_hand(turns, tmp_path, case, iterate):
    case, slots, last = Case(), random.randint(1, 64), iterate == "last"
    found = case.evaluate(slots, iterate=iterate, save_images=tmp_path)
    expected, plain = case.plain(last)
    assert verdicts(found) == expected
    assert found["passes"] == found["forwards"]
    assert (len(turns), found["passes"], found["waste"]) == case.filled(slots, last)
    assert found["passes"] - found["waste"] == plain
    assert saved(tmp_path) == case.images(last)


@pytest.mark.parametrize(("survivors", "runs", "slots", "rounds"), [(3, 9, 27, 1), (3, 9, 26, 2), (2, 5, 64, 1)])
def test_all_runs_of_few_survivors_take_the_time_of_one(turns, survivors, runs, slots, rounds):
    case = Case(survivors, runs, 4, share=0)
    found = case.evaluate(slots)
    assert len(turns) == rounds * 5
    assert (found["passes"], found["waste"]) == (survivors * runs * 5, 0)


def test_a_run_that_comes_earlier_goes_on_and_the_later_ones_are_stopped(turns):
    """Run 2 fools at step 0, run 1 at step 3, run 0 not at all; runs 3 and 4 are stopped after a step."""
    case = Case(1, 5, 4, share=0)
    case.fools[0, 2, 0] = case.fools[0, 1, 3] = True
    case.model.fools[:1] = case.fools
    found = case.evaluate(64)
    assert verdicts(found)[0] == (1, 3)
    assert found["waste"] == 1 + 1 + 1
    assert found["passes"] == 5 + 4 + found["waste"]
    assert len(turns) == 5


@pytest.mark.parametrize("case", range(6))
def test_on_the_cpu_nothing_is_wasted(case):
    case, slots = Case(), random.randint(1, 64)
    found = case.evaluate(slots)
    expected, plain = case.plain()
    assert verdicts(found) == expected
    assert (found["forwards"], found["waste"]) == (plain, 0)


@pytest.mark.parametrize("case", range(6))
def test_without_gradients_the_waste_is_of_the_forward_passes(turns, monkeypatch, case):
    monkeypatch.setattr(Scripted, "by_gradient", False)
    case, slots = Case(share=0.1), random.randint(1, 64)
    found = case.evaluate(slots)
    assert (found["passes"], found["forwards"], found["waste"]) == (0, *case.filled(slots)[1:])


# Windows, a host that is ahead, runs that an attack asks for later


@pytest.mark.parametrize("pool", [1, 3, 8])
@pytest.mark.parametrize("case", range(4))
def test_windows_leave_the_verdict(turns, tmp_path, case, pool):
    case = Case()
    found = case.evaluate(random.randint(1, 64), pool=pool, save_images=tmp_path)
    expected, plain = case.plain()
    assert verdicts(found) == expected
    assert found["passes"] - found["waste"] == plain
    assert saved(tmp_path) == case.images()


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("case", range(4))
def test_a_host_that_is_ahead_leaves_the_verdict(turns, tmp_path, monkeypatch, case, lag):
    told = []

    def late(self, turn, numbers):
        told.append(numbers.tolist())
        return (turn - lag, told[turn - lag - 1]) if turn > lag else (0, [0, 0, 0, 0])

    monkeypatch.setattr(queue._Pilot, "read", late)
    case = Case()
    found = case.evaluate(random.randint(1, 64), save_images=tmp_path)
    expected, plain = case.plain()
    assert verdicts(found) == expected
    assert found["passes"] - found["waste"] == plain
    assert saved(tmp_path) == case.images()


@pytest.mark.parametrize("case", range(6))
def test_runs_that_an_attack_asks_for_later_are_not_begun_before(turns, tmp_path, case):
    case = Case(runs=random.randint(3, 9))
    found = case.evaluate(64, first=2, save_images=tmp_path)
    expected, plain = case.plain()
    assert verdicts(found) == expected
    assert found["passes"] - found["waste"] == plain
    assert saved(tmp_path) == case.images()
    began = case.n * 2 * (case.steps + 1)
    assert found["waste"] <= began  # only the second run can be waste: each later run is asked for after the one before


# Cut and continued


@pytest.mark.parametrize("pool", [None, 4])
@pytest.mark.parametrize("case", range(8))
def test_a_run_that_was_cut_goes_on_with_the_same_result(turns, tmp_path, monkeypatch, case, pool):
    """In some cases a later run has fooled before the cut, while earlier runs have not ended."""
    monkeypatch.setattr(evaluation_run, "SAVE_EVERY", 0)
    case, slots, iterate, number = Case(), random.randint(1, 64), Queue.iterate, count()
    whole = case.evaluate(slots, pool=pool)
    cut = random.randrange(len(turns))

    def fatal(self):
        if next(number) == cut:
            raise Cut
        iterate(self)

    monkeypatch.setattr(Queue, "iterate", fatal)
    options = {"pool": pool, "state": tmp_path / "state", "save_images": tmp_path / "images"}
    with pytest.raises(Cut):
        case.evaluate(slots, **options)
    again = case.evaluate(slots, **options)
    assert verdicts(again) == verdicts(whole) == case.plain()[0]
    assert saved(tmp_path) == case.images()


# Attacks as they are


@pytest.mark.parametrize("name", ["pgd", "pma", "apgd-t", "fab-t", "square"])
def test_attacks_find_what_they_find_in_plain_order(monkeypatch, tmp_path, name):
    def found(folder, batch_size):
        several = {} if name in ("pma", "apgd-t", "fab-t") else {"restarts": 2}
        report = evaluated(
            "cpu",
            lambda there: [attack_of(name, there, SMALL, **several)],
            batch_size=batch_size,
            save_images=tmp_path / folder,
        )
        result = report["attacks"][0]
        files = {file.name: file.read_bytes() for file in (tmp_path / folder).rglob("*.png")}
        return [result.get(key) for key in ("fooled", "restart", "step", "target", "runs")], files, result

    *here, _ = found("rows", 7)
    monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    for batch_size in (7, 48):
        *there, result = found(f"{batch_size}", batch_size)
        assert there == here
    assert result["waste"] > 0 or name in ("fab-t", "square")
