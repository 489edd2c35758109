"""FAB: its step to a hyperplane against an exact solver, and its iterates against the algorithm by hand."""

import math

import pytest
import torch
from attacked import EPS, L2_EPS, batch_of
from attacked import one_thread as one_thread
from torch import nn

from fastadv.attacks import FAB, FABL2, Normalized
from fastadv.attacks.hyperplane import to_hyperplane
from fastadv.attacks.samplewise import seeds_for

BOX = (0.0, 1.0)
NORMS = {"Linf": (FAB, EPS), "L2": (FABL2, L2_EPS)}
EVERYWHERE = {"Linf": 1.0, "L2": 9.0}  # with this eps the ball holds the whole box
every_norm = pytest.mark.parametrize("norm", NORMS)


def length(delta, norm):
    return delta.flatten(1).norm(dim=1) if norm == "L2" else delta.flatten(1).abs().amax(1)


# ---------------------------------------------------------------------- to a hyperplane


def exact_move(v, w, gap, norm):
    """The exact step of one point in float64: the pixels reach their bounds one after the other, so they are sorted."""
    shape, v, w = v.shape, v.flatten(), w.flatten()
    c = w.sign() if norm == "Linf" else w
    forward = -math.copysign(1.0, gap) * c
    room = torch.where(forward > 0, 1 - v, v)
    moving = forward != 0
    limit = torch.where(moving, room / c.abs(), math.inf)
    rate = (w * c).abs()
    # The part of the gap that pixels at their bounds have closed; the rate of the pixels that still move.
    done, left = 0.0, rate[moving].sum().item()
    for j in limit.argsort().tolist():
        if not moving[j]:
            break
        if done + limit[j].item() * left >= abs(gap):
            level = (abs(gap) - done) / left
            return (forward * level).maximum(-v).minimum(1 - v).reshape(shape)
        done, left = done + (limit[j] * rate[j]).item(), left - rate[j].item()
    return torch.where(moving, torch.where(forward > 0, 1 - v, -v), 0.0).reshape(shape)


def points(kind, n, d, dtype=torch.float64):
    """(points, normals w, gaps, the largest rise and fall of the product with w in the box)."""
    v, w = torch.rand(n, d, dtype=dtype), torch.randn(n, d, dtype=dtype)
    if kind == "corners":
        v = torch.where(torch.rand(n, d) < 0.8, v.round(), v)
    elif kind == "heavy tails":
        w = w.sign() * (-9 * torch.rand(n, d, dtype=dtype)).exp()
    elif kind == "ties":
        v, w = (v * 4).round() / 4, w.round()
    elif kind == "few pixels count":
        w = torch.where(torch.rand(n, d) < 0.02, w, 0.0)
        w[:, 0] += 0.5
    forth = torch.where(w > 0, 1 - v, -v).mul(w).sum(1)
    back = torch.where(w > 0, -v, 1 - v).mul(w).sum(1)
    share = torch.rand(n, dtype=dtype) ** torch.tensor([0.2, 1.0, 4.0]).repeat(n)[:n].to(dtype)
    return v, w, -share * torch.where(torch.rand(n) < 0.5, forth, back), (forth, back)


KINDS = ("plain", "corners", "heavy tails", "ties", "few pixels count")


@every_norm
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 7, 600])
def test_the_way_to_a_plane_is_the_exact_one(norm, kind, d):
    v, w, gap, _ = points(kind, 60, d)
    moves = to_hyperplane(v, w, gap, norm, BOX)
    assert ((v + moves >= 0) & (v + moves <= 1)).all()
    slack = 1e-5 if kind == "heavy tails" else 1e-13  # in L2 the passes do not reach every point of this kind
    assert (((w * moves).sum(1) + gap).abs() <= slack * w.abs().sum(1)).all()
    for i in range(len(v)):
        exact = exact_move(v[i], w[i], gap[i].item(), norm)
        # A pixel with a small weight may move far to close a gap of one rounding error.
        assert ((w[i] * (moves[i] - exact)).abs() <= slack * w[i].abs().sum()).all()


