"""The base class of all attacks: calling convention, options, checks, and the care that leaves a model unchanged."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from fastadv._warnings import warn
from fastadv.attacks.arguments import Arguments
from fastadv.attacks.attributes import Clip, TargetFunction
from fastadv.attacks.checks import (
    BOX,
    box_of,
    check_clip,
    check_eps,
    check_options,
    check_whole,
    in_ball,
)
from fastadv.attacks.engine import Engine, GraphEngine, Slots, baked, is_ours
from fastadv.attacks.inputs import Inputs
from fastadv.attacks.lengths import Lengths
from fastadv.attacks.losses import LossFunction
from fastadv.attacks.modes import Modes
from fastadv.attacks.normalized import denormalized, normalization_of
from fastadv.attacks.objective import Objective
from fastadv.attacks.options import assignable, options_of
from fastadv.attacks.outcomes import Outcome, better_where, stronger
from fastadv.attacks.samplewise import has_rows, put_, scalar
from fastadv.attacks.targets import Targets
from fastadv.attacks.verdicts import is_label, verdict
from fastadv.attacks.watch import Watch
from fastadv.functional import Normalization, new_seed, pgd_step_, random_init, to_float
from fastadv.names import instead
from fastadv.nn.frozen import as_normal, frozen, on
from fastadv.nn.logits import AnyModel
from fastadv.nn.normalized import Normalized, is_plain
from fastadv.nn.parallel import one_process
from fastadv.ops.autograd import result_like
from fastadv.ops.generator import as_int64
from fastadv.ops.reference import compute_dtype

GRAPHS = 8  # that are kept; each has its own memory


class Attack(Modes, Targets, Arguments, Lengths):
    """An attack on `model` within `eps`, in the images' units, [0, 1].

    While it runs no parameter requires grad, so that no weight gradient is computed, and the model is in eval mode.
    The model is left exactly as it was found, also when it raises: train flags, requires_grad, `.grad`, buffers.
    Of a model that is no `nn.Module`, such as `lambda x: net(x)`, this holds for the modules inside: those in the
    function's closure or the globals that it uses, in a method's object or a partial, and in what these hold; and
    likewise for those inside a `loss` or `targeted` of your own, or in a list, function or object of your own class
    or Python's that a module holds. A model under DistributedDataParallel is attacked through its `.module`. Its logits
    are its output, the output's attribute or key `logits`, or the only float matrix in the output.

    Args:
        model: any callable from images to logits (N, C). `Normalized(model, mean, std)` where it takes normalised
            images: these stay in [0, 1] and eps in pixels.
        eps: budget.
        targeted: False; True: the labels given are the targets; "random": a class other than the label;
            "least_likely": the class with the smallest logit on the clean image; or a callable from (images, labels),
            images in pixels, to the targets, int64 (N,).
        kth_min: "least_likely" is the class with the k-th smallest logit, the label left out.
        loss: "ce", "margin", "dlr", "probability_margin"; "targeted_margin" or "targeted_dlr", towards one class after
            the other; "bce", for a single logit or several labels a sample; "kl" (from the model's output on the clean
            images; it takes a random start, for it is 0 at the image itself); or a callable from (outputs, targets) to
            one value per sample; targets are then whatever was passed as labels.
        target_classes: number of classes that the losses "targeted_margin" and "targeted_dlr" go towards, one after the
            other: those with the highest logits on the clean images, the label left out. Logits are compared in
            float32; of two equal ones the lower class comes first.
        restarts: number of runs, each from another random start (and towards each target class). Without one, as of
            BIM, they are equal unless the model draws. Each image keeps its strongest result: the one with the largest
            loss, where NaN is the smallest. With a named loss other than "kl" and labels that are not soft, a
            misclassified result comes before any other.
        best_iterate: a call returns for each image the strongest of all iterates, in the same order, instead of the
            last one. It costs a forward pass more.
        eot: number of draws, for a model that answers at random. Gradient and loss are the means of the draws at one
            point, and the prediction is that of their mean probabilities. Athalye et al. 2018 (arXiv 1802.00420,
            section 4.2).
        training_mode: "eval"; "as_is"; or "batch_norm": batch-norm in train mode, the rest in eval mode.
        autocast: dtype of torch.autocast for the model, such as torch.bfloat16. Only the gradient's sign matters,
            and bfloat16 keeps it; float16 can lose small gradients. On the CPU attention of few tokens stays in
            float32, which is faster there.
        memory_format: of the images during the attack, such as torch.channels_last. Convert the model yourself.
        compile: run the model and the loss under torch.compile. A batch smaller than the first is filled up, so that
            nothing is compiled twice.
        graph: capture one iteration per shape as a CUDA graph and replay it.
        chunk: number of images that are attacked at a time, for less memory. One seed for all images then becomes one
            for each, so that the noise differs from a run without `chunk`; seeds for each image stay.
        clip: (lo, hi), the box that images are in; None for inputs without one, such as embeddings. With any but the
            default eps and the other lengths are in the inputs' own unit.
        images_normalized: (mean, std), each a number or one per channel, where the images that are passed, x_init too,
            are (pixels - mean) / std and the model takes such images. The result is normalised, too; eps, alpha, noise
            and clip stay in pixels, where the ball holds. The result is rounded once more, which in float16 and
            bfloat16 may leave the ball by one rounding. The attack is the same as one on `Normalized(model, mean, std)`
            with pixels. None: images are pixels.

    All of these are attributes. One that is assigned later acts as if it had been passed here; another name is
    refused.

    Raises:
        AttributeError: a name that is no setting was assigned.
        TypeError: an option is unknown or of a wrong type.
        ValueError: an option is of a wrong value.
    """

    alpha: float | torch.Tensor | None = None
    """Step size: a number; None, for eps; or a float tensor on the images' device, 0-dim, (N,) with one for each image
    of a call, or as the steps take it, (N, 1, 1, 1), (1, C, 1, 1) or (N, C, 1, 1). Its values are looked at in the
    first batch only. With `graph` step sizes of each image may change from call to call; another tensor of a single
    row, as another number, is captured anew."""
    norm = "Linf"  # in which eps is a distance
    by_gradient = True  # else its steps see losses and logits only
    eps_for_division: float = 0.0  # added to a gradient's norm, which it is divided by

    def __init__(
        self,
        model: AnyModel,
        eps: float,
        *,
        targeted: bool | str | TargetFunction = False,
        loss: str | LossFunction = "ce",
        target_classes: int = 9,
        restarts: int = 1,
        best_iterate: bool = False,
        eot: int = 1,
        training_mode: str = "eval",
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        compile: bool = False,
        graph: bool = False,
        chunk: int | None = None,
        clip: Clip = BOX,
        kth_min: int = 1,
        images_normalized: tuple[Any, Any] | None = None,
        **unknown: object,
    ) -> None:
        for name in unknown:
            raise TypeError(f"{type(self).__name__} has no option {name!r}{instead(name, options_of(type(self)))}")
        self.model = model
        self.eps = eps
        self.targeted = targeted
        self.loss = loss
        self.target_classes = target_classes
        self.restarts = restarts
        self.best_iterate = best_iterate
        self.eot = eot
        self.training_mode = training_mode
        self.autocast = autocast
        self.memory_format = memory_format
        self.compile = compile
        self.graph = graph
        self.chunk = chunk
        self.clip = clip
        self.kth_min = kth_min
        self.images_normalized = images_normalized
        self._start_losses: torch.Tensor | None = None
        self._told = set()
        self._shapes: list[torch.Size] = []  # of the model's parameters in the last call
        self._settled: dict[str, object] = {}
        self._made_of: dict[str, object] = {}
        self._graphs: OrderedDict[tuple[object, ...], GraphEngine] = OrderedDict()
        Attack.check(self)
        self._warn_of_unit()
        self._make_objective()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            raise TypeError(
                f"{cls.__name__} defines forward, which nothing calls here: an attack of fastadv defines start(slots) "
                "and step(slots, grad), or is any callable from (images, labels) to images without this base"
            )

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles have. What was made for the model, such as compiled code, is made anew for theirs."""
        return {name: value for name, value in vars(self).items() if name not in ("objective", "_made_of", "_graphs")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._made_of, self._graphs = {}, OrderedDict()
        self._make_objective()

    # ------------------------------------------------------------------ settings

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse a name that is no setting and would change nothing, such as `iters`; subclasses of yours are free."""
        kind = type(self)
        free = name.startswith("_") or not kind.__module__.startswith("fastadv.")
        replaced = callable(value) and callable(getattr(kind, name, None))  # a method
        if not (free or replaced or name in assignable(kind)):
            raise AttributeError(f"{kind.__name__} has no setting {name!r}{instead(name, ('eps', *options_of(kind)))}")
        super().__setattr__(name, value)

    def check(self) -> None:
        """Refuse settings of a wrong type or value; called before they act, also after one was assigned."""
        check_clip(self.clip)
        check_eps(self.eps, self.norm, self.clip)
        check_options(
            *(self.targeted, self.loss, self.target_classes, self.restarts, self.eot, self.training_mode),
            *(self.autocast, self.memory_format, self.best_iterate, self.compile, self.graph, self.chunk),
        )
        check_whole("kth_min", self.kth_min)
        if self.images_normalized is not None:
            normalization_of(self.images_normalized, self.model)

    def _settle(self) -> None:
        """Check the settings where one has changed, and forget what was made with the old ones."""
        # A tensor with a row for each image is no setting: it comes with the slots.
        settings = {name: v for name, v in vars(self).items() if not name.startswith("_") and not has_rows(v)}
        del settings["objective"]
        eps = settings.pop("eps")  # graphs have it as a tensor, so that a schedule needs but one
        if _same(settings, self._settled):
            check_eps(eps, self.norm, self.clip)
        else:
            self.check()
            self._settled = settings
            self._graphs.clear()
        self._make_objective()

    def _make_objective(self) -> None:
        """The attacked function, made again where settings that it has have changed, or how the model is wrapped."""
        inner, normalization = _unwrapped(self.model)
        made_of: dict[str, object] = {"inner": inner, "normalization": normalization}
        names = ("images_normalized", "loss", "targeted", "eot", "autocast", "compile")
        made_of |= {name: getattr(self, name) for name in names}
        if _same(made_of, self._made_of):
            return
        if self.images_normalized is not None:
            normalization = normalization_of(self.images_normalized, self.model)
        self._made_of, self._normalization = made_of, normalization
        self.objective = Objective(
            *(inner, self.loss),
            targeted=bool(self.targeted),
            eot=self.eot,
            autocast=self.autocast,
            compiled=self.compile,
        )
        self._graphs.clear()
        self._watch = Watch()
        self._width = 0  # the batch size that was compiled

    # ------------------------------------------------------------------ what an attack is

    @abstractmethod
    def start(self, slots: Slots) -> None:
        """Write the first iterate into `slots`."""

    @abstractmethod
    def step(self, slots: Slots, grad: torch.Tensor) -> None:
        """Write the next iterate; `grad` is with respect to `slots.input`."""

    def check_shape(self, x: torch.Tensor) -> None:
        """Refuse images of a shape that the attack is not made for."""

    def prepare(self, slots: Slots) -> None:
        """Make what the attack keeps in `slots.memory`, as it is before the first step."""

    def ended(self, slots: Slots) -> torch.Tensor:
        """Which slots hold the last iterate of their run, (N,) bool."""
        return slots.age >= self.steps

    def step_size(self, slots: Slots) -> float | torch.Tensor:
        """alpha, one for all or (N, 1, ...); eps where it is None."""
        alpha = self.alpha if slots.alpha is None else slots.alpha
        return slots.eps if alpha is None else alpha

    def factors(self) -> list[float]:
        """The factor of the step size, for each step."""
        return [1.0] * self.steps

    def leads_nowhere(self, grad: torch.Tensor) -> torch.Tensor:
        """Which samples' gradients, as `step` gets them, no step can follow, (N,) bool."""
        return (grad.nan_to_num(0.0) == 0).flatten(1).all(1)  # steps take the sign of NaN for 0

    def inside(self, slots: Slots) -> torch.Tensor | None:
        """Which iterates are within the budget and may count, (N,) bool; None where all are."""
        return None

    def result(self, slots: Slots) -> torch.Tensor:
        """The images that a call returns when all steps are taken."""
        return slots.adv

    def strength(self, slots: Slots, losses: torch.Tensor) -> torch.Tensor:
        """The strength of a run's results, (N,), by which runs are compared; `losses` are the results'."""
        return losses

    def goes_on(self, falls: Sequence[int], images: int) -> bool:
        """Whether an evaluation adds a run.

        Args:
            falls: how many images each run so far was the first to fool.
            images: how many are evaluated.
        """
        return False

    def cost(self, classes: int) -> tuple[int, int]:
        """The cost of a step for an image: (gradients, forward passes beside the one that judges the iterate)."""
        return (self.eot if self.by_gradient else 0), 0

    def runs(self, classes: int) -> int:
        """The number of runs on a model with `classes` classes: the restarts, towards each target class."""
        return self.restarts * (min(self.target_classes, classes - 1) if self.compares == "pairs" else 1)

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
        """Adversarial images: the last iterate, or the strongest. `images` are not changed.

        Works under no_grad and inference_mode.

        Args:
            images: (N, ...) in [0, 1], any floating-point type, or uint8 meaning images / 255; with
                `images_normalized` floats, normalised.
            labels: int64 (N,) on the images' device, each in [0, classes); for the loss "ce" also float (N, C), soft
                labels; for "bce" also (N, C), 0 or 1 for each logit; for a loss of your own anything with N rows. None
                means the model's own predictions.
            eps: instead of the attack's: a number, or a tensor (N,) for one per sample.
            seed: of the random start: an int, or an int64 tensor with one element or of shape (N,). None draws one
                from torch's generator on the images' device.
            x_init: images to start from, instead of the attack's own start.

        Returns:
            A tensor like `images` (float32 for uint8), detached, within eps of them and in [0, 1]; with
            `images_normalized` normalised.

        Raises:
            TypeError: images, labels or x_init are of a wrong type or dtype, or the model's output is.
            ValueError: a wrong shape, device or value; images beyond `clip`, soft labels that do not sum to 1. Values
                are refused in the first batch; in later ones they are counted on the device, and warned of at the end.
            RuntimeError: another thread is attacking the model, or its output does not depend on its input.
        """
        self._settle()
        self._check_batch(images, labels, seed, x_init)
        frozen_model = frozen(self.model, self.training_mode, self.loss, self.targeted)
        with torch.inference_mode(False), torch.no_grad(), frozen_model as parameters, on(images.device):
            shapes = [parameter.shape for parameter in parameters if not is_lazy(parameter)]
            if shapes != self._shapes:  # another head in the same model has other classes
                self._shapes, self._watch.first = shapes, True
            self._watch.begin()
            x = as_normal(images)
            passed = None if self.images_normalized is None else self._normalization  # of the images that were passed
            if passed is not None:
                x = denormalized(x, passed, self.clip, look=self._watch.first, count=self._watch.tally)
                x_init = x_init if x_init is None else denormalized(x_init, passed, self.clip, look=False)
            if self.memory_format is not None:
                x = x.contiguous(memory_format=self.memory_format)
            seed = scalar(seed)
            several = self.restarts > 1 or self.compares == "pairs"
            if seed is None and (self.draws or several or self.targeted == "random"):
                seed = new_seed(x.device)
            alpha = self._own_alpha(x)
            if x_init is not None:
                self._check_start(x_init)
            if self._watch.looks(len(x), self.loss):
                self.objective.watch = self.leads_nowhere
            try:
                if callable(self.targeted):
                    labels = self._mapped(self.targeted, x, labels)
                if self._watch.first:
                    self._check_values(x, labels)
                elif len(x):
                    self._count_values(as_normal(images) if passed is None else None, labels)
                targets = self._targets(x, labels, seed, given=x_init is not None)
                budget = self._budget(eps, x)
                self._warn_of_lengths(budget, x.dtype, look=self._watch.first and len(x) > 0, given=x_init is not None)
                adv = self._in_chunks(Inputs(x, targets, budget, seed, x_init, alpha))
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"out of memory with {len(x)} images: pass chunk={max(1, (self.chunk or len(x)) // 2)} (which "
                    "draws other noise from a seed that is one for all), or autocast"
                ) from error
            if len(x) and not is_ours(self) and self.norm in ("Linf", "L2") and getattr(self, "project", True):
                self._watch.tally("reach", in_ball(adv, to_float(x), budget, self.norm, self.clip))
            self._watch.first = self._watch.first and len(x) == 0
            still, self.objective.still = self.objective.still, None
            self._watch.report(still, self.objective.classes, box_of(self.clip), self.eps_for_division)
            return adv if passed is None else passed(adv)

    def _in_chunks(self, inputs: Inputs) -> torch.Tensor:
        if self.chunk is None or len(inputs) <= self.chunk:
            return self._filled_up(inputs)
        return torch.cat([self._filled_up(part) for part in inputs.parts(self.chunk)])

    def _filled_up(self, inputs: Inputs) -> torch.Tensor:
        n = len(inputs)
        pad = self._width - n if self.compile and self.training_mode == "eval" else 0
        self._width = max(self._width, n)
        return self._over_restarts(inputs, n) if pad <= 0 else self._over_restarts(inputs.filled_up(pad), n)[:n]

    def _over_restarts(self, inputs: Inputs, n: int) -> torch.Tensor:
        """The result of all restarts; the first n of the images are no filling."""
        runs = self.runs(inputs.targets.shape[1] if self.compares == "pairs" else 0)
        return reduce(stronger, (self._run(run, runs, inputs.of_run(run), n) for run in range(runs)))[0]

    def _run(self, run: int, runs: int, inputs: Inputs, n: int) -> Outcome:
        """The outcome of run number `run` of `runs`."""
        slots = self.slots(inputs.x, inputs.targets, inputs.eps, inputs.seed, inputs.x_init)
        slots.alpha = inputs.alpha
        if slots.restart is not None:
            slots.restart.fill_(run)
        if self.best_iterate:
            slots.best = result_like(slots.x)
            slots.best_losses = slots.x.new_empty(len(slots.x), dtype=torch.float64)
            slots.best_fooled = slots.x.new_empty(len(slots.x), dtype=torch.bool)
        engine = self.engine(slots)
        losses_seen = engine.run()[:, :n]
        self._watch.losses.append(losses_seen)
        if runs == 1:
            self._start_losses = losses_seen[0] if self.steps == 1 and self.draws else None
        judged = runs > 1 or self.best_iterate
        adv, losses, fooled = self._outcome(engine.slots, judged)
        if not self.graph:
            return adv, losses, fooled
        # The graph writes its own again.
        return adv.clone(), losses.clone() if judged else losses, None if fooled is None else fooled.clone()

    def _outcome(self, slots: Slots, judged: bool) -> Outcome:
        """The outcome of a run; without `judged` it has the losses of the last step, which nobody compares."""
        adv = slots.adv if self.best_iterate else self.result(slots)
        if not judged:
            return adv, slots.losses, None
        slots.losses, slots.logits = self.objective.judge(self._seen_by_model(adv), self.aim(slots))
        if not self.best_iterate:
            return adv, self.strength(slots, slots.losses), self.fooled(slots.logits, slots.targets)
        slots.inside = self.inside(slots)
        self.keep_best(slots)
        return slots.strongest

    def _seen_by_model(self, adv: torch.Tensor) -> torch.Tensor:
        pixels = to_float(adv)
        return pixels if self._normalization is None else self._normalization(pixels)

    @property
    def start_losses(self) -> torch.Tensor | None:
        """The last images' losses at the random start of a single step, (N,), which it took anyway; else None."""
        return self._start_losses

    def slots(
        self,
        x: torch.Tensor,
        targets: torch.Tensor,
        eps: float | torch.Tensor,
        seed: int | torch.Tensor | None,
        x_init: torch.Tensor | None = None,
    ) -> Slots:
        """Make slots for images.

        Args:
            x: clean images.
            targets: what the loss compares with.
            eps: a number, or one for each image (N, 1, ...).
            seed: an int, or int64 with one element or (N,); None for an attack that draws nothing.
            x_init: images to start from.

        Returns:
            The slots, before the attack's start.
        """
        self._settle()
        self.check_shape(x)
        adv = None
        if x_init is not None:
            dtype = result_like(x[:0]).dtype
            x_init = as_normal(x_init)
            x_init = x_init if x_init.dtype == torch.uint8 else x_init.to(dtype)
            copy = torch.empty_like(x_init, dtype=dtype)
            adv = random_init(x_init, 0.0, seed=0, clip=box_of(self.clip), out=copy)  # in the box
            if self.memory_format is not None:
                adv = adv.contiguous(memory_format=self.memory_format)
        if not isinstance(eps, torch.Tensor):
            # In float32, as the ops and a captured graph have it: arithmetic with either gives the same bits.
            eps = eps if compute_dtype(x) == torch.float64 else float(np.float32(eps))
        slots = Slots(x, targets, eps, seed, adv=adv)
        if self.by_age or self.compares == "pairs":
            slots.age, slots.restart = torch.zeros(2, len(x), dtype=torch.int64, device=x.device)
        if self._normalization is not None:
            slots.z = result_like(x)
            if adv is not None:
                self.show(slots)
        return slots

    def show(self, slots: Slots) -> None:
        """Write the model's next input for the iterate, where that is another tensor."""
        if slots.z is not None and self._normalization is not None:
            slots.z.copy_(self._normalization(to_float(slots.iterate)))

    def fooled(self, logits: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor | None:
        """Which samples the attack has fooled, (N,) bool; None where outputs or targets are no classes.

        No prediction is wrong for every label, and reaches no target.
        """
        soft = self.compares == "soft" and targets.is_floating_point()
        if logits is None or soft or self.compares in ("anything", "clean"):
            return None
        labels = targets[:, 0] if self.compares == "pairs" else targets
        return is_label(verdict(logits, labels), labels) == bool(self.targeted)

    def keep_best(self, slots: Slots) -> None:
        """Keep the iterate, judged by its losses and logits, where it is the strongest so far."""
        fooled = self.fooled(slots.logits, slots.targets)
        better = better_where(slots.strongest, (slots.iterate, slots.losses, fooled))
        if slots.inside is not None:
            better &= slots.inside
        put_(slots.best, better, slots.iterate)
        torch.where(better, slots.losses, slots.best_losses, out=slots.best_losses)
        if fooled is not None:
            torch.where(better, fooled, slots.best_fooled, out=slots.best_fooled)

    def into_ball(self, slots: Slots) -> None:
        """Bring a start that was given into the ball."""
        pgd_step_(slots.adv, slots.adv, slots.x, alpha=0.0, eps=slots.eps, **self.model_input_kwargs(slots))

    def engine(self, slots: Slots) -> Engine:
        """The engine that iterates on `slots`; with `graph` a captured one, whose own slots get the same values."""
        if not self.graph:
            return Engine(self, slots)
        if isinstance(slots.seed, int):  # a number would be captured as it is
            slots.seed = torch.full((), as_int64(slots.seed), dtype=torch.int64, device=slots.x.device)
        if not isinstance(slots.eps, torch.Tensor):
            slots.eps = torch.full((), slots.eps, dtype=compute_dtype(slots.x), device=slots.x.device)
        shapes = ((n, t.shape, t.stride(), t.dtype, t.device) for n, t in slots.tensors().items())
        key = (slots.given, *shapes, *baked(self.objective.model, slots.x.device))
        if key not in self._graphs:
            self._graphs[key] = GraphEngine(self, slots)
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        engine = self._graphs[key]
        engine.load(slots)
        return engine

    def model_input_kwargs(self, slots: Slots) -> dict[str, Any]:
        """Keywords for the ops: the box; with normalisation they write the model's next input too."""
        box: dict[str, Any] = {"clip": box_of(self.clip)}
        return box if slots.z is None else {**box, "normalization": self._normalization, "z": slots.z}

    def also(self, slots: Slots) -> dict[str, Any]:
        """What `model_input_kwargs` was called before."""
        warn("Attack.also is now Attack.model_input_kwargs", FutureWarning)
        return self.model_input_kwargs(slots)

    def in_pixels(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient with respect to the model's input as one with respect to the image, in float32 at least."""
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if self._normalization is None:
            return grad
        return grad * self._normalization.parameters(grad.ndim, grad.dtype, grad.device)[1]

    def _clean_logits(self, x: torch.Tensor) -> torch.Tensor:
        pixels = self._seen_by_model(x)
        if self.chunk is None or len(x) <= self.chunk:
            return self.objective.logits(pixels)
        return torch.cat([self.objective.logits(part) for part in pixels.split(self.chunk)])

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        hidden = ("model", "objective", "draws")
        settings = (f"{name}={self._shown(name, value)}" for name, value in shown.items() if name not in hidden)
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(settings)})"


def _unwrapped(model: AnyModel) -> tuple[AnyModel, Normalization | None]:
    """(the model without its normalisation, the normalisation or None).

    A `Normalized` whose call does more than its forward, for example by hooks, stays as it is.
    """
    inner = one_process(model)
    if type(inner) is Normalized and is_plain(inner):
        return one_process(inner.model), inner.normalization
    return inner, None


def _same(settings: Mapping[str, object], others: Mapping[str, object]) -> bool:
    """Whether two dicts have the same values; two tensors or modules are the same where they are one object."""
    plain = (bool, int, float, str, tuple, type(None))
    return settings.keys() == others.keys() and all(
        value is others[name] or (type(value) is type(others[name]) in plain and value == others[name])
        for name, value in settings.items()
    )
