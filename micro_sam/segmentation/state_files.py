"""The state of a segmenter in files next to its embeddings: one reader and one writer for each format.

Decoder maps: HDF5 `is_state.h5`, a group `state` or `state-<plane>`. Mask generator: `amg_state.npz` or
`amg_state/state-<plane>.npz`; the pickles of older versions are read without running code from them.
Each state carries the settings that it was computed with, except those of older versions.
"""

import io
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.utils.amg import MaskData

from ..core.errors import EmbeddingCacheError, EmbeddingMismatchError, UnsafeCheckpointError
from ..core.output import writing
from ..models.safe_pickle import HostilePickleError, SafePickle
from .ais import MAP_NAMES

logger = logging.getLogger(__name__)

_H5_NAME = "is_state.h5"


def check_settings(found: Mapping[str, Any] | None, wanted: Mapping[str, Any], path: Path) -> None:
    """Compare the settings of a state with those that are wanted; a state without settings passes, with a log entry.

    Raises:
        EmbeddingMismatchError: Naming both values.
    """
    if found is None:
        logger.warning("The state in %s is of an older version, which does not note for which model it is.", path)
        return
    wanted = json.loads(json.dumps(wanted))
    for name in {**found, **wanted}:
        if name != "model_name" and found.get(name) != wanted.get(name):
            raise EmbeddingMismatchError(
                f"The segmentation state in {path} was computed with {name}={found.get(name)}, but "
                f"{name}={wanted.get(name)} was asked for. Use the settings of the state, delete the file, or choose "
                "another path."
            )


def _damaged(path: Path, error: Exception) -> EmbeddingCacheError:
    return EmbeddingCacheError(f"The segmentation state in {path} is damaged ({error}). Delete it to compute it again.")


# --- decoder maps ---


def _group_name(i: int | None) -> str:
    return "state" if i is None else f"state-{i}"


def _open_h5(path: Path, mode: str):
    import h5py

    try:
        return h5py.File(path, mode)
    except OSError as error:
        if isinstance(error, BlockingIOError) or "lock" in str(error):
            raise EmbeddingCacheError(f"{path} is used by another process. Wait for it, or stop it.") from error
        raise