@every_norm
@pytest.mark.parametrize("kind", KINDS)
def test_no_shorter_way_leads_there(norm, kind):
    """In L-inf no shorter step reaches the plane; in L2 no exchange between two pixels on the plane is shorter."""
    v, w, gap, _ = points(kind, 100, 200)
    moves = to_hyperplane(v, w, gap, norm, BOX)
    forward = -gap.sign()[:, None] * w
    room = torch.where(forward > 0, 1 - v, v)
    if norm == "Linf":
        shorter = room.minimum((1 - 1e-9) * length(moves, norm)[:, None])
        assert ((w.abs() * shorter).sum(1) < gap.abs()).all()
        return
    counts = w.abs() > 1e-6
    cost = torch.where(counts, moves.abs() / w.abs(), 0.0)
    highest = torch.where(counts & (moves != 0), cost, 0.0).amax(1)
    lowest = torch.where(counts & (moves.abs() < room - 1e-12), cost, math.inf).amin(1)
    assert (highest <= lowest * (1 + 1e-6) + 1e-9).all()


@every_norm
def test_a_plane_that_the_box_does_not_meet_sends_every_pixel_to_its_bound(norm):
    v, w, _, (forth, back) = points("corners", 50, 40)
    for gap, towards in ((-1.01 * forth, w > 0), (-1.01 * back, w < 0), (torch.full_like(forth, -1e300), w > 0)):
        moves = to_hyperplane(v, w, gap, norm, BOX)
        torch.testing.assert_close(v + moves, towards.double(), rtol=0, atol=1e-15)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_logits_changes_no_way(norm, dtype, scale):
    v, w, gap, _ = points("plain", 20, 300, dtype)
    moves = to_hyperplane(v, w, gap, norm, BOX)
    scaled = to_hyperplane(v, w * scale, gap * scale, norm, BOX)
    assert ((w * (scaled - moves)).abs() <= 1e-6 * w.abs().sum(1, keepdim=True)).all()


@every_norm
def test_no_gradient_and_no_finite_margin_are_no_move(norm):
    v, w, gap, _ = points("corners", 5, 40)
    assert (to_hyperplane(v, torch.zeros_like(w), gap, norm, BOX) == 0).all()
    for bad in (math.nan, math.inf, -math.inf, 0.0):
        assert (to_hyperplane(v, w, torch.full_like(gap, bad), norm, BOX) == 0).all()


@every_norm
def test_without_a_box_the_way_has_a_closed_form(norm):
    v, w, gap, _ = points("plain", 20, 50)
    moves = to_hyperplane(v, w, gap, norm, (-math.inf, math.inf))
    along = w / w.pow(2).sum(1, keepdim=True) if norm == "L2" else w.sign() / w.abs().sum(1, keepdim=True)
    torch.testing.assert_close(moves, -gap[:, None] * along, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- the algorithm by hand


def by_hand(model, image, label, targets, norm, steps, alpha_max=0.1, eta=1.05, beta=0.9):
    """The iterates x_0 .. x_steps, float64, each towards the nearest of the planes of the classes `targets`.

    x_{i+1} is judged before it is drawn back.
    """

    def far(delta):
        return max(length(delta[None], norm).item(), 1e-8)

    x, seen = image, [image]
    for _ in range(steps):
        planes = []
        for target in targets:
            leaf = x.clone().requires_grad_()
            logits = model(leaf[None])[0]
            margin = logits[target] - logits[label]
            (w,) = torch.autograd.grad(margin, leaf)
            size = w.norm() if norm == "L2" else w.abs().sum()
            planes.append((abs(margin.item()) / size.item(), w, (w * x).sum() - margin.item()))
        _, w, b = min(planes, key=lambda plane: plane[0])
        d_here, d_clean = (exact_move(v, w, ((w * v).sum() - b).item(), norm) for v in (x, image))
        a = min(far(d_here) / (far(d_here) + far(d_clean)), alpha_max)
        x = ((1 - a) * (x + eta * d_here) + a * (image + eta * d_clean)).clamp(0, 1)
        seen.append(x)
        if model(x[None]).argmax() != label:
            x = image + beta * (x - image)
    return seen


def best_of(model, seen, image, label, norm):
    """(distance, iterate) of the nearest misclassified iterate."""
    wrong = [(length((x - image)[None], norm).item(), x) for x in seen if model(x[None]).argmax() != label]
    return min(wrong, key=lambda pair: pair[0], default=(math.inf, image))


class Rows(nn.Module):
    """Two layers that compute each row alone, so that its bits do not depend on the batch."""

    def __init__(self, classes=5, pixels=108, dtype=torch.float64):
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, pixels, dtype=dtype))
        self.last = nn.Parameter(torch.randn(classes, 16, dtype=dtype))

    def forward(self, x):
        hidden = (x.flatten(1)[:, None] * self.first).sum(2).tanh()
        return (hidden[:, None] * self.last).sum(2)


