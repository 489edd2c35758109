"""On a GPU captured graphs give the eager attack's bits, and an evaluation has the CPU's verdicts."""

import functools
from functools import partial
from itertools import count

import pytest
import torch
from attacked import one_thread as one_thread
from attacked import short_steps
from cut import Cut
from gpus import needs_gpu
from test_cuda_graph import EPS
from test_cuda_graph import model as model
from test_cuda_graph import one_order as one_order
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.attacks import APGDL2, FABL2, FGSM, PGD, PMAL2, PRESETS, Normalized, Square, SquareL2, create_attack
from fastadv.evaluation import evaluate, queue
from fastadv.evaluation import run as evaluation_run
from fastadv.evaluation.queue import Queue

# So small a model gives these warnings, which are not tested here.
TOLD = ("the last", "gradients look masked", "robust accuracy rises")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{told}") for told in TOLD]

STEPS, QUERIES, L2_EPS = 4, 40, 0.1
IN_L2 = {"apgdl2": APGDL2, "fabl2": FABL2, "pmal2": PMAL2, "squarel2": SquareL2}
NAMES = (*PRESETS, *IN_L2)
every_attack = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=[pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return request.param


def attack_of(name, model, eps=EPS, **options):
    """A preset with few steps, or an attack in L2."""
    kind = IN_L2[name] if name in IN_L2 else PRESETS[name][0]
    if issubclass(kind, (Square, SquareL2)):
        options["n_queries"] = QUERIES
    elif not issubclass(kind, FGSM):
        options["steps"] = STEPS
    if name in IN_L2:
        return kind(model, L2_EPS, **options)
    return create_attack(name, model, eps, **options)


# ---------------------------------------------------------------------- graphs


OPTIONS = {
    "plain": {},
    "alpha": {},
    "uint8": {},
    "eot": {"eot": 2},
    "best": {"best_iterate": True},
    "normalized": {},
    "images_normalized": {"images_normalized": ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))},
}


@every_attack
@pytest.mark.parametrize("option", OPTIONS)
def test_graph_equals_eager_bit_for_bit(device, model, name, option):
    """The capture and the replays each take other images."""
    attacked = Normalized(model, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)) if option == "normalized" else model
    eager, graph = (attack_of(name, attacked, **OPTIONS[option], graph=graph) for graph in (False, True))
    if option == "alpha" and not isinstance(getattr(eager, "alpha", None), float):
        return
    for seed in (1, 2, torch.arange(6, device=device)):
        images = torch.rand(6, 3, 8, 8, device=device)
        if option == "uint8":
            images = (images * 255).to(torch.uint8)
        if option == "images_normalized":
            images = (images - 0.4) / 0.4
        if option == "alpha":
            eager.alpha = graph.alpha = EPS * (0.1 + torch.rand(6, device=device))
        with torch.no_grad():
            labels = attacked(images / 255 if option == "uint8" else images).argmax(1)
        found, expected = graph(images, labels, seed=seed), eager(images, labels, seed=seed)
        with torch.no_grad():  # to tell a tie, which another order of summation breaks, from a fault
            logits = None if option in ("uint8", "images_normalized") else (attacked(found), attacked(expected))
        assert torch.equal(found, expected), (seed, (found != expected).flatten(1).sum(1), labels, logits)
        assert not torch.equal(found, images / 255 if option == "uint8" else images)


