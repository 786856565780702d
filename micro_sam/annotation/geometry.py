"""The image that is annotated, its place in the world, and the tiling that a user asks for. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..core.errors import InvalidInputError, InvalidTypeError
from ..core.lazy_array import view
from ..embeddings.signature import compute_data_signature

MODES = ("2d", "3d", "tracking")

_MIN_TILE = 256
_CHANNELS = (2, 3, 4)
_AXES = {"2d": "(Y, X)", "3d": "(Z, Y, X)", "tracking": "(T, Y, X)"}
_NDIM = {"2d": 2, "3d": 3, "tracking": 3}


def check_mode(mode: str) -> None:
    """Raise `InvalidInputError` if `mode` is none of `MODES`."""
    if mode not in MODES:
        raise InvalidInputError(f"mode must be one of {', '.join(MODES)}, but is {mode!r}.")


def plane_of(position: float) -> int:
    """The plane of a position on the first axis, in voxels: the one rounding rule (half to even)."""
    return int(np.rint(position))


@dataclass(frozen=True)
class Transform:
    """Where voxels are in the world of a viewer: world = voxel * scale + translate, per axis of the image.

    Args:
        scale: Size of a voxel per axis (Z, Y, X), (T, Y, X) or (Y, X); not 0.
        translate: World position of the first voxel per axis.
        axes: The world axes that the axes of the image are, counted from the end. By default the last ones, so that
            a viewer may have more axes in front.
    """

    scale: tuple[float, ...]
    translate: tuple[float, ...]
    axes: tuple[int, ...] | None = None

    def __post_init__(self):
        ndim = len(self.scale)
        axes = range(-ndim, 0) if self.axes is None else self.axes
        object.__setattr__(self, "scale", _per_axis("scale", self.scale, ndim))
        object.__setattr__(self, "translate", _per_axis("translate", self.translate, ndim))
        object.__setattr__(self, "axes", tuple(int(axis) for axis in axes))
        if 0 in self.scale:
            raise InvalidInputError(f"A scale of 0 has no inverse, but the scale is {self.scale}. Set the voxel size.")
        if len(self.axes) != ndim or any(axis >= 0 for axis in self.axes):
            raise InvalidInputError(f"axes must be {ndim} negative numbers, one per axis, but are {self.axes}.")

    @property
    def ndim(self) -> int:
        return len(self.scale)

    def world_to_voxel(self, world: Sequence[float] | np.ndarray) -> np.ndarray:
        """Positions (..., D) in the world of the viewer, D at least `ndim`, as float positions (..., ndim) in voxels.

        Raises:
            InvalidInputError: If there are too few coordinates.
        """
        world = np.asarray(world, dtype=float)
        n_axes = -min(self.axes)
        if world.ndim == 0 or world.shape[-1] < n_axes:
            raise InvalidInputError(f"A position needs at least {n_axes} coordinates, but has the shape {world.shape}.")
        return (world[..., list(self.axes)] - self.translate) / self.scale

    def voxel_to_world(self, voxel: Sequence[float] | np.ndarray) -> np.ndarray:
        """Positions (..., ndim) in voxels as positions (..., ndim) in the world, in the order of the image's axes.

        Raises:
            InvalidInputError: If there are not `ndim` coordinates.
        """
        voxel = np.asarray(voxel, dtype=float)
        if voxel.ndim == 0 or voxel.shape[-1] != self.ndim:
            raise InvalidInputError(f"A position needs {self.ndim} coordinates, but has the shape {voxel.shape}.")
        return voxel * self.scale + self.translate

    def plane_index(self, world: Sequence[float] | np.ndarray, n_planes: int) -> int:
        """The plane, from 0 to `n_planes` - 1, at one position in the world; beyond the ends it is the outermost.

        Raises:
            InvalidInputError: If the position has too few coordinates or is not finite there.
        """
        position = float(self.world_to_voxel(world)[0])
        if not math.isfinite(position):
            raise InvalidInputError(f"The position {np.asarray(world).tolist()} is in no plane.")
        return plane_of(min(max(position, 0), n_planes - 1))


def _per_axis(name: str, values: Sequence[float], ndim: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != ndim or not all(map(math.isfinite, numbers)):
        raise InvalidInputError(f"{name} must be {ndim} finite numbers, one per axis, but is {numbers}.")
    return numbers


@dataclass(frozen=True, eq=False)
class AnnotationImage:
    """An image (Y, X[, C]), a volume (Z, Y, X[, C]) or a time series (T, Y, X[, C]); make it with `create`.

    Attributes:
        array: The pixels; they are read when they are indexed.
        mode: `2d`, `3d` or `tracking`.
        has_channels: Whether the last axis of `array` holds channels (at most three).
        name: What the image is called.
        scale: Size of a voxel per axis, or None. For viewers and for files that are written.
        translate: Position of the first voxel per axis, or None.
        units: Unit of the scale per axis, or None.
        axes: The axes of a viewer of the source that were kept, counted from the end.
    """

    array: Any
    mode: str
    has_channels: bool
    name: str
    scale: tuple[float, ...] | None
    translate: tuple[float, ...] | None
    units: tuple[str, ...] | None
    axes: tuple[int, ...]

    @classmethod
    def create(
        cls,
        array: Any,
        *,
        mode: str,
        rgb: bool | None = None,
        name: str = "image",
        scale: Sequence[float] | None = None,
        translate: Sequence[float] | None = None,
        units: Sequence[Any] | None = None,
    ) -> "AnnotationImage":
        """Find out what the axes of an array are. No pixels are read.

        Axes of length one vanish if there are too many axes. Of four channels the last one (opacity) is left out.

        Args:
            array: A numpy, dask, zarr or other array, or the levels of a multiscale image, the largest first.
            mode: `2d`, `3d` or `tracking`.
            rgb: Whether the last axis holds channels. None takes it as channels if it has a length of 2, 3 or 4
                and the mode leaves an axis over for them.
            name: What the image is called.
            scale: Size of a voxel per axis of the array without channels, or per axis of the result. With one more for
                the channels, these are an axis of the viewer, too.
            translate: Position of the first voxel, likewise.
            units: Unit per axis, likewise.

        Raises:
            InvalidInputError: If the number of axes does not fit the mode; the message says what to do.
            InvalidTypeError: If the pixels are not numbers.

        Example:
            >>> AnnotationImage.create(np.zeros((1, 40, 50, 4), "uint8"), mode="2d").array.shape
            (40, 50, 3)
        """
        check_mode(mode)
        array = _finest(array)
        shape = tuple(int(s) for s in array.shape)
        if np.dtype(array.dtype).kind not in "buif":
            raise InvalidTypeError(
                f"The image {name!r} has pixels of type {array.dtype}. Convert them to integers or real floats."
            )
        if 0 in shape:
            raise InvalidInputError(f"The image {name!r} is empty: its shape is {shape}. Choose another one.")
        has_channels = _has_channels(shape, mode, rgb)
        n_source = len(shape) - has_channels
        kept = _kept_axes(shape[:n_source], mode)
        if kept is None:
            raise InvalidInputError(f"The image {name!r} of shape {shape} {_advice(shape, mode, has_channels)}")
        fixed: dict[int, int | slice] = {axis: 0 for axis in range(n_source) if axis not in kept}
        order = list(kept)
        if has_channels and shape[-1] == 1:
            fixed[n_source], has_channels = 0, False
        elif has_channels:
            order.append(n_source)
            if shape[-1] == 4:
                fixed[n_source] = slice(0, 3)

        given = {"scale": scale, "translate": translate, "units": units}
        chosen, axes = _placement(given, kept, n_source, len(shape))
        return cls(view(array, fixed, order, name), mode, has_channels, str(name), axes=axes, **chosen)

    @property
    def ndim(self) -> int:
        """2 or 3; channels do not count. It is the `ndim` of the embeddings of `array`."""
        return len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without channels: (Y, X), (Z, Y, X) or (T, Y, X)."""
        return tuple(int(s) for s in self.array.shape[:self.ndim])

    @property
    def plane_shape(self) -> tuple[int, int]:
        return self.shape[-2:]

    @property
    def n_planes(self) -> int | None:
        """Number of slices or frames; None for an image."""
        return self.shape[0] if self.ndim == 3 else None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @cached_property
    def transform(self) -> Transform:
        """Between voxels and the world of a viewer that shows the source with its scale and translation."""
        return Transform(self.scale or (1.0,) * self.ndim, self.translate or (0.0,) * self.ndim, self.axes)

    def plane(self, i: int | None = None) -> np.ndarray:
        """Read plane `i` (Y, X[, C]) and nothing else; an image has just the plane None.

        Raises:
            InvalidInputError: If there is no such plane.
        """
        if i is None and self.n_planes is None:
            return np.asarray(self.array[...])
        if i is None or self.n_planes is None or not 0 <= i < self.n_planes:
            planes = "no planes: leave i out" if self.n_planes is None else f"the planes 0 to {self.n_planes - 1}"
            raise InvalidInputError(f"There is no plane {i}: the image has {planes}.")
        return np.asarray(self.array[int(i)])

    def signature(self) -> str:
        """The fingerprint of `array`, as `embedding_steps` takes it; reads the image in pieces, once."""
        return self._signature

    @cached_property
    def _signature(self) -> str:
        return compute_data_signature(self.array)


