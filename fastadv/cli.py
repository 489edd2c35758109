"""The command line: a module of fastadv.commands for each command."""

import argparse
import logging
from collections.abc import Sequence

from fastadv.commands import evaluate, export, finetune, info, predict, pretrain

COMMANDS = {
    "finetune": (finetune, "train a model adversarially, from a robust backbone to classes of your own"),
    "evaluate": (evaluate, "measure a model's clean and robust accuracy"),
    "predict": (predict, "classify pictures"),
    "export": (export, "write a plain model that loads without fastadv"),
    "pretrain": (pretrain, "train the embedded robust backbone again"),
    "info": (info, "what runs on which device here, and why"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv` (without the program's name; None means the process's own arguments).

    Raises:
        SystemExit: bad arguments, or a file, a package or a number that the command cannot work with.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastadv").setLevel(logging.INFO)
    try:
        arguments.run(arguments)
    except (ArithmeticError, ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"fastadv: error: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastadv", description="Fast adversarial training and fine-tuning.")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    for name, (module, help) in COMMANDS.items():
        module.add(commands.add_parser(name, help=help))
    return parser
