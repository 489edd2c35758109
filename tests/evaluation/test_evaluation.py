"""The evaluation against a plain loop, the properties of its queue, and its resumption after a cut."""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from attacked import one_thread as one_thread
from attacked import short_steps
from cut import Cut
from dispatched import NoReads
from matplotlib.image import imread
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastadv import cli, data, models, random_init, sample_seeds
from fastadv.attacks import FGSM, MIFGSM, PGD, PGDL2, PMA, PMAL2, Normalized, create_attack, samplewise
from fastadv.evaluation import evaluate, masking_checks, progress, queue, robustness
from fastadv.evaluation import run as evaluation_run
from fastadv.evaluation.images import nearest_codes
from fastadv.evaluation.queue import Queue
from fastadv.evaluation.saved import StateFile
from fastadv.evaluation.windows import Windows

EPS, BATCH = 16 / 255, 7


class Net(nn.Module):
    """A small float64 network that records the shapes of its inputs; each call has one `sin`."""

    def __init__(self, inputs=48):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Linear(inputs, 24).double(), nn.Linear(24, 3).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.logits(x)

    def logits(self, x):
        return self.second(self.first(x.to(self.first.weight.dtype).flatten(1) - 0.5).sin() * 2)


class CutAt(TorchFunctionMode):
    """Raises `Cut`, or calls `end`, in call number `count` of a Net; model and attack stay the same objects."""

    def __init__(self, count, end=None):
        super().__init__()
        self.left, self.end = count, end

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.sin:
            self.left -= 1
            if self.left == 0:
                if self.end is None:
                    raise Cut
                self.end()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def samples():
    return forty_samples()


def forty_samples():
    """Easy and hard images; the model misclassifies four of them."""
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = Net()(images).argmax(1)
    labels[5:20:4] = (labels[5:20:4] + 1) % 3
    return images, labels


def hardest(net, restarts=3, steps=4, **options):
    return PGD(net, EPS, EPS / 4, steps, restarts=restarts, **options)


def plain_loop(model, images, labels, attack, seed, last):
    """(restart, step) of the first misclassified iterate of each sample; None where there is none."""
    found = []
    for i in range(len(images)):
        x, y = images[i : i + 1], labels[i : i + 1]
        if model(x).argmax() != y:
            found.append(None)
            continue
        found.append(first_fooling(model, x, y, attack, torch.tensor([i]), seed, last))
    return found


def first_fooling(model, x, y, attack, index, seed, last):
    for restart in range(attack.restarts):
        adv = random_init(x, attack.eps, seed=sample_seeds(seed, index, restart=restart))
        for step in range(attack.steps + 1):
            leaf = adv.clone().requires_grad_()
            logits = model(leaf)
            if (step == attack.steps or not last) and logits.argmax() != y:
                return restart, step
            grad = torch.autograd.grad(nn.functional.cross_entropy(logits, y), leaf)[0]
            adv = (x + (adv + attack.alpha * grad.sign() - x).clamp(-attack.eps, attack.eps)).clamp(0, 1)
    return None


def verdicts(result):
    return [
        (r, s) if fooled else None
        for fooled, r, s in zip(*(result[k] for k in ("fooled", "restart", "step")), strict=True)
    ]


# The verdict


@pytest.fixture(params=["rows", "one shape"])
def shape(request, monkeypatch):
    """The queue has as many rows as images under attack, or a fixed number of slots as on a GPU."""
    if request.param == "one shape":
        monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    return request.param


@pytest.mark.parametrize("iterate", ["any", "last"])
def test_verdict_restart_and_step_are_those_of_a_plain_loop(net, samples, iterate, shape):
    attack = hardest(net)
    report = evaluate(net, samples, [attack], batch_size=BATCH, seed=11, iterate=iterate)
    expected = plain_loop(net, *samples, attack, 11, iterate == "last")
    result = report["attacks"][0]
    assert verdicts(result) == expected
    fooled = [f for f in expected if f]
    assert {r for r, _ in fooled} >= {0, 1}  # both restarts fool some samples
    assert len({s for _, s in fooled}) > (1 if iterate == "any" else 0)
    assert report["clean_accuracy"] == 36 / 40
    assert result["robust_accuracy"] == (36 - len(fooled)) / 40 > 0
    # No pass is wasted: a sample that is misclassified or fooled gets none, and the last step gets no gradient.
    # Where the number of slots is fixed, empty slots take further runs, which are counted as waste.
    cost = sum(r * 5 + s + 1 for r, s in fooled) + (36 - len(fooled)) * 3 * 5
    gradients = sum(r * 4 + min(s + 1, 4) for r, s in fooled) + (36 - len(fooled)) * 3 * 4
    assert result["forwards"] - result["waste"] == cost
    assert result["passes"] - result["waste"] == (gradients if shape == "rows" else cost)
    assert result["waste"] == 0 or shape == "one shape"


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_verdicts_do_not_depend_on_how_far_the_host_is_ahead(net, samples, lag, monkeypatch):
    """On a GPU the host reads numbers that are some iterations old."""
    told, turns, iterate = [], [], Queue.iterate

    def late(self, turn, numbers):
        told.append(numbers.tolist())
        return (turn - lag, told[turn - lag - 1]) if turn > lag else (0, [0, 0, 0, 0])

    expected = evaluate(net, samples, [hardest(net)], batch_size=BATCH, seed=11)["attacks"][0]
    monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    monkeypatch.setattr(queue._Pilot, "read", late)
    monkeypatch.setattr(Queue, "iterate", lambda self: turns.append(1) or iterate(self))
    found = evaluate(net, samples, [hardest(net)], batch_size=BATCH, seed=11)["attacks"][0]
    assert verdicts(found) == verdicts(expected)
    assert found["forwards"] - found["waste"] == expected["forwards"]
    # A slot that has finished waits for the host; at the end all slots wait.
    assert len(turns) <= (1 + lag / 3) * expected["forwards"] / BATCH + 5 + 2 * lag


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_verdicts_do_not_depend_on_the_batch_size(net, samples, batch_size, shape):
    one, other = (
        evaluate(net, samples, [hardest(net)], batch_size=n, seed=2)["attacks"][0] for n in (BATCH, batch_size)
    )
    assert verdicts(one) == verdicts(other)
    assert one["passes"] - one["waste"] == other["passes"] - other["waste"]


@pytest.mark.parametrize(
    "attack_on",
    [
        lambda model: FGSM(model, EPS),
        lambda model: create_attack("fgsm-rs", model, EPS, restarts=2),
        lambda model: create_attack("tpgd", model, EPS),
        lambda model: MIFGSM(model, EPS, EPS / 4, 4),
        lambda model: PGDL2(model, 0.4, 0.1, 4),
        lambda model: PMA(model, EPS, 4),
        lambda model: PMAL2(model, 0.4, 4),
        lambda model: PGD(model, EPS, EPS / 2, 4, schedule="cosine"),
        lambda model: hardest(model, loss="targeted_margin", restarts=1),
        lambda model: hardest(model, loss="targeted_dlr", restarts=2),
        lambda model: hardest(model, loss="margin"),
        lambda model: hardest(model, targeted="random"),
        lambda model: hardest(model, targeted="least_likely"),
        lambda model: hardest(model, loss=lambda outputs, y: nn.functional.cross_entropy(outputs, y, reduction="none")),
    ],
    ids=[
        "fgsm",
        "fgsm-rs",
        "tpgd",
        "mifgsm",
        "pgdl2",
        "pma",
        "pma-l2",
        "cosine",
        "targeted-margin",
        "targeted-dlr",
        "margin",
        "random",
        "least-likely",
        "own-loss",
    ],
)
def test_every_attack_refills_as_it_begins(net, samples, attack_on, shape):
    """Nothing that an attack keeps in a slot may reach the next sample. The reference has a slot for each sample."""
    few, all_at_once = (evaluate(net, samples, [attack_on(net)], batch_size=n, seed=5)["attacks"][0] for n in (3, 40))
    assert verdicts(few) == verdicts(all_at_once)
    assert 0 < few["robust_accuracy"] < 0.9


def test_any_is_never_the_weaker(net, samples):
    any_, last = (
        evaluate(net, samples, ["fgsm", "pgd"], eps=[EPS / 2, EPS], batch_size=BATCH, iterate=iterate)["attacks"]
        for iterate in ("any", "last")
    )
    for one, other in zip(any_, last, strict=True):
        assert (one["attack"], one["eps"]) == (other["attack"], other["eps"])
        assert all(a or not b for a, b in zip(one["fooled"], other["fooled"], strict=True))


