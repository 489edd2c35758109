"""The benchmarks and the GPU script, tried without a GPU: what they write, that they resume, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/gpu/run.sh"
PARTS = ("build", "correctness", "kernels", "bench", "attacks", "training", "counters", "sanitizer")
FACTS = {"device", "device_type", "driver", "cuda", "torch", "triton", "python", "threads", "commit", "date", "dry_run"}


def run(*command, **env):
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
    )


def report(*arguments):
    return run(sys.executable, ROOT / "benchmarks/report.py", *arguments)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A folder that a dry run of the script has filled."""
    out = tmp_path_factory.mktemp("dry")
    done = run(SCRIPT, out, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def result(out, part):
    return json.loads((out / f"{part}.json").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_says_where_it_ran(dry, part):
    found = result(dry, part)
    assert found["ok"] is True
    assert found["part"] == part
    facts = found["environment"]
    assert set(facts) >= FACTS
    assert facts["device"] == facts["device_type"] == "cpu"
    assert facts["dry_run"] is True
    assert len(facts["commit"].rstrip("+")) == 40 or facts["commit"] == os.environ.get("FASTADV_COMMIT", "unknown")


def test_the_parts_did_their_work(dry):
    assert result(dry, "build")["flags"] == {"FASTADV_CPU": "0", "FASTADV_CUDA": "0"}
    tests = result(dry, "correctness")["tests"]
    assert tests["run"] > 10
    assert tests["failure"] == tests["error"] == tests["skipped"] == 0
    tools = result(dry, "sanitizer")["tools"]
    assert all(run["calls"] >= 100 and run["mismatches"] == 0 for run in tools.values())
    assert result(dry, "kernels")["facts"]["compiler"]


def test_benchmarks_have_pytest_benchmark_format_and_the_ratios(dry):
    rows = [b["extra_info"] for b in result(dry, "bench")["benchmarks"]]
    (op,) = [r for r in rows if r["kind"] == "op"]
    seconds, nbytes = op["median_seconds"], op["bytes"]
    assert set(seconds) >= {"fastadv", "naive", "compile", "copy"}
    assert all(value > 0 for value in seconds.values())
    tensor = 2 * 3 * 8 * 8 * 4
    assert nbytes == {"fastadv": 4 * tensor, "copy": 2 * tensor}
    assert op["speedup_over_naive"] == pytest.approx(seconds["naive"] / seconds["fastadv"])
    assert op["speedup_over_compile"] == pytest.approx(seconds["compile"] / seconds["fastadv"])
    assert op["share_of_copy_rate"] == pytest.approx(2 * seconds["copy"] / seconds["fastadv"])
    (timed,) = [b for b in result(dry, "bench")["benchmarks"] if b["extra_info"]["kind"] == "op"]
    assert timed["stats"]["median"] == pytest.approx(seconds["fastadv"])
    host = [r for r in rows if r["kind"] == "host"]
    assert {r["op"] for r in host} == {"pgd_step", "fgsm_step", "fgsm_rs_step", "random_init"}


def test_the_training_part_has_steps_and_runs(dry):
    found = result(dry, "training")
    rows = [b["extra_info"] for b in found["benchmarks"]]
    assert {row["method"] for row in rows} == {"full", "lora"}
    for row in rows:
        seconds = row["quartile_seconds"]
        parts = 7 * seconds["F + Bx"] + seconds["F + B"] + seconds["optimiser"]
        assert row["over_parts"]["pgd"] == pytest.approx(seconds["pgd"] / parts)
    runs = [(row["method"], row["attack"]) for row in found["transfer"]["rows"]]
    assert runs == [("linear", "fgsm"), ("linear", "pgd"), ("full", "fgsm"), ("full", "pgd")]
    assert [(row["method"], row["attack"]) for row in found["summary"]] == runs


def test_a_second_run_skips_what_is_done(dry):
    before = {path: path.stat().st_mtime_ns for path in dry.glob("*.json")}
    again = run(SCRIPT, dry, "--dry-run")
    assert again.returncode == 0
    assert again.stdout.splitlines() == [f"{part}: done already" for part in PARTS]
    assert {path: path.stat().st_mtime_ns for path in dry.glob("*.json")} == before


def test_another_machine_builds_and_goes_on(dry):
    code = "import importlib.util, sys, parts; importlib.util.find_spec = lambda name: None; parts.left(*sys.argv[1:])"
    path = f"{ROOT}:{ROOT / 'benchmarks'}:{SCRIPT.parent}"
    assert run(sys.executable, "-c", code, dry, *PARTS, PYTHONPATH=path).stdout.split() == ["build"]


def test_a_failed_part_is_done_again_and_its_finished_steps_are_kept(dry, tmp_path):
    out = shutil.copytree(dry, tmp_path / "out")
    failed = {**result(out, "correctness"), "ok": False}
    (out / "correctness.json").write_text(json.dumps(failed))
    step = (out / "correctness/triton.json").stat().st_mtime_ns
    assert run(SCRIPT, out, "--dry-run", "--part", "correctness").returncode == 0
    assert result(out, "correctness")["ok"] is True
    assert (out / "correctness/triton.json").stat().st_mtime_ns == step


@pytest.mark.parametrize("arguments", [(), ("--part", "nothing", "x"), ("--no-such-flag", "x"), ("x", "y")], ids=str)
def test_wrong_arguments_are_refused(arguments, tmp_path):
    done = run(SCRIPT, *(tmp_path / a if a in "xy" else a for a in arguments))
    assert done.returncode == 2
    assert "run.sh OUTDIR" in done.stderr
    assert not list(tmp_path.iterdir())


def test_report_makes_tables_and_a_plot(dry, tmp_path):
    text, picture = tmp_path / "report.md", tmp_path / "report.png"
    done = report(dry, "--markdown", text, "--plot", picture)
    assert done.returncode == 0, done.stderr
    written = text.read_text()
    assert "dry run: no measurement" in written
    assert "| pgd_step | tiny | f32/f32 | cpu |" in written
    assert "| vit | lora | 4 |" in written
    assert "| linear | pgd | 1 |" in written
    assert all(f"{part}: ok" in written for part in ("build", "correctness", "kernels", "sanitizer"))
    assert picture.read_bytes().startswith(b"\x89PNG")


COUNTED = {"op": "pgd_step", "dtype": "f32/f32", "backend": "cuda", "bytes": 1600, "elements": 100}
COUNTED |= {"nanoseconds": 2.0, "dram_bytes": 1600, "dram_percent": 80, "warp_instructions": 75}
COUNTED |= {"issue_slots_percent": 30}


def test_report_shows_what_was_counted(dry, tmp_path):
    path, text, picture = tmp_path / "counters.json", tmp_path / "report.md", tmp_path / "roofline.png"
    path.write_text(json.dumps({**result(dry, "counters"), "launches": [COUNTED]}))
    done = report(path, "--markdown", text, "--roofline", picture)
    assert done.returncode == 0, done.stderr
    assert "| pgd_step | f32/f32 | cuda | 0.0 | 800 | 80% | 24.0 | 30% |" in text.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "there are no counters" in report(dry / "bench.json", "--roofline", picture).stderr


NCU = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum"
"","","ns","inst"
"0","flat_kernel","147,900","26,417,664"
"""


def test_counters_are_read():
    metrics = {"gpu__time_duration.sum": "nanoseconds", "smsp__inst_executed.sum": "warp_instructions"}
    code = f"import json, parts; parts.METRICS = {metrics!r}; print(json.dumps(parts.counted({NCU!r})))"
    done = run(sys.executable, "-c", code, PYTHONPATH=f"{ROOT}:{ROOT / 'benchmarks'}:{SCRIPT.parent}")
    assert json.loads(done.stdout) == [{"nanoseconds": 147900.0, "warp_instructions": 26417664.0}]


def doctored(dry, tmp_path, device_type, factor):
    """The dry run's benchmark as if the op had moved `factor` times the bytes of the copy."""
    bench = result(dry, "bench")
    for row in (b["extra_info"] for b in bench["benchmarks"]):
        if row["kind"] == "op":
            row.update(device_type=device_type, bytes_per_second=factor * row["copy_bytes_per_second"])
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    return path


def test_report_refuses_a_gpu_figure_above_the_roofline(dry, tmp_path):
    text = tmp_path / "report.md"
    done = report(doctored(dry, tmp_path, "cuda", 1.5), "--markdown", text)
    assert done.returncode == 1
    assert "pgd_step tiny f32/f32" in done.stderr
    assert "1.50 times the fastest measured copy" in done.stderr
    assert not text.exists()


def test_report_allows_noise_and_warns_on_a_cpu(dry, tmp_path):
    assert report(doctored(dry, tmp_path, "cuda", 1.2)).stderr == ""
    done = report(doctored(dry, tmp_path, "cpu", 1.5))
    assert done.returncode == 0
    assert "warning" in done.stderr
    assert "warning" in done.stdout


def test_report_refuses_other_files(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    done = report(other)
    assert done.returncode == 1
    assert "other.json: not a result of these benchmarks" in done.stderr


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1a' for 'sm_90'
ptxas info    : Function properties for _Z1a
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1b' for 'sm_90'
ptxas info    : Function properties for _Z1b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
"""


def test_the_compilers_report_is_read():
    code = f"import json, parts; print(json.dumps(parts.resources({PTXAS!r})))"
    done = run(sys.executable, "-c", code, PYTHONPATH=f"{ROOT}:{ROOT / 'benchmarks'}:{SCRIPT.parent}")
    assert json.loads(done.stdout) == [
        {"name": "_Z1a", "arch": "sm_90", "registers": 64, "stack_bytes": 16, "spill_bytes": 12},
        {"name": "_Z1b", "arch": "sm_90", "registers": 20, "stack_bytes": 0, "spill_bytes": 0},
    ]
