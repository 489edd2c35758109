"""Attacks change neither the model nor the inputs, do not wait for the device, and a broken sample harms no other."""

import copy
import re
import warnings

import pytest
import torch
from attacked import (
    ATTACKS,
    CLASSES,
    EPS,
    RANDOM,
    SINGLE_STEP,
    STEPS,
    N,
    Net,
    batch_of,
    distances,
    every_attack,
    radius,
    steps_of,
)
from attacked import one_thread as one_thread
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastadv.attacks import FFGSM, FGSM, MIFGSM, NFGSM, PGD, PGDL2, TPGD, samplewise

OPTIONS = {
    "plain": {},
    "restarts": {"restarts": 2},
    "chunk": {"chunk": 4},
    "as_is": {"training_mode": "as_is"},
    "batch_norm": {"training_mode": "batch_norm"},
    "autocast": {"autocast": torch.bfloat16},
    "channels_last": {"memory_format": torch.channels_last},
    "margin": {"loss": "margin"},
    "dlr": {"loss": "dlr"},
    "callable": {"loss": lambda outputs, targets: outputs.square().sum(1) + targets},
    "targeted": {"targeted": True, "loss": "ce"},
    "random": {"targeted": "random", "loss": "ce"},
    "least_likely": {"targeted": "least_likely", "loss": "ce"},
    "everything": {"restarts": 2, "chunk": 4, "training_mode": "batch_norm", "autocast": torch.bfloat16},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def left_of(model, tensors):
    """All that an attack could change: values, flags, modes, gradients, and the number of writes to a tensor."""
    return {
        "values": {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())},
        "keys": list(model.state_dict()),
        "training": {k: m.training for k, m in model.named_modules()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "grads": {k: (id(p.grad), copy.deepcopy(p.grad)) for k, p in model.named_parameters()},
        "objects": {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "inputs": {k: (v.clone(), v._version, v.requires_grad, v.grad, v.dtype) for k, v in tensors.items()},
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


def assert_equal(new, old, path=""):
    assert type(new) is type(old), path
    if isinstance(new, dict):
        assert new.keys() == old.keys(), path
        for key in new:
            assert_equal(new[key], old[key], f"{path}.{key}")
    elif isinstance(new, tuple | list):
        assert len(new) == len(old), path
        for i, (a, b) in enumerate(zip(new, old, strict=True)):
            assert_equal(a, b, f"{path}[{i}]")
    elif isinstance(new, torch.Tensor):
        assert torch.equal(new, old), path
    else:
        assert new == old, path


class KeepsBatchNorm(Net):
    """A model with a train() of its own, as users write it to keep batch-norm frozen."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = False
        return self


def mixed_net():
    """Modules in different modes, flags of both kinds, gradients on some parameters."""
    net = KeepsBatchNorm()
    net.norm.running_mean.uniform_(-0.1, 0.1)
    net.training, net.norm.training, net.drop.training, net.conv.training = True, True, True, False
    net.conv.bias.requires_grad_(False)
    net.head.weight.grad = torch.randn_like(net.head.weight)
    return net


@pytest.mark.filterwarnings("ignore:steps =", "ignore:its eps is")
@every_attack
@every_option
@pytest.mark.parametrize("start", ["own", "x_init"])
def test_model_and_inputs_are_left_as_they_were(name, options, start):
    """Also where the model raises in its first or last call."""
    net, (images, labels) = mixed_net(), batch_of(N)
    attack = ATTACKS[name](net, **options)
    given = {
        "images": images,
        "labels": labels,
        "eps": torch.full((N,), radius("PGDL2" if name == "PGDL2" else "PGD")),
        "seed": torch.randint(2**62, (N,)),
    }
    if start == "x_init":
        given["x_init"] = (images + 0.01).clamp(0, 1)
    calls, failure, fails_at = [], None, 0

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == fails_at:
            raise failure
        return output

    net.register_forward_hook(hook)
    expected = left_of(net, given)
    attack(**given)
    assert_equal(left_of(net, given), expected)
    total = len(calls)
    assert total >= steps_of(name)
    failing = ((ZeroDivisionError, total), (KeyboardInterrupt, total), (ZeroDivisionError, 1))
    for failure, fails_at in failing:  # noqa: B007 (the hook reads it)
        calls.clear()
        with pytest.raises(failure):
            attack(**given)
        assert_equal(left_of(net, given), expected)


@every_attack
def test_a_model_that_returns_no_logits_is_left_as_it_was(name):
    net, calls, last = mixed_net(), [], steps_of(name)
    net.register_forward_hook(lambda module, args, out: calls.append(1) or (out[:, 0] if len(calls) == last else out))
    expected = left_of(net, {})
    with pytest.raises(TypeError, match=r"tensor of shape \(6,\)"):
        ATTACKS[name](net)(*batch_of(N))
    assert_equal(left_of(net, {}), expected)


@every_attack
@pytest.mark.parametrize("mode", ["as_is", "batch_norm", "eval"])
def test_buffers_that_the_model_replaces_are_put_back(name, mode):
    class Counting(Net):
        def forward(self, x):
            if self.training:
                self.hidden = self.hidden + 1
            return super().forward(x)

    net = Counting()
    expected = left_of(net, {})
    ATTACKS[name](net, training_mode=mode)(*batch_of(N))
    assert_equal(left_of(net, {}), expected)


def by_data(buffer, values):
    buffer.data = values


IN_PLACE = {
    "data": by_data,
    "set_": lambda buffer, values: buffer.set_(values),
    "resize_": lambda buffer, values: buffer.resize_(values.shape).copy_(values),
}


@every_attack
@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("size", [0, 2, CLASSES])
def test_buffers_that_get_other_memory_are_put_back(name, write, size):
    class Moving(Net):
        def forward(self, x):
            logits = super().forward(x)
            write(self.hidden, self.hidden.sum() + logits.detach().mean(0))
            return logits

    net = Moving()
    net.hidden = torch.rand(size)
    expected = left_of(net, {})
    ATTACKS[name](net)(*batch_of(N))
    assert_equal(left_of(net, {}), expected)


@every_attack
def test_buffers_that_are_conjugated_or_negated_lazily_are_put_back(name):
    class Adding(Net):
        def forward(self, x):
            for buffer in (self.conjugated, self.negated, self.hidden):
                buffer.add_(1)
            return super().forward(x)

    net, values = Adding(), torch.randn(3, dtype=torch.complex64)
    net.register_buffer("conjugated", values.clone().conj())
    net.register_buffer("negated", values.clone().conj().imag)
    assert net.conjugated.is_conj()
    assert net.negated.is_neg()
    ATTACKS[name](net, training_mode="as_is")(*batch_of(N))
    assert torch.equal(net.conjugated, values.conj())
    assert torch.equal(net.negated, -values.imag)
    assert not net.hidden.any()
    assert not net.norm.num_batches_tracked


REPARAMETRIZED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@every_attack
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", REPARAMETRIZED.values(), ids=REPARAMETRIZED)
def test_weights_that_a_hook_has_computed_lead_to_their_parameters_after_an_attack(name, how):
    net, (images, labels) = Net().eval(), batch_of(N)
    how(net.head)

    def gradients(attacked):
        net.zero_grad(set_to_none=True)
        net(images)
        if attacked:
            ATTACKS[name](net)(images, labels)
        net.head.weight.abs().sum().backward()
        return [p.grad.clone() for p in net.head.parameters() if p.grad is not None]

    expected = gradients(False)
    assert expected
    assert_equal(gradients(True), expected)


@every_attack
def test_the_callers_cache_of_parametrizations_keeps_no_frozen_weight(name):
    net, (images, labels) = Net().eval(), batch_of(N)
    nn.utils.parametrizations.weight_norm(net.head)

    def gradients(attacked):
        net.zero_grad(set_to_none=True)
        with nn.utils.parametrize.cached():
            if attacked:
                ATTACKS[name](net)(images, labels)
            nn.functional.cross_entropy(net(images), labels).backward()
        return [p.grad.clone() for p in net.parameters()]

    assert_equal(gradients(True), gradients(False))


@every_attack
def test_buffers_that_nothing_can_write_to_are_no_obstacle(name):
    net = Net()
    net.register_buffer("expanded", torch.ones(1).expand(3))
    with torch.inference_mode():
        net.register_buffer("fixed", torch.ones(3))
    expected = left_of(net, {})
    ATTACKS[name](net)(*batch_of(N))
    assert_equal(left_of(net, {}), expected)


@every_attack
@pytest.mark.parametrize("mode", ["as_is", "batch_norm", "eval"])
def test_a_backward_may_begin_before_the_attack_and_end_after_it(name, mode):
    net, (images, labels) = Net(), batch_of(N)
    net.norm.eval()
    attack = ATTACKS[name](net, training_mode=mode)
    loss = nn.functional.cross_entropy(net(images), labels)
    attack(images, labels)
    loss.backward()  # batch-norm in eval mode kept its statistics for this
    assert all(p.grad.any() for p in net.parameters())


@every_attack
def test_in_eval_mode_unless_told_with_parameters_that_are_frozen_and_get_no_gradient(name):
    net, seen, computed, training = mixed_net(), [], [], []
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_hook(computed.append)
    net.register_forward_pre_hook(lambda module, args: seen.extend(p.requires_grad for p in net.parameters()))
    net.register_forward_pre_hook(lambda module, args: training.extend(m.training for m in net.modules()))
    for options in OPTIONS.values():
        training.clear()
        ATTACKS[name](net, **options)(*batch_of(N))
        assert any(training) == ("training_mode" in options)
    assert seen
    assert not any(seen)
    assert not computed


@every_attack
def test_the_callers_autocast_cache_keeps_no_frozen_weight(name):
    net, (images, labels) = Net().eval(), batch_of(N)

    def gradients(attacked):
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            if attacked:
                ATTACKS[name](net)(images, labels)
            loss = nn.functional.cross_entropy(net(images).float(), labels)
        loss.backward()
        return [p.grad.clone() for p in net.parameters()]

    assert_equal(gradients(True), gradients(False))


@every_attack
def test_a_given_seed_leaves_the_generator_alone(name):
    net, batch = Net(), batch_of(N)
    state = torch.get_rng_state()
    for seed in (3, torch.arange(N)):
        for options in ({}, {"restarts": 2}, {"chunk": 2}, {"targeted": "random", "loss": "ce"}):
            ATTACKS[name](net, **options)(*batch, seed=seed)
    if name not in RANDOM:
        ATTACKS[name](net)(*batch)  # these attacks draw nothing, so they need no seed
    PGD(net, EPS, random_start=False)(*batch)
    assert torch.equal(state, torch.get_rng_state())


@every_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_be_under_no_grad_or_inference_mode(name, mode):
    net, (images, labels) = Net().eval(), batch_of(N)
    expected = ATTACKS[name](net)(images, labels, seed=2)
    with mode():
        adv = ATTACKS[name](net)(images.clone(), labels.clone(), seed=2)  # inference tensors under inference_mode
        assert not torch.is_grad_enabled()
    assert torch.equal(adv, expected)
    nn.functional.cross_entropy(net(adv), labels).backward()  # the result is fit for training


@every_attack
def test_images_that_require_grad_get_none(name):
    images, labels = batch_of(N)
    images.requires_grad_()
    adv = ATTACKS[name](Net())(images * 1, labels)
    assert not adv.requires_grad
    assert images.grad is None


# The gradient


@every_attack
def test_loss_is_summed_over_float32_logits(name):
    """The gradient at the model's outputs is that of a sum: as large for one sample as for many."""
    arrived = []

    def model(x):
        logits = (x.flatten(1)[:, :CLASSES] * 4).to(torch.bfloat16)
        if logits.requires_grad:
            logits.register_hook(lambda g: arrived.append(g.double()))
        return logits

    images, labels = batch_of(64, classes=CLASSES)
    attack = ATTACKS[name](model, loss="ce")
    attack(images, labels, x_init=images)
    probabilities = (images.flatten(1)[:, :CLASSES] * 4).to(torch.bfloat16).double().softmax(1)
    expected = probabilities - nn.functional.one_hot(labels, CLASSES)
    torch.testing.assert_close(arrived[0], expected, rtol=2**-7, atol=1e-7)


BROKEN = {
    "NaN": lambda logits, own: logits * torch.nan,
    "infinite": lambda logits, own: logits / 0.0,
    "no probability": lambda logits, own: logits.masked_fill(own, -torch.inf),
    "NaN on the way back": lambda logits, own: logits + (logits.detach() - logits - 1).sqrt(),
}


@every_attack
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"targeted": True, "loss": "ce"}], ids=["", "chunk", "targeted"])
def test_broken_samples_are_counted_and_leave_the_others_alone(name, broken, options):
    if broken == "no probability" and name == "TPGD" and "loss" not in options:
        broken = "NaN"  # a probability of zero costs the divergence nothing
    net, (images, labels) = Net().eval(), batch_of(N)
    bad = torch.tensor([False, True, False, False, True, True])
    seeds = torch.randint(2**62, (N,))

    def model(x):
        rows = torch.cdist(x.detach().flatten(1), images.flatten(1)).argmin(1)  # the nearest clean images
        logits, own = net(x), nn.functional.one_hot(labels[rows], CLASSES).bool()
        return torch.stack(
            [BROKEN[broken](z, o) if is_bad else z for z, o, is_bad in zip(logits, own, bad[rows], strict=True)]
        )

    whole = ATTACKS[name](net, **options)(images, labels, seed=seeds)
    attack = ATTACKS[name](model, **options)
    with pytest.warns(UserWarning, match="not finite") as caught:
        adv = attack(images, labels, seed=seeds)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).startswith(f"{3 * steps_of(name)} losses")
    assert bool(adv.isfinite().all())
    assert same(adv[~bad], whole[~bad])
    assert bool((distances(name, adv, images) <= radius(name) * (1 + 1e-6)).all())
    if name not in RANDOM and broken != "no probability":  # no probability makes only the loss infinite
        assert same(adv[bad], images[bad])


