"""The benchmarks and the GPU script, run without a GPU: their files, their resumption, and their refusals."""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu/run.sh"
sys.path.append(str(SCRIPT.parent))
plan = importlib.import_module("plan")
PARTS = tuple(plan.CAPS)
RUNS = sorted(ROOT.glob("benchmarks/results/**/transfer*.json"))  # they are older than studies
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
    done = run(SCRIPT, out, "--dry-run", "--minutes", "9", "--to", out / "brought")
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "printed").write_text(done.stdout)
    return out


def result(out, part):
    return json.loads((out / f"{part}.json").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_says_where_it_ran(dry, part):
    found = result(dry, part)
    assert found["ok"] is True
    assert found["seconds"] > 0
    assert found["part"] == part
    facts = found["environment"]
    assert set(facts) >= FACTS
    assert facts["device"] == facts["device_type"] == "cpu"
    assert facts["dry_run"] is True
    assert len(facts["commit"].rstrip("+")) == 40 or facts["commit"] == os.environ.get("FASTADV_COMMIT", "unknown")


def test_the_parts_did_their_work(dry):
    assert result(dry, "build")["flags"] == {"FASTADV_CPU": "0", "FASTADV_CUDA": "0"}
    assert result(dry, "build")["facts"]["compiler"]
    tests = result(dry, "correctness")["tests"]
    assert tests["of"] == tests["passed"] > 10
    tools = result(dry, "sanitizer")["tools"]
    assert all(run["calls"] >= 20 and run["mismatches"] == 0 for run in tools.values())
    assert {row["kind"] for part in ("attacks", "evaluation") for row in result(dry, part)["summary"]} == {
        "attack",
        "evaluation",
    }


def test_a_part_that_hangs_is_cut_and_the_others_run(dry):
    outcomes = {part: found["outcome"] for part, found in json.loads((dry / "kept/plan.json").read_text()).items()}
    assert outcomes == {"hanging": "cut", **dict.fromkeys(PARTS, "done")}
    printed = (dry / "printed").read_text()
    for part in PARTS:
        assert f"\n{part.ljust(11)}  done " in printed
    assert "\nhanging      cut " in printed


def test_the_results_are_brought_in_one_file(dry):
    with tarfile.open(dry / "brought/results.tar.gz") as archive:
        names = archive.getnames()
    assert {f"{part}.{ending}" for part in PARTS for ending in ("json", "log")} <= set(names)


def test_a_second_call_does_nothing_again_that_is_done(dry):
    before = {path: path.stat().st_mtime_ns for part in PARTS for path in dry.glob(f"{part}.*")}
    again = run(SCRIPT, dry, "--dry-run", "--minutes", "9")
    assert again.returncode == 0
    assert next(line for line in again.stdout.splitlines() if ", " in line).startswith("hanging: cut")
    assert {path: path.stat().st_mtime_ns for part in PARTS for path in dry.glob(f"{part}.*")} == before


def test_benchmarks_have_the_ratios(dry):
    rows = result(dry, "bench")["summary"]
    (op,) = [r for r in rows if r["kind"] == "op"]
    seconds, nbytes = op["median_seconds"], op["bytes"]
    assert set(seconds) == {"fastadv", "naive", "copy"}
    assert all(value > 0 for value in seconds.values())
    tensor = 2 * 3 * 8 * 8 * 4
    assert nbytes == {"fastadv": 4 * tensor, "copy": 2 * tensor}
    assert op["speedup_over_naive"] == pytest.approx(seconds["naive"] / seconds["fastadv"])
    assert op["share_of_copy_rate"] == pytest.approx(2 * seconds["copy"] / seconds["fastadv"])
    host = [r for r in rows if r["kind"] == "host"]
    assert {r["op"] for r in host} == {"pgd_step", "fgsm_step", "fgsm_rs_step", "random_init"}


def test_the_training_part_has_steps(dry):
    rows = result(dry, "steps")["summary"]
    assert {row["method"] for row in rows} == {"full", "lora"}
    for row in rows:
        seconds = row["quartile_seconds"]
        parts = 7 * seconds["F + Bx"] + seconds["F + B"] + seconds["optimiser"]
        assert row["over_parts"]["pgd"] == pytest.approx(seconds["pgd"] / parts)


def cells(out):
    """{attack: the text of the study's finished cell}."""
    texts = [path.read_text() for path in out.glob("kept/price/cells/*/cell.json")]
    return {json.loads(text)["cell"]["attack"]: text for text in texts}


def unpacked(archive, folder):
    """Unpack an archive into the folder; returns the names of its files."""
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
        return set(files.getnames())


def test_a_study_that_is_cut_goes_on_elsewhere_from_its_finished_cells(dry, tmp_path):
    cut = tmp_path / "cut"
    unpacked(dry / "brought/results.tar.gz", cut)
    whole = cells(cut)
    assert whole == cells(dry)
    assert whole.keys() == {"fgsm", "pgd"}
    (fgsm,), (pgd,) = (list(cut.glob(f"kept/price/cells/*-{attack}-*")) for attack in ("fgsm", "pgd"))
    (pgd / "train/state").mkdir(parents=True)
    (pgd / "cell.json").replace(pgd / "error.txt")
    for name in ("machines.json", "train/log.jsonl", "train/state/00000001.json", "train/state/0.safetensors"):
        (pgd / name).write_text("{}")
    plan.collect(cut, "price")
    assert result(cut, "price")["cells"] == [fgsm.name]

    plan.pack(cut, tmp_path)
    there = tmp_path / "there"
    names = {name for name in unpacked(tmp_path / "results.tar.gz", there) if name.startswith("kept/price/")}
    files = {"study.yaml", "results.json", "results.csv", f"cells/{fgsm.name}/cell.json", f"cells/{pgd.name}/error.txt"}
    assert names == {f"kept/price/{file}" for file in files}

    subprocess.run(plan.command_of("price", there), env=plan.environment_of(dry_run=True), check=True)
    again = cells(there)
    assert again["fgsm"] == whole["fgsm"]  # even its seconds are equal, so it was not run again
    found, wanted = json.loads(again["pgd"]), json.loads(whole["pgd"])
    assert [found[name] for name in ("settings", "verdicts")] == [wanted[name] for name in ("settings", "verdicts")]
    assert found["commit"] == result(there, "price")["environment"]["commit"]
    assert not [*dry.rglob("*.safetensors"), *there.rglob("*.safetensors")]


# ------------------------------------------------------------------ the plan


def planned(out, caps, commands):
    """A plan whose parts are the given lines of Python."""
    return plan.Plan(out, caps, lambda part, out: [sys.executable, "-c", commands[part]], built=lambda: True)


def test_a_part_is_killed_at_its_cap_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    hang = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(100)"
    )
    made = planned(tmp_path, {"hang": 2, "after": 2}, {"hang": hang, "after": "pass"})
    start = time.monotonic()
    assert not made.run(60, dict(os.environ))
    assert time.monotonic() - start < 2 + 2 * plan.GRACE + 2
    assert made.outcome("hang") == "cut"
    assert made.outcome("after") == "done"
    assert "begun" in (tmp_path / "hang.log").read_text()
    time.sleep(0.2)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_parts_that_never_began_come_before_parts_that_were_cut(tmp_path):
    commands = {"a": "import time; time.sleep(100)", "b": "raise SystemExit(3)", "c": "pass", "d": "pass"}
    first = planned(tmp_path, {"a": 1, "b": 1, "c": 1, "d": 1}, commands)
    assert not first.run(60, dict(os.environ))
    assert [first.outcome(part) for part in "abcd"] == ["cut", "failed", "done", "done"]
    assert planned(tmp_path, {"a": 1, "b": 1, "c": 1, "e": 1}, commands).order() == ["e", "a", "b"]


