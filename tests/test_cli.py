"""The command line, in process."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv import cli, data, models
from fastadv.attacks import PGD
from fastadv.commands.arguments import budget, class_list, eps_budget
from fastadv.evaluation import robust_accuracy
from fastadv.models.networks import conv


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
    assert class_list("5-9") == [5, 6, 7, 8, 9]
    assert class_list("0,3,5-7") == [0, 3, 5, 6, 7]
    assert class_list("cat, sea lion") == ["cat", "sea lion"]


def finetune(out, *options):
    cli.main(["finetune", "--out", str(out), "--device", "cpu", *options])


def last_line(out):
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])


def test_a_convolutional_network_from_an_npz_file_becomes_robust(tmp_path, capsys):
    from test_training import TEST_32 as TEST
    from test_training import TRAIN_32 as TRAIN

    arrays = zip(("x_train", "y_train", "x_test", "y_test"), (*TRAIN, *TEST), strict=True)
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
    untrained = robust_accuracy(model, TEST, attack, seed=3)
    model = models.load(tmp_path / "run" / "model.safetensors").pixels
    attack = PGD(model, 16 / 255, 4 / 255, 10)
    trained = robust_accuracy(model, TEST, attack, seed=3)
    assert trained["robust_accuracy"] > untrained["robust_accuracy"] + 0.3
    assert trained == {key: final[key] for key in trained}
    assert f"PGD-10 accuracy {trained['robust_accuracy']:.1%} at eps 16/255" in capsys.readouterr().out


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
    finetune("run", "--data", "digits", "--model", "my_net:net", "--attack", "none", "--lr", "0.01")
    assert last_line(tmp_path / "run")["clean_accuracy"] > 0.3
    monkeypatch.delitem(sys.modules, "my_net")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    cli.main(["export", "run/model.safetensors", "plain.safetensors"])
    assert Path("plain.safetensors").exists()


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


def test_info_prints_every_fact(capsys):
    cli.main(["info"])
    printed = capsys.readouterr().out
    for word in ("version", "torch", "backends", "cuda", "triton", "cpu", "reference", "build"):
        assert word in printed


def test_importing_fastadv_imports_no_extra():
    code = "import torch, sys; before = set(sys.modules); import fastadv; print(*set(sys.modules) - before)"
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


def test_images_of_one_class_after_the_other_are_sampled_from_all(tmp_path):
    rng = np.random.default_rng()
    labels = np.repeat(np.arange(5), 20)
    arrays = {f"{kind}_{part}": value for part in ("train", "test") for kind, value in (("x", None), ("y", labels))}
    arrays |= {f"x_{part}": rng.random((100, 1, 2, 2), np.float32) for part in ("train", "test")}
    np.savez(tmp_path / "sorted.npz", **arrays)
    finetune(tmp_path / "run", "--data", str(tmp_path / "sorted.npz"), "--model", "mlp", "--attack", "none")
    model = ("--model", tmp_path / "run" / "model.safetensors", "--data", tmp_path / "sorted.npz", "--device", "cpu")
    cli.main(["evaluate", *map(str, (*model, "--attacks", "fgsm", "--limit", "20", "--out", tmp_path / "report"))])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    chosen = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:20].sort()[0]
    with torch.no_grad():
        network = models.load(tmp_path / "run" / "model.safetensors").pixels.eval()
        says = network(torch.from_numpy(arrays["x_test"])[chosen]).argmax(1)
    assert report["clean_correct"] == (says == torch.from_numpy(labels)[chosen]).tolist()
    assert len(set(labels[chosen])) > 2