def test_uint8_images_mean_images_over_255(samples):
    net = Net()
    codes = (samples[0] * 255).round().to(torch.uint8)
    labels = net(codes.float() / 255).argmax(1)
    one = evaluate(net, (codes, labels), [hardest(net)], batch_size=BATCH)
    other = evaluate(net, (codes.float() / 255, labels), [hardest(net)], batch_size=BATCH)
    assert verdicts(one["attacks"][0]) == verdicts(other["attacks"][0])


def test_batches_are_as_good_as_a_pair(net, samples):
    batches = [(samples[0][:9], samples[1][:9]), (samples[0][9:], samples[1][9:])]
    one, other = (evaluate(net, d, [hardest(net)], batch_size=BATCH)["attacks"][0] for d in (samples, batches))
    assert verdicts(one) == verdicts(other)


def test_compiled_verdicts_are_those_of_a_plain_loop(net, samples, monkeypatch):
    torch._dynamo.reset()
    compiler, real = CompileCounterWithBackend("inductor"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=compiler, **options))
    model = net.logits  # with the list of shapes the model would be compiled again for each length
    attack = hardest(model, compile=True)
    result = evaluate(model, samples, [attack], batch_size=BATCH, seed=11)["attacks"][0]
    assert verdicts(result) == plain_loop(net, *samples, attack, 11, last=False)
    assert compiler.frame_count == 1  # one compilation serves all batches of the queue


def test_verdicts_under_autocast_are_those_of_a_plain_loop_under_autocast(net, samples):
    """One sample in twenty may differ, because sums over a batch may have another order than sums for one sample."""
    images, labels = samples[0].float(), samples[1]
    seen = []

    def half(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    net.float()
    attack = hardest(net, autocast=torch.bfloat16)
    expected = plain_loop(half, images, labels, attack, 11, last=False)
    net.first.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    result = evaluate(net, (images, labels), [attack], batch_size=BATCH, seed=11)["attacks"][0]
    assert seen.count(torch.bfloat16) * BATCH >= result["passes"]
    assert sum(a != b for a, b in zip(verdicts(result), expected, strict=True)) <= 2


# The queue


@pytest.mark.parametrize("pool", [None, 10, 3])
def test_samples_are_taken_in_the_order_restart_sample(net, samples, monkeypatch, pool, shape):
    taken, settle = [], Queue.settle

    def held(self):
        rows = self._sample[self._open]
        return list(zip(self._run[self._open].tolist(), self._numbers[rows].tolist(), strict=True))

    def spy(self):
        before = held(self)
        settle(self)
        fell = {number for row, number in enumerate(self._numbers.tolist()) if self._step[row] >= 0}
        assert {(run, number) for run, number in before if number not in fell} <= set(held(self))
        taken.extend(pair for pair in held(self) if pair not in before)

    monkeypatch.setattr(Queue, "settle", spy)
    evaluate(net, samples, [hardest(net)], batch_size=BATCH, pool=pool)
    assert taken == sorted(taken)
    assert len(taken) == len(set(taken)) > 40


@pytest.mark.parametrize("pool", [1, 10, 35])
def test_no_more_images_than_the_pool_are_on_the_device_and_the_result_is_the_same(
    net, samples, monkeypatch, tmp_path, pool
):
    sizes, staged, init = [], [], Queue.__init__

    def spy(self, attack, images, *args, **options):
        assert not any(earlier() is not None for earlier in staged)
        staged.append(weakref.ref(images))
        sizes.append(len(images))
        init(self, attack, images, *args, **options)

    monkeypatch.setattr(Queue, "__init__", spy)

    def run(pool):
        attacks = [hardest(net), hardest(net, targeted="random"), create_attack("tpgd", net, EPS, restarts=2)]
        options = {"pool": pool, "batch_size": BATCH, "save_images": tmp_path / f"{pool}", "ensemble": False}
        results = evaluate(net, samples, attacks, **options)["attacks"]
        return [{key: value for key, value in result.items() if key != "seconds"} for result in results]

    whole = run(None)
    assert sizes == [36] * 3
    sizes.clear()
    assert run(pool) == whole
    assert max(sizes) == pool
    files = [sorted((f.relative_to(root), f.read_bytes()) for f in root.rglob("*.png")) for root in tmp_path.iterdir()]
    assert files[0] == files[1]
    assert len(files[0]) == 3 * 36


def test_what_is_left_of_all_windows_never_grows(net, samples, monkeypatch):
    seen, run = [], Windows.run
    monkeypatch.setattr(Windows, "run", lambda self: (seen.append(each) or each for each in run(self)))
    evaluate(net, samples, [hardest(net)], batch_size=BATCH, pool=10)
    done, left = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert all(a + b <= 36 * 3 * 5 for a, b in seen)
    assert list(left) == sorted(left, reverse=True)
    assert left[-1] == 0


@pytest.mark.parametrize("part", ["iterate", "settle"])
def test_the_host_reads_nothing_where_the_number_of_slots_is_fixed(net, samples, monkeypatch, tmp_path, part):
    calls, original = [], getattr(Queue, part)
    attacks = [hardest(net), FGSM(net, EPS), PMA(net, EPS, 4)]
    for attack in attacks:
        attack(samples[0][:2], samples[1][:2])  # an attack's first gradient is looked at

    def guarded(self):
        calls.append(1)
        with NoReads(), monkeypatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host reads"))
            original(self)

    monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    monkeypatch.setattr(samplewise, "AT_ONCE", ())
    monkeypatch.setattr(Queue, part, guarded)
    evaluate(net, samples, attacks, batch_size=BATCH, save_images=tmp_path)
    assert len(calls) > 40


def test_the_guard_sees_a_read():
    mask = torch.tensor([True, False])
    for read in (lambda: mask.nonzero(), lambda: mask[mask], lambda: mask[0].item()):
        with pytest.raises(AssertionError), NoReads():
            read()


def test_the_model_sees_one_shape(net, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "takes_one_shape", lambda *_: True)
    theirs = torchattacks.PGD(net, eps=EPS, steps=2)
    evaluate(net, samples, ["fgsm", hardest(net)], batch_size=BATCH, save_images=tmp_path)
    assert set(net.shapes) == {(BATCH, 3, 4, 4)}
    net.shapes.clear()
    evaluate(net, samples, [theirs], batch_size=BATCH, save_images=tmp_path / "theirs")
    # A last batch of another library's attack is not filled up.
    assert set(net.shapes) == {(BATCH, 3, 4, 4), (36 % BATCH, 3, 4, 4)}


def test_the_model_is_left_as_found_also_when_it_is_cut(net, samples):
    net.first.weight.requires_grad_(False)
    net.second.training = False
    for end in (pytest.raises(Cut), CutAt(12)), (nullcontext(), nullcontext()):
        with end[0], end[1]:
            evaluate(net, samples, [hardest(net)], batch_size=BATCH)
        assert [module.training for module in net.modules()] == [True, True, False]
        assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
        assert all(p.grad is None for p in net.parameters())


# Cut and continued


def two_attacks(model, samples, ensemble=False, **options):
    attacks = [hardest(model), hardest(model, restarts=2, steps=6)]
    return evaluate(model, samples, attacks, batch_size=BATCH, ensemble=ensemble, **options)


@pytest.mark.parametrize("pool", [None, 10])
@pytest.mark.parametrize(("share", "ensemble"), [(0.3, False), (0.5, False), (0.85, False), (0.3, True), (0.9, True)])
def test_a_run_that_was_cut_goes_on_with_the_same_result(net, samples, tmp_path, monkeypatch, share, ensemble, pool):
    monkeypatch.setattr(evaluation_run, "SAVE_EVERY", 0)
    path = tmp_path / "state"

    def run(model, **options):
        folder = tmp_path / f"{options}"
        return two_attacks(model, samples, ensemble, pool=pool, save_images=folder, **options)

    whole = run(net)
    with pytest.raises(Cut), CutAt(int(share * len(net.shapes))):
        run(Net(), state=path)
    saved = [known["passes"] for known in facts(path)["attacks"]]
    assert (saved[0] > 0, saved[1] > 0) == (True, share > 0.8)

    second = Net()
    again = run(second, state=path)
    for one, other, before, longest in zip(whole["attacks"], again["attacks"], saved, (5, 7), strict=True):
        assert verdicts(one) == verdicts(other)
        for name in ("robust_accuracy", "robust_accuracy_8bit"):
            assert one[name] == other[name]
        assert other["passes"] - before <= one["passes"] - before + BATCH * longest
    files = [
        sorted((f.relative_to(root), f.read_bytes()) for f in root.rglob("*.png"))
        for root in (tmp_path / "{}", tmp_path / f"{ {'state': path} }")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 36 + whole["attacks"][1]["given"] <= 2 * 36

    assert run(Net(), state=path)["attacks"] == again["attacks"]  # a finished run has nothing left to do
    assert [path] == [f for f in tmp_path.iterdir() if f.is_file()]


CHILD = """
import os, signal, sys
import torch
from test_evaluation import CutAt, Net, forty_samples, two_attacks
from fastadv.evaluation import run as evaluation_run

path, where, fatal = sys.argv[1:]
calls = []

def dies_in(function):
    def call(*args):
        calls.append(1)
        if len(calls) == int(fatal):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

if where == "model":
    CutAt(int(fatal), lambda: os.kill(os.getpid(), signal.SIGKILL)).__enter__()
else:
    os.fsync = dies_in(os.fsync)
torch.set_num_threads(1)
evaluation_run.SAVE_EVERY = 0
two_attacks(Net(), forty_samples(), state=path)
"""


@pytest.mark.parametrize(("where", "share"), [("model", 0.4), ("model", 0.9), ("fsync", 0.5)])
def test_a_killed_run_goes_on_with_the_same_result(net, samples, tmp_path, monkeypatch, where, share):
    path, written, fsync = tmp_path / "state", [], os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_run, "SAVE_EVERY", 0)
        patch.setattr(os, "fsync", lambda file: written.append(1) or fsync(file))
        whole = two_attacks(net, samples, state=tmp_path / "whole")["attacks"]
    fatal = int(share * len(net.shapes if where == "model" else written)) | 1  # at an odd fsync a file is unfinished
    command = [sys.executable, "-c", CHILD, path, where, str(fatal)]
    killed = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = [known["passes"] for known in facts(path)["attacks"]]
    assert [passes > 0 for passes in saved] == [True, share == 0.9]
    assert (tmp_path / "state.new").exists() == (where == "fsync")

    second = Net()
    again = two_attacks(second, samples, state=path)["attacks"]
    assert len(second.shapes) < len(net.shapes)
    for one, other, before, longest in zip(whole, again, saved, (5, 7), strict=True):
        assert verdicts(one) == verdicts(other)
        assert other["passes"] - before <= one["passes"] - before + BATCH * longest
    assert not (tmp_path / "state.new").exists()


def facts(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["fastadv"]
        return json.loads(file.metadata()["fastadv"])


def test_another_librarys_attack_goes_on_too(net, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_run, "SAVE_EVERY", 0)

    def run(model, **options):
        return evaluate(model, samples, [torchattacks.PGD(model, EPS, EPS / 2, 3)], batch_size=BATCH, **options)

    whole = run(net)
    with pytest.raises(Cut), CutAt(25):
        run(Net(), state=tmp_path / "state")
    second = Net()
    assert run(second, state=tmp_path / "state")["attacks"][0]["fooled"] == whole["attacks"][0]["fooled"]
    assert len(second.shapes) < len(net.shapes)


def other_weights(options):
    options["net"].second.bias.data[0] += 1e-6


def other_image(options):
    options["samples"][0][3, 0, 0, 0] += 1e-6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "the model's weights, the model"),
        (other_image, "images"),
        (lambda options: options.update(seed=1), r"seed \(0 there, 1 here\)"),
        (lambda options: options.update(iterate="last"), r"iterate \('any' there, 'last' here\)"),
        (lambda options: options.update(batch_size=1), rf"batch_size \({BATCH} there, 1 here\)"),
        (lambda options: options.update(eps=EPS / 2), r"eps of attack 1 \(0.06.* there, 0.03.* here\)"),
        (lambda options: options.update(attacks=["pgd"]), r"attack of attack 1 \('fgsm' there, 'pgd' here\)"),
        (None, None),
    ],
    ids=["weights", "image", "seed", "iterate", "batch size", "eps", "attack", "nothing"],
)
def test_a_state_of_another_run_is_refused_and_what_differs_is_named(samples, tmp_path, change, named):
    options = {"net": Net(), "samples": samples, "attacks": ["fgsm"], "eps": EPS, "seed": 0, "iterate": "any"}
    options["batch_size"] = BATCH

    def run(net, samples, attacks, **options):
        return evaluate(net, samples, attacks, state=tmp_path / "state", **options)["attacks"]

    first = run(**options)
    options["net"] = Net()
    if change is None:
        assert run(**options) == first
        return
    change(options)
    with pytest.raises(ValueError, match=f"state of another run, which differs in.*{named}"):
        run(**options)


