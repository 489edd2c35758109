"""Attacks by name, with the settings of their papers."""

import pytest
from attacked import EPS
from attacked import net as net

from fastadv.attacks import create_attack


def test_unknown_names_and_settings_are_refused(net):
    with pytest.raises(ValueError, match="there are fgsm, fgsm-rs, nfgsm, pgd"):
        create_attack("pgb", net, EPS)
    with pytest.raises(ValueError, match="the attack fgsm has no setting 'steps'"):
        create_attack("fgsm", net, EPS, steps=7)
    with pytest.raises(TypeError, match="eps must be a number, got '8/255'"):
        create_attack("pgd-10", net, "8/255")


@pytest.mark.parametrize("name", ["bim", "mifgsm", "pgdl2"])
def test_a_setting_may_be_that_of_a_base(net, name):
    assert create_attack(name, net, EPS, schedule="cosine").schedule == "cosine"
    assert create_attack("pma-l2", net, EPS, most_runs=3).most_runs == 3
    with pytest.raises(ValueError, match="has no setting 'args'"):
        create_attack("fab", net, EPS, args=1)


def test_presets_hold_the_papers_settings(net):
    def settings(name):
        return {key: value for key, value in vars(create_attack(name, net, EPS)).items() if key in keys}

    keys = ("alpha", "noise", "steps", "random_start", "restarts", "decay")
    fgsm, pgd = {"restarts": 1}, {"alpha": EPS / 4, "steps": 10, "random_start": True, "restarts": 1}
    assert settings("fgsm") == {"alpha": None, "noise": 0.0, **fgsm}
    assert settings("fgsm-rs") == {"alpha": 1.25 * EPS, "noise": EPS, **fgsm}
    assert settings("nfgsm") == {"alpha": None, "noise": None, **fgsm}
    assert settings("pgd") == {**pgd, "steps": 7}
    assert settings("pgd-20") == {**pgd, "steps": 20}
    assert settings("pgd-50-10") == {**pgd, "steps": 50, "restarts": 10}
    assert settings("bim") == {**pgd, "random_start": False}
    assert settings("mifgsm") == {**pgd, "alpha": EPS / 10, "random_start": False, "decay": 1.0}
    assert create_attack("pgd", net, EPS, steps=5, alpha=None).steps == 5
