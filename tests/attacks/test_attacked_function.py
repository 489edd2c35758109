"""The attacked function is the given model with the present settings, and an attack does not change it."""

import copy
import inspect
import os
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacked import CLASSES, EPS, N, Net, batch_of, short_steps
from attacked import one_thread as one_thread
from torch import nn

from fastadv import attacks, sample_seeds
from fastadv.attacks import (
    APGD,
    APGDL2,
    BIM,
    FAB,
    FFGSM,
    FGSM,
    MIFGSM,
    NFGSM,
    PGD,
    PGDL2,
    PMA,
    PMAL2,
    TPGD,
    Normalized,
    ZeroGrad,
    base,
)
from fastadv.attacks.base import Attack
from fastadv.attacks.engine import Engine
from fastadv.attacks.losses import LOSSES
from fastadv.evaluation import evaluate
from fastadv.training import Trainer

SEEDS = torch.arange(N)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def net():
    return Net().eval()


def plain_pgd(model, x, y, eps, alpha, steps, box=(0.0, 1.0), start=None, loss=F.cross_entropy):
    """PGD as a loop by hand, in float64."""
    adv = x if start is None else start
    for _ in range(steps):
        leaf = adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(leaf), y, reduction="sum"), leaf)
        adv = (x + (adv + alpha * grad.sign() - x).clamp(-eps, eps)).clamp(*box)
    return adv


# ------------------------------------------------------------------ settings live once

CHANGES = {
    "eps": EPS / 3,
    "alpha": EPS / 7,
    "steps": 6,
    "random_start": False,
    "restarts": 3,
    "loss": "margin",
    "targeted": True,
    "autocast": torch.bfloat16,
    "training_mode": "as_is",
    "chunk": 4,
    "clip": None,
}


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_is_assigned_acts_as_if_it_had_been_given(name, called):
    model, (images, labels) = Net(), batch_of(N)
    model = nn.Sequential(nn.Dropout2d(0.0), nn.BatchNorm2d(3), model)  # another mode is another function
    changed, usual = PGD(model, EPS), PGD(model, EPS)
    given = PGD(model, **{"eps": EPS, name: CHANGES[name]})
    if called:
        changed(images, labels, seed=SEEDS)
    setattr(changed, name, CHANGES[name])
    torch.manual_seed(1)
    got = changed(images, labels, seed=SEEDS)
    torch.manual_seed(1)
    assert torch.equal(got, given(images, labels, seed=SEEDS))
    if name not in (
        "chunk",
        "clip",
        "restarts",
        "autocast",
        "random_start",
    ):  # which change these images little, or not at all
        assert not torch.equal(got, usual(images, labels, seed=SEEDS))


OWN = [
    *((FGSM, "noise", EPS / 2), (FGSM, "alpha", EPS / 2), (MIFGSM, "decay", EPS / 2), (NFGSM, "noise", EPS / 2)),
    # With another default than their base's.
    *((BIM, "random_start", True), (MIFGSM, "random_start", True), (FFGSM, "noise", EPS / 2)),
    *((ZeroGrad, "noise", EPS / 2), (PMA, "alpha", EPS / 4), (PMAL2, "random_start", False)),
]


@short_steps
@pytest.mark.filterwarnings("ignore:its eps is 8/255, a length for L-inf")
@pytest.mark.parametrize(("cls", "name", "value"), OWN)
def test_so_do_the_settings_of_an_attack_s_own(cls, name, value):
    model, (images, labels) = net(), batch_of(N)
    changed = cls(model, EPS)
    changed(images, labels, seed=SEEDS)
    setattr(changed, name, value)
    given = cls(model, EPS, **{name: value})
    assert torch.equal(changed(images, labels, seed=SEEDS), given(images, labels, seed=SEEDS))


