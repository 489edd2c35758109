"""The stored verdicts of AutoAttack's package belong to these models and images, and a wrong evaluation would fail."""

import functools
import importlib
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attacked import one_thread as one_thread

from fastadv.attacks import FGSM, PGD
from fastadv.evaluation import evaluate

PEERS = Path(__file__).resolve().parents[2] / "benchmarks/peers"
RESULTS = PEERS.parent / "results/autoattack"
sys.path.append(str(PEERS))
judged, standard, suites = (importlib.import_module(name) for name in ("judged", "standard", "suites"))

# The backbone's images are available only where FASTADV_CIFAR10 names the copy of CIFAR-10 with these verdicts.
WITH_IMAGES = [name for name in judged.NAMES if name != "backbone" or os.environ.get("FASTADV_CIFAR10")]

judge = functools.cache(judged.judged)


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def stored(name):
    """{seed: bool (N,), whether a sample is misclassified, clean or after any part of AutoAttack}."""
    return {run["seed"]: torch.tensor(run["verdicts"]) != standard.ROBUST for run in result(name)["runs"]}


@pytest.mark.parametrize("name", judged.NAMES)
def test_the_verdicts_are_of_these_weights(name):
    """If this fails, the models were trained again: run `benchmarks/peers/autoattack.py`."""
    model, eps = judged.built(name)
    assert result(name)["weights"] == judged.digest(model.state_dict().values())
    assert result(name)["eps"] == eps
    if name != "backbone":
        with judged.safe_open(judged.FOLDER / f"{name}.safetensors", "pt") as file:
            assert judged.Recipe(**json.loads(file.metadata()["recipe"])) == judged.TRAINED[name]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_verdicts_are_of_these_images(name):
    model, images, labels, _ = judge(name)
    assert result(name)["images"] == judged.digest((images, labels))
    assert images.dtype == torch.float32
    right = model(images).argmax(1) == labels
    assert result(name)["clean"] == int(right.sum())
    for run in result(name)["runs"]:
        assert torch.equal(torch.tensor(run["verdicts"]) != standard.MISCLASSIFIED, right)


@pytest.mark.parametrize("name", judged.NAMES)
def test_a_wrong_evaluation_would_show(name):
    """Some images are robust and some are fooled, a few of them only by targeted APGD."""
    runs = result(name)["runs"]
    parts = standard.parts_for(result(name)["classes"])
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        counts = {part: run["verdicts"].count(1 + standard.PARTS.index(part)) for part in parts}
        robust, wrong = (run["verdicts"].count(kind) for kind in (standard.ROBUST, standard.MISCLASSIFIED))
        assert robust + wrong + sum(counts.values()) == len(run["verdicts"])
        assert run["robust"] == robust == (~stored(name)[run["seed"]]).sum()
        assert 0.1 <= robust / len(run["verdicts"]) <= 0.6
        done = parts[: len(run["seconds"])]  # the backbone's run may have been cut short
        assert len(done) >= 2
        assert tuple(run["seconds"]) == tuple(run["gradients"]) == tuple(run["forwards"]) == done
        assert counts.get("apgd-t", 5) >= 5


@pytest.mark.parametrize("name", judged.TRAINED)
def test_what_pgd_fools_is_fooled(name):
    """PGD is not among the stored attacks."""
    model, images, labels, eps = judge(name)
    adv = PGD(model, eps, eps / 4, 10)(images, labels)
    fooled = model(adv).argmax(1) != labels
    found = torch.stack(list(stored(name).values())).any(0)
    assert (fooled & ~found).sum() <= 0.01 * len(found)  # the verdicts of two seeds differ in about as many images
    assert fooled.sum() > 0.5 * found.sum()


def test_the_collapsed_model_is_robust_to_fgsm_only():
    model, images, labels, _ = judge("collapsed")
    eps = judged.TRAINED["collapsed"].trained_at
    left = [
        (model(attack(images, labels)).argmax(1) == labels).float().mean()
        for attack in (FGSM(model, eps), PGD(model, eps, eps / 4, 20))
    ]
    assert left[0] > 0.6
    assert left[1] < 0.01


@pytest.mark.parametrize(("name", "hidden"), [("quantised", 1), ("saturated", 0.9), ("randomised", None)])
def test_masking_models_hide_their_gradient(name, hidden):
    model, images, labels, _ = judge(name)
    images = images.clone().requires_grad_()
    outputs = model(images)
    assert (outputs.argmax(1) == labels).float().mean() > 0.9
    if hidden is None:
        assert not torch.equal(outputs, model(images))
        return
    (grad,) = torch.autograd.grad(F.cross_entropy(outputs, labels), images)
    assert (grad.flatten(1) == 0).all(1).float().mean() >= hidden


