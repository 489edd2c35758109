"""APGD against an oracle and by its properties; the strongest of all iterates; the mean gradient of several draws."""

import itertools

import apgd_oracle
import pytest
import torch
from attacked import ATTACKS, EPS, L2_EPS, Net, batch_of, distances, fresh_seed
from attacked import batch as batch
from attacked import net as net
from attacked import one_thread as one_thread
from gpus import needs_gpu
from torch import nn

from fastadv import data, sample_seeds
from fastadv.attacks import APGD, APGDL2, FGSM, LOSSES, MIFGSM, PGD, PGDL2, PMA, Normalized, create_attack
from fastadv.attacks.engine import Engine

KINDS = {"linf": (APGD, EPS), "l2": (APGDL2, L2_EPS)}
both_norms = pytest.mark.parametrize("norm", KINDS)


class Watched:
    """A model that keeps its input images."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, images):
        self.seen.append(images.detach().clone())
        return self.model(images)


class Rough(nn.Module):
    """Two layers whose loss has no maximum that a few steps reach; the bits of a row do not depend on other rows."""

    def __init__(self, classes=5, width=60):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, 75, dtype=torch.float64), requires_grad=False)
        # Logits so near that no label is sure: cross-entropy has a gradient for every image.
        self.second = nn.Parameter(torch.randn(classes, width, dtype=torch.float64) / 8, requires_grad=False)

    def forward(self, x):
        hidden = (x.flatten(1)[:, None] * self.first).sum(2).relu()
        return (hidden[:, None] * self.second).sum(2)


def samples(model, count):
    images = torch.rand(count, 3, 5, 5, dtype=torch.float64)
    return images, model(images).argmax(1)


def alone(images, seed):
    """A seed for each sample."""
    return sample_seeds(seed, torch.arange(len(images)))


# ---------------------------------------------------------------------- the steps


def clear_until(losses):
    """The first iterate whose loss nearly equals the loss before it or the best loss so far.

    There rounding decides whether the loss rises, and the two programs may take different steps from there on.
    """
    losses = torch.tensor(losses, dtype=torch.float64)
    gaps = torch.stack((losses.diff(), losses[1:] - losses.cummax(0).values[:-1])).abs()
    tied = ((gaps > 0) & (gaps < 1e-11)).any(0).nonzero()
    return int(tied[0]) if len(tied) else len(losses) - 1


@both_norms
@pytest.mark.parametrize(
    ("loss", "steps", "rho"), [("ce", 100, 0.75), ("targeted_dlr", 100, 0.75), ("margin", 40, 0.5), ("ce", 7, 0.9)]
)
def test_apgd_takes_the_oracles_steps(norm, loss, steps, rho):
    """Iterates, step sizes and halvings of a few samples, at twice the usual budget: so more samples oscillate."""
    kind, eps = KINDS[norm]
    eps, model = 2 * eps, Rough()
    images, labels = samples(model, 5)
    sizes = []

    class Traced(kind):
        def step(self, slots, grad):
            super().step(slots, grad)
            sizes.append(eps * slots.memory["length"].clone())

    watched = Watched(model)
    attack = Traced(watched, eps, steps, rho=rho, loss=loss, target_classes=1, best_iterate=False)
    last = attack(images, labels, seed=alone(images, fresh_seed()))
    ours = torch.stack((*watched.seen[-steps:], last))
    others = model(images).argsort(1, descending=True)[:, 1]
    halvings = compared = 0
    for i, start in enumerate(ours[0]):
        pair = torch.stack((labels[i], others[i]))[None] if loss == "targeted_dlr" else labels[i : i + 1]
        trace = apgd_oracle.apgd(
            model, images[i], pair, start, eps=eps, norm=norm, loss=LOSSES[loss], steps=steps, rho=rho
        )
        clear = clear_until(trace.losses)
        compared += clear
        torch.testing.assert_close(torch.stack(trace.iterates)[: clear + 1], ours[: clear + 1, i], rtol=0, atol=1e-9)
        assert trace.sizes[:clear] == torch.stack(sizes)[:clear, i].tolist()
        halvings += sum(done < clear for done in trace.halved)
    assert compared >= 0.6 * steps * len(images)
    assert halvings >= (5 if steps > 10 else 1)


@both_norms
def test_the_start_reaches_the_boundary(norm):
    kind, eps = KINDS[norm]
    images = torch.full((200, 3, 5, 5), 0.5, dtype=torch.float64)
    watched = Watched(Rough())
    kind(watched, eps, 1)(images, torch.zeros(200, dtype=torch.int64), seed=1)
    delta = (next(x for x in watched.seen if not torch.equal(x, images)) - images).flatten(1)
    length = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    torch.testing.assert_close(length, torch.full_like(length, eps), rtol=1e-9, atol=0)
    assert delta.mean(0).abs().max() < 5 * delta.std() / 200**0.5
    # Directions on the sphere are normal in each coordinate; in the cube they are uniform.
    kurtosis = (delta**4).mean() / (delta**2).mean() ** 2
    assert abs(kurtosis - (3 * 75 / 77 if norm == "l2" else 1.8)) < 0.15


@both_norms
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_normalised_images_of_any_dtype_stay_in_ball_and_box(norm, dtype):
    kind, eps = KINDS[norm]
    images, labels = batch_of()
    images = (255 * images).byte() if dtype == torch.uint8 else images.to(dtype)
    if dtype.is_floating_point:
        images[0], images[1] = 0, 1
    model = Net().eval().to(dtype if dtype.is_floating_point else torch.float32)
    adv = kind(Normalized(model, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), eps, 30)(images, labels, seed=3)
    assert adv.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    clean = images.double() / 255 if dtype == torch.uint8 else images.double()
    slack = 1e-6 if norm == "l2" else 1e-12 if dtype == torch.float64 else 5e-8
    assert (distances("PGDL2" if norm == "l2" else "PGD", adv, clean) <= eps + slack).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert not torch.equal(adv.double(), clean)


@both_norms
@pytest.mark.parametrize("loss", ["ce", "targeted_dlr"])
def test_a_refilled_slot_is_as_good_as_a_fresh_one(norm, loss):
    """A sample that enters a slot beside slots of other ages gets the same result as alone."""
    kind, eps = KINDS[norm]
    model = Rough()
    images, labels = samples(model, 12)
    seeds, steps, slots = alone(images, fresh_seed()), 30, 4
    attack = kind(model, eps, steps, loss=loss, target_classes=1, best_iterate=False)
    targets = attack.targets(model(images), labels)

    def filled(rows):
        made = attack.slots(images[rows], targets[rows], eps, seeds[rows])
        made.age = torch.zeros(len(rows), dtype=torch.int64)
        made.restart = torch.zeros_like(made.age)
        engine = Engine(attack, made)
        engine.start()
        return engine

    held, waiting, found = list(range(slots)), list(range(slots, 12)), {}
    engine = filled(held)
    mine = engine.slots.tensors()
    # The first samples leave after different numbers of steps, so that later samples enter one by one.
    early = {0: 5, 1: 11, 2: 17}
    while any(sample is not None for sample in held):
        engine.iterate()
        for slot, sample in enumerate(held):
            age = int(engine.slots.age[slot])
            if sample is None or (age < steps and early.get(sample) != age):
                continue
            if age == steps:
                found[sample] = engine.slots.adv[slot].clone()
            else:
                waiting.append(sample)  # it begins again later
                del early[sample]
            held[slot] = waiting.pop(0) if waiting else None
            if held[slot] is not None:
                for name, t in filled([held[slot]]).slots.tensors().items():
                    mine[name][slot] = t[0]
    for i in range(12):
        expected = attack(images[i : i + 1], labels[i : i + 1], seed=seeds[i : i + 1])
        assert torch.equal(found[i], expected[0])


# ---------------------------------------------------------------------- what it finds


@pytest.fixture(scope="module")
def trained():
    """(a network that was trained briefly on digits, images that were not in training, their labels)."""
    torch.manual_seed(0)
    parts = data.load("digits", validation=0, test=0.3)
    (images, labels), held_out = parts.train, parts.test
    layers = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    attack = FGSM(model, 0.15, noise=None)
    for _ in range(4):
        for rows in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(attack(images[rows], labels[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), held_out[0][:100], held_out[1][:100]


def test_apgd_finds_at_least_what_pgd_finds(trained):
    model, images, labels = trained
    robust, loss = {}, {}
    for name in ("pgd-20", "apgd-ce"):
        logits = [model(create_attack(name, model, eps)(images, labels, seed=1)).detach() for eps in (0.1, 0.15, 0.2)]
        robust[name] = sum((z.argmax(1) == labels).sum().item() for z in logits)
        loss[name] = sum(nn.functional.cross_entropy(z, labels).item() for z in logits)
    assert 30 < robust["apgd-ce"] <= robust["pgd-20"] < 270
    # APGD returns its misclassified iterate with the largest loss, PGD its last iterate.
    assert loss["apgd-ce"] > loss["pgd-20"]


def test_the_presets():
    model = Rough(12)
    chosen = {name: create_attack(name, model, EPS) for name in ("apgd-ce", "apgd-dlr", "apgd-t")}
    assert [attack.loss for attack in chosen.values()] == ["ce", "dlr", "targeted_dlr"]
    assert all(type(attack) is APGD and attack.steps == 100 for attack in chosen.values())
    images, labels = samples(model, 2)
    assert chosen["apgd-t"].targets(model(images), labels).shape[1] == 1 + 9
    assert chosen["apgd-t"].runs(classes=12) == 9


@pytest.mark.parametrize("wrong", [{"rho": -0.1}, {"rho": 1.5}, {"steps": 0}, {"eot": 0}], ids=str)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        APGD(Rough(), **wrong)


# ---------------------------------------------------------------------- the strongest iterate


def strongest(attack, model, trace, labels):
    """By hand: of the iterates (steps + 1, N, ...) the first with the largest loss; a misclassified one comes first."""
    sign = -1 if attack.targeted else 1
    best = []
    for i, label in enumerate(labels):
        logits = model(trace[:, i])
        losses = sign * LOSSES[attack.loss](logits, label.expand(len(logits)))
        fooled = (logits.argmax(1) == label) == bool(attack.targeted)
        best.append(trace[(losses + 1e6 * fooled).argmax(), i])
    return torch.stack(best)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "TPGD"])  # TPGD's loss takes no labels
def test_the_strongest_of_all_iterates(name, batch):
    model, (images, labels) = steep(), batch
    for options in ({}, {"loss": "margin"}, {"targeted": True}, {"restarts": 3}):
        watched = Watched(model)
        attack = ATTACKS[name](watched, best_iterate=True, **options)
        adv = attack(images, labels, seed=5)
        runs, steps = options.get("restarts", 1), attack.steps
        shown = torch.stack(watched.seen[-runs * (steps + 1) :])
        torch.testing.assert_close(adv, strongest(attack, model, shown, labels), rtol=0, atol=1e-12)


def steep():
    model = Net().double().eval()
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model.requires_grad_(False)


def test_a_given_start_that_is_the_strongest_is_in_the_ball(net, batch):
    images, labels = batch
    for kind, eps in ((PGD, EPS), (PGDL2, L2_EPS), *KINDS.values()):
        start = (images + torch.randn_like(images)).clamp(0, 1)
        adv = kind(net, eps, steps=5, best_iterate=True)(images, labels, x_init=start)
        assert (distances("PGDL2" if kind in (PGDL2, APGDL2) else "PGD", adv, images) <= eps + 1e-12).all()


def test_apgd_returns_its_strongest_iterate():
    model = Rough()
    images, labels = samples(model, 8)
    watched = Watched(model)
    attack = APGD(watched, 4 * EPS, 30)
    adv = attack(images, labels, seed=2)
    assert torch.equal(adv, strongest(attack, model, torch.stack(watched.seen[-31:]), labels))


@pytest.mark.parametrize("fooling", [0, 1, 2])
def test_a_misclassified_iterate_comes_before_one_of_larger_loss(fooling):
    undecided, wrong = torch.tensor([0.01, 0, 0, 0, 0]), torch.tensor([0, 0.1, -9, -9, -9])
    answers = iter([wrong if step == fooling else undecided for step in range(3)])
    watched = Watched(lambda x: next(answers) + 1e-9 * x.flatten(1).sum(1, keepdim=True))
    labels = torch.zeros(1, dtype=torch.int64)
    assert LOSSES["ce"](wrong[None], labels) < LOSSES["ce"](undecided[None], labels)
    start = torch.full((1, 3, 4, 4), 0.5)
    adv = PGD(watched, EPS, EPS / 2, 2, False, best_iterate=True)(start, labels)
    assert torch.equal(adv, watched.seen[fooling])


def test_iterates_that_may_not_count_do_not(net, batch):
    images, labels = batch

    class Half(PGD):
        def inside(self, slots):
            return slots.adv.flatten(1).sum(1) < images.flatten(1).sum(1)  # the image has become darker

    adv = Half(net, EPS, EPS / 2, 6, best_iterate=True)(images, labels, seed=1)
    assert (adv.flatten(1).sum(1) <= images.flatten(1).sum(1)).all()


# ---------------------------------------------------------------------- several draws


class Drawn(nn.Module):
    """The logits of x times 1 + n. n is +2 and -2 in turns, with mean 0, and under -2 the gradient's sign is wrong."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x) * (1 + (2 if self.calls % 2 else -2))