def test_another_model_is_attacked_where_it_was_assigned():
    old, new, (images, labels) = net(), net(), batch_of(N)
    attack = PGD(old, EPS)
    attack(images, labels, seed=SEEDS)
    for other in (new, Normalized(new, MEAN, STD)):
        attack.model = other
        assert torch.equal(attack(images, labels, seed=SEEDS), PGD(other, EPS)(images, labels, seed=SEEDS))
    attack.model.model = old
    want = PGD(Normalized(old, MEAN, STD), EPS)(images, labels, seed=SEEDS)
    assert torch.equal(attack(images, labels, seed=SEEDS), want)


def test_another_head_in_the_same_model_has_other_classes():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), batch_of(16)[0]
    attacks = [PGD(model, EPS), PGD(lambda x: model(x), EPS)]
    for classes in (5, 10, 5):
        model[1] = nn.Linear(108, classes)
        labels, seeds = torch.arange(16) % classes, torch.arange(16)
        want = PGD(model, EPS)(images, labels, seed=seeds)
        for attack in attacks:
            assert torch.equal(attack(images, labels, seed=seeds), want)


WRONG = [
    (PGD, "eps", 8, r"the images' scale \[0, 1\]"),
    (PGD, "eps", -0.1, "the images' scale"),
    (PGD, "eps", float("nan"), "the images' scale"),
    (PGD, "alpha", "2/255", "alpha must be a number"),
    (PGD, "steps", 1.5, "steps must be a whole number"),
    (PGD, "steps", 0, "steps must be at least 1, got 0"),
    (PGD, "schedule", "linear", "unknown schedule 'linear'; there are constant, cosine"),
    (PGD, "restarts", "2", "restarts must be a whole number"),
    (PGD, "chunk", 0, "chunk must be at least 1"),
    (PGD, "autocast", "bf16", "autocast must be a dtype"),
    (PGD, "memory_format", "channels_last", "memory_format must be one of torch's"),
    (PGD, "loss", "cross", "unknown loss"),
    (PGD, "targeted", "yes", "targeted must be one of"),
    (PGD, "clip", (1, 0), "lo below hi"),
    (FGSM, "eps", 8, "the images' scale"),
    (FGSM, "alpha", "2/255", "alpha must be a number"),
    (FGSM, "noise", "8/255", "noise must be a number"),
    (FGSM, "noise", -0.1, "noise must not be negative, got -0.1"),
    (ZeroGrad, "quantile", 1.1, r"quantile is a share in \[0, 1\], got 1.1"),
    (PGD, "clip", [1], r"clip must be \(lo, hi\)"),
    (PGD, "compile", "no", "compile must be True or False, got 'no'"),
    (MIFGSM, "decay", -0.5, "decay, the momentum's factor, must be at least 0"),
    (PGDL2, "eps_for_division", 0.0, "eps_for_division must be above 0"),
    *((cls, "loss", loss, "PMA climbs the loss") for cls in (PMA, PMAL2) for loss in LOSSES if loss[:4] != "prob"),
    (PMA, "loss", lambda outputs, labels: outputs.sum(1), "PMA climbs the loss 'probability_margin' by stages"),
    (PMA, "schedule", "cosine", "with step sizes of its own .schedule='constant'."),
]


