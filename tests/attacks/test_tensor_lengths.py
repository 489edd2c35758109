"""Lengths given as tensors are looked at as numbers are; and copies of an attack attack their own model."""

import copy
import pickle
import warnings

import pytest
import torch
from attacked import Net, batch_of

from fastadv.attacks import FGSM, PGD, PGDL2

N = 12


def words_of(attack, eps=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack(*batch_of(N), eps=eps)
    return [str(warning.message) for warning in caught]


def told(make, eps=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attack = make()
    return [str(warning.message) for warning in caught] + words_of(attack, eps)


FORMS = {
    "0-dim": torch.tensor,
    "per image": lambda length: torch.full((N,), length),
    "one too large": lambda length: torch.tensor([length] + [1 / 255] * (N - 1)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_budget_that_the_steps_do_not_reach(form):
    def make():
        return PGD(Net(), random_start=False)

    as_number = told(make, 48 / 255)
    assert any("move an image by 20/255 at most" in words for words in as_number)
    as_tensor = told(make, form(48 / 255))
    assert [words.partition(", less than")[0] for words in as_tensor] == [
        words.partition(", less than")[0] for words in as_number
    ]
    assert told(make, form(12 / 255)) == []


def test_step_sizes_of_each_image_are_compared_with_its_own_budget():
    eps = torch.linspace(4 / 255, 64 / 255, N)
    assert told(lambda: PGD(Net(), 64 / 255, alpha=eps / 8), eps) == []
    assert len(told(lambda: PGD(Net(), 64 / 255, alpha=eps.flip(0) / 8), eps)) == 1


@pytest.mark.parametrize("form", [torch.tensor, lambda length: torch.full((N,), length)])
def test_a_step_in_255ths_is_refused(form):
    with pytest.raises(ValueError, match="alpha is on the images' scale"):
        PGD(Net(), 48 / 255, alpha=form(2.0))(*batch_of(N))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_length_for_l_inf_in_l2(form):
    assert "a length for L-inf" in " ".join(told(lambda: PGDL2(Net()), form(8 / 255)))
    assert told(lambda: PGDL2(Net()), form(0.5)) == []


@pytest.mark.parametrize(("clip", "wide", "right"), [((-1, 1), 8.0, 0.5), ((0, 255), 300.0, 8.0)])
def test_a_ball_that_holds_the_whole_box(clip, wide, right):
    def make(eps):
        return lambda: FGSM(lambda x: Net()(x.clamp(0, 1)), eps, clip=clip)

    assert "all images are in the ball" in " ".join(told(make(wide)))
    assert told(make(right)) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda attack: pickle.loads(pickle.dumps(attack)), copy.copy])
def test_a_copy_of_a_compiled_attack_attacks_its_own_model(copied, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function(*args))
    images, labels = batch_of(N)
    attack = PGD(Net().eval(), 8 / 255, random_start=False, compile=True)
    before = attack(images, labels)
    other = copied(attack)
    if copied is copy.copy:
        other.model = copy.deepcopy(other.model)
    assert torch.equal(other(images, labels), before)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    expected = PGD(other.model, 8 / 255, random_start=False)(images, labels)
    assert torch.equal(other(images, labels), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(attack(images, labels), before)
