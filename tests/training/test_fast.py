"""The training attacks against plain float64 loops from the formulas; the random numbers are those of the ops."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fitted import drawn, loaded_batches
from torch import nn

from fastadv import random_init, sample_seeds
from fastadv.attacks import ZeroGrad
from fastadv.attacks.noise import uniform, uniform_per_sample
from fastadv.attacks.samplewise import seeds_for
from fastadv.training import Augment, Trainer, run, stages
from fastadv.training.batches import AUGMENTING, Batches
from fastadv.training.fast import FAST, FastMethod, fast_method
from fastadv.training.monitor import Reading
from fastadv.training.step import TrainStep

COUNT, CLASSES, BATCH, EPOCHS = 23, 3, 8, 7  # three updates an epoch, of 8, 8 and 7 images
STEPS = EPOCHS * math.ceil(COUNT / BATCH)
LR, SEED = 0.02, 4
REPEATS = 3


@pytest.fixture
def data():
    return drawn(COUNT, CLASSES, 4)


def network():
    """A smooth network with batch-norm, so that the mode of each pass matters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def trained(data, attack, eps, **changes):
    """(weights, the rows of each part of a batch in the order of the run, the records)."""
    model = network()
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "optimizer": "sgd", "seed": SEED, "probe": 0}
    if attack == "free":
        settings["repeats"] = REPEATS
    if attack == "cached":
        settings["method"] = "linear"
    trainer = Trainer(model, eps, attack=attack, measure_backbone=False, progress=False, **settings | changes)
    with loaded_batches() as order:
        records = trainer.fit(data)
    return model.state_dict(), [rows for _, rows in order], records


# ---------------------------------------------------------------------- the methods by hand


def own_losses(model, x, y):
    logits = model(x)
    return logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]


def gradient(model, x, y, create_graph=False):
    """The gradient with the model in eval mode."""
    model.eval()
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(own_losses(model, x, y).sum(), x, create_graph=create_graph)
    model.train()
    return g


def projected(adv, x, eps):
    return torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1)


def smoothed(logits, y, smoothing):
    targets = (1 - smoothing) * F.one_hot(y, CLASSES).double() + smoothing / CLASSES
    return -(targets * logits.log_softmax(1)).sum(1)


class ByHand:
    """A method: `loss` is the sum of the losses in a part, and `after` runs after the backward passes of an update."""

    smoothing, ema_decay = 0.0, 0.0

    def __init__(self, model, eps, penalty=None):
        self.model, self.eps, self.penalty = model, eps, penalty

    def before(self, step, epoch):
        pass

    def after(self):
        pass

    def learnt(self, adv, y):
        return smoothed(self.model(adv), y, self.smoothing).sum()


class GradAlignByHand(ByHand):
    def loss(self, x, y, seeds, rows, where=None):
        g = gradient(self.model, x, y)
        there = gradient(self.model, random_init(x, self.eps, seed=seeds), y, create_graph=True)
        cosine = F.cosine_similarity(g.flatten(1), there.flatten(1), dim=1).mean()
        weight = 0.02 * 10 ** (self.eps * 255 / 8) if self.penalty is None else self.penalty
        # Now, for the update's forward pass moves the statistics that this gradient was taken with.
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(weight * (1 - cosine) * len(x), parameters)
        added = sum((p * grad).sum() for p, grad in zip(parameters, grads, strict=True))
        return self.learnt((x + self.eps * g.sign()).clamp(0, 1), y) + added


class FreeByHand(ByHand):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.delta = 0.0

    def before(self, step, epoch):
        self.used = []

    def loss(self, x, y, seeds, rows, where=None):
        first = sum(len(adv) for adv in self.used)
        if first == 0 and isinstance(self.delta, float):
            self.delta = torch.zeros(BATCH, *x.shape[1:], dtype=torch.float64)
        adv = (x + self.delta[first : first + len(x)]).clamp(0, 1).requires_grad_()
        self.used.append(adv)
        return self.learnt(adv, y)

    def after(self):
        grad = torch.cat([adv.grad for adv in self.used])
        n = len(grad)
        self.delta[:n] = (self.delta[:n] + self.eps * grad.sign()).clamp(-self.eps, self.eps)


