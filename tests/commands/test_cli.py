"""The command line, called within the test's process."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fitted import colours

from fastadv import cli, data, devices, models
from fastadv.attacks import PGD
from fastadv.attacks.checks import device_of
from fastadv.commands import evaluate as evaluate_command
from fastadv.commands import finetune as finetune_command
from fastadv.commands import pretrain as pretrain_command
from fastadv.commands.values import budget, eps_budget
from fastadv.data.classes import class_list
from fastadv.data.parquet import Columns
from fastadv.evaluation import robust_accuracy
from fastadv.models.networks import conv, mlp
from fastadv.training.settings import Settings


@pytest.mark.parametrize(
    ("text", "codes"), [("8", 8), ("8/255", 8), ("0.5", 0.5), ("0", 0), ("0.25/255", 0.25), ("255", 255)]
)
def test_eps_is_in_units_of_one_255th(text, codes):
    assert eps_budget(text) == codes / 255


@pytest.mark.parametrize("text", ["0.031", "0.3", "1e-3"])
def test_eps_that_looks_like_pixels_of_the_unit_range_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--data", "digits", "--out", "o", "--eps", text])
    error = capsys.readouterr().err
    assert f"is --eps {255 * float(text):.4g}" in error
    assert "units of 1/255" in error


@pytest.mark.parametrize("text", ["-1", "256", "nan", "inf", "8/256", "8/", "eight", ""])
def test_other_budgets_are_refused(text):
    for parse in (eps_budget, budget):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of 1/255"):
            parse(text)


def test_a_small_step_is_accepted():
    assert budget("0.25") == 0.25 / 255


def test_class_lists():
    assert class_list("5-9") == [range(5, 10)]
    assert class_list("0,3,5-7") == [0, 3, range(5, 8)]
    assert class_list("cat, sea lion") == ["cat", "sea lion"]
    assert class_list('"salt, rock",pepper') == ["salt, rock", "pepper"]
    assert class_list(' "3-5" , 7,"a ""b"" c",d"e') == ["3-5", "7", 'a "b" c', 'd"e']


def finetune(out, *options):
    cli.main(["finetune", "--out", str(out), "--device", "cpu", *options])


def last_line(out):
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])


# ---------------------------------------------------------------------- every option acts


class Asked(Exception):
    """Raised in place of the command's work."""


def options_of(command):
    parser = argparse.ArgumentParser()
    command.add(parser)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]  # without the old names
    return {action.option_strings[0] for action in shown} - {"-h"}


@pytest.fixture
def loaded(monkeypatch):
    """A dict that gets the arguments with which a command loads its data; the data are always digits."""
    found, load = {}, data.load

    def noted(name, *, preprocessing, classes, **options):
        found.update({"data": str(name), "classes": classes}, **{f"load {key}": v for key, v in options.items()})
        return load("digits", **{**options, "folder": None, "image_column": None, "label_column": None})

    monkeypatch.setattr(data, "load", noted)
    return found


def run(command, given, option, word):
    """Run a command up to its work; `option` replaces the option of this name in `given`."""
    words = [part for name, value in given.items() if name != option for part in (name, value)]
    with pytest.raises(Asked):
        cli.main([command, *words, *([option] if option else []), *(word.split() if word else [])])


@pytest.fixture
def asked_of_finetune(monkeypatch, tmp_path, loaded):
    """`asked("--lr", "0.1")`: a dict of all arguments that `fastadv finetune` passes on."""
    monkeypatch.chdir(tmp_path)
    saved(mlp((1, 8, 8), 10), (1, 8, 8), map(str, range(10)), tmp_path / "w.safetensors")
    found, source = {}, finetune_command.model_source

    class Noted:
        def __init__(self, model, eps, **options):
            found.update(eps=eps, **options)

        def fit(self, train, val, test):
            raise Asked(found.update(validation=round(len(val[0]) / (len(train[0]) + len(val[0])), 1)))

    monkeypatch.setattr(finetune_command, "Trainer", Noted)
    monkeypatch.setattr(Settings, "__post_init__", lambda self: None)  # which refuses a word for another method

    def noted(name, trust):
        found.update(model=name, trust=trust)
        return source("mlp", trust)

    monkeypatch.setattr(finetune_command, "model_source", noted)
    monkeypatch.setattr(models, "load_weights", lambda network, path, **_: found.update(init=path))

    def asked(option=None, word=None):
        found.clear()
        given = {"--data": "digits", "--model": "mlp", "--out": str(tmp_path), "--device": "cpu"}
        run("finetune", given, option, word)
        return loaded | found

    return asked


