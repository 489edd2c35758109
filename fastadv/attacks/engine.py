"""The one loop of all attacks: a fixed number of slots that take steps together.

`attack(images, labels)` is an engine with a slot for each image; an evaluation puts another image into a slot
whose image is finished. Nothing here reads the device from the host.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fastadv.attacks.samplewise import taken, together
from fastadv.functional import to_float
from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel
from fastadv.ops.autograd import result_like

if TYPE_CHECKING:
    from fastadv.attacks.base import Attack

NAMES = ("x", "targets", "eps", "seed", "adv", "z", "age", "restart", "alpha", "best", "best_losses", "best_fooled")
WARM_UP = 3  # iterations before a capture: cuDNN's and cuBLAS's choices and workspaces must exist by then


class Slots:
    """What belongs to the images under attack; every tensor has a row for each slot.

    Attributes:
        x: clean images.
        targets: what the loss compares with.
        eps: float or tensor (N, 1, ...).
        seed: int, or int64 with one element or (N,); None where nothing is drawn.
        adv: the iterate, None before the start.
        z: the model's input where normalisation is folded into the steps, else None.
        given: whether `adv` came from outside, so that it cannot be made again from the seed.
        age: steps since the start, int64 (N,); None where the attack does not ask for it.
        restart: number of the run, int64 (N,); None where the attack does not ask for it.
        alpha: step sizes, float (N, 1, ...); None where they are one for all.
        memory: tensors that an attack keeps from step to step.
        scratch: tensors that an attack writes in each step before it reads them, kept because fresh memory costs more
            on the CPU than what is written there.
        best: the strongest of the iterates that a step was taken from; None where nobody asks for it.
        best_losses: the losses of `best`, (N,), or None.
        best_fooled: whether `best` fools, (N,) bool, or None.
        losses: of the iterate, (N,), when a step is taken.
        logits: of the iterate, (N, C); None where the outputs are none.
        inside: which iterates may count, (N,) bool, None for all.
    """

    # Some of these may be None, as said above. Their types are what an attack that asks for them sees in a step.
    seed: int | torch.Tensor
    adv: torch.Tensor
    age: torch.Tensor
    restart: torch.Tensor
    best: torch.Tensor
    best_losses: torch.Tensor
    best_fooled: torch.Tensor
    losses: torch.Tensor

    def __init__(
        self,
        x: torch.Tensor,
        targets: torch.Tensor,
        eps: float | torch.Tensor,
        seed: int | torch.Tensor | None,
        *,
        adv: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        age: torch.Tensor | None = None,
        restart: torch.Tensor | None = None,
    ) -> None:
        self.x, self.targets, self.eps, self.z = x, targets, eps, z
        self.seed, self.adv, self.age, self.restart = seed, adv, age, restart  # type: ignore[assignment]
        self.alpha: torch.Tensor | None = None
        self.given = adv is not None
        self.memory: dict[str, torch.Tensor] = {}
        self.scratch: dict[str, torch.Tensor] = {}
        self.logits: torch.Tensor | None = None
        self.inside: torch.Tensor | None = None
        self.losses = self.best = self.best_losses = self.best_fooled = None  # type: ignore[assignment]

    @property
    def input(self) -> torch.Tensor:
        """What the model sees."""
        return self.iterate if self.z is None else self.z

    @property
    def iterate(self) -> torch.Tensor:
        """Without a random start, and before the first step, the images themselves."""
        return self.x if self.adv is None else self.adv

    @property
    def strongest(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images, losses, which of them fool)."""
        return self.best, self.best_losses, self.best_fooled

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {name: getattr(self, name) for name in NAMES}
        return {name: t for name, t in {**named, **self.memory}.items() if isinstance(t, torch.Tensor)}

    def rows(self, index: torch.Tensor) -> Slots:
        """Copies of the slots `index` (n,)."""
        part = copy.copy(self)
        part.scratch = {}
        part.memory = {name: taken(t, index) for name, t in self.memory.items()}
        for name in NAMES:
            value = getattr(self, name)
            setattr(part, name, taken(value, index) if _has_rows(value, self) else value)
        return part


def concatenated(first: Slots, second: Slots) -> Slots:
    """The slots of both, which belong to one attack."""
    both = copy.copy(first)
    both.scratch = {}
    both.memory = {name: together(t, second.memory[name]) for name, t in first.memory.items()}
    for name in NAMES:
        value = getattr(first, name)
        setattr(both, name, together(value, getattr(second, name)) if _has_rows(value, first) else value)
    return both


def _has_rows(value: object, slots: Slots) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(slots.x)


def is_ours(attack: Attack) -> bool:
    """Whether the methods that make its iterates are of this package."""
    return is_of_package(attack, "start", "step")


def is_of_package(attack: Attack, *names: str) -> bool:
    """Whether these methods of an attack are of this package: neither its class nor the object has others."""
    methods = (getattr(type(attack), name) for name in names)
    own = vars(attack).keys() & set(names)
    return not own and all(method.__module__.partition(".")[0] == "fastadv" for method in methods)


