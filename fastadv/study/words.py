"""Numbers and lists in sentences."""

from collections.abc import Iterable, Sequence


def points(share: float) -> str:
    """A difference of shares in points, with its sign: 0.0123 is "+1.23"."""
    rounded = round(100 * share, 2) or 0.0
    return f"{rounded:+.2f}" if rounded else "0.00"


def interval(mean: float, low: float, high: float, unit: str = "") -> str:
    """A difference with its interval, in points: "-0.54 (-1.53 to +0.44)"; `unit` follows the mean."""
    return f"{points(mean)}{unit} ({points(low)} to {points(high)})"


def listed(names: Iterable[str], last: str = "and") -> str:
    """The names as a text: "a, b and c"."""
    *names, final = names
    return f"{', '.join(names)} {last} {final}" if names else final


def counted(number: float, what: str) -> str:
    """A number of things: "1 run", "2 runs"."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def distinct(names: Iterable[str]) -> list[str]:
    """The names, each once."""
    return list(dict.fromkeys(names))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table in Markdown. The first `left` columns are aligned to the left, and the others to the right."""
    lines = [head, [*["---"] * left, *["---:"] * (len(head) - left)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
