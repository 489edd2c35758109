"""Every setting acts: a run with one changed setting equals the loop by hand with that change, and no other run."""

import copy
import json
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from families import SHAPE, made
from fitted import loaded_batches
from torch import nn

from fastadv import random_init, sample_seeds
from fastadv.attacks import FGSM
from fastadv.models.added import added_to
from fastadv.training import Monitor, Trainer, run, stages
from fastadv.training.methods import METHODS
from fastadv.training.settings import Settings

EPS, COUNT, CLASSES = 0.1, 24, 3


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return torch.rand(count, 3, 4, 4, dtype=torch.float64, generator=generator), labels


TRAIN, VAL = images(COUNT, 1), images(9, 2)


def network():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


BASE = {"attack": "fgsm", "epochs": 2, "batch_size": 8, "lr": 0.03, "probe": 0}


def trained(changes, parts=(TRAIN,)):
    """(weights, the rows of each part of a batch in the order of the run, the records)."""
    model = network()
    with loaded_batches() as order:
        records = Trainer(model, EPS, measure_backbone=False, progress=False, **BASE | changes).fit(*parts)
    return model.state_dict(), [rows for _, rows in order], records


# ---------------------------------------------------------------------- the loop by hand


def smoothed_losses(logits, labels, smoothing=0.0):
    targets = (1 - smoothing) * F.one_hot(labels, CLASSES) + smoothing / CLASSES
    return -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


def share_of_budget(schedule, share):
    begin, end = {"constant": (-2, -1), "linear": (0, 1)}.get(schedule) or eval(schedule.removeprefix("hinge:"))
    return min(1, max(0, (share - begin) / (end - begin)))


def attacked(model, x, y, seeds, share, attack, alpha=None, noise=None, steps=None):
    if attack is None:
        return x
    steps = (steps or 7) if attack == "pgd" else 1
    alpha = alpha or {"fgsm": EPS, "fgsm-rs": 1.25 * EPS, "pgd": EPS / 4}[attack]
    noise = {"fgsm": 0.0, "fgsm-rs": noise or EPS, "pgd": EPS}[attack]
    eps, alpha, noise = share * EPS, share * alpha, share * noise
    adv = random_init(x, noise, seed=seeds)
    for _ in range(steps):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(smoothed_losses(model(adv), y).sum(), adv)
        adv = torch.min(torch.max(adv.detach() + alpha * grad.sign(), x - eps), x + eps).clamp(0, 1)
    return adv


