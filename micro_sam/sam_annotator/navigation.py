"""Move the viewer to what the user chose in a panel."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..annotation.session import COMMITTED


def go_to(annotator: Any, plane: int | None, yx: Sequence[float] | None = None) -> None:
    """Show a plane, and move the camera if a position in it is not in sight.

    Args:
        annotator: The annotator.
        plane: The slice or frame; None for an image.
        yx: The position in voxels of the image.
    """
    viewer, image, layer = annotator.viewer, annotator.session.image, annotator.views[COMMITTED]
    if plane is not None:
        point = list(viewer.dims.point)
        point[image.axes[0]] = image.transform.voxel_to_world((plane, 0, 0))[0]
        viewer.dims.point = point
    if yx is None:
        return
    low, high = layer.corner_pixels[:, list(image.axes[-2:])]
    if (np.asarray(yx) < low).any() or (np.asarray(yx) > high).any():
        world = image.transform.voxel_to_world(yx if plane is None else (plane, *yx))
        viewer.camera.center = (0.0, *world[-2:])
