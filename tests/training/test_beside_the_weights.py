"""What training changes, leaves out or cannot do beside its weights is said, or refused before it begins."""

import copy
import math
import random
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from fitted import changed, colours, copied, same
from torch import nn

from fastadv.attacks import FGSM
from fastadv.evaluation.identity import fingerprint
from fastadv.training import Trainer, TrainStep
from fastadv.training import settings as of_runs

EPS = 8 / 255
OPTIONS = {"batch_size": 20, "progress": False, "probe": 0, "measure_backbone": False, "device": "cpu"}


def layers(classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, classes)
    )


class Taught(nn.Module):
    """A student and a teacher, which is the moving average of its weights, and answers in eval mode."""

    def __init__(self, write, as_buffers=False):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.write = layers(), write
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if as_buffers:
            for module in self.teacher.modules():
                for name, parameter in list(module._parameters.items()):
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())

    def forward(self, x):
        if not self.training:
            return self.teacher(x)
        held = dict(self.teacher.named_parameters()) | dict(self.teacher.named_buffers())
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                self.write(held[name], parameter)
        return self.student(x)


def lerped(old, new):
    old.lerp_(new, 0.2)


def lerped_data(old, new):
    old.data.lerp_(new, 0.2)


def replaced_data(old, new):
    old.data = 0.8 * old.data + 0.2 * new.data


@contextmanager
def cut_after(count):
    """Ctrl-C after so many steps."""
    taken, left = TrainStep.apply, [count]

    def applied(step):
        taken(step)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "apply", applied)
        with pytest.raises(KeyboardInterrupt):
            yield


def words_of(train):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return " ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("write", [lerped, lerped_data, replaced_data])
@pytest.mark.parametrize("kept", [False, True])
def test_a_teacher_that_follows_is_told(write, kept, tmp_path):
    given = {"folder": tmp_path} if kept else {}
    words = words_of(lambda: Trainer(Taught(write), EPS, epochs=1, **given, **OPTIONS).fit(colours(60, 1)))
    assert "a step changed teacher.0.weight, which does not train and is no buffer" in words
    assert words.count("a step changed") == 1


def test_a_teacher_of_buffers_is_the_best_epoch_s_and_is_resumed(tmp_path):
    def train(model, epochs, **given):
        trainer = Trainer(model, EPS, epochs=epochs, lr=0.02, **given, **OPTIONS)
        return trainer.fit(colours(60, 1), colours(60, 2))

    whole, cut = (Taught(lerped, as_buffers=True) for _ in range(2))
    words = words_of(lambda: train(whole, 4))
    assert "a step changed" not in words
    with cut_after(7):
        train(cut, 4, folder=tmp_path)
    records = train(resumed := Taught(lerped, as_buffers=True), 4, folder=tmp_path, resume=True)
    assert records[-1]["epochs"] == 4
    assert same(copied(resumed), copied(whole))


class Keeping(nn.Module):
    """Keeps a number in an attribute of a kind, and counts in it."""

    def __init__(self, held, count):
        super().__init__()
        self.layers, self.held, self.count = layers(), held, count

    def forward(self, x):
        if self.training:
            self.count(self.held)
        return self.layers(x)


class Bag:
    step = 0


def stepped(held):
    held.step += 1


def written(held):
    held["steps"] += 1


def replaced(held):
    held[0] = held[0] + 1


def drew(held):
    held.random()


KEPT = {
    "a dict's entry": (lambda: {"steps": 0}, written),
    "a list's entry": (lambda: [0], replaced),
    "an array": (lambda: torch.zeros(1).numpy(), replaced),
    "an object": (Bag, stepped),
    "a generator": (lambda: random.Random(1), drew),
}


@pytest.mark.parametrize(("held", "count"), KEPT.values(), ids=KEPT)
def test_what_an_attribute_holds_is_looked_into(held, count, tmp_path):
    options = {"epochs": 1, **OPTIONS}
    words = words_of(lambda: Trainer(Keeping(held(), count), EPS, folder=tmp_path / "a", **options).fit(colours(40, 1)))
    assert "a step changed held of Keeping of the model" in words
    still = Keeping(held(), lambda held: None)
    still.also = [still.layers[0], still.layers[0].weight]  # these train, and are saved
    assert "a step changed" not in words_of(
        lambda: Trainer(still, EPS, folder=tmp_path / "b", **options).fit(colours(40, 1))
    )