def test_nothing_is_begun_that_the_minutes_have_no_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "LEAST", 2)
    monkeypatch.setattr(plan, "GRACE", 1)
    made = planned(tmp_path, {"a": 60, "b": 60}, {"a": "import time; time.sleep(100)", "b": "pass"})
    assert not made.run(plan.LEAST + plan.GRACE + 1, dict(os.environ))
    assert made.outcome("a") == "cut"
    assert made.outcome("b") is None
    assert made.known["a"]["seconds"] < plan.LEAST + 2 * plan.GRACE + 2
    (_, a, b) = made.table()
    assert a.split() == ["a", "cut", str(made.known["a"]["seconds"]), "-", "60"]
    assert b.split() == ["b", "unmeasured", "-", "-", "60"]


def test_the_calls_fit_into_nine_and_three_minutes():
    caps = list(plan.CAPS.values())
    assert sum(caps[:3]) + plan.GRACE <= 9 * 60
    for first in range(3, len(caps), 3):
        assert sum(caps[first : first + 3]) + plan.GRACE <= 3 * 60


KEPT = """
import os, pytest
@pytest.mark.parametrize("i", range(4))
def test_it(i, request):
    open(os.environ["RAN"], "a").write(f"{i}\\n")
    request.node.user_properties.append(("figures", {"i": i}))
    if i == 2 and os.environ.get("DIE"):
        os._exit(9)
    assert i != 1 or not os.environ.get("FAIL"), "one is odd"
"""