@pytest.mark.parametrize("kind", [PGD, PGDL2, APGD, APGDL2, PMA, MIFGSM])
def test_of_a_model_that_always_answers_alike_the_mean_is_its_gradient_to_the_bit(kind, net, batch):
    images, labels = batch
    for options in ({}, {"loss": "targeted_margin", "target_classes": 2}):
        if kind is PMA and options:
            continue
        once, often = (kind(net, steps=6, eot=eot, **options)(images, labels, seed=1) for eot in (1, 3))
        assert torch.equal(once, often)


def test_the_mean_of_several_draws_is_what_is_climbed(batch):
    """On a linear model the noise has the mean 0, so the mean gradient of two draws is the gradient without noise."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).double()
    images, labels = batch

    def margin(logits, labels):
        return logits[:, 0] - logits[:, 1]

    plain = PGD(linear, EPS, EPS, 3, loss=margin)(images, labels, seed=1)
    attack = PGD(Drawn(linear), EPS, EPS, 3, loss=margin)
    assert not torch.allclose(attack(images, labels, seed=1), plain)
    attack.eot = 2  # an assigned setting acts like a given one
    torch.testing.assert_close(attack(images, labels, seed=1), plain)
    attack.eot = 1
    assert not torch.allclose(attack(images, labels, seed=1), plain)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_the_verdict_is_that_of_the_mean_probabilities(loss):
    draws = [torch.randn(40, 3, dtype=torch.float64) * 5 for _ in range(4)]
    answers = itertools.cycle(draws)
    objective = PGD(lambda x: next(answers) + 0 * x.sum(), EPS, loss=loss, eot=4).objective
    images, labels = torch.rand(40, 3, 2, 2, dtype=torch.float64), torch.randint(3, (40,))
    targets = torch.randint(2, (40, 3)).double() if loss == "bce" else labels
    _, losses, logits = objective.gradient(images, targets)
    if loss == "bce":
        mean = torch.stack([z.sigmoid() for z in draws]).mean(0)
        torch.testing.assert_close(logits.sigmoid(), mean)
    else:
        mean = torch.stack([z.softmax(1) for z in draws]).mean(0)
        torch.testing.assert_close(logits.softmax(1), mean)
        assert not torch.equal(mean.argmax(1), sum(draws).argmax(1))  # the mean of logits gives another verdict
    torch.testing.assert_close(losses, torch.stack([LOSSES[loss](z, targets) for z in draws]).mean(0))
    for judged in (objective.judge(images, targets)[1], objective.logits(images)):
        torch.testing.assert_close(judged, logits)


# ---------------------------------------------------------------------- as a CUDA graph


@needs_gpu
@pytest.mark.parametrize("kind", [APGD, APGDL2, PGD, FGSM])
def test_a_captured_attack_gives_the_same(kind):
    model = Net().cuda().eval()
    eager, graph = (kind(model, EPS, best_iterate=True, graph=graph) for graph in (False, True))
    results = []
    for n, seed in ((6, 1), (6, 2), (4, 1)):
        images, labels = (t.cuda() for t in batch_of(n))
        results.append((graph(images, labels, seed=seed), eager(images, labels, seed=seed)))
    for captured, expected in results:
        torch.testing.assert_close(captured, expected)
