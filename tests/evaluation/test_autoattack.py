"""AutoAttack with the interface of its authors' program, against torchattacks and against its attacks one by one."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastadv.attacks import APGD, FAB, Ensemble, Square
from fastadv.evaluation import AutoAttack, evaluate
from fastadv.functional import sample_seeds

EPS = 0.03


class Counting(nn.Module):
    """A small network that counts its images and calls, and raises `Cut` at call number `most`."""

    fastadv_key = "the same whatever its counts are"

    def __init__(self, classes=4, most=None):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 36, classes)
        self.seen = self.graded = self.calls = 0
        self.most = most

    def forward(self, x):
        self.calls += 1
        if self.calls == self.most:
            raise Cut
        self.seen += len(x)
        self.graded += len(x) * torch.is_grad_enabled()
        return self.second(self.first(x).tanh().flatten(1))


class Cut(Exception):
    pass


@pytest.fixture
def net():
    return Counting().eval()


def again(net, **changes):
    """A copy with the same weights."""
    other = Counting(**changes).eval()
    other.load_state_dict(net.state_dict())
    return other


@pytest.fixture
def samples(net):
    """Images, most of them classified correctly and some near a decision boundary; and their labels."""
    x = 0.5 + 0.3 * torch.randn(40, 1, 6, 6).clamp(-1.5, 1.5)
    with torch.no_grad():
        net.second.bias -= net(x).mean(0)  # all classes get similar logits
        labels = net(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    net.seen = net.graded = net.calls = 0
    return x, labels


def few(attack, steps=8, queries=30):
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = steps
    attack.square.n_queries = queries
    return attack


def made(model, eps=EPS, **options):
    return few(AutoAttack(model, eps=eps, verbose=False, **options))


def test_what_is_returned_fools_within_the_budget_and_the_rest_is_untouched(net, samples):
    x, y = samples
    attack = made(net)
    adv, said = attack.run_standard_evaluation(x, y, bs=16, return_labels=True)
    with torch.no_grad():
        assert torch.equal(net(adv).argmax(1), said)
    robust, correct = said == y, net(x).argmax(1) == y
    assert 0 < robust.sum() < correct.sum() < len(x)
    untouched = robust | ~correct
    assert torch.equal(adv[untouched], x[untouched])
    assert (adv - x).abs().max() <= EPS + 1e-6
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert attack.report["robust_accuracy"] == robust.double().mean()
    assert torch.equal(attack.run_standard_evaluation(x, y, bs=7), adv)


def test_each_attack_gets_what_those_before_it_left(net, samples):
    x, y = samples
    results = {r["attack"]: r for r in evaluate(net, (x, y), few(Ensemble(net, eps=EPS)), batch_size=9)["attacks"]}
    assert list(results) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for before, after in pairwise(results.values()):
        assert after["given"] == before["given"] - sum(before["fooled"])
    # APGD alone, with the same seeds.
    correct = net(x).argmax(1) == y
    adv = APGD(net, EPS, 8)(x, y, seed=sample_seeds(0, torch.arange(len(x))))
    fooled = correct & (net(adv).argmax(1) != y)
    assert fooled.any()
    assert torch.equal(torch.tensor(results["apgd-ce"]["fooled"]), fooled)
    for name, runs in (("apgd-ce", 1), ("apgd-t", 3), ("fab-t", 3), ("square", 1)):
        assert results[name]["runs"] == runs


def test_each_attack_by_itself_gets_all(net, samples):
    x, y = samples
    attack = made(net)
    found = attack.run_standard_evaluation_individual(x, y, bs=16, return_labels=True)
    together = attack.run_standard_evaluation(x, y, bs=16, return_labels=True)[1]
    assert list(found) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for adv, said in found.values():
        assert torch.equal(net(adv).argmax(1), said)
        assert ((said == y) >= (together == y)).all()
    robust = torch.stack([said == y for _, said in found.values()]).all(0)
    assert torch.equal(robust, together == y)  # together the attacks fool the same images as alone


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_as_robust_as_torchattacks_says(net, norm, samples):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = samples
    eps = EPS if norm == "Linf" else 0.15
    targeted = torchattacks.APGDT(net, norm=norm, eps=eps, steps=15, n_classes=4, seed=0)
    ce = torchattacks.APGD(net, norm=norm, eps=eps, steps=15, seed=0)
    robust = net(torchattacks.MultiAttack([ce, targeted])(x, y)).argmax(1) == y
    ours = few(AutoAttack(net, norm, eps, verbose=False), 15, 100)
    adv = ours.run_standard_evaluation(x, y)
    mine = net(adv).argmax(1) == y
    assert 0 < robust.sum() < len(x) - 3
    assert mine.sum() <= robust.sum() + 1


# Settings, by the number of images that the model gets; eps is 0, so that no attack fools a sample


def runs_of(net, samples, change=lambda attack: None, **options):
    x, y = samples
    attack = made(net, eps=0.0, **options)
    change(attack)
    before = net.graded, net.seen
    attack.run_standard_evaluation(x, y, bs=64)
    return net.graded - before[0], net.seen - before[1]


@pytest.mark.parametrize(
    ("part", "name", "changes", "factor"),
    [
        ("apgd-ce", "apgd", {"n_iter": 24}, 3),
        ("apgd-ce", "apgd", {"n_restarts": 2}, 2),
        ("apgd-dlr", "apgd", {"eot_iter": 5}, 5),
        ("apgd-t", "apgd_targeted", {"n_iter": 16}, 2),
        ("apgd-t", "apgd_targeted", {"n_restarts": 3}, 3),
        ("apgd-t", "apgd_targeted", {"n_target_classes": 1}, 1 / 3),
        ("apgd-t", "apgd_targeted", {"n_target_classes": 2, "eot_iter": 3}, 2),
        ("fab-t", "fab", {"n_iter": 16}, 2),
        ("fab-t", "fab", {"n_target_classes": 2}, 2 / 3),
        ("fab-t", "fab", {"n_restarts": 4}, 1),
        ("fab", "fab", {"n_restarts": 4}, 4),
    ],
)
def test_settings_change_how_many_gradients_are_taken(net, samples, part, name, changes, factor):
    def change(attack):
        for key, value in changes.items():
            setattr(getattr(attack, name), key, value)

    options = {"version": "custom", "attacks_to_run": [part]}
    robust = int((net(samples[0]).argmax(1) == samples[1]).sum())
    looked = (part != "fab-t" and part != "fab") * changes.get("eot_iter", 1) * 40  # the check of the first gradients
    plain = runs_of(net, samples, **options)[0] - 40 * part.startswith("apgd")
    changed = runs_of(net, samples, change, **options)[0] - looked
    assert plain >= robust * 8
    assert changed == factor * plain


@pytest.mark.parametrize(("changes", "queries"), [({}, 30), ({"n_queries": 70}, 70), ({"n_restarts": 2}, 60)])
def test_square_asks_as_often_as_it_is_told(net, samples, changes, queries):
    def change(attack):
        for key, value in changes.items():
            setattr(attack.square, key, value)

    options = {"version": "custom", "attacks_to_run": ["square"]}
    none = runs_of(net, samples, lambda attack: setattr(attack.square, "n_queries", 1), **options)[1]
    robust = int((net(samples[0]).argmax(1) == samples[1]).sum())
    assert runs_of(net, samples, change, **options) == (0, none + robust * (queries - 1))


def test_a_part_has_an_eps_of_its_own(net, samples):
    x, y = samples
    attack = made(net, eps=0.0, version="custom", attacks_to_run=["apgd-ce"])
    attack.apgd.eps = 0.3
    distance = (attack.run_standard_evaluation(x, y) - x).abs().max()
    assert 0.1 < distance <= 0.3 + 1e-6


def test_versions_are_those_of_the_paper(net):
    def run(**options):
        return [(name, type(a), a.loss, a.restarts, a.eot) for name, a in Ensemble(net, **options).attacks()]

    ce, targeted = ("apgd-ce", APGD, "ce", 1, 1), ("apgd-t", APGD, "targeted_dlr", 1, 1)
    fab_t, square = ("fab-t", FAB, "targeted_margin", 1, 1), ("square", Square, "margin", 1, 1)
    assert run() == [ce, targeted, fab_t, square]
    dlr, fab = ("apgd-dlr", APGD, "dlr", 5, 1), ("fab", FAB, "margin", 5, 1)
    assert run(version="plus") == [("apgd-ce", APGD, "ce", 5, 1), dlr, fab, square, targeted, fab_t]
    assert run(version="rand") == [("apgd-ce", APGD, "ce", 1, 20), ("apgd-dlr", APGD, "dlr", 1, 20)]


# A model with random logits


class Noisy(nn.Module):
    """Classifies by the sign of the mean pixel plus noise; the noise has mean 0 and is often larger."""

    def forward(self, x):
        mean = (x.flatten(1).mean(1) - 0.5) * 20 + torch.randn(len(x))
        return torch.stack((-mean, mean), 1)


def test_the_randomised_version_judges_by_the_mean_of_its_draws():
    x = torch.full((60, 1, 4, 4), 0.5) + 0.1 * torch.linspace(-1, 1, 60).view(-1, 1, 1, 1)
    margin = x.flatten(1).mean(1) - 0.5
    report = evaluate(Noisy(), (x, (margin > 0).long()), "autoattack-rand", eps=0.03)
    # The sign of the gradient does not depend on the noise, so only |20 * margin| counts, in deviations of the noise.
    # The mean of 20 draws is right where it is 1; where it is 1.3, the mean was wrong in none of 200 tries.
    robust, clean = torch.tensor(report["budgets"][0]["robust"]), torch.tensor(report["clean_correct"])
    assert not robust[margin.abs() < 0.01].any()
    assert robust[margin.abs() > 0.095].all()
    assert clean[margin.abs() > 0.05].all()
    assert [attack["settings"]["eot"] for attack in report["attacks"]] == [20, 20]
    assert not [note for note in report["warnings"] if "random" in note]


# Cut and continued; bad input


def test_a_run_that_was_cut_returns_the_same_images(net, samples, tmp_path, monkeypatch):
    from fastadv.evaluation import run as evaluation_run

    monkeypatch.setattr(evaluation_run, "SAVE_EVERY", 0)
    x, y = samples
    whole = made(net).run_standard_evaluation(x, y, bs=8, return_labels=True)
    calls = net.calls
    for share in (0.15, 0.4, 0.7, 0.9):
        path = tmp_path / f"state-{share}"
        with pytest.raises(Cut):
            made(again(net, most=int(share * calls))).run_standard_evaluation(x, y, bs=8, state_path=path)
        other = again(net)
        found = made(other).run_standard_evaluation(x, y, bs=8, return_labels=True, state_path=path)
        assert other.calls < (1.2 - share) * calls
        for mine, theirs in zip(found, whole, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"norm": "L1"}, "L1"),
        ({"version": "strong"}, "standard, plus, rand, custom"),
        ({"attacks_to_run": ["square"]}, "version='custom'"),
        ({"version": "custom", "attacks_to_run": ["apgd"]}, "apgd-ce"),
        ({"version": "custom", "attacks_to_run": "square"}, "list"),
        ({"is_tf_model": True}, "TensorFlow"),
        ({"eps": 2.0}, "eps"),
    ],
)
def test_what_cannot_be_is_refused_at_once(net, options, what):
    with pytest.raises(ValueError, match=what):
        AutoAttack(net, **options)
    assert net.calls == 0


@pytest.mark.parametrize("name", ["eps", "epsilon", "version", "n_queries"])
def test_a_setting_that_would_change_nothing_cannot_be_assigned(net, name):
    with pytest.raises(AttributeError, match=name):
        setattr(AutoAttack(net), name, 0.1)


@pytest.mark.parametrize("option", [{"epsilon": EPS}, {"restarts": 3}, {"clip": (0, 255)}, {"best_iterate": True}])
def test_options_that_its_attacks_do_not_take_are_refused_by_name(net, option):
    with pytest.raises(TypeError, match=f"{next(iter(option))}.*autocast.*apgd.n_restarts"):
        AutoAttack(net, **option)


@pytest.mark.parametrize("model", ["Carmon2019", None, Counting])
def test_a_model_that_is_none_is_refused_at_once(model):
    with pytest.raises(TypeError, match="model must be a callable"):
        AutoAttack(model)


@pytest.mark.parametrize(("norm", "shape"), [("Linf", (36,)), ("L2", (36,)), ("L2", (1, 4, 9))])
@pytest.mark.parametrize("apart", [False, True])
def test_images_that_the_last_attack_is_not_made_for_are_refused_before_the_first(norm, shape, apart):
    net, calls = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), []
    net.register_forward_hook(lambda *_: calls.append(1))
    attack = AutoAttack(nn.Sequential(*net) if apart else net, norm, verbose=False)
    with pytest.raises(ValueError, match="images must"):
        evaluate(net, (torch.rand(5, *shape), torch.zeros(5, dtype=torch.int64)), attack)
    assert not calls


def test_paths_that_cannot_be_written_are_found_before_the_first_attack(net, samples, tmp_path):
    x, y = samples
    (tmp_path / "file").touch()
    for path, error in ((tmp_path, ValueError), (tmp_path / "file" / "state", OSError)):
        with pytest.raises(error):
            made(net).run_standard_evaluation(x, y, state_path=path)
        seen = net.seen
        with pytest.raises(OSError, match=tmp_path.name):
            made(net, log_path=path).run_standard_evaluation(x, y)
        assert net.seen == seen
    assert net.graded == 0
    path = tmp_path / "new" / "folder" / "log"
    made(net, log_path=path).run_standard_evaluation(x, y)
    assert "robust accuracy" in path.read_text()


def test_without_a_seed_each_run_draws_one(net, samples):
    runs = [made(net, seed=None, version="custom", attacks_to_run=["square"]) for _ in range(2)]
    one, other = (attack.run_standard_evaluation(*samples) for attack in runs)
    assert runs[0].report["settings"]["seed"] != runs[1].report["settings"]["seed"]
    assert not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*no step was taken")  # towards the masked class
@pytest.mark.parametrize("part", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_a_class_that_cannot_be_is_as_if_it_were_not_there(net, samples, part):
    class Masked(nn.Module):
        def forward(self, x):
            return net(x) + torch.tensor([0.0, 0.0, 0.0, -torch.inf])

    class Without(nn.Module):
        def forward(self, x):
            return net(x)[:, :3]

    x, y = samples[0], Without()(samples[0]).argmax(1)
    options = {"version": "custom", "attacks_to_run": [part]}
    attacks = made(Masked(), **options), made(Without(), **options)
    masked, without = (attack.run_standard_evaluation(x, y, return_labels=True)[1] for attack in attacks)
    assert (without != y).any()
    assert torch.equal(masked == y, without == y)


def test_what_cannot_be_run_is_refused_before_it_runs(net, samples, tmp_path):
    x, y = samples
    with pytest.raises(ValueError, match="attacks_to_run"):
        AutoAttack(net, version="custom").run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match="attacks_to_run"):
        evaluate(net, (x, y), Ensemble(net, version="custom"))
    attack = AutoAttack(net)
    attack.attacks_to_run = None
    with pytest.raises(ValueError, match="list"):
        attack.run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match="seed="):
        AutoAttack(net, seed=None).run_standard_evaluation(x, y, state_path=tmp_path / "state")
    with pytest.raises(ValueError, match="bs"):
        AutoAttack(net).run_standard_evaluation(x, y, bs=0)
    attack = AutoAttack(net)
    with pytest.raises(AttributeError):
        attack.apgd.n_iters = 3
    attack.apgd.n_iter = 0
    with pytest.raises(ValueError, match="steps"):
        attack.run_standard_evaluation(x, y)
    assert net.calls == 0


def test_it_says_what_it_finds_as_it_goes(net, samples, tmp_path, capsys):
    x, y = samples
    attack = few(AutoAttack(net, eps=EPS, log_path=tmp_path / "log"))
    attack.run_standard_evaluation(x, y)
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "log").read_text().splitlines() == lines
    assert lines[0] == f"using {', '.join(f'{name} at 7.65/255' for name in attack.attacks_to_run)}"
    assert lines[1] == f"initial accuracy: {attack.report['clean_accuracy']:.2%}"
    left = attack.report["clean_accuracy"]
    for line, result in zip(lines[2:], attack.report["attacks"], strict=True):
        left -= sum(result["fooled"]) / len(x)
        assert line.startswith(f"robust accuracy after {result['attack'].upper()}: {left:.2%} ")
