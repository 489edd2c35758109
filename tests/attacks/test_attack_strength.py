"""The results of attacks against torchattacks, plain loops, closed forms and statistics."""

import math
import sys

import pytest
import torch
import torchattacks
from attacked import (
    ATTACKS,
    CLASSES,
    EPS,
    IN_L2,
    L2_EPS,
    RANDOM,
    SINGLE_STEP,
    TO_CORNERS,
    N,
    Net,
    batch_of,
    distances,
    every_attack,
    radius,
    short_steps,
)
from attacked import batch as batch
from attacked import net as net
from attacked import one_thread as one_thread
from torch import nn

from fastadv import random_init, sample_seeds
from fastadv.attacks import APGD, BIM, FFGSM, FGSM, MIFGSM, NFGSM, PGD, PGDL2, TPGD, ZeroGrad, create_attack
from fastadv.evaluation import evaluate


def within_an_ulp(a, b, images, reach=EPS):
    """Whether two results differ by at most one spacing of the largest possible pixel value."""
    top = (images + reach).clamp(max=1.0)
    spacing = torch.nextafter(top, torch.full_like(top, 9)) - top
    return bool(((a - b).abs() <= spacing).all())


def ce(logits, labels):
    """The summed cross-entropy, written out."""
    return (logits.exp().sum(1).log() - logits.gather(1, labels[:, None])[:, 0]).sum()


def gradient(model, x, loss):
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(model(leaf)), leaf)[0]


