"""`pytest` runs the tests, `pytest --benchmark` the benchmarks; a path on the command line wins over both."""

import pytest


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