class LIETByHand(ByHand):
    smoothing, ema_decay = 0.6, 0.9995

    def before(self, step, epoch):
        self.weight = (100 if self.penalty is None else self.penalty) * (epoch + 1) / EPOCHS
        self.looks = step % 20 == 0

    def loss(self, x, y, seeds, rows, where=None):
        if self.looks:
            grey = torch.full((CLASSES, *x.shape[1:]), 0.5, dtype=torch.float64)
            self.classes, self.looks = self.eps * gradient(self.model, grey, torch.arange(CLASSES)).sign(), False
        wide = self.eps > 8.01 / 255
        draw = [seeds_for(seeds, x, k) for k in range(5)]
        start = torch.empty_like(x)
        for i in range(len(x)):
            side = 1 if uniform_per_sample(x, draw[1])[i] > 0.5 else -1
            mask = uniform(x, draw[3])[i] < 0.1 + 0.4 * uniform_per_sample(x, draw[2])[i]
            noise = (2 if wide else 1) * self.eps * (2 * uniform(x, draw[4])[i] - 1)
            start[i] = (x[i] + torch.where(mask, noise, side * self.classes[y[i]])).clamp(0, 1)
        adv = start + self.eps * gradient(self.model, start, y).sign()
        adv = adv.clamp(0, 1) if wide else projected(adv, x, self.eps)
        # One pass of both, for batch-norm; the divergence from its definition.
        logits, at_start = self.model(torch.cat((adv, start))).split(len(x))
        p, q = logits.softmax(1), at_start.softmax(1)
        m = (p + q) / 2
        divergence = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        return smoothed(logits, y, self.smoothing).sum() + self.weight * divergence


class SORAByHand(ByHand):
    v = 0.99

    def before(self, step, epoch):
        self.used = []

    def loss(self, x, y, seeds, rows, where=None):
        start = random_init(x, self.eps, seed=seeds)
        g = gradient(self.model, start, y)
        longest = 2 * self.eps if self.v >= 1 else min(2 * self.eps, 0.02 / (1 - self.v))
        length = longest * uniform(x, seeds_for(seeds, x, 1))
        adv = (start + length * g.sign()).clamp(0, 1).requires_grad_()
        self.used.append((g, adv))
        return self.learnt(adv, y)

    def after(self):
        n = sum(len(g) for g, _ in self.used)
        held = [
            (one.sign() * other).sum() * n / one.abs().sum()  # adv.grad is the gradient of the batch's mean loss
            for g, adv in self.used
            for one, other in zip(g, adv.grad, strict=True)
        ]
        self.v = 0.95 * self.v + 0.05 * (sum(held) / n).item()


class PGIByHand(ByHand):
    smoothing = 0.4

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept = {}

    def loss(self, x, y, seeds, rows, where=None):
        signs = (uniform(x, seeds) - 0.5).sign()
        adv, start = torch.empty_like(x), torch.empty_like(x)
        for i, row in enumerate(rows.tolist()):
            kept = self.kept.get(row, (self.eps * signs[i], torch.zeros_like(x[i])))
            # For each pixel the number of the stored pixel that it shows, from 1 on; 0 in the padding.
            shown = torch.arange(1, x[i, 0].numel() + 1) if where is None else where[i, 0].flatten().long()
            delta, m = (F.pad(t.flatten(1), (1, 0))[:, shown].reshape(x[i].shape) for t in kept)
            start[i] = x[i] + delta
            (g,) = gradient(self.model, start[i : i + 1], y[i : i + 1])
            m = g / g.abs().sum() + 0.3 * m
            adv[i] = (x[i] + (delta + self.eps * g.sign()).clamp(-self.eps, self.eps)).clamp(0, 1)
            following = (delta + self.eps * m.sign()).clamp(-self.eps, self.eps)
            following = (x[i] + following).clamp(0, 1) - x[i]
            for old, new in zip(kept, (following, m), strict=True):
                old.view(3, -1)[:, shown[shown > 0] - 1] = new.flatten(1)[:, shown > 0]
            self.kept[row] = kept
        logits, at_start = self.model(torch.cat((adv, start))).split(len(x))
        weight = 10 if self.penalty is None else self.penalty
        return smoothed(logits, y, self.smoothing).sum() + weight * ((logits - at_start) ** 2).sum() / CLASSES


