"""What is installed here, what is missing, and how to get it: the data behind `micro_sam.info`."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from .._version import __version__
from ..core.errors import MicroSamError
from ..core.settings import available_devices, get_cache_directory, get_device
from .hashing import file_hash, remembered_hash
from .precision import gains_from_half_precision
from .registry import (
    download_sam_model,
    find_spec,
    get_local_models_file,
    get_models_directory,
    list_models,
    local_models,
)
from .specs import MODELS, ModelSpec

DOCUMENTATION = "https://computational-cell-analytics.github.io/micro-sam"
PUBLICATION = "https://www.nature.com/articles/s41592-024-02580-4"
_PACKAGES = (
    "torch", "torchvision", "torch-em", "segment-anything", "numpy", "scipy", "scikit-image", "zarr", "dask",
    "tifffile", "bioimage-cpp", "python-elf", "napari",
)
_OPTIONAL = {"napari": "Only needed for annotation. Install it with: pip install 'micro_sam[gui]'"}
_VARIABLES = ("MICROSAM_CACHEDIR", "MICROSAM_MODELS", "XDG_CACHE_HOME", "PYTORCH_ENABLE_MPS_FALLBACK")


def _packages() -> dict[str, str | None]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    import torch

    devices = []
    for name in available_devices():
        device = {
            "name": name, "default": name == str(get_device()), "half_precision": gains_from_half_precision(name),
        }
        if name == "cuda":
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                devices.append(device | {
                    "name": f"cuda:{index}", "hardware": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "default": device["default"] and index == 0,
                })
            continue
        if name == "cpu":
            device |= {"hardware": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        devices.append(device)
    return devices


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # deleted meanwhile
                continue
    return total


def _cache() -> dict[str, Any]:
    folder = get_cache_directory()
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    parts = {p.name: _folder_size(p) for p in sorted(folder.iterdir()) if p.is_dir()} if folder.is_dir() else {}
    return {
        "path": str(folder), "exists": folder.is_dir(), "writable": os.access(existing, os.W_OK),
        "size_bytes": _folder_size(folder) if folder.is_dir() else 0, "parts_bytes": parts,
        "free_bytes": shutil.disk_usage(existing).free,
    }


def _file(path: Path, known_hash: str | None, verify: bool) -> dict[str, Any]:
    """Describe a file; `hash_ok` is None if no hash is registered or it was not checked."""
    if not path.is_file():
        return {"path": str(path), "present": False, "size_bytes": None, "hash_ok": None}
    found = None
    if known_hash is not None:
        found = file_hash(path) if verify else remembered_hash(path)
    return {
        "path": str(path), "present": True, "size_bytes": path.stat().st_size,
        "hash_ok": None if found is None else found == known_hash,
    }


def _model(spec: ModelSpec, verify: bool) -> dict[str, Any]:
    if spec.files:
        found = [_file(get_models_directory() / name, digest, verify) for name, (_, digest) in spec.files.items()]
        remedy = f"micro_sam.info --download {spec.name}"
    elif spec.resource is not None:
        found, remedy = [_file(spec.local_path, None, verify)], "Install micro_sam again."
    else:
        found = [_file(Path(spec.path), spec.hash, verify)]
        if spec.decoder_path is not None:
            found.append(_file(Path(spec.decoder_path), None, verify))
        remedy = f"Correct the row in {get_local_models_file()}, or put the file back."
    present, ok = all(file["present"] for file in found), not any(file["hash_ok"] is False for file in found)
    state = "ready" if present and ok else "damaged" if not ok else (
        "incomplete" if any(file["present"] for file in found) else "absent"
    )
    return {
        "name": spec.name, "family": spec.family, "size": spec.size, "version": spec.version,
        "modes": list(spec.modes), "licence": spec.licence, "purpose": spec.purpose, "state": state, "files": found,
        "remedy": None if state == "ready" else remedy,
    }


def collect_info(verify: bool = True) -> dict[str, Any]:
    """Collect what a user or supporter needs to know about this installation.

    Args:
        verify: Whether to read downloaded files to check their hashes, unless they are remembered.

    Returns:
        Plain values that can be written as JSON: `micro_sam` (version), `python`, `packages`, `system`, `environment`,
        `devices`, `cache`, `models` (each with `state`: ready, absent, incomplete or damaged, and `remedy`),
        `problems` (each with `problem` and `remedy`), `documentation` and `publication`.
    """
    packages, cache, problems = _packages(), _cache(), []
    for name, found in packages.items():
        if found is None and name not in _OPTIONAL:
            problems.append({"problem": f"The package {name} is missing.", "remedy": f"pip install {name}"})
    if not cache["writable"]:
        problems.append({
            "problem": f"The cache directory {cache['path']} cannot be written.",
            "remedy": "Set the environment variable MICROSAM_CACHEDIR to a folder that you may write.",
        })
    specs = list(MODELS)
    try:
        specs += local_models().values()
    except MicroSamError as error:
        problems.append({"problem": str(error), "remedy": f"Edit {get_local_models_file()}."})
    rows = [_model(spec, verify) for spec in specs]
    for spec, row in zip(specs, rows):
        # That a model was never downloaded is no problem.
        if row["state"] != "ready" and (row["state"] != "absent" or not spec.files):
            problems.append({"problem": f"The model {row['name']} is {row['state']}.", "remedy": row["remedy"]})
    memory = psutil.virtual_memory()
    return {
        "micro_sam": __version__,
        "python": sys.version.split()[0],
        "packages": packages,
        "system": {
            "system": platform.system(), "release": platform.release(), "version": platform.version(),
            "machine": platform.machine(), "node": platform.node(), "processor": platform.processor(),
            "platform": platform.platform(), "cpus": os.cpu_count(), "memory_gib": round(memory.total / 2**30, 1),
            "memory_free_gib": round(memory.available / 2**30, 1),
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": _devices(),
        "cache": cache,
        "models": rows,
        "problems": problems,
        "documentation": DOCUMENTATION,
        "publication": PUBLICATION,
    }


def format_size(size: float) -> str:
    """Write a number of bytes for people, for example `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def format_info(info: dict[str, Any]) -> str:
    """Write what `collect_info` returns as text for a terminal."""
    system, cache = info["system"], info["cache"]
    lines = [
        f"micro_sam {info['micro_sam']}, Python {info['python']}",
        f"Documentation: {info['documentation']}", f"Publication:   {info['publication']}", "", "System",
        f"  {system['platform']}, {system['cpus']} CPUs, {system['memory_gib']} GiB memory "
        f"({system['memory_free_gib']} GiB free)",
    ]
    for device in info["devices"]:
        extra = ", ".join(
            str(text) for text in (
                device.get("hardware"), device.get("memory_gib") and f"{device['memory_gib']} GiB",
                device.get("threads") and f"{device['threads']} threads",
                "faster in half precision (--precision auto)" if device["half_precision"] else "",
                "used by default" if device["default"] else "",
            ) if text
        )
        lines.append(f"  device {device['name']}: {extra}")
    lines += ["", "Packages"]
    for name, found in info["packages"].items():
        lines.append(f"  {name} {found or 'is not installed. ' + _OPTIONAL.get(name, '')}")
    sizes = f"{format_size(cache['size_bytes'])}, {format_size(cache['free_bytes'])} free"
    lines += ["", "Cache", f"  {cache['path']}: {sizes}"]
    lines += [f"    {name}: {format_size(size)}" for name, size in cache["parts_bytes"].items()]
    lines += [f"  {name}={value}" for name, value in info["environment"].items()]
    lines += ["", "Models"]
    width = max(len(row["name"]) for row in info["models"])
    for row in info["models"]:
        label = ", ".join(part for part in (row["family"], row["size"], row["version"]) if part)
        state = row["state"] if row["remedy"] is None else f"{row['state']}: {row['remedy']}"
        lines.append(f"  {row['name']:{width}s}  {label:36s}  {state}")
    lines += ["", "Problems" if info["problems"] else "No problems were found."]
    lines += [f"  {entry['problem']} {entry['remedy']}" for entry in info["problems"]]
    return "\n".join(lines)


def download_models(
    names: Sequence[str] | None = None, progress: Callable[[str], Any] | None = None
) -> dict[str, dict[str, str | None]]:
    """Download models and their decoders, so that they work offline.

    Args:
        names: Names of models. None takes all published ones. All names are checked before anything is downloaded.
        progress: Called with the name of a file that has to be downloaded; returns a bar like tqdm's.

    Returns:
        For each model the paths of the `checkpoint` and the `decoder` (None if there is none).

    Raises:
        UnknownModelError: If a name is not that of a model; names the nearest ones.
        DownloadError: If a download fails, with what to do then. What was received is kept.
    """
    if names is None:
        names = [name for name in list_models() if find_spec(name).files]
    specs = [find_spec(name) for name in names]
    paths = {}
    for spec in specs:
        if spec.files:
            checkpoint, _, decoder = download_sam_model(spec.name, progress)
        else:  # it is on this computer already
            checkpoint = str(spec.local_path)
            decoder = spec.decoder_path
        paths[spec.name] = {"checkpoint": checkpoint, "decoder": decoder}
    return paths
