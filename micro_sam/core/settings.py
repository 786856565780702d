"""Cache directory, device and precision. Environment and settings of users are read at each call, never at import."""

import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DeviceError, InvalidInputError, OutputWriteError, nearest_names

if TYPE_CHECKING:
    import torch

APP_NAME = "micro_sam"
PRECISIONS = ("float32", "auto", "bfloat16")
PRECISION_VARIABLE = "MICROSAM_PRECISION"


def _os_cache_directory() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(base) / APP_NAME / APP_NAME / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / APP_NAME
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / APP_NAME


def user_settings_file() -> Path:
    """Return the file with the settings that users have chosen; it need not exist."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / APP_NAME
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").expanduser()
    return base / APP_NAME / "settings.json"


def read_user_settings() -> dict[str, Any]:
    """Return what users have chosen: `cache_directory`, `embedding_cache_gb` and `precision`, as far as they are set.

    A file that is damaged counts as empty.
    """
    try:
        content = json.loads(user_settings_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_user_settings(**values: Any) -> None:
    """Keep settings, also for the next start; None removes one.

    Raises:
        OutputWriteError: If the file cannot be written.
    """
    content = {k: v for k, v in {**read_user_settings(), **values}.items() if v is not None}
    path = user_settings_file()
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(content, indent=2), encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise OutputWriteError(f"The settings {path} cannot be written: {error}. Check the permissions.") from error


def get_cache_directory() -> Path:
    """Return the directory for models, sample data and automatic embedding caches (not created here).

    It is `$MICROSAM_CACHEDIR` (with `~` expanded; empty counts as unset), what the user has chosen in the settings
    panel, or the cache folder of the system.
    """
    custom = os.environ.get("MICROSAM_CACHEDIR") or read_user_settings().get("cache_directory")
    return Path(custom).expanduser() if custom else _os_cache_directory()


def get_precision(precision: str | None = None) -> str:
    """Choose or check in which precision models compute.

    Args:
        precision: `float32`, `bfloat16`, or `auto`, which is half precision where the device is faster in it. None
            takes `$MICROSAM_PRECISION`, else what the user has chosen in the settings panel, else `float32`.

    Raises:
        InvalidInputError: If it is none of them; says where it comes from.
    """
    source = "precision"
    if precision is None:
        source, precision = PRECISION_VARIABLE, os.environ.get(PRECISION_VARIABLE)
    if not precision:
        source, precision = f"precision in {user_settings_file()}", read_user_settings().get("precision", "float32")
    if precision not in PRECISIONS:
        hint = nearest_names(str(precision), PRECISIONS)
        raise InvalidInputError(f"{source} is {precision!r}, which is not a precision. {hint}")
    return precision


def _is_available(device_type: str) -> bool:
    import torch
    if device_type == "cuda":
        return torch.cuda.is_available()
    if device_type == "mps":
        return torch.backends.mps.is_available() and torch.backends.mps.is_built()
    return device_type == "cpu"


def available_devices() -> list[str]:
    """Return those of `cuda`, `mps` and `cpu` that can be used on this machine."""
    return [name for name in ("cuda", "mps", "cpu") if _is_available(name)]


def get_device(device: "str | torch.device | None" = None) -> "str | torch.device":
    """Choose or check the compute device.

    Args:
        device: A name such as `cpu`, `cuda`, `cuda:1` or `mps` (any case) or a torch device.
            None or `auto` chooses cuda, else mps, else cpu (cpu if `GITHUB_ACTIONS` is `true`).

    Returns:
        The device as it was given (names in lower case), or the chosen name.

    Raises:
        DeviceError: If the device is unknown or not available here.
    """
    if device is None or (isinstance(device, str) and device.lower() == "auto"):
        if os.environ.get("GITHUB_ACTIONS") == "true":
            return "cpu"
        return available_devices()[0]

    import torch
    if isinstance(device, str):
        device = device.lower()
    known = "Use 'cpu', 'cuda', 'cuda:<index>', 'mps' or 'auto'."
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"Unknown device {device!r}. {known}") from error
    if parsed.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"The device type {parsed.type!r} is not supported. {known}")
    if not _is_available(parsed.type):
        raise DeviceError(
            f"The device {device!r} is not available here; available: {', '.join(available_devices())}. "
            "Pass one of these or device='auto', or install a torch build for your accelerator."
        )
    if parsed.type == "cuda" and parsed.index is not None and parsed.index >= torch.cuda.device_count():
        raise DeviceError(
            f"There is no CUDA device {parsed.index}: {torch.cuda.device_count()} found. Pass an index below that."
        )
    return device