class ZeroGradByHand(ByHand):
    quantile = 0.35

    def loss(self, x, y, seeds, rows, where=None):
        start = random_init(x, self.eps, seed=seeds)
        g = gradient(self.model, start, y)
        least = g.abs().flatten(1).quantile(self.quantile, dim=1)
        step = torch.where(g.abs() < least[:, None, None, None], 0.0, 2 * self.eps * g.sign())
        return self.learnt(projected(start + step, x, self.eps), y)


BY_HAND = {
    "gradalign": GradAlignByHand,
    "free": FreeByHand,
    "liet": LIETByHand,
    "sora": SORAByHand,
    "fgsm-pgi": PGIByHand,
    "zerograd": ZeroGradByHand,
}


def by_hand(data, attack, eps, order, grad_accum_steps, penalty=None, augment=None):
    model = network().train()
    method, left = BY_HAND[attack](model, eps, penalty), iter(order)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True)
    ema = copy.deepcopy(model.state_dict())
    for step in range(STEPS):
        epoch = step // math.ceil(COUNT / BATCH)
        method.before(step, epoch)
        parts = [next(left) for _ in range(grad_accum_steps)]
        for part in parts:
            x, y, seeds, where = data[0][part], data[1][part], sample_seeds(SEED, part, epoch), None
            if augment is not None:
                passed = step // (REPEATS if attack == "free" else 1) // math.ceil(COUNT / BATCH)
                moves = sample_seeds(SEED, part, passed + AUGMENTING)
                numbers = torch.arange(1.0, x[0, 0].numel() + 1).reshape(1, 1, *x.shape[2:])
                x, where = augment(x, moves), augment(numbers.expand(len(x), -1, -1, -1), moves)
            (method.loss(x, y, seeds, part, where) / sum(map(len, parts))).backward()
        method.after()
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.step()
        optimizer.zero_grad()
        decay = min(method.ema_decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            ema[name] = decay * ema[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
    assert next(left, None) is None
    return ema if method.ema_decay else model.state_dict()


# The length of SORA's step changes only at a large budget.
@pytest.mark.parametrize(
    ("eps", "grad_accum_steps", "attack"),
    [*((8 / 255, 1, name) for name in BY_HAND), *((0.1, 2, name) for name in BY_HAND), (0.4, 2, "sora")],
)
def test_a_method_is_the_loop_by_hand(data, attack, eps, grad_accum_steps):
    weights, order, _ = trained(data, attack, eps, grad_accum_steps=grad_accum_steps)
    expected = by_hand(data, attack, eps, order, grad_accum_steps)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)
    plain, _, _ = trained(data, "fgsm", eps, grad_accum_steps=grad_accum_steps)
    assert max((weights[name].double() - plain[name].double()).abs().max() for name in weights) > 1e-6


@pytest.mark.parametrize("attack", BY_HAND)
def test_with_crops_and_flips_it_is_the_loop_by_hand(data, attack):
    larger = F.interpolate(data[0], 8, mode="bilinear"), data[1]
    weights, order, _ = trained(larger, attack, 0.05, augment=True)
    expected = by_hand(larger, attack, 0.05, order, 1, augment=Augment(crop=1))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attack", ["gradalign", "liet", "fgsm-pgi"])
def test_the_weight_of_what_is_added_can_be_set(data, attack):
    weights, order, _ = trained(data, attack, 0.05, penalty=3.0)
    torch.testing.assert_close(weights, by_hand(data, attack, 0.05, order, 1, penalty=3.0), rtol=0, atol=1e-10)


def test_given_settings_of_loss_and_ema_override_a_method_s_own(data):
    liet = {"label_smoothing": 0.1, "ema_decay": 0.0}
    for attack, changes in (("liet", liet), ("fgsm-pgi", {"label_smoothing": 0.0})):
        weights, order, _ = trained(data, attack, 0.05, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BY_HAND[attack], "smoothing", changes["label_smoothing"])
            patch.setattr(BY_HAND[attack], "ema_decay", 0.0)
            expected = by_hand(data, attack, 0.05, order, 1)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


def test_the_quantile_of_zerograd_can_be_set(data):
    weights, order, _ = trained(data, "zerograd", 0.05, quantile=0.8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZeroGradByHand, "quantile", 0.8)
        torch.testing.assert_close(weights, by_hand(data, "zerograd", 0.05, order, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
def test_zerograd_zeroes_strictly_below_the_quantile_also_among_equal_ones(quantile):
    weight = torch.tensor([3.0, -1, 1, 0, 1, 2, -2, 1, 0, 5], dtype=torch.float64)
    x = torch.full((2, 10), 0.5, dtype=torch.float64)
    eps = 0.1
    adv = ZeroGrad(lambda x: torch.stack((x @ weight, -x @ weight), 1), eps, quantile=quantile)(
        x, torch.zeros(2, dtype=torch.int64), seed=3
    )
    start = random_init(x, eps, seed=3)
    moved = weight.abs() >= weight.abs().quantile(quantile)
    expected = torch.where(moved & (weight != 0), x - eps * weight.sign(), start)
    torch.testing.assert_close(adv, expected)


# ---------------------------------------------------------------------- updates in a row


def test_free_takes_each_batch_repeats_times_in_a_row_and_every_image_epochs_over_repeats_times(data):
    _, order, records = trained(data, "free", 0.05, repeats=3, epochs=9)
    assert len(order) == 27
    runs = [order[i : i + 3] for i in range(0, 27, 3)]
    assert all(torch.equal(part, run[0]) for run in runs for part in run)
    for first in (0, 3, 6):  # the first batch of each of three passes over the data
        assert torch.equal(torch.cat([run[0] for run in runs[first : first + 3]]).sort()[0], torch.arange(COUNT))
    assert not torch.equal(runs[0][0], runs[3][0])
    rates = [record["lr"] for record in records if "epoch" in record]
    assert rates == pytest.approx([LR * (1 + math.cos(math.pi * step / 27)) / 2 for step in range(2, 27, 3)])


def test_the_updates_of_free_in_a_row_see_one_crop(data):
    """The picture is cropped and flipped once for all updates in a row, even where an epoch ends between them."""
    shown, batch_of = [], Batches.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "load", lambda *given: (shown.append(batch_of(*given)), shown[-1])[1])
        x = torch.rand(COUNT, 3, 16, 16)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES))
        settings = {"epochs": 4, "batch_size": BATCH, "repeats": 2, "augment": True, "probe": 0}
        Trainer(model, 0.05, attack="free", measure_backbone=False, progress=False, **settings).fit((x, data[1]))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(shown[::2], shown[1::2], strict=True))
    assert len({tuple(image.flatten().tolist()) for images, _ in shown for image in images}) > 1.5 * COUNT


