"""The description of a package (`rdf.yaml`), built with `bioimageio.spec`, and the archive with all files."""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import InvalidInputError
from .compatibility import closing_files, load_bioimageio
from .tensors import TensorRow

ADAPTOR_SOURCE = '''"""Runs a Segment Anything model of micro_sam, which has to be installed."""

from micro_sam.bioimageio.predictor_adaptor import PredictorAdaptor

__all__ = ["PredictorAdaptor"]
'''
# Where persons and addresses are: what may be looked up in the network when it is checked.
_LOOKED_UP = ("authors", "maintainers", "packaged_by", "uploader", "cite", "git_repo")
# The embedding has many values, some of which differ between processors by more than rounding.
_EMBEDDING_TOLERANCE = 1000


def file_entry(path: Path) -> dict[str, str]:
    """A file in a description: where it is, and its SHA-256."""
    with open(path, "rb") as f:
        return {"source": str(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _tensor(row: TensorRow, folder: Path, is_input: bool) -> dict[str, Any]:
    content = {
        "id": row.name, "description": row.description, "axes": [dict(axis) for axis in row.axes],
        "data": {"type": row.dtype}, "test_tensor": file_entry(folder / row.file),
    }
    if row.picture:
        content["sample_tensor"] = file_entry(folder / row.picture)
    return content | ({"optional": row.optional} if is_input else {})


def description_content(
    folder: Path, inputs: Sequence[TensorRow], outputs: Sequence[TensorRow], *, weights: Path, model_type: str,
    torch_version: str, config: Mapping[str, Any], entries: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the description.

    Args:
        folder: Where `predictor_adaptor.py`, `environment.yaml` and the test tensors are.
        inputs: The inputs of the model.
        outputs: Its outputs.
        weights: The file with the weights.
        model_type: The architecture.
        torch_version: The version that wrote the weights.
        config: What micro_sam wants to say about the model.
        entries: More entries: `name`, `description`, `license`, `authors` and so on. Empty ones are left out.
    """
    tolerance = {"output_ids": ["embeddings"], "mismatched_elements_per_million": _EMBEDDING_TOLERANCE}
    return {
        "type": "model", "format_version": load_bioimageio()[0].ModelDescr.implemented_format_version,
        "inputs": [_tensor(row, folder, True) for row in inputs],
        "outputs": [_tensor(row, folder, False) for row in outputs],
        "weights": {"pytorch_state_dict": {
            **file_entry(weights), "pytorch_version": torch_version,
            "architecture": {
                **file_entry(folder / "predictor_adaptor.py"), "callable": "PredictorAdaptor",
                "kwargs": {"model_type": model_type},
            },
            "dependencies": file_entry(folder / "environment.yaml"),
        }},
        "config": {"bioimageio": {"reproducibility_tolerance": [tolerance]}, "micro_sam": dict(config)},
        **{key: value for key, value in entries.items() if value not in (None, "", [])},
    }


def build_description(content: Mapping[str, Any]) -> tuple[Any, Any]:
    """Check a description, without looking anything up in the network.

    Returns:
        The description, and one without persons and addresses whose files were all checked, which can be run.

    Raises:
        InvalidInputError: If an entry is not allowed; names it.
    """
    with closing_files():
        return _build(content, False), _build(content, True)


def _build(content: Mapping[str, Any], checked: bool) -> Any:
    spec, _ = load_bioimageio()
    used = {key: value for key, value in content.items() if not (checked and key in _LOOKED_UP)}
    context = spec.ValidationContext(perform_io_checks=checked, log_warnings=False)
    found = spec.build_description(used, context=context)
    if not isinstance(found, spec.InvalidDescr):
        return found
    problems = [
        f"{'.'.join(map(str, error.loc)) or 'description'}: {error.msg}"
        for detail in found.validation_summary.details for error in detail.errors
    ]
    raise InvalidInputError(
        f"bioimage.io does not allow what the package would say. {'; '.join(problems)}. Correct these entries."
    )


def write_package(description: Any, path: Path) -> None:
    """Write the archive with the description and all its files."""
    spec, _ = load_bioimageio()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in spec.get_package_content(description).items():
            if isinstance(content, Mapping):
                text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
                archive.writestr(name, text, zipfile.ZIP_DEFLATED)
            else:
                method = zipfile.ZIP_STORED if name.endswith(".pt") else zipfile.ZIP_DEFLATED  # weights hardly shrink
                archive.write(content.source, name, method)
