"""The training loop: seeds, the choice of the final weights, reactions to overfitting, refusals."""

import copy
import json
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors.torch
import torch
import torchattacks
from fitted import changed, colours, copied, loaded_batches, same, timeless
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastadv import data, sample_seeds, to_float
from fastadv.attacks import FGSM, NFGSM, PGD, PGDL2, Normalized, create_attack
from fastadv.evaluation import evaluate, robust_accuracy
from fastadv.models import find_head, networks
from fastadv.training import Trainer, judge, run, stages, updates
from fastadv.training.augment import Augment
from fastadv.training.batches import AUGMENTING, Batches
from fastadv.training.monitor import Reading
from fastadv.training.step import TrainStep

EPS = 16 / 255


TRAIN, VAL, TEST = colours(50, 1), colours(20, 2), colours(21, 3)


def conv(batch_norm=True):
    """A network with a 1x1 convolution for LoRA, batch-norm and no dropout."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
    layers = [nn.Conv2d(3, 8, 3, 2, 1), norm, nn.SiLU(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 3))


def fit(model, *, parts=(TRAIN, VAL), **changes):
    settings = {"epochs": 2, "batch_size": 10, "lr": 1e-2, "probe": 0, "measure_backbone": False, "progress": False}
    options = settings | changes
    return Trainer(model, options.pop("eps", EPS), **options).fit(*parts)


@pytest.fixture
def after_steps(monkeypatch):
    """(states, watch): after `watch(model)` the list `states` gets the model's weights after each step."""
    states, watched, apply = [], [], TrainStep.apply

    def noted(step):
        apply(step)
        states.append(copied(watched[0]))

    monkeypatch.setattr(TrainStep, "apply", noted)
    return states, watched.append


# ---------------------------------------------------------------------- seeds


@pytest.mark.parametrize(("batch_size", "grad_accum_steps"), [(50, 1), (10, 1), (10, 3), (7, 2)])
def test_a_sample_is_attacked_alike_whatever_its_batch(batch_size, grad_accum_steps):
    """A sample's random start depends only on the run's seed, the sample's number and the epoch."""
    model = conv()
    reference = copy.deepcopy(model).eval()
    shown, order = [], []
    hook = model.register_forward_hook(lambda module, args, _: shown.append((module.training, args[0].clone())))
    looks = TrainStep._is_as_in_eval_mode

    def looked(self, images):  # once, by passes of its own
        count = len(shown)
        result = looks(self, images)
        del shown[count:]
        return result

    batch_of = Batches.load

    def noted(self, part, *at):
        if not order:
            shown.clear()  # without the passes that looked for the head
        order.append(part)
        return batch_of(self, part, *at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "load", noted)
        patch.setattr(TrainStep, "_is_as_in_eval_mode", looked)
        options = {"batch_size": batch_size, "grad_accum_steps": grad_accum_steps}
        options |= {"lr": 0.0, "method": "bias", "seed": 5}
        fit(model, attack="fgsm-rs", parts=(TRAIN,), **options)
    hook.remove()
    assert torch.cat(order).sort()[0].tolist() == sorted([*range(50), *range(50)])
    # Every second pass is an update's.
    updates = [x for _, x in shown][1 : 2 * len(order) : 2]
    for number, (index, x) in enumerate(zip(order, updates, strict=True)):
        epoch = 2 * number // len(order)
        images, labels = to_float(TRAIN[0][index]), TRAIN[1][index]
        seeds = sample_seeds(5, index, epoch)
        expected = FGSM(reference, EPS, alpha=1.25 * EPS, noise=None)(images, labels, seed=seeds)
        # A gradient that is nearly zero may have another sign in another batch.
        assert ((x - expected).abs() > 1e-6).float().mean() < 0.01
        assert (x - images).abs().max() > 0.5 * EPS


def test_the_seed_reaches_what_an_attack_draws():
    def draws(seed):
        drawn = []
        fit(conv(), attack=lambda x, y: drawn.append(torch.rand(()).item()) or x, epochs=1, seed=seed)
        return drawn

    assert draws(1) == draws(1)
    assert not set(draws(1)) & set(draws(2))


