"""Clean and robust accuracy of a model under several attacks, with everything that is needed to believe them."""

import platform
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastadv.attacks import LOSSES, Attack
from fastadv.attacks.checks import highest
from fastadv.attacks.engine import Engine
from fastadv.attacks.normalized import Normalized, normalization_of
from fastadv.attacks.objective import Objective
from fastadv.attacks.state import frozen, on
from fastadv.attacks.verdicts import NONE, is_label, verdict
from fastadv.data import to_float
from fastadv.data.share import Share
from fastadv.evaluation import suspicions
from fastadv.evaluation.alone import alone
from fastadv.evaluation.ensemble import Trial, budgets, curve, fooled_by, in_turn
from fastadv.evaluation.foreign import Reach, as_images, one_seed
from fastadv.evaluation.identity import fingerprint, untold
from fastadv.evaluation.images import Gallery, Kept
from fastadv.evaluation.masking import ASKED, Masking, by_chance, most_likely, of_masking, of_square, square_of
from fastadv.evaluation.opponents import EPS, Opponent, check_they_take, is_several, opponents
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.queue import Queue, Verdicts
from fastadv.evaluation.samples import Batch, gathered
from fastadv.evaluation.saved import StateFile
from fastadv.evaluation.windows import Windows
from fastadv.functional import sample_seeds
from fastadv.locks import held
from fastadv.version import __version__

ITERATES = ("any", "last")
TARGETED = [name for name, loss in LOSSES.items() if loss.compares == "pairs"]
ATTACKS = ("fgsm", "pgd-10", "pma")
SAVE_EVERY = 10.0  # seconds between two states on the disk
SAVING = 0.5  # seconds that one may take; longer ones are as much rarer
PROBED = 64  # samples whose first gradients are looked at
KEPT = ("restart", "step", "said")  # of the verdicts, beside their counts


