"""Stored signs against loops by hand that move pixels one by one."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fitted import loaded_batches
from torch import nn

from fastadv import sample_seeds
from fastadv.attacks import FGSM
from fastadv.training import Augment, Settings, Trainer, TrainStep, pack_signs, run, stages, unpack_signs
from fastadv.training.batches import AUGMENTING
from fastadv.training.fast import stale
from fastadv.training.fast.base import Epoch, FastMethod
from fastadv.training.memory import SampleMemory

EPS, CLASSES, COUNT, SIDE = 0.1, 3, 20, 8


def images(count=COUNT, dtype=torch.float64):
    labels = torch.arange(count) % CLASSES
    x = torch.rand(count, 3, SIDE, SIDE, dtype=torch.float64)
    return (x if dtype.is_floating_point else 255 * x).to(dtype), labels


def network(dtype=torch.float64, norm=True):
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, CLASSES)).to(dtype)


def trained(model, data, **changes):
    """(the records, (epoch, rows) of each part of a batch)."""
    settings = {"attack": "stale", "epochs": 3, "batch_size": 7, "lr": 0.05, "probe": 0, "optimizer": "sgd"}
    settings |= {"measure_backbone": False, "progress": False} | changes
    with loaded_batches() as order:
        records = Trainer(model, EPS, **settings).fit(data)
    return [record for record in records if "epoch" in record], order


# ---------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.bool])
def test_packed_signs_are_numpys(dtype):
    shape = tuple(random.choices(range(1, 6), k=3))
    values = torch.randint(-2, 3, (random.randrange(1, 9), *shape)).to(dtype)
    packed = pack_signs(values)
    above = (values > 0).flatten(1).numpy()
    assert np.array_equal(packed.numpy(), np.packbits(above, axis=1, bitorder="little"))
    for kind in (torch.float32, torch.bfloat16):
        signs = unpack_signs(packed, shape, kind)
        assert signs.dtype == kind
        assert torch.equal(signs, torch.where(values > 0, 1.0, -1.0).to(kind))
    last = values.transpose(1, -1).contiguous().transpose(1, -1)  # another layout
    assert torch.equal(pack_signs(last), packed)


def test_signs_of_another_shape_are_refused():
    with pytest.raises(TypeError, match=r"packed signs are uint8, got torch\.int64"):
        unpack_signs(torch.zeros(2, 1, dtype=torch.int64), (8,))
    with pytest.raises(ValueError, match=r"9 signs a sample are 2 bytes a sample, got the shape \(2, 1\)"):
        unpack_signs(torch.zeros(2, 1, dtype=torch.uint8), (3, 3))
    with pytest.raises(ValueError, match=r"values must be \(N, ...\), got the shape \(3,\)"):
        pack_signs(torch.zeros(3))


# ---------------------------------------------------------------------- places of pixels


def places_by_hand(augment, seeds, height, width):
    """For each pixel of the result its place in the picture, or None; the pixels of the picture are their numbers."""
    numbers = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    seen = augment(numbers.expand(len(seeds), -1, -1, -1), seeds)[:, 0].long().tolist()
    whole = [[divmod(number - 1, width) if number else None for number in row] for one in seen for row in one]
    return [whole[i * height : (i + 1) * height] for i in range(len(seeds))]


@pytest.mark.parametrize("flip", [True, False])
def test_sources_and_targets_say_where_each_pixel_goes(flip):
    height, width, crop = 6, 5, random.randrange(4)
    augment, seeds = Augment(crop, flip), torch.randint(2**62, (30,))
    rows, columns = (place.tolist() for place in augment.sources(seeds, height, width))
    back_rows, back_columns = (place.tolist() for place in augment.targets(seeds, height, width))
    for i, whole in enumerate(places_by_hand(augment, seeds, height, width)):
        went = {}
        for r in range(height):
            for c in range(width):
                place = (rows[i][r], columns[i][c])
                inside = 0 <= place[0] < height and 0 <= place[1] < width
                assert (place if inside else None) == whole[r][c]
                if inside:
                    went[place] = (r, c)
        for r in range(height):
            for c in range(width):
                place = (back_rows[i][r], back_columns[i][c])
                inside = 0 <= place[0] < height and 0 <= place[1] < width
                assert (place if inside else None) == went.get((r, c))


# ---------------------------------------------------------------------- the update's by-product


class Told(FastMethod):
    """A method that returns given adversarial images and keeps the gradient that it gets."""

    sees_gradient = True

    def attacked(self, images, labels, seeds, rows=None, moves=None):
        return (self.x_adv.clone(),)

    def seen(self, gradient):
        self.gradient = gradient


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("clean_weight", [0.0, 0.3])
def test_the_update_gives_the_gradient_at_x_adv(frozen, clean_weight):
    model, (x, y) = network(), images()
    model.requires_grad_(not frozen)
    model[-1].requires_grad_(True)
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    twin, mine = copy.deepcopy(model), x_adv.clone().requires_grad_()
    targets = F.one_hot(y, CLASSES).double()
    logits = twin(torch.cat((mine, x)) if clean_weight else mine)
    losses = -(targets.repeat(len(logits) // len(y), 1) * logits.log_softmax(1)).sum(1).view(-1, len(y)).mean(1)
    loss = losses[0] if not clean_weight else (1 - clean_weight) * losses[0] + clean_weight * losses[1]
    loss.backward()
    told, optimizer = Told(model, EPS), torch.optim.SGD(model.parameters(), 1.0)
    told.x_adv = x_adv
    step = TrainStep(model, told, optimizer, clean_weight=clean_weight)
    step.gradients(x, y)
    torch.testing.assert_close(told.gradient / COUNT, mine.grad, rtol=1e-10, atol=1e-15)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (not one.requires_grad)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-15)


# ---------------------------------------------------------------------- whole runs


def chance(rows, when):
    """Random signs that the loop by hand can draw for one image at a time."""
    generators = [torch.Generator().manual_seed(1000 * int(row) + when) for row in rows]
    return torch.stack([torch.randint(2, (3, SIDE, SIDE), generator=g) for g in generators]).double() * 2 - 1


def by_hand(model, data, order, fresh, augment=None, alpha=EPS, method="full", seed=0, hinge=False):
    """The run with signs, image by image. Returns each epoch's share of unchanged signs, and the fresh attacks.

    `fresh(i, epoch, last)` tells whether image i gets a fresh FGSM attack; `last` has the shares of the last epoch.
    """
    x_all, y_all = data
    x_all = x_all.double() / (1 if x_all.dtype.is_floating_point else 255)
    held = {i: chance([i], 0)[0] for i in range(COUNT)}
    trains = [p for name, p in model.named_parameters() if method == "full" or name.startswith("4.")]
    momentum = [torch.zeros_like(p) for p in trains]
    total, shares, last, now, picked = len(order), [], {}, {}, []
    for number, (epoch, rows) in enumerate(order):
        if number and order[number - 1][0] != epoch:
            shares, last, now = [*shares, sum(now.values()) / len(now)], now, {}
        rows = rows.tolist()
        moves = sample_seeds(seed, torch.tensor(rows), epoch + AUGMENTING)
        whole = [[[(r, c) for c in range(SIDE)] for r in range(SIDE)] for _ in rows]
        if augment is not None:
            whole = places_by_hand(augment, moves, SIDE, SIDE)
        x, signs = torch.zeros(len(rows), 3, SIDE, SIDE, dtype=torch.float64), chance(rows, 1 + epoch)
        for k, i in enumerate(rows):
            for r in range(SIDE):
                for c in range(SIDE):
                    if whole[k][r][c]:
                        x[k, :, r, c] = x_all[i][(slice(None), *whole[k][r][c])]
                        signs[k, :, r, c] = held[i][(slice(None), *whole[k][r][c])]
        y = y_all[rows]
        for k, i in enumerate(rows):
            if fresh(i, epoch, last):
                picked.append((epoch, i))
                model.eval()
                one = x[k : k + 1].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(one), y[k : k + 1]), one)
                signs[k] = gradient[0].sign()
        share = 1.0 if not hinge else min(max((number / total - 0.2) / 0.4, 0), 1)
        x_adv = (x + share * alpha * signs).clamp(0, 1).requires_grad_()
        model.train(method == "full")
        logits = model(x_adv)
        targets = F.one_hot(y, CLASSES).double()
        loss = -(targets * logits.log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, [x_adv, *trains])
        for k, i in enumerate(rows):
            before, stayed, seen = held[i].clone(), 0, 0
            for r in range(SIDE):
                for c in range(SIDE):
                    if whole[k][r][c]:
                        place = (slice(None), *whole[k][r][c])
                        held[i][place] = torch.where(gradients[0][k, :, r, c] > 0, 1.0, -1.0).double()
                        stayed += int((held[i][place] == before[place]).sum())
                        seen += 3
            now[i] = stayed / seen
        rate = 0.05 * (1 + np.cos(np.pi * number / total)) / 2
        with torch.no_grad():
            for p, m, gradient in zip(trains, momentum, gradients[1:], strict=True):
                m.mul_(0.9).add_(gradient)
                p.sub_(rate * (gradient + 0.9 * m))
    return [*shares, sum(now.values()) / len(now)], picked


CASES = [
    ({}, lambda i, epoch, last: False),
    ({"augment": True}, lambda i, epoch, last: False),
    ({"refresh": 3, "augment": True}, lambda i, epoch, last: epoch == 0 or (i + epoch) % 3 == 0),
    ({"refresh": 99}, lambda i, epoch, last: epoch == 0),
    ({"eps_schedule": "hinge:0.2,0.6", "refresh": 2}, lambda i, epoch, last: epoch == 0 or (i + epoch) % 2 == 0),
    ({"method": "linear", "alpha": 0.07, "refresh": 2}, lambda i, epoch, last: epoch == 0 or (i + epoch) % 2 == 0),
]


@pytest.mark.filterwarnings("ignore:steps = 1 of alpha")
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize(("changes", "fresh"), CASES)
def test_a_run_is_the_loop_by_hand(monkeypatch, changes, fresh, dtype):
    monkeypatch.setattr(stale.Stale, "_random", lambda self, rows, when, x: chance(rows, when).to(torch.bfloat16))
    data = images(dtype=dtype)
    model = network()
    if dtype == torch.uint8:  # the model gets them as float32, and rounding may change a sign
        model = nn.Sequential(*model.float())
    twin = copy.deepcopy(model).double()
    records, order = trained(model, data, **changes)
    augment = Augment(SIDE // 8) if "augment" in changes else None
    options = {"alpha": changes.get("alpha", EPS), "hinge": "eps_schedule" in changes}
    shares, picked = by_hand(twin, data, order, fresh, augment, method=changes.get("method", "full"), **options)
    close = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 3e-3}
    torch.testing.assert_close([p.detach().double() for p in model.parameters()], [*twin.parameters()], **close)
    assert [record["agreement"] for record in records] == pytest.approx(
        shares, abs=1e-6 if dtype.itemsize > 1 else 0.01
    )
    counts = [sum(epoch == number for number, _ in picked) for epoch in range(3)]
    assert [record["fresh"] for record in records] == [count / COUNT for count in counts]


def test_price_attacks_the_images_whose_signs_agreed_least(monkeypatch):
    monkeypatch.setattr(stale.Stale, "_random", lambda self, rows, when, x: chance(rows, when).to(torch.bfloat16))
    chosen, choose = [], stale.Stale._chosen
    monkeypatch.setattr(stale.Stale, "_chosen", lambda self: (chosen.append(choose(self)), chosen[-1])[1])
    data, model = images(), network()
    twin = copy.deepcopy(model)
    _, order = trained(model, data, price=1.25, epochs=4)
    fresh_count = round(0.375 * COUNT)
    assert [int(fresh.sum()) for fresh in chosen] == [fresh_count] * 4

    def fresh(i, epoch, last):
        """The run's choice, which must be the choice by hand unless shares at the border are equal."""
        below = sum(last[j] < last[i] - 1e-6 for j in last)
        not_above = sum(last[j] <= last[i] + 1e-6 for j in last)
        taken = bool(chosen[epoch][i])
        if last:
            assert taken >= (not_above <= fresh_count)
            assert taken <= (below < fresh_count)
        return taken

    by_hand(twin, data, order, fresh)
    torch.testing.assert_close([*model.parameters()], [*twin.parameters()], rtol=0, atol=1e-10)
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augment": True, "grad_accum_steps": 2},
        {"channels_last": True, "ema_decay": 0.9},
        {"method": "lora", "lora_targets": ("0",), "precision": "bf16"},
    ],
)
def test_a_fresh_attack_for_all_is_fgsm_to_the_bit(changes):
    data, models = images(dtype=torch.float32), [network(torch.float32)]
    models.append(copy.deepcopy(models[0]))
    found = [
        trained(model, data, **changes, **more)[0]
        for model, more in zip(models, ({"attack": "fgsm"}, {"refresh": 1}), strict=True)
    ]
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)
    assert [r["loss"] for r in found[0]] == [r["loss"] for r in found[1]]
    assert not any("agreement" in record for record in found[1])  # signs that no epoch will use are not kept