def _finest(array: Any) -> Any:
    """The first level of a multiscale image; other arrays as they are."""
    if not isinstance(array, Sequence):
        return array if hasattr(array, "shape") and hasattr(array, "dtype") else np.asarray(array)
    if len(array) == 0 or not all(hasattr(level, "shape") and hasattr(level, "dtype") for level in array):
        return np.asarray(array)
    sizes = [math.prod(level.shape) for level in array]
    if any(a <= b for a, b in zip(sizes, sizes[1:])):
        raise InvalidInputError(
            "A list of arrays is understood as the levels of a multiscale image, the largest first, but the shapes "
            f"are {[tuple(level.shape) for level in array]}. Join planes to one array with numpy.stack."
        )
    return array[0]


def _has_channels(shape: tuple[int, ...], mode: str, rgb: bool | None) -> bool:
    """Whether the last axis holds channels."""
    ndim = _NDIM[mode]
    if rgb is False:
        return False
    if rgb is None:
        if ndim == 3 and len(shape) == 3 and shape[-1] in (3, 4):
            raise InvalidInputError(
                f"An image of shape {shape} looks like a colour image (Y, X, C), but the mode {mode!r} needs "
                f"{_AXES[mode]}. Use the 2D annotator, or pass rgb=False if the last axis is a spatial one."
            )
        return len(shape) > ndim and shape[-1] in _CHANNELS
    if len(shape) < 3 or shape[-1] not in (1, *_CHANNELS):
        raise InvalidInputError(
            f"The last axis of a colour image must hold 1 to 4 channels, but the shape is {shape}. Pass rgb=False if "
            "the image has no channels, or choose at most three of them."
        )
    return True


