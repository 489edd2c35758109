"""The fingerprint of a run: every change of the computation changes it, and nothing else does."""

import functools
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchattacks
from attacked import one_thread as one_thread
from dispatched import Allocated
from torch import nn

from fastadv.attacks import FGSM, PGD, Normalized, create_attack
from fastadv.evaluation import evaluate
from fastadv.evaluation.identity import differences, fingerprint, unidentifiable
from fastadv.evaluation.identity import known_hash as in_pieces
from fastadv.training import Trainer

EPS = 8 / 255
SCALE = 2.0


def net(seed=0, **attributes):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Scaled(nn.Module):
    offset = 1.0

    def __init__(self, scale, inner=None):
        super().__init__()
        self.scale, self.inner = scale, net() if inner is None else inner
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.inner(x) * self.scale + self.offset


class Shifted(Scaled):
    offset = 2.0


class Foreign:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, images, labels):
        return images


class Other(Foreign):
    def __call__(self, images, labels):
        return 1 - images


class Slotted:
    __slots__ = ("step",)

    def __init__(self, step):
        self.step = step

    def __call__(self, images, labels):
        return images + self.step


class Own(PGD):
    def __init__(self, *args, factor=1.0, **options):
        super().__init__(*args, **options)
        self._factor = factor


def closing_over(value):
    return lambda images, labels: images + value


def one(images, labels):
    return images


def two(images, labels):
    return images + 0


def with_default(images, labels, step=0.1):
    return images + step


def other_default(images, labels, step=0.2):
    return images + step


def inner_constant(value):
    def attack(images, labels):
        return [image + value for image in images]

    return attack


def global_of(value):
    """A function with the same code as the others and another value of a global."""
    return eval("lambda x, y: x + STEP", {"STEP": value})


def hooked(hook):
    made = net()
    made[1].register_forward_hook(hook)
    return made


def ours(model=None, **options):
    return PGD(net() if model is None else model, EPS, **options)


def own_loss(weight):
    return lambda outputs, y: weight * nn.functional.cross_entropy(outputs, y, reduction="none")


def theirs(model=None, **attributes):
    attack = torchattacks.PGD(net() if model is None else model, EPS)
    vars(attack).update(attributes)
    return attack


