"""Times of cells that are trained again, alone."""

import json
import shutil
import sys
from collections import Counter

import pytest
import studied
from studied import rng  # noqa: F401
from test_study import study, write_set

from fastadv.commands import study as command
from fastadv.study import retiming
from fastadv.study.reading import read_study
from fastadv.study.writing import write_study

GRID = """
data: [colours.npz, {name: others, path: colours.npz}]
model: mlp
methods: [linear, full]
attacks: [none, fgsm]
eps: [24]
seeds: 1
epochs: 2
batch_size: 16
probe: 0
train_limit: 32
val_limit: 32
test_limit: 32
blocks:
  - {}
  - {data: [{name: others, path: colours.npz}], methods: full, attacks: [{name: kept, attack: stale}]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_study", lambda out: None)
    write_set(tmp_path / "colours.npz", 1)
    study(tmp_path, "-q", grid=GRID)
    return tmp_path


def retimed(folder):
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("out/cells/*/retimed.json")}
    return dict(sorted(found.items()))


def test_cells_are_trained_again_in_rounds_and_none_twice(folder, capsys, monkeypatch):
    cells = {path: path.read_bytes() for path in folder.glob("out/cells/*/cell.json")}
    monkeypatch.setenv("FASTADV_COMMIT", "one")
    study(folder, "--times", "2", grid=GRID)
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "trained again" in line]
    ids = [f"colours-mlp-linear-{attack}-eps24-seed0" for attack in ("none", "fgsm")]
    ids += [f"others-mlp-full-{attack}-eps24-seed0" for attack in ("none", "fgsm", "kept")]  # this row has most attacks
    assert set(said) == set(ids)
    assert said == 2 * said[: len(ids)]
    found = retimed(folder)
    assert found.keys() == set(ids)
    for each in found.values():
        assert [len(each[name]) for name in ("train_s", "train_cpu_s")] == [2, 2]
        assert (each["machine"]["device"], each["commit"]) == ("cpu", "one")
    assert {path: path.read_bytes() for path in folder.glob("out/cells/*/cell.json")} == cells
    assert {path.name for path in folder.glob("out/cells/*/*")} == {"cell.json", "retimed.json"}
    study(folder, "--times", "2", grid=GRID)
    assert retimed(folder) == found
    shutil.rmtree(folder / "out" / "cells" / ids[0])  # its row has fewer attacks now
    study(folder, "--times", "3", grid=GRID)
    counts = Counter(id for id, each in retimed(folder).items() for _ in each["train_s"])
    assert counts == {ids[1]: 2} | dict.fromkeys(ids[2:], 3) | {
        f"others-mlp-linear-{attack}-eps24-seed0": 3 for attack in ("none", "fgsm")
    }
    monkeypatch.setenv("FASTADV_COMMIT", "another")  # whose times are no repetitions
    study(folder, "--times", "1", grid=GRID)
    assert all(len(retimed(folder)[id]["train_s"]) == 1 for id in ids[2:])


def test_a_training_that_is_cut_is_made_again(folder, monkeypatch):
    trained, calls = retiming._trained, []

    def cut(task, site):
        calls.append(task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trained(task, site)

    monkeypatch.setattr(retiming, "_trained", cut)
    with pytest.raises(SystemExit):
        study(folder, "--times", "1", grid=GRID)
    assert len(retimed(folder)) == 2
    study(folder, "--times", "1", grid=GRID)
    assert (len(retimed(folder)), len(calls)) == (5, 3 + 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--times", "0"), "--times must be at least 1, got 0"),
        (("--times", "1", "--processes", "2"), "--times trains one cell after another, alone"),
        (("--times", "1", "--dry-run"), "--times trains one cell after another, alone"),
    ],
)
def test_what_is_not_alone_is_refused(folder, options, words):
    with pytest.raises(SystemExit, match=words):
        study(folder, *options, grid=GRID)


def test_a_report_that_could_not_be_written_is_known_before_the_first_training(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="matplotlib"):
        study(folder, "--times", "1", grid=GRID)
    assert not retimed(folder)


def test_times_without_a_finished_cell_are_refused(tmp_path):
    write_set(tmp_path / "colours.npz", 1)
    with pytest.raises(SystemExit, match="has no finished cell of this grid to take the time of"):
        study(tmp_path, "--times", "1", grid=GRID)


def write_times(folder, record, *seconds, commit="one", **machine):
    (cell,) = (p for p in folder.glob("cells/*/cell.json") if json.loads(p.read_text())["cell"] == record["cell"])
    content = {"format": 1, "machine": record["machine"] | machine, "commit": commit}
    content |= {"train_s": [9.0 for _ in seconds], "train_cpu_s": list(seconds)}
    (cell.parent / "retimed.json").write_text(json.dumps(content))


def test_the_report_has_the_ratios_of_the_shortest_times_alone(tmp_path, rng):  # noqa: F811
    records = {
        (data, attack): studied.record_of(rng, data=data, labels=data, attack=attack)
        for data in ("a", "b")
        for attack in ("none", "fgsm", "pgd", "nfgsm")
    }
    for record in records.values():
        studied.write(tmp_path, record)
    before = read_study(tmp_path)
    for attack, seconds in {"none": (4.0, 3.0), "fgsm": (7.0, 6.0), "pgd": (30.0,)}.items():
        write_times(tmp_path, records["a", attack], *seconds)
    found = read_study(tmp_path)
    of = {each.attack: each for each in found.times}
    assert (of["fgsm"].to_none, of["fgsm"].to_pgd) == (6 / 3, 7 / 30)  # of two trainings, and of one
    assert of["fgsm"].pairs == 1
    assert [each.retimed for each in (of["fgsm"], of["nfgsm"])] == ["a CPU", None]
    assert of["nfgsm"].to_pgd == next(each.to_pgd for each in before.times if each.attack == "nfgsm")
    assert {(each.row.data, each.time) for each in found.prices if each.attack == "fgsm"} == {("a", 2.0), ("b", 2.0)}
    write_study(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("Of FGSM, no attack, PGD: of cells that were trained again on a CPU, with nothing else there.") == 2
    )
    # Another machine's, or another code's, are not compared.
    for changes in ({"cpu": "another"}, {"commit": "another"}):
        write_times(tmp_path, records["a", "fgsm"], 6.0, **changes)
        of = {each.attack: each for each in read_study(tmp_path).times}
        assert of["fgsm"] == next(each for each in before.times if each.attack == "fgsm")
    (path,) = tmp_path.glob("cells/a-*-fgsm-*/retimed.json")
    path.write_text("{")
    damaged = read_study(tmp_path)
    assert len(damaged.results) == len(records)
    (problem,) = (each for each in damaged.problems if "retimed.json" in each)
    assert problem.endswith("remove it, and take the times again")
