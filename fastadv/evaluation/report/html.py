"""Pieces of HTML. Whatever a name holds, it is shown, and by the reader's own fonts."""

import base64
import html
from collections.abc import Mapping, Sequence

LONGEST = 80  # characters of a name
KEPT = "\n\u200c\u200d"  # not printable by themselves: lines, and the joiners of Persian, Indic scripts and emoji


def text(value: object) -> str:
    """`value` as text of a page; controls, and bytes of a name that is not UTF-8, as escapes."""
    return html.escape("".join(c if c.isprintable() or c in KEPT else _escaped(c) for c in str(value)))


def name(number: int, names: Sequence[str]) -> str:
    """A class by its number and name, whose script may run from right to left; a very long name is cut."""
    words = names[number] if len(names[number]) <= LONGEST else names[number][: LONGEST - 1] + "…"
    return f"{number} <bdi>{text(words.replace(chr(10), _escaped(chr(10))))}</bdi>"


def paragraph(words: str, kind: str = "") -> str:
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def facts(rows: Mapping[str, object], kind: str = "") -> str:
    """A table of names and their values."""
    cells = "".join(f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in rows.items())
    return f'<table class="{kind}">{cells}</table>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table with a head; its cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(words: str, content: str) -> str:
    return f"<details><summary>{text(words)}</summary>{content}</details>"


def image(png: bytes, words: str) -> str:
    return f'<img alt="{text(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _escaped(character: str) -> str:
    """A character as Python escapes it; a byte that was no UTF-8 as that byte."""
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
