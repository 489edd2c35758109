"""The run of an evaluation: what all of its attacks share, and what they find."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from fastadv.attacks import LOSSES, Attack
from fastadv.attacks.checks import highest
from fastadv.attacks.engine import Engine
from fastadv.attacks.objective import Objective
from fastadv.attacks.verdicts import NONE, is_label, verdict
from fastadv.evaluation import masking_checks
from fastadv.evaluation.adversaries import Adversary
from fastadv.evaluation.ensemble import Trial, budgets, curve, fooled_by
from fastadv.evaluation.foreign import Reach, as_images, one_seed
from fastadv.evaluation.images import Gallery, Kept
from fastadv.evaluation.masking import ASKED, Masking, by_chance, most_likely, of_masking, of_square, square_of
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.queue import Queue, Verdicts
from fastadv.evaluation.windows import Windows
from fastadv.functional import sample_seeds, to_float
from fastadv.ops.generator import seeded

TARGETED = [name for name, loss in LOSSES.items() if loss.compares == "pairs"]
SAVE_EVERY = 10.0  # seconds between two states on the disk
SAVING = 0.5  # seconds that one may take; longer ones are as much rarer
PROBED = 64  # samples whose first gradients are looked at


class Run:
    """What all attacks of an evaluation share: the samples, the outputs on the clean ones, the warnings."""

    def __init__(self, model, share, labels, against, settings, pool, autocast, memory_format):
        self.share, self.labels, self.pool, self._layout = share, labels, pool, memory_format
        self.last, self.slots, self.seed = settings["iterate"] == "last", settings["slots"], settings["seed"]
        self.notes: list[str] = []
        attacks = [adversary.attack for adversary in against if adversary.ours]
        signs = len(attacks) == len(against) and all(attack.compares == "signs" for attack in attacks)
        draws = max((attack.eot for attack in attacks), default=1)
        self._objective = Objective(model, "bce" if signs else "ce", eot=draws, autocast=autocast)
        if labels.ndim == 1:
            self._objective.check_classes(highest(labels))
        self.clean = share.concatenated(self.logits(share.mine) if len(share) else None, labels.device)
        said = verdict(self.clean, labels)
        self.said, self.correct, self.silent = said, is_label(said, labels), int((said == NONE).sum())
        self._warn_of_outputs(draws, autocast)

    def _warn_of_outputs(self, draws: int, autocast: torch.dtype | None) -> None:
        first = self.share.rows[: self.slots].to(self.labels.device)
        found = ()
        if len(first):
            seen = self._seen_by_model(self._staged(first))
            found = masking_checks.of_outputs(self._objective.logits, seen, draws, autocast)
        told = [note for notes in self.share.team.gathered(list(found)) for note in notes]
        self._warn(dict.fromkeys(told))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Of all images, in batches of one shape."""
        parts = []
        for rows in torch.arange(len(images), device=images.device).split(self.slots):
            batch = images[self._filled(rows)].to(self.labels.device)
            parts.append(self._objective.logits(self._seen_by_model(batch))[: len(rows)])
        return torch.cat(parts)

    def _seen_by_model(self, images):
        images = to_float(images)
        return images if self._layout is None else images.contiguous(memory_format=self._layout)

    def _staged(self, rows):
        """The images `rows`, which are this process's, on the device."""
        return self.share.take(rows).to(self.labels.device)

    def _filled(self, rows):
        """`rows` filled up to a full batch: the model sees one shape."""
        return torch.cat((rows, rows[-1:].expand(self.slots - len(rows))))

    def _warn(self, found: Iterable[str]) -> None:
        for note in found:
            self.notes.append(note)
            warnings.warn(note, stacklevel=5)

    def trial(self, adversary: Adversary, gallery: Gallery | Kept | None) -> Trial:
        reach = None if adversary.ours else Reach()
        runs = adversary.attack.runs(self.clean.shape[1]) if adversary.ours else 1
        return Trial(adversary, Verdicts(self.correct, runs), gallery, reach)

    def left(self, ended: Sequence[Trial]) -> torch.Tensor:
        """Samples that are classified correctly and that none of `ended` fooled, (N,) bool."""
        fooled = [trial.verdicts.fooled for trial in ended]
        return self.correct & ~torch.stack([~self.correct, *fooled]).any(0)

    def hand_on(self, before: Sequence[Trial], trial: Trial) -> None:
        """Give `trial` those samples alone that the trials before it have not fooled within its budget."""
        budget = (trial.adversary.norm, trial.adversary.eps) if trial.adversary.has_budget else (None, None)
        trial.verdicts.todo = self.correct & ~fooled_by(before, *budget, self.correct)

    def attack(self, trial: Trial, save: Callable[[], None], progress: bool) -> None:
        """Finish `trial`; what is known is saved every few seconds and at the end."""
        while trial.is_open(len(self.labels)):
            with self._my_part(trial):
                self._run(trial, save, progress)

    @contextmanager
    def _my_part(self, trial: Trial) -> Iterator[None]:
        """Inside, this process's samples alone are to be attacked; then all know the verdicts on all."""
        share, verdicts, todo = self.share, trial.verdicts, trial.verdicts.todo
        if share.alone:
            yield
            return
        before = torch.tensor([getattr(verdicts, name) for name in Verdicts.COUNTS], device=todo.device)
        verdicts.todo = torch.zeros_like(todo)
        verdicts.todo[share.rows.to(todo.device)] = todo[share.rows.to(todo.device)]
        yield
        verdicts.todo = todo
        for name in Verdicts.KEPT:
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
        windows = self._windows(trial) if adversary.ours else None
        unit = "pass" if adversary.ours else "batch"
        with Progress(adversary.title, unit, progress) as shown:
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

    def _windows(self, trial) -> Windows:
        attack, gallery, targets = trial.adversary.attack, trial.gallery, self._targets(trial.adversary.attack)

        def queue(rows, verdicts):
            if gallery is not None:
                self._write_images(trial)
                gallery.begin(rows)
            options = {"slots": self.slots, "seed": self.seed, "numbers": rows, "last": self.last}
            options["classes"] = self.clean.shape[1]
            keep = None if gallery is None else gallery.put
            return Queue(attack, self._staged(rows), self.labels[rows], targets[rows], verdicts, keep=keep, **options)

        return Windows(trial.verdicts, self.pool, queue)

    def _targets(self, attack: Attack) -> torch.Tensor:
        """What its loss compares with, for all samples."""
        if not attack.needs_clean:
            return self.labels
        numbers = torch.arange(len(self.labels), device=self.labels.device)
        return attack.targets(self.clean, self.labels, sample_seeds(self.seed, numbers, restart=2**32 - 1))

    def _zero_gradients(self, attack: Attack) -> tuple[int, int]:
        """(samples whose gradient is 0 where the attack starts, samples looked at: the first of those to be attacked).

        At the clean image itself kl has no gradient on any model: such samples are not looked at.
        """
        zero = looked = 0
        targets = self._targets(attack)
        first = self.share.here(self.correct.nonzero()[:PROBED, 0])
        for part in first.split(self.slots) if len(first) else ():
            rows = self._filled(part)
            x = self._staged(rows)
            if attack.memory_format is not None:
                x = x.contiguous(memory_format=attack.memory_format)
            slots = attack.slots(x, targets[rows], attack.eps, sample_seeds(self.seed, rows))
            Engine(attack, slots).start()
            grad, _, _ = attack.objective.gradient(slots.input, attack.aim(slots))
            counts = torch.ones_like(rows, dtype=torch.bool)
            if attack.loss == "kl":
                counts = (slots.adv != to_float(x)).flatten(1).any(1)
            counts = counts[: len(part)]
            looked += int(counts.sum())
            zero += int((counts & ~grad[: len(part)].flatten(1).any(1)).sum())
        return tuple(self.share.team.summed(torch.tensor([zero, looked], device=self.labels.device)).tolist())

    def _batches(self, trial) -> Iterator[tuple[int, int]]:
        """The plain loop for what cannot run on the slots: (batches so far, batches left)."""
        verdicts = trial.verdicts
        chunks = verdicts.todo.nonzero()[:, 0].split(self.slots)
        for i, chunk in enumerate(chunks):
            if not verdicts.unsettled[chunk].any():
                continue
            images = to_float(self._staged(chunk))
            with seeded(one_seed(sample_seeds(self.seed, chunk))), torch.enable_grad():
                returned = trial.adversary(images, self.labels[chunk])
            adv = as_images(returned, images)
            finite = trial.reach.add(adv, images)
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

    def _write_images(self, trial) -> None:
        if trial.gallery is not None:
            trial.gallery.flush(trial.verdicts, self.labels, self.logits)

    def ask_square(self, trial: Trial, save: Callable[[], None]) -> None:
        """After PMA: which of the survivors does the Square attack fool? That counts, too."""
        square = square_of(trial, self.share.shape)
        if square is None or self.labels.ndim > 1 or trial.by_square is not None:
            return
        survivors = self._robust(trial)
        rows = self.share.here(most_likely(survivors, self.clean))
        verdicts = Verdicts(survivors[rows], 1)
        if len(rows):
            labels = self.labels[rows]
            options = {"slots": min(self.slots, ASKED), "seed": self.seed, "numbers": rows}
            options["classes"] = self.clean.shape[1]
            for _ in Queue(square, self._staged(rows), labels, labels, verdicts, **options).run():
                pass
        found = torch.zeros_like(self.labels).index_put((rows,), verdicts.fooled.long())
        trial.by_square = self.share.team.summed(found) > 0
        save()

    def masking(self, order: Sequence[Trial]) -> Iterator[tuple[Trial, Masking]]:
        """What was found after each PMA."""
        n = len(self.labels)
        for i, trial in enumerate(order):
            if trial.by_square is None:
                continue
            survivors = self._robust(trial)
            chance = by_chance([t for t in order[: i + 1] if t.adversary.eps == trial.adversary.eps])
            asked, fooled = min(int(survivors.sum()), ASKED), int((self.correct & ~survivors).sum())
            fell, zero = int(trial.by_square.sum()), trial.zero_gradients or 0.0
            yield trial, Masking(n, asked, fell, fooled, chance, zero)

    def report(self, trials: Sequence[Trial], order: Sequence[Trial], ensemble: bool) -> dict:
        n = len(self.labels)
        for trial in trials:
            by_gradient = trial.adversary.ours and trial.adversary.attack.by_gradient
            trial.zeros = self._zero_gradients(trial.adversary.attack) if by_gradient else None
        masked = list(self.masking(order))
        results = [self._result(trial) for trial in trials]
        ours = [(t.adversary, r) for t, r in zip(trials, results, strict=True) if t.adversary.ours]
        self._warn(masking_checks.of_gradients((t.adversary.title, *t.zeros) for t in trials if t.zeros))
        silenced = [(trial.adversary.title, r["no_prediction"]) for trial, r in zip(trials, results, strict=True)]
        self._warn(masking_checks.of_predictions([("no attack", self.silent), *silenced], n))
        theirs = [trial for trial in trials if not trial.adversary.ours]
        self._warn(note for trial in theirs for note in masking_checks.of_reach(trial.adversary, trial.reach))
        self._warn(masking_checks.of_losses((o.title, r["nonfinite_losses"]) for o, r in ours))
        if not ensemble:
            robust = [(t.adversary.title, t.adversary.attack, self._robust(t)) for t in trials if t.adversary.ours]
            self._warn(masking_checks.of_accuracies(robust))
        if ensemble:
            self._warn(of_square(order, n))
        self._warn(of_masking([(trial.adversary.title, masking) for trial, masking in masked]))
        self._warn(masking_checks.of_late_falls(trial for trial in trials if trial.adversary.ours))
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

    def _robust(self, trial) -> torch.Tensor:
        """Of the samples that it was given, those that it did not fool."""
        return trial.verdicts.todo & ~trial.verdicts.fooled

    def _result(self, trial) -> dict:
        adversary, verdicts, reach = trial.adversary, trial.verdicts, trial.reach
        n, fooled = len(self.labels), verdicts.fooled.tolist()
        first = {
            name: [v if f and adversary.ours else None for v, f in zip(values.tolist(), fooled, strict=True)]
            for name, values in (("restart", verdicts.restart), ("step", verdicts.step))
        }
        target = {}
        if adversary.ours and adversary.attack.loss in TARGETED:
            classes = adversary.attack.target_class(self._targets(adversary.attack), verdicts.restart)
            target = {"target": [c if f else None for c, f in zip(classes.tolist(), fooled, strict=True)]}
        accuracy = {"robust_accuracy": int(self._robust(trial).sum()) / n}
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
            "passes": verdicts.passes if adversary.ours else None,
            "forwards": verdicts.forwards if adversary.ours else None,
            "waste": verdicts.waste if adversary.ours else None,
            "seconds": trial.seconds,
            "nonfinite_losses": verdicts.nonfinite,
            "runs": verdicts.restarts,
            "zero_gradients": trial.zero_gradients,
            "fooled": fooled,
            "said": [said if f else None for said, f in zip(verdicts.said.tolist(), fooled, strict=True)],
            **first,
            **target,
            "latest": trial.latest if adversary.ours else None,
            "settings": adversary.facts(),
        }


def _curves(found: Sequence[Mapping], clean: float) -> list[dict]:
    points: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        points.setdefault(each["norm"], []).append((each["eps"], each["robust_accuracy"]))
    return [curve(norm, of_norm, clean) for norm, of_norm in points.items() if len(of_norm) > 1]
