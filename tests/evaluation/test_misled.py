"""Evaluations that would say too much robustness, or that of another model, say so: each once went without a word."""

import copy
import math
import warnings

import pytest
import torch
from test_evaluation import forty_samples
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from fastadv.attacks import FGSM, PGD, PGDL2, PMA
from fastadv.evaluation import evaluate
from fastadv.evaluation.masking import as_picture

EPS = 16 / 255


class Net(nn.Module):
    """A float32 network of two layers; `scale` is a plain attribute."""

    def __init__(self, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.scale = nn.Linear(48, 24), nn.Linear(24, 3), scale
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x):
        return self.scale * self.second(torch.sin(2 * self.first(x.flatten(1) - 0.5)))


class Rooted(Net):
    """The root of a sum of squares that is 0 at every image: its value is right, and the gradient NaN."""

    def forward(self, x):
        return super().forward(x) / (1 + ((x.clamp(0, 1) - x) ** 2).sum((1, 2, 3)).sqrt())[:, None]


class Stepped(Net):
    """Rounds its input where `levels` says so: then it has no gradient, and without `levels` it is its own twin."""

    levels = None

    def forward(self, x):
        return super().forward(x if self.levels is None else (x * self.levels).round() / self.levels + 0 * x)


@pytest.fixture
def samples():
    images, _ = forty_samples()
    images = images.float()
    return images, Net()(images).argmax(1)


def told(model, samples, attacks="pgd-10", **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = evaluate(model, samples, attacks, batch_size=16, progress=False, **options)
    assert {str(warning.message) for warning in caught} == set(report["warnings"])
    return report, " ".join(report["warnings"])


def test_a_gradient_that_is_nan_is_none(samples):
    report, words = told(Rooted(), samples, ["fgsm"], eps=EPS)
    assert report["attacks"][0]["zero_gradients"] == 1
    assert "the gradient is zero for 40 of 40 images where fgsm" in words
    with pytest.warns(UserWarning, match="exactly zero for 40 of 40 images at the first step .NaN counts as zero"):
        assert torch.equal(FGSM(Rooted(), EPS)(*samples), samples[0])


@pytest.mark.parametrize("attack", [PGDL2, PGD])
def test_gradients_too_short_to_be_divided_by_count_in_l2(samples, attack):
    """Logits 40 times as large have losses of 1e-12 and less: in L2 such a gradient is divided by 1e-10 and more."""
    net = Net(400.0)
    x = samples[0].clone().requires_grad_()
    nn.functional.cross_entropy(net(x), samples[1], reduction="sum").backward()
    lengths = x.grad.double().flatten(1).norm(dim=1)
    least = 1e-10 if attack is PGDL2 else 0.0
    made = attack(net, 0.2 if attack is PGDL2 else EPS, random_start=False)
    report, words = told(net, samples, [made])
    assert report["attacks"][0]["zero_gradients"] == float((lengths <= least).double().mean())
    assert ("length of at most 1e-10" in words) == (attack is PGDL2)
    assert int((lengths <= 1e-10).sum()) > int((lengths == 0).sum())


@pytest.mark.filterwarnings("ignore")
def test_an_attack_on_a_differentiable_twin_is_judged_by_its_own_images(samples):
    """Backward pass differentiable approximation: Athalye et al. 2018, section 4.1.1."""
    twin, model = Stepped(), Stepped()
    model.levels = 64
    labels = model(samples[0]).argmax(1)
    attack = PGD(twin, EPS, EPS / 4, random_start=False)
    report, words = told(model, (samples[0], labels), [attack])
    assert report["robust_accuracy"] == float((model(attack(samples[0], labels)).argmax(1) == labels).double().mean())
    assert report["robust_accuracy"] < 0.9
    assert "the images were transferred" in words
    assert told(model, (samples[0], labels), [PGD(copy.deepcopy(model), EPS)])[0]["attacks"][0]["zero_gradients"] == 1


class Called(PGD):
    """Its call is stronger than its steps."""

    def __call__(self, images, labels=None, **given):
        return PGD(self.model, self.eps, self.eps / 4)(images, labels, seed=1)


class Rounding(PGD):
    """Its result is rounded to ten levels, and leaves the ball."""

    def result(self, slots):
        return (slots.adv * 10).round() / 10


@pytest.mark.parametrize("cls", [Called, Rounding])
def test_what_a_call_of_a_class_of_ones_own_returns_is_judged(samples, cls):
    net = Net()
    attack = cls(net, EPS, random_start=False, alpha=EPS)
    report, words = told(net, samples, [attack])
    adv = attack(*samples)
    right = float((net(adv).argmax(1) == samples[1]).double().mean())
    result = report["attacks"][0]
    assert result["fooled"] == (net(adv).argmax(1) != samples[1]).tolist()
    assert result["largest_linf"] == pytest.approx(float((adv - samples[0]).abs().max()))
    assert result["robust_accuracy"] == (right if cls is Called else None)
    assert ("beyond its eps" in words) == (cls is Rounding)
    assert "another object" not in words


def test_a_step_that_an_object_was_given_is_measured(samples):
    net = Net()
    attack = PGD(net, EPS, EPS / 4)
    attack.step = lambda slots, grad: slots.adv.add_(grad.sign(), alpha=0.2)
    report, words = told(net, samples, [attack])
    assert report["attacks"][0]["largest_linf"] > EPS
    assert "its robust accuracy is left out" in words


@pytest.mark.filterwarnings("ignore:all of the model's outputs", "ignore:the gradient is")
@pytest.mark.parametrize("sharp", [3.0, 9.0])
def test_the_outputs_of_a_sigmoid_are_told(samples, sharp):
    net = Net(sharp)
    _, words = told(lambda x: net(x).sigmoid(), samples)
    assert "as a sigmoid's are: the loss ce takes a softmax of them once more" in words
    with pytest.warns(UserWarning, match="Pass the model without its sigmoid"):
        PGD(lambda x: net(x).sigmoid(), EPS)(*samples)
    several = (net(samples[0]) > 0).long()
    yes, words = told(
        lambda x: net(x).sigmoid(), (samples[0], several), [PGD(lambda x: net(x).sigmoid(), EPS, loss="bce")]
    )
    assert "the sign of a logit, here always a yes" in words
    assert yes["clean_accuracy"] == float(several.all(1).double().mean())
    assert "sigmoid" not in told(net, (samples[0], several), [PGD(net, EPS, loss="bce")])[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(40, 48), (40, 6, 8), (40, 3, 16)])
