"""Clean and robust accuracy of a model under several attacks, with everything that is needed to believe them."""

import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastadv._extras import require
from fastadv.attacks import Attack, by_name
from fastadv.attacks.objective import Objective
from fastadv.attacks.state import as_normal, frozen
from fastadv.data import to_float
from fastadv.evaluation import suspicions
from fastadv.evaluation.images import Gallery
from fastadv.evaluation.queue import Queue, Verdicts
from fastadv.evaluation.saved import StateFile, fingerprint
from fastadv.functional import sample_seeds
from fastadv.version import __version__

Batch = tuple[torch.Tensor, torch.Tensor]
ITERATES = ("any", "last")
SAVE_EVERY = 10.0  # seconds between two states on the disk


def evaluate(
    model: Callable,
    data: Batch | Iterable[Batch],
    attacks: Sequence[str | Callable] = ("fgsm", "pgd-20", "pgd-50-10"),
    *,
    eps: float | Sequence[float] = 8 / 255,
    iterate: str = "any",
    slots: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    state: str | Path | None = None,
    save_images: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Robust accuracy of `model` in eval mode, left as found.

    A sample that is misclassified as it is counts as not robust and is not attacked. Any other is fooled by an attack
    when it is misclassified, as whatever class, at an iterate of any restart. An attack of fastadv runs on a fixed
    number of slots; a slot whose sample is fooled or finished takes the next one, in the order (restart, sample), so
    that no gradient is computed for a sample that is settled. Its options autocast, compile, graph and memory_format
    hold, and the verdicts are those of the model under them; chunk does not. Any other attack, and one of fastadv on
    another model, is called batch by batch, and what it returns is judged.

    Args:
        model: any callable from images to logits (N, C), as in `Attack`.
        data: a pair (images, labels) or an iterable of such batches; images (N, ...) in [0, 1] or uint8, labels int64
            (N,). All of it is moved to the device; uint8 stays uint8 there.
        attacks: names (keys of PRESETS), each at every eps; objects of fastadv; or callables from (images, labels) to
            images, such as those of torchattacks or AutoAttack's `run_standard_evaluation`. These two have an eps of
            their own.
        eps: one or several, in pixels of [0, 1].
        iterate: "any": the start and every iterate are judged; "last": the last one of each restart only, the verdict
            of other libraries. "any" is never the weaker.
        slots: images under attack at a time, the batch size of everything.
        seed: of the random starts; that of sample i is `sample_seeds(seed, i, restart)`, whatever its batch. torch's
            generators are seeded with it for other libraries' attacks, and put back.
        device: where to evaluate; None means the model's, or where the images are if it has no parameters.
        state: a file that keeps what is finished, written every few seconds; a run that was cut goes on from it.
        save_images: a folder for the adversarial images as PNG, of the iterate that fooled or the last one. Each pixel
            is the nearest 8-bit code within the budget; they are classified again.
        progress: show a progress bar (on a terminal only); its remaining time is what is needed if nothing more is
            fooled.

    Returns:
        A dict for `json.dump`: "clean_accuracy"; "clean_correct" (a bool per sample); "attacks", a list of {"attack",
        "eps", "robust_accuracy", "passes" (gradients of one image; null where not known), "seconds",
        "nonfinite_losses", "fooled" (a bool per sample), "restart" and "step" (of the first iterate that fooled; null
        where there is none or it is not known), "settings", with save_images also "robust_accuracy_8bit"}; "warnings"
        (also given by `warnings.warn`); "settings"; "versions".

    Raises:
        TypeError: images or labels are of a wrong dtype, or the model's output is.
        ValueError: there are no images; an option, a shape or a label is wrong; or `state` belongs to another run.

    Source: Madry et al. 2018 (arXiv 1706.06083, section 5) for robust accuracy under PGD with restarts.
    """
    if iterate not in ITERATES:
        raise ValueError(f"unknown iterate {iterate!r}: choose one of {', '.join(ITERATES)}")
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    entries = list(_entries(model, attacks, [eps] if isinstance(eps, (int, float)) else eps))
    images, labels = _gathered(data, _device(model, device))
    settings = {"iterate": iterate, "slots": slots, "seed": seed, "attacks": [entry.facts() for entry in entries]}
    file = state and StateFile(state, fingerprint(settings, (images, labels), model))
    notes: list[str] = []
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        run = _Run(model, images, labels, entries, notes, iterate == "last", slots, seed, file, save_images)
        for number in range(len(entries)):
            run.attack(number, progress and sys.stderr.isatty())
    return run.report() | {
        "settings": {
            **settings,
            "images": list(images.shape),
            "dtype": str(images.dtype),
            "device": str(images.device),
        },
        "versions": {"fastadv": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class _Entry:
    """One attack at one eps; `ours` where it can run on the slots."""

    def __init__(self, name: str, attack: Callable, model: Callable):
        self.name, self.attack = name, attack
        self.eps = getattr(attack, "eps", getattr(attack, "epsilon", None))  # AutoAttack's is called epsilon
        self.ours = isinstance(attack, Attack) and attack.model is model
        if self.ours and attack.targeted is True:
            raise ValueError(f"{attack!r} takes its targets for labels: choose targeted='random' or 'least_likely'")
        if self.ours and attack.training_mode != "eval":
            raise ValueError(f"{attack!r} attacks the model in another mode than the eval mode that is evaluated")

    @property
    def restarts(self) -> int:
        return self.attack.restarts if self.ours else 1

    @property
    def title(self) -> str:
        return self.name if self.eps is None else f"{self.name} at {255 * self.eps:.4g}/255"

    def facts(self) -> dict:
        plain = (bool, int, float, str, type(None))
        public = {key: value for key, value in getattr(self.attack, "__dict__", {}).items() if not key.startswith("_")}
        values = {key: value if isinstance(value, plain) else None for key, value in public.items()}
        kept = {key: value for key, value in values.items() if value is not None}
        return {"attack": self.name, "type": type(self.attack).__qualname__, **kept}


class _Run:
    """The clean pass, then one attack after the other, with a state on the disk in between."""

    def __init__(self, model, images, labels, entries, notes, last, slots, seed, file, save_images):
        self.images, self.labels, self.entries, self.notes = images, labels, entries, notes
        self.last, self.slots, self.seed, self.file = last, slots, seed, file
        self._objective = Objective(model, "ce")
        first = self._rows(torch.arange(min(slots, len(images)), device=images.device))
        self.clean = self.logits(images)
        if labels.max() >= self.clean.shape[1]:
            raise ValueError(f"labels must be below the model's {self.clean.shape[1]} classes, got {int(labels.max())}")
        self.correct = self.clean.argmax(1) == labels
        batch = to_float(images[first])
        self._warn(suspicions.of_outputs(self.logits, batch, self._objective.logits(batch)))
        if any(entry.ours for entry in entries):
            self._warn(suspicions.of_gradients(self._objective, batch, labels[first]))
        self.verdicts = [Verdicts(self.correct, entry.restarts) for entry in entries]
        self.seconds = [0.0] * len(entries)
        self.galleries = [self._gallery(save_images, i, entry) for i, entry in enumerate(entries)]
        self._resume()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Of all images, in batches of one shape."""
        parts = []
        for rows in torch.arange(len(images), device=images.device).split(self.slots):
            parts.append(self._objective.logits(to_float(images[self._rows(rows)]))[: len(rows)])
        return torch.cat(parts)

    def _rows(self, rows):
        """`rows` filled up to a full batch: the model sees one shape."""
        return torch.cat((rows, rows[-1:].expand(self.slots - len(rows))))

    def _warn(self, found: Iterable[str]) -> None:
        for note in found:
            self.notes.append(note)
            warnings.warn(note, stacklevel=4)

    # ------------------------------------------------------------------ one attack

    def attack(self, number: int, progress: bool) -> None:
        entry, verdicts = self.entries[number], self.verdicts[number]
        if not bool((verdicts.left > 0).any()):
            return
        begun, before = time.perf_counter(), self.seconds[number]
        saved = begun
        bar = require("tqdm").tqdm(desc=entry.title, unit="pass", unit_scale=True) if progress else None
        try:
            queue, rounds = self._rounds(number)
            for done, left in rounds:
                now = time.perf_counter()
                self.seconds[number] = before + now - begun
                if bar is not None:
                    bar.total = done + left
                    bar.update(done - bar.n)
                if self.file and now - saved >= SAVE_EVERY:
                    if queue is not None:
                        queue.update()
                    self._save(number)
                    saved = time.perf_counter()
        finally:
            if bar is not None:
                bar.close()
        self.seconds[number] = before + time.perf_counter() - begun
        self._save(number)
        if verdicts.nonfinite:
            self._warn([f"{verdicts.nonfinite} losses under {entry.title} were not finite; no step was taken there"])

    def _rounds(self, number):
        """(queue or None, iterator of (done, left at most) while the attack runs)."""
        entry, verdicts, gallery = self.entries[number], self.verdicts[number], self.galleries[number]
        keep = None if gallery is None else gallery.put
        if not entry.ours:
            return None, self._batches(entry.attack, verdicts, keep)
        targets = self.labels
        if entry.attack.needs_clean:
            index = torch.arange(len(self.images), device=self.images.device)
            seeds = sample_seeds(self.seed, index, restart=2**32 - 1)
            targets = entry.attack.targets(self.clean, self.labels, seeds)
        options = {"slots": self.slots, "seed": self.seed, "last": self.last, "keep": keep}
        queue = Queue(entry.attack, self.images, self.labels, targets, verdicts, **options)
        return queue, queue.run()

    def _batches(self, attack, verdicts, keep) -> Iterator[tuple[int, int]]:
        chunks = self.correct.nonzero()[:, 0].split(self.slots)
        for i, chunk in enumerate(chunks):
            if not bool((verdicts.left[chunk] > 0).any()):
                continue
            rows = self._rows(chunk)
            with seeded(self.seed + i), torch.enable_grad():
                adv = attack(to_float(self.images[rows]), self.labels[rows]).detach()
            wrong = (self._objective.logits(adv).argmax(1) != self.labels[rows])[: len(chunk)]
            verdicts.step[chunk[wrong]] = 0
            verdicts.restart[chunk[~wrong]] = 1
            if keep is not None:
                keep(chunk, adv[: len(chunk)])
            yield i + 1, len(chunks) - i - 1

    # ------------------------------------------------------------------ what is kept

    def _gallery(self, folder, number, entry):
        if folder is None:
            return None
        linf = not isinstance(entry.attack, Attack) or entry.attack.largest_eps <= 1
        codes = "" if entry.eps is None else f"-{255 * entry.eps:.4g}"
        return Gallery(Path(folder) / f"{number}-{entry.name}{codes}", self.images, entry.eps if linf else None)

    def _save(self, number) -> None:
        verdicts, gallery = self.verdicts[number], self.galleries[number]
        if gallery is not None:
            gallery.flush(verdicts.todo & (verdicts.left == 0), self.labels, self.logits)
        if not self.file:
            return
        tensors, facts = {}, []
        for i, (each, shown) in enumerate(zip(self.verdicts, self.galleries, strict=True)):
            tensors |= {f"{i}.restart": each.restart, f"{i}.step": each.step}
            tensors |= {} if shown is None else {f"{i}.right": shown.right}
            facts.append({"passes": each.passes, "nonfinite": each.nonfinite, "seconds": self.seconds[i]})
        self.file.save(tensors, {"attacks": facts})

    def _resume(self) -> None:
        loaded = self.file.load() if self.file else None
        if loaded is None:
            return
        tensors, facts = loaded
        tensors = {name: t.to(self.images.device) for name, t in tensors.items()}
        for i, (verdicts, gallery) in enumerate(zip(self.verdicts, self.galleries, strict=True)):
            verdicts.restart, verdicts.step = tensors[f"{i}.restart"], tensors[f"{i}.step"]
            known = facts["attacks"][i]
            verdicts.passes, verdicts.nonfinite, self.seconds[i] = (
                known[key] for key in ("passes", "nonfinite", "seconds")
            )
            if gallery is not None:
                gallery.right = tensors[f"{i}.right"]

    # ------------------------------------------------------------------ the report

    def report(self) -> dict:
        n = len(self.images)
        results = []
        for entry, verdicts, gallery, seconds in zip(
            self.entries, self.verdicts, self.galleries, self.seconds, strict=True
        ):
            fooled = verdicts.fooled.tolist()
            result = {
                "attack": entry.name,
                "eps": entry.eps,
                "robust_accuracy": int((self.correct & ~verdicts.fooled).sum()) / n,
                "passes": verdicts.passes if entry.ours else None,
                "seconds": seconds,
                "nonfinite_losses": verdicts.nonfinite,
                "fooled": fooled,
                "settings": entry.facts(),
            }
            for name in ("restart", "step"):
                values = getattr(verdicts, name).tolist()
                result[name] = [v if f and entry.ours else None for v, f in zip(values, fooled, strict=True)]
            if gallery is not None:
                result["robust_accuracy_8bit"] = int((gallery.right == 1).sum()) / n
            results.append(result)
        pairs = zip(self.entries, results, strict=True)
        self._warn(
            suspicions.of_accuracies([(e.title, e.attack, r["robust_accuracy"]) for e, r in pairs if e.ours]),
        )
        return {
            "clean_accuracy": int(self.correct.sum()) / n,
            "clean_correct": self.correct.tolist(),
            "attacks": results,
            "warnings": self.notes,
        }


def robust_accuracy(
    model: Callable, data: Batch | Iterable[Batch], attack: str | Callable, **options
) -> Mapping[str, float]:
    """{"clean_accuracy": ..., "robust_accuracy": ...} of one attack: `evaluate` in short, without a progress bar."""
    report = evaluate(model, data, [attack], progress=False, **options)
    return {
        "clean_accuracy": report["clean_accuracy"],
        "robust_accuracy": report["attacks"][0]["robust_accuracy"],
    }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, give them back as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _entries(model, attacks, budgets) -> Iterator[_Entry]:
    for attack in [attacks] if isinstance(attacks, str) else attacks:
        if isinstance(attack, str):
            for eps in budgets:
                yield _Entry(attack, by_name(attack, model, eps), model)
        elif callable(attack):
            yield _Entry(getattr(attack, "__name__", type(attack).__name__), attack, model)
        else:
            raise TypeError(f"attacks are names or callables, got {type(attack).__name__}")


def _device(model, device):
    if device is None and isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), None)
    return device


def _gathered(data, device) -> Batch:
    """All images and all labels, checked, on `device`."""
    is_pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], torch.Tensor)
    batches = [data] if is_pair else list(data)
    if not sum(len(labels) for _, labels in batches):
        raise ValueError("there are no images to evaluate")
    images, labels = (as_normal(torch.cat(part)).to(device) for part in zip(*batches, strict=True))
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be a float or uint8 tensor, got {images.dtype}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise TypeError(
            f"labels must be int64 (N,), one for each of images {tuple(images.shape)}, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")
    if images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images must be in [0, 1], got [{images.min():.4g}, {images.max():.4g}]: if they are normalised, pass "
            "them as they were before, and Normalized(model, mean, std) as the model"
        )
    return images, labels
