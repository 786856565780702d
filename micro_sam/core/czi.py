"""Zeiss czi files, read lazily: only the subblocks that an indexed region touches are decoded."""

from pathlib import Path

import numpy as np

from .errors import ImageReadError
from .lazy_array import Key, LazyArray

_ZSTD0, _ZSTD1 = 5, 6


def open_czi(path: Path) -> tuple[LazyArray, str]:
    """Open a czi file as an array; returns it with its axes (letters as in `core.image`).

    The full resolution level is read; scenes of a mosaic keep their place in one large plane.
    """
    import czifile

    file = czifile.CziFile(str(path))
    # Pyramid levels repeat the image at lower resolution: their stored shape is smaller than their shape.
    blocks = [b for b in file.filtered_subblock_directory if tuple(b.stored_shape) == tuple(b.shape)]
    if not blocks:
        raise ImageReadError(f"{path} holds no image data at full resolution.")
    # Of the axes that czi knows, those with a single index do not matter; S is a scene there, 0 the RGB samples.
    names = {"S": "V", "0": "S"}
    axes = "".join(names.get(a, a) for a in file.axes)
    shape, start = tuple(int(s) for s in file.shape), [int(s) for s in file.start]
    if "V" in axes and shape[axes.index("V")] > 1:
        # Scenes lie side by side in one coordinate system: their union is one plane.
        scene = axes.index("V")
        axes, shape = axes.replace("V", ""), shape[:scene] + shape[scene + 1:]
    else:
        scene = None
    drop = [] if scene is None else [scene]

    def place(values):
        return [int(v) for n, v in enumerate(values) if n not in drop]

    origin = place(start)
    placed = [([a - b for a, b in zip(place(b.start), origin)], place(b.shape), b) for b in blocks]

    def read(key: Key) -> np.ndarray:
        lower = [k.start if isinstance(k, slice) else k for k in key]
        upper = [k.stop if isinstance(k, slice) else k + 1 for k in key]
        out = np.zeros([u - lo for lo, u in zip(lower, upper)], dtype=file.dtype)
        for begin, size, block in placed:
            first = [max(lo, b) for lo, b in zip(lower, begin)]
            last = [min(u, b + s) for u, b, s in zip(upper, begin, size)]
            if any(lo >= u for lo, u in zip(first, last)):
                continue
            data = _decode(block).reshape(size)
            target = tuple(slice(f - lo, u - lo) for f, u, lo in zip(first, last, lower))
            out[target] = data[tuple(slice(f - b, u - b) for f, u, b in zip(first, last, begin))]
        return out[tuple(slice(None, None, k.step) if isinstance(k, slice) else 0 for k in key)]

    chunk = [max(size[n] for _, size, _ in placed) for n in range(len(shape))]
    return LazyArray(read, shape, file.dtype, str(path), chunk, file), axes


def _decode(block) -> np.ndarray:
    segment = block.data_segment()
    if block.compression not in (_ZSTD0, _ZSTD1):
        return segment.data(resize=False)
    import imagecodecs

    raw = segment.data(raw=True)
    interleaved = False
    if block.compression == _ZSTD1:
        # A header of its own length; in its longer form the last bit of its third byte says
        # that low and high bytes of 16 bit values are stored apart.
        size = raw[0]
        interleaved = size >= 3 and bool(raw[2] & 1)
        raw = raw[size:]
    data = np.frombuffer(imagecodecs.zstd_decode(raw), np.uint8)
    if interleaved:
        data = np.ascontiguousarray(data.reshape(2, -1).T).reshape(-1)
    data = data.view(np.dtype(block.dtype).base).reshape(block.stored_shape)
    if data.shape[-1] in (3, 4):  # stored as BGR(A)
        data = data[..., [2, 1, 0, 3][:data.shape[-1]]]
    return data
