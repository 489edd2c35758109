"""Files of every kind that earlier versions wrote: they load, and runs go on from them.

old_files/VERSION holds the files that `old_run.py` wrote with that version.
"""

import csv
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import old_run
import pytest
import safetensors
import safetensors.torch
import torch

from fastadv import models
from fastadv.data.trained import known
from fastadv.evaluation import queue

VERSIONS = sorted((Path(__file__).parent / "old_files").iterdir())
pytestmark = pytest.mark.parametrize("old", VERSIONS, ids=lambda path: path.name)


@pytest.mark.parametrize("name", old_run.RUNS)
def test_a_training_goes_on(old, name, tmp_path, monkeypatch):
    shutil.copytree(old / name, tmp_path / "run")
    log = [json.loads(line) for line in (old / name / "log.jsonl").read_text().splitlines()]
    batches, updates = [], old_run.updates.Updates
    take = updates.take
    monkeypatch.setattr(updates, "take", lambda each, *args: (batches.append(None), take(each, *args))[1])
    weights, records = old_run.train(name, tmp_path / "run")
    assert records[: len(log)] == log
    epochs = 3 + old_run.RUNS[name].get("lp_ft", 0)
    assert [record["epoch"] for record in records if "epoch" in record] == list(range(epochs))
    assert len(batches) == 4 * epochs - old_run.STEPS[name]
    # The weights are from an uncut run of that version. Another processor rounds otherwise, and then some signs of
    # FGSM differ: 0.2 % of the way from the start, where a run that lost its optimizer's state was 13 and 18 % off.
    start, uncut = old_run.network().state_dict(), safetensors.torch.load_file(old / f"{name}.safetensors")
    assert weights.keys() == uncut.keys()
    here, there, first = (
        torch.cat([made[key].flatten() for key in uncut if uncut[key].is_floating_point()])
        for made in (weights, uncut, start)
    )
    assert (here - there).norm() < 0.02 * (there - first).norm()
    assert all((weights[key] - start[key]).abs().max() > 0.01 for key in ("0.weight", "1.running_mean", "4.weight"))
    assert old_run.train(name, tmp_path / "run")[1] == records  # this version reads the files that it wrote


def test_a_training_goes_on_for_more_epochs_with_more_evaluations(old, tmp_path):
    shutil.copytree(old / "sgd", tmp_path / "run")
    with pytest.warns(UserWarning, match="was to have 3 epochs and goes on to 5"):
        _, records = old_run.train("sgd", tmp_path / "run", epochs=5, eval_every=1)
    rows = [record for record in records if "epoch" in record]
    assert ["robust_accuracy" in row for row in rows] == [False, True, True, True, True]
    assert records[-1]["epochs"] == 5


def test_another_training_is_refused_by_what_differs(old, tmp_path):
    shutil.copytree(old / "sgd", tmp_path / "run")
    words = r"differs in lr \(0.02 there, 0.5 here\), max_grad_norm \(None there, 1.0 here\)\."
    with pytest.raises(ValueError, match=words):
        old_run.train("sgd", tmp_path / "run", lr=0.5, max_grad_norm=1.0)


def test_a_model_loads(old):
    model = models.load(old / "model.safetensors")
    made = old_run.model()
    assert (model.classes, model.preprocessing, model.trained_on) == (
        made.classes,
        made.preprocessing,
        made.trained_on,
    )
    assert known(model.trained_on, old_run.DIGESTS[:5]) == 5
    expected = safetensors.torch.load_file(old / "logits.safetensors")["logits"]
    torch.testing.assert_close(old_run.logits(model), expected, rtol=1e-5, atol=1e-5)
    again = models.source(str(old / "model.safetensors")).build(("gnu",), (3, 8, 8))  # for other classes
    assert again.pretrained


def test_an_evaluation_goes_on(old, tmp_path):
    shutil.copy(old / "evaluation.safetensors", tmp_path / "state.safetensors")
    done = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert all(0 < done[f"{number}.restart"].sum() for number in (0, 1))  # the run was cut in the second attack
    iterations, iterate = {}, queue.Queue.iterate

    def judged(path):
        def counted(self):
            iterations[path] = iterations.get(path, 0) + 1
            return iterate(self)

        with patch.object(queue.Queue, "iterate", counted):
            return old_run.judged(models.load(old / "model.safetensors"), path)

    report, whole = judged(tmp_path / "state.safetensors"), judged(None)
    before = json.loads((old / "report.json").read_text())
    for now in (report, whole):
        assert now["clean_accuracy"] == before["clean_accuracy"]
        assert now["robust_accuracy"] == before["robust_accuracy"]
        assert [each["fooled"] for each in now["attacks"]] == [each["fooled"] for each in before["attacks"]]
    assert iterations[tmp_path / "state.safetensors"] < iterations[None]


def test_a_report_and_a_log_say_what_they_said(old, tmp_path):
    """A program that reads an older version's files can read new ones: no field is missing or has another type."""
    before = json.loads((old / "report.json").read_text())
    now = json.loads(json.dumps(old_run.judged(old_run.model(), None)))
    assert kinds(before).items() <= kinds(now).items()
    old_run.train("adamw", tmp_path)
    logs = ((folder / "log.jsonl").read_text().splitlines() for folder in (old / "adamw", tmp_path))
    before, now = ([json.loads(line) for line in log] for log in logs)
    assert now[-1]["format"] == 1
    for record, other in zip(before, now, strict=False):
        assert kinds(record).items() <= kinds(other).items()


def kinds(value, place=""):
    """The type of each field by its place; int and float are both "number"."""
    if isinstance(value, dict):
        return {key: kind for name, each in value.items() for key, kind in kinds(each, f"{place}.{name}").items()}
    return {place: "number" if type(value) in (int, float) else type(value).__name__}


def test_predictions_say_what_they_said(old, tmp_path):
    old_run.predict(old_run.pictures(tmp_path / "pictures"), old / "model.safetensors", tmp_path / "new.csv")
    before, now = (list(csv.DictReader(path.open())) for path in (old / "predictions.csv", tmp_path / "new.csv"))
    assert len(before) == len(now) == 3
    for row, other in zip(before, now, strict=True):
        assert Path(row.pop("picture")).name == Path(other["picture"]).name
        assert row.pop("class") == other["class"]
        for name, share in row.items():
            assert float(other[name]) == pytest.approx(float(share), abs=1e-5)


def test_a_batch_that_was_kept_is_there(old):
    batch = safetensors.torch.load_file(old / "nonfinite.safetensors")
    assert torch.equal(batch["images"], old_run.images(24)[0][batch["index"]])
    assert torch.equal(batch["labels"], old_run.images(24)[1][batch["index"]])


def test_a_number_of_a_later_version_is_refused_with_what_to_do(old, tmp_path):
    """Models and the states of evaluations; test_resume.py has the state of a training run."""
    for name in ("model", "evaluation"):
        with safetensors.safe_open(old / f"{name}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["fastadv"])
        tensors = safetensors.torch.load_file(old / f"{name}.safetensors")
        facts = {"fastadv": json.dumps(facts | {"format": facts["format"] + 9})}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors", facts)
    words = r"has the format \d+, this fastadv reads \d: install a newer fastadv"
    with pytest.raises(ValueError, match=words):
        models.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        old_run.judged(models.load(old / "model.safetensors"), tmp_path / "evaluation.safetensors")
