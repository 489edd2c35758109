"""The results of several attacks together, against unions and sums by hand."""

import functools

import pytest
import torch
import torchattacks
from cut import Cut
from test_evaluation import BATCH, EPS, CutAt, Net, forty_samples, hardest
from test_evaluation import net as net
from test_evaluation import samples as samples

from fastadv.attacks import FGSM, NFGSM, PGD, PGDL2, PMA, Normalized, Square, create_attack
from fastadv.evaluation import evaluate
from fastadv.evaluation import run as evaluation_run
from fastadv.evaluation.adversaries import adversaries
from fastadv.evaluation.ensemble import curve
from fastadv.evaluation.masking import QUERIES, Masking


def union(results):
    return [any(each) for each in zip(*(result["fooled"] for result in results), strict=True)]


def both(net, samples, attacks, **options):
    return [evaluate(net, samples, attacks, batch_size=BATCH, ensemble=e, seed=3, **options) for e in (True, False)]


def test_survivors_are_handed_on_and_all_together_fool_what_each_alone_does(net, samples):
    theirs = torchattacks.PGD(net, EPS, EPS / 4, 4)
    theirs.norm = "Linf"
    attacks = [FGSM(net, EPS), hardest(net), PMA(net, EPS, 4), theirs]
    together, alone = both(net, samples, attacks)
    correct = together["clean_correct"]
    left = sum(correct)
    seen = [False] * 40
    for one, each in zip(together["attacks"], alone["attacks"], strict=True):
        assert one["given"] == left
        # fastadv's attacks draw for each sample, not for the batch: they fool the same samples in either case.
        assert each["given"] == sum(correct)
        if each["passes"] is not None:
            assert one["fooled"] == [f and not s for f, s in zip(each["fooled"], seen, strict=True)]
        seen = [f or s for f, s in zip(one["fooled"], seen, strict=True)]
        left -= sum(one["fooled"])
        assert one["robust_accuracy"] == left / 40
    assert seen == union(together["attacks"])
    assert together["robust_accuracy"] == left / 40 > 0
    assert together["budgets"][0]["robust"] == [c and not s for c, s in zip(correct, seen, strict=True)]
    assert together["budgets"][0]["attacks"] == ["FGSM", "PGD", "PMA", "PGD"][:3]
    ours = union(alone["attacks"][:3])
    assert all(s or not o for o, s in zip(ours, seen, strict=True))
    assert sum(r["passes"] for r in together["attacks"][:3]) < sum(r["passes"] for r in alone["attacks"][:3])


def test_what_falls_within_a_budget_falls_within_a_larger_one_without_work(net, samples):
    eps = [EPS, EPS / 4, EPS / 2]
    together, alone = both(net, samples, ["fgsm", "pgd"], eps=eps)
    found = {(r["attack"], r["eps"]): r for r in together["attacks"]}
    single = {(r["attack"], r["eps"]): r["fooled"] for r in alone["attacks"]}
    assert list(found) == list(single)
    for budget in together["budgets"]:
        fooled = union([{"fooled": f} for (_, e), f in single.items() if e <= budget["eps"]])
        right = together["clean_correct"]
        assert budget["robust"] == [c and not f for c, f in zip(right, fooled, strict=True)]
    assert [b["eps"] for b in together["budgets"]] == eps
    assert together["robust_accuracy"] == [b["robust_accuracy"] for b in together["budgets"]]
    small, middle, large = (found["fgsm", e] for e in sorted(eps))
    assert middle["given"] == small["given"] - sum(small["fooled"])
    assert large["given"] == middle["given"] - sum(middle["fooled"])
    assert found["pgd", EPS / 4]["given"] == small["given"] - sum(small["fooled"])


