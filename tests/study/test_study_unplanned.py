"""Uses of a study that nobody planned: other folders, files that changed, warnings, writers that meet."""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import studied
import torch
from studied import rng  # noqa: F401
from test_study import SMALL, colours, records, study, write_set
from torch import nn

from fastadv import models
from fastadv.commands import study as command
from fastadv.data.classes import class_list
from fastadv.files import write_atomically
from fastadv.study import cells
from fastadv.study.cells import Site
from fastadv.study.files import read_grid, write_grid
from fastadv.study.grid import expanded
from fastadv.study.images import _loaded
from fastadv.study.run import pending
from fastadv.study.writing import write_study

ONE = SMALL.replace("[linear, full]", "linear").replace("seeds: 2", "seeds: 1").replace("[fgsm-rs, pgd]", "none")


@pytest.fixture(autouse=True)
def _unreported(monkeypatch):
    monkeypatch.setattr(command, "write_study", lambda out: None)


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path / "colours.npz", 1)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["report.html", "results.csv", "results.json", "figures/holiday.png"])
def test_a_folder_that_is_no_study_keeps_its_files(folder, name):
    path = folder / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = contents(folder)
    for options in ((), ("--dry-run",)):
        with pytest.raises(SystemExit, match=rf"--out .*out is no study and has a {name.partition('/')[0]}: choose"):
            study(folder, *options, grid=ONE)
    with pytest.raises(ValueError, match="is no study"):
        write_study(folder / "out")
    assert {p: c for p, c in contents(folder).items() if p.name != "grid.yaml"} == before


def test_pictures_beside_the_figures_of_a_study_stay(tmp_path, rng):  # noqa: F811
    studied.write(tmp_path, studied.record_of(rng))
    own = ["holiday.png", "mapping.svg", "map-of-town.png"]
    (tmp_path / "figures").mkdir()
    for name in (*own, "map-0-gone.svg", "curves-0-gone-full.png"):
        (tmp_path / "figures" / name).write_text("mine")
    write_study(tmp_path)
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert left > set(own)
    assert not any("gone" in name for name in left)


def test_a_report_that_could_not_be_written_is_known_before_the_first_cell(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="matplotlib"):
        study(folder, grid=ONE)
    assert not (folder / "out").exists()


# ---------------------------------------------------------------------- kept weights, errors and warnings


def test_weights_of_another_training_are_not_judged(folder):
    study(folder, "-q", "--keep-weights", grid=ONE)
    (cell,) = folder.glob("out/cells/*")
    kept = (cell / "model.safetensors").read_bytes()
    (cell / "cell.json").unlink()
    study(folder, "-q", grid=ONE)
    assert not (cell / "model.safetensors").exists()
    (cell / "cell.json").unlink()
    study(folder, "-q", "--keep-weights", grid=ONE)
    (record,) = records(folder / "out").values()
    model = models.load(cell / "model.safetensors")
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    models.save(model, cell / "model.safetensors")
    with pytest.raises(SystemExit, match=r"has not the weights that the finished cell .* was judged with"):
        study(folder, "-q", grid=ONE + "judges: [apgd-ce]\n")
    old = {name: value for name, value in record.items() if name != "weights_file"}
    (cell / "cell.json").write_text(json.dumps(old))  # an older version's: as before
    study(folder, "-q", grid=ONE + "judges: [apgd-ce]\n")
    (cell / "model.safetensors").write_bytes(kept)
    (cell / "cell.json").write_text(json.dumps(record))
    study(folder, "-q", grid=ONE + "judges: [apgd-ce]\n")
    assert "apgd-ce" in next(iter(records(folder / "out").values()))["verdicts"]


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_is_warned_of_images_is_in_every_cell_and_said_once(folder):
    images, labels = colours(48, 1)
    parts = {"x_train": images, "y_train": labels, "x_test": images[:20], "y_test": labels[:20]}
    np.savez(folder / "colours.npz", **parts)
    _loaded.cache_clear()
    with pytest.warns(UserWarning, match="as well") as said:
        study(folder, "-q", "--keep-weights", grid=ONE.replace("none", "[none, fgsm-rs]"))
    (words,) = [str(each.message) for each in said if "pictures as well" in str(each.message)]
    assert [each["warnings"].count(words) for each in records(folder / "out").values()] == [1, 1]
    study(folder, "-q", grid=ONE + "judges: [apgd-ce]\n")
    assert [each["warnings"].count(words) for each in records(folder / "out").values()] == [1, 1]


