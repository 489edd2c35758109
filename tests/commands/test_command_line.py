"""The messages of the command line: progress, and errors in words instead of tracebacks."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastadv
from fastadv import cli, data, models
from fastadv.commands import evaluate as evaluate_command
from fastadv.commands import finetune as finetune_command
from fastadv.commands.speech import speaking
from fastadv.evaluation import run as evaluation_run
from fastadv.training import stages, updates

SHORT = ("--data", "digits", "--model", "mlp", "--device", "cpu", "--classes", "0-1", "--probe", "0", "--eps", "20")


def finetune(out, *options):
    cli.main(["finetune", *SHORT, "--out", str(out), *options])


def failed(capsys, *words):
    """(exit status, last line of its output) of a command that fails without a traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    said = capsys.readouterr().err
    if isinstance(ended.value.code, str):
        return 1, ended.value.code
    assert "Traceback" not in said
    return ended.value.code, said.strip().splitlines()[-1]


def shares(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_off_a_terminal_each_epoch_is_a_line_with_the_numbers_of_the_log(tmp_path, caplog):
    finetune(tmp_path, "--epochs", "2", "--lp-ft", "1", "--probe", "64", "--eval-every", "2")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "epoch" in record]
    lines = [message for message in caplog.messages if message.startswith("epoch ")]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for record, line in zip(epochs, lines, strict=True):
        names = ("train_accuracy", "clean_accuracy", "robust_accuracy", "probe_pgd")
        assert shares(line) == [pytest.approx(100 * record[name], abs=0.05) for name in names if name in record]
        assert float(re.search(r"loss ([\d.e-]+)", line)[1]) == pytest.approx(record["loss"], rel=1e-3)
    assert ["left" in line for line in lines] == [True, True, False]
    assert sum("clean" in line for line in lines) == 2  # the last epoch of LP-FT's linear stage and the last of all


def test_the_report_has_the_learning_rate_of_the_method_where_none_was_asked_for(tmp_path):
    finetune(tmp_path, "--epochs", "1", "--method", "linear", "--alpha", "25")
    text = re.sub(r"<[^>]*>|\s+", " ", (tmp_path / "report.html").read_text())
    assert re.search(r" lr +0.01 ", text)
    assert f" alpha {25 / 255}" in re.sub(" +", " ", text)


def test_an_epoch_that_takes_long_says_how_far_it_is(tmp_path, caplog):
    finetune(tmp_path, "--epochs", "1", "--checkpoint-s", "0", "--batch-size", "60")
    batches = [m for m in caplog.messages if re.match(r"epoch 1: batch \d of \d$", m)]
    assert len(batches) == int(re.search(r"of (\d)", batches[0])[1])


def test_quiet_and_verbose_before_the_command_or_behind_it(tmp_path, capsys, caplog):
    common = ("--epochs", "1", "--validation", "0")
    for option in ("-q", "-v"):
        words = ["finetune", *SHORT, "--out", str(tmp_path / option), *common]
        cli.main([option, *words] if option == "-q" else [*words, option])
        printed = capsys.readouterr().out
        assert (printed == "") == (option == "-q")
        assert any("parameters train" in message for message in caplog.messages) == (option == "-v")
        caplog.clear()
    assert logging.getLogger("fastadv").level == logging.NOTSET  # the level is restored


def test_a_warning_is_a_line(capsys):
    for verbosity, start in (
        (logging.INFO, "fastadv: warning: look out\n"),
        (logging.DEBUG, "here.py:7: UserWarning:"),
    ):
        with speaking(verbosity):
            assert warnings.formatwarning(UserWarning("look out"), UserWarning, "here.py", 7).startswith(start)
        print("caf\udce9")  # the terminal's encoding lacks this character
    assert "caf" in capsys.readouterr().out


def test_a_traceback_is_shown_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    def tracebacks(*options):
        with pytest.raises(SystemExit, match="unknown model"):
            cli.main(["finetune", "--data", "digits", "--model", "nothing", "--out", str(tmp_path), *options])
        return capsys.readouterr().err.count("Traceback")

    assert [tracebacks(), tracebacks("-v")] == [0, 1]
    monkeypatch.setenv("FASTADV_TRACEBACK", "1")
    assert tracebacks() == 1


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_command, "train", lambda *_: {}["a fault"])
    with pytest.raises(KeyError, match="a fault"):
        finetune(tmp_path)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fastadv {fastadv.__version__}\n")


