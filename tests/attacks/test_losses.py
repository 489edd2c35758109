"""The losses by name, against formulas in float64 and their gradients by autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv.attacks import FGSM, LOSSES, PGD, PMA
from fastadv.attacks.losses import BOTH, LABEL, OTHER

EPS = 8 / 255


def rows(count, classes, dtype=torch.float64, scale=2.0):
    """Logits, some of them equal within a row, and labels."""
    logits = (scale * torch.randn(count, classes, dtype=dtype)).round(decimals=1)
    return logits.requires_grad_(), torch.randint(classes, (count,))


def others(row, label):
    return [value for j, value in enumerate(row) if j != label]


def gradient(losses, logits):
    return torch.autograd.grad(losses.sum(), logits)[0]


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_dlr_and_its_targeted_kind_follow_their_formulas_for_any_number_of_classes(classes):
    logits, labels = rows(200, classes)
    targets = (labels + torch.randint(1, classes, labels.shape)) % classes
    plain = LOSSES["dlr"](logits, labels)
    driven = LOSSES["targeted_dlr"](logits, torch.stack((labels, targets), 1))
    for i, row in enumerate(logits.tolist()):
        y, t, ranked = int(labels[i]), int(targets[i]), sorted(row, reverse=True)
        margin = max(others(row, y)) - row[y]
        expected = margin if classes == 2 else margin / (ranked[0] - ranked[2] + 1e-12)
        assert math.isclose(plain[i].item(), expected, rel_tol=1e-12, abs_tol=1e-12)
        below = {2: None, 3: sum(ranked[1:]) / 2}.get(classes, sum(ranked[2:4]) / 2)
        expected = row[t] - row[y] if classes == 2 else (row[t] - row[y]) / (ranked[0] - below + 1e-12)
        assert math.isclose(driven[i].item(), expected, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_a_logit_of_minus_infinity_is_no_class_in_a_ratio(classes):
    logits = torch.randn(100, classes, dtype=torch.float64, requires_grad=True)  # no two are equal, so one is third
    labels = torch.randint(classes, (100,))
    pairs = torch.stack((labels, (labels + 1) % classes), 1)
    for name, targets in (("dlr", labels), ("targeted_dlr", pairs)):
        masked = torch.cat((logits, torch.full((100, 3), -torch.inf, dtype=logits.dtype)), 1)
        expected = LOSSES[name](logits, targets)
        found = LOSSES[name](masked, targets)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_few_classes_have_a_gradient_under_every_loss(classes):
    logits, _ = rows(200, classes)
    labels = logits.argmax(1)
    pairs = torch.stack((labels, (labels + torch.randint(1, classes, labels.shape)) % classes), 1)
    for name in ("ce", "margin", "dlr", "targeted_margin", "targeted_dlr", "probability_margin"):
        grad = gradient(LOSSES[name](logits, pairs if LOSSES[name].compares == "pairs" else labels), logits)
        assert (grad.abs() > 1e-9).any(1).float().mean() > 0.9, name  # what rounding leaves of zero is none


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("climbed", [LABEL, OTHER, BOTH])
def test_the_probability_margin_is_its_value_and_its_gradient_a_positive_multiple(climbed, classes):
    logits, labels = rows(200, classes)
    own = labels[:, None]
    p = logits.softmax(1)
    p_own, p_best = p.gather(1, own)[:, 0], p.scatter(1, own, -1.0).amax(1)
    value = {LABEL: -p_own, OTHER: p_best, BOTH: p_best - p_own}[climbed]
    targets = labels if climbed == BOTH else torch.stack((labels, torch.full_like(labels, climbed)), 1)
    found = LOSSES["probability_margin"](logits, targets)
    torch.testing.assert_close(found, value)
    # Of two equal classes this loss climbs the first; the gradient of amax climbs both.
    single = (p.scatter(1, own, -1.0) == p_best[:, None]).sum(1) == 1
    mine, true = (F.normalize(gradient(each, logits), dim=1)[single] for each in (found, value))
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1000.0])
def test_the_probability_margin_has_a_gradient_however_sure_the_model_is(scale):
    """In float32 1 - p_y is 0 from a margin of 17 on."""
    logits, labels = rows(100, 5, torch.float32)
    labels = logits.argmax(1)
    scaled = (logits * scale).detach().requires_grad_()
    for climbed in (LABEL, OTHER, BOTH):
        targets = torch.stack((labels, torch.full_like(labels, climbed)), 1)
        grad = gradient(LOSSES["probability_margin"](scaled, targets), scaled)
        assert grad.isfinite().all()
        assert (grad.gather(1, labels[:, None]) <= 0).all()
        assert (grad.abs().amax(1) > 0.1).all()


def test_bce_is_the_sum_over_the_labels():
    logits, labels = torch.randn(30, 4, dtype=torch.float64), torch.randint(2, (30, 4))
    z, y = logits, labels.double()
    by_hand = -(y * z.sigmoid().log() + (1 - y) * (-z).sigmoid().log()).sum(1)
    torch.testing.assert_close(LOSSES["bce"](logits, labels), by_hand)
    torch.testing.assert_close(
        LOSSES["bce"](logits[:, :1], labels[:, 0]), -((2 * y[:, 0] - 1) * z[:, 0]).sigmoid().log()
    )
    with pytest.raises(ValueError, match="one for each of"):
        LOSSES["bce"](logits, labels[:, 0])


# ---------------------------------------------------------------------- in an attack


def linear(classes=5, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(27, classes)).double()


def samples(model, count=40):
    images = torch.rand(count, 3, 3, 3, dtype=torch.float64)
    return images, model(images).argmax(1)


def test_targeted_losses_are_run_towards_the_classes_in_the_order_of_the_clean_logits():
    """On a linear model the sign step towards each class is known; the strongest step is kept."""
    model = linear(6)
    images, labels = samples(model)
    asked = []
    attack = PGD(model, EPS, EPS, 1, False, loss="targeted_margin", target_classes=3)
    aim = attack.aim
    attack.aim = lambda slots: (asked.append(aim(slots)), asked[-1])[1]
    adv = attack(images, labels)
    ranked = model(images).detach().argsort(1, descending=True)
    weight = model[1].weight.detach()
    results = []
    for rank in (1, 2, 3):
        assert any(torch.equal(pairs, torch.stack((labels, ranked[:, rank]), 1)) for pairs in asked)
        step = (weight[ranked[:, rank]] - weight[labels]).sign().view_as(images)
        results.append((images + EPS * step).clamp(0, 1))
    said = torch.stack([model(x).argmax(1) != labels for x in results])
    assert torch.equal(model(adv).argmax(1) != labels, said.any(0))
    assert all(any(torch.allclose(adv[i], x[i], atol=1e-12) for x in results) for i in range(len(images)))


def test_of_equal_logits_the_lower_class_comes_first_and_the_label_is_left_out():
    model = linear(5)
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 3.0], [-torch.inf, 5.0, -torch.inf, 4.0, 4.0]], dtype=torch.float64)
    attack = PGD(model, EPS, loss="targeted_dlr", target_classes=9)
    found = attack.targets(logits, torch.tensor([4, 1]))
    assert found.tolist() == [[4, 1, 2, 3, 0], [1, 3, 4, 0, 2]]


@pytest.mark.parametrize("loss", ["targeted_margin", "targeted_dlr", "kl"])
def test_a_loss_that_chooses_its_targets_is_refused_with_others(loss):
    with pytest.raises(ValueError, match=f"the loss {loss}"):
        PGD(linear(), EPS, loss=loss, targeted=True)


def test_bce_attacks_one_logit_and_several_labels():
    """With one logit a linear model's best step is the sign of its weight; with several, one wrong label fools."""
    model = linear(1)
    images = torch.rand(20, 3, 3, 3, dtype=torch.float64)
    labels = (model(images)[:, 0] > 0).long()
    adv = FGSM(model, EPS, loss="bce")(images, labels)
    step = (1 - 2 * labels).view(-1, 1, 1, 1) * model[1].weight.detach().sign().view(3, 3, 3)
    torch.testing.assert_close(adv, (images + EPS * step).clamp(0, 1))
    several = linear(4)
    signs = (several(images) > 0).long()
    attack = PGD(several, EPS, loss="bce", restarts=3)
    adv = attack(images, signs.float(), seed=1)
    fooled = attack.fooled(several(adv).detach(), signs)
    assert torch.equal(fooled, ((several(adv) > 0) != (signs > 0)).any(1))
    with pytest.raises(ValueError, match="0 or 1"):
        PGD(several, EPS, loss="bce")(images, 2 * signs.float() + 0.5)


