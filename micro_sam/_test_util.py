"""What the tests of this package and of others have in common."""

from collections.abc import Sequence
from typing import Any

import numpy as np

LAYER_NAMES = ("auto_segmentation", "committed_objects", "current_object", "image", "point_prompts", "prompts")


def check_layer_initialization(viewer: Any, expected_shape: Sequence[int]) -> None:
    """Check the layers of an annotator that was just opened: all six are there, and nothing is annotated.

    Args:
        viewer: The napari viewer.
        expected_shape: Shape of the image, without channels.

    Raises:
        AssertionError: If something else is found.
    """
    names = sorted(layer.name for layer in viewer.layers)
    assert names == list(LAYER_NAMES), f"expected the layers {list(LAYER_NAMES)}, found {names}"
    assert len(viewer.layers["prompts"].data) == 0, "there are shapes"
    assert len(viewer.layers["point_prompts"].data) == 0, "there are points"
    for name in ("auto_segmentation", "committed_objects", "current_object"):
        labels = np.asarray(viewer.layers[name].data)
        assert labels.shape == tuple(expected_shape), f"{name} has the shape {labels.shape}, not {expected_shape}"
        assert not labels.any(), f"{name} is not empty"
