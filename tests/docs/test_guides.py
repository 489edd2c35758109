"""The guides of the site: the code of each runs unchanged in a folder of its own, and its assertions hold."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from fastadv.cli import main

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    """(language, code, lines of the text before the code) of each block, in their order."""
    for found in BLOCK.finditer(text):
        yield found[1], found[2], text.count("\n", 0, found.start(2))


def commands(code):
    """The arguments of each command `fastadv ...`, from the lines of a shell."""
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "fastadv", f"a guide runs fastadv alone: {line}"
        yield arguments


def run(path):
    """The code of the guide as one program; a traceback names the line of the guide."""
    names = {"__name__": path.stem}
    for language, code, before in blocks(path.read_text()):
        if language == "python":
            exec(compile("\n" * before + code, path, "exec"), names)
        else:
            for arguments in commands(code):
                main(arguments)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder and one thread; torch's generator is restored."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guide_runs_as_it_stands(path, alone):
    run(path)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guide_ends_with_a_check(path):
    *_, (language, code, _) = blocks(path.read_text())
    assert language == "python"
    assert re.search(r"^assert ", code, re.MULTILINE)


def test_a_wrong_guide_fails(alone):
    (alone / "wrong.md").write_text("text\n\n```python\nx = 1\n```\n\n```python\n\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run(alone / "wrong.md")
    assert error.traceback[-1].lineno + 1 == 9  # the line number in an editor
    (alone / "wrong.md").write_text("```sh\nfastadv evaluate --no-such-option\n```\n")
    with pytest.raises(SystemExit):
        run(alone / "wrong.md")
