"""Two processes do what one does, end together, and their run goes on in one."""

import json
import os
import subprocess
import sys

import distributed_run
import pytest
import torch

from fastadv.training import Step

STEPS = 50
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*arguments, **variables):
    """The exit status and the errors of two processes, on the CPU."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [*LAUNCH, distributed_run.__file__, *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            _, errors = launcher.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its processes, which may wait for each other
            raise
    return launcher.returncode, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    status, errors = run("compare", folder)
    assert status == 0, errors
    return folder


def results(folder, name):
    """Of each of the two processes."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def without_seconds(records):
    return [{key: value for key, value in record.items() if not key.endswith("_s")} for record in records]


@pytest.mark.parametrize("case", distributed_run.CASES)
def test_two_processes_train_as_one_does(folder, case):
    model, records = distributed_run.train(*distributed_run.CASES[case])
    alone, before = (each.state_dict() for each in (model, distributed_run.network(*distributed_run.CASES[case][:2])))
    assert any((value - before[name]).abs().max() > 0.01 for name, value in alone.items())
    tolerance = 1e-3 if distributed_run.CASES[case][1] == torch.float32 else 1e-10
    for each in results(folder, case):
        torch.testing.assert_close(each["weights"], alone, rtol=0, atol=tolerance)
        assert [record.keys() for record in each["records"]] == [record.keys() for record in records]
        for one, other in zip(records, each["records"], strict=True):
            for key in ("loss", "train_accuracy", "lr", "robust_accuracy", "probe_pgd", "abnormal"):
                assert one.get(key) == pytest.approx(other.get(key), abs=1e-6), key
    assert sum("epoch" in record for record in records) == STEPS // 10


def test_processes_that_see_different_things_do_the_same(folder):
    """Other batch-norm statistics, an alarm and a checkpoint that is due in one of them only."""
    first, second = (without_seconds(result["records"]) for result in results(folder, "disagreement"))
    assert first == second
    assert [record.get("action") for record in first if "epoch" in record] == [None, None, "stop"]
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    assert without_seconds(map(json.loads, lines)) == first


def test_a_signal_to_one_process_ends_both_and_one_goes_on_alone(tmp_path, monkeypatch):
    status, errors = run("interrupted", tmp_path, 23, ACCELERATE_USE_CPU="true")
    assert status != 0
    assert "Connection closed" not in errors  # neither was left waiting for the other
    first, second = ((tmp_path / f"steps-{rank}").stat().st_size for rank in (0, 1))
    assert first == second
    assert 23 <= first <= 24  # the first one learns of it with the sums of a step
    taken, apply = [], Step.apply
    monkeypatch.setattr(Step, "apply", lambda step: (taken.append(None), apply(step)))
    with pytest.warns(UserWarning, match="'processes': 2.* goes on with .*'processes': 1"):
        _, records = distributed_run.train(*distributed_run.CASES["full"], folder=tmp_path, resume=True)
    assert first + len(taken) == STEPS
    assert [record["epoch"] for record in records if "epoch" in record] == list(range(STEPS // 10))