def test_tests_are_kept_as_they_end_and_not_run_again(tmp_path):
    (tmp_path / "test_it.py").write_text(KEPT)
    (tmp_path / "kept").mkdir()
    kept, ran = tmp_path / "kept/part.jsonl", tmp_path / "ran"
    command = (sys.executable, "-m", "pytest", "-p", "kept", "--kept", kept, "--rootdir", tmp_path, tmp_path)
    env = {"PYTHONPATH": str(SCRIPT.parent), "RAN": str(ran)}
    assert run(*command, DIE="1", FAIL="1", **env).returncode == 9
    assert [line["figures"] for line in plan.lines(kept)[1:]] == [[{"i": 0}], [{"i": 1}]]
    plan.collect(tmp_path, "part")
    cut = json.loads((tmp_path / "part.json").read_text())
    assert cut["tests"] == {"of": 4, "passed": 1, "failed": 1, "skipped": 0}
    ((name, why),) = cut["failed"].items()
    assert name.endswith("test_it[1]")
    assert "one is odd" in why
    kept.write_text(kept.read_text() + '{"test": "cut in the mid')
    again = run(*command, **env)
    assert again.returncode == 0, again.stdout
    plan.collect(tmp_path, "part")
    assert json.loads((tmp_path / "part.json").read_text())["summary"] == [{"i": i} for i in range(4)]
    assert ran.read_text().split() == ["0", "1", "2", "1", "2", "3"]


@pytest.mark.parametrize(
    "arguments",
    [(), ("--part", "nothing", "x"), ("--no-such-flag", "x"), ("x", "y"), ("x", "--minutes", "nine")],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, tmp_path):
    done = run(SCRIPT, *(tmp_path / a if a in "xy" else a for a in arguments))
    assert done.returncode == 2
    assert "usage: run.sh" in done.stderr
    assert not list(tmp_path.iterdir())


def test_report_makes_tables_and_a_plot(dry, tmp_path):
    text, picture = tmp_path / "report.md", tmp_path / "report.png"
    done = report(dry, "--markdown", text, "--plot", picture)
    assert done.returncode == 0, done.stderr
    written = text.read_text()
    assert "dry run: no measurement" in written
    assert "| pgd_step | tiny | f32/f32 | cpu |" in written
    assert "| vit | lora | 4 |" in written
    assert "price: ok; 2 finished cells" in written
    assert all(f"{part}: ok" in written for part in ("build", "correctness", "sanitizer"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_report_has_means_and_deviations_of_the_runs_before_studies(path):
    written, groups = report(path).stdout.splitlines(), {}
    for row in json.loads(path.read_text())["rows"]:
        groups.setdefault((row["method"], row["attack"]), []).append(row)
    for (method, attack), rows in groups.items():
        judged = [row["judged"]["accuracy"] for row in rows if row.get("judged")]
        shares = [[row[name] for row in rows] for name in ("clean_accuracy", "robust_accuracy")]
        shares += [[each[name] for each in judged] for name in ("PMA", "AutoAttack") if judged]
        (line,) = (line for line in written if line.startswith(f"| {method} | {attack} | {len(rows)} |"))
        for values in shares:
            assert f" {100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} % |" in line
        assert f" | {statistics.mean(row['train_s'] for row in rows):,.1f} | " in line


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
"0","vectorised_kernel","147,900","26,417,664"
"""


def test_counters_are_read():
    metrics = {"gpu__time_duration.sum": "nanoseconds", "smsp__inst_executed.sum": "warp_instructions"}
    code = f"import json, parts; parts.METRICS = {metrics!r}; print(json.dumps(parts.counted({NCU!r})))"
    done = run(sys.executable, "-c", code, PYTHONPATH=f"{ROOT}:{ROOT / 'benchmarks'}:{SCRIPT.parent}")
    assert json.loads(done.stdout) == [{"nanoseconds": 147900.0, "warp_instructions": 26417664.0}]


def doctored(dry, tmp_path, device_type, factor):
    """The dry run's benchmark, changed as if the op had moved `factor` times the bytes of the copy."""
    bench = result(dry, "bench")
    for row in bench["summary"]:
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