# torchattacks


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda m, **o: PGD(m, EPS, EPS / 4, 20, **o), lambda m: torchattacks.PGD(m, EPS, EPS / 4, 20)),
        (lambda m, **o: FFGSM(m, EPS, 1.25 * EPS, **o), lambda m: torchattacks.FFGSM(m, EPS, 1.25 * EPS)),
    ],
    ids=["PGD", "FFGSM"],
)
def test_equals_torchattacks_from_the_same_start(net, batch, ours, theirs, targeted, monkeypatch):
    images, labels = batch
    noise = torch.empty_like(images).uniform_(-EPS, EPS)
    start = (images + noise).clamp(0, 1)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(noise))
    reference = theirs(net)
    if targeted:
        reference.set_mode_targeted_by_label(quiet=True)
    adv = ours(net, targeted=targeted)(images, labels, x_init=start)
    assert within_an_ulp(adv, reference(images, labels), images)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda m: FGSM(m, EPS), lambda m: torchattacks.FGSM(m, EPS)),
        (lambda m: BIM(m, EPS, EPS / 4, 10), lambda m: torchattacks.BIM(m, EPS, EPS / 4, 10)),
        (lambda m: PGD(m, EPS, EPS / 4, 10, False), lambda m: torchattacks.PGD(m, EPS, EPS / 4, 10, False)),
        (lambda m: MIFGSM(m, EPS, EPS / 4, 10), lambda m: torchattacks.MIFGSM(m, EPS, EPS / 4, 10)),
        (
            lambda m: MIFGSM(m, EPS, EPS / 9, 10, decay=0.3),
            lambda m: torchattacks.MIFGSM(m, EPS, EPS / 9, 10, decay=0.3),
        ),
        (lambda m: PGDL2(m, 0.5, 0.2, 10, False), lambda m: torchattacks.PGDL2(m, 0.5, 0.2, 10, False)),
    ],
    ids=["FGSM", "BIM", "PGD", "MIFGSM", "MIFGSM-0.3", "PGDL2"],
)
def test_equals_torchattacks(net, batch, ours, theirs):
    torch.testing.assert_close(ours(net)(*batch), theirs(net)(*batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", [FGSM, FFGSM, BIM, PGD, MIFGSM, TPGD, PGDL2])
def test_defaults_are_torchattacks(cls):
    net = Net()
    ours, theirs = cls(net), getattr(torchattacks, cls.__name__)(net)
    for setting in ("eps", "alpha", "steps", "decay", "random_start", "eps_for_division"):
        if hasattr(theirs, setting) and cls is not FGSM:
            assert getattr(ours, setting) == getattr(theirs, setting)
    assert ours.eps == theirs.eps


# Plain loops


def plain_step(iterate, images, grad, alpha, eps):
    moved = iterate + alpha * grad.sign()
    return (images + (moved - images).clamp(-eps, eps)).clamp(0, 1)


def test_tpgd_equals_a_plain_loop(net, batch):
    images, _ = batch
    adv = start = (images + 0.001 * torch.randn_like(images)).clamp(0, 1)
    clean = net(images).detach().softmax(1)
    for _ in range(10):
        grad = gradient(net, adv, lambda z: (clean * (clean.log() - z.log_softmax(1))).sum())
        adv = plain_step(adv, images, grad, EPS / 4, EPS)
    assert within_an_ulp(TPGD(net, EPS, EPS / 4, 10)(images, x_init=start), adv, images)


@short_steps
@pytest.mark.parametrize("restart_from", range(5))
def test_each_float32_step_is_the_plain_one(restart_from):
    net, (images, labels) = Net().eval(), batch_of(N)
    alpha, one = EPS / 4, torch.tensor(1.0)
    iterate = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(4):
        grad = gradient(net, iterate, lambda z: nn.functional.cross_entropy(z, labels, reduction="sum"))
        expected = plain_step(iterate.double(), images.double(), grad.double(), alpha, EPS)
        adv = PGD(net, EPS, alpha, 1)(images, labels, x_init=iterate)
        sure = grad.abs() > 1e-5 * grad.abs().max()
        spacing = one.nextafter(torch.tensor(0.0)).sub(one).abs() * 2
        assert sure.float().mean() > 0.9
        assert ((adv - expected).abs()[sure] <= spacing).all()
        iterate = adv


@pytest.mark.parametrize(
    ("attack_on", "reach", "alpha", "projects"),
    [
        (lambda m: FFGSM(m, EPS, 1.25 * EPS), EPS, 1.25 * EPS, True),
        (lambda m: create_attack("fgsm-rs", m, EPS), EPS, 1.25 * EPS, True),
        (lambda m: NFGSM(m, EPS), 2 * EPS, EPS, False),
    ],
    ids=["FFGSM", "FGSM-RS", "NFGSM"],
)
def test_a_single_step_is_taken_from_the_random_start_that_the_model_saw(net, batch, attack_on, reach, alpha, projects):
    images, labels = batch
    seen = []
    hook = net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    adv = attack_on(net)(images, labels, seed=7)
    hook.remove()
    (start,) = seen
    assert torch.equal(start, random_init(images, reach, seed=7))
    grad = gradient(net, start, lambda z: ce(z, labels))
    step = start + alpha * grad.sign()
    expected = (images + (step - images).clamp(-EPS, EPS) if projects else step).clamp(0, 1)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-15)


# Closed forms


@pytest.fixture
def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).double()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    "attack_on",
    [
        lambda m, **o: FGSM(m, EPS, **o),
        lambda m, **o: FFGSM(m, EPS, 2 * EPS, **o),
        lambda m, **o: FGSM(m, EPS, alpha=2 * EPS, noise=EPS, **o),
        lambda m, **o: PGD(m, EPS, EPS, 1, False, **o),
        lambda m, **o: PGD(m, EPS, EPS / 4, 9, **o),
        lambda m, **o: BIM(m, EPS, EPS / 4, 5, **o),
        lambda m, **o: MIFGSM(m, EPS, EPS / 4, 5, **o),
        lambda m, **o: PGD(m, EPS, EPS / 4, 9, loss="margin", restarts=2, **o),
        lambda m, **o: PGD(m, EPS, EPS / 4, 9, chunk=4, **o),
    ],
)
def test_linf_optimum_of_a_linear_model(linear, batch, attack_on, targeted):
    images, labels = batch[0], batch[1] % 2
    weight = linear[1].weight.detach()
    towards = labels if targeted else 1 - labels
    best = (images + EPS * (weight[towards] - weight[1 - towards]).sign().reshape(images.shape)).clamp(0, 1)
    torch.testing.assert_close(attack_on(linear, targeted=targeted)(images, labels), best, rtol=0, atol=1e-14)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("random_start", [False, True])
def test_l2_optimum_of_a_linear_model(linear, batch, targeted, random_start):
    images, labels = batch[0] * 0.2 + 0.4, batch[1] % 2  # away from the box
    weight = linear[1].weight.detach()
    towards = labels if targeted else 1 - labels
    direction = weight[towards] - weight[1 - towards]
    best = images + 0.3 * (direction / direction.norm(dim=1, keepdim=True)).reshape(images.shape)
    adv = PGDL2(linear, 0.3, 0.5, 100, random_start, targeted=targeted)(images, labels)
    torch.testing.assert_close(adv, best, rtol=0, atol=1e-9)