class Growing(nn.Module):
    """A buffer gets its shape in the first pass, another grows in each update."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = layers()
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("queue", torch.zeros(0, 3))

    def forward(self, x):
        logits = self.layers(x)
        if self.training:
            if len(self.mean) == 0:
                self.mean = logits.detach().mean(0)
            else:
                self.mean.lerp_(logits.detach().mean(0), 0.1)
            self.queue = torch.cat((self.queue, logits.detach()[:1]))
        return logits - 0.01 * (self.mean if len(self.mean) else 0)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_buffer_that_grew_goes_on_where_it_was(decay, tmp_path):
    whole, cut, resumed = Growing(), Growing(), Growing()
    parts, options = (colours(60, 1), colours(30, 2)), {**OPTIONS, "epochs": 3, "ema_decay": decay}
    Trainer(whole, EPS, **options).fit(*parts)
    assert 1 <= len(whole.queue) <= 9
    with cut_after(5):
        Trainer(cut, EPS, folder=tmp_path, checkpoint_s=0, **options).fit(*parts)
    with pytest.raises(ValueError, match="To go on give the model as it was before training, made anew"):
        Trainer(cut, EPS, folder=tmp_path, resume=True, **options).fit(*parts)
    Trainer(resumed, EPS, folder=tmp_path, checkpoint_s=0, resume=True, **options).fit(*parts)
    assert same(copied(resumed), copied(whole))


def test_a_fingerprint_leaves_memory_as_it_was():
    small, large = torch.zeros(0, 3), torch.zeros(3, 2**19)
    fingerprint({"small": small, "large": large})
    small.resize_(8)
    large.resize_(4, 2**20)
    assert len(large) == 4


class Listed(nn.Module):
    def __init__(self, trains):
        super().__init__()
        self.hidden, self.head = [layers(6).requires_grad_(trains)], nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.hidden[0](x))


def test_layers_that_are_not_registered_are_refused_unless_they_are_to_stay(tmp_path):
    model = Listed(True)
    with pytest.raises(
        ValueError, match=r"uses a Sequential that is not registered in it, such as one in a plain list"
    ):
        Trainer(model, EPS, epochs=1, folder=tmp_path / "run", **OPTIONS).fit(colours(40, 1))
    assert not (tmp_path / "run").exists()
    Trainer(Listed(False), EPS, epochs=1, **OPTIONS).fit(colours(40, 1))


def test_a_method_that_the_model_does_not_take_is_refused_before_the_stage_in_front_of_it():
    for wrong, words in (
        ({"method": "prompt"}, "plain vision transformers"),
        ({"method": "lora", "lora_targets": ["nowhere"]}, "nowhere"),
    ):
        model = layers()
        before = copied(model)
        with pytest.raises(ValueError, match=words):
            Trainer(model, EPS, lp_ft=1, epochs=1, **wrong, **OPTIONS).fit(colours(40, 1))
        assert not changed(model, before)
    with pytest.raises(ValueError, match="lora_alpha"):
        Trainer(layers(), EPS, method="lora", lora_alpha=0, **OPTIONS)


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-2), ("linear", 1e-1), ("bias", 3e-2)])
def test_sgd_has_rates_of_its_own(method, rate):
    """Ten times AdamW's, whose steps have the length of the rate whatever the gradient's."""
    model = layers()
    same_rate = copy.deepcopy(model)
    for each, given in ((model, {}), (same_rate, {"lr": rate})):
        Trainer(each, EPS, method=method, optimizer="sgd", epochs=2, **given, **OPTIONS).fit(colours(60, 1))
    assert same(copied(model), copied(same_rate))
    assert of_runs.Settings(method=method).lr == pytest.approx(rate / 10)
    assert of_runs.Settings(method="full", lp_ft=2, optimizer="sgd").stages[0].lr == pytest.approx(0.1)


class Beyond:
    eps = EPS

    def __call__(self, images, labels):
        return (images + 0.3).clamp(0, 1)


def test_an_attack_of_the_evaluations_that_leaves_its_budget_is_refused_before_training():
    model = layers()
    before = copied(model)
    with pytest.raises(ValueError, match="no weights can be judged by it"):
        Trainer(model, EPS, epochs=1, eval_attack=Beyond(), **OPTIONS).fit(colours(40, 1), None, colours(20, 2))
    assert not changed(model, before)


class Dropping(nn.Module):
    """Drops by a function, in train mode alone; no module shows that."""

    def __init__(self, share):
        super().__init__()
        self.layers, self.share = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), share

    def forward(self, x):
        return self.layers(F.dropout(x, self.share, self.training))


def of_instances(running):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=running), nn.Flatten(), nn.Linear(288, 3)
    )


@pytest.mark.parametrize(
    ("made", "looked"),
    [
        (lambda: Dropping(0.0), 20),
        (lambda: Dropping(0.5), 0),
        (lambda: of_instances(False), 20),
        (lambda: of_instances(True), 0),
    ],
    ids=["a function that drops nothing", "a function's dropout", "instances", "running statistics of instances"],
)
def test_losses_in_two_modes_are_not_compared(made, looked):
    """The abnormal share compares the loss at the attack's start, in eval mode, with the update's."""
    model = made().train()
    images, labels = colours(20, 1)
    before = copied(model)
    state = torch.random.get_rng_state()
    step = TrainStep(model, FGSM(model, EPS, alpha=1.25 * EPS, noise=EPS), torch.optim.SGD(model.parameters(), 0.1))
    found = step.gradients(images, labels, torch.arange(20))
    assert found[3] == looked
    assert all(math.isfinite(value) for value in found.tolist())
    assert changed(model, before) <= {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    if looked:
        assert torch.equal(torch.random.get_rng_state(), state)


def test_other_versions_are_told_where_a_run_goes_on(tmp_path, monkeypatch):
    parts = colours(40, 1)
    torch.manual_seed(0)
    model = layers()
    first = copy.deepcopy(model)
    with cut_after(1):
        Trainer(model, EPS, epochs=1, folder=tmp_path, checkpoint_s=0, **OPTIONS).fit(parts)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.warns(UserWarning, match=r"'torch': '2\..* goes on with .*'torch': '9\.9\.9'"):
        Trainer(first, EPS, epochs=1, folder=tmp_path, resume=True, **OPTIONS).fit(parts)
