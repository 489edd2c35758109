"""What fastadv.evaluation.report was called before."""

from fastadv._renamed import old_names

__getattr__ = old_names(
    __name__,
    {name: f"fastadv.evaluation.report.{name}" for name in ("write_curves", "write_report")},
)
