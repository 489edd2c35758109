"""The attacks against closed forms, against torchattacks, and their manners towards the model."""

import copy

import pytest
import torch
import torchattacks
from torch import nn

from fastadv import fgsm_step, random_init
from fastadv.attacks import FGSM, NFGSM, PGD, create_attack

EPS = 8 / 255
ATTACKS = {
    "fgsm": lambda model: FGSM(model, EPS),
    "fgsm-rs": lambda model: FGSM(model, EPS, alpha=1.25 * EPS, noise=EPS),
    "nfgsm": lambda model: NFGSM(model, EPS),
    "pgd": lambda model: PGD(model, EPS, EPS / 4, 5),
}
every_attack = pytest.mark.parametrize("attack_on", ATTACKS.values(), ids=ATTACKS.keys())


class Net(nn.Module):
    """Convolution, batch-norm and dropout, with a train() that keeps batch-norm frozen, as users write it."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, classes)

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = False
        return self

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean(dim=(2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


# Strength


@pytest.fixture
def linear():
    """A linear model of two classes; the best attack on it is known."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double()


@pytest.mark.parametrize(
    "attack_on",
    [
        lambda model: FGSM(model, EPS),
        lambda model: FGSM(model, EPS, alpha=2 * EPS, noise=EPS),
        lambda model: PGD(model, EPS, EPS / 4, 8),
        lambda model: PGD(model, EPS, EPS, 1, random_start=False),
    ],
    ids=["fgsm", "fgsm-rs-far", "pgd", "pgd-1"],
)
def test_linear_model_reaches_the_optimum(linear, batch, attack_on):
    images, labels = batch[0].double(), batch[1] % 2
    weight = linear[1].weight.detach()
    uphill = (weight[1 - labels] - weight[labels]).sign().reshape(images.shape)
    best = (images + EPS * uphill).clamp(0, 1)
    adv = attack_on(linear)(images, labels)
    torch.testing.assert_close(adv, best, rtol=0, atol=1e-15)
    loss = nn.functional.cross_entropy(linear(adv), labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(linear(best), labels), rtol=1e-13, atol=0)


def test_nfgsm_on_a_linear_model_steps_from_its_start_without_projection(linear, batch):
    images, labels = batch[0].double(), batch[1] % 2
    weight = linear[1].weight.detach()
    uphill = (weight[1 - labels] - weight[labels]).sign().reshape(images.shape)
    expected = (random_init(images, 2 * EPS, seed=5) + EPS * uphill).clamp(0, 1)
    adv = NFGSM(linear, EPS)(images, labels, seed=5)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-15)
    assert (adv - images).abs().max() > 2.5 * EPS


def within_one_ulp(actual, expected):
    towards = torch.nextafter(expected, actual)
    return bool((towards == actual).all())


def test_fgsm_equals_torchattacks(net, batch):
    assert within_one_ulp(FGSM(net, EPS)(*batch), torchattacks.FGSM(net, eps=EPS)(*batch))


def test_pgd_equals_torchattacks_over_twenty_steps():
    # In float64: in float32 one rounding may turn the sign of a gradient that is nearly zero.
    torch.manual_seed(3)
    model = Net().double().eval()
    images, labels = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4
    ours = PGD(model, EPS, EPS / 4, 20, random_start=False)(images, labels)
    theirs = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=20, random_start=False)(images, labels)
    assert within_one_ulp(ours, theirs)


def test_fgsm_rs_equals_torchattacks_from_the_same_start(net, batch, monkeypatch):
    images, labels = batch
    noise = random_init(images, EPS, seed=9, clip=(-1, 2)) - images
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(noise))
    theirs = torchattacks.FFGSM(net, eps=EPS, alpha=1.25 * EPS)(images, labels)
    ours = create_attack("fgsm-rs", net, EPS)(images, labels, seed=9)
    # Their start differs from ours by the rounding of x + noise, so a pixel may by 2 roundings near 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-23)


def test_fgsm_rs_takes_the_gradient_at_the_start_that_the_step_uses(batch):
    images, labels = batch
    seen = []

    def model(x):
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :4] ** 3

    adv = create_attack("fgsm-rs", model, EPS)(images, labels, seed=7)
    assert torch.equal(seen[0], random_init(images, EPS, seed=7))
    leaf = seen[0].requires_grad_()
    grad = torch.autograd.grad(nn.functional.cross_entropy(leaf.flatten(1)[:, :4] ** 3, labels), leaf)[0]
    assert torch.equal(adv, fgsm_step(images, grad, EPS, alpha=1.25 * EPS, noise=EPS, seed=7))


