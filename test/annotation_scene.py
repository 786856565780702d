"""A scene with known objects, and a model that finds the one that its prompts point at; importable by tests."""

import numpy as np
import torch
from scipy import ndimage

from micro_sam import prompt_based_segmentation
from micro_sam.annotation.prompts import PointPrompt, Prompts, ShapePrompt
from micro_sam.core.masks import BoxedMask
from micro_sam.volume import propagation_prompts

LOW_RES = 64
IOU = 0.9


class PlaneNumbers:
    """Features (P, 1, C, h, w) whose values are the number of the plane."""

    def __init__(self, n_planes: int):
        self.shape = (n_planes, 1, 256, 16, 16)

    def __getitem__(self, plane):
        return np.full(self.shape[1:], plane, dtype=np.float32)


class Scene:
    """Labels (P, Y, X); the model returns the object under a positive point, or the one that fills most of a box or
    mask, without what is within 8 pixels of a negative point."""

    def __init__(self, shape, monkeypatch):
        self.labels = np.zeros(shape, dtype=np.uint8)
        height, width = shape[1:]
        scale = 256 / max(height, width)
        self.embeddings = {
            "features": PlaneNumbers(shape[0]), "original_size": (height, width),
            "input_size": (int(height * scale + 0.5), int(width * scale + 0.5)),
        }
        self.asked = []
        for module in (propagation_prompts, prompt_based_segmentation):
            monkeypatch.setattr(module, "decode_prompts", self._decode)

    def disc(self, planes, label, center, radius):
        """Paint a disc into planes; a function gives the centre by plane."""
        y, x = np.ogrid[:self.labels.shape[1], :self.labels.shape[2]]
        for plane in planes:
            cy, cx = center(plane) if callable(center) else center
            self.labels[plane][np.hypot(y - cy, x - cx) <= radius] = label

    def _decode(self, predictor, prompts, multimask_output):
        plane = int(predictor.features[0, 0, 0, 0])
        n = max(len(v) for v in (prompts.boxes, prompts.points, prompts.logits) if v is not None)
        self.asked.append((plane, n))
        shape = self.labels.shape[1:]
        step = max(shape) / LOW_RES
        grid = np.meshgrid(*[(np.arange(LOW_RES) + 0.5) * step - 0.5] * 2, indexing="ij")
        logits = []
        for k in range(n):
            mask = self._find(self.labels[plane], prompts, k)
            outside = ndimage.distance_transform_edt(~mask) if mask.any() else np.full(shape, 9.0)
            distance = ndimage.distance_transform_edt(mask) - outside
            values = ndimage.map_coordinates(distance, grid, order=1, mode="constant", cval=-9)
            logits.append([values] * (3 if multimask_output else 1))
        return torch.tensor(np.array(logits), dtype=torch.float32), torch.full((n, len(logits[0])), IOU)

    def _find(self, labels, prompts, k):
        seen = np.zeros(labels.shape, dtype=bool)
        negative = []
        if prompts.points is not None:
            for (x, y), label in zip(prompts.points[k], prompts.labels[k]):
                if label == 1:
                    seen[min(int(y), seen.shape[0] - 1), min(int(x), seen.shape[1] - 1)] = True
                else:
                    negative.append((y, x))
        if not seen.any() and prompts.boxes is not None:
            x0, y0, x1, y1 = prompts.boxes[k].astype(int)
            seen[y0:y1, x0:x1] = True
        if not seen.any() and prompts.logits is not None:
            rows, columns = (np.minimum(np.arange(n) * LOW_RES // max(labels.shape), LOW_RES - 1) for n in labels.shape)
            seen = prompts.logits[k, 0][np.ix_(rows, columns)] > 0
        found = np.bincount(labels[seen], minlength=2)[1:]
        mask = (labels == found.argmax() + 1) if found.any() else np.zeros(labels.shape, dtype=bool)
        y, x = np.ogrid[:labels.shape[0], :labels.shape[1]]
        for cy, cx in negative:
            mask &= np.hypot(y - cy, x - cx) > 8
        return mask


def point(plane, y, x, positive=True, **options):
    return PointPrompt((plane, y, x), positive, **options)


def box(plane, y0, x0, y1, x1, kind="rectangle", **options):
    return ShapePrompt(kind, ((plane, y0, x0), (plane, y0, x1), (plane, y1, x1), (plane, y1, x0)), **options)


def prompts(*parts):
    """Prompts from points and shapes in any order."""
    return Prompts(
        tuple(p for p in parts if isinstance(p, PointPrompt)), tuple(p for p in parts if isinstance(p, ShapePrompt))
    )


def full(mask: BoxedMask, shape) -> np.ndarray:
    out = np.zeros(shape, dtype=bool)
    y0, x0, y1, x1 = mask.box
    out[y0:y1, x0:x1] = mask.mask
    return out


def iou(mask: BoxedMask, truth: np.ndarray) -> float:
    found = full(mask, truth.shape)
    return (found & truth).sum() / (found | truth).sum()