def test_masked_gradients_are_looked_for_in_inputs_of_any_shape(samples, shape):
    net = Net()

    def masked(x):
        return net(x + 0.03 * torch.sin(700 * x))

    inputs = samples[0].reshape(shape)
    labels = masked(inputs).argmax(1)
    report, words = told(masked, (inputs, labels), [PMA(masked, EPS, steps=8)])
    assert len(report["masking"]) == 1
    assert report["masking"][0]["asked"] > 0
    assert "gradients look masked" in words
    assert math.prod(as_picture(shape[1:])) == math.prod(shape[1:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [PGD, PGDL2])
def test_gradients_that_say_nothing_of_the_next_step_are_told(samples, kind):
    """Waves far shorter than a step: the gradient is right, and leads nowhere. The share is that of a loop by hand."""
    net = Net()

    def waved(x):
        return net(x + 0.01 * torch.sin(10_000 * x))

    def risen(model, x, label, eps):
        x = x[None].double().requires_grad_()
        logits = copy.deepcopy(net).double()(x if model is net else x + 0.01 * torch.sin(10_000 * x))[0]
        other = max((c for c in range(3) if c != label), key=lambda c: float(logits[c].detach()))
        (grad,) = torch.autograd.grad(logits[other] - logits[label], x)
        step = grad / grad.norm() if kind is PGDL2 else grad.sign()
        moved = (x.detach() + eps / 4 * step).clamp(0, 1)
        after = (model(moved.float())[0].double()).detach()
        gain = after[other] - after[label] - (logits[other] - logits[label]).detach()
        return float(gain / (grad * (moved - x.detach())).sum())

    eps = 0.5 if kind is PGDL2 else EPS
    for model in (net, waved):
        labels = model(samples[0]).argmax(1)
        report, words = told(model, (samples[0], labels), [kind(model, eps, steps=4)])
        rises = [risen(model, x, int(label), eps) for x, label in zip(samples[0], labels, strict=True)]
        share = sum(each < 0.1 for each in rises) / len(rises)
        assert report["attacks"][0]["shattered_gradients"] == pytest.approx(share, abs=0.05)
        assert ("along the margin's gradient" in words) == (model is waved) == (share > 0.5)


def test_a_loss_of_another_output_than_the_logits_judges_logits_without_a_gradient(samples):
    net = Net()

    class Hard(nn.Module):
        def forward(self, x):
            soft = net(x)
            return {"logits": nn.functional.one_hot(soft.argmax(1), 3).float(), "soft": soft}

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs["soft"], labels, reduction="none")

    model = Hard()
    report, _ = told(model, samples, [PGD(model, EPS, steps=6, loss=loss, random_start=False, alpha=EPS / 4)])
    plain, _ = told(net, samples, [PGD(net, EPS, steps=6, random_start=False, alpha=EPS / 4)])
    assert report["attacks"][0]["fooled"] == plain["attacks"][0]["fooled"]
    assert any(report["attacks"][0]["fooled"])
    assert report["attacks"][0]["shattered_gradients"] is None
    assert plain["attacks"][0]["shattered_gradients"] == 0


