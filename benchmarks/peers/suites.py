"""Runs peers' own tests with fastadv's attacks in place of theirs, and with theirs for comparison.

    python benchmarks/peers/suites.py CHECKOUTS... [--mnist FOLDER]

CHECKOUTS are clones of the repositories in PEERS. What these need beside torch must be installed (eagerpy and GitPython
for foolbox). FOLDER has Keras' mnist.npz, which ART downloads otherwise; ART's tests use its first 100 training images
and 11 test images. A file for each peer is stored in benchmarks/results/peers. The exit status is 1 if a test that
passes with the peer's attack fails with fastadv's, and PEERS does not explain why; or if a test passes without a call
of fastadv.
"""

import argparse
import functools
import importlib
import json
import os
import re
import sys
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import MagicMock

import judged
import numpy as np
import pytest
import suite_adapters
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import environment

from fastadv import attacks
from fastadv.files import write_atomically

RESULTS = environment.ROOT / "benchmarks/results/peers"


# ------------------------------------------------------------------ what the tests need and a clone lacks


def stand_in(*names, **attributes):
    """Put empty modules in place of modules that the tests import but do not use, where these are not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # a torchvision for another torch raises errors of several types
            sys.modules[name] = MagicMock(**attributes)


def for_adv_lib(mnist):
    stand_in("torchvision", "visdom")


def for_art(mnist):
    stand_in("tensorflow", "keras", "keras.backend", __version__="2")
    if mnist is not None:
        importlib.import_module("art.config").ART_DATA_PATH = str(mnist)


def for_torchattacks(mnist):
    """A model and images in place of RobustBench's, which must be downloaded."""

    def load_cifar10(n_examples, data_dir):
        _, images, labels, _ = judged.judged("clean")
        return images[:n_examples], labels[:n_examples]

    def clean_accuracy(model, x, y):
        return (model(x).argmax(1) == y).float().mean().item()

    def load_model(name, model_dir, norm):
        return judged.built("clean")[0]

    sys.modules["robustbench"] = types.ModuleType("robustbench")
    for name, functions in (("utils", (load_model, clean_accuracy)), ("data", (load_cifar10,))):
        module = sys.modules[f"robustbench.{name}"] = types.ModuleType(f"robustbench.{name}")
        vars(module).update({function.__name__: function for function in functions})


# ------------------------------------------------------------------ peers


@dataclass(frozen=True)
class Peer:
    """A package whose tests are run.

    Attributes:
        repository: on GitHub.
        files: the files in the clone that have the tests.
        chosen: a regular expression; a test is run if its id matches.
        replace: puts fastadv's attacks in place of theirs.
        needs: provides what the tests need and a clone lacks; takes the folder with MNIST, or None.
        options: options for pytest.
        translated: what the adapters change in the arguments of attacks, beside their names.
        explained: {part of a test's id: why the test fails with fastadv}.
    """

    repository: str
    files: tuple[str, ...]
    chosen: str
    replace: Callable
    needs: Callable = lambda mnist: None
    options: tuple[str, ...] = ()
    translated: tuple[str, ...] = ()
    explained: dict[str, str] = field(default_factory=dict)


BOX = "An L-inf eps beyond the box's width is the box's width: fastadv refuses such an eps."

PEERS = {
    "adv_lib": Peer(
        "jeromerony/adversarial-library",
        ("tests/test_attacks.py",),
        r"_budget_|_untargeted_minimal_(l2.*attack5|linf.*attack2)\]",  # the latter are FAB
        suite_adapters.adv_lib,
        for_adv_lib,
    ),
    "foolbox": Peer(
        "bethgelab/foolbox",
        ("tests/test_attacks.py", "tests/test_attacks_raise.py", "tests/test_eot_wrapper.py"),
        rf"pytorch_simple.*-({'|'.join(suite_adapters.FOOLBOX)})\("
        r"|(test_fgsm_run_raises|test_eot_wrapper)\[pytorch_simple",
        suite_adapters.foolbox,
        options=("--backend", "pytorch"),
        translated=(BOX,),
        explained={
            "test_fgsm_run_raises": "foolbox's FGSM refuses targets; fastadv's takes them, as all its attacks do."
        },
    ),
    "art": Peer(
        "Trusted-AI/adversarial-robustness-toolbox",
        (
            "tests/attacks/test_projected_gradient_descent.py",
            "tests/attacks/test_iterative_method.py",
            "tests/attacks/evasion/test_fast_gradient.py",
            "tests/attacks/evasion/test_momentum_iterative_method.py",
            "tests/attacks/evasion/test_auto_projected_gradient_descent.py",
            "tests/attacks/evasion/test_square_attack.py",
        ),
        r"test_\d_(framework_)?pytorch|(?<!norm)_images|test_tabular\[.*-True\]|test_generate\[(?!1-)",
        suite_adapters.art,
        for_art,
        options=("--framework", "pytorch"),
        translated=(
            BOX,
            "An array of eps, step sizes or clip values that are all equal is that number.",
            "A mask is in the model that is attacked, which sees the masked change of the image.",
            "Defences' gradient is taken to be the identity, as ART takes it.",
            "Of the option `minimal` the budgets are tried one after the other.",
            "SquareAttack leaves misclassified images as they are; a call of fastadv attacks every image.",
            "The L1 norm and random eps, which fastadv has not, stay theirs.",
        ),
        explained={
            "test_6_framework_pytorch_mnist": "From random starts it wants what ART's NumPy attack makes of NumPy's "
            "generator; fastadv draws from seeds of its own. What it compares before agrees to its 6 places: L-inf, L2 "
            "and targets, from the image itself.",
            "test_square_attack.py::test_generate[2]": "It wants a largest change of 0.25 after 5 queries, which ART's "
            "way to place the L2 bumps has. torchattacks' Square changes no pixel of these images by more than 0.04 "
            "then and 0.13 after 50 queries; fastadv's by 0.12 and 0.13.",
        },
    ),
    "torchattacks": Peer(
        "Harry24k/adversarial-attacks-pytorch",
        ("code_coverage/test_atks.py",),
        rf"\[({'|'.join(attacks.__all__)})\]",
        suite_adapters.torchattacks,
        for_torchattacks,
        translated=("Model and images are of scikit-learn's digits: RobustBench's come from the net.",),
    ),
}


