"""The line in the log for each epoch, where there is no progress bar: in a batch system, a pipe, under nohup."""

from collections.abc import Sequence

from fastadv.training.progress import Record

SHOWN = {
    "train_accuracy": "training accuracy {:.1%}",
    "clean_accuracy": "validation {:.1%} clean",
    "robust_accuracy": "{:.1%} robust",
    "probe_pgd": "probe {:.1%} under PGD",
}


def epoch_line(records: Sequence[Record], epochs: int) -> str:
    """The last epoch as a line of text. Epochs count from 1.

    Args:
        records: the records of a run, as `Trainer.fit` returns them; the last one is an epoch's.
        epochs: the number of epochs that the run will have.
    """
    done = [record for record in records if "epoch" in record]
    record, mean = done[-1], sum(map(_seconds, done)) / len(done)
    shares = [words.format(record[name]) for name, words in SHOWN.items() if record.get(name) is not None]
    number, left = record["epoch"] + 1, epochs - record["epoch"] - 1
    rest = f", about {_duration(left * mean)} left" if left else ""
    facts = ", ".join([f"loss {record['loss']:.4g}", *shares, f"{_duration(_seconds(record))}{rest}"])
    return f"epoch {number}/{epochs}: {facts}"


def _seconds(record: Record) -> float:
    seconds: float = sum(record.get(name, 0.0) for name in ("train_s", "monitor_s", "eval_s"))
    return seconds


def _duration(seconds: float) -> str:
    """Seconds in a suitable unit: "4.2 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
