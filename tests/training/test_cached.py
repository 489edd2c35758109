"""Linear probing on kept features, against a loop by hand that passes every image through the whole model."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from fitted import loaded_batches
from torch import nn

from fastadv.attacks import Normalized
from fastadv.nn.frozen import frozen
from fastadv.training import Trainer

EPS, CLASSES, COUNT, BATCH, EPOCHS, LR = 0.1, 3, 23, 7, 6, 0.05
UPDATES = EPOCHS * math.ceil(COUNT / BATCH)


def images(dtype=torch.float64):
    return torch.rand(COUNT, 3, 8, 8, dtype=dtype), torch.arange(COUNT) % CLASSES


def network(head=None, dtype=torch.float64):
    """A network with batch-norm and dropout, which are in eval mode while the head alone trains."""
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64, CLASSES) if head is None else head)
    model[1].running_mean.normal_()
    return model.to(dtype)


def trained(model, data, **changes):
    """(the records of the epochs, (epoch, rows) of each part of a batch, the number of images in each forward pass)."""
    passed = []
    settings = {"attack": "cached", "method": "linear", "epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "probe": 0}
    settings |= {"optimizer": "sgd", "measure_backbone": False, "progress": False} | changes

    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    with loaded_batches() as order:
        hook = first.register_forward_pre_hook(lambda layer, args: passed.append(len(args[0])) if order else None)
        records = Trainer(model, EPS, **settings).fit(data)
    hook.remove()
    return [record for record in records if "epoch" in record], order, passed


# ---------------------------------------------------------------------- the run by hand


def by_hand(model, data, order, refresh, alpha=EPS, smoothing=0.0, grad_accum_steps=1):
    """The run by hand: every image goes through the model in every update, with its kept perturbation."""
    weight, bias = model[-1].weight, model[-1].bias
    moments, kept, parts = [torch.zeros_like(weight), torch.zeros_like(bias)], {}, iter(order)
    for update in range(UPDATES):
        batch = list(itertools.islice(parts, grad_accum_steps))
        count, gradients = sum(len(rows) for _, rows in batch), [0.0, 0.0]
        for epoch, rows in batch:
            model.eval()
            for i in rows.tolist():
                if epoch == 0 or (i + epoch) % refresh == 0:
                    x, y = data[0][i : i + 1].clone().requires_grad_(), data[1][i]
                    logits = model(x)[0]
                    (gradient,) = torch.autograd.grad(logits.exp().sum().log() - logits[y], x)
                    kept[i] = (data[0][i] + alpha * gradient[0].sign()).clamp(0, 1)
            targets = (1 - smoothing) * F.one_hot(data[1][rows], CLASSES).double() + smoothing / CLASSES
            logits = model(torch.stack([kept[i] for i in rows.tolist()]))
            loss = -(targets * logits.log_softmax(1)).sum() / count
            new = torch.autograd.grad(loss, [weight, bias])
            gradients = [one + other for one, other in zip(gradients, new, strict=True)]
        rate = LR * (1 + math.cos(math.pi * update / UPDATES)) / 2
        with torch.no_grad():
            for parameter, moment, gradient in zip((weight, bias), moments, gradients, strict=True):
                moment.mul_(0.9).add_(gradient)
                parameter.sub_(rate * (gradient + 0.9 * moment))
    assert next(parts, None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refresh": 3, "label_smoothing": 0.2},
        {"refresh": 2, "alpha": 0.07, "grad_accum_steps": 2},
        {"refresh": 99},
        {"refresh": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:steps = 1 of alpha")
def test_a_run_is_the_loop_by_hand(changes):
    data, model = images(), network()
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    records, order, passed = trained(model, data, **changes)
    options = {"alpha": changes.get("alpha", EPS), "grad_accum_steps": changes.get("grad_accum_steps", 1)}
    refresh = changes.get("refresh", 4)
    by_hand(twin, data, order, refresh, smoothing=changes.get("label_smoothing", 0.0), **options)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=1e-10)
    moved = (model[-1].weight - before["5.weight"]).abs().max()
    assert moved > 1e-3
    fresh = [sum(epoch == 0 or (i + epoch) % refresh == 0 for i in range(COUNT)) for epoch in range(EPOCHS)]
    assert [record["fresh"] for record in records] == [count / COUNT for count in fresh]
    assert sum(passed) == 2 * sum(fresh)  # FGSM's pass and the pass for the features


# ---------------------------------------------------------------------- plain FGSM


class Wrapped(nn.Module):
    """Returns its logits as transformers' models do."""

    def __init__(self, model):
        super().__init__()
        self.body, self.fastadv_head = model, "body.5"

    def forward(self, x):
        return {"logits": self.body(x), "features": x.flatten(1)}


def moody_head():
    """A head that draws random numbers and has statistics that change in train mode."""
    return nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, CLASSES))


def compiled():
    """A compiled model that has run before, without a hook."""
    model = torch.compile(network(dtype=torch.float32), backend="eager")
    with torch.no_grad(), frozen(model):
        model(torch.rand(2, 3, 8, 8))
    return model