def peer_of(checkout):
    for package in PEERS:
        if (checkout / package).is_dir():
            return package
    raise SystemExit(f"{checkout} is no clone of {', '.join(peer.repository for peer in PEERS.values())}")


# ------------------------------------------------------------------ running


class Watch:
    """A pytest plugin: it selects the tests, seeds them, and notes how they end and what they call."""

    def __init__(self, chosen):
        self.chosen, self.calls, self.rows = re.compile(chosen), 0, {}
        call = attacks.Attack.__call__

        @functools.wraps(call)
        def counted(*args, **kwargs):
            self.calls += 1
            return call(*args, **kwargs)

        attacks.Attack.__call__ = counted

    def pytest_configure(self, config):
        # ART runs tests for all frameworks with TensorFlow only, unless another framework is the default.
        for plugin in config.pluginmanager.get_plugins():
            if hasattr(plugin, "get_default_framework"):
                plugin.get_default_framework = lambda: "pytorch"

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.chosen.search(item.nodeid)]

    def pytest_runtest_setup(self, item):
        self.calls = 0
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (their attacks draw from it)

    def pytest_runtest_logreport(self, report):
        failed = self.rows.get(report.nodeid, {}).get("outcome") == "failed"
        if failed or (report.when != "call" and report.passed):
            return
        row = self.rows[report.nodeid] = {"outcome": report.outcome, "calls": self.calls}
        if report.failed:
            row["at"], row["said"] = told(report.longrepr)
        elif report.skipped:
            row["said"] = report.longrepr[2]


def told(failure):
    """(the last line of the tests that was reached, the error)."""
    places = [entry.reprfileloc for entry in failure.reprtraceback.reprentries]
    places = [f"{place.path}:{place.lineno}" for place in places if "test" in place.path]
    return places[-1] if places else "", failure.reprcrash.message.strip().split("\n")[0][:300]


def run(checkout, package, mnist, ours):
    """{test: how it ended}, in this process, which must not have imported the package before."""
    torch.set_num_threads(1)
    peer = PEERS[package]
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    peer.needs(mnist)
    if ours:
        peer.replace()
    watch = Watch(peer.chosen)
    quiet = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=")
    pytest.main([*quiet, *peer.options, *peer.files], plugins=[watch])
    if not watch.rows:
        raise RuntimeError(f"none of the tests of {checkout} was run: see above")
    return watch.rows, getattr(importlib.import_module(package), "__version__", None)


def apart(*args):
    """The result of `run` in a separate process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *args).result()


def beside(package, ours, theirs):
    """A row for each test; a difference without an explanation is "unexplained"."""
    rows = []
    for test, row in ours.items():
        row = {"test": test, **row, "with theirs": theirs[test]["outcome"]}
        if row["outcome"] == "failed":
            whys = [why for part, why in PEERS[package].explained.items() if part in test]
            same = "It fails with their attack too: " + theirs[test].get("said", "")
            row["why"] = same if row["with theirs"] == "failed" else whys[0] if whys else "unexplained"
        elif row["outcome"] == "passed" and not row["calls"]:
            row["why"] = "unexplained"  # no attack of fastadv was called
        rows.append(row)
    return rows


def result(package, checkout, mnist, facts):
    (ours, its_version), (theirs, _) = (apart(checkout, package, mnist, mine) for mine in (True, False))
    rows = beside(package, ours, theirs)
    peer = PEERS[package]
    return {
        "part": "suites",
        "peer": peer.repository,
        "commit of the peer": environment.output("git", "-C", checkout, "rev-parse", "HEAD"),
        "version of the peer": its_version,
        "environment": facts,
        "versions": {name: version(name) for name in ("numpy", "pytest", "torch")},
        "translated": peer.translated,
        "counts": {how: sum(row["outcome"] == how for row in rows) for how in ("passed", "failed", "skipped")},
        "tests": rows,
    }


def stored(result, package):
    """Write the file, with a line for each fact and each test."""
    lines = [f'"{key}": {json.dumps(value)}' for key, value in result.items() if key != "tests"]
    lines.append('"tests": [\n' + ",\n".join(map(json.dumps, result["tests"])) + "\n]")
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{package}.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+")
    parser.add_argument("--mnist", type=Path)
    args = parser.parse_args()
    facts, unexplained = environment.facts(), 0
    for checkout in args.checkouts:
        package = peer_of(checkout)
        found = result(package, checkout.resolve(), args.mnist and args.mnist.resolve(), facts)
        stored(found, package)
        print(package, found["counts"], flush=True)
        for row in found["tests"]:
            if "why" in row:
                print(f"  {row['test']}: {row['outcome']}, {row.get('said', '')}: {row['why']}")
        unexplained += sum(row.get("why") == "unexplained" for row in found["tests"])
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
