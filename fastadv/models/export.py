"""Exports models to files that load without fastadv."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.files import write_atomically
from fastadv.models.added import added_facts
from fastadv.models.checkpoints import check_no_factors, read_facts
from fastadv.models.model import Model
from fastadv.models.structure import plain
from fastadv.nn.logits import find_logits
from fastadv.preprocessing import Preprocessing

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx")  # whoever names a folder so means a file
# Of a folder transformers reads these first, in place of the weights and of preprocessor_config.json.
_READ_FIRST = ("adapter_config.json", "processor_config.json")
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def export(model: Model, path: str | Path) -> None:
    """Write `model` so that it loads without fastadv.

    The ending of the path chooses the format:

    - .pt2, for any network: a program of torch.export. It needs neither fastadv nor timm nor transformers:
      `torch.export.load(path).module()` maps images (N, C, H, W), float32 in [0, 1], to logits (N, classes); it
      raises a RuntimeError for images of another dtype. It normalises the images itself, is in eval mode, and cannot be
      trained. The names of the classes are in its extra file "classes.json". Adapters and prompts can be exported only
      so: a plain network could not load them.
    - none, or another, for a network of transformers: a folder for from_pretrained, with the weights,
      preprocessor_config.json and config.json, which has the names of the classes. It
      differs from the preprocessing in pictures of 16 bits and transparent ones, of which it makes white and black or
      whatever lies below; and, where the preprocessing crops, in two things: it also resizes a picture that has the
      model's size already, and its crop may lie a pixel beside.
    - .safetensors, .pt or .pth, for any other network: its state dict, under the network's own names.

    The networks in the last two formats take normalised images: (pixels - mean) / std with the mean and std of the
    preprocessing, for pixels in [0, 1].

    Args:
        model: the model.
        path: the file or folder.

    Raises:
        FileExistsError: there is a checkpoint of fastadv at the path, such as the one that the model came from; or the
            folder has a file of another model that transformers would read in place of the export.
        ImportError: safetensors is not installed.
        OSError: the file or the folder cannot be written.
        ValueError: the ending fits no format of this network; torch.export cannot turn the network into a program;
            transformers has no image processor for the preprocessing; or, but for .pt2, the network has factors of
            peft that are not merged.

    Warns:
        UserWarning: the folder's network takes grey pictures, and no image processor of transformers makes these.
    """
    path = Path(path)
    for written in (path, path / "model.safetensors"):  # the second one is what transformers writes into a folder
        if _is_checkpoint(written):
            raise FileExistsError(
                f"{written} is a checkpoint of fastadv, and an export of it is none: choose another name"
            )
    if path.suffix == ".pt2":
        write_atomically(path, _program(model))
        return
    network = plain(model.network)
    check_no_factors(network)
    added = {fact["kind"] for fact in added_facts(network)}
    if added:
        raise ValueError(
            f"the network has {' and '.join(sorted(f'{kind}s' for kind in added))}, which no plain network of its kind "
            f"would load: export it to a file .pt2, a program of torch.export, in place of {path}"
        )
    if model.architecture["kind"] == "hf":
        _folder(model, path)
    elif path.suffix == ".safetensors":
        # Tied weights are copied: readers expect them under each of their names, and safetensors refuses shared memory.
        state = {name: t.detach().cpu().clone().contiguous() for name, t in network.state_dict().items()}
        write_atomically(path, require("safetensors.torch").save(state, {"format": "pt"}))
    elif path.suffix in (".pt", ".pth"):
        content = io.BytesIO()
        torch.save({name: t.detach().cpu() for name, t in network.state_dict().items()}, content)
        write_atomically(path, content.getvalue())
    else:
        raise ValueError(f"{path} must end in .safetensors, .pt, .pth or .pt2, to say which file it is to be")


def _is_checkpoint(path: Path) -> bool:
    """Whether `save` wrote the file at this path."""
    try:
        return path.is_file() and path.suffix == ".safetensors" and read_facts(path) is not None
    except ValueError:  # another kind of file, which may be replaced
        return False


class _Plain(nn.Module):
    """A network from images in [0, 1] to logits that has operations of PyTorch alone."""

    mean: torch.Tensor  # (C, 1, 1)
    std: torch.Tensor  # (C, 1, 1)

    def __init__(self, model: Model):
        super().__init__()
        given = model.preprocessing
        self.network = copy.deepcopy(plain(model.network)).cpu()
        mean, std = (given.mean, given.std) if given else ((0.0,), (1.0,))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._assert_tensor_metadata(images, dtype=torch.float32)
        return find_logits(self.network((images - self.mean) / self.std), images.shape[0])


def _program(model: Model) -> bytes:
    shape = model.preprocessing.shape if model.preprocessing else model.architecture.get("shape")
    if shape is None:
        raise ValueError("a program takes images of one shape, and this model has no preprocessing that says it")
    # The example has two images: with one, torch.export would fix the batch size at 1.
    example, sizes = torch.zeros(2, *shape), ({0: torch.export.Dim("images")},)
    try:
        program = torch.export.export(_Plain(model).eval(), (example,), dynamic_shapes=sizes)
    except Exception as error:
        raise ValueError(f"torch.export cannot turn the network into a program: {error}") from error
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"classes.json": json.dumps(model.classes)})
    return content.getvalue()


def _folder(model: Model, path: Path) -> None:
    if path.suffix in _FILES or path.is_file():
        raise ValueError(f"a model of transformers is exported as a folder, or to a file .pt2, and {path} names a file")
    if model.preprocessing is None:
        raise ValueError("a model of transformers is exported with its preprocessing, and this one has none")
    height, width = model.preprocessing.size
    if height != width:
        raise ValueError(
            f"the model takes pictures of {height} x {width} pixels, and no image processor of transformers resizes to "
            "a rectangle as fastadv does: export it to a file .pt2"
        )
    for name in _READ_FIRST:
        if (path / name).exists():
            raise FileExistsError(
                f"{path} has the {name} of another model, and transformers would read that in place of the export: "
                "choose a new folder, or move the file out"
            )
    if model.preprocessing.channels == 1:
        warn(
            "the model takes grey pictures, and no image processor of transformers makes these of others: give it "
            "pictures that are grey already, as Pillow's .convert('L') makes them"
        )
    network: Any = plain(model.network)  # of transformers
    network.config.id2label = dict(enumerate(model.classes))
    network.config.label2id = {name: i for i, name in enumerate(model.classes)}
    network.config.problem_type = "single_label_classification"  # pipelines read it to choose softmax or sigmoid
    network.save_pretrained(path)
    write_atomically(path / "preprocessor_config.json", json.dumps(_processor(model.preprocessing), indent=2).encode())


def _processor(given: Preprocessing) -> dict[str, Any]:
    """The settings of CLIP's image processor, which resizes the shorter side and cuts out the centre as we do."""
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
