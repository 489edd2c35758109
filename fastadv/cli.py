"""The command line: a module of fastadv.commands for each command."""

import argparse
import itertools
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from fastadv.commands import evaluate, export, finetune, info, predict, pretrain, study
from fastadv.commands.failures import words_of
from fastadv.commands.speech import add_verbosity, is_verbose, speaking
from fastadv.names import nearest
from fastadv.version import __version__

COMMANDS = {
    "finetune": (finetune, "train a model adversarially, from a robust backbone to classes of your own"),
    "evaluate": (evaluate, "measure a model's clean and robust accuracy"),
    "study": (study, "compare methods, attacks and budgets, over data sets and seeds"),
    "predict": (predict, "classify pictures"),
    "export": (export, "write a plain model that loads without fastadv"),
    "pretrain": (pretrain, "train the embedded robust backbone again"),
    "info": (info, "what runs on which device here, and why"),
}
INTERRUPTED = 130  # the exit status that a shell reports after Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv` (without the program's name; None means the process's own arguments).

    An error is a line that says what was wrong. With -v, or the variable FASTADV_TRACEBACK, its traceback comes first.

    Raises:
        SystemExit: bad arguments, or a file, a package or a number that the command cannot work with; 130 after Ctrl-C.
    """
    argv = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments, unknown = _parser().parse_known_args(argv)
    command = vars(arguments).pop("command")
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_near(unknown[0], command)}")
    _check_empty(argv, command)
    arguments.command_line = shlex.join(["fastadv", *argv])
    with speaking(getattr(arguments, "verbosity", logging.INFO)):
        try:
            arguments.run(arguments)
            if sys.stdout is not None:  # it is None where the shell closed it
                sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its last flush
            raise SystemExit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            words = words_of(error, arguments)
            if words is None:
                raise
            if is_verbose() or os.environ.get("FASTADV_TRACEBACK"):
                traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                print(f"fastadv: {words}", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from None
            raise SystemExit(f"fastadv: error: {words}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastadv", description="Fast adversarial training and fine-tuning.")
    parser.add_argument("--version", action="version", version=f"fastadv {__version__}")
    add_verbosity(parser)
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for name, (module, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        add_verbosity(command)
        module.add(command)
        command.set_defaults(command=command)  # its errors show its own usage, not the program's
    return parser


def _at_home(word: str) -> str:
    """`--out=~/run` with the folder that ~ stands for, which a shell puts in after a space alone."""
    name, sign, value = word.partition("=")
    return name + sign + os.path.expanduser(value) if name.startswith("--") else word


def _check_empty(words: Sequence[str], command: argparse.ArgumentParser) -> None:
    """Refuse an empty word, as of "$OUT" in a shell where OUT is not set: as a path it would be the working folder."""
    for before, word in itertools.pairwise(["", *words]):
        if not word or (word.startswith("--") and word.find("=") == len(word) - 1):
            command.error(f"nothing after {word or before}: is a variable of the shell not set?")


def _near(word: str, command: argparse.ArgumentParser) -> str:
    """The option that was probably meant."""
    names = [name for action in command._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
    known = {name.strip("-"): name for name in names}
    near = nearest(word.partition("=")[0].strip("-"), known, cutoff=0.7)
    return f". Did you mean {known[near]}?" if near else ""
