"""Puts fastadv's attacks in place of peers' own, with the peers' names, arguments and defaults.

The functions `adv_lib`, `foolbox`, `art` and `torchattacks` each replace the attacks of that package; `suites.py` then
runs the package's tests. It lists what an adapter changes, beside names, and stores this with the results.
"""

import math
from functools import partial

import numpy as np
import torch

from fastadv import attacks


def whole_box(eps, lo, hi):
    """The radius for fastadv: eps, or the width of the box if eps is larger."""
    return min(float(eps), hi - lo)


# ------------------------------------------------------------------ adv-lib


def apgd(model, inputs, labels, eps, norm, targeted=False, n_iter=100, n_restarts=1, loss_function="dlr", eot_iter=1):
    attack = attacks.APGD if norm == math.inf else attacks.APGDL2
    options = {"loss": loss_function, "targeted": targeted, "restarts": n_restarts, "eot": eot_iter}
    return attack(model, eps, n_iter, **options)(inputs, labels)


def pgd_linf(
    model,
    inputs,
    labels,
    ε,
    targeted=False,
    steps=40,
    random_init=True,
    restarts=1,
    loss_function="ce",
    relative_step_size=0.01 / 0.3,
    absolute_step_size=None,
):
    alpha = relative_step_size * ε if absolute_step_size is None else absolute_step_size
    options = {"loss": loss_function, "targeted": targeted, "restarts": restarts}
    return attacks.PGD(model, ε, alpha, steps, random_init, **options)(inputs, labels)


def fab(model, inputs, labels, norm, n_iter=100):
    """FAB without a bound: within the whole box."""
    attack, eps = (attacks.FAB, 1.0) if norm == math.inf else (attacks.FABL2, math.sqrt(inputs[0].numel()))
    return attack(model, eps, n_iter, loss="margin")(inputs, labels)


def adv_lib():
    from adv_lib import attacks as theirs

    theirs.apgd, theirs.pgd_linf, theirs.fab = apgd, pgd_linf, fab


# ------------------------------------------------------------------ foolbox

FOOLBOX = {
    "LinfProjectedGradientDescentAttack": attacks.PGD,
    "LinfBasicIterativeAttack": attacks.PGD,
    "LinfFastGradientAttack": attacks.PGD,
    "LinfMomentumIterativeFastGradientMethod": attacks.MIFGSM,
    "L2ProjectedGradientDescentAttack": attacks.PGDL2,
    "L2BasicIterativeAttack": attacks.PGDL2,
    "L2FastGradientAttack": attacks.PGDL2,
}


def foolbox_run(ours):
    """The replacement of the method `run` of one of foolbox's attacks."""

    def run(self, model, inputs, criterion, *, epsilon, **kwargs):
        import eagerpy
        from foolbox.attacks.base import get_criterion

        x, restore = eagerpy.astensor_(inputs)
        criterion = get_criterion(criterion)
        targeted = hasattr(criterion, "target_classes")
        labels = criterion.target_classes if targeted else criterion.labels
        eps = whole_box(epsilon, *model.bounds) if ours.norm == "Linf" else epsilon
        settings = {"alpha": self.abs_stepsize or self.rel_stepsize * eps, "steps": self.steps}
        if ours is attacks.MIFGSM:
            settings["decay"] = self.momentum
        else:
            settings["random_start"] = self.random_start
        attack = ours(model, eps, **settings, targeted=targeted, clip=tuple(model.bounds))
        return restore(eagerpy.astensor(attack(x.raw, labels.raw)))

    return run


def foolbox():
    from foolbox import attacks as theirs

    for name, ours in FOOLBOX.items():
        getattr(theirs, name).run = foolbox_run(ours)


# ------------------------------------------------------------------ ART


def number(value):
    """A setting as a number; ART allows arrays with a single value."""
    values = np.unique(value)
    if len(values) > 1:
        raise NotImplementedError(f"one value for all pixels, got {values}")
    return float(values[0])


def art_model(estimator, x, mask):
    """Their estimator as a function of tensors, with its preprocessing, whose gradient is the identity, and the mask.

    A pixel that is masked out keeps its value in x.
    """

    def model(images):
        images = x + mask * (images - x)
        seen, _ = estimator._apply_preprocessing(images.detach().numpy(), y=None, fit=False)
        return estimator.model(images + (torch.as_tensor(seen, dtype=x.dtype) - images).detach())

    return model