# Pairs of functions that make two different computations.
DIFFERENT = {
    "another function": (lambda: one, lambda: two),
    "closure": (lambda: closing_over(0.1), lambda: closing_over(0.2)),
    "tensor in a closure": (lambda: closing_over(torch.zeros(3)), lambda: closing_over(torch.ones(3))),
    "module in a closure": (lambda: closing_over(net(0)), lambda: closing_over(net(1))),
    "constant of an inner function": (lambda: inner_constant(1), lambda: inner_constant(2)),
    "default": (lambda: with_default, lambda: other_default),
    "global": (lambda: global_of(1.0), lambda: global_of(2.0)),
    "partial": (lambda: functools.partial(one, step=1), lambda: functools.partial(one, step=2)),
    "function's attribute": (lambda: SimpleNamespace(f=one), lambda: SimpleNamespace(f=with_default)),
    "bound method": (lambda: Foreign(a=1).__call__, lambda: Foreign(a=2).__call__),
    "class": (lambda: Foreign(), lambda: Other()),
    "attribute": (lambda: Foreign(step=0.1), lambda: Foreign(step=0.2)),
    "private attribute": (lambda: Foreign(_step=0.1), lambda: Foreign(_step=0.2)),
    "slot": (lambda: Slotted(0.1), lambda: Slotted(0.2)),
    "list": (lambda: Foreign(attacks=["apgd-ce", "fab"]), lambda: Foreign(attacks=["apgd-ce"])),
    "order of a list": (lambda: Foreign(attacks=["a", "b"]), lambda: Foreign(attacks=["b", "a"])),
    "nested": (lambda: Foreign(a=[{"b": (1, 2)}]), lambda: Foreign(a=[{"b": (1, 3)}])),
    "array": (lambda: Foreign(a=np.zeros(3)), lambda: Foreign(a=np.ones(3))),
    "number's type": (lambda: Foreign(a=1), lambda: Foreign(a=True)),
    "set": (lambda: Foreign(a={"x", "y"}), lambda: Foreign(a={"x", "z"})),
    "pattern": (lambda: Foreign(a=re.compile("x+")), lambda: Foreign(a=re.compile("x*"))),
    "pattern's flags": (lambda: Foreign(a=re.compile("x")), lambda: Foreign(a=re.compile("x", re.IGNORECASE))),
    "surrogate's weights": (lambda: Foreign(model=net(0)), lambda: Foreign(model=net(1))),
    "surrogate of a transfer": (lambda: ours(net(0)), lambda: ours(net(1))),
    "surrogate's normalisation": (lambda: ours(Normalized(net(), 0.5, 0.5)), lambda: ours(Normalized(net(), 0.4, 0.5))),
    "alpha": (lambda: ours(alpha=1 / 255), lambda: ours(alpha=2 / 255)),
    "loss": (lambda: ours(loss="ce"), lambda: ours(loss="margin")),
    "loss's constant": (lambda: ours(loss=own_loss(1.0)), lambda: ours(loss=own_loss(2.0))),
    "own attack's private attribute": (lambda: Own(net(), EPS), lambda: Own(net(), EPS, factor=2.0)),
    "module's plain attribute": (lambda: Scaled(1.0), lambda: Scaled(2.0)),
    "module's class": (lambda: Scaled(1.0), lambda: Shifted(1.0)),
    "attribute of an installed module": (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2)),
    "attribute of an inner module": (lambda: net(flag=nn.LeakyReLU(0.1)), lambda: net(flag=nn.LeakyReLU(0.2))),
    "hidden buffer": (lambda: Scaled(1.0), lambda: (made := Scaled(1.0)).hidden.add_(1) is None or made),
    "hook": (lambda: hooked(lambda m, a, out: out), lambda: hooked(lambda m, a, out: out * 2)),
    "order of layers": (
        lambda: nn.Sequential(OrderedDict(a=nn.ReLU(), b=nn.Tanh())),
        lambda: nn.Sequential(OrderedDict(b=nn.Tanh(), a=nn.ReLU())),
    ),
    "another library's": (lambda: theirs(steps=10), lambda: theirs(steps=20)),
    "another library's targets": (
        lambda: theirs(_target_map_function=lambda x, y: y),
        lambda: theirs(_target_map_function=lambda x, y: y + 1),
    ),
    "another library's lists": (
        lambda: torchattacks.AutoAttack(net(), version="standard", seed=0),
        lambda: torchattacks.AutoAttack(net(), version="rand", seed=0),
    ),
    "script's weights": (lambda: torch.jit.script(net(0)), lambda: torch.jit.script(net(1))),
    "script's code": (
        lambda: torch.jit.script(nn.Sequential(nn.ReLU())),
        lambda: torch.jit.script(nn.Sequential(nn.Tanh())),
    ),
}


def told(value):
    found = fingerprint({"it": value})
    assert not unidentifiable(found)
    return found


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_computation_is_told(case):
    first, second = (told(make()) for make in DIFFERENT[case])
    assert first != second
    assert differences(first, second) == "it"


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_same_computation_made_again_is_the_same(case):
    for make in DIFFERENT[case]:
        assert told(make()) == told(make())


def test_what_a_call_leaves_behind_is_no_difference():
    images, labels = torch.rand(9, 3, 2, 2), torch.randint(3, (9,))
    for make in (
        lambda: ours(net(), restarts=2),
        lambda: create_attack("mifgsm", net(), EPS),
        lambda: torchattacks.PGD(net(), EPS),
        lambda: Own(net(), EPS),
    ):
        attack = make()
        before = told(attack)
        attack(images, labels)
        assert told(attack) == before == told(make())


CALLS = 0


class Counting(torch.autograd.Function):
    calls, scale = 0, 2.0

    @staticmethod
    def forward(ctx, x):
        return x * Counting.scale

    @staticmethod
    def backward(ctx, grad):
        Counting.calls += 1
        return grad * Counting.scale


class Counted(Foreign):
    calls, weight = 0, 1.0

    @classmethod
    def count(cls):
        cls.calls = cls.calls + 1

    def weigh(self, value):
        self.weight = value * self.weight  # an attribute of the instance, not of the class

    def __call__(self, images, labels):
        self.count()
        return Counting.apply(images)