def test_info_is_words_for_people_and_json_for_programs(capsys):
    cli.main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    calls = facts.pop("calls")
    assert facts == {name: value for name, value in fastadv.info().items() if name != "calls"}
    assert set(calls) == set(facts["backends"])
    cli.main(["info"])
    printed = capsys.readouterr().out
    assert not re.search(r"True|False|None|[{}\[\]]", printed)
    rows = {
        line.split()[0]: line for line in printed.partition("Backends")[2].partition("Built")[0].splitlines() if line
    }
    assert rows.keys() == facts["backends"].keys()
    for name, backend in facts["backends"].items():
        assert backend["why"] in rows[name]
        assert ("ready" in rows[name]) == backend["available"]
    for word in (facts["version"], facts["torch"]["version"], *facts["devices"], *facts["serves"].values()):
        assert word in printed


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("command", ["finetune", "evaluate", "pretrain", "predict"])
@pytest.mark.parametrize("name", ["cuda:99", "xpu", "gpu", "meta", ""])
def test_a_device_that_is_not_here_is_refused_and_those_that_are_are_named(command, name, capsys):
    given = ["--out", "o", "--data", "digits"] if command != "predict" else ["x.jpg"]
    code, said = failed(capsys, command, *given, "--model", "m", "--device", name)
    assert code == 2
    assert re.search(rf"device '{name}'.*; here are cpu", said)


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a PyTorch without CUDA")
def test_of_cuda_it_is_said_why(capsys):
    assert "built without CUDA" in failed(capsys, "predict", "x.jpg", "--model", "m", "--device", "cuda")[1]


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_after_ctrl_c_it_says_how_to_go_on_and_does(tmp_path, monkeypatch, capsys):
    given = ("finetune", *SHORT, "--epochs", "2", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(finetune_command, "train", interrupt)
        assert failed(capsys, *given) == (130, "fastadv: interrupted: nothing is kept of it")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "epoch_line", interrupt)
        code, said = failed(capsys, *given)
    assert (code, str(tmp_path / "out" / "state") in said) == (130, True)
    assert "the same command and --resume" in said
    with monkeypatch.context() as patch:
        patch.setattr(stages, "epoch_line", interrupt)
        code, said = failed(capsys, *given, "--resume")
    assert "the same command," in said
    cli.main([*map(str, given), "--resume"])
    evaluation = ("evaluate", "--model", tmp_path / "out" / "model.safetensors", *SHORT[:2], *SHORT[6:8])
    monkeypatch.setattr(evaluation_run.Run, "attack", interrupt)
    code, said = failed(capsys, *evaluation, "--out", tmp_path)
    assert (code, said) == (
        130,
        f"fastadv: interrupted: go on with the same command, from {tmp_path}/state.safetensors",
    )


def too_large(where):
    if where == "numpy":
        np.empty(2**55)
    elif where == "torch":
        torch.empty(2**55)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nGPU 0 has")


@pytest.mark.parametrize("where", ["numpy", "torch", "cuda"])
def test_out_of_memory_names_the_batch_and_what_makes_it_smaller(tmp_path, monkeypatch, capsys, where):
    with monkeypatch.context() as patch:
        patch.setattr(updates.Updates, "take", lambda *_: too_large(where))
        options = ("--batch-size", "48", "--grad-accum-steps", "2")
        code, said = failed(capsys, "finetune", *SHORT, "--out", tmp_path / "out", *options)
    assert code == 1
    assert said.startswith("fastadv: error: out of memory with --batch-size 48 in 2 parts: take a smaller --batch-size")
    assert "--grad-accum-steps 4" in said
    assert re.search(r"allocate [\d.]+ (\w?i?B|bytes)", said)
    finetune(tmp_path / "done", "--epochs", "1")
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *_, **__: too_large(where))
    model = tmp_path / "done" / "model.safetensors"
    evaluation = ("evaluate", "--model", model, *SHORT[:2], *SHORT[6:8], "--batch-size", "77", "--out", tmp_path / "e")
    assert "out of memory with --batch-size 77: take a smaller --batch-size" in failed(capsys, *evaluation)[1]


