"""The report of a run: its numbers, its warnings, and the names under its pictures."""

import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from fastadv.evaluation.ensemble import curve
from fastadv.report import write_curves, write_report

EPS, CLASSES = 0.1, ("dark <0.5", "bright")
RECORDS = [
    {"backbone": {"clean_accuracy": 0.81, "robust_accuracy": 0.12, "eps": EPS, "warning": "the backbone is <weak>"}},
    {"stage": 0, "method": "full"},
    {"epoch": 0, "train_accuracy": 0.41, "clean_accuracy": 0.72, "robust_accuracy": 0.31, "probe_pgd": 0.21},
    {"epoch": 1, "train_accuracy": 0.42, "clean_accuracy": 0.73, "robust_accuracy": 0.32, "probe_pgd": 0.22}
    | {"alarm": "overfitting & more", "action": "rollback"},
    {"final": True, "best_epoch": 1, "clean_accuracy": 0.93, "robust_accuracy": 0.34, "pma_accuracy": 0.32}
    | {"chosen_by": "robust_accuracy", "noise": 0.105, "within_noise": [0]},
]


class Brightness(nn.Module):
    """Bright where the mean is above one half: images near it are fooled."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        score = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack((-score, score), 1)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """(text, figures) of a report with `records`."""

    def write(records=RECORDS):
        figures, save = [], Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
        levels = torch.tensor([0.05, 0.45, 0.55, 0.95, 0.2, 0.8]).repeat_interleave(2)
        images = (levels[:, None, None, None] + 0.02 * torch.rand(12, 3, 4, 4)).clamp(0, 1)
        labels = (levels > 0.5).long()
        labels[4] = 1 - labels[4]  # one that is wrong as it is
        write_report(
            tmp_path / "r.html",
            "a & b",
            Brightness(),
            records,
            (images, labels),
            CLASSES,
            EPS,
            {"Settings": {"lr": "<1"}},
        )
        return (tmp_path / "r.html").read_text(), figures, images, labels

    return write


def tables(text):
    """The rows of each table, as a dict."""
    rows = [
        re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", table) for table in re.findall("<table.*?</table>", text)
    ]
    return [dict(table) for table in rows]


def test_the_numbers_are_those_of_the_records(report):
    text, (curves, _), _, _ = report()
    robust = "Robust accuracy (PGD-10, eps 25.5/255)"
    assert tables(text) == [
        {"Clean accuracy": "93.0 %", robust: "34.0 %", "and under PMA, two runs of 20 steps": "32.0 %"},
        {"Clean accuracy": "81.0 %", robust: "12.0 %"},
        {"lr": "&lt;1"},
    ]
    assert "<h1>a &amp; b</h1>" in text
    shown = {line.get_label(): line.get_xydata().tolist() for line in curves.axes[0].lines}
    expected = {
        "clean, validation": "clean_accuracy",
        "PGD-10, validation": "robust_accuracy",
        "training attack, training": "train_accuracy",
        "PGD-5, probe": "probe_pgd",
    }
    assert shown.keys() == expected.keys()
    for label, key in expected.items():
        assert shown[label] == [[1, pytest.approx(100 * RECORDS[2][key])], [2, pytest.approx(100 * RECORDS[3][key])]]


def test_the_curve_s_points_are_the_shares_at_their_budgets(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, buffer, **_: (seen.append(self), buffer.write(b"png")))
    found = curve("Linf", [(8 / 255, 0.2), (4 / 255, 0.5)], 0.9)
    write_curves(tmp_path / "c.png", [found, curve("L2", [(0.5, 0.4)], 0.8)])
    assert (tmp_path / "c.png").read_bytes() == b"png"
    first, second = ([line.get_xydata().tolist() for line in axis.lines] for axis in seen[0].axes)
    assert first == [[[0, 90], [pytest.approx(4), 50], [pytest.approx(8), 20]]]
    assert second == [[[0, 80], [0.5, 40]]]
    assert "mean 52.5 %" in seen[0].axes[0].get_title()


def test_alarms_and_a_weak_backbone_are_warned_of_and_a_choice_within_noise_is_said(report):
    text, *_ = report()
    assert re.findall('<p class="warning">(.*?)</p>', text) == [
        "the backbone is &lt;weak&gt;",
        "epoch 1: overfitting &amp; more (rollback)",
    ]
    (choice,) = re.findall("<p>(.*?)</p>", text)
    assert re.search(
        r"epoch 1, chosen by robust accuracy .* two standard errors \(10.5 %\): those of epoch 0\.", choice
    )
    backbone = RECORDS[0]["backbone"] | {"warning": None}
    healthy = [{"backbone": backbone}, RECORDS[2], RECORDS[-1] | {"within_noise": []}]
    text, *_ = report(healthy)
    assert "<p" not in text


def test_under_each_picture_is_what_the_model_says_of_it(report):
    _, (_, pictures), images, labels = report()
    clean, perturbation, adversarial = np.array(pictures.axes).reshape(3, 8)
    chosen = [i * 12 // 8 for i in range(8)]
    fooled = 0
    for i, *column in zip(chosen, clean, perturbation, adversarial, strict=True):
        shown = [torch.from_numpy(np.array(axis.images[0].get_array())).permute(2, 0, 1) for axis in column]
        torch.testing.assert_close(shown[0], images[i])
        assert (shown[2] - images[i]).abs().max() <= EPS + 1e-6
        torch.testing.assert_close(shown[1], (shown[2] - shown[0]) / (2 * EPS) + 0.5)
        assert column[1].get_title() == ""
        for x, axis in ((shown[0], column[0]), (shown[2], column[2])):
            says = int(x.mean() > 0.5)
            assert axis.get_title() == CLASSES[says]
            assert axis.title.get_color() == ("#2e7d32" if says == labels[i] else "#c62828")
        fooled += (shown[0].mean() > 0.5) != (shown[2].mean() > 0.5)
    assert 0 < fooled < 8


def test_a_picture_of_which_the_model_says_nothing_is_titled_so(report, monkeypatch):
    monkeypatch.setattr(Brightness, "forward", lambda self, x: self.scale * 0 * x.flatten(1)[:, :2])
    with pytest.warns(UserWarning, match="the gradient is exactly zero"):
        _, (_, pictures), *_ = report()
    titled = [axis for axis in pictures.axes if axis.get_title()]
    assert {(axis.get_title(), axis.title.get_color()) for axis in titled} == {("no prediction", "#c62828")}
