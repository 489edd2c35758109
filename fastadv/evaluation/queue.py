"""The evaluation's queue: a slot whose image is fooled or finished takes the next one, all of it on the device."""

from collections.abc import Callable, Iterator

import torch

from fastadv.attacks.base import Attack
from fastadv.attacks.engine import Engine
from fastadv.attacks.rows import per_sample
from fastadv.attacks.verdicts import NONE, predicted
from fastadv.functional import sample_seeds
from fastadv.ops.autograd import result_like

READ_EVERY = 8  # iterations between two looks of the host at how far it is


class Verdicts:
    """What is known of each sample; from it alone a run goes on where it was cut.

    restart: restarts that the sample survived, int64 (N,); step: the step of restart `restart` at which it was fooled,
    -1 where it was not, int64 (N,); said: the class that it was then taken for, -1 for none at all, int64 (N,); todo:
    whether it is to be attacked at all, bool (N,); restarts: how many there are.
    passes: gradients computed for slots that held a sample; nonfinite: losses among them that were not finite.
    """

    def __init__(self, todo: torch.Tensor, restarts: int):
        self.todo, self.restarts = todo, restarts
        self.restart = torch.zeros_like(todo, dtype=torch.int64)
        self.step = torch.full_like(self.restart, -1)
        self.said = torch.zeros_like(self.restart)
        self.passes = self.nonfinite = 0

    @property
    def fooled(self) -> torch.Tensor:
        return self.step >= 0

    @property
    def silenced(self) -> torch.Tensor:
        """Fooled by an image for which the model gives no prediction."""
        return self.fooled & (self.said == NONE)

    @property
    def unsettled(self) -> torch.Tensor:
        return self.todo & ~self.fooled & (self.restart < self.restarts)

    @property
    def restarts_left(self) -> int:
        """At most, those that are still to be run, of all samples together."""
        return int(((self.restarts - self.restart) * self.unsettled).sum())

    def part(self, rows: torch.Tensor, restarts: int) -> "Verdicts":
        """Those of the samples `rows` (n,), to be run until `restarts`; `take` brings them back."""
        part = Verdicts(self.todo[rows], restarts)
        part.restart, part.step, part.said = self.restart[rows], self.step[rows], self.said[rows]
        part.passes, part.nonfinite = self.passes, self.nonfinite
        return part

    def take(self, rows: torch.Tensor, part: "Verdicts") -> None:
        self.restart[rows], self.step[rows], self.said[rows] = part.restart, part.step, part.said
        self.passes, self.nonfinite = part.passes, part.nonfinite