def test_a_file_that_is_no_state_is_refused(net, samples, tmp_path):
    (tmp_path / "state").write_text("precious")
    with pytest.raises(ValueError, match="no state file"):
        evaluate(net, samples, ["fgsm"], state=tmp_path / "state")
    assert (tmp_path / "state").read_text() == "precious"


def test_a_cut_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    file = StateFile(tmp_path / "state", "run")
    file.save({"a": torch.arange(3)}, {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            file.save({"a": torch.arange(4)}, {"n": 2})
    tensors, known = file.load()
    assert torch.equal(tensors["a"], torch.arange(3))
    assert known["n"] == 1


# Images of eight bits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("codes", [8, 0.5, 2.5, 0])
def test_codes_are_the_nearest_within_the_ball(dtype, codes):
    grid = torch.arange(256)
    clean = grid.to(torch.uint8) if dtype == torch.uint8 else (grid.double() / 255).to(dtype)
    adv = (grid.double()[:, None] / 255 + torch.linspace(-0.05, 0.05, 21)).clamp(0, 1)
    clean = clean[:, None].expand_as(adv)
    got = nearest_codes(adv, clean, codes / 255)
    columns = (grid[:, None].expand_as(adv), adv, got)
    for x, a, c in zip(*(column.flatten().tolist() for column in columns), strict=True):
        allowed = [code for code in range(max(0, x - 8), min(256, x + 9)) if abs(code - x) <= codes]
        assert c in allowed
        assert abs(c - 255 * a) <= min(abs(code - 255 * a) for code in allowed) + 1e-9


def test_codes_between_those_of_the_image():
    clean = torch.tensor([10.4, 10.5, 10.9], dtype=torch.float64) / 255
    assert nearest_codes(clean + 1 / 255, clean, 1 / 255).tolist() == [11, 11, 11]
    assert nearest_codes(clean + 0.2 / 255, clean, 0.05 / 255).tolist() == [10, 10, 11]  # no code is inside the ball
    far = clean + torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64) / 255
    assert nearest_codes(far, clean, None).tolist() == [12, 10, 11]


def test_images_are_saved_and_classified_again(net, samples, tmp_path):
    codes = (samples[0] * 255).round().to(torch.uint8)
    labels = net(codes.float() / 255).argmax(1)
    report = evaluate(net, (codes, labels), [hardest(net)], batch_size=BATCH, save_images=tmp_path)
    result = report["attacks"][0]
    files = sorted((tmp_path / "0-PGD-16").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(40)]
    saved = torch.stack([torch.from_numpy(imread(file)).permute(2, 0, 1) for file in files])
    back = (saved * 255).round()
    assert torch.equal(back / 255, saved)
    assert (back - codes).abs().max() == 16
    right = net(saved).argmax(1) == labels
    assert result["robust_accuracy_8bit"] == right.double().mean()
    agree = [bool(r) != f for r, f in zip(right, result["fooled"], strict=True)]
    assert sum(agree) >= 36  # rounding changes few verdicts


def test_grey_images_are_saved_as_such(tmp_path):
    net, images = Net(12), torch.rand(3, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    evaluate(net, (images, net(images).argmax(1)), ["fgsm"], batch_size=2, save_images=tmp_path)
    assert imread(tmp_path / "0-fgsm-8" / "00002.png").shape == (3, 4)
    with pytest.raises(ValueError, match=r"images \(N, 1 or 3, H, W\)"):
        evaluate(net, (images.reshape(3, 12), net(images).argmax(1)), ["fgsm"], save_images=tmp_path)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(net, samples, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "fastadv")
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    found = evaluate(net, samples, ["fgsm", "pgd"], batch_size=BATCH)["attacks"]
    assert not capsys.readouterr().err
    for name, result in zip(("fgsm", "pgd"), found, strict=True):
        lines = [message for message in caplog.messages if message.startswith(f"{name} at 8/255: ")]
        assert len(lines) > 1
        counts = [int(re.search(r"(\d+) of at most", line)[1]) for line in lines[:-1]]
        assert counts == sorted(counts)
        assert counts[-1] == result["forwards"]
        assert "done in" in lines[-1]
    caplog.clear()
    evaluate(net, samples, ["fgsm"], batch_size=BATCH, progress=False)
    assert not caplog.messages
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    passes = evaluate(net, samples, ["fgsm"], batch_size=BATCH)["attacks"][0]["forwards"]
    assert f"fgsm at 8/255: 100%|██████████| {passes}/{passes}" in capsys.readouterr().err


# Other libraries and other models


def test_torchattacks_plugs_in(net, samples):
    ours, theirs = evaluate(
        net, samples, [FGSM(net, EPS), torchattacks.FGSM(net, EPS)], batch_size=BATCH, iterate="last"
    )["attacks"]
    assert ours["fooled"] == theirs["fooled"]
    assert 0 < theirs["robust_accuracy"] < 0.9
    assert theirs["passes"] is None
    assert set(theirs["step"]) == {None}
    assert (theirs["attack"], theirs["eps"]) == ("FGSM", EPS)


def test_autoattacks_object_plugs_in(net, samples):
    class AutoAttack:  # the part of the authors' class that is used
        epsilon = EPS

        def run_standard_evaluation(self, images, labels):
            return FGSM(net, self.epsilon)(images, labels)

    ours, theirs = evaluate(net, samples, ["fgsm", AutoAttack()], eps=EPS, batch_size=BATCH, iterate="last")["attacks"]
    assert ours["fooled"] == theirs["fooled"]
    assert (theirs["attack"], theirs["eps"]) == ("AutoAttack", EPS)
    with pytest.raises(TypeError, match="names or callables, got float"):
        evaluate(net, samples, [0.5])


def test_other_attacks_draw_the_same_each_time_and_leave_the_generator(net, samples):
    state = torch.get_rng_state()
    results = [
        evaluate(net, samples, [torchattacks.PGD(net, EPS, EPS / 4, 3)], batch_size=BATCH, seed=seed)["attacks"][0][
            "fooled"
        ]
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:the gradient is zero", "ignore:no prediction")
def test_a_warning_names_each_budget_in_its_own_unit(net, samples):
    def broken(x):
        clean = torch.cdist(x.flatten(1).detach(), samples[0].flatten(1)).amin(1) < 1e-6
        return torch.where(clean[:, None], net(x), torch.nan)

    attacks = [FGSM(broken, EPS), PGDL2(broken, 0.25, 0.25, 1)]
    with pytest.warns(UserWarning, match="not finite"):
        report = evaluate(broken, samples, attacks, batch_size=BATCH)
    notes = [note for note in report["warnings"] if "not finite" in note]
    assert [note.split(" losses under ")[1].split(" were")[0] for note in notes] == ["FGSM at 16/255", "PGDL2 at 0.25"]


def test_an_attack_on_another_model_is_a_transfer(net, samples):
    weak = lambda x: net(1 - x)  # noqa: E731
    attack = PGD(weak, EPS, EPS, 1, random_start=False)
    with pytest.warns(UserWarning, match="made on another object than the model"):
        result = evaluate(net, samples, attack, batch_size=BATCH)["attacks"][0]  # a single attack needs no list
    right = net(samples[0]).argmax(1) == samples[1]
    fooled = right & (net(attack(*samples)).argmax(1) != samples[1])
    assert result["fooled"] == fooled.tolist()


class Foreign:
    """An attack of another library, which returns call(images, labels)."""

    def __init__(self, call, **attributes):
        self.call, self.seen = call, []
        vars(self).update(attributes)

    def __call__(self, images, labels):
        self.seen.append((images.clone(), labels))
        return self.call(images, labels)


def moved(images, linf, l2):
    """Images at the distance `linf` in one pixel and about `l2` over all pixels."""
    rest = images[0].numel() - 1
    delta = torch.full_like(images, ((l2**2 - linf**2) / rest) ** 0.5).flatten(1)
    delta[:, 7] = linf
    inwards = torch.where(images > 0.5, -1.0, 1.0)
    return images + inwards * delta.view_as(images)


@pytest.mark.parametrize(
    "form",
    [
        lambda adv: adv.numpy(),
        lambda adv: adv.numpy()[:, ::-1][:, ::-1].astype("float64"),
        lambda adv: (adv, torch.ones(len(adv), dtype=torch.bool)),
        lambda adv: [adv.numpy(), None],
        lambda adv: adv.requires_grad_(),
        lambda adv: adv.float(),
    ],
    ids=["array", "float64 array", "pair", "list", "with a graph", "float32"],
)
def test_what_an_attack_returns_may_have_several_forms(net, samples, form):
    attack = Foreign(lambda images, labels: form(moved(images, 0.05, 0.3)))
    result = evaluate(net, samples, [attack], batch_size=BATCH)["attacks"][0]
    images, labels = samples
    wrong = net(moved(images, 0.05, 0.3)).argmax(1) != labels
    assert result["fooled"] == (wrong & (net(images).argmax(1) == labels)).tolist()
    assert result["largest_linf"] == pytest.approx(0.05, abs=1e-6)
    assert result["largest_l2"] == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda images: images[:2], ValueError, r"shape \(7, 3, 4, 4\).*it returned the shape \(2, 3, 4, 4\)"),
        (lambda images: images.flatten(1), ValueError, r"it returned the shape \(7, 48\)"),
        (lambda images: None, TypeError, "it returned a NoneType"),
        (lambda images: (images, images, images), TypeError, "it returned a tuple"),
        (lambda images: (images * 255).long(), TypeError, "it returned torch.int64"),
        (lambda images: [image.tolist() for image in images], TypeError, "it returned a list"),
    ],
)
def test_what_is_no_images_is_refused_in_words(net, samples, returned, error, message):
    with pytest.raises(error, match=f"must return the adversarial images.*{message}"):
        evaluate(net, samples, [Foreign(lambda images, labels: returned(images))], batch_size=BATCH)


