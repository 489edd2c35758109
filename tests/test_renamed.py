"""Old public names: each does what the new one does, and warns."""

import warnings

import pytest
import torch
from torch import nn

import fastadv
from fastadv import attacks, cli, data, evaluation, models, report, training
from fastadv.study.grid import expanded
from fastadv.training import Trainer
from fastadv.training.settings import RENAMED

NAMES = (
    (data, "to_float", fastadv.to_float),
    (attacks, "by_name", attacks.create_attack),
    (models, "Source", models.ModelSource),
    (training, "Step", training.TrainStep),
    (report, "write_report", evaluation.report.write_report),
    (report, "write_curves", evaluation.report.write_curves),
)
NEEDED = {"head_start_lr": {"lp_ft": 1}}  # the settings without which one has no effect
VALUES = {"accumulate": 3, "average": 0.5, "clip": 2.5, "head_start": 2, "head_start_lr": 0.25}
VALUES["on_overfitting"] = "stop"


@pytest.mark.parametrize(("module", "old", "new"), NAMES, ids=[old for _, old, _ in NAMES])
def test_an_old_name_is_the_new_one(module, old, new):
    with pytest.warns(FutureWarning, match=rf"{module.__name__}.{old} is now fastadv\."):
        assert getattr(module, old) is new
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_setting_is_the_new_one(old):
    model, new = nn.Linear(2, 2), RENAMED[old]
    with pytest.warns(FutureWarning, match=f"{old} is now {new}"):
        given = Trainer(model, 0.1, method="bias", **{old: VALUES[old]}, **NEEDED.get(old, {})).settings
    assert given == Trainer(model, 0.1, method="bias", **{new: VALUES[old]}, **NEEDED.get(old, {})).settings
    assert getattr(given, new) == VALUES[old]
    with pytest.raises(TypeError, match=f"{old} is now {new}, and both are given"):
        Trainer(model, 0.1, **{old: VALUES[old], new: VALUES[old]})


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_setting_of_a_grid_is_the_new_one(old):
    grid = {"data": "digits", "model": "conv", "methods": ["bias"], "seeds": 1, **NEEDED.get(old, {})}
    (expected, *_) = expanded({**grid, RENAMED[old]: VALUES[old]})
    for blocks in ({old: VALUES[old]}, {"blocks": [{old: VALUES[old]}]}):
        with pytest.warns(FutureWarning, match=f"{old} is now"):
            assert expanded({**grid, **blocks})[0].training == expected.training


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_option_is_the_new_one(old):
    finetune = ("finetune", "--data", "digits", "--out", "nowhere")
    option, new = (f"--{name.replace('_', '-')}" for name in (old, RENAMED[old]))
    parser = cli._parser()
    with pytest.warns(FutureWarning, match=f"{option} is now {new}"):
        given = parser.parse_args([*finetune, option, str(VALUES[old])])
    assert getattr(given, RENAMED[old]) == VALUES[old]
    assert vars(given) == vars(parser.parse_args([*finetune, new, str(VALUES[old])]))


def test_an_attack_of_the_old_name_of_what_steps_write_is_the_new_one():
    class Own(attacks.FGSM):
        def step(self, slots, grad):
            fastadv.pgd_step_(slots.adv, grad, slots.x, alpha=slots.eps, eps=slots.eps, **self.also(slots))

    model = attacks.Normalized(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 0.4, 0.3)
    images, labels = torch.rand(4, 3, 2, 2), torch.randint(3, (4,))
    with pytest.warns(FutureWarning, match=r"Attack\.also is now"):
        adv = Own(model, 0.1)(images, labels)
    assert torch.equal(adv, attacks.FGSM(model, 0.1)(images, labels))


def test_the_old_names_of_a_batch_and_a_model_are_the_new_ones():
    model = models.source("mlp").build(("a", "b"), (1, 4, 4))
    with pytest.warns(FutureWarning, match=r"Model\.pixels is now"):
        assert model.pixels is model.on_pixels
    samples = torch.rand(5, 1, 4, 4), torch.randint(2, (5,))
    with pytest.warns(FutureWarning, match="slots is now batch_size") as caught:
        old = evaluation.evaluate(model.on_pixels, samples, ["fgsm"], slots=2, progress=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        new = evaluation.evaluate(model.on_pixels, samples, ["fgsm"], batch_size=2, progress=False)
    assert old["settings"] == new["settings"]
    assert old["settings"]["slots"] == 2
