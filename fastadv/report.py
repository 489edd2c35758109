"""The old name of fastadv.evaluation.report."""

from fastadv._renamed import old_names

__getattr__ = old_names(
    __name__,
    {name: f"fastadv.evaluation.report.{name}" for name in ("write_curves", "write_report")},
)
