"""A stream of toy rows, for tests of the loop that both trainers share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from detok_pipe.latents.noise import Noise


@dataclass
class Rows:
    x: Tensor
    ids: Tensor


class Stream:
    def __init__(self, batch: int = 8) -> None:
        self.batch, self.position = batch, 0

    def __iter__(self):
        while True:
            ids = torch.arange(self.position, self.position + self.batch)
            self.position += self.batch
            yield Rows(Noise(7, ids).normal("x", (4,)), ids)

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"]