# What comes out


@every_attack
def test_result_stays_in_the_ball_and_the_images_as_they_were(net, batch, attack_on):
    images, labels = batch[0].clone(), batch[1].clone()
    adv = attack_on(net)(images, labels)
    radius = 3 * EPS if attack_on is ATTACKS["nfgsm"] else EPS
    assert (adv - images).abs().max() <= torch.tensor(radius).nextafter(torch.tensor(1.0))
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert adv.dtype == images.dtype
    assert not adv.requires_grad
    assert torch.equal(images, batch[0])
    assert torch.equal(labels, batch[1])


@pytest.mark.parametrize("name", ["fgsm-rs", "nfgsm", "pgd"])
def test_seed_makes_the_start_reproducible(net, batch, name):
    attack = create_attack(name, net, EPS)
    assert torch.equal(attack(*batch, seed=3), attack(*batch, seed=3))
    assert not torch.equal(attack(*batch, seed=3), attack(*batch, seed=4))
    torch.manual_seed(0)
    first = attack(*batch)
    assert not torch.equal(first, attack(*batch))
    torch.manual_seed(0)
    assert torch.equal(first, attack(*batch))


def test_attacks_without_a_random_start_draw_nothing(net, batch):
    state = torch.get_rng_state()
    FGSM(net, EPS)(*batch)
    PGD(net, EPS, EPS, 2, random_start=False)(*batch)
    assert torch.equal(state, torch.get_rng_state())


@every_attack
def test_uint8_images_mean_images_over_255(net, batch, attack_on):
    codes = (batch[0] * 255).round().to(torch.uint8)
    before = codes.clone()
    adv = attack_on(net)(codes, batch[1], seed=1)
    assert adv.dtype == torch.float32
    assert torch.equal(adv, attack_on(net)(codes.float() / 255, batch[1], seed=1))
    assert torch.equal(codes, before)


@every_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caller_may_be_under_no_grad_or_inference_mode(net, batch, attack_on, mode):
    expected = attack_on(net)(*batch, seed=2)
    with mode():
        images, labels = batch[0].clone(), batch[1].clone()  # inference tensors under inference_mode
        adv = attack_on(net)(images, labels, seed=2)
        assert not torch.is_grad_enabled()
    assert torch.equal(adv, expected)
    nn.functional.cross_entropy(net(adv), batch[1]).backward()  # the result is fit for training


def test_images_that_require_grad_get_none(net, batch):
    images = batch[0].clone().requires_grad_()
    adv = PGD(net, EPS, EPS / 4, 2)(images * 1, batch[1])
    assert not adv.requires_grad
    assert images.grad is None


def test_no_gradient_is_lost_in_a_large_half_precision_batch():
    images = torch.full((256, 3, 8, 8), 0.5, dtype=torch.float16)
    labels = torch.zeros(256, dtype=torch.int64)

    def model(x):  # gradients near 4e-7: divided by the batch size they would be zero in float16
        first = 9 + x.mean(dim=(1, 2, 3))
        return torch.stack((first, torch.zeros_like(first)), dim=1)

    assert (FGSM(model, EPS)(images, labels) < images).all()


# The model is left as it was found


def state_of(model):
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [copy.deepcopy(parameter.grad) for parameter in model.parameters()],
        "tensors": [value.clone() for value in model.state_dict().values()],
    }