class Queue:
    """Runs `attack` on samples through a fixed number of slots, in the order (restart, sample).

    Every restart that a sample survives takes as many iterations, so survivors come back in the order in which they
    were taken: a ring that they join at its end stays ordered. All counts are tensors, and a prefix sum over the free
    slots says which sample goes where: the host waits for nothing, and the model sees one shape.

    Args:
        attack: on a model in the state in which it shall be judged.
        images, labels, targets: (N, ...), (N,), (N, ...) on the model's device. Images stay uint8 if they are.
        verdicts: of the samples; those that are still to be attacked are, and the verdicts are written there.
        slots: images under attack at a time.
        seed, numbers: sample i draws `sample_seeds(seed, numbers[i], restart)`; int64 (N,).
        last: judge the last iterate of a restart only, instead of every one and the start.
        keep: gets in each iteration (rows, iterates, images): which sample each slot has finished with this iterate,
            the one that fooled or the last of all, and from which image; N where none.
    """

    def __init__(
        self,
        attack: Attack,
        images: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor,
        verdicts: Verdicts,
        *,
        slots: int,
        seed: int,
        numbers: torch.Tensor,
        last: bool = False,
        keep: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
    ):
        self.attack, self.verdicts = attack, verdicts
        self._images, self._labels, self._targets = images, labels, targets
        self._seed, self._numbers, self._last, self._keep = seed, numbers, last, keep
        self._n = len(images)
        count = torch.zeros((), dtype=torch.int64, device=images.device)
        order = verdicts.restart.argsort(stable=True)
        order = order[verdicts.unsettled[order]]
        # Row N takes what is written for slots that have nothing to write, and stands for no sample.
        self._ring = torch.cat((order, order.new_zeros(self._n + 1 - len(order))))
        self._restart = torch.cat((verdicts.restart, verdicts.restart.new_zeros(1)))
        self._step = torch.cat((verdicts.step, verdicts.step.new_zeros(1)))
        self._said = torch.cat((verdicts.said, verdicts.said.new_zeros(1)))
        self._head, self._tail = count.clone(), count + len(order)
        self._passes, self._nonfinite = count + verdicts.passes, count + verdicts.nonfinite
        self._sample = torch.full((slots,), self._n, device=images.device)
        self._age = torch.zeros_like(self._sample)  # steps since the start
        self._readout = _Readout(images.device)

        rows = torch.zeros_like(self._sample)
        x = images.index_select(0, rows)
        if attack.memory_format is not None:
            x = x.contiguous(memory_format=attack.memory_format)
        mine = self._filled(x, targets.index_select(0, rows), rows.clone())
        self.engine = attack.engine(mine)
        self.engine.start()
        mine = self.engine.slots
        # The next images' slots share what is looked up again for all slots anyway.
        self._next = self._filled(mine.x, mine.targets, mine.seed)
        self._label = labels.index_select(0, rows)
        self._refill(self._sample == self._n)

    def _filled(self, x, targets, seed):
        slots = self.attack.slots(x, targets, self.attack.eps, seed)
        slots.adv = result_like(x)
        return slots

    def run(self) -> Iterator[tuple[int, int]]:
        """Until all is done; yields (passes so far, passes left at most) every few iterations.

        `verdicts` are up to date after `update()`, and at the end.
        """
        while True:
            for _ in range(READ_EVERY):
                self.iterate()
            passes, left = self._read()
            if left >= 0:
                yield passes, left
            if left == 0:
                break
        self.update()

    def update(self) -> None:
        """Bring `verdicts` up to date; the samples in the slots begin their restart again where a run goes on so."""
        self.verdicts.restart, self.verdicts.step = self._restart[:-1].clone(), self._step[:-1].clone()
        self.verdicts.said = self._said[:-1].clone()
        self.verdicts.passes, self.verdicts.nonfinite = torch.stack((self._passes, self._nonfinite)).tolist()

    def iterate(self) -> None:
        """One gradient and one step in every slot, the verdicts, and new samples into the slots that are done."""
        slots, steps, none = self.engine.slots, self.attack.steps, self._n
        before = None if self._keep is None else slots.adv.clone()
        # A loss of one's own need not be one of logits; the verdict is.
        own_loss = callable(self.attack.loss)
        logits = self.attack.objective.logits(slots.input) if own_loss else None
        losses, found = self.engine.iterate()
        said = predicted(logits if own_loss else found)
        wrong = said != self._label

        live = self._sample < none
        at_end = live & (self._age == steps)
        fooled = wrong & (at_end if self._last else live)
        survived = at_end & ~fooled
        self._passes += live.sum()
        self._nonfinite += (live & (losses - losses != 0)).sum()  # 0 where finite, else NaN
        settled = torch.where(fooled, self._sample, none)
        self._step.scatter_(0, settled, self._age)
        self._said.scatter_(0, settled, said)
        self._restart.scatter_add_(0, self._sample, survived.long())
        again = survived & (self._restart[self._sample] < self.verdicts.restarts)
        done = fooled | at_end
        if before is not None:
            self._keep(torch.where(done & ~again, self._sample, none), before, slots.x)

        place = (self._tail + again.cumsum(0) - 1) % none
        self._ring.scatter_(0, torch.where(again, place, none), self._sample)
        self._tail += again.sum()
        self._age += 1
        self._refill(done | ~live)

    def _refill(self, free):
        rank = free.cumsum(0) - 1
        taken = free & (rank < self._tail - self._head)
        following = self._ring[(self._head + rank) % self._n]
        self._sample = torch.where(taken, following, torch.where(free, self._n, self._sample))
        self._age = torch.where(free, 0, self._age)
        self._head += taken.sum()

        rows = self._sample.clamp(max=self._n - 1)
        mine, new = self.engine.slots, self._next
        torch.index_select(self._images, 0, rows, out=mine.x)
        torch.index_select(self._targets, 0, rows, out=mine.targets)
        torch.index_select(self._labels, 0, rows, out=self._label)
        if self.attack.draws:
            mine.seed.copy_(sample_seeds(self._seed, self._numbers[rows], self._restart[rows]))
        Engine(self.attack, new).start()
        kept = mine.tensors()
        for name, fresh in new.tensors().items():
            if fresh is not kept[name]:
                torch.where(per_sample(taken, fresh), fresh, kept[name], out=kept[name])

    def _read(self):
        """(passes, passes left at most), on the host."""
        waiting = self.verdicts.todo & (self._step[:-1] < 0)
        restarts = ((self.verdicts.restarts - self._restart[:-1]) * waiting).sum()
        live = self._sample < self._n
        left = restarts * (self.attack.steps + 1) - (live * self._age).sum()
        return self._readout(self._passes, left)


class _Readout:
    """Numbers from the device, without waiting for it: on a GPU those of the call before."""

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            self._host = torch.empty(2, dtype=torch.int64, pin_memory=True)
            self._event = torch.cuda.Event()
            self._pending = False

    def __call__(self, passes: torch.Tensor, left: torch.Tensor) -> tuple[int, int]:
        numbers = torch.stack((passes, left))
        if self._event is None:
            return tuple(numbers.tolist())
        if self._pending:
            self._event.synchronize()
            before = tuple(self._host.tolist())
        else:
            before = (0, -1)  # not known yet
        self._host.copy_(numbers, non_blocking=True)
        self._event.record()
        self._pending = True
        return before
