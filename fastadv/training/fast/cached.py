"""Kept features: linear probing that attacks only some images in an epoch; the others skip the backbone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastadv.attacks.checks import device_of
from fastadv.functional import to_float
from fastadv.models import find_head
from fastadv.nn.autocast import own_autocast
from fastadv.nn.eager import eager
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits
from fastadv.ops.generator import seeded
from fastadv.training.fast.base import Epoch, FastMethod, needed
from fastadv.training.settings import Settings, in_limits
from fastadv.training.ties import place

INSTEAD = "Name another head with head= (--head), or take another attack"
CLOSE = 1e-3  # times the largest feature: rounding may change features so much when the batch has another size


class Cached(FastMethod):
    """Linear probing with FGSM, where an image keeps its perturbation, and so its features, for some epochs.

    The backbone is frozen and in eval mode. So the features that enter the head depend on the attacked image alone. All
    images get a fresh FGSM in the first epoch, and later image i where (i + epoch) mod `refresh` is 0. With refresh 2:

        epoch    image 0    image 1
        0        FGSM       FGSM
        1        kept       FGSM
        2        FGSM       kept

    The features of attacked images are kept. For the other images the head trains on the kept features, and they skip
    the backbone. With `refresh` K an epoch costs 3 / K forward passes of each image; FGSM costs 3, and training on
    clean images 1 (`fastadv.training.cost`). With K = 1 this is FGSM to the bit, if the model computes the same bits
    with and without a gradient and its head takes vectors.

    The features of an image are one row of numbers, with the dtype in which they enter the head. In float32 that is
    images x features x 4 bytes: 26 MB for 50,000 images and 128 features, 154 MB for 768. There are two such tables in
    memory, or three files of them in the run's folder. After a rollback the features are still right, but their
    perturbations were computed for the head that was discarded.

    Args:
        model: as of `FastMethod`.
        eps: as of `FastMethod`.
        refresh: an image gets a fresh FGSM every `refresh` epochs; None means 4.
        options: as of `FastMethod`; `alpha` is the length of FGSM's step, None means eps.
    """

    OPTIONS = ("alpha", "refresh")
    REFRESH = 4
    REFUSES: Mapping[str, str] = {
        "augment": "a picture that is cropped and flipped has other features in each epoch",
        "clean_weight": "it keeps the features of attacked images alone",
        "compile": "most of its updates run the head alone, and the others a new number of images each",
        "eps_schedule": "the features that it keeps are of one budget",
    }

    def __init__(self, model: nn.Module, eps: float, *, refresh: int | None = None, **options: Any):
        super().__init__(model, eps, **options)
        self.refresh: int = self.REFRESH if refresh is None else in_limits("refresh", refresh)
        self._known = False  # whether the first epoch has found the head and the shape of a row
        self._head: nn.Module
        self._row: torch.Tensor

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        if settings.method != "linear":
            raise ValueError(
                f"{name} keeps what enters the head, and with the method {settings.method} that changes in each "
                "update: take the method linear, or another attack such as stale"
            )

    def check_model(self, name: str, settings: Settings, images: torch.Tensor) -> None:
        where, head = find_head(self.model, settings.head, images[:1])
        tied = _tied(self.model, where)
        if tied:
            raise ValueError(f"{tied} is in the head {where} too and trains: what {name} keeps would change. {INSTEAD}")
        with torch.no_grad(), seeded(settings.seed), frozen(self.model):
            if not _gives_logits(self.model, head, images):
                raise ValueError(
                    f"{name} learns from the head {where} alone. This must be called once, with one row of numbers for "
                    f"each image, and what it returns must be the logits: in this model it is not so. {INSTEAD}"
                )
            both, one = (_entering(self.model, head, some) for some in (images, images[:1]))
        if not torch.allclose(both[:1], one, rtol=0, atol=CLOSE * both.abs().max().item()):
            raise ValueError(
                f"{name} keeps what enters the head {where}, and that is not the image's alone: in eval mode too the "
                f"layers before it draw random numbers, or mix the images of a batch. {INSTEAD}"
            )

    def begin_epoch(self, epoch: Epoch) -> None:
        """Get the features of the epoch before, and choose the images that get a fresh FGSM."""
        super().begin_epoch(epoch)
        if not self._known:
            black = to_float(torch.zeros(1, *epoch.shape, dtype=epoch.dtype, device=device_of(self.model)))
            _, self._head = find_head(self.model, epoch.settings.head, black)
            self._row, self._known = self._features(black)[0], True
        self._memory = epoch.memory("features", self._row.shape, self._row.dtype)
        numbers = torch.arange(len(self._memory.before))
        self._fresh = (numbers + epoch.number) % self.refresh == 0 if not self._memory.empty else numbers >= 0

    def facts(self) -> dict[str, float]:
        """The share of images with a fresh FGSM."""
        return {"fresh": self._fresh.double().mean().item()}

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The features that enter the head, (N, ...): new ones where an image gets a fresh FGSM, else the kept ones."""
        rows = needed(rows)
        features = self._memory.read(rows).to(images.device)
        fresh = self._fresh[rows].nonzero()[:, 0].to(images.device)  # positions in this part of the batch
        if len(fresh):
            features[fresh] = self._features(self.fresh(images[fresh], labels[fresh], seeds[fresh]))
        self._memory.write(rows, features)
        return (features,)

    def outputs(self, through: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> object:
        return self._head(inputs)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """The features of images (n, C, H, W), (n, ...), in the precision of the update."""
        with torch.no_grad(), own_autocast(images.device, self.attack.autocast):
            return _entering(self.model, self._head, images)


class _AtTheHead(Exception):
    """Ends a forward pass when it reaches the head."""


def _entering(model: nn.Module, head: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The features of images (n, C, H, W) that enter the head, (n, ...); the forward pass ends there."""
    entered: list[torch.Tensor] = []

    def end(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.extend(args)
        raise _AtTheHead

    # This hook comes first: the head's own hooks act later, when the head is called with these features. A compiled
    # model would not call the hook.
    hook = head.register_forward_pre_hook(end, prepend=True)
    try:
        with eager():
            model(images)
    except _AtTheHead:
        pass
    finally:
        hook.remove()
    return entered[0]


def _gives_logits(model: nn.Module, head: nn.Module, images: torch.Tensor) -> bool:
    """Whether the head is called once, with one tensor (n, ...), and its output is the logits.

    A hook replaces the head's output by other numbers. The model must then return these numbers as its logits.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []

    def replaced(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        numbers = torch.arange(output.numel()).to(output).view_as(output) - output.numel() / 2
        calls.append((args, kwargs, numbers))
        return numbers

    hook = head.register_forward_hook(replaced, with_kwargs=True)
    try:
        with eager():
            logits = find_logits(model(images), len(images))
    finally:
        hook.remove()
    if len(calls) != 1:
        return False
    ((args, kwargs, numbers),) = calls
    alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and len(args[0]) == len(images)
    return alone and logits.equal(numbers)


def _tied(model: nn.Module, head: str) -> str | None:
    """The name of a parameter whose memory a layer before the head shares with the head; None where there is none."""
    named = [(name, p, name.startswith(f"{head}.")) for name, p in model.named_parameters(remove_duplicate=False)]
    own = {place(p) for _, p, within in named if within}
    return next((name for name, p, within in named if not within and place(p) in own), None)