@pytest.mark.filterwarnings("ignore:its eps is")
@every_attack
@short_steps
@pytest.mark.parametrize("rows", [False, True], ids=["0-dim", "per image"])
def test_eps_as_a_tensor_gives_the_bits_of_the_number(name, rows):
    """On the CPU too: a graph keeps eps as a tensor, so that a call may change it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    attack = attack_of(name, body, EPS)
    for _ in range(3):
        images = torch.rand(6, 3, 8, 8)
        labels = body(images).argmax(1)
        eps = torch.tensor(attack.eps)
        found = attack(images, labels, seed=5, eps=eps.expand(6).clone() if rows else eps)
        assert torch.equal(found, attack(images, labels, seed=5))


# ---------------------------------------------------------------------- verdicts


class Exact(nn.Module):
    """A model whose logits have no rounding error in any order of summation, so that no verdict depends on one.

    Pixels are rounded to 2^-16 and weights to 2^-10, so that float64 holds every sum exactly.
    """

    def __init__(self, inputs=108, classes=5):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 24).double(), nn.Linear(24, classes).double()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
                parameter.mul_(2**10).round_().div_(2**10)

    def forward(self, x):
        seen = x + ((x * 2**16).round() / 2**16 - x).detach()
        waves = (self.first(seen.flatten(1) - 0.5).remainder(2) - 1).abs()  # attacks fool some samples, not all
        return self.second(waves - 0.5)


IMAGES, BATCH = 48, 7
OF_A_SAMPLE = ("fooled", "restart", "step", "robust_accuracy", "given", "zero_gradients")


def samples():
    """Easy and hard samples; some labels are wrong from the start."""
    images = torch.rand(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = Exact()(images).argmax(1)
    labels[5:20:4] = (labels[5:20:4] + 1) % 5
    return images, labels


def evaluated(device, attacks_on, **options):
    there = Exact().to(device).eval()
    return evaluate(
        there, samples(), attacks_on(there), **{"batch_size": BATCH, "seed": 3, "progress": False, **options}
    )


def of(keys, report):
    return [{key: result[key] for key in keys} for result in report["attacks"]]


def work(report):
    """(passes, forwards) of each attack without waste, which depends on the number of slots."""
    for result in report["attacks"]:
        unit = result["passes"] or result["forwards"] or 1
        yield [result[key] * (unit - result["waste"]) / unit for key in ("passes", "forwards")]


def assert_same(there, here, counted):
    """Compare verdicts with `here`, whose queue shrinks, and counts with `counted`, with a fixed number of slots."""
    assert of(OF_A_SAMPLE, there) == of(OF_A_SAMPLE, here)
    assert list(work(there)) == list(work(counted))
    assert of(["nonfinite_losses"], there) == of(["nonfinite_losses"], counted)
    for key in ("clean_correct", "budgets", "masking", "robust_accuracy"):
        assert there[key] == here[key]


@pytest.fixture
def one_shape(monkeypatch):
    """Runs an evaluation on the CPU with a fixed number of slots, as on a GPU."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(queue, "takes_one_shape", lambda *_: True)
            return evaluated("cpu", *args, **options)

    return run


RUNS = ({"batch_size": 3}, {"batch_size": 64}, {"pool": 20})
SMALL = 0.012  # at this eps further restarts of few steps still fool more samples


@every_attack
@pytest.mark.parametrize("iterate", ["any", "last"])
def test_an_evaluation_there_has_the_cpus_verdicts(device, one_shape, name, iterate):
    def one(there, **options):
        return [attack_of(name, there, SMALL, **options)]

    here, counted = evaluated("cpu", one, iterate=iterate), one_shape(one, iterate=iterate)
    assert 0 < here["robust_accuracy" if here["budgets"] else "clean_accuracy"] < 1
    for options in RUNS if iterate == "any" else ({},):
        assert_same(evaluated(device, one, iterate=iterate, **options), here, counted)
    for options in ({}, {"pool": 20}) if iterate == "any" else ({},):
        assert_same(evaluated(device, partial(one, graph=True), iterate=iterate, **options), here, counted)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("ensemble", [True, False], ids=["handed on", "each alone"])
def test_attacks_after_each_other_and_what_looks_like_masking(device, one_shape, graph, ensemble):
    def three(there, **options):
        return [attack_of(name, there, SMALL, **options) for name in ("fgsm", "pgd-10", "pma")]

    here, counted = evaluated("cpu", three, ensemble=ensemble), one_shape(three, ensemble=ensemble)
    assert here["masking"][0]["asked"] > 5
    assert_same(evaluated(device, partial(three, graph=graph), ensemble=ensemble), here, counted)


