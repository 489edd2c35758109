"""fastadv export: a plain model for timm, transformers or torch, or a program of torch, without fastadv."""

import argparse
from pathlib import Path

from fastadv import models
from fastadv.commands.arguments import TRAINED, add_trust, load_model
from fastadv.commands.speech import say


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    parser.add_argument("model", help=TRAINED)
    add_trust(parser)
    parser.add_argument(
        "out",
        type=Path,
        help="a file .safetensors or .pt, for a model of transformers a folder; or a program of torch.export, .pt2",
    )


def run(arguments: argparse.Namespace) -> None:
    models.export(load_model(arguments.model, arguments.trust_code), arguments.out)
    say(f"saved {arguments.out}")