def same(a, b):
    """Whether two tensors are equal, as a bool: pytest would print the tensors."""
    return bool(torch.equal(a, b))


@every_attack
def test_a_sample_that_breaks_in_one_step_takes_the_others(name):
    net, (images, labels) = Net().eval(), batch_of(N)
    calls, breaks = [], steps_of(name) + (name == "TPGD")  # TPGD's first call is on the clean images

    def model(x):
        calls.append(1)
        logits = net(x)
        return torch.cat((logits[:1] * torch.nan, logits[1:])) if len(calls) == breaks else logits

    seeds = torch.arange(N)
    attack = ATTACKS[name](model)
    with pytest.warns(UserWarning, match="1 losses were not finite"):
        adv = attack(images, labels, seed=seeds)
    whole = ATTACKS[name](net)(images, labels, seed=seeds)
    assert same(adv[1:], whole[1:])
    if name not in SINGLE:
        before = ATTACKS[name](net)
        before.steps = STEPS - 1
        torch.testing.assert_close(adv[0], before(images, labels, seed=seeds)[0], rtol=0, atol=1e-2 * EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(images, labels, seed=seeds)


SINGLE = (*SINGLE_STEP, "MIFGSM", "APGD", "APGDL2")  # the last three move on by their momentum


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero")
def test_padding_is_not_counted(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    net, (images, labels) = Net().eval(), batch_of(N)
    bad = False

    def model(x):
        return torch.cat((net(x[:1]), net(x[1:]) * torch.nan)) if bad else net(x)

    attack = PGD(model, compile=True)
    attack(images, labels)
    bad = True
    with pytest.warns(UserWarning, match="10 losses were not finite"):
        attack(images[:2], labels[:2])


# Nothing waits for the device

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.", "unique", "_unique", "item")


def tensors_in(value):
    """All tensors; torch's own search takes as long as the op."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


class Log(TorchDispatchMode):
    """Records every op by name, with the number of elements of its largest tensor."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = list(tensors_in((args, tuple((kwargs or {}).values()), result)))
        waits = str(func).startswith(tuple(f"aten.{name}" for name in READS)) or (
            str(func).startswith("aten.index") and any(t.dtype == torch.bool for t in tensors[1:])
        )
        self.ops.append((str(func), max((t.numel() for t in tensors), default=0), waits))
        return result


OTHERS = {
    "eps": {"eps": torch.full((N,), 0.02)},
    "seeds": {"seed": torch.arange(N)},
    "whole seed": {"seed": torch.tensor(5)},
    "no labels": {"labels": None},
    "x_init": {"x_init": torch.full((N, 3, 6, 6), 0.5)},
}


@pytest.mark.filterwarnings("ignore:steps =", "ignore:its eps is")
@every_attack
@pytest.mark.parametrize("call", [{}, *OTHERS.values()], ids=["plain", *OTHERS])
def test_the_host_reads_the_device_once_and_last(name, call, monkeypatch):
    images, labels = batch_of(N)
    for options in OPTIONS.values() if not call else (OPTIONS[key] for key in ("plain", "random", "everything")):
        given = {"images": images, "labels": labels, **call}
        if given["labels"] is None and ("targeted" in options or callable(options.get("loss"))):
            continue
        attack = ATTACKS[name](Net(), **options)
        attack(**given)
        with monkeypatch.context() as patch, Log() as log:
            patch.setattr(samplewise, "AT_ONCE", ())
            for method in ("numpy", "__array__", "cpu", "__contains__"):  # the dispatcher does not see these
                patch.setattr(torch.Tensor, method, lambda *args, **kwargs: pytest.fail("read"))
            patch.setattr(torch.Tensor, "tolist", lambda t: log.ops.append(("tolist", t.numel(), True)) or [0] * len(t))
            attack(**given)
        reads = [i for i, (_, _, waits) in enumerate(log.ops) if waits]
        assert len(reads) == 1
        rest = {op for op, *_ in log.ops[reads[0] + 1 :]}
        # The copy restores the buffers; whether they are in their old memory, the host knows.
        assert rest <= {"aten.detach.default", "aten._foreach_copy_.default", "aten.is_set_to.default"}
        assert reads[0] > 10


@every_attack
def test_what_only_a_cpu_is_asked_changes_nothing(name, monkeypatch):
    net, (images, labels), found = Net(), batch_of(N), []
    for at_once in (("cpu",), ()):
        monkeypatch.setattr(samplewise, "AT_ONCE", at_once)
        found.append(ATTACKS[name](net, best_iterate=True)(images, labels, seed=1))
    assert torch.equal(*found)


def test_the_log_sees_reads():
    x = torch.rand(3)
    for read in (lambda: x[x > 0.5], lambda: float(x[0]), lambda: bool(x.sum() > 1), lambda: x.nonzero()):
        with Log() as log:
            read()
        assert any(waits for *_, waits in log.ops)


def test_values_are_looked_at_in_the_first_batch_only():
    images, labels = batch_of(N)
    skipped = torch.full((N,), -100)  # cross_entropy ignores it
    fresh = FGSM(Net(), EPS)
    with pytest.raises(ValueError, match="negative"):
        fresh(images, skipped)
    with pytest.raises(ValueError, match="negative"):  # a refused batch does not count as the first
        fresh(images, skipped)
    fresh(images, labels)
    with pytest.warns(UserWarning, match=f"{N} labels name no class"):
        assert torch.equal(fresh(images, skipped), images)
    seen = PGD(lambda x: x.flatten(1), EPS)
    with pytest.raises(ValueError, match=r"below the model's 108 classes, got 108"):
        seen(images, torch.full((N,), 108))
    own = PGD(lambda x: x, EPS, loss=lambda outputs, targets: outputs.flatten(1).sum(1))
    own(images, torch.full((N,), 10**9))


LATER = {
    "bytes": ({}, lambda x, y: {"images": 255 * x}, r"images of this batch are beyond \[0, 1\]"),
    "normalised": ({}, lambda x, y: {"images": (x - 0.3) / 0.2}, "images of this batch are beyond"),
    "NaN": ({}, lambda x, y: {"images": x * torch.nan}, "images of this batch are beyond"),
    "embeddings": ({"clip": (-1, 2)}, lambda x, y: {"images": x + 1.5}, r"images of this batch are beyond \[-1, 2\]"),
    "pixels for normalised": (
        {"images_normalized": (0.5, 0.01)},
        lambda x, y: {"images": 100 * x},
        r"images of this batch are beyond \[0, 1\]",
    ),
    "budgets of 8": ({}, lambda x, y: {"eps": torch.tensor([EPS, 8.0, 8.0] * (N // 3))}, f"{2 * N // 3} budgets"),
    "negative budgets": ({"clip": None}, lambda x, y: {"eps": torch.full((N,), -EPS)}, f"{N} budgets"),
    "sums of 5": ({}, lambda x, y: {"labels": 5 * nn.functional.one_hot(y, CLASSES).float()}, f"{N} soft labels"),
    "signs": ({"loss": "bce"}, lambda x, y: {"labels": torch.full((N, CLASSES), 2)}, f"{N * CLASSES} labels are nei"),
}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("options", "later", "message"), LATER.values(), ids=LATER)
def test_wrong_values_of_a_later_batch_are_warned_of(options, later, message, chunk):
    images, labels = batch_of(N)
    if "images_normalized" in options:
        images = (images - 0.5) / 0.01
    first = {"images": images, "labels": labels}
    if options.get("loss") == "bce":
        first["labels"] = nn.functional.one_hot(labels, CLASSES)
    attack = PGD(Net(), EPS, chunk=chunk, **options)
    attack(**first)
    attack(**{**first, "eps": torch.full((N,), EPS)})  # a warning would be an error
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        attack(**{**first, **later(*batch_of(N))})
    assert [w for w in found if re.match(message, str(w.message)) and w.filename == __file__], [*map(str, found)]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, CLASSES]), ValueError, f"below the model's {CLASSES} classes, got {CLASSES}"),
        (torch.tensor([0, 1, 2, 3, 0, -100]), ValueError, "not be negative, got -100"),
        (torch.zeros(5, dtype=torch.int64), ValueError, r"one for each of images \(6, 3, 6, 6\), got \(5,\)"),
        (torch.zeros(6, 1, dtype=torch.int64), ValueError, r"got \(6, 1\)"),
        (torch.zeros(6, dtype=torch.int32), TypeError, "int64 tensor, got torch.int32"),
        ([0] * 6, TypeError, "int64 tensor, got <class 'list'>"),
    ],
)
def test_bad_labels_are_refused_and_nothing_is_changed(labels, error, message):
    net, (images, _) = mixed_net(), batch_of(N)
    expected = left_of(net, {"images": images})
    with pytest.raises(error, match=message):
        PGD(net, EPS, EPS / 2, 2)(images, labels)
    assert_equal(left_of(net, {"images": images}), expected)