class Ensemble:
    """Stands for AutoAttack: each part takes two gradients and a forward pass per image, and fools two more images."""

    def __init__(self, model, **settings):
        self.model, self.attacked, self.settings = model, model, settings
        self.apgd_targeted, self.fab = types.SimpleNamespace(), types.SimpleNamespace()

    def run_standard_evaluation(self, images, labels, return_labels):
        self.model(images)
        with torch.enable_grad():
            self.attacked(images.repeat(2, 1))
        with torch.no_grad():
            self.attacked(images)
        found = labels.clone()
        found[:2] += 1
        return images, found


def test_a_run_says_which_part_was_the_first_and_what_it_took(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=Ensemble))
    run = {"seed": 7, "verdicts": [-1, 0, -1, -1, -1, 0, -1], "seconds": {}, "gradients": {}, "forwards": {}}
    for part in ("apgd-ce", "fab-t"):
        standard.run_part(lambda x: x, torch.rand(7, 3), torch.zeros(7).long(), 0.1, 3, run, part)
    assert run["verdicts"] == [1, 0, 1, 3, 3, 0, -1]
    assert run["robust"] == 1
    assert run["gradients"] == {"apgd-ce": 10, "fab-t": 6}
    assert run["forwards"] == {"apgd-ce": 5, "fab-t": 3}
    made, _ = standard.attack(lambda x: x, 0.1, 3, 7, "fab-t")
    assert (made.fab.n_target_classes, made.settings["seed"], made.settings["eps"]) == (2, 7, 0.1)


# ---------------------------------------------------------------------- fastadv's evaluation beside AutoAttack


@pytest.mark.filterwarnings("ignore:the last .* fell in the last tenth")
@pytest.mark.parametrize("name", judged.TRAINED)
def test_the_default_evaluation_leaves_what_autoattack_leaves(name):
    """No more images are robust than in the package's lower count, plus one image in 500."""
    model, images, labels, eps = judged.judged(name)
    report = evaluate(model, (images, labels), eps=eps, progress=False)
    least = min(int((~fooled).sum()) for fooled in stored(name).values())
    assert sum(report["budgets"][0]["robust"]) <= least + 1
    assert not any("masked" in warning for warning in report["warnings"])
    # PGD alone leaves clearly more.
    pgd = evaluate(model, (images, labels), ["pgd-10"], eps=eps, progress=False)
    assert sum(pgd["budgets"][0]["robust"]) > least + 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["quantised", "saturated", "randomised"])
def test_a_model_that_hides_its_gradient_is_told_of(name):
    model, images, labels, eps = judge(name)
    report = evaluate(model, (images[:200], labels[:200]), eps=eps, progress=False)
    assert any("gradients look masked" in warning for warning in report["warnings"])


# ---------------------------------------------------------------------- tests of peers, run with fastadv's attacks


def test_what_their_tests_say_is_explained_or_told():
    """Failures that the peer has too, with a reason and without a reason; and a test that called no fastadv attack."""
    said = {"outcome": "failed", "said": "no net"}
    ours = {
        "fine": {"outcome": "passed", "calls": 2},
        "tests/test_attacks_raise.py::test_fgsm_run_raises[x]": {"outcome": "failed", "calls": 1, "said": "no error"},
        "broken": {"outcome": "failed", "calls": 1, "said": "wrong"},
        "theirs too": {"outcome": "failed", "calls": 0, "said": "elsewhere"},
        "not ours": {"outcome": "passed", "calls": 0},
        "left out": {"outcome": "skipped", "calls": 0, "said": "no GPU"},
    }
    theirs = {test: said if test == "theirs too" else {"outcome": "passed"} for test in ours}
    rows = {row["test"]: row.get("why") for row in suites.beside("foolbox", ours, theirs)}
    assert rows.pop("tests/test_attacks_raise.py::test_fgsm_run_raises[x]").startswith("foolbox's FGSM refuses targets")
    assert "no net" in rows.pop("theirs too")
    assert rows == {"fine": None, "broken": "unexplained", "not ours": "unexplained", "left out": None}


def test_least_finds_the_first_budget_at_which_an_image_falls():
    """Class 1 needs a pixel above a threshold: the first multiple of the step beyond the gap fools the image."""
    gaps = torch.tensor([0.05, 0.12, 0.31, 0.9])[:, None]

    def model(x):
        return torch.cat((torch.zeros_like(x), 8 * (x - gaps)), 1)

    least = suites.suite_adapters.Least(
        functools.partial(PGD, alpha=None, steps=1, random_start=False), 0.1, model, 0.5, (0, 1)
    )
    found = least(torch.zeros(4, 1), None)[:, 0]
    assert torch.allclose(found, torch.tensor([0.1, 0.2, 0.4, 0.5]))


@pytest.mark.parametrize("package", suites.PEERS)
def test_no_failure_of_a_peers_test_is_left_without_a_reason(package):
    stored = json.loads((suites.RESULTS / f"{package}.json").read_text())
    assert stored["tests"]
    assert [row["test"] for row in stored["tests"] if row.get("why") == "unexplained"] == []
    assert stored["counts"]["passed"] == sum(row["outcome"] == "passed" for row in stored["tests"])
