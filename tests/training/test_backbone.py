"""The robustness of a backbone: a head in closed form is attacked with PGD, and the model is not changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attacked import Net, batch_of, fresh_seed
from attacked import one_thread as one_thread
from sklearn.linear_model import Ridge
from torch import nn

from fastadv import data
from fastadv.attacks import PGD
from fastadv.evaluation import robust_accuracy
from fastadv.models.networks import mlp
from fastadv.training import backbone
from fastadv.training.backbone import backbone_robustness, ridge_head

EPS = 0.2
OLD, NEW = data.load("digits", classes=range(5)), data.load("digits", classes=range(5, 10))


def pretrained(robustly):
    """A model that was trained on the digits 0-4."""
    model = mlp(OLD.shape, 5)
    images, labels = OLD.train
    attack, optimizer = PGD(model, EPS, EPS / 4, 7), torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(20):
        for index in torch.randperm(len(images)).split(64):
            x = attack(images[index], labels[index]) if robustly else images[index]
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def test_only_a_standard_backbone_is_warned_of():
    standard, robust = (backbone_robustness(pretrained(robustly), *NEW.train, EPS) for robustly in (0, 1))
    for result in (standard, robust):
        assert result["clean_accuracy"] > 0.75
        assert result["eps"] == EPS
    assert standard["robust_accuracy"] < 0.17  # 0 to 0.12 in ten runs
    assert standard["warning"].startswith("the backbone is not robust at eps = 51/255: a linear head fitted to its")
    assert f"PGD-10 leaves {standard['robust_accuracy']:.1%}" in standard["warning"]
    assert robust["robust_accuracy"] > 0.2  # 0.30 to 0.40 in the same runs
    assert robust["warning"] is None


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
    """By hand: the images are split, the features computed, the head put into the model and the model attacked."""
    net, seed, eps = Net(), fresh_seed(), 0.02
    net.head = nn.Linear(24, 5, bias=bias)
    images, _ = batch_of(1000)
    labels = (5 * images.mean((1, 2, 3)).argsort().argsort() / 1000).long()
    result = backbone_robustness(net, images, labels, eps, seed=seed, fit=900, judge=300, steps=4)

    other, order = copy.deepcopy(net).eval(), torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    judge, fit = order[:200], order[200:]  # a fifth is evaluated, the rest fits the head

    def refit(x, y):
        entered = []
        with other.head.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach())):
            other(x)
        weight, offset = ridge_head(entered[0], y, 5, intercept=bias)
        other.head.weight.data = weight.float()
        if bias:
            other.head.bias.data = offset.float()

    def accuracy(x):
        return (other(x).argmax(1) == labels[judge]).float().mean().item()

    x, y = images[fit], labels[fit]
    refit(x, y)
    assert result["clean_accuracy"] == pytest.approx(accuracy(images[judge]))
    for i in (1, 2):
        x_adv = PGD(other, eps, eps / 2, 3, chunk=128)(images[fit], labels[fit], seed=seed + i)
        x, y = torch.cat((x, x_adv)), torch.cat((y, labels[fit]))
        refit(x, y)
    judged = robust_accuracy(other, (images[judge], labels[judge]), PGD(other, eps, eps / 4, 4), seed=seed)
    assert result["robust_accuracy"] == pytest.approx(judged["robust_accuracy"], abs=0.006)


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
            backbone_robustness(*call)
        broken.remove()
    else:
        backbone_robustness(*call)
    for old, new in zip(before, state_of(net), strict=True):
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(old, new, strict=True))
    assert net.head.weight is weight
    assert torch.equal(net.hidden, hidden)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_in_data_parallel_is_measured_as_itself():
    images, labels = batch_of(40)
    net = Net()
    for head in (None, "head"):
        inside = head and f"module.{head}"
        expected = backbone_robustness(net, images, labels, EPS, head=head)
        assert backbone_robustness(nn.DataParallel(net), images, labels, EPS, head=inside) == expected


class Distilled(nn.Module):
    """The mean of two heads, as of a distilled DeiT."""

    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(108, 5), nn.Linear(108, 5)

    def forward(self, x):
        return (self.head(x.flatten(1)) + self.head_dist(x.flatten(1))) / 2


def test_what_cannot_be_measured_says_why():
    images, labels = batch_of(20)
    conv = nn.Sequential(nn.Conv2d(3, 5, 6), nn.Flatten())
    result = backbone_robustness(conv, images, labels, EPS, head="0")
    assert result == {
        "clean_accuracy": None,
        "robust_accuracy": None,
        "eps": EPS,
        "warning": "the backbone's robustness is not measured: the head 0 is no plain nn.Linear but a Conv2d",
    }
    normed = nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(108, 5)))
    result = backbone_robustness(normed, images, labels, EPS)
    assert result["robust_accuracy"] is None
    assert "the weight of the head 1 is computed from others" in result["warning"]
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(36, 5), nn.Flatten(), nn.Linear(15, 5))
    result = backbone_robustness(tokens, images, labels, EPS, head="1")
    assert result["robust_accuracy"] is None
    assert "does not get one vector of features for each image" in result["warning"]
    result = backbone_robustness(Distilled(), images, labels, EPS, head="head")
    assert result["clean_accuracy"] is result["robust_accuracy"] is None
    assert "the logits depend on more than the head head, such as on a second head" in result["warning"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.arange(1, 6)}, "below the head's 5 outputs, got 5"),
        ({"eps": 8}, r"the images' scale \[0, 1\]"),
        ({"judge": 0}, "judge must be at least 1, got 0"),
        ({"head": "top"}, "no module called 'top'"),
        ({"images": torch.rand(1, 3, 6, 6), "labels": torch.tensor([4])}, "got 1 image"),
    ],
)
def test_bad_input_is_refused(changes, message):
    settings = {"images": torch.rand(5, 3, 6, 6), "labels": torch.arange(5), "eps": EPS, **changes}
    with pytest.raises(ValueError, match=message):
        backbone_robustness(Net(), **settings)
