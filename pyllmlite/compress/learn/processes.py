"""One process, or the ranks that ``torchrun`` or ``accelerate launch`` started.

Gradients are summed here, after the last micro-batch, instead of by DistributedDataParallel: an
objective may then use any part of the module (the body without the head), which DDP's wrapper
around ``forward`` does not see.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

_BUCKET = 1 << 23  # elements that are summed at once
_TIMEOUT = datetime.timedelta(hours=12)  # one rank may write the data while others wait


class Processes:
    """The ranks of a run.  ``rank`` 0 writes files and shows progress.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str = "auto") -> None:
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._mine = False
        if wanted > 1 and not distributed.is_initialized():
            backend = "nccl" if device == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=_TIMEOUT)
            self._mine = True
        several = distributed.is_available() and distributed.is_initialized()
        self.size: int = distributed.get_world_size() if several else 1
        self.rank: int = distributed.get_rank() if several else 0
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        self.device = torch.device(device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element by element over all ranks."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, tensors: Iterable[Any]) -> None:
        """Rank 0's values everywhere."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def sum_gradients(self, parameters: list[Any]) -> None:
        """In place; a parameter that a rank did not use counts as zeros there."""
        if self.size == 1:
            return
        bucket: list[Any] = []
        count = 0
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            count += parameter.numel()
            if count >= _BUCKET or i == len(parameters) - 1:
                flat = torch.cat([grad.reshape(-1) for grad in bucket])
                distributed.all_reduce(flat)
                parts = flat.split([grad.numel() for grad in bucket])
                for grad, part in zip(bucket, parts, strict=True):
                    grad.copy_(part.view_as(grad))
                bucket, count = [], 0

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def close(self) -> None:
        if self._mine:
            distributed.destroy_process_group()
            self._mine = False
