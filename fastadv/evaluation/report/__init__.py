"""Reports for people: a training run as one HTML file, and an evaluation's curves as PNG."""

from fastadv.evaluation.report.curves import write_curves
from fastadv.evaluation.report.page import write_report

__all__ = ["write_curves", "write_report"]