# ---------------------------------------------------------------------- cut, answered, refused


class Cut(Exception):
    pass


@pytest.mark.parametrize("attack", FAST)
@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(data, attack, checkpoint_s, tmp_path):
    """There is a checkpoint after each step, or only between epochs: then the resumed run repeats steps."""
    options = {"checkpoint_s": checkpoint_s, "grad_accum_steps": 2, "augment": attack != "cached", "epochs": 3}
    x = F.interpolate(data[0], 16), data[1]
    with pytest.MonkeyPatch.context() as patch:
        whole, _, records = on_large(x, attack, folder=tmp_path / "whole", **options)
        taken, apply, at = [], TrainStep.apply, {random.randrange(1, 9), random.randrange(1, 9)}

        def applied(step):
            taken.append(None)
            if len(taken) in at:
                raise Cut
            apply(step)

        patch.setattr(TrainStep, "apply", applied)
        print(f"cut at {at}")
        for _ in at:
            with pytest.raises(Cut):
                on_large(x, attack, folder=tmp_path / "cut", resume=True, **options)
        resumed, _, again = on_large(x, attack, folder=tmp_path / "cut", resume=True, **options)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    timeless = [{k: v for k, v in r.items() if not k.endswith("_s")} for r in records]
    assert timeless == [{k: v for k, v in r.items() if not k.endswith("_s")} for r in again]