def test_tpgd_on_a_linear_model_goes_to_one_of_the_two_far_corners(linear, batch):
    images, _ = batch
    uphill = (linear[1].weight[0] - linear[1].weight[1]).detach().sign().reshape(images.shape[1:])
    adv = TPGD(linear, EPS, EPS / 4, 12)(images)
    for a, x in zip(adv, images, strict=True):
        error = [(a - (x + s * EPS * uphill).clamp(0, 1)).abs().max() for s in (-1, 1)]
        assert min(error) < 1e-14


# Random starts


def starts(attack_class, images, **settings):
    """The first input of the model with a gradient: the attack's start."""
    seen = []

    def model(x):
        if x.requires_grad:
            seen.append(x.detach().clone())
        return x.flatten(1)[:, :CLASSES]

    call = {key: settings.pop(key) for key in ("seed", "eps") if key in settings}
    attack_class(model, **{"alpha": None, "steps": 1, **settings})(
        images, torch.zeros(len(images), dtype=torch.int64), **call
    )
    return seen[0]


def kolmogorov_smirnov(sample, distribution):
    """sqrt(n) times the largest distance between the distribution functions. It is above 2.2 once in 10,000 runs."""
    ordered = distribution(sample.double().sort().values)
    steps = torch.arange(len(ordered), dtype=torch.float64) / len(ordered)
    return math.sqrt(len(ordered)) * max((ordered - steps).max(), (steps + 1 / len(ordered) - ordered).max())


@pytest.mark.filterwarnings("ignore:all of the model's outputs")
@pytest.mark.parametrize("per_sample", [False, True])
def test_pgdl2_starts_in_a_random_direction_at_a_uniform_distance(per_sample):
    images = torch.full((2000, 3, 2, 2), 0.5)
    seed = torch.randint(2**62, (2000,)) if per_sample else int(torch.randint(2**62, ()))
    delta = (starts(PGDL2, images, eps=0.4, seed=seed) - images).flatten(1).double()
    far = delta.norm(dim=1)
    assert far.max() <= 0.4 * (1 + 1e-6)
    assert kolmogorov_smirnov(far / 0.4, lambda r: r) < 2.5
    direction = delta / far[:, None]
    second = direction.T @ direction / len(direction) * 12
    assert (direction.mean(0) * math.sqrt(12 * 2000)).abs().max() < 5
    assert (second - torch.eye(12, dtype=torch.float64)).abs().max() < 5 * math.sqrt(2 / 2000)
    assert (direction**4).mean() * 12 * 14 / 3 == pytest.approx(1, abs=0.05)  # as on a sphere, not as in a cube
    # The distance tells nothing about the direction.
    assert (torch.corrcoef(torch.cat((far[None], direction.T)))[0, 1:] * math.sqrt(2000)).abs().max() < 5


@pytest.mark.filterwarnings("ignore:all of the model's outputs")
@pytest.mark.parametrize("per_sample", [False, True])
def test_tpgd_starts_with_a_deviation_of_a_thousandth(per_sample):
    images = torch.full((400, 3, 6, 6), 0.5, dtype=torch.float64)
    seed = torch.randint(2**62, (400,)) if per_sample else int(torch.randint(2**62, ()))
    z = ((starts(TPGD, images, eps=EPS, seed=seed) - images) / 0.001).flatten()
    assert kolmogorov_smirnov(z, lambda r: 0.5 * (1 + torch.erf(r / math.sqrt(2)))) < 2.5
    assert z.std() == pytest.approx(1, abs=0.03)
    near = starts(TPGD, images, eps=0.001, seed=seed)
    assert (near - images).abs().max() <= 0.001
    assert 0 <= starts(TPGD, images * 0, eps=EPS, seed=seed).min()


