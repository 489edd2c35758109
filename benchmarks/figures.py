"""Writes the table of all measured numbers ("figures"), and the texts in README and docs that quote them.

    python benchmarks/figures.py          (make figures)

`quoted.py` lists the figures and says where in benchmarks/results each is. `figures.md` has the texts, with `{id}` in
place of a figure. This writes benchmarks/results/table.csv, and in README.md and docs the text between
`<!-- figures:NAME -->` and `<!-- /figures -->`. No figure is typed by hand: a test compares these texts with new ones.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quoted import COMMANDS, FIGURES, Figure, at

ROOT = Path(__file__).resolve().parent.parent
TABLE, TEXTS = "benchmarks/results/table.csv", "benchmarks/figures.md"
COLUMNS = ("id", "what", "device", "versions", "value", "file", "command", "commit")
BLOCK = re.compile(r"<!-- figures:([\w-]+) -->\n(.*?)<!-- /figures -->", re.DOTALL)
QUOTED = re.compile(r"\{([\w.-]+)\}")


# ------------------------------------------------------------------ the table


def table(root: Path = ROOT, figures: Iterable[Figure] = FIGURES) -> list[dict[str, str]]:
    """A row for each figure. Its value is the text that is quoted, such as "3.1"."""
    results: dict[str, Any] = {}
    for figure in figures:
        results |= {name: read(root / "benchmarks/results", name) for name in figure.files if name not in results}
    return [row(figure, {name: results[name] for name in figure.files}) for figure in figures]


def read(folder: Path, name: str) -> Any:
    """The content of a file of results; for a name with a star, a list of the contents of all files that match."""
    if "*" in name:
        return [json.loads(path.read_text()) for path in sorted(folder.glob(name))]
    return json.loads((folder / name).read_text())


def row(figure: Figure, found: Mapping[str, Any]) -> dict[str, str]:
    value = at(*found.values(), figure.value) if isinstance(figure.value, str) else figure.value(*found.values())
    results = [each for some in found.values() for each in (some if isinstance(some, list) else [some])]
    return {
        "id": figure.id,
        "what": figure.what,
        "device": joined(environment(each).get("cpu" if on_cpu(each) else "device") for each in results),
        "versions": joined(map(versions, results)),
        "value": figure.form(value),
        "file": joined(figure.files),
        "command": joined(command(name, each) for name, each in found.items()),
        "commit": joined(map(commit, results)),
    }


def joined(words: Iterable[str | None]) -> str:
    """Distinct words in their order, as one text."""
    return "; ".join(dict.fromkeys(word for word in words if word))


def environment(result: Mapping) -> Mapping:
    return result.get("environment") or result.get("machine") or result


def on_cpu(result: Mapping) -> bool:
    return environment(result).get("device_type", "cpu") == "cpu"


def versions(result: Mapping) -> str:
    """The versions of the software in a measurement, also that of another library that was measured."""
    facts = {name: environment(result).get(name) for name in ("torch", "triton", "cuda", "python")}
    facts["autoattack"] = (result.get("autoattack") or "")[:7]
    facts[result.get("peer")] = result.get("version of the peer")
    return ", ".join(f"{name} {version}" for name, version in facts.items() if version)


def commit(result: Mapping) -> str:
    """The first seven digits of the commit, with "+" where files differed from it."""
    whole = result.get("commit") or environment(result).get("commit") or ""
    return whole[:7] + ("+" if whole.endswith("+") else "")


def command(name: str, result: Any) -> str:
    told = result.get("command") if isinstance(result, dict) else None
    return told or next(command for pattern, command in COMMANDS.items() if fnmatch(name, pattern))


def as_csv(rows: Iterable[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ------------------------------------------------------------------ the texts that quote it


def texts(root: Path = ROOT) -> dict[str, str]:
    """{name of a block: its text, with {id} in place of a figure}."""
    return dict(BLOCK.findall((root / TEXTS).read_text()))


def quoted(text: str) -> list[str]:
    return QUOTED.findall(text)


def filled(page: str, blocks: Mapping[str, str], values: Mapping[str, str]) -> str:
    """The page with new texts between its marks.

    Args:
        page: the text of the page.
        blocks: {name of a block: its text}.
        values: {id of a figure: its value}.

    Raises:
        LookupError: the page has a block, or a text a figure, that does not exist.
    """

    def written(mark: re.Match) -> str:
        name = mark[1]
        if name not in blocks:
            raise LookupError(f"{TEXTS} has no block {name}")
        unknown = set(quoted(blocks[name])) - values.keys()
        if unknown:
            raise LookupError(f"the block {name} quotes what quoted.py does not have: {', '.join(sorted(unknown))}")
        text = QUOTED.sub(lambda figure: values[figure[1]], blocks[name])
        return f"<!-- figures:{name} -->\n{text}<!-- /figures -->"

    return BLOCK.sub(written, page)


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def files_of(page: Path, root: Path = ROOT) -> list[str]:
    """The files of results from which a page quotes figures."""
    blocks, figures = texts(root), {figure.id: figure for figure in FIGURES}
    ids = [name for block, _ in BLOCK.findall(page.read_text()) for name in quoted(blocks[block])]
    return list(dict.fromkeys(file for name in ids for file in figures[name].files))


def made(root: Path = ROOT, figures: Iterable[Figure] = FIGURES) -> dict[Path, str]:
    """{path: new content} of the table and the pages."""
    rows, blocks = table(root, figures), texts(root)
    values = {row["id"]: row["value"] for row in rows}
    return {root / TABLE: as_csv(rows)} | {page: filled(page.read_text(), blocks, values) for page in pages(root)}


def main() -> None:
    for path, text in made().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