def _kept_axes(shape: tuple[int, ...], mode: str) -> tuple[int, ...] | None:
    """The axes that remain when superfluous ones of length one are dropped from the front; None if impossible."""
    n_extra = len(shape) - _NDIM[mode]
    dropped = [axis for axis, size in enumerate(shape) if size == 1][:max(n_extra, 0)]
    if len(dropped) != n_extra:
        return None
    return tuple(axis for axis in range(len(shape)) if axis not in dropped)


def _placement(
    given: dict[str, Sequence | None], kept: tuple[int, ...], n_source: int, n_all: int
) -> tuple[dict[str, tuple | None], tuple[int, ...]]:
    """Values of the kept axes, and these axes counted from the end of those of a viewer.

    Args:
        given: Scale, translation and units.
        kept: The axes that remain.
        n_source: Number of axes without channels.
        n_all: Number of axes with channels.
    """
    given = {name: None if values is None else tuple(values) for name, values in given.items()}
    n_world = n_all if any(values is not None and len(values) == n_all for values in given.values()) else n_source
    chosen: dict[str, tuple | None] = {}
    for name, values in given.items():
        if values is not None and len(values) == n_world:
            values = tuple(values[axis] for axis in kept)
        if values is not None and name != "units":
            values = _per_axis(name, values, len(kept))
        elif values is not None and len(values) != len(kept):
            raise InvalidInputError(f"units must be {len(kept)} units, one per axis, but are {values}.")
        elif values is not None:
            values = tuple(str(unit) for unit in values)
        chosen[name] = values
    return chosen, tuple(axis - n_world for axis in kept)


def _advice(shape: tuple[int, ...], mode: str, has_channels: bool) -> str:
    """What an image has to look like for a mode, and what to do with this one."""
    n_long = sum(size > 1 for size in shape[:len(shape) - has_channels])
    found = f"has {n_long} axes that are longer than one" + (" besides its channels" if has_channels else "")
    needed = f"the mode {mode!r} needs {_AXES[mode]}, with at most four channels on a last axis"
    if mode == "2d" and n_long == 3:
        todo = "Use the 3D annotator for a volume and the tracking annotator for a time series, or choose one plane."
    elif mode != "2d" and len(shape) - has_channels == 2:
        todo = "Use the 2D annotator, or give the image a first axis of length one."
    else:
        todo = "Choose a channel, a plane or a time point, so that the other axes vanish."
    return f"{found}, but {needed}. {todo}"


def normalise_tiling(
    tile_y: int | None = 0, tile_x: int | None = 0, halo_y: int | None = 0, halo_x: int | None = 0
) -> tuple[tuple[int, int], tuple[int, int]] | tuple[None, None]:
    """Turn what a form says of tiles into a tile shape and a halo.

    Args:
        tile_y: Height of a tile in pixels. Without both numbers (0 or None) there are no tiles; with one, tiles are
            square. Tiles have at least 256 pixels in each direction.
        tile_x: Width of a tile.
        halo_y: By how much tiles overlap their neighbours above and below; unused without tiles.
        halo_x: By how much to the left and right.

    Returns:
        Tile shape (y, x) and halo (y, x), or None and None.

    Raises:
        InvalidInputError: For negative numbers and fractions.
    """
    given = {"tile_y": tile_y, "tile_x": tile_x, "halo_y": halo_y, "halo_x": halo_x}
    values = [0 if value is None else value for value in given.values()]
    wrong = [name for name, v in zip(given, values) if not hasattr(v, "__index__") or v < 0]
    if wrong:
        raise InvalidInputError(f"{wrong[0]} must be a whole number of pixels, but is {given[wrong[0]]!r}.")
    y, x, *halo = (int(value) for value in values)
    if not y and not x:
        return None, None
    tile = tuple(max(side or y or x, _MIN_TILE) for side in (y, x))
    return tile, tuple(halo)
