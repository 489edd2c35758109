"""What a call of an attack is given, looked at before anything is done with it."""

import torch

from fastadv.attacks.attributes import Attributes
from fastadv.attacks.checks import (
    are_probabilities,
    are_signs,
    beyond_the_box,
    check_alpha_of,
    check_device,
    check_eps,
    check_has_classes,
    check_images,
    check_labels,
    check_length,
    check_signs,
    check_soft,
    check_start,
    eps_fits,
    highest,
    in_box,
)
from fastadv.attacks.samplewise import has_rows, per_sample
from fastadv.attacks.watch import PROBLEMS
from fastadv.nn.frozen import as_normal
from fastadv.ops.checks import seed as check_seed


class Arguments(Attributes):
    """The part of an attack that checks images, labels, seed, x_init, and the lengths of each image."""

    def _check_batch(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        seed: int | torch.Tensor | None,
        x_init: torch.Tensor | None,
    ) -> None:
        check_images(images, self.clip)
        check_device(images.device, self.model)
        if seed is not None:  # also where nothing is drawn, or one for each sample is made of it first
            check_seed(seed, images)
        if x_init is not None:
            check_start(x_init, images)
        if labels is not None:
            check_labels(
                labels, images, soft=self.compares in ("soft", "clean"), any_kind=self.compares in ("anything", "signs")
            )
            check_has_classes(labels, self.targeted)
        elif callable(self.loss) or self.targeted is True:
            raise ValueError("labels are missing: a loss of your own, or targeted=True, needs them")

    def _check_values(self, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        """In the first batch only, because it waits for the device: a label that is too large kills a CUDA context."""
        if not len(x):
            return
        wrong = beyond_the_box(x, self.clip)
        if wrong:
            raise ValueError(wrong)
        if not callable(self.loss):
            logits = self._clean_logits(x) if self.compile else None
            top = highest(labels) if labels is not None and labels.dtype == torch.int64 else 0
            self.objective.check_classes(top, logits, look=True)
        if labels is not None and labels.is_floating_point() and self.compares in ("soft", "clean"):
            check_soft(labels)
        if labels is not None and self.compares == "signs":
            check_signs(labels)

    def _check_start(self, x_init: torch.Tensor) -> None:
        sound = ~x_init.isnan().any()
        if not self._watch.first:
            self._watch.tally("start", sound)
        elif not sound:
            raise ValueError(f"{PROBLEMS['start']}: an attack starts from images")

    def _count_values(self, images: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        """In later batches, without waiting for the device: count what `_check_values` would refuse."""
        if images is not None and images.is_floating_point() and images.numel():
            self._watch.tally("images", in_box(images, self.clip))
        if labels is not None and labels.is_floating_point() and self.compares in ("soft", "clean"):
            self._watch.tally("soft labels", are_probabilities(labels))
        if labels is not None and self.compares == "signs":
            self._watch.tally("signs", are_signs(labels))

    def _budget(self, eps: float | torch.Tensor | None, x: torch.Tensor) -> float | torch.Tensor:
        if eps is None:
            return self.eps
        if not isinstance(eps, torch.Tensor):
            check_eps(eps, self.norm, self.clip)
            return float(eps)
        if not eps.is_floating_point() or eps.device != x.device:
            raise TypeError(
                f"eps must be a float tensor on the images' device {x.device}, got {eps.dtype} on {eps.device}"
            )
        if self._watch.first and eps.numel():
            for value in torch.stack(eps.double().aminmax()).tolist():
                check_eps(value, self.norm, self.clip)
        elif eps.numel():
            self._watch.tally("eps", eps_fits(eps, self.norm, self.clip))
        if eps.shape not in ((), (len(x),), (len(x), *(1,) * (x.ndim - 1))):
            raise ValueError(f"eps must be a number or a tensor of shape ({len(x)},), got {tuple(eps.shape)}")
        return eps if eps.ndim == 0 else eps.reshape(-1, *(1,) * (x.ndim - 1))

    def _own_alpha(self, x: torch.Tensor) -> torch.Tensor | None:
        """The step sizes (N, 1, ...) of these images; None where they are one for all."""
        if not isinstance(self.alpha, torch.Tensor):
            return None
        check_alpha_of(self.alpha, x, look=self._watch.first)
        if self._watch.first and self.alpha.numel():
            check_length("alpha", float(self.alpha.max()), self.eps, self.norm, self.clip)
        alpha = as_normal(self.alpha)
        if alpha.ndim == 1:
            return per_sample(alpha, x)
        return alpha if has_rows(alpha) else None
