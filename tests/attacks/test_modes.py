"""Normalised images, step sizes for each image, targets by a function, and torchattacks' methods."""

import copy
import inspect
import io
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import torchattacks
from attacked import ATTACKS, CLASSES, EPS, N, Net, batch_of, distances, every_attack, radius, short_steps, steps_of
from attacked import batch as batch
from attacked import net as net
from attacked import one_thread as one_thread
from gpus import needs_gpu
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastadv import attacks as base_attacks
from fastadv.attacks import BIM, FGSM, PGD, PMA, TPGD, Normalized, base
from fastadv.attacks.engine import NAMES, Engine, GraphEngine
from fastadv.attacks.normalized import denormalized
from fastadv.evaluation import robust_accuracy
from fastadv.functional import Normalization
from fastadv.training.step import check_attack

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOADED = {"images_normalized": (MEAN, STD)}


def per_channel(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).reshape(-1, 1, 1)


def normalised(pixels):
    """Normalised as a data loader does it, in the pixels' dtype."""
    return (pixels - per_channel(MEAN, pixels.dtype)) / per_channel(STD, pixels.dtype)


def pixels_of(images):
    return images.double() * per_channel(STD) + per_channel(MEAN)


# Normalised images


@every_attack
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.float32, {"restarts": 2, "chunk": 4}),
        (torch.float32, {"memory_format": torch.channels_last}),
        (torch.float64, {"targeted": "least_likely", "loss": "ce"}),
    ],
)
def test_pixels_are_those_of_an_attack_through_normalized(name, dtype, options):
    net = Net().to(dtype).eval()
    pixels, labels = batch_of(dtype=dtype)
    wrapped, images = Normalized(net, MEAN, STD), normalised(pixels)
    expected = ATTACKS[name](wrapped, **options)(denormalized(images, wrapped.normalization), labels, seed=7)
    ours = ATTACKS[name](net, **LOADED, **options)(images, labels, seed=7)
    assert ours.dtype == dtype
    assert torch.equal(ours, wrapped.normalization(expected))
    rounding = 4e-6 if dtype == torch.float32 else 1e-12
    assert bool((distances(name, pixels_of(ours), pixels) <= radius(name) + rounding).all())
    assert bool((distances(name, pixels_of(ours), pixels) > radius(name) / 10).all())
    assert -rounding <= pixels_of(ours).min()
    assert pixels_of(ours).max() <= 1 + rounding


@pytest.mark.parametrize("name", ["FGSM", "PGD", "PGDL2"])
def test_a_start_is_normalised_too(net, batch, name):
    pixels, labels = batch
    start = (pixels + 0.02 * torch.randn_like(pixels)).clamp(0, 1)
    ours = ATTACKS[name](net, **LOADED)(normalised(pixels), labels, x_init=normalised(start))
    through = ATTACKS[name](Normalized(net, MEAN, STD))(pixels, labels, x_init=start)
    torch.testing.assert_close(ours, normalised(through), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["FGSM", "BIM", "MIFGSM"])
@pytest.mark.parametrize("spelling", [lambda values: list(values), lambda values: np.array(values), tuple])
def test_set_normalization_used_equals_torchattacks(net, batch, name, spelling):
    images, labels = normalised(batch[0]), batch[1]
    ours, theirs = ATTACKS[name](net), getattr(torchattacks, name)(net, eps=EPS)
    if name != "FGSM":
        theirs.alpha, theirs.steps = EPS / 2, steps_of(name)
    for attack in (ours, theirs):
        attack.set_normalization_used(mean=spelling(MEAN), std=spelling(STD))
    torch.testing.assert_close(ours(images, labels), theirs(images, labels), rtol=0, atol=2e-6)
    assert torch.equal(ours(images, labels), ATTACKS[name](net, **LOADED)(images, labels))


