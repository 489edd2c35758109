"""The monitor: its measurements, its alarms, and the state that it leaves unchanged."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from attacked import EPS, Net, batch_of, fresh_seed
from attacked import one_thread as one_thread
from torch import nn

from fastadv import data, sample_seeds
from fastadv.attacks import FGSM, NFGSM, PGD, Normalized, create_attack
from fastadv.models.networks import mlp
from fastadv.training.monitor import Monitor, abnormal_share

DIGITS = data.load("digits", classes=range(5))
LARGE_EPS = 0.3


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def test_an_attack_on_another_model_or_images_of_another_dtype_are_told(recwarn):
    model, (x, y) = mlp((3, 4, 4), 3), (torch.rand(6, 3, 4, 4), torch.arange(6) % 3)
    Monitor(model, x, y, FGSM(model, EPS), EPS)
    assert not recwarn.list
    Monitor(model, x, y, FGSM(copy.deepcopy(model), EPS), EPS)
    assert "the training attack was made on another model" in str(recwarn.pop(UserWarning).message)
    with pytest.raises(ValueError, match=r"weights of torch.float32, does not take images .* of torch.float64"):
        Monitor(model, x.double(), y, None, EPS)


def train(attack, epochs, seed):
    """The readings after each epoch of a training loop by hand, on digits at a large budget."""
    torch.manual_seed(seed)
    model = mlp(DIGITS.shape, 5)
    attack = create_attack(attack, model, LARGE_EPS)
    monitor = Monitor(model, DIGITS.x_train[:128], DIGITS.y_train[:128], attack, LARGE_EPS)
    images, labels = DIGITS.x_train[128:], DIGITS.y_train[128:]
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    readings = []
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(attack(images[index], labels[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        readings.append(monitor.check())
    return readings


def test_fgsm_at_a_large_budget_raises_the_alarm_and_pgd_does_not():
    fgsm, pgd = train("fgsm", 30, fresh_seed()), train("pgd", 15, fresh_seed())
    assert any(reading.alarm for reading in fgsm)
    assert not any(reading.alarm for reading in pgd)
    assert max(reading.gap for reading in pgd) < 0.1


@pytest.fixture
def net():
    return Net().eval()


@pytest.mark.parametrize("attack", [FGSM, NFGSM, PGD])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_reading_is_what_a_hand_measures(net, attack, normalized):
    model = Normalized(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)) if normalized else net
    (x, y), seed, attack = batch_of(64), fresh_seed(), attack(model, EPS)
    reading = Monitor(model, x, y, attack, EPS, steps=5, seed=seed).check()

    def losses(images):
        return F.cross_entropy(model(images), y, reduction="none")

    def gradient(images):
        images = images.clone().requires_grad_()
        return torch.autograd.grad(losses(images).sum(), images)[0].flatten(1)

    seeds = sample_seeds(seed, torch.arange(64))
    adv = attack(x, y, seed=seeds)
    noisy = PGD(model, EPS, alpha=0.0, steps=1)(x, y, seed=seeds)  # PGD's random start
    assert ((noisy - x).abs().amax() <= EPS) & (noisy != x).any()
    assert reading.probe_pgd == pytest.approx(accuracy(model, PGD(model, EPS, EPS / 4, 5)(x, y, seed=seeds), y))
    assert reading.probe_attack == pytest.approx(accuracy(model, adv, y))
    assert reading.gap == reading.probe_attack - reading.probe_pgd
    assert reading.alignment == pytest.approx(F.cosine_similarity(gradient(x), gradient(noisy)).mean().item(), abs=1e-4)
    begins = x if isinstance(attack, FGSM) and not isinstance(attack, NFGSM) else noisy
    cosines = F.cosine_similarity(gradient(begins), gradient(adv))
    assert reading.cosine == pytest.approx(cosines.mean().item(), abs=1e-4)
    assert reading.abnormal == pytest.approx((losses(noisy) > losses(adv)).float().mean().item())


def test_without_an_attack_the_clean_images_count_and_nothing_alarms(net):
    x, _ = batch_of(64)
    y = net(x).argmax(1)  # the model is right on every image, and wrong near it
    reading = Monitor(net, x, y, None, 0.5).check()
    assert reading.probe_attack == accuracy(net, x, y) == 1
    assert reading.gap > 0.5
    assert reading.abnormal is None
    assert reading.cosine is None
    assert reading.alarm is None


def test_any_callable_is_an_attack_and_draws_the_same_each_time(net):
    (x, y), drawn = batch_of(32), []

    def attack(images, labels):
        drawn.append(torch.rand_like(images))
        images = images.clone().requires_grad_()
        F.cross_entropy(net(images), labels).backward()
        return (images + EPS * images.grad.sign()).clamp(0, 1)

    monitor = Monitor(net, (255 * x).to(torch.uint8), y, attack, EPS)
    first, again = monitor.check(), monitor.check()
    assert first == again
    assert torch.equal(*drawn)
    ours = Monitor(net, (255 * x).to(torch.uint8), y, FGSM(net, EPS), EPS).check()
    assert first.probe_attack == ours.probe_attack


def test_a_compiled_attack_fills_its_batches_no_further_after_a_check(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model.register_forward_hook(lambda module, args, _: seen.append(len(args[0])))
    images, labels = torch.rand(32, 3, 2, 2), torch.arange(32) % 3
    attack = PGD(model, 0.1, 0.05, 2, compile=True)
    attack(images[:8], labels[:8])
    Monitor(model, images, labels, attack, 0.1).check()
    seen.clear()
    attack(images[:7], labels[:7])
    assert set(seen) == {8}


def test_a_check_leaves_model_and_generators_as_they_were(net):
    net.train()
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    F.cross_entropy(net(batch_of()[0]), batch_of()[1]).backward()
    before, grads = copy.deepcopy(net), [copy.deepcopy(parameter.grad) for parameter in net.parameters()]
    monitor = Monitor(net, *batch_of(16), PGD(net, EPS, training_mode="as_is"), EPS)
    state = torch.get_rng_state()
    with torch.inference_mode():
        monitor.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    for old, new, grad in zip(before.parameters(), net.parameters(), grads, strict=True):
        assert torch.equal(old, new)
        assert old.requires_grad == new.requires_grad
        assert new.grad is grad is None or torch.equal(new.grad, grad)
    for old, new in zip(before.buffers(), net.buffers(), strict=True):
        assert torch.equal(old, new)


class Scripted(nn.Module):
    """A model with given accuracies on 100 images: one under PGD, one for the images that `marked` returns."""

    def __init__(self):
        super().__init__()
        self.percent = {"pgd": 0, "attack": 0}

    def forward(self, x):
        right = torch.arange(len(x)) < self.percent["attack" if (x == 1).all() else "pgd"]
        return torch.stack((right, ~right), 1).float() + 0 * x


def marked(images, labels):
    return torch.ones_like(images)


def scripted():
    images = torch.full((100, 2), 0.95)  # from here to 1 is within eps
    return Monitor(Scripted(), images, torch.zeros(100, dtype=torch.int64), marked, 0.1)


def check(monitor, pgd, attack):
    monitor.model.percent = {"pgd": pgd, "attack": attack}
    return monitor.check()


@pytest.mark.parametrize(
    ("course", "alarms"),
    [
        ([(40, 42), (50, 53), (45, 60), (30, 52)], "...."),  # accuracy under PGD falls by no more than drop
        ([(60, 62), (39, 66)], ".!"),  # it falls further, and the gap gets wider
        ([(60, 62), (30, 36), (55, 58)], "..."),  # an unlucky step: both accuracies fall
        ([(30, 32), (60, 62), (41, 64), (38, 68), (61, 64)], "...!."),  # the drop counts from the best reading
        ([(60, 75), (39, 70)], ".."),  # the gap was wide before, and grew by 16 points only
        ([(60, 40), (39, 41)], ".."),  # an attack beyond the budget, such as N-FGSM: a gap below zero counts as 0
        ([(2, 90), (3, 95), (70, 75), (71, 74)], "!!.."),  # the collapse came before the first reading
        ([(10, 12), (15, 30), (20, 39), (19, 41)], "...!"),  # the accuracy was low at all readings
        ([(41, 80), (46, 90)], ".."),  # a wide gap, but more than half of the accuracy is left
        ([(0, 10), (0, 20)], ".."),  # the beginning of training
    ],
)
def test_the_alarm_is_for_a_fall_with_a_wider_gap_or_a_collapse(course, alarms):
    monitor = scripted()
    readings = [check(monitor, *percent) for percent in course]
    assert "".join("!" if reading.alarm else "." for reading in readings) == alarms
    for reading, (pgd, attack) in zip(readings, course, strict=True):
        assert (reading.probe_pgd, reading.probe_attack) == (pgd / 100, attack / 100)
        assert reading.alignment is reading.cosine is None  # every gradient is zero
    assert monitor.best == max((reading.probe_pgd for reading in readings if not reading.alarm), default=None)


def test_the_alarm_tells_the_numbers():
    monitor = scripted()
    check(monitor, 60, 62)
    alarm = check(monitor, 5, 97).alarm
    assert alarm == (
        "catastrophic overfitting: accuracy on the probe batch is 5.0% under PGD-5 and 97.0% under the training "
        "attack; at its best it was 60.0% and 62.0%"
    )


def test_a_resumed_monitor_goes_on_exactly():
    course = [(31, 30), (57, 64), (40, 55), (35, 80), (58, 60), (37, 81)]
    whole = scripted()
    expected = [check(whole, *percent) for percent in course]
    for cut in range(len(course) + 1):
        first, second = scripted(), scripted()
        readings = [check(first, *percent) for percent in course[:cut]]
        second.load(json.loads(json.dumps(first.state())))
        readings += [check(second, *percent) for percent in course[cut:]]
        assert readings == expected
        assert (second.best, second.state()) == (whole.best, whole.state())
    with pytest.raises(ValueError, match="keys best and best_gap, got best"):
        whole.load({"best": 0.5})


@pytest.mark.parametrize("row", [[float("nan"), 0, 0], [0, float("nan"), 1], [0.5, 0.5, 0.5]])
def test_no_prediction_is_a_wrong_answer_whatever_the_label(row):
    x, y = torch.rand(6, 3), torch.arange(6) % 3
    monitor = Monitor(lambda x: torch.tensor(row) + 0 * x, x, y, lambda x, y: x, EPS)
    reading = monitor.check()
    assert (reading.probe_pgd, reading.probe_attack) == (0, 0)


def test_tiny_gradients_still_have_an_angle():
    """The squares of a confident model's gradients are zero in float32. An affine model's gradients are all equal."""
    weight = torch.randn(2, 12)

    def model(x):
        return 1e-30 * (x.flatten(1) @ weight.T)

    x, y = batch_of(8, classes=2, size=2)
    assert Monitor(model, x, y, None, EPS).check().alignment == pytest.approx(1)


def test_abnormal_share_counts_and_refuses_what_is_not_one_per_sample():
    assert abnormal_share(torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 2, 2, 5])) == 0.25
    for other in (torch.rand(3), torch.rand(4, 1)):
        with pytest.raises(ValueError, match="one for each sample"):
            abnormal_share(torch.rand(4), other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": 8}, ValueError, r"the images' scale \[0, 1\]"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number, got 1.5"),
        ({"drop": "0.2"}, TypeError, "drop must be a number, got '0.2'"),
        ({"attack": FGSM}, TypeError, "attack must be a callable .* got <class"),
        (
            {"attack": PGD(nn.Identity(), EPS, clip=None)},
            ValueError,
            r"images in \[0, 1\], and attack is made for clip=None",
        ),
        ({"drop": 20}, ValueError, r"share in \(0, 1\), got 20"),
        ({"attack": "fgsm"}, TypeError, "attack must be a callable .* got 'fgsm'"),
        ({"images": torch.rand(6, 3, 6, 6) * 255}, ValueError, r"images must be in \[0, 1\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, "one for each"),
        ({"images": torch.rand(0, 3, 6, 6), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "no images"),
    ],
)
def test_bad_settings_are_refused(net, changes, error, message):
    images, labels = batch_of()
    settings = {"images": images, "labels": labels, "attack": None, "eps": EPS, **changes}
    with pytest.raises(error, match=message):
        Monitor(net, **settings)


def test_labels_beyond_the_classes_are_refused(net):
    images, labels = batch_of()
    with pytest.raises(ValueError, match="below the model's 5 classes, got 7"):
        Monitor(net, images, labels * 0 + 7, None, EPS).check()