def on_large(data, attack, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "network", large)
        return trained(data, attack, 0.4 if attack == "sora" else 0.05, **options)


def large():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, CLASSES)).double()


@pytest.mark.parametrize("attack", FAST)
def test_a_switch_leaves_the_method(data, attack, tmp_path, monkeypatch):
    looked, methods, apply = [], [], TrainStep.apply

    class Once:
        def __init__(self, model, x, y, attack, eps, **options):
            self.attack = attack

        def check(self):
            looked.append(type(self.attack).__name__)
            return Reading(0.5, 0.5, 0.0, None, 0.0, "fire" if len(looked) == 2 else None)

        def state(self):
            return {"best": 0.5}

        def load(self, state):
            pass

    def applied(step):
        methods.append(step.method)
        apply(step)

    monkeypatch.setattr(stages, "Monitor", Once)
    monkeypatch.setattr(TrainStep, "apply", applied)
    options = {"probe": 4, "epochs": 4, "on_catastrophic_overfitting": "switch", "folder": tmp_path}
    with pytest.warns(UserWarning, match="epoch 2: fire"):
        _, order, _ = trained(data, attack, 0.05, **options)
    assert looked == ["NFGSM" if attack == "sora" else "FGSM"] * 2 + ["PGD"] * 2
    assert [method is None for method in methods] == [False] * 6 + [True] * 6
    for first in (6, 9):  # after the switch an epoch has all images
        assert torch.equal(torch.cat(order[first : first + 3]).sort()[0], torch.arange(COUNT))


@pytest.mark.parametrize(
    ("attack", "options", "words"),
    [
        ("fgsm", {"penalty": 1.0}, "the attack fgsm has no setting 'penalty'"),
        ("fgsm", {"repeats": 2}, "the attack fgsm has no setting 'repeats'"),
        ("fgsm-rs", {"quantile": 0.3}, "the attack fgsm-rs has no setting 'quantile'"),
        ("free", {"penalty": 1.0}, "the attack free has no setting 'penalty'"),
        ("gradalign", {"repeats": 2}, "the attack gradalign has no setting 'repeats'"),
        ("gradalign", {"alpha": 0.1}, "the attack gradalign has no setting 'alpha'"),
        ("sora", {"noise": 0.1}, "the attack sora has no setting 'noise'"),
        ("liet", {"steps": 2}, "the attack liet has no setting 'steps'"),
        (None, {"penalty": 1.0}, "penalty belong to an attack by name"),
        ("sora", {"clean_weight": 0.1}, "clean_weight is not for sora: its step follows the gradient"),
        ("free", {"clean_weight": 1.0}, "free follows the gradient .* clean_weight=1 leaves these out"),
        *(
            (attack, {"label_smoothing": 0.1}, f"{attack} follows .* label_smoothing turns that towards the label")
            for attack in ("free", "sora", "stale")
        ),
        ("free", {"eps_schedule": "linear"}, "eps_schedule is not for free: "),
        ("sora", {"eps_schedule": "linear"}, "eps_schedule is not for sora: "),
        ("free", {"epochs": 3, "repeats": 4}, "learns from each batch 4 times"),
        ("free", {"epochs": 8, "repeats": 4, "lp_ft": 3}, "3 epochs of linear are less than one pass"),
    ],
)
def test_what_nothing_would_heed_is_refused(attack, options, words):
    with pytest.raises(ValueError, match=words):
        Trainer(network(), 0.05, attack=attack, **options)


@pytest.mark.parametrize("attack", ["free", "sora", "stale"])
def test_a_step_refuses_label_smoothing_too_where_the_attack_follows_its_gradient(attack):
    model = network()
    with pytest.raises(ValueError, match="follows the gradient of the update's loss, and label_smoothing"):
        TrainStep(model, fast_method(attack, model, 0.05, {}), torch.optim.SGD(model.parameters()), label_smoothing=0.1)


def test_a_step_refuses_a_clean_share_with_sora():
    model = network()
    with pytest.raises(ValueError, match="clean_weight is not for SORA: its step follows the gradient"):
        TrainStep(model, fast_method("sora", model, 0.05, {}), torch.optim.SGD(model.parameters()), clean_weight=0.2)