@pytest.mark.parametrize(
    ("linf", "l2", "attributes", "kept", "title"),
    [
        (0.0399, 0.2, {"eps": 0.04}, True, "Foreign at 0.04"),
        (0.0401, 0.2, {"eps": 0.04}, False, "Foreign at 0.04"),
        (0.0401, 0.2, {"epsilon": 0.04, "norm": "Linf"}, False, "Foreign at 10.2/255"),
        (0.04 + 9e-7, 0.2, {"eps": 0.04}, True, ""),  # rounding
        (0.04 + 2e-6, 0.2, {"eps": 0.04}, False, "Foreign at 0.04"),
        (0.2, 0.2999, {"eps": 0.3, "norm": "L2"}, True, ""),
        (0.2, 0.3001, {"eps": 0.3, "norm": "L2"}, False, "Foreign at 0.3 "),
        (0.2, 0.3001, {"eps": 0.3}, True, ""),  # within 0.3 if the norm is L-inf, which is not known
        (0.2, 0.3001, {"eps": None}, True, ""),
        (0.4, 2.501, {"eps": 2.5}, False, "Foreign at 2.5"),  # above 1 it bounds nothing in L-inf
        (0.4, 2.499, {"eps": 2.5}, True, ""),
    ],
)
def test_images_beyond_the_attacks_own_eps_give_no_figure(net, samples, recwarn, linf, l2, attributes, kept, title):
    attack = Foreign(lambda images, labels: moved(images, linf, l2), **attributes)
    report = evaluate(net, samples, [attack], batch_size=BATCH)
    result = report["attacks"][0]
    assert (result["largest_linf"], result["largest_l2"]) == pytest.approx((linf, l2), abs=1e-9)
    if kept:
        assert not report["warnings"]
        assert not recwarn.list
        assert result["robust_accuracy"] == (36 - sum(result["fooled"])) / 40
    else:
        assert result["robust_accuracy"] is None
        (note,) = report["warnings"]
        assert title in note
        assert "beyond its eps" in note
        assert "255" not in note or attributes.get("norm") == "Linf"
        assert robustness.robust_accuracy(net, samples, attack, batch_size=BATCH)["robust_accuracy"] is None