def evaluate(
    model: Callable,
    data: Batch | Iterable[Batch],
    attacks: Sequence[str | Callable] = ATTACKS,
    *,
    eps: float | Sequence[float] = EPS,
    ensemble: bool = True,
    images_normalized: tuple | None = None,
    iterate: str = "any",
    slots: int = 128,
    pool: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    state: str | Path | None = None,
    save_images: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Robust accuracy of `model` in eval mode, left as found.

    A sample that is misclassified as it is counts as not robust and is not attacked. Any other is fooled by an attack
    when it is misclassified, as whatever class, at an iterate of any restart. Where a logit is NaN, or all are equal,
    the model gives no prediction: that is misclassified whatever the label, and counted apart. Labels (N, C), 0 or 1
    for each logit, are several a sample, which is right where the sign of every logit is that of its label; as for a
    model of one logit, attacks then take loss="bce".

    The attacks run one after the other, and each gets the samples that are left: robust is what withstands all of them
    within a budget. A sample that is fooled within some eps is fooled within any larger one of the same norm.

    An attack of fastadv runs on a fixed number of slots; a slot whose sample is fooled or finished takes the next one,
    in the order (restart, sample). On a GPU, and with compile or graph, slots for which no sample is left take further
    restarts and targets of samples that are under attack; the verdict is that of the first of these, in their order,
    that fools. Its options autocast, compile, graph and memory_format hold, and the verdicts are those of the model
    under them; chunk does not. Any other attack, and one of fastadv on another model, is called batch by batch, and
    what it returns is judged.

    Args:
        model: any callable from images to logits (N, C), as in `Attack`.
        data: a pair (images, labels) of tensors or NumPy arrays, or a loader or Dataset of such pairs, or of dicts;
            images (N, ...) in [0, 1] or uint8, labels int64 (N,), or 0 or 1 (N, C). What is attacked is moved to the
            device; uint8 stays uint8 there. With a `Share` of images and all labels each process of its team attacks
            its own images, and all get the report on the whole.
        attacks: one or several: names (keys of PRESETS, or of ENSEMBLES for several that follow each other), each at
            every eps; objects of fastadv, `AutoAttack` too; or callables from (images, labels) to images (a tensor, a
            NumPy array, or a pair that begins with one), such as those of torchattacks or the `run_standard_evaluation`
            of AutoAttack's authors. These two have an eps of their own; where they have no attribute `norm`, "Linf" or
            "L2", they are independent of the others and count for no budget.
        eps: one or several, in pixels of [0, 1].
        ensemble: whether each attack gets what those before it left; else all get all samples, for figures that do not
            depend on each other.
        images_normalized: (mean, std) of a loader that normalises already, for a model that takes such images; eps
            stays in pixels. Attacks are then names.
        iterate: "any": the start and every iterate are judged; "last": the last one of each restart only, the verdict
            of other libraries. "any" is never the weaker.
        slots: images under attack at a time, the batch size of everything; no more than there are images. Slots beyond
            the number of samples that survive, times their restarts and targets, stay empty in the end: on a GPU they
            cost their time, so with few images choose few.
        pool: images on the device at a time, None for all: for data sets that do not fit there. Take many times the
            slots, because these run empty before the next images come.
        seed: of the random starts; that of sample i is `sample_seeds(seed, i, restart)`, whatever its batch. For other
            libraries' attacks the generators of torch, NumPy and Python are seeded from those of a batch's samples, and
            put back.
        device: where to evaluate; None means the model's, or where the images are if it has no parameters.
        autocast, memory_format: as in `Attack`, of the clean images, of those that other libraries' attacks return, and
            of attacks by name; an attack of fastadv that is given has its own.
        state: a file that keeps what is finished, written every few seconds; a run that was cut goes on from it. It
            belongs to the settings, the data, the model and the attacks, with all that these hold or close over; an
            attribute `fastadv_key`, a string, says instead what one of them is.
        save_images: a folder for the adversarial images as PNG, of the iterate that fooled or the last one. Each pixel
            is the nearest 8-bit code within the budget; they are classified again.
        progress: show a progress bar on a terminal, whose remaining time is what is needed if nothing more is fooled;
            elsewhere log a line a minute and at the end of each attack (logger "fastadv", level INFO).

    Returns:
        A dict for `json.dump`: "clean_accuracy"; "robust_accuracy" (the share that withstands all attacks; a list where
        there are several budgets, in their order); "budgets", a list of {"norm", "eps", "robust_accuracy", "attacks"
        (those that count), "robust" (a bool per sample)}; "curves", what `curve` says of each norm with several
        budgets; "masking", what the Square attack and chance found after each PMA, see `Masking`; "clean_correct" (a
        bool per sample); "clean_said" (a class per sample, -1 where the model gives none; with labels (N, C) 1 where
        all are right and 0 where one is not); "no_prediction" (clean samples that get none); "attacks", a list of
        {"attack", "eps", "norm", "robust_accuracy" (the share that it was given and did not fool), "given" (samples
        that it was to fool), "largest_linf" and "largest_l2" (how far another library's attack went; null for those of
        fastadv, which stay in their ball), "no_prediction" (samples that are fooled because they get none), "passes"
        and "forwards" (gradients and forward passes of one image; null where not known), "waste" (those of the passes
        that were in a run after the one that fooled, begun because slots were free; of the forward passes, where an
        attack takes no gradients; 0 on the CPU without compile and graph; null likewise), "seconds",
        "nonfinite_losses", "zero_gradients" (share of the first samples to be attacked whose gradient is exactly 0 at
        the attack's start), "fooled" (a bool per sample), "said" (what it is then taken for, as in "clean_said"; null
        for the others), "restart" and "step" (of the first iterate that fooled; where an attack goes towards one class
        after the other its runs are counted through; null where there is none or it is not known), "target" (of such an
        attack, the class that this run went to), "runs" (of a sample that withstands), "latest" (restart and step of
        the sample that fell last), "settings", with save_images also "robust_accuracy_8bit"}; "warnings" (also given by
        `warnings.warn`); "settings"; "versions". Where another library's attack left [0, 1] or its eps by more than
        rounding, its robust accuracy is null, it counts for no budget, and a warning says how far it went.

    Raises:
        InUseError: another process has the `state`; an OSError.
        TypeError: data, an option or the model's output are of a wrong type; or with `state` the model or an attack
            hold something that cannot be told from another one, such as an open file.
        ValueError: there are no images; an option, a shape or a label is wrong; or `state` belongs to another run.

    Source: Madry et al. 2018 (arXiv 1706.06083, section 5) for robust accuracy under PGD with restarts.
    """
    if iterate not in ITERATES:
        raise ValueError(f"unknown iterate {iterate!r}: choose one of {', '.join(ITERATES)}")
    check_counts(slots=slots, pool=pool, seed=seed)
    normalization = None
    if images_normalized is not None:
        normalization = normalization_of(images_normalized, model)
        if not all(isinstance(attack, str) for attack in ([attacks] if isinstance(attacks, str) else attacks)):
            raise ValueError(
                "with images_normalized attacks are names: for others evaluate Normalized(model, mean, std) on images "
                "in [0, 1]"
            )
        model = Normalized(model, *images_normalized)
    passes = {"autocast": autocast, "memory_format": memory_format}
    against = opponents(model, attacks, eps, **passes)
    images, labels = gathered(data, model, device, normalization)
    most = images.most if isinstance(images, Share) else len(images)
    if isinstance(images, Share) and not images.alone and (state, save_images, normalization) != (None, None, None):
        raise ValueError(
            "images that several processes share are evaluated without state, save_images and normalization"
        )
    settings = {"iterate": iterate, "ensemble": ensemble, "slots": min(slots, most), "seed": seed}
    settings["save_images"] = save_images is not None
    settings |= {name: str(value) for name, value in passes.items() if value is not None}

    def gallery(number, opponent):
        if save_images is None:
            return None
        name = "-".join([f"{number}", opponent.name, *([] if opponent.eps is None else [opponent.budget])])
        eps = opponent.eps if opponent.is_linf else None
        return Gallery(Path(save_images) / name, images, eps, labels.device)

    return judged(model, images, labels, against, settings, pool, state, gallery, progress=progress, **passes)[0]


def check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) and (name, value) != ("pool", None):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if name != "seed" and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def judged(
    model: Callable,
    images: torch.Tensor,
    labels: torch.Tensor,
    against: Sequence[Opponent],
    settings: Mapping,
    pool: int | None,
    state: str | Path | None,
    gallery: Callable[[int, Opponent], Gallery | Kept | None],
    *,
    told: Callable[["Run", Sequence[Trial]], None] = lambda run, ended: None,
    progress: bool = False,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[dict, "Run", list[Trial]]:
    """What `evaluate` does once its arguments are looked at: (what it returns, the run, an attack each).

    Args:
        settings: iterate, ensemble, slots, seed, and what else makes it another run.
        gallery: gets an opponent's number and the opponent.
        told: gets the attacks that have ended, before the first one and after each.
    """
    share = images if isinstance(images, Share) else Share(images)
    check_they_take(against, share.mine, labels)
    settings = {**settings, "attacks": [each.facts() for each in against]}
    file = None if state is None else StateFile(state, _identity(settings, model, images, labels, against))
    kept = nullcontext() if state is None else held(state, f"the state {state} of an evaluation")
    with kept, torch.inference_mode(False), torch.no_grad(), alone(model), frozen(model), on(labels.device):
        run = Run(model, share, labels, against, settings, pool, autocast, memory_format)
        trials = [run.trial(opponent, gallery(number, opponent)) for number, opponent in enumerate(against)]
        if file is not None:
            _load(file, trials)
        order = in_turn(trials)
        told(run, [])
        save = partial(_save, file, trials)
        save()  # where that cannot be written it is known now
        for i, trial in enumerate(order):
            if settings["ensemble"]:
                run.hand_on(order[:i], trial)
            run.attack(trial, save, progress)
            run.ask_square(trial, save)
            told(run, order[: i + 1])
        report = run.report(trials, order, settings["ensemble"])
    report |= {
        "settings": {
            **settings,
            "images": list(share.shape),
            "dtype": str(images.dtype),
            "device": str(labels.device),
        },
        "versions": {"fastadv": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return report, run, trials


class Run:
    """What all attacks of an evaluation share: the samples, the outputs on the clean ones, the warnings."""

    def __init__(self, model, share, labels, against, settings, pool, autocast, memory_format):
        self.share, self.labels, self.pool, self._layout = share, labels, pool, memory_format
        self.last, self.slots, self.seed = settings["iterate"] == "last", settings["slots"], settings["seed"]
        self.notes: list[str] = []
        attacks = [opponent.attack for opponent in against if opponent.ours]
        signs = len(attacks) == len(against) and all(attack.compares == "signs" for attack in attacks)
        draws = max((attack.eot for attack in attacks), default=1)
        self._objective = Objective(model, "bce" if signs else "ce", eot=draws, autocast=autocast)
        if labels.ndim == 1:
            self._objective.check_classes(highest(labels))
        self.clean = share.joined(self.logits(share.mine) if len(share) else None, labels.device)
        said = verdict(self.clean, labels)
        self.said, self.correct, self.silent = said, is_label(said, labels), int((said == NONE).sum())
        self._warn_of_outputs(draws, autocast)

    def _warn_of_outputs(self, draws: int, autocast: torch.dtype | None) -> None:
        first = self.share.rows[: self.slots].to(self.labels.device)
        found = ()
        if len(first):
            seen = self._seen_by_model(self._staged(first))
            found = suspicions.of_outputs(self._objective.logits, seen, draws, autocast)
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

    def trial(self, opponent: Opponent, gallery: Gallery | Kept | None) -> Trial:
        reach = None if opponent.ours else Reach()
        runs = opponent.attack.runs(self.clean.shape[1]) if opponent.ours else 1
        return Trial(opponent, Verdicts(self.correct, runs), gallery, reach)

    def left(self, ended: Sequence[Trial]) -> torch.Tensor:
        """Samples that are classified correctly and that none of `ended` fooled, (N,) bool."""
        fooled = [trial.verdicts.fooled for trial in ended]
        return self.correct & ~torch.stack([~self.correct, *fooled]).any(0)

    def hand_on(self, before: Sequence[Trial], trial: Trial) -> None:
        """Give `trial` those samples alone that the trials before it have not fooled within its budget."""
        budget = (trial.opponent.norm, trial.opponent.eps) if trial.opponent.has_budget else (None, None)
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
        for name in KEPT:
            setattr(verdicts, name, share.merged(getattr(verdicts, name)))
        counts = torch.tensor([getattr(verdicts, name) for name in Verdicts.COUNTS], device=todo.device)
        for name, count in zip(Verdicts.COUNTS, (before + share.team.summed(counts - before)).tolist(), strict=True):
            setattr(verdicts, name, count)
        if trial.reach is not None:
            trial.reach = Reach.of(share.team.gathered(trial.reach))

    def _run(self, trial: Trial, save: Callable[[], None], progress: bool) -> None:
        opponent, earlier = trial.opponent, trial.seconds
        begun = saved = time.perf_counter()
        pause = SAVE_EVERY
        windows = self._windows(trial) if opponent.ours else None
        unit = "pass" if opponent.ours else "batch"
        with Progress(opponent.title, unit, progress) as shown:
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
        attack, gallery, targets = trial.opponent.attack, trial.gallery, self._targets(trial.opponent.attack)

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
                returned = trial.opponent(images, self.labels[chunk])
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
            chance = by_chance([t for t in order[: i + 1] if t.opponent.eps == trial.opponent.eps])
            asked, fooled = min(int(survivors.sum()), ASKED), int((self.correct & ~survivors).sum())
            fell, zero = int(trial.by_square.sum()), trial.zero_gradients or 0.0
            yield trial, Masking(n, asked, fell, fooled, chance, zero)

    def report(self, trials: Sequence[Trial], order: Sequence[Trial], ensemble: bool) -> dict:
        n = len(self.labels)
        for trial in trials:
            by_gradient = trial.opponent.ours and trial.opponent.attack.by_gradient
            trial.zeros = self._zero_gradients(trial.opponent.attack) if by_gradient else None
        masked = list(self.masking(order))
        results = [self._result(trial) for trial in trials]
        ours = [(t.opponent, r) for t, r in zip(trials, results, strict=True) if t.opponent.ours]
        self._warn(suspicions.of_gradients((t.opponent.title, *t.zeros) for t in trials if t.zeros))
        silenced = [(trial.opponent.title, r["no_prediction"]) for trial, r in zip(trials, results, strict=True)]
        self._warn(suspicions.of_predictions([("no attack", self.silent), *silenced], n))
        theirs = [trial for trial in trials if not trial.opponent.ours]
        self._warn(note for trial in theirs for note in suspicions.of_reach(trial.opponent, trial.reach))
        self._warn(suspicions.of_losses((o.title, r["nonfinite_losses"]) for o, r in ours))
        if not ensemble:
            robust = [(t.opponent.title, t.opponent.attack, self._robust(t)) for t in trials if t.opponent.ours]
            self._warn(suspicions.of_accuracies(robust))
        if ensemble:
            self._warn(of_square(order, n))
        self._warn(of_masking([(trial.opponent.title, masking) for trial, masking in masked]))
        self._warn(suspicions.of_late_falls(trial for trial in trials if trial.opponent.ours))
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
            "masking": [{"after": trial.opponent.title, **asdict(masking)} for trial, masking in masked],
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
        opponent, verdicts, reach = trial.opponent, trial.verdicts, trial.reach
        n, fooled = len(self.labels), verdicts.fooled.tolist()
        first = {
            name: [v if f and opponent.ours else None for v, f in zip(values.tolist(), fooled, strict=True)]
            for name, values in (("restart", verdicts.restart), ("step", verdicts.step))
        }
        target = {}
        if opponent.ours and opponent.attack.loss in TARGETED:
            classes = opponent.attack.target_class(self._targets(opponent.attack), verdicts.restart)
            target = {"target": [c if f else None for c, f in zip(classes.tolist(), fooled, strict=True)]}
        accuracy = {"robust_accuracy": int(self._robust(trial).sum()) / n}
        if trial.gallery is not None:
            accuracy |= trial.gallery.facts()
        if reach is not None and (reach.leaves_box() or reach.exceeds(opponent.eps, opponent.norm)):
            accuracy = dict.fromkeys(accuracy)
        return {
            "attack": opponent.name,
            "eps": opponent.eps,
            "norm": opponent.norm,
            **accuracy,
            "given": int(verdicts.todo.sum()),
            "largest_linf": reach and reach.linf,
            "largest_l2": reach and reach.l2,
            "no_prediction": int(verdicts.silenced.sum()),
            "passes": verdicts.passes if opponent.ours else None,
            "forwards": verdicts.forwards if opponent.ours else None,
            "waste": verdicts.waste if opponent.ours else None,
            "seconds": trial.seconds,
            "nonfinite_losses": verdicts.nonfinite,
            "runs": verdicts.restarts,
            "zero_gradients": trial.zero_gradients,
            "fooled": fooled,
            "said": [said if f else None for said, f in zip(verdicts.said.tolist(), fooled, strict=True)],
            **first,
            **target,
            "latest": trial.latest if opponent.ours else None,
            "settings": opponent.facts(),
        }


def _identity(settings, model, images, labels, against: Sequence[Opponent]) -> str:
    """Of a run, for its state."""
    parts = {name: value for name, value in settings.items() if name != "attacks"}
    for number, (opponent, facts) in enumerate(zip(against, settings["attacks"], strict=True), 1):
        attack = f"attack {number}"
        parts |= {f"{name} of {attack}": value for name, value in facts.items()} | {attack: opponent.attack}
    weights = model.state_dict() if isinstance(model, nn.Module) else {}
    run = fingerprint({**parts, "images": images, "labels": labels, "the model's weights": weights, "the model": model})
    if untold(run):
        raise TypeError(f"there is no state for such a run: {', '.join(untold(run))}")
    return run


def _curves(found: Sequence[Mapping], clean: float) -> list[dict]:
    points: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        points.setdefault(each["norm"], []).append((each["eps"], each["robust_accuracy"]))
    return [curve(norm, of_norm, clean) for norm, of_norm in points.items() if len(of_norm) > 1]


def _save(file: StateFile | None, trials: Sequence[Trial]) -> None:
    if file is None:
        return
    tensors, facts = {}, []
    for i, trial in enumerate(trials):
        verdicts = trial.verdicts
        tensors |= {f"{i}.{name}": getattr(verdicts, name) for name in KEPT}
        if trial.by_square is not None:
            tensors[f"{i}.by_square"] = trial.by_square
        if trial.gallery is not None:
            tensors |= {f"{i}.images.{name}": t for name, t in trial.gallery.state().items()}
        known = {name: getattr(verdicts, name) for name in Verdicts.COUNTS}
        facts.append(known | {"seconds": trial.seconds, "reach": trial.reach and asdict(trial.reach)})
    file.save(tensors, {"attacks": facts})


def _load(file: StateFile, trials: Sequence[Trial]) -> None:
    loaded = file.load()
    if loaded is None:
        return
    tensors, facts = loaded
    for i, (trial, known) in enumerate(zip(trials, facts["attacks"], strict=True)):
        verdicts, device = trial.verdicts, trial.verdicts.todo.device
        for name in KEPT:
            setattr(verdicts, name, tensors[f"{i}.{name}"].to(device))
        for name in Verdicts.COUNTS:
            setattr(verdicts, name, known[name])
        verdicts.restarts = max(verdicts.restarts, int((verdicts.restart + verdicts.fooled.long()).max()))
        trial.seconds = known["seconds"]
        if f"{i}.by_square" in tensors:
            trial.by_square = tensors[f"{i}.by_square"].to(device)
        trial.reach = known["reach"] and Reach(**known["reach"])
        if trial.gallery is not None:
            prefix = f"{i}.images."
            trial.gallery.load({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def robust_accuracy(
    model: Callable, data: Batch | Iterable[Batch], attack: str | Callable, **options
) -> Mapping[str, float | list[float | None] | None]:
    """{"clean_accuracy": ..., "robust_accuracy": ...} of one attack: `evaluate` in short, without a progress bar.

    With several `eps` the robust accuracy is a list, one for each in their order.
    """
    report = evaluate(model, data, [attack], progress=False, **options)
    found = [result["robust_accuracy"] for result in report["attacks"]]
    accuracy = found if is_several(options.get("eps")) else found[0]
    return {"clean_accuracy": report["clean_accuracy"], "robust_accuracy": accuracy}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python inside, give them back as they were."""
    # NumPy's old one: it is what other libraries draw from.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])
