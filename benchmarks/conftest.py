"""The fixture that measures, the contents of the JSON file, and the table at the end.

pytest-benchmark's options choose the rounds: at least `--benchmark-min-rounds`, and as many as fit into
`--benchmark-max-time` seconds for each case. One round of each case, to see that everything runs:
`pytest --benchmark --benchmark-min-rounds=1 --benchmark-max-time=0`.
"""

import sys
from pathlib import Path

# The modules beside the benchmarks can be imported. Installed packages come first.
sys.path.extend(str(Path(__file__).resolve().parent / folder) for folder in ("", "attacks", "training"))

import environment
import pytest
import report
import timing

FIGURES = pytest.StashKey()
# A row needs these facts, whatever file it is stored in.
VERSIONS = ("device", "device_type", "threads", "torch", "triton", "python", "cuda", "driver")


class Measure:
    def __init__(self, benchmark, node, facts):
        self.benchmark, self.node, self.config, self.facts = benchmark, node, node.config, facts
        self.min_rounds = self.config.getoption("benchmark_min_rounds")
        self.max_time = float(self.config.getoption("benchmark_max_time"))

    @property
    def quick(self):
        return self.max_time == 0

    def __call__(self, readings, first):
        """Time all contenders in turn; pytest-benchmark gets the times of `first`. Returns {name: seconds}."""
        return timing.run(self.benchmark, readings, first, self.min_rounds, self.max_time)

    def record(self, **figures):
        figures |= {name: self.facts[name] for name in VERSIONS}
        self.benchmark.extra_info.update(figures)
        self.node.user_properties.append(("figures", figures))  # gpu/kept.py keeps them at once
        self.config.stash.setdefault(FIGURES, []).append(figures)


@pytest.fixture(scope="session")
def facts():
    return environment.facts()


@pytest.fixture
def measure(benchmark, request, facts):
    return Measure(benchmark, request.node, facts)


def pytest_benchmark_update_machine_info(machine_info):
    """Leave the host's name and the processor's hundred flags out of stored results."""
    machine_info.pop("node", None)
    machine_info["cpu"].pop("flags", None)


def pytest_benchmark_update_json(output_json):
    """Add the facts of the run, and remove the single readings, which are nine tenths of the file."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
    output_json["part"] = "bench"
    output_json["environment"] = environment.facts()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    for title, header, rows in report.tables(config.stash.get(FIGURES, [])):
        terminalreporter.section(f"fastadv: {title}")
        for line in report.aligned(header, rows):
            terminalreporter.write_line(line)