@every_attack
@pytest.mark.parametrize("options", [{}, {"targeted": True}, {"targeted": "random"}, {"targeted": "least_likely"}])
def test_labels_beyond_the_classes_are_refused_by_name(name, options):
    images, labels = batch_of(N)
    labels[2] = CLASSES
    with pytest.raises(ValueError, match=f"below the model's {CLASSES} classes, got {CLASSES}"):
        ATTACKS[name](Net(), loss="ce", **options)(images, labels)


def test_images_out_of_range_are_refused_and_rounding_is_not():
    net, (images, labels) = Net(), batch_of(N)
    images[0, 0, 0, 0] = 1.0000001
    PGD(net, EPS)(images, labels)
    images[0, 0, 0, 0] = 1.00001
    with pytest.raises(ValueError, match=r"1\.00001\d*\].*Normalized"):  # with the digits that show it
        PGD(net, EPS)(images, labels)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="nan"):
        PGD(net, EPS)(images, labels)


# Costs

LIBRARY = torch.library.Library("attacktests", "DEF")
LIBRARY.define("forward(Tensor x, Tensor w) -> Tensor")
LIBRARY.define("backward(Tensor g, Tensor w, Tensor x) -> Tensor")
LIBRARY.impl("forward", lambda x, w: x.flatten(1).to(w.dtype) @ w, "CompositeExplicitAutograd")
LIBRARY.impl("backward", lambda g, w, x: (g @ w.T).reshape(x.shape), "CompositeExplicitAutograd")


