"""Uses of an evaluation that nobody planned: each figure is of the whole run, of these images and of this model."""

import re
import shutil
import sys
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadv.attacks import PGD
from fastadv.evaluation import AutoAttack, evaluate, robust_accuracy

EPS = 12 / 255


class Scaled(nn.Module):
    """A network whose large logits leave cross-entropy no gradient."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.net, self.scale = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 4)), scale

    def forward(self, x):
        return self.scale * self.net(x)


@pytest.fixture
def judged():
    """(a network, images, its own labels)."""
    torch.manual_seed(5)
    model, x = Scaled(), torch.rand(40, 3, 4, 4)
    return model, x, model(x).argmax(1)


def robust_by_hand(report, eps):
    """The share of images that no attack of the report fools within eps."""
    fooled = torch.tensor([each["fooled"] for each in report["attacks"] if each["eps"] <= eps]).any(0)
    return (torch.tensor(report["clean_correct"]) & ~fooled).double().mean().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ["apgd", "autoattack", "object", "pma"])
def test_the_short_form_gives_the_figure_of_all_parts(judged, attack):
    model, x, y = judged
    x, y = (x[:8], y[:8]) if attack == "autoattack" else (x, y)  # its Square takes 5,000 queries of each
    model.scale = 1e6
    several = (EPS, EPS / 3)
    given = {} if attack == "object" else {"eps": EPS}
    chosen = AutoAttack(model, eps=EPS, version="rand", verbose=False) if attack == "object" else attack
    report = evaluate(model, (x, y), [chosen], progress=False, **given)
    found = robust_accuracy(model, (x, y), chosen, **given)
    assert found["robust_accuracy"] == pytest.approx(robust_by_hand(report, EPS))
    if attack in ("apgd", "autoattack"):
        assert found["robust_accuracy"] < report["attacks"][0]["robust_accuracy"]  # the first part alone is masked
    if attack == "apgd":
        report = evaluate(model, (x, y), [attack], eps=several, progress=False)
        found = robust_accuracy(model, (x, y), attack, eps=several)["robust_accuracy"]
        assert found == pytest.approx([robust_by_hand(report, eps) for eps in several])


class Batched(nn.Module):
    """Batch-norm by the statistics of the batch, in eval mode too."""

    def __init__(self):
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("count", [8, 12])
def test_statistics_of_the_batch_are_warned_of(count):
    x, y = torch.rand(count, 3, 4, 4), torch.randint(3, (count,))
    attack = lambda images, labels: 1 - images  # noqa: E731
    with pytest.warns(UserWarning, match="output for an image depends on the others in its batch"):
        evaluate(Batched(), (x, y), [attack], progress=False)


class Placed(nn.Module):
    """Depends on the place in the batch."""

    def forward(self, x):
        return x.flatten(1)[:, :3] + torch.arange(len(x), dtype=x.dtype)[:, None] * torch.tensor([0.0, 0.3, 0.0])


def test_a_model_that_looks_at_the_place_in_the_batch_is_warned_of():
    x, y = torch.rand(9, 3, 4, 4), torch.randint(3, (9,))
    with pytest.warns(UserWarning, match="output for an image depends on the others in its batch"):
        evaluate(Placed(), (x, y), [lambda images, labels: 1 - images], progress=False)


def test_labels_in_columns_are_one_for_each_logit():
    torch.manual_seed(0)
    model, x = Scaled(), torch.rand(20, 3, 4, 4)
    y = model(x).argmax(1)

    def inverted(images, labels):
        return 1 - images

    assert evaluate(model, (x, y), [inverted], progress=False)["clean_accuracy"] == 1
    with pytest.raises(ValueError, match=r"labels \(20, 1\) are several a sample.* the model returns 4"):
        evaluate(model, (x, y[:, None] % 2), [inverted], progress=False)
    one_hot = torch.eye(4, dtype=torch.int64)[y]
    with pytest.warns(UserWarning, match="every sample has exactly one: if they stand for one class, pass labels"):
        evaluate(model, (x, one_hot), [PGD(model, EPS, EPS, 1, loss="bce")], progress=False)
    several = one_hot.clone()
    several[0, :2] = 1
    evaluate(model, (x, several), [PGD(model, EPS, EPS, 1, loss="bce")], progress=False)  # warns of nothing


# ---------------------------------------------------------------------- images and states


def pictures(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


@pytest.mark.filterwarnings("ignore:nfgsm at 12/255 is not projected")
def test_images_of_an_earlier_evaluation_are_not_among_the_new_ones(judged, tmp_path):
    model, x, y = judged
    options = {"eps": EPS, "progress": False, "save_images": tmp_path / "images"}
    state = tmp_path / "state.safetensors"
    evaluate(model, (x, y), ["fgsm", "nfgsm"], state=state, **options)
    (tmp_path / "images" / "mine.png").write_bytes(b"not of an evaluation")
    assert len(pictures(tmp_path)) == 81
    evaluate(model, (x, y), ["fgsm", "nfgsm"], state=state, **options)  # taken from its state
    assert len(pictures(tmp_path)) == 81
    state.unlink()
    for kept in ({}, {"state": state}):
        with pytest.raises(FileExistsError, match=r"images has images of an earlier evaluation, .*remove them"):
            evaluate(model, (x[:6], y[:6]), ["fgsm"], **kept, **options)
    assert len(pictures(tmp_path)) == 81
    assert not state.exists()
    for name in ("0-fgsm-12", "1-nfgsm-12"):
        shutil.rmtree(tmp_path / "images" / name)
    evaluate(model, (x[:6], y[:6]), ["fgsm"], state=state, **options)
    assert pictures(tmp_path / "images") == [*(f"0-fgsm-12/{i:05d}.png" for i in range(6)), "mine.png"]


def test_images_that_were_removed_are_not_taken_for_written(judged, tmp_path):
    model, x, y = judged
    options = {"eps": EPS, "progress": False, "state": tmp_path / "state.safetensors"}
    evaluate(model, (x, y), ["fgsm"], save_images=tmp_path / "images", **options)
    (tmp_path / "images" / "0-fgsm-12" / "00003.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 40 images, such as 00003\.png.*remove the state as well"):
        evaluate(model, (x, y), ["fgsm"], save_images=tmp_path / "images", **options)


@pytest.mark.parametrize("change", ["file", "value"])
def test_a_state_is_of_the_model_s_own_helper_modules_too(judged, tmp_path, monkeypatch, change):
    _, x, y = judged
    source = tmp_path / "own_helper.py"
    source.write_text("def scale(x):\n    return x\n")
    helper = ModuleType("own_helper")
    helper.__file__, helper.factor, helper.scale = str(source), 1.0, torch.clone
    monkeypatch.setitem(sys.modules, "own_helper", helper)
    net = judged[0].net

    def model(images):
        return net(helper.scale(images)) * helper.factor

    options = {"eps": EPS, "progress": False, "state": tmp_path / "state.safetensors"}
    before = evaluate(model, (x, y), ["fgsm"], **options)
    assert evaluate(model, (x, y), ["fgsm"], **options)["robust_accuracy"] == before["robust_accuracy"]
    if change == "file":
        source.write_text("def scale(x):\n    return 1 - x\n")
    else:
        helper.factor = np.float64(-1.0)
    with pytest.raises(ValueError, match="is the state of another run, which differs in attack 1, the model"):
        evaluate(model, (x, y), ["fgsm"], **options)


GUESS = "no more than one class for all of them would be"


def bright_or_dark(count):
    """(images whose class is their brightness in four steps, their classes)."""
    labels = torch.arange(count) % 4
    return (labels.reshape(-1, 1, 1, 1) + torch.rand(count, 3, 4, 4)) / 4, labels


def by_brightness(x):
    """The class by the mean of the pixels."""
    return -((x.mean((1, 2, 3))[:, None] - (torch.arange(4) + 0.5) / 4) ** 2)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda x, y: (by_brightness, x, (y + 1) % 4), GUESS),  # classes in another order
        (lambda x, y: (lambda z: by_brightness(z / 255), x, y), GUESS),
        (lambda x, y: (by_brightness, x / 255, y), f"{GUESS}.*divided by 255 twice"),
        (lambda x, y: (by_brightness, (x > 0.5).to(torch.uint8), y), f"{GUESS}.*of 0 and 1"),
        (lambda x, y: (by_brightness, x[:16] / 255, y[:16]), None),  # too few to tell
        (lambda x, y: (by_brightness, x, y), None),
        (lambda x, y: (by_brightness, x[::4], y[::4]), None),  # all of one class
    ],
)
def test_a_model_that_is_no_better_than_a_guess_is_told(use, said):
    model, images, labels = use(*bright_or_dark(160))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = evaluate(model, (images, labels), ["fgsm"], eps=1 / 255, progress=False)
    found = [note for note in report["warnings"] if GUESS in note]
    assert found == [str(each.message) for each in caught if GUESS in str(each.message)]
    assert len(found) == (said is not None)
    if said is not None:
        assert re.search(said, found[0])
        assert ("no pixel" in found[0]) == (said != GUESS)


def test_a_network_in_a_loss_is_left_as_it_was(judged):
    """A loss of the user's own, such as a perceptual one, may hold a network in train mode."""
    model, x, _ = judged
    features = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5))

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none") + features(x[: len(outputs)]).mean(1)

    before = {name: value.clone() for name, value in features.state_dict().items()}
    y = torch.arange(len(x)) % 4
    found = [evaluate(model, (x, y), [PGD(model, EPS, loss=loss)], progress=False)["budgets"] for _ in range(2)]
    assert found[0] == found[1]
    assert all(module.training for module in features.modules())
    for name, value in features.state_dict().items():
        assert torch.equal(value, before[name]), name
