"""The backbone's own robustness: a head in closed form, judged under PGD, and the model left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attacked import Net, batch_of, fresh_seed
from attacked import one_thread as one_thread
from sklearn.linear_model import Ridge
from torch import nn

from fastadv.attacks import PGD
from fastadv.training import backbone
from fastadv.training.backbone import backbone_robustness, ridge_head

EPS = 0.1


def two_features(count):
    """4x4 images of two classes: a bright half, which is right in nine of ten, and a hundredth more brightness for
    class 1 all over a flat quarter, which is always right and easily turned."""
    labels = torch.randint(2, (count,))
    images = 0.3 + 0.1 * torch.rand(count, 1, 4, 4)
    side = torch.where(torch.rand(count) < 0.9, labels, 1 - labels)
    images[torch.arange(count), 0, 2 * side] += 0.5
    images[:, 0, 3] = 0.5 + 0.02 * labels[:, None]
    return images, labels


class Centred(nn.Module):
    """Makes small differences of the last row as large as the others."""

    def forward(self, x):
        scale = torch.ones(4, 1)
        scale[3] = 50
        return (x - 0.5) * scale


def pretrained(robustly):
    model = nn.Sequential(Centred(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    images, labels = two_features(512)
    attack, optimizer = PGD(model, EPS, EPS / 4, 5), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        loss = F.cross_entropy(model(attack(images, labels) if robustly else images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nn.init.normal_(model[4].weight)  # a new head: only the features count
    return model


def test_only_a_standard_backbone_is_warned_of():
    images, labels = two_features(600)
    standard = backbone_robustness(pretrained(False), images, labels, EPS, classes=2)
    robust = backbone_robustness(pretrained(True), images, labels, EPS, classes=2)
    assert standard["clean_accuracy"] > 0.95
    assert standard["robust_accuracy"] < 0.05
    assert robust["clean_accuracy"] > 0.8
    assert robust["robust_accuracy"] > 0.7
    assert robust["warning"] is None
    assert standard["warning"].startswith("the backbone is not robust at eps = 25.5/255: of its clean accuracy of")
    assert f"PGD-10 leaves {standard['robust_accuracy']:.1%}" in standard["warning"]
    assert robust["eps"] == EPS


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("shape", [(50, 7), (20, 40)])
def test_the_head_is_sklearns_ridge(intercept, shape):
    features, labels = 5 * torch.randn(shape) + 3, torch.randint(4, shape[:1])
    weight, bias = ridge_head(features, labels, 4, intercept=intercept)
    x = features.double().numpy()
    alpha = backbone.RIDGE * len(x) * (x.var(0) if intercept else (x**2).mean(0)).mean()
    peer = Ridge(alpha=alpha, fit_intercept=intercept).fit(x, 2.0 * F.one_hot(labels, 4).numpy() - 1)
    torch.testing.assert_close(weight, torch.from_numpy(peer.coef_))
    torch.testing.assert_close(bias, torch.from_numpy(peer.intercept_ + torch.zeros(4).double().numpy()))


def test_features_that_say_nothing_give_a_constant_head():
    weight, bias = ridge_head(torch.ones(10, 3), torch.arange(10) % 5, 5, intercept=True)
    assert not weight.any()
    torch.testing.assert_close(bias, torch.full((5,), -0.6, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
def test_accuracies_are_those_of_a_model_with_that_head(bias):
    """The same written out: split, features by hand, a head put in place, attacked."""
    net, seed = Net(), fresh_seed()
    net.head = nn.Linear(24, 5, bias=bias)
    images, _ = batch_of(300)
    labels = (5 * images.mean((1, 2, 3)).argsort().argsort() / 300).long()
    result = backbone_robustness(net, images, labels, 0.01, classes=5, seed=seed, fit=250, judge=80, steps=3)

    other, order = copy.deepcopy(net).eval(), torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    judge, fit = order[:60], order[60:]  # a fifth, and the rest
    entered = []
    other.head.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    other(images[fit])
    weight, offset = ridge_head(entered[0], labels[fit], 5, intercept=bias)
    other.head.weight.data = weight.float()
    if bias:
        other.head.bias.data = offset.float()

    def accuracy(x):
        return (other(x).argmax(1) == labels[judge]).float().mean().item()

    assert result["clean_accuracy"] == pytest.approx(accuracy(images[judge]))
    # Each image is judged at every step, and has a seed of its own: chance moves an image or two.
    adv = PGD(other, 0.01, 0.0025, 3)(images[judge], labels[judge], seed=seed)
    assert result["robust_accuracy"] == pytest.approx(accuracy(adv), abs=0.1)


def state_of(net):
    flags = [(m.training, len(m._forward_pre_hooks)) for m in net.modules()]
    return flags, [p.requires_grad for p in net.parameters()], [t.clone() for t in net.state_dict().values()]


@pytest.mark.parametrize("failing", [False, True])
def test_model_and_generators_are_left_as_they_were(failing):
    net = Net().train()
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    before, weight, hidden = state_of(net), net.head.weight, net.hidden.clone()
    call = (net, *batch_of(40), EPS)
    state = torch.get_rng_state()
    if failing:
        broken = net.norm.register_forward_hook(lambda m, args, out: out[:, :3] if net.hidden[0] > 1 else out)
        with pytest.raises(RuntimeError):
            backbone_robustness(*call, classes=5)
        broken.remove()
    else:
        backbone_robustness(*call, classes=5)
    for old, new in zip(before, state_of(net), strict=True):
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(old, new, strict=True))
    assert net.head.weight is weight
    assert torch.equal(net.hidden, hidden)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_measured_says_why():
    images, labels = batch_of(20)
    conv = nn.Sequential(nn.Conv2d(3, 5, 6), nn.Flatten())
    result = backbone_robustness(conv, images, labels, EPS, classes=5, head="0")
    assert result == {
        "clean_accuracy": None,
        "robust_accuracy": None,
        "eps": EPS,
        "warning": "the backbone's robustness is not measured: the head 0 is no plain nn.Linear but a Conv2d",
    }
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(36, 5), nn.Flatten(), nn.Linear(15, 5))
    result = backbone_robustness(tokens, images, labels, EPS, classes=5, head="1")
    assert result["robust_accuracy"] is None
    assert "does not get one vector of features for each image" in result["warning"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 4}, "below classes = 4, got 4"),
        ({"classes": 6}, "the head head must have an output for each of 6 classes"),
        ({"eps": 8}, r"pixels of \[0, 1\]"),
        ({"judge": 0}, "judge must be at least 1, got 0"),
        ({"head": "top"}, "no module called 'top'"),
        ({"images": torch.rand(1, 3, 6, 6), "labels": torch.tensor([4])}, "got 1 image"),
    ],
)
def test_bad_input_is_refused(changes, message):
    settings = {"images": torch.rand(5, 3, 6, 6), "labels": torch.arange(5), "eps": EPS, "classes": 5, **changes}
    with pytest.raises(ValueError, match=message):
        backbone_robustness(Net(), **settings)
