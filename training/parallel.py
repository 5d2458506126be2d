"""One process a GPU, or one process alone: the few collective operations that training needs."""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportPrivateImportUsage=false
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """The processes of one training run. Started by `torchrun` there are several; otherwise one."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this process prints and saves."""
        return self.rank == 0

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in one transfer."""
        if self.size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors)])

    def agree(self, value: float) -> float:
        """The leader's value, on every process."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return box.item()

    def say(self, text: str) -> None:
        """Print once."""
        if self.leads:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


class Budget:
    """Progress in [0, 1] by wall clock, the same on every process: read from the leader's clock every few steps."""

    def __init__(self, team: Team, seconds: float, every: int = 20) -> None:
        self.team, self.seconds, self.every = team, seconds, every
        self.start, self.steps, self.progress = time.time(), 0, 0.0

    def restart(self) -> None:
        """Begin counting now."""
        self.start = time.time()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.time() - self.start

    def step(self) -> float:
        """Count a step and return the progress."""
        if self.steps % self.every == 0:
            self.progress = self.team.agree(self.elapsed / self.seconds)
        self.steps += 1
        return self.progress


def schedule(progress: float, step: int, warmup: int, hold: float, floor: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, full until `hold`, then linear to `floor` at progress 1."""
    decay = 1.0 if progress < hold else max(floor, (1 - progress) / (1 - hold))
    return min(1.0, (step + 1) / warmup) * decay
