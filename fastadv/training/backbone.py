"""Measures how robust a backbone is before training. A head on a frozen backbone cannot be more robust than it."""

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import nn
from torch.func import functional_call

from fastadv.attacks import PGD
from fastadv.attacks.checks import check_eps, check_samples, highest
from fastadv.attacks.verdicts import predicted
from fastadv.evaluation.robustness import robust_accuracy
from fastadv.evaluation.samples import as_tensors, collected
from fastadv.functional import sample_seeds
from fastadv.models import find_head
from fastadv.models.structure import gives_logits_alone, is_plain
from fastadv.nn.autocast import own_autocast
from fastadv.nn.eager import eager
from fastadv.nn.frozen import frozen
from fastadv.ops.generator import seeded
from fastadv.training.passes import Passes

BATCH = 128
FIT, JUDGE = 1000, 256  # the most images that the head is fitted to, and judged on
# The penalty, times the features' mean variance. With a smaller one the head uses small features that any attack moves.
RIDGE = 1.0
REFITS = 2  # fits on attacked images: a head that is fitted to clean ones alone uses features that are not robust
NEAR_NOTHING = 0.2  # a warning where PGD leaves less than this share of the clean accuracy


class BackboneRobustness(TypedDict):
    """The result of `backbone_robustness`, which describes it."""

    clean_accuracy: float | None
    robust_accuracy: float | None
    eps: float
    warning: str | None


