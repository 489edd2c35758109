"""What the site takes from the code: the options of each command, and which public names must have a place in it."""

import argparse
import ast
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastadv.cli import COMMANDS
from fastadv.commands.values import default_of

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = re.compile(r"^<!-- options: (\w+) -->$", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, **_) -> str:
    """Put the options of a command in the place of its marker."""
    return OPTIONS.sub(lambda found: options(found[1]), markdown)


def on_page_content(html: str, **_) -> str:
    """Mark options of the command line, for the style sheet."""
    return re.sub(r"<code>(--[\w-]+)</code>", r'<code class="option">\1</code>', html)


def on_post_build(config, **_) -> None:
    """Warn, which is an error in a strict build, of public names that no page describes."""
    described = set(inventory(Path(config.site_dir) / "objects.inv"))
    for name in public_names():
        module = f"{name}.{name.rpartition('.')[2]}"  # of a function that has the name of its module
        if not described & {name, module}:
            log.warning("%s is public, and no page describes it: has it a docstring?", name)


def options(command: str) -> str:
    """The arguments of a command as a table."""
    parser = argparse.ArgumentParser(add_help=False)
    COMMANDS[command][0].add(parser)
    rows = [f"| {_spelt(each)} | {_meaning(each)} |" for each in parser._actions if each.help != argparse.SUPPRESS]
    return "\n".join(["| Option | |", "|---|---|", *rows])


def _spelt(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = "" if action.nargs == 0 else f" *{action.metavar or 'value'}*"
    return ", ".join(f"`{each}`" for each in action.option_strings) + value


def _meaning(action: argparse.Action) -> str:
    sentences = [(action.help or "").strip()]
    if action.choices:
        sentences.append(f"One of {', '.join(f'`{each}`' for each in action.choices)}")
    default = default_of(action)
    if default is not None and action.dest != "device":  # which is the machine's that makes the site
        sentences.append(f"Default: `{default}`")
    return " ".join(f"{each}." for each in sentences if each).replace("|", "\\|")


def public_names() -> Iterator[str]:
    """What the packages have in `__all__`; the version is a string, and nothing to describe."""
    for path in sorted((ROOT / "fastadv").rglob("__init__.py")):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
                yield from (f"{package}.{name}" for name in ast.literal_eval(node.value) if name != "__version__")


def inventory(path: Path) -> Iterator[str]:
    """The names in a Sphinx inventory: four lines, then compressed ones that begin with a name."""
    _, content = path.read_bytes().split(b"zlib.\n", 1)
    return (line.split(" ", 1)[0] for line in zlib.decompress(content).decode().splitlines())