class Recognisable(torch.autograd.Function):
    """A model with one op forward and one backward, so that all other ops are the attack's."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.ops.attacktests.forward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return torch.ops.attacktests.backward(g, w, x), None


VIEWS = ("aten.detach", "aten.alias", "aten.view", "aten.empty", "aten.as_strided")


@pytest.mark.parametrize(
    ("attack_on", "before", "after"),
    [
        (lambda m, **o: FGSM(m, EPS, **o), [], ["fgsm_step"]),
        (lambda m, **o: FGSM(m, EPS, alpha=EPS, noise=EPS, **o), ["random_init"], ["fgsm_step"]),
        (lambda m, **o: FFGSM(m, EPS, EPS, **o), ["random_init"], ["fgsm_step"]),
        (lambda m, **o: NFGSM(m, EPS, **o), ["random_init"], ["fgsm_step"]),
        (lambda m, **o: PGD(m, EPS, EPS / 2, 4, **o), ["random_init"], ["pgd_step"]),
        (lambda m, **o: PGD(m, EPS, EPS / 2, 4, random_start=False, **o), ["random_init"], ["pgd_step"]),
        (lambda m, **o: ATTACKS["BIM"](m, **o), ["random_init"], ["pgd_step"]),
        (lambda m, **o: ATTACKS["TPGD"](m, **o), None, ["pgd_step"]),
    ],
    ids=["FGSM", "FGSM-RS", "FFGSM", "NFGSM", "PGD", "PGD-clean", "BIM", "TPGD"],
)
@pytest.mark.parametrize("call", [{}, {"eps": torch.full((2,), 0.02)}, {"seed": torch.arange(2)}])
@pytest.mark.parametrize("options", [{}, {"targeted": True, "loss": "ce"}, {"loss": "margin"}])
def test_between_two_model_calls_one_op_touches_an_image(attack_on, before, after, call, options):
    weight, images = torch.randn(3 * 16 * 16, 4), torch.rand(2, 3, 16, 16)
    attack = attack_on(lambda x: Recognisable.apply(x, weight), **options)
    labels = torch.tensor([0, 3])
    for _ in range(4):  # the gradients of the first 8 images are looked at
        attack(images, labels, **call)
    with Log() as log:
        attack(images, labels, **call)
    parts, inside = [[]], False
    for op, size, _ in log.ops:
        if op.startswith("attacktests.forward"):
            # Inside until the backward call ends. The prediction of the clean images has no backward call.
            inside = attack.loss != "kl" or len(parts) > 1
            parts.append([])
        elif op.startswith("attacktests.backward"):
            inside = False
        elif size >= images.numel() and not op.startswith(VIEWS):
            assert not inside, op
            parts[-1].append(op)
    if attack.loss == "kl":
        parts = parts[1:]  # without the prediction of the clean images
    if before is not None:
        assert [op.split(".")[1] for op in parts[0]] == ["aminmax", *before]  # are the images in the box?
    assert len(parts) == attack.steps + 1
    for part in parts[1:]:
        assert [op.split(".")[1] for op in part] == after


def test_pgd_10_costs_ten_forwards_and_ten_backwards_to_the_input():
    class Direct(Net):
        """A module without hooks: the counter's module hooks refuse a leaf."""

        def forward(self, x):
            features = nn.functional.avg_pool2d(nn.functional.conv2d(x, self.conv.weight, self.conv.bias).tanh(), 2)
            return nn.functional.linear(features.flatten(1), self.head.weight, self.head.bias)

        __call__ = forward

    net, (images, labels) = Direct(), batch_of(N)
    net.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        logits = net(leaf := images.clone().requires_grad_())
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(nn.functional.cross_entropy(logits, labels), leaf)
    net.requires_grad_(True)
    assert forward.get_total_flops() > 0
    assert backward.get_total_flops() > 0
    once = forward.get_total_flops() + backward.get_total_flops()
    for attack, times in [
        (PGD(net, EPS, EPS / 4, 10), 10),
        (PGD(net, EPS, EPS / 4, 10, targeted=True, loss="margin"), 10),
        (MIFGSM(net, EPS, EPS / 4, 10), 10),
        (PGDL2(net, 1.0, 0.2, 10), 10),
        (FGSM(net, EPS), 1),
        (NFGSM(net, EPS), 1),
    ]:
        for _ in range(2):
            with FlopCounterMode(display=False) as spent:
                attack(images, labels)
            assert spent.get_total_flops() == times * once
    with FlopCounterMode(display=False) as spent:
        TPGD(net, EPS, EPS / 4, 10)(images)
    assert spent.get_total_flops() == 10 * once + forward.get_total_flops()