def trained_on(net):
    """A copy of a network with other weights."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.second.weight.add_(0.1)
    return other


class Standard:
    """An attack that is called as AutoAttack's authors' program is."""

    def __init__(self, model):
        self.model = model

    def run_standard_evaluation(self, images, labels):
        return images


class Normalising:
    def __init__(self, model):
        self.model = model

    def __call__(self, images, labels):
        return FGSM(Normalized(self.model, 0.4, 0.5), EPS)(images, labels)


def with_another_head(net):
    """A network with the layers of `net`, but a last one of its own."""
    other = copy.copy(net)
    other._modules = net._modules | {"second": copy.deepcopy(net.second)}
    with torch.no_grad():
        other.second.weight.neg_()
    return other


MADE_ON = {
    "another model": lambda net: (net, PGD(trained_on(net), EPS)),
    "another library's on another model": lambda net: (net, torchattacks.FGSM(trained_on(net), EPS)),
    "within Normalized": lambda net: (Normalized(net, 0.4, 0.5), PGD(net, EPS)),
    "torchattacks' within Normalized": lambda net: (Normalized(net, 0.4, 0.5), torchattacks.FGSM(net, EPS)),
    "AutoAttack's within Normalized": lambda net: (Normalized(net, 0.4, 0.5), Standard(net)),
    "around the model": lambda net: (net, PGD(Normalized(net, 0.4, 0.5), EPS)),
    "in a row": lambda net: (nn.Sequential(nn.Hardtanh(), net), PGD(net, EPS)),
    "with another head": lambda net: (net, PGD(with_another_head(net), EPS)),
}
MADE_RIGHT = {
    "the model": lambda net: (net, PGD(net, EPS)),
    "another library's": lambda net: (net, torchattacks.FGSM(net, EPS)),
    "an equal copy": lambda net: (net, PGD(copy.deepcopy(net), EPS)),
    "normalised twice": lambda net: (Normalized(net, 0.4, 0.5), PGD(Normalized(net, 0.4, 0.5), EPS)),
    "compiled": lambda net: (net, PGD(torch.compile(net, backend="eager"), EPS)),
    "judged compiled": lambda net: (torch.compile(net, backend="eager"), PGD(net, EPS)),
    "in parallel": lambda net: (nn.DataParallel(net), PGD(net, EPS)),
    "averaged": lambda net: (averaged := AveragedModel(net), PGD(averaged.module, EPS)),
    "a wrapper": lambda net: (nn.Sequential(net), PGD(net, EPS)),
    "one that normalises by itself": lambda net: (Normalized(net, 0.4, 0.5), Normalising(net)),
    "no model": lambda net: (net, lambda images, labels: 1 - images),
}
MADE_ELSEWHERE = {
    "traced": lambda net: (net, PGD(torch.jit.trace(net, torch.rand(1, 3, 4, 4)), EPS)),
    "no module": lambda net: (net, PGD(net.logits, EPS)),
    "judged within a function": lambda net: (lambda x: net(x), PGD(net, EPS)),
}


@pytest.mark.filterwarnings("ignore:nothing was attacked")
@pytest.mark.parametrize("made", MADE_ON.values(), ids=MADE_ON)
def test_an_attack_on_another_model_is_called_transferred(net, samples, made):
    model, attack = made(net)
    with pytest.warns(UserWarning, match="the images were transferred") as warned:
        report = evaluate(model, samples, [attack], batch_size=BATCH, progress=False)
    assert [note for note in report["warnings"] if "upper bound" in note] == [
        str(warning.message) for warning in warned if "upper bound" in str(warning.message)
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", MADE_RIGHT.values(), ids=MADE_RIGHT)
def test_an_attack_on_the_model_in_any_wrapping_is_not(net, samples, made):
    model, attack = made(net)
    assert evaluate(model, samples, [attack], batch_size=BATCH, progress=False)["warnings"] == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", MADE_ELSEWHERE.values(), ids=MADE_ELSEWHERE)
def test_an_attack_on_what_may_be_the_model_says_that_it_is_judged_by_its_last_images(net, samples, made):
    model, attack = made(net)
    with pytest.warns(UserWarning, match="its last images alone are judged, and masked gradients are not looked for"):
        evaluate(model, samples, [attack], batch_size=BATCH, progress=False)


class Masked(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.03 * torch.sin(700 * x))


@pytest.mark.filterwarnings("ignore:gradients look masked", "ignore:robust accuracy rises", "ignore:the last")
@pytest.mark.parametrize("made", [nn.DataParallel, copy.deepcopy, nn.Sequential])
def test_an_attack_on_the_model_in_any_wrapping_is_as_strong_as_on_the_model(net, samples, made):
    """Each of its images is judged, it has further runs, and masked gradients are looked for."""
    masked = Masked(net)
    for options in ({}, {"alpha": EPS, "restarts": 2}):
        attack = PGD(masked, EPS, steps=8, **options) if options else PMA(masked, EPS, steps=8)
        made_of_it = made(masked)  # judged first: the network keeps a list of its calls, which a copy has no longer
        found = [evaluate(each, samples, attack, batch_size=BATCH, progress=False) for each in (made_of_it, masked)]
        assert found[0]["attacks"][0]["fooled"] == found[1]["attacks"][0]["fooled"]
        assert found[0]["masking"] == found[1]["masking"]


@pytest.mark.parametrize("attacks", [[lambda images, labels: images], ["fgsm", lambda images, labels: images]])
def test_an_attack_that_changes_nothing_is_told(net, samples, attacks):
    with pytest.warns(UserWarning, match="nothing was attacked: <lambda> returned every image as it was"):
        evaluate(net, samples, attacks, batch_size=BATCH, eps=EPS if len(attacks) > 1 else None, progress=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_unit_in_the_last_place_is_no_transgression(dtype, recwarn):
    net = Net().float()
    clean = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    images = (clean * 255).to(dtype) if dtype == torch.uint8 else clean.to(dtype)
    pixels = images / 255 if dtype == torch.uint8 else images
    labels = net(pixels).argmax(1)
    attack = Foreign(lambda x, y: (x.float() + 8 / 255 * (torch.rand_like(x.float()) - 0.5).sign()).clamp(0, 1).to(x))
    attack.eps = 8 / 255
    result = evaluate(net, (images, labels), [attack], batch_size=4)["attacks"][0]
    assert result["robust_accuracy"] is not None
    assert result["largest_linf"] == pytest.approx(8 / 255, abs=0.004 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.filterwarnings("ignore:the images that Foreign returned")
@pytest.mark.parametrize(("shift", "kept"), [(9e-7, True), (2e-5, False)])
def test_images_that_leave_the_box_give_no_figure(net, samples, shift, kept):
    def call(images, labels):
        adv = images.clone()
        adv[0, 0, 0, 0], adv[0, 0, 0, 1] = -shift, 1 + shift
        return adv

    report = evaluate(net, samples, [Foreign(call)], batch_size=BATCH)
    assert (report["attacks"][0]["robust_accuracy"] is not None) == kept
    assert any("beyond [0, 1]" in note for note in report["warnings"]) != kept


@pytest.mark.filterwarnings("ignore:no prediction", "ignore:.* are not finite")
@pytest.mark.parametrize("pixel", [torch.nan, torch.inf])
def test_images_that_are_not_finite_get_no_prediction(net, samples, pixel):
    """A model that replaces NaN gives a prediction, which does not count."""

    def model(x):
        return net(x.nan_to_num(0.5, 0.5, 0.5))

    def call(images, labels):
        images[::3, 1, 2, 3] = pixel
        return images

    report = evaluate(model, samples, [Foreign(call, eps=0.1)], batch_size=BATCH)
    result = report["attacks"][0]
    attacked = [i for i, right in enumerate(report["clean_correct"]) if right]
    batches = [attacked[i : i + BATCH] for i in range(0, 36, BATCH)]
    broken = {sample for batch in batches for sample in batch[::3]}
    assert result["fooled"] == [i in broken for i in range(40)]
    assert result["no_prediction"] == len(broken)
    assert result["robust_accuracy"] == (36 - len(broken)) / 40
    assert any(
        f"{len(broken)} of the images that Foreign at 0.1 returned are not finite" in w for w in report["warnings"]
    )


@pytest.mark.filterwarnings("ignore:the images that Foreign")
def test_an_attack_that_writes_into_what_it_gets_is_measured_all_the_same(net, samples):
    def call(images, labels):
        labels.zero_()
        return images.add_(0.5).clamp_(0, 1)

    before = samples[0].clone(), samples[1].clone()
    result = evaluate(net, samples, [Foreign(call, eps=0.1)], batch_size=64)["attacks"][0]
    assert result["largest_linf"] == pytest.approx(0.5)
    assert result["robust_accuracy"] is None
    assert all(torch.equal(*pair) for pair in zip(samples, before, strict=True))
    wrong = net((samples[0] + 0.5).clamp(0, 1)).argmax(1) != samples[1]
    assert result["fooled"] == (wrong & (net(samples[0]).argmax(1) == samples[1])).tolist()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(8),
        lambda: torch.from_numpy(np.random.rand(8)),  # noqa: NPY002 (other libraries draw from it)
        lambda: torch.tensor([random.random() for _ in range(8)]),
    ],
    ids=["torch", "numpy", "random"],
)
def test_batches_of_another_library_draw_each_their_own(net, samples, draw):
    def run(seed):
        drawn = []
        attack = Foreign(lambda images, labels: (drawn.append(draw()), 1 - images)[1])
        evaluate(net, samples, [attack], batch_size=BATCH, seed=seed)
        return [tuple(each.tolist()) for each in drawn]

    after = draw()
    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert len(first) == 6
    assert len({*first, *other}) == 12  # a batch does not draw the numbers of the next batch under another seed
    assert not torch.equal(draw(), after)


def test_the_generators_are_given_back_as_they_were(net, samples):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    evaluate(net, samples, [Foreign(lambda images, labels: (draw_all(), 1 - images)[1])], batch_size=BATCH)
    assert state() == before


def draw_all():
    return random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002


def test_robust_accuracy_counts_what_a_hand_counts():
    def model(x):  # class 1 where the pixel is above one half
        return torch.stack((0.5 - x[:, 0], x[:, 0] - 0.5), dim=1)

    images = torch.tensor([[0.9], [0.55], [0.1], [0.45], [0.8]])
    labels = torch.tensor([1, 1, 0, 0, 0])  # the last image is misclassified
    attack = FGSM(model, 0.1)
    expected = {"clean_accuracy": 0.8, "robust_accuracy": 0.4}
    assert robustness.robust_accuracy(model, (images, labels), attack) == expected
    assert robustness.robust_accuracy(model, (images, labels), attack, batch_size=2) == expected
    assert robustness.robust_accuracy(model, [(images[:3], labels[:3]), (images[3:], labels[3:])], attack) == expected
    helpful = robustness.robust_accuracy(model, (images, labels), lambda x, y: y[:, None].float())
    assert helpful == {"clean_accuracy": 0.8, "robust_accuracy": 0.8}
    with pytest.raises(ValueError, match="no images"):
        robustness.robust_accuracy(model, [], attack)


def test_robust_accuracy_answers_for_every_eps(net, samples):
    budgets = (EPS / 4, EPS / 2, EPS)
    each = [
        robustness.robust_accuracy(net, samples, "pgd", eps=eps, batch_size=BATCH)["robust_accuracy"] for eps in budgets
    ]
    assert each == sorted(each, reverse=True)
    assert each[0] > each[-1]
    for several in (budgets, list(budgets), np.array(budgets), torch.tensor(budgets, dtype=torch.float64)):
        assert robustness.robust_accuracy(net, samples, "pgd", eps=several, batch_size=BATCH)["robust_accuracy"] == each


# Warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: lambda x: net(x) + torch.randn(len(x), 3), "output is random"),
        (lambda net: lambda x: net(x) - net(x).cumsum(0) / 10, "depends on the others"),
        (lambda net: lambda x: net(x).softmax(1), "returns probabilities"),
        (lambda net: lambda x: net(x + ((x * 64).round() / 64 - x).detach()), None),
        (lambda net: lambda x: net((x * 8).round() / 8 + 0 * x), "the gradient is zero for"),
        (lambda net: lambda x: net(x) * 1e4, "the gradient is zero for"),
        (lambda net: lambda x: net(x) * torch.tensor([1.0, torch.inf, 1]).nan_to_num(posinf=1), None),
    ],
    ids=["random", "neighbours", "probabilities", "masked, but not zero", "rounded", "saturated", "sound"],
)
def test_suspicious_models_are_called_so(net, samples, recwarn, change, message):
    report = evaluate(change(net), samples, ["fgsm"], batch_size=BATCH)
    if message is None:
        assert not report["warnings"]
        assert not recwarn.list
    else:
        assert any(message in note for note in report["warnings"])
        assert {str(w.message) for w in recwarn.list} == set(report["warnings"])


@pytest.mark.parametrize("zero", [0, 3, 4, 40])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "tpgd"])
def test_the_share_of_zero_gradients_is_reported_and_warned_of_from_a_tenth_on(net, samples, recwarn, zero, name):
    """All 40 images are attacked. The model cuts off the gradient of an image whose first pixel is bright."""
    images, labels = samples[0].clone(), net(samples[0]).argmax(1)
    images[:, 0, 0, 0] = (torch.arange(40) < zero) * 1.0
    model = lambda x: net(torch.where(x[:, :1, :1, :1].detach() > 0.5, x.detach() + 0 * x, x))  # noqa: E731
    labels = model(images).argmax(1)
    report = evaluate(model, (images, labels), [create_attack(name, model, EPS)], batch_size=BATCH)
    assert report["attacks"][0]["zero_gradients"] == zero / 40
    told = any(f"the gradient is zero for {zero} of 40 images" in note for note in report["warnings"])
    assert told == (zero >= 4)
    assert len(recwarn.list) == told


@pytest.mark.filterwarnings("ignore:the gradient is zero")
@pytest.mark.parametrize("count", [7, 8])
def test_a_few_zero_gradients_may_be_an_accident(samples, count):
    model = lambda x: (x.flatten(1)[:, :3] * 4).round() / 4 + 0 * x.flatten(1)[:, :3] + torch.arange(3)  # noqa: E731
    images = samples[0][:count]
    report = evaluate(model, (images, model(images).argmax(1)), ["fgsm"])
    assert report["attacks"][0]["zero_gradients"] == 1
    assert bool(report["warnings"]) == (count == 8)


def test_at_the_clean_image_kl_has_no_gradient_on_any_model(net, samples, recwarn):
    report = evaluate(net, samples, ["tpgd"], eps=0.0, batch_size=BATCH)
    assert report["attacks"][0]["zero_gradients"] is None
    assert not recwarn.list


def test_a_model_of_one_class_is_refused_with_what_works(samples):
    images = samples[0].float()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))
    with pytest.raises(ValueError, match=r"returns one logit.*torch.cat\(\(0 \* z, z\), 1\)"):
        evaluate(model, (images, torch.zeros(40, dtype=torch.int64)), ["fgsm"])

    def both(x):
        z = model(x)
        return torch.cat((0 * z, z), 1)

    labels = (model(images)[:, 0] > 0).long()
    report = evaluate(both, (images, labels), ["fgsm"], batch_size=BATCH)
    assert report["clean_accuracy"] == 1
    direction = torch.where(labels == 1, -1.0, 1.0)[:, None] * model[1].weight.sign()
    adv = (images + 8 / 255 * direction.view_as(images)).clamp(0, 1)
    assert report["attacks"][0]["fooled"] == ((model(adv)[:, 0] > 0).long() != labels).tolist()


@pytest.mark.filterwarnings("ignore:the gradient is zero", "ignore:no prediction")
def test_losses_that_are_not_finite_are_counted(net, samples):
    def model(x):
        logits = net(x)
        sound = x.detach().flatten(1)[:, :1] > samples[0].flatten(1)[:, 0].median()
        return torch.where(sound | (logits < logits.amax(1, keepdim=True)), logits, torch.inf)

    with pytest.warns(UserWarning, match="not finite"):
        report = evaluate(model, samples, [PGD(model, 0.0, 0.0, 1, random_start=False)], batch_size=BATCH)
    assert 0 < report["attacks"][0]["nonfinite_losses"] <= report["attacks"][0]["passes"]


def test_accuracy_that_rises_with_the_budget_is_called_so():
    def trap(x):  # class 1 lies in a narrow zone that a larger step jumps over
        zone = (x > 0.51) & (x < 0.52)
        return torch.cat((torch.ones_like(x), x + zone), dim=1)

    images, labels = torch.full((5, 1), 0.5), torch.zeros(5, dtype=torch.int64)
    with pytest.warns(UserWarning, match="rises from 0.00% under fgsm at 4/255 to 100.00% under fgsm at 8/255"):
        evaluate(trap, (images, labels), ["fgsm"], eps=[4 / 255, 8 / 255], batch_size=2, ensemble=False)


@short_steps
@pytest.mark.parametrize(
    ("gained", "lost", "called_so"),
    [(1, 0, False), (4, 0, False), (5, 0, True), (7, 1, True), (60, 39, True), (60, 40, False), (0, 60, False)],
)
def test_accuracy_that_rises_by_chance_is_not_called_so(net, gained, lost, called_so):
    weak = torch.tensor([False] * gained + [True] * lost + [True] * 500 + [False] * 400)
    strong = torch.tensor([True] * gained + [False] * lost + [True] * 500 + [False] * 400)
    attacks = [("weak", FGSM(net, EPS), weak), ("strong", PGD(net, EPS, steps=5), strong)]
    assert len(list(masking_checks.notes_on_accuracies(attacks))) == called_so
    assert len(list(masking_checks.notes_on_accuracies(attacks[::-1]))) == called_so


@short_steps
def test_only_comparable_attacks_are_compared(net):
    def rises(weak, strong):
        none, all_ = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
        return bool(list(masking_checks.notes_on_accuracies([("weak", weak, none), ("strong", strong, all_)])))

    assert rises(FGSM(net, EPS), PGD(net, EPS, steps=5))
    assert rises(PGD(net, EPS, steps=5), PGD(net, EPS, steps=5, restarts=2))
    assert rises(PGD(net, EPS / 2, steps=5), PGD(net, EPS, steps=5))
    assert not rises(PGD(net, EPS, steps=5), PGD(net, EPS, steps=5))
    assert not rises(PGD(net, EPS, steps=5), PGD(net, EPS / 2, steps=50))
    assert not rises(PGD(net, EPS), PGDL2(net, 1.0, steps=50))
    assert not rises(create_attack("nfgsm", net, EPS), PGD(net, EPS))
    assert not rises(PGD(net, EPS), PGD(net, EPS, steps=50, loss="margin"))


# Refusals


def of_torchattacks_towards_labels(net):
    attack = torchattacks.PGD(net, eps=EPS)
    attack.set_mode_targeted_by_label(quiet=True)
    return attack


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterate": "first"}, "unknown iterate 'first'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"attacks": ["pgb"]}, "unknown attack 'pgb'"),
        ({"eps": 8}, r"the images' scale \[0, 1\]"),
        ({"eps": [4 / 255, 8 / 255, 4 / 255]}, r"eps has 0.0156863 \(4/255\) more than once"),
        ({"attacks": [lambda net: PGD(trained_on(net), EPS, targeted=True)]}, "takes its targets for labels"),
        ({"attacks": [lambda net: of_torchattacks_towards_labels(net)]}, "takes its targets for labels"),
        ({"attacks": [lambda net: hardest(net, targeted=True)]}, "takes its targets for labels"),
        ({"attacks": [lambda net: hardest(net, training_mode="as_is")]}, "in another mode"),
        ({"images": lambda x: x * 2}, "images must be in"),
        ({"labels": lambda y: y + 1}, "below the model's 3 classes, got 3"),
        ({"labels": lambda y: y - 1}, "not be negative, got -1"),
        ({"labels": lambda y: y[:0], "images": lambda x: x[:0]}, "no images to evaluate"),
        ({"labels": lambda y: y[:39]}, "one for each of images"),
        ({"device": "meta"}, "the device 'meta' is not here"),
    ],
)
def test_what_cannot_work_is_refused(net, samples, options, message):
    images, labels = (options.pop(key, lambda t: t)(t) for key, t in zip(("images", "labels"), samples, strict=True))
    made = [a(net) if callable(a) else a for a in options.pop("attacks", ["fgsm"])]
    with pytest.raises(ValueError, match=message):
        evaluate(net, (images, labels), made, **options)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "images must be a float or uint8"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), "labels must be an int64 tensor"),
    ],
)
def test_data_of_a_wrong_type_are_refused(net, images, labels, message):
    with pytest.raises(TypeError, match=message):
        evaluate(net, (images, labels), ["fgsm"])


@pytest.mark.parametrize("make", [lambda attack: {"pgd-10": attack}, lambda attack: {"fgsm", attack}])
def test_attacks_without_an_order_are_refused(net, samples, make):
    with pytest.raises(TypeError, match=r"attacks run in their order, got a (dict|set)"):
        evaluate(net, samples, make(hardest(net)), progress=False)


def as_dicts(images, labels):
    names = random.choice(["images", "image", "pixel_values", "img"]), random.choice(["labels", "label"])
    return [dict(zip(names, pair, strict=True), other=3) for pair in zip(images, labels, strict=True)]


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: (x.numpy(), y.numpy().astype(np.int32)),
        lambda x, y: [x.numpy(), y],
        lambda x, y: TensorDataset(x, y),
        lambda x, y: DataLoader(TensorDataset(x, y), 9),
        lambda x, y: DataLoader(as_dicts(x, y), 9),
        lambda x, y: as_dicts(x.split(9), y.split(9)),
        lambda x, y: dict(zip(("images", "labels"), (x, y), strict=True)),
        lambda x, y: ((a.numpy(), b.numpy()) for a, b in zip(x.split(9), y.split(9), strict=True)),
    ],
    ids=["arrays", "int32", "mixed", "dataset", "loader", "loader of dicts", "dicts", "dict", "generator of arrays"],
)
def test_data_come_in_many_forms(net, samples, form, recwarn):
    samples[0].numpy().flags.writeable = False
    expected, found = (evaluate(net, d, ["pgd"], batch_size=BATCH) for d in (samples, form(*samples)))
    assert found["clean_correct"] == expected["clean_correct"]
    assert found["attacks"][0]["step"] == expected["attacks"][0]["step"]
    assert not recwarn.list


def test_numpys_float64_is_what_the_model_takes(samples):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    images, labels = (np.array(part) for part in samples)
    expected = evaluate(net, (samples[0].float(), samples[1]), ["fgsm"])
    assert evaluate(net, (images, labels), ["fgsm"])["attacks"][0]["fooled"] == expected["attacks"][0]["fooled"]


class Pictures(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Image.new("RGB", (4, 4)), i


class Noisy(TensorDataset):
    """Draws a shift for each image at each reading, as augmentation does."""

    def __init__(self, x, y, draw):
        super().__init__(x, y)
        self.draw = draw

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image * (1 - 0.1 * self.draw()), label


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), random.random, lambda: np.random.rand()],  # noqa: NPY002
)
@pytest.mark.parametrize("loads", [False, True], ids=["dataset", "loader"])
def test_images_that_are_drawn_anew_are_told(net, samples, draw, loads):
    drawn = Noisy(*samples, draw)
    given = DataLoader(drawn, 9) if loads else drawn
    with pytest.warns(UserWarning, match="the data set draws its images anew each time"):
        report = evaluate(net, given, ["fgsm"], progress=False)
    assert "the data set draws its images anew" in report["warnings"][0]


class Keyed(Dataset):
    """Has names for indices, and samples that a collate function makes into images."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, name):
        return int(name.removeprefix("sample "))

    def together(self, rows):
        return self.x[rows], self.y[rows]