@pytest.mark.parametrize("sampler", ["shuffle", "random part"])
def test_lists_of_a_shuffled_loader_are_in_the_order_of_their_labels(samples, sampler):
    data = TensorDataset(*samples)
    chosen = {"shuffle": True} if sampler == "shuffle" else {"sampler": SubsetRandomSampler(range(40))}
    net = Net()
    report, words = told(net, DataLoader(data, batch_size=10, **chosen), "fgsm", eps=EPS)
    assert "the loader shuffles" in words
    assert sorted(report["labels"]) == sorted(samples[1].tolist())
    kept, words = told(net, DataLoader(data, batch_size=10), "fgsm", eps=EPS)
    assert "shuffles" not in words
    assert kept["labels"] == samples[1].tolist()
    for one in range(3):
        of_class = [
            sum(r for r, label in zip(each["budgets"][0]["robust"], each["labels"], strict=True) if label == one)
            for each in (report, kept)
        ]
        assert of_class[0] == of_class[1]


def test_randomness_is_told_where_any_attack_has_one_draw(samples):
    net = Net()

    def noisy(x):
        return net(x + 0.1 * torch.randn_like(x))

    several, one = PGD(noisy, EPS, eot=2), PGD(noisy, EPS)
    assert "output is random" in told(noisy, samples, [several, one])[1]
    assert "output is random" not in told(noisy, samples, [several])[1]

    def together(x):
        return net(x - x.mean(0))

    assert "depends on the others" in told(together, samples, [PGD(together, EPS, eot=2)])[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steps_that_rounding_swallows_are_told(samples, dtype):
    """Between 1/2 and 1 bfloat16 has a number each 1/256, float16 one each 1/2048."""
    net = Net()
    images = (0.6 + 0.3 * samples[0]).to(dtype)
    model = lambda x: net(x.float())  # noqa: E731
    labels = model(images).argmax(1)
    alpha = 1 / 600
    attack = PGD(model, EPS, alpha, 40, random_start=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = (attack(images, labels) != images).any()
    assert bool(moved) == (dtype != torch.bfloat16)
    assert ("is lost to rounding" in " ".join(str(w.message) for w in caught)) == (dtype == torch.bfloat16)
    assert ("is lost to rounding" in told(model, (images, labels), [attack])[1]) == (dtype == torch.bfloat16)


def test_budgets_that_are_equal_in_float32_are_one(samples):
    """The steps have them in float32; an eps that came from NumPy or a tensor is rounded to it."""
    net = Net()
    given = float(torch.tensor(8 / 255))
    assert given != 8 / 255
    report, _ = told(net, samples, ["fgsm", PGD(net, given, given / 4)], eps=8 / 255)
    assert isinstance(report["robust_accuracy"], float)
    assert [each["attacks"] for each in report["budgets"]] == [["fgsm", "PGD"]]