@pytest.mark.parametrize("name", ["pgd-10", "pma", "apgd-ce", "apgd-t", "fab-t", "square", "squarel2"])
@pytest.mark.parametrize("options", [{}, {"graph": True}], ids=["eager", "graph"])
def test_the_images_that_are_saved_are_the_cpus(device, tmp_path, name, options):
    found = {}
    for where, settings in (("cpu", {}), (device, options)):
        folder = tmp_path / where
        report = evaluated(where, lambda there, s=settings: [attack_of(name, there, SMALL, **s)], save_images=folder)
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}
        found[where] = files, report["attacks"][0]["robust_accuracy_8bit"]
    assert len(found["cpu"][0]) == IMAGES - 4
    assert found[device] == found["cpu"]


# ---------------------------------------------------------------------- cut and continued


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_run_that_was_cut_goes_on_with_the_same_result(device, tmp_path, monkeypatch, graph, share):
    monkeypatch.setattr(evaluation_run, "SAVE_EVERY", 0)
    iterate, turns, last = Queue.iterate, count(1), [10**9]

    def counted(self):
        if next(turns) == last[0]:
            raise Cut
        iterate(self)

    monkeypatch.setattr(Queue, "iterate", counted)

    def run(**options):
        def three(there):
            return [attack_of(name, there, SMALL, graph=graph) for name in ("pgd-10", "apgd-t", "pma")]

        return evaluated(device, three, **options)

    whole = run()
    done = next(turns)
    last[0] = done + int(share * done)
    with pytest.raises(Cut):
        run(state=tmp_path / "state")
    again = run(state=tmp_path / "state")
    assert next(turns) < last[0] + done
    assert of(OF_A_SAMPLE, again) == of(OF_A_SAMPLE, whole)
    for key in ("budgets", "masking", "robust_accuracy"):
        assert again[key] == whole[key]


# ---------------------------------------------------------------------- the host waits for nothing


@pytest.mark.parametrize("part", ["iterate", "settle"])
@pytest.mark.parametrize("name", ["pgd", "pma", "apgd-ce", "apgd-t", "square", "fab-t"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_host_waits_for_nothing(device, monkeypatch, name, part, graph):
    """The first call of each queue may wait, because it copies tables to the device."""
    guards, original = [], getattr(Queue, part)

    def guarded(self):
        if hasattr(self, "begun"):
            guards.append(1)
            torch.cuda.set_sync_debug_mode("error")
        self.begun = True
        try:
            original(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Queue, part, guarded)
    evaluated(device, lambda there: [attack_of(name, there, SMALL, graph=graph)])
    assert len(guards) > 5


class Counting(TorchDispatchMode):
    """Counts ops that launch a kernel: no views, no allocations, no copies of a tensor to itself."""

    none = ("empty", "detach", "alias", "view", "select", "slice", "expand", "unsqueeze", "reshape", "t", "permute")

    def __init__(self):
        super().__init__()
        self.names, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        same = name == "copy_" and args[0].data_ptr() == args[1].data_ptr()
        if not self.paused and not same and name.removeprefix("_").split("_like")[0] not in self.none:
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_an_iteration_launches_little_beside_gradient_and_step(device, monkeypatch):
    """At most 20 kernels, about as many as the gradient of a small model."""
    counting, iterate, seen = Counting(), Queue.iterate, []

    def paused(function):
        @functools.wraps(function)  # the package's, by its module: another's images are measured
        def call(*args):
            counting.paused = True
            result = function(*args)
            counting.paused = False
            return result

        return call

    def counted(self):
        counting.names.clear()
        with counting:
            iterate(self)
        seen.append(list(counting.names))

    monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    monkeypatch.setattr(Queue, "iterate", counted)
    monkeypatch.setattr(PGD, "step", paused(PGD.step))

    def one(there):
        attack = PGD(there, SMALL, SMALL / 4, STEPS)
        attack.objective.gradient = paused(attack.objective.gradient)
        return [attack]

    evaluated(device, one)
    assert len(seen) > 20
    assert 10 < max(map(len, seen)) <= 20, seen[0]