def counting():
    calls = 0

    def attack(images, labels):
        global CALLS
        nonlocal calls
        calls, CALLS = calls + 1, CALLS + 1
        return images

    return attack


@pytest.mark.parametrize("make", [Counted, counting])
def test_how_often_something_ran_is_no_difference(make):
    attack, images = make(), torch.ones(2, 3, requires_grad=True)
    before = told(attack)
    attack(images, None).sum().backward()
    assert told(attack) == before
    assert (Counting.calls, Counted.calls) >= (1, 1) if make is Counted else CALLS >= 1


@pytest.mark.parametrize(("owner", "name"), [(Counting, "scale"), (Counted, "weight")])
def test_what_a_class_only_reads_or_sets_for_its_instances_is_one(owner, name, monkeypatch):
    before = told(Counted())
    monkeypatch.setattr(owner, name, 3.0)
    assert told(Counted()) != before


def test_flags_and_devices_are_no_difference():
    model = net()
    before = told(model)
    model.eval().requires_grad_(False)
    assert told(model) == before
    assert told(Foreign(device=torch.device("cpu"))) == told(Foreign(device=torch.device("meta")))


def test_compilation_in_place_is_no_difference():
    plain, model = net(), net()
    model.compile(backend="eager")
    assert told(model) == told(plain)
    model(torch.rand(2, 3, 2, 2))
    assert told(model) == told(plain)


PROCESS = """
import sys
from test_identity import DIFFERENT, fingerprint
print({case: [fingerprint({"it": make()}) for make in pair] for case, pair in DIFFERENT.items()})
"""


def test_another_process_says_the_same():
    """Another process has other addresses and other hashes of strings."""
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    both = [subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert printed[0] == printed[1] != ""


def test_models_of_other_packages_are_told_by_their_weights_alone():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )

    def makers(seed):
        torch.manual_seed(seed)
        yield timm.create_model("vit_tiny_patch16_224", embed_dim=12, depth=1, num_heads=2, num_classes=3)
        yield timm.create_model("resnet10t", num_classes=3)
        yield transformers.ViTForImageClassification(config)

    first, again, other = ([told(model) for model in makers(seed)] for seed in (0, 0, 1))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("unknown", [threading.Lock(), sys.stderr, (i for i in range(3)), torch.zeros(2).to_sparse()])
def test_what_cannot_be_told_equals_nothing_and_takes_a_name(unknown):
    first = fingerprint({"the attack": Foreign(a=[unknown])})
    assert first != fingerprint({"the attack": Foreign(a=[unknown])})
    assert "the attack (it holds a" in unidentifiable(first)[0]
    assert "fastadv_key" in unidentifiable(first)[0]
    named = [fingerprint({"it": Foreign(a=[unknown], fastadv_key=key)}) for key in ("one", "one", "two")]
    assert not unidentifiable(named[0])
    assert named[0] == named[1] != named[2]


def test_what_differs_is_said_by_name_and_value():
    here, there = (fingerprint({"eps": eps, "attack": attack, "same": 3}) for eps, attack in ((1, one), (2, two)))
    assert differences(here, there) == "eps (2 there, 1 here), attack"
    assert "same" not in differences(fingerprint({"same": 3}), there)
    unnamed = fingerprint({"attack": Foreign(a=[threading.Lock()])})
    assert differences(fingerprint({"attack": Foreign(a=[1])}), unnamed) == "attack"
    assert set(json.loads(here)) == {"eps", "attack", "same"}


def test_containers_that_hold_themselves_end():
    endless = [1]
    endless.append(endless)
    assert told(endless) == told(endless)
    assert told(deque([1, 2])) != told(deque([2, 1]))


@pytest.mark.parametrize("part", ["attack", "model"])
def test_an_evaluation_s_state_is_refused_for_what_is_not_in_its_settings(tmp_path, part):
    images = 0.9 * torch.rand(8, 3, 2, 2)  # perturbed images stay in the box
    with torch.no_grad():
        labels = Scaled(1.0)(images).argmax(1)  # without an image to attack there would be no state

    def run(value):
        model = Scaled(value if part == "model" else 1.0)
        attacks = ["fgsm"] if part == "model" else [closing_over(value)]
        return evaluate(model, (images, labels), attacks, state=tmp_path / "state")["attacks"]

    assert run(0.01) == run(0.01)
    with pytest.raises(ValueError, match=f"differs in.*{part}"):
        run(0.02)


