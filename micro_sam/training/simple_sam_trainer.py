"""Training of SAM with one prompt per object and without corrections."""

from typing import Any

import numpy as np

from ..core.errors import InvalidInputError
from .interactive import ONE_BOX, ONE_POINT, PromptChoice
from .sam_trainer import SamTrainer

__all__ = ["MedSAMTrainer", "SimpleSamTrainer"]


class SimpleSamTrainer(SamTrainer):
    """Trains SAM with a single prediction per iteration, from a point or from a box for each object.

    Args:
        use_points: Whether to train with one positive point per object (three masks, of which the best counts).
        use_box: Whether to train with a box per object (one mask). With both, each iteration takes one at random.
        kwargs: Arguments of `SamTrainer`, without `n_sub_iteration` and `mask_prob`, which are 1 and 0.

    Raises:
        InvalidInputError: If neither points nor boxes are to be used.
    """

    def __init__(self, use_points: bool = True, use_box: bool = True, **kwargs: Any) -> None:
        if not (use_points or use_box):
            raise InvalidInputError("Neither points nor boxes would be used. Set use_points or use_box.")
        super().__init__(n_sub_iteration=1, mask_prob=0.0, **kwargs)
        self.use_points = use_points
        self.use_box = use_box

    def _configuration(self) -> dict[str, Any]:
        return {**super()._configuration(), "use_points": self.use_points, "use_box": self.use_box}

    def _choose(self, rng: np.random.Generator) -> PromptChoice:
        choices = [ONE_POINT] * self.use_points + [ONE_BOX] * self.use_box
        return choices[rng.integers(len(choices))]

    def _training_choice(self, rng: np.random.Generator) -> PromptChoice:
        return self._choose(rng)

    def _validation_choice(self, index: int, rng: np.random.Generator) -> PromptChoice:
        return self._choose(rng)


class MedSAMTrainer(SimpleSamTrainer):
    """Trains SAM from boxes alone, as Ma et al. 2024 (10.1038/s41467-024-44824-z) did for medical images.

    Args:
        kwargs: Arguments of `SimpleSamTrainer`, without `use_points` and `use_box`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(use_points=False, use_box=True, **kwargs)
