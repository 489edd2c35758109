"""Pieces of HTML. Any name can be shown: the page uses the reader's fonts, and escapes what cannot be printed."""

import base64
import html
from collections.abc import Mapping, Sequence

LONGEST = 80  # characters: a longer name is cut
KEPT = "\n\u200c\u200d"  # not printable, but needed: line ends, and the joiners of Persian, Indic scripts and emoji


def text(value: object) -> str:
    """`value` as text of a page. Control characters, and bytes of a file's name that is not UTF-8, become escapes."""
    return html.escape("".join(c if c.isprintable() or c in KEPT else _escaped(c) for c in str(value)))


def name(number: int, names: Sequence[str]) -> str:
    """A class as its number and its name. The name may be in a script from right to left; a very long name is cut."""
    words = names[number] if len(names[number]) <= LONGEST else names[number][: LONGEST - 1] + "…"
    return f"{number} <bdi>{text(words.replace(chr(10), _escaped(chr(10))))}</bdi>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of text, with the CSS class `kind`."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def facts(rows: Mapping[str, object], kind: str = "") -> str:
    """A table of names and values, which are text, with the CSS class `kind`."""
    cells = "".join(f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in rows.items())
    return f'<table class="{kind}">{cells}</table>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table with a head, and with the CSS class `kind`. The cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(words: str, content: str) -> str:
    """HTML that is hidden until the reader clicks on `words`."""
    return f"<details><summary>{text(words)}</summary>{content}</details>"


def image(png: bytes, words: str) -> str:
    """A PNG image inside the page; `words` describe it for people who cannot see it."""
    return f'<img alt="{text(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _escaped(character: str) -> str:
    """A character as Python escapes it; a byte that is no UTF-8 as \\x and its number."""
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