def read_maps(folder: Path, i: int | None, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict | None:
    """Read the maps of a plane; None if they are not there or incomplete.

    Args:
        folder: The folder of the embeddings.
        i: The plane; None for an image.
        shape: Shape (Y, X) that the maps must have.
        settings: What they must have been computed with.

    Raises:
        EmbeddingMismatchError: If they were computed with other settings, or for an image of another shape.
        EmbeddingCacheError: If the file is damaged or locked.
    """
    path = folder / _H5_NAME
    if not path.exists():
        return None
    try:
        with _open_h5(path, "r") as file:
            group = file.get(_group_name(i))
            if group is None or any(name not in group for name in MAP_NAMES):
                return None
            found = group.attrs.get("settings")
            check_settings(None if found is None else json.loads(found), settings, path)
            maps = {name: group[name][...] for name in MAP_NAMES}
    except (OSError, KeyError, RuntimeError) as error:
        if isinstance(error, EmbeddingCacheError | EmbeddingMismatchError):
            raise
        raise _damaged(path, error) from error
    for name, array in maps.items():
        if array.shape != tuple(shape):
            raise EmbeddingMismatchError(
                f"{name} in {path} ({_group_name(i)}) has the shape {array.shape}, but the image has {tuple(shape)}. "
                "Delete the file to compute it again, or choose another path."
            )
    return maps


def write_maps(folder: Path, i: int | None, maps: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
    """Write the maps of a plane. The group gets its name when it is complete; a new file appears complete."""
    path = folder / _H5_NAME
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _write_group(path, i, maps, settings)
            return
        with tempfile.TemporaryDirectory(prefix=".is_state.", dir=folder) as temporary:
            _write_group(Path(temporary) / _H5_NAME, i, maps, settings)
            os.replace(Path(temporary) / _H5_NAME, path)


def _write_group(path: Path, i: int | None, maps, settings) -> None:
    name = _group_name(i)
    with _open_h5(path, "a") as file:
        for stale in (name, f".partial-{name}"):
            if stale in file:
                del file[stale]
        group = file.create_group(f".partial-{name}")
        for key in MAP_NAMES:
            group.create_dataset(key, data=np.asarray(maps[key], np.float32), compression="gzip")
        group.attrs["settings"] = json.dumps(settings)
        file.flush()
        file.move(f".partial-{name}", name)


# --- mask generator ---


def _amg_path(folder: Path, i: int | None, suffix: str) -> Path:
    if i is not None:
        return folder / "amg_state" / f"state-{i}.{'pkl' if suffix == 'pickle' else suffix}"
    return folder / f"amg_state.{suffix}"


def read_amg_state(folder: Path, i: int | None, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of a mask generator; None if there is none. Arguments and errors as for `read_maps`.

    Raises:
        UnsafeCheckpointError: If a pickle asks for more than arrays and containers.
    """
    path = _amg_path(folder, i, "npz")
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                check_settings(json.loads(str(file["settings"])), settings, path)
                return _decode_amg(file)
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise _damaged(path, error) from error
    legacy = _amg_path(folder, i, "pickle")
    if legacy.exists():
        check_settings(None, settings, legacy)
        return read_legacy_pickle(legacy)
    return None


def write_amg_state(folder: Path, i: int | None, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the state of a mask generator, complete or not at all."""
    path = _amg_path(folder, i, "npz")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".amg_state.", dir=path.parent))
        try:
            np.savez_compressed(
                temporary / path.name, settings=np.array(json.dumps(settings)), **dict(_encode_amg(state))
            )
            os.replace(temporary / path.name, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _encode_amg(state: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    yield "original_size", np.asarray(state["original_size"])
    yield "crop_boxes", np.asarray(state["crop_boxes"]).reshape(-1, 4)
    for n, crop in enumerate(state["crop_list"]):
        for key, value in crop.items():
            if key == "rles":
                yield f"{n}/rles/size", np.array([rle["size"] for rle in value], int).reshape(-1, 2)
                yield f"{n}/rles/n_counts", np.array([len(rle["counts"]) for rle in value], int)
                counts = [np.asarray(rle["counts"], np.int64) for rle in value]
                yield f"{n}/rles/counts", np.concatenate(counts) if counts else np.empty(0, np.int64)
            elif isinstance(value, torch.Tensor):
                yield f"{n}/tensor/{key}", value.detach().cpu().numpy()
            else:
                yield f"{n}/array/{key}", np.asarray(value)


def _decode_amg(file: Mapping[str, np.ndarray]) -> dict[str, Any]:
    boxes = file["crop_boxes"].tolist()
    crops: list[MaskData] = [MaskData() for _ in boxes]
    for name in file:
        number, _, rest = name.partition("/")
        if not number.isdigit():
            continue
        kind, _, key = rest.partition("/")
        crop = crops[int(number)]
        if kind == "tensor":
            crop[key] = torch.from_numpy(file[name])
        elif kind == "array":
            crop[key] = file[name]
        elif key == "counts":
            lengths = np.cumsum(file[f"{number}/rles/n_counts"])[:-1]
            parts = np.split(file[name], lengths) if len(file[f"{number}/rles/n_counts"]) else []
            sizes = file[f"{number}/rles/size"].tolist()
            crop["rles"] = [{"size": size, "counts": part.tolist()} for size, part in zip(sizes, parts)]
    size = tuple(int(s) for s in file["original_size"])
    return {"crop_list": crops, "crop_boxes": boxes, "original_size": size}


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _build(unpickler: Any) -> None:
    if not isinstance(unpickler.stack[-2], MaskData):
        SafePickle().Unpickler.dispatch[pickle.BUILD[0]](unpickler)
        return
    state = unpickler.stack.pop()
    if not isinstance(state, dict) or set(state) != {"_stats"} or not isinstance(state["_stats"], dict):
        raise pickle.UnpicklingError("The state of a MaskData is not as expected.")
    unpickler.stack[-1]._stats = state["_stats"]


def read_legacy_pickle(path: Path) -> dict[str, Any]:
    """Read a state of older versions with a reader that builds arrays, tensors and containers, and runs nothing.

    Raises:
        UnsafeCheckpointError: If the file asks for anything else.
        EmbeddingCacheError: If it is damaged.
    """
    reader = SafePickle()

    class Unpickler(reader.Unpickler):
        dispatch = reader.Unpickler.dispatch | {pickle.BUILD[0]: _build}

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("segment_anything.utils.amg", "MaskData"):
                return MaskData
            if (module, name) == ("torch.storage", "_load_from_bytes"):
                return _load_storage
            return super().find_class(module, name)

    refusal = f"The segmentation state {path} needs objects that are not loaded from files for safety: "
    try:
        with open(path, "rb") as file:
            state = Unpickler(file).load()
    except HostilePickleError as error:
        raise UnsafeCheckpointError(f"{refusal}{error} Nothing of it was run. Delete the file.") from error
    except Exception as error:  # what a damaged stream raises depends on where it breaks
        if reader.refused:
            raise UnsafeCheckpointError(f"{refusal}{', '.join(sorted(reader.refused))}. Delete the file.") from error
        raise _damaged(path, error) from error
    if reader.refused:
        raise UnsafeCheckpointError(f"{refusal}{', '.join(sorted(reader.refused))}. Delete the file.")
    if not isinstance(state, dict) or not {"crop_list", "crop_boxes", "original_size"} <= set(state):
        raise _damaged(path, ValueError("it is not the state of a mask generator"))
    return state
