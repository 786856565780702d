"""All models that can be chosen by name: published, shipped, and the user's own. Loads no torch.

Own models are rows of a text file, `models.toml` in the folder `models` of the cache directory, or the file that the
environment variable `MICROSAM_MODELS` names:

    [[model]]
    name = "my_nuclei"
    path = "best.pt"                  # absolute, or relative to this file
    description = "nuclei of our spinning disk"
    decoder_path = "decoder.pt"       # optional: the checkpoint may hold the decoder itself
    hash = "xxh128:…"                 # optional
    image_size = 512                  # optional, in pixels
"""

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import (
    InvalidInputError,
    MissingFileError,
    OutputExistsError,
    UnknownModelError,
    nearest_names,
)
from ..core.settings import get_cache_directory
from .files import replacing
from .specs import LOCAL_FAMILY, MODELS, ModelSpec

if TYPE_CHECKING:
    from .download import ModelRegistry

_HEADER = re.compile(r"^\s*\[\[\s*model\s*\]\]", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_FIELDS = {
    "name": str, "path": str, "description": str, "decoder_path": str, "hash": str, "image_size": int,
    "has_decoder": bool,
}
_PUBLISHED = {spec.name: spec for spec in MODELS}


def get_models_directory() -> Path:
    """Return the folder of the downloaded models; files may also be placed there by hand."""
    return get_cache_directory() / "models"


def get_local_models_file() -> Path:
    """Return the file with the rows of local models; it need not exist."""
    custom = os.environ.get("MICROSAM_MODELS")
    return Path(custom).expanduser() if custom else get_models_directory() / "models.toml"


def _file_keys() -> dict[str, tuple[str, str]]:
    """The files of published models, name -> (url, hash): first the models, then the decoders."""
    files = [item for spec in MODELS for item in spec.files.items()]
    return dict(sorted(files, key=lambda item: item[0].endswith("_decoder")))


def _check_row(row: dict[str, Any], seen: set[str]) -> str | None:
    """Return what is wrong with the row, or None."""
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        return f"has the unknown field {unknown[0]!r}. {nearest_names(unknown[0], _FIELDS)}"
    for field in ("name", "path"):
        if not row.get(field):
            return f"has no {field!r}. Add {field} = \"…\"."
    for field, value in row.items():
        if type(value) is not _FIELDS[field]:
            return f"has {field} = {value!r}, which should be of type {_FIELDS[field].__name__}."
    name = row["name"]
    if not _NAME.fullmatch(name):
        return f"has the name {name!r}. Use letters, digits, '_', '-' and '.', starting with a letter or digit."
    if name in _PUBLISHED or name in _file_keys():
        return f"has the name {name!r}, which belongs to a published model. Choose another name."
    if name in seen:
        return f"has the name {name!r} for the second time. Names must differ."
    if "hash" in row and not re.fullmatch(r"xxh128:[0-9a-f]{32}", row["hash"]):
        return f"has the hash {row['hash']!r}. It must be 'xxh128:' and 32 hexadecimal digits."
    if "image_size" in row and (row["image_size"] <= 0 or row["image_size"] % 16):
        return f"has image_size = {row['image_size']}. It must be a positive multiple of 16."
    return None


def _local_spec(row: dict[str, Any], folder: Path) -> ModelSpec:
    decoder_path = row.get("decoder_path")
    modes = ("amg",) if row.get("has_decoder") is False else ("ais", "apg", "amg")
    return ModelSpec(
        name=row["name"], family=LOCAL_FAMILY, purpose=row.get("description", ""), modes=modes, hash=row.get("hash"),
        path=str(folder / Path(row["path"]).expanduser()), image_size=row.get("image_size"),
        decoder_path=None if decoder_path is None else str(folder / Path(decoder_path).expanduser()),
    )


def _parse(text: str, path: Path) -> dict[str, ModelSpec]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(f"The file of local models {path} is not valid TOML: {error}. Correct it.") from error
    rows = content.get("model", [])
    if set(content) - {"model"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidInputError(
            f"The file of local models {path} must consist of [[model]] sections, but has: {', '.join(content)}."
        )
    lines = [text.count("\n", 0, match.end()) + 1 for match in _HEADER.finditer(text)]
    specs: dict[str, ModelSpec] = {}
    for number, row in enumerate(rows):
        problem = _check_row(row, set(specs))
        if problem is not None:
            where = f"line {lines[number]}" if len(lines) == len(rows) else f"number {number + 1}"
            raise InvalidInputError(f"The [[model]] section at {where} of {path} {problem}")
        specs[row["name"]] = _local_spec(row, path.absolute().parent)
    return specs


def local_models() -> dict[str, ModelSpec]:
    """Return the rows of the user's own models by name.

    Raises:
        InvalidInputError: If the file of local models has a mistake; names the line.
    """
    path = get_local_models_file()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"The file of local models {path} cannot be read: {error}.") from error
    return _parse(text, path)


def _toml_string(value: str) -> str:
    # Strings of JSON are strings of TOML, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def register_local_model(
    name: str,
    path: str | os.PathLike,
    description: str = "",
    *,
    decoder_path: str | os.PathLike | None = None,
    image_size: int | None = None,
    has_decoder: bool | None = None,
    hash: str | None = None,
    replace: bool = False,
) -> ModelSpec:
    """Add an own model to the file of local models, so that menus and commands offer it.

    Args:
        name: How the model is called; must not be that of a published model.
        path: The checkpoint.
        description: What it is for.
        decoder_path: A file with the segmentation decoder, if it is not in the checkpoint.
        image_size: Side of the canvas in pixels. By default that of the checkpoint.
        has_decoder: False if the model has no decoder, so that menus do not offer what needs one.
        hash: The checkpoint's hash, to notice changes. By default none is checked.
        replace: Whether a row of that name may be replaced.

    Returns:
        The new row.

    Raises:
        MissingFileError: If a file does not exist.
        InvalidInputError: If a value is not allowed or the file of local models has a mistake.
        OutputExistsError: If there is a model of that name already.
        OutputWriteError: If the file cannot be written.
    """
    row: dict[str, Any] = {"name": name, "path": _existing(path)}
    row |= {"description": description} if description else {}
    row |= {} if decoder_path is None else {"decoder_path": _existing(decoder_path)}
    extra = {"image_size": image_size, "has_decoder": has_decoder, "hash": hash}
    row |= {field: value for field, value in extra.items() if value is not None}
    problem = _check_row(row, set())
    if problem is not None:
        raise InvalidInputError(f"The model {problem}")

    known = local_models()
    if name in known and not replace:
        raise OutputExistsError(
            f"There is a local model {name!r} already, with {known[name].path}. Choose another name or replace it."
        )
    target = get_local_models_file()
    text = target.read_text(encoding="utf-8") if target.exists() else ""
    if name in known:
        starts = [match.start() for match in _HEADER.finditer(text)] + [len(text)]
        if len(starts) != len(known) + 1:
            raise InvalidInputError(f"The row {name!r} could not be found in {target}. Edit the file by hand.")
        index = list(known).index(name)
        text = text[:starts[index]] + text[starts[index + 1]:]
    values = {k: _toml_string(v) if isinstance(v, str) else str(v).lower() for k, v in row.items()}
    section = "[[model]]\n" + "".join(f"{k} = {v}\n" for k, v in values.items())
    text = f"{text.rstrip()}\n\n{section}" if text.strip() else section
    spec = _parse(text, target)[name]
    with replacing(target) as new:
        new.write_text(text, encoding="utf-8")
    return spec