class Streamed(torch.utils.data.IterableDataset):
    """Has a length, and no indices."""

    def __init__(self, x, y):
        self.pairs = list(zip(x, y, strict=True))

    def __len__(self):
        return len(self.pairs)

    def __iter__(self):
        return iter(self.pairs)


@pytest.mark.parametrize("form", ["keyed", "streamed", "bfloat16", "gradients"])
def test_loaders_of_other_indices_and_types_are_judged_as_before(net, samples, form, recwarn):
    x, y = samples
    if form == "keyed":
        made = Keyed(x, y)
        given = DataLoader(made, 9, sampler=[f"sample {i}" for i in range(len(x))], collate_fn=made.together)
    elif form == "streamed":
        given = DataLoader(Streamed(x, y), 9)
    elif form == "bfloat16":
        x = x.bfloat16()
        given = DataLoader(TensorDataset(x, y), 9)
        net = net.bfloat16()
    else:
        given = DataLoader(TensorDataset(x.clone().requires_grad_(), y), 9)
    found, expected = (evaluate(net, each, ["fgsm"], progress=False) for each in (given, (x, y)))
    assert found["clean_correct"] == expected["clean_correct"]
    assert found["attacks"][0]["fooled"] == expected["attacks"][0]["fooled"]
    assert found["warnings"] == expected["warnings"]