def art_generate(theirs, made_of):
    """The replacement of their `generate`.

    made_of(self, norm) returns a function from (model, eps, clip) to an attack; or None, which keeps their attack.
    """

    def generate(self, x, y=None, **options):
        norm = math.inf if self.norm == "inf" else self.norm
        make = made_of(self, norm)
        if make is None:
            return theirs(self, x, y, **options)
        mask = 1.0 if options.get("mask") is None else options["mask"]
        x, mask = (torch.as_tensor(each, dtype=torch.float32) for each in (x, mask))
        labels = None if y is None else torch.from_numpy(np.argmax(y, 1) if np.ndim(y) == 2 else y)
        eps, clip = number(self.eps), self.estimator.clip_values
        if clip is not None:
            clip = number(clip[0]), number(clip[1])
            eps = whole_box(eps, *clip) if norm == math.inf else eps
        attack = make(art_model(self.estimator, x, mask), eps, clip=clip)
        return (x + mask * (attack(x, labels) - x)).numpy()

    return generate


def known(model, x, labels):
    return model(x).argmax(1) if labels is None else labels


def art_pgd(self, norm):
    """PGD for ART, and for its subclasses BasicIterativeMethod and MomentumIterativeMethod."""
    if norm not in (2, math.inf) or self.random_eps:
        return None
    settings = {"alpha": number(self.eps_step), "steps": self.max_iter, "targeted": self.targeted}
    if self._attack.decay is not None:
        return partial(attacks.MIFGSM, decay=self._attack.decay, **settings) if norm == math.inf else None
    settings |= {"random_start": self.num_random_init > 0, "restarts": max(1, self.num_random_init)}
    return partial(attacks.PGD if norm == math.inf else attacks.PGDL2, **settings)


def art_fgm(self, norm):
    if norm not in (2, math.inf):
        return None
    settings = {"alpha": None, "steps": 1, "targeted": self.targeted}
    settings |= {"random_start": self.num_random_init > 0, "restarts": max(1, self.num_random_init)}
    make = partial(attacks.PGD if norm == math.inf else attacks.PGDL2, **settings)
    return partial(Least, make, number(self.eps_step)) if self.minimal else make


class Least:
    """ART's option `minimal`: the first of the budgets step, 2 step, ... that fools, else the last one within eps."""

    def __init__(self, make, step, model, eps, clip):
        self.attack, self.budgets = make(model, eps, clip=clip), np.arange(1, eps / step + 1e-6) * step

    def __call__(self, x, labels):
        model, found, left = self.attack.model, x.clone(), torch.ones(len(x), dtype=torch.bool)
        labels = known(model, x, labels)
        for eps in self.budgets:
            found[left] = self.attack(x, labels, eps=min(float(eps), self.attack.eps))[left]
            left = (model(found).argmax(1) == labels) != self.attack.targeted
        return found


def art_apgd(self, norm):
    if norm not in (2, math.inf):
        return None
    loss = {"cross_entropy": "ce", "difference_logits_ratio": "dlr"}[self.loss_type]
    settings = {"steps": self.max_iter, "loss": loss, "targeted": self.targeted, "restarts": self.nb_random_init}
    return partial(attacks.APGD if norm == math.inf else attacks.APGDL2, **settings)


def art_square(self, norm):
    make = attacks.Square if norm == math.inf else attacks.SquareL2
    settings = {"n_queries": self.max_iter, "p_init": self.p_init, "restarts": self.nb_restarts}
    return partial(OnlyRight, partial(make, **settings))


class OnlyRight:
    """An attack that returns misclassified images unchanged."""

    def __init__(self, make, model, eps, clip):
        self.attack = make(model, eps, clip=clip)

    def __call__(self, x, labels):
        right = self.attack.model(x).argmax(1) == known(self.attack.model, x, labels)
        return torch.where(right[:, None, None, None], self.attack(x, labels), x)


def art():
    from art.attacks import evasion

    replaced = {
        evasion.ProjectedGradientDescent: art_pgd,
        evasion.FastGradientMethod: art_fgm,
        evasion.AutoProjectedGradientDescent: art_apgd,
        evasion.SquareAttack: art_square,
    }
    for attack, made_of in replaced.items():
        attack.generate = art_generate(attack.generate, made_of)


# ------------------------------------------------------------------ torchattacks


def torchattacks():
    """No adapter is needed: names and arguments are the same."""
    import torchattacks as theirs

    for name in set(theirs.__all__) & set(attacks.__all__):
        setattr(theirs, name, getattr(attacks, name))
