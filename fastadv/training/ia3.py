"""IA3, vectors that scale the outputs or the inputs of layers, with peft (Liu et al. 2022, arXiv 2205.05638)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastadv._extras import require
from fastadv.models.projections import ia3_targets
from fastadv.training.factors import ADAPTER, merged, pattern
from fastadv.training.mergeable import ALONE, check_mergeable
from fastadv.training.options import Chosen, Options

_TODO = "choose another method"


@contextmanager
def ia3(model: nn.Module, options: Options) -> Iterator[Chosen]:
    """Scale keys, values and the input of each block's last layer; at the end the scales are merged into the weights.

    Args:
        model: the network.
        options: `example` and `heads` are used.

    Yields:
        The vectors, which begin with ones.

    Raises:
        ImportError: peft is not installed.
        ValueError: there are no such layers; or the vectors of a layer cannot be merged, see `check_mergeable`.
    """
    example = options.images("IA3 finds its layers")
    outputs, inputs = ia3_targets(model, example, options.heads)
    names = [target.name for target in outputs] + inputs
    peft = require("peft")
    # Where no input is scaled, a pattern that matches nothing: for an empty one peft would take its own defaults.
    nothing = "(?!)"
    alone = {
        name: peft.IA3Config(target_modules=ALONE, feedforward_modules=ALONE if name in inputs else nothing)
        for name in names
    }
    check_mergeable(model, peft.IA3Model, alone, example, "IA3", _TODO)
    config = peft.IA3Config(target_modules=pattern(names), feedforward_modules=pattern(inputs) or nothing)
    tuner = peft.IA3Model(model, {ADAPTER: config}, ADAPTER)
    vectors = {name: model.get_parameter(f"{name}.ia3_l.{ADAPTER}") for name in names}
    with merged(tuner, vectors, "IA3", _TODO.capitalize()) as hold:
        fixed = 0
        for target in outputs:
            vector = vectors[target.name]
            dim = 1 if vector.ndim == 4 else 0  # the vector of a convolution is (1, outputs, 1, 1)
            fixed += hold(vector, target.rows, dim)
        yield Chosen(list(vectors.values()), fixed)