def parameters_of(model, method, head, lora):
    if method == "full":
        return dict(model.named_parameters())
    trains = {name: p for name, p in model.named_parameters() if name.startswith(f"{head}.")}
    if method == "bias":
        trains |= {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    return trains | {f"{name}.{i}": factor for name, pair in lora.items() for i, factor in enumerate(pair)}


class Lora:
    """A model with scale * B A added to the weights of `targets`; the factors start as peft's do after the seed."""

    def __init__(self, model, targets, rank, alpha, seed):
        torch.manual_seed(seed)
        self.model, self.scale, self.factors = model, alpha / rank, {}
        for name in targets:
            layer = model.get_submodule(name)
            a, b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
            self.factors[name] = [nn.Parameter(each.weight.detach().double()) for each in (a, b)]

    def weight(self, name):
        a, b = self.factors[name]
        return self.model.get_submodule(name).weight + self.scale * b @ a

    def __call__(self, x):
        weights = {f"{name}.weight": self.weight(name) for name in self.factors}
        return torch.func.functional_call(self.model, weights, (x,))


def by_hand(order, **s):
    """The weights after the run of `Settings(**s)`, on the parts of batches in `order`."""
    defaults = {field.name: getattr(Settings().settled({}), field.name) for field in fields(Settings)}
    s = defaults | {"attack": None} | BASE | s
    attack = {name: s[name] for name in ("attack", "alpha", "noise", "steps")}
    model, left, epoch = network(), iter(order), -1
    stages = [("linear", s["lp_ft"], s["lp_ft_lr"])] if s["lp_ft"] else []
    for method, epochs, peak in [*stages, (s["method"], s["epochs"], s["lr"])]:
        lora = Lora(model, (s["lora_targets"] or ()) if method == "lora" else (), s["rank"], s["lora_alpha"], s["seed"])
        trains = parameters_of(model, method, s["head"] or "4", lora.factors)
        # The weights of layers and factors decay; biases and the norm's weight do not.
        decay = [0.0 if name.endswith("bias") or name == "2.weight" else s["weight_decay"] for name in trains]
        groups = [{"params": [p], "weight_decay": d} for p, d in zip(trains.values(), decay, strict=True)]
        adamw = s["optimizer"] == "adamw"
        optimizer = torch.optim.AdamW(groups) if adamw else torch.optim.SGD(groups, 1, momentum=0.9, nesterov=True)
        ema = copy.deepcopy(model.state_dict())
        steps = -(-COUNT // s["batch_size"])
        for step in range(epochs * steps):
            epoch += step % steps == 0
            share = (step - s["warmup"]) / (epochs * steps - s["warmup"])
            factor = (step + 1) / s["warmup"] if step < s["warmup"] else (1 + math.cos(math.pi * share)) / 2
            all_epochs = s["lp_ft"] + s["epochs"]
            budget = share_of_budget(s["eps_schedule"], (epoch + step % steps / steps) / all_epochs)
            parts = [next(left) for _ in range(s["grad_accum_steps"])]
            for part in parts:
                x, y, seeds = TRAIN[0][part], TRAIN[1][part], sample_seeds(s["seed"], part, epoch)
                kept = copy.deepcopy(model.state_dict())
                model.eval()
                adv = attacked(lora, x, y, seeds, budget, **attack)
                model.load_state_dict(kept)
                model.train(method == "full")
                both = torch.cat((adv, x)) if s["clean_weight"] else adv
                losses = smoothed_losses(lora(both), y.repeat(len(both) // len(y)), s["label_smoothing"])
                shares = [1 - s["clean_weight"]] * len(y) + [s["clean_weight"]] * (len(both) - len(y))
                loss = (losses * torch.tensor(shares, dtype=torch.float64)).sum() / sum(map(len, parts))
                for p, grad in zip(trains.values(), torch.autograd.grad(loss, [*trains.values()]), strict=True):
                    p.grad = grad if p.grad is None else p.grad + grad
            norm = torch.cat([p.grad.flatten() for p in trains.values()]).norm()
            for group, p in zip(optimizer.param_groups, trains.values(), strict=True):
                p.grad *= min(1.0, (s["max_grad_norm"] or math.inf) / (norm + 1e-6))
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
            decay = min(s["ema_decay"], (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                ema[name] = decay * ema[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
        with torch.no_grad():
            for name in lora.factors:
                model.get_submodule(name).weight.copy_(lora.weight(name))
        if s["ema_decay"]:
            model.load_state_dict(ema)
    return model.state_dict()


def apart(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# The settings that change the weights: (field, its value, other settings under which it acts).
LORA = {"method": "lora", "lora_targets": ["1"], "rank": 2}
IN_THE_WEIGHTS = [
    ("method", "linear", {}),
    ("method", "bias", {}),
    ("method", "lora", {"lora_targets": ["1"]}),
    ("head", "1", {"method": "linear"}),
    ("lp_ft", 2, {}),
    ("lp_ft_lr", 0.05, {"lp_ft": 1, "warmup": 2}),
    ("rank", 3, LORA),
    ("lora_alpha", 5.0, LORA),
    ("lora_targets", ["1", "4"], LORA | {"head": "4"}),
    ("alpha", 0.06, {}),
    ("alpha", 0.03, {"attack": "pgd"}),
    ("noise", 0.04, {"attack": "fgsm-rs"}),
    ("steps", 5, {"attack": "pgd"}),
    ("eps_schedule", "linear", {"lp_ft": 1}),
    ("eps_schedule", "hinge:0.1,0.7", {}),
    ("eps_schedule", "hinge:0.5,1", {"attack": "pgd", "alpha": 0.03}),
    ("eps_schedule", "linear", {"attack": "fgsm-rs", "noise": 0.04}),
    ("epochs", 3, {}),
    ("batch_size", 12, {}),
    ("grad_accum_steps", 3, {}),
    ("lr", 0.01, {}),
    ("warmup", 2, {}),
    ("optimizer", "sgd", {}),
    ("weight_decay", 0.5, {}),
    ("weight_decay", 0.1, {"optimizer": "sgd"}),
    ("clean_weight", 0.3, {}),
    ("clean_weight", 1.0, {}),
    ("label_smoothing", 0.2, {}),
    ("max_grad_norm", 0.1, {"optimizer": "sgd"}),
    ("ema_decay", 0.7, {}),
    ("seed", 3, {"attack": "fgsm-rs"}),
]


@pytest.mark.filterwarnings("ignore:steps = 1 of alpha")
@pytest.mark.parametrize(("field", "value", "needed"), IN_THE_WEIGHTS)
def test_a_setting_changes_what_it_says_and_nothing_else(field, value, needed):
    weights, order, _ = trained(needed | {field: value})
    torch.testing.assert_close(weights, by_hand(order, **needed | {field: value}), rtol=0, atol=1e-8)
    without, _, _ = trained({} if field == "method" else needed)
    assert apart(weights, without) > 1e-4


@pytest.mark.parametrize("attack", ["fgsm", "fgsm-rs", "pgd", None])
def test_without_changes_it_is_the_loop_by_hand_too(attack):
    weights, order, _ = trained({"attack": attack})
    torch.testing.assert_close(weights, by_hand(order, attack=attack), rtol=0, atol=1e-8)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_each_epoch_has_every_image_once_in_an_order_of_its_own(grad_accum_steps):
    def epochs(**changes):
        return torch.cat(trained({"epochs": 4, "grad_accum_steps": grad_accum_steps, **changes})[1]).reshape(4, COUNT)

    order = epochs()
    assert (order.sort(1)[0] == torch.arange(COUNT)).all()
    assert len({tuple(row) for row in order.tolist()}) == 4
    assert torch.equal(order, epochs(batch_size=5))
    assert not torch.equal(order, epochs(seed=1))


def test_monitor_and_evaluations_have_the_whole_budget_from_the_first_epoch_on():
    def seen(schedule):
        settings = {"eps_schedule": schedule, "lr": 0.0, "probe": COUNT, "epochs": 3, "attack": "pgd"}
        _, _, records = trained(settings, (TRAIN, VAL))
        names = ("probe_pgd", "probe_attack", "robust_accuracy", "train_accuracy")
        return [tuple(record[name] for name in names) for record in records if "epoch" in record]

    whole, growing = seen("constant"), seen("hinge:0.5,1")
    assert [found[:3] for found in whole] == [found[:3] for found in growing]
    assert growing[0][3] > whole[0][3]  # under the schedule the first epoch's steps have no budget


@pytest.mark.parametrize("schedule", ["cosine", "hinge", "hinge:0.5", "hinge:0.7,0.3", "hinge:0,2", "linear:0,1", ""])
def test_a_schedule_that_is_none_is_refused(schedule):
    with pytest.raises(ValueError, match=r"hinge:0.25,0.75"):
        Trainer(network(), EPS, eps_schedule=schedule)


@pytest.mark.parametrize("attack", [None, lambda x, y: x])
def test_a_schedule_needs_an_attack_that_it_changes(attack):
    with pytest.raises(ValueError, match="changes the budget of an attack of fastadv, and"):
        Trainer(network(), EPS, attack=attack, eps_schedule="linear")


# ---------------------------------------------------------------------- settings that do not change the weights


def augment():
    """Each epoch has other crops and flips of the padded image; without augmentation the images are unchanged."""
    side, pad = 16, 2
    x = torch.rand(COUNT, 1, side, side)
    seen = []

    def shown(**changes):
        seen.clear()
        model = nn.Sequential(nn.Flatten(), nn.Linear(side * side, CLASSES))
        settings = BASE | {"attack": lambda x, y: seen.append(x) or x, "batch_size": COUNT, "lr": 0.0} | changes
        Trainer(model, EPS, measure_backbone=False, progress=False, **settings).fit((x, TRAIN[1]))
        return list(seen)

    padded = F.pad(x, (pad,) * 4)
    crops = padded.unfold(2, side, 1).unfold(3, side, 1).reshape(COUNT, -1, side, side)
    crops = torch.cat((crops, crops.flip(3)), 1).transpose(0, 1)  # (crop, image, H, W)
    found = []
    for epoch in shown(augment=True):
        places = [(crops == one).flatten(2).all(2).nonzero().tolist() for one in epoch]
        assert all(len(place) == 1 for place in places)
        found.append({image: crop for ((crop, image),) in places})
    assert len(set(found[0].values())) > COUNT / 2
    assert sum(found[0][image] != found[1][image] for image in range(COUNT)) > COUNT / 2
    assert all((one == x).flatten(1).all(1).any() for one in shown(augment=False)[0])


def compile():
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
        weights, _, _ = trained({"compile": True})
        assert len(compiled) == 4  # the attack, the update, the monitor and the evaluation's attack
        plain, _, _ = trained({"compile": False})
        assert len(compiled) == 4
    torch.testing.assert_close(weights, plain, rtol=0, atol=1e-8)


def eval_every():
    for every, evaluated in ((1, [0, 1, 2, 3]), (3, [2, 3]), (0, [3])):
        _, _, records = trained({"epochs": 4, "eval_every": every}, parts=(TRAIN, VAL))
        assert [r["epoch"] for r in records if "epoch" in r and "robust_accuracy" in r] == evaluated


def probe():
    seen = []

    def noted(model, x, *arguments, **options):
        seen.append(x)
        return Monitor(model, x, *arguments, **options)

    for count in (0, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "Monitor", noted)
            _, _, records = trained({"probe": count})
        assert [len(x) for x in seen] == ([count] if count else [])
        assert all(any(torch.equal(one, image) for image in TRAIN[0]) for x in seen for one in x)
        assert ["probe_pgd" in r for r in records if "epoch" in r] == [bool(count)] * 2


def adapter_reduction():
    for value, width in ((None, 2), (4, 4)):  # the block has 16 channels
        network = made("own resnet")
        trained_on_families(network, method="adapter", adapter_reduction=value)
        assert [added.reduced for _, added in added_to(network)] == [width // 2, width]


def prompt_tokens():
    for value, count in ((None, 10), (3, 3)):
        network = made("hf vit")
        trained_on_families(network, method="prompt", prompt_tokens=value)
        assert [len(added.tokens) for _, added in added_to(network)] == [count, count]


def trained_on_families(network, **settings):
    options = {"epochs": 1, "batch_size": 3, "probe": 0, "measure_backbone": False, "progress": False, "device": "cpu"}
    Trainer(network, 0.01, **options, **settings).fit((torch.rand(3, *SHAPE), torch.arange(3)))


def fresh_images(attack="stale", **changes):
    """How many images FGSM attacks in each epoch."""
    seen, call = [], FGSM.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FGSM, "__call__", lambda self, x, y, **more: seen.append(len(y)) or call(self, x, y, **more))
        finish = stages.StageRun._finish_epoch
        patch.setattr(stages.StageRun, "_finish_epoch", lambda self: seen.append(None) or finish(self))
        trained({"attack": attack, "epochs": 3, **changes})
    ends = [i for i, count in enumerate(seen) if count is None]
    return [sum(seen[i + 1 : j]) for i, j in zip([-1, *ends], ends, strict=False)]


def refresh():
    """Image i where (i + epoch) mod K is 0, and all in the first epoch."""
    for value, counts in ((None, [0, 0, 0]), (1, [24, 24, 24]), (3, [24, 8, 8]), (7, [24, 3, 3]), (99, [24, 0, 0])):
        assert fresh_images(refresh=value) == counts
    for value, counts in ((None, [24, 6, 6]), (1, [24, 24, 24]), (3, [24, 8, 8]), (99, [24, 0, 0])):
        assert fresh_images("cached", refresh=value, method="linear") == counts


def price():
    """A step of full fine-tuning costs 3 forward passes, and FGSM 2 more, which gives the share of fresh images."""
    for value, method, share in ((1.0, "full", 0), (1.25, "full", 0.375), (5 / 3, "full", 1), (1.5, "bias", 0.5)):
        assert fresh_images(price=value, method=method) == [round(share * COUNT)] * 3
    assert fresh_images(price=2.5, method="linear") == [COUNT // 4] * 3
    assert fresh_images(price=2.25, clean_weight=0.5) == [9] * 3


ELSEWHERE = {each.__name__: each for each in (augment, compile, eval_every, probe)}
ELSEWHERE |= {each.__name__: each for each in (adapter_reduction, prompt_tokens, refresh, price)}


@pytest.mark.parametrize("field", ELSEWHERE)
def test_a_setting_that_shows_elsewhere_acts_there(field):
    ELSEWHERE[field]()


def test_checkpoint_s_is_the_time_between_two_checkpoints(tmp_path):
    for seconds, count in ((0.0, 2 * COUNT // 8), (1e9, 0)):
        saved, save = [], run.Checkpoints.save
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Checkpoints, "save", lambda *a, save=save, saved=saved: saved.append(None) or save(*a))
            trained({"checkpoint_s": seconds, "folder": tmp_path / str(count)})
        # At the begin and end of the stage, before and after the evaluation of each of two epochs, and at the end.
        always = 7
        assert len(saved) == count + always


IN_TEST_FAST = {"quantile", "penalty", "repeats"}  # test_fast.py has loops by hand for their methods
IN_TEST_TRAINER = {"precision", "channels_last", "on_catastrophic_overfitting", "switch_to"}


def test_no_setting_is_left_out():
    tried = (
        IN_TEST_FAST | IN_TEST_TRAINER | {field for field, _, _ in IN_THE_WEIGHTS} | ELSEWHERE.keys() | {"checkpoint_s"}
    )
    assert tried == {field.name for field in fields(Settings)}


# ---------------------------------------------------------------------- the method's own learning rate


def test_a_method_has_a_learning_rate_of_its_own():
    own = {"linear": 1e-2, "bias": 3e-3}
    for method in METHODS:
        assert Settings(method=method).lr == own.get(method, 1e-3)
        assert Settings(method=method, lr=0.5).lr == 0.5
        assert Settings(method=method, lr=0).lr == 0


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-3), ("linear", 1e-2), ("bias", 3e-3)])
def test_a_run_takes_the_rate_of_its_method_and_tells_it(method, rate, tmp_path):
    options = {"method": method, "epochs": 1, "batch_size": COUNT, "probe": 0, "measure_backbone": False, "lp_ft": 0}
    trainer = Trainer(network(), EPS, progress=False, folder=tmp_path, **options)
    assert trainer.settings.lr == rate
    rates = [record["lr"] for record in trainer.fit(TRAIN) if "lr" in record]
    assert rates == [rate]  # the only step has the peak rate
    (manifest, *_) = sorted((tmp_path / "state").glob("*.json"))
    assert json.loads(json.loads(manifest.read_text().partition("\n")[2])["run"])["lr"] == str(rate)


def test_a_run_that_was_begun_with_a_number_goes_on_with_it_alone(tmp_path):
    def go_on(**lr):
        options = {"method": "linear", "epochs": 1, "probe": 0, "measure_backbone": False, "progress": False}
        return Trainer(network(), EPS, folder=tmp_path, resume=True, **options, **lr).fit(TRAIN)

    before = go_on(lr=1e-3)
    assert go_on(lr=1e-3)[-1]["final"] == before[-1]["final"]
    with pytest.raises(ValueError, match=r"differs in lr \(0.001 there, 0.01 here\)"):
        go_on()