# {setting: (the value of its option as a word, the value of the setting)}.
SETTINGS = {
    "method": ("lora", "lora"),
    "head": ("5", "5"),
    "lp_ft": ("3", 3),
    "lp_ft_lr": ("0.5", 0.5),
    "rank": ("3", 3),
    "refresh": ("4", 4),
    "price": ("1.25", 1.25),
    "lora_alpha": ("7", 7.0),
    "adapter_reduction": ("4", 4),
    "prompt_tokens": ("5", 5),
    "lora_targets": ("a.b,c", ["a.b", "c"]),
    "alpha": ("5/255", 5 / 255),
    "noise": ("0.2", 0.2 / 255),
    "steps": ("3", 3),
    "quantile": ("0.2", 0.2),
    "penalty": ("3", 3.0),
    "repeats": ("5", 5),
    "epochs": ("7", 7),
    "batch_size": ("9", 9),
    "grad_accum_steps": ("2", 2),
    "lr": ("0.3", 0.3),
    "warmup": ("4", 4),
    "optimizer": ("sgd", "sgd"),
    "weight_decay": ("0.1", 0.1),
    "clean_weight": ("0.4", 0.4),
    "label_smoothing": ("0.2", 0.2),
    "max_grad_norm": ("1.5", 1.5),
    "ema_decay": ("0.9", 0.9),
    "precision": ("bf16", "bf16"),
    "compile": (None, True),
    "channels_last": (None, True),
    "augment": (None, True),
    "eval_every": ("4", 4),
    "eps_schedule": ("linear", "linear"),
    "probe": ("100", 100),
    "on_catastrophic_overfitting": ("stop", "stop"),
    "switch_to": ("nfgsm", "nfgsm"),
    "checkpoint_s": ("30", 30.0),
}
TRAINING = {  # {option: (word, the arguments that it changes)}, for both commands that train
    "--image-column": ("a", {"load image_column": "a"}),
    "--label-column": ("b", {"load label_column": "b"}),
    "--data": ("photos", {"data": "photos"}),
    "--data-folder": ("here", {"load folder": Path("here")}),
    "--classes": ("1,3-4", {"classes": [1, range(3, 5)]}),
    "--skip-corrupt": (None, {"load skip_corrupt": True}),
    "--workers": ("3", {"load workers": 3}),
    "--split-seed": ("5", {"load seed": 5}),
    "--seed": ("5", {"seed": 5}),
    "--device": ("cpu:0", {"device": torch.device("cpu:0")}),
    "--out": ("there", {"folder": Path("there")}),
    "--resume": (None, {"resume": True}),
}
OPTIONS = TRAINING | {f"--{name.replace('_', '-')}": (word, {name: value}) for name, (word, value) in SETTINGS.items()}
OPTIONS |= {
    "--validation": ("0.3", {"load validation": 0.3, "validation": 0.3}),
    "--model": ("conv", {"model": "conv"}),
    "--trust-code": (None, {"trust": True}),
    "--init": ("w.safetensors", {"init": "w.safetensors"}),
    "--attack": ("pgd", {"attack": "pgd"}),
    "--eps": ("4", {"eps": 4 / 255}),
}


