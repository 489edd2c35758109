"""The verdicts of a study's judges on each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastadv.attacks import Ensemble, create_attack
from fastadv.attacks.verdicts import predicted
from fastadv.data.share import Batch, Samples
from fastadv.evaluation import evaluate
from fastadv.functional import to_float
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits
from fastadv.study.grid import IN_A_ROW

PART = 256  # images that go through the model at a time


def judged(
    model: torch.nn.Module, test: Batch, judges: Sequence[str], eps: float, seed: int, folder: Path
) -> dict[str, str]:
    """Each judge's verdicts on the test images.

    A judge of IN_A_ROW is several attacks in a row, each on the images that the ones before left. Any other judge
    is one attack on all images; these judges have the same random starts.

    Args:
        model: from images (N, C, H, W) in [0, 1] to logits.
        test: images and labels.
        judges: names of attacks, or of IN_A_ROW.
        eps: radius of the ball, in the images' units, [0, 1].
        seed: the seed of the random starts.
        folder: where the state of each evaluation is kept, so that a cut one goes on.

    Returns:
        {judge: verdicts}, "clean" first where a judge is one attack. Verdicts are a character for each image: 1 where
        the model is right after the attack, else 0, such as "1101".
    """
    graph = next(model.parameters()).is_cuda
    alone = [judge for judge in judges if judge not in IN_A_ROW]
    found: dict[str, str] = {}
    if alone:
        attacks = [create_attack(judge, model, eps, graph=graph) for judge in alone]
        state = _state(folder, alone)
        report = evaluate(model, test, attacks, ensemble=False, state=state, seed=seed, progress=False)
        left = report["clean_correct"]
        found = {"clean": _bits(left)}
        found |= {judge: _bits(_left(left, result)) for judge, result in zip(alone, report["attacks"], strict=True)}
    rows = {judge: IN_A_ROW[judge] for judge in judges if judge in IN_A_ROW}
    if rows:
        longest = max(rows.values(), key=len)  # the other rows are the beginning of this one
        ensemble = Ensemble(model, eps=eps, version="custom", attacks_to_run=list(longest), graph=graph)
        attacks = [attack for _, attack in ensemble.attacks()]
        report = evaluate(model, test, attacks, state=_state(folder, longest), seed=seed, progress=False)
        left, after = report["clean_correct"], {}
        for count, result in enumerate(report["attacks"], 1):
            left = after[longest[:count]] = _left(left, result)
        found |= {judge: _bits(after[parts]) for judge, parts in rows.items()}
    return found


def predicted_classes(model: torch.nn.Module, test: Samples) -> set[int]:
    """The classes that the model predicts for the test images, without an attack."""
    device = next(model.parameters()).device
    with torch.no_grad(), frozen(model):
        parts = (to_float(part.to(device)) for part in test[0].split(PART))
        found = [predicted(find_logits(model(part), len(part))) for part in parts]
    return set(torch.cat(found).tolist())


def _state(folder: Path, attacks: Sequence[str]) -> Path:
    """The file of an evaluation's state. Its name has the attacks, as a resumed grid may ask for more judges."""
    return folder / f"judged-{'-'.join(attacks)}.safetensors"


def _left(right: Sequence[bool], result: Mapping[str, Any]) -> list[bool]:
    return [was and not fell for was, fell in zip(right, result["fooled"], strict=True)]


def _bits(right: Sequence[bool]) -> str:
    return "".join("1" if each else "0" for each in right)


def share(verdicts: str) -> float:
    """The share of images that are classified correctly, in [0, 1], from verdicts as `judged` returns them."""
    return verdicts.count("1") / len(verdicts)
