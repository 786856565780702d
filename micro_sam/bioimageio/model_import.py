"""Packages of bioimage.io as local models, which menus, commands and scripts find by name. Needs no network."""

import contextlib
import hashlib
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..core.errors import CheckpointError, InvalidInputError, MissingFileError, OutputExistsError
from ..core.output import temporary_path
from ..models.hashing import compute_hash
from ..models.registry import get_local_models_file, list_models, local_models, register_local_model
from ..models.specs import ModelSpec

_DESCRIPTIONS = ("rdf.yaml", "bioimageio.yaml", "model.yaml")
_FOLDER = "imported"


class PackageError(InvalidInputError):
    """A package of bioimage.io is damaged, or holds no model that micro_sam can use."""


def import_model(
    path_or_folder: str | os.PathLike, name: str | None = None, *, overwrite: bool = False
) -> ModelSpec:
    """Make the Segment Anything model of a bioimage.io package a local model.

    Weights, description, documentation and licence are copied to the folder `imported/<name>` beside the file of
    local models (`micro_sam.models.registry`), so that the package is not needed afterwards. No code of the package is
    run.

    Args:
        path_or_folder: The package (zip), a folder with its files, or the description in such a folder (`rdf.yaml`).
        name: How the model is to be called. By default the name in the description, with `_` for what names of
            models cannot contain.
        overwrite: Whether to replace a local model of that name.

    Returns:
        The row of the model. `get_predictor_and_decoder(name)`, `segment(image, model=name)`, the menus of the
        annotation tools and `-m name` on the command line take its name.

    Raises:
        MissingFileError: If there is no such package.
        PackageError: If it is damaged or incomplete, or is not a Segment Anything model.
        CheckpointError: If its weights are damaged or do not fit a network that is known.
        InvalidInputError: If the name is not allowed or belongs to a published model.
        OutputExistsError: If there is a local model of that name.
        OutputWriteError: If the files cannot be written.

    Example:
        >>> import_model("nuclei.zip", "my_nuclei").name  # doctest: +SKIP
        'my_nuclei'
    """
    with _open_package(Path(path_or_folder).expanduser()) as package:
        entry = package.weights()
        name = _choose_name(package.description, name, overwrite)
        target = get_local_models_file().parent / _FOLDER / name
        if target.exists() and name not in local_models() and not overwrite:
            raise OutputExistsError(
                f"{target} exists, but is no local model. Delete it, pass overwrite=True, or choose another name."
            )
        is_new = not target.exists()
        with temporary_path(target, is_folder=True) as new:
            new.mkdir()
            weights = package.copy(entry, new)
            has_decoder, decoder = _load(package, weights, new)
            package.copy_texts(new)
        try:
            return register_local_model(
                name, target / weights.name, " ".join(str(package.description.get("description", "")).split()),
                decoder_path=None if decoder is None else target / decoder.name, has_decoder=has_decoder,
                hash=compute_hash(target / weights.name), replace=overwrite,
            )
        except BaseException:
            if is_new:
                shutil.rmtree(target, ignore_errors=True)
            raise


@dataclass(frozen=True)
class _Package:
    """A package that is open: its description, and the folder or archive (with a folder inside of it) of its files."""

    path: Path
    text: bytes
    description: Mapping[str, Any]
    archive: zipfile.ZipFile | None
    folder: Path | PurePosixPath

    def weights(self) -> Mapping[str, Any]:
        """The entry of the weights."""
        kind, weights = self.description.get("type"), self.description.get("weights")
        if kind != "model" or not isinstance(weights, Mapping):
            raise PackageError(f"{self.path} describes a {kind or 'thing without type'}, not a model. Pass a model.")
        entry = weights.get("pytorch_state_dict")
        if not isinstance(entry, Mapping) or not entry.get("source"):
            raise PackageError(
                f"{self.path} has weights of the format {', '.join(weights) or 'none'}, but only 'pytorch_state_dict' "
                "can be used. Pass a package of a Segment Anything model with such weights."
            )
        return entry

    def copy(self, entry: Mapping[str, Any], folder: Path) -> Path:
        """Copy a described file and check its SHA-256."""
        source = str(entry["source"])
        if "://" in source:
            raise PackageError(
                f"The description in {self.path} only refers to {source}. Download the whole package (zip) and pass it."
            )
        relative = PurePosixPath(source)
        if relative.is_absolute() or ".." in relative.parts or "\\" in source:
            raise PackageError(f"{self.path} refers to {source!r}, which is outside of it. Do not trust this package.")
        target = folder / relative.name
        digest = hashlib.sha256()
        with self._open(relative) as file, open(target, "wb") as out:
            while block := file.read(1 << 22):
                digest.update(block)
                out.write(block)
        if entry.get("sha256") not in (None, digest.hexdigest()):
            raise PackageError(
                f"{source} in {self.path} is damaged: it has another SHA-256 than described. Get the package again."
            )
        return target

    @contextlib.contextmanager
    def _open(self, relative: PurePosixPath) -> Iterator[Any]:
        try:
            if self.archive is None:
                file = open(self.folder / relative, "rb")
            else:
                file = self.archive.open(str(self.folder / relative))
        except (KeyError, FileNotFoundError, IsADirectoryError) as error:
            raise PackageError(
                f"{self.path} has no file {relative}, which it describes. Get the package again."
            ) from error
        with file:
            try:
                yield file
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise PackageError(f"{relative} in {self.path} is damaged: {error}. Get the package again.") from error

    def attachments(self) -> list[Mapping[str, Any]]:
        """The files that are attached, in all versions of the format."""
        attached = self.description.get("attachments") or []
        attached = attached.get("files", []) if isinstance(attached, Mapping) else attached
        return [a if isinstance(a, Mapping) else {"source": a} for a in attached]

    def copy_texts(self, folder: Path) -> None:
        """Copy what says where the model comes from and what it may be used for."""
        (folder / _DESCRIPTIONS[0]).write_bytes(self.text)
        for key in ("documentation", "license"):
            value = self.description.get(key)
            entry = value if isinstance(value, Mapping) else {"source": value} if key == "documentation" else {}
            if entry.get("source") and "://" not in str(entry["source"]):
                self.copy(entry, folder)