@pytest.mark.parametrize("name", ["FGSM", "PGD", "PGDL2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_perturbation_images_come_back(name, dtype):
    pixels = torch.randint(256, (N, 3, 6, 6)).to(dtype) / 255  # rounding can take 0 and 1 out of the box
    images = normalised(pixels)
    back = ATTACKS[name](Net().to(dtype).eval(), **LOADED)(images, torch.zeros(N).long(), eps=0.0, seed=1)
    torch.testing.assert_close(back, images, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_denormalised_is_its_formula(dtype, layout):
    pixels = torch.rand(N, 3, 5, 5, dtype=torch.float64)
    pixels[:2] = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    images = normalised(pixels).to(dtype).contiguous(memory_format=layout)
    found = denormalized(images, Normalization(MEAN, STD))
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), pixels_of(images).clamp(0, 1), rtol=0, atol=2 * spacing)
    torch.testing.assert_close(found.double(), pixels, rtol=0, atol=4 * spacing)
    assert found.dtype == dtype
    assert found.stride() == images.stride()
    assert 0 <= found.min()
    assert found.max() <= 1


def test_one_number_for_all_channels_and_no_box(batch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)).double()
    pixels, labels = batch
    pixels = 4 * pixels - 2
    attack = BIM(net, 0.1, 0.1, 1, clip=None, images_normalized=(0.25, 0.5))
    adv = attack((pixels - 0.25) / 0.5, labels)
    # On a linear model the expected result is one step of the whole budget, in pixels.
    torch.testing.assert_close((adv * 0.5 + 0.25 - pixels).abs(), torch.full_like(pixels, 0.1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beyond", [-1e-4, 1 + 1e-4, -3.0, math.nan])
def test_pixels_far_beyond_the_box_are_refused(net, batch, beyond):
    images = normalised(batch[0])
    images[2, 1, 0, 0] = (beyond - MEAN[1]) / STD[1]
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\].*another mean and std, or not at all"):
        BIM(net, **LOADED)(images, batch[1])


@pytest.mark.parametrize("beyond", [-9e-6, 1 + 9e-6])
def test_pixels_a_rounding_beyond_the_box_are_put_back(net, batch, beyond):
    images = normalised(batch[0])
    images[2, 1, 0, 0] = (beyond - MEAN[1]) / STD[1]
    inside = denormalized(images, Normalization(MEAN, STD))
    assert inside[2, 1, 0, 0] == round(beyond)
    torch.testing.assert_close(inside, pixels_of(images).clamp(0, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("images_normalized", "message"),
    [
        (0.5, "must be \\(mean, std\\)"),
        ((MEAN,), "must be \\(mean, std\\)"),
        (((125.3, 123.0, 113.9), STD), "divide mean and std by 255"),
        ((MEAN, (0.2, 0.2, 0.0)), "std must be above 0"),
        ((MEAN, (0.2, 0.2)), "one number per channel"),
    ],
)
def test_what_is_no_normalisation_is_refused(net, images_normalized, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PGD(net, images_normalized=images_normalized)
    attack = PGD(net)
    attack.images_normalized = images_normalized
    for _ in range(2):  # the second call is refused like the first
        with pytest.raises((TypeError, ValueError), match=message):
            attack(*batch_of(dtype=torch.float64))


def test_normalising_twice_is_refused(net, batch):
    for model in (Normalized(net, MEAN, STD), nn.Sequential(Normalized(net, MEAN, STD))):
        with pytest.raises(ValueError, match="again"):
            PGD(model, **LOADED)
        attack = PGD(net, **LOADED)
        attack.model = model
        with pytest.raises(ValueError, match="again"):
            attack(*batch)
        plain = PGD(model)
        with pytest.raises(ValueError, match="again"):
            plain.set_normalization_used(MEAN, STD)
        assert plain.images_normalized is None


def test_bytes_and_other_channels_are_refused(net, batch):
    images, labels = normalised(batch[0]), batch[1]
    codes = (255 * batch[0]).to(torch.uint8)
    for wrong in ({"images": codes}, {"images": images, "x_init": codes}):
        with pytest.raises(TypeError, match=r"uint8.*Normalized"):
            PGD(net, **LOADED)(labels=labels, **wrong)
    with pytest.raises(ValueError, match="3 channels"):
        PGD(net, **LOADED)(images[:, :2], labels)


def test_it_is_a_setting_like_the_others(net, batch):
    pixels, labels = batch
    attack = BIM(net, EPS)
    attack(pixels, labels)
    attack.images_normalized = (MEAN, STD)
    made_so = BIM(net, EPS, **LOADED)(normalised(pixels), labels)
    assert torch.equal(attack(normalised(pixels), labels), made_so)
    attack.images_normalized = (MEAN, (0.3, 0.3, 0.3))
    other = (pixels - per_channel(MEAN)) / 0.3
    assert not torch.allclose(attack(other, labels) * 0.3, made_so * per_channel(STD))
    attack.images_normalized = None
    assert torch.equal(attack(pixels, labels), BIM(net, EPS)(pixels, labels))
    with pytest.raises(ValueError, match="without images_normalized"):
        check_attack("attack", BIM(net, **LOADED))


# Step sizes of each image


@short_steps
@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith("APGD")])  # APGD sets its own
@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"chunk": 4}, {"memory_format": torch.channels_last}])
def test_each_image_has_its_own_step_size(net, batch, name, options):
    images, labels = batch
    # The steps are too short to reach the edge of the ball, where all step sizes would give the same result.
    alpha, seeds = EPS / 4 * torch.rand(N, dtype=torch.float64), torch.arange(N)
    attack = ATTACKS[name](net, **options)
    attack.alpha = alpha
    adv = attack(images, labels, seed=seeds)
    for i in range(N):
        attack.alpha = float(alpha[i])
        alone = attack(images[i : i + 1], labels[i : i + 1], seed=seeds[i : i + 1])
        torch.testing.assert_close(adv[i : i + 1], alone, rtol=0, atol=1e-9)
    attack.alpha = alpha.reshape(N, 1, 1, 1)
    assert torch.equal(attack(images, labels, seed=seeds), adv)
    attack.alpha = float(alpha.mean())
    assert not torch.allclose(attack(images, labels, seed=seeds), adv, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (N,), (1, 3, 1, 1), (N, 3, 1, 1), (N, 1, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("chunk", [None, 4, 1])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_step_sizes_of_any_shape_against_a_plain_loop(net, batch, shape, chunk, schedule):
    images, labels = batch
    alpha = EPS * (0.3 + torch.rand(shape, dtype=torch.float64))
    each = alpha.reshape(N, 1, 1, 1) if len(shape) == 1 else alpha
    x = images.clone()
    for t in range(4):
        leaf = x.clone().requires_grad_()
        nn.functional.cross_entropy(net(leaf), labels, reduction="sum").backward()
        factor = 1.0 if schedule == "constant" else 1 + math.cos(math.pi * t / 4)
        x = (images + (x + factor * each * leaf.grad.sign() - images).clamp(-EPS, EPS)).clamp(0, 1)
    attack = PGD(net, EPS, alpha, 4, False, chunk=chunk, schedule=schedule)
    torch.testing.assert_close(attack(images, labels), x, rtol=0, atol=1e-12)
    assert "one for each of" in repr(attack) or math.prod(shape[:1]) == 1


def test_a_smaller_batch_of_a_compiled_attack_is_filled_up_with_them(net, batch, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    images, labels = batch
    attack = PGD(net, EPS, EPS / 3, 3, False, compile=True)
    attack(images, labels)
    for n in (4, 1):
        attack.alpha = EPS * (0.4 + torch.rand(n, dtype=torch.float64))
        eager = PGD(net, EPS, attack.alpha, 3, False)
        assert torch.equal(attack(images[:n], labels[:n]), eager(images[:n], labels[:n]))


def test_an_evaluation_takes_a_step_size_of_all(batch):
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)), torch.rand(60, 3, 6, 6)
    labels = model(images).argmax(1)
    found = [
        robust_accuracy(model, (images, labels), PGD(model, 0.3, alpha, 3), batch_size=7)  # nearly all are fooled
        for alpha in (0.1, torch.tensor(0.1), torch.full((1, 3, 1, 1), 0.1), torch.zeros(()))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["robust_accuracy"] < found[3]["robust_accuracy"]


class Uncaptured(GraphEngine):
    """An engine with tensors of its own, like a captured graph, but without a GPU."""

    made = 0

    def __init__(self, attack, slots):
        Uncaptured.made += 1
        slots = copy.copy(slots)
        Engine.__init__(self, attack, slots)
        slots.memory = {}
        for name in NAMES:
            if isinstance(getattr(slots, name), torch.Tensor):
                setattr(slots, name, getattr(slots, name).clone())
        self.start()

    iterate = Engine.iterate


def same_graph_for_other_step_sizes(net, images, labels):
    attack = PGD(net, EPS, EPS * (0.4 + torch.rand(len(images), device=images.device)), 3, False, graph=True)
    for _ in range(3):
        attack.alpha = EPS * (0.4 + torch.rand(len(images), device=images.device))
        eager = PGD(net, EPS, attack.alpha, 3, False)
        assert torch.equal(attack(images, labels), eager(images, labels))
    for alpha in (torch.tensor(EPS / 2, device=images.device), torch.tensor(EPS / 3, device=images.device), EPS / 1.5):
        attack.alpha = alpha
        assert torch.equal(attack(images, labels), PGD(net, EPS, alpha, 3, False)(images, labels))


def test_a_graph_takes_other_step_sizes(net, batch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base, "GraphEngine", Uncaptured)
    Uncaptured.made = 0
    same_graph_for_other_step_sizes(net, *batch)
    assert Uncaptured.made == 4  # all step sizes per image share one graph, and each single number has its own


@needs_gpu
def test_a_captured_graph_takes_other_step_sizes():
    images, labels = batch_of()
    same_graph_for_other_step_sizes(Net().cuda().eval(), images.cuda(), labels.cuda())


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (torch.ones(N).long(), TypeError, "float tensor, got torch.int64"),
        (torch.ones(N, requires_grad=True), ValueError, "detach"),
        (torch.ones(N - 1), ValueError, r"one of shape \(6,\), one per image.*got \(5,\)"),
        (torch.ones(1), ValueError, r"got \(1,\)"),
        (torch.ones(N, 3), ValueError, r"got \(6, 3\)"),
        (torch.ones(N, 1, 6, 1), ValueError, r"got \(6, 1, 6, 1\)"),
        (torch.ones(N, device="meta"), ValueError, "images' device cpu, got meta"),
        (torch.tensor([0.1] * (N - 1) + [math.nan]), ValueError, "finite"),
        (torch.tensor(math.inf), ValueError, "finite"),
        ("0.1", TypeError, "must be a number"),
    ],
)
@pytest.mark.parametrize("attack", [FGSM, PGD], ids=["FGSM", "PGD"])
def test_what_is_no_step_size_is_refused(net, batch, attack, alpha, error, message):
    attacked = attack(net)
    attacked.alpha = alpha
    with pytest.raises(error, match=message):
        attacked(*batch)
    attacked.alpha = torch.full((N,), EPS)
    assert attacked(*batch).shape == batch[0].shape


