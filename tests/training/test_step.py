"""One step of adversarial training against the same step by hand."""

import copy
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchattacks
import transformers
from accelerate import Accelerator, state
from dispatched import NoReads
from families import logits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastadv import random_init
from fastadv.attacks import FGSM, NFGSM, PGD, Normalized, create_attack
from fastadv.training.fast import fast_method
from fastadv.training.foreign import as_attack
from fastadv.training.methods import METHODS, trainable
from fastadv.training.monitor import Monitor
from fastadv.training.step import TrainStep

EPS, LR, CLASSES = 0.1, 0.5, 4
FOLLOWING = ("gradalign", "liet", "free")  # these reach for the images' gradient


def network(dtype=torch.float64):
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 8), nn.SiLU(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers).to(dtype)


def batch(count=9, dtype=torch.float64):
    return torch.rand(count, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (count,))


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)


def cross_entropy(logits, labels, smoothing=0.0):
    targets = (1 - smoothing) * F.one_hot(labels, CLASSES).to(logits.dtype) + smoothing / CLASSES
    return -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


def fgsm_by_hand(model, images, labels):
    images = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(model(images), labels).sum(), images)
    return (images + EPS * grad.sign()).clamp(0, 1).detach()


def learnt_by_hand(model, x_adv, images, labels, clean_weight=0.0, smoothing=0.0, max_grad_norm=None):
    """(loss, weights) after a step of plain SGD on a mixture of adversarial and clean images."""
    on_adv, on_clean = (cross_entropy(model(x), labels, smoothing).mean() for x in (x_adv, images))
    loss = (1 - clean_weight) * on_adv + clean_weight * on_clean
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
    return loss.item(), [(p - LR * factor * grad).detach() for p, grad in zip(parameters, grads, strict=True)]


def taken(step, images, labels, parts=None, seeds=None):
    """Take the step on a batch that is cut into `parts`; returns the sum of the results of `gradients`."""
    sizes = parts or [len(labels)]
    cut = zip(images.split(sizes), labels.split(sizes), strict=True)
    results = [
        step.gradients(x, y, seeds, scale=1 / len(labels), more=i + 1 < len(sizes)) for i, (x, y) in enumerate(cut)
    ]
    step.apply()
    return sum(results)