class Detached(nn.Module):
    """A network whose first part, from `since` calls on, gives its input no gradient."""

    def __init__(self, since):
        super().__init__()
        self.body, self.head, self.since, self.calls = nn.Linear(12, 4), nn.Linear(4, CLASSES), since, 0

    def forward(self, x):
        self.calls += 1
        features = self.body(x.flatten(1)).tanh()
        return self.head(features if self.calls <= self.since else features.detach())


@pytest.mark.parametrize(("attack", "since"), [("free", 0), ("sora", 1), ("stale", 0)])
def test_an_update_without_a_gradient_at_the_images_says_so_and_changes_nothing(attack, since):
    model = Detached(since)
    method = fast_method(attack, model, 0.05, {"refresh": 2} if attack == "stale" else {})
    step = TrainStep(model, method, torch.optim.SGD(model.parameters(), lr=1.0))
    images, labels = torch.rand(6, 3, 2, 2), torch.randint(CLASSES, (6,))
    if attack == "stale":
        method.attacked = lambda *given: (images.clone(),)  # what it keeps needs a run
    begun(method)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="does not depend on its input through autograd"):
        step.gradients(images, labels, rows=torch.arange(6))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "attack", [name for name in FAST if name != "gradalign"]
)  # which does nothing before an update
def test_an_update_that_was_not_begun_is_refused(data, attack):
    model = network()
    method = FAST[attack](model, 0.05)
    step = TrainStep(model, method, torch.optim.SGD(model.parameters(), LR))
    with pytest.raises(RuntimeError, match=f"{type(method).__name__} was not begun: call its begin"):
        step.gradients(*data, rows=torch.arange(COUNT))
    if attack in ("free", "liet", "sora"):
        begun(method)
        step.gradients(*data)
        step.apply()
        with pytest.raises(RuntimeError, match="call its begin before each update"):
            step.gradients(*data)


@pytest.mark.parametrize("attack", [name for name in FAST if name != "cached"])  # which trains no factors
def test_the_passes_of_a_training_attack_run_on_merged_weights(data, attack, monkeypatch):
    layer = pytest.importorskip("peft.tuners.lora.layer").Linear
    seen, forward, attacked = {True: set(), False: set()}, layer.forward, FAST[attack].attacked
    attacks = False

    def watched(self, *args, **kwargs):
        seen[attacks].add(self.merged)
        return forward(self, *args, **kwargs)

    def during(*args):
        nonlocal attacks
        attacks = True
        found = attacked(*args)
        attacks = False
        return found

    monkeypatch.setattr(layer, "forward", watched)
    monkeypatch.setattr(FAST[attack], "attacked", during)
    trained(data, attack, 0.05, method="lora", epochs=REPEATS, **({"refresh": 2} if attack == "stale" else {}))
    assert seen == {True: set() if attack == "free" else {True}, False: {False, True}}  # merged at the end


def test_an_update_without_a_batch_leaves_what_sora_has_measured(data):
    model = network()
    method = FAST["sora"](model, 0.05)
    step = TrainStep(model, method, torch.optim.SGD(model.parameters(), LR))
    begun(method)
    step.gradients(*data)
    step.apply()
    before = method.state()["v"].clone()
    begun(method)
    step.apply()
    assert torch.equal(method.state()["v"], before)