def test_an_error_of_a_run_before_is_not_that_of_one_that_was_ended(folder, monkeypatch):
    def ended(*_):
        raise SystemExit(143)

    for judge, words in ((lambda *_: 1 / 0, "1 of 1 cells failed"), (ended, "143")):
        monkeypatch.setattr(cells, "judged", judge)
        with pytest.raises(SystemExit, match=words):
            study(folder, "-q", grid=ONE)
        assert len(list(folder.glob("out/cells/*/error.txt"))) == (words != "143")


# ---------------------------------------------------------------------- what a grid's text means


def test_numbers_are_those_of_yaml_1_2_and_zero_padded_ones_are_names(tmp_path):
    text = (
        "classes: [00000, 00010, 0008, 7]\neps: 010\na: 1:30\nb: 1_0\nc: [0, -3, +4, 12, 1.5, .5, 2., 1e-3, -1E+2]\n"
        "d: 0x1F\ne: 1e3\nf: '1e3'\ng: '007'\nh: [00.5, 1.2.3]\ni: '.5'\n"
    )
    (tmp_path / "grid.yaml").write_text(text)
    grid = read_grid(tmp_path / "grid.yaml")
    assert grid == {
        "classes": ["00000", "00010", "0008", 7],
        "eps": "010",
        "a": "1:30",
        "b": "1_0",
        "c": [0, -3, 4, 12, 1.5, 0.5, 2.0, 0.001, -100.0],
        "d": "0x1F",
        "e": 1000.0,
        "f": "1e3",
        "g": "007",
        "h": ["00.5", "1.2.3"],
        "i": ".5",
    }
    assert [type(each) for each in grid["c"]] == [int] * 4 + [float] * 5
    write_grid(tmp_path, grid)
    assert read_grid(tmp_path / "study.yaml") == grid
    data = [{"name": "signs", "classes": grid["classes"]}]
    (task, *_) = expanded({"data": data, "model": "mlp", "methods": "full"})
    assert class_list(task.data.classes) == ["00000", "00010", "0008", "7"]


@pytest.mark.parametrize("names", [["salt, rock", 'a "b"', "pepper", " c"], ["0-2", "4-6"]])
def test_an_entry_of_a_list_of_classes_is_one_class(names):
    (task, *_) = expanded({"data": {"name": "a", "classes": names}, "model": "mlp", "methods": "full"})
    assert class_list(task.data.classes) == names


def test_a_grid_may_merge_mappings(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: &c {<<: *b, x: 4}\nd: {z: 9, <<: [*c, {x: 0, w: 5}]}\n"
    (tmp_path / "grid.yaml").write_text(text)
    assert read_grid(tmp_path / "grid.yaml") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 4, "y": 3},
        "d": {"z": 9, "x": 4, "y": 3, "w": 5},
    }
    for text, words in (("a: {x: 1, x: 2}", "says x twice"), ("a: &a 1\nb: {<<: *a}", "<< takes a mapping or a list")):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_grid(tmp_path / "grid.yaml")


def test_a_name_of_an_attack_means_one_attack_whatever_the_method(tmp_path):
    blocks = [
        {"methods": method, "attacks": {"name": "fast", "attack": attack}}
        for method, attack in (("full", "fgsm"), ("linear", "nfgsm"))
    ]
    tasks = expanded({"data": "digits", "model": "mlp", "seeds": 1, "blocks": blocks})
    with pytest.raises(ValueError, match=r"use the name fast for attacks .* trained_with \(fgsm, nfgsm\)"):
        pending(tasks, tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "a study's precision is in the grid, such as precision: bf16"),
        ("WORLD_SIZE", "2", "a study runs its cells with --processes or --ray, not under torchrun"),
    ],
)
def test_what_a_launcher_sets_is_refused(folder, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=words):
        study(folder, grid=ONE)
    assert not (folder / "out").exists()


# ---------------------------------------------------------------------- a study that changes under its names


