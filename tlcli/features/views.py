"""The views of an image: the plain one, and augmented ones that are functions of image, number and seed."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tlcli.config.backbone import Preprocess
from tlcli.data.augment import Augmenter, AugmentPolicy
from tlcli.data.transforms import EvalTransform

PLAIN_VIEW = 0


@dataclass(frozen=True)
class Views:
    """How views from 1 on are made.

    Attributes:
        policy: What varies, and how much.
        seed: Of --view-seed.
    """

    policy: AugmentPolicy
    seed: int = 0

    def key_facts(self) -> dict[str, Any]:
        """Return what makes the views what they are, for the cache key."""
        return {"augment": self.policy.key_facts(), "view_seed": self.seed}


class ViewMaker:
    """Makes the views of decoded images, at the network's size.

    Args:
        preprocess: The evaluation transform, which gives view 0.
        views: How the others are made; None where view 0 is all there is.

    Attributes:
        transform: Of view 0.
    """

    def __init__(self, preprocess: Preprocess, views: Views | None) -> None:
        self.transform = EvalTransform(preprocess)
        self._views = views
        self._augmenter = Augmenter(views.policy, preprocess) if views else None

    def __call__(self, image: Tensor, key: str, view: int) -> Tensor:
        """Return one view, uint8 [3, h, w], of a decoded image, uint8 [3, H, W].

        Args:
            image: The whole image.
            key: SHA-256 of its file.
            view: 0 for the plain one.

        Raises:
            ValueError: There is no such view.
        """
        if view == PLAIN_VIEW:
            return self.transform(image)
        if self._augmenter is None or self._views is None:
            raise ValueError(f"view {view} of an image: this extractor has no augmentation")
        return self._augmenter(image, key, view, self._views.seed)
