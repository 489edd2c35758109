"""Where a warning points: at the line of the user's program from which fastadv was called."""

import random
import subprocess
import sys
import warnings

import pytest

from fastadv._warnings import warn

WITHIN = ["fastadv.attacks.base", "fastadv", "torch.nn.modules.module", "contextlib", "functools"]


def called_through(modules, call):
    """`call`, called by a function of each of the modules, the last one first."""
    for module in modules:
        names = {"__name__": module, "call": call}
        exec("def outer():\n    call()", names)
        call = names["outer"]
    return call


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_a_warning_names_the_line_of_the_user_however_deep_it_began(depth, recwarn):
    names = {"__name__": "fastadv.found", "warn": warn}
    exec("def found():\n    warn('odd', FutureWarning)", names)
    deep, line = called_through(random.choices(WITHIN, k=depth - 1), names["found"]), sys._getframe().f_lineno + 1
    deep()
    (told,) = recwarn.list
    assert (told.filename, told.lineno, told.category, str(told.message)) == (__file__, line, FutureWarning, "odd")


def test_a_users_function_that_fastadv_calls_is_the_users_line(recwarn):
    """Such as a subclass of an attack: the warning is about what it asks for."""

    def of_the_user():
        called_through(["fastadv.found"], found)()

    names = {"__name__": "fastadv.found", "warn": warn}
    exec("def found():\n    warn('odd')", names)
    found = names["found"]
    called_through(["fastadv.engine", "torch.autograd"], of_the_user)()
    assert recwarn.list[0].lineno == of_the_user.__code__.co_firstlineno + 1


def test_each_line_is_told_once_and_a_module_can_be_left_out():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("first")
        warn("first")
        assert len(found) == 2
        warnings.filterwarnings("ignore", module="tests|test_warnings|.*test_warnings")
        warn("second")
        assert len(found) == 2
        warnings.filterwarnings("error", module=".*test_warnings")
        with pytest.raises(UserWarning, match="third"):
            warn("third")


def test_a_program_that_is_the_package_has_a_line_too():
    """`python -m fastadv` has no line of a user: the outermost one serves."""
    words = "import sys; from fastadv._warnings import warn; globals()['__name__'] = 'fastadv'; warn('odd')"
    ran = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert ran.stderr.startswith("<string>:1: UserWarning: odd")


def test_a_caught_warning_keeps_its_kind(recwarn):
    warn(DeprecationWarning("old"))
    assert recwarn.list[0].category is DeprecationWarning