@pytest.mark.parametrize("command", ["finetune", "evaluate", "pretrain"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(models, "source", lambda *_, **__: pytest.fail("it was read"))
    (tmp_path / "file").write_text("mine")
    given = (command, *(["--data", "digits", "--model", "m"] if command != "pretrain" else []))
    for out, words in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "is a file")):
        assert words in failed(capsys, *given, "--out", out)[1]
    with monkeypatch.context() as patch:
        patch.setattr("tempfile._os.open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
        said = failed(capsys, *given, "--out", tmp_path / "a" / "b")[1]
    assert re.search(rf"cannot write to --out {tmp_path}/a/b \(to make it in {tmp_path}\): read-only", said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_said_and_costs_no_state(tmp_path, monkeypatch, capsys):
    given = ("finetune", *SHORT, "--epochs", "2", "--out", tmp_path / "out")
    saves, flush = [], os.fsync

    def full(descriptor):
        saves.append(None)
        if len(saves) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, said = failed(capsys, *given)
    assert code == 1
    assert re.search(
        r"No space left on device: '.*out/.*'.*: make room, then go on with the same command and --res", said
    )
    cli.main([*map(str, given), "--resume"])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "fastadv", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


def test_a_file_that_is_no_model_is_a_line(tmp_path, capsys):
    for name, content in (("empty", b""), ("text", b"weights"), ("header", (8).to_bytes(8, "little") + b'{"a": 1}')):
        path = Path(tmp_path, f"{name}.safetensors")
        path.write_bytes(content)
        code, said = failed(capsys, "predict", "x.jpg", "--model", path)
        assert (code, "is not a safetensors file" in said) == (1, True)


@pytest.mark.parametrize(("option", "meant"), [("--batchsize", "--batch-size"), ("--slots-", None), ("--zzz=3", None)])
def test_an_unknown_option_is_an_error_of_its_command(capsys, option, meant):
    status, words = failed(capsys, "evaluate", "--data", "digits", "--model", "x", "--out", "y", option, "8")
    assert status == 2
    assert words.startswith(f"fastadv evaluate: error: unrecognized arguments: {option} 8")
    assert words.endswith(f"Did you mean {meant}?" if meant else f"{option} 8")


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "--data", "digits", "--out", ""),
        ("finetune", "--data=", "--out", "x"),
        ("finetune", "--data", "digits", "--init", "", "--out", "x"),
        ("evaluate", "--data", "", "--model", "m", "--out", "x"),
        ("predict", "", "--model", "m"),
    ],
)
def test_an_empty_word_is_no_path(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    empty = next(i for i, word in enumerate(words) if not word or word.endswith("="))
    place = words[empty] or words[empty - 1]
    code, said = failed(capsys, *words)
    assert code == 2
    assert f"nothing after {place}: is a variable of the shell not set?" in said
    assert not list(tmp_path.iterdir())


def test_a_budget_beyond_the_scale_is_named_as_it_was_given(tmp_path, monkeypatch, capsys):
    models.save(models.source("mlp").build(("0", "1"), (1, 8, 8)), tmp_path / "model.safetensors")
    given = ("--model", tmp_path / "model.safetensors", "--data", "digits", "--out", tmp_path / "out")
    assert "which is 300/255" in failed(capsys, "evaluate", *given, "--eps", "300")[1]


def test_a_closed_stdout_is_no_fault(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    cli.main(["info"])
    assert capsys.readouterr().err == ""


def test_a_pipe_that_closes_at_the_end_costs_nothing_but_words(tmp_path, monkeypatch):
    def closed(text):
        raise BrokenPipeError

    with (tmp_path / "said").open("w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(
            models, "save", lambda *_, save=models.save: (patch.setattr(finetune_command, "say", closed), save(*_))
        )
        with pytest.raises(SystemExit):
            cli.main(["finetune", *map(str, SHORT), "--out", str(tmp_path / "out")])
    assert {"model.safetensors", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attacks", "pgd-10, nosuch"), "unknown attack 'nosuch'"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
        (("--limit", "0"), "--limit must be at least 1"),
    ],
)
def test_evaluate_refuses_what_cannot_be_before_it_reads_the_data(tmp_path, monkeypatch, capsys, words, message):
    models.save(models.source("mlp").build(("0", "1"), (1, 8, 8)), tmp_path / "model.safetensors")
    monkeypatch.setattr(data, "held_out", lambda *_, **__: pytest.fail("it was read"))
    given = ("--model", tmp_path / "model.safetensors", "--data", "digits", "--out", tmp_path / "out")
    assert message in failed(capsys, "evaluate", *given, *words)[1]
    assert not (tmp_path / "out").exists()


def test_a_folder_at_home_is_meant_where_no_shell_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    options = ("--data", "digits", "--model", "mlp", "--epochs", "1", "--device", "cpu")
    cli.main(["finetune", *options, "--probe", "0", "--out=~/run"])
    assert (tmp_path / "home" / "run" / "model.safetensors").exists()
    assert not (tmp_path / "~").exists()