def assert_weights(model, expected, **tolerance):
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected, **tolerance)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parts", [[9], [5, 4], [4, 4, 1]], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clean_weight", [0.0, 0.3, 1.0])
def test_a_step_is_the_textbook_one_in_however_many_parts(clean_weight, smoothing, parts):
    model, (images, labels) = network(), batch()
    x_adv = fgsm_by_hand(model, images, labels)
    loss, weights = learnt_by_hand(model, x_adv, images, labels, clean_weight, smoothing)
    right = (model(x_adv).argmax(1) == labels).sum()
    step = TrainStep(model, FGSM(model, EPS), sgd(model), clean_weight=clean_weight, label_smoothing=smoothing)
    result = taken(step, images, labels, parts)
    assert result.dtype == torch.float64
    assert result.tolist() == pytest.approx([loss, right.item(), 0, 0], rel=1e-12)
    assert_weights(model, weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_max_grad_norm_bounds_the_norm_of_the_whole_gradient(share):
    model, (images, labels) = network(), batch()
    x_adv = fgsm_by_hand(model, images, labels)
    grads = torch.autograd.grad(cross_entropy(model(x_adv), labels).mean(), list(model.parameters()))
    bound = share * torch.cat([grad.flatten() for grad in grads]).norm().item()
    _, weights = learnt_by_hand(model, x_adv, images, labels, max_grad_norm=bound)
    taken(TrainStep(model, FGSM(model, EPS), sgd(model), max_grad_norm=bound), images, labels, [5, 4])
    assert_weights(model, weights, rtol=1e-5, atol=1e-5)  # PyTorch adds 1e-6 to the norm


def test_without_a_scale_the_loss_is_a_mean():
    model, (images, labels) = network(), batch(5)
    step = TrainStep(model, None, sgd(model))
    expected = cross_entropy(model(images), labels).mean().item()
    assert step.gradients(images, labels)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_float32_and_uint8_images(dtype):
    model, (images, labels) = network(torch.float32), batch(dtype=torch.float32)
    images = (255 * images).to(torch.uint8) if dtype == torch.uint8 else images
    pixels = (images.double() / 255).float() if dtype == torch.uint8 else images
    loss, weights = learnt_by_hand(model, fgsm_by_hand(model, pixels, labels), pixels, labels, 0.3)
    result = taken(TrainStep(model, FGSM(model, EPS), sgd(model), clean_weight=0.3), images, labels)
    assert result[0].item() == pytest.approx(loss, rel=1e-5)
    assert_weights(model, weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_callable_gets_float_images_and_labels_and_nothing_else(dtype):
    model, (images, labels) = network(torch.float32), batch(dtype=torch.float32)
    images = (255 * images).to(torch.uint8) if dtype == torch.uint8 else images
    pixels = (images.double() / 255).float() if dtype == torch.uint8 else images
    calls = []

    def attack(*args, **keywords):
        calls.append((args, keywords))
        return 1 - args[0]

    loss, weights = learnt_by_hand(model, 1 - pixels, pixels, labels)
    result = taken(TrainStep(model, attack, sgd(model)), images, labels, seeds=torch.arange(len(labels)))
    (((x, y), keywords),) = calls
    torch.testing.assert_close(x, pixels, rtol=0, atol=1e-7)
    assert y is labels or torch.equal(y, labels)
    assert keywords == {}
    assert result[0].item() == pytest.approx(loss, rel=1e-5)
    assert_weights(model, weights, rtol=1e-4, atol=1e-6)


def test_a_foreign_attack_leaves_nothing_in_the_parameters_or_the_buffers():
    """The attack calls backward() in train mode."""

    def attack(x, y):
        x = x.clone().requires_grad_()
        cross_entropy(model(x), y).sum().backward()
        return (x + EPS * x.grad.sign()).clamp(0, 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), *network().children()).double().train()
    images, labels = batch()
    alone = copy.deepcopy(model)
    x_adv = fgsm_by_hand(copy.deepcopy(model), images, labels)
    x_adv = torch.where((x_adv - images).abs() > 0, images + EPS * (x_adv - images).sign(), x_adv)
    cross_entropy(alone(attack(images, labels).detach()), labels).mean().backward()
    model.zero_grad()
    model.load_state_dict(alone.state_dict())
    for name, buffer in model.named_buffers():
        buffer.copy_(dict(nn.BatchNorm2d(3).double().named_buffers())[name.partition(".")[2]])
    TrainStep(model, attack, sgd(model)).gradients(images, labels)
    for (name, got), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert model[0].num_batches_tracked == 1


def test_without_an_attack_it_is_standard_training():
    model, (images, labels) = network(), batch()
    loss, weights = learnt_by_hand(model, images, images, labels)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(None))
    result = taken(TrainStep(model, None, sgd(model)), images, labels)
    assert len(calls) == 1
    assert result[0].item() == pytest.approx(loss, rel=1e-12)
    assert_weights(model, weights, rtol=1e-12, atol=1e-14)


