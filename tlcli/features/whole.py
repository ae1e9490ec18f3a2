"""Features of a whole trained network, computed in the parts in which it was trained and measured.

The frozen prefix computes as it did for the rows that were trained on, its rows are rounded as they are when
they are stored, and what was trained after it computes in fp32.
"""

import copy
import dataclasses

import torch
from torch import Tensor, nn

from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.memory_format import in_memory_format, to_channels_last
from tlcli.features.extractor import TYPES, Extractor
from tlcli.machine.memory import is_out_of_memory


class TrainedPart(nn.Module):
    """What follows a cut, as it is now: rows at the cut [B, *row_shape] -> features [B, D], in fp32.

    Args:
        extractor: Of the rows at the cut; its suffix is copied.
    """

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        suffix, device = extractor.cut.suffix, extractor.device
        row = torch.zeros(1, *extractor.cut.row_shape, device=device)
        self.channels_last = True
        self.module = to_channels_last(_settled(suffix).to(device))
        try:
            with torch.no_grad():
                self(row)
        except (RuntimeError, ValueError) as error:  # a view that this memory format does not allow
            if is_out_of_memory(error):
                raise
            self.channels_last, self.module = False, _settled(suffix).to(device)
        self.eval()

    def forward(self, rows: Tensor) -> Tensor:
        """Return the features of rows of any number type."""
        features: Tensor = self.module(in_memory_format(rows.float(), self.channels_last))
        return features.float()


def _settled(suffix: nn.Module) -> nn.Module:
    """Return a copy in eval mode, without what some attention layers keep between two evaluations."""
    return copy.deepcopy(suffix).float().train().eval().requires_grad_(False)


class InParts(nn.Module):
    """Normalised images -> features: the prefix, the rounding of a stored row, the trained part.

    Args:
        prefix: As prepared for the rows at the cut.
        row_dtype: Their number type.
        trained: What follows.
    """

    def __init__(self, prefix: nn.Module, row_dtype: torch.dtype, trained: TrainedPart) -> None:
        super().__init__()
        self.prefix, self.row_dtype, self.trained = prefix, row_dtype, trained

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.trained(self.prefix(images).to(self.row_dtype))
        return features


def whole_network(extractor: Extractor) -> tuple[Extractor, TrainedPart]:
    """Return an extractor of the whole network's features, and the part of it after the cut.

    Args:
        extractor: Of the rows at the cut, its suffix as it was trained.
    """
    trained = TrainedPart(extractor)
    module = InParts(extractor.fast.module, TYPES[extractor.row_dtype], trained).eval()
    facts = {
        "suffix_sha256": state_sha256(trained.module),
        "suffix_memory_format": "channels_last" if trained.channels_last else "contiguous",
        "rounded_to": extractor.row_dtype,
    }
    cut = dataclasses.replace(
        extractor.cut, node="all", row_shape=(extractor.backbone.num_features,), saved=None
    )
    frozen = cut.num_frozen_units
    then = f" up to unit {frozen}, fp32 after it" if frozen else ""
    return extractor.derived(module, cut, "fp32", facts, then=then), trained
