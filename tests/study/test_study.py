"""fastadv study: a grid's cells each run once and give the same as alone, and no result is mixed up or lost."""

import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fitted import timeless

from fastadv import cli, models, random_init, sample_seeds
from fastadv.attacks import create_attack
from fastadv.commands import study as command
from fastadv.data import Split, TrainedOn
from fastadv.evaluation import evaluate
from fastadv.locks import held
from fastadv.study import cells, cluster, verdicts
from fastadv.study.cells import Site
from fastadv.study.cost import cost_of, units_of, watching
from fastadv.study.estimate import estimates
from fastadv.study.files import read_grid, write_grid
from fastadv.study.grid import Cell, DataSet, expanded, trainer
from fastadv.study.images import parts_of
from fastadv.study.run import shared_out
from fastadv.training import Monitor, Trainer
from fastadv.training.fast import fast_method, is_fast
from fastadv.training.methods import METHODS
from fastadv.training.settings import RENAMED
from fastadv.version import __version__

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def colours(count, seed, classes=3, side=6):
    """uint8 images of classes that a few training steps can separate."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    bright = np.eye(classes)[labels][:, :, None, None]
    return (255 * (0.3 * bright + 0.7 * rng.random((count, 3, side, side)))).astype(np.uint8), labels


def write_set(path, seed, train=48, test=20):
    arrays = zip(
        ("x_train", "y_train", "x_test", "y_test"), (*colours(train, seed), *colours(test, seed + 1)), strict=True
    )
    np.savez(path, **dict(arrays))


SMALL = """
data: colours.npz
model: mlp
methods: [linear, full]
attacks: [fgsm-rs, pgd]
eps: [24]
seeds: 2
epochs: 2
batch_size: 16
probe: 16
lr: {full: 3e-3}
"""


def study(folder, *options, grid=SMALL, out="out"):
    (folder / "grid.yaml").write_text(grid)
    words = ["study", folder / "grid.yaml", "--data-folder", folder, "--out", folder / out, "--device", "cpu", *options]
    cli.main([str(word) for word in words])


def records(out):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("cells/*/cell.json"))}


@pytest.fixture(autouse=True)
def _unreported(monkeypatch):
    """These tests write no reports, because figures take longer than the cells; test_study_page.py tests reports."""
    monkeypatch.setattr(command, "write_study", lambda out: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a study that was not cut."""
    folder = tmp_path_factory.mktemp("study")
    write_set(folder / "colours.npz", 1)
    study(folder, "-q")
    assert (folder / "out" / "report.html").exists()
    return folder


# ---------------------------------------------------------------------- the grid


def test_a_grid_is_a_product_by_hand():
    rng = np.random.default_rng()
    known = {
        "data": ["digits", "a/eurosat", "b.npz"],
        "model": ["mlp", "robust-resnet"],
        "methods": ["linear", "bias", "lora", "full", "scratch"],
        "attacks": ["none", "fgsm", "fgsm-rs", "nfgsm", "pgd"],
        "eps": [1, 2, 4, 8, 16, 32],
        "seeds": [0, 1, 5],
    }
    chosen = {name: list(rng.permutation(values)[: rng.integers(1, 4)]) for name, values in known.items()}
    chosen = {name: [v.item() if hasattr(v, "item") else str(v) for v in values] for name, values in chosen.items()}
    tasks = expanded(chosen)
    expected = []
    for data in chosen["data"]:
        for rest in itertools.product(*(chosen[name] for name in list(known)[1:])):
            expected.append(({"digits": "digits", "a/eurosat": "eurosat", "b.npz": "b"}[data], None, *rest))
    found = [(c.data, c.classes, c.model, c.method, c.attack, c.eps, c.seed) for c in (task.cell for task in tasks)]
    assert Counter(found) == Counter(expected)
    assert len({task.cell.id for task in tasks}) == len(tasks)
    # The cells of a row are neighbours, so that a cut study has whole rows.
    rows = [(c[0], c[2], c[5], c[6]) for c in found]
    assert len([row for row, _ in itertools.groupby(rows)]) == len(set(rows))


def test_blocks_are_products_of_their_own_and_share_what_the_grid_says():
    grid = {
        "data": [{"name": "d", "path": "x/d.npz", "classes": "1-3", "train_limit": 7}, "e"],
        "methods": ["full", "linear", "lora", "scratch"],
        "attacks": ["pgd"],
        "seeds": 1,
        "train_limit": 9,
        "lr": {"lora": 0.5},
        "blocks": [
            {"eps": [8], "judges": ["apgd"]},
            {"eps": [8, 16], "methods": ["full"], "judges": ["autoattack", "apgd"]},
            {"eps": [4], "methods": ["full"], "lr": 0.25, "epochs": 3},
        ],
    }
    tasks = {(t.cell.data, t.cell.method, t.cell.eps): t for t in expanded(grid)}
    assert len(tasks) == 2 * (4 + 1 + 1)
    assert tasks["d", "full", 8].judges == ("apgd", "autoattack")
    assert tasks["d", "linear", 8].judges == ("apgd",)
    assert tasks["d", "full", 16].judges == ("autoattack", "apgd")
    rates = {method: tasks["e", method, 8].training.lr for method in grid["methods"]}
    assert rates == {"full": 1e-3, "linear": 1e-2, "lora": 0.5, "scratch": 1e-3}
    assert (tasks["e", "full", 4].training.lr, tasks["e", "full", 4].training.epochs) == (0.25, 3)
    assert tasks["e", "scratch", 8].training.method == "full"
    assert [tasks[name, "full", 8].images.train_limit for name in "de"] == [7, 9]
    assert tasks["d", "full", 8].data == DataSet("d", "x/d.npz", "1-3")
    assert tasks["d", "full", 8].cell.id == "d-1-3-robust-resnet-full-pgd-eps8-seed0"


