"""The cost model against counts by hand and against the ratios in the papers."""

import pytest

from fastadv.training.cost import STEPS, fresh_share, passes, price


@pytest.mark.parametrize(
    ("attack", "method", "options", "expected"),
    [
        (None, "full", {}, (1, 0, 1)),
        ("fgsm", "full", {}, (2, 1, 1)),
        ("nfgsm", "lora", {}, (2, 2, 0)),
        ("pgd", "full", {}, (8, 7, 1)),
        ("pgd", "full", {"steps": 2}, (3, 2, 1)),
        ("none", "linear", {}, (1, 0, 0)),
        ("pgd", "linear", {}, (8, 7, 0)),
        ("stale", "full", {}, (1, 0, 1)),
        ("stale", "full", {"fresh": 0.25}, (1.25, 0.25, 1)),
        ("stale", "linear", {}, (1, 1, 0)),
        ("cached", "linear", {"fresh": 1.0}, (2, 1, 0)),
        ("cached", "linear", {"fresh": 0.25}, (0.5, 0.25, 0)),
        ("free", "full", {}, (1, 0, 1)),
        ("fgsm-pgi", "full", {}, (3, 1, 2)),
        ("fgsm", "full", {"clean": True}, (3, 1, 2)),
        ("gradalign", "full", {}, (3, 2, 3)),
    ],
)
def test_the_passes_of_a_method_by_hand(attack, method, options, expected):
    assert passes(attack, method, **options) == expected


def test_the_ratios_that_the_papers_state():
    """PGD-7 costs 3.4 times as much as FGSM, and 5 times for a linear probe. FGSM costs 5/3 of standard training."""
    names = STEPS.keys() - {"cached"}
    full, linear = ({name: passes(name, method).total for name in names} for method in ("full", "linear"))
    assert full["pgd"] / full["fgsm"] == pytest.approx(3.4)
    assert linear["pgd"] / linear["fgsm"] == pytest.approx(5.0)
    assert full["fgsm"] / full["none"] == pytest.approx(5 / 3)
    assert passes("stale", fresh=1).total == full["fgsm"]
    assert passes("cached", "linear", fresh=1) == passes("fgsm", "linear")


@pytest.mark.parametrize(
    ("attack", "options", "words"),
    [
        ("fgms", {}, "'fgms' is not known; there are none, fgsm"),
        ("fgsm", {"steps": 3}, "steps are of pgd"),
        ("fgsm", {"fresh": 0.5}, "of the images of stale and cached"),
        ("cached", {}, "cached is for linear probing on attacked images alone"),
        ("cached", {"method": "linear", "clean": True}, "on attacked images alone"),
        ("stale", {"fresh": 1.5}, r"a share in \[0, 1\]"),
    ],
)
def test_what_cannot_be_counted_is_refused(attack, options, words):
    with pytest.raises(ValueError, match=words):
        passes(attack, **options)


@pytest.mark.parametrize("method", ["full", "linear", "lora"])
@pytest.mark.parametrize("clean", [False, True])
def test_the_share_of_fresh_images_has_the_price_that_was_wanted(method, clean):
    least, most = (price("stale", method, fresh=share, clean=clean) for share in (0, 1))
    for wanted in (least, (least + most) / 2, most):
        share = fresh_share(wanted, method, clean)
        assert price("stale", method, fresh=share, clean=clean) == pytest.approx(wanted)
    assert (fresh_share(least / 2, method, clean), fresh_share(2 * most, method, clean)) == (0, 1)