def case(n=6, classes=5, dtype=torch.float64):
    """A model and images that it classifies correctly, with their labels."""
    model, images = Rows(classes, dtype=dtype).eval(), batch_of(n, dtype)[0]
    return model, images, model(images).argmax(1)


def started(attack, images, labels, run=0, seed=0):
    """An engine for these images, at the start of run number `run`."""
    targets = attack.targets(attack._clean_logits(images), labels)
    slots = attack.slots(images, targets, attack.eps, seed)
    slots.age = torch.zeros(len(images), dtype=torch.int64)
    slots.restart = torch.full_like(slots.age, run)
    engine = attack.engine(slots)
    engine.start()
    return engine


@every_norm
@pytest.mark.parametrize(("loss", "run"), [("targeted_margin", 0), ("targeted_margin", 2), ("margin", 0)])
def test_the_iterates_are_the_algorithm_s(norm, loss, run):
    model, images, labels = case()
    steps, (cls, eps) = 12, NORMS[norm]
    settings = {"alpha_max": 0.2, "eta": 1.01, "beta": 0.8}
    attack = cls(model, eps, steps, loss=loss, **settings)
    engine = started(attack, images, labels, run)
    if loss == "margin":
        targets = [[target for target in range(5) if target != label] for label in labels]
    else:
        targets = attack.targets(model(images), labels)[:, 1 + run, None]
    hand = [by_hand(model, *one, norm, steps, **settings) for one in zip(images, labels, targets, strict=True)]
    wrong = torch.stack([model(torch.stack(seen)).argmax(1) != label for seen, label in zip(hand, labels, strict=True)])
    assert wrong[:, 1:].any()  # some iterates are drawn back; the images themselves are not
    for t in range(steps):
        for adv, seen in zip(engine.slots.adv, hand, strict=True):
            torch.testing.assert_close(adv, seen[t], rtol=0, atol=1e-7)  # twelve steps multiply what rounding leaves
        engine.iterate()
    attack.result(engine.slots)
    for i, seen in enumerate(hand):
        torch.testing.assert_close(engine.slots.adv[i], seen[steps], rtol=0, atol=1e-7)
        distance, found = best_of(model, seen, images[i], labels[i], norm)
        torch.testing.assert_close(engine.slots.memory["nearest"][i], found, rtol=0, atol=1e-7)
        assert math.isclose(engine.slots.memory["distance"][i].item(), distance, abs_tol=1e-7)


@pytest.mark.filterwarnings("ignore:its eps is:UserWarning")  # here the samples set eps: at times it is that short
@every_norm
def test_a_call_returns_the_nearest_of_all_target_classes_or_the_image(norm):
    model, images, labels = case(n=8)
    cls, steps = NORMS[norm][0], 6
    nearest = []
    for image, label in zip(images, labels, strict=True):
        targets = [target for target in range(5) if target != label]
        seen = [x for target in targets for x in by_hand(model, image, label, [target], norm, steps)]
        nearest.append(best_of(model, seen, image, label, norm))
    eps = sorted(distance for distance, _ in nearest)[4] * (1 + 1e-6)  # five of eight samples are within eps
    adv = cls(model, eps, steps)(images, labels)
    for i, (distance, found) in enumerate(nearest):
        torch.testing.assert_close(adv[i], found if distance <= eps else images[i], rtol=0, atol=1e-9)
    own = torch.tensor([distance for distance, _ in nearest], dtype=torch.float64) * (1 + 1e-6)
    assert (model(cls(model, eps, steps)(images, labels, eps=own)).argmax(1) != labels).all()
    assert torch.equal(cls(model, eps, steps)(images, labels, eps=own * 0.99), images)