@pytest.mark.filterwarnings("ignore:all of the model's outputs")
def test_pgd_starts_uniformly():
    images = torch.full((100, 3, 6, 6), 0.5, dtype=torch.float64)
    for seed in (5, torch.randint(2**62, (100,))):
        z = (starts(PGD, images, eps=EPS, seed=seed) - images).flatten() / EPS
        assert z.abs().max() <= 1
        assert kolmogorov_smirnov(z, lambda r: (r + 1) / 2) < 2.5


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"targeted": "random", "loss": "ce"}, {"chunk": 3}])
def test_with_seeds_per_sample_a_result_does_not_depend_on_its_neighbours(net, batch, name, options):
    images, labels = batch
    attack, seeds = ATTACKS[name](net, **options), torch.randint(2**62, (N,))
    whole = attack(images, labels, seed=seeds)
    order = torch.randperm(N)
    torch.testing.assert_close(attack(images[order], labels[order], seed=seeds[order]), whole[order], rtol=0, atol=1e-9)
    for n in range(N):
        alone = attack(images[n : n + 1], labels[n : n + 1], seed=seeds[n : n + 1])
        torch.testing.assert_close(alone, whole[n : n + 1], rtol=0, atol=1e-9)
    if name not in TO_CORNERS:
        assert not torch.equal(attack(images, labels, seed=seeds + 1), whole)


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_is_an_int_or_a_tensor_with_one_element(net, batch, name):
    attack = ATTACKS[name](net)
    results = [attack(*batch, seed=seed) for seed in (9, torch.tensor(9), torch.tensor([9]))]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    if name not in TO_CORNERS:
        assert not torch.equal(results[0], attack(*batch, seed=10))


@pytest.mark.parametrize("name", RANDOM)
def test_without_a_seed_the_start_is_drawn_from_torch_s_generator(net, batch, name):
    attack = ATTACKS[name](net)
    state = torch.get_rng_state()
    first, second = attack(*batch), attack(*batch)
    torch.set_rng_state(state)
    assert torch.equal(attack(*batch), first)
    if name not in TO_CORNERS:
        assert not torch.equal(first, second)


# Targets, losses, labels


def recorded(attack_class=PGD, **options):
    """The targets that the loss gets, read from a linear model's gradient."""
    arrived = []

    def model(x):
        logits = x.flatten(1)[:, :CLASSES] * 1.0
        if logits.requires_grad:
            logits.register_hook(lambda g: arrived.append(g.detach()))
        return logits

    attack = attack_class(model, EPS, EPS, 1, random_start=False, **options)

    def targets(images, labels, **call):
        arrived.clear()
        attack(images, labels, **call)
        # In cross-entropy's gradient, softmax minus one-hot, only the target's entry is negative.
        return (arrived[0] * (1 if options.get("targeted") else -1)).argmax(1)

    return targets


@pytest.mark.filterwarnings("ignore:all of the model's outputs")
def test_random_targets_cover_all_classes_but_the_label():
    images, labels = batch_of(3000)
    targets = recorded(targeted="random")
    seen = targets(images, labels, seed=3)
    counts = torch.zeros(CLASSES, CLASSES)
    counts.index_put_((labels, seen), torch.ones(len(labels)), accumulate=True)
    assert (counts.diagonal() == 0).all()
    expected = counts.sum(1, keepdim=True) / (CLASSES - 1)
    others = ~torch.eye(CLASSES, dtype=torch.bool)
    assert (((counts - expected) / expected.sqrt())[others].abs() < 5).all()
    assert torch.equal(seen, targets(images, labels, seed=3))
    assert not torch.equal(seen, targets(images, labels, seed=4))
    assert not torch.equal(targets(images, labels), targets(images, labels))
    two = torch.randint(CLASSES, (1,)).item()
    assert (recorded(targeted="random")(images[:50], torch.full((50,), two)) != two).all()


@pytest.mark.parametrize("targeted", ["random", "least_likely"])
def test_labels_that_name_no_class_have_no_other_class(net, batch, targeted):
    images, soft = batch[0], torch.rand(N, CLASSES, dtype=torch.float64).softmax(1)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=rf"targeted='{targeted}' chooses .* \(6, 5\) name no class: .*argmax\(1\)"):
        PGD(net, EPS, targeted=targeted)(images, soft)
    own = PGD(net, EPS, targeted=targeted, loss=lambda outputs, targets: (outputs - targets).abs().sum(1))
    with pytest.raises(ValueError, match="name no class"):
        own(images, soft)
    assert not calls
    PGD(net, EPS, targeted=True)(images, soft)


