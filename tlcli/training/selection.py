"""What a training takes from looking at val: the rate on a plateau, the best epoch, when to stop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tlcli.training.recipe import Recipe
from tlcli.training.schedule import Plateau


@dataclass
class Selection:
    """Follows val where the recipe says so; otherwise does nothing.

    Attributes:
        recipe: Schedule and patience.
        plateau: Lowers the learning rate.
        best_epoch: The epoch, from 1, with the smallest loss on val so far; 0 before the first.
        best_loss: That loss.
        best: The weights of that epoch, by the names of the network's state; empty without patience.
    """

    recipe: Recipe
    plateau: Plateau = field(default_factory=Plateau)
    best_epoch: int = 0
    best_loss: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    def update(self, row: Mapping[str, float], values: Mapping[str, Tensor]) -> None:
        """Look at an epoch that has ended.

        Args:
            row: Its `epoch`, `train_loss` and, where val is measured, `val_log_loss`.
            values: The weights it ended with, which are copied where they are the best.
        """
        if not self.recipe.select_on_val:
            return
        loss = row.get("val_log_loss", row["train_loss"])
        self.plateau.update(loss, self.recipe)
        if self.recipe.patience and loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, int(row["epoch"])
            self.best = {name: value.detach().clone() for name, value in values.items()}

    def is_over(self, epoch: int) -> bool:
        """Return whether `epoch` epochs are enough: the last --patience of them were no better."""
        patience = self.recipe.patience
        return patience is not None and epoch - self.best_epoch >= patience
