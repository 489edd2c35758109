"""How robust is a backbone, before anything is trained? A frozen one gives its head no more than it has."""

import torch
from torch import nn
from torch.func import functional_call

from fastadv.attacks import PGD
from fastadv.attacks.checks import check_eps, highest
from fastadv.attacks.state import frozen
from fastadv.attacks.verdicts import predicted
from fastadv.data import to_float
from fastadv.evaluation.robustness import robust_accuracy, seeded
from fastadv.evaluation.samples import gathered
from fastadv.models import find_head

BATCH = 128
FIT, JUDGE = 1000, 256  # images at most
RIDGE = 1.0  # times the features' mean variance: less, and the head leans on small features that any attack moves
REFITS = 2  # on clean images alone a head finds what is not robust in a robust backbone too
NEAR_NOTHING = 0.2  # of the clean accuracy


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
) -> dict:
    """Clean and robust accuracy of the features of `model`, under a linear head fitted to them in closed form.

    The head is a ridge regression of targets +-1 on the features of clean images (Hastie et al. 2009, "The elements of
    statistical learning", section 3.4.1), which gives the clean accuracy. It is fitted again, twice, on these and on
    the features of what PGD-3 makes of the images against the head so far, as adversarial training would; that gives
    the robust accuracy, under PGD with steps of eps / 4. Other images judge both. A standard backbone is left with
    about nothing, a robust one with a good share of its clean accuracy. The model is left as it was found; its own
    head is never written to.

    Args:
        model: from images to logits (N, classes), the output of its head.
        images, labels: training images (N, ...) in [0, 1] or uint8, and int64 (N,); split at random.
        eps: budget, in pixels of [0, 1].
        head: name of the head; None means `fastadv.models.find_head`'s.
        steps: number of PGD's steps.
        seed: of the split and of PGD's random start.
        fit: fit the head to so many images at most.
        judge: judge it on so many others at most; where there are few images, on a fifth of them.

    Returns:
        {"clean_accuracy", "robust_accuracy", "eps", "warning"}. The accuracies are None, and the warning says why,
        where the head is no plain nn.Linear on one feature vector per image, or there are several. Else the warning is
        None, or says that the backbone is not robust: less than a fifth of its accuracy, which is above chance, is left
        under PGD.

    Raises:
        TypeError: images are neither floats nor uint8, or labels are not int64.
        ValueError: fewer than two images; a label is beyond the head's outputs; no such head; or a
            number is out of range.
    """
    check_eps(eps, "Linf")
    for option, value in (("steps", steps), ("fit", fit), ("judge", judge)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    images, labels = gathered((images, labels), model, None)
    if len(labels) < 2:
        raise ValueError("there must be an image to fit the head to and one to judge it on, got 1 image")
    try:
        name, module = find_head(model, head, images[:1].to(labels.device))
    except ValueError as error:
        if head is not None:
            raise
        return _not_measured(eps, str(error))
    if type(module) is not nn.Linear:
        return _not_measured(eps, f"the head {name} is no plain nn.Linear but a {type(module).__name__}")
    if highest(labels) >= module.out_features:
        raise ValueError(f"labels must be below the head's {module.out_features} outputs, got {highest(labels)}")

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    judges = min(judge, max(1, len(labels) // 5, len(labels) - fit))
    (x_judge, y_judge), (x_fit, y_fit) = (
        (images[rows.to(images.device)].to(labels.device), labels[rows.to(labels.device)])
        for rows in (order[:judges], order[judges:][:fit])
    )
    with seeded(seed), frozen(model):
        features = _features(model, module, x_fit)
        if features is None:
            return _not_measured(eps, f"the head {name} does not get one vector of features for each image")
        probe = _Probe(model, name, module)
        probe.fit(features, y_fit)
        logits = nn.functional.linear(_features(model, module, x_judge), *probe.parameters.values())
        clean = int((predicted(logits) == y_judge).sum()) / judges
        for refit in range(1, 1 + REFITS):
            x_adv = PGD(probe, eps, eps / 2, 3, chunk=BATCH)(x_fit, y_fit, seed=seed + refit)
            features = torch.cat((features, _features(model, module, x_adv)))
            probe.fit(features, y_fit.repeat(1 + refit))
        against = PGD(probe, eps, eps / 4, steps)
        robust = robust_accuracy(probe, (x_judge, y_judge), against, slots=BATCH, seed=seed)["robust_accuracy"]
    chance = int(y_judge.bincount().max()) / judges
    warning = None
    if clean > chance and robust < NEAR_NOTHING * clean:
        warning = (
            f"the backbone is not robust at eps = {255 * eps:.4g}/255: a linear head fitted to its features has a "
            f"clean accuracy of {clean:.1%}, and PGD-{steps} leaves {robust:.1%}. No head holds on features that do "
            "not: start from robustly pretrained weights, take a smaller eps, or train everything"
        )
    return {"clean_accuracy": clean, "robust_accuracy": robust, "eps": eps, "warning": warning}


class _Probe:
    """`model` with another head in the place of its own, which is not written to."""

    def __init__(self, model: nn.Module, name: str, head: nn.Linear):
        self.model, self.name, self.head = model, name, head
        self.parameters: dict[str, torch.Tensor] = {}

    def fit(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        fitted = ridge_head(features, labels, self.head.out_features, intercept=self.head.bias is not None)
        own = self.head.named_parameters(recurse=False)
        self.parameters = {f"{self.name}.{key}": new.to(old) for (key, old), new in zip(own, fitted, strict=False)}

    def __call__(self, images: torch.Tensor) -> object:
        return functional_call(self.model, self.parameters, (images,))


def ridge_head(
    features: torch.Tensor, labels: torch.Tensor, classes: int, *, intercept: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (classes, D) and bias (classes,) of the ridge regression of targets +-1 on features (N, D), in float64.

    The penalty is RIDGE times N times the mean variance of the features, so that their scale does not matter; the
    bias has none. Without `intercept` the bias is zero, and the variance is about zero.
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


@torch.no_grad()
def _features(model: nn.Module, head: nn.Linear, images: torch.Tensor) -> torch.Tensor | None:
    """What enters `head`: (N, D); None where that is something else."""
    entered = []
    hook = head.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        for batch in images.split(BATCH):
            model(to_float(batch))
    finally:
        hook.remove()
    if not entered or entered[0].ndim != 2 or sum(map(len, entered)) != len(images):
        return None
    return torch.cat(entered)


def _not_measured(eps: float, why: str) -> dict:
    warning = f"the backbone's robustness is not measured: {why}"
    return {"clean_accuracy": None, "robust_accuracy": None, "eps": eps, "warning": warning}
