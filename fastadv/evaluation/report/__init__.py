"""What a run or an evaluation leaves for people: one HTML file, curves."""

from fastadv.evaluation.report.curves import write_curves
from fastadv.evaluation.report.page import write_report

__all__ = ["write_curves", "write_report"]
