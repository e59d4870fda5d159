"""What sampling and scoring need of several processes: who am I, wait, let one decide.

Work is divided by shard number, so that any number of processes makes the same files; what
travels between processes is small: decisions, and features of reference images.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from detok_pipe.latents.errors import DetokError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other before they fail. The main one may score, save or download
for longer than NCCL's ten minutes, and sampling drifts apart over hours. Launchers end the others
when one has died; only where there is none, as under a bare srun, do they wait so long in vain."""


class Processes:
    """This process among all. Without an Accelerator it is the only one, on ``device``."""

    def __init__(
        self, accelerator: Accelerator | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        self.accelerator = accelerator
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        self.device = torch.device(device if accelerator is None else accelerator.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mine(self, shard: int) -> bool:
        """Whether this process works on a shard."""
        return shard % self.world == self.rank

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """Let each machine's first process go ahead: what it downloads, the others find."""
        if self.accelerator is None:
            return nullcontext()
        return self.accelerator.local_main_process_first()

    def gather(self, items: list[T]) -> list[T]:
        """Everyone's items, in the order of the processes, for everyone."""
        return items if self.world == 1 else gather_object(items)

    def on_main(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the main process; its result, or its error, is everyone's."""
        if self.world == 1:
            return function()
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except DetokError as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if isinstance(outcome[1], DetokError):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]
