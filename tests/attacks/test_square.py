"""The Square attack against loops by hand that draw its numbers themselves, statistics, and torchattacks."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torchattacks
from attacked import one_thread as one_thread
from dispatched import NoReads
from torch import nn

from fastadv.attacks import Normalized, Square, SquareL2, create_attack, samplewise
from fastadv.attacks.engine import Engine

EPS = 0.07
L2_EPS = 0.9
CLASSES = 4
# The window's side in an image of 32 x 32, for each query i: the square root of 1024 p, p = .8 and its halves, by hand.
SIDES_OF_32 = [
    *(((0, 1, 10), 29), ((11, 50), 20), ((51, 200), 14), ((201, 500), 10), ((501, 1000), 7), ((1001, 2000), 5)),
    *(((2001, 4000), 4), ((4001, 9999), 3)),
]


def network(channels, height, width):
    size = channels * height * width
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()


def samples(model, n, shape):
    """(images with some pixels at 0 or 1, the model's predictions for them)."""
    images = (torch.rand(n, *shape, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    return images, model(images).argmax(1)


def seen_by(model):
    """A list that gets the model's later inputs, (N, ...) for each query."""
    shown = []
    model.register_forward_pre_hook(lambda module, args: shown.append(args[0].detach().clone()))
    return shown


def drawn(seed, query, count):
    """The uniform numbers of a query for a sample with this seed, from the generator in contract.md."""
    key = int(oracle.sample_seeds(seed, [0], restart=query + 2**31)[0])
    return [(2 * int(h) + 1) / 2**17 for h in oracle.random_halves(key, np.arange(count))]


def side_by_hand(query, shape):
    p = 0.8 / 2 ** sum(query > after for after in (10, 50, 200, 500, 1000, 2000, 4000))
    return min(max(round(math.sqrt(p * shape[1] * shape[2])), 1), *shape[1:])


def key_by_hand(logits, label, loss, targeted):
    """The key that Square makes larger: first whether the image is fooled, then the loss."""
    logits = logits.tolist()
    if loss == "ce":
        value = math.log(sum(math.exp(z) for z in logits)) - logits[label]
    else:
        value = max(z for j, z in enumerate(logits) if j != label) - logits[label]
    there = max(range(CLASSES), key=logits.__getitem__) == label
    return (there, -value) if targeted else (not there, value)


def linf_by_hand(model, image, label, seed, queries, loss="margin", targeted=False):
    """(the model's inputs, the best point) of one sample, by a loop over the windows."""
    c, h, w = image.shape
    stripes = [(2 * int(v) + 1) / 2**17 > 0.5 for v in oracle.random_halves(seed, np.arange(c * w))]
    point = image + torch.tensor([EPS if up else -EPS for up in stripes], dtype=torch.float64).reshape(c, 1, w)
    point, best, highest, shown = point.clamp(0, 1), None, None, []
    for query in range(queries):
        shown.append(point)
        key = key_by_hand(model(point[None])[0], label, loss, targeted)
        if highest is None or key > highest:
            best, highest = point, key
        s = side_by_hand(query, image.shape)
        u = drawn(seed, query, 2 + c)
        top, left = int(u[0] * (h - s)), int(u[1] * (w - s))
        point = best.clone()
        for channel in range(c):
            point[channel, top : top + s, left : left + s] += 2 * EPS if u[2 + channel] > 0.5 else -2 * EPS
        point = torch.minimum(torch.maximum(point, image - EPS), image + EPS).clamp(0, 1)
    return torch.stack(shown), best


@pytest.mark.parametrize(
    ("shape", "loss", "targeted"),
    [
        ((3, 8, 8), "margin", False),
        ((1, 6, 11), "margin", True),
        ((2, 9, 5), "ce", False),
        ((3, 7, 7), "ce", True),
    ],
)
def test_linf_follows_a_loop_by_hand(shape, loss, targeted):
    model = network(*shape)
    images, labels = samples(model, 5, shape)
    labels = (labels + 1) % CLASSES if targeted else labels
    seeds = torch.randint(-(2**62), 2**62, (5,))
    hand = [
        linf_by_hand(model, x, int(y), int(seed), 80, loss, targeted)
        for x, y, seed in zip(images, labels, seeds, strict=True)
    ]
    shown = seen_by(model)
    best = Square(model, EPS, 80, loss=loss, targeted=targeted)(images, labels, seed=seeds)
    assert len(shown) == 80
    for n, (points, strongest) in enumerate(hand):
        torch.testing.assert_close(torch.stack(shown)[:, n], points, rtol=0, atol=1e-12)
        torch.testing.assert_close(best[n], strongest, rtol=0, atol=1e-12)


def test_linf_queries_are_stripes_then_squares():
    """The test looks at the model's inputs only, for images away from 0 and 1."""
    model = network(3, 12, 20)
    images = 0.4 + 0.2 * torch.rand(6, 3, 12, 20, dtype=torch.float64)
    labels, shown = model(images).argmax(1), seen_by(model)
    Square(model, EPS, 70)(images, labels, seed=5)
    shown = shown[:]  # a copy: the margins below call the model, which appends to the list
    deltas = (torch.stack(shown) - images) / EPS
    torch.testing.assert_close(deltas.abs(), torch.ones_like(deltas), rtol=0, atol=1e-12)
    deltas = deltas.round()
    assert (deltas[0] == deltas[0][:, :, :1]).all()  # vertical
    margins = [key_by_hand(z, int(y), "margin", False)[1] for x in shown for z, y in zip(model(x), labels, strict=True)]
    margins = torch.tensor(margins).reshape(len(deltas), 6)
    changed = 0
    for query in range(1, len(deltas)):
        best = margins[:query].argmax(0)
        side = side_by_hand(query - 1, (3, 12, 20))
        for n in range(6):
            moved = deltas[query, n] != deltas[best[n], n]
            for axis in ((0, 1), (0, 2)):
                where = moved.any(axis[0]).any(axis[1] - 1).nonzero()[:, 0]
                assert len(where) == 0 or where.max() - where.min() < side
            for channel, was in zip(deltas[query, n], moved, strict=True):
                assert len(channel[was].unique()) <= 1  # one sign a channel
            changed += bool(moved.any())
    assert changed > 0.9 * 6 * (len(deltas) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_linf_stays_in_ball_and_box(dtype):
    images = torch.rand(4, 3, 9, 9)
    images = (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
    pixels = oracle.image(images, np.float32)
    shown, weight = [], torch.randn(3 * 81, CLASSES)

    def model(x):
        shown.append(x.clone())
        return x.float().flatten(1) @ weight

    adv = Square(model, EPS, 60)(images, torch.arange(4), seed=1)
    assert adv.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    for points in (*shown, adv):
        values = oracle.values(points)
        assert 0 <= values.min() <= values.max() <= 1
        assert np.abs(values.astype(np.float32) - pixels).max() <= np.float32(EPS)
    assert np.abs(oracle.values(adv) - pixels).mean() > 0.8 * EPS


def after_one_step(attack, images, ages, seeds):
    """The next iterates of slots of these ages, whose best points are the images."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    slots = attack.slots(images, labels, attack.eps, seeds)
    slots.age, slots.restart = torch.zeros_like(labels), torch.zeros_like(labels)
    engine = Engine(attack, slots)
    engine.start()
    slots.adv.copy_(images)
    engine.iterate()
    slots.age, slots.adv[:] = ages, images
    engine.iterate()
    return slots.adv


def flat(x):
    return x.flatten(1)[:, :CLASSES]


def squares_of(moved):
    """(top, left, height, width) of the rectangle of nonzero pixels, for (N, C, H, W)."""
    found = []
    for one in moved:
        assert ((one != 0) == (one[:1] != 0)).all()
        rows, columns = (one[0] != 0).any(1).nonzero()[:, 0], (one[0] != 0).any(0).nonzero()[:, 0]
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        assert (one[:, top:bottom, left:right] != 0).all()
        found.append((int(top), int(left), int(bottom - top), int(right - left)))
    return torch.tensor(found)


@pytest.mark.parametrize("n_queries", [1, 100, 5000])
def test_sides_follow_a_table_by_hand_whatever_the_number_of_queries(n_queries):
    ages, sides = zip(*((i, side) for queries, side in SIDES_OF_32 for i in queries), strict=True)
    images = torch.full((len(ages), 3, 32, 32), 0.5)
    seeds = torch.randint(2**62, (len(ages),))
    found = squares_of(after_one_step(Square(flat, EPS, n_queries), images, torch.tensor(ages), seeds) - images)
    assert found[:, 2].tolist() == found[:, 3].tolist() == list(sides)


@pytest.mark.parametrize("kind", ["seeds", "one seed", "one sample"])
def test_windows_and_signs_are_uniform(kind):
    n, height, width, query = 4000, 9, 14, 300
    images = torch.full((n, 3, height, width), 0.5)
    ages, seeds = torch.full((n,), query), torch.randint(2**62, (n,))
    if kind == "one seed":
        seeds = int(seeds[0])
    elif kind == "one sample":
        ages, seeds = torch.arange(n) % 300 + 201, seeds[torch.arange(n) // 300]
    moved = after_one_step(Square(flat, EPS, 5000), images, ages, seeds) - images
    found = squares_of(moved)
    side = side_by_hand(query, (3, height, width))
    assert (found[:, 2:] == side).all()
    places = torch.zeros(height - side, width - side)  # Square never draws the last place, height - side
    places.index_put_((found[:, 0], found[:, 1]), torch.ones(n), accumulate=True)
    expected = n / places.numel()
    assert ((places - expected) ** 2 / expected).sum() < places.numel() + 5 * math.sqrt(2 * places.numel())
    signs = moved.flatten(2).sum(2).sign()
    assert (signs.mean(0).abs() * math.sqrt(n) < 5).all()
    together = torch.cat((signs, found[:, :2].float()), 1).T
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() * math.sqrt(n) < 5
    assert (signs.prod(1).mean().abs() * math.sqrt(n)) < 5


def test_stripes_are_of_both_signs():
    n, shown = 3000, []
    images = torch.full((n, 2, 5, 6), 0.5)

    def model(x):
        shown.append(x.clone())
        return flat(x)

    for seed in (3, torch.randint(2**62, (n,))):
        Square(model, EPS, 1)(images, torch.zeros(n, dtype=torch.int64), seed=seed)
        signs = (shown.pop() - images)[:, :, 0].flatten(1).sign()
        assert (signs.mean(0).abs() * math.sqrt(n) < 5).all()
        assert (torch.corrcoef(signs.T) - torch.eye(12)).abs().max() * math.sqrt(n) < 5


# ------------------------------------------------------------------------------------------ L2


def bump_by_hand(side, turned):
    """Two pyramids of nested rectangles, one after the other."""

    def pyramid(height, width):
        out = torch.zeros(height, width, dtype=torch.float64)
        for k in range(max(height, width) // 2 + 1):
            top, left = max(height // 2 - k, 0), max(width // 2 - k, 0)
            out[top : height // 2 + k + 1, left : width // 2 + k + 1] += 1 / (k + 1) ** 2
        return out / out.norm() if height else out

    bump = torch.cat((pyramid(side // 2, side), -pyramid(side - side // 2, side)))
    bump /= bump.norm()
    return bump.T if turned else bump


def l2_start_by_hand(image, seed):
    c, h, w = image.shape
    side, halves = min(h, w) // 5, oracle.random_halves(seed, np.arange((1 + c) * 25)).reshape(1 + c, 5, 5) >= 2**15
    delta, top, left = torch.zeros_like(image), (h - 5 * side) // 2, (w - 5 * side) // 2
    for channel, i, j in itertools.product(range(c), range(5), range(5)):
        tile = bump_by_hand(side, not halves[0, i, j]) * (1 if halves[1 + channel, i, j] else -1)
        delta[channel, top + i * side :, left + j * side :][:side, :side] = tile
    return image + L2_EPS * delta / delta.norm()


def l2_query_by_hand(image, best, seed, query):
    """The next point, before the box; None where bump and old window cancel, so that only a rounding error is left."""
    c, h, w = image.shape
    p = 0.8 / 2 ** sum(query > after for after in (10, 50, 200, 500, 1000, 2000, 4000))
    s = max(round(math.sqrt(p * h * w)), 3)
    s = min(s + (s % 2 == 0), h, w)
    u = drawn(seed, query, 5 + c)
    (top, left), (other_top, other_left) = ((int(u[i] * (h - s)), int(u[i + 1] * (w - s))) for i in (0, 2))
    window = slice(top, top + s), slice(left, left + s)
    other = slice(other_top, other_top + s), slice(other_left, other_left + s)
    delta, both = best - image, torch.zeros(h, w, dtype=torch.bool)
    both[window] = both[other] = True
    unused = max(L2_EPS**2 - float((delta**2).sum()), 0)
    after = delta.clone()
    for channel in range(c):
        old = delta[channel][window]
        new = bump_by_hand(s, u[4] > 0.5) * (1 if u[5 + channel] > 0.5 else -1) + old / (old.norm() + 1e-12)
        if new.norm() < 1e-9:
            return None
        energy = unused / c + float((delta[channel][both] ** 2).sum())
        after[channel][other] = 0
        after[channel][window] = new / new.norm() * math.sqrt(energy)
    return image + after / after.norm() * L2_EPS


@pytest.mark.parametrize("shape", [(3, 10, 10), (1, 6, 12), (2, 11, 5), (3, 17, 16)])
def test_l2_follows_its_rules_by_hand(shape):
    """Query by query, because an empty window is normalised too, which makes a difference in the last bit large."""
    model = network(*shape)
    images, labels = samples(model, 4, shape)
    seeds, shown = torch.randint(-(2**62), 2**62, (4,)), seen_by(model)
    found = SquareL2(model, L2_EPS, 60)(images, labels, seed=seeds)
    points = torch.stack(shown)
    for n, (image, label, seed) in enumerate(zip(images, labels.tolist(), seeds.tolist(), strict=True)):
        expected, best, highest = l2_start_by_hand(image, seed), None, None
        for query in range(60):
            torch.testing.assert_close(points[query, n], expected.clamp(0, 1), rtol=0, atol=1e-6)
            key = key_by_hand(model(points[query])[n], label, "margin", False)
            if highest is None or key > highest:
                best, highest = points[query, n], key
            expected = l2_query_by_hand(image, best, seed, query)
            if expected is None:  # a bump cancelled its negative: from here on rounding decides
                break
        else:
            assert torch.equal(found[n], best)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.uint8])
def test_l2_perturbations_have_the_norm_eps(dtype):
    images, shown, weight = torch.full((4, 3, 12, 12), 0.5), [], torch.randn(432, CLASSES)
    images = (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)

    def model(x):
        shown.append(x.clone())
        return x.float().flatten(1) @ weight

    for scale in (1, 0.02):  # within the box, and at its border
        image = images if scale == 1 else images // 127 if dtype == torch.uint8 else images * scale
        adv = SquareL2(model, L2_EPS, 60)(image, torch.arange(4), seed=1)
        pixels = torch.from_numpy(oracle.image(image, np.float64))
        for points in (*shown, adv):
            norms = (points.double() - pixels).flatten(1).norm(dim=1)
            assert (norms <= L2_EPS * (1 + 1e-6)).all()
            if scale == 1:
                assert (norms >= L2_EPS * (1 - (1e-2 if dtype == torch.float16 else 1e-6))).all()
            assert points.min() >= 0
        shown.clear()


def test_l2_bumps_are_of_both_axes_and_signs():
    n, query = 3000, 300
    images = torch.full((n, 3, 14, 14), 0.5, dtype=torch.float64)
    ages, seeds = torch.full((n,), query), torch.randint(2**62, (n,))
    moved = after_one_step(SquareL2(flat, L2_EPS), images, ages, seeds) - images
    places, counts = torch.zeros(9, 9), torch.zeros(2)
    upright, signs = bump_by_hand(5, False), torch.zeros(n, 3)
    for i, one in enumerate(moved):
        rows, columns = (one[0] != 0).any(1).nonzero()[:, 0], (one[0] != 0).any(0).nonzero()[:, 0]
        top, left = rows.min(), columns.min()
        held = one[:, top : top + 5, left : left + 5] * math.sqrt(3) / L2_EPS
        turned = int((held[0] - held[0].T).abs().max() > 0 and abs((held[0] * upright).sum()) < 0.9)
        signs[i] = (held * (upright.T if turned else upright)).sum((1, 2))
        places[top, left] += 1
        counts[turned] += 1
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=0, atol=1e-6)
    assert ((places - n / 81) ** 2 / (n / 81)).sum() < 81 + 5 * math.sqrt(2 * 81)
    assert abs(counts[0] - n / 2) < 5 * math.sqrt(n / 4)
    assert (signs.mean(0).abs() * math.sqrt(n) < 5).all()
    assert (torch.corrcoef(signs.T) - torch.eye(3)).abs().max() * math.sqrt(n) < 5


@pytest.mark.parametrize("shape", [(2, 1, 4, 9), (2, 1, 9, 4)])
def test_l2_refuses_images_without_room_for_its_tiles(shape):
    with pytest.raises(ValueError, match="must have 5 rows and columns at least, got"):
        SquareL2(nn.Flatten(), L2_EPS)(torch.rand(shape), torch.zeros(2, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ both kinds


KINDS = {
    "Linf": lambda model, **o: Square(model, EPS, **{"n_queries": 40, **o}),
    "L2": lambda model, **o: SquareL2(model, L2_EPS, **{"n_queries": 40, **o}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
SHAPE = (3, 10, 8)


@every_kind
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"targeted": "random"}, {"targeted": "least_likely"}])
def test_a_sample_gets_the_same_whatever_its_batch(kind, options):
    model = network(*SHAPE)
    images, labels = samples(model, 6, SHAPE)
    attack, seeds = KINDS[kind](model, **options), torch.randint(2**62, (6,))
    whole, order = attack(images, labels, seed=seeds), torch.randperm(6)
    torch.testing.assert_close(attack(images[order], labels[order], seed=seeds[order]), whole[order], rtol=0, atol=1e-9)
    for n in range(6):
        alone = attack(images[n : n + 1], labels[n : n + 1], seed=seeds[n : n + 1])
        torch.testing.assert_close(alone, whole[n : n + 1], rtol=0, atol=1e-9)
    assert not torch.equal(attack(images, labels, seed=seeds + 1), whole)
    assert not torch.equal(attack(images[:1], labels[:1], seed=1), attack(images[:1], labels[:1], seed=2))


@every_kind
@pytest.mark.parametrize("normalized", [False, True])
def test_slots_of_mixed_ages_go_as_each_sample_goes_alone(kind, normalized):
    model = network(*SHAPE)
    images, labels = samples(model, 8, SHAPE)
    attack = KINDS[kind](Normalized(model, 0.4, 0.3) if normalized else model)
    seeds = torch.randint(2**62, (8,))

    def started(rows):
        slots = attack.slots(images[rows], labels[rows], attack.eps, seeds[rows])
        slots.age = torch.zeros(len(rows), dtype=torch.int64)
        slots.restart = torch.zeros_like(slots.age)
        engine = Engine(attack, slots)
        engine.start()
        return engine

    def path(n):
        engine = started(torch.tensor([n]))
        points = [engine.slots.adv.clone()]
        for _ in range(25):
            engine.iterate()
            points.append(engine.slots.adv.clone())
        return torch.cat(points)

    alone = [path(n) for n in range(8)]
    held, engine = torch.tensor([0, 1, 2]), started(torch.tensor([0, 1, 2]))
    for iteration in range(24):
        for slot, (n, age) in enumerate(zip(held.tolist(), engine.slots.age.tolist(), strict=True)):
            torch.testing.assert_close(engine.slots.adv[slot], alone[n][age], rtol=0, atol=1e-9)
            if normalized:
                torch.testing.assert_close(engine.slots.z[slot], (engine.slots.adv[slot] - 0.4) / 0.3)
        engine.iterate()
        if iteration % 4 == 3 and held.max() < 7:
            slot, new = iteration // 4 % 3, held.max() + 1
            held[slot] = new
            fresh = started(new.repeat(3)).slots.tensors()
            for name, t in engine.slots.tensors().items():
                t[slot] = fresh[name][slot]
    assert len(engine.slots.age.unique()) == 3


@every_kind
def test_images_in_bytes_and_a_normalized_model_give_the_same(kind):
    model = network(*SHAPE)
    codes = torch.randint(256, (5, *SHAPE), dtype=torch.uint8)
    images, labels = (codes / 255).float(), torch.randint(CLASSES, (5,))
    plain = KINDS[kind](lambda x: model(x.double()))(images, labels, seed=4)
    torch.testing.assert_close(KINDS[kind](lambda x: model(x.double()))(codes, labels, seed=4), plain)
    undone = Normalized(lambda z: model(z.double() * 0.25 + 0.5), 0.5, 0.25)
    torch.testing.assert_close(KINDS[kind](undone)(images, labels, seed=4), plain)


def scripted(rows):
    """(a model that returns the next row as logits at each query, the list of its inputs)."""
    shown, rows = [], iter(rows)

    def model(x):
        shown.append(x.clone())
        return torch.tensor([next(rows)]).log()

    return model, shown


@every_kind
def test_with_another_loss_what_fools_comes_first(kind):
    right, fools, right_again, fools_more = (0.5, 0.3, 0.2), (0.45, 0.46, 0.09), (0.34, 0.33, 0.33), (0.1, 0.8, 0.1)
    silent = (math.nan, 0.0, 0.0)
    image, label = torch.rand(1, 3, 9, 9), torch.zeros(1, dtype=torch.int64)
    for rows, strongest in (
        ((right, right_again, fools, right_again), 2),
        ((right, fools, right_again, fools_more, fools), 3),
        ((right, right_again, right), 1),
    ):
        model, shown = scripted(rows)
        best = KINDS[kind](model, loss="ce", n_queries=len(rows))
        assert torch.equal(best(image, label, seed=1), shown[strongest])
    model, shown = scripted((right, silent, right_again, silent))
    with pytest.warns(UserWarning, match="2 losses were not finite"):
        best = KINDS[kind](model, n_queries=4)(image, label, seed=1)
    assert torch.equal(best, shown[2])


@every_kind
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_an_iteration_reads_nothing_from_the_device_and_keeps_its_tensors(kind, loss, monkeypatch):
    monkeypatch.setattr(samplewise, "AT_ONCE", ())
    model = network(*SHAPE)
    images, labels = samples(model, 3, SHAPE)
    attack = KINDS[kind](model, loss=loss)
    slots = attack.slots(images, labels, attack.eps, torch.randint(2**62, (3,)))
    slots.age, slots.restart = torch.zeros_like(labels), torch.zeros_like(labels)
    engine = Engine(attack, slots)
    engine.start()
    engine.iterate()  # the first call may build tables
    kept = {name: t.data_ptr() for name, t in slots.tensors().items()}
    with NoReads():
        engine.iterate()
    assert {name: t.data_ptr() for name, t in slots.tensors().items()} == kept


@every_kind
def test_a_budget_a_sample_and_another_layout_change_nothing_else(kind):
    model = network(*SHAPE)
    images, labels = samples(model, 4, SHAPE)
    attack, seeds = KINDS[kind](model), torch.randint(2**62, (4,))
    budgets = attack.eps * torch.tensor([1, 0.5, 0, 0.7], dtype=torch.float64)
    together = attack(images, labels, eps=budgets, seed=seeds)
    for n in range(4):
        alone = attack(images[n : n + 1], labels[n : n + 1], eps=float(budgets[n]), seed=seeds[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone, rtol=0, atol=1e-9)
    assert torch.equal(together[2], images[2])
    last = KINDS[kind](model, memory_format=torch.channels_last)(images, labels, eps=budgets, seed=seeds)
    torch.testing.assert_close(last, together, rtol=0, atol=1e-9)


@every_kind
@pytest.mark.parametrize("n_queries", [1, 2, 3, 100])
def test_the_model_is_shown_as_many_images_as_there_are_queries(kind, n_queries):
    model = network(*SHAPE)
    (images, labels), shown = samples(model, 3, SHAPE), seen_by(model)
    attack = KINDS[kind](model, n_queries=n_queries)
    best = attack(images, labels)
    assert len(shown) == n_queries
    logits = [model(x) for x in shown[:]]
    margins = torch.stack([z.scatter(1, labels[:, None], -torch.inf).amax(1) for z in logits])
    margins -= torch.stack([z.gather(1, labels[:, None])[:, 0] for z in logits])
    for n in range(3):
        assert torch.equal(best[n], shown[int(margins[:, n].argmax())][n])
    slots = attack.slots(images, labels, attack.eps, 0)
    slots.age = torch.tensor([0, n_queries - 1, n_queries])
    assert attack.ended(slots).tolist() == [n_queries == 1, True, True]


@every_kind
def test_a_start_from_outside_is_brought_into_the_ball(kind):
    model = network(*SHAPE)
    images, labels = samples(model, 3, SHAPE)
    attack, far = KINDS[kind](model, n_queries=1), torch.rand(3, *SHAPE, dtype=torch.float64)
    delta = attack(images, labels, x_init=far) - images
    if attack.norm == "Linf":
        torch.testing.assert_close(delta, (far - images).clamp(-EPS, EPS), rtol=0, atol=1e-12)
    else:
        assert (delta.flatten(1).norm(dim=1) <= attack.eps * (1 + 1e-9)).all()
        assert (torch.cosine_similarity(delta.flatten(1), (far - images).flatten(1)) > 1 - 1e-9).all()


@every_kind
def test_what_cannot_be_meant_is_refused(kind):
    model, labels = nn.Flatten(), torch.zeros(2, dtype=torch.int64)
    for shape in ((2, 9), (2, 9, 9), (2, 3, 9, 9, 9)):
        with pytest.raises(ValueError, match=r"\(N, C, H, W\), got"):
            KINDS[kind](model)(torch.rand(shape), labels)
    with pytest.raises(ValueError, match="n_queries must be at least 1"):
        KINDS[kind](model, n_queries=0)
    with pytest.raises(TypeError, match="n_queries must be a whole number"):
        KINDS[kind](model, n_queries=1.5)
    for share in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="p_init is a share"):
            KINDS[kind](model, p_init=share)


def test_preset():
    attack = create_attack("square", flat, EPS)
    assert type(attack) is Square
    assert (attack.n_queries, attack.p_init, attack.loss, attack.eps) == (5000, 0.8, "margin", EPS)


# ------------------------------------------------------------------------------------------ strength


def trained(channels):
    """(a small network that was trained to find one of four patterns under noise, images)."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(CLASSES, channels, 10, 10, generator=generator)
    labels = torch.randint(CLASSES, (600,), generator=generator)
    noise = torch.randn(600, channels, 10, 10, generator=generator)
    images = (0.4 + 0.2 * patterns[labels] + 0.2 * noise).clamp(0, 1)
    torch.manual_seed(0)
    convolutions = nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = images[:300], labels[:300]
    right = model(images).argmax(1) == labels
    return model, images[right], labels[right]


def shares(attacks, model, images, labels):
    return torch.tensor([(model(attack(images, labels)).argmax(1) != labels).double().mean() for attack in attacks])


# For L2 the images have one channel: torchattacks divides a window's energy between channels in its own way.
@pytest.mark.parametrize(("cls", "eps", "channels"), [(Square, 0.12, 3), (SquareL2, 0.9, 1)])
def test_as_strong_as_torchattacks(cls, eps, channels):
    model, images, labels = trained(channels)
    queries, seeds = 60, range(6)
    found = shares([lambda x, y, s=s: cls(model, eps, queries)(x, y, seed=s) for s in seeds], model, images, labels)
    options = {"n_queries": queries - 1, "resc_schedule": False}  # torchattacks does not count the start
    peers = [torchattacks.Square(model, cls.norm, eps, seed=seed, **options) for seed in seeds]
    expected = shares(peers, model, images, labels)
    assert 0.2 < expected.mean() < 0.8
    # torchattacks draws for a batch, not for a sample: its share differs by about 0.03 between seeds.
    assert abs(found.mean() - expected.mean()) < 0.06