# Targets by a function


def next_class(images, labels):
    return (labels + 1) % CLASSES


@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"restarts": 2}, {"loss": "margin"}])
def test_targets_of_a_function_are_targets(net, batch, options):
    images, labels = batch
    for _ in range(2):
        attack = PGD(net, targeted=next_class, **options)
        given = PGD(net, targeted=True, **options)(images, next_class(None, labels), seed=3)
        assert torch.equal(attack(images, labels, seed=3), given)
        predictions = net(images).argmax(1)
        towards = PGD(net, targeted=True, **options)(images, next_class(None, predictions), seed=3)
        assert torch.equal(attack(images, seed=3), towards)


def test_the_function_gets_pixels_and_labels(net, batch):
    seen = []

    def function(images, labels):
        seen.append((images, labels))
        return labels

    pixels, labels = batch
    BIM(net, targeted=function, **LOADED)(normalised(pixels), labels)
    BIM(net.float(), targeted=function)((255 * pixels).to(torch.uint8), labels)
    torch.testing.assert_close(seen[0][0], pixels, rtol=0, atol=1e-14)
    torch.testing.assert_close(seen[1][0], (255 * pixels).to(torch.uint8).float() / 255)
    assert all(torch.equal(got, labels) for _, got in seen)


def test_a_function_that_writes_in_place_changes_no_image_and_no_label_of_the_caller(net, batch):
    images, labels = batch
    before = images.clone(), labels.clone()

    def next_in_place(images, labels):
        images.zero_()
        return labels.add_(1).remainder_(CLASSES)

    def loss_in_place(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets.add_(1).remainder_(CLASSES), reduction="none")

    adv = PGD(net, targeted=next_in_place)(images, labels, seed=3)
    assert adv.equal(PGD(net, targeted=next_class)(*before, seed=3))
    adv = PGD(net, loss=loss_in_place)(images, labels, seed=3)
    assert adv.equal(PGD(net)(before[0], next_class(*before), seed=3))
    assert images.equal(before[0])
    assert labels.equal(before[1])


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda images, labels: labels.float(), TypeError, "callable `targeted` returned must be an int64"),
        (lambda images, labels: labels.tolist(), TypeError, "callable `targeted` returned must be an int64"),
        (lambda images, labels: labels[1:], ValueError, "callable `targeted` returned must be of shape"),
        (lambda images, labels: labels.to("meta"), ValueError, "callable `targeted` returned must be on"),
        (lambda images, labels: labels + CLASSES, ValueError, "below the model's 5 classes"),
        (lambda images, labels: labels - CLASSES, ValueError, "negative"),
    ],
)
def test_what_is_no_target_is_refused(net, batch, function, error, message):
    with pytest.raises(error, match=message):
        BIM(net, targeted=function)(*batch)
    with pytest.raises(TypeError, match="set_mode_targeted_by_label"):
        BIM(net).set_mode_targeted_by_function(None)