def test_no_option_of_finetune_is_left_out_and_their_values_are_settings_values():
    assert options_of(finetune_command) == OPTIONS.keys()
    assert {*SETTINGS, "seed"} == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_finetune_changes_what_it_says_and_nothing_else(option, asked_of_finetune):
    word, changes = OPTIONS[option]
    assert asked_of_finetune(option, word) == asked_of_finetune() | changes


def test_without_an_option_a_setting_is_its_own_default(asked_of_finetune):
    found = asked_of_finetune()
    assert Settings(**{name: found[name] for name in (*SETTINGS, "seed")}) == Settings()
    assert found["attack"] == "fgsm"
    assert asked_of_finetune("--attack", "none")["attack"] is None


def saved(network, shape, classes, path):
    architecture = {"kind": "own", "name": "mlp", "shape": list(shape), "options": {}}
    models.save(models.Model(network, None, architecture, tuple(classes), pretrained=False), path)


@pytest.fixture
def asked_of_evaluate(monkeypatch, tmp_path):
    """`asked("--batch-size", "9")`: a dict of all arguments that `fastadv evaluate` passes on; the data are digits."""
    monkeypatch.chdir(tmp_path)
    found, held_out, decoded = {}, data.held_out, data.HeldOut.decoded
    for name in ("one", "other"):
        saved(mlp((1, 8, 8), 10), (1, 8, 8), map(str, range(10)), tmp_path / name)

    def noted(model, batch, attacks, **options):
        raise Asked(found.update(attacks=attacks, device=device_of(model), count=len(batch[1]), **options))

    def noted_data(name, known, **options):
        found.update({"data": str(name), **{f"data {key}": value for key, value in options.items()}})
        return held_out("digits", known, **{**options, "classes": None, "folder": None, "columns": None})

    def noted_decoding(self, preprocessing, skip_corrupt, workers):
        found.update(skip_corrupt=skip_corrupt, workers=workers)
        return decoded(self, preprocessing, skip_corrupt, workers)

    monkeypatch.setattr(evaluate_command, "evaluate", noted)
    monkeypatch.setattr(data, "held_out", noted_data)
    monkeypatch.setattr(data.HeldOut, "decoded", noted_decoding)
    monkeypatch.setattr(devices, "devices", lambda: ["cpu", "meta"])
    load = evaluate_command.load_model

    def loaded_model(path, trust):
        found.update(model=Path(path).name, trust=trust)
        return load(path, trust)

    monkeypatch.setattr(evaluate_command, "load_model", loaded_model)

    def asked(option=None, word=None):
        found.clear()
        model = tmp_path / (word if option == "--model" else "one")
        given = {"--data": "digits", "--out": "out", "--device": "cpu", "--model": str(model)}
        run("evaluate", given, option, str(model) if option == "--model" else word)
        return dict(found)

    return asked


EVALUATION = {
    "--data": ("photos", {"data": "photos"}),
    "--data-folder": ("here", {"data folder": Path("here")}),
    "--image-column": ("a", {"data columns": Columns("a", None)}),
    "--label-column": ("b", {"data columns": Columns(None, "b")}),
    "--classes": ("1,3-4", {"data classes": [1, range(3, 5)]}),
    "--skip-corrupt": (None, {"skip_corrupt": True}),
    "--workers": ("3", {"workers": 3}),
    "--part": ("test", {"data part": "test"}),
    "--split-seed": ("5", {"data split": data.Split(5)}),
    "--seed": ("5", {"seed": 5}),
    "--device": ("meta", {"device": torch.device("meta")}),
    "--model": ("other", {"model": "other"}),
    "--trust-code": (None, {"trust": True}),
    "--attacks": ("pgd,fgsm", {"attacks": ["pgd", "fgsm"]}),
    "--eps": ("4 2/255", {"eps": [4 / 255, 2 / 255]}),
    "--iterate": ("last", {"iterate": "last"}),
    "--limit": ("7", {"data limit": 7, "count": 7}),
    "--independent": (None, {"ensemble": False}),
    "--allow-overlap": (None, {}),  # it changes nothing where no test image is a training image
    "--batch-size": ("9", {"batch_size": 9}),
    "--save-images": (None, {"save_images": Path("out/images")}),
    "--out": ("there", {"state": Path("there/state.safetensors")}),
}


