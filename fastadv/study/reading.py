"""Reads a study's finished cells, and computes everything that its page shows."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastadv.study import answer as say
from fastadv.study import attack_table, paper_table, price_words, words
from fastadv.study.files import CELL, ERROR, GRID, Record, cell_folder, read_cell, read_grid, read_retimed
from fastadv.study.grid import Task, expanded
from fastadv.study.overfitting import Course, Score, courses, scores
from fastadv.study.partners import no_pgd
from fastadv.study.price import Price, Summary, prices, summaries
from fastadv.study.results import Result, grouped, place_of, result_of, set_words
from fastadv.study.statistics import Average, Difference, averages, compare
from fastadv.study.timing import Time, times
from fastadv.study.together import check, check_together


@dataclass(frozen=True)
class Study:
    """The results in a folder, and what was computed from them.

    Attributes:
        folder: the study's folder.
        results: the finished cells.
        asked: the ids of the cells that the grid asks for; None where there is no grid.
        absent: {id of a cell that is not finished: the last line of its error, or ""}.
        unjudged: {id of a finished cell: the judges of the grid that have not judged it}.
        problems: a sentence for each file that cannot be read, and for each row that cannot be compared.
        differences: the differences to the cells that were trained with PGD.
        averages: the differences averaged over data sets.
        courses: how the runs went.
        scores: the scores of the detectors.
        times: the times of methods with attacks.
        prices: what training attacks cost and bring, beside training without one and with FGSM.
    """

    folder: Path
    results: list[Result]
    asked: list[str] | None
    absent: dict[str, str]
    unjudged: dict[str, list[str]]
    problems: list[str]
    differences: list[Difference]
    averages: list[Average]
    courses: list[Course]
    scores: list[Score]
    times: list[Time]
    prices: list[Price]

    @cached_property
    def summaries(self) -> list[Summary]:
        """The prices over eps."""
        return summaries(self.prices)

    @cached_property
    def answer(self) -> say.Answer:
        """The answer to the question in the title."""
        fast = self._fast
        means, times = [e for e in self.averages if e.attack in fast], [e for e in self.times if e.attack in fast]
        return say.answer(
            self.courses, means, times, self.scores, self.summaries, self.complete, self._of_fast, self.no_pgd
        )

    @property
    def no_pgd(self) -> str:
        """Why models are not compared with PGD's, where they are not: the end of a sentence."""
        return no_pgd(self.results)

    @cached_property
    def _fast(self) -> set[str]:
        return {each.cell.attack for each in self.results if each.fast}

    @property
    def _of_fast(self) -> list[Difference]:
        return [each for each in self.differences if each.attack in self._fast]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not (self.absent or self.unjudged or self.problems)

    @property
    def paper_table(self) -> str:
        """The paper's differences beside ours, with intervals and times, as a table of Markdown."""
        return words.markdown(*self.paper, left=1)

    @cached_property
    def paper(self) -> tuple[list[str], list[list[str]]]:
        """The paper's differences beside the study's, with intervals and times: (head, rows)."""
        return paper_table.table(self.averages, self.times, self.differences)

    @cached_property
    def attacks(self) -> attack_table.Table | None:
        """The fast attacks side by side; None where there are no two of them."""
        return attack_table.table(self.results, self.differences, self.times, self.courses)

    @property
    def attack_table(self) -> str:
        """The training attacks as a table of Markdown; empty where there are no two of them."""
        found = self.attacks
        return words.markdown(found.head, found.rows, left=1) if found else ""

    @property
    def price_sentences(self) -> list[str]:
        """The cheapest attack and the best one beside FGSM, in sentences; none where there are no prices."""
        return price_words.sentences(self.summaries)

    @property
    def price_table(self) -> str:
        """The prices as a table of Markdown; empty where there are none."""
        return price_words.table(self.summaries) if self.prices else ""


