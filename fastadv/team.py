"""Passes objects, sums, tensors and errors between the processes of a run."""

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
    """The processes of torch.distributed's default group, or a single process.

    All methods are collective: every process of the team must call them, in the same order. A single process calls them
    too, and waits for nothing.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    def wait(self) -> None:
        """Wait until every process has called this."""
        if not self.alone:
            distributed.barrier()

    def gathered(self, value: object) -> list[Any]:
        """The values of all processes, in the order of their ranks. They are sent by pickle."""
        values = [value]
        if not self.alone:
            values = [None] * self.size
            distributed.all_gather_object(values, value)
        return values

    def summed(self, t: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes.

        Args:
            t: this process's tensor, of the same shape and dtype in all processes, on a device that the process group's
                backend can send from.
        """
        if self.alone:
            return t
        total = t.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    def from_first(self, action: Callable[[], Result]) -> Result:
        """Call `action` in the first process alone; every process returns its result, or raises its error."""
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
        """Call `action` in every process. Where it fails in one process, all of them raise that error."""
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
        """The first process's groups of tensors, in every process. The tensors are sent one at a time.

        Args:
            groups: {group: {name: tensor}} in the first process; the others may pass anything.
            device: a device that the process group's backend can send from.

        Returns:
            {group: {name: tensor}}, on the CPU.
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
        """The first process's tensor, in every process; the others pass a tensor of the same shape and dtype."""
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
    """The error; where it cannot be pickled, a RuntimeError with its message."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
        return copy
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _of_process(rank: int, error: Exception) -> Exception:
    """The error with the number of the process in which it was raised."""
    words = f"process {rank}: {error}"
    try:
        return type(error)(words)
    except Exception:
        return RuntimeError(words)
