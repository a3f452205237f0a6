"""The processes of a run that torchrun started: their shares of every batch, and what they tell each other.

They must see one output folder. Rank 0 alone writes there and prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from .checkpoint import Workspace, open_workspace

BACKEND = "gloo"  # images and models of this command are on the CPU


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's number among ``world`` processes; 0 of 1 where there is no torchrun.

    All methods but `share` are collective: every process has to call them, in the same order.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This process's part of a batch that `require_divisible` accepts."""
        size = len(items) // self.world
        return items[self.rank * size : (self.rank + 1) * size]

    def require_divisible(self, batch: int) -> int:
        """Images per process. Raises `ConfigError` unless every process gets as many."""
        if batch % self.world:
            low = batch // self.world * self.world
            near = f"{low} or {low + self.world}" if low else f"{self.world}"
            raise ConfigError(
                f"setting 'batch': got {batch} for {self.world} processes; accepted: a multiple of {self.world}, since "
                f"each gets as many images of a batch; give --batch {near}, or start another number of processes"
            )
        return batch // self.world

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.world == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.item()

    def mean(self, value: float) -> float:
        return self.total(value) / self.world

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order; of one shape."""
        if self.world == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(tensors, tensor)
        return tensors

    @torch.no_grad()
    def lend_buffers(self, model: nn.Module) -> None:
        """Give everybody rank 0's buffers, as DistributedDataParallel does before every forward."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """The mean over all processes of every buffer of floating point: the others are equal everywhere."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world

    def wait(self) -> None:
        """Until everybody is here, and what rank 0 wrote before can be read."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def started_by_torchrun() -> Ranks:
    """What torchrun's environment says of this process."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextlib.contextmanager
def workspace_of(ranks: Ranks, folder: Path, *, resume: bool, overwrite: bool) -> Iterator[Workspace]:
    """`open_workspace`, by rank 0 for all: the others begin when it holds the lock."""
    if ranks.leads:
        opened: contextlib.AbstractContextManager[Workspace] = open_workspace(
            folder, resume=resume, overwrite=overwrite
        )
    else:
        opened = contextlib.nullcontext(Workspace(folder))
    with opened as workspace:
        ranks.wait()
        yield workspace


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Within, the processes that torchrun started are a group; one that exists already is used and left as it is."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    ranks = started_by_torchrun()
    if ranks.world == 1:
        yield ranks
        return
    dist.init_process_group(BACKEND)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
