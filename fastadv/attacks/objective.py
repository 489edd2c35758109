"""The attacked function: images in, one loss per sample out, and its gradient with respect to the images alone."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from fastadv._warnings import warn
from fastadv.attacks.attention import ShortAttentionInFloat32
from fastadv.attacks.checks import of_probabilities
from fastadv.attacks.losses import LOSSES, LossFunction
from fastadv.nn.logits import AnyModel, are_logits, at_least_float32, describe, find_logits

NO_GRADIENT = (
    "the model's output does not depend on its input through autograd, so that no attack can follow its gradient: does "
    "it run under no_grad, detach, leave PyTorch (NumPy, OpenCV), or is it quantised? Attack a differentiable version "
    "of it, and judge this one on what that gives"
)


class Objective:
    """A model and a loss; `gradient(x, targets)` is what an attack climbs.

    The losses are summed, not averaged: the sign does not care about the scale, and in half precision a mean pushes
    small gradients to zero. Logits below float32 are raised to float32 for the same reason.

    Args:
        model: any callable from images (N, ...) to outputs.
        loss: a name from LOSSES, of logits; or a callable from (outputs, targets) to one value per sample.
        targeted: the loss of the targets is minimised.
        eot: number of draws: gradients and losses are their means, logits the logarithm of their mean probabilities.
        autocast: dtype in which the model runs under torch.autocast; None means as it is.
        compiled: model and loss run under torch.compile, with one graph per shape.
    """

    def __init__(
        self,
        model: AnyModel,
        loss: str | LossFunction,
        *,
        targeted: bool = False,
        eot: int = 1,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        if not callable(model) or isinstance(model, type):
            got = f"the class {model.__name__}: make one" if isinstance(model, type) else f"{model!r}"
            raise TypeError(f"the model must be a callable from images to logits, got {got}")
        self.model = model
        self.loss = loss
        self.targeted = targeted
        self.eot = eot
        self.autocast = autocast
        self.compiled = compiled
        self.classes: int | None = None  # of the logits that were seen last
        self.still: torch.Tensor | None = None  # which samples' gradient leads nowhere, (N,) bool, said by `watch`
        self.watch: Callable[[torch.Tensor], torch.Tensor] | None = None  # it sees one gradient
        self._copies = False  # whether the model writes to its input
        self._looked = False  # whether that is known
        self._highest, self._look = -1, ""  # the name of the loss, where its logits are to be looked at
        self._losses = torch.compile(self._forward, dynamic=False) if compiled else self._forward

    def gradient(
        self, x: torch.Tensor, targets: torch.Tensor, scratch: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute the gradient of the summed loss.

        Args:
            x: the model's input (N, ...), float.
            targets: what the loss compares the outputs with.
            scratch: memory that is kept from step to step, for what is the same in all steps of one batch size.

        Returns:
            (gradient, like x; losses (N,); detached logits (N, C), None where the outputs are none).

        Raises:
            TypeError: the outputs are no logits, or the losses not one float per sample.
            ValueError: there are fewer than two classes, or labels beyond them.
            RuntimeError: the outputs do not depend on x.
        """
        if self.eot == 1:
            grad, losses, logits = self._climb(x, targets, scratch)
        else:
            grad, losses, logits = self._expected(lambda: self._climb(x, targets, scratch))
        if logits is not None:
            self.classes = logits.shape[1]
        self.show(grad)
        return grad, losses, logits

    def show(self, grad: torch.Tensor) -> None:
        """Show `watch` a gradient that an attack climbs."""
        watch, self.watch = self.watch, None
        if watch is not None:
            self.still = watch(grad)

    def _climb(
        self, x: torch.Tensor, targets: torch.Tensor, scratch: dict[str, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with torch.enable_grad():
            # A write that autograd does not see, as to x.data, would be one to the images: the first call is looked at.
            leaf = (x.detach() if self._looked else x.clone()).requires_grad_()
            losses, logits = self._of_leaf(leaf, targets)
            grad = _gradient(losses, leaf, self._ones(losses, scratch))
        if not self._looked:
            self._looked, self._copies = True, self._copies or not torch.equal(leaf, x)
        return grad, losses.detach(), logits

    def _ones(self, losses: torch.Tensor, scratch: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """The weights of the losses, all 1; they are kept, unless a user's loss may write to them in its backward."""
        if scratch is None or callable(self.loss):
            return torch.ones_like(losses)
        if "ones" not in scratch:
            scratch["ones"] = torch.ones_like(losses)
        return scratch["ones"]

    def _of_leaf(self, leaf: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses and logits of the images, or of a copy where the model writes to its input."""
        if not self._copies:
            try:
                return self._losses(leaf, targets)
            except RuntimeError as error:  # PyTorch refuses that for a leaf, before anything is written
                if "leaf Variable that requires grad" not in str(error):
                    raise
                self._copies = True
        return self._losses(leaf.clone(), targets)

    def margins(self, x: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the margin to each class in turn and its gradient, from one forward pass.

        The margin is the class's logit minus the label's. Both are 0 for the label's own class. The model sees a copy,
        as it may write there; it is not compiled.

        Args:
            x: the model's input (N, ...), float.
            labels: int64 (N,).

        Yields:
            (gradient, like x; margin, (N,)).

        Raises:
            TypeError: as `gradient`.
            ValueError: as `gradient`.
            RuntimeError: as `gradient`.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self._checked(at_least_float32(find_logits(self._outputs(leaf.clone()), len(x))))
            margins = (logits - logits.gather(1, labels[:, None])).unbind(1)
        for margin in margins:
            yield _gradient(margin, leaf, torch.ones_like(margin), retain_graph=True), margin.detach()

    def judge(
        self, x: torch.Tensor, targets: torch.Tensor, copy: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute losses and logits without a gradient. The model sees a copy, as it may write there.

        Args:
            x: the model's input (N, ...), float.
            targets: what the loss compares the outputs with.
            copy: memory like x for the copy, which is used where one draw is enough.

        Returns:
            (losses (N,); logits (N, C), None where the outputs are none).
        """
        if self.eot > 1:
            copy = None  # an output may be a view of it, and of several draws each counts
        with torch.no_grad():
            return self._expected(lambda: self._losses(x.clone() if copy is None else copy.copy_(x), targets))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of x, without a gradient, in float32 at least. The model sees a copy, as it may write there."""

        def draw() -> tuple[torch.Tensor]:
            return (self._checked(at_least_float32(find_logits(self._outputs(x.clone()), len(x)))),)

        logits: torch.Tensor
        with torch.no_grad():
            (logits,) = self._expected(draw)
        self.classes = logits.shape[1]
        return logits

    def _expected(self, draw: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The means of `eot` draws of (..., logits); the mean of equal draws is exactly the draw."""
        *means, logits = draw()
        if self.eot == 1:
            return *means, logits
        several = [logits]
        for k in range(2, self.eot + 1):
            *new, logits = draw()
            means = [mean + (t - mean) / k for mean, t in zip(means, new, strict=True)]
            several.append(logits)
        return *means, None if logits is None else _of_mean_probabilities(torch.stack(several), self.loss)

    def check_classes(self, highest: int, logits: torch.Tensor | None = None, *, look: bool = False) -> None:
        """Refuse labels beyond the logits' classes: now, or in the next call where there are no logits yet.

        Args:
            highest: of the labels.
            logits: (N, C).
            look: warn of logits that are probabilities, where the loss takes a softmax or a sigmoid of them; this waits
                for the device.
        """
        known = "" if callable(self.loss) else self.loss
        self._highest, self._look = highest, known if look and known and LOSSES[known].squashes else ""
        if logits is not None:
            self._check_highest(logits)

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] < 2 and self.loss != "bce":
            raise ValueError(
                f"the model returns one logit, {tuple(logits.shape)}: of a single class nothing can be wrong, and a "
                "softmax over it is always 1. Where one logit z stands for two classes pass the attack loss='bce', or "
                "return both, torch.cat((0 * z, z), 1), whose softmax is z's sigmoid"
            )
        if self._highest >= 0:
            self._check_highest(logits)
        return logits

    def _check_highest(self, logits: torch.Tensor) -> None:
        highest, self._highest = self._highest, -1
        classes = max(logits.shape[1], 2)  # one logit tells two classes apart
        if highest >= classes:
            raise ValueError(f"labels must be below the model's {classes} classes, got {highest}")
        if self._look and (wrong := of_probabilities(logits, self._look)):
            warn(wrong)

    def _forward(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        outputs, n = self._outputs(x), x.shape[0]
        logits: torch.Tensor | None
        if callable(self.loss):
            losses = _per_sample(self.loss(outputs, targets.clone()), n)  # a copy, for it may write to them
            logits = at_least_float32(outputs).detach() if are_logits(outputs, n) else None
        else:
            found = self._checked(at_least_float32(find_logits(outputs, n)))
            losses = LOSSES[self.loss].of(found, targets)
            logits = found.detach()
        if self.targeted:
            losses = -losses
        return losses, logits

    def _outputs(self, x: torch.Tensor) -> Any:
        if self.autocast is None:
            return self.model(x)
        attention = ShortAttentionInFloat32() if x.device.type == "cpu" else nullcontext()
        with torch.autocast(x.device.type, dtype=self.autocast), attention:
            return self.model(x)


def _gradient(losses: torch.Tensor, leaf: torch.Tensor, ones: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
    """The gradient of the sum of the losses, like the leaf."""
    grad = None
    if losses.requires_grad:
        (grad,) = torch.autograd.grad(losses, leaf, ones, retain_graph=retain_graph, allow_unused=True)
    if grad is None:
        raise RuntimeError(NO_GRADIENT)
    return grad


def _of_mean_probabilities(logits: torch.Tensor, loss: str | LossFunction) -> torch.Tensor:
    """Of (K, N, C) the logits (N, C) of the mean over K, in float64, so that differences of any size survive."""
    logits = logits.double()
    if loss == "bce" or logits.shape[2] == 1:  # each is a probability by itself
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
    return logits.log_softmax(2).logsumexp(0)


def _per_sample(losses: object, n: int) -> torch.Tensor:
    if not (isinstance(losses, torch.Tensor) and losses.is_floating_point() and losses.shape == (n,)):
        raise TypeError(
            f"loss must return one value per sample, a float tensor of shape ({n},); it returned "
            f"{describe(losses)}. Is its reduction 'none'?"
        )
    return losses
