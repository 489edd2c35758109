"""The errors about a package that is missing or broken."""

import sys

import pytest

from fastadv._extras import require


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package("a", "import b")` makes a module."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def package(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        made.append(name)
        sys.modules.pop(name, None)

    yield package
    for name in made:
        sys.modules.pop(name, None)


def said(module, extra="train"):
    with pytest.raises(ImportError) as error:
        require(module, extra)
    return str(error.value)


def test_a_missing_package_is_named_with_its_extra(package):
    assert said("fastadv_absent", "timm") == "fastadv_absent is not installed: pip install 'fastadv[timm]'"
    package("fastadv_user", "import fastadv_absent")
    assert said("fastadv_user") == "fastadv_absent is not installed: pip install 'fastadv[train]'"


BROKEN = {
    "torch's operators": "raise RuntimeError('operator torchvision::nms does not exist')",
    "a library": "raise OSError('torchvision/_C.so: undefined symbol: _ZN3c10')",
    "a half import": "raise AttributeError(\"partially initialized module 'torchvision'\")",
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("lazily", [False, True])
def test_a_broken_torchvision_is_called_by_its_name(package, how, lazily):
    """peft imports transformers, which imports torchvision, and hides its error behind another one."""
    package("fastadv_inner", BROKEN[how])
    hidden = (
        "try:\n import fastadv_inner\nexcept Exception as e:\n raise ModuleNotFoundError('Could not import X') from e"
    )
    package("fastadv_outer", hidden if lazily else "import fastadv_inner")
    text = said("fastadv_outer")
    for words in (
        "fastadv_outer is installed and cannot be imported",
        "torchvision, which is broken",
        "pip install --f",
    ):
        assert words in text
    assert BROKEN[how].split("'")[1].split(":")[0] in text


def test_what_else_is_broken_is_said_as_it_is(package):
    package("fastadv_bad", "1 / 0")
    assert said("fastadv_bad") == (
        "fastadv_bad is installed and cannot be imported (ZeroDivisionError: division by zero): install it again"
    )