def _existing(path: str | os.PathLike) -> str:
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}. Pass the path of a checkpoint.")
    return str(path)


def list_models() -> list[str]:
    """Return the exact names of all models: published, shipped, then local ones."""
    return [*_PUBLISHED, *local_models()]


def find_spec(name: str) -> ModelSpec:
    """Return the row of a published, shipped or local model.

    Raises:
        UnknownModelError: If there is no such model; names the nearest ones.
        InvalidInputError: If the name is not a published one and the file of local models has a mistake.
    """
    if name in _PUBLISHED:
        return _PUBLISHED[name]
    local = local_models()
    if name in local:
        return local[name]
    hint = ""
    if name in _file_keys():
        hint = f"{name!r} is the file of a decoder, which is loaded with its model. "
    raise UnknownModelError(f"There is no model {name!r}. {hint}{nearest_names(name, [*_PUBLISHED, *local])}")


def get_model_names() -> list[str]:
    """Return the names of all model files: published models, their decoders, then the shipped and local models.

    `list_models` returns only what can be passed as a model's name.
    """
    files = list(_file_keys())
    return files + [name for name in list_models() if name not in files]


def models() -> "ModelRegistry":
    """Return the registry of downloadable model files, for the present cache directory.

    Its `registry` maps names to hashes, `urls` names to urls; `path` is the folder of the files; `fetch(name)` returns
    the path of a file and downloads it if needed; `get_url(name)` returns its url.
    """
    from .download import ModelRegistry
    return ModelRegistry(get_models_directory(), _file_keys())


def download_sam_model(
    model_type: str, progress_bar_factory: Callable[[str], Any] | None = None
) -> tuple[str, str, str | None]:
    """Download a published model and its decoder, unless they are there.

    Args:
        model_type: The model's name.
        progress_bar_factory: Called with the name of a file that has to be downloaded; returns a bar like tqdm's,
            which is closed afterwards.

    Returns:
        The path of the checkpoint, its hash `xxh128:<hex>`, and the path of the decoder or None.

    Raises:
        UnknownModelError: If no such model is published; names the nearest ones.
        DownloadError: If the download fails, with what to do then.
    """
    spec = find_spec(model_type)
    if not spec.files:
        published = [s.name for s in MODELS if s.files]
        raise UnknownModelError(f"{model_type!r} is not a model to download. Those are: {', '.join(published)}.")
    registry = models()
    paths = {}
    for name in spec.files:
        present = (Path(registry.path) / name).exists()
        if progress_bar_factory is None or present:
            paths[name] = registry.fetch(name, progressbar=progress_bar_factory is None and not present)
            continue
        bar = progress_bar_factory(name)
        try:
            paths[name] = registry.fetch(name, progressbar=bar)
        finally:
            bar.close()
    return paths[spec.name], spec.hash, paths.get(f"{spec.name}_decoder")
