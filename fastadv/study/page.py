"""What a study found, as files."""

import csv
import io
import json
from pathlib import Path

from fastadv.files import write_atomically
from fastadv.study.files import finished


def write_study(folder: Path) -> None:
    """Write results.json and results.csv of the finished cells in `folder`: a row each, with its accuracies."""
    rows = []
    for record in finished(folder):
        shares = {judge: said.count("1") / len(said) for judge, said in record["verdicts"].items()}
        rows.append({**record["cell"], **shares, "train_s": record["train_s"]})
    write_atomically(folder / "results.json", (json.dumps({"format": 1, "rows": rows}, indent=1) + "\n").encode())
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "results.csv", text.getvalue().encode())
