"""What is marked as measured before the code changed is just that."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
stale = importlib.import_module("stale")


def git(folder, *command):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", folder, *name, *command], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    """Sources, a result of theirs, and its commit."""
    git(tmp_path, "init", "-q")
    for name in ("fastadv/attacks/pgd.py", "fastadv/ops/reference.py", "csrc/cpu/ops.cpp", "csrc/cuda/ops.cu", "x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def store(repository, name, rows, commit):
    path = repository / "benchmarks/results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"part": "bench", "summary": rows, "environment": {"commit": commit}}))


def test_a_figure_is_stale_where_a_file_that_it_depends_on_has_changed(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    store(repository, "cpu.json", [{"kind": "op", "backend": "cpu"}], commit)
    store(repository, "gpu/cuda.json", [{"kind": "op", "backend": "cuda"}], commit + "+")
    store(repository, "attack.json", [{"kind": "attack", "backend": "cpu"}], commit[:7])
    assert stale.stale(repository) == {}

    def changes(name, text):
        (repository / name).write_text(text)
        return {result: paths for result, (_, paths) in stale.stale(repository).items()}

    assert changes("x.py", "second\n") == {}
    assert changes("csrc/cuda/ops.cu", "second\n") == {"gpu/cuda.json": ["csrc/cuda/ops.cu"]}
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")  # what is committed counts as what is not
    new = {"attack.json": ["fastadv/attacks/new.py"], "gpu/cuda.json": ["csrc/cuda/ops.cu"]}
    assert changes("fastadv/attacks/new.py", "new\n") == new
    (repository / "fastadv/attacks/new.py").unlink()
    assert changes("csrc/cuda/ops.cu", "first\n") == {}  # as it was


def test_a_commit_that_git_does_not_know_is_named(repository):
    store(repository, "old.json", [{"kind": "attack"}], "0" * 40)
    assert stale.stale(repository) == {"old.json": None}


def test_the_first_cell_of_each_commit_stands_for_a_study(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    (repository / "fastadv/attacks/pgd.py").write_text("second\n")
    git(repository, "commit", "-qam", "second")
    newer = git(repository, "rev-parse", "HEAD").strip()
    for name, made_at in (("a", newer), ("b", commit), ("c", commit), ("d", newer)):
        path = repository / "benchmarks/results/study/cells" / name / "cell.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"cell": {}, "commit": made_at}))
    assert stale.stale(repository) == {"study/cells/b/cell.json": (commit[:7], ["fastadv/attacks/pgd.py"])}


def test_every_stored_result_says_what_it_depends_on():
    for name, result in stale.results(ROOT).items():
        assert stale.depends(result), name


@pytest.mark.parametrize("place", stale.PLACES)
def test_the_lists_are_up_to_date(place):
    """If not: python benchmarks/stale.py --write"""
    found = stale.stale(ROOT)
    if None in found.values():
        pytest.skip("git does not know a commit that a result names: a shallow clone, or none")
    assert (ROOT / place).read_text() == stale.filled((ROOT / place).read_text(), stale.PLACES[place](found))