@pytest.mark.filterwarnings("ignore:all of the model's outputs")
def test_least_likely_target_is_the_smallest_logit_but_the_label():
    images, labels = batch_of(200)
    logits = images.flatten(1)[:, :CLASSES]
    expected = [min((j for j in range(CLASSES) if j != y), key=row.__getitem__) for row, y in zip(logits, labels)]  # noqa: B905
    assert recorded(targeted="least_likely")(images, labels).tolist() == expected
    predicted = logits.argmax(1)
    assert torch.equal(recorded(targeted="least_likely")(images, None), logits.argmin(1))
    assert torch.equal(recorded()(images, None), predicted)
    assert (recorded(targeted="random")(images, None) != predicted).all()
    assert torch.equal(recorded(targeted=True)(images, labels), labels)
    assert torch.equal(recorded()(images, labels), labels)


@every_attack
def test_without_labels_the_models_own_prediction_is_attacked(net, batch, name):
    attack, images = ATTACKS[name](net), batch[0]
    assert torch.equal(attack(images, seed=1), attack(images, net(images).argmax(1), seed=1))


FORMULAS = {
    "ce": lambda z, y: -math.log(math.exp(z[y]) / sum(map(math.exp, z))),
    "margin": lambda z, y: max(z[j] for j in range(len(z)) if j != y) - z[y],
    "dlr": lambda z, y: -(z[y] - max(z[j] for j in range(len(z)) if j != y)) / (sorted(z)[-1] - sorted(z)[-3] + 1e-12),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_losses_are_their_formulas(net, batch, loss):
    images, labels = batch
    attack = PGD(net, EPS, loss=loss)
    losses, logits = attack.objective.judge(images, labels)
    rows = net(images).tolist()
    expected = torch.tensor([FORMULAS[loss](z, y) for z, y in zip(rows, labels.tolist(), strict=True)]).double()
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, net(images).detach())
    minus, _ = PGD(net, EPS, loss=loss, targeted=True).objective.judge(images, labels)
    assert torch.equal(minus, -losses)


def test_kl_and_soft_labels_are_their_formulas(net, batch):
    images, soft = batch[0], torch.rand(N, CLASSES, dtype=torch.float64).softmax(1)
    z = net(images).detach().tolist()
    log_p = [[v - math.log(sum(map(math.exp, row))) for v in row] for row in z]
    rows = list(zip(soft.tolist(), log_p, strict=True))
    kl = [sum(q * (math.log(q) - p) for q, p in zip(qs, ls, strict=True)) for qs, ls in rows]
    cross = [sum(-q * p for q, p in zip(qs, ls, strict=True)) for qs, ls in rows]
    for loss, expected in (("kl", kl), ("ce", cross)):
        losses, _ = PGD(net, EPS, loss=loss).objective.judge(images, soft)
        torch.testing.assert_close(losses, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "soft", "kl"])
def test_each_loss_is_climbed(net, batch, loss):
    images, labels = batch
    soft = torch.rand(N, CLASSES, dtype=torch.float64).softmax(1)
    one_hot = nn.functional.one_hot(labels, CLASSES)

    def formula(z):
        best_other = (z - 1e9 * one_hot).amax(1)
        own = (z * one_hot).sum(1)
        top = z.topk(3).values
        return {
            "ce": -(z.log_softmax(1) * one_hot).sum(),
            "margin": (best_other - own).sum(),
            "dlr": ((best_other - own) / (top[:, 0] - top[:, 2] + 1e-12)).sum(),
            "soft": -(z.log_softmax(1) * soft).sum(),
            "kl": -(z.log_softmax(1) * soft).sum(),
        }[loss]

    adv, targets = images, labels if loss in ("ce", "margin", "dlr") else soft
    for _ in range(5):
        adv = plain_step(adv, images, gradient(net, adv, formula), EPS / 4, EPS)
    attack = PGD(net, EPS, EPS / 4, 5, False, loss="ce" if loss == "soft" else loss)
    assert within_an_ulp(attack(images, targets), adv, images)
    with torch.inference_mode():
        assert within_an_ulp(attack(images.clone(), targets.clone()), adv, images)


@every_attack
def test_a_loss_of_ones_own(batch, name):
    """A loss for regression: a dict of outputs, and float targets of another shape."""
    images, values = batch[0], torch.rand(N, 2, dtype=torch.float64)
    weight = torch.randn(108, 2, dtype=torch.float64)

    def model(x):
        return {"aux": None, "value": (x.flatten(1) @ weight).tanh()}

    attack = ATTACKS[name](model, loss=lambda outputs, targets: (outputs["value"] - targets).square().sum(1))
    before = ((images.flatten(1) @ weight).tanh() - values).square().sum(1)
    adv = attack(images, values, x_init=images)
    assert (((adv.flatten(1) @ weight).tanh() - values).square().sum(1) > before).all()
    with pytest.raises(ValueError, match="labels are missing"):
        attack(images)


