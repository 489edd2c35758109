"""A run that was killed or interrupted, or had a full disk, is resumed to the same bits; nothing is lost."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import killed_run
import numpy as np
import pytest
import torch
from fitted import colours
from torch import nn

from fastadv.training import Trainer, judge, updates
from fastadv.training.checkpoints import FORMAT, Checkpoints
from fastadv.training.memory import SampleMemory

KILLS = 20
STALE = {"attack": "stale", "price": 1.25, "lp_ft": 0, "epochs": 4, "eval_every": 0}
CACHED = {"attack": "cached", "refresh": 2, "method": "linear", "lp_ft": 0, "epochs": 8, "eval_every": 0}
CACHED |= {"augment": False}


@pytest.mark.parametrize(
    ("kills", "settings"),
    [(KILLS, {}), (KILLS // 4, STALE), (KILLS // 4, CACHED)],
    ids=["fgsm-rs", "stale", "cached"],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, kills, settings):
    seed = random.randrange(2**31)
    program = [sys.executable, killed_run.__file__, tmp_path, kills, seed, json.dumps(settings)]
    subprocess.run([*map(str, program)], check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    deaths = result["deaths"]
    assert len(deaths) == kills, f"seed {seed}"
    assert result["same_bits"], f"seed {seed}"
    assert result["same_log"], f"seed {seed}"
    assert sum(death["inside_a_write"] for death in deaths) == max(1, kills * 3 // 20)
    assert 2 * sum(death["checkpoints"] > 0 for death in deaths) >= kills
    whole, cut = result["steps"]
    # With a checkpoint after each step, a kill costs at most two: the present step, and a step whose checkpoint was
    # being written.
    assert whole <= cut <= whole + 2 * kills, f"seed {seed}"


@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        ("signs", {"refresh": 3}),
        ("signs", {"method": "bias", "lp_ft": 2, "epochs": 4}),
        ("features", CACHED | {"epochs": 6}),
    ],
    ids=str,
)
def test_what_is_kept_outlasts_a_signal_and_a_damaged_checkpoint(tmp_path, memory, settings, monkeypatch, terminating):
    """The run is cut within an epoch. Without the damaged newest checkpoint it goes on from the epoch before."""
    fast = {"probe": 0, "eval_every": 0}
    settings = {"attack": "stale", "lp_ft": 0, "epochs": 6, "checkpoint_s": 1e9} | fast | settings
    whole = killed_run.train(tmp_path / "whole", **settings)
    taken, apply = [], killed_run.TrainStep.apply

    def counted(step):
        apply(step)
        taken.append(None)
        if len(taken) == 21:  # the third of six batches in the fourth epoch
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(killed_run.TrainStep, "apply", counted)
    with pytest.raises(Terminated):
        killed_run.train(tmp_path / "cut", **settings)
    for damaged in (False, True):
        folder = tmp_path / f"cut-{damaged}"
        shutil.copytree(tmp_path / "cut", folder)
        if damaged:
            newest = max((folder / "state").glob("*.json"))
            newest.write_text(newest.read_text()[:-9])
        with pytest.warns(UserWarning, match="Going on from the one before") if damaged else nullcontext():
            resumed = killed_run.train(folder, **settings)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
    assert len(taken) == 21 + 15 + 18
    (tmp_path / "cut" / "memory" / f"{memory}.0").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{memory}\.0 is missing or empty: the run cannot go on"):
        killed_run.train(tmp_path / "cut", **settings)


def test_signs_are_on_the_disk_before_the_checkpoint_that_needs_them(tmp_path, monkeypatch):
    seen, flush, save = [], SampleMemory.flush, Checkpoints.save
    monkeypatch.setattr(SampleMemory, "flush", lambda memory: (seen.append("signs"), flush(memory)))
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: (seen.append("checkpoint"), save(*arguments)))
    killed_run.train(tmp_path, attack="stale", lp_ft=0, epochs=2)
    assert seen == ["checkpoint"] + ["signs", "signs", "checkpoint"] * (len(seen) // 3)
    assert len(seen) > 36


class Terminated(Exception):
    """The exception that SIGTERM raises in this test."""


@pytest.fixture
def terminating():
    """Signals act as in a program on a terminal, whatever handlers the test runner has set."""

    def terminate(number, frame):
        raise Terminated

    before = [signal.signal(signal.SIGTERM, terminate), signal.signal(signal.SIGINT, signal.default_int_handler)]
    yield terminate
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch, terminating):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    apply = killed_run.TrainStep.apply
    monkeypatch.setattr(killed_run.TrainStep, "apply", lambda step: (apply(step), os.kill(os.getpid(), signal.SIGINT)))
    killed_run.train(tmp_path)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["final"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_a_checkpoint_and_then_acts(tmp_path, number, error, monkeypatch, terminating):
    whole = killed_run.train(tmp_path / "whole", checkpoint_s=1e9)
    taken = []
    apply = killed_run.TrainStep.apply

    def counted(step):
        apply(step)
        taken.append(None)
        if len(taken) == 9:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(killed_run.TrainStep, "apply", counted)
    with pytest.raises(error):
        killed_run.train(tmp_path / "cut", checkpoint_s=1e9)
    assert signal.getsignal(signal.SIGTERM) is terminating
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = killed_run.train(tmp_path / "cut", checkpoint_s=1e9)
    assert len(taken) == 36  # six epochs of six batches: no step was taken twice
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_signal_during_an_evaluation_acts_at_once_and_costs_no_step(tmp_path, monkeypatch, terminating):
    whole = killed_run.train(tmp_path / "whole", checkpoint_s=1e9)
    evaluations, taken = [], []
    measure, apply = judge.robust_accuracy, killed_run.TrainStep.apply

    def interrupted(*args, **options):
        evaluations.append(None)
        if len(evaluations) == 3:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")
        return measure(*args, **options)

    monkeypatch.setattr(judge, "robust_accuracy", interrupted)
    monkeypatch.setattr(killed_run.TrainStep, "apply", lambda step: (taken.append(None), apply(step)))
    with pytest.raises(Terminated):
        killed_run.train(tmp_path / "cut", checkpoint_s=1e9)
    resumed = killed_run.train(tmp_path / "cut", checkpoint_s=1e9)
    assert len(taken) == 36
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_finished_run_gives_its_weights_and_records_again(tmp_path):
    first = killed_run.train(tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    second = killed_run.train(tmp_path)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert (tmp_path / "log.jsonl").read_text() == log
    with pytest.raises(FileExistsError, match="resume it, or choose another folder"):
        killed_run.train(tmp_path, resume=False)


def short(folder, cut=None, part=0, model=None, **changes):
    """(weights, losses, records) of a run on 96 images in batches of 16; an exception ends it after `cut` steps."""
    network, taken = killed_run.model() if model is None else model, []
    options = {"attack": "fgsm-rs", "epochs": 3, "batch_size": 16, "lr": 1e-2, "probe": 0, "progress": False}
    options |= {"measure_backbone": False, "checkpoint_s": 0.0 if cut else 600.0, "folder": folder, "resume": True}
    options |= changes
    batch = updates.Updates.take

    def failing(self, *arguments):
        if len(taken) == cut:
            raise RuntimeError("cut")
        taken.append(None)
        return batch(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Updates, "take", failing)
        parts = (colours(96, 1 + part), colours(33, 2))
        records = Trainer(network, options.pop("eps", 16 / 255), **options).fit(*parts)
    return network.state_dict(), [record["loss"] for record in records if "epoch" in record], records


def state(folder):
    return {path.name: path.read_bytes() for path in (folder / "state").iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-2}, r"another run, which differs in lr \(0.01 there, 0.02 here\)\. Choose"),
        ({"eps": 8 / 255, "seed": 3}, r"eps \(0.06.* there, 0.03.* here\), seed \(0 there, 3 here\)\. Choose"),
        ({"attack": "fgsm"}, r"attack \('fgsm-rs' there, 'fgsm' here\)\. Choose"),
        ({"part": 7}, r"run, which differs in training data\. Choose"),
        ({"epochs": 1}, "has 2 epochs behind it, more than the 1 that it is to have now"),
    ],
)
def test_another_run_s_state_is_refused_and_what_differs_is_named(tmp_path, changes, message):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path, cut=8)
    before = state(tmp_path)
    with pytest.raises(ValueError, match=message):
        short(tmp_path, **changes)
    assert state(tmp_path) == before


def rewrite(folder, change):
    """Change the manifests of a state, as another version of fastadv would have written them."""
    for path in (folder / "state").glob("*.json"):
        body = json.loads(path.read_text().splitlines()[1])
        run = json.loads(body["run"])
        change(body, run)
        text = json.dumps(body | {"run": json.dumps(run)})
        path.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")


def older(body, run):
    """The state without these settings, as an older version wrote it."""
    assert run.pop("label_smoothing") == "0.0"
    assert run.pop("max_grad_norm") == "None"
    assert body["facts"]["place"].pop("switched") is False
    body["facts"]["machine"].pop("precision")


def test_a_state_from_before_a_setting_goes_on_with_its_default(tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path / "cut", cut=8)
    rewrite(tmp_path / "cut", older)
    before = state(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"which differs in label_smoothing \(0.0 there, 0.1 here\)\. Choose"):
        short(tmp_path / "cut", label_smoothing=0.1)
    assert state(tmp_path / "cut") == before
    (weights, losses, _), expected = short(tmp_path / "cut"), short(tmp_path / "whole")
    assert losses == expected[1]
    assert all(torch.equal(value, expected[0][name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body, run: run.update(mixup="0.4"), r"newer fastadv.*does not know its mixup \(0.4 there\): install"),
        (lambda body, run: body["facts"]["place"].update(phase=3), "newer fastadv.*does not know its phase: install"),
        (
            lambda body, run: body.update(format=4),
            "has the format 4, this fastadv reads 2 to 3: install a newer fastadv",
        ),
        (
            lambda body, run: body.update(format=1),
            "has the format 1, this fastadv reads 2 to 3: install the fastadv that",
        ),
    ],
    ids=["setting", "place", "newer format", "older format"],
)
def test_a_state_with_what_is_not_known_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path, cut=8)
    rewrite(tmp_path, change)
    before, log = state(tmp_path), (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=message):
        short(tmp_path)
    assert state(tmp_path) == before
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_resumed_run_may_be_evaluated_and_kept_at_other_times(tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path / "cut", cut=8, eval_every=1)
    (weights, losses, records), expected = (short(tmp_path / name, eval_every=0) for name in ("cut", "whole"))
    assert losses == expected[1]
    assert ["robust_accuracy" in record for record in records if "epoch" in record] == [True, False, True]
    assert weights.keys() == expected[0].keys()


@pytest.mark.parametrize(
    ("settings", "cut", "same_steps"),
    [
        ({"warmup": 10}, 9, True),
        ({"warmup": 10}, 11, True),  # step 11 is the cosine's first, with the peak rate
        ({"warmup": 10}, 12, False),
        ({"lp_ft": 2}, 11, True),
        ({"lp_ft": 2}, 14, False),
        ({"warmup": 18}, None, True),  # a finished run without a cosine
        ({}, None, False),
    ],
)
def test_more_epochs_may_follow_and_it_is_said_where_the_steps_so_far_would_have_been_others(
    settings, cut, same_steps, tmp_path
):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            short(tmp_path / "cut", cut=cut, **settings)
        except RuntimeError:
            assert cut
        if same_steps:
            weights, losses, records = short(tmp_path / "cut", epochs=5, **settings)
    if not same_steps:
        with pytest.warns(UserWarning, match=r"was to have 3 epochs and goes on to 5: the learning rate"):
            _, losses, records = short(tmp_path / "cut", epochs=5, **settings)
    assert len(losses) == 5 + settings.get("lp_ft", 0)
    seconds = sum(record["train_s"] for record in records if "epoch" in record)
    assert records[-1]["train_s"] == pytest.approx(seconds)
    if same_steps:
        expected = short(tmp_path / "whole", epochs=5, **settings)
        assert losses == expected[1]
        assert all(torch.equal(value, expected[0][name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attack": "liet", "warmup": 10}, "the attack's loss of its 9 steps"),
        ({"lp_ft": 2, "eps_schedule": "linear"}, "the budget of its 9 steps"),  # cut in the linear stage
    ],
)
def test_other_epochs_are_said_to_change_what_grows_with_them(settings, words, tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path / "cut", cut=9, **settings)
    with pytest.warns(UserWarning, match=f"was to have 3 epochs and goes on to 5: {words} so far followed 3"):
        short(tmp_path / "cut", epochs=5, **settings)


class Drawing(nn.Module):
    """Adds noise in train mode, which NumPy and Python draw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))

    def forward(self, x):
        noise = torch.from_numpy(np.random.normal(size=x.shape)).to(x)  # noqa: NPY002
        return self.net(x + 0.1 * random.random() * noise if self.training else x)