def test_a_study_whose_cells_are_finished_says_that_it_reads_no_images(folder, capsys):
    study(folder, "-q", grid=ONE)
    (folder / "colours.npz").unlink()
    study(folder, grid=ONE)
    assert "all cells are finished: the report is written from their files, and no images" in capsys.readouterr().out


def test_another_path_under_the_name_of_finished_cells_is_refused(folder):
    grid = ONE.replace("data: colours.npz", "data: [{name: mine, path: colours.npz}]")
    study(folder, "-q", grid=grid)
    shutil.copy(folder / "colours.npz", folder / "moved.npz")
    before = contents(folder / "out")
    study(folder, "-q", grid=grid.replace("colours.npz", "./colours.npz"))
    for options in ((), ("--dry-run",)):
        with pytest.raises(
            SystemExit,
            match=r"mine was other data when its 1 finished cells were made, and differs in path \(colours.npz, moved",
        ):
            study(folder, *options, grid=grid.replace("colours.npz", "moved.npz"))
    assert {path.name for path in contents(folder / "out")} == {path.name for path in before}
    # Where a cell is left, the images are compared: those of the moved file are the same.
    study(folder, "-q", grid=grid.replace("colours.npz", "moved.npz").replace("seeds: 1", "seeds: 2"))
    assert len(records(folder / "out")) == 2


def test_another_file_under_the_name_of_a_finished_cell_s_model_is_refused(folder):
    file = folder / "m.safetensors"
    grid = ONE.replace("model: mlp", f"model: {file}")
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.save(models.source("mlp").build(("0", "1", "2"), (3, 6, 6)), file)
        if not seed:
            study(folder, "-q", grid=grid)
            study(folder, "--dry-run", grid=grid)
    with pytest.raises(SystemExit, match=f"have different model files under the name {file}: put back"):
        study(folder, "--dry-run", grid=grid)


def test_another_source_of_a_model_is_another_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    source = folder / "network_of_mine.py"
    code = "from fastadv.models.networks import mlp\n\ndef make(shape, classes):\n    return mlp(shape, classes)\n"
    source.write_text(code)
    grid = ONE.replace("model: mlp", "model: network_of_mine:make")
    study(folder, "-q", grid=grid)
    (record,) = records(folder / "out").values()
    assert len(record["settings"]["source"]) == 64
    study(folder, "--dry-run", grid=grid)
    source.write_text(code + "# another activation\n")
    for more in ("seeds: 1", "seeds: 2"):
        with pytest.raises(SystemExit, match="different source files of the function under the name network_of_mine"):
            study(folder, "-q", grid=grid.replace("seeds: 1", more))
    # A cell that another process begins is refused, too; one of an older version does not say its source.
    (_, task) = expanded(read_grid(folder / "grid.yaml"))
    assert "different source files" in cells.run(task, Site(folder / "out", folder)).words
    (path,) = folder.glob("out/cells/*/cell.json")
    del record["settings"]["source"]
    path.write_text(json.dumps(record))
    study(folder, "-q", grid=grid.replace("seeds: 1", "seeds: 2"))
    assert len(records(folder / "out")) == 2


def test_a_model_has_a_digest_of_its_file_or_its_source_or_none(monkeypatch):
    for name in ("mlp", "timm:resnet18", "hf:a/b", "resnet?widths=[8]", "no_such:function", "math:hypot"):
        assert cells.model_here(name) == {}
    monkeypatch.setattr(nn, "unnamed", object(), raising=False)
    assert cells.model_here("torch.nn:unnamed") == {}
    assert set(cells.model_here("fastadv.models.networks:mlp")) == {"source"}


# ---------------------------------------------------------------------- writers that meet


def _write_often(path, letter, count):
    for _ in range(count):
        write_atomically(path, letter * 200_000)


def test_files_that_several_processes_write_are_whole(tmp_path):
    path = tmp_path / "study.yaml"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, letter, 30)) for letter in (b"a", b"b", b"c")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            read = path.read_bytes()
            assert len(read) == 200_000
            assert len(set(read)) == 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["study.yaml"]


def test_a_new_file_has_the_permissions_of_new_files_and_a_left_one_is_taken_over(tmp_path):
    (tmp_path / "a.new").write_text("a killed process has left this, and it is longer")
    write_atomically(tmp_path / "a", b"short")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert (tmp_path / "a").read_bytes() == b"short"
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["a", "b"]
