"""README and docs quote the stored results, and a result is marked as stale if its code has changed since."""

import csv
import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
figures, quoted, stale = map(importlib.import_module, ("figures", "quoted", "stale"))

# ------------------------------------------------------------------ the figures in README and docs


PAGES = [str(page.relative_to(ROOT)) for page in figures.pages()]


@pytest.fixture(scope="module")
def made():
    return figures.made()


@pytest.mark.parametrize("path", [figures.TABLE, *PAGES])
def test_table_and_pages_are_what_the_stored_results_say(path, made):
    """If this fails, run `make figures`."""
    assert (ROOT / path).read_text() == made[ROOT / path]


def test_every_figure_is_quoted_and_every_text_stands_on_a_page():
    texts = figures.texts()
    standing = {name for page in figures.pages() for name, _ in figures.BLOCK.findall(page.read_text())}
    assert standing == texts.keys()
    ids = [figure.id for figure in quoted.FIGURES]
    assert len(set(ids)) == len(ids)
    assert {name for text in texts.values() for name in figures.quoted(text)} == set(ids)


def test_no_figure_is_typed_into_a_text():
    for name, text in figures.texts().items():
        assert measured(without_settings(figures.TEXTS, text)) == [], name


@pytest.fixture
def house(tmp_path):
    """A folder with a README that quotes two results, and the quoted values."""
    values = [random.uniform(1, 9) for _ in range(3)]
    results = tmp_path / "benchmarks/results"
    (results / "runs").mkdir(parents=True)
    rows = [{"op": op, "size": "large", "ratio": value} for op, value in zip(("step", "init"), values, strict=False)]
    machine = {"device": "A GPU", "device_type": "cuda", "cpu": "A CPU", "torch": "2.1", "commit": "abcdef0123+"}
    (results / "ops.json").write_text(json.dumps({"rows": rows, "command": "bench", "environment": machine}))
    for run in ("a", "b"):
        machine = {"device_type": "cpu", "cpu": f"CPU {run}", "torch": "2.2"}
        (results / f"runs/{run}.json").write_text(json.dumps({"s": values[2], "machine": machine, "commit": "1" * 40}))
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/figures.md").write_text("<!-- figures:speed -->\n{step} of {all} s.\n<!-- /figures -->\n")
    (tmp_path / "README.md").write_text("a\n<!-- figures:speed -->\nold\n<!-- /figures -->\nb\n")
    return tmp_path, values


def some_figures():
    command = {"*": "run"}
    total = quoted.Figure(
        "all", "of all runs, s", ("runs/*.json",), lambda runs: sum(run["s"] for run in runs), "{:.3f}".format
    )
    step = quoted.Figure("step", "a step", ("ops.json",), "rows[op=step&size=large].ratio", "{:.1f}".format)
    return command, [step, total]


def test_a_page_and_the_table_have_the_values_of_the_results(house, monkeypatch):
    root, (ratio, _, each) = house
    commands, some = some_figures()
    monkeypatch.setattr(figures, "COMMANDS", commands)
    made = figures.made(root, some)
    sentence = f"{ratio:.1f} of {2 * each:.3f} s."
    assert made[root / "README.md"] == f"a\n<!-- figures:speed -->\n{sentence}\n<!-- /figures -->\nb\n"
    step, total = csv.DictReader(made[root / figures.TABLE].splitlines())
    assert (step["device"], step["versions"], step["command"]) == ("A GPU", "torch 2.1", "bench")
    assert (step["value"], step["file"], step["commit"]) == (f"{ratio:.1f}", "ops.json", "abcdef0+")
    assert (total["device"], total["versions"], total["command"]) == ("CPU a; CPU b", "torch 2.2", "run")
    assert (total["value"], total["file"], total["commit"]) == (f"{2 * each:.3f}", "runs/*.json", "1111111")
    # After `--write` nothing is wrong; a result that changes also changes the page.
    for path, text in made.items():
        path.write_text(text)
    assert figures.made(root, some) == made
    (root / "benchmarks/results/runs/b.json").write_text(json.dumps({"s": each + 1, "machine": {}}))
    assert f"of {2 * each + 1:.3f} s" in figures.made(root, some)[root / "README.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("<!-- figures:other -->\n<!-- /figures -->\n", "no block other"), (None, "quotes what .* does not have: step")],
)
def test_what_does_not_exist_is_named(house, monkeypatch, text, message):
    root, _ = house
    commands, (step, total) = some_figures()
    monkeypatch.setattr(figures, "COMMANDS", commands)
    if text:
        (root / "README.md").write_text(text)
    with pytest.raises(LookupError, match=message):
        figures.made(root, [step, total] if text else [total])


