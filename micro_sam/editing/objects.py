"""Correct the objects of a label image: replace, add, merge, split, remove, fill, and prompts of a model.

Positions are pixels in the order of the axes; a *plane* is the index on the first axis of a volume or time series.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from segment_anything import SamPredictor
from skimage.draw import line as draw_line
from skimage.segmentation import watershed

from ..core.errors import InvalidInputError
from ..embeddings.encode import ImageEmbeddings
from .editor import PRESERVE_MODES, LabelEditor, Masks, check_preserve
from .history import Delta, LabelStore, row_runs
from .refine import refine_mask


class Commit(NamedTuple):
    """What `ObjectEditor.commit` did.

    `ids` has the new id of each object that came in, `rejected` the objects that did not, `shrunk` the ids of objects
    that lost pixels to new ones.
    """

    delta: Delta
    ids: dict[int, int]
    rejected: tuple[int, ...]
    shrunk: tuple[int, ...]


class ObjectEditor(LabelEditor):
    """Edits the objects of a label image; see `LabelEditor` for the arguments.

    Example:
        >>> editor = ObjectEditor(np.array([[1, 1, 0, 2]]))
        >>> editor.merge([1, 2]).removed
        (2,)
        >>> editor.labels.tolist()
        [[1, 1, 0, 1]]
        >>> _ = editor.undo()
        >>> editor.labels.tolist()
        [[1, 1, 0, 2]]
    """

    def replace(
        self, object_id: int, mask: Masks, plane: int | None = None, *, preserve: str = "pixels"
    ) -> Delta:
        """Give an object new pixels in some planes; in all others it stays as it is.

        Args:
            object_id: The object; it keeps its id.
            mask: Mask (Y, X), not empty; (N, Y, X) for planes from `plane` on; or masks by plane.
            plane: The plane; None for an image, for masks by plane and for a mask of the whole volume.
            preserve: What happens to pixels of other objects: `pixels` keeps them, `none` overwrites them.

        Raises:
            InvalidInputError: If the object does not exist, the mask does not fit or is empty, or other objects keep
                all of its pixels.
        """
        object_id = self._known(object_id)
        return self._paint_edit("replace", {object_id: self._masks(mask, plane)}, preserve)

    def add(
        self, mask: Masks, plane: int | None = None, *, preserve: str = "pixels", object_id: int | None = None
    ) -> Delta:
        """Add an object; its id is `delta.created[0]`.

        Args:
            mask: See `replace`.
            plane: See `replace`.
            preserve: See `replace`.
            object_id: An id from `reserve_ids`; None takes a fresh one.

        Raises:
            InvalidInputError: See `replace`; or if the id was not reserved or is in use.
        """
        masks = self._masks(mask, plane)
        return self._paint_edit("add", {self._free_id(object_id): masks}, preserve)

    def correct(
        self,
        object_id: int,
        predictor: SamPredictor,
        image_embeddings: ImageEmbeddings | None = None,
        plane: int | None = None,
        *,
        preserve: str = "pixels",
        **prompts: Any,
    ) -> Delta:
        """Correct an object in a plane by prompts; the model starts from the pixels that it has there.

        To show a result before it is taken over, call `refine_mask` with `mask`, and `replace` afterwards.

        Args:
            object_id: The object; it keeps its id.
            predictor: The predictor.
            image_embeddings: Embeddings of the image or stack; None uses the image that is set in the predictor.
            plane: The plane of labels and embeddings; None for an image.
            preserve: See `replace`.
            prompts: `points`, `labels`, `scribbles`, `scribble_labels`, `box` and `box_extension` of `refine_mask`.

        Raises:
            InvalidInputError: For malformed prompts, or if the model finds nothing; the object stays as it is then.
            PromptTileError: If no tile sees all points.
        """
        i = None if image_embeddings is None or self._store.ndim == 2 else self._plane(plane)
        mask, _ = refine_mask(predictor, self.mask(object_id, plane), image_embeddings, i, **prompts)
        if not mask.any():
            raise InvalidInputError(
                f"The model finds nothing with these prompts, and object {object_id} stays as it is. Place other "
                "prompts, or use remove."
            )
        return self.replace(object_id, mask, plane, preserve=preserve)

    def remove(self, object_id: int, planes: int | Iterable[int] | None = None) -> Delta:
        """Remove an object, in some planes or (None) everywhere."""
        object_id = self._known(object_id)
        boxes = self._index.boxes([object_id], self._plane_list(planes))
        return self._edit("remove", boxes, lambda values, _: np.where(values == object_id, 0, values))

    def merge(self, object_ids: Sequence[int]) -> Delta:
        """Make one object of two or more; it has the first id."""
        first, *others = self._known_distinct(object_ids)
        return self._edit(
            "merge", self._index.boxes(others), lambda values, _: np.where(np.isin(values, others), first, values)
        )

    def fill_holes(self, object_id: int, plane: int | None = None) -> Delta:
        """Fill the holes that an object has in a plane, or (None) in each of its planes; other objects stay in them."""
        object_id = self._known(object_id)

        def change(values, _):
            filled = np.stack([ndimage.binary_fill_holes(p == object_id) for p in values])
            return np.where(filled & (values == 0), object_id, values)

        return self._edit("fill", self._index.boxes([object_id], self._plane_list(plane)), change)

    def split_components(self, object_id: int, plane: int | None = None) -> Delta:
        """Make objects of the parts of an object that do not touch, not even at corners.

        The largest part keeps the id. With a plane only that plane is looked at and changed.

        Raises:
            InvalidInputError: If the object is in one piece.
        """
        mask, origin = self.crop(object_id, plane)
        parts = _by_size(_label(mask))
        if parts.max() < 2:
            raise InvalidInputError(f"Object {object_id} is in one piece: there is nothing to split.")
        return self._split("split components", object_id, parts, origin)

    def split_line(self, object_id: int, line: np.ndarray, plane: int | None = None) -> Delta:
        """Split an object along a line.

        Args:
            object_id: The object. Its largest part, and parts that the line does not touch, keep the id.
            line: Polyline (N, 2) in the order (y, x), N >= 2, that crosses the object.
            plane: The plane in which to cut, and the only one that changes; None cuts through all planes.

        Raises:
            InvalidInputError: If the line does not cut the object into parts.
        """
        mask, origin = self.crop(object_id, plane)
        parts = _cut(mask, _draw(line, origin[1:], mask.shape[1:]))
        if parts.max() < 2:
            raise InvalidInputError(
                f"The line does not split object {object_id}. Draw it across the object, from outside to outside."
            )
        return self._split("split line", object_id, parts, origin)

    def split_seeds(self, object_id: int, seeds: np.ndarray, plane: int | None = None) -> Delta:
        """Split an object by a watershed from one seed for each part, in its distance to the outside.

        Args:
            object_id: The object. The part of the first seed, and parts that no seed reaches, keep the id.
            seeds: Positions of at least two pixels of the object: (N, 2) in the order (y, x) in `plane` or an image,
                or (N, 3) in the order (plane, y, x).
            plane: The plane that is split; None splits the whole object.

        Raises:
            InvalidInputError: If a seed is not in the object, or two are the same pixel.
        """
        mask, origin = self.crop(object_id, plane)
        seeds = np.asarray(seeds, dtype=float)
        flat = plane is not None or self._store.ndim == 2
        if seeds.ndim != 2 or len(seeds) < 2 or seeds.shape[1] != (2 if flat else 3) or not np.isfinite(seeds).all():
            raise InvalidInputError(
                f"Seeds must be two or more finite positions {'(y, x)' if flat else '(plane, y, x)'}, but have the "
                f"shape {seeds.shape}."
            )
        local = np.rint(seeds).astype(int) - origin[1 if flat else 0:]
        local = np.pad(local, ((0, 0), (1, 0))) if flat else local
        inside = ((local >= 0) & (local < mask.shape)).all(axis=1)
        inside[inside] = mask[tuple(local[inside].T)]
        if not inside.all() or len(np.unique(local, axis=0)) < len(local):
            raise InvalidInputError(
                f"Each seed must be a pixel of its own of object {object_id}, but these are not: "
                f"{seeds[~inside].tolist() or 'two seeds are the same pixel'}."
            )
        markers = np.zeros(mask.shape, dtype=np.int32)
        markers[tuple(local.T)] = np.arange(1, len(local) + 1)
        depth = ndimage.distance_transform_edt(np.pad(mask, [(int(s > 1),) * 2 for s in mask.shape]))
        depth = depth[tuple(slice(1, -1) if s > 1 else slice(None) for s in mask.shape)]
        parts = watershed(-depth, markers, connectivity=mask.ndim, mask=mask)
        return self._split("split seeds", object_id, parts, origin)

    def commit(
        self, candidate: Any, plane: int | None = None, *, preserve: str = "objects", threshold: float = 0.75
    ) -> Commit:
        """Take over the objects of another label image, under new ids in the order of theirs.

        Args:
            candidate: Label image (Y, X), (N, Y, X) for planes from `plane` on, or of the shape of the labels; it
                may be on disk.
            plane: The plane, or the first one.
            preserve: Which objects give way. `pixels`: new objects only fill background. `none`: they overwrite.
                `objects`: an old object of which one new object covers at least the fraction `threshold` is kept and
                that new one rejected; other old objects lose the pixels that new ones cover.
            threshold: See `preserve`, in 0 to 1.

        Returns:
            The change, and what became of which object.

        Raises:
            InvalidInputError: If the shape does not fit, or for an unknown mode or threshold.
        """
        return self._commit(candidate, plane, preserve, threshold)

    def _commit(self, candidate, plane, preserve, threshold, links=None) -> Commit:
        check_preserve(preserve, ("objects", *PRESERVE_MODES))
        if not 0 <= threshold <= 1:
            raise InvalidInputError(f"threshold is a fraction from 0 to 1, but is {threshold!r}.")
        source = LabelStore(candidate)
        first = self._first_plane(source.shape, plane)
        blocks = list(self._store.blocks(first, first + source.shape[0]))

        def read(block):
            return source.read((slice(block[0].start - first, block[0].stop - first), *block[1:]))

        incoming, kept, covered = self._overlaps(blocks, read, threshold if preserve == "objects" else None)
        accepted = [i for i in incoming if i not in covered]
        ids = dict(zip(accepted, self._fresh_ids(len(accepted))))
        lookup = np.array([ids.get(i, 0) for i in incoming], dtype=np.int64)

        def change(values, block):
            new = read(block)
            take = new != 0
            if preserve == "pixels":
                take &= values == 0
            elif kept:
                take &= ~np.isin(values, kept)
            out = values.copy()
            mapped = lookup[np.searchsorted(incoming, new[take].astype(np.int64))]
            out[take] = np.where(mapped, mapped, values[take])
            return out

        runs = self._compute(blocks if accepted else (), change)
        painted = runs.ids()
        ids = {i: new for i, new in ids.items() if new in painted}
        links = {ids[i]: ids[p] for i, p in (links or {}).items() if i in ids and p in ids}
        delta = self._record("commit", runs, links=links)
        rejected = tuple(i for i in incoming if i not in ids)
        return Commit(delta, ids, rejected, tuple(sorted(delta.changed + delta.removed)))

    def _overlaps(self, blocks, read, threshold) -> tuple[list[int], list[int], set[int]]:
        """Return the ids of the candidate, the objects to keep, and the ids of the candidate that cover these."""
        counts: dict[tuple[int, int], int] = {}
        for block in blocks:
            _, length, old, new = row_runs(self._store.read(block), read(block))
            if (new < 0).any():
                raise InvalidInputError("Ids of objects must be from 1 to 2^63 - 1, but there are others.")
            pairs, where = np.unique(np.stack([old, new], axis=1)[new > 0], axis=0, return_inverse=True)
            sizes = np.bincount(where.reshape(-1), weights=length[new > 0], minlength=len(pairs))
            for pair, size in zip(map(tuple, pairs.tolist()), sizes.astype(int).tolist()):
                counts[pair] = counts.get(pair, 0) + size
        best: dict[int, tuple[int, int]] = {}
        for (old, new), size in counts.items() if threshold is not None else ():
            best[old] = max(best.get(old, (0, 0)), (size, -new))
        best.pop(0, None)
        kept = [old for old, (size, _) in best.items() if size >= threshold * self._index.pixels(old)]
        return sorted({new for _, new in counts}), kept, {-best[old][1] for old in kept}

    def _split(self, name: str, object_id: int, parts: np.ndarray, origin: tuple[int, ...]) -> Delta:
        """Give each part >= 2 of an object a new id; `parts` (P, h, w) starts at `origin` and is 0 elsewhere."""
        ids = np.array([object_id, object_id, *self._fresh_ids(int(parts.max()) - 1)])
        boxes = self._index.boxes([object_id], range(origin[0], origin[0] + len(parts)))

        def change(values, block):
            out = values.copy()
            inside = [
                slice(max(s.start, o), min(s.stop, o + n)) for s, o, n in zip(block, origin, parts.shape)
            ]
            window = out[tuple(slice(i.start - s.start, i.stop - s.start) for i, s in zip(inside, block))]
            part = parts[tuple(slice(i.start - o, i.stop - o) for i, o in zip(inside, origin))]
            own = window == object_id
            window[own] = ids[part[own]]
            return out

        return self._edit(name, boxes, change)

def _label(mask: np.ndarray) -> np.ndarray:
    return ndimage.label(mask, structure=np.ones((3,) * mask.ndim))[0]


def _by_size(parts: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Renumber parts from the largest on; those marked in `keep` (by number) all become part 1."""
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    rank = np.zeros(len(sizes), dtype=np.int32)
    free = [k for k in np.argsort(-sizes, kind="stable") if sizes[k] and (keep is None or not keep[k])]
    rank[free] = np.arange(1, len(free) + 1)
    if keep is not None:
        rank[keep] = 1
    return rank[parts]