def test_no_option_of_evaluate_is_left_out():
    assert options_of(evaluate_command) == EVALUATION.keys()


@pytest.mark.parametrize("option", EVALUATION)
def test_an_option_of_evaluate_changes_what_it_says_and_nothing_else(option, asked_of_evaluate):
    word, changes = EVALUATION[option]
    without, found = asked_of_evaluate(), asked_of_evaluate(option, word)
    if option in ("--split-seed", "--part"):  # they choose a part of the digits
        assert 250 < found["count"] < 450 < without["count"] == 1797
        del without["count"], found["count"]
    assert found == without | changes


PRETRAINING = TRAINING | {
    "--epochs": ("20", {"epochs": 20, "warmup": 0.15}),
}


@pytest.mark.parametrize("option", PRETRAINING)
def test_an_option_of_pretrain_changes_what_it_says_and_nothing_else(option, monkeypatch, tmp_path, loaded):
    found = {}

    class Noted:
        def __init__(self, model, eps, **options):
            found.update(eps=eps, **options)

        def fit(self, train):  # the warm-up is a share of the steps
            steps = found["epochs"] * -(-len(train[0]) // found["batch_size"])
            raise Asked(found.update(warmup=round(found["warmup"] / steps, 2)))

    monkeypatch.setattr(pretrain_command, "Trainer", Noted)
    monkeypatch.setattr(pretrain_command, "NETWORK", "resnet?widths=[4,4]&blocks=1")
    assert options_of(pretrain_command) == {*PRETRAINING, "--limit"}  # the limit of test images acts after training
    given, (word, changes) = {"--data": "digits", "--out": str(tmp_path), "--device": "cpu"}, PRETRAINING[option]
    run("pretrain", given, None, None)
    without = loaded | found
    run("pretrain", given, option, word)
    assert loaded | found == without | changes


def test_evaluate_tells_the_classes_of_the_model_by_their_names(tmp_path):
    """A model is right on all images although its classes have another order than the data set's."""
    labels = torch.arange(60) % 3
    images, others = (0.6 * F.one_hot(labels, 3)[:, :, None, None] + 0.4 * torch.rand(60, 3, 2, 2) for _ in range(2))
    parts = {"x_train": images, "y_train": labels, "x_test": others, "y_test": labels}
    np.savez(tmp_path / "set.npz", **{name: part.numpy() for name, part in parts.items()})
    network, known = mlp((3, 2, 2), 2), labels != 1
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(images[known]), (labels[known] == 0).long()).backward()
        optimizer.step()
    saved(network, (3, 2, 2), ("2", "0"), tmp_path / "model.safetensors")
    options = ("--data", tmp_path / "set.npz", "--model", tmp_path / "model.safetensors", "--attacks", "fgsm")
    evaluate = ("evaluate", *map(str, options), "--device", "cpu", "--out", str(tmp_path / "report"), "--classes")
    cli.main([*evaluate, "2,0"])
    assert json.loads((tmp_path / "report" / "report.json").read_text())["clean_accuracy"] == 1
    for other, count in (("0,2", 40), ("0", 20), ("2", 20)):  # another order, or only one class
        cli.main([*evaluate[:-2], str(tmp_path / other), "--classes", other])
        report = json.loads((tmp_path / other / "report.json").read_text())
        assert report["clean_correct"] == [True] * count
    for other in ("2,1", "2,0,1"):
        with pytest.raises(SystemExit, match="does not know the classes 1: choose those that it knows: "):
            cli.main([*evaluate, other])
    with pytest.raises(SystemExit, match="does not know the classes 1: choose those that it knows: 0, 2"):
        cli.main(list(evaluate[:-1]))