# Restarts


@every_attack
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_keep_the_strongest_result_of_each_image(name, per_sample, targeted):
    net, (images, labels) = Net().double().eval(), batch_of(32, torch.float64)
    labels = labels if targeted else net(images).argmax(1)
    seed = torch.randint(2**62, (32,)) if per_sample else 11
    options = {"targeted": targeted, "loss": "ce"}
    index = torch.zeros(32, dtype=torch.int64) if per_sample else torch.arange(32)
    single = ATTACKS[name](net, **options)
    runs = [single(images, labels, seed=seed)]
    runs += [single(images, labels, seed=sample_seeds(seed, index, restart=r)) for r in (1, 2)]
    best = ATTACKS[name](net, restarts=3, **options)(images, labels, seed=seed)

    def strength(adv, n):
        logits = net(adv[n : n + 1])
        loss = float(ce(logits.detach(), labels[n : n + 1]))
        fooled = (int(logits.argmax()) == int(labels[n])) == targeted
        return fooled, -loss if targeted else loss

    for n in range(32):
        strongest = max(range(3), key=lambda r: strength(runs[r], n))
        expected = strength(runs[strongest], n)
        assert strength(best, n)[0] == expected[0]
        assert strength(best, n)[1] == pytest.approx(expected[1], rel=1e-9)
    if name in RANDOM and name not in TO_CORNERS:
        assert not torch.equal(best, runs[0])


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero")
def test_restarts_keep_a_fooled_result_over_one_of_larger_loss():
    """Where the first pixel grew, the image is fooled by a hair; elsewhere its loss is larger, but it is not fooled."""

    def model(x):
        grown = (x[:, 0, 0, 0] > 0.5)[:, None]
        fooled, missed = torch.full((30,), -9.0), torch.full((30,), -0.01)
        fooled[0], fooled[1], missed[0] = 0.0, 0.1, 0.0
        return torch.where(grown, fooled, missed) + 0 * x.flatten(1)[:, :1]

    images, labels, index = torch.full((64, 3, 6, 6), 0.5), torch.zeros(64, dtype=torch.int64), torch.arange(64)
    single = PGD(model, EPS, 0.0, 1)
    runs = [single(images, labels, seed=5)]
    runs += [single(images, labels, seed=sample_seeds(5, index, restart=r)) for r in (1, 2)]
    possible = torch.stack([adv[:, 0, 0, 0] > 0.5 for adv in runs]).any(0)
    best = PGD(model, EPS, 0.0, 1, restarts=3)(images, labels, seed=5)
    assert torch.equal(best[:, 0, 0, 0] > 0.5, possible)


@pytest.mark.parametrize("gap", [torch.nan, torch.inf], ids=["NaN", "infinite"])
@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_keep_a_finite_result_over_a_broken_one(gap, targeted, recwarn):
    """Where the first pixel grew, the model's output is not finite, and its largest entry is class 1."""

    def model(x):
        broken = (x[:, 0, 0, 0] > 0.5)[:, None] & torch.tensor([False, True, False])
        logits = torch.tensor([0.1, 0.0, 0.0]) + x.flatten(1)[:, :3] / 100
        return torch.where(broken, gap, logits)

    images, labels, index = torch.full((64, 3, 6, 6), 0.5), torch.full((64,), int(targeted)), torch.arange(64)
    single = PGD(model, EPS, 0.0, 1, targeted=targeted)
    runs = [single(images, labels, seed=5)]
    runs += [single(images, labels, seed=sample_seeds(5, index, restart=r)) for r in (1, 2)]
    broken = torch.stack([adv[:, 0, 0, 0] > 0.5 for adv in runs])
    best = PGD(model, EPS, 0.0, 1, targeted=targeted, restarts=3)(images, labels, seed=5)
    # An infinite logit is a prediction and fools, although its loss is NaN. A NaN logit predicts no class: it is wrong
    # for every label, and reaches no target.
    expected = broken.all(0) if targeted and gap is torch.nan else broken.any(0)
    assert torch.equal(best[:, 0, 0, 0] > 0.5, expected)