def test_the_first_seed_of_all_blocks_comes_first():
    blocks = [{"attacks": "fgsm"}, {"attacks": "pgd", "seeds": [5]}, {"attacks": "none", "seeds": [7, 0]}]
    tasks = expanded({"data": "a", "model": "mlp", "methods": "full", "seeds": 3, "blocks": blocks})
    found = [(task.cell.attack, task.cell.seed) for task in tasks]
    assert found == [("fgsm", 0), ("pgd", 5), ("none", 7), ("fgsm", 1), ("none", 0), ("fgsm", 2)]


def test_an_attack_with_settings_of_its_own_has_a_name_of_its_own():
    variant = {"name": "stale-4", "attack": "stale", "refresh": 4, "epochs": 9}
    fgsm, stale = expanded({"data": "digits", "methods": "full", "attacks": ["fgsm", variant], "seeds": 1, "epochs": 3})
    assert (fgsm.attack, fgsm.cell.attack, fgsm.training.epochs, fgsm.training.refresh) == ("fgsm", "fgsm", 3, None)
    assert (stale.attack, stale.cell.attack, stale.training.epochs, stale.training.refresh) == (
        "stale",
        "stale-4",
        9,
        4,
    )
    assert (stale.cell.id, stale.settings["trained_with"]) == ("digits-robust-resnet-full-stale-4-eps8-seed0", "stale")
    assert trainer(stale, torch.nn.Identity()).attack == "stale"
    record = {"settings": stale.settings | {"trained_with": "fgsm"}, "cell": asdict(stale.cell)}
    with pytest.raises(ValueError, match=r"differs in trained_with \(fgsm, stale\)"):
        cells.check(stale, record)