def test_samples_that_a_loader_leaves_out_or_repeats_are_told(net, samples):
    whole = TensorDataset(*samples)
    count = len(whole)
    with pytest.warns(UserWarning, match=f"gave {count - count % 7} of the {count} samples of its data set"):
        evaluate(net, DataLoader(whole, 7, drop_last=True), ["fgsm"], progress=False)
    weighted = torch.utils.data.WeightedRandomSampler(torch.ones(count), count)
    for sampler in (weighted, torch.utils.data.RandomSampler(whole, replacement=True)):
        with pytest.warns(UserWarning, match="draws with replacement"):
            evaluate(net, DataLoader(whole, 7, sampler=sampler), ["fgsm"], progress=False)


@pytest.mark.parametrize(
    ("form", "got"),
    [
        (lambda x, y: DataLoader(TensorDataset(x, y, y), 9), "a list of 3 entries"),
        (lambda x, y: TensorDataset(x, y, y), "a list of 3 entries"),
        (lambda x, y: [{"inputs": x, "labels": y}], "the keys inputs, labels"),
        (lambda x, y: x, "a Tensor"),
        (lambda x, y: (x, y.tolist()), "labels that are a list"),
        (lambda x, y: 3, "a int"),
        (lambda x, y: "photos", "a str"),
        (lambda x, y: Pictures(), "its samples make no batch"),
        (lambda x, y: [x, x], "a pair"),
    ],
)
def test_other_data_are_refused_with_what_is_wanted(net, samples, form, got):
    if got == "a pair":
        with pytest.raises(TypeError, match="labels must be an int64 tensor"):
            evaluate(net, form(*samples), ["fgsm"])
        return
    with pytest.raises(TypeError, match=rf"a pair \(images, labels\).*got {got}|a pair.*{got}"):
        evaluate(net, form(*samples), ["fgsm"])