def backbone_robustness(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    *,
    head: str | None = None,
    steps: int = 10,
    seed: int = 0,
    fit: int = FIT,
    judge: int = JUDGE,
    part: int = BATCH,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    compile: bool = False,
) -> BackboneRobustness:
    """The clean and the robust accuracy that a linear head reaches on the features of `model`.

    1. A head is fitted to the features of clean images, by ridge regression of targets +-1 (Hastie et al. 2009, "The
       elements of statistical learning", section 3.4.1). Its accuracy on other images is the clean accuracy.
    2. Twice, PGD-3 attacks the images against the latest head, and a new head is fitted to all features so far, as in
       adversarial training. The last head's accuracy on the other images under PGD, with steps of eps / 4, is the
       robust accuracy.

    PGD leaves almost nothing of a standard backbone's accuracy, and a good share of a robust one's. The model is not
    changed, nor is its head. Only the images that are used are copied, and they go to the device in parts.

    Args:
        model: from images to logits (N, classes), the output of its head.
        images: training images (N, ...) in [0, 1] or uint8; they are split at random.
        labels: int64 (N,).
        eps: the radius of the ball, in the images' units, [0, 1].
        head: the name of the head; None means the one that `fastadv.models.find_head` finds.
        steps: the number of PGD's steps for the robust accuracy.
        seed: the seed of the split and of PGD's random start.
        fit: the most images that the head is fitted to.
        judge: the most other images that judge it; of few images a fifth.
        part: the number of images that go through the model at a time.
        autocast: the dtype of torch.autocast, as in `Attack`.
        memory_format: the memory format of the images, as in `Attack`.
        compile: whether the attack runs under torch.compile, as in `Attack`; the features come from the plain model.

    Returns:
        {"clean_accuracy", "robust_accuracy", "eps", "warning"}. Where the head is no plain nn.Linear on one feature
        vector per image, or the logits depend on several heads, both accuracies are None and the warning says why. Else
        the warning is None; or it says that the backbone is not robust, where PGD leaves less than a fifth of a clean
        accuracy above chance.

    Raises:
        TypeError: images are neither floats nor uint8; or labels are not int64.
        ValueError: there are fewer than two images; a label is beyond the head's outputs; there is no such head; or a
            number is out of range.
    """
    if isinstance(model, nn.DataParallel):  # functional_call does not take it
        model, head = model.module, head and head.removeprefix("module.")
    check_eps(eps, "Linf")
    for option, value in (("steps", steps), ("fit", fit), ("judge", judge), ("part", part)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    images, labels = as_tensors(images, labels, model)
    check_samples(images, labels)
    if not len(labels):
        raise ValueError("there are no images to fit a head to")
    if len(labels) < 2:
        raise ValueError("there must be an image to fit the head to and one to judge it on, got 1 image")
    top = highest(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    judges = min(judge, max(1, len(labels) // 5, len(labels) - fit))
    order = order[: judges + fit]
    chosen = images[order.to(images.device)], labels[order.to(labels.device)]
    images, labels = collected(chosen, model, None)
    try:
        name, module = find_head(model, head, images[:1].to(labels.device))
    except ValueError as error:
        if head is not None:
            raise
        return _not_measured(eps, str(error))
    if type(module) is not nn.Linear:
        return _not_measured(eps, f"the head {name} is no plain nn.Linear but a {type(module).__name__}")
    if not is_plain(module):
        return _not_measured(eps, f"the weight of the head {name} is computed from others, as by spectral_norm")
    if top >= module.out_features:
        raise ValueError(f"labels must be below the head's {module.out_features} outputs, got {top}")

    passes = Passes(part, autocast, memory_format, compile)
    numbers = torch.arange(len(labels), device=labels.device)
    judging, fitting = numbers[:judges], numbers[judges:]

    def staged(rows: torch.Tensor) -> Iterable[torch.Tensor]:
        return (passes.staged(images, few, labels.device) for few in rows.split(part))

    def attacked(seed: int) -> Iterable[torch.Tensor]:
        attack = PGD(probe, eps, eps / 2, 3, **passes.attack)
        for rows, x in zip(fitting.split(part), staged(fitting), strict=True):
            yield attack(x, labels[rows], seed=sample_seeds(seed, rows - judges))

    with seeded(seed), frozen(model):
        try:
            features = _features(model, module, staged(fitting), passes)
        except _NoVectorError:
            return _not_measured(eps, f"the head {name} does not get one vector of features for each image")
        if not _alone(model, module, next(iter(staged(fitting[:1]))), passes):
            return _not_measured(eps, f"the logits depend on more than the head {name}, such as on a second head")
        probe = _Probe(model, name, module)
        probe.fit(features, labels[fitting])
        right = predicted(probe.of_features(_features(model, module, staged(judging), passes))) == labels[judging].cpu()
        clean = int(right.sum()) / judges
        for refit in range(1, 1 + REFITS):
            features = torch.cat((features, _features(model, module, attacked(seed + refit), passes)))
            probe.fit(features, labels[fitting].repeat(1 + refit))
        against = PGD(probe, eps, eps / 4, steps, **passes.attack)
        judged, options = (images[:judges], labels[:judges]), {"seed": seed, "device": labels.device}
        report = robust_accuracy(probe, judged, against, **options, **passes.evaluation)
        robust: float = report["robust_accuracy"]
    chance = int(labels[judging].bincount().max()) / judges
    warning = None
    if clean > chance and robust < NEAR_NOTHING * clean:
        warning = (
            f"the backbone is not robust at eps = {255 * eps:.4g}/255: a linear head fitted to its features has a "
            f"clean accuracy of {clean:.1%}, and PGD-{steps} leaves {robust:.1%}. No head is robust on features that "
            "are not: start from robustly pretrained weights, take a smaller eps, or train everything"
        )
    return {"clean_accuracy": clean, "robust_accuracy": robust, "eps": eps, "warning": warning}


class _Probe:
    """`model` with other weights in its head. The model itself is not changed."""

    def __init__(self, model: nn.Module, name: str, head: nn.Linear):
        self.model, self.name, self.head = model, name, head
        self.parameters: dict[str, torch.Tensor] = {}

    def fit(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        fitted = ridge_head(features, labels, self.head.out_features, intercept=self.head.bias is not None)
        own = self.head.named_parameters(recurse=False)
        self.parameters = {f"{self.name}.{key}": new.to(old) for (key, old), new in zip(own, fitted, strict=False)}

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """The logits (N, classes) of features (N, D), on the CPU."""
        weight, *bias = (parameter.cpu() for parameter in self.parameters.values())
        return nn.functional.linear(features.to(weight.dtype), weight, *bias)

    def __call__(self, images: torch.Tensor) -> object:
        return functional_call(self.model, self.parameters, (images,))


def ridge_head(
    features: torch.Tensor, labels: torch.Tensor, classes: int, *, intercept: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head of the ridge regression of targets +-1 on features.

    The penalty on the weights is RIDGE times N times the mean variance of the features. So the scale of the features
    does not matter. The bias has no penalty.

    Args:
        features: floats (N, D).
        labels: int64 (N,).
        classes: the number of classes.
        intercept: whether there is a bias; without it the variance is taken about zero.

    Returns:
        The weight (classes, D) and the bias (classes,), float64, on the CPU; without `intercept` the bias is zero.
    """
    x = features.double().cpu()
    y = 2 * nn.functional.one_hot(labels.cpu(), classes).double() - 1
    x_mean, y_mean = (t.mean(0) if intercept else t.new_zeros(t.shape[1]) for t in (x, y))
    x, y = x - x_mean, y - y_mean
    penalty = (RIDGE * x.square().sum() / x.shape[1]).clamp_min(torch.finfo(x.dtype).tiny)
    gram = x.T @ x
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean


class _NoVectorError(Exception):
    """The head does not get one vector of features for each image."""


@torch.no_grad()
def _features(model: nn.Module, head: nn.Linear, batches: Iterable[torch.Tensor], passes: Passes) -> torch.Tensor:
    """The features that enter `head`: (N, D), on the CPU.

    Raises:
        _NoVectorError: the head gets something else.
    """
    found = []
    for batch in batches:
        entered: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args, entered=entered: entered.append(args[0]))
        try:
            with own_autocast(batch.device, passes.autocast):
                model(batch)
        finally:
            hook.remove()
        if len(entered) != 1 or entered[0].ndim != 2 or len(entered[0]) != len(batch):
            raise _NoVectorError
        found.append(entered[0].cpu())
    return torch.cat(found)


@torch.no_grad()
def _alone(model: nn.Module, head: nn.Linear, image: torch.Tensor, passes: Passes) -> bool:
    """Whether the logits depend on the head alone: the features that enter it tell nothing of a second one."""
    with own_autocast(image.device, passes.autocast), eager():
        return gives_logits_alone(model, head, image)


def _not_measured(eps: float, why: str) -> BackboneRobustness:
    warning = f"the backbone's robustness is not measured: {why}"
    return {"clean_accuracy": None, "robust_accuracy": None, "eps": eps, "warning": warning}
