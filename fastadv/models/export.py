"""Models for those who do not have fastadv."""

import io
import json
from pathlib import Path

import torch

from fastadv._extras import require
from fastadv.files import write_atomically
from fastadv.models.model import Model
from fastadv.preprocessing import Preprocessing

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def export(model: Model, path: str | Path) -> None:
    """Write `model` so that it loads without fastadv.

    A network of transformers becomes a folder for from_pretrained: weights, config.json with the names of the
    classes, preprocessor_config.json. Any other becomes one file with its state dict, under the network's own names:
    .safetensors, or .pt or .pth for torch.load. It takes normalised images: (pixels - mean) / std with the
    preprocessing's numbers, for pixels in [0, 1].

    Raises:
        ValueError: the path's ending fits no format of this network.
    """
    path = Path(path)
    if model.architecture["kind"] == "hf":
        _folder(model, path)
    elif path.suffix == ".safetensors":
        # Copies: readers expect tied weights under each of their names, safetensors refuses shared memory.
        state = {name: t.detach().cpu().clone().contiguous() for name, t in model.network.state_dict().items()}
        write_atomically(path, require("safetensors.torch").save(state, {"format": "pt"}))
    elif path.suffix in (".pt", ".pth"):
        content = io.BytesIO()
        torch.save({name: t.detach().cpu() for name, t in model.network.state_dict().items()}, content)
        write_atomically(path, content.getvalue())
    else:
        raise ValueError(f"{path} must end in .safetensors, .pt or .pth, to say which file it is to be")


def _folder(model: Model, path: Path) -> None:
    if path.suffix in (".safetensors", ".pt", ".pth") or path.is_file():
        raise ValueError(f"a model of transformers is exported as a folder, and {path} is a file")
    model.network.config.id2label = dict(enumerate(model.classes))
    model.network.config.label2id = {name: i for i, name in enumerate(model.classes)}
    model.network.save_pretrained(path)
    write_atomically(path / "preprocessor_config.json", json.dumps(_processor(model.preprocessing), indent=2).encode())


def _processor(given: Preprocessing) -> dict:
    """The settings of CLIP's image processor: the one that resizes the shorter side and cuts out the centre."""
    height, width = given.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": given.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": min(given.covered)},
        "resample": _RESAMPLE[given.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(given.mean),
        "image_std": list(given.std),
    }