D = {"data": "digits", "model": "mlp"}


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({}, "names no data"),
        (D | {"epoch": 3}, "no setting 'epoch'"),
        (D | {"methods": ["probe"]}, "unknown method 'probe'"),
        (D | {"attacks": ["pgd", "fgms"]}, "'fgms'"),
        (D | {"attacks": ["pgdl2"]}, "pgdl2|L2"),
        (D | {"attacks": [{"name": "a", "refresh": 4}]}, "mappings with a name and an attack"),
        (D | {"attacks": [{"name": "../a", "attack": "fgsm"}]}, "begins with a letter or a digit, got '../a'"),
        (D | {"attacks": [{"name": "$x_$", "attack": "fgsm"}]}, r"got '\$x_\$'"),
        (
            D | {"attacks": [{"name": "pgd", "attack": "fgsm"}]},
            "pgd reads as the name of the attack pgd, and stands for fgsm",
        ),
        (D | {"attacks": [{"name": "none", "attack": "stale"}]}, "none reads as the name of the attack none, and"),
        (D | {"attacks": [{"name": "N-FGSM", "attack": "stale"}]}, "N-FGSM reads as the name of the attack nfgsm"),
        (D | {"attacks": [{"name": "PGD", "attack": "fgsm"}]}, "PGD reads as the name of the attack pgd, and stands"),
        (D | {"attacks": [{"name": "a" * 61, "attack": "fgsm"}]}, "has at most 60 letters"),
        (D | {"eps": [8, 8.0000001]}, "or budgets that are not so close"),
        (D | {"attacks": [{"name": "a", "attack": "stale", "fresh": 4}]}, "the attack a has no setting 'fresh'"),
        (D | {"attacks": [{"name": "a", "attack": "fgsm", "refresh": 4}]}, "refresh"),
        (D | {"methods": ["lora"], "attacks": ["cached"]}, "cached keeps what enters the head, and .* lora"),
        (D | {"judges": ["pgdl2"]}, "unknown judge 'pgdl2'"),
        (D | {"eps": 0.03}, "eps is a number of 1/255"),
        (D | {"eps": []}, "empty list"),
        (D | {"seeds": [-1]}, "none below 0"),
        (D | {"seeds": 0}, "seeds are how many"),
        (D | {"lr": {"fool": 1}}, "lr has no setting 'fool'"),
        (D | {"epochs": 0}, "epochs must be at least 1"),
        (D | {"test_limit": 0}, "test_limit must be at least 1"),
        (D | {"validation": 1.5}, "validation must be a share"),
        (D | {"split_seed": "a"}, "split_seed is a whole number"),
        (D | {"data": {"name": "a", "size": "big"}}, "size is a whole number of pixels"),
        (D | {"data": ["a/.."]}, "paths that end in a name"),
        (D | {"data": {"name": ""}}, "mappings with a name"),
        (D | {"blocks": []}, "empty list: nothing would be done"),
        (D | {"alpha": 0.1, "attacks": ["none"]}, "the attack none has no alpha: give it to the attacks"),
        ({"data": {"name": "a", "folder": "b"}}, "the data set a has no setting 'folder'"),
        (D | {"blocks": [{"epochs": 2}, {"epochs": 3}]}, r"ask for digits-mlp-.* different epochs \(2, 3\)"),
        ({"data": ["x/a", "y/a"]}, "two data sets are called a, x/a and y/a: give them names in a YAML file, as {name"),
        (D | {"data": [{"name": "a", "label_column": c} for c in "bc"]}, "with different data"),
        (D | {"data": {"name": "a", "path": 2020}}, "the path of the data set a is a text, got 2020"),
        (D | {"data": {"name": "a", "path": ["x"]}}, r"the path of the data set a is a text, got \['x'\]"),
        (D | {"data": {"name": "a", "path": ""}}, "the path of the data set a is a text, got ''"),
        (D | {"data": {"name": "a", "image_column": ["x"]}}, "the image_column of the data set a is a text"),
        (D | {"data": {"name": "a", "label_column": 3}}, "the label_column of the data set a is a text, got 3"),
        (D | {"validation": "no"}, r"validation is a share in \[0, 1\), such as 0\.1 \(0: none\), got 'no'"),
        (D | {"validation": False}, "validation is a share"),
        (D | {"train_limit": 1e3}, r"train_limit is a whole number, such as 1000, got 1000\.0"),
        (D | {"eps": "1_0"}, "eps is a number of 1/255, from 0.5 to 255, got '1_0'"),
        (D | {"data": {"name": "a", "classes": [True, "x"]}}, "the classes of a are names or labels, got True"),
        (D | {"data": {"name": "a", "classes": ["x", None]}}, "the classes of a are names or labels, got None"),
        (D | {"data": {"name": "a", "classes": 1.5}}, r"the classes of a are names or labels, got 1\.5"),
        (D | {"data": {"name": "a", "classes": {"x": 1}}}, "the classes of a are names or labels, got {'x': 1}"),
        ({"data": ["a"], "model": ["b-conv", "b"], "blocks": [{"data": ["a-b"], "model": "conv"}, {}]}, "two cells"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_by_name(grid, words):
    with pytest.raises((ValueError, TypeError), match=words):
        expanded(grid)


def test_names_that_no_folder_can_have_are_told_apart():
    odd = [Cell("d", '"a/b",c', "mlp", "full", "pgd", 8.0, 0), Cell("d", '"a:b",c', "mlp", "full", "pgd", 8.0, 0)]
    odd += [Cell("d", None, f"timm:vit?x={'y' * 60}{i}", "full", "pgd", 8.0, 0) for i in range(2)]
    ids = {cell.id for cell in odd}
    assert len(ids) == 4
    assert all(set(id) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_") for id in ids)


def test_a_grid_is_read_as_it_was_written(tmp_path):
    text = "format: 1\ndata: [a]\nlr: 1e-3\nclasses: 6-9\nattacks: [none, fgsm]\nepochs: 2\n"
    (tmp_path / "g.yaml").write_text(text)
    grid = read_grid(tmp_path / "g.yaml")
    assert grid == {"data": ["a"], "lr": 0.001, "classes": "6-9", "attacks": ["none", "fgsm"], "epochs": 2}
    write_grid(tmp_path, grid)
    assert read_grid(tmp_path / "study.yaml") == grid
    for text, words in (
        ("a: 1\na: 2", "says a twice"),
        ("format: 2\ndata: a", "has the format 2"),
        ("[1, 2", "no YAML file"),
        ("- a", "is no grid"),
    ):
        (tmp_path / "g.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_grid(tmp_path / "g.yaml")


def test_the_committed_study_has_the_cells_that_were_asked_for():
    grid = read_grid(BENCHMARKS / "training" / "study.yaml")
    known = [block for block in grid["blocks"] if set(block.get("methods", ())) <= {*METHODS, "scratch"}]
    tasks = expanded({**grid, "blocks": known})
    assert [len(expanded({**grid, "blocks": [block]})) for block in known if not block] == [432]
    by_judge = Counter(judge for task in tasks for judge in task.judges)
    assert by_judge == {"pgd-50-10": 36, "apgd": 36, "autoattack": 6}
    at = {task.cell.eps for task in tasks if task.cell.data == "eurosat"}
    assert at == {1, 2, 4, 8, 16, 32}
    assert {c.seed for c in (task.cell for task in tasks) if c.eps == 32} == {0}
    fgsm = Counter((task.cell.method, task.cell.eps) for task in tasks if task.cell.attack == "fgsm")
    methods = ("linear", "bias", "lora", "full", "adapter")
    assert all(fgsm[method, eps] >= 6 for method in methods for eps in (2, 32))


def _wanted(task):
    """What a cell is of, whatever its model and the names of its attacks."""
    cell = task.cell
    return cell.data, cell.classes, cell.method, task.attack, cell.eps, cell.seed, task.judges


def test_the_study_for_a_gpu_is_refused_where_its_transformer_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = BENCHMARKS / "training" / "study-gpu.yaml"
    tasks = expanded(read_grid(path))
    usual = expanded(read_grid(path.with_name("study.yaml")))
    for model in ("robust-resnet", "robust-vit.safetensors"):  # each has all of study.yaml
        mine = {_wanted(task) for task in tasks if task.cell.model == model}
        assert {_wanted(task) for task in usual} <= mine
        assert Counter(judge for *_, judges in mine for judge in judges) == {
            "pgd-50-10": 36,
            "apgd": 36,
            "autoattack": 6,
        }
    with pytest.raises(SystemExit, match=r"no file 'robust-vit\.safetensors'"):
        cli.main(["study", str(path), "--out", "out"])
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_knows_which_images_get_a_fresh_attack():
    """By hand: an image costs F + B in each epoch, with B = 2 F, and F + Bx more if it gets a fresh attack."""
    asked = {"steady": {"refresh": 4, "epochs": 9}, "once": {"refresh": 9, "epochs": 3}, "never": {}}
    asked |= {"dear": {"price": 5 / 3}, "cheap": {"price": 1.25}, "always": {"refresh": 1}}
    grid = D | {"methods": "full", "seeds": 1, "epochs": 8}
    grid["attacks"] = [{"name": name, "attack": "stale", **settings} for name, settings in asked.items()]
    units = {task.cell.attack: cost_of(task)["units"] for task in expanded(grid)}
    least = units["never"]
    fresh = {name: (each - least) / 2 for name, each in units.items()}
    assert fresh == pytest.approx(
        {"steady": (1 + 8 / 4) / 9, "once": (1 + 2 / 9) / 3, "never": 0, "always": 1}
        | {"dear": (5 - least) / 2, "cheap": (1.25 * 3 - least) / 2}
    )
    assert least == 3
    asked = {"cached": {}, "cached-2": {"refresh": 2}, "cached-9": {"refresh": 9}}
    grid |= {"methods": "linear", "attacks": [{"name": name, "attack": "cached", **s} for name, s in asked.items()]}
    units = {task.cell.attack: cost_of(task)["units"] for task in expanded(grid)}
    share = {"cached": (1 + 7 / 4) / 8, "cached-2": (1 + 7 / 2) / 8, "cached-9": (1 + 7 / 9) / 8}
    assert units == pytest.approx({name: 3 * fresh for name, fresh in share.items()})


def test_an_estimate_has_the_passes_of_the_monitor():
    """Counted: those of a reading, of images forwards and of gradients backwards."""

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.passes = torch.nn.Linear(12, 3), 0

        def forward(self, x):
            self.passes += len(x)
            x = x.flatten(1)
            if x.requires_grad:
                x.register_hook(self.count)
            return self.inner(x)

        def count(self, grad):
            self.passes += len(grad)

    attacks = ["fgsm", "nfgsm", "stale", "sora", {"name": "pgd-3", "attack": "pgd", "steps": 3, "alpha": 0.04}]
    for task in expanded(D | {"methods": "full", "attacks": ["none", *attacks], "seeds": 1}):
        sizes, unwatched = (
            {"train": 100, "val": 20, "test": 30},
            replace(task, training=replace(task.training, probe=0)),
        )
        readings = units_of(task, sizes, 3) - units_of(unwatched, sizes, 3)
        assert readings == pytest.approx(task.training.epochs * 100 * watching(task))  # a probe of 100 of 128
        if task.attack == "none":
            assert readings == 0
            continue
        model, images = Counted(), (torch.rand(9, 3, 2, 2), torch.arange(9) % 3)
        if is_fast(task.attack):
            attack = fast_method(task.attack, model, 0.1, {}).attack
        else:
            attack = create_attack(task.attack, model, 0.1, **task.training.attack)
        monitor = Monitor(model, *images, attack, 0.1)
        model.passes = 0
        monitor.check()
        assert model.passes == 9 * watching(task)


# ---------------------------------------------------------------------- one cell


def test_the_costs_are_those_of_the_cost_model():
    tasks = expanded(D | {"methods": ["full", "scratch", "linear"], "attacks": ["none", "fgsm", "pgd"], "seeds": 1})
    units = {(task.cell.method, task.cell.attack): cost_of(task)["units"] for task in tasks}
    whole = {"none": 3, "fgsm": 5, "pgd": 17}
    probe = {"none": 1, "fgsm": 3, "pgd": 15}
    assert units == {(m, a): (probe if m == "linear" else whole)[a] for m, a in units}
    (five,) = expanded(D | {"methods": "full", "attacks": "pgd", "steps": 5, "seeds": 1})
    assert cost_of(five) == {"forward": 6, "input_backward": 5, "backward": 1, "units": 13}
    (two,) = expanded(D | {"methods": "full", "attacks": "fgsm", "lp_ft": 6, "epochs": 2, "seeds": 1})
    assert cost_of(two)["units"] == (6 * 3 + 2 * 5) / 8  # the first stage is linear probing
    # A fresh FGSM attack costs 2 passes. The first of 10 epochs attacks all images, each later epoch a fifth of them.
    for changes, units in (({}, 3), ({"refresh": 5}, 3 + 2 * (1 + 9 / 5) / 10), ({"price": 1.4}, 4.2)):
        variant = {"name": "kept", "attack": "stale", "epochs": 10, **changes}
        (kept,) = expanded(D | {"methods": "full", "attacks": [variant], "seeds": 1})
        assert cost_of(kept)["units"] == pytest.approx(units)


def test_from_scratch_the_same_network_has_other_weights():
    (task,) = expanded({"data": "digits", "methods": "scratch", "attacks": "pgd", "seeds": [3]})
    parts = type("Parts", (), {"train": (torch.zeros(1, 3, 32, 32), None), "classes": ("a", "b")})
    model = cells.build(task.cell, parts)
    pretrained = models.source("robust-resnet").build(("a", "b"))
    torch.manual_seed(3)
    fresh = models.construct(pretrained.architecture, 2).state_dict()
    state = model.network.state_dict()
    assert all(torch.equal(state[name], fresh[name]) for name in fresh)
    moved = [name for name, tensor in pretrained.network.state_dict().items() if not torch.equal(tensor, state[name])]
    assert len(moved) > 10
    assert model.preprocessing == pretrained.preprocessing


def test_limits_take_the_first_of_one_order_and_digests_tell_the_images(tmp_path):
    write_set(tmp_path / "colours.npz", 5)
    few, more = (
        expanded(D | {"data": "colours.npz", "train_limit": n, "test_limit": 9, "seeds": 1})[0] for n in (5, 11)
    )
    small, large = (parts_of(task, tmp_path) for task in (few, more))
    assert torch.equal(small.train[0], large.train[0][:5])
    assert torch.equal(small.train[1], large.train[1][:5])
    assert (small.contents, small.judged) == (large.contents, large.judged)
    (eight,) = expanded(D | {"data": "colours.npz", "test_limit": 8, "attacks": "pgd", "methods": "full", "seeds": 1})
    assert parts_of(eight, tmp_path).judged != small.judged


def test_what_is_said_of_a_data_set_acts(tmp_path):
    write_set(tmp_path / "colours.npz", 5, train=90)

    def parts(**said):
        grid = {"data": {"name": "colours", "path": "colours.npz", **said}, "model": "mlp", "seeds": 1}
        return parts_of(expanded(grid)[0], tmp_path)

    plain = parts()
    assert parts(size=8).train[0].shape[1:] == (3, 8, 8) != plain.train[0].shape[1:]
    assert parts(classes="0,2").classes == ("0", "2")
    assert len(parts(validation=0.4).val[1]) > len(plain.val[1]) > len(parts(validation=0).val[1]) == 0
    assert not torch.equal(parts(split_seed=1).val[1], plain.val[1])
    for name in ("train", "val", "test"):
        some = getattr(parts(**{f"{name}_limit": 3}), name)
        assert [len(each) for each in some] == [3, 3]
    with pytest.raises(ValueError, match="for parquet files"):
        parts(image_column="picture")
    with pytest.raises(ValueError, match="for parquet files"):
        parts(label_column="kind")
    with pytest.raises(ValueError, match="single class"):
        parts(classes="1")
    grid = {"data": {"name": "colours", "path": "colours.npz", "size": 8}}
    with pytest.raises(ValueError, match="takes images of 32 x 32 pixels: leave out the size of colours"):
        parts_of(expanded(grid)[0], tmp_path)


def plain_pgd(model, images, labels, eps, seed):
    """Which images are classified correctly at the random start and after each of ten steps: bool (N,)."""
    x = images.double() / 255
    adv = random_init(images, eps, seed=sample_seeds(seed, torch.arange(len(x)))).double()
    right = torch.ones(len(x), dtype=torch.bool)
    for step in range(11):
        adv.requires_grad_()
        logits = model(adv.float())
        right &= logits.argmax(1) == labels
        if step == 10:
            return right
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), adv)
        adv = torch.min(torch.max(adv.detach() + eps / 4 * grad.sign(), x - eps), x + eps).clamp(0, 1)


def test_the_verdicts_are_those_of_attacks_by_hand_on_the_kept_weights(tmp_path, monkeypatch):
    rows = {"apgd": ("apgd-ce", "apgd-t"), "autoattack": ("apgd-ce", "apgd-t", "apgd-dlr")}  # Square would be slow
    assert verdicts.IN_A_ROW == {"apgd": ("apgd-ce", "apgd-t"), "autoattack": ("apgd-ce", "apgd-t", "fab-t", "square")}
    monkeypatch.setattr(verdicts, "IN_A_ROW", rows)
    write_set(tmp_path / "colours.npz", 7, test=30)
    grid = (
        SMALL.replace("[linear, full]", "full").replace("[fgsm-rs, pgd]", "pgd").replace("seeds: 2", "seeds: [4]")
        + "judges: [apgd, autoattack]\n"
    )
    monkeypatch.setenv("FASTADV_COMMIT", "the commit")
    study(tmp_path, "-q", "--keep-weights", grid=grid)
    for task in expanded(read_grid(tmp_path / "grid.yaml")):
        record = records(tmp_path / "out")[task.cell.id]
        model = models.load(tmp_path / "out" / "cells" / task.cell.id / "model.safetensors").on_pixels.eval()
        images, labels = parts_of(task, tmp_path).test
        found = {judge: [each == "1" for each in said] for judge, said in record["verdicts"].items()}
        clean = model(images / 255).argmax(1) == labels
        assert found["clean"] == clean.tolist()
        right = clean & plain_pgd(model, images, labels, 24 / 255, 4)
        assert found["pgd-10"] == right.tolist()
        assert 0 < sum(found["pgd-10"]) < 30
        for judge in ("fgsm", "pma"):
            report = evaluate(model, (images, labels), [judge], eps=24 / 255, seed=4, progress=False)
            assert found[judge] == report["budgets"][0]["robust"]
        for judge, names in rows.items():
            report = evaluate(model, (images, labels), names, eps=24 / 255, seed=4, progress=False)
            assert found[judge] == report["budgets"][0]["robust"]
        assert record["warnings"] == []
        assert record["commit"] == "the commit"


def test_a_model_that_knows_the_test_images_is_spoken_of(tmp_path):
    write_set(tmp_path / "colours.npz", 1)
    (task,) = expanded({"data": "colours.npz", "model": "mlp", "methods": "full", "attacks": "pgd", "seeds": 1})
    parts = parts_of(task, tmp_path)
    model = models.source("mlp").build(parts.classes, (3, 6, 6))
    seen = SimpleNamespace(digests={"train": parts.test_digests[:7]}, split=Split())
    model.trained_on = (TrainedOn.of(seen),)
    models.save(model, tmp_path / "m.safetensors")
    grid = SMALL.replace("model: mlp", f"model: {tmp_path / 'm.safetensors'}").replace("seeds: 2", "seeds: 1")
    study(
        tmp_path,
        "-q",
        grid=grid.replace("[linear, full]", "linear").replace("[fgsm-rs, pgd]", "none"),
    )
    (record,) = records(tmp_path / "out").values()
    assert "was trained on 7 of the 20 test images" in record["warnings"][0]


def test_a_cell_has_its_threads_and_its_device_whatever_was_before(whole, tmp_path, monkeypatch):
    write_set(tmp_path / "colours.npz", 1)
    seen = []

    def noted(trainer, *parts):
        seen.append((torch.get_num_threads(), trainer.device))
        raise ValueError("enough")

    monkeypatch.setattr(Trainer, "fit", noted)
    before = torch.get_num_threads()
    with pytest.raises(SystemExit, match="4 of 4 cells failed"):
        study(tmp_path, "-q", "--threads", str(before + 1), grid=SMALL.replace("seeds: 2", "seeds: 1"))
    assert seen == [(before + 1, torch.device("cpu"))] * 4
    assert torch.get_num_threads() == before
    assert {record["machine"]["threads"] for record in records(whole / "out").values()} == {1}


# ---------------------------------------------------------------------- each cell runs once and gives the same as alone


def test_a_row_has_the_same_images_and_a_finished_cell_is_not_run_again(whole, monkeypatch):
    found = records(whole / "out")
    assert len(found) == 8
    assert len({record["labels"] for record in found.values()}) == 1
    assert len({record["settings"]["contents"] for record in found.values()}) == 1
    for record in found.values():
        assert {len(said) for said in record["verdicts"].values()} == {20}
        assert list(record["verdicts"]) == ["clean", "fgsm", "pgd-10", "pma"]
        assert record["train_s"] > 0 < record["train_cpu_s"]
        assert sum("epoch" in each for each in record["records"]) == 2
    assert {path.name for path in whole.glob("out/cells/*/*")} == {"cell.json"}
    monkeypatch.setattr(cells, "run", lambda *_: pytest.fail("it was run again"))
    study(whole, "-q")
    assert read_grid(whole / "out" / "study.yaml") == read_grid(whole / "grid.yaml")


def test_a_study_that_is_killed_and_goes_on_finds_the_same(whole, tmp_path):
    write_set(tmp_path / "colours.npz", 1)
    (tmp_path / "grid.yaml").write_text(SMALL + "checkpoint_s: 0\n")
    program = Path(__file__).with_name("killed_study.py")
    subprocess.run([sys.executable, program, tmp_path, "3", str(np.random.default_rng().integers(2**31))], check=True)
    told = json.loads((tmp_path / "deaths.json").read_text())
    assert len(told) == 3
    assert any(each["begun"] for each in told)  # a kill came in the middle of a cell
    assert timeless(records(tmp_path / "out")) == timeless(records(whole / "out"))


def test_folders_are_merged_and_a_process_that_dies_costs_its_cell_alone(whole, tmp_path, monkeypatch, capsys):
    """Seed 0 runs on two processes, and a model kills one of them. Seed 1 has its own folder; then both are merged."""
    write_set(tmp_path / "colours.npz", 1)
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom fastadv.models.networks import mlp\n\ndef make(shape, classes):\n"
        "    return mlp(shape, classes) if os.path.exists('alive') else os._exit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    small = SMALL.replace("[linear, full]", "full")
    deadly = (
        small.replace("seeds: 2", "seeds: [0]") + 'blocks: [{model: "deadly:make", methods: full, attacks: pgd}, {}]\n'
    )
    with pytest.raises(SystemExit, match=r"1 of 3 cells failed, such as colours-deadly-make\."):
        study(tmp_path, "--processes", "2", grid=deadly, out="first")
    assert "failed, its process died (exit code 3)" in capsys.readouterr().out
    study(tmp_path, "-q", grid=small.replace("seeds: 2", "seeds: [1]"), out="second")
    (tmp_path / "alive").touch()
    study(tmp_path, "-q", grid=deadly, out="first")
    assert not list(tmp_path.glob("first/cells/*/error.txt"))
    shutil.copytree(tmp_path / "second" / "cells", tmp_path / "first" / "cells", dirs_exist_ok=True)
    monkeypatch.setattr(cells, "run", lambda *_: pytest.fail("it was run again"))
    study(tmp_path, "-q", grid=small, out="first")
    found = records(tmp_path / "first")
    (extra,) = [id for id in found if "deadly" in id]
    del found[extra]
    assert timeless(found) == timeless({id: each for id, each in records(whole / "out").items() if "-full-" in id})


def test_a_cell_that_fails_is_noted_and_the_others_go_on(tmp_path, capsys):
    write_set(tmp_path / "colours.npz", 1)
    grid = SMALL.replace("data: colours.npz", "data: [absent.npz, colours.npz]").replace("seeds: 2", "seeds: 1")
    grid = grid.replace("[linear, full]", "linear")
    with pytest.raises(SystemExit, match=r"2 of 4 cells failed, such as absent-mlp-linear.*error\.txt"):
        study(tmp_path, grid=grid)
    assert "failed, FileNotFoundError: no data set or file" in capsys.readouterr().out
    (error, _) = tmp_path.glob("out/cells/*/error.txt")
    assert "Traceback" in error.read_text()
    assert len(records(tmp_path / "out")) == 2
    write_set(tmp_path / "absent.npz", 3)
    study(tmp_path, grid=grid)
    assert capsys.readouterr().out.count("absent-mlp") == 2  # finished cells have no line
    assert len(records(tmp_path / "out")) == 4
    assert not list(tmp_path.glob("out/cells/*/error.txt"))


def test_processes_are_shared_out_among_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    sites = shared_out(Site(tmp_path, device="cuda"), 5)
    assert [each.device for each in sites] == [f"cuda:{i}" for i in (0, 1, 0, 1, 0)]
    assert [cells.machine(each)["sharing"] for each in sites] == [3, 2, 3, 2, 3]
    assert "sharing" not in cells.machine(Site(tmp_path))


def test_a_cell_that_was_cut_says_all_its_machines(tmp_path, monkeypatch):
    write_set(tmp_path / "colours.npz", 1)
    grid = SMALL.replace("seeds: 2", "seeds: 1").replace("[linear, full]", "full").replace("[fgsm-rs, pgd]", "none")
    names = iter(("first CPU", "second CPU", "first CPU"))
    monkeypatch.setattr(cells, "_cpu", lambda: next(names))
    fit = Trainer.fit
    for _ in range(2):
        monkeypatch.setattr(Trainer, "fit", lambda *_: 1 / 0)
        with pytest.raises(
            SystemExit, match=r"1 of 1 cells failed, such as .* \(ZeroDivisionError: division by zero\)"
        ):
            study(tmp_path, "-q", grid=grid)
    monkeypatch.setattr(Trainer, "fit", fit)
    study(tmp_path, "-q", grid=grid)
    (record,) = records(tmp_path / "out").values()
    assert record["machine"]["cpu"] == "first CPU"
    assert [each["cpu"] for each in record["machine"]["before"]] == ["second CPU"]
    assert [path.name for path in tmp_path.glob("out/cells/*/*")] == ["cell.json"]


def test_a_cell_that_another_process_has_is_left_to_it(whole, tmp_path, capsys):
    write_set(tmp_path / "colours.npz", 1)
    entered, leave = threading.Event(), threading.Event()
    (id, *_) = records(whole / "out")

    def hold():  # another thread stands for another process
        with held(tmp_path / "out" / "cells" / id / "cell", "it"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(60)
    try:
        study(tmp_path, grid=SMALL.replace("seeds: 2", "seeds: 1").replace("[linear, full]", "full"))
    finally:
        leave.set()
        thread.join()
    said = capsys.readouterr().out
    assert f"{id}: elsewhere, the cell {id} is in use by another process" in said
    assert "run by other processes: 1 of the cells" in said
    assert len(records(tmp_path / "out")) == 1


class Cluster:
    """Stands for Ray. `found` is {machine: (content of the file that it reads, version)}; ... is this machine's."""

    def __init__(self, **found):
        names = ["here", *found]
        self.machines = [
            {"NodeID": name, "NodeManagerHostname": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in names
        ]
        self.found = found
        self.util = SimpleNamespace(scheduling_strategies=self)

    def nodes(self):
        return [*self.machines, {"Alive": False}, {"Alive": True, "Resources": {}}]

    def NodeAffinitySchedulingStrategy(self, name, soft):
        assert not soft
        return name

    def remote(self, **needs):
        def on(scheduling_strategy):
            said, version = self.found.get(scheduling_strategy, (Ellipsis, __version__))
            return SimpleNamespace(remote=lambda token: (token.read_text() if said is Ellipsis else said, version))

        return lambda look: SimpleNamespace(options=on)

    def get(self, seen):
        return seen


def test_machines_without_the_folder_or_with_another_version_are_refused(tmp_path):
    cluster._check_machines(Cluster(), tmp_path)
    with pytest.raises(FileNotFoundError, match=f"machine far of the cluster does not have the folder {tmp_path}"):
        cluster._check_machines(Cluster(far=(None, __version__)), tmp_path)
    with pytest.raises(FileNotFoundError, match="machine far"):  # it has another folder of this name
        cluster._check_machines(Cluster(far=("other", __version__)), tmp_path)
    with pytest.raises(ValueError, match=r"machine old of the cluster has fastadv 0\.0\.9, this one"):
        cluster._check_machines(Cluster(old=(..., "0.0.9")), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- nothing is mixed


def test_finished_cells_of_another_study_are_refused_by_name(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    folder = tmp_path / "copy"
    for change, words in (
        (("3e-3", "1e-3"), r"mlp-full-fgsm-rs-.* differs in lr \(0\.003, 0\.001\)"),
        (("epochs: 2", "epochs: 3"), r"differs in epochs \(2, 3\)"),
        (("probe: 16", "probe: 16\ntest_limit: 9"), r"differs in test_limit \(None, 9\)"),
    ):
        with pytest.raises(SystemExit, match=words):
            study(folder, grid=SMALL.replace(*change))
    # Another data set under the same name is found at the first new cell.
    write_set(folder / "colours.npz", 9)
    with pytest.raises(SystemExit, match="4 of 12 cells failed"):
        study(folder, "-q", grid=SMALL.replace("seeds: 2", "seeds: 3"))
    (error, *_) = folder.glob("out/cells/*seed2/error.txt")
    assert "different images under the name colours" in error.read_text()
    # A cell with another data set comes from a merged folder.
    study(folder, "-q", grid=SMALL.replace("seeds: 2", "seeds: [2]"), out="other")
    shutil.copytree(folder / "other" / "cells", folder / "out" / "cells", dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="different images under the name colours"):
        study(folder, grid=SMALL)


def test_what_an_older_cell_has_no_name_for_had_its_default_and_a_newer_one_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = next(tmp_path.glob("copy/out/cells/*/cell.json"))
    record = json.loads(path.read_text())
    del record["settings"]["weight_decay"]
    path.write_text(json.dumps(record))
    study(tmp_path / "copy", "-q")
    with pytest.raises(SystemExit, match=r"differs in weight_decay \(0\.0, 0\.1\)"):
        study(tmp_path / "copy", grid=SMALL + "weight_decay: 0.1\n")
    path.write_text(json.dumps(record | {"settings": record["settings"] | {"colour": "blue"}}))
    with pytest.raises(SystemExit, match=r"differs in colour \(blue, None\)"):
        study(tmp_path / "copy")
    old = {new: name for name, new in RENAMED.items()}
    first = {old.get(name, name): value for name, value in record["settings"].items()}
    path.write_text(json.dumps(record | {"format": 1, "settings": first}))  # with the old names of the settings
    study(tmp_path / "copy", "-q")
    with pytest.raises(SystemExit, match=r"differs in max_grad_norm \(None, 2\.0\)"):
        study(tmp_path / "copy", grid=SMALL + "max_grad_norm: 2.0\n")
    path.write_text(json.dumps(record | {"format": 3}))
    with pytest.raises(SystemExit, match="has the format 3"):
        study(tmp_path / "copy")
    path.write_text("{")
    with pytest.raises(SystemExit, match=r"cell\.json is damaged"):
        study(tmp_path / "copy")
    # A copy of a cell's folder beside it would count twice.
    path.write_text(json.dumps(record))
    shutil.copytree(path.parent, path.parent.with_name("aside"))
    with pytest.raises(SystemExit, match=rf"aside/cell\.json is of the cell {path.parent.name}: move that folder out"):
        study(tmp_path / "copy")


def test_a_judge_that_comes_later_needs_the_weights(whole, tmp_path, monkeypatch):
    grid = SMALL.replace("seeds: 2", "seeds: 1").replace("[linear, full]", "full")
    with pytest.raises(SystemExit, match=r"has no verdicts of apgd-ce.*weights were not kept"):
        study(whole, grid=SMALL + "judges: [apgd-ce]\n")
    write_set(tmp_path / "colours.npz", 1)
    study(tmp_path, "-q", "--keep-weights", grid=grid)
    before = records(tmp_path / "out")
    monkeypatch.setattr(cells, "trainer", lambda *_, **__: pytest.fail("it was trained again"))
    study(tmp_path, "-q", grid=grid + "judges: [apgd-ce, apgd]\n")
    for id, record in records(tmp_path / "out").items():
        assert list(record["verdicts"]) == ["clean", "fgsm", "pgd-10", "pma", "apgd-ce", "apgd"]
        assert {judge: record["verdicts"][judge] for judge in before[id]["verdicts"]} == before[id]["verdicts"]
        assert record["records"] == before[id]["records"]


# ---------------------------------------------------------------------- the command


def test_a_dry_run_says_what_is_done_and_what_is_left_and_writes_nothing(whole, capsys):
    files = sorted(whole.rglob("*"))
    more = SMALL.replace("seeds: 2", "seeds: 3").replace("[fgsm-rs, pgd]", "[fgsm-rs, pgd, none]")
    (whole / "grid.yaml").touch()
    study(whole, "--dry-run", grid=more)
    assert sorted(whole.rglob("*")) == files
    said = capsys.readouterr()
    assert said.err == ""
    *rows, total = said.out.splitlines()
    said = dict(row.split("  ") for row in rows)
    done = records(whole / "out")
    assert {id for id, state in said.items() if state == "done"} == set(done)
    assert len(said) == 18
    assert all(state.endswith(" s at most") for id, state in said.items() if id not in done)
    assert total.startswith("18 cells, 8 done; 10 are left, ")


def test_a_dry_run_lists_the_cells_beside_those_that_would_fail(tmp_path, capsys):
    write_set(tmp_path / "colours.npz", 1)
    grid = SMALL.replace("seeds: 2", "seeds: 1") + "blocks: [{}, {methods: prompt}]\n"
    with pytest.raises(SystemExit, match="2 of 6 cells would fail, see above"):
        study(tmp_path, "--dry-run", grid=grid)
    *rows, total = capsys.readouterr().out.splitlines()
    for id, state in (row.split("  ", 1) for row in rows):
        assert state.startswith("would fail, ValueError: ") if "-prompt-" in id else state.endswith(" s at most")
    assert (len(rows), total.split(",")[0]) == (6, "6 cells")


def test_an_estimate_is_the_passes_times_what_finished_cells_took(whole):
    grid = read_grid(whole / "out" / "study.yaml")
    (task,) = expanded(grid | {"seeds": [9], "methods": "full", "attacks": "pgd"})
    found = [r for r in records(whole / "out").values() if r["cell"]["method"] == "full"]
    assert len(found) == 4
    counts = found[0]["images"]
    units = {"fgsm-rs": 5, "pgd": 17}
    seconds = [r["train_s"] / (2 * counts["train"] * units[r["cell"]["attack"]]) for r in found]
    fgsm, pgd, pma = 2 + 1, 20 + 1, 2 * (40 + 1)
    passes = 2 * counts["train"] * 17 + counts["val"] * (2 * pgd + pgd + pma) + counts["test"] * (fgsm + pgd + pma)
    passes += 2 * 16 * (1 + 2 * (5 + 2 + 7))  # two readings: PGD-5, two gradients, the attack
    estimate = estimates([task], Site(whole / "out", whole))[task.cell.id]
    assert estimate == pytest.approx(sum(seconds) / 4 * passes)


def test_what_is_timed_is_a_standard_step_whatever_attacks(whole, tmp_path, monkeypatch):
    fit, seen = Trainer.fit, []
    monkeypatch.setattr(Trainer, "fit", lambda self, *parts: seen.append(self.attack) or fit(self, *parts))
    grid = read_grid(whole / "grid.yaml") | {"methods": "full", "seeds": 1, "epochs": 8}
    (task,) = expanded(grid | {"attacks": [{"name": "free-4", "attack": "free", "repeats": 4}]})
    assert estimates([task], Site(tmp_path, whole))[task.cell.id] > 0
    assert seen == [None]


def test_one_that_is_interrupted_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "colours.npz", 1)
    run, reports, order = cells.run, [], []

    def interrupted(task, place):
        if len(order) == 2:
            raise KeyboardInterrupt
        order.append(task.cell.id)
        return run(task, place)

    monkeypatch.setattr(cells, "run", interrupted)
    monkeypatch.setattr(command, "REPORT_S", 0)
    monkeypatch.setattr(command, "write_study", lambda out: reports.append(list(records(out))))
    with pytest.raises(SystemExit) as ended:
        study(tmp_path)
    # Reports are written while the study runs, and at the end.
    assert reports == [sorted(order[:1]), sorted(order), sorted(order)]
    assert ended.value.code == 130
    assert f"go on with the same command, from {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_ends_no_study(tmp_path, monkeypatch, caplog):
    write_set(tmp_path / "colours.npz", 1)
    monkeypatch.setattr(command, "REPORT_S", 0)
    tries = iter([ValueError("no room"), None])

    def write(out):
        if (error := next(tries, None)) is not None:
            raise error

    monkeypatch.setattr(command, "write_study", write)
    study(tmp_path)
    assert "the report could not be written: ValueError: no room" in caplog.text
    assert len(list((tmp_path / "out" / "cells").glob("*/cell.json"))) == 8


def test_options_are_a_grid_and_none_goes_beside_a_file(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "_run", lambda *_: [])
    words = "study --data digits --classes 0-4 --model mlp --methods linear,full --attacks fgsm --eps 4,8 --seeds 2"
    words += " --judges apgd --epochs 3 --batch-size 5 --train-limit 6 --val-limit 7 --test-limit 8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "expanded", lambda grid: asked.update(grid) or [])
        cli.main([*words.split(), "--out", str(tmp_path)])
    assert asked == {
        "data": [{"name": "digits", "path": "digits", "classes": "0-4"}],
        "model": "mlp",
        "methods": ["linear", "full"],
        "attacks": ["fgsm"],
        "eps": [4, 8],
        "seeds": 2,
        "judges": ["apgd"],
        "epochs": 3,
        "batch_size": 5,
        "train_limit": 6,
        "val_limit": 7,
        "test_limit": 8,
    }
    (tmp_path / "g.yaml").write_text("data: digits")
    for words, said in (
        (f"study {tmp_path}/g.yaml --epochs 3 --eps 4", "leave out --eps, --epochs, or write it there"),
        ("study", "needs --data"),
        ("study --data a,b --classes 0-1", "--classes are those of a single data set"),
        ("study --data digits --model mlp --attacks pgd-20", "the cost of 'pgd-20' is not known"),
        ("study --data digits --model nothing", "unknown model 'nothing'"),
        ("study --data digits --processes 0", "--processes must be at least 1"),
        ("study --data digits --processes 2 --ray auto", "leave out one"),
    ):
        with pytest.raises(SystemExit, match=said):
            cli.main([*words.split(), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data digits,", "names with a comma or a space between them, got 'digits,'"),
        ("--data digits --eps 4,x", "'x' is not a number of 1/255, such as 8 or 8/255"),
    ],
)
def test_lists_of_the_command_line_have_no_gaps(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", *words.split(), "--out", "o"])
    assert said in capsys.readouterr().err