def test_numbers_of_numpy_and_python_are_drawn_again_after_an_interruption(tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path / "cut", cut=9, model=Drawing())
    (resumed, *_), (whole, *_) = (short(tmp_path / name, model=Drawing()) for name in ("cut", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


class Counting(nn.Module):
    """Forgets `if self.training` where it writes to its buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return self.net(x)


class Sharing(nn.Module):
    """Has buffers over the memory of weights and of each other, and one whose elements are the same number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("rows", self.net[1].weight.data[2:])
        self.register_buffer("mean", self.net[2].running_mean)
        self.register_buffer("ones", torch.ones(1).expand(3))

    def forward(self, x):
        return self.net(x) * self.ones


@pytest.mark.parametrize("settings", [{"method": "linear"}, {"method": "bias", "ema_decay": 0.9}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("kind", [Counting, Sharing])
def test_buffers_of_any_kind_go_on_after_an_interruption(kind, settings, tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        short(tmp_path / "cut", cut=9, model=kind(), **settings)
    resumed, losses, _ = short(tmp_path / "cut", model=kind(), **settings)
    whole, expected, _ = short(None, model=kind(), resume=False, **settings)
    assert losses[-1] == expected[-1]
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_sparse_tensors_are_refused_by_name_before_a_step(tmp_path):
    with pytest.raises(ValueError, match="keeps no sparse tensors, such as b: make them dense"):
        Checkpoints(tmp_path, "run").save({"weights": {**tensors(0), "b": torch.eye(3).to_sparse()}}, {})


def test_other_threads_are_warned_of(tmp_path):
    def train(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            killed_run.train(tmp_path)
        finally:
            torch.set_num_threads(before)

    train(1)
    with pytest.warns(UserWarning, match="'threads': 1.* goes on with .*'threads': 2"):
        train(2)


# ---------------------------------------------------------------------- the files


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(300, generator=generator), "n": torch.tensor(seed)}


def same(groups, seed):
    return all(torch.equal(groups["weights"][name], value) for name, value in tensors(seed).items())


def test_the_last_two_are_kept_and_equal_tensors_once(tmp_path):
    files = Checkpoints(tmp_path, "run")
    assert files.load() is None
    for seed in range(4):
        files.save({"weights": tensors(seed), "best": tensors(2) if seed >= 2 else tensors(seed)}, {"seed": seed})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.endswith(".json")] == ["00000003.json", "00000004.json"]
    assert len(names) == 2 + 2  # the tensors of seeds 2 and 3
    groups, facts = Checkpoints(tmp_path, "run").load()
    assert facts == {"seed": 3}
    assert same(groups, 3)
    assert torch.equal(groups["best"]["a"], tensors(2)["a"])
    files.save({"weights": tensors(5), "best": None}, {"seed": 5})
    groups, _ = Checkpoints(tmp_path, "run").load()
    assert torch.equal(groups["best"]["a"], tensors(2)["a"])


@pytest.mark.parametrize("victim", ["newest manifest", "its tensors", "tensors missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, victim):
    files = Checkpoints(tmp_path, "run")
    for seed in range(2):
        files.save({"weights": tensors(seed)}, {"seed": seed})
    manifest = tmp_path / "00000002.json"
    path = manifest
    if victim != "newest manifest":
        path = tmp_path / json.loads(manifest.read_text().splitlines()[1])["files"]["weights"]
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content) - 1)] ^= 1
    path.unlink() if victim == "tensors missing" else path.write_bytes(content)
    again = Checkpoints(tmp_path, "run")
    with pytest.warns(UserWarning, match="00000002.json is damaged"):
        groups, facts = again.load()
    assert facts == {"seed": 0}
    assert same(groups, 0)
    for seed in (1, 7):  # a resumed run first makes the content of the damaged checkpoint again
        again.save({"weights": tensors(seed)}, {"seed": seed})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            groups, facts = Checkpoints(tmp_path, "run").load()
        assert facts == {"seed": seed}
        assert same(groups, seed)


@pytest.mark.parametrize("content", [b"", b'{"a": 1}', bytes(range(128, 256))])
def test_a_damaged_checkpoint_that_nobody_needs_stops_nothing(tmp_path, content):
    files = Checkpoints(tmp_path, "{}")
    for seed in range(2):
        files.save({"weights": tensors(seed)}, {"seed": seed})
    (tmp_path / "00000001.json").write_bytes(content)
    again = Checkpoints(tmp_path, "{}")
    again.load()
    for seed in (1, 1, 2):  # equal weights again, as after an evaluation, make no new file of tensors
        again.save({"weights": tensors(seed)}, {"seed": seed})
        groups, facts = Checkpoints(tmp_path, "{}").load()
        assert facts == {"seed": seed}
        assert same(groups, seed)


@pytest.mark.parametrize("name", ["../mine.safetensors", "{folder}/mine.safetensors", "mine.safetensors", "..", ""])
@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_others_names_no_file_but_its_own(tmp_path, name, version):
    mine = tmp_path / "mine.safetensors"
    mine.write_text("precious")
    checkpoints = Checkpoints(tmp_path / "state", "run")
    checkpoints.save({"weights": tensors(1)}, {})
    facts = {"format": version, "run": "run", "files": {"weights": name.format(folder=tmp_path)}, "facts": {}}
    body = json.dumps(facts)
    digest = hashlib.sha256(body.encode()).hexdigest()
    (tmp_path / "state" / "00000002.json").write_text(f"{digest}\n{body}\n")
    with pytest.warns(UserWarning, match="which is no file of a state"):
        groups, _ = Checkpoints(tmp_path / "state", "run").load()
    assert same(groups, 1)
    assert mine.read_text() == "precious"


def test_nothing_whole_is_an_error_and_not_a_new_beginning(tmp_path):
    Checkpoints(tmp_path, "run").save({"weights": tensors(0)}, {})
    next(tmp_path.glob("*.json")).write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint can be loaded"):
        Checkpoints(tmp_path, "run").load()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    files = Checkpoints(tmp_path, "run")
    files.save({"weights": tensors(0)}, {"seed": 0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # like a full disk, the system refuses longer files
    try:
        with pytest.raises(OSError, match=r"File too large|No space"):
            files.save({"weights": tensors(1)}, {"seed": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.glob("*.new"))
    groups, facts = Checkpoints(tmp_path, "run").load()
    assert facts == {"seed": 0}
    assert same(groups, 0)


def test_what_a_run_did_not_write_stays(tmp_path):
    files = Checkpoints(tmp_path, "run")
    own = ["notes.json", "1.json", "model.safetensors", "weights.new", f"{'g' * 64}.safetensors"]
    for name in own:
        (tmp_path / name).write_text("mine")
    for seed in range(5):
        files.save({"weights": tensors(seed)}, {})
    assert {name: (tmp_path / name).read_text() for name in own} == dict.fromkeys(own, "mine")
    assert len(list(tmp_path.iterdir())) == len(own) + 4
    assert same(Checkpoints(tmp_path, "run").load()[0], 4)


def test_a_log_of_another_run_is_kept_under_another_name(tmp_path):
    (tmp_path / "log.jsonl").write_text("of another run")
    killed_run.train(tmp_path, resume=False)
    assert (tmp_path / "log.1.jsonl").read_text() == "of another run"
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["final"]


def test_a_checkpoint_that_cannot_be_read_now_is_no_damaged_one(tmp_path, monkeypatch):
    """A network drive may be away for a while: then an older checkpoint must not replace the newest."""
    files = Checkpoints(tmp_path, "run")
    for seed in range(2):
        files.save({"weights": tensors(seed)}, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    read = Path.read_bytes

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Checkpoints(tmp_path, "run").load()
    monkeypatch.setattr(Path, "read_bytes", read)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(Checkpoints(tmp_path, "run").load()[0], 1)


@pytest.mark.parametrize("elsewhere", ["above", "absolute", "a link", "a manifest that is a link"])
def test_a_checkpoint_is_made_of_files_in_its_folder_alone(tmp_path, elsewhere):
    folder, outside = tmp_path / "state", tmp_path / "outside"
    Checkpoints(outside, "run").save({"weights": tensors(1)}, {})
    Checkpoints(folder, "run").save({"weights": tensors(0)}, {})
    victim, manifest = next(outside.glob("*.safetensors")), folder / "00000002.json"
    name = {"above": f"../outside/{victim.name}", "absolute": str(victim)}.get(elsewhere, victim.name)
    body = json.dumps({"format": FORMAT, "run": "run", "files": {"weights": name}, "facts": {}})
    manifest.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")
    if "link" in elsewhere:
        (folder / victim.name).symlink_to(victim)
    if elsewhere == "a manifest that is a link":
        (folder / victim.name).unlink()
        (folder / victim.name).write_bytes(victim.read_bytes())
        manifest.rename(outside / manifest.name)
        manifest.symlink_to(outside / manifest.name)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    again = Checkpoints(folder, "run")
    with pytest.warns(UserWarning, match=r"00000002.json is damaged: it (names .*no file of a state|is a link)"):
        groups, _ = again.load()
    assert same(groups, 0)
    again.save({"weights": tensors(2)}, {})
    assert {path: path.read_bytes() for path in outside.iterdir()} == before
    assert same(Checkpoints(folder, "run").load()[0], 2)


def test_nothing_is_pickled(tmp_path):
    killed_run.train(tmp_path)
    kinds = {path.suffix for path in Path(tmp_path).rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors"}


class Keeping(nn.Module):
    """A network that keeps something from pass to pass: `kept` says what."""

    def __init__(self, kept):
        super().__init__()
        self.net, self.kept, self.count, self.history = nn.Linear(12, 3), kept, 0, []
        self.mean, self.generator = torch.zeros(3), torch.Generator().manual_seed(0)
        self.register_buffer("late", None)
        self.register_buffer("early", torch.zeros(3))

    def forward(self, x):
        logits = self.net(x.flatten(1))
        if self.kept == "count":
            self.count += 1
        elif self.kept == "history":
            self.history.append(len(x))
        elif self.kept == "generator":
            logits = logits * torch.rand(3, generator=self.generator)
        elif self.kept == "mean":
            self.mean.lerp_(logits.detach().mean(0), 0.1)
        elif self.kept == "late":
            self.late = logits.detach().mean(0)
        elif self.kept == "early":
            self.early = self.early.lerp(logits.detach().mean(0), 0.1)
        return logits


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, images, labels):
        self.calls += 1
        return images


@pytest.mark.parametrize("kept", ["count", "history", "generator", "mean", "late", "early", "nothing", "calls"])
def test_what_no_checkpoint_has_is_told_at_the_first_step(kept, tmp_path, recwarn):
    attack = {"attack": Counting()} if kept == "calls" else {}
    options = {"epochs": 2, "batch_size": 4, "probe": 0, "progress": False, **attack}
    parts = torch.rand(9, 3, 2, 2), torch.arange(9) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(Keeping(kept), 0.1, **options).fit(parts)  # without a folder nothing is promised
    Trainer(Keeping(kept), 0.1, folder=tmp_path, **options).fit(parts)
    told = [str(each.message) for each in recwarn if "no checkpoint has it" in str(each.message)]
    assert len(told) == (kept not in ("early", "nothing"))
    assert all(f"{kept} of " in each for each in told)