def assert_same_state(model, before):
    after = state_of(model)
    assert after["training"] == before["training"]
    assert after["requires_grad"] == before["requires_grad"]
    for old, new in zip(before["grad"], after["grad"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    for old, new in zip(before["tensors"], after["tensors"], strict=True):
        assert torch.equal(old, new)


@pytest.fixture
def mixed(net):
    """Modules in different modes, flags of both kinds, gradients on some parameters."""
    net.training, net.norm.training, net.drop.training, net.conv.training = True, True, True, False
    net.conv.bias.requires_grad_(False)
    net.head.weight.grad = torch.randn_like(net.head.weight)
    return net


@every_attack
def test_model_is_left_as_found(mixed, batch, attack_on):
    before = state_of(mixed)
    attack_on(mixed)(*batch)
    assert_same_state(mixed, before)


@every_attack
@pytest.mark.parametrize("failure", ["raises", "returns no logits", "interrupted"])
def test_model_is_left_as_found_when_it_fails(mixed, batch, attack_on, failure):
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) < (3 if isinstance(attack_on(mixed), PGD) else 1):
            return output
        if failure == "raises":
            raise ZeroDivisionError
        if failure == "interrupted":
            raise KeyboardInterrupt
        return output[:, 0]

    mixed.register_forward_hook(hook)
    before = state_of(mixed)
    with pytest.raises((ZeroDivisionError, TypeError, KeyboardInterrupt)):
        attack_on(mixed)(*batch)
    assert_same_state(mixed, before)


@every_attack
def test_model_runs_in_eval_mode_with_frozen_parameters(mixed, batch, attack_on):
    seen = []

    def hook(module, args):
        seen.append(any(m.training for m in mixed.modules()) or any(p.requires_grad for p in mixed.parameters()))

    mixed.register_forward_pre_hook(hook)
    attack_on(mixed)(*batch)
    assert seen
    assert not any(seen)


def test_no_gradient_of_a_parameter_is_computed(net, batch):
    computed = []
    for parameter in net.parameters():
        parameter.register_hook(lambda grad: computed.append(grad))
    PGD(net, EPS, EPS / 4, 2)(*batch)
    assert not computed
    assert all(parameter.grad is None for parameter in net.parameters())


# Refusals


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 4]), ValueError, "below the model's 4 classes, got 4"),
        (torch.tensor([0, 1, 2, 3, 0, -100]), ValueError, "not be negative, got -100"),
        (torch.zeros(5, dtype=torch.int64), ValueError, r"one for each of images \(6, 3, 8, 8\), got \(5,\)"),
        (torch.zeros(6, 1, dtype=torch.int64), ValueError, r"got \(6, 1\)"),
        (torch.zeros(6, dtype=torch.int32), TypeError, "int64 tensor, got torch.int32"),
        ([0] * 6, TypeError, "int64 tensor, got <class 'list'>"),
        (torch.zeros(6, dtype=torch.int64, device="meta"), ValueError, "images' device cpu, got meta"),
    ],
)
def test_bad_labels_are_refused(net, batch, labels, error, message):
    before = state_of(net)
    with pytest.raises(error, match=message):
        PGD(net, EPS, EPS / 4, 2)(batch[0], labels)
    assert_same_state(net, before)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: (x, x), "a tuple of length 2"),
        (lambda x: {"logits": x}, r"a dict with the keys \['logits'\]"),
        (lambda x: x.mean(dim=(1, 2, 3)), r"a float32 tensor of shape \(6,\)"),
        (lambda x: x.flatten(1)[:3], r"a float32 tensor of shape \(3, 192\)"),
        (lambda x: x.flatten(1).argmax(dim=1, keepdim=True), r"a int64 tensor of shape \(6, 1\)"),
        (lambda x: None, "a NoneType"),
    ],
)
def test_output_that_is_not_logits_is_refused_by_what_it_is(batch, output, message):
    with pytest.raises(TypeError, match=message):
        FGSM(output, EPS)(*batch)


def test_output_without_a_gradient_is_refused(net, batch):
    with pytest.raises(RuntimeError, match="under no_grad"):
        FGSM(torch.no_grad()(net.forward), EPS)(*batch)


@pytest.mark.parametrize("images", [torch.zeros(6, 3, dtype=torch.int64), [0.0] * 6])
def test_images_of_another_type_are_refused(net, batch, images):
    with pytest.raises(TypeError, match="images must be a float or uint8 tensor"):
        FGSM(net, EPS)(images, batch[1])


@pytest.mark.parametrize("eps", [8, -0.1, float("nan")])
def test_eps_outside_the_pixel_range_is_refused(net, eps):
    with pytest.raises(ValueError, match=r"the images' scale \[0, 1\]"):
        FGSM(net, eps)


def test_pgd_without_a_step_is_refused(net):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PGD(net, EPS, EPS, 0)


def test_unknown_names_and_settings_are_refused(net):
    with pytest.raises(ValueError, match="there are fgsm, fgsm-rs, nfgsm, pgd"):
        create_attack("pgb", net, EPS)
    with pytest.raises(ValueError, match="the attack fgsm has no setting 'steps'"):
        create_attack("fgsm", net, EPS, steps=7)


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
    assert create_attack("pgd", net, EPS, steps=3, alpha=None).steps == 3
