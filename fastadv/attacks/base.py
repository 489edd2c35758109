"""What every attack has in common: its calling convention, its options, its checks and its manners."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from fastadv.attacks.checks import (
    CHOSEN,
    beyond_the_box,
    check_device,
    check_eps,
    check_has_classes,
    check_images,
    check_labels,
    check_options,
    check_start,
    highest,
)
from fastadv.attacks.engine import Engine, GraphEngine, Slots
from fastadv.attacks.normalized import Normalized
from fastadv.attacks.objective import Objective
from fastadv.attacks.rows import padded, part_of, per_sample, scalar, seeds_for
from fastadv.attacks.state import as_normal, frozen
from fastadv.attacks.verdicts import predicted
from fastadv.data import to_float
from fastadv.functional import new_seed, random_init
from fastadv.ops.autograd import result_like
from fastadv.ops.generator import as_int64


class Attack(ABC):
    """An attack on `model` within `eps`, in pixels of [0, 1].

    While it runs no parameter requires grad, so that no weight gradient is computed, and the model is in eval mode.
    The model is left exactly as it was found, also when it raises: train flags, requires_grad, `.grad`, buffers.
    A model that is not an `nn.Module` is called as it is; one under DistributedDataParallel is attacked through its
    `.module`. Its logits are its output, the output's attribute or key `logits`, or the output's first entry.

    Args:
        model: any callable from images to logits (N, C). `Normalized(model, mean, std)` where it takes normalised
            images: these stay in [0, 1] and eps in pixels.
        eps: budget.
        targeted: False; True: the labels given are the targets; "random": a class other than the label; or
            "least_likely": the class with the smallest logit on the clean image.
        loss: "ce", "margin", "dlr", "kl" (from the model's output on the clean images), or a callable from
            (outputs, targets) to one value per sample; targets are then whatever was passed as labels.
        restarts: the attack is run so often from other random starts, and the strongest result is kept for each
            image: one that is misclassified if there is any, and among those the one with the largest loss; a loss
            of NaN is the smallest.
        training_mode: "eval"; "as_is"; or "batch_norm": batch-norm in train mode, the rest in eval mode.
        autocast: dtype of torch.autocast for the model, such as torch.bfloat16. Only the gradient's sign matters,
            and bfloat16 keeps it; float16 can lose small gradients. On the CPU attention of few tokens stays in
            float32, which is faster there.
        memory_format: of the images while they are attacked, such as torch.channels_last (convert the model yourself).
        compile: run the model and the loss under torch.compile; a batch smaller than the first is filled up, so that
            nothing is compiled twice.
        graph: capture one iteration per shape as a CUDA graph and replay it.
        chunk: attack so many images at a time, for less memory.

    Raises:
        TypeError, ValueError: an option is of a wrong type or value.
    """

    steps = 1
    draws = False  # whether it needs a seed
    norm = "Linf"  # in which eps is a distance

    def __init__(
        self,
        model: Callable,
        eps: float,
        *,
        targeted: bool | str = False,
        loss: str | Callable = "ce",
        restarts: int = 1,
        training_mode: str = "eval",
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        compile: bool = False,
        graph: bool = False,
        chunk: int | None = None,
    ):
        check_eps(eps, self.norm)
        check_options(targeted, loss, restarts, training_mode, graph, chunk)
        self.model = model
        self.eps = eps
        self.targeted = targeted
        self.loss = loss
        self.restarts = restarts
        self.training_mode = training_mode
        self.autocast = autocast
        self.memory_format = memory_format
        self.compile = compile
        self.graph = graph
        self.chunk = chunk
        inner, self._normalization = _unwrapped(model)
        self.objective = Objective(inner, loss, targeted=bool(targeted), autocast=autocast, compiled=compile)
        self._start_losses: torch.Tensor | None = None
        self._seen: list[torch.Tensor] = []  # losses of this call, (steps, n) each
        self._first = True
        self._width = 0  # the batch size that was compiled
        self._graphs: dict[tuple, GraphEngine] = {}

    # ------------------------------------------------------------------ what an attack is

    @abstractmethod
    def start(self, slots: Slots) -> None:
        """Write the first iterate into `slots`."""

    @abstractmethod
    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        """Write the next iterate; `grad` is with respect to `slots.input`."""

    def prepare(self, slots: Slots) -> None:  # noqa: B027 (most attacks keep nothing)
        """Make what the attack keeps in `slots.memory`, as it is before the first step."""

    # ------------------------------------------------------------------ calling it

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        eps: float | torch.Tensor | None = None,
        seed: int | torch.Tensor | None = None,
        x_init: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adversarial images: the last iterate. `images` are not changed. Works under no_grad and inference_mode.

        Args:
            images: (N, ...) in [0, 1], any floating-point type, or uint8 meaning images / 255.
            labels: int64 (N,) on the images' device, each in [0, classes); for the loss "ce" also float (N, C), soft
                labels; for a loss of your own anything with N rows. None means the model's own predictions.
            eps: instead of the attack's: a number, or a tensor (N,) for one per sample.
            seed: of the random start: an int, or an int64 tensor with one element or of shape (N,). None draws one
                from torch's generator on the images' device.
            x_init: images to start from, instead of the attack's own start.

        Returns:
            A tensor like `images` (float32 for uint8), detached, within eps of them and in [0, 1].

        Raises:
            TypeError: images, labels or x_init are of a wrong type or dtype, or the model's output is.
            ValueError: a wrong shape, device or value. Values of labels are looked at in the first batch only.
        """
        self._check_batch(images, labels, x_init)
        with torch.inference_mode(False), torch.no_grad(), frozen(self.model, self.training_mode):
            x = as_normal(images)
            if self.memory_format is not None:
                x = x.contiguous(memory_format=self.memory_format)
            seed = scalar(seed)
            if seed is None and (self.draws or self.restarts > 1 or self.targeted == "random"):
                seed = new_seed(x.device)
            self._seen = []
            try:
                if self._first:
                    self._check_values(x, labels)
                targets = self._targets(x, labels, seed)
                adv = self._attack(x, targets, self._budget(eps, x), seed, x_init)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"out of memory with {len(x)} images: pass chunk={max(1, (self.chunk or len(x)) // 2)}, or autocast"
                ) from error
            self._first = self._first and len(x) == 0
            self._report_losses()
        return adv

    def _attack(self, x, targets, eps, seed, x_init):
        n = len(x)
        if self.chunk is not None and n > self.chunk:
            if seed is not None and not (isinstance(seed, torch.Tensor) and seed.ndim):
                seed = seeds_for(seed, x)  # each chunk needs noise of its own
            parts = [slice(i, i + self.chunk) for i in range(0, n, self.chunk)]
            return torch.cat(
                [self._run(x[p], targets[p], part_of(eps, p), part_of(seed, p), part_of(x_init, p)) for p in parts]
            )
        return self._run(x, targets, eps, seed, x_init)

    def _run(self, x, targets, eps, seed, x_init):
        n = len(x)
        pad = self._width - n if self.compile and self.training_mode == "eval" else 0
        if pad > 0:
            x, targets, eps, seed, x_init = (padded(t, n, pad) for t in (x, targets, eps, seed, x_init))
        self._width = max(self._width, n)
        adv = self._strongest(x, targets, eps, seed, x_init, n)
        return adv[:n] if pad > 0 else adv

    def _strongest(self, x, targets, eps, seed, x_init, n):
        """Of all restarts; the first n of the images are no filling."""
        best = None
        for restart in range(self.restarts):
            if restart > 0:
                x_init = None
                again = seeds_for(seed, x, restart)
            engine = self.engine(self.slots(x, targets, eps, again if restart > 0 else seed, x_init))
            seen = engine.run()[:, :n]
            self._seen.append(seen)
            adv = engine.slots.adv.clone() if self.graph else engine.slots.adv  # a graph's is written again
            if self.restarts == 1:
                self._start_losses = seen[0] if self.steps == 1 and self.draws else None
                return adv
            losses, logits = self.objective.judge(engine.slots.input, targets)
            best = _stronger(best, (adv, losses, self.fooled(logits, targets)))
        return best[0]

    @property
    def start_losses(self) -> torch.Tensor | None:
        """Of the last images under a single step from a random start: their losses there, which it took anyway."""
        return self._start_losses

    def slots(self, x, targets, eps, seed, x_init=None) -> Slots:
        """New slots for these images; `seed` may be None for an attack that draws nothing."""
        adv = None
        if x_init is not None:
            dtype = result_like(x[:0]).dtype
            x_init = as_normal(x_init)
            x_init = x_init if x_init.dtype == torch.uint8 else x_init.to(dtype)
            adv = random_init(x_init, 0.0, seed=0, out=torch.empty_like(x_init, dtype=dtype))  # a copy in the box
            if self.memory_format is not None:
                adv = adv.contiguous(memory_format=self.memory_format)
        slots = Slots(x, targets, eps, seed, adv=adv)
        if self._normalization is not None:
            slots.z = result_like(x)
            if adv is not None:
                slots.z.copy_(self._normalization(adv))
        return slots

    def fooled(self, logits: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor | None:
        """Which samples are where the attack wants them: (N,) bool, None where outputs or targets are no classes.

        No prediction is wrong for every label, and reaches no target.
        """
        if logits is None or targets.is_floating_point():
            return None
        return (predicted(logits) == targets) == bool(self.targeted)

    def engine(self, slots: Slots) -> Engine:
        """What iterates on `slots`: with `graph`, a captured one, whose own slots then hold the same."""
        if not self.graph:
            return Engine(self, slots)
        if isinstance(slots.seed, int):  # a number would be captured as it is
            slots.seed = torch.full((), as_int64(slots.seed), dtype=torch.int64, device=slots.x.device)
        tensors = slots.tensors()
        eps = slots.eps if not isinstance(slots.eps, torch.Tensor) else None
        key = (eps, slots.given, *((n, t.shape, t.stride(), t.dtype, t.device) for n, t in tensors.items()))
        if key not in self._graphs:
            self._graphs[key] = GraphEngine(self, slots)
        engine = self._graphs[key]
        engine.load(slots)
        return engine

    def also(self, slots: Slots) -> dict:
        """Keywords for the ops: with normalisation they write the model's next input too."""
        return {} if slots.z is None else {"normalization": self._normalization, "z": slots.z}

    def in_pixels(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient with respect to the model's input as one with respect to the image, in float32 at least."""
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if self._normalization is None:
            return grad
        return grad * self._normalization.parameters(grad.ndim, grad.dtype, grad.device)[1]

    # ------------------------------------------------------------------ targets

    def _targets(self, x, labels, seed):
        if labels is not None and (labels.is_floating_point() or not self.needs_clean):
            return as_normal(labels)
        seeds = seed
        if self.targeted == "random":
            seeds = seeds_for(seed, x, 2**32 - 1)
        return self.targets(self._clean_logits(x), labels, seeds)

    @property
    def needs_clean(self) -> bool:
        """Whether its targets depend on the model's outputs on the clean images."""
        return self.loss == "kl" or self.targeted in CHOSEN

    def targets(
        self, logits: torch.Tensor, labels: torch.Tensor | None, seeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the loss compares with, from the clean images' logits (N, C); `seeds` (N,) draw random targets."""
        if self.loss == "kl":
            return logits.softmax(1)
        if labels is None:
            labels = logits.argmax(1)
        if self.targeted == "least_likely":
            return logits.scatter(1, labels[:, None], torch.inf).argmin(1)
        if self.targeted == "random":
            classes = logits.shape[1]
            return (labels + 1 + (seeds & 0xFFFFFFFF) % (classes - 1)) % classes
        return labels

    def _clean_logits(self, x):
        pixels = to_float(x)
        pixels = pixels if self._normalization is None else self._normalization(pixels)
        if self.chunk is None or len(x) <= self.chunk:
            return self.objective.logits(pixels)
        return torch.cat([self.objective.logits(part) for part in pixels.split(self.chunk)])

    # ------------------------------------------------------------------ checks

    def _warn_of_step(self, alpha) -> None:
        if alpha is not None and alpha > 2 * self.eps:
            below = type(self).__mro__[: type(self).__mro__.index(Attack)]
            constructors = sum("__init__" in vars(cls) for cls in below)  # each is a frame between here and the caller
            warnings.warn(
                f"alpha = {self._shown('alpha', alpha)} is more than twice eps = {self._shown('eps', self.eps)}: "
                "a step crosses the ball",
                stacklevel=2 + constructors,
            )

    def _budget(self, eps, x):
        if eps is None:
            return self.eps
        if not isinstance(eps, torch.Tensor):
            check_eps(eps, self.norm)
            return eps
        if eps.shape not in ((), (len(x),), (len(x), *(1,) * (x.ndim - 1))):
            raise ValueError(f"eps must be a number or a tensor of shape ({len(x)},), got {tuple(eps.shape)}")
        return eps if eps.ndim == 0 else eps.reshape(-1, *(1,) * (x.ndim - 1))

    def _check_batch(self, images, labels, x_init) -> None:
        check_images(images)
        check_device(images.device, self.model)
        if x_init is not None:
            check_start(x_init, images)
        if labels is not None:
            check_labels(labels, images, soft=self.loss in ("ce", "kl"), any_kind=callable(self.loss))
            check_has_classes(labels, self.targeted)
        elif callable(self.loss) or self.targeted is True:
            raise ValueError("labels are missing: a loss of your own, or targeted=True, needs them")

    def _check_values(self, x, labels) -> None:
        """In the first batch only, because it waits for the device: a label that is too large kills a CUDA context."""
        if not len(x):
            return
        wrong = beyond_the_box(x)
        if wrong:
            warnings.warn(wrong, stacklevel=3)
        if labels is not None and labels.dtype == torch.int64 and not callable(self.loss):
            self.objective.check_classes(highest(labels), self._clean_logits(x) if self.compile else None)

    def _report_losses(self) -> None:
        """Warn of losses that were not finite, counted at the end: small models are waited for by the launches."""
        seen, self._seen = self._seen, []
        if seen[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        # x - x is 0 where x is finite, else NaN. One read for all chunks and restarts.
        if count := int(sum((losses - losses != 0).sum() for losses in seen)):
            warnings.warn(
                f"{count} losses were not finite; where a gradient is not, its sample takes no step. Is the model in a "
                "half precision that its logits leave?",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        hidden = ("model", "objective", "draws")
        settings = (f"{name}={self._shown(name, value)}" for name, value in shown.items() if name not in hidden)
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(settings)})"

    def _shown(self, name, value):
        if self.norm == "Linf" and name in ("eps", "alpha", "noise") and isinstance(value, float) and 0 < value < 1:
            in_255 = round(value * 255, 6)
            return f"{in_255:g}/255" if abs(in_255 - value * 255) < 1e-9 else f"{value:g}"
        return getattr(value, "__name__", None) or repr(value)


def _unwrapped(model):
    """(what is called, its normalisation or None)."""
    normalization = None
    while isinstance(model, (Normalized, nn.parallel.DistributedDataParallel)):
        if isinstance(model, Normalized):
            model, normalization = model.model, model.normalization
        else:
            model = model.module
    return model, normalization


def _stronger(best, new):
    if best is None:
        return new
    better = (new[1] > best[1]) | (best[1].isnan() & ~new[1].isnan())
    if new[2] is not None:
        better = (new[2] & ~best[2]) | ((new[2] == best[2]) & better)
    return tuple(
        None if b is None else torch.where(per_sample(better, b), n, b) for n, b in zip(new, best, strict=True)
    )