def test_only_what_keeps_to_a_ball_counts_for_it(net, samples):
    """Three attacks do not count: one in another norm, N-FGSM, which leaves its ball, and one beyond its budget."""

    class Beyond:
        __name__, eps, norm = "Beyond", EPS, "Linf"

        def __call__(self, images, labels):
            return (images + 0.5).clamp(0, 1)

    attacks = [NFGSM(net, EPS), PGDL2(net, 0.4, 0.1, 4), Beyond(), PGD(net, EPS, EPS / 4, 4)]
    attacks.append(torchattacks.PGD(net, EPS, EPS / 4, 4))  # it does not name its norm
    with pytest.warns(UserWarning, match="beyond its eps"), pytest.warns(UserWarning, match="NFGSM .* for no budget"):
        report = evaluate(net, samples, attacks, batch_size=BATCH)
    assert [r["given"] for r in report["attacks"]] == [36] * 5
    assert [(b["norm"], b["eps"], b["attacks"]) for b in report["budgets"]] == [
        ("L2", 0.4, ["PGDL2"]),
        ("Linf", EPS, ["PGD"]),
    ]
    assert report["robust_accuracy"] == [report["attacks"][i]["robust_accuracy"] for i in (1, 3)]


def test_the_curve_s_figures_are_sums_by_hand():
    found = curve("Linf", [(0.4, 0.1), (0.1, 0.5)], 0.9)
    assert found["eps"] == [0.0, 0.1, 0.4]
    assert found["robust_accuracy"] == [0.9, 0.5, 0.1]
    assert found["area"] == pytest.approx((0.1 * (0.9 + 0.5) / 2 + 0.3 * (0.5 + 0.1) / 2) / 0.4)
    # Of ten samples one is misclassified, four are fooled at 0.1, four more at 0.4, and one is not fooled.
    assert found["expected_robustness"] == pytest.approx((4 * 0.1 + 1 * 0.4) / 10)


def test_several_budgets_make_a_curve(net, samples):
    report = evaluate(net, samples, ["fgsm", "pma"], eps=[EPS, EPS / 2], batch_size=BATCH)
    (found,) = report["curves"]
    assert found["eps"] == [0.0, EPS / 2, EPS]
    assert found["robust_accuracy"] == [report["clean_accuracy"], *report["robust_accuracy"][::-1]]
    assert not evaluate(net, samples, ["fgsm"], batch_size=BATCH)["curves"]


def test_a_late_fall_is_told_of(net, samples):
    """The model is fooled only in the last steps of the second run."""
    calls = []

    def stubborn(x):
        if x.requires_grad:
            calls.append(1)
        return net(x) + (torch.tensor([0.0, 0, 1e3]) if len(calls) >= 40 else 0)

    with pytest.warns(UserWarning, match=r"fell in the last tenth.*pma-100-2"):
        report = evaluate(stubborn, samples, [create_attack("pma", stubborn, 1e-4)], batch_size=64)
    assert report["attacks"][0]["latest"]["restart"] == 1
    assert report["attacks"][0]["latest"]["step"] >= 19
    quiet = evaluate(net, samples, ["pma"], eps=1e-4, batch_size=64)
    assert not quiet["warnings"]


def test_one_logit_and_several_labels_a_sample_are_judged_by_their_signs():
    """On a linear model the sign step along the weight is the worst perturbation."""
    torch.manual_seed(1)
    images = torch.rand(60, 3, 2, 2)
    one = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    with torch.no_grad():
        one[1].bias -= one(images).mean()
    labels = (one(images)[:, 0] > 0).long()
    report = evaluate(one, (images, labels), [FGSM(one, 8 / 255, loss="bce")], batch_size=BATCH)
    step = (1 - 2 * labels).view(-1, 1, 1, 1) * one[1].weight.detach().sign().view(3, 2, 2)
    adv = (images + 8 / 255 * step).clamp(0, 1)
    assert report["attacks"][0]["fooled"] == ((one(adv)[:, 0] > 0).long() != labels).tolist()
    assert 0 < report["robust_accuracy"] < report["clean_accuracy"] == 1

    several = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    signs = (several(images) > 0).long()
    signs[:5, 0] ^= 1
    attack = PGD(several, 8 / 255, loss="bce", random_start=False, steps=4)
    report = evaluate(several, (images, signs), [attack], batch_size=BATCH)
    assert report["clean_correct"] == [False] * 5 + [True] * 55
    found = several(attack(images, signs))
    fooled = ((found > 0) != (signs > 0)).any(1)
    assert all(f for f, last in zip(report["attacks"][0]["fooled"], fooled.tolist(), strict=True) if last and f)
    assert sum(report["attacks"][0]["fooled"]) >= int(fooled[5:].sum()) > 0
    with pytest.raises(ValueError, match="loss='bce'"):
        evaluate(several, (images, signs), ["fgsm"], batch_size=BATCH)


