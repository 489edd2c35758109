"""What the processes of a run tell each other: objects, sums, tensors and errors."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import distributed

Result = TypeVar("Result")
Groups = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Team:
    """The processes of torch.distributed's default group, or one process that is alone and waits for nobody.

    All methods are collective: every process of the team calls them, in the same order.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        return self.size == 1

    def wait(self) -> None:
        """Wait until every process is here."""
        if not self.alone:
            distributed.barrier()

    def gathered(self, value: object) -> list[Any]:
        """The values of all processes, in their order; each is pickled."""
        values = [value]
        if not self.alone:
            values = [None] * self.size
            distributed.all_gather_object(values, value)
        return values

    def summed(self, t: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor of one shape and dtype, on a device that the group's backend takes."""
        if self.alone:
            return t
        total = t.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    def from_first(self, action: Callable[[], Result]) -> Result:
        """Call `action` in the first process alone, and return its result, or raise its error, in all of them."""
        if self.alone:
            return action()
        result, error = _tried(action) if self.rank == 0 else (None, None)
        told: list[tuple[Result | None, Exception | None]] = [(result, error and _portable(error))]
        distributed.broadcast_object_list(told, 0)
        result, portable = told[0]
        if portable is not None:
            raise error or portable
        return cast(Result, result)

    def by_all(self, action: Callable[[], Result]) -> Result:
        """Call `action` in every process; where it fails in one, all of them raise its error before any goes on."""
        if self.alone:
            return action()
        result, error = _tried(action)
        errors = self.gathered(error and _portable(error))
        failed = [rank for rank, each in enumerate(errors) if each is not None]
        if not failed:
            return cast(Result, result)
        first = errors[failed[0]]
        raise first if len(failed) == self.size else _of_process(failed[0], first) from error

    def tensors_of_first(self, groups: Groups | None, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
        """The groups of tensors of the first process, on the CPU; they go by way of `device`, one at a time.

        Args:
            groups: of the first process; in the others they are not looked at.
            device: one that the process group's backend can send from.

        Returns:
            The tensors by group and name.
        """
        mine = groups or {}
        kinds = {name: {key: (t.shape, t.dtype) for key, t in part.items()} for name, part in mine.items()}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, part in self.from_first(lambda: kinds).items():
            found[name] = {}
            for key, (shape, dtype) in part.items():
                t = mine[name][key].to(device) if self.rank == 0 else torch.empty(shape, dtype=dtype, device=device)
                found[name][key] = self.sent(t).cpu()
        return found

    def sent(self, t: torch.Tensor) -> torch.Tensor:
        """The first process's tensor in all of them; the others pass one of its shape and dtype."""
        if not self.alone:
            t = t.contiguous()
            distributed.broadcast(t, 0)
        return t


def _tried(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _portable(error: Exception) -> Exception:
    """The error, or its words where it cannot be pickled."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
        return copy
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _of_process(rank: int, error: Exception) -> Exception:
    """The error, with the number of the process that it comes from: the others may have no such trouble."""
    words = f"process {rank}: {error}"
    try:
        return type(error)(words)
    except Exception:
        return RuntimeError(words)
