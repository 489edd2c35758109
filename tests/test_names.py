"""Every message about an unknown name lists the known names and suggests the nearest."""

import re

import pytest
import torch

import fastadv
from fastadv import cli, data, models
from fastadv.attacks import ENSEMBLES, FGSM, PGD, PRESETS, Ensemble, create_attack
from fastadv.evaluation import evaluate
from fastadv.names import MOST, instead
from fastadv.preprocessing import Preprocessing
from fastadv.study.grid import IN_A_ROW, JUDGES, expanded
from fastadv.training import Trainer
from fastadv.training.cost import passes
from fastadv.training.fast import FAST
from fastadv.training.methods import METHODS, trainable


def test_a_message_lists_what_there_is_and_the_nearest():
    assert instead("pdg", ["fgsm", "pgd"]) == "; there are fgsm, pgd. Did you mean pgd?"
    assert instead("PGD-10", ["pgd-20", "pgd-10"]) == "; there are pgd-20, pgd-10. Did you mean pgd-10?"
    assert instead("square", ["fgsm", "pgd"]) == "; there are fgsm, pgd"
    assert instead("x", []) == "; there are none"
    assert instead(7, ["x", "y"]) == "; there are x, y"


def test_a_long_list_is_cut_and_the_nearest_is_one_of_all():
    known = [f"layer.{i}.weight" for i in range(MOST + 7)]
    told = instead(f"layer.{MOST + 3}.wieght", known)
    assert told.startswith(f"; there are {', '.join(known[:MOST])} and 7 more. ")
    assert told.endswith(f"Did you mean {known[MOST + 3]}?")


MODEL = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
IMAGES, LABELS = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
GRID = {"data": "digits", "model": "mlp", "seeds": 1}
LOOKED_UP = {
    "attack": (lambda: create_attack("pgd10", MODEL, 0.1), "pgd-10", PRESETS),
    "attack of evaluate": (lambda: evaluate(MODEL, (IMAGES, LABELS), "pmaa"), "pma", (*PRESETS, *ENSEMBLES)),
    "attack of training": (lambda: Trainer(MODEL, 0.1, attack="stael"), "stale", (*PRESETS, *FAST)),
    "setting of an attack": (lambda: create_attack("pgd", MODEL, 0.1, step=3), "steps", ("alpha", "loss", "restarts")),
    "option of an attack": (lambda: PGD(MODEL, restart=3), "restarts", ("alpha", "steps", "loss", "targeted")),
    "setting of a training attack": (
        lambda: Trainer(MODEL, 0.1, attack="stale", repeats=3),
        None,
        ("refresh", "price"),
    ),
    "loss": (lambda: FGSM(MODEL, loss="drl"), "dlr", ("ce", "kl")),
    "training mode": (lambda: FGSM(MODEL, training_mode="evaluate"), "eval", ("eval",)),
    "schedule": (lambda: PGD(MODEL, schedule="cosin"), "cosine", ()),
    "part of AutoAttack": (lambda: Ensemble(MODEL, version="custom", attacks_to_run=["fab-tt"]), "fab-t", ("square",)),
    "version": (lambda: Ensemble(MODEL, version="standart"), "standard", ("plus", "rand")),
    "iterate": (lambda: evaluate(MODEL, (IMAGES, LABELS), iterate="lasts"), "last", ("any",)),
    "method": (lambda: trainable(MODEL, "lara").__enter__(), "lora", METHODS),
    "method of training": (lambda: Trainer(MODEL, 0.1, method="liner"), "linear", METHODS),
    "setting of training": (lambda: Trainer(MODEL, 0.1, batchsize=3), "batch_size", ("epochs", "lr")),
    "layer": (lambda: trainable(MODEL, "linear", head="0.").__enter__(), "0", ("0", "1")),
    "cost": (lambda: passes("fgms"), "fgsm", ("stale",)),
    "backend": (lambda: fastadv.backend("tritn").__enter__(), "triton", ("cuda", "cpu", "reference")),
    "model": (lambda: models.source("rezesnet"), "resnet", ("mlp",)),
    "option of a model": (lambda: models.source("resnet?block=3"), "blocks", ("widths",)),
    "data set": (lambda: data.load("digit"), "digits", ("cifar10",)),
    "class": (lambda: data.load("digits", classes=["0", "oo"]), None, map(str, range(10))),
    "part": (lambda: data.held_out("digits", ["0"], part="tests"), "test", ("all",)),
    "interpolation": (lambda: Preprocessing((2, 2), 1, interpolation="bilinaer"), "bilinear", ("bicubic",)),
    "method of a study": (lambda: expanded({**GRID, "methods": "ful"}), "full", (*METHODS, "scratch")),
    "judge": (lambda: expanded({**GRID, "judges": "auto-attack"}), "autoattack", JUDGES),
    "key of a grid": (lambda: expanded({**GRID, "attack": "fgsm"}), "attacks", ("judges", "epochs")),
    "key of a data set": (lambda: expanded({"data": {"name": "a", "clases": "b"}}), "classes", ("path",)),
}


@pytest.mark.parametrize("what", LOOKED_UP)
def test_every_look_up_says_what_there_is(what):
    look_up, near, known = LOOKED_UP[what]
    with pytest.raises((ValueError, TypeError, RuntimeError, FileNotFoundError)) as error:
        look_up()
    listed = re.search(r"; there are (.*?)(?:\. Did you mean (.*)\?)?$", str(error.value))
    assert set(known) <= set(listed[1].split(", "))
    assert listed[2] == near


def test_the_commands_options_with_choices_say_it_too(capsys):
    for option, wrong, near in (("attack", "fgm", "fgsm"), ("method", "lorra", "lora"), ("optimizer", "adam", "adamw")):
        with pytest.raises(SystemExit):
            cli.main(["finetune", "--data", "digits", "--out", "o", f"--{option}", wrong])
        assert capsys.readouterr().err.strip().endswith(f"Did you mean {near}?")


def test_a_judge_of_several_attacks_is_an_attack_of_evaluate_too():
    for judge in IN_A_ROW:
        report = evaluate(MODEL, (IMAGES, LABELS), judge, progress=False)
        assert tuple(attack["attack"] for attack in report["attacks"]) == IN_A_ROW[judge]
    assert set(JUDGES) <= {*PRESETS, *ENSEMBLES}