@pytest.mark.parametrize(("cls", "name", "value", "message"), WRONG)
def test_a_wrong_setting_is_refused_when_given_and_when_assigned(cls, name, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls(net(), **{name: value})
    attack, (images, labels) = cls(net()), batch_of(N)
    attack(images, labels)
    setattr(attack, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        attack(images, labels)


PUBLIC = [each for each in vars(attacks).values() if isinstance(each, type) and issubclass(each, Attack)]


@pytest.mark.parametrize("cls", [each for each in PUBLIC if not inspect.isabstract(each)])
def test_every_setting_takes_its_type_alone(cls):
    """A configuration file gives text such as "0.5" or "no" by mistake; as a bool, "no" would be True."""
    given = {}
    for part in cls.__mro__[:-1]:
        parameters = inspect.signature(part.__init__).parameters.values() if "__init__" in vars(part) else ()
        given = {each.name: each.default for each in parameters if type(each.default) in (bool, int, float)} | given
    assert given.keys() >= {"eps", "compile", "graph", "best_iterate", "restarts", "eot", "kth_min"}
    for setting, default in given.items():
        texts = {"targeted": "no"} if setting == "targeted" else {setting: str(default)}
        with pytest.raises((TypeError, ValueError), match=setting):
            cls(net(), **texts)


def test_numbers_of_numpy_are_numbers():
    model, (images, labels) = net(), batch_of(N)
    given = PGD(model, np.float32(EPS), alpha=np.float32(EPS / 2), steps=np.int64(3))
    want = PGD(model, float(np.float32(EPS)), alpha=float(np.float32(EPS / 2)), steps=3)
    assert torch.equal(given(images, labels, seed=SEEDS), want(images, labels, seed=SEEDS))


def test_budgets_of_a_tensor_are_looked_at():
    images, labels = batch_of(N)
    for value in (-0.1, 8.0, torch.nan):
        with pytest.raises(ValueError, match=r"the images' scale \[0, 1\]"):
            PGD(net())(images, labels, eps=torch.tensor([0.1] * (N - 1) + [value]))
    with pytest.raises(TypeError, match="float tensor"):
        PGD(net())(images, labels, eps=torch.ones(N, dtype=torch.int64))


def test_a_subclass_with_a_forward_is_told():
    with pytest.raises(TypeError, match="defines start"):

        class Theirs(Attack):
            def forward(self, images, labels):
                return images


# ------------------------------------------------------------------ unwrapping changes nothing


class Doubled(Normalized):
    def forward(self, images):
        return super().forward(images) * torch.linspace(-1, 1, CLASSES).to(images)


def hooked():
    model = Normalized(net(), MEAN, STD)
    model.register_forward_hook(lambda module, inputs, outputs: outputs.flip(1))
    return model


def patched():
    model = Normalized(net(), MEAN, STD)
    inner = model.model
    model.forward = lambda images: inner(1 - images)
    return model


WRAPPED = {
    "nested": lambda: Normalized(Normalized(net(), MEAN, STD), (0.1, 0.2, 0.3), 0.5),
    "subclassed": lambda: Doubled(net(), MEAN, STD),
    "hooked": hooked,
    "a forward of its own": patched,
}


@pytest.mark.filterwarnings("ignore:the model seems to normalise its input already, in a Normalized")
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapped_model_is_attacked_as_the_function_that_it_is(wrapped):
    model, (images, labels) = WRAPPED[wrapped]().double(), batch_of(N)
    images = images.double()
    got = BIM(model, EPS, EPS / 3, 4)(images, labels)
    torch.testing.assert_close(got, plain_pgd(model, images, labels, EPS, EPS / 3, 4), rtol=0, atol=1e-12)


def test_a_hook_of_all_modules_is_called_for_a_normalised_model_too():
    model, (images, labels) = Normalized(net(), MEAN, STD).double(), batch_of(N)
    images, seen = images.double(), []

    def brighter(module, args):
        if module is model:
            seen.append(1)
            return (args[0] ** 2,)
        return None

    hook = nn.modules.module.register_module_forward_pre_hook(brighter)
    try:
        got = BIM(model, EPS, EPS / 3, 4)(images, labels)
    finally:
        hook.remove()
    expected = plain_pgd(lambda x: model(x**2), images, labels, EPS, EPS / 3, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert seen


def test_means_for_bytes_are_refused():
    with pytest.raises(ValueError, match="divide mean and std by 255"):
        Normalized(net(), (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))


# ------------------------------------------------------------------ a captured graph is never stale


class Stub(Engine):
    """Stands for a captured graph, and counts how many are made. Like a graph it fixes everything outside tensors."""

    made = 0

    def __init__(self, attack, slots):
        slots = copy.copy(slots)
        super().__init__(attack, slots)
        for name, t in slots.tensors().items():
            setattr(slots, name, t.clone())
        if slots.adv is None:
            slots.adv = slots.x.clone()
        type(self).made += 1

    def load(self, slots):
        mine = self.slots.tensors()
        for name, t in slots.tensors().items():
            mine[name].copy_(t)


@pytest.fixture
def captures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base, "GraphEngine", Stub)

    def count(call):
        before = Stub.made
        call()
        return Stub.made - before

    return count


def swapped(model):
    model[1] = nn.BatchNorm2d(3).eval()


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


BAKED = {
    "alpha": lambda attack, model: setattr(attack, "alpha", EPS / 9),
    "decay": lambda attack, model: setattr(attack, "decay", 0.5),
    "weights that were assigned": lambda attack, model: assigned(model),
    "a parameter's memory": lambda attack, model: setattr(model[1].weight, "data", torch.rand(3)),
    "a buffer": lambda attack, model: setattr(model[1], "running_mean", torch.rand(3)),
    "a type": lambda attack, model: model.to(torch.float64).to(torch.float32),
    "a module": lambda attack, model: swapped(model),
    "deterministic": lambda attack, model: setattr(torch.backends.cudnn, "deterministic", True),
    "tf32": lambda attack, model: torch.set_float32_matmul_precision("high"),
}


@pytest.fixture
def how_to_compute():
    """Restores PyTorch's global settings, such as the precision of matrix products."""
    before = torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision()
    torch.backends.cudnn.deterministic = False
    yield
    torch.backends.cudnn.deterministic = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("inside", [False, True], ids=["model", "inside a function"])
@pytest.mark.parametrize("what", BAKED)
@pytest.mark.usefixtures("how_to_compute")
def test_what_a_graph_has_baked_in_makes_another(captures, what, inside):
    model, (images, labels) = nn.Sequential(nn.Identity(), nn.BatchNorm2d(3), net()).eval(), batch_of(N)
    attack = MIFGSM((lambda x: model(x)) if inside else model, EPS, graph=True)
    assert captures(lambda: attack(images, labels)) == 1
    assert captures(lambda: attack(images, labels)) == 0
    BAKED[what](attack, model)
    assert captures(lambda: attack(images, labels)) == 1


def test_modes_and_the_caller_s_autocast_make_another_graph(captures):
    model, (images, labels) = nn.Sequential(nn.BatchNorm2d(3), net()).eval(), batch_of(N)
    attack = PGD(model, EPS, graph=True, training_mode="as_is")
    attack(images, labels)
    model[0].train()
    assert captures(lambda: attack(images, labels)) == 1
    model[0].eval()
    assert captures(lambda: attack(images, labels)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert captures(lambda: attack(images, labels)) == 1


def test_a_schedule_of_budgets_needs_one_graph_and_few_are_kept(captures):
    model, (images, labels) = net(), batch_of(2 * base.GRAPHS)
    attack = BIM(model, EPS, graph=True)

    def schedule():
        for step in range(1, 5):
            attack.eps = EPS * step / 4
            got = attack(images, labels)
            assert torch.equal(got, BIM(model, EPS * step / 4)(images, labels))
            assert torch.equal(attack(images, labels, eps=EPS / 5), BIM(model, EPS / 5)(images, labels))

    assert captures(schedule) == 1
    sizes = range(1, 2 * base.GRAPHS)
    assert captures(lambda: [attack(images[:n], labels[:n]) for n in sizes]) == len(sizes)
    assert len(attack._graphs) == base.GRAPHS
    assert captures(lambda: attack(images[: sizes[-1]], labels[: sizes[-1]])) == 0


# ------------------------------------------------------------------ images and models are left alone


class Writing(nn.Module):
    """A model that normalises its input in place, as many published models do."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        x -= 0.5
        x *= 3.0
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "labelled"),
    [
        (lambda m: FGSM(m, EPS), True),
        (lambda m: PGD(m, EPS), False),
        (lambda m: PGD(m, EPS, targeted="random"), True),
        (lambda m: PGD(m, EPS, restarts=3), True),
        (lambda m: TPGD(m, EPS), False),
        (lambda m: PGDL2(m, 0.5), True),
    ],
    ids=["FGSM", "no labels", "random targets", "restarts", "TPGD", "PGDL2"],
)
def test_a_model_that_writes_to_its_input_leaves_the_images_alone(make, labelled):
    writing, (images, labels) = Writing().eval(), batch_of(N)
    before, given = images.clone(), (labels if labelled else None)
    got = make(writing)(images, given, seed=SEEDS)
    assert torch.equal(images, before)
    assert torch.equal(got, make(lambda x: writing.inner((x - 0.5) * 3.0))(images, given, seed=SEEDS))


def without_grad(x):
    with torch.no_grad():
        x.sub_(0.5).mul_(3.0)


def through_numpy(x):
    array = x.detach().numpy()
    array -= 0.5
    array *= 3.0


UNSEEN = {
    "data": lambda x: x.data.sub_(0.5).mul_(3.0),
    "detach": lambda x: x.detach().sub_(0.5).mul_(3.0),
    "no_grad": without_grad,
    "NumPy": through_numpy,
}


@pytest.mark.parametrize("write", UNSEEN.values(), ids=UNSEEN)
@pytest.mark.parametrize(
    "make",
    [
        lambda m: FGSM(m, EPS),
        lambda m: PGD(m, EPS, best_iterate=True),
        lambda m: PGD(m, EPS, eot=2),
        lambda m: PGD(m, EPS, images_normalized=(0.5, 0.5)),
        lambda m: APGD(m, EPS, 4),
        lambda m: PGDL2(m, 0.5),
    ],
    ids=["FGSM", "best iterate", "eot", "images_normalized", "APGD", "PGDL2"],
)
def test_a_model_that_writes_to_its_input_past_autograd_is_attacked_like_one_that_does_not(make, write):
    inner, (images, labels) = net(), batch_of(N)

    def writing(x):
        write(x)
        return inner(x)

    before = images.clone()
    for attack in (make(writing),) * 2:  # its first batch and a later one
        got = attack(images, labels, seed=SEEDS)
        assert torch.equal(images, before)
        # Such a write has no derivative: the gradient is that of the inner model.
        assert torch.equal(got, make(lambda x: inner(Shifted.apply(x)))(images, labels, seed=SEEDS))


class Shifted(torch.autograd.Function):
    """(x - 0.5) * 3, with the derivative 1."""

    @staticmethod
    def forward(ctx, x):
        return (x - 0.5) * 3.0

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_second_thread_is_refused_and_the_first_goes_on():
    model, (images, labels), inside, go = net(), batch_of(N), threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            inside.set()
            assert go.wait(10)
            return self.inner(x)

    found = []
    first = threading.Thread(target=lambda: found.append(FGSM(Waiting().train(), EPS)(images, labels)))
    first.start()
    assert inside.wait(10)
    with pytest.raises(RuntimeError, match=r"another thread .*copy.deepcopy"):
        FGSM(model, EPS)(images, labels)
    child = os.fork()
    if child == 0:  # the child process has no other thread that holds the lock
        os._exit(0 if len(FGSM(model, EPS)(images, labels)) == N else 1)
    assert os.waitpid(child, 0)[1] == 0
    go.set()
    first.join()
    assert torch.equal(found[0], FGSM(model, EPS)(images, labels))  # now the model is free
    copy.deepcopy(model)


def test_a_model_that_attacks_itself_may():
    """The lock is reentrant: a thread that evaluates a model may also attack it."""
    model, (images, labels) = net(), batch_of(N)
    inner = FGSM(model, EPS)
    outer = FGSM(
        model, EPS, loss=lambda outputs, y: F.cross_entropy(outputs, y, reduction="none") + 0 * inner(images, y).sum()
    )
    assert torch.equal(outer(images, labels), inner(images, labels))


def test_putting_flags_back_never_hides_the_first_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.inner.train = None
            type(self.inner).training = property(lambda module: False)  # it cannot be set
            raise ZeroDivisionError("the first")

    class Layer(nn.Linear):
        pass

    model = Broken()
    model.inner = Layer(3, 3)
    with pytest.raises(ZeroDivisionError, match="the first"):
        FGSM(model, EPS)(*batch_of(N))


@pytest.mark.parametrize("made", ["script", "trace", "freeze"])
def test_torchscript_is_attacked_like_what_it_was_made_of(made):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)).eval()
    images, labels = batch_of(N)
    scripted = torch.jit.trace(model, images) if made == "trace" else torch.jit.script(model)
    scripted = torch.jit.freeze(scripted) if made == "freeze" else scripted
    got = PGD(scripted, EPS)(images, labels, seed=SEEDS)
    torch.testing.assert_close(got, PGD(model, EPS)(images, labels, seed=SEEDS), rtol=0, atol=2e-2 * EPS)


# ------------------------------------------------------------------ inputs without a box

BOXES = {"audio": ((-1.0, 1.0), 0.05), "embeddings": (None, 0.3), "bytes": ((0.0, 255.0), 8.0)}


@short_steps
@pytest.mark.parametrize("name", BOXES)
def test_inputs_of_other_ranges(name):
    clip, eps = BOXES[name]
    lo, hi = (-torch.inf, torch.inf) if clip is None else clip
    x = torch.randn(N, 1, 24, dtype=torch.float64) if clip is None else torch.rand(N, 1, 24).double() * (hi - lo) + lo
    labels, model = torch.arange(N) % 4, nn.Sequential(nn.Flatten(), nn.Linear(24, 4)).double().eval()
    with pytest.raises(ValueError, match="clip="):
        BIM(model, 0.1, 0.1)(x, labels)
    want = plain_pgd(model, x, labels, eps, eps / 3, 4, (lo, hi))
    torch.testing.assert_close(BIM(model, eps, eps / 3, 4, clip=clip)(x, labels), want, rtol=0, atol=1e-12)
    for attack in (PGD, TPGD, FFGSM, PGDL2):
        adv = attack(model, eps, eps / 4, clip=clip)(x, labels)
        moved = (adv - x).flatten(1)
        norm = moved.norm(dim=1) if attack is PGDL2 else moved.abs().amax(1)
        assert (norm <= eps * (1 + 1e-9)).all()
        assert norm.max() > eps / 2
        assert adv.min() >= lo
        assert adv.max() <= hi
    still = TPGD(model, eps, alpha=0.0, steps=1, clip=clip)(x, labels)  # its start, noise of deviation 0.001
    assert (still - x).abs().max() < 0.01
    with pytest.raises(ValueError, match="images must be in"):
        BIM(model, eps, eps, clip=clip)(x * 0 + 300 if clip else x * torch.nan, labels)


def test_bytes_are_in_the_usual_box():
    with pytest.raises(TypeError, match="uint8 images mean images / 255"):
        PGD(net(), 8, 2, clip=(0, 255))(torch.zeros(N, 3, 6, 6, dtype=torch.uint8), torch.zeros(N, dtype=torch.int64))


# ------------------------------------------------------------------ inputs without a problem to attack


def test_an_output_that_does_not_depend_on_the_input():
    model, (images, labels) = net(), batch_of(N)
    for broken in (
        lambda x: model(torch.from_numpy(x.detach().numpy())),
        lambda x: model(x.detach()).detach(),
        torch.no_grad()(model.forward),
    ):
        with pytest.raises(RuntimeError, match=r"does not depend on its input through autograd.*under no_grad"):
            PGD(broken)(images, labels)


def test_a_single_logit_is_refused():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(108, 1)), batch_of(N)[0]
    for call in (
        lambda: PGD(model)(images, torch.zeros(N, dtype=torch.int64)),
        lambda: PGD(model, targeted="random")(images, torch.zeros(N, dtype=torch.int64)),
        lambda: TPGD(model)(images),
        lambda: PGD(model)(images),
    ):
        with pytest.raises(ValueError, match="one logit"):
            call()
    own = PGD(model, loss=lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.float(), reduction="none"))
    assert not torch.equal(own(images, torch.ones(N)), images)


def test_soft_labels_are_probabilities():
    model, images = net(), batch_of(N)[0]
    PGD(model)(images, torch.rand(N, CLASSES).softmax(1))
    for wrong in (
        torch.ones(N, CLASSES),
        torch.zeros(N, CLASSES),
        torch.eye(CLASSES)[torch.arange(N) % CLASSES] * 2 - 0.2,
    ):
        with pytest.raises(ValueError, match="sum to 1"):
            PGD(model)(images, wrong)


def test_a_divergence_from_the_start_itself_is_refused():
    images, labels = batch_of(N)
    for attack in (FGSM(net(), EPS, loss="kl"), PGD(net(), EPS, random_start=False, loss="kl"), BIM(net(), loss="kl")):
        with pytest.raises(ValueError, match="is 0 there"):
            attack(images, labels)
    start = (images + 0.01).clamp(0, 1)
    assert not torch.equal(PGD(net(), EPS, random_start=False, loss="kl")(images, labels, x_init=start), images)


def saturated(share):
    """A model whose gradient is exactly zero for this share of the images, because of a plateau."""

    inner = net()

    def model(x):
        flat = torch.arange(len(x)) < round(share * len(x))
        return inner(torch.where(flat.view(-1, 1, 1, 1), x.round(), x))

    return model


@pytest.mark.parametrize("attack", [FGSM, FFGSM, PGD, TPGD, PMA])
def test_probabilities_are_told_of_and_logits_are_not(attack):
    model, (images, labels) = net(), batch_of(20)
    with pytest.warns(UserWarning, match="returns probabilities, not logits: the loss") as caught:
        attack(lambda x: model(x).softmax(1), EPS)(images, labels)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(lambda x: model(x).log_softmax(1), EPS)(images, labels)
        PGD(lambda x: model(x).softmax(1), EPS, loss="margin")(images, labels)


def test_zero_gradients_are_told_of_once():
    images, labels = batch_of(20)
    attack = PGD(saturated(0.15), EPS)
    with pytest.warns(UserWarning, match="exactly zero for 3 of 20 images"):
        attack(images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(images, labels)
        PGD(saturated(0.05), EPS)(images, labels)
        PGD(saturated(0.5), EPS)(images[:7], labels[:7])


@pytest.mark.parametrize("loss", ["targeted_margin", "margin"])
def test_fab_tells_of_zero_gradients_too(loss):
    with pytest.warns(UserWarning, match="exactly zero for 3 of 20 images"):
        FAB(saturated(0.15), EPS, steps=2, loss=loss)(*batch_of(20))


def test_zero_gradients_of_small_batches_are_summed_up():
    images, labels = batch_of(12)
    attack = PGD(saturated(1.0), EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(7):
            attack(images[k : k + 1], labels[k : k + 1])
    with pytest.warns(UserWarning, match="exactly zero for 12 of 12 images"):
        attack(images[7:], labels[7:])


@pytest.mark.parametrize(("cls", "least"), [(PGDL2, 1e-10), (APGDL2, 1e-12)])
def test_gradients_that_an_l2_step_cannot_follow_are_told_of(cls, least):
    """As of a model that is sure: of two classes with a margin of 50 cross-entropy leaves e^-50."""
    images, weight = torch.rand(20, 3, 6, 6), torch.randn(108)
    labels = torch.zeros(20, dtype=torch.int64)

    def model(x):
        ahead = 50 + 0.01 * (x.flatten(1) @ weight)
        return torch.stack((ahead, 0 * ahead), 1)

    with pytest.warns(UserWarning, match=f"or at most {least:g} long, for 20 of 20 images .*float64"):
        adv = cls(model)(images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        further = cls(model, loss="margin")(images, labels)
    assert (model(further)[:, 0] < model(adv)[:, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-35, 1e-22, 1.0, 1e22, 1e35])
def test_the_scale_of_a_loss_changes_no_l2_step(scale, dtype):
    images, weight = torch.full((N, 3, 6, 6), 0.5, dtype=dtype), torch.randn(108, N, dtype=dtype).abs() + 0.1

    def loss(outputs, _):
        return outputs.flatten(1).mul(weight.T * scale).sum(1)

    attacks = [PGDL2(lambda x: x, 0.1, 0.1, 1, loss=loss, eps_for_division=1e-40)]
    if scale >= 1:  # APGD's authors add 1e-12
        attacks.append(APGDL2(lambda x: x, 0.1, 1, loss=loss))
    for attack in attacks:
        adv = attack(images, torch.zeros(N), x_init=images)
        want = 0.1 * weight.T / weight.T.double().norm(dim=1, keepdim=True)
        torch.testing.assert_close((adv - images).flatten(1).double(), want.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the gradient is exactly zero")  # that of dlr may be
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_labels_of_later_batches_that_name_no_class_are_counted(loss):
    images, labels = batch_of(N)
    attack = PGD(net(), EPS, loss=loss)
    attack(images, labels)
    wrong = labels.clone()
    wrong[1], wrong[3] = -100, CLASSES
    with pytest.warns(UserWarning, match=f"2 labels name no class, they must be in .0, {CLASSES}") as told:
        adv = attack(images, wrong, seed=SEEDS)
    assert told[0].filename == __file__
    others = torch.tensor([0, 2, 4, 5])
    assert torch.equal(adv[others], attack(images, labels, seed=SEEDS)[others])


# ------------------------------------------------------------------ masked classes


@pytest.mark.parametrize("loss", ["kl", "soft"])
def test_impossible_classes_are_as_if_they_were_not_there(loss):
    z = torch.randn(N, 6, dtype=torch.float64)
    kept = [0, 1, 2, 4]
    mask = torch.full((6,), -torch.inf).double()
    mask[kept] = 0
    targets = torch.zeros(N, 6, dtype=torch.float64)
    targets[:, kept] = torch.rand(N, 4).double().softmax(1)
    name = "ce" if loss == "soft" else loss
    whole, cut = z.clone().requires_grad_(), z[:, kept].clone().requires_grad_()
    got, want = LOSSES[name](whole + mask, targets), LOSSES[name](cut, targets[:, kept])
    torch.testing.assert_close(got, want)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(whole.grad[:, kept], cut.grad)
    assert not whole.grad[:, [3, 5]].any()


# ------------------------------------------------------------------ starts and targets


def test_a_start_outside_ball_and_box_is_brought_in():
    model, (images, labels) = net().double(), batch_of(N)
    images = images.double()
    far = torch.rand_like(images) * 3 - 1
    got = PGD(model, EPS, EPS / 3, 3)(images, labels, x_init=far)
    want = plain_pgd(model, images, labels, EPS, EPS / 3, 3, start=far.clamp(0, 1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_random_targets_are_drawn_by_a_counter_of_their_own():
    model, (images, labels) = net(), batch_of(N)
    seeds = torch.randint(2**62, (N,))
    draw = sample_seeds(seeds, torch.zeros(N, dtype=torch.int64), 2**32 - 1) & 0xFFFFFFFF
    targets = (labels + 1 + draw % (CLASSES - 1)) % CLASSES
    got = PGD(model, EPS, targeted="random")(images, labels, seed=seeds)
    assert torch.equal(got, PGD(model, EPS, targeted=True)(images, targets, seed=seeds))


def test_what_takes_images_alone_refuses_attacks_on_other_inputs():
    model, (images, labels) = net(), batch_of(N)
    attack = PGD(model, EPS, clip=(-1, 1))
    with pytest.raises(ValueError, match=r"clip=\(-1, 1\), and what is judged are images in \[0, 1\]"):
        evaluate(model, (images, labels), [attack], progress=False)
    with pytest.raises(ValueError, match=r"clip=\(-1, 1\)"):
        Trainer(model, EPS, attack=attack, epochs=1).fit((images, labels))


class Spoiling(torch.autograd.Function):
    """The identity, whose backward pass writes into the gradient that it gets."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.neg_().clone()


def test_a_loss_that_writes_into_its_gradient_is_the_same_loss_in_every_step():
    model, (x, y) = Net().double(), batch_of(6, torch.float64)

    def spoiling(logits, labels):
        return Spoiling.apply(F.cross_entropy(logits, labels, reduction="none"))

    adv = PGD(model, 0.1, 0.02, steps=5, random_start=False, loss=spoiling)(x, y)
    by_hand = PGD(model, 0.1, 0.02, steps=5, random_start=False, loss="ce", targeted=True)(x, y)
    assert torch.equal(adv, by_hand)
