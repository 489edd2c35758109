"""The run of an evaluation: its samples, its attacks one after the other, and the report."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from fastadv._warnings import warn
from fastadv.attacks import LOSSES, Attack
from fastadv.attacks.checks import box_of, highest, of_probabilities
from fastadv.attacks.engine import Engine, is_ours
from fastadv.attacks.objective import Objective
from fastadv.attacks.verdicts import NONE, is_label, verdict
from fastadv.data.share import Share
from fastadv.evaluation import masking_checks
from fastadv.evaluation.adversaries import Adversary
from fastadv.evaluation.ensemble import Trial, budgets, curve, fooled_by
from fastadv.evaluation.foreign import Reach, as_images, one_seed
from fastadv.evaluation.images import FooledImages, Gallery
from fastadv.evaluation.masking import (
    ASKED,
    Masking,
    as_picture,
    by_chance,
    most_likely,
    notes_on_masking,
    notes_on_square,
    shattered,
    square_of,
)
from fastadv.evaluation.progress import ProgressBar
from fastadv.evaluation.queue import Queue, Verdicts
from fastadv.evaluation.windows import Windows
from fastadv.functional import sample_seeds, to_float
from fastadv.nn.frozen import frozen_for_callable
from fastadv.nn.logits import AnyModel
from fastadv.ops.generator import seeded

TARGETED = [name for name, loss in LOSSES.items() if loss.compares == "pairs"]
SAVE_EVERY = 10.0  # seconds between two states on the disk
SAVING = 0.5  # seconds that writing a state may take; a slower one is written as much more rarely
PROBED = 64  # the first gradients of so many samples are checked

Report = dict[str, Any]  # for json.dump; `evaluate` lists its entries


class Run:
    """The common part of an evaluation's attacks: the samples, the outputs on the clean images, the warnings.

    Args:
        model: the model, frozen.
        share: the images.
        labels: int64 (N,), the labels of all images, or (N, C) where a sample has several.
        against: the attacks.
        settings: "iterate", "slots" and "seed" as of `evaluate`.
        pool: the number of images on the device at a time; None means all.
        autocast: the dtype of torch.autocast for the model; None means without autocast.
        memory_format: the memory format of the model's inputs; None means that of the images.

    Attributes:
        clean: (N, C), the logits of the clean images.
        said: int64 (N,), the predictions for the clean images.
        correct: bool (N,), whether they are right.
        silent: the number of clean images without a prediction.
        notes: the warnings so far.
    """

    def __init__(
        self,
        model: AnyModel,
        share: Share,
        labels: torch.Tensor,
        against: Sequence[Adversary],
        settings: Mapping[str, Any],
        pool: int | None,
        autocast: torch.dtype | None,
        memory_format: torch.memory_format | None,
    ):
        self.share, self.labels, self.pool, self._memory_format = share, labels, pool, memory_format
        self.last, self.slots, self.seed = settings["iterate"] == "last", settings["slots"], settings["seed"]
        self.notes: list[str] = []
        attacks = [adversary.ours for adversary in against if adversary.ours is not None]
        signs = len(attacks) == len(against) and all(attack.compares == "signs" for attack in attacks)
        draws, loss = [attack.eot for attack in attacks] or [1], "bce" if signs else "ce"
        self._objective = Objective(model, loss, eot=max(draws), autocast=autocast)
        if labels.ndim == 1:
            self._objective.check_classes(highest(labels))
        self.clean = share.concatenated(self.logits(share.mine) if len(share) else None, labels.device)
        if labels.ndim == 2:
            self._check_several(labels)
        said = verdict(self.clean, labels)
        self.said, self.correct, self.silent = said, is_label(said, labels), int((said == NONE).sum())
        if labels.ndim == 1:
            self._warn(masking_checks.notes_on_guesses(self.correct, labels, share.mine))
        self._warn_of_outputs(Objective(model, loss, autocast=autocast), min(draws))
        self._warn(masking_checks.notes_on_models(against))

    def _check_several(self, labels: torch.Tensor) -> None:
        """Refuse several labels a sample that are not one for each logit; warn where each sample has just one."""
        if labels.shape[1] != self.clean.shape[1]:
            raise ValueError(
                f"the labels {tuple(labels.shape)} are several a sample, one for each logit, and the model returns "
                f"{self.clean.shape[1]}: where a sample has one class pass int64 labels (N,), such as labels[:, 0]"
            )
        if labels.shape[1] > 1 and len(labels) >= masking_checks.FEW and bool((labels.sum(1) == 1).all()):
            self._warn(
                [
                    f"the labels {tuple(labels.shape)} are taken for several a sample, each judged by the sign of its "
                    "logit, and every sample has exactly one: if they stand for one class, pass labels.argmax(1)"
                ]
            )

    def _warn_of_outputs(self, once: Objective, draws: int) -> None:
        """Warn of what is odd about the outputs of one draw, `once`, where an attack has so few as `draws`."""
        first = self.share.rows[: self.slots].to(self.labels.device)
        found: list[str] = []
        if len(first):
            seen = self._seen_by_model(self._staged(first))
            found = list(masking_checks.notes_on_outputs(once.logits, seen, draws, once.autocast))
            logits = self.clean if self._objective.eot == 1 else once.logits(seen)  # the mean of draws is of a softmax
            found += [wrong] if (wrong := of_probabilities(logits, str(once.loss))) else []
        self._warn(dict.fromkeys(note for notes in self.share.team.gathered(found) for note in notes))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The logits (n, C) of images (n, ...), in batches of one shape."""
        parts = []
        for rows in torch.arange(len(images), device=images.device).split(self.slots):
            batch = images[self._filled(rows)].to(self.labels.device)
            parts.append(self._objective.logits(self._seen_by_model(batch))[: len(rows)])
        return torch.cat(parts)

    def _seen_by_model(self, images: torch.Tensor) -> torch.Tensor:
        images = to_float(images)
        return images if self._memory_format is None else images.contiguous(memory_format=self._memory_format)

    def _staged(self, rows: torch.Tensor) -> torch.Tensor:
        """The images `rows`, of this process's share, on the device."""
        return self.share.take(rows).to(self.labels.device)

    def _filled(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` filled up to a full batch: the model sees one shape."""
        return torch.cat((rows, rows[-1:].expand(self.slots - len(rows))))

    def _warn(self, found: Iterable[str]) -> None:
        for note in found:
            self.notes.append(note)
            warn(note)

    def trial(self, adversary: Adversary, gallery: Gallery | FooledImages | None) -> Trial:
        """A trial of the adversary that has not begun."""
        if adversary.ours is None:
            return Trial(adversary, Verdicts(self.correct, 1), gallery, Reach())
        return Trial(adversary, Verdicts(self.correct, adversary.ours.runs(self.clean.shape[1])), gallery, None)

    def left(self, ended: Sequence[Trial]) -> torch.Tensor:
        """Which samples are classified correctly and were fooled by none of the trials `ended`, (N,) bool."""
        fooled = [trial.verdicts.fooled for trial in ended]
        return self.correct & ~torch.stack([~self.correct, *fooled]).any(0)

    def hand_on(self, before: Sequence[Trial], trial: Trial) -> None:
        """Leave `trial` only the samples that the trials before it have not fooled within its budget."""
        trial.verdicts.todo = self.correct & ~fooled_by(before, trial.adversary.ball, self.correct)

    def attack(self, trial: Trial, save: Callable[[], None], progress: bool) -> None:
        """Finish `trial`.

        Args:
            trial: the attack with its verdicts so far.
            save: writes the state; it is called every few seconds and at the end.
            progress: whether a progress bar is shown.
        """
        while trial.is_open(len(self.labels)):
            with self._my_part(trial):
                self._run(trial, save, progress)

    @contextmanager
    def _my_part(self, trial: Trial) -> Iterator[None]:
        """Let this process attack its own samples alone; at the end combine the verdicts of all processes."""
        share, verdicts, todo = self.share, trial.verdicts, trial.verdicts.todo
        if share.alone:
            yield
            return
        before = torch.tensor([getattr(verdicts, name) for name in Verdicts.COUNTS], device=todo.device)
        verdicts.todo = torch.zeros_like(todo)
        verdicts.todo[share.rows.to(todo.device)] = todo[share.rows.to(todo.device)]
        yield
        verdicts.todo = todo
        for name in Verdicts.SAVED:
            setattr(verdicts, name, share.merged(getattr(verdicts, name)))
        counts = torch.tensor([getattr(verdicts, name) for name in Verdicts.COUNTS], device=todo.device)
        for name, count in zip(Verdicts.COUNTS, (before + share.team.summed(counts - before)).tolist(), strict=True):
            setattr(verdicts, name, count)
        if trial.reach is not None:
            trial.reach = Reach.of(share.team.gathered(trial.reach))

    def _run(self, trial: Trial, save: Callable[[], None], progress: bool) -> None:
        adversary, earlier = trial.adversary, trial.seconds
        begun = saved = time.perf_counter()
        pause = SAVE_EVERY
        windows = None if adversary.ours is None else self._windows(trial, adversary.ours)
        unit = "batches" if adversary.ours is None else "passes"
        with ProgressBar(trial.title, unit, progress) as shown:
            for done, left in self._batches(trial) if windows is None else windows.run():
                now = time.perf_counter()
                trial.seconds = earlier + now - begun
                shown.update(done, left)
                if now - saved >= pause:
                    if windows is not None:
                        windows.update()
                    self._write_images(trial)
                    save()
                    saved = time.perf_counter()
                    pause = SAVE_EVERY * max(1.0, (saved - now) / SAVING)
        trial.seconds = earlier + time.perf_counter() - begun
        self._write_images(trial)
        save()

    def _windows(self, trial: Trial, attack: Attack) -> Windows:
        gallery, targets = trial.gallery, self._targets(attack)
        reach = None if is_ours(attack) else trial.reach or Reach()
        trial.reach = reach

        def queue(rows: torch.Tensor, verdicts: Verdicts) -> Queue:
            if gallery is not None:
                self._write_images(trial)
                gallery.begin(rows)

            def keep(samples: torch.Tensor, iterates: torch.Tensor, images: torch.Tensor) -> None:
                if gallery is not None:
                    gallery.put(samples, iterates, images)
                held = samples < len(rows)
                if reach is not None and bool(held.any()):  # this waits for the device
                    reach.add(iterates[held], to_float(images[held]))

            return Queue(
                *(attack, self._staged(rows), self.labels[rows], targets[rows], verdicts),
                slots=self.slots,
                classes=self.clean.shape[1],
                seed=self.seed,
                numbers=rows,
                last=self.last,
                keep=None if gallery is None and reach is None else keep,
            )

        return Windows(trial.verdicts, self.pool, queue)

    def _targets(self, attack: Attack) -> torch.Tensor:
        """The targets of the attack's loss for all samples."""
        if not attack.needs_clean:
            return self.labels
        numbers = torch.arange(len(self.labels), device=self.labels.device)
        return attack.targets(self.clean, self.labels, sample_seeds(self.seed, numbers, restart=2**32 - 1))

    def _zero_gradients(self, attack: Attack) -> tuple[int, int]:
        """(samples whose gradient at the attack's start no step can follow, samples that were checked): two numbers.

        The first PROBED samples to be attacked are checked. With the loss "kl" a start at the clean image itself is
        left out: there the gradient of every model is 0.
        """
        zero = looked = 0
        targets = self._targets(attack)
        for rows, count in self._probed():
            x = self._staged(rows)
            if attack.memory_format is not None:
                x = x.contiguous(memory_format=attack.memory_format)
            slots = attack.slots(x, targets[rows], attack.eps, sample_seeds(self.seed, rows))
            Engine(attack, slots).start()
            grad, _, _ = attack.objective.gradient(slots.input, attack.aim(slots))
            counts = torch.ones_like(rows, dtype=torch.bool)
            if attack.loss == "kl":
                counts = (slots.adv != to_float(x)).flatten(1).any(1)
            counts = counts[:count]
            looked += int(counts.sum())
            zero += int((counts & attack.leads_nowhere(grad)[:count]).sum())
        zero, looked = self.share.team.summed(torch.tensor([zero, looked], device=self.labels.device)).tolist()
        return zero, looked

    def _shattered(self, attack: Attack) -> tuple[int, int]:
        """(samples whose margin hardly rises along its gradient, samples that were checked), of the first PROBED."""
        found = torch.zeros(2, dtype=torch.int64, device=self.labels.device)
        model = Objective(self._objective.model, "targeted_margin", eot=attack.eot, autocast=self._objective.autocast)
        pairs = torch.stack((self.labels, self.clean.scatter(1, self.labels[:, None], -torch.inf).argmax(1)), 1)
        for rows, count in self._probed():
            of_batch = shattered(attack, model, self._seen_by_model(self._staged(rows)), pairs[rows])
            found += torch.stack([each[:count].sum() for each in of_batch])
        low, looked = self.share.team.summed(found).tolist()
        return low, looked

    def _probed(self) -> Iterator[tuple[torch.Tensor, int]]:
        """(rows of a full batch, how many of them count), of this process's part of the first PROBED samples."""
        first = self.share.here(self.correct.nonzero()[:PROBED, 0])
        for part in first.split(self.slots) if len(first) else ():
            yield self._filled(part), len(part)

    def _look_at_gradients(self, trials: Sequence[Trial]) -> None:
        """Fill in what the gradients of the trials' attacks are like."""
        found: dict[tuple[object, ...], tuple[int, int]] = {}
        of_logits = self.labels.ndim == 1 and self.clean.shape[1] > 1
        for trial in trials:
            attack = trial.adversary.ours
            if attack is None or not attack.by_gradient:
                continue
            trial.zeros = self._zero_gradients(attack)
            # A loss of the user's may climb another output than the logits, which need not have a gradient.
            if of_logits and attack.eps > 0 and not callable(attack.loss):
                same = attack.norm, attack.eps, box_of(attack.clip), attack.eot
                if same not in found:
                    found[same] = self._shattered(attack)
                trial.shattered = found[same]

    def _batches(self, trial: Trial) -> Iterator[tuple[int, int]]:
        """The plain loop for attacks that cannot run in slots; yields (batches so far, batches left)."""
        verdicts = trial.verdicts
        reach = trial.reach = trial.reach or Reach()
        chunks = verdicts.todo.nonzero()[:, 0].split(self.slots)
        for i, chunk in enumerate(chunks):
            if not verdicts.unsettled[chunk].any():
                continue
            images = to_float(self._staged(chunk))
            with frozen_for_callable(self._objective.model), seeded(one_seed(sample_seeds(self.seed, chunk))):
                returned = trial.adversary(images, self.labels[chunk])
            adv = as_images(returned, images)
            finite = reach.add(adv, images)
            logits = self._objective.logits(self._seen_by_model(adv))
            said = torch.where(finite, verdict(logits, self.labels[chunk]), NONE)
            wrong = ~is_label(said, self.labels[chunk])
            verdicts.said[chunk] = said
            verdicts.step[chunk[wrong]] = 0
            verdicts.restart[chunk[~wrong]] = 1
            if trial.gallery is not None:
                trial.gallery.begin(chunk)
                trial.gallery.put(torch.arange(len(chunk), device=adv.device), adv, self._staged(chunk))
                self._write_images(trial)
            yield i + 1, len(chunks) - i - 1

    def _write_images(self, trial: Trial) -> None:
        if trial.gallery is not None:
            trial.gallery.flush(trial.verdicts, self.labels, self.logits)

    def ask_square(self, trial: Trial, save: Callable[[], None]) -> None:
        """After PMA, run the Square attack on some of the survivors; those that it fools count as fooled."""
        square = square_of(trial, self.share.shape)
        if square is None or self.labels.ndim > 1 or trial.by_square is not None:
            return
        survivors = self._robust(trial)
        rows = self.share.here(most_likely(survivors, self.clean))
        verdicts = Verdicts(survivors[rows], 1)
        if len(rows):
            labels = self.labels[rows]
            pictures = self._staged(rows).reshape(len(rows), *as_picture(tuple(self.share.shape[1:])))
            queue = Queue(
                *(square, pictures, labels, labels, verdicts),
                slots=min(self.slots, ASKED),
                classes=self.clean.shape[1],
                seed=self.seed,
                numbers=rows,
            )
            for _ in queue.run():
                pass
        found = torch.zeros_like(self.labels).index_put((rows,), verdicts.fooled.long())
        trial.by_square = self.share.team.summed(found) > 0
        save()

    def masking(self, order: Sequence[Trial]) -> Iterator[tuple[Trial, Masking]]:
        """(a trial of PMA, the signs of masked gradients after it), in the order in which they ran."""
        n = len(self.labels)
        for i, trial in enumerate(order):
            if trial.by_square is None:
                continue
            survivors = self._robust(trial)
            chance = by_chance([t for t in order[: i + 1] if t.adversary.eps == trial.adversary.eps])
            asked, fooled = min(int(survivors.sum()), ASKED), int((self.correct & ~survivors).sum())
            fell, zero = int(trial.by_square.sum()), trial.zero_gradients or 0.0
            yield trial, Masking(n, asked, fell, fooled, chance, zero)

    def report(self, trials: Sequence[Trial], order: Sequence[Trial], ensemble: bool) -> Report:
        """The report, without "settings" and "versions".

        Args:
            trials: the trials in the order in which the user gave the attacks.
            order: the same trials in the order in which they ran.
            ensemble: whether each got only the samples that the trials before it had not fooled.
        """
        n = len(self.labels)
        self._look_at_gradients(trials)
        masked = list(self.masking(order))
        results = [self._result(trial) for trial in trials]
        ours = [(t.adversary, r) for t, r in zip(trials, results, strict=True) if t.adversary.ours is not None]
        self._warn(masking_checks.notes_on_lengths(trial.adversary for trial in trials))
        self._warn(masking_checks.notes_on_steps((t.adversary for t in trials), self.share.mine.dtype))
        self._warn(masking_checks.notes_on_gradients(trials))
        self._warn(masking_checks.notes_on_shattering(trials))
        silenced = [(trial.adversary.title, r["no_prediction"]) for trial, r in zip(trials, results, strict=True)]
        self._warn(masking_checks.notes_on_predictions([("no attack", self.silent), *silenced], n))
        theirs = [(trial.adversary, trial.reach) for trial in trials if trial.reach is not None]
        self._warn(note for each in theirs for note in masking_checks.notes_on_reach(*each))
        self._warn(masking_checks.notes_on_losses((o.title, r["nonfinite_losses"]) for o, r in ours))
        if not ensemble:
            adversaries = [(trial.adversary, self._robust(trial)) for trial in trials]
            survived = [(each.title, each.ours, robust) for each, robust in adversaries if each.ours is not None]
            self._warn(masking_checks.notes_on_accuracies(survived))
        if ensemble:
            self._warn(notes_on_square(order, n))
        self._warn(notes_on_masking([(trial.adversary.title, masking) for trial, masking in masked]))
        self._warn(masking_checks.notes_on_late_falls(t for t in trials if t.adversary.ours is not None))
        clean = int(self.correct.sum()) / n
        found = [
            {
                "norm": norm,
                "eps": eps,
                "robust_accuracy": int(robust.sum()) / n,
                "attacks": names,
                "robust": robust.tolist(),
            }
            for norm, eps, names, robust in budgets(trials, self.correct)
        ]
        accuracies = [each["robust_accuracy"] for each in found]
        return {
            "labels": self.labels.tolist(),
            "clean_accuracy": clean,
            "robust_accuracy": accuracies[0] if len(accuracies) == 1 else accuracies,
            "budgets": found,
            "curves": _curves(found, clean),
            "masking": [{"after": trial.adversary.title, **asdict(masking)} for trial, masking in masked],
            "clean_correct": self.correct.tolist(),
            "clean_said": self.said.tolist(),
            "no_prediction": self.silent,
            "attacks": results,
            "warnings": self.notes,
        }

    def _robust(self, trial: Trial) -> torch.Tensor:
        """Which samples the attack got and did not fool, (N,) bool."""
        return trial.verdicts.todo & ~trial.verdicts.fooled

    def _result(self, trial: Trial) -> dict[str, Any]:
        """The entry of the report's "attacks"."""
        adversary, verdicts, reach = trial.adversary, trial.verdicts, trial.reach
        attack = adversary.ours
        n, fooled = len(self.labels), verdicts.fooled.tolist()
        first = {
            name: [v if f and attack is not None else None for v, f in zip(values.tolist(), fooled, strict=True)]
            for name, values in (("restart", verdicts.restart), ("step", verdicts.step))
        }
        target = {}
        if attack is not None and attack.loss in TARGETED:
            classes = attack.target_class(self._targets(attack), verdicts.restart)
            target = {"target": [c if f else None for c, f in zip(classes.tolist(), fooled, strict=True)]}
        accuracy: dict[str, float | None] = {"robust_accuracy": int(self._robust(trial).sum()) / n}
        if trial.gallery is not None:
            accuracy |= trial.gallery.facts()
        if reach is not None and (reach.leaves_box() or reach.exceeds(adversary.eps, adversary.norm)):
            accuracy = dict.fromkeys(accuracy)
        return {
            "attack": adversary.name,
            "eps": adversary.eps,
            "norm": adversary.norm,
            **accuracy,
            "given": int(verdicts.todo.sum()),
            "largest_linf": reach and reach.linf,
            "largest_l2": reach and reach.l2,
            "no_prediction": int(verdicts.silenced.sum()),
            "passes": None if attack is None else verdicts.passes,
            "forwards": None if attack is None else verdicts.forwards,
            "waste": None if attack is None else verdicts.waste,
            "seconds": trial.seconds,
            "nonfinite_losses": verdicts.nonfinite,
            "runs": verdicts.restarts,
            "zero_gradients": trial.zero_gradients,
            "shattered_gradients": trial.shattered_gradients,
            "fooled": fooled,
            "said": [said if f else None for said, f in zip(verdicts.said.tolist(), fooled, strict=True)],
            **first,
            **target,
            "latest": None if attack is None else trial.latest,
            "settings": adversary.facts(),
        }


def _curves(found: Sequence[Mapping[str, Any]], clean: float) -> list[dict[str, Any]]:
    """A curve for each norm with several budgets."""
    points: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        points.setdefault(each["norm"], []).append((each["eps"], each["robust_accuracy"]))
    return [curve(norm, of_norm, clean) for norm, of_norm in points.items() if len(of_norm) > 1]