def read_study(folder: Path) -> Study:
    """The study in `folder`. A file that cannot be read is no error, but one of the study's problems.

    Raises:
        ImportError: scipy is not installed.
    """
    results, problems = _read(folder)
    differences, refused = compare(results)
    priced, not_priced = prices(results)
    tasks, said = _asked(folder)
    asked, done = None if tasks is None else [task.cell.id for task in tasks], {each.cell.id: each for each in results}
    finished = [(task, done[task.cell.id]) for task in tasks or () if task.cell.id in done]
    unjudged = {each.cell.id: [j for j in task.judges if j not in each.verdicts] for task, each in finished}
    said += _not_one_study(results, finished)
    once = _once(results)
    found = courses(results)
    return Study(
        folder,
        results,
        asked,
        {id: _reason(folder, id) for id in asked or () if id not in done},
        {id: missed for id, missed in unjudged.items() if missed},
        list(dict.fromkeys([*problems, *said, *refused, *not_priced, *_other_images(results), *once.values()])),
        differences,
        averages(each for each in differences if (each.row.data, each.row.classes) not in once),
        found,
        scores(each for each in found if each.result.fast),
        times(results),
        priced,
    )


def _read(folder: Path) -> tuple[list[Result], list[str]]:
    results: list[Result] = []
    problems: list[str] = []
    for path in sorted((folder / "cells").glob(f"*/{CELL}")):
        try:
            if (record := read_cell(folder, path.parent.name)) is not None:
                results.append(result_of(record, _retimed(folder, path.parent.name, problems)))
        except (KeyError, TypeError) as error:
            problems.append(f"{path.parent.name}/{CELL} is no record of a cell: {type(error).__name__}: {error}")
        except ValueError as error:
            problems.append(str(error))
    return sorted(results, key=place_of), problems


def _retimed(folder: Path, id: str, problems: list[str]) -> Record | None:
    try:
        return read_retimed(folder, id)
    except ValueError as error:  # the cell has its other results
        problems.append(str(error))
        return None


def _asked(folder: Path) -> tuple[list[Task] | None, list[str]]:
    """(the cells that the grid asks for, why the grid is not known)."""
    if not (folder / GRID).exists():
        return None, [f"There is no {GRID}: what else was asked for is not known."]
    try:
        return expanded(read_grid(folder / GRID)), []
    except (ImportError, TypeError, ValueError) as error:
        return None, [f"{GRID} cannot be read, so that what is missing is not known: {error}"]


def _not_one_study(results: Iterable[Result], finished: Iterable[tuple[Task, Result]]) -> list[str]:
    """What the command would refuse, of a folder that another process wrote to, or that was merged by hand."""
    said = []
    for task, each in finished:
        try:
            check(task, each.record)
        except ValueError as error:
            said.append(str(error))
    try:
        check_together(each.record for each in results)
    except ValueError as error:
        said.append(str(error))
    return said


def _once(results: Iterable[Result]) -> dict[tuple[str, str | None], str]:
    """{a data set with the images of one before it: a sentence}. Means over data sets leave it out."""
    first: dict[str, Result] = {}
    found = {}
    for each in results:
        one = first.setdefault(each.record["settings"]["contents"], each)
        if (name := (each.cell.data, each.cell.classes)) != (one.cell.data, one.cell.classes):
            words = f"{set_words(each.cell)} has the images of {set_words(one.cell)}"
            found[name] = f"{words}: means over data sets leave it out."
    return found


def _other_images(results: Iterable[Result]) -> list[str]:
    """Data sets whose cells were judged on different test images, as with another limit for each method."""
    said = []
    for _, group in grouped(results, lambda each: (each.cell.data, each.cell.classes)):
        if len({each.record["labels"] for each in group}) > 1:
            name = set_words(group[0].cell)
            said.append(f"Not all cells of {name} were judged on the same images: means over them are left out.")
    return said


def _reason(folder: Path, id: str) -> str:
    try:
        return (cell_folder(folder, id) / ERROR).read_text(errors="replace").strip().splitlines()[-1]
    except (FileNotFoundError, IndexError):
        return ""