def test_a_convolutional_network_from_an_npz_file_becomes_robust(tmp_path, capsys):
    train, test = colours(64, 1, side=32), colours(33, 2, side=32)
    arrays = zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True)
    np.savez(tmp_path / "set.npz", **{key: value.numpy() for key, value in arrays})
    common = (
        "--data",
        str(tmp_path / "set.npz"),
        "--model",
        "conv",
        "--eps",
        "16",
        "--seed",
        "3",
        "--lr",
        "0.01",
    )
    finetune(
        tmp_path / "run",
        *common,
        "--attack",
        "fgsm-rs",
        "--epochs",
        "6",
        "--batch-size",
        "16",
        "--eval-every",
        "0",
    )
    final = last_line(tmp_path / "run")

    model = conv((3, 32, 32), 3)
    attack = PGD(model, 16 / 255, 4 / 255, 10)
    untrained = robust_accuracy(model, test, attack, seed=3)
    model = models.load(tmp_path / "run" / "model.safetensors").on_pixels
    attack = PGD(model, 16 / 255, 4 / 255, 10)
    trained = robust_accuracy(model, test, attack, seed=3)
    assert trained["robust_accuracy"] > untrained["robust_accuracy"] + 0.3
    assert trained == {key: final[key] for key in trained}
    printed = capsys.readouterr().out
    assert f"robust accuracy {trained['robust_accuracy']:.1%} under PGD-10 at eps 16/255" in printed
    assert f"{final['pma_accuracy']:.1%} under PGD-10 and PMA" in printed


def test_transfer_with_a_linear_probe_keeps_the_source_backbone(tmp_path, capsys):
    digits = ("--data", "digits", "--model", "mlp", "--eps", "25", "--epochs", "5")
    finetune(tmp_path / "source", *digits, "--classes", "0-4")
    init = str(tmp_path / "source" / "model.safetensors")
    finetune(
        tmp_path / "target",
        *digits,
        "--classes",
        "5-9",
        "--init",
        init,
        "--method",
        "linear",
        "--attack",
        "pgd",
    )
    assert "with a new head" in capsys.readouterr().out
    source, target = (models.load(tmp_path / run / "model.safetensors") for run in ("source", "target"))
    assert target.classes == tuple("56789")
    source, target = (model.network.state_dict() for model in (source, target))
    changed = {key for key, value in source.items() if not torch.equal(value, target[key])}
    assert changed == {"5.weight", "5.bias"}
    lines = [json.loads(line) for line in (tmp_path / "target" / "log.jsonl").read_text().splitlines()]
    assert set(lines[0]["backbone"]) >= {"clean_accuracy", "robust_accuracy"}
    assert lines[1] == {"stage": 0, "method": "linear", "trainable": 5 * 257, "total": 5 * 257 + 256 * (65 + 257)}
    assert [line.get("epoch") for line in lines[2:]] == [0, 1, 2, 3, 4, None]
    assert all("robust_accuracy" in line for line in lines[2:])


def test_same_seed_same_file(tmp_path):
    options = (
        "--data",
        "digits",
        "--model",
        "mlp",
        "--attack",
        "nfgsm",
        "--epochs",
        "1",
        "--eval-every",
        "0",
    )
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        finetune(tmp_path / run, *options, "--seed", seed)
    a, b, c = ((tmp_path / run / "model.safetensors").read_bytes() for run in "abc")
    assert a == b
    assert a != c