class Epochs:
    """Begins the epochs of a method without a run and without a folder."""

    def __init__(self, method, count, seed=0):
        self.method, self.count, self.settings, self.memories = method, count, Settings(seed=seed), {}

    def begin(self, number):
        def memory(name, shape, dtype):
            held = self.memories.setdefault(name, SampleMemory(None, name, self.count, shape, dtype))
            held.begin(number)
            return held

        self.method.begin_epoch(Epoch(number, self.settings, (3, SIDE, SIDE), torch.float32, None, memory))


def test_signs_equal_to_the_gradients_give_fgsms_bits():
    model, (x, y) = network(torch.float32), images(dtype=torch.float32)
    method = stale.Stale(model, EPS)
    epochs, rows, seeds = Epochs(method, COUNT), torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.int64)
    epochs.begin(0)
    leaf = x.clone().requires_grad_()
    model.eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    assert (gradient != 0).all()
    method.attacked(x, y, seeds, rows)
    method.seen(gradient)
    epochs.begin(1)
    (x_adv,) = method.attacked(x, y, seeds, rows)
    assert torch.equal(x_adv, FGSM(model, EPS)(x, y))


def test_random_signs_are_an_images_own_and_half_of_each():
    method, rows = stale.Stale(network(), EPS), torch.randperm(900)
    Epochs(method, 900, seed=5).begin(0)
    x = torch.empty(900, 3, SIDE, SIDE)
    signs = method._random(rows, 3, x)
    assert ((signs == 1) | (signs == -1)).all()
    assert abs((signs > 0).double().mean() - 0.5) < 5 * 0.5 / signs.numel() ** 0.5
    some = rows[100:120]
    assert torch.equal(method._random(some, 3, x[:20]), signs[100:120])
    assert abs((method._random(rows, 4, x) == signs).double().mean() - 0.5) < 5 * 0.5 / signs.numel() ** 0.5
    assert len({tuple(one) for one in signs.flatten(1).tolist()}) == 900