@every_norm
@pytest.mark.parametrize("loss", ["targeted_margin", "margin"])
def test_further_restarts_start_at_random_at_half_of_eps_and_the_nearest_result_is_kept(norm, loss):
    model, images, labels = case()
    cls = NORMS[norm][0]
    attack = cls(model, 0.1, 4, loss=loss, restarts=3)
    starts = [started(attack, images, labels, run, seed=run).slots.adv for run in range(4)]
    assert torch.equal(starts[0], images)
    assert torch.equal(starts[3], images)  # here the first run towards the next target class begins
    assert not torch.equal(starts[1], starts[2])
    free = cls(model, 0.1, 4, loss=loss, restarts=3, clip=None)
    for run in (1, 2):
        away = started(free, images, labels, run, seed=run).slots.adv - images
        torch.testing.assert_close(length(away, norm), torch.full((6,), 0.05).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(starts[run], (images + away).clamp(0, 1))
    attack = cls(model, EVERYWHERE[norm], 3, loss=loss, restarts=3)
    found = []
    for run in range(3 if loss == "margin" else 12):
        engine = started(attack, images, labels, run, seed=seeds_for(5, images, run) if run else 5)
        for _ in range(3):
            engine.iterate()
        attack.result(engine.slots)
        found.append(engine.slots.memory["distance"])
    nearest = torch.stack(found).amin(0)
    expected = torch.where(nearest <= attack.eps, nearest, 0.0)
    torch.testing.assert_close(length(attack(images, labels, seed=5) - images, norm), expected)


@pytest.mark.parametrize(
    "options",
    [{"loss": "ce"}, {"loss": "margin", "targeted": True}, {"eta": 0.9}, {"beta": 1.1}, {"loss": "margin", "eot": 2}],
)
def test_what_is_no_fab_is_refused(options):
    with pytest.raises(ValueError, match=r"planes of equal logits|must be in|eot does not average"):
        FAB(Rows(), **options)


def test_a_step_costs_what_its_draws_cost():
    assert FAB(Rows(), eot=5).cost(10) == (5, 5)
    assert FAB(Rows(), loss="margin").cost(10) == (10, 1)


@pytest.mark.parametrize("loss", ["targeted_margin", "margin"])
def test_no_images_give_none(loss):
    model, images, labels = case()
    assert FAB(model, EPS, 2, loss=loss)(images[:0], labels[:0]).shape == (0, 3, 6, 6)


@pytest.mark.parametrize("loss", ["targeted_margin", "margin"])
def test_a_model_without_gradient_is_refused(loss):
    model, images, labels = case()
    for blind in (lambda x: model(x.detach()), lambda x: model(x).detach()):
        with pytest.raises(RuntimeError, match="does not depend on its input"):
            FAB(blind, loss=loss)(images, labels)


# ---------------------------------------------------------------------- linear models


def linear(classes, pixels=48):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double().eval()


@every_norm
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_on_a_linear_model_a_few_steps_find_the_nearest_point(norm, classes):
    """A linear model's planes are exact: the result lies beyond one by a twentieth of a tenth of the way."""
    model, images = linear(classes), batch_of(8, torch.float64, size=4)[0]
    logits = model(images).detach()
    labels = logits.argmax(1)
    weight, nearest = model[1].weight.detach(), []
    for i, label in enumerate(labels):
        exact = [
            exact_move(images[i].flatten(), weight[t] - weight[label], (logits[i, t] - logits[i, label]).item(), norm)
            for t in range(classes)
            if t != label
        ]
        nearest.append(min(length(move[None], norm).item() for move in exact))
    cls = NORMS[norm][0]
    adv = cls(model, EVERYWHERE[norm], 10)(images, labels)
    found = length(adv - images, norm)
    assert (model(adv).argmax(1) != labels).all()
    for distance, least in zip(found.tolist(), nearest, strict=True):
        assert least <= distance <= 1.012 * least


@every_norm
def test_the_nearest_plane_is_so_in_the_attack_s_norm(norm):
    """Class 1 depends on one pixel, class 2 on all 48 with a twentieth of the weight: in L-inf class 2 is nearer."""
    model, images = linear(3), 0.5 + 0.1 * torch.rand(5, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
        model[1].weight[1, 7], model[1].weight[2] = 20, 1
        clean = model(images)
    adv = NORMS[norm][0](
        lambda x: model(x) - clean * torch.tensor([0, 1, 1]) - torch.tensor([0, 0.5, 0.5]),
        *(EVERYWHERE[norm], 3),
        loss="margin",
    )(images, torch.zeros(5, dtype=torch.int64))
    expected = 0.5 / 20 if norm == "L2" else 0.5 / 48
    torch.testing.assert_close(length(adv - images, norm), torch.full((5,), expected).double(), rtol=0.06, atol=0)


# ---------------------------------------------------------------------- slots, types, models


def put(engine, other, rows):
    """Put rows of new slots into an engine's slots, as an evaluation does."""
    mine = engine.slots.tensors()
    for name, fresh in other.slots.tensors().items():
        mine[name][rows] = fresh[rows]


@every_norm
def test_slots_of_any_ages_do_what_each_sample_does_alone(norm):
    model, images, labels = case(n=8)
    other, others = (t.flip(0) for t in (images, labels))
    attack = NORMS[norm][0](model, EVERYWHERE[norm], 5)
    alone, iterates = started(attack, images, labels), []
    for _ in range(attack.steps):
        iterates.append(alone.slots.adv.clone())
        alone.iterate()
    iterates.append(alone.slots.adv.clone())
    found, distance = attack.result(alone.slots), alone.slots.memory["distance"]

    mixed, ages = started(attack, other, others), torch.zeros(8, dtype=torch.int64)
    fresh, finished = torch.zeros(8, dtype=torch.bool), set()
    for _ in range(12):
        mixed.iterate()
        ages += 1
        assert torch.equal(mixed.slots.age, ages)
        result = attack.result(mixed.slots)
        for i in (fresh & (ages == attack.steps)).nonzero()[:, 0].tolist():
            assert torch.equal(result[i], found[i])
            assert torch.equal(mixed.slots.memory["distance"][i], distance[i])
            finished.add(i)
        rows = (ages >= attack.steps) | (~fresh & (torch.rand(8) < 0.5))
        put(mixed, started(attack, images, labels), rows)
        fresh, ages = fresh | rows, torch.where(rows, 0, ages)
        for i in fresh.nonzero()[:, 0].tolist():
            assert torch.equal(mixed.slots.adv[i], iterates[ages[i]][i])
    assert len(finished) >= 4


@every_norm
def test_only_iterates_within_eps_may_count(norm):
    model, images, labels = case()
    attack = NORMS[norm][0](model, 1.0, 6)
    first = started(attack, images, labels)
    first.iterate()
    attack.eps = length(first.slots.adv - images, norm).median().item() * (1 + 1e-9)
    engine = started(attack, images, labels)
    both = set()
    for _ in range(6):
        expected = length(engine.slots.adv - images, norm) <= attack.eps
        engine.iterate()
        assert torch.equal(engine.slots.inside, expected)
        both |= set(expected.tolist())
    assert both == {True, False}


@every_norm
def test_a_normalised_model_is_attacked_in_pixels(norm):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    model, images, _ = case(n=5)
    plain = nn.Sequential(Scale(mean, std), model)
    labels = plain(images).argmax(1)
    cls, eps = NORMS[norm][0], EVERYWHERE[norm]
    ours, theirs = (cls(m, eps, 8)(images, labels) for m in (Normalized(model, mean, std), plain))
    assert (plain(ours).argmax(1) != labels).all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


class Scale(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (torch.tensor(t, dtype=torch.float64).view(1, 3, 1, 1) for t in (mean, std))

    def forward(self, x):
        return (x - self.mean) / self.std


@every_norm
def test_uint8_images_are_the_same_images(norm):
    model, images, _ = case(dtype=torch.float32)
    images = (255 * images).round().to(torch.uint8)
    labels = model(images / 255).argmax(1)
    attack = NORMS[norm][0](model, 0.2, 8)
    assert torch.equal(attack(images, labels), attack(images / 255, labels))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_call_returns_is_misclassified_within_eps_in_any_type(norm, dtype):
    model, images, _ = case(n=16, dtype=torch.float32)
    images = images.to(dtype)

    def raised(x):
        return model(x.float())

    labels, eps = raised(images).argmax(1), 0.1 if norm == "Linf" else 0.5
    adv = NORMS[norm][0](raised, eps, 10)(images, labels)
    moved = (adv != images).flatten(1).any(1)
    assert adv.dtype == dtype
    assert moved.any()
    assert torch.equal(moved, raised(adv).argmax(1) != labels)
    assert (length(adv.float() - images.float(), norm) <= torch.tensor(eps)).all()
    assert ((adv >= 0) & (adv <= 1)).all()


@every_norm
def test_pixels_whose_gradient_is_nan_stay_and_the_others_move(norm):
    model, images, labels = case(n=4)
    adv = NORMS[norm][0](lambda x: model(x) + (0 * x[:, 0, :1, 0]).sqrt(), EVERYWHERE[norm], 10)(images, labels)
    moved = (adv != images).flatten(1).any(1)
    assert moved.any()
    assert (model(adv).argmax(1) != labels)[moved].all()
    assert torch.equal(adv[:, 0, 0, 0], images[:, 0, 0, 0])


@every_norm
def test_an_image_without_gradient_or_with_nan_logits_stays(norm):
    model, images, labels = case(n=4)

    def broken(x):
        logits = model(x)
        return torch.cat((logits[:1] * 0, logits[1:2] * math.nan, logits[2:]))

    adv = NORMS[norm][0](broken, 0.3, 3)
    with pytest.warns(UserWarning, match="not finite"):
        assert torch.equal(adv(images, labels)[:2], images[:2])