def test_an_own_model_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    model, data = "run/model.safetensors", ("--data", "digits", "--out", "out")
    finetune("run", "--data", "digits", "--model", "my_net:net", "--attack", "none", "--lr", "0.01")
    assert last_line(tmp_path / "run")["clean_accuracy"] > 0.3
    monkeypatch.delitem(sys.modules, "my_net")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for command in (("export", model), ("predict", "x.jpg", "--model", model), ("evaluate", "--model", model, *data)):
        with pytest.raises(SystemExit, match=r"'my_net:net', and to load it is to run that code.*--trust-code"):
            cli.main([*command, *(["plain.safetensors"] if command[0] == "export" else [])])
        assert "my_net" not in sys.modules
    # A file in the working folder must not replace a package of the same name that is imported late.
    Path("safetensors.py").write_text("open('ran', 'w').close()\n")
    export = [sys.executable, "-m", "fastadv", "export", model, "plain.safetensors", "--trust-code"]
    subprocess.run(export, check=True)
    assert Path("plain.safetensors").exists()
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "absent.npz", "--model", "mlp"), "absent.npz"),
        (("--data", "digits", "--model", "mlpp"), "unknown model 'mlpp'"),
        (("--data", "digits", "--model", "mlp", "--init", "absent"), "no file 'absent'"),
        (("--data", "digits", "--model", "mlp", "--steps", "3"), "the attack fgsm has no setting 'steps'"),
        (("--data", "digits", "--model", "mlp", "--epochs", "0"), "epochs must be at least 1"),
        (("--data", "digits", "--model", "mlp", "--method", "linear", "--head", "x"), "no module called 'x'"),
    ],
)
def test_what_cannot_work_is_one_line_without_a_traceback(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"^fastadv: error: .*{message}"):
        finetune(tmp_path / "run", *options)


@pytest.mark.parametrize("words", [("--epochs", "0"), ("--seed", str(2**80)), ("--lp-ft-lr", "0.1")])
def test_settings_are_refused_before_the_data_are_read(tmp_path, monkeypatch, words):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(SystemExit, match=f"^fastadv: error: {words[0][2:].replace('-', '_')} "):
        finetune(tmp_path / "run", "--data", "digits", *words)
    assert not (tmp_path / "run").exists()


def test_an_earlier_result_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(SystemExit, match="choose another --out"):
        finetune(tmp_path, "--data", "digits")
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'fastadv\[train\]'"):
        finetune(tmp_path, "--data", "digits", "--model", "mlp")
    with pytest.raises(ImportError, match="sklearn"):
        data.load("digits")


def test_importing_fastadv_imports_no_extra():
    packages = "fastadv, fastadv.attacks, fastadv.data, fastadv.training.augment"
    code = f"import torch, sys; before = set(sys.modules); import {packages}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert not tops & {
        "sklearn",
        "matplotlib",
        "tqdm",
        "safetensors",
        "accelerate",
        "peft",
        "transformers",
        "PIL",
        "pyarrow",
        "timm",
    }


def test_images_of_one_class_after_the_other_are_sampled_from_all(tmp_path, capsys):
    rng = np.random.default_rng()
    labels = np.repeat(np.arange(5), 20)
    arrays = {f"{kind}_{part}": value for part in ("train", "test") for kind, value in (("x", None), ("y", labels))}
    arrays |= {f"x_{part}": rng.random((100, 1, 2, 2), np.float32) for part in ("train", "test")}
    np.savez(tmp_path / "sorted.npz", **arrays)
    finetune(tmp_path / "run", "--data", str(tmp_path / "sorted.npz"), "--model", "mlp", "--attack", "none")
    model = ("--model", tmp_path / "run" / "model.safetensors", "--data", tmp_path / "sorted.npz", "--device", "cpu")
    words = list(map(str, ("evaluate", *model, "--attacks", "fgsm", "--limit", "20", "--out", tmp_path / "report")))
    capsys.readouterr()
    cli.main(words)
    said = capsys.readouterr().out
    cli.main(["-q", *words])
    results = [line for line in said.splitlines() if line.startswith(("clean acc", "robust acc", "attack", "fgsm"))]
    assert capsys.readouterr().out.splitlines() == results
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    chosen = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:20].sort()[0]
    with torch.no_grad():
        network = models.load(tmp_path / "run" / "model.safetensors").on_pixels.eval()
        says = network(torch.from_numpy(arrays["x_test"])[chosen]).argmax(1)
    assert report["clean_correct"] == (says == torch.from_numpy(labels)[chosen]).tolist()
    assert len(set(labels[chosen])) > 2