def test_further_runs_of_pma_are_those_that_more_restarts_would_make(net, samples, tmp_path):
    """Extra runs fool the same samples as restarts of the same number, and no run exceeds what `goes_on` asks for."""
    attack = PMA(net, EPS, 4, most_runs=9)
    found = evaluate(net, samples, [attack], batch_size=BATCH, seed=2, save_images=tmp_path / "found")["attacks"][0]
    survivors = [i for i, f in enumerate(found["fooled"]) if not f]
    runs = max(r for r in found["restart"] if r is not None) + 1
    falls = [sum(r == run for r in found["restart"]) for run in range(9)]
    needed = next((n for n in range(2, 9) if not attack.goes_on(falls[:n], 40)), 9)
    assert survivors
    assert runs <= needed
    fixed = PMA(net, EPS, 4, restarts=needed, most_runs=needed)
    whole = evaluate(net, samples, [fixed], batch_size=BATCH, seed=2, save_images=tmp_path / "whole")["attacks"][0]
    keys = ("fooled", "restart", "step", "passes", "robust_accuracy_8bit")
    assert [whole[key] for key in keys] == [found[key] for key in keys]
    images = [sorted((f.name, f.read_bytes()) for f in (tmp_path / run).rglob("*.png")) for run in ("found", "whole")]
    assert images[0] == images[1]


def test_the_progress_says_which_lines_are_of_extra_runs(net, samples, caplog):
    class Insistent(PMA):
        def goes_on(self, falls, images):
            return len(falls) < 5

    caplog.set_level("INFO", "fastadv")
    found = evaluate(net, samples, [Insistent(net, EPS, 4)], batch_size=BATCH)["attacks"][0]
    assert found["runs"] == 5
    titles = [message.partition(": done in ")[0] for message in caplog.messages]
    why = "because others still fooled samples"
    assert titles == ["Insistent at 16/255", *(f"Insistent at 16/255, extra run {run} {why}" for run in (3, 4, 5))]