@pytest.mark.parametrize("kth_min", range(1, CLASSES))
def test_least_likely_is_the_kth_smallest_of_the_other_logits(net, batch, kth_min):
    images, labels = batch
    logits = net(images).detach().numpy()
    wanted = [
        sorted((c for c in range(CLASSES) if c != y), key=lambda c, row=row: row[c])[kth_min - 1]
        for row, y in zip(logits, labels.tolist(), strict=True)
    ]
    given = BIM(net, targeted=True)(images, torch.tensor(wanted))
    assert torch.equal(BIM(net, targeted="least_likely", kth_min=kth_min)(images, labels), given)


def test_there_must_be_so_many_classes(net, batch):
    with pytest.raises(ValueError, match="kth_min is 5, of 5 classes"):
        BIM(net, targeted="least_likely", kth_min=CLASSES)(*batch)
    for wrong in (0, 1.5):
        with pytest.raises((TypeError, ValueError), match="kth_min"):
            BIM(net, kth_min=wrong)
        attack = BIM(net)
        with pytest.raises((TypeError, ValueError), match="kth_min"):
            attack.set_mode_targeted_least_likely(wrong)
        assert attack.get_mode() == "default"


# torchattacks' names

SETS = {
    "default": lambda attack, **quiet: attack.set_mode_default(),
    "by_label": lambda attack, **quiet: attack.set_mode_targeted_by_label(**quiet),
    "random": lambda attack, **quiet: attack.set_mode_targeted_random(**quiet),
    "least_likely": lambda attack, **quiet: attack.set_mode_targeted_least_likely(**quiet),
    "second_least_likely": lambda attack, **quiet: attack.set_mode_targeted_least_likely(2, **quiet),
    "by_function": lambda attack, **quiet: attack.set_mode_targeted_by_function(next_class, **quiet),
}
SAME_NAMES = (
    *("set_mode_default", "set_mode_targeted_by_label", "set_mode_targeted_random", "set_mode_targeted_least_likely"),
    *("set_mode_targeted_by_function", "set_normalization_used", "set_model_training_mode", "get_mode", "save"),
)


