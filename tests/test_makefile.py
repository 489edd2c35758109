"""The files that the Makefile names."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_quick_tests_are_there():
    told = subprocess.run(["make", "-n", "test-quick"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = [word for word in told.split() if word.startswith("tests/")]
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
