"""A pytest plugin that stores the outcome of each test at once; a test that has passed before is not run again.

    pytest -p kept --kept FILE

FILE has one JSON object per line: {"collected": number of tests} for each collection, and {"test", "outcome",
"seconds", "figures"} for each test, with "why" for one that failed. A run that is killed loses only the test that was
running.
"""

import json
from pathlib import Path

import plan
import pytest

ENDED = ("passed", "skipped")
WORDS = 3000  # characters of the end of what pytest says of a failure


def pytest_addoption(parser):
    parser.addoption("--kept", type=Path, metavar="FILE", help="store outcomes there, and skip tests that have passed")


def pytest_configure(config):
    if config.getoption("kept"):
        config.pluginmanager.register(Kept(config))


class Kept:
    def __init__(self, config):
        self.path = config.getoption("kept")
        worker = getattr(config, "workerinput", {}).get("workerid")  # of pytest-xdist
        self.collects, self.reports = worker in (None, "gw0"), worker is None
        if self.reports and self.path.exists():  # a last line that was cut off is dropped
            text = self.path.read_text()
            self.path.write_text(text[: text.rfind("\n") + 1])

    def add(self, **line):
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def ended(self):
        return {line["test"] for line in plan.lines(self.path) if line.get("outcome") in ENDED}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        ended = self.ended()
        if self.collects:
            self.add(collected=len(items))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ended])
        items[:] = [item for item in items if item.nodeid not in ended]

    def pytest_runtest_logreport(self, report):
        if self.reports and (report.when == "call" or report.outcome != "passed"):
            figures = [value for name, value in report.user_properties if name == "figures"]
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            why = {"why": report.longreprtext[-WORDS:]} if report.outcome == "failed" else {}
            self.add(**line, figures=figures, **why)