class Wrapped(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


OUTPUTS = {
    "object": lambda logits: SimpleNamespace(loss=None, logits=logits),
    "ModelOutput": lambda logits: transformers.modeling_outputs.ImageClassifierOutput(logits=logits),
    "dict": lambda logits: {"features": logits[:, :1], "logits": logits},
    "tuple": lambda logits: (logits, logits.sum()),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_found_in_other_outputs(kind):
    model, (images, labels) = network(), batch()
    _, weights = learnt_by_hand(model, fgsm_by_hand(model, images, labels), images, labels, 0.3)
    wrapped = Wrapped(model, OUTPUTS[kind])
    taken(TrainStep(wrapped, FGSM(wrapped, EPS), sgd(model), clean_weight=0.3), images, labels, [5, 4])
    assert_weights(model, weights, rtol=1e-12, atol=1e-14)


def test_frozen_weights_get_no_gradient_and_the_others_their_own():
    model, (images, labels) = network(), batch()
    _, weights = learnt_by_hand(model, fgsm_by_hand(model, images, labels), images, labels)
    frozen = [p for module in model[:4] for p in module.parameters()]
    before = [p.detach().clone() for p in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    step = TrainStep(model, FGSM(model, EPS), sgd(model))
    step.gradients(images, labels)
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 2
    step.apply()
    assert_weights(model, [*before, *weights[4:]], rtol=1e-12, atol=1e-14)


def test_bf16_is_used_in_attack_and_update_and_the_loss_is_in_float32():
    model, (images, labels) = network(torch.float32), batch(dtype=torch.float32)
    seen = []
    model.register_forward_hook(lambda module, _, out: seen.append((model[0].weight.requires_grad, out.detach())))
    step = TrainStep(model, FGSM(model, EPS, autocast=torch.bfloat16), sgd(model), autocast=torch.bfloat16)
    result = step.gradients(images, labels)
    assert [trains for trains, _ in seen] == [False, True]
    assert {out.dtype for _, out in seen} == {torch.bfloat16}
    loss = cross_entropy(seen[1][1].double(), labels).mean().item()
    assert result[0].item() == pytest.approx(loss, rel=1e-6)  # bfloat16 would round to steps of 4e-3
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    # The gradient is the float32 gradient up to bfloat16's rounding.
    in_float32 = copy.deepcopy(model).requires_grad_()
    in_float32.zero_grad()
    cross_entropy(in_float32(fgsm_by_hand(in_float32, images, labels)), labels).mean().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, in_float32))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.98


# ---------------------------------------------------------------------- what a step costs


def plain_conv():
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.SiLU(),
        nn.Conv2d(8, 16, 1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.SiLU(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=16, patch_size=8, attn_implementation="eager", **sizes)
    config.num_labels = CLASSES
    return transformers.ViTForImageClassification(config)


NETWORKS = {"conv": plain_conv, "vit": vit}
COSTLY = torch.rand(4, 3, 16, 16), torch.arange(4) % CLASSES


class Flops(TorchDispatchMode):
    """Sums PyTorch's FLOP formulas. Its own FlopCounterMode refuses a gradient with respect to the images."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


class Passes:
    """The FLOPs of a forward pass, of a backward pass to the images, and of a backward pass to what trains."""

    def __init__(self, model):
        images, labels = COSTLY
        with Flops() as forward, torch.no_grad():
            model(images)
        self.forward = forward.total
        loss = F.cross_entropy(logits(model(images)), labels)
        with Flops() as update:
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        self.update = update.total
        trains = [p for p in model.parameters() if p.requires_grad]
        for parameter in trains:
            parameter.requires_grad_(False)
        leaf = images.clone().requires_grad_()
        loss = F.cross_entropy(logits(model(leaf)), labels)
        with Flops() as to_images:
            torch.autograd.grad(loss, leaf)
        self.to_images = to_images.total
        for parameter in trains:
            parameter.requires_grad_(True)


ELSEWHERE = ("adapter", "ia3", "prompt", "norm")  # a plain chain of convolutions has nothing for them
TRAINED = [(kind, method) for kind in NETWORKS for method in METHODS if kind == "vit" or method not in ELSEWHERE]


@pytest.mark.parametrize("attack", ["fgsm", "fgsm-rs", "nfgsm", "pgd"])
@pytest.mark.parametrize(("kind", "method"), TRAINED)
def test_a_step_costs_the_attack_s_passes_and_one_of_each_kind(kind, method, attack):
    """With LoRA the attack's passes are those without its factors, which are merged once: rank products a weight."""
    model, (images, labels) = NETWORKS[kind](), COSTLY
    attacked = Passes(model)
    with trainable(model, method, rank=2, example=images):
        passes = Passes(model)
        weights = [m.base_layer.weight for m in model.modules() if method == "lora" and hasattr(m, "base_layer")]
        attacked = attacked if method == "lora" else passes
        step = TrainStep(model, create_attack(attack, model, EPS), sgd(model))
        step.gradients(images, labels)  # the first one looks once whether the model's mode matters
        with Flops() as counter:
            step.gradients(images, labels, torch.arange(len(labels)))
            step.apply()
    repeats = 7 if attack == "pgd" else 1
    merged = sum(2 * 2 * weight.numel() for weight in weights)
    expected = merged + repeats * (attacked.forward + attacked.to_images) + passes.forward + passes.update
    assert counter.total == expected


def convolution(channels, out, kernel, pixels):
    return 2 * len(COSTLY[1]) * channels * kernel**2 * out * pixels


HEAD = {"conv": 2 * len(COSTLY[1]) * 16 * CLASSES, "vit": 2 * len(COSTLY[1]) * 16 * CLASSES}


def test_the_passes_of_a_convolutional_network_in_closed_form():
    first = convolution(3, 8, 3, 64)
    forward = first + convolution(8, 16, 1, 64) + convolution(16, 16, 3, 16) + HEAD["conv"]
    updates = {"full": 2 * forward - first, "linear": HEAD["conv"], "bias": forward - first + HEAD["conv"]}
    for method, update in updates.items():
        model = plain_conv()
        with trainable(model, method):
            passes = Passes(model)
        assert (passes.forward, passes.to_images, passes.update) == (forward, forward, update), method


def test_attention_costs_twice_on_the_way_back_and_a_linear_probe_nothing_but_its_head():
    model = vit()
    with trainable(model, "linear"):
        passes = Passes(model)
    tokens = (16 // 8) ** 2 + 1
    # Two layers, two products in each, and a multiplication and an addition for each term.
    attention = 2 * 2 * 2 * len(COSTLY[1]) * tokens**2 * 16
    assert passes.to_images == passes.forward + attention
    assert passes.update == HEAD["vit"]


# ---------------------------------------------------------------------- abnormal samples, for free


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


def rough():
    """A network on which a long step often ends at a smaller loss."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), Sine(), nn.Linear(16, CLASSES)).double()
    model[1].weight.data *= 10
    return model


@pytest.mark.parametrize("kind", [FGSM, NFGSM])
def test_the_free_share_of_abnormal_samples_is_the_computed_one(kind):
    model, (images, labels) = rough(), batch(64)
    seeds = torch.randint(2**40, (64,))
    attack = kind(model, 0.3, alpha=0.6, noise=0.25)
    start = random_init(images, 0.25, seed=seeds)
    losses = [cross_entropy(model(x), labels) for x in (start, attack(images, labels, seed=seeds))]
    expected = (losses[0] > losses[1]).sum().item()
    assert 0 < expected < 64
    step = TrainStep(model.train(), attack, sgd(model), label_smoothing=0.2, clean_weight=0.5)
    assert step.gradients(images, labels, seeds)[2:].tolist() == [expected, 64]


@pytest.mark.parametrize(
    ("layer", "looked"),
    [
        *((nn.Dropout(0.1), 0), (nn.Dropout(0.0), 16), (nn.BatchNorm1d(16), 0), (nn.LayerNorm(16), 16)),
        *((timm.layers.DropPath(0.1), 0), (timm.layers.DropPath(0.0), 16)),
    ],
)
def test_none_is_looked_at_where_attack_and_update_differ_in_mode(layer, looked):
    model, (images, labels) = rough(), batch(16)
    model.insert(2, copy.deepcopy(layer).double())
    attack = FGSM(model, 0.3, alpha=0.6, noise=0.25)
    step = TrainStep(model.train(), attack, sgd(model))
    assert step.gradients(images, labels)[3] == looked
    model.eval()
    assert step.gradients(images, labels)[3] == 16


@pytest.mark.parametrize(
    "attack",
    [
        lambda model: FGSM(model, EPS),  # without a random start no loss is computed there
        lambda model: PGD(model, EPS, EPS, 1, random_start=False),
        lambda model: PGD(model, EPS, EPS / 3, 3),
        lambda model: FGSM(model, EPS, noise=None, loss="margin"),
        lambda model: FGSM(model, EPS, noise=None, targeted="random"),
        lambda model: FGSM(model, EPS, noise=None, restarts=2),
        lambda model: None,
        lambda model: lambda x, y: x,
    ],
)
def test_none_is_looked_at_where_no_such_loss_is_at_hand(attack):
    model, (images, labels) = rough(), batch(16)
    step = TrainStep(model, attack(model), sgd(model))
    assert step.gradients(images, labels)[2:].tolist() == [0, 0]


def test_none_is_looked_at_where_the_attack_alone_has_batch_norm_in_train_mode():
    model, (images, labels) = rough(), batch(16)
    model.insert(2, nn.BatchNorm1d(16).double())
    model.eval()
    step = TrainStep(model, FGSM(model, EPS, noise=None, training_mode="batch_norm"), sgd(model))
    assert step.gradients(images, labels)[2:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clean_weight": 1.5}, ValueError, "clean_weight must be at most 1, got 1.5"),
        ({"clean_weight": "0.5"}, TypeError, "clean_weight is a number, got '0.5'"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be at least 0, got -0.1"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be above 0, got 0"),
        ({"autocast": "bf16"}, TypeError, "autocast is a dtype such as torch.bfloat16, or None, got 'bf16'"),
        ({"attack": "fgsm"}, TypeError, "attack must be a callable .* got 'fgsm'"),
        ({"attack": FGSM}, TypeError, "attack must be a callable .* got <class"),
        ({"autocast": torch.bfloat16}, ValueError, "autocast to torch.bfloat16 leaves a float64 model as it is"),
        ({"compile": "no"}, TypeError, "compile must be True or False, got 'no'"),
        ({"highest": "9"}, TypeError, "highest must be a whole number, got '9'"),
        ({"optimizer": torch.optim.LBFGS([torch.zeros(1)])}, ValueError, "LBFGS computes the loss again"),
        (
            {"attack": PGD(nn.Identity(), EPS, EPS / 4, clip=(0, 255))},
            ValueError,
            r"images in \[0, 1\], and attack is made for clip",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    model = network()
    with pytest.raises(error, match=message):
        TrainStep(model, **{"attack": None, "optimizer": sgd(model), **options})


@pytest.mark.parametrize("attack", [lambda model: None, lambda model: FGSM(model, EPS), lambda model: lambda x, y: x])
def test_every_batch_has_images_and_a_label_for_each(attack):
    model, (images, labels) = network(), batch()
    step = TrainStep(model, attack(model), sgd(model))
    taken(step, images, labels)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"one for each of images \(18, 3, 8, 8\), got \(9,\)"):
        step.gradients(torch.cat((images, images)), labels)
    with pytest.raises(ValueError, match="no images in the batch"):
        step.gradients(images[:0], labels[:0])
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "attack", [lambda model: None, *(lambda m, n=n: fast_method(n, m, EPS, {}) for n in FOLLOWING)]
)
def test_images_that_require_grad_get_none_and_are_learnt_from_like_others(attack):
    model, (images, labels) = network(), batch()
    twin, watched, seeds = copy.deepcopy(model), images.clone().requires_grad_(), torch.arange(9)
    for one, x in ((model, images), (twin, watched)):
        method = attack(one)
        step = TrainStep(one, method, sgd(one))
        if method is not None:
            method.begin(0, 0, 1)
        taken(step, x, labels, seeds=seeds)
    assert watched.grad is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_of_other_parameters_than_the_models_is_told(recwarn):
    model = network()
    TrainStep(model, None, sgd(model))
    TrainStep(model, None, torch.optim.SGD(model[-1].parameters(), LR))  # a part trains
    assert not recwarn.list
    TrainStep(copy.deepcopy(model), None, sgd(model))
    assert "has 6 parameters that are not the model's, and not 0.weight" in str(recwarn.pop(UserWarning).message)
    optimizer = sgd(model)
    model[-1] = nn.Linear(8, CLASSES).double()
    TrainStep(model, None, optimizer)
    assert "has 2 parameters that are not the model's, and not 5.weight" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: None, TypeError, "it returned a NoneType"),
        (lambda x: x.long(), TypeError, "it returned torch.int64"),
        (lambda x: x[:1], ValueError, r"it returned the shape \(1, 3, 8, 8\)"),
        (lambda x: x.mean(0), ValueError, r"it returned the shape \(3, 8, 8\)"),
    ],
)
def test_an_attack_that_returns_no_images_like_those_it_got_is_refused(returned, error, message):
    model, (images, labels) = network(), batch()
    attack = lambda x, y: returned(x)  # noqa: E731
    wanted = rf"tensor of shape \(9, 3, 8, 8\) .*; {message}"
    with pytest.raises(error, match=wanted):
        TrainStep(model, attack, sgd(model)).gradients(images, labels)
    with pytest.raises(error, match=wanted):
        Monitor(model, images, labels, attack, EPS).check()


@pytest.mark.parametrize("returned", [lambda x: x.numpy(), lambda x: (x, None), lambda x: (x.numpy(), 3)])
def test_arrays_of_numpy_and_pairs_are_learnt_from(returned):
    model, (images, labels) = network(), batch()
    loss, weights = learnt_by_hand(model, 1 - images, images, labels)
    attack = lambda x, y: returned(1 - x)  # noqa: E731
    assert taken(TrainStep(model, attack, sgd(model)), images, labels)[0].item() == pytest.approx(loss, rel=1e-12)
    assert_weights(model, weights, rtol=1e-12, atol=1e-14)


def test_no_prediction_is_a_wrong_answer_in_the_accuracy_of_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()
    images, labels = batch(8)
    labels[:4] = 0
    with torch.no_grad():
        model[1].weight.zero_()  # all logits equal
        model[1].bias.zero_()
    assert TrainStep(model, None, sgd(model)).gradients(images, labels)[1] == 0
    model[1].bias.data[0] = 1
    assert TrainStep(model, None, sgd(model)).gradients(images, labels)[1] == (labels == 0).sum()


def steps_taken(around, autocast):
    """The weights after three steps on one batch, where `around` is the caller's context."""
    torch.manual_seed(0)
    model, (images, labels) = network(torch.float32), batch(dtype=torch.float32)
    with around:
        step = TrainStep(model, FGSM(model, EPS), sgd(model), autocast=autocast)
        model(images)  # the caller's autocast keeps cast copies of these weights
        for _ in range(3):
            taken(step, images, labels)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_step_is_the_same_within_the_callers_autocast(autocast):
    alone = steps_taken(nullcontext(), autocast)
    within = steps_taken(torch.autocast("cpu", torch.bfloat16), autocast)
    assert all(torch.equal(a, b) for a, b in zip(alone, within, strict=True))


def returning(change, **attributes):
    """An attack of another library, which returns change(images)."""

    def attack(images, labels):
        return change(images)

    vars(attack).update(attributes)
    return attack


@pytest.mark.parametrize(
    ("attack", "eps", "messages"),
    [
        (returning(lambda x: (x + 0.05).clamp(0, 1), eps=0.05), 0.05, []),
        (returning(lambda x: 1 - x), None, []),  # it names no eps, and a step has none
        (returning(lambda x: (x + 0.05).clamp(0, 1), eps=0.04), None, ["up to 0.05 in L-inf .* beyond eps = 0.04"]),
        (returning(lambda x: (x + 0.05).clamp(0, 1), eps=0.06), 0.04, ["up to 0.05 in L-inf .* beyond eps = 0.04"]),
        (returning(lambda x: 1 - x, eps=1.5), None, ["beyond eps = 1.5"]),  # 255 times too large
        (returning(lambda x: x / 2, eps=8.0, norm="L2"), None, []),
        (returning(lambda x: (x - 0.4) / 0.2), None, [r"go from -1\.\d+ to [23]\.\d+, and training takes"]),
        (
            returning(lambda x: x.index_fill(0, torch.tensor([1, 4]), torch.nan)),
            None,
            ["2 of the images .* not finite"],
        ),
        (returning(lambda x: x + 1, eps=0.1), None, ["go from", "beyond eps = 0.1"]),
    ],
)
def test_a_warning_says_once_what_another_librarys_images_are_not(attack, eps, messages, recwarn):
    model, (images, labels) = network(), batch(16)
    step = TrainStep(model, as_attack(attack, model, eps), sgd(model))
    for _ in range(4):
        step.gradients(images, labels)
    assert len(recwarn) == len(messages)
    for text in messages:
        assert re.search(text, str(recwarn.pop(UserWarning).message))


def test_later_batches_are_measured_without_waiting_for_the_device():
    far = 0.0
    attack = as_attack(lambda images, labels: images + far, network(), 0.1)
    images, labels = torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64)
    attack(images, labels)
    attack(images, labels)
    far = 0.2
    with NoReads():
        attack(images, labels)
    far = 0.0
    with pytest.warns(UserWarning, match="up to 0.2 in L-inf"):  # after the fourth
        attack(images, labels)


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_what_a_callable_writes_in_place_changes_its_copies_alone(clean_weight):
    def written(images, labels):
        labels.add_(1).remainder_(CLASSES)
        return images.mul_(0.5)

    model, (images, labels) = network(), batch()
    before = images.clone(), labels.clone()
    _, weights = learnt_by_hand(model, images / 2, images, labels, clean_weight)
    taken(TrainStep(model, written, sgd(model), clean_weight=clean_weight), images, labels)
    assert_weights(model, weights, rtol=1e-12, atol=1e-14)
    assert images.equal(before[0])
    assert labels.equal(before[1])


def test_a_training_attack_on_another_model_is_told(recwarn):
    model = network()
    for attack in (FGSM(model, EPS), FGSM(nn.DataParallel(model), EPS), FGSM(copy.deepcopy(model), EPS)):
        assert not recwarn.list
        TrainStep(model, attack, sgd(model))
    assert "made on another model, not on the model that trains" in str(recwarn.pop(UserWarning).message)
    TrainStep(Normalized(model, 0.4, 0.2), FGSM(model, EPS), sgd(model))
    assert "made on a part of the model, or one around it" in str(recwarn.pop(UserWarning).message)
    other = nn.Sequential(*model[:-1], nn.Linear(8, CLASSES).double())  # two heads on one body
    TrainStep(model, FGSM(other, EPS), sgd(model))
    assert "made on another model, not on the model that trains" in str(recwarn.pop(UserWarning).message)


def test_a_step_keeps_its_model():
    model = network()
    step = TrainStep(model, None, sgd(model))
    with pytest.raises(AttributeError):
        step.model = network()


@pytest.fixture
def accelerator():
    """One that accumulates two parts; what accelerate shares between all of a process is reset."""
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    for kind in (state.AcceleratorState, state.GradientState):
        kind._reset_state()


def test_accelerate_accumulates_no_parts_of_a_step_and_the_step_does(accelerator):
    model, images, labels = network(), *batch(8)
    whole = copy.deepcopy(model)
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    step = TrainStep(prepared, None, optimizer)
    before = copy.deepcopy(model.state_dict())
    with accelerator.accumulate(prepared), pytest.raises(RuntimeError, match=r"accelerator\.accumulate would drop"):
        step.gradients(images[:4], labels[:4])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with accelerator.accumulate(prepared):  # the second of two parts; elsewhere gradients are in step always
        pass
    step.gradients(images[:4], labels[:4], scale=1 / 8, more=True)
    step.gradients(images[4:], labels[4:], scale=1 / 8)
    step.apply()
    F.cross_entropy(whole(images), labels).backward()
    sgd(whole).step()
    for here, there in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(here, there)


def test_an_attack_towards_the_labels_is_refused():
    model = network()
    theirs = torchattacks.PGD(model)
    theirs.set_mode_targeted_by_label(quiet=True)
    for attack in (FGSM(model, EPS, targeted=True), theirs):
        with pytest.raises(ValueError, match="attack goes towards the labels"):
            TrainStep(model, attack, sgd(model))
