"""The process group that torchrun starts, and what a single process uses in its place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sdxl_training.records import UserError

Item = TypeVar("Item")
RENDEZVOUS = timedelta(minutes=10)
SLOWEST_RANK = timedelta(hours=12)
"""How long ranks wait for each other: one may be encoding pictures, or drawing previews, while the others are done."""


@dataclass(frozen=True)
class Group:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks."""
        if self.world_size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of parameters that no wrapper averages, as DDP does for its own."""
        if self.world_size > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            for gradient in gradients:
                distributed.all_reduce(gradient)
                gradient /= self.world_size

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is set. Asked over gloo, on the CPU: the device is not waited for."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Return all ranks' items, in order of rank; items are pickled."""
        if self.world_size == 1:
            return list(items)
        shares: list[Sequence[Item]] = [()] * self.world_size
        distributed.all_gather_object(shares, items)
        return [item for share in shares for item in share]

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            distributed.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients averaged over the ranks; itself in a single process."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)


@contextmanager
def process_group(device: str) -> Iterator[Group]:
    """Join the group torchrun describes in the environment, or be the only process.

    device: auto, cpu, cuda or cuda:N. `auto` takes the GPU where there is one. Raises UserError for a GPU that is not
    there, or one for several processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = own_device(device)
    if world_size == 1:
        yield Group(0, 1, chosen)
        return
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, rank, world_size = next(rendezvous("env://", timeout=RENDEZVOUS))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=SLOWEST_RANK)
    try:
        yield Group(distributed.get_rank(), world_size, chosen)
    finally:
        distributed.destroy_process_group()


def own_device(device: str) -> torch.device:
    """Return this process' device and make it the current one; see `process_group`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        _refuse_missing_gpu(chosen, device, int(os.environ.get("WORLD_SIZE", "1")))
        torch.cuda.set_device(chosen)
    return chosen


def _refuse_missing_gpu(chosen: torch.device, asked: str, world_size: int) -> None:
    count, index = torch.cuda.device_count(), chosen.index or 0
    if not torch.cuda.is_available():
        raise UserError(
            f"global_config.device = {asked}: torch sees no GPU here; `sdxl-training doctor` says why. Set it to auto "
            "or cpu, or mend the installation."
        )
    if index >= count:
        raise UserError(
            f"global_config.device = {asked}: there is no GPU {index}, only {count}, counted from 0. Name one of them, "
            "or start no more processes on a machine than it has GPUs."
        )
    if world_size > 1 and asked not in ("auto", "cuda"):
        raise UserError(
            f"global_config.device = {asked}: {world_size} processes cannot share one GPU. Set it to cuda, which gives "
            "each process its own."
        )


def set_grad_sync(model: nn.Module, last: bool) -> None:
    """Let gradients be averaged over the ranks in the next backward only if it is the step's last."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
