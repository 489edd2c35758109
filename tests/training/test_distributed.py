"""Two processes give the result of one process and end together, and one process can resume their run."""

import json
import os
import re
import subprocess
import sys

import distributed_faults
import distributed_run
import numpy as np
import pytest
import torch
from fitted import timeless
from PIL import Image

from fastadv import cli, data, models
from fastadv.locks import held
from fastadv.training import TrainStep

STEPS = 50
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*arguments, program=distributed_run, **variables):
    """(exit status, errors) of two processes on the CPU."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [*LAUNCH, program.__file__, *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            _, errors = launcher.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # the launcher ends its processes, which may wait for each other
            raise
    return launcher.returncode, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    status, errors = run("compare", folder)
    assert status == 0, errors
    return folder


def results(folder, name):
    """The results of the two processes."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", distributed_run.CASES)
def test_two_processes_train_as_one_does(folder, case):
    model, records, judged = distributed_run.train(*distributed_run.CASES[case])
    alone, before = (each.state_dict() for each in (model, distributed_run.network(*distributed_run.CASES[case][:2])))
    assert any((value - before[name]).abs().max() > 0.01 for name, value in alone.items())
    tolerance = 1e-3 if distributed_run.CASES[case][1] == torch.float32 else 1e-10
    for each in results(folder, case):
        torch.testing.assert_close(each["weights"], alone, rtol=0, atol=tolerance)
        assert [record.keys() for record in each["records"]] == [record.keys() for record in records]
        for one, other in zip(records, each["records"], strict=True):
            for key in (
                "loss",
                "train_accuracy",
                "lr",
                "clean_accuracy",
                "robust_accuracy",
                "pma_accuracy",
                "probe_pgd",
                "abnormal",
                "fresh",
                "agreement",
            ):
                assert one.get(key) == pytest.approx(other.get(key), abs=1e-6), key
    assert sum("epoch" in record for record in records) == STEPS // 10
    shares = [each["judged"] / judged for each in results(folder, case)]
    assert max(shares) < 0.65, shares  # each process evaluates its part of the images only


def test_processes_that_see_different_things_do_the_same(folder):
    """Only one process has other batch-norm statistics, an alarm, and a checkpoint that is due."""
    first, second = (timeless(result["records"]) for result in results(folder, "disagreement"))
    assert first == second
    assert [record.get("action") for record in first if "epoch" in record] == [None, None, "stop"]
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    assert timeless([json.loads(line) for line in lines]) == first


