"""Only one run may use a folder: the error names the process of the first run, and a lock ends with its process."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from fastadv.evaluation import evaluate
from fastadv.locks import InUseError, held
from fastadv.training import Trainer

HOLDER = """
import sys, time
from fastadv.locks import held
with held(sys.argv[1] + "/run", "it"), held(sys.argv[1] + "/state", "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def data(count=12):
    return torch.rand(count, 3, 4, 4), torch.arange(count) % 3


def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


@pytest.fixture
def another(tmp_path):
    """Another process that has locked the run in tmp_path and the state of an evaluation there."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_by_name_of_the_first_which_keeps_its_files(tmp_path, another):
    trainer = Trainer(model(), 8 / 255, epochs=1, batch_size=4, probe=0, progress=False, folder=tmp_path, resume=True)
    with pytest.raises(InUseError, match=rf"run in {tmp_path} is in use .*process {another.pid} on .*since 20"):
        trainer.fit(data(), data())
    with pytest.raises(InUseError, match=rf"process {another.pid} on "):
        evaluate(model(), data(), ["fgsm"], state=tmp_path / "state", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock", "run.owner", "state.lock", "state.owner"}
    os.kill(another.pid, signal.SIGKILL)
    another.wait()
    trainer.fit(data(), data())
    assert not (tmp_path / "run.owner").exists()


def test_a_thread_may_hold_it_twice_and_another_thread_not_at_all(tmp_path):
    refused = []

    def enter():
        try:
            with held(tmp_path / "run", "the run"):
                pass
        except InUseError as error:
            refused.append(str(error))

    with held(tmp_path / "run", "the run"):
        enter()
        assert not refused
        for _ in range(2):  # the end of the inner block in `enter` did not release the lock
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
    assert len(refused) == 2
    assert f"process {os.getpid()}" in refused[0]
    enter()
    assert len(refused) == 2


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    filelock = pytest.importorskip("filelock")
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda self: exec("raise NotImplementedError"))
    with pytest.warns(UserWarning, match="has no locks"), held(tmp_path / "run", "the run"):
        pass