@pytest.mark.parametrize("excess", [1e-7, 9e-7])
def test_images_that_rounding_put_beyond_the_box_are_put_back(net, samples, excess):
    images = samples[0].clone()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1 + excess, -excess
    before = images.clone()
    attack = Foreign(lambda images, labels: 1 - images)
    evaluate(net, (images, samples[1]), [attack], batch_size=64)
    seen = attack.seen[0][0]
    assert (seen.min(), seen.max()) == (0, 1)
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match="images must be in"):
        evaluate(net, (images + 1e-5, samples[1]), ["fgsm"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attacks": [PGD]}, TypeError, "the class PGD"),
        ({"attacks": PGD}, TypeError, "the class PGD"),
        ({"attacks": 0.5}, TypeError, "names or callables, got float"),
        ({"eps": "8/255"}, TypeError, "eps must be a number on the images' scale"),
        ({"eps": ["8"]}, TypeError, "eps must be a number on the images' scale"),
        ({"eps": []}, TypeError, "eps must be a number on the images' scale"),
        ({"eps": "8"}, TypeError, "eps must be a number on the images' scale"),
        ({"eps": True}, TypeError, "eps must be a number on the images' scale"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eps": -0.1}, ValueError, "the images' scale"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an int"),
        ({"pool": "3"}, TypeError, "pool must be an int"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"ensemble": "no"}, TypeError, "ensemble must be True or False, got 'no'"),
        ({"attacks": [FGSM(Net(), EPS)], "eps": EPS / 4}, ValueError, "eps is for attacks by name.*FGSM at 16/255"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(net, samples, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(net, samples, **{"attacks": ["fgsm"], **options})


@pytest.mark.parametrize("eps", [np.float32(EPS), np.float64(EPS), torch.tensor(EPS), np.array([EPS, EPS / 2])])
def test_numbers_are_taken_from_whichever_library(net, samples, eps):
    found = [r["eps"] for r in evaluate(net, samples, "fgsm", eps=eps)["attacks"]]
    assert found == pytest.approx([EPS, EPS / 2][: len(found)])
    json.dumps(found)


@pytest.mark.parametrize("around", [lambda m: m, lambda m: Normalized(m, 0.5, 0.5), nn.Sequential])
def test_one_process_of_several_may_evaluate(samples, one_process, monkeypatch, around):
    """The forward of DistributedDataParallel would wait for the other processes."""
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    calls, forward = [], nn.parallel.DistributedDataParallel.forward
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "forward", lambda *a: calls.append(1) or forward(*a))
    wrapped = around(nn.parallel.DistributedDataParallel(inner))
    attacks = [hardest(around(inner)), Foreign(lambda images, labels: FGSM(wrapped, EPS)(images, labels))]
    found = evaluate(wrapped, samples, ["fgsm", "pgd", attacks[1]], batch_size=BATCH)
    assert not calls
    expected = evaluate(around(inner), samples, ["fgsm", "pgd", attacks[1]], batch_size=BATCH)
    assert [r["fooled"] for r in found["attacks"]] == [r["fooled"] for r in expected["attacks"]]
    calls.clear()
    wrapped(samples[0])
    assert calls == [1]


# The command


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    digits = data.load("digits")
    made = models.source("mlp").build(digits.classes, digits.shape)
    model = made.network
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits.x_train), digits.y_train).backward()
        optimizer.step()
    models.save(made, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def command(weights, out, *options):
    cli.main(["evaluate", "--data", "digits", "--model", str(weights), "--out", str(out), "--device", "cpu", *options])


def test_command_round_trip(weights, tmp_path, capsys, monkeypatch):
    judged = ("--part", "test", "--limit", "50")
    options = (*judged, "--attacks", "fgsm,pgd", "--eps", "4", "8", "--batch-size", "16", "--save-images")
    command(weights, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "report.json").read_text()
    report = json.loads(text)
    assert [(r["attack"], r["eps"]) for r in report["attacks"]] == [
        (name, codes / 255) for name in ("fgsm", "pgd") for codes in (4, 8)
    ]
    assert f"clean accuracy {report['clean_accuracy']:.1%} of 50 images" in printed
    for result in report["attacks"]:
        assert len(result["fooled"]) == len(result["step"]) == 50
        row = next(line for line in printed.splitlines() if line.split()[:2] == [
            result["attack"], f"{255 * result['eps']:g}/255"])  # fmt: skip
        assert row.split()[2:4] == [f"{result['robust_accuracy']:.1%}", f"{result['passes']:,}"]
        assert (
            len(list((tmp_path / "out" / "images").glob(f"*-{result['attack']}-{255 * result['eps']:g}/*")))
            == result["given"]
        )
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["seed"] == 0
    for budget in report["budgets"]:
        assert f"{budget['robust_accuracy']:.1%} at eps {255 * budget['eps']:g}/255, under fgsm, pgd" in printed
    assert (tmp_path / "out" / "curve.png").read_bytes()[:4] == b"\x89PNG"

    digits = data.load("digits")
    model = models.load(weights).network
    chosen = torch.randperm(len(digits.y_test), generator=torch.Generator().manual_seed(0))[:50].sort()[0]
    some = digits.x_test[chosen], digits.y_test[chosen]
    direct = evaluate(model, some, ["fgsm", "pgd"], eps=[4 / 255, 8 / 255], batch_size=16)
    assert [r["fooled"] for r in direct["attacks"]] == [r["fooled"] for r in report["attacks"]]

    monkeypatch.setattr(Queue, "iterate", lambda self: pytest.fail("it is done already"))
    command(weights, tmp_path / "out", *options)
    assert (tmp_path / "out" / "report.json").read_text() == text
    with pytest.raises(SystemExit, match="state of another run"):
        command(weights, tmp_path / "out", *options, "--seed", "1")
