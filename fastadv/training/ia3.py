"""IA3, vectors that scale the outputs or the inputs of layers, with peft (Liu et al. 2022, arXiv 2205.05638)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv._extras import require
from fastadv.models.projections import ia3_targets
from fastadv.training.factors import check_targets, hold, merged, pattern
from fastadv.training.options import Chosen, Options

_TODO = "choose another method"


@contextmanager
def ia3(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Scale keys, values and the input of each block's last layer; at the end the scales are merged into the weights.

    Args:
        model: the network.
        options: `example` and `head` are used.

    Yields:
        The vectors, which begin with ones.

    Raises:
        ImportError: peft is not installed.
        ValueError: there are no such layers; or two layers share a weight.
    """
    outputs, inputs = ia3_targets(model, options.images("IA3 finds its layers"), options.head)
    names = [target.name for target in outputs] + inputs
    check_targets(model, names, "IA3", _TODO)
    peft = require("peft")
    # Where no input is scaled, a pattern that matches nothing: for an empty one peft would take its own defaults.
    config = peft.IA3Config(target_modules=pattern(names), feedforward_modules=pattern(inputs) or "(?!)")
    tuner = peft.IA3Model(model, {"default": config}, "default")
    vectors = {name: model.get_parameter(f"{name}.ia3_l.default") for name in names}
    with merged(tuner, vectors, "IA3", _TODO.capitalize()):
        fixed = 0
        for target in outputs:
            vector = vectors[target.name]
            dim = 1 if vector.ndim == 4 else 0  # the vector of a convolution is (1, outputs, 1, 1)
            fixed += hold(vector, target.rows, dim)
        yield Chosen(list(vectors.values()), fixed)
