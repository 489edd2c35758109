"""Checks an architecture from a file of unknown origin: it may choose sizes, but no code, other file or download."""

from collections.abc import Iterator

# The allowed options of timm.create_model: sizes, rates, and NAMES, which timm looks up among its own layers.
NAMES = ("act_layer", "global_pool", "norm_layer", "pos_embed")
TIMM_OPTIONS = (
    *("in_chans", "img_size", "patch_size", "embed_dim", "embed_dims", "depth", "depths", "dims", "num_heads"),
    *("key_dim", "mlp_ratio", "mlp_ratios", "window_size", "window_ratio", "stem_width", "base_width", "cardinality"),
    *("layers", "channels", "output_stride", "class_token", "reg_tokens", "no_embed_class", "qkv_bias", "qk_norm"),
    *("init_values", "ls_init_value", "fc_norm", "pre_norm", "final_norm", "use_fc_norm", "use_abs_pos_emb"),
    *("use_rel_pos_bias", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "drop_rate", "drop_path_rate"),
    *("drop_block_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *NAMES,
)
# Entries of a configuration of transformers that can name a module, another model, or a kernel on the hub.
OUTWARD = (
    *("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config", "experts_implementation"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "model_args", "backbone"),
    *("backbone_config", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone"),
)
ATTENTION = ("eager", "sdpa")  # implementations that are in PyTorch itself


def check_timm(name: object, options: object) -> None:
    """Refuse a name or an option that may lead to code or to another file.

    Args:
        name: the name of a model of timm's.
        options: {option of timm.create_model: value}.

    Raises:
        ValueError: the name is not one of timm's own models; an option is not in TIMM_OPTIONS; or its value is neither
            a number nor a list of numbers nor, for an option in NAMES, a word.
    """
    if not isinstance(name, str) or ":" in name or "/" in name:
        raise ValueError(f"{name!r} is no name of a model that timm contains")
    if not isinstance(options, dict):
        raise ValueError(f"the options of a model of timm's are names and values, got {options!r}")
    for option, value in options.items():
        if option not in TIMM_OPTIONS:
            raise ValueError(
                f"a model of timm's cannot have the option {option!r} here: options are stored with the model, and "
                f"must lead to no code and no other file. There are {', '.join(TIMM_OPTIONS)}"
            )
        if not (_is_numbers(value) or (option in NAMES and isinstance(value, str))):
            raise ValueError(f"the option {option!r} of a model of timm's cannot be {value!r}")


def check_transformers(config: object) -> None:
    """Refuse a configuration that leads to code, models or files from outside transformers.

    Args:
        config: the configuration as a dict, such as config.json holds it.

    Raises:
        ValueError: an entry leads elsewhere; or `config` is no configuration.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a configuration of transformers has a model_type, and this one has none")
    if kind.startswith("timm"):
        raise ValueError(f"a model of timm's inside transformers ({kind}) is not taken: name it timm:NAME")
    for name, value in _entries(config):
        harmless = value in (None, False, {}, []) or ("attn" in name and value in ATTENTION)
        if name in OUTWARD and not harmless:
            raise ValueError(
                f"the model's configuration sets {name} to {value!r}, which leads to code or models from elsewhere: "
                "such a model is not loaded"
            )


def check_shape(shape: object) -> None:
    """Refuse anything but the shape of an image, such as (3, 32, 32).

    Raises:
        ValueError: `shape` is not a sequence of integers above 0.
    """
    sizes = list(shape) if isinstance(shape, list | tuple) else []
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if not sizes or not whole or min(sizes) < 1:
        raise ValueError(f"the shape of an image must be integers (C, H, W), got {shape!r}")


def _is_numbers(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numbers, value))
    return value is None or isinstance(value, bool | int | float)


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """(name, value) of each entry of a dict and of all dicts inside it."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)