def printed(call):
    told = io.StringIO()
    with redirect_stdout(told):
        call()
    return told.getvalue()


@pytest.mark.parametrize("name", SAME_NAMES)
def test_they_take_what_torchattacks_take(net, name):
    # torchattacks' decorator hides the arguments of a method.
    theirs = getattr(torchattacks.attack.Attack, name)
    hidden = [cell.cell_contents for cell in theirs.__closure__ or ()]
    theirs, ours = (inspect.signature(f).parameters for f in ((hidden or [theirs])[0], getattr(PGD, name)))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", SETS)
def test_modes_say_what_torchattacks_say(net, name):
    ours, theirs = PGD(net), torchattacks.PGD(net)
    SETS["random"](ours, quiet=True)
    # torchattacks prints "'default.'" and "'targeted(random)'."; fastadv puts the dot last in both.
    told, expected = (printed(lambda attack=attack: SETS[name](attack)) for attack in (ours, theirs))
    assert told == expected.replace(".'", "'.")
    assert ours.get_mode() == theirs.get_mode() == ours.attack_mode
    assert ours.supported_mode == theirs.supported_mode
    assert bool(ours.targeted) == theirs.targeted
    if name != "default":
        assert printed(lambda: SETS[name](ours, quiet=True)) == ""


@pytest.mark.parametrize("attack", ["FGSM", "BIM", "MIFGSM"])
@pytest.mark.parametrize("name", ["default", "by_label", "least_likely", "second_least_likely", "by_function"])
def test_images_are_torchattacks(net, batch, attack, name):
    ours, theirs = (getattr(module, attack)(net) for module in (base_attacks, torchattacks))
    for each in (ours, theirs):
        each.set_mode_targeted_random()  # one after the other
        SETS[name](each)
    torch.testing.assert_close(ours(*batch), theirs(*batch), rtol=0, atol=1e-9)