def test_restarts_of_a_regression_take_the_largest_loss(batch):
    images, values = batch[0], torch.rand(N, dtype=torch.float64)

    def loss(outputs, targets):
        return (outputs - targets).abs()

    def model(x):
        return (x.flatten(1) * 40).sin().sum(1)

    single = PGD(model, EPS, EPS, 1, loss=loss)
    index = torch.arange(N)
    runs = [single(images, values, seed=3)] + [
        single(images, values, seed=sample_seeds(3, index, restart=r)) for r in (1, 2, 3)
    ]
    strongest = torch.stack([loss(model(adv), values) for adv in runs]).amax(0)
    best = PGD(model, EPS, EPS, 1, loss=loss, restarts=4)(images, values, seed=3)
    torch.testing.assert_close(loss(model(best), values), strongest)


# Budgets


@short_steps
@every_attack
def test_budget_per_call_and_per_sample(net, batch, name):
    images, labels = batch
    eps = torch.tensor([0.3, 0.0, 0.02, 0.1, 0.0, 0.05], dtype=torch.float64)
    attack, seeds = ATTACKS[name](net), torch.arange(N)
    mixed = attack(images, labels, eps=eps, seed=seeds)
    assert mixed.isfinite().all()
    far = eps * (3 if name == "NFGSM" else 1)
    assert (distances(name, mixed, images) <= far * (1 + 1e-12) + 1e-16).all()
    assert (distances(name, mixed, images)[far > 0] > 0.01).all()
    for n in range(N):
        alone = attack(images, labels, eps=float(eps[n]), seed=seeds)
        torch.testing.assert_close(alone[n], mixed[n], rtol=0, atol=1e-9)
    assert torch.equal(attack(images, labels, eps=eps.reshape(N, 1, 1, 1), seed=seeds), mixed)
    with pytest.raises(ValueError, match=r"of shape \(6,\), got \(5,\)"):
        attack(images, labels, eps=eps[:5])


@pytest.mark.parametrize("cls", [FGSM, FFGSM, NFGSM, PGD, BIM, MIFGSM, TPGD, PGDL2])
def test_an_attack_of_no_budget_takes_that_of_its_call(net, batch, cls):
    assert torch.equal(cls(net, 0.0, alpha=0.0)(*batch, seed=1), batch[0])
    adv = cls(net, 0.0, alpha=0.0)(*batch, seed=1, eps=0.1)
    assert torch.equal(adv, cls(net, 0.1, alpha=0.0)(*batch, seed=1))


@pytest.mark.parametrize("cls", [FGSM, FFGSM, NFGSM, PGD, BIM, MIFGSM, TPGD, PGDL2])
def test_a_step_across_the_ball_warns_where_it_is_asked_for(cls, recwarn):
    cls(Net(), 0.1, alpha=0.2)
    assert not recwarn.list

    class Own(cls):
        """A subclass without a constructor."""

    class Deeper(Own):
        def __init__(self, model):
            super().__init__(model, 0.1, alpha=0.21)  # this line asks for the step

    here = sys._getframe().f_lineno
    cls(Net(), 0.1, alpha=0.21)
    Own(Net(), 0.1, alpha=0.21)
    Deeper(Net())
    assert [w.lineno - here for w in recwarn.list] == [1, 2, -2]
    assert "more than twice eps" in str(recwarn.list[0].message)
    assert {w.filename for w in recwarn.list} == {__file__}


@pytest.mark.parametrize(
    ("cls", "lengths"),
    [
        *((cls, {"alpha": 2}) for cls in (FGSM, FFGSM, NFGSM, ZeroGrad, PGD, BIM, MIFGSM, TPGD)),
        *((cls, {"noise": 16}) for cls in (FGSM, NFGSM)),
    ],
)
def test_lengths_wider_than_the_box_are_refused(cls, lengths):
    (name,) = lengths
    with pytest.raises(ValueError, match=rf"{name} is on the images' scale \[0, 1\] \(8/255, not 8\), got"):
        cls(Net(), EPS, **lengths)
    attack = cls(Net(), EPS)
    setattr(attack, name, lengths[name])  # assigned later
    with pytest.raises(ValueError, match=f"{name} is on the images' scale"):
        attack(*batch_of(N))
    cls(Net(), 1.0, **{name: 1.25})  # what a preset or the paper makes of a large eps
    cls(Net(), 2.0, clip=(0, 4), **{name: 2.0})
    PGDL2(Net(), 3.0, alpha=2.0)


