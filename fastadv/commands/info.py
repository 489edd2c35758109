"""fastadv info: what runs on which device here, and why."""

import argparse

import fastadv


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    for name, value in fastadv.info().items():
        print(f"{name}: {'' if isinstance(value, dict) else value}")
        for key, item in value.items() if isinstance(value, dict) else ():
            facts = item.items() if isinstance(item, dict) else ()
            print(f"  {key}: {', '.join(f'{k} {v}' for k, v in facts) if facts else item}")