def test_a_loader_that_normalises_is_evaluated_as_its_pixels_are(samples):
    inner, mean, std = Net(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    m, s = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    images, labels = samples
    labels = inner((images - m) / s).argmax(1)
    batches = [((images[i : i + 7] - m) / s, labels[i : i + 7]) for i in range(0, 40, 7)]
    found = evaluate(inner, batches, ["pgd-10"], eps=EPS / 8, images_normalized=(mean, std), batch_size=BATCH)
    expected = evaluate(Normalized(inner, mean, std), (images, labels), ["pgd-10"], eps=EPS / 8, batch_size=BATCH)
    assert found["attacks"][0]["fooled"] == expected["attacks"][0]["fooled"]
    assert 0 < found["robust_accuracy"] < found["clean_accuracy"] == 1
    with pytest.raises(ValueError, match="attacks are names"):
        evaluate(inner, batches, [FGSM(inner, EPS)], images_normalized=(mean, std))
    with pytest.raises(ValueError, match="takes normalised images"):
        evaluate(Net(), samples, [FGSM(Net(), EPS, images_normalized=(mean, std))])


@pytest.mark.parametrize(
    ("images", "asked", "fell", "fooled", "by_chance", "without_gradient", "likely"),
    [
        (1000, 32, 1, 500, 20, 0.02, False),
        (1000, 32, 2, 500, 0, 0.0, True),
        (1000, 32, 0, 500, 100, 0.0, False),  # a weak model: noise fools it, and gradients far more often
        (1000, 32, 0, 300, 100, 0.0, True),
        (1000, 32, 0, 40, 20, 0.0, False),
        (1000, 32, 0, 500, 0, 0.03, True),
        (18, 1, 0, 5, 2, 0.0, False),  # with few images this may be chance
        (18, 1, 0, 8, 5, 0.0, True),
    ],
)
def test_what_looks_like_masked_gradients(images, asked, fell, fooled, by_chance, without_gradient, likely):
    assert Masking(images, asked, fell, fooled, by_chance, without_gradient).is_likely == likely


class Rounded(Net):
    """A model without gradients, so that Square fools samples that PMA does not."""

    def logits(self, x):
        return super().logits((x * 8).round() / 8 + 0 * x)


def rounded_at_two_budgets(model, **options):
    images = forty_samples()[0]
    attacks = [PMA(model, eps, 4, most_runs=2) for eps in (0.1, 0.15)]
    report = evaluate(model, (images, Rounded()(images).argmax(1)), attacks, batch_size=64, **options)
    timeless = [{**each, "seconds": None} for each in report["attacks"]]
    return {**report, "attacks": timeless}


@pytest.mark.filterwarnings("ignore:gradients look masked", "ignore:the gradient is zero", "ignore:the last")
def test_what_square_found_is_in_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_run, "SAVE_EVERY", 0)
    nets = [Rounded() for _ in range(4)]
    whole = rounded_at_two_budgets(nets[0])
    assert all(each["fell"] > 2 for each in whole["masking"])
    for each, attack, budget in zip(whole["masking"], whole["attacks"], whole["budgets"], strict=True):
        assert budget["robust_accuracy"] <= attack["robust_accuracy"] - each["fell"] / 40

    with pytest.raises(Cut), CutAt(len(nets[0].shapes) - 50):  # during the second budget's queries
        rounded_at_two_budgets(nets[1], state=tmp_path / "state")
    assert rounded_at_two_budgets(nets[2], state=tmp_path / "state") == whole
    assert len(nets[2].shapes) < len(nets[0].shapes) - QUERIES  # the queries of the first budget are not repeated
    assert rounded_at_two_budgets(nets[3], state=tmp_path / "state") == whole
    assert len(nets[3].shapes) < 20  # only the clean images and the first gradients are computed again


def test_square_judges_the_model_under_pma_s_options(samples, monkeypatch):
    seen, compiled, step = [], [], Square.step

    class Seen(Net):
        def forward(self, x):
            seen.append((torch.is_autocast_enabled("cpu"), x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x)

    @functools.wraps(step)
    def asked(*args):
        seen.append("asked")
        step(*args)

    monkeypatch.setattr(Square, "step", asked)
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    model = Seen().float()
    options = {"autocast": torch.bfloat16, "memory_format": torch.channels_last, "compile": True, "eot": 2}
    report = evaluate(model, (samples[0].float(), samples[1]), [PMA(model, EPS / 8, 2, **options)], batch_size=BATCH)
    assert report["masking"][0]["asked"] > 0
    queries = [i for i, each in enumerate(seen) if each == "asked"]
    assert len(queries) >= QUERIES
    assert all(seen[i - 3 : i] == [seen[i - 3], (True, True), (True, True)] for i in queries)
    assert len(compiled) == 2


def test_attacks_by_name_have_the_usual_eps_of_their_norm():
    names = ["fgsm", "pgd-10", "pma", "pma-l2", "pgdl2", "apgd", "autoattack-l2"]
    model = torch.nn.Flatten()
    found = {(each.norm, each.eps) for each in adversaries(model, names)}
    assert found == {("Linf", 8 / 255), ("L2", 0.5)}
    assert {each.eps for each in adversaries(model, names, 0.1)} == {0.1}
    with pytest.raises(ValueError, match="eps is for attacks by name"):
        adversaries(model, PGD(model, 0.05), 8 / 255)


@pytest.mark.parametrize(("eps", "said"), [(None, False), (8 / 255, True), (16 / 255, True), (64 / 255, False)])
def test_a_length_of_l_inf_in_l2_is_told(eps, said, recwarn):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.rand(20, 3, 2, 2)
    report = evaluate(model, (images, model(images).argmax(1)), "pgdl2", eps=eps, progress=False)
    assert any("a length for L-inf" in note for note in report["warnings"]) == said
    assert report["attacks"][0]["eps"] == (0.5 if eps is None else eps)
