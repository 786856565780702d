"""Labels of a layer whose content results replace, such as the current object and the automatic segmentation."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.masks import BoxedMask
from ..editing.editor import LabelEditor
from ..editing.history import Delta, ObjectIndex


class LayerLabels(LabelEditor):
    """Labels that start empty and are written in place; each change is returned as a sparse `Delta`.

    Args:
        shape: (Y, X), or planes (P, Y, X).
        dtype: Unsigned integer.
    """

    def __init__(self, shape: Sequence[int], dtype: Any = np.uint32):
        super().__init__(np.zeros(shape, dtype=dtype), in_place=True, index=ObjectIndex(), max_undo=0)

    def assign(
        self,
        name: str,
        objects: Mapping[int, Mapping[int, BoxedMask]],
        planes: Collection[int] | None = None,
        ids: Collection[int] | None = None,
    ) -> Delta:
        """Replace objects; later ones overwrite earlier ones.

        Args:
            name: The name of the change.
            objects: Masks by id and plane; 0 is the plane of an image.
            planes: Where the objects that are there now are removed; None removes them in all planes.
            ids: Which of them are removed; None removes all.
        """
        removed = set(self.ids if ids is None else ids)
        boxes = [self._index.boxes(removed, planes)]
        boxes.append(np.array([
            (z, *box_rows(m)) for masks in objects.values() for z, m in masks.items() if m.area
        ], dtype=np.int64).reshape(-1, 5))

        def change(values, block):
            out = values.copy()
            for z in range(block[0].start, block[0].stop):
                plane = out[z - block[0].start]
                if planes is None or z in planes:
                    plane[np.isin(plane, list(removed))] = 0
                for object_id, masks in objects.items():
                    if z in masks and masks[z].area:
                        m = masks[z]
                        y, x = m.y0 - block[1].start, m.x0 - block[2].start
                        plane[y:y + m.mask.shape[0], x:x + m.mask.shape[1]][m.mask] = object_id
            return out

        return self._edit(name, np.concatenate(boxes), change)


def box_rows(mask: BoxedMask) -> tuple[int, int, int, int]:
    """The box of a mask as (y0, y1, x0, x1)."""
    y0, x0, y1, x1 = mask.box
    return y0, y1, x0, x1
