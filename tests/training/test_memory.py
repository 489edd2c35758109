"""The memory for training images: an epoch reads the rows that the epoch before wrote, also after a kill."""

import multiprocessing
import os
import random
import signal

import pytest
import torch

from fastadv.files import FormatError
from fastadv.team import Team
from fastadv.training import memory
from fastadv.training.memory import FILES, HEADER, SampleMemory

COUNT, SHAPE = 23, (5,)


def made(folder, resume=False, dtype=torch.float32):
    return SampleMemory(folder, "rows", COUNT, SHAPE, dtype, resume=resume)


def epoch_of(kept, epoch, generator=None):
    """An epoch with batches in random order; new rows depend only on the rows of the epoch before."""
    for rows in torch.randperm(COUNT, generator=generator).split(4):
        kept.write(rows, 2 * kept.read(rows) + rows[:, None] + epoch)


def expected(epochs):
    held = torch.zeros(COUNT, *SHAPE)
    for epoch in range(epochs):
        held = 2 * held + torch.arange(COUNT)[:, None] + epoch
    return held


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_epoch_reads_what_the_one_before_wrote(tmp_path, on_disk):
    kept = made(tmp_path if on_disk else None)
    for epoch in range(5):
        kept.begin(epoch)
        assert torch.equal(kept.before, expected(epoch))
        epoch_of(kept, epoch)
        assert torch.equal(kept.written, expected(epoch + 1))
        epoch_of(kept, epoch)  # the epoch is repeated in another order
        assert torch.equal(kept.before, expected(epoch))


def _work(folder, epoch, deaths):
    kept = made(folder, resume=epoch > 0)
    kept.begin(epoch)
    for rows in torch.randperm(COUNT).split(4):
        if random.random() < deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        kept.write(rows, 2 * kept.read(rows) + rows[:, None] + epoch)
    kept.flush()
    os._exit(0)


def test_killed_processes_lose_and_repeat_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    killed = 0
    for epoch in range(6):
        code = None
        while code != 0:
            process = fork.Process(target=_work, args=(tmp_path, epoch, 0.5 if killed < 8 else 0))
            process.start(), process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
    assert killed
    kept = made(tmp_path, resume=True)
    kept.begin(6)
    assert torch.equal(kept.before, expected(6))


def test_the_last_checkpoint_but_one_can_go_on_as_well(tmp_path):
    kept = made(tmp_path)
    for epoch in range(4):
        kept.begin(epoch)
        epoch_of(kept, epoch)
    again = made(tmp_path, resume=True)  # the newest checkpoint, of epoch 3, is damaged
    for epoch in (2, 3):
        again.begin(epoch)
        assert torch.equal(again.before, expected(epoch))
        epoch_of(again, epoch)
    with pytest.raises(ValueError, match=r"rows for epoch 4, counted from 0, and the run goes on in epoch 1"):
        again.begin(1)


def test_files_that_are_not_its_own_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rows\.0 is missing"):
        made(tmp_path, resume=True)
    made(tmp_path)
    with pytest.raises(ValueError, match=r"has dtype torch\.float32, not torch\.uint8"):
        made(tmp_path, resume=True, dtype=torch.uint8)
    first = tmp_path / "rows.0"
    whole = first.read_bytes()
    first.write_bytes(whole.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(FormatError, match="format 9"):
        made(tmp_path, resume=True)
    first.write_bytes(bytes(HEADER) + whole[HEADER:])
    with pytest.raises(ValueError, match=r"header of .*rows\.0 is damaged"):
        made(tmp_path, resume=True)
    first.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"rows\.0 has .* bytes"):
        made(tmp_path, resume=True)
    made(tmp_path)  # a new run begins with zeros
    kept = made(tmp_path, resume=True)
    kept.begin(0)
    assert not kept.before.any()


def test_a_full_disk_is_told_before_the_memory_is_written_to(tmp_path):
    limit = HEADER + 4 * COUNT * SHAPE[0] - 1
    resource = pytest.importorskip("resource")

    def full(folder):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            made(folder)
        except OSError:
            os._exit(0)
        os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=full, args=(tmp_path,))
    process.start(), process.join()
    assert process.exitcode == 0


def test_several_processes_need_files_of_one_machine(tmp_path, monkeypatch):
    team = Team(0, 2)
    with pytest.raises(ValueError, match="share the rows of their images by files: give a folder"):
        SampleMemory(None, "rows", COUNT, SHAPE, torch.uint8, team=team)
    monkeypatch.setattr(Team, "from_first", lambda team, action: action())
    monkeypatch.setattr(Team, "by_all", lambda team, action: action())
    monkeypatch.setattr(Team, "gathered", lambda team, value: [value, ("elsewhere", value[1])])
    with pytest.raises(ValueError, match="process 1 does not share the files of process 0"):
        SampleMemory(tmp_path, "rows", COUNT, SHAPE, torch.uint8, team=team)
    assert len(list(tmp_path.iterdir())) == FILES == 3
    assert memory.FORMAT == 1