# ---------------------------------------------------------------------- stages, answers, refusals


def test_signs_outlast_a_stage_and_begin_again_after_a_switch(monkeypatch, tmp_path):
    begun, begin = [], stale.Stale.begin_epoch
    noted = lambda self, epoch: (begin(self, epoch), begun.append((epoch.number, self._signs.empty)))  # noqa: E731
    monkeypatch.setattr(stale.Stale, "begin_epoch", noted)
    changes = {"method": "bias", "lp_ft": 3, "epochs": 2}
    trained(network(), images(), folder=tmp_path / "kept", **changes)
    assert begun == [(0, True), (1, False), (2, False), (3, False), (4, False)]
    begun.clear()
    check = stages.Monitor.check

    def alarmed(self):
        reading = check(self)
        object.__setattr__(reading, "alarm", "fire" if isinstance(self.attack, FGSM) and len(begun) == 2 else None)
        return reading

    monkeypatch.setattr(stages.Monitor, "check", alarmed)
    options = {"folder": tmp_path, "probe": 8, "on_catastrophic_overfitting": "switch"}
    with pytest.warns(UserWarning, match="fire"):
        records, _ = trained(network(), images(), **options, **changes)
    assert begun == [(0, True), (1, False), (3, True), (4, False)]
    assert ["fresh" in record for record in records] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": "fgsm", "refresh": 2}, "the attack fgsm has no setting 'refresh'"),
        ({"attack": "sora", "price": 1.2}, "the attack sora has no setting 'price'"),
        ({"attack": None, "price": 1.2}, "price belong to an attack by name, got the attack None"),
        ({"refresh": 2, "price": 1.2}, "refresh and price both say which images get a fresh FGSM"),
        ({"price": 0.99}, "method full a step takes 1.00 times as long .* and 1.67 times with .* got 0.99"),
        ({"price": 1.7}, "got 1.7"),
        (
            {"price": 1.9, "method": "linear"},
            "method linear a step takes 2.00 times as long .* and 3.00 times .* got 1.9",
        ),
        (
            {"price": 1.2, "clean_weight": 0.5},
            "clean images beside the attacked ones a step takes 2.00 times .* got 1.2",
        ),
        ({"price": 1.2, "method": "bias", "lp_ft": 1}, "price is that of one method, and lp_ft"),
        ({"noise": 0.1}, "the attack stale has no setting 'noise'"),
        ({"steps": 2}, "the attack stale has no setting 'steps'"),
        ({"clean_weight": 1.0}, "clean_weight=1 leaves these out"),
        ({"compile": True, "refresh": 2}, "refresh would save nothing with compile"),
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Trainer(network(), EPS, **{"attack": "stale"} | changes)


def test_an_augmentation_that_does_not_say_where_pixels_go_is_refused(monkeypatch):
    class Blur:
        def __init__(self, crop):
            pass

        def __call__(self, images, seeds):
            return images

        def __repr__(self):
            return "Blur()"

    monkeypatch.setattr(run, "Augment", Blur)
    with pytest.raises(ValueError, match=r"Blur\(\) does not say where each pixel goes"):
        trained(network(), images(), augment=True)
