"""The lists on the pages of the site are complete, compared with the code. `make docs` builds the site, strictly."""

import argparse
import importlib.util
import logging
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import fastadv.attacks
from fastadv.attacks import PRESETS
from fastadv.cli import COMMANDS
from fastadv.training.cost import STEPS, passes
from fastadv.training.fast import FAST
from fastadv.training.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = module_at(DOCS / "hooks.py")


def page(name):
    return (DOCS / name).read_text()


def rows(text, heading):
    """The cells of the first table under a heading."""
    table = re.search(rf"^## {heading}\n.*?^((?:\|[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()[2:]]


def named(text, heading):
    return [row[0].strip("`") for row in rows(text, heading)]


# ---------------------------------------------------------------------- the reference


def test_every_package_with_public_names_has_a_page():
    described = {name for path in PAGES for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE)}
    packages = {name.rpartition(".")[0] for name in hooks.public_names()}
    assert packages <= described
    assert {"fastadv", "fastadv.attacks", "fastadv.training.fast"} <= packages
    assert set(hooks.public_names()) >= {f"fastadv.attacks.{name}" for name in fastadv.attacks.__all__}


def test_the_build_warns_of_a_public_name_that_no_page_describes(tmp_path, caplog):
    names = list(hooks.public_names())
    missing = names.pop(len(names) // 2)
    head = "# Sphinx inventory version 2\n# Project: \n# Version: \n# The rest is compressed by zlib.\n"
    content = "\n".join(f"{name} py:function 1 page.html#$ -" for name in names)
    (tmp_path / "objects.inv").write_bytes(head.encode() + zlib.compress(content.encode()))
    with caplog.at_level(logging.WARNING):
        hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))
    assert [record.args[0] for record in caplog.records] == [missing]


# ---------------------------------------------------------------------- tables


def test_the_page_of_methods_has_those_that_there_are():
    text = page("methods.md")
    assert sorted(named(text, "What trains")) == sorted(METHODS)
    assert sorted(named(text, "Training attacks")) == sorted(FAST)
    assert sorted(named(text, "Attacks") + named(text, "Training attacks")) == sorted(STEPS)
    assert {name for name in named(text, "Attacks") if name != "none"} <= PRESETS.keys()


def formula(counts):
    """Passes such as "8 F + 7 Bx + B"."""
    terms = zip(counts, ("F", "Bx", "B"), strict=True)
    return " + ".join(name if count == 1 else f"{count:g} {name}" for count, name in terms if count)


def test_the_costs_are_those_of_the_cost_model():
    table = rows(page("methods.md"), "What a step costs")
    assert sorted(row[0].strip("`") for row in table) == sorted(name for name, step in STEPS.items() if not step.kept)
    assert f"`cached` takes {passes('cached', 'linear', fresh=1 / 4).total:g} F" in page("methods.md")
    for name, written, *totals in table:
        attack = name.strip("`")
        assert written == formula(passes(attack))
        assert totals == [f"{passes(attack, method).total:g}" for method in ("full", "linear", "lora")]


def test_the_page_of_attacks_has_every_class():
    classes = {name for name in fastadv.attacks.__all__ if isinstance(getattr(fastadv.attacks, name), type)}
    table = re.search(r"^\| Attack \|.*?\n\n", page("attacks.md"), re.MULTILINE | re.DOTALL)[0]
    assert set(re.findall(r"`(\w+)`", table)) == classes - {"Attack", "Ensemble", "Normalized"}


# ---------------------------------------------------------------------- the command line


def test_every_command_has_its_options_on_the_page():
    text = page("commands.md")
    assert sorted(hooks.OPTIONS.findall(text)) == sorted(COMMANDS)
    assert all(f"\n## {name}\n" in text for name in COMMANDS)
    made = hooks.on_page_markdown(text)
    assert "<!-- options" not in made
    for module, _ in COMMANDS.values():
        parser = argparse.ArgumentParser()
        module.add(parser)
        for option in re.findall(r"--[a-z][a-z-]+", parser.format_usage()):  # the usage lacks hidden options
            assert f"`{option}`" in made, option
    assert argparse.SUPPRESS not in made


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_option_that_a_page_names_is_there(path):
    known = {"--help", "--benchmark", "--minutes", "--no-build-isolation"}
    for module, _ in COMMANDS.values():
        parser = argparse.ArgumentParser()
        module.add(parser)
        known |= {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text())) <= known


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_to_pages_of_the_site(path):
    text = path.read_text()
    assert not re.search(r"https?://", text)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (path.parent / target).resolve().is_relative_to(DOCS)
        assert (path.parent / target).exists(), target


def test_nothing_is_fetched_from_elsewhere_and_every_page_has_its_place():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    assert config["extra"] == {"generator": False}
    assert not {"repo_url", "site_url", "copyright"} & config.keys()
    assert config["strict"] is True
    listed = re.findall(r": ([\w/-]+\.md)$|- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {"".join(pair) for pair in listed} == {str(path.relative_to(DOCS)) for path in PAGES}


# ---------------------------------------------------------------------- continuous integration


def test_the_hosted_workflow_runs_what_must_hold():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert "make docs" in (ROOT / ".ci/run").read_text()


def test_the_commit_hooks_are_of_this_repository():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert all(hook["entry"].startswith(".venv/bin/ruff ") for hook in repository["hooks"])
