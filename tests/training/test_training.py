"""The trainer: what it learns, what it does not change, and what it writes."""

import copy
import json

import pytest
import torch
from torch import nn

from fastadv import data, models, to_float
from fastadv.attacks import FGSM, PGD
from fastadv.evaluation import robust_accuracy
from fastadv.models import networks
from fastadv.training import Trainer
from fastadv.training.methods import METHODS
from fastadv.training.schedule import lr_factor

EPS = 16 / 255


def colours(count, seed, side=8):
    """Noisy uint8 images (count, 3, side, side); the class is the channel that is bright."""
    labels = torch.arange(count) % 3
    bright = nn.functional.one_hot(labels, 3)[:, :, None, None]
    noise = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return (255 * (0.4 * bright + 0.6 * noise)).to(torch.uint8), labels


TRAIN, TEST = colours(96, 1), colours(33, 2)


def conv(seed=0):
    torch.manual_seed(seed)
    return networks.conv((3, 32, 32), 3)


def trainer(model, **changes):
    settings = {"epochs": 6, "batch_size": 16, "lr": 1e-2, "probe": 0, "progress": False}
    return Trainer(model, EPS, **settings | changes)


def trained_on_digits(attack):
    """The final record of a perceptron, at a budget against which training on clean images does not help."""
    digits, eps = data.load("digits", classes=range(5)), 0.15
    torch.manual_seed(0)
    model = networks.mlp(digits.shape, 5)
    attack = FGSM(model, eps) if attack == "object" else attack
    settings = {"epochs": 6, "batch_size": 64, "lr": 2e-3, "probe": 0, "eval_every": 0, "progress": False}
    return Trainer(model, eps, attack=attack, **settings).fit(digits.train, digits.test)[-1]


@pytest.mark.parametrize("attack", ["fgsm", "fgsm-rs", "nfgsm", "pgd", "object"])
def test_every_attack_makes_robust(attack):
    final = trained_on_digits(attack)
    assert final["robust_accuracy"] > 0.6
    assert final["clean_accuracy"] > 0.9


def test_without_an_attack_a_network_is_not_robust():
    final = trained_on_digits(None)
    assert final["robust_accuracy"] < 0.45
    assert final["clean_accuracy"] > 0.95


def test_linear_changes_the_bits_of_the_head_only():
    model = conv().train()
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    trainer(model, method="linear", attack="fgsm-rs", epochs=1).fit(TRAIN, TEST)
    head = models.find_head(model)[0]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{head}.weight", f"{head}.bias"}
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_linear_runs_no_backward_through_the_backbone_in_the_update():
    model = conv()
    recorded = []

    def hook(module, args, output):
        if model[-1].weight.requires_grad:  # in the update, not in an attack
            recorded.append(args[0].requires_grad or output.requires_grad)

    model[6].register_forward_hook(hook)
    trainer(model, method="linear", attack=None, epochs=1).fit(TRAIN, TEST)
    assert recorded
    assert not any(recorded)


def test_the_named_head_trains():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    trainer(model, method="linear", head="1", epochs=1).fit(TRAIN, TEST)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"1.weight", "1.bias"}