KINDS = {
    "plain": lambda: network(dtype=torch.float32),
    "normalized": lambda: Normalized(network(dtype=torch.float32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
    "a head with modes": lambda: network(moody_head(), torch.float32),
    "outputs with logits": lambda: Wrapped(network(dtype=torch.float32)),
    "compiled": compiled,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accum_steps": 2, "ema_decay": 0.9},
        {"channels_last": True, "max_grad_norm": 0.1},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_a_fresh_attack_for_all_is_fgsm_to_the_bit(kind, changes):
    data, model = images(torch.float32), KINDS[kind]()
    if kind == "a head with modes":
        changes = changes | {"head": "5"}
    twin = copy.deepcopy(model)
    kept, _, _ = trained(model, data, refresh=1, **changes)
    plain, _, _ = trained(twin, data, attack="fgsm", **changes)
    for (name, one), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert [record["loss"] for record in kept] == [record["loss"] for record in plain]


def test_features_are_kept_in_the_precision_in_which_they_enter_the_head(tmp_path):
    for precision, size in (("no", 4), ("bf16", 2)):
        trained(network(dtype=torch.float32), images(torch.float32), folder=tmp_path / precision, precision=precision)
        with open(tmp_path / precision / "memory" / "features.0", "rb") as file:
            assert json.loads(file.readline())["bytes"] == COUNT * 64 * size


def test_a_hook_of_the_heads_own_acts_once():
    def scaled(module, args):
        return (3 * args[0],)

    data, model = images(torch.float32), network(dtype=torch.float32)
    model[-1].register_forward_pre_hook(scaled)
    twin = copy.deepcopy(model)
    trained(model, data, refresh=1)
    trained(twin, data, attack="fgsm")
    assert torch.equal(model[-1].weight, twin[-1].weight)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({"method": method}, f"with the method {method} that changes in each update")
            for method in ("full", "bias", "lora")
        ),
        ({"augment": True}, "augment is not for cached: a picture that is cropped"),
        ({"clean_weight": 0.5}, "clean_weight is not for cached: "),
        ({"compile": True}, "compile is not for cached: "),
        ({"eps_schedule": "linear"}, "eps_schedule is not for cached: "),
        ({"price": 2.5}, "the attack cached has no setting 'price'"),
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
    ],
)
def test_settings_that_it_cannot_heed_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Trainer(network(), EPS, **{"attack": "cached", "method": "linear"} | changes)


class Body(nn.Module):
    """The base of models that use their head in different ways; `fastadv_head` is 'head'."""

    fastadv_head = "head"

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, CLASSES)
        nn.init.zeros_(self.head.weight)  # the logits do not show what follows the head
        nn.init.zeros_(self.head.bias)

    def features(self, x):
        return self.conv(x).tanh().flatten(1)


class Tempered(Body):
    def forward(self, x):
        return self.head(self.features(x)) / 2


class Rectified(Body):
    def forward(self, x):
        return self.head(self.features(x)).relu()


class Permuted(Body):
    def forward(self, x):
        return self.head(self.features(x)).flip(1)


class Flipped(Body):
    def forward(self, x):
        return (self.head(self.features(x)) + self.head(self.features(x.flip(3)))) / 2


class PerToken(Body):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(2)).mean(1)


class TokensFirst(Body):
    """The head gets a row for each token, and each row has all images."""

    def __init__(self):
        super().__init__()
        self.head = Pooling(16, CLASSES)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(2).transpose(0, 1))


class Pooling(nn.Linear):
    def forward(self, tokens):
        return super().forward(tokens.mean(0))


class Scaling(nn.Linear):
    def forward(self, features, scale=1.0):
        return super().forward(scale * features)


class Told(Body):
    """The head gets more arguments than the features."""

    def __init__(self):
        super().__init__()
        self.head = Scaling(64, CLASSES)

    def forward(self, x):
        return self.head(self.features(x), scale=2.0)


class ByName(Body):
    def forward(self, x):
        return self.head(input=self.features(x))


class Aside(Body):
    """The logits are not the head's output."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.other(self.features(x))


class Drawing(Body):
    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.5, training=True))


class Mixing(Body):
    def forward(self, x):
        features = self.features(x)
        return self.head(features - features.mean(0))


class Tied(Body):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(64, CLASSES, bias=False)
        self.head = nn.Linear(64, CLASSES)
        self.before.weight = self.head.weight

    def forward(self, x):
        features = self.features(x)
        return self.head(features + self.before(features) @ self.before.weight)


class TiedMemory(Tied):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(64, CLASSES, bias=False)
        self.before.weight.data = self.head.weight.data


ALONE = "cached learns from the head head alone. This must be called once, with one row"
OWN = "cached keeps what enters the head head, and that is not the image's alone"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *(
            (kind, ALONE)
            for kind in (Tempered, Rectified, Permuted, Flipped, PerToken, TokensFirst, Told, ByName, Aside)
        ),
        *((kind, OWN) for kind in (Drawing, Mixing)),
        *((kind, r"before\.weight is in the head head too and trains") for kind in (Tied, TiedMemory)),
    ],
)
@pytest.mark.filterwarnings("ignore:the gradient is exactly zero")
def test_a_model_whose_head_is_not_all_that_follows_is_refused_before_anything_is_changed(kind, words, tmp_path):
    model, data, folder = kind(), images(torch.float32), tmp_path / "run"
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=words):
        trained(model, data, folder=folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not folder.exists() or not list(folder.iterdir())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert not model.head._forward_hooks
    assert not model.head._forward_pre_hooks
    if kind is not Aside:
        trained(model, data, attack="fgsm")  # FGSM runs on this model