@pytest.mark.parametrize(
    ("attack", "changes", "error", "words"),
    [
        ("free", {"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ("free", {"repeats": 2.5}, ValueError, "repeats is a whole number, got 2.5"),
        ("gradalign", {"penalty": -1.0}, ValueError, "penalty must be at least 0, got -1.0"),
        ("liet", {"penalty": math.nan}, ValueError, "penalty must be finite, got nan"),
        ("fgsm-pgi", {"penalty": "x"}, TypeError, "penalty is a number, got 'x'"),
        ("stale", {"refresh": 0}, ValueError, "refresh must be at least 1, got 0"),
        ("stale", {"price": -3}, ValueError, "price must be above 0, got -3"),
        ("cached", {"refresh": 2.5}, ValueError, "refresh is a whole number, got 2.5"),
        ("fre", {}, ValueError, "unknown training attack 'fre'.*free"),
    ],
)
def test_a_method_refuses_what_the_settings_of_a_run_refuse(attack, changes, error, words):
    with pytest.raises(error, match=words):
        fast_method(attack, network(), 0.05, changes)


def test_signs_that_are_not_used_stand_no_smoothing_in_the_way(data):
    given = {"label_smoothing": 0.1, "epochs": 2}
    (ours, _, _), (theirs, _, _) = (
        trained(data, *attack, **given, **more)
        for attack, more in ((("stale", 0.05), {"refresh": 1}), (("fgsm", 0.05), {}))
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def begun(method):
    """The method as in its first update, without the memory of a run."""
    FastMethod.begin_epoch(method, None)
    method.begin(0, 0, 1)
    return method


class Normalizing(nn.Module):
    """Normalises its input, in its own memory or in new memory."""

    def __init__(self, in_place):
        super().__init__()
        self.net, self.in_place = network(), in_place

    def forward(self, x):
        return self.net(x.sub_(0.4).div_(0.3) if self.in_place else (x - 0.4) / 0.3)


@pytest.mark.parametrize("attack", [attack for attack in FAST if attack != "cached"])
def test_a_model_that_writes_to_its_input_is_trained_like_one_that_does_not(data, attack, monkeypatch):
    found = []
    for model in (Normalizing(in_place=False), Normalizing(in_place=True)):
        monkeypatch.setitem(globals(), "network", lambda model=model: model)
        found.append(trained(data, attack, 0.05, epochs=REPEATS)[0])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, y: (255 * x, y), ValueError, r"\[0, 1\]"),
        (lambda x, y: (2 * x - 1, y), ValueError, r"\[0, 1\]"),
        (lambda x, y: (x, y.index_fill(0, torch.tensor([0]), -100)), ValueError, "must not be negative, got -100"),
        (lambda x, y: (x, F.one_hot(y, CLASSES)), TypeError, r"int64 tensor \(N,\), got torch.int64 of shape"),
        (lambda x, y: (x[:CLASSES], torch.eye(CLASSES)), TypeError, r"int64 tensor \(N,\), got torch.float32 of shape"),
    ],
)
@pytest.mark.parametrize("attack", ["sora", None])
def test_a_step_refuses_what_is_no_batch(data, attack, change, error, words):
    model = network()
    method = None if attack is None else fast_method(attack, model, 0.05, {})
    step = TrainStep(model, method, torch.optim.SGD(model.parameters()))
    with pytest.raises(error, match=words):
        step.gradients(*change(*data))


@pytest.mark.parametrize(
    ("attack", "method"),
    [*((attack, "linear") for attack in FAST), *((attack, "bias") for attack in FAST if attack != "cached")],
)
def test_a_part_of_the_model_trains_and_no_other_bit_changes(data, attack, method):
    before = network().state_dict()
    weights, _, _ = trained(data, attack, 0.05, method=method)
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    head, others = {"7.weight", "7.bias"}, {"1.bias", "5.bias"} if method == "bias" else set()
    assert changed == head | others


@pytest.mark.parametrize("attack", FAST)
def test_images_stay_channels_last(data, attack, monkeypatch):
    formats, model_call = set(), nn.Conv2d.forward

    def noted(layer, x):
        if len(x) > 2:  # else an example in which the head is looked for
            formats.add(x.is_contiguous(memory_format=torch.channels_last))
        return model_call(layer, x)

    monkeypatch.setattr(nn.Conv2d, "forward", noted)
    trained(data, attack, 0.05, channels_last=True)
    assert formats == {True}


@pytest.mark.parametrize("attack", FAST)
def test_in_bf16_the_model_runs_in_bf16_in_every_pass(data, attack, monkeypatch):
    data, dtypes, forward = (F.interpolate(data[0].float(), 16), data[1]), [], nn.Linear.forward

    def noted(layer, x):
        y = forward(layer, x)
        if len(x) > 2:  # else an example in which the head is looked for
            dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(nn.Linear, "forward", noted)
    for name, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        dtypes.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "network", lambda: large().float())
            trained(data, attack, 0.05, precision=name, epochs=3)
        assert set(dtypes) == {dtype}


