"""CONTRIBUTING.md: the files that it names exist, and its list for a new attack is complete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastadv

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PATH = re.compile(r"`((?:fastadv|csrc|tests|docs|benchmarks)/[\w/.-]+|[A-Z]+\.md)`")
NEW = "fastadv/attacks/half_start.py"  # the new file of the list for an attack

# {file: the text that the list adds to it}, for FGSM from a random start in half the ball.
PLACES = {
    NEW: """
from fastadv.attacks.fgsm import FGSM


class HalfStart(FGSM):
    def __init__(self, model, eps=8 / 255, **options):
        super().__init__(model, eps, noise=None, **options)

    NOISE = 0.5
""",
    "fastadv/attacks/__init__.py": """
from fastadv.attacks.half_start import HalfStart
__all__ += ["HalfStart"]
""",
    "fastadv/attacks/presets.py": """
from fastadv.attacks.half_start import HalfStart
PRESETS["half-start"] = (HalfStart, lambda eps: {})
""",
    "tests/attacks/attacked.py": """
from fastadv.attacks import HalfStart
ATTACKS["HalfStart"] = lambda model, **o: HalfStart(model, EPS, **o)
RANDOM += ("HalfStart",)
SINGLE_STEP += ("HalfStart",)
""",
    "tests/attacks/test_attack_options.py": """
OWN["HalfStart"] = ("eps=8/255",)
""",
}

# The new attack by its name in Python, `evaluate`, `Trainer` and the command line, and its result in plain PyTorch.
USED = """
import torch
from torch import nn

from fastadv import random_init
from fastadv.attacks import HalfStart
from fastadv.cli import main
from fastadv.evaluation import evaluate
from fastadv.training import Trainer

torch.set_num_threads(1)
model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
x, y, eps = torch.rand(16, 3, 4, 4).double(), torch.randint(3, (16,)), 8 / 255
start = random_init(x, eps / 2, seed=7).requires_grad_()
(grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(start), y), start)
expected = (x + (start + eps * grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
torch.testing.assert_close(HalfStart(model, eps)(x, y, seed=7), expected, rtol=0, atol=1e-15)
evaluate(model, (x, y), "half-start", eps=eps, progress=False)
Trainer(model.float(), eps, attack="half-start", epochs=1, progress=False).fit((x.float(), y))
try:
    main(["finetune", "--attack", "half-start", "--data", "nowhere", "--out", "run"])
except SystemExit as error:
    assert "nowhere" in str(error), error
"""


def section(title):
    found = re.search(rf"^## {title}\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    return found[1]


def test_every_file_that_is_named_is_there():
    named = set(PATH.findall(TEXT)) - {NEW}
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_that_is_named_is_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", section("Set-up"))) <= targets


def test_every_table_that_is_named_is_in_its_file():
    """An item of a list that names a `TABLE` also names the `FILE` that has it."""
    items = re.split(r"^\d+\. ", TEXT, flags=re.MULTILINE)
    for item in items:
        files = [ROOT / name for name in PATH.findall(item) if name.endswith((".py", ".cpp", ".cu"))]
        for table in re.findall(r"`(_?[A-Z][A-Z_]{2,})`", item.split("\n\n")[0]):
            assert any(re.search(rf"\b{table}\b", path.read_text()) for path in files if path.exists()), table


def test_the_list_for_an_attack_names_the_places_that_it_takes():
    numbered = re.search(r"^1\. .*?\n\n", section("Adding an attack"), re.MULTILINE | re.DOTALL)[0]
    assert set(PATH.findall(numbered)) == set(PLACES)


@pytest.fixture
def followed(tmp_path):
    """A copy of the package and of the tests, with a new attack that was added as the list says."""
    shutil.copytree(Path(fastadv.__file__).parent, tmp_path / "fastadv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "old_files"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in PLACES.items():
        with open(tmp_path / name, "a") as file:
            file.write(text)
    return tmp_path


def run(folder, *command):
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in ours if not path.startswith(str(ROOT / "tests"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *others])}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_who_follows_the_list_has_an_attack_that_works_everywhere(followed):
    (followed / "used.py").write_text(USED)
    run(followed, "used.py")
    shared = ("tests/attacks/test_attack_manners.py", "tests/attacks/test_attack_options.py")
    out = run(followed, "-m", "pytest", "-p", "no:cacheprovider", *shared, "-k", "HalfStart and not compile")
    assert int(re.search(r"(\d+) passed", out)[1]) > 20