def test_a_signal_to_one_process_ends_both_and_one_goes_on_alone(tmp_path, monkeypatch):
    status, errors = run("interrupted", tmp_path, 23, ACCELERATE_USE_CPU="true")
    assert status != 0
    assert "Connection closed" not in errors  # no process waited for the other
    first, second = ((tmp_path / f"steps-{rank}").stat().st_size for rank in (0, 1))
    assert first == second
    assert 23 <= first <= 24  # the first process learns of the signal with the sums of a step
    taken, apply = [], TrainStep.apply
    monkeypatch.setattr(TrainStep, "apply", lambda step: (taken.append(None), apply(step)))
    with pytest.warns(UserWarning, match="'processes': 2.* goes on with .*'processes': 1"):
        _, records, _ = distributed_run.train(*distributed_run.CASES["full"], folder=tmp_path, resume=True)
    assert first + len(taken) == STEPS
    assert [record["epoch"] for record in records if "epoch" in record] == list(range(STEPS // 10))


# ---------------------------------------------------------------------- trouble, and two disks


def photos(folder, seed=0):
    """Twenty pictures for each of three classes, in different colours."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 200, (8, 8, 3)) + 55 * (np.arange(3) == label)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """(the folder, [outcomes of the first process, outcomes of the second])."""
    top = tmp_path_factory.mktemp("troubled")
    for disk in (top / "0", top / "1"):
        for name in ("photos", "differ", "damaged"):
            photos(disk / name)
        for i in (1, 2):
            (disk / "damaged" / "red" / f"{i:02}.png").write_bytes(b"no picture")
    (top / "1" / "differ" / "green" / "07.png").write_bytes((top / "1" / "differ" / "green" / "08.png").read_bytes())
    torch.manual_seed(7)
    models.save(models.source("mlp").build(("blue", "green", "red"), (3, 8, 8)), top / "0" / "init.safetensors")
    with held(top / "locked" / "run", "the run of the test"):
        status, errors = run(top, program=distributed_faults)
    assert status == 0, errors
    return top, [json.loads((top / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("unreadable", "OSError: the disk is gone"),
        ("in use", "InUseError: the run in .*locked is in use by another process .*process [0-9]+ on .*since"),
        ("other data", "ValueError: process 1 differs from process 0 in training data"),
        ("other settings", "ValueError: process 1 differs from process 0 in lr .0.002 there, 0.001 here"),
        ("other attack", "ValueError: process 1 differs from process 0 in attack .None there, 'fgsm' here"),
        ("other measurement", "ValueError: process 1 differs from process 0 in measure_backbone"),
        ("other folder", "ValueError: process 1 differs from process 0 in having a folder .False there, True here"),
        ("other model", "ValueError: process 1 has another model than process 0, beginning with 1.bias"),
        ("other pictures", "ValueError: process 1 has other (train|val|test) pictures than process 0"),
        ("damaged picture", "ValueError: .*pictures cannot be read"),
        ("layers skipped late", "RuntimeError: an update used other parameters than the passes before training did"),
    ],
)
def test_what_one_process_meets_ends_all_with_the_same_error(troubled, trouble, words):
    first, second = (met[trouble] for met in troubled[1])
    assert re.match(words, first), first
    assert second == first


def test_the_disk_of_the_first_process_is_enough_to_go_on(troubled):
    top, met = troubled
    for each in met:
        assert (each["first"], each["untouched"], each["resumed"]) == ("[0, 1]", True, "[0, 1, 2]")
    assert (top / "0" / "run" / "state").exists()
    assert not (top / "1" / "run").exists()


def test_what_runs_beside_the_steps_takes_their_parts_where_images_come_in_shares(troubled):
    assert [each["parts"] for each in troubled[1]] == [[4, 4], [4, 4]]  # batches of 8 in two processes


def test_what_the_first_process_came_with_is_no_fault_in_the_others(troubled):
    assert [each["mask"] for each in troubled[1]] == ["[0, 1]"] * 2


def test_layers_that_are_skipped_at_random_train_in_several_processes(troubled):
    assert [each["skipped layers"] for each in troubled[1]] == ["10"] * 2


def test_a_process_may_hold_none_of_the_images(troubled):
    """This happens where all pictures of its share are damaged."""
    assert [each["all in one"] for each in troubled[1]] == ["[0, 1]"] * 2


def test_nothing_keeps_the_process_group_alive_at_the_end(troubled):
    assert [each["kept"] for each in troubled[1]] == [0, 0]


def test_two_processes_decode_a_half_each_and_tune_as_one_does(troubled, tmp_path):
    top, met = troubled
    arguments = ("finetune", "--data", top / "0" / "photos", *distributed_faults.FINETUNE, "--out", tmp_path / "tuned")
    cli.main([*map(str, arguments), "--init", str(top / "0" / "init.safetensors")])
    assert [each["finetune"] for each in met] == ["None", "None"]
    assert [each["decoded"] for each in met] == [30, 30]
    both, one = (models.load(folder / "tuned" / "model.safetensors").network for folder in (top / "0", tmp_path))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], value, rtol=0, atol=1e-3)
    assert (top / "0" / "tuned" / "report.html").exists()
    assert not (top / "1" / "tuned").exists()


def test_pictures_that_cannot_be_read_are_left_out_of_all_shares(troubled):
    top, met = troubled
    with pytest.warns(UserWarning, match="2 of 60 pictures were left out"):
        alone = data.load(top / "0" / "damaged", skip_corrupt=True)
    (images, labels), (none, same) = (torch.load(top / f"left-out-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(images, alone.x_train)
    assert torch.equal(labels, alone.y_train)
    assert torch.equal(same, labels)
    assert len(none) == 0
    assert [each["left out"][0] for each in met] == [len(labels)] * 2