class Attention(nn.Module):
    """A token for each row of an image, with PyTorch's attention or its formula."""

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.qkv, self.head = fused, nn.Linear(12, 24), nn.Linear(8, CLASSES)

    def forward(self, x):
        q, k, v = self.qkv(x.transpose(1, 2).flatten(2)).chunk(3, dim=2)
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(2) @ v
        return self.head(seen.mean(1))


@pytest.mark.parametrize("draw", range(4))
def test_gradalign_aligns_the_gradients_of_a_sample_that_the_model_is_certain_of(draw):
    """In float32 the gradient of its cross-entropy is all but zero, and the inverse of that infinite."""
    torch.manual_seed(draw)  # of 2,000 networks some have too few bits left in the attack's own gradient
    image, seed, found = torch.rand(1, 3, 4, 4), torch.tensor([5]), []
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3, bias=False))
    with torch.no_grad():
        highest, second = (logits := plain(image)).topk(2).values[0]
        plain[3].weight *= 98 / (highest - second)
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(plain).to(dtype)
        method = FAST["gradalign"](model, 0.05, penalty=5.0)
        method.attacked(image.to(dtype), logits.argmax(1), seed)
        loss = method.learn(logits.argmax(1), list(model.parameters()), 1.0)
        found.append([loss, *(p.grad for p in model.parameters())])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here.double(), there, rtol=1e-2, atol=1e-2 * float(there.abs().max()))


@pytest.mark.filterwarnings("ignore:the model has weights of torch.bfloat16")
@pytest.mark.parametrize("attack", FAST)
def test_a_model_in_bfloat16_gets_images_in_bfloat16(data, attack, monkeypatch):
    dtypes, forward = set(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: (dtypes.add(x.dtype), forward(layer, x))[1])
    monkeypatch.setitem(globals(), "network", lambda: large().to(torch.bfloat16))
    before = network().state_dict()
    weights, _, _ = trained((F.interpolate(data[0], 16).to(torch.bfloat16), data[1]), attack, 0.05)
    assert dtypes == {torch.bfloat16}
    assert not torch.equal(weights["5.weight"], before["5.weight"])
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("attack", ["free", "gradalign", "liet", "sora"])
def test_an_optimizer_may_have_frozen_parameters(data, attack):
    found = []
    for trains in (lambda p: True, lambda p: p.requires_grad):
        model = network()
        model[0].requires_grad_(False)
        method = fast_method(attack, model, 0.05, {})
        step = TrainStep(model, method, torch.optim.SGD(filter(trains, model.parameters()), lr=0.1))
        for number in range(3):
            method.begin(number, 0, 1)
            step.gradients(*data, torch.arange(len(data[1])))
            step.apply()
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not torch.equal(found[0]["7.weight"], network()[7].weight)


def test_gradalign_goes_through_attention_whose_fused_form_has_no_second_derivative(data):
    found = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "network", lambda fused=fused: Attention(fused).double())
            found.append(trained(data, "gradalign", 0.05, penalty=5.0)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attack", [name for name, method in FAST.items() if method.alone])
def test_several_processes_are_refused(data, attack, monkeypatch):
    monkeypatch.setattr(run, "team_of", lambda here: SimpleNamespace(alone=False, by_all=lambda take: take()))
    with pytest.raises(ValueError, match=f"the attack {attack} keeps what one process has seen, and trains in one"):
        trained(data, attack, 0.05)


@pytest.mark.parametrize("attack", ["cached", "fgsm-pgi", "stale"])
def test_a_method_that_keeps_something_of_each_image_wants_their_numbers(data, attack):
    model = network()
    method = begun(FAST[attack](model, 0.1))
    step = TrainStep(model, method, torch.optim.SGD(model.parameters(), LR))
    with pytest.raises(ValueError, match="give rows="):
        step.gradients(*data)


def test_labels_beyond_the_classes_are_refused_in_words(data):
    for attack in FAST:
        with pytest.raises(ValueError, match="below the model's 3 classes, got 3"):
            trained((data[0], data[1] + 1), attack, 0.05)