def test_random_targets_are_other_classes(net, batch):
    images, labels = batch
    attack = FGSM(net)
    attack.set_mode_targeted_random()
    adv = attack(images, labels, seed=5)
    towards = torch.stack([FGSM(net, targeted=True)(images, torch.full_like(labels, c)) for c in range(CLASSES)])
    hit = (towards == adv).flatten(2).all(2)
    assert bool(hit.any(0).all())
    assert not hit.gather(0, labels[None]).any()


def test_where_there_is_no_target_class(net):
    assert TPGD(net).supported_mode == torchattacks.TPGD(net).supported_mode == ["default"]
    for attack in (TPGD(net), torchattacks.TPGD(net), PGD(net, loss="targeted_dlr")):
        for name in SETS.keys() - {"default"}:
            with pytest.raises(ValueError, match=r"(?i)target"):
                SETS[name](attack)
        assert attack.get_mode() == "default"
        attack.set_mode_default()
    for attack in (PMA(net), PGD(net, loss=lambda outputs, labels: -outputs[:, 0])):
        attack.set_mode_targeted_by_label()
        assert attack.targeted is True


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(0.2), nn.Linear(108, CLASSES)
        self.seen = set()

    def forward(self, x):
        self.seen.add((self.norm.training, self.drop.training))
        return self.head(self.drop(self.norm(x)).flatten(1))


@pytest.mark.parametrize("modes", [(m, b, d) for m in (False, True) for b in (False, True) for d in (False, True)])
def test_training_mode_is_torchattacks_where_there_is_one(batch, modes):
    model = Watched().double().eval()
    ours, theirs = BIM(model), torchattacks.BIM(model)
    theirs.set_model_training_mode(*modes)
    theirs(*batch)
    expected = set(model.seen)
    model.eval().seen.clear()  # torchattacks leaves the model in train mode
    if modes[0] and modes != (True, True, False):
        with pytest.raises(ValueError, match="as_is"):
            ours.set_model_training_mode(*modes)
        assert ours.training_mode == "eval"
        return
    ours.set_model_training_mode(*modes)
    ours(*batch)
    assert model.seen == expected


# Saving


@pytest.fixture
def loader():
    images, labels = torch.rand(10, 3, 6, 6, dtype=torch.float64), torch.randint(CLASSES, (10,))
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def saved(attack, loader, path, **options):
    told = printed(lambda: saved.returned.append(attack.save(loader, str(path), **options)))
    return torch.load(path, weights_only=True), saved.returned.pop(), told


saved.returned = []


@pytest.mark.parametrize("save_predictions", [False, True])
@pytest.mark.parametrize("save_clean_inputs", [False, True])
@pytest.mark.parametrize("mode", ["default", "by_label"])
def test_save_writes_what_torchattacks_writes(net, loader, tmp_path, save_predictions, save_clean_inputs, mode):
    options = {"save_predictions": save_predictions, "save_clean_inputs": save_clean_inputs, "return_verbose": True}
    (ours, told, _), (theirs, their_told, _) = (
        saved(attack, loader, tmp_path / f"{i}.pt", **options)
        for i, attack in enumerate((BIM(net), torchattacks.BIM(net)))
        if SETS[mode](attack) is None
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9)
        else:
            assert ours[name] == tensor == "float"
    assert told[0] == pytest.approx(their_told[0])
    assert told[1] == pytest.approx(their_told[1], rel=1e-6, nan_ok=True)
    assert 0 < told[2] < 60


