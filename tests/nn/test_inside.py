"""A network inside a callable is frozen and left as it was, like one that is the model itself."""

import collections
import functools
import itertools
import logging
import sys
import types
import weakref

import pytest
import torch
from torch import nn

from fastadv.attacks import PGD, Normalized
from fastadv.evaluation import evaluate
from fastadv.evaluation.identity import are_equal
from fastadv.nn.frozen import frozen
from fastadv.nn.inside import as_module
from fastadv.nn.kinship import is_another, is_part

EPS = 8 / 255
LOG = logging.getLogger(__name__)
NET: nn.Module
HELD: dict[str, list[nn.Module]]
PACKAGE = types.ModuleType("package")
PACKAGE.helpers = types.ModuleType("package.helpers")
PACKAGE.helpers.package = PACKAGE


class Net(nn.Module):
    """One whose outputs and buffers depend on its mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


class WithList:
    def __init__(self, net):
        self.nets = [net]

    def __call__(self, x):
        return self.nets[0](x)

    def logits(self, x):
        return self(x)


class WithSlot:
    __slots__ = ("net",)

    def __call__(self, x):
        return self.net(x)


class WithGlobal:
    def __call__(self, x):
        LOG.debug("called")
        return NET(x)


def with_slot(net):
    made = WithSlot()
    made.net = net
    return made


def with_class(net):
    class Holder:
        held = net

        @classmethod
        def logits(cls, x):
            return cls.held(x)

    return Holder.logits


def with_default(net):
    def logits(x, net=net):
        return net(x)

    return logits


def of_helper(x):
    return HELD["nets"][0](x)


def with_weak_reference(net):
    reference = weakref.ref(net)
    return lambda x: reference()(x)


class Unregistered(nn.Module):
    """A module that calls what it holds and has not registered."""

    def __init__(self, held):
        super().__init__()
        self.scale = nn.Linear(1, 1)
        self.__dict__["held"] = held

    def forward(self, x):
        held = next(self.held) if isinstance(self.held, itertools.repeat) else self.held
        return (held if callable(held) else held[0])(x)


class Parts:
    """An object that cannot be called itself."""

    def __init__(self, net):
        self.net = net


class OfParts(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return self.parts.net(x)


def with_closure_of_its_class(net):
    class Through(nn.Module):
        def forward(self, x):
            return net(x)

    return Through()


def with_hook(net):
    through = nn.Identity()
    through.register_forward_hook(lambda module, args, output: net(output))
    return through


def with_import_inside(net):
    sys.modules["imported_inside"] = held = types.ModuleType("imported_inside")
    held.net = net

    def call(x):
        from imported_inside import net as inner

        return inner(x)

    return call


def of_import(net):
    helpers = types.ModuleType("helpers")
    helpers.net = net
    return lambda x: helpers.net(x)


HOLDERS = {
    "lambda": lambda net: lambda x: net(x),
    "partial": functools.partial,
    "method": lambda net: net.forward,
    "object": WithList,
    "its method": lambda net: WithList(net).logits,
    "closure over an object": lambda net: (lambda held: lambda x: held.logits(x))(WithList(net)),
    "slot": with_slot,
    "class": with_class,
    "default": with_default,
    "keyword": lambda net: functools.partial(lambda x, nets: nets["a"](x), nets={"a": net}),
    "decorated": lambda net: torch.enable_grad()(lambda x: net(x)),
    "global": lambda net: lambda x: NET(x),
    "global of a class": lambda net: WithGlobal(),
    "global of a helper": lambda net: lambda x: of_helper(x),
    "weak reference": with_weak_reference,
    "import that a call makes": with_import_inside,
    "import": lambda net: lambda x: PACKAGE.helpers.net(x),
    "import within a function": of_import,
    "normalised": lambda net: Normalized(lambda x: net(x), 0.0, 1.0),
    "normalised method": lambda net: Normalized(net.forward, 0.0, 1.0),
    "function of a module": lambda net: Unregistered(lambda x: net(x)),
    "list of a module": lambda net: Unregistered([net]),
    "module of a module": Unregistered,
    "object without a call of a module": lambda net: OfParts(Parts(net)),
    "namespace of a module": lambda net: OfParts(types.SimpleNamespace(net=net)),
    "deque of a module": lambda net: Unregistered(collections.deque([net])),
    "iterator of a module": lambda net: Unregistered(itertools.repeat(net)),
    "dict of a module's, read-only": lambda net: Unregistered(types.MappingProxyType({0: net})),
    "weak dict of a module's": lambda net: Unregistered(weakref.WeakValueDictionary({0: net})),
    "object of a module within a module": lambda net: nn.Sequential(nn.Identity(), Unregistered(WithList(net))),
    "closure over such a module": lambda net: (lambda held: lambda x: held(x))(Unregistered([net])),
    "class of a module": with_closure_of_its_class,
    "hook of a module": with_hook,
    "compiled": lambda net: torch.compile(lambda x: net(x), backend="eager"),
}


@pytest.fixture
def net():
    """A network in train mode, also where the holders look for a global."""
    global NET, HELD
    torch.manual_seed(0)
    NET = Net().train()
    HELD = {"nets": [NET]}
    PACKAGE.helpers.net = NET
    return NET


def state_of(net):
    return [t.clone() for t in net.state_dict().values()], [m.training for m in net.modules()]


def assert_same(new, old):
    assert new[1] == old[1]
    assert all(map(torch.equal, new[0], old[0]))


@pytest.mark.parametrize("held", HOLDERS.values(), ids=HOLDERS)
def test_a_network_inside_a_callable_is_attacked_as_the_network_itself(held, net):
    images, labels = torch.rand(16, 3, 2, 2), torch.randint(3, (16,))
    before, model = state_of(net), held(net)
    expected = PGD(net, EPS)(images, labels, seed=3)
    assert torch.equal(PGD(model, EPS)(images, labels, seed=3), expected)
    assert_same(state_of(net), before)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_an_evaluation_of_a_lambda_says_what_that_of_the_network_says(net):
    data = torch.rand(40, 3, 2, 2), torch.randint(3, (40,))
    before, answers = state_of(net), []
    for model in (net, lambda x: net(x)):
        report = evaluate(model, data, "pgd-10", eps=EPS, batch_size=7, progress=False)
        answers.append((report["clean_accuracy"], report["robust_accuracy"]))
    assert answers[0] == answers[1]
    assert_same(state_of(net), before)


def test_a_closure_that_changes_is_followed(net):
    other, model = Net().train(), lambda x: net(x)
    attack = PGD(model, EPS)
    images, labels = torch.rand(16, 3, 2, 2), torch.randint(3, (16,))
    attack(images, labels)
    net, before = other, state_of(other)
    attack(images, labels)
    assert_same(state_of(other), before)


def test_only_what_the_callable_uses_is_found(net):
    other = Net()
    assert list(as_module(lambda x: other(x))) == [other]
    assert list(as_module(torch.relu)) == []
    assert as_module(net) is net
    net.registered, net.hidden = [net.head], [other]
    assert list(as_module(net)) == [net, other]
    net.hidden = []
    assert as_module(net) is net
    with frozen(lambda x: other(x)):
        assert not any(m.training for m in other.modules())
        assert all(m.training for m in net.modules())
        assert not any(p.requires_grad for p in other.parameters())


def test_a_network_inside_the_loss_or_the_choice_of_targets_is_frozen_and_left_as_it_was(net):
    critic = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    still = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    images, labels = torch.rand(16, 3, 2, 2), torch.randint(3, (16,))

    def attacked(critic, chooser):
        return PGD(
            net,
            EPS,
            loss=lambda outputs, targets: nn.functional.cross_entropy(critic(outputs), targets, reduction="none"),
            targeted=lambda x, y: (chooser(x).argmax(1) + y) % 3,
        )(images, labels, seed=3)

    chooser = Net().train()
    before = state_of(critic), state_of(chooser)
    expected = Net().eval()
    expected.load_state_dict(chooser.state_dict())
    assert torch.equal(attacked(critic, chooser), attacked(still, expected))
    assert_same(state_of(critic), before[0])
    assert_same(state_of(chooser), before[1])


def test_models_inside_callables_are_told_apart(net):
    def one(net):
        return Normalized(lambda x: net(x), 0.5, 0.25)

    other = Net()
    assert is_another(one(net), lambda x: other(x))
    assert not is_another(one(net), lambda x: net(x))
    assert is_part(net, one(net))
    assert not is_part(other, one(net))
    assert not are_equal(one(net), one(other))
    assert are_equal(one(net), one(net))


def test_images_that_are_normalised_already_are_refused_before_a_function_that_normalises(net):
    wrapped = Normalized(net, 0.5, 0.25)
    with pytest.raises(ValueError, match="would do it again"):
        PGD(lambda x: wrapped(x), EPS, images_normalized=(0.5, 0.25))
    PGD(lambda x: net(x), EPS, images_normalized=(0.5, 0.25))