class Engine:
    """Runs `attack` on `slots`: `start()`, then `iterate()` as often as the attack has steps."""

    def __init__(self, attack: Attack, slots: Slots) -> None:
        self.attack, self.slots = attack, slots
        self._theirs = not is_ours(attack)

    def start(self) -> None:
        attack, slots = self.attack, self.slots
        if not slots.given:
            before = slots.adv
            self._wrote("start", attack.start(slots), before)
        elif slots.best is not None:
            attack.into_ball(slots)  # for the start may be the strongest
        attack.prepare(slots)
        if slots.best is not None:
            slots.best.copy_(to_float(slots.x))
            slots.best_losses.fill_(-torch.inf)
            slots.best_fooled.fill_(False)

    def iterate(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One gradient and one step; the losses and logits of the iterate before the step."""
        attack, slots = self.attack, self.slots
        grad: torch.Tensor | None = None
        if attack.by_gradient:
            gradient = attack.objective.gradient
            grad, slots.losses, slots.logits = gradient(slots.input, attack.aim(slots), slots.scratch)
        else:
            if "seen" not in slots.scratch:
                slots.scratch["seen"] = torch.empty_like(slots.input)
            judge = attack.objective.judge
            slots.losses, slots.logits = judge(slots.input, attack.aim(slots), slots.scratch["seen"])
        slots.inside = attack.inside(slots)
        if slots.best is not None:
            attack.keep_best(slots)
        before = slots.adv
        self._wrote("step", attack.step(slots, grad), before)  # type: ignore[arg-type]
        if slots.age is not None:
            slots.age += 1
        return slots.losses, slots.logits

    def _wrote(self, name: str, returned: object, before: torch.Tensor | None) -> None:
        """After a method of an attack of others, which may write its iterate in other ways than our ops do.

        Args:
            name: of the method.
            returned: what it returned.
            before: the tensor that had the iterate.

        Raises:
            TypeError: it returned something.
        """
        if not self._theirs:
            return
        attack, slots = self.attack, self.slots
        if returned is not None and returned is not slots.adv:  # as our ops in place return it
            raise TypeError(
                f"{type(attack).__name__}.{name} returned a {type(returned).__name__}: an attack writes its iterate "
                "into slots.adv, and returns nothing"
            )
        if before is not None and slots.adv is not before:  # a captured graph reads and writes that tensor
            slots.adv = before.copy_(slots.adv)
        elif slots.adv is not None and slots.adv.data_ptr() == slots.x.data_ptr():  # the caller's images
            slots.adv = to_float(slots.adv).clone()
        attack.show(slots)

    def run(self) -> torch.Tensor:
        """All steps; the losses before each of them, (steps, N)."""
        self.start()
        return torch.stack([self.iterate()[0] for _ in range(self.attack.steps)])


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now and not inside: freeing an old graph would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def baked(model: AnyModel, device: torch.device) -> tuple[object, ...]:
    """What a captured graph depends on beside the slots' shapes and the attack's settings: a part of its key.

    It holds the model's modules with their modes, the memory of its parameters and buffers, the caller's autocast, and
    how PyTorch is told to compute. The key keeps the modules alive, so that a new one never gets the id of an old one.
    """
    inside = as_module(model)
    modules = (model, *list(inside.modules())[1:])  # the first is the model, or a list that is new each time
    tensors = (*inside.parameters(), *inside.buffers())
    kind = device.type
    backends = torch.backends
    return (
        modules,
        tuple(getattr(module, "training", None) for module in modules),
        tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors),
        torch.is_autocast_enabled(kind) and (torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()),
        *(backends.cudnn.enabled, backends.cudnn.deterministic, backends.cudnn.benchmark),
        *(backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
    )


class GraphEngine(Engine):
    """An engine whose iteration is captured as a CUDA graph and replayed: `iterate` launches one thing.

    Built for one set of shapes; `load` puts other images into its slots.
    """

    def __init__(self, attack: Attack, slots: Slots) -> None:
        slots = copy.copy(slots)
        super().__init__(attack, slots)
        # Tensors of its own: the graph keeps their addresses.
        slots.memory = {}
        for name in NAMES:
            if isinstance(getattr(slots, name), torch.Tensor):
                setattr(slots, name, getattr(slots, name).clone())
        if slots.adv is None:
            slots.adv = result_like(slots.x)
        stream = torch.cuda.Stream(slots.x.device)
        stream.wait_stream(torch.cuda.current_stream(slots.x.device))
        with torch.cuda.stream(stream):
            self.start()
            for _ in range(WARM_UP):
                super().iterate()
        torch.cuda.current_stream(slots.x.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with no_collection(), torch.cuda.graph(self._graph, stream=stream):
            self._result = super().iterate()

    def load(self, slots: Slots) -> None:
        mine = self.slots.tensors()
        for name, t in slots.tensors().items():
            mine[name].copy_(t)
        self.slots.given = slots.given

    def iterate(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._graph.replay()
        losses, logits = self._result
        return losses.clone(), logits  # which the next replay writes again
