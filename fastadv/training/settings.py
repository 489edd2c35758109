"""The settings of a training run, which are checked before anything is changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, TypeVar, cast, get_args, get_origin

from fastadv.names import instead
from fastadv.training.budget import span
from fastadv.training.methods import LEARNING_RATE, LEARNING_RATES, METHODS, learning_rate

# Old names work until the next minor release, and warn. Files with old names can always be loaded.
RENAMED = {
    "accumulate": "grad_accum_steps",
    "average": "ema_decay",
    "clip": "max_grad_norm",
    "head_start": "lp_ft",
    "head_start_lr": "lp_ft_lr",
    "on_overfitting": "on_catastrophic_overfitting",
}
WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a name", tuple: "a sequence of names"}
_RATES = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items()) + f", the others {LEARNING_RATE:g}"

T = TypeVar("T")


def _of(default: T, help: str, **limits: object) -> T:
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True)
class Settings:
    """Settings of a `Trainer`, and options of `fastadv finetune` by the same names."""

    method: str = _of(
        "full",
        "which weights train: full: all; linear: the head; the others the head and: bias: biases; norm: norm layers; "
        "lora: low-rank factors; ia3: scales of keys, values and MLPs; adapter: bottlenecks after the blocks; prompt: "
        "extra tokens of a vision transformer",
        choices=tuple(METHODS),
    )
    head: str | None = _of(None, "name of the head module (the one that the model's structure gives if not given)")
    lp_ft: int = _of(0, "epochs of linear probing before the method, which starts from its head", least=0)
    lp_ft_lr: float | None = _of(
        None, "peak learning rate of the epochs of lp_ft (that of linear if not given)", least=0
    )
    rank: int = _of(16, "rank of lora's factors", least=1)
    lora_alpha: float = _of(16.0, "lora's product of factors is scaled by lora_alpha / rank", above=0)
    lora_targets: tuple[str, ...] | None = _of(
        None, "modules that lora adapts (found by the model's structure if not given)"
    )
    adapter_reduction: int | None = _of(
        None, "an adapter is so many times narrower than its block (8 if not given)", least=1
    )
    prompt_tokens: int | None = _of(None, "tokens that prompt adds to each block (10 if not given)", least=1)
    alpha: float | None = _of(
        None, "step size of the attack, on the scale [0, 1] (the attack's own if not given)", least=0
    )
    noise: float | None = _of(
        None, "half-width of fgsm-rs' and nfgsm's random start, on the scale [0, 1] (theirs if not given)", least=0
    )
    steps: int | None = _of(None, "steps of pgd (7 if not given)", least=1)
    eps_schedule: str = _of(
        "constant",
        "how eps grows: constant; linear, from 0 over all epochs; hinge:0.25,0.75, between these shares of them",
    )
    refresh: int | None = _of(
        None,
        "for stale and cached: every image gets a fresh FGSM in the first epoch and in every K-th of its own, where "
        "(i + epoch) mod K is 0 (K is 4 for cached if not given)",
        least=1,
    )
    price: float | None = _of(
        None,
        "for stale: the price of a step, in steps of standard training by the cost model; it decides how many images "
        "get a fresh FGSM, those first whose signs agree least",
        above=0,
    )
    quantile: float | None = _of(
        None, "for zerograd: gradients below this quantile are zeroed (0.35 if not given)", least=0, most=1
    )
    penalty: float | None = _of(
        None, "weight of the term that gradalign, fgsm-pgi and liet add to the loss (theirs if not given)", least=0
    )
    repeats: int | None = _of(None, "for free: updates in a row from each batch (8 if not given)", least=1)
    epochs: int = _of(20, "passes over the training images; free makes epochs / repeats passes", least=1)
    batch_size: int = _of(
        64, "images of an update, over all processes; the batches of an epoch are nearly equal", least=1
    )
    grad_accum_steps: int = _of(1, "parts in which a batch goes through the model, for memory", least=1)
    lr: float | None = _of(
        None,
        f"peak learning rate (if not given the method's own: with adamw {_RATES}; with sgd ten times as much)",
        least=0,
    )
    warmup: int = _of(0, "steps (not epochs) of linear warm-up; a cosine to 0 follows", least=0)
    optimizer: str = _of("adamw", "adamw, or sgd with a Nesterov momentum of 0.9", choices=("adamw", "sgd"))
    weight_decay: float = _of(0.0, "decay of weights; biases, norms, positions and tokens have none", least=0)
    clean_weight: float = _of(0.0, "share of the loss on clean images", least=0, most=1)
    label_smoothing: float | None = _of(
        None,
        "label smoothing of the training loss (if not given 0; fgsm-pgi 0.4 and liet 0.6, until a switch)",
        least=0,
        most=1,
    )
    max_grad_norm: float | None = _of(None, "largest norm of the gradient (no clipping if not given)", above=0)
    ema_decay: float | None = _of(
        None,
        "decay of a moving average of the weights, such as 0.998; the average is then the result (if not given 0, no "
        "average; liet 0.9995)",
        least=0,
        most=1,
    )
    precision: str | None = _of(
        None, "precision of attack and update (that of accelerate launch if not given)", choices=("no", "bf16")
    )
    compile: bool = _of(False, "run attack and update under torch.compile")
    channels_last: bool = _of(False, "channels-last memory format for the model and the images")
    augment: bool = _of(False, "random crops, after padding by an eighth of the height, and flips")
    seed: int = _of(0, "seed of everything that is random", least=-(2**63), most=2**64 - 1)
    eval_every: int = _of(1, "epochs between evaluations on validation images; 0: after the last one only", least=0)
    probe: int = _of(
        256, "training images on which the monitor looks for catastrophic overfitting; 0: no monitor", least=0
    )
    on_catastrophic_overfitting: str = _of(
        "warn",
        "warn: go on; the others go back to the weights of the best probe: stop ends the run, rollback halves the "
        "learning rate, switch changes the attack and begins the schedule again, over the epochs that are left",
        choices=("warn", "stop", "rollback", "switch"),
    )
    switch_to: str = _of("pgd", "the attack after a switch", choices=("pgd", "nfgsm"))
    checkpoint_s: float = _of(600.0, "seconds between two checkpoints; there is one after each epoch as well", least=0)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                object.__setattr__(self, each.name, in_limits(each.name, value))
        if self.lr is None:
            object.__setattr__(self, "lr", learning_rate(self.method, self.optimizer))
        if self.lp_ft_lr is None:  # where it has no use, what states of earlier versions have
            optimizer = self.optimizer if self.lp_ft else "adamw"
            object.__setattr__(self, "lp_ft_lr", learning_rate("linear", optimizer))
        span(self.eps_schedule)  # refuses an unknown schedule
        if self.lp_ft and self.method == "linear":
            raise ValueError("lp_ft is linear probing before another method: for linear, take more epochs")
        own = dict.fromkeys(("rank", "lora_alpha", "lora_targets"), "lora")
        for name, method in {**own, "adapter_reduction": "adapter", "prompt_tokens": "prompt"}.items():
            if self._given(name) and self.method != method:
                raise ValueError(f"{name} belongs to the method {method}, and the method is {self.method}")
        if self.lp_ft_lr != learning_rate("linear", "adamw") and not self.lp_ft:
            raise ValueError("lp_ft_lr is the learning rate of lp_ft, and lp_ft=0 means no epochs of that: give both")
        if self._given("switch_to") and self.on_catastrophic_overfitting != "switch":
            raise ValueError("switch_to belongs to on_catastrophic_overfitting='switch': give both")
        if self.on_catastrophic_overfitting != "warn" and not self.probe:
            raise ValueError(
                f"on_catastrophic_overfitting={self.on_catastrophic_overfitting!r} answers the monitor, and probe=0 "
                "means that there is none: leave probe as it is, or on_catastrophic_overfitting"
            )

    def _given(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != getattr(type(self), name))

    @property
    def attack(self) -> dict[str, float | None]:
        """Changes to the settings of an attack by name."""
        names = ("alpha", "noise", "steps", "refresh", "price", "quantile", "penalty", "repeats")
        return {name: getattr(self, name) for name in names}

    def settled(self, defaults: Mapping[str, float]) -> "Settings":
        """These settings with numbers for `label_smoothing` and `ema_decay` where they are not given.

        Args:
            defaults: of the training attack, by the names of settings; a setting that it does not name is 0.
        """
        names = ("label_smoothing", "ema_decay")
        missing: dict[str, Any] = {name: defaults.get(name, 0.0) for name in names if getattr(self, name) is None}
        return replace(self, **missing)

    @property
    def stages(self) -> tuple["Stage", ...]:
        """The parts of the run: linear probing, where `lp_ft` asks for it, and then the method."""
        first = (Stage("linear", self.lp_ft, cast(float, self.lp_ft_lr)),) if self.lp_ft else ()
        return (*first, Stage(self.method, self.epochs, cast(float, self.lr)))


_LINES = [f"{each.name}: {each.metadata['help']}." for each in fields(Settings)]
Settings.__doc__ = "\n        ".join([f"{Settings.__doc__}\n\n    Attributes:", *_LINES]) + "\n    "


@dataclass(frozen=True)
class Stage:
    """A part of a run with one method and one schedule."""

    method: str
    epochs: int
    lr: float


def of_kind(name: str, value: object, kind: type[T]) -> T:
    """`value` as a plain `kind`; numbers of NumPy are numbers.

    Args:
        name: of the setting, for the errors.
        value: what was given.
        kind: a key of WANTED.

    Raises:
        TypeError: it is something else.
        ValueError: an int is wanted, and the number is not whole.
    """
    if kind is tuple:
        right = isinstance(value, Sequence) and not isinstance(value, str)
    elif kind in (int, float):
        right = isinstance(value, Real) and not isinstance(value, bool)
    else:
        right = isinstance(value, kind)
    wanted = f"{name} is {WANTED[kind]}, got {value!r}"
    if not right:
        raise TypeError(wanted)
    if kind is int and not isinstance(value, Integral):
        raise ValueError(wanted)
    return kind(value)  # type: ignore[call-arg]


def kind_of(each: "Field[Any]") -> type:
    """The type of a setting that is not None: a key of WANTED."""
    first = (*get_args(each.type), each.type)[0]
    kind: type = get_origin(first) or first
    return kind


def in_limits(name: str, value: object) -> Any:
    """`value` as the setting `name` takes it.

    Raises:
        TypeError: it is of another kind.
        ValueError: it is not within the setting's limits.
    """
    each = Settings.__dataclass_fields__[name]
    return checked(name, value, kind_of(each), **each.metadata["limits"])


def checked(
    name: str,
    value: object,
    kind: type[T],
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> T:
    """`value` as a plain `kind` within its limits.

    Args:
        name: of the setting, for the errors.
        value: what was given.
        kind: a key of WANTED.
        choices: what it may be; None means anything.
        least: of a number: it is at least this.
        above: of a number: it is greater than this.
        most: of a number: it is at most this.

    Raises:
        TypeError: it is of another kind.
        ValueError: it is not within the limits.
    """
    if choices is not None and value not in choices:
        raise ValueError(f"unknown {name} {value!r}{instead(value, choices)}")
    plain = of_kind(name, value, kind)
    number: Any = plain  # where there are limits
    if kind is float and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if least is not None and not number >= least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be above {above}, got {number}")
    if most is not None and not number <= most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return plain
