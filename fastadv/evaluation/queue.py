"""The evaluation's queue: a slot whose image is fooled or finished takes the next one, all of it on the device."""

from collections.abc import Callable, Iterator
from itertools import count

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.engine import Engine, Slots, concatenated
from fastadv.attacks.samplewise import per_sample
from fastadv.attacks.verdicts import NONE, verdict
from fastadv.functional import sample_seeds
from fastadv.ops.autograd import result_like

LAG = 2  # the host may be so many iterations ahead of a GPU


class Verdicts:
    """The verdict on each sample so far. A cut evaluation is resumed from it alone.

    Args:
        todo: bool (N,), whether a sample is attacked at all.
        restarts: the number of runs for each sample.

    Attributes:
        restart: int64 (N,), the number of runs that did not fool the sample.
        step: int64 (N,), the step of run `restart` at which it was fooled; -1 where it was not.
        said: int64 (N,), the prediction for the image that fooled, as `verdict` returns it.
        passes: the number of gradients for slots with a sample.
        forwards: the number of forward passes for such slots.
        nonfinite: the number of their losses that were not finite.
        waste: the gradients of runs after the one that fooled; for an attack without gradients, the forward passes.
    """

    COUNTS = ("passes", "forwards", "nonfinite", "waste")
    SAVED = ("restart", "step", "said")  # the tensors in a state on the disk, beside the counts

    def __init__(self, todo: torch.Tensor, restarts: int):
        self.todo, self.restarts = todo, restarts
        self.restart = torch.zeros_like(todo, dtype=torch.int64)
        self.step = torch.full_like(self.restart, -1)
        self.said = torch.zeros_like(self.restart)
        self.passes = self.forwards = self.nonfinite = self.waste = 0

    @property
    def fooled(self) -> torch.Tensor:
        """Which samples are fooled, bool (N,)."""
        return self.step >= 0

    @property
    def silenced(self) -> torch.Tensor:
        """Which samples are fooled by an image without a prediction, bool (N,)."""
        return self.fooled & (self.said == NONE)

    @property
    def unsettled(self) -> torch.Tensor:
        """Which samples have a run left, bool (N,)."""
        return self.todo & ~self.fooled & (self.restart < self.restarts)

    @property
    def falls(self) -> list[int]:
        """How many samples each run fooled."""
        counts: list[int] = self.restart[self.fooled].bincount(minlength=self.restarts).tolist()
        return counts

    @property
    def restarts_left(self) -> int:
        """The largest number of runs that are still to come, of all samples together."""
        return int(((self.restarts - self.restart) * self.unsettled).sum())

    def part(self, rows: torch.Tensor, restarts: int) -> "Verdicts":
        """A copy of the verdicts on the samples `rows` (n,), with runs up to `restarts`; `take` copies it back."""
        part = Verdicts(self.todo[rows], restarts)
        part.restart, part.step, part.said = self.restart[rows], self.step[rows], self.said[rows]
        part.count_on(self)
        return part

    def take(self, rows: torch.Tensor, part: "Verdicts") -> None:
        """Copy back the verdicts on the samples `rows` (n,), which `part` returned."""
        self.restart[rows], self.step[rows], self.said[rows] = part.restart, part.step, part.said
        self.count_on(part)

    def count_on(self, other: "Verdicts") -> None:
        """Take over the counts of `other`, which continued from these."""
        for name in self.COUNTS:
            setattr(self, name, getattr(other, name))


def takes_one_shape(images: torch.Tensor, attack: Attack) -> bool:
    """Whether the number of slots is fixed."""
    return images.is_cuda or attack.compile or attack.graph


