"""Run-length encodings of masks, in the convention of COCO and SAM.

A mask is read column by column; the counts are the lengths of the runs of background and foreground in turn, starting
with background (0 if the first pixel is foreground).
"""

from collections.abc import Sequence

import numpy as np
from bioimage_cpp.utils import compute_rle


def encode(mask: np.ndarray) -> np.ndarray:
    """Return the counts, int64, of a bool mask (h, w)."""
    return compute_rle(np.ascontiguousarray(mask.T))


def decode(counts: Sequence[int] | np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the bool mask of a shape (h, w) from its counts."""
    values = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(shape[1], shape[0]).T)


def encode_in_plane(mask: np.ndarray, origin: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Return the counts of a plane (H, W) that holds a bool mask (h, w) at `origin` (y, x) and is empty elsewhere.

    The cost is that of the mask, not of the plane.
    """
    size = shape[0] * shape[1]
    padded = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=np.int8)
    padded[:, 1:-1] = mask.T
    changes = np.diff(padded, axis=1)
    ends = []
    for change in (1, -1):
        column, row = np.nonzero(changes == change)
        ends.append((column + origin[1]) * shape[0] + row + origin[0])
    starts, stops = ends
    borders = np.stack([starts, stops], axis=1).ravel()
    joined = np.flatnonzero(stops[:-1] == starts[1:])  # runs that go on in the next column
    borders = np.delete(borders, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(borders, prepend=0, append=size)
    return counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts


def area(counts: Sequence[int] | np.ndarray) -> int:
    """Number of foreground pixels."""
    return int(np.sum(counts[1::2]))


def compress(counts: Sequence[int] | np.ndarray) -> str:
    """Return the counts as the string of COCO's compressed encoding.

    From the fourth count on, the difference to the count two before is stored; numbers are written in groups of five
    bits, the lowest first, as characters from `0` on. See the file format of https://github.com/cocodataset/cocoapi.
    """
    counts = [int(c) for c in counts]
    out = []
    for k, count in enumerate(counts):
        value = count - counts[k - 2] if k > 2 else count
        more = True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            out.append(chr(48 + (group | 32 if more else group)))
    return "".join(out)
