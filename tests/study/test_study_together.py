"""Uses of a study that nobody planned: in one study a name stands for one thing, and nothing is mixed up."""

import json
import math
import shutil
import sys
from dataclasses import asdict
from types import ModuleType

import numpy as np
import pytest
import studied
import torch
from studied import rng  # noqa: F401
from test_study import SMALL, colours, records, study
from torch import nn

from fastadv import models
from fastadv.commands import study as command
from fastadv.study import cells
from fastadv.study.cells import Site
from fastadv.study.files import read_cell, read_grid, write_grid
from fastadv.study.grid import expanded
from fastadv.study.reading import read_study
from fastadv.study.results import result_of
from fastadv.study.run import pending
from fastadv.study.statistics import averages
from fastadv.study.verdicts import predicted_classes
from fastadv.study.writing import write_study

ONE = SMALL.replace("[linear, full]", "full").replace("seeds: 2", "seeds: 1")  # FGSM-RS and PGD


@pytest.fixture(autouse=True)
def _unreported(monkeypatch):
    monkeypatch.setattr(command, "write_study", lambda out: None)


def write_set(path, train, test):
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(path, **dict(zip(names, (*train, *test), strict=True)))


def shuffled(images, labels, seed):
    order = np.random.default_rng(seed).permutation(len(labels))
    return images[order], labels[order]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A study of one cell, with PGD, of 30 of the images."""
    folder = tmp_path_factory.mktemp("first")
    write_set(folder / "colours.npz", colours(48, 1), colours(20, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "write_study", lambda out: None)
        limited = ONE.replace("[fgsm-rs, pgd]", "[pgd]") + "train_limit: 30\ntest_limit: 12\n"
        study(folder, "-q", "--keep-weights", grid=limited)
    return folder


def limited(attacks, more=""):
    return ONE.replace("[fgsm-rs, pgd]", attacks) + f"train_limit: 30\ntest_limit: 12\n{more}"


# ---------------------------------------------------------------------- images, networks and files


@pytest.mark.parametrize("change", ["order", "test images that are to train on now"])
def test_the_same_images_in_other_parts_or_another_order_are_another_data_set(first, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(first, folder)
    train, test = colours(48, 1), colours(20, 2)
    if change == "order":
        write_set(folder / "colours.npz", shuffled(*train, 5), test)
    else:
        more = [np.concatenate((mine, its[14:])) for mine, its in zip(train, test, strict=True)]
        write_set(folder / "colours.npz", more, [each[:14] for each in test])
    with pytest.raises(SystemExit, match=r"1 of 2 cells failed.*different images to train on, or an order of them"):
        study(folder, "-q", grid=limited("[fgsm-rs, pgd]"))
    assert len(records(folder / "out")) == 1


def test_a_judge_that_comes_later_sees_the_test_images_of_those_before(first, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(first, folder)
    write_set(folder / "colours.npz", colours(48, 1), shuffled(*colours(20, 2), 5))
    with pytest.raises(SystemExit, match="was judged on other test images, or in another order"):
        study(folder, "-q", grid=limited("[pgd]", "judges: [apgd-ce]\n"))
    (record,) = records(folder / "out").values()
    assert "apgd-ce" not in record["verdicts"]


def test_one_name_of_a_model_is_one_file_whatever_the_data(first, tmp_path):
    folder, file = tmp_path / "study", tmp_path / "m.safetensors"
    folder.mkdir()
    shutil.copy(first / "colours.npz", folder)
    write_set(folder / "others.npz", colours(48, 7), colours(20, 8))
    grid = limited("[pgd]").replace("model: mlp", f"model: {file}")
    for seed, data in ((0, "colours.npz"), (1, "[colours.npz, others.npz]")):
        torch.manual_seed(seed)
        models.save(models.source("mlp").build(("0", "1", "2"), (3, 6, 6)), file)
        grid = grid.replace("data: colours.npz", f"data: {data}")
        if not seed:
            study(folder, "-q", grid=grid)
    with pytest.raises(SystemExit, match=f"have different model files under the name {file}"):
        study(folder, "-q", grid=grid)


def test_a_function_that_makes_another_network_is_another_model(first, tmp_path, monkeypatch):
    shutil.copy(first / "colours.npz", tmp_path)
    grid = limited("[pgd]").replace("model: mlp", "model: networks_of_one:wide").replace("full", "scratch")
    module = ModuleType("networks_of_one")
    monkeypatch.setitem(sys.modules, "networks_of_one", module)
    layers = [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    for width in (4, 9):

        def wide(shape, classes, width=width):
            sizes = [(), (math.prod(shape), width), (), (width, classes)]
            return nn.Sequential(*(layer(*size) for layer, size in zip(layers, sizes, strict=True)))

        module.wide = wide
        if width == 4:
            study(tmp_path, "-q", grid=grid)
    cells._digests.cache_clear()
    with pytest.raises(SystemExit, match="have different networks under the name networks_of_one:wide"):
        study(tmp_path, "-q", grid=grid.replace("[pgd]", "[pgd, fgsm-rs]"))


# ---------------------------------------------------------------------- attacks and seeds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("seeds: 1", "seeds: [1, 2]\nweight_decay: 0.3"), r"differ in weight_decay \(0\.0, 0\.3\)"),
        (("epochs: 2", "epochs: 5\nseeds: [3]"), r"differ in epochs \(2, 5\)"),
        (
            ("data: colours.npz", "data: [{name: again, path: colours.npz}]"),
            r"use the name pgd for attacks with different settings, steps \(None, 9\)",
        ),
    ],
)
def test_a_name_of_an_attack_means_one_attack_and_seeds_differ_in_the_seed_alone(first, tmp_path, change, words):
    shutil.copytree(first, tmp_path / "copy")
    other = "[pgd]" if "colours" not in change[0] else "[{name: pgd, attack: pgd, steps: 9}]"
    grid = limited(other)
    if "seeds: [3]" in change[1]:
        grid = grid.replace("seeds: 1\n", "")
    before = sorted((tmp_path / "copy" / "out").rglob("*"))
    with pytest.raises(SystemExit, match=words):
        study(tmp_path / "copy", "-q", grid=grid.replace(*change))
    assert sorted((tmp_path / "copy" / "out").rglob("*")) == before


def test_a_grid_that_means_two_attacks_by_one_name_is_refused_before_any_cell(tmp_path):
    blocks = [
        {"seeds": [0], "attacks": [{"name": "mine", "attack": "fgsm", "epochs": 1}]},
        {"seeds": [1], "attacks": [{"name": "mine", "attack": "stale", "refresh": 3, "epochs": 6}]},
    ]
    tasks = expanded({"data": "digits", "model": "mlp", "methods": "full", "eps": 8, "blocks": blocks})
    with pytest.raises(ValueError, match=r"use the name mine for attacks with different settings, trained_with \(fgsm"):
        pending(tasks, tmp_path)


def test_another_process_s_cell_with_other_settings_is_no_result_of_this_grid(first, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(first, folder)
    (folder / "grid.yaml").write_text(limited("[pgd]").replace("epochs: 2", "epochs: 7"))
    (task,) = expanded(read_grid(folder / "grid.yaml"))
    outcome = cells.run(task, Site(folder / "out", folder))  # the cell was not there when this process began
    assert outcome.status == "failed"
    assert "differs in epochs (2, 7)" in outcome.words
    write_grid(folder / "out", read_grid(folder / "grid.yaml"))
    read = read_study(folder / "out")
    assert any("differs in epochs (2, 7)" in words for words in read.problems)
    assert not read.complete


@pytest.mark.parametrize("change", [("epochs: 2", "epochs: 4"), ("probe: 16", "probe: 16\neval_every: 2")])
def test_a_cut_cell_goes_on_with_its_own_settings_only(first, tmp_path, monkeypatch, change):
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(first / "colours.npz", folder)

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells, "judged", cut)
        with pytest.raises(SystemExit, match="130"):
            study(folder, "-q", grid=limited("[pgd]"))
    with pytest.raises(SystemExit, match=r"was begun with other settings, and differs in (epochs|eval_every)"):
        study(folder, "-q", grid=limited("[pgd]").replace(*change))
    study(folder, "-q", grid=limited("[pgd]"))
    (record,), (expected,) = (records(place / "out").values() for place in (folder, first))
    assert record["verdicts"] == expected["verdicts"]
    assert {path.name for path in folder.glob("out/cells/*/*")} == {"cell.json"}


# ---------------------------------------------------------------------- what the report makes of it


def test_one_class_for_all_test_images_is_told_by_these(first):
    (record,) = records(first / "out").values()
    (file,) = first.glob("out/cells/*/model.safetensors")
    model = models.load(file).on_pixels.eval()
    data = np.load(first / "colours.npz")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12]
    images = torch.from_numpy(data["x_test"])[order]
    by_hand = set(model(images / 255).argmax(1).tolist())
    assert record["classes_predicted"] == len(by_hand)
    assert predicted_classes(model, (images.repeat(30, 1, 1, 1), None)) == by_hand
    last = record["records"][-1]
    one_of_validation = {"confusion": {"clean": [[0, 1, 1], [2, 1, 1]]}}
    for count, constant in ((1, True), (2, False)):
        changed = record | {"classes_predicted": count, "records": [*record["records"][:-1], last | one_of_validation]}
        assert result_of(changed).constant == constant
    del changed["classes_predicted"]
    assert result_of(changed).constant  # of an older cell: all that is known


def test_a_data_set_counts_once_whatever_its_names(tmp_path, rng):  # noqa: F811
    names = ("p", "q", "other")
    for data in names:
        for attack in ("fgsm", "pgd"):
            record = studied.record_of(rng, attack=attack, data=data, labels=data)
            record["settings"]["contents"] = "other" if data == "other" else "the same"
            studied.write(tmp_path, record)
    read = read_study(tmp_path)
    assert {each.data_sets for each in read.averages} == {2}
    assert [words for words in read.problems if "images of" in words] == [
        "q has the images of p: means over data sets leave it out."
    ]
    assert {each.row.data for each in read.differences} == set(names)
    alone = averages(each for each in read.differences if each.row.data != "q")
    assert [asdict(each) for each in read.averages] == [asdict(each) for each in alone]


def test_the_first_screen_is_about_a_fast_attack(tmp_path, rng):  # noqa: F811
    trained = {"a-clean": "none", "a-pgd-20": "pgd", "nfgsm": "nfgsm", "pgd": "pgd"}
    for name, attack in trained.items():
        record = studied.record_of(rng, attack=attack)
        record["cell"]["attack"] = name
        record["settings"]["trained_with"] = attack
        if name == "a-pgd-20":
            record["settings"]["steps"] = 20
        studied.write(tmp_path, record)
    words = " ".join(read_study(tmp_path).answer.sentences)
    assert "trained with N-FGSM minus that of" in words
    assert "Training with N-FGSM takes" in words
    assert "a-" not in words


def test_figures_of_attacks_that_are_gone_are_gone(tmp_path, rng):  # noqa: F811
    def kept():
        write_study(tmp_path)
        return {path.name for path in (tmp_path / "figures").glob("*fgsm*")}

    studied.write(tmp_path, studied.record_of(rng, attack="pgd"))
    gone = studied.write(tmp_path, studied.record_of(rng, attack="fgsm"))
    before = kept()
    shutil.rmtree(gone)
    studied.write(tmp_path, studied.record_of(rng, attack="nfgsm"))
    after = kept()
    assert before
    assert after
    assert not any("-fgsm" in name for name in after)


# ---------------------------------------------------------------------- files and options


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("null", "it is no mapping"),
        ("[]", "it is no mapping"),
        ({"settings": None}, "it has no settings"),
        ({"machine": None}, "it has no machine"),
        ({"records": []}, "it has no records"),
        ({"labels": None}, "it has no labels"),
        ({"train_s": None}, "it has no train_s"),
        ({"verdicts": {}}, "it has no verdicts"),
        ({"verdicts": {"clean": "11", "fgsm": "10", "pgd-10": "10"}}, "it has no verdicts of pma"),
        (
            {"verdicts": dict.fromkeys(("clean", "fgsm", "pgd-10", "pma"), "1x")},
            "its verdicts are not a 0 or 1 for each",
        ),
        (
            {"verdicts": {"clean": "11", "fgsm": "10", "pgd-10": "10", "pma": "1"}},
            "its verdicts are not a 0 or 1 for each of the same images",
        ),
    ],
)
def test_a_record_that_is_not_whole_is_named_and_costs_no_other_cell(tmp_path, rng, content, words):  # noqa: F811
    studied.write(tmp_path, studied.record_of(rng))
    whole = studied.record_of(rng, attack="pgd")
    path = studied.write(tmp_path, whole) / "cell.json"
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(ValueError, match=rf"{path} is no record of a finished cell, {words}.*remove it"):
        read_cell(tmp_path, path.parent.name)
    read = read_study(tmp_path)
    assert any(f"{path} is no record" in said for said in read.problems)
    assert [each.cell.attack for each in read.results] == ["fgsm"]


def test_yaml_has_no_booleans_but_true_and_false_and_no_dates(tmp_path):
    (tmp_path / "grid.yaml").write_text("precision: no\ncompile: true\nema: False\nclasses: 2020-01-02\nlr: 1e-3\n")
    grid = read_grid(tmp_path / "grid.yaml")
    assert grid == {"precision": "no", "compile": True, "ema": False, "classes": "2020-01-02", "lr": 0.001}
    write_grid(tmp_path, grid)
    assert read_grid(tmp_path / "study.yaml") == grid


def test_classes_may_be_a_list():
    data = [{"name": "a", "path": "a.npz", "classes": classes} for classes in ([0, 2], "0,2")]
    one, other = (expanded({"data": each, "model": "mlp", "methods": "full"})[0].data for each in data)
    assert one == other


def test_weights_that_cannot_be_kept_any_more_are_said(tmp_path, first, caplog, monkeypatch):
    shutil.copytree(first, tmp_path / "copy")
    study(tmp_path / "copy", "--keep-weights", grid=limited("[pgd]"))
    assert "too late" not in caplog.text
    (file,) = tmp_path.glob("copy/out/cells/*/model.safetensors")
    file.unlink()
    study(tmp_path / "copy", "--keep-weights", grid=limited("[pgd]"))
    assert "--keep-weights comes too late for 1 of the cells" in caplog.text


def test_a_limit_beyond_the_images_is_warned_of(tmp_path, first):
    shutil.copy(first / "colours.npz", tmp_path)
    study(tmp_path, "-q", grid=limited("[pgd]").replace("test_limit: 12", "test_limit: 21"))
    (record,) = records(tmp_path / "out").values()
    assert "test_limit is 21, and colours has 20 such images" in record["warnings"]


def test_a_study_is_not_written_into_its_pictures(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "photos" / part / "a").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"is within the data set .*photos"):
        study(tmp_path, grid=SMALL.replace("colours.npz", "photos"), out="photos/out")
    assert not (tmp_path / "photos" / "out").exists()


def test_a_data_set_called_digits_is_not_taken_for_scikit_learn_s(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "a.png").touch()
    with pytest.raises(SystemExit, match=r"digits is the name of scikit-learn's, and .*/digits has pictures, too"):
        study(tmp_path, "-q", grid=ONE.replace("colours.npz", "digits"))