def test_full_trains_every_tensor():
    model = conv()
    before = copy.deepcopy(model.state_dict())
    trainer(model, epochs=1).fit(TRAIN, TEST)
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_step_of_full_training_is_the_textbook_one(optimizer):
    """Attack, then one optimiser step on the mean cross-entropy, written out by hand."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    reference = copy.deepcopy(model)
    trainer(model, optimizer=optimizer, epochs=1, batch_size=96, attack="fgsm").fit(TRAIN, TEST)
    images = to_float(TRAIN[0]).requires_grad_()
    grad = torch.autograd.grad(nn.functional.cross_entropy(reference(images), TRAIN[1]), images)[0]
    adv = (images + EPS * grad.sign()).clamp(0, 1).detach()
    nn.functional.cross_entropy(reference(adv), TRAIN[1]).backward()
    by_hand = {"adamw": torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0)}
    by_hand["sgd"] = torch.optim.SGD(reference.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    by_hand[optimizer].step()
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_seed_reaches_what_an_attack_draws():
    def draws(seed):
        drawn = []

        def attack(x, y):
            drawn.append(torch.rand(()).item())
            return x

        trainer(conv(), attack=attack, epochs=1, seed=seed).fit(TRAIN, TEST)
        return drawn

    assert draws(1) == draws(1)
    assert not set(draws(1)) & set(draws(2))


def test_same_seed_same_bits_and_the_callers_generator_untouched():
    def weights(seed):
        model = conv()  # dropout, a random start, a shuffled order
        trainer(model, attack="fgsm-rs", epochs=1, seed=seed).fit(TRAIN, TEST)
        return torch.cat([value.flatten().double() for value in model.state_dict().values()])

    first = weights(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    model = copy.deepcopy(conv())
    torch.set_rng_state(state)
    trainer(model, attack="fgsm-rs", epochs=1, seed=1).fit(TRAIN, TEST)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_log_agrees_with_a_new_evaluation(tmp_path):
    model = conv()
    settings = {"epochs": 3, "eval_every": 2, "seed": 5, "folder": tmp_path}
    records = trainer(model, **settings).fit(TRAIN, TEST, TEST)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == records
    assert lines.pop(0) == {"stage": 0, "method": "full", "trainable": 23891, "total": 23891}
    assert [line.get("epoch") for line in lines] == [0, 1, 2, None]
    assert ["robust_accuracy" in line for line in lines] == [False, True, True, True]
    for line in lines[:-1]:
        assert {"loss", "train_accuracy", "lr", "train_s"} <= line.keys()
    again = robust_accuracy(model, TEST, PGD(model, EPS, EPS / 4, 10), seed=5)
    assert again == {key: lines[-1][key] for key in again}
    model.eval()
    right = (model(to_float(TEST[0])).argmax(dim=1) == TEST[1]).float().mean()
    assert lines[-1]["clean_accuracy"] == pytest.approx(right.item())


def test_learning_rate_warms_up_in_steps_and_falls_along_a_cosine():
    factors = [lr_factor(step, 4, 12) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors == factors[:4] + sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.1
    assert lr_factor(0, 0, 1) == 1.0
    records = trainer(conv(), attack=None, epochs=2, warmup=6).fit(TRAIN, TEST)  # 6 steps an epoch
    assert records[1]["lr"] == pytest.approx(1e-2)
    assert records[2]["lr"] == pytest.approx(1e-2 * lr_factor(11, 6, 12))


def test_a_last_batch_of_one_image_does_not_reach_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    trainer(model, epochs=1).fit((TRAIN[0][:17], TRAIN[1][:17]), TEST)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model[1].weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.warns(UserWarning, match="losses were not finite"),
        pytest.raises(FloatingPointError, match="the loss is nan at epoch 1, batch 1"),
    ):
        trainer(model).fit(TRAIN, TEST)
    assert torch.equal(model[1].bias, before["1.bias"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adaptor"}, f"unknown method 'adaptor'; there are {', '.join(METHODS)}"),
        ({"attack": "cw"}, "unknown attack 'cw'; there are fgsm, .*, free, .*stale"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; there are adamw, sgd"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be finite, got nan"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(conv(), **changes)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        trainer(conv().requires_grad_(False)).fit(TRAIN, TEST)
    with pytest.raises(ValueError, match="no images to train on"):
        trainer(conv()).fit((TRAIN[0][:0], TRAIN[1][:0]), TEST)


def test_robust_accuracy_counts_what_a_hand_counts():
    def model(x):  # class 1 where the pixel is above one half
        return torch.stack((0.5 - x[:, 0], x[:, 0] - 0.5), dim=1)

    images = torch.tensor([[0.9], [0.55], [0.1], [0.45], [0.8]])
    labels = torch.tensor([1, 1, 0, 0, 0])  # the last one is wrong already
    attack = FGSM(model, 0.1)
    expected = {"clean_accuracy": 0.8, "robust_accuracy": 0.4}
    assert robust_accuracy(model, (images, labels), attack) == expected
    assert robust_accuracy(model, (images, labels), attack, batch_size=2) == expected
    assert robust_accuracy(model, [(images[:3], labels[:3]), (images[3:], labels[3:])], attack) == expected
    helpful = robust_accuracy(model, (images, labels), lambda x, y: y[:, None].float())
    assert helpful == {"clean_accuracy": 0.8, "robust_accuracy": 0.8}
    with pytest.raises(ValueError, match="no images"):
        robust_accuracy(model, [], attack)