def test_a_row_is_found_by_facts_that_no_other_has():
    found = {"by seed": [{"seed": 0, "eps": 0.5, "left": {"a b": 7}}, {"seed": 1, "eps": 0.5, "left": {"a b": 8}}]}
    assert quoted.at(found, "by seed[seed=1&eps=0.5].left.a b") == 8
    for facts in ("eps=0.5", "seed=2", "seed=0&eps=1"):
        with pytest.raises(LookupError, match="rows have"):
            quoted.at(found, f"by seed[{facts}].left")


def test_a_study_says_how_much_of_it_is_measured():
    (cells,) = [figure for figure in quoted.FIGURES if figure.id == "study.cells"]
    done, missing = random.randint(0, 9), random.randint(1, 9)
    report = {"rows": [{}] * done, "missing": {"cells": ["a"] * missing}}
    assert cells.value(report, []).startswith(f"{done} of {done + missing} cells are measured")
    assert cells.value(report | {"missing": {"cells": []}}, []) == f"All {done} cells are measured."


# ------------------------------------------------------------------ no figure stands anywhere else

UNITS = (
    *("%", "times", "fold", "points"),
    *("us", "µs", "ms", "s", "seconds?", "minutes?", "hours?"),
    *("[kMG]i?B", "[MGT]B/s", "FLOPs?"),
)
MEASURED = re.compile(rf"(?<![\w/.={{-])\d[\d.,]*(?: (?:to|±) \d[\d.,]*)?(?:x|[ -]?(?:{'|'.join(UNITS)}))(?![\w/])")

# {page: phrases with such a unit that are no measurements}.
SETTINGS = {"benchmarks/figures.md": ("95 % intervals", "115 MB a tensor")}


def measured(text):
    """The numbers with a unit of measurement in the prose of a page, without its figures, code and links."""
    for what in (
        figures.BLOCK,
        re.compile(r"<!-- stale figures.*?<!-- end -->", re.DOTALL),
        re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE),
        re.compile(r"(?:\A|(?<=\n\n))(?: {4}.*\n)+"),
        re.compile(r"`[^`]*`"),
        re.compile(r"\]\([^)]*\)"),
    ):
        text = what.sub("", text)
    return MEASURED.findall(text)


def without_settings(name, text):
    for phrase in SETTINGS.get(name, ()):
        text = text.replace(phrase, "")
    return text


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (
            "It takes 3.1 ms, 12x as long, or 0.94 to 1.14 times; 1,234 MB.",
            ["3.1 ms", "12x", "0.94 to 1.14 times", "1,234 MB"],
        ),
        ("A third: 33 %, 1.5 points, 4.2 TB/s, a 3-fold gain.", ["33 %", "1.5 points", "4.2 TB/s", "3-fold"]),
        ("At eps 8/255, 32x32 images of 3 channels, sm_90 and 2 x 3, in 10 steps, 5 samples.", []),
        ("`--eps 8 %`\n\n    sleep 3 s\n\n```\n4 %\n```\n[a](b5%)\n", []),
        ("<!-- figures:a -->\n5 % of\n<!-- /figures -->\n", []),
        ("- a list of\n    6 % in its second line\n", ["6 %"]),
    ],
)
def test_what_counts_as_a_measured_number(text, numbers):
    assert measured(text) == numbers


