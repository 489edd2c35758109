"""APGD for one sample, in float64 and by plain loops: an oracle written from the paper's formulas alone.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (arXiv 2003.01690), Algorithm 1 and section 3. The projection is the plain one: onto the ball, then onto
the pixel box, each rounded as float64 rounds.
"""

from typing import NamedTuple

import torch


class Trace(NamedTuple):
    """What one run of APGD did.

    Attributes:
        iterates: the points x_0 .. x_steps, float64 images. x_{i+1} is the point that step i reached, also where a
            check then put the sample back on its best point.
        halved: after how many steps the step size was halved.
        sizes: the step size of each of the `steps` steps.
        losses: the loss at each of the iterates.
        best: the first iterate of the largest loss.
    """

    iterates: list
    halved: list
    sizes: list
    losses: list
    best: torch.Tensor


def check_points(steps):
    """The numbers of steps after which APGD checks the step size: for 100 steps 22, 41, 57, 70, 80, 87, 93 and 99."""
    interval, drop, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    points, done = [], 0
    while done + interval <= steps:
        done += interval
        points.append(done)
        interval = max(interval - drop, least)
    return points


def projected(point, image, eps, norm):
    """`point` brought into the ball around `image`, then into the box [0, 1]."""
    shift = point - image
    if norm == "linf":
        shift = shift.clamp(-eps, eps)
    else:
        length = shift.norm().item()
        shift = shift * (eps / length) if length > eps else shift
    return (image + shift).clamp(0, 1)


def direction(gradient, norm):
    return gradient.sign() if norm == "linf" else gradient / (gradient.norm() + 1e-12)


def loss_and_gradient(model, point, label, loss):
    point = point.clone().requires_grad_()
    value = loss(model(point[None]), label).squeeze()
    (gradient,) = torch.autograd.grad(value, point)
    return value.item(), gradient


def apgd(model, image, label, start, *, eps, norm, loss, steps, rho=0.75, momentum=0.75):
    """Run APGD from the point `start` and say what it did.

    Args:
        model: maps float64 images (1, ...) to logits (1, C).
        image: the clean image, in [0, 1].
        label: the sample's label, passed on to `loss`.
        start: the first iterate x_0, already within the ball and the box.
        eps: the radius of the ball.
        norm: "linf" or "l2".
        loss: maps logits (1, C) and the label to a scalar, which is climbed.
        steps: the number of gradient steps.
        rho: the share of an interval's steps that must have raised the loss for the step size to stay.
        momentum: the weight of the new step; the rest goes to the last movement.
    """
    image, x = image.double(), start.double()
    before = x
    value, gradient = loss_and_gradient(model, x, label, loss)
    best = (x, gradient, value)
    iterates, losses, sizes, halved = [x], [value], [], []

    size, checks = 2 * eps, check_points(steps)
    checked, halved_last, best_checked = 0, True, value
    for i in range(steps):
        sizes.append(size)
        z = projected(x + size * direction(gradient, norm), image, eps, norm)
        a = 1.0 if i == 0 else momentum
        following = projected(x + a * (z - x) + (1 - a) * (x - before), image, eps, norm)
        before, x = x, following
        value, gradient = loss_and_gradient(model, x, label, loss)
        iterates.append(x)
        losses.append(value)
        if value > best[2]:
            best = (x, gradient, value)

        done = i + 1
        if done in checks:
            # The first interval compares its first loss with 0, not with the loss of the start.
            past = [0.0, *losses[1:]] if checked == 0 else losses
            rises = sum(past[j] > past[j - 1] for j in range(checked + 1, done + 1))
            oscillates = rises <= rho * (done - checked)
            stuck = not halved_last and best[2] <= best_checked
            halved_last = oscillates or stuck
            checked, best_checked = done, best[2]
            if halved_last:
                halved.append(done)
                size /= 2
                x, gradient = best[0], best[1]

    return Trace(iterates, halved, sizes, losses, best[0])
