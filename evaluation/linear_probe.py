"""A linear classifier on frozen features: do samples look like their class?"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """Ridge regression of one-hot labels on standardised features, in closed form.

    Attributes:
        mean, scale: (D,) fp64, of the training features.
        weight: (D + 1, K) fp64; the last row is the bias.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, *, ridge: float = 1.0) -> "LinearProbe":
        """Fit to features (N, D) and labels (N,) int64 in [0, K).

        Args:
            ridge: penalty on the weights (not the bias), per feature dimension.
        """
        features = features.double()
        mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
        inputs = _with_bias((features - mean) / scale)  # (N, D + 1)
        targets = torch.nn.functional.one_hot(labels).double()  # (N, K)
        penalty = torch.full((inputs.shape[1],), ridge * features.shape[1], dtype=torch.float64)
        penalty[-1] = 0.0
        gram = inputs.T @ inputs + torch.diag(penalty)
        return cls(mean, scale, torch.linalg.solve(gram, inputs.T @ targets))

    def predict(self, features: Tensor) -> Tensor:
        """The most likely label of each row, (N,) int64."""
        inputs = _with_bias((features.double() - self.mean) / self.scale)
        return (inputs @ self.weight).argmax(1)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of rows whose predicted label is ``labels`` (N,)."""
        return (self.predict(features) == labels).double().mean().item()


def _with_bias(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