def _draw(line: np.ndarray, origin: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Pixels of a polyline (N, 2) in (y, x), without diagonal steps, in a window (h, w) at `origin`."""
    corners = np.asarray(line, dtype=float)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 2 or not np.isfinite(corners).all():
        raise InvalidInputError(f"A line must have two or more finite points (y, x), but has shape {corners.shape}.")
    out = np.zeros(shape, dtype=bool)
    corners = np.rint(corners).astype(int) - origin
    for start, stop in zip(corners[:-1], corners[1:]):
        y, x = draw_line(*start, *stop)
        # The corner of each diagonal step too: otherwise objects that touch at corners would not be cut.
        y, x = np.concatenate([y, y[1:]]), np.concatenate([x, x[:-1]])
        inside = (y >= 0) & (x >= 0) & (y < shape[0]) & (x < shape[1])
        out[y[inside], x[inside]] = True
    return out


def _cut(mask: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Parts of a mask (P, h, w) that a line (h, w) cuts apart, from the largest on; the cut goes to the nearest."""
    whole = _label(mask)
    untouched = np.ones(whole.max() + 1, dtype=bool)
    untouched[np.unique(whole[mask & line])] = False
    parts = _label(mask & ~line)
    keep = np.zeros(parts.max() + 1, dtype=bool)
    keep[np.unique(parts[untouched[whole] & (parts > 0)])] = True
    keep[0] = False
    parts = _by_size(parts, keep)
    nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    return np.where(mask, parts[tuple(nearest)], 0)
