"""Images of which each process of a run holds a part."""

from collections.abc import Iterator, Sequence

import torch
from torch import distributed

from fastadv.team import Team

CHUNK = 256  # images that go to one process at a time


class Share:
    """Images (N, ...) of a set that the processes of a team hold together, each image in one of them.

    Three processes hold six images in turn: process 0 the images 0 and 3, process 1 the images 1 and 4, process 2 the
    images 2 and 5. What the methods return depends on the set alone, not on who holds what, so that several processes
    do what one does. Every process of the team calls the methods that are called collective.

    Args:
        mine: the images of this process (n, ...), in their order.
        owners: which process holds each image, int64 (N,); None where this one holds all.
        team: the processes.

    Attributes:
        rows: the numbers of this process's images, int64 (n,).
    """

    def __init__(self, mine: torch.Tensor, owners: torch.Tensor | None = None, team: Team | None = None):
        self.mine, self.team = mine, team or Team()
        self.owners = torch.zeros(len(mine), dtype=torch.int64) if owners is None else owners
        if self.alone:
            self.rows = torch.arange(len(mine))
            return
        self.rows = (self.owners == self.team.rank).nonzero()[:, 0]
        self._held = _Held(self.rows, mine, len(self.owners))
        self._brought: _Held | None = None

    @classmethod
    def of(cls, images: torch.Tensor, team: Team) -> "Share":
        """This process's share of a tensor that every process has; all of it if there are fewer images than processes.

        Args:
            images: (N, ...), the same in every process.
            team: the processes.
        """
        if team.alone or len(images) < team.size:
            return cls(images)
        owners = dealt(len(images), team)
        return cls(images[owners == team.rank], owners, team)

    def __len__(self) -> int:
        """How many this process holds."""
        return len(self.mine)

    @property
    def alone(self) -> bool:
        """Whether this process holds all images."""
        return self.team.alone

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...), of the whole set."""
        return (len(self.owners), *self.mine.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.mine.dtype

    @property
    def most(self) -> int:
        """The largest number of images that one process holds."""
        return int(self.owners.bincount().max())

    def here(self, rows: torch.Tensor) -> torch.Tensor:
        """The numbers among `rows` (n,), on any device, of images that this process holds."""
        return rows if self.alone else rows[self.owners.to(rows.device)[rows] == self.team.rank]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The images `rows` (n,), which must be among those that `bring` brought last, or this process's own."""
        return self.mine[rows.to(self.mine.device)] if self.alone else (self._brought or self._held).take(rows)

    def bring(self, wanted: Sequence[torch.Tensor], device: torch.device) -> None:
        """Collective: have ready for `take` what `fetched` returns for these arguments."""
        if not self.alone:
            images = self.fetched(wanted, device)
            self._brought = _Held(wanted[self.team.rank], images, len(self.owners))

    def fetched(self, wanted: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """Collective: the images that this process wants, whoever holds them.

        Args:
            wanted: for each process of the team the numbers (n,) that it wants; the same in all processes.
            device: where they shall be, one that the team's backend takes.

        Returns:
            (n, ...), in the order of this process's numbers.
        """
        mine = wanted[self.team.rank]
        if self.alone:
            return self.take(mine).to(device)
        given = [self.here(numbers) for numbers in wanted]
        owners = self.owners[mine]
        received = torch.empty((len(mine), *self.shape[1:]), dtype=self.dtype, device=device)
        distributed.all_to_all_single(
            received,
            self._held.take(torch.cat(given)).to(device).contiguous(),
            owners.bincount(minlength=self.team.size).tolist(),
            [len(numbers) for numbers in given],
        )
        images = torch.empty_like(received)
        images[owners.argsort(stable=True).to(device)] = received  # they came in the order of who sent them
        return images

    def to_all(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Collective: the images `rows`, in every process."""
        return self.fetched([rows] * self.team.size, device)

    def to_first(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Collective: the images `rows`, in the first process; none in the others."""
        return self.fetched([rows, *[rows[:0]] * (self.team.size - 1)], device)

    def chunks(self, device: torch.device) -> Iterator[torch.Tensor]:
        """Collective: all images in their order, a few at a time, in the first process; none in the others."""
        for rows in torch.arange(len(self.owners)).split(CHUNK):
            yield self.to_first(rows, device).cpu()

    def whole(self, device: torch.device) -> torch.Tensor:
        """Collective: all images on the CPU in the first process, none in the others; they go by way of `device`."""
        return self.mine if self.alone else torch.cat(list(self.chunks(device)))

    def concatenated(self, values: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Collective: one tensor of what the processes computed for their images.

        Args:
            values: (n, ...), a row for each image of this process; None where it holds no image.
            device: where the tensor shall be.

        Returns:
            (N, ...), a row for each image of the set.
        """
        if self.alone and values is not None:
            return values
        kinds = self.team.gathered(None if values is None else (values.shape[1:], values.dtype))
        shape, dtype = next(kind for kind in kinds if kind is not None)
        whole = torch.zeros((len(self.owners), *shape), dtype=dtype, device=device)
        if values is not None:
            whole[self.rows.to(device)] = values
        return self.team.summed(whole)

    def merged(self, values: torch.Tensor) -> torch.Tensor:
        """Collective: one tensor from tensors (N, ...) whose rows each process knows for its own images alone."""
        return self.concatenated(values[self.rows.to(values.device)], values.device)


class _Held:
    """Some images of a set, found by their numbers in it.

    Args:
        rows: the numbers, int64 (n,).
        images: (n, ...).
        count: number of images of the whole set.
    """

    def __init__(self, rows: torch.Tensor, images: torch.Tensor, count: int):
        self.images = images
        self._place = torch.full((count,), -1)
        self._place[rows] = torch.arange(len(rows))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        places = self._place[rows.cpu()]
        if len(places) and int(places.min()) < 0:
            raise LookupError(f"the image {int(rows[places.argmin()])} is in another process")
        return self.images[places.to(self.images.device)]


def dealt(count: int, team: Team) -> torch.Tensor:
    """Which process gets each of `count` images: in turn."""
    return torch.arange(count) % team.size


# Images (N, ...), floats in [0, 1] or uint8, and labels int64 (N,).
Samples = tuple[torch.Tensor, torch.Tensor]
Batch = tuple[torch.Tensor | Share, torch.Tensor]  # the same, of which this process may hold a share of the images