class Queue:
    """Attacks samples in a number of slots, in the order (run, sample).

    For example two slots and three samples, with one run of four iterations each; sample 0 is fooled in its second
    iteration:

        slot 0   0  0  2  2  2  2
        slot 1   1  1  1  1

    An iteration is a gradient, a verdict and a step in every slot. After an iteration in which runs have ended, their
    verdicts are booked and their slots are refilled.

    On a GPU, and for a compiled model, the number of slots is fixed. The model sees one shape, a prefix sum over the
    free slots says which run goes where, and the host, which is up to two iterations ahead, waits for nothing. An image
    that has taken its last step is judged in one more iteration, whose gradient is not used. When no sample waits, free
    slots take further runs of the samples under attack. The verdict is that of the first run that fools. The runs
    before it continue; the runs after it were not needed, and are stopped. All runs that do not fool take the same
    number of iterations. So a sample's runs end in the order in which they began, except for those that fool.

    On the CPU there are as many rows as images under attack, each in one run, and images that have taken their last
    step are judged by a forward pass.

    Args:
        attack: the attack, on a model in the mode in which it is judged.
        images: (N, ...) on the model's device; uint8 images stay uint8.
        labels: (N,), or (N, C) where a sample has several.
        targets: (N, ...), the targets of the attack's loss.
        verdicts: the verdicts on the samples. Samples with runs left are attacked, and their verdicts are updated.
        slots: the number of images under attack at a time.
        classes: the number of the model's classes.
        seed: sample i draws its random numbers from `sample_seeds(seed, numbers[i], run)`.
        numbers: int64 (N,), the numbers of the samples in the whole data set.
        last: whether only the last iterate of a run is judged; else the start and every iterate are.
        keep: called with (rows, iterates, images) of all slots: the row of the sample that a slot has just finished,
            the iterate that fooled or the last one, and the clean image. The row is N where a slot has finished none.
    """

    engine: Engine
    # For each slot, (slots,):
    _sample: torch.Tensor  # the row of its sample; N where it has none
    _run: torch.Tensor  # the number of the sample's run
    _open: torch.Tensor  # bool, whether the run continues
    _label: torch.Tensor  # the sample's label
    _expected: torch.Tensor  # the result of `verdict` where the model is right
    _at: torch.Tensor  # the step at which the run ended
    _answer: torch.Tensor  # the prediction there
    _bad: torch.Tensor  # the number of the run's losses that were not finite
    _final: torch.Tensor  # (slots, ...), the iterate with which the run ended, where `keep` is given

    def __init__(
        self,
        attack: Attack,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor,
        verdicts: Verdicts,
        *,
        slots: int,
        classes: int,
        seed: int,
        numbers: torch.Tensor,
        last: bool = False,
        keep: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    ):
        self.attack, self.verdicts = attack, verdicts
        self._images, self._labels, self._targets = images, labels, targets
        self._all_expected = labels if labels.ndim == 1 else labels.new_ones(len(labels), dtype=torch.int64)
        self._classes, self._seed, self._numbers, self._last, self._keep = classes, seed, numbers, last, keep
        self._n, self._slots = len(images), slots
        self._fixed = takes_one_shape(images, attack)
        self._own_forward = attack.compares == "anything"  # until its logits are seen
        none = torch.zeros((), dtype=torch.int64, device=images.device)
        left = verdicts.unsettled
        self._lowest = int(verdicts.restart.where(left, verdicts.restarts).amin())
        # Row N is no sample's: slots that have nothing to write write there.
        self._restart, self._step, self._said = (
            torch.cat((t, t.new_zeros(1))) for t in (verdicts.restart, verdicts.step, verdicts.said)
        )
        self._begun = self._restart.clone()  # runs that have begun, with those that did not fool
        # The first run that fooled, or the number of runs; later runs do not count.
        self._until = torch.cat((left * verdicts.restarts, none[None]))
        self._counts = {name: none + getattr(verdicts, name) for name in Verdicts.COUNTS}
        self._numbers_told = torch.zeros(4, dtype=torch.int64, device=images.device)
        self._pilot = _Pilot(images.device)
        empty = torch.zeros(slots if self._fixed else 0, dtype=torch.int64, device=images.device)
        self._hold(empty + self._n, empty.clone(), empty != 0)
        self._at, self._answer, self._bad = empty.clone(), empty.clone(), empty.clone()
        self._has_engine = self._fixed  # on the CPU it comes with the first samples
        if self._fixed:
            self._make_fixed(torch.zeros_like(empty))
        self.settle()

    # ------------------------------------------------------------------ the loop

    def run(self) -> Iterator[tuple[int, int]]:
        """Run all samples; yields (forward passes so far, the most that are left) in every iteration.

        `verdicts` are up to date after `update()`, and at the end.
        """
        settled = 0
        for turn in count(1):
            known, (pending, unfinished, done, left) = self._pilot.read(turn, self._numbers_told)
            if known and not unfinished:
                break
            if known > settled and pending:
                self.settle()
                settled = turn
                continue
            if known:
                yield done, left
            self.iterate()
        self.update()
        yield self.verdicts.forwards, 0

    def update(self) -> None:
        """Bring `verdicts` up to date. An evaluation that is resumed from them begins the runs in the slots again."""
        self.settle()
        settled = self._restart >= self._until
        self.verdicts.restart, self.verdicts.said = self._restart[:-1].clone(), self._said[:-1].clone()
        self.verdicts.step = self._step.where(settled, -1)[:-1]
        booked = dict(self._counts)
        age = self.engine.slots.age
        self._count(age, age, self._open)
        self._counts["nonfinite"] = self._counts["nonfinite"] + (self._bad * self._open).sum()
        for name, number in self._counts.items():
            setattr(self.verdicts, name, int(number))
        self._counts = booked  # runs in the slots are counted when they end

    def iterate(self) -> None:
        """A gradient, a verdict and a step in every slot; on the CPU also a verdict on images after their last step."""
        attack, slots = self.attack, self.engine.slots
        at_end = attack.ended(slots)  # on the CPU only where a run has no step: other ends are judged below
        before = None if self._keep is None else slots.adv.clone()
        # A loss of one's own need not be one of logits; the verdict is.
        if self._own_forward:
            own = attack.objective.logits(slots.input)
        losses, logits = self.engine.iterate()
        if logits is None:
            logits = own
        else:
            self._own_forward = False
        said = self._verdict(logits, self._label, slots.inside, self._expected)
        stops = said != self._expected
        ends = self._open & (at_end if self._last else stops | at_end)
        self._bad += self._open & (losses - losses != 0)  # 0 where finite, else NaN
        if self._fixed or ends.any():
            self._at = torch.where(ends, slots.age, self._at)
            self._answer = torch.where(ends, said, self._answer)
            self._open ^= ends
            if before is not None:
                self._final = torch.where(per_sample(ends, before), before, self._final)
            self._numbers_told[0] += ends.sum()
        if not self._fixed:
            self._judge_ended()

    def _judge_ended(self) -> None:
        """Judge the iterates of slots that have taken their last step, by a forward pass."""
        slots = self.engine.slots
        rows = (self._open & self.attack.ended(slots)).nonzero()[:, 0]
        if not len(rows):
            return
        ended = slots.rows(rows)
        objective = self.attack.objective
        losses, logits = objective.judge(ended.input, self.attack.aim(ended))
        logits = objective.logits(ended.input) if logits is None else logits
        inside = self.attack.inside(ended)
        self._bad[rows] += losses - losses != 0
        self._answer[rows] = self._verdict(logits, self._label[rows], inside, self._expected[rows])
        self._at[rows] = ended.age + 1
        self._open[rows] = False
        if self._keep is not None:
            self._final[rows] = ended.adv
        self._numbers_told[0] += len(rows)

    def _verdict(
        self, logits: torch.Tensor, labels: torch.Tensor, inside: torch.Tensor | None, right: torch.Tensor
    ) -> torch.Tensor:
        """The model's predictions; the right one where an iterate does not count, such as one outside the ball."""
        said = verdict(logits, labels)
        return said if inside is None else torch.where(inside, said, right)

    # ------------------------------------------------------------------ booking and refilling

    def settle(self) -> None:
        """Book the runs that have ended, and put the next runs into the free slots."""
        if self._has_engine:
            self._book()
        if self._fixed:
            self._refill()
        else:
            self._exchange()
        left = (self._until - self._restart).clamp(min=0)
        under_way = (self.engine.slots.age * self._open).sum()
        done, most = self._counts["forwards"] + under_way, left.sum() * (self.attack.steps + 1) - under_way
        self._numbers_told.copy_(torch.stack((torch.zeros_like(done), (left > 0).sum(), done, most.clamp(min=0))))

    def _book(self) -> None:
        """Write the verdicts of runs that have ended. Free their slots, and the slots of runs that no longer count."""
        none, slots, runs = self._n, self.engine.slots, self.verdicts.restarts
        held = self._sample < none
        ended = held & ~self._open
        fell = ended & (self._answer != self._expected)
        self._until.scatter_reduce_(0, self._sample, torch.where(fell, self._run, runs), "amin")
        late = held & (self._run > self._until[self._sample])
        first, survived, leaves = fell & ~late, ended & ~(fell | late), ended | late
        judged = torch.where(ended, self._at, slots.age)
        steps = torch.minimum(judged, slots.age)  # a forward pass apart has no step
        self._count(judged, steps, leaves)
        self._counts["nonfinite"] += (self._bad * leaves).sum()
        # A run that fooled earlier, but comes later, took so many steps; -1 where there is none.
        overtaken = (self._step[self._sample] + 1) * first
        unit = self.attack.cost(self._classes)[0] or self.attack.eot
        self._counts["waste"] += unit * (overtaken + steps * late).sum()
        settled = torch.where(first, self._sample, none)
        self._step.scatter_(0, settled, self._at - 1)
        self._said.scatter_(0, settled, self._answer)
        self._restart.scatter_add_(0, self._sample, survived.long())
        if self._keep is not None:
            kept = first | (survived & (self._run == runs - 1))
            self._keep(torch.where(kept, self._sample, none), self._final, slots.x)
        self._sample = torch.where(leaves, none, self._sample)
        self._open &= ~late

    def _count(self, judged: torch.Tensor, steps: torch.Tensor, held: torch.Tensor) -> None:
        """Count the passes of the slots `held`, bool, after so many iterates judged and so many steps, int64."""
        (gradients, beside), steps = self.attack.cost(self._classes), (steps * held).sum()
        self._counts["passes"] = self._counts["passes"] + gradients * steps
        forwards = self.attack.eot * (judged * held).sum() + beside * steps
        self._counts["forwards"] = self._counts["forwards"] + forwards

    def _exchange(self) -> None:
        """On the CPU: keep the open slots, and add new ones for as many samples as there is room for."""
        keep = self._open.nonzero()[:, 0]
        waiting = ((self._begun == self._restart) & (self._begun < self._until)).nonzero()[:, 0]
        room = min(self._slots - len(keep), len(waiting))
        if self._has_engine and not room and len(keep) == len(self._open):
            return
        places = (self._begun[waiting] * self._n + waiting).topk(room, largest=False).values
        runs, rows = places // self._n, places % self._n
        self._begun[rows] += 1
        fresh = self._filled(self._images.index_select(0, rows), self._targets[rows], rows, runs)
        Engine(self.attack, fresh).start()
        if self._has_engine:
            self.engine.slots = concatenated(self.engine.slots.rows(keep), fresh)
        else:
            self.engine, self._has_engine = Engine(self.attack, fresh), True
        opened = torch.ones(len(keep) + room, dtype=torch.bool)
        self._hold(torch.cat((self._sample[keep], rows)), torch.cat((self._run[keep], runs)), opened)
        self._at, self._answer, self._bad = (
            torch.cat((t[keep], torch.zeros_like(rows))) for t in (self._at, self._answer, self._bad)
        )
        if self._keep is not None:
            self._final = torch.empty_like(self.engine.slots.adv)

    def _make_fixed(self, rows: torch.Tensor) -> None:
        """Make the engine of a fixed number of slots, and slots for the next images; both hold `rows` at first."""
        mine = self._filled(self._images.index_select(0, rows), self._targets[rows], rows.clone(), rows.clone())
        self.engine = self.attack.engine(mine)
        self.engine.start()
        mine = self.engine.slots
        # The next images' slots share what is looked up again for all slots anyway.
        self._next = self._filled(mine.x, mine.targets, rows, rows)
        self._next.seed, self._next.restart = mine.seed, mine.restart
        if self._keep is not None:
            self._final = torch.empty_like(mine.adv)

    def _refill(self) -> None:
        """Put the next runs into the free slots, where the number of slots is fixed: no shape depends on what is free.

        With the free slots 1 and 3 and due runs a, b, c the prefix sums are 0 1 1 2 over the slots and 1 2 3 over the
        runs: slot 1 is the first free one and takes a, slot 3 the second and takes b.
        """
        free = ~self._open
        runs = torch.arange(self._lowest, self.verdicts.restarts, device=free.device)[:, None]
        due = ((runs >= self._begun[:-1]) & (runs < self._until[:-1])).flatten()  # in the order (run, sample)
        place = torch.searchsorted(due.cumsum(0), free.cumsum(0))  # the first free slot takes the first, and so on
        taken = free & (place < len(due))
        samples = torch.where(taken, place % self._n, self._sample)
        self._begun.scatter_add_(0, samples, taken.long())
        run = torch.where(taken, self._lowest + place // self._n, self._run)
        rows = self._hold(samples, run, self._open | taken)
        self._bad = torch.where(taken, 0, self._bad)
        mine, new = self.engine.slots, self._next
        kept = mine.tensors()
        torch.index_select(self._images, 0, rows, out=mine.x)
        torch.index_select(self._targets, 0, rows, out=mine.targets)
        mine.restart.copy_(run)
        if self.attack.draws:
            kept["seed"].copy_(self._seeds(rows, run))
        Engine(self.attack, new).start()
        for name, fresh in new.tensors().items():
            if fresh is not kept[name]:
                torch.where(per_sample(taken, fresh), fresh, kept[name], out=kept[name])

    def _hold(self, samples: torch.Tensor, runs: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
        """Note which sample each slot holds, in which run, and whether that run is open.

        Returns:
            A row of `images` for each slot: its sample's, or the last one where it holds none.
        """
        self._sample, self._run, self._open = samples, runs, opened
        rows = samples.clamp(max=self._n - 1)
        self._label, self._expected = self._labels.index_select(0, rows), self._all_expected.index_select(0, rows)
        return rows

    def _filled(self, x: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, runs: torch.Tensor) -> Slots:
        """Slots for these runs of the samples `rows`, not started."""
        if self.attack.memory_format is not None:
            x = x.contiguous(memory_format=self.attack.memory_format)
        seeds = self._seeds(rows, runs) if self.attack.draws else rows
        slots = self.attack.slots(x, targets, self.attack.eps, seeds)
        slots.adv = result_like(x)
        slots.age, slots.restart = torch.zeros_like(rows), runs
        return slots

    def _seeds(self, rows: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
        return sample_seeds(self._seed, self._numbers[rows], runs)


class _Pilot:
    """Reads numbers from the device without waiting for it: on a GPU the numbers of two turns before.

    In turn 5 the host begins to copy the numbers of turn 5, and reads those of turn 3, whose copy has ended by then.
    There is room for LAG + 1 = 3 copies.

        turn           1  2  3  4  5
        begins a copy  1  2  3  4  5
        reads          -  -  1  2  3
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._host = [torch.empty(4, dtype=torch.int64, pin_memory=True) for _ in range(LAG + 1)]
            self._events = [torch.cuda.Event() for _ in range(LAG + 1)]

    def read(self, turn: int, numbers: torch.Tensor) -> tuple[int, list[int]]:
        """Copy the four numbers of a turn, and read the latest that are there.

        Args:
            turn: number of this turn, from 1.
            numbers: int64 (4,) on the device.

        Returns:
            The turn that the numbers are of, 0 where none are there yet, and the numbers.
        """
        if not self._on_gpu:
            return turn, numbers.tolist()
        mine, known = turn % (LAG + 1), turn - LAG
        self._host[mine].copy_(numbers, non_blocking=True)
        self._events[mine].record()
        if known < 1:
            return 0, [0, 0, 0, 0]
        before = known % (LAG + 1)
        self._events[before].synchronize()
        return known, self._host[before].tolist()