# ---------------------------------------------------------------------- PMA


def by_hand(model, images, labels, starts, steps, eps, run):
    """PMA's iterates (steps + 1, N, ...) from its formulas, with autograd's gradient of the probabilities."""
    x, iterates = starts, [starts]
    period, first = (steps, steps // 4) if run >= 2 else (steps // 2, steps // 2)
    for k in range(steps):
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        p = logits.softmax(1)
        p_own = p.gather(1, labels[:, None])[:, 0]
        best = logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)
        p_best = p.gather(1, best[:, None])[:, 0]
        if k >= first:
            value = p_best - p_own
        elif run >= 2:  # the third run goes to the class that comes second on the clean image
            driven_to = model(images).argsort(dim=1, descending=True)[:, 1 + (run - 2) % (logits.shape[1] - 1)]
            value = (logits.gather(1, driven_to[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
        else:
            value = p_best if run % 2 else -p_own
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        alpha = eps * (1 + math.cos(math.pi * (k % period) / period))
        x = (images + (x + alpha * grad.sign() - images).clamp(-eps, eps)).clamp(0, 1)
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("steps", [2, 8, 20])
def test_pma_follows_its_formulas_in_each_run(steps):
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    images, labels = samples(model, 12)
    shown = []
    model.register_forward_pre_hook(lambda module, args: shown.append(args[0].detach().clone()))
    PMA(model, EPS, steps, restarts=7)(images, labels, seed=3)
    runs = [shown[i : i + steps + 1] for i in range(1, len(shown), steps + 1)]  # the first call has clean images
    assert len(runs) == 7  # the last run goes to the second class again
    for run, iterates in enumerate(runs):
        expected = by_hand(model, images, labels, iterates[0], steps, EPS, run)
        assert (iterates[0] - images).abs().max() > EPS / 2
        for found, want in zip(iterates, expected, strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-9)
    assert not torch.equal(runs[0][0], runs[1][0])


def test_pma_goes_on_where_the_second_run_found_something():
    """The second run fooled more than one image in 500 and more than one image, or a tenth of the first run's count."""
    attack = PMA(linear())
    for second, images, goes_on in ((2, 500, True), (1, 500, False), (1, 100, False), (20, 10_000, False)):
        assert attack.goes_on([400, second], images) == goes_on
    assert attack.goes_on([400, 21], 10_000)
    for first, goes_on in ((9, True), (10, False), (0, True)):
        assert attack.goes_on([first, 1], 500) == goes_on
    assert not attack.goes_on([0, 0], 500)
    assert not attack.goes_on([3, 3], 3000)  # no more than one image in 1,000
    assert not attack.goes_on([50], 500)  # the second run has not ended


def test_pma_goes_on_while_that_finds_something():
    """The last four runs, without the first, together fooled more than one image in 1,000."""
    attack = PMA(linear(), most_runs=12)
    falls = [50, 9]
    for _ in range(4):
        assert attack.goes_on(falls, 500)
        falls.append(0)
    assert not attack.goes_on(falls, 500)
    assert not attack.goes_on([18, 1, 5], 500)  # the first two runs asked for no third
    assert attack.goes_on([*falls, 1, 0, 0, 0], 500)
    assert not attack.goes_on([*falls, 1, 0, 0, 0, 0], 500)
    assert not attack.goes_on([900, 90, 9, 4, 3, 2, 1], 10_000)
    assert attack.goes_on([900, 90, 9, 4, 4, 2, 1], 10_000)
    assert not attack.goes_on([50, *[9] * 11], 500)


def test_pma_has_an_even_number_of_steps():
    with pytest.raises(ValueError, match="even"):
        PMA(linear(), EPS, 7)


@pytest.mark.parametrize("factor", [10, 100, 1000])
def test_pma_finds_as_much_whatever_the_scale_of_the_logits(factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        model[3].weight *= 3
    images = torch.rand(300, 3, 3, 3)
    labels = model(images).argmax(1)

    def fooled(scale):
        attack = PMA(lambda x: scale * model(x), 0.15)
        return model(attack(images, labels, seed=0)).argmax(1) != labels

    one, other = fooled(1), fooled(factor)
    assert 0.2 < one.float().mean() < 0.8
    assert one.float().mean() - other.float().mean() <= 0.06