def test_so_does_a_single_step_that_is_too_short(recwarn):
    attack = FFGSM(Net(), EPS)
    NFGSM(Net(), EPS, alpha=EPS / 2)  # it may go beyond the ball
    assert not recwarn.list
    here = sys._getframe().f_lineno
    FFGSM(Net(), 48 / 255)
    FGSM(Net(), EPS, alpha=EPS / 2)
    attack(*batch_of(4), eps=48 / 255)
    assert [w.lineno - here for w in recwarn.list] == [1, 2, 3]
    assert "move an image by 10/255 at most, less than eps = 48/255" in str(recwarn.list[0].message)


def test_an_eps_in_another_unit_than_the_inputs_warns(recwarn):
    PGD(Net(), 8, 2, clip=(0, 255))
    PGD(Net(), clip=(-1, 1))
    PGD(Net(), clip=None)
    PGD(Net(), 0.0, 0.0, clip=(0, 255))
    assert not recwarn.list
    here = sys._getframe().f_lineno
    APGD(Net(), clip=(0, 255))
    BIM(Net(), clip=(0, 255))
    assert [w.lineno - here for w in recwarn.list] == [1, 2]
    assert "eps = 0.0313725 is tiny on the images' scale" in str(recwarn.list[0].message)


@pytest.mark.parametrize("cls", [PGD, BIM, MIFGSM, TPGD, PGDL2])
def test_steps_that_do_not_reach_the_boundary_warn_once_for_each_eps(cls, recwarn):
    """Where they surely do not: from the image, in the attack's own norm."""
    images, labels = batch_of(4)
    reaching = cls(Net(), 0.3, alpha=0.1, steps=3)
    cls(Net(), 0.4, alpha=0.1, steps=3, schedule="cosine")  # they are 4 times alpha together
    cls(Net(), 0.3, alpha=0.0, steps=3)  # the start alone
    assert not recwarn.list
    here = sys._getframe().f_lineno
    cls(Net(), 0.31, alpha=0.1, steps=3)
    cls(Net(), 0.41, alpha=0.1, steps=3, schedule="cosine")
    reaching(images, labels, eps=0.31)
    reaching(images, labels, eps=0.31)
    reaching(images, labels, eps=0.33, x_init=images)  # that may begin anywhere
    reaching(images, labels, eps=0.32)
    reaching.alpha = 0.09
    reaching(images, labels)
    assert [w.lineno - here for w in recwarn.list] == [1, 2, 3, 6, 8]
    assert {w.filename for w in recwarn.list} == {__file__}
    found = evaluate(reaching.model, (images, labels), reaching, eps=0.3, progress=False)["warnings"]
    assert [note for note in found if "less than eps = 0.3" in note or "less than eps = 76.5/255" in note]


@every_attack
def test_result_is_in_ball_and_box_in_every_dtype(name):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        images, labels = batch_of(N)
        images[0], images[1] = 0, 1
        images = (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
        net = Net().eval().to(dtype if dtype.is_floating_point else torch.float32)
        adv = ATTACKS[name](net)(images, labels)
        pixels = images.double() / 255 if dtype == torch.uint8 else images.double()
        assert adv.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
        slack = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 1e-6)
        if name == "PGDL2":
            slack = 1e-6
        assert (distances(name, adv, pixels) <= radius(name) + slack).all()
        # Users check the result in the images' dtype. N-FGSM does not project: it keeps the half unit above.
        if name not in (*IN_L2, "NFGSM") and dtype != torch.uint8:
            assert ((adv - images).abs() <= radius(name)).all()
        assert 0 <= adv.min()
        assert adv.max() <= 1


@every_attack
def test_images_to_start_from_may_be_of_another_type(net, batch, name):
    images, labels = batch
    codes = torch.randint(256, images.shape, dtype=torch.uint8)
    attack = ATTACKS[name](net)
    expected = attack(images, labels, x_init=codes.double() / 255)
    assert torch.equal(attack(images, labels, x_init=codes), expected)
    bits = attack(images, labels, x_init=codes.float() / 255)
    torch.testing.assert_close(bits, expected, rtol=0, atol=1e-6)


def test_groups_of_attacks_are_complete():
    assert set(RANDOM) | set(SINGLE_STEP) | {"BIM", "MIFGSM"} == set(ATTACKS)
    assert L2_EPS == PGDL2(Net(), L2_EPS).eps