def test_torchattacks_loads_it(net, loader, tmp_path):
    attack = BIM(net.train())  # the model is attacked and evaluated in eval mode even so
    attack.save(loader, tmp_path / "of" / "adv.pt", save_predictions=True, save_clean_inputs=True, save_type="int")
    assert all(module.training for module in net.modules())
    net.eval()
    batches = torchattacks.attack.Attack.load(
        tmp_path / "of" / "adv.pt", batch_size=4, load_predictions=True, load_clean_inputs=True
    )
    for (images, labels), (adv, saved_labels, predictions, clean) in zip(loader, batches, strict=True):
        expected = attack(images, labels)
        torch.testing.assert_close(adv.double(), (expected * 255).round() / 255, rtol=0, atol=1e-7)
        torch.testing.assert_close(clean.double(), (images * 255).round() / 255, rtol=0, atol=1e-7)
        assert torch.equal(saved_labels, labels)
        assert torch.equal(predictions, net(expected).argmax(1))


@pytest.mark.parametrize("save_type", ["float", "int"])
def test_pixels_are_saved_of_normalised_images(net, loader, tmp_path, save_type):
    pixels, labels = map(torch.cat, zip(*loader, strict=True))
    normalised_loader = DataLoader(TensorDataset(normalised(pixels), labels), batch_size=5)
    options = {"save_clean_inputs": True, "save_predictions": True, "return_verbose": True, "save_type": save_type}
    ours, told, _ = saved(BIM(net, **LOADED), normalised_loader, tmp_path / "a.pt", **options)
    plain, expected, _ = saved(BIM(Normalized(net, MEAN, STD)), loader, tmp_path / "b.pt", **options)
    assert ours.keys() == plain.keys()
    for name in ("adv_inputs", "clean_inputs", "labels", "preds"):
        assert ours[name].dtype == plain[name].dtype
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=1e-12 if save_type == "float" else 0)
    assert told[:2] == pytest.approx(expected[:2], nan_ok=True)


def test_save_of_bytes_keeps_them(loader, tmp_path):
    net, codes = Net().eval(), torch.randint(256, (6, 3, 6, 6), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (6,))
    content, returned, told = saved(
        BIM(net), [(codes, labels)], tmp_path / "a.pt", verbose=False, save_clean_inputs=True, save_type="int"
    )
    assert returned is None
    assert told == ""
    assert torch.equal(content["clean_inputs"], codes)
    assert content["adv_inputs"].dtype == torch.uint8
    assert (content["adv_inputs"].int() - codes.int()).abs().max() == 8  # no rounding beyond a budget of whole codes
    returned = BIM(net).save([(codes, labels)], verbose=False, return_verbose=True)
    wrong = net(BIM(net)(codes, labels)).argmax(1) != labels
    assert returned[0] == pytest.approx(100 * (~wrong).double().mean().item())


def test_what_cannot_be_saved_is_refused_first(net, loader, tmp_path, monkeypatch):
    attack = BIM(net)
    monkeypatch.setattr(BIM, "step", lambda *_: pytest.fail("attacked before"))
    for options, error in (
        ({"save_type": "uint8"}, ValueError),
        ({"save_path": tmp_path}, IsADirectoryError),
        ({"data_loader": iter(())}, ValueError),
        ({"data_loader": [(torch.rand(2, 3, 6, 6), torch.rand(2, CLASSES))]}, TypeError),
    ):
        with pytest.raises(error):
            attack.save(**{"data_loader": loader, "save_path": tmp_path / "a.pt", **options})
    with pytest.raises(ValueError, match="clip"):
        BIM(net, clip=None).save(loader, tmp_path / "a.pt", save_type="int")
    assert list(tmp_path.iterdir()) == []