def test_same_seed_same_bits_and_the_callers_generator_untouched():
    def weights(seed, callers):
        torch.manual_seed(0)
        model = networks.conv((3, 32, 32), 3)  # with dropout; random starts and the order of the images are random too
        torch.manual_seed(callers)
        state = torch.get_rng_state()
        fit(model, attack="fgsm-rs", epochs=1, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return copied(model)

    first = weights(1, 7)
    assert same(first, weights(1, 99))
    assert not same(first, weights(2, 7))


# ---------------------------------------------------------------------- what trains


METHODS = {
    "full": {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "6.weight", "6.bias"},
    "linear": {"6.weight", "6.bias"},
    "bias": {"0.bias", "1.bias", "3.bias", "6.weight", "6.bias"},
    "lora": {"3.weight", "6.weight", "6.bias"},
}
RANK = {"lora": {"rank": 2}}
STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize("method", METHODS)
def test_after_ten_steps_what_should_train_has_changed_and_no_other_bit(method):
    model = conv()
    model[2].eval()
    before, modes = copied(model), [module.training for module in model.modules()]
    records = fit(model, method=method, **RANK.get(method, {}))
    assert changed(model, before) == METHODS[method] | (STATISTICS if method == "full" else set())
    assert [record["lr"] for record in records if "lr" in record][-1] > 0
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_lora_is_validated_with_the_weights_that_the_trained_model_will_have():
    """To the bit: with the factors beside the weights the logits would differ by rounding."""
    model, seen = conv(), []

    def evaluating(x, y):
        seen.append((x, model(x)))
        return (x + EPS).clamp(0, 1)

    fit(model, method="lora", **RANK["lora"], epochs=1, eval_attack=evaluating)
    x, logits = seen[0]
    model.eval()
    assert torch.equal(logits, model(x))


@pytest.mark.parametrize("method", ["full", "bias", "lora"])
def test_lp_ft_trains_the_head_first_and_the_method_begins_with_it(method, after_steps):
    states, watch = after_steps
    model = conv()
    watch(model)
    before = copied(model)
    records = fit(model, method=method, **RANK.get(method, {}), lp_ft=2, epochs=2, parts=(TRAIN,))
    assert len(states) == 20
    first, second = states[9], states[10]
    assert {name for name in first if not torch.equal(first[name], before[name])} == METHODS["linear"]
    moved = (second["6.weight"] - first["6.weight"]).abs().max()
    assert 0 < moved < 0.011  # one step of AdamW at lr 0.01
    assert changed(model, before) == METHODS[method] | (STATISTICS if method == "full" else set())
    assert [record["method"] for record in records if "stage" in record] == ["linear", method]
    assert [record["epoch"] for record in records if "epoch" in record] == [0, 1, 2, 3]


def test_a_last_batch_of_one_image_does_not_reach_batch_norm():
    """Eleven images in batches of ten are cut into 6 and 5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    seen = []
    model[2].register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])) if layer.training else None)
    fit(model, epochs=1, parts=((TRAIN[0][:11], TRAIN[1][:11]), VAL))
    assert seen == [6, 5]


# ---------------------------------------------------------------------- the choice of the final weights


@pytest.fixture
def scripted(monkeypatch):
    """`scripted((clean, robust), ...)` sets the results of the evaluations, and returns a list of their attacks."""

    def script(*found):
        attacks, left = [], iter(found)

        def measure(model, batch, attack, **options):
            attacks.append(attack)
            assert batch[0] is VAL[0]
            assert batch[1] is VAL[1]
            return dict(zip(("clean_accuracy", "robust_accuracy"), next(left), strict=True))

        monkeypatch.setattr(judge, "robust_accuracy", measure)
        return attacks

    return script


CHOICES = [
    ("fgsm", [(1, 0.2), (0.6, 0.6), (1, 0.5), (1, 0.1)], 1),
    ("fgsm", [(0.8, 0.3), (0.9, 0.3), (0.7, 0.3), (1, 0.2)], 1),  # robust accuracy is equal: clean accuracy decides
    ("fgsm", [(0.9, 0.3), (0.9, 0.3), (0.8, 0.3), (1, 0.2)], 1),  # both are equal: the later epoch is chosen
    ("fgsm", [(0.5, 0), (0.7, 0), (0.8, 0), (0.9, 0)], 3),
    (None, [(0.5, 0.3), (0.8, 0.2), (0.9, 0.1), (0.7, 0.4)], 2),
    (None, [(0.9, 0.3), (0.8, 0.5), (0.9, 0), (0.7, 0.4)], 2),
]


@pytest.mark.parametrize(("attack", "found", "best"), CHOICES)
def test_the_weights_are_those_that_were_best_under_the_evaluation_attack(attack, found, best, scripted, after_steps):
    states, watch = after_steps
    model, attacks = conv(), scripted(*found)
    watch(model)
    records = fit(model, attack=attack, epochs=4, parts=(TRAIN, VAL, TEST))
    assert same(copied(model), states[5 * best + 4])
    assert records[-1]["best_epoch"] == best
    assert records[-1]["chosen_by"] == ("robust_accuracy" if attack else "clean_accuracy")
    assert all(type(attack) is PGD and attack.steps == 10 for attack in attacks)


def test_the_final_figures_are_those_of_the_evaluation_s_attack_and_of_pma_on_what_it_leaves():
    model = conv()
    final = fit(model, epochs=3, eps=0.1, parts=(TRAIN, VAL, TEST), seed=4)[-1]
    attacks = [create_attack(name, model, 0.1) for name in ("pgd-10", "pma")]
    alone = [result["fooled"] for result in evaluate(model, TEST, attacks, ensemble=False, seed=4)["attacks"]]
    images, labels = to_float(TEST[0]), TEST[1]
    right = (model.eval()(images).argmax(1) == labels).tolist()
    assert final["clean_accuracy"] == sum(right) / 21
    assert final["robust_accuracy"] == sum(r and not p for r, p in zip(right, alone[0], strict=True)) / 21
    assert final["pma_accuracy"] == sum(r and not (p or q) for r, p, q in zip(right, *alone, strict=True)) / 21


def test_the_log_is_the_records_and_agrees_with_a_new_evaluation(tmp_path):
    model = conv()
    records = fit(model, epochs=3, eval_every=2, seed=5, folder=tmp_path, parts=(TRAIN, VAL, TEST))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == records
    count = sum(parameter.numel() for parameter in model.parameters())
    assert lines.pop(0) == {"stage": 0, "method": "full", "trainable": count, "total": count}
    assert [line.get("epoch") for line in lines] == [0, 1, 2, None]
    assert ["robust_accuracy" in line for line in lines] == [False, True, True, True]
    for line in lines[:-1]:
        assert {"loss", "train_accuracy", "lr", "train_s"} <= line.keys()
    again = robust_accuracy(model, TEST, PGD(model, EPS, EPS / 4, 10), seed=5)
    assert again == {key: lines[-1][key] for key in again}


def test_the_final_record_says_which_epochs_chance_alone_may_have_told_from_the_best(scripted):
    shares = [0.05, 0.6, 0.9, 0.85, 0.7]
    scripted(*((1, share) for share in shares))
    final = fit(conv(), epochs=5, parts=(TRAIN, VAL, TEST))[-1]
    count = len(VAL[0])
    middle = (0.9 * count + 2) / (count + 4)  # Agresti and Coull 1998
    assert final["noise"] == pytest.approx(2 * (middle * (1 - middle) / (count + 4)) ** 0.5)
    assert final["within_noise"] == [epoch for epoch in (0, 1, 3, 4) if shares[epoch] >= 0.9 - final["noise"]] == [3]
    scripted((0.7, 0), (0.1, 0))
    assert fit(conv(), attack=None, parts=(TRAIN, VAL, TEST))[-1]["within_noise"] == []
    assert "noise" not in fit(conv(), parts=(TRAIN,))[-1]


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.float32, r"above 0\.0039 .* divided by 255 twice"), (torch.uint8, "are these of 0 and 1")],
)
def test_training_images_without_a_bright_pixel_are_told(dtype, said):
    images, labels = colours(24, seed=1)
    dark = images / 255**2 if dtype == torch.float32 else (images > 127).to(dtype)
    with pytest.warns(UserWarning, match=said) as caught:
        fit(conv(), epochs=1, parts=((dark, labels),))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("part", ["val", "test"])
def test_labels_that_no_training_image_has_are_told(part):
    (images, labels), known = TRAIN, TRAIN[1] != 1
    held_out = {"val": VAL, "test": TEST}
    count, whole = (held_out[part][1] == 1).sum(), len(held_out[part][1])
    other = {name: tuple(t[pair[1] != 1] for t in pair) for name, pair in held_out.items() if name != part}
    words = f"no training image has the label 1 of {count} of the {whole} images of {part}, which"
    with pytest.warns(UserWarning, match=words) as caught:
        fit(conv(), epochs=1, parts=((images[known], labels[known]), *(held_out | other).values()))
    told = [warning for warning in caught if "no training image" in str(warning.message)]
    assert [warning.filename for warning in told] == [__file__]


class TwoHeads(nn.Module):
    """In train mode it has an auxiliary classifier, as GoogLeNet has, and a block that it leaves out at random."""

    def __init__(self, auxiliary, block):
        super().__init__()
        self.body, self.head = conv()[:-1], nn.Linear(128, 3)
        self.auxiliary = nn.Linear(128, 3) if auxiliary else None
        self.block = nn.Linear(128, 128) if block else None
        self.token = nn.Parameter(torch.zeros(2))  # for masked patches, which there are none of

    def forward(self, x):
        x = self.body(x)
        if self.block is not None and torch.rand(()) < 0.5:
            x = x + self.block(x)
        other = {} if self.auxiliary is None or not self.training else {"auxiliary": self.auxiliary(x)}
        return {"logits": self.head(x), **other}


@pytest.mark.parametrize(("auxiliary", "block"), [(True, False), (True, True), (False, True)])
def test_what_is_to_train_and_gets_no_gradient_is_told(auxiliary, block, recwarn):
    model = TwoHeads(auxiliary, block)
    before = copied(model)
    fit(model, batch_size=5)
    moved = changed(model, before)
    still, total = (sum(p.numel() for n, p in model.named_parameters() if n not in left) for left in (moved, ()))
    words = f"{still} of the {total:,} numbers that train got no gradient"
    told = [str(warning.message).startswith(words) for warning in recwarn if "no gradient" in str(warning.message)]
    assert told == ([True] if auxiliary else [])


@pytest.mark.parametrize("attack", ["pgdl2", "object"])
def test_training_with_an_l2_attack_is_refused(attack):
    model = conv()
    attack = PGDL2(model, 0.5) if attack == "object" else attack
    with pytest.raises(ValueError, match=r"training with an L2 attack .* not possible yet.* such as fgsm or pgd"):
        fit(model, attack=attack)
    with pytest.warns(UserWarning, match="eval_attack has eps 0.5 in L2, and the training has 0.0627451 in L-inf"):
        fit(model, epochs=1, eval_attack=PGDL2(model, 0.5))


@pytest.mark.filterwarnings("ignore:eval_attack goes up to")
def test_the_training_attack_never_chooses(after_steps):
    """Later epochs are worse under the evaluation's attack and better under the training attack."""
    states, watch = after_steps
    model = conv()
    watch(model)
    epochs = iter(range(100))

    def evaluating(x, y):  # from the second epoch on it inverts the images
        return x if next(epochs) == 0 else 1 - x

    records = fit(model, epochs=3, attack="fgsm", eval_attack=evaluating)
    epochs_of = [record for record in records if "epoch" in record]
    assert epochs_of[0]["robust_accuracy"] > max(record["robust_accuracy"] for record in epochs_of[1:])
    assert epochs_of[2]["train_accuracy"] > epochs_of[0]["train_accuracy"]
    assert same(copied(model), states[4])


def test_without_validation_images_the_last_weights_are_taken(after_steps):
    states, watch = after_steps
    model = conv()
    watch(model)
    records = fit(model, parts=(TRAIN,))
    assert same(copied(model), states[-1])
    assert records[-1]["best_epoch"] is None
    assert "robust_accuracy" not in records[-1]


# ---------------------------------------------------------------------- reactions to overfitting


@pytest.fixture
def alarms(monkeypatch):
    """`alarms(2)` sets a monitor with an alarm at its third check, and returns a list of its attack at each check.

    probes: accuracy under PGD at each check; 0.5 if not given.
    """

    def script(*numbers, probes=()):
        seen = []

        class Scripted:
            def __init__(self, model, images, labels, attack, eps, **options):
                self.attack, self.best = attack, None

            def check(self):
                alarm = "it burns" if len(seen) in numbers else None
                pgd = probes[len(seen)] if probes else 0.5
                seen.append(self.attack)
                if alarm is None:
                    self.best = max(pgd, self.best or 0)
                return Reading(pgd, 0.5, 0.5 - pgd, 1.0, 0.0, alarm)

            def state(self):
                return {"best": self.best, "best_gap": 0.0}

            def load(self, state):
                self.best = state["best"]

        monkeypatch.setattr(stages, "Monitor", Scripted)
        return seen

    return script


def actions(records):
    return [record.get("action") for record in records if "epoch" in record]


def learning_rates(records):
    return [record["lr"] for record in records if "epoch" in record]


OPTIONS = {"probe": 8, "epochs": 4, "parts": (TRAIN,), "attack": "fgsm-rs"}


def test_a_warning_changes_nothing(alarms):
    quiet, warned = conv(), conv()
    alarms()
    fit(quiet, **OPTIONS)
    alarms(1)
    with pytest.warns(UserWarning, match=r"epoch 2: it burns \(warn\)"):
        records = fit(warned, **OPTIONS)
    assert same(copied(quiet), copied(warned))
    assert actions(records) == [None, "warn", None, None]


def test_stopping_leaves_the_last_good_weights(alarms, after_steps):
    (states, watch), model = after_steps, conv()
    watch(model)
    alarms(2)
    with pytest.warns(UserWarning, match="it burns"):
        records = fit(model, on_catastrophic_overfitting="stop", **OPTIONS)
    assert len(states) == 15
    assert same(copied(model), states[9])
    assert actions(records) == [None, None, "stop"]
    assert records[-1]["final"]
    assert records[-1]["epochs"] == 3


@pytest.mark.parametrize(("probes", "best"), [([0.5, 0.6, 0.4], 1), ([0.5, 0.4, 0.5], 2), ([0.6, 0.5, 0.4], 0)])
def test_an_answer_goes_to_the_weights_of_the_best_probe(probes, best, alarms, after_steps, before_steps, tmp_path):
    """So it is after a resumption too. Weights with a worse probe are not restored, even if they had no alarm."""
    (states, watch), model = after_steps, conv()
    (found, watch_before) = before_steps
    watch(model)
    watch_before(model)
    probes = [*probes, 0.3, 0.5]
    alarms(3, probes=probes)
    with pytest.warns(UserWarning, match="it burns"):
        fit(model, on_catastrophic_overfitting="rollback", **OPTIONS | {"epochs": 5})
    good = states[5 * best + 4]
    assert same(found[20], good)
    cut = conv()
    alarms(probes=probes)
    with pytest.MonkeyPatch.context() as patch:
        watch = stages.StageRun._watch
        patch.setattr(stages.StageRun, "_watch", lambda stage: cut_at(stage, 3) or watch(stage))
        with pytest.raises(RuntimeError, match="cut"):
            fit(cut, on_catastrophic_overfitting="rollback", folder=tmp_path, **OPTIONS | {"epochs": 5})
    found.clear()
    resumed = conv()
    watch_before.__self__[0] = resumed
    alarms(0, probes=probes[3:])
    with pytest.warns(UserWarning, match="it burns"):
        fit(resumed, on_catastrophic_overfitting="rollback", folder=tmp_path, resume=True, **OPTIONS | {"epochs": 5})
    assert same(found[0], good)


def cut_at(stage, epoch):
    if stage.run.at.epoch == epoch + 1:
        raise RuntimeError("cut")


def test_an_alarm_in_the_linear_stage_of_lp_ft_ends_only_that_stage(alarms, tmp_path):
    alarms(1)
    options = OPTIONS | {"lp_ft": 4, "epochs": 2, "folder": tmp_path, "resume": True}
    options["on_catastrophic_overfitting"] = "stop"
    with pytest.warns(UserWarning, match=r"it burns \(stop\)"):
        records = fit(conv(), **options)
    assert [record["method"] for record in records if "stage" in record] == ["linear", "full"]
    assert actions(records) == [None, "stop", None, None]
    assert fit(conv(), **options) == records  # a resumed run has the same records


def test_stopping_with_validation_images_leaves_the_best_weights(alarms, after_steps, monkeypatch):
    (states, watch), model, scores = after_steps, conv(), iter([0.6, 0.5, 0.4, 0.0])
    watch(model)
    alarms(2)
    scripted = {"clean_accuracy": 1.0}
    monkeypatch.setattr(judge, "robust_accuracy", lambda *_, **__: scripted | {"robust_accuracy": next(scores)})
    with pytest.warns(UserWarning, match="it burns"):
        fit(model, on_catastrophic_overfitting="stop", **OPTIONS | {"parts": (TRAIN, VAL)})
    assert same(copied(model), states[4])


@pytest.fixture
def before_steps(monkeypatch):
    """(states, watch): after `watch(model)` the list `states` gets the model's weights before each step."""
    states, watched, batch = [], [], updates.Updates.take

    def noted(run, *arguments):
        states.append(copied(watched[0]))
        return batch(run, *arguments)

    monkeypatch.setattr(updates.Updates, "take", noted)
    return states, watched.append


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_an_alarm_before_any_good_reading_says_that_the_model_is_untrained(alarms, action):
    model = conv()
    before = copied(model)
    alarms(0)
    with pytest.warns(UserWarning, match="epoch 1: no earlier reading of this stage was without an alarm") as warned:
        fit(model, on_catastrophic_overfitting=action, **OPTIONS)
    assert sum("no earlier reading" in str(each.message) for each in warned) == 1
    assert same(copied(model), before) == (action == "stop")


def test_rollback_goes_to_the_last_good_weights_and_halves_the_learning_rate(alarms, before_steps):
    (states, watch), model = before_steps, conv()
    watch(model)
    alarms(1, 2)
    with pytest.warns(UserWarning, match=r"it burns \(rollback\)"):
        records = fit(model, on_catastrophic_overfitting="rollback", **OPTIONS)
    good = states[5]  # after the first epoch
    assert same(states[10], good)
    assert same(states[15], good)
    assert not same(states[11], good)
    assert actions(records) == [None, "rollback", "rollback", None]
    alarms()
    undisturbed = learning_rates(fit(conv(), **OPTIONS))
    expected = [rate * factor for rate, factor in zip(undisturbed, (1, 1, 0.5, 0.25), strict=True)]
    assert learning_rates(records) == pytest.approx(expected, rel=1e-12)


def test_after_a_rollback_the_average_begins_again(alarms, after_steps, before_steps):
    """It soon forgets the weights that it begins with, as at the start: the decay at step t is (1 + t) / (10 + t)."""
    (states, watch), (before, watch_before), model = after_steps, before_steps, conv()
    watch(model)
    watch_before(model)
    alarms(1)
    with pytest.warns(UserWarning, match=r"it burns \(rollback\)"):
        fit(
            model,
            on_catastrophic_overfitting="rollback",
            **OPTIONS | {"ema_decay": 0.9999, "epochs": 3, "parts": (TRAIN,)},
        )
    average = before[10]
    for step, state in enumerate(states[10:]):
        decay = (1 + step) / (10 + step)
        average = {
            name: decay * value + (1 - decay) * state[name] if value.is_floating_point() else state[name]
            for name, value in average.items()
        }
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [EPS, 0.9 * EPS])
def test_an_attack_of_a_larger_budget_than_the_training_s_is_told(eps, recwarn):
    model = conv()
    Trainer(model, eps, attack=FGSM(model, EPS))
    told = [str(each.message) for each in recwarn]
    assert any("is larger than that of the training" in words for words in told) == (eps < EPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"switch_to": "nfgsm"}, "switch_to belongs to on_catastrophic_overfitting='switch'"),
        ({"lp_ft_lr": 0.3}, "lp_ft_lr is the learning rate of lp_ft, and lp_ft=0"),
        ({"rank": 4}, "rank belongs to the method lora, and the method is full"),
        ({"lora_alpha": 4.0, "method": "linear"}, "lora_alpha belongs to the method lora, and the method is linear"),
        ({"attack": None, "on_catastrophic_overfitting": "stop"}, "training on clean images has no attack"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Trainer(conv(), EPS, **options)


def test_rollback_in_the_first_epoch_goes_to_the_beginning(alarms, before_steps):
    (states, watch), model = before_steps, conv()
    watch(model)
    alarms(0)
    with pytest.warns(UserWarning, match="it burns"):
        fit(model, on_catastrophic_overfitting="rollback", **OPTIONS)
    assert same(states[5], states[0])


@pytest.mark.parametrize("given", [None, 0.1])
def test_a_switch_leaves_the_label_smoothing_that_was_not_given(given, alarms, monkeypatch):
    used, gradients = [], TrainStep.gradients
    noted = lambda step, *a, **k: (used.append(step.label_smoothing), gradients(step, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(TrainStep, "gradients", noted)
    alarms(0)
    changes = {"attack": "liet", "label_smoothing": given, "epochs": 2, "probe": 4}
    with pytest.warns(UserWarning, match="it burns"):
        fit(conv(), on_catastrophic_overfitting="switch", **changes)
    assert used == [0.6 if given is None else given] * 5 + [given or 0.0] * 5


@pytest.mark.filterwarnings("ignore:steps = 1 of alpha")
@pytest.mark.parametrize(("name", "kind"), [("pgd", PGD), ("nfgsm", NFGSM)])
def test_switching_goes_to_the_last_good_weights_and_another_attack(name, kind, alarms, before_steps, monkeypatch):
    (states, watch), model, used = before_steps, conv(), []
    watch(model)
    gradients = TrainStep.gradients
    monkeypatch.setattr(
        TrainStep, "gradients", lambda step, *a, **k: (used.append(step.attack), gradients(step, *a, **k))[1]
    )
    watching = alarms(1, 3)
    with pytest.warns(UserWarning, match="it burns"):
        records = fit(model, on_catastrophic_overfitting="switch", switch_to=name, alpha=0.01, **OPTIONS)
    assert same(states[10], states[5])
    assert [type(attack) for attack in used] == [FGSM] * 10 + [kind] * 10
    assert (used[0].alpha, used[0].noise) == (0.01, EPS)
    assert used[-1].eps == EPS
    assert (used[-1].alpha, used[-1].steps) == ((EPS / 4, 7) if name == "pgd" else (None, 1))
    assert [type(attack) for attack in watching] == [FGSM] * 2 + [kind] * 2
    assert actions(records) == [None, "switch", None, "warn"]  # a run switches only once
    steps = torch.tensor([4, 9, 4, 9])  # the last step of each epoch; the schedule has 20 steps, then the 10 left
    expected = 1e-2 * (1 + torch.cos(torch.pi * steps / torch.tensor([20, 20, 10, 10]))) / 2
    assert learning_rates(records) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_resumed_run_knows_that_it_switched(alarms, tmp_path):
    def train(folder, cut=None):
        model = conv()
        alarms(1)
        batch, count = updates.Updates.take, iter(range(100))

        def failing(self, *arguments):
            if next(count) == cut:
                raise RuntimeError("cut")
            return batch(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(updates.Updates, "take", failing)
            fit(model, on_catastrophic_overfitting="switch", ema_decay=0.9, folder=folder, resume=True, **OPTIONS)
        return model

    with pytest.warns(UserWarning, match="it burns"):
        whole = train(tmp_path / "whole")
    with pytest.warns(UserWarning, match="it burns"), pytest.raises(RuntimeError, match="cut"):
        train(tmp_path / "cut", cut=17)
    alarms()
    resumed = conv()
    fit(resumed, on_catastrophic_overfitting="switch", ema_decay=0.9, folder=tmp_path / "cut", resume=True, **OPTIONS)
    assert same(copied(whole), copied(resumed))


def test_a_run_cut_in_its_final_evaluation_can_be_resumed_twice(tmp_path, monkeypatch):
    models = [conv(), conv(), conv()]

    def failing(*arguments, **options):
        raise RuntimeError("cut")

    options = {"folder": tmp_path, "resume": True, "parts": (TRAIN, None, TEST)}
    monkeypatch.setattr(judge, "evaluate", failing)
    with pytest.raises(RuntimeError, match="cut"):
        fit(models[0], **options)
    monkeypatch.setattr(judge, "evaluate", evaluate)
    first, second = (fit(model, **options) for model in models[1:])
    assert first == second
    assert all(same(copied(models[0]), copied(model)) for model in models[1:])


# ---------------------------------------------------------------------- robustness, and overfitting itself


EPOCHS = 40


def digits(classes, **changes):
    dataset = data.load("digits", classes=classes)
    torch.manual_seed(0)
    model = networks.mlp(dataset.shape, len(classes))
    return model, dataset, {"optimizer": "adamw", "lr": 2e-3, "batch_size": 64, "probe": 256, **changes}


@pytest.mark.parametrize("attack", ["nfgsm", "object", None])
def test_training_under_attack_makes_robust_and_without_does_not(attack):
    model, dataset, settings = digits(range(5), eps=0.15, epochs=6, probe=0, eval_every=0)
    settings["attack"] = FGSM(model, 0.15) if attack == "object" else attack
    final = fit(model, parts=(dataset.train, dataset.test), **settings)[-1]
    assert final["clean_accuracy"] > 0.9
    assert final["robust_accuracy"] > 0.6 if attack else final["robust_accuracy"] < 0.45


def trained(model, dataset, **settings):
    """(the records of the epochs, the accuracy of the last weights on the test images under PGD-10)."""
    eps = settings["eps"]
    records = fit(model, parts=(dataset.train,), **settings)
    robust = robust_accuracy(model, dataset.test, PGD(model, eps, eps / 4, 10))["robust_accuracy"]
    return [record for record in records if "epoch" in record], robust


@pytest.fixture(scope="module")
def by_answer():
    """{attack or reaction: (records, robust accuracy)} on digits 0-4 from scratch, at an eps at which FGSM overfits."""
    runs = {"pgd": {"attack": "pgd"}, "fgsm": {}}
    runs |= {answer: {"on_catastrophic_overfitting": answer} for answer in ("stop", "rollback", "switch")}
    found = {}
    for name, changes in runs.items():
        model, dataset, settings = digits(range(5), eps=0.3, epochs=EPOCHS, attack="fgsm")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = trained(model, dataset, **settings | changes)
    return found


def first_alarm(records):
    return next(record["epoch"] for record in records if record.get("alarm"))


def test_fgsm_from_scratch_overfits_and_the_alarm_tells(by_answer):
    records, robust = by_answer["fgsm"]
    assert first_alarm(records) < EPOCHS / 2
    assert robust < by_answer["pgd"][1] - 0.2
    assert not any(record.get("alarm") for record in by_answer["pgd"][0])


@pytest.mark.parametrize("answer", ["stop", "rollback", "switch"])
def test_until_the_alarm_nothing_differs_and_then_the_answer_is_given(by_answer, answer):
    (without, _), (records, _) = by_answer["fgsm"], by_answer[answer]
    epoch = first_alarm(without)
    for key in ("loss", "lr", "probe_pgd", "alignment"):
        assert [record[key] for record in records[: epoch + 1]] == [record[key] for record in without[: epoch + 1]]
    assert records[epoch]["action"] == answer
    rates = {"stop": [], "rollback": [without[epoch + 1]["lr"] / 2]}.get(answer)
    if rates is not None:  # a switch begins the schedule again
        assert [record["lr"] for record in records[epoch + 1 : epoch + 2]] == pytest.approx(rates)


def test_after_a_switch_it_is_as_robust_as_under_pgd_throughout(by_answer):
    records, robust = by_answer["switch"]
    assert robust > by_answer["pgd"][1] - 0.05
    assert not any(record["alarm"] for record in records[first_alarm(records) + 1 :])


def test_fine_tuning_a_robust_network_gives_no_alarm():
    model, dataset, settings = digits(range(5), eps=0.1, epochs=10, attack="pgd")
    trained(model, dataset, **settings)
    _, dataset, settings = digits(range(5, 10), eps=0.1, epochs=15, attack="fgsm")
    find_head(model)[1].reset_parameters()
    records, robust = trained(model, dataset, **settings)
    assert robust > 0.7
    assert [record["alarm"] for record in records] == [None] * 15


# ---------------------------------------------------------------------- a loss that is not finite


@pytest.mark.filterwarnings("ignore:.* are not finite")
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_batch_of_a_loss_that_is_not_finite_is_kept(batch_norm, tmp_path, before_steps):
    (states, watch), model = before_steps, conv(batch_norm)
    watch(model)
    images, labels = colours(50, 1)
    images = images.float() / 255
    poisoned, seen = 31, []

    def attack(x, y):
        seen.append(x)
        return torch.where((x == images[poisoned]).flatten(1).all(1)[:, None, None, None], torch.inf, x)

    with pytest.raises(FloatingPointError, match=r"at epoch 1, batch \d.*nonfinite.safetensors"):
        fit(model, attack=attack, folder=tmp_path, parts=((images, labels),))
    kept = safetensors.torch.load_file(tmp_path / "nonfinite.safetensors")
    assert kept.keys() == {"images", "labels", "index"}
    assert poisoned in kept["index"]
    assert torch.equal(kept["images"], images[kept["index"]])
    assert torch.equal(kept["images"], seen[-1])
    assert torch.equal(kept["labels"], labels[kept["index"]])
    assert same(copied(model), states[-1])
    assert all(value.isfinite().all() for value in model.state_dict().values())


# ---------------------------------------------------------------------- EMA


def test_the_ema_is_evaluated_and_returned(after_steps, monkeypatch):
    (states, watch), model, evaluated = after_steps, conv(), []
    watch(model)
    start = copied(model)

    def noted(model, batch, attack, **options):
        evaluated.append(copied(model))
        return {"clean_accuracy": 1.0, "robust_accuracy": len(evaluated) / 10}

    monkeypatch.setattr(judge, "robust_accuracy", noted)
    fit(model, ema_decay=0.6)
    expected = {name: value for name, value in start.items() if value.is_floating_point()}
    for step, state in enumerate(states):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * state[name] for name, value in expected.items()}
        if step % 5 == 4:
            torch.testing.assert_close({name: evaluated[step // 5][name] for name in expected}, expected)
    assert same(copied(model), evaluated[1])
    assert not same(copied(model), states[-1])


# ---------------------------------------------------------------------- augmentation, layout, precision


def test_augmented_images_reach_the_model_as_their_seeds_say():
    def shown(seed):
        model, seen = conv(), []
        model.register_forward_hook(lambda module, args, _: seen.append(args[0]))
        with loaded_batches() as order:
            fit(model, attack=None, augment=True, seed=seed, epochs=1, parts=(TRAIN,))
        return torch.cat([rows for _, rows in order]), torch.cat(seen)

    order, seen = shown(5)
    seeds = sample_seeds(5, order, AUGMENTING)
    torch.testing.assert_close(seen, to_float(Augment(crop=1)(TRAIN[0][order], seeds)), rtol=0, atol=0)
    assert not torch.equal(seen, to_float(TRAIN[0][order]))
    again, other = shown(5), shown(6)
    assert torch.equal(again[1], seen)
    first, second = (x[index.argsort()] for index, x in ((order, seen), other))
    assert not torch.equal(first, second)


def losses(records):
    return [record["loss"] for record in records if "epoch" in record]


def test_channels_last_reaches_the_model_and_changes_no_result():
    def found(wanted):
        model, layouts = conv(), set()
        model.register_forward_pre_hook(
            lambda module, args: layouts.add(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        records = fit(model, channels_last=wanted, augment=True, parts=(TRAIN,))
        assert layouts == {wanted}
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == wanted
        return losses(records)

    assert found(True) == pytest.approx(found(False), rel=1e-3)


def test_a_compiled_run_has_the_same_losses():
    options = {"parts": (colours(48, 1),), "batch_size": 16, "clean_weight": 0.3, "epochs": 2}
    mlps = [nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    mlps[1].load_state_dict(mlps[0].state_dict())
    compiled, eager = (losses(fit(mlp, compile=flag, **options)) for mlp, flag in zip(mlps, (True, False), strict=True))
    assert compiled == pytest.approx(eager, abs=1e-4)


def test_bf16_trains_weights_that_stay_float32():
    def found(precision, dtype):
        model, dtypes = conv(), set()
        model[0].register_forward_hook(lambda module, args, out: dtypes.add((module.weight.requires_grad, out.dtype)))
        records = fit(model, precision=precision, epochs=6, parts=(TRAIN,), attack="pgd")
        assert dtypes == {(False, dtype), (True, dtype)}  # the attack's pass and the update's
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return losses(records)

    in_bf16 = found("bf16", torch.bfloat16)
    assert in_bf16 == pytest.approx(found("no", torch.float32), abs=0.05)
    assert in_bf16[-1] < 0.7 * in_bf16[0]


@pytest.mark.parametrize("attack", ["fgsm", "gradalign"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_within_the_callers_autocast_has_the_same_bits(precision, attack):
    def found(around):
        model = conv(batch_norm=False)
        with around:
            model(to_float(TRAIN[0]))  # from here on the caller's autocast keeps cast copies of the weights
            records = fit(model, precision=precision, probe=10, attack=attack)
        return copied(model), timeless(records)

    (weights, records), (alone, records_alone) = found(torch.autocast("cpu", torch.bfloat16)), found(nullcontext())
    assert same(weights, alone)
    assert records == records_alone


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adaptor"}, "unknown method 'adaptor'; there are full, linear, bias, lora, .*, norm"),
        ({"attack": "cw"}, "unknown attack 'cw'; there are fgsm, .*, free, .*stale"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; there are adamw, sgd"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lp_ft": 2, "method": "linear"}, "lp_ft is linear probing before another method"),
        ({"clean_weight": 1.1}, "clean_weight must be at most 1, got 1.1"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0, got -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0, got -1.0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
        ({"epochs": 2.5}, "epochs is a whole number, got 2.5"),
        ({"rank": 4.0}, "rank is a whole number, got 4.0"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"ema_decay": float("nan")}, "ema_decay must be finite, got nan"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; there are no, bf16"),
        (
            {"on_catastrophic_overfitting": "panic"},
            "unknown on_catastrophic_overfitting 'panic'; there are warn, stop, rollback, switch",
        ),
        ({"switch_to": "fgsm"}, "unknown switch_to 'fgsm'; there are pgd, nfgsm"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"attack": "fgsm", "steps": 3}, "the attack fgsm has no setting 'steps'"),
        ({"attack": "pgd", "steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": 11, "epochs": 2}, "a warmup of 11 steps is longer than the 10 steps of the 2 epochs of full"),
        ({"warmup": 6, "lp_ft": 1}, "a warmup of 6 steps is longer than the 5 steps of the 1 epochs of linear"),
        (
            {"on_catastrophic_overfitting": "stop"},
            "on_catastrophic_overfitting='stop' answers the monitor, and probe=0",
        ),
        ({"lora_targets": ["3"]}, "lora_targets belongs to the method lora, and the method is full"),
        ({"attack": None, "alpha": 0.1, "steps": 3}, "alpha, steps belong to an attack by name, got .* None"),
        ({"steps": 1.5, "attack": "pgd"}, "steps is a whole number, got 1.5"),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615"),
        ({"eps": 8, "attack": None}, "eps is on the images' scale"),
        (
            {"attack": PGD(nn.Identity(), 0.1, 0.1, clip=(-1, 1))},
            r"images in \[0, 1\], and attack is made for clip=\(-1, 1\)",
        ),
        (
            {"eval_attack": PGD(nn.Identity(), 0.1, 0.1, clip=None)},
            r"images in \[0, 1\], and eval_attack is made for .*None",
        ),
        ({"parts": ((TRAIN[0][:0], TRAIN[1][:0]), VAL)}, "no images to train on"),
        ({"parts": ((TRAIN[0], TRAIN[1] - 1),)}, "labels must not be negative, got -1"),
        ({"parts": (TRAIN, (VAL[0], VAL[1] - 100)), "attack": None}, "labels must not be negative, got -100"),
        ({"parts": ((TRAIN[0], 0 * TRAIN[1] + 2),)}, "all of class 2: there is nothing to tell apart"),
        ({"batch_size": 10, "grad_accum_steps": 11}, "a batch of 10 images cannot be cut into 11 parts"),
        ({"parts": ((TRAIN[0], TRAIN[1][:40]),)}, "labels"),
        ({"parts": (TRAIN, (VAL[0].float(), VAL[1]))}, r"\[0, 1\]"),
        ({"parts": (TRAIN, (VAL[0][:, :1], VAL[1]))}, r"does not take images \(1, 8, 8\) of torch.float32"),
        ({"parts": (TRAIN, None, (TEST[0][..., :4], TEST[1]))}, r"does not take images \(3, 8, 4\)"),
        ({"parts": (TRAIN, VAL, (to_float(TEST[0]).double(), TEST[1]))}, "does not take images .* of torch.float64"),
        ({"parts": ((to_float(TRAIN[0]).double(), TRAIN[1]),)}, "does not take images .* of torch.float64"),
        ({"parts": (TRAIN,), "eval_attack": lambda x, y: x}, "eval_attack is for the evaluations on val and test"),
        ({"eps_schedule": "linear", "epochs": 1, "batch_size": 50}, "leaves all 1 updates .* without a budget"),
        ({"eps_schedule": "hinge:0.91,1", "epochs": 2}, "hinge:0.91,1' leaves all 10 updates"),
        ({"attack": None, "clean_weight": 0.5}, "clean_weight=0.5 is the share of clean images beside attacked ones"),
        ({"resume": True}, "resume=True goes on from the state in folder: give both"),
        ({"folder": __file__}, "is a file: name a folder"),
        ({"method": "linear", "head": "7"}, "no module called '7'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(changes, message):
    model = conv()
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        fit(model, channels_last="head" not in changes, **changes)
    assert same(copied(model), before)
    assert model[0].weight.is_contiguous()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda model: PGD(conv(), EPS), "eval_attack was made on another model"),
        (lambda model: torchattacks.PGD(conv(), EPS), "eval_attack was made on another model"),
        (lambda model: PGD(model.model, EPS), "eval_attack was made on a part of the model"),
        (lambda model: PGD(model, EPS, targeted=True), "eval_attack goes towards the labels"),
        (lambda model: PGD(model, EPS, targeted=lambda x, y: y), "takes its targets for labels"),
        (lambda model: PGD(model, EPS, training_mode="as_is"), "in another mode than the eval mode"),
    ],
)
def test_an_attack_that_cannot_choose_weights_is_refused_before_training(attack, message):
    model = Normalized(conv(), 0.4, 0.2)
    with pytest.raises(ValueError, match=message):
        Trainer(model, EPS, eval_attack=attack(model))


@pytest.mark.parametrize("targeted", ["random", "least_likely"])
def test_an_attack_with_targets_chooses_weights_with_a_warning(targeted):
    model = conv()
    with pytest.warns(UserWarning, match="weaker than an attack without targets"):
        Trainer(model, EPS, eval_attack=PGD(model, EPS, targeted=targeted))


@pytest.mark.parametrize(
    "kind", [lambda m: PGD(m, EPS / 2), lambda m: torchattacks.PGD(m, 2 * EPS), lambda m: lambda x, y: 1 - x]
)
def test_weights_that_are_chosen_at_another_budget_are_told_once(kind, recwarn):
    model = conv()
    fit(model, eval_attack=PGD(model, EPS))
    fit(model, eval_attack=lambda x, y: (x + EPS).clamp(0, 1))
    assert not recwarn.list
    fit(model, eval_attack=kind(model))
    assert len(recwarn) == 1
    assert str(recwarn.pop(UserWarning).message).startswith("eval_attack ")


def test_a_float64_model_has_no_bf16():
    parts = [(to_float(images).double(), labels) for images, labels in (TRAIN, VAL)]
    with pytest.raises(ValueError, match="leaves a float64 model as it is"):
        fit(conv().double(), precision="bf16", parts=parts)


def test_weights_made_in_inference_mode_are_refused_and_copies_of_them_train():
    with torch.inference_mode():
        model = conv()
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode.*or give copy\.deepcopy\(model\)"):
        fit(model)
    fit(copy.deepcopy(model))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 512), (torch.float16, 4096)])
@pytest.mark.filterwarnings("error")
def test_weights_that_lose_small_steps_are_told(dtype, limit):
    weights = torch.linspace(1, 2, limit, dtype=torch.float64)[:-1].to(dtype).double()
    assert torch.equal((weights * (1 + 0.99 / limit)).to(dtype).double(), weights)
    assert ((weights * (1 + 2.01 / limit)).to(dtype).double() != weights).all()
    parts = [(to_float(images).to(dtype), labels) for images, labels in (TRAIN, VAL)]
    with pytest.warns(UserWarning, match=f"weights of {dtype}: a step that changes one by less than 1/{limit} of it"):
        fit(conv().to(dtype), parts=parts, lr=1e-5, optimizer="sgd")
    fit(conv(), precision="bf16")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_no_bit(context):
    alone, within = conv(), conv()
    fit(alone)
    with context():
        fit(within)
    assert same(copied(alone), copied(within))


@pytest.mark.parametrize("attack", ["fgsm-pgi", None])
def test_a_run_leaves_the_callers_images_without_gradient(attack):
    alone, watched = conv(), conv()
    images = to_float(TRAIN[0])
    fit(alone, attack=attack, parts=((images, TRAIN[1]),))
    needing = images.clone().requires_grad_()
    fit(watched, attack=attack, parts=((needing, TRAIN[1]),))
    assert needing.grad is None
    assert same(copied(alone), copied(watched))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ((TRAIN[0], None), "labels must be an int64 tensor"),
        ((TRAIN[0], TRAIN[1][0]), r"labels must be an int64 tensor \(N,\), got torch.int64 of shape \(\)"),
        ((TRAIN[0], np.array(["a"] * 50)), "labels of train must be whole numbers, got a NumPy array of <U1"),
        (data.Data(*TRAIN, *VAL, *TEST, ("a", "b", "c")), "got Data: give data.train, data.val and data.test"),
    ],
)
def test_what_is_no_pair_of_images_and_numbers_is_refused_in_words(train, words):
    with pytest.raises(TypeError, match=words):
        fit(conv(), parts=(train,))


def test_another_librarys_wrong_eps_is_told_once_a_run(recwarn):
    model = conv()
    fit(model, attack=torchattacks.FGSM(model, eps=8), epochs=3, lp_ft=1)
    assert len(recwarn) == 1
    assert "up to 1 in L-inf" in str(recwarn.pop(UserWarning).message)
    fit(model, attack=torchattacks.FGSM(model, eps=EPS))
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:.* are not finite")
def test_images_that_are_not_finite_are_named_where_the_run_ends():
    named = "10 of the images that the attack .*<lambda> returned are not finite"
    with pytest.raises(FloatingPointError, match=f"at epoch 1, batch 1.*{named}"):
        fit(conv(), attack=lambda images, labels: images / 0 * 0)


def strided(channels=15, kernel=1, stride=2, groups=1):
    """A network with a strided 1x1 convolution, as in a residual network's shortcut."""
    skip = nn.Conv2d(channels, channels, kernel, stride, groups=groups)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    return nn.Sequential(nn.Conv2d(3, channels, 3), skip, *head)


class BegunError(Exception):
    pass


@pytest.fixture
def begin_only(monkeypatch):
    def begun(_):
        raise BegunError

    monkeypatch.setattr(run.Run, "run", begun)


@pytest.mark.parametrize("settings", [{"channels_last": True}, {"compile": True}, {"method": "lora", "compile": True}])
@pytest.mark.parametrize("stride", [2, (2, 1), (1, 2)])
def test_a_convolution_that_pytorch_gets_wrong_on_a_cpu_is_refused(begin_only, settings, stride):
    model = strided(stride=stride)
    with pytest.raises(ValueError, match="1 is a 1x1 convolution with a stride and 15 channels"):
        fit(model, device="cpu", **settings)
    assert model[0].weight.is_contiguous()


def test_it_is_refused_in_a_model_that_has_the_layout_already(begin_only):
    with pytest.raises(ValueError, match="1 is a 1x1 convolution"):
        fit(strided().to(memory_format=torch.channels_last), device="cpu")


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        ({}, {"channels_last": False}),
        ({}, {"method": "linear"}),
        ({}, {"method": "bias"}),
        ({"channels": 16}, {}),
        ({"kernel": 2}, {}),
        ({"stride": 1}, {}),
        ({"groups": 15}, {}),
    ],
)
def test_other_convolutions_are_trained(begin_only, layer, settings):
    with pytest.raises(BegunError):
        fit(strided(**layer), device="cpu", **({"channels_last": True} | settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": 3}, "attack must be a name, a callable"),
        ({"attack": FGSM}, "attack must be a name, a callable .* got <class"),
        ({"attack": [FGSM]}, "attack must be a name, a callable"),
        ({"eval_attack": "pgd-20"}, "eval_attack must be a callable"),
        ({"eval_attack": PGD}, "eval_attack must be a callable .* got <class"),
        ({"eps": "8"}, "eps is a number, got '8'"),
        ({"eps": torch.tensor(0.1)}, r"eps is a number, got tensor\(0.1"),
        ({"epochs": "2"}, "epochs is a whole number, got '2'"),
        ({"epochs": None}, "epochs is a whole number, got None"),
        ({"epochs": True}, "epochs is a whole number, got True"),
        ({"lr": "0.1"}, "lr is a number, got '0.1'"),
        ({"lr": torch.tensor(0.1)}, "lr is a number, got tensor"),
        ({"learning_rate": 0.1}, r"there is no setting 'learning_rate'; there are method, head, .*\blr\b"),
        ({"max_grad_norm": [1.0]}, r"max_grad_norm is a number, got \[1.0\]"),
        ({"compile": "no"}, "compile is True or False, got 'no'"),
        ({"augment": 0}, "augment is True or False, got 0"),
        ({"resume": "no"}, "resume is True or False, got 'no'"),
        ({"measure_backbone": "yes"}, "measure_backbone is True or False, got 'yes'"),
        ({"head": 3, "method": "linear"}, "head is a name, got 3"),
        ({"method": "lora", "lora_targets": "qkv"}, "lora_targets is a sequence of names, got 'qkv'"),
        ({"parts": (DataLoader(TensorDataset(*TRAIN), 10),)}, r"a pair \(images, labels\) .* got DataLoader"),
        ({"parts": (TensorDataset(*TRAIN),)}, r"a pair \(images, labels\) .* got TensorDataset"),
        ({"parts": (TRAIN, dict(zip(("images", "labels"), VAL, strict=True)))}, "val must be a pair .* got dict"),
        ({"parts": ((*TRAIN, TRAIN[1]),)}, r"train must be a pair \(images, labels\) .* got tuple"),
        ({"parts": ((TRAIN[0].numpy().astype(str), TRAIN[1].numpy()),)}, "numpy"),
        ({"parts": ((TRAIN[0].int(), TRAIN[1]),)}, "images must be a float or uint8 tensor"),
        ({"parts": (TRAIN, (VAL[0], VAL[1].float()))}, "labels must be an int64 tensor"),
    ],
)
def test_wrong_types_are_refused_and_nothing_is_changed(changes, message, tmp_path):
    model = conv()
    before = copied(model)
    with pytest.raises(TypeError, match=message):
        fit(model, channels_last="augment" not in changes, folder=tmp_path, **changes)
    assert same(copied(model), before)
    assert model[0].weight.is_contiguous()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:no training image has the label 3")
@pytest.mark.parametrize("attack", ["fgsm", None])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_label_that_the_model_has_no_class_for_is_refused_in_the_first_batch(attack, part, tmp_path):
    model, parts = conv(), {"train": TRAIN, "val": VAL, "test": TEST}
    before = copied(model)
    labels = parts[part][1].clone()
    labels[-1] = 3
    parts[part] = (parts[part][0], labels)
    with pytest.raises(ValueError, match="labels must be below the model's 3 classes, got 3"):
        fit(model, attack=attack, parts=parts.values(), folder=tmp_path)
    assert same(copied(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_a_batch_leaves_the_model_as_it_was_before_it(after_steps):
    """The error comes after the first half of the batch has changed batch-norm's statistics."""
    (states, watch), model, calls = after_steps, conv(), []
    watch(model)

    def failing(x, y):
        calls.append(None)
        if len(calls) == 2 * 7 + 2:
            raise KeyError("the first error")
        return x

    with pytest.raises(KeyError, match="the first error"):
        fit(model, attack=failing, parts=(TRAIN,), grad_accum_steps=2)
    assert len(states) == 7
    assert same(copied(model), states[6])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 'resnet'"):
        Trainer("resnet", EPS)


def test_numbers_of_numpy_are_numbers_and_its_arrays_images_and_labels(tmp_path):
    models = [conv(), conv()]
    plain = fit(models[0], parts=(TRAIN, VAL), lr=0.03125, max_grad_norm=2, folder=tmp_path / "plain")
    images, labels = (t.numpy() for t in TRAIN)
    labels = labels.astype(np.uint8)
    images.flags.writeable = False
    held_out = (VAL[0].numpy() / 255, VAL[1].numpy().astype(np.int32))
    assert held_out[0].dtype == np.float64
    options = {"lr": np.float32(0.03125), "max_grad_norm": np.int64(2), "epochs": np.int32(2), "eps": np.float64(EPS)}
    parts = ((images, labels), held_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays = fit(models[1], parts=parts, folder=tmp_path / "arrays", **options)
    assert losses(arrays) == losses(plain)
    assert same(copied(models[0]), copied(models[1]))


def test_the_callers_own_accelerator_is_left_as_it_was_and_may_come_later():
    accelerate, state = run.require("accelerate"), run.require("accelerate.state")
    fit(conv(), epochs=1, parts=(TRAIN,))
    try:
        own = accelerate.Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
        model, dtypes = conv(), set()
        model[0].register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
        fit(model, epochs=1, parts=(TRAIN,))
        assert dtypes == {torch.bfloat16}  # the precision of the caller's accelerator
        assert (own.gradient_accumulation_steps, own.mixed_precision) == (4, "bf16")
    finally:
        state.AcceleratorState._reset_state()
        state.GradientState._reset_state()


def test_a_precision_of_accelerate_s_that_is_not_known_is_refused(monkeypatch):
    model = conv()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # `accelerate launch` sets it
    with pytest.raises(ValueError, match="precision must be no or bf16, got fp16 from accelerate"):
        fit(model, channels_last=True)
    assert model[0].weight.is_contiguous()
    fit(model, precision="bf16", epochs=1, parts=(TRAIN,))  # a given precision overrides the variable
