"""Docs, docstrings, helps and messages use the field's plain words."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READ = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "fastadv").rglob("*.py")]
# {an odd phrase: plain words}. Only the paper's title speaks of fast methods.
PLAIN = {
    r"in pixels of \[0, 1\]": "in the images' units, [0, 1]",
    r"withst(and|ood)": "robust, or: no attack fools it",
    r"(nothing|if nothing else) is said": "by default",
    r"told from (another|others)": "told apart from",
    r"\bsays? one class\b": "predicts one class",
    r"fast methods?\b(?! stable)": "training attack: a method is what trains",
    r"methods? (of|in) training\b": "training attack: a method is what trains",
}


@pytest.mark.parametrize("odd", PLAIN)
def test_readers_find_plain_words(odd):
    found = [
        f"{path.relative_to(ROOT)}: {match[0]} -> {PLAIN[odd]}"
        for path in READ
        for match in re.finditer(odd, re.sub(r"\s+", " ", path.read_text()), re.IGNORECASE)
    ]
    assert not found
