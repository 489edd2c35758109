"""`pytest` runs the tests, `pytest --benchmark` the benchmarks; a path on the command line wins over both."""

import os
import sys
from pathlib import Path

# `python -m pytest` puts the current folder on the path, and with it sources that may not be built. Before fastadv is
# imported: what is installed is what runs.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import pytest
import torch

# timm and peft import torchvision, whose usual build does not load beside a CPU torch: it lacks the operators that its
# own library would define. Declared they are enough, for nothing here calls them.
if torch.version.cuda is None:
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")  # kept: with it its operators would go
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_addoption(parser):
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="collect benchmarks/ (bench_*.py, test_*.py) instead of tests/",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    benchmark = config.getoption("--benchmark")
    if benchmark:
        config.addinivalue_line("python_files", "bench_*.py")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / ("benchmarks" if benchmark else "tests"))]


NEEDS = "needs an NVIDIA GPU"
_other_skips = []


def pytest_runtest_logreport(report):
    if report.skipped and NEEDS not in str(report.longrepr):
        _other_skips.append(f"{report.nodeid}: {report.longrepr[-1] if report.longrepr else ''}")


def pytest_collectreport(report):
    if report.skipped and NEEDS not in str(report.longrepr):
        _other_skips.append(f"{report.nodeid}: {report.longrepr}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """In CI nothing may be skipped but what needs a GPU."""
    if os.environ.get("CI") and _other_skips and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for skip in _other_skips:
        terminalreporter.write_line(f"skipped for another reason than a missing GPU: {skip}", red=True)
