"""One step of adversarial training: the passes of the attack and of the update, none of them twice."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from fastadv._warnings import warn
from fastadv.attacks import Attack
from fastadv.attacks.checks import (
    BOX,
    box_of,
    check_images,
    check_labels,
    check_one_class,
    check_samples,
    check_switch,
    check_whole,
    highest,
)
from fastadv.attacks.objective import NO_GRADIENT
from fastadv.attacks.samplewise import seeds_for
from fastadv.attacks.verdicts import predicted
from fastadv.evaluation.adversaries import goes_to_labels, strange
from fastadv.functional import new_seed, to_float
from fastadv.nn.autocast import own_autocast
from fastadv.nn.frozen import as_normal, buffers_kept, frozen
from fastadv.nn.logits import AnyModel, at_least_float32, find_logits
from fastadv.ops.generator import seeded
from fastadv.training.factors import MergedWeights
from fastadv.training.fast.base import FastMethod
from fastadv.training.foreign import AnyAttack, ForeignAttack, TrainAttack, as_attack
from fastadv.training.settings import checked

ALIKE = 1e-2  # of the largest logit: how far rounding may move one


class TrainStep:
    """Attacks a batch and learns from it; `gradients`, then `apply`.

    The cost is that of the attack and one forward and backward pass of the model: for FGSM two forward passes, one
    backward pass to the images and one to what trains.

    Args:
        model: it is trained; its outputs are any that attacks take.
        attack: one of fastadv, any callable from (images, labels) to images, None for clean images, or a `FastMethod`,
            whose `begin` the caller calls before each update.
        optimizer: of the parameters that train, whose gradients so far are dropped; a warning says where it has others
            than the model's.
        through: the update calls this, such as the model under DistributedDataParallel; None means the model.
        clean_weight: share of the loss on clean images, in [0, 1]; these go through the model with the others.
        label_smoothing: of the loss of the update.
        max_grad_norm: largest norm of the gradient of all parameters; None means no clipping.
        autocast: dtype of torch.autocast for the update, None for none; the attack has its own. The caller's
            torch.autocast changes neither. A float64 model takes none.
        compile: run the update's forward pass and loss under torch.compile.
        highest: the highest of all labels that will come: with it `gradients` refuses a label that the model has no
            class for, and does not wait for the device.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option has a wrong value; or the optimizer is LBFGS, whose step would need the loss again.
    """

    # Without a dict of its own: a name that is no attribute, such as `lr`, is refused when it is assigned.
    __slots__ = (
        *("_model", "attack", "method", "optimizer", "through", "clean_weight", "label_smoothing", "max_grad_norm"),
        *("autocast", "highest", "_losses", "_looked", "_merged", "_mode_dependent", "_alike", "_norm"),
        "__weakref__",
    )

    def __init__(
        self,
        model: nn.Module,
        attack: TrainAttack | FastMethod | None,
        optimizer: torch.optim.Optimizer,
        *,
        through: Callable[[torch.Tensor], object] | None = None,
        clean_weight: float = 0.0,
        label_smoothing: float = 0.0,
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        highest: int = 0,
    ):
        self.method = attack if isinstance(attack, FastMethod) else None
        given = attack.attack if isinstance(attack, FastMethod) else attack
        check_attack("attack", given)
        warn_of_strange(given, model)
        self.attack = as_attack(given, model)
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"autocast is a dtype such as torch.bfloat16, or None, got {autocast!r}")
        check_autocast(model, autocast)
        check_switch("compile", compile)
        check_whole("highest", highest, least=0)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS computes the loss again within its step, which no attack follows: take another")
        self._model, self.optimizer = model, optimizer
        self.through: Callable[[torch.Tensor], object] = model if through is None else through
        self.clean_weight = checked("clean_weight", clean_weight, float, least=0, most=1)
        self.label_smoothing = checked("label_smoothing", label_smoothing, float, least=0, most=1)
        self.max_grad_norm = None if max_grad_norm is None else checked("max_grad_norm", max_grad_norm, float, above=0)
        self.autocast, self.highest = autocast, highest
        self._losses = torch.compile(self._forward, dynamic=False) if compile else self._forward
        if self.method is not None:
            self.method.check_loss(type(self.method).__name__, self.clean_weight, self.label_smoothing)
            self.method.attack.objective.check_classes(highest)
        self._looked = False
        self._merged = MergedWeights(model)
        if self.method is not None:
            self.method.around_passes = self._merged
        self._mode_dependent = [module for module in model.modules() if _depends_on_mode(module)]
        self._alike: bool | None = None  # whether the model's outputs were as in eval mode, in the first batch
        self._norm: torch.Tensor | None = None
        self.forget()  # what is left over, such as of a step that trained other parameters
        self._warn_of_others()

    @property
    def model(self) -> nn.Module:
        """The model that is trained. Another one needs a step of its own, with its own optimizer."""
        return self._model

    @property
    def repeats(self) -> int:
        """Updates in a row from one batch."""
        return 1 if self.method is None else self.method.repeats

    def gradients(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
        scale: float | None = None,
        more: bool = False,
    ) -> torch.Tensor:
        """Add the gradients of a batch to the gradients of the parameters.

        Args:
            images: (N, C, H, W), floats in [0, 1] or uint8.
            labels: int64 (N,).
            seeds: int64 (N,), one for each image, of the attack's random start; a callable that is no attack of
                fastadv draws from torch's generator instead.
            rows: int64 (N,), the images' numbers, for an attack that keeps something of each image.
            moves: int64 (N,), the seeds of the images' augmentation, for such an attack; None without one.
            scale: the loss is the sum over the batch times this; None means 1/N, a mean.
            more: another part of the same update follows: under DistributedDataParallel nothing is sent yet.

        Returns:
            float64 (4,) on the images' device: the scaled loss; how many images were classified correctly after the
            attack; on how many images noise alone raised the loss more than the attack did; and at how many images
            that was looked. Such images are a sign of overfitting to the attack, which costs nothing where attack and
            update run in the same mode; elsewhere no image is looked at.

        Raises:
            RuntimeError: the attack follows the update's gradient, and the model gives none to its input; or a
                `FastMethod` was not begun; or accelerate accumulates gradients (accelerator.accumulate), which the step
                does itself.
            TypeError: labels are not int64 (N,), or images neither floats nor uint8.
            ValueError: no images, or not as many as labels; images beyond [0, 1] or labels below 0, in the first batch;
                a label that the model has no class for.
        """
        self._check_batch(images, labels)
        if self.method is not None:
            self.method.check_begun()
        images = as_normal(images)  # no gradient is the caller's
        self._norm = None
        scale = 1 / len(labels) if scale is None else scale
        with torch.inference_mode(False), torch.enable_grad(), own_autocast(images.device, None):
            method, sees = self.method, False
            start: Sequence[torch.Tensor] = ()
            beside: torch.Tensor | float | None = None
            if method is None:
                x_adv = self._attacked(images, labels, seeds)
            else:
                seeds = seeds_for(new_seed(images.device), images) if seeds is None else seeds
                x_adv, *start = method.attacked(to_float(images), labels, seeds, rows, moves)
                beside, sees = method.learn(labels, self._parameters, scale), method.sees_gradient
            if sees:
                x_adv = x_adv.detach().requires_grad_()
            clean = (to_float(images),) if self.clean_weight else ()
            # A copy of a leaf, for the model may write to its input.
            together = torch.cat((x_adv, *start, *clean)) if start or clean or sees else x_adv
            with self.through.no_sync() if more and hasattr(self.through, "no_sync") else nullcontext():
                loss, logits = self._losses(together, labels, scale)
                if not loss.requires_grad:
                    raise RuntimeError(
                        "the loss depends on no parameter that requires grad, so there is nothing to train: is the "
                        "model frozen, or does it run under no_grad?"
                    )
                loss.backward()
            if method is not None and sees:
                if x_adv.grad is None:
                    self.forget()
                    raise RuntimeError(NO_GRADIENT)
                method.seen(x_adv.grad / scale)
            with torch.no_grad():
                logits = logits.detach()[: len(labels)]
                right = (predicted(logits) == labels).sum()
                abnormal, looked = self._abnormal(images, logits, labels)
                loss = loss.detach() if beside is None else loss.detach() + beside
                return torch.stack([value.double() for value in (loss, right, abnormal, looked)])

    def _check_batch(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuse what is no batch. Values are looked at in the first one alone, because that waits for the device."""
        accelerate = getattr(self.optimizer, "gradient_state", None)
        if accelerate is not None and not accelerate.sync_gradients:
            raise RuntimeError(
                "accelerator.accumulate would drop the updates between, and each part would count as a whole batch: "
                "leave it out, call gradients(..., scale=1 / images of the whole batch, more=True) for the parts (the "
                "last one without more), and then apply()"
            )
        check_one_class(labels)
        check_images(images)
        check_labels(labels, images)
        if not len(labels):
            raise ValueError("there are no images in the batch")
        if not self._looked:
            check_samples(images, labels)
            self.highest = max(self.highest, highest(labels))
            self._looked = True

    def norm(self) -> torch.Tensor:
        """The norm of the gradient that `apply` takes next, before clipping: 0-dim, on the parameters' device.

        It is not finite where any number of the gradient is not, or where it is too large for the parameters' dtype.
        The caller has to look at it, and must not call `apply` then: after `norm`, `apply` does not look again, because
        that would wait for the device.
        """
        self._norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return self._norm

    def apply(self) -> None:
        """Change the parameters by their gradients, and forget the gradients.

        Raises:
            FloatingPointError: the gradient is not finite, and the caller did not ask for its `norm`; nothing was
                changed, and the gradients are forgotten.
        """
        if self._norm is None and not math.isfinite(found := self.norm().item()):
            self.forget()
            raise FloatingPointError(f"the norm of the gradient is {found}: no step was taken{self.of_nonfinite()}")
        if self.max_grad_norm is not None and self._norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, self._norm)
        self.optimizer.step()
        if self.method is not None:
            self.method.end()
        self.forget()

    def forget(self) -> None:
        """Forget the gradients."""
        self._norm = None
        self.optimizer.zero_grad()

    def tell(self) -> None:
        """As `ForeignAttack.tell`; nothing for other attacks."""
        if isinstance(self.attack, ForeignAttack):
            self.attack.tell()

    def of_nonfinite(self) -> str:
        """As `ForeignAttack.of_nonfinite`; "" for other attacks."""
        return self.attack.of_nonfinite() if isinstance(self.attack, ForeignAttack) else ""

    def _warn_of_others(self) -> None:
        """Warn where the optimizer has parameters that no pass uses, in place of some of the model."""
        modules = [module for module in (self.model, self.through) if isinstance(module, nn.Module)]
        used = {id(p) for module in modules for p in module.parameters()}
        held = {id(p) for p in self._parameters}
        left = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if left and held - used:
            warn(
                f"the optimizer has {len(held - used)} parameters that are not the model's, and not {left[0]}, which "
                "will not train: make the optimizer from the parameters that the model has now"
            )

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _attacked(self, images: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        if self.attack is None:
            return to_float(images)
        with self._merged():
            return self.attack(images, labels, seed=seeds)

    def _forward(self, images: torch.Tensor, labels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            outputs = self.through(images) if self.method is None else self.method.outputs(self.through, images)
        logits = at_least_float32(find_logits(outputs, len(images)))
        if logits.shape[1] < 2:
            raise ValueError(
                f"the model returns one logit, {tuple(logits.shape)}, and cross-entropy of a single class is always 0: "
                "where one logit z stands for two classes return both, torch.cat((0 * z, z), 1)"
            )
        if self.highest >= logits.shape[1]:
            raise ValueError(f"labels must be below the model's {logits.shape[1]} classes, got {self.highest}")
        losses = F.cross_entropy(
            logits,
            labels if len(images) == len(labels) else labels.repeat(len(images) // len(labels)),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        loss, clean = losses[: len(labels)].sum(), losses[-len(labels) :]
        if self.clean_weight:
            loss = torch.lerp(loss, clean.sum(), self.clean_weight)
        if self.method is not None and self.method.compares:
            loss = loss + self.method.distances(*logits.split(len(labels))[:2]).sum()
        return loss * scale, logits

    def _abnormal(
        self, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """On how many images the attack's start has the larger loss, and of how many images."""
        attack = self.attack
        start = None if attack is None or not self._comparable(attack) else attack.start_losses
        if start is None or len(start) != len(labels) or not self._is_as_in_eval_mode(images):
            return torch.zeros(2, device=labels.device)
        after = F.cross_entropy(logits, labels, reduction="none")
        return (start > after).sum(), torch.tensor(len(labels), device=labels.device)

    def _comparable(self, attack: AnyAttack) -> bool:
        """Whether the attack's losses are cross-entropies, of the model in the mode in which the update ran it."""
        if attack.loss != "ce" or attack.targeted or attack.training_mode == "batch_norm":
            return False
        return not any(module.training for module in self._mode_dependent)

    def _is_as_in_eval_mode(self, images: torch.Tensor) -> bool:
        """Whether the model's outputs do not depend on its mode, as by a function's dropout; looked at once."""
        if self._alike is None:
            some = to_float(images[:2])
            with seeded(0), buffers_kept(self.model):
                here = self._logits(some.clone())
                with frozen(self.model):
                    there = self._logits(some.clone())
            self._alike = bool((here - there).abs().max() <= ALIKE * there.abs().max())
        return self._alike

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return at_least_float32(find_logits(self.model(images), len(images)))


def check_attack(name: str, attack: object, also: str = "") -> None:
    """Refuse an attack that no training can use: no callable, a class, on other inputs than images in [0, 1], or
    towards the labels.

    Args:
        name: of the argument, for the errors.
        attack: what was given.
        also: what else the argument may be, for the errors, such as "a name, ".

    Raises:
        TypeError: it cannot be called, or is a class.
        ValueError: it attacks other inputs than images in [0, 1]; or it takes its targets for labels, as with
            targeted=True.
    """
    if attack is not None and (isinstance(attack, type) or not callable(attack)):
        raise TypeError(f"{name} must be {also}a callable from (images, labels) to images, or None: got {attack!r}")
    if isinstance(attack, Attack) and box_of(attack.clip) != BOX:
        raise ValueError(
            f"training takes images in [0, 1], and {name} is made for clip={attack.clip}: scale the images, and give "
            "the model's own range to Normalized(model, mean, std)"
        )
    if isinstance(attack, Attack) and attack.images_normalized is not None:
        raise ValueError(
            f"training takes images in [0, 1], and {name} is made for normalised ones: make it on "
            "Normalized(model, mean, std), without images_normalized"
        )
    if goes_to_labels(attack):
        raise ValueError(
            f"{name} goes towards the labels, and those of training are the images' own: choose targeted='random' or "
            "'least_likely', or leave targeted out"
        )


def check_linf(attack: object) -> None:
    """Refuse an attack in another norm than L-inf.

    Raises:
        ValueError: it is such an attack.
    """
    if isinstance(attack, Attack) and attack.norm != "Linf":
        raise ValueError(
            f"training with an {attack.norm} attack ({attack!r}) is not possible yet: its weights would be chosen, and "
            "its overfitting looked for, under L-inf PGD at the same eps. Train with an L-inf attack, such as fgsm or "
            "pgd; evaluation takes L2 attacks"
        )


def warn_of_strange(attack: object, model: AnyModel) -> None:
    """Warn of a training attack that was made on another model than the one that trains."""
    if (elsewhere := strange(attack.attack if isinstance(attack, ForeignAttack) else attack, model)) is not None:
        warn(
            f"the training attack was made on {elsewhere}, not on the model that trains: its images are "
            "transferred, and weaker. For adversarial training make it on the model that trains"
        )


def check_autocast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse torch.autocast for a float64 model, because it changes nothing there.

    Raises:
        ValueError: all weights are float64, and `dtype` is not None.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtype is not None and kinds == {torch.float64}:
        raise ValueError(
            f"torch.autocast to {dtype} leaves a float64 model as it is: take model.float(), or no autocast"
        )


def _depends_on_mode(module: nn.Module) -> bool:
    """Batch-norm, dropout, and what timm, torchvision and transformers call stochastic depth."""
    drops = (value for name, value in vars(module).items() if name == "p" or "drop" in name)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or any(isinstance(p, float) and p > 0 for p in drops)
