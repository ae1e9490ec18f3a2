"""Measuring a trained network: the features that `evaluate` and `predict` compute from the images, from rows.

Each batch has one size and, on a CPU, one thread, as the prefix's batches do: what is measured after training
is what is measured later, bit for bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tlcli.features.extractor import Extractor
from tlcli.features.whole import whole_network
from tlcli.training.inputs import Inputs
from tlcli.training.loop import network_logits


class _Features:
    """Inputs of a head: the features of other inputs."""

    def __init__(self, inputs: Inputs, extractor: Extractor) -> None:
        self.inputs = inputs
        self.whole, self.trained = whole_network(extractor)
        self.on_cpu = extractor.device.type == "cpu"

    def __len__(self) -> int:
        return len(self.inputs)

    def load(self, indices: Sequence[int], epoch: int, turn: Callable[[], object]) -> Tensor:
        """Return the features; on a GPU what they come from."""
        loaded = self.inputs.load(indices, epoch, turn)
        return self._features(self.inputs.finish(loaded), turn) if self.on_cpu else loaded

    def finish(self, loaded: Tensor) -> Tensor:
        """Return the features."""
        return loaded if self.on_cpu else self._features(self.inputs.finish(loaded), lambda: None)

    def _features(self, rows: Tensor, turn: Callable[[], object]) -> Tensor:
        found = []
        for part in torch.split(rows, self.whole.batch_size):
            turn()
            found.append(self.whole.computed(self.trained, part, pad=self.on_cpu))
        return torch.cat(found)


def network_features(extractor: Extractor, inputs: Inputs, *, workers: int) -> Tensor:
    """Return the features of each sample's plain view, fp32 [N, D] on the CPU.

    Args:
        extractor: Of the rows at the cut, its suffix as it was trained.
        inputs: Give the rows at the cut, or the images where nothing is frozen.
        workers: Threads.
    """
    return network_logits(nn.Identity(), _Features(inputs, extractor), workers=workers)