@contextlib.contextmanager
def _open_package(path: Path) -> Iterator[_Package]:
    if path.is_dir():
        found = next((path / name for name in _DESCRIPTIONS if (path / name).is_file()), None)
        if found is None:
            raise MissingFileError(f"The folder {path} has no {_DESCRIPTIONS[0]}. Pass a folder with a package.")
        yield _package(path, found.read_bytes(), None, path)
    elif not path.is_file():
        raise MissingFileError(f"There is no package {path}. Pass a zip, a folder, or its {_DESCRIPTIONS[0]}.")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if PurePosixPath(n).name in _DESCRIPTIONS]
            if not names:
                raise PackageError(
                    f"{path} has no {_DESCRIPTIONS[0]}, so it is not a package of bioimage.io. A checkpoint need not "
                    "be imported: pass it as checkpoint, or register it with register_local_model."
                )
            found = min(names, key=len)
            yield _package(path, archive.read(found), archive, PurePosixPath(found).parent)
    elif path.suffix.lower() in (".yaml", ".yml"):
        yield _package(path, path.read_bytes(), None, path.parent)
    else:
        raise PackageError(f"{path} is neither a zip nor a description ({_DESCRIPTIONS[0]}). Get the package again.")


def _package(path: Path, text: bytes, archive: zipfile.ZipFile | None, folder: Path | PurePosixPath) -> _Package:
    try:
        description = yaml.safe_load(text.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PackageError(f"The description in {path} cannot be read: {error}. Get the package again.") from error
    if not isinstance(description, Mapping):
        raise PackageError(f"The description in {path} has no entries. Get the package again.")
    return _Package(path, text, description, archive, folder)


def _choose_name(description: Mapping[str, Any], name: str | None, overwrite: bool) -> str:
    if name is None:
        name = re.sub(r"[^A-Za-z0-9_.\-]+", "_", str(description.get("name", ""))).strip("_.-") or "imported_model"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", name):
        raise InvalidInputError(
            f"The name {name!r} is not allowed. Use letters, digits, '_', '-' and '.', starting with a letter or digit."
        )
    known = local_models()
    if name in list_models() and name not in known:
        raise InvalidInputError(f"{name!r} is the name of a published model. Pass another name.")
    if name in known and not overwrite:
        raise OutputExistsError(
            f"There is a local model {name!r} already, with {known[name].path}. Pass another name, or overwrite=True."
        )
    return name


def _load(package: _Package, weights: Path, folder: Path) -> tuple[bool, Path | None]:
    """Load the network once, to know that it works.

    Returns:
        Whether it has a decoder, and the file of the decoder if the weights do not hold it: it is then attached, as in
        packages of earlier versions, and copied here.
    """
    from ..models.checkpoints import read_checkpoint
    from ..models.loading import get_predictor_and_decoder, get_sam_model

    try:
        checkpoint = read_checkpoint(weights, mmap=True)
        architecture, has_decoder = checkpoint.architecture, checkpoint.decoder_state is not None
    except CheckpointError as error:
        raise PackageError(f"{package.path} holds no Segment Anything model that can be used: {error}") from error
    attached = [a for a in package.attachments() if str(a.get("source", "")).endswith("_decoder.pt")]
    decoder = package.copy(attached[0], folder) if attached and not has_decoder else None
    if has_decoder or decoder is not None:
        get_predictor_and_decoder(architecture, weights, "cpu", decoder_path=decoder)
        return True, decoder
    get_sam_model(architecture, "cpu", weights)
    return False, None
