"""Lists on the command line: commas or spaces, and budgets with or without /255, in every command."""

import argparse
import random
import re

import pytest

from fastadv.commands import evaluate, finetune, predict, pretrain, study
from fastadv.study.grid import expanded


def parsed(command, *words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add(parser)
    needed = {evaluate: "--data d --model m --out o", finetune: "--data d --out o"}.get(command, "--out o")
    return vars(parser.parse_args([*needed.split(), *words]))


LISTS = {
    (evaluate, "attacks"): ["pgd-10", "pma", "fgsm"],
    (evaluate, "classes"): ["cat", "sea lion", "dog"],
    (finetune, "classes"): ["cat", "sea lion", "dog"],
    (finetune, "lora_targets"): ["a.b", "c", "d"],
    (pretrain, "classes"): [3, 4, 7],
    (study, "attacks"): ["fgsm", "stale", "pgd"],
    (study, "methods"): ["linear", "full", "scratch"],
    (study, "judges"): ["apgd", "pgd-50-10", "autoattack"],
    (study, "data"): ["digits", "photos/a", "b.npz"],
}


@pytest.mark.parametrize(("command", "name"), LISTS, ids=lambda value: getattr(value, "__name__", value))
def test_names_have_commas_or_spaces_between_them(command, name):
    wanted = LISTS[command, name]
    a, b, c = map(str, wanted)
    for words in ([f"{a},{b},{c}"], [a, b, c], [f"{a},", f"{b},", c], [f"{a},{b}", c], [f"{a}, {b}, {c}"]):
        assert list(parsed(command, "--" + name.replace("_", "-"), *words)[name]) == wanted


@pytest.mark.parametrize(("command", "unit"), [(evaluate, 255), (study, 1)], ids=["evaluate", "study"])
def test_budgets_have_commas_or_spaces_between_them_and_a_unit_or_none(command, unit):
    codes = [random.randint(1, 255) for _ in range(3)]
    spelled = [random.choice(["{}", "{}/255", "{}.0"]).format(code) for code in codes]
    for words in (spelled, [",".join(spelled)], [", ".join(spelled)], [f"{spelled[0]},{spelled[1]}", spelled[2]]):
        assert parsed(command, "--eps", *words)["eps"] == [code / unit for code in codes]


@pytest.mark.parametrize("command", [evaluate, study], ids=["evaluate", "study"])
@pytest.mark.parametrize("words", [["4", "x"], ["4,,8"], ["4,8,"], ["0.03"], ["8/256"], [","]], ids=" ".join)
def test_a_list_of_budgets_that_cannot_be_meant_is_refused(command, words):
    with pytest.raises(argparse.ArgumentError, match="--eps: "):
        parsed(command, "--eps", *words)


def test_a_name_with_commas_is_in_double_quotes():
    assert parsed(study, "--data", '"a,b.npz"', "c")["data"] == ["a,b.npz", "c"]
    assert parsed(evaluate, "--classes", '"salt, rock"', "pepper")["classes"] == ["salt, rock", "pepper"]
    assert parsed(study, "--classes", '"salt, rock"', "pepper")["classes"] == '"salt, rock",pepper'


def test_labels_are_labels_wherever_the_commas_are():
    for words in (["5-7,9"], ["5-7", "9"], ["5-7,", "9"]):
        assert parsed(finetune, "--classes", *words)["classes"] == [range(5, 8), 9]
    assert parsed(finetune, "--classes", "01", "5")["classes"] == ["01", "5"]  # "01" is no label, so all are names


def test_the_defaults_are_lists_too():
    assert parsed(evaluate)["eps"] is None  # each norm has its own
    assert parsed(evaluate)["attacks"] == ["fgsm", "pgd-10", "pma"]
    assert parsed(pretrain)["classes"] == [range(6)]
    assert parsed(study)["eps"] is None


def test_a_budget_in_l2_may_be_longer_than_one_pixel_value():
    assert parsed(evaluate, "--attacks", "pgdl2", "--eps", "765")["eps"] == [3.0]
    with pytest.raises(argparse.ArgumentError):
        parsed(evaluate, "--eps", "inf")


def test_a_grid_takes_budgets_as_the_commands_do():
    grid = {"data": "digits", "model": "mlp", "seeds": 1, "methods": "full", "attacks": "fgsm"}
    assert [task.cell.eps for task in expanded({**grid, "eps": [4, "8/255", "16"]})] == [4, 8, 16]
    with pytest.raises(ValueError, match="'8/256' is not a number of 1/255"):
        expanded({**grid, "eps": "8/256"})


def help_of(command):
    """{option: its line of help}, without line breaks."""
    parser = argparse.ArgumentParser()
    command.add(parser)
    options = re.split(r"\n(?=  -)", parser.format_help())[1:]
    return {re.search(r"--[a-z0-9-]+", each)[0]: " ".join(each.split()) for each in options}


@pytest.mark.parametrize("command", [evaluate, finetune, predict, pretrain, study], ids=lambda m: m.__name__[17:])
def test_the_help_shows_a_default_only_where_there_is_one(command):
    lines = help_of(command)
    text = " ".join(lines.values())
    assert not re.search(r"None|False|\[0\.|\['", text)
    parser = argparse.ArgumentParser()
    command.add(parser)
    for action in parser._actions:
        has_one = action.default is not None and action.default is not False and action.default != argparse.SUPPRESS
        if has_one and action.help != argparse.SUPPRESS:
            assert "(default: " in lines[action.option_strings[0]]


def test_a_default_is_shown_as_the_option_takes_it():
    lines = help_of(evaluate)
    assert "(not given: 8, and 127.5, which is 0.5, for attacks in L2)" in lines["--eps"]
    assert parsed(evaluate, "--eps", "8")["eps"] == [8 / 255]
    for name, shown in (("attacks", "fgsm,pgd-10,pma"), ("batch-size", "128")):
        assert f"(default: {shown})" in lines[f"--{name}"]
        assert parsed(evaluate)[name.replace("-", "_")] == parsed(evaluate, f"--{name}", shown)[name.replace("-", "_")]
    assert "(default: 600)" in help_of(finetune)["--checkpoint-s"]
    assert "(default: 0-5)" in help_of(pretrain)["--classes"]
