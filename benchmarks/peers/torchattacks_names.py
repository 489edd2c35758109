"""Lists the public names of the installed torchattacks, and whether fastadv's attacks have them.

    python benchmarks/peers/torchattacks_names.py

There is one row for each method, attribute and constructor argument of torchattacks' base class, and of the attacks
that both packages have. "same" means that fastadv has the name, with the same arguments in the same order and the same
defaults. For a name that fastadv does not have, the row says what to write instead. If INSTEAD lacks the name, the row
says "missing". The exit status is 1 if a name is missing, or has other arguments or defaults.
"""

import inspect
import sys
from importlib.metadata import version

import torchattacks
from torch import nn

from fastadv import attacks

ATTACKS = ("FGSM", "FFGSM", "BIM", "PGD", "MIFGSM", "TPGD", "PGDL2")
# Names that fastadv has with another behaviour: the difference.
DIFFERENT = {
    "__call__": "labels may be left out; eps, seed and x_init may be passed",
    "save": "uint8 is rounded, not cut off; the L2 norm is in pixels; the time is a batch's mean; written once, whole",
    "set_mode_targeted_by_function": "None is refused: set_mode_targeted_by_label()",
    "set_mode_targeted_random": "drawn from the call's seed, without a loop over images",
    "set_model_training_mode": "the modes that training_mode has; others are refused",
    "set_normalization_used": "the model may not be Normalized as well",
    "targeted": "True for targets as labels; else also which: 'random', 'least_likely', or the function",
}
# Names that fastadv does not have: what to write instead.
INSTEAD = {
    "attack": "type(atk).__name__",
    "device": "none needed: where the images and the model are",
    "forward": "atk(images, labels)",
    "get_least_likely_label": "targeted='least_likely'",
    "get_logits": "model(images)",
    "get_output_with_eval_nograd": "model(images), in eval mode under torch.no_grad()",
    "get_random_target_label": "targeted='random'",
    "get_target_label": "targeted=",
    "inverse_normalize": "images * std + mean",
    "load": "torch.load(path, weights_only=True), a dict of tensors",
    "model_name": "type(atk.model).__name__",
    "normalization_used": "images_normalized, (mean, std)",
    "normalize": "fastadv.Normalization(mean, std)(images)",
    "set_device": "none needed: where the images and the model are",
    "set_model": "atk.model = model",
    "to_type": "fastadv.to_float(images); (255 * images).round().to(torch.uint8)",
}


def arguments(function: object) -> list[tuple[str, object]]:
    """(name, default) of each argument, also behind a decorator of torchattacks."""
    hidden = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    function = next(filter(inspect.isfunction, hidden), function)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]


def verdict(name: str, ours: object, theirs: object) -> str:
    """The comparison of the attribute `name` of two attacks, in words."""
    if not hasattr(ours, name):
        return INSTEAD.get(name, "missing")
    if name in DIFFERENT:
        return f"same name: {DIFFERENT[name]}"
    if inspect.isroutine(getattr(type(theirs), name, None)):
        mine, its = (arguments(getattr(type(attack), name)) for attack in (ours, theirs))
        return "same" if mine == its else "other arguments"
    return "same"


def rows(model: nn.Module) -> dict[str, str]:
    """{name: its verdict}: first for the names of the base class, which all attacks have, then for each attack."""
    pairs = {name: (getattr(attacks, name)(model), getattr(torchattacks, name)(model)) for name in ATTACKS}
    told: dict[str, str] = {}
    for attack, (ours, theirs) in pairs.items():
        public = [name for name in dir(theirs) if not name.startswith("_") or name == "__call__"]
        for name in sorted(public):
            of_base = name in dir(torchattacks.attack.Attack) or name in vars(torchattacks.attack.Attack("", model))
            told[name if of_base else f"{attack}.{name}"] = verdict(name, ours, theirs)
        mine, its = (arguments(type(each).__init__) for each in (ours, theirs))
        for i, (name, default) in enumerate(its):
            same = mine[i : i + 1] == [(name, default)]
            told[f"{attack}({name}=)"] = "same" if same else "other default or place"
    return told


def main() -> int:
    told = rows(nn.Linear(1, 2))
    print(f"torchattacks {version('torchattacks')}: {len(told)} names\n")
    for name, verdict_ in told.items():
        print(f"{name:40}{verdict_}")
    same = sum(v.startswith("same") for v in told.values())
    print(f"\n{same} of {len(told)} are there under the same name")
    return int(any(v in ("missing", "other arguments", "other default or place") for v in told.values()))


if __name__ == "__main__":
    sys.exit(main())