@pytest.mark.parametrize("page", PAGES)
def test_prose_has_no_measured_number(page):
    """A figure goes to benchmarks/figures.md, with `{id}` where its value stands; a setting to SETTINGS."""
    assert measured(without_settings(page, (ROOT / page).read_text())) == []


def test_the_list_of_settings_has_no_more_than_there_are():
    for name, phrases in SETTINGS.items():
        assert not [phrase for phrase in phrases if phrase not in (ROOT / name).read_text()], name


def test_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# ------------------------------------------------------------------ results that are older than their code


def git(folder, *command):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", folder, *name, *command], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    """(a repository with sources and a result that was measured with them, the commit)."""
    git(tmp_path, "init", "-q")
    for name in ("fastadv/attacks/pgd.py", "fastadv/ops/reference.py", "csrc/cpu/ops.cpp", "csrc/cuda/ops.cu", "x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def store(repository, name, rows, commit):
    path = repository / "benchmarks/results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"part": "bench", "summary": rows, "environment": {"commit": commit}}))


def test_a_figure_is_stale_where_a_file_that_it_depends_on_has_changed(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    store(repository, "cpu.json", [{"kind": "op", "backend": "cpu"}], commit)
    store(repository, "gpu/cuda.json", [{"kind": "op", "backend": "cuda"}], commit + "+")
    store(repository, "attack.json", [{"kind": "attack", "backend": "cpu"}], commit[:7])
    assert stale.stale(repository) == {}

    def changes(name, text):
        (repository / name).write_text(text)
        return {result: paths for result, (_, paths) in stale.stale(repository).items()}

    assert changes("x.py", "second\n") == {}
    assert changes("csrc/cuda/ops.cu", "second\n") == {"gpu/cuda.json": ["csrc/cuda/ops.cu"]}
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")  # committed changes count like uncommitted ones
    new = {"attack.json": ["fastadv/attacks/new.py"], "gpu/cuda.json": ["csrc/cuda/ops.cu"]}
    assert changes("fastadv/attacks/new.py", "new\n") == new
    (repository / "fastadv/attacks/new.py").unlink()
    assert changes("csrc/cuda/ops.cu", "first\n") == {}  # the file is as it was


def test_a_commit_that_git_does_not_know_is_named(repository):
    store(repository, "old.json", [{"kind": "attack"}], "0" * 40)
    assert stale.stale(repository) == {"old.json": None}


def test_the_first_cell_of_each_commit_stands_for_a_study(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    (repository / "fastadv/attacks/pgd.py").write_text("second\n")
    git(repository, "commit", "-qam", "second")
    newer = git(repository, "rev-parse", "HEAD").strip()
    for name, made_at in (("a", newer), ("b", commit), ("c", commit), ("d", newer), ("e", None)):
        path = repository / "benchmarks/results/study/cells" / name / "cell.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"cell": {}} | ({"commit": made_at} if made_at else {})))
    of_b = (commit[:7], ["fastadv/attacks/pgd.py"])
    assert stale.stale(repository) == {"study/cells/b/cell.json": of_b, "study/cells/e/cell.json": None}


def test_code_that_changed_is_told_by_folder():
    found = stale.by_folder(["a/b/c.py", "a/d.py", "a/b/e.py", "f.h"])
    assert found == ["`a/b` (2 files)", "`a/d.py`", "`f.h`"]


def test_every_stored_result_says_what_it_depends_on():
    for name, result in stale.results(ROOT).items():
        assert stale.depends(result), name


@pytest.mark.parametrize("place", stale.PLACES)
def test_the_lists_are_up_to_date(place):
    """If this fails, run `make figures`."""
    found = stale.stale(ROOT)
    if None in found.values():
        pytest.skip("git does not know a commit that a result names: a shallow clone, or none")
    assert (ROOT / place).read_text() == stale.filled((ROOT / place).read_text(), stale.PLACES[place](found))