@pytest.mark.filterwarnings("ignore:nothing was attacked")
def test_an_evaluation_without_a_name_for_it_has_no_state(tmp_path):
    attack = Foreign(lock=threading.Lock())
    batch = torch.rand(8, 3, 2, 2), torch.randint(3, (8,))
    with pytest.raises(TypeError, match=r"no state for such a run: attack 1 \(it holds a lock.*fastadv_key"):
        evaluate(net(), batch, [attack], state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    attack.fastadv_key = "mine"
    evaluate(net(), batch, [attack], state=tmp_path / "state")


def train(folder, attack=one, scale=1.0, resume=True, **settings):
    images = torch.rand(24, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    data, val = ((part, torch.arange(12) % 3) for part in images.split(12))
    options = {"epochs": 1, "batch_size": 6, "probe": 0, "measure_backbone": False, "progress": False, **settings}
    trainer = Trainer(Scaled(scale), EPS, attack=attack, folder=folder, resume=resume, device="cpu", **options)
    return trainer.fit(data, val)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attack": two}, "attack"),
        ({"eval_attack": closing_over(0.5)}, "eval_attack"),
        ({"scale": 2.0}, "the model"),
        ({"lr": 0.1}, r"lr \(0.001 there, 0.1 here\)"),
    ],
)
def test_a_training_s_state_is_refused_for_another_computation(tmp_path, change, named):
    records = train(tmp_path)
    assert train(tmp_path) == records
    with pytest.raises(ValueError, match=f"another run, which differs in {named}"):
        train(tmp_path, **change)


def test_a_training_goes_on_for_more_epochs_and_with_other_evaluations(tmp_path):
    assert [r["epoch"] for r in train(tmp_path) if "epoch" in r] == [0]
    with pytest.warns(UserWarning, match="the result is not that of 3 in one run"):
        records = train(tmp_path, epochs=3, eval_every=2)
    assert [r["epoch"] for r in records if "epoch" in r] == [0, 1, 2]
    assert records[-1]["final"]
    assert records[-1]["epochs"] == 3
    with pytest.raises(ValueError, match="3 epochs behind it"):
        train(tmp_path, epochs=2)


def test_a_training_that_cannot_be_resumed_says_so_at_once(tmp_path):
    attack = Foreign(lock=threading.Lock())
    with pytest.warns(UserWarning, match="cannot be resumed: attack .it holds a lock"):
        train(tmp_path, attack)
    with (
        pytest.warns(UserWarning, match="cannot be resumed"),
        pytest.raises(ValueError, match=r"differs in attack \(it"),
    ):
        train(tmp_path, attack)


def test_a_traced_module_is_told_by_its_code():
    graphs = [torch.fx.symbolic_trace(nn.Sequential(each())) for each in (nn.ReLU, nn.Tanh)]
    assert told(graphs[0]) == told(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    assert told(graphs[0]) != told(graphs[1])
    assert told(FGSM(graphs[0], EPS)) != told(FGSM(graphs[1], EPS))


def test_a_large_tensor_is_read_in_pieces_and_known_by_its_values():
    images = torch.rand(600, 3, 32, 32)
    elsewhere = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # the same values in another layout
    with Allocated() as allocated:
        first, second = (fingerprint({"images": part}) for part in (images, elsewhere))
    assert first == second
    assert allocated.most < images.nbytes / 5
    images[-1, -1, -1, -1] += 1
    assert fingerprint({"images": images}) != first
    assert fingerprint({"images": images.reshape(600, -1)}) != fingerprint({"images": images})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("count", [3, 7001])  # the larger number is more than a MiB, which is hashed by itself
def test_images_that_come_in_pieces_are_the_same_as_in_one(dtype, count):
    images = torch.randint(0, 256, (count, 3, 8, 8)).to(dtype)
    labels = torch.randint(0, 5, (count,))
    whole = fingerprint({"data": (images, labels)})
    assert fingerprint({"data": (in_pieces(dtype, images.shape, images.split(1000)), labels)}) == whole
    assert fingerprint({"data": (in_pieces(dtype, images.shape, images.flip(0).split(1000)), labels)}) != whole
