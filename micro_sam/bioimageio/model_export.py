"""Models as packages for bioimage.io: weights, description, documentation and examples in one archive."""

import contextlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
import yaml

from .._version import __version__
from ..core.errors import (
    CheckpointError,
    InvalidInputError,
    InvalidTypeError,
    ModelError,
    NoObjectsError,
    OutputExistsError,
    nearest_names,
)
from ..core.output import prepare_folder, temporary_path
from ..core.progress import Step, Steps, drain
from ..models.build_sam import IMAGE_SIZE
from ..models.checkpoints import ENCODER, read_checkpoint
from ..models.export import save_checkpoint
from ..models.loading import get_sam_model
from ..models.registry import find_spec
from ..models.specs import ModelSpec
from ..segmentation.workflow import default_options
from . import provenance
from .compatibility import closing_files, load_bioimageio
from .description import ADAPTOR_SOURCE, build_description, description_content, file_entry, write_package
from .predictor_adaptor import SEGMENTATION_OPTIONS, PredictorAdaptor
from .tensors import example_inputs, picture_of, tensor_rows

logger = logging.getLogger(__name__)

# Settings that loading needs. Others, such as the paths of the training data, are nobody's business.
_SETTINGS = ("model_type", "image_size", "scale_positions", "peft", SEGMENTATION_OPTIONS)
_TEXT = "Export model"


def export_sam_model(
    image: np.ndarray,
    label_image: np.ndarray,
    model_type: str,
    name: str,
    output_path: str | os.PathLike,
    checkpoint_path: str | os.PathLike | None = None,
    *,
    license: str | None = None,
    description: str | None = None,
    documentation: str | os.PathLike | None = None,
    authors: Sequence[Mapping[str, str]] | None = None,
    maintainers: Sequence[Mapping[str, str]] | None = None,
    cite: Sequence[Mapping[str, str]] | None = None,
    tags: Sequence[str] | None = None,
    covers: Sequence[str | os.PathLike] | None = None,
    id: str | None = None,
    id_emoji: str | None = None,
    uploader: Mapping[str, str] | None = None,
    version: str | None = None,
    attach_decoder: bool = False,
    overwrite: bool = False,
    verbose: bool = False,
    **kwargs: Any,
) -> None:
    """Export a model as package (zip) for bioimage.io.

    The package segments objects from boxes, points and masks, and, if the model has a decoder, all objects of an image.
    It is run before it is written: its example outputs must come out again, and each kind of prompt must work.

    Args:
        image: Example image (Y, X) or (Y, X, C).
        label_image: Its objects (Y, X), at least one; those with the ids 1 and 2, or the first ones, become the
            example prompts.
        model_type: The name of the model, or the architecture of the checkpoint.
        name: How the package is called: at least five letters, digits, spaces or `_+-()`.
        output_path: The file to write, usually `*.zip`.
        checkpoint_path: A checkpoint instead of a published model: plain weights, an export, or of a training.
        license: SPDX identifier, for example `CC-BY-4.0`. By default that of the published model; say it for a
            checkpoint of your own, as nobody may use a model without licence.
        description: One or two sentences. By default what the published model is for.
        documentation: Text, or the path of a `.md` file. By default the model card of the model that ships, or what is
            known about the network.
        authors: Who made the model: dicts with `name`, and maybe `affiliation`, `orcid`, `github_user`, `email`.
        maintainers: Who looks after the package: dicts with `github_user`, and maybe `name`.
        cite: Works to cite: dicts with `text` and `doi` or `url`. By default those that the model builds on.
        tags: Tags; by default those of the family of the model.
        covers: Pictures to show. By default one is made of the image and its segmentation.
        id: The identifier that bioimage.io gave to the model.
        id_emoji: The emoji of that identifier.
        uploader: Who uploads it: a dict with `email` and maybe `name`.
        version: The version of the model.
        attach_decoder: Whether to add the decoder as separate file `<architecture>_decoder.pt`, as earlier packages
            had it. The weights hold it anyway.
        overwrite: Whether to replace an existing file.
        verbose: Whether to show progress.
        kwargs: Nothing else is supported; unknown names are refused.

    Raises:
        InvalidTypeError: For unknown keyword arguments.
        InvalidInputError: If images do not fit, or bioimage.io does not allow an entry.
        NoObjectsError: If there are no objects, or the model finds nothing for those that there are.
        UnknownModelError, CheckpointError, MissingFileError: If there is no such model, or a file cannot be used.
        MissingPackageError: If `bioimageio.core` is not installed.
        OutputExistsError: If the file exists.
        OutputWriteError: If it cannot be written.
        ModelError: If the package does not give its example outputs.

    Example:
        >>> export_sam_model(image, labels, "vit_t_lite", "Nuclei (small)", "model.zip")  # doctest: +SKIP
    """
    if kwargs:
        unknown, known = next(iter(kwargs)), set(export_sam_model.__annotations__) - {"kwargs", "return"}
        raise InvalidTypeError(
            f"export_sam_model got the unknown argument {unknown!r}. {nearest_names(unknown, known)}"
        )
    entries = {
        "name": name, "license": license, "description": description, "authors": authors, "maintainers": maintainers,
        "cite": cite, "tags": tags, "id": id, "id_emoji": id_emoji, "uploader": uploader, "version": version,
    }
    steps = export_steps(
        image, label_image, model_type, output_path, checkpoint_path, entries, documentation=documentation,
        covers=covers, attach_decoder=attach_decoder, overwrite=overwrite,
    )
    drain(steps, verbose=verbose)


def export_steps(
    image: np.ndarray, label_image: np.ndarray, model_type: str, output_path: str | os.PathLike,
    checkpoint_path: str | os.PathLike | None, entries: Mapping[str, Any], *, documentation: str | os.PathLike | None,
    covers: Sequence[str | os.PathLike] | None, attach_decoder: bool, overwrite: bool,
) -> Steps[None]:
    """Generator behind `export_sam_model`; `entries` are those of the description. Closing it leaves nothing behind."""
    output_path = Path(output_path).expanduser().absolute()
    if output_path.is_dir():
        raise InvalidInputError(f"{output_path} is a folder. Pass the file to write, for example model.zip.")
    if output_path.exists() and not overwrite:
        raise OutputExistsError(
            f"{output_path} exists. Pass overwrite=True (--overwrite) to replace it, or choose another output."
        )
    covers, text = provenance.check_covers(covers), provenance.given_text(documentation)
    load_bioimageio()
    prepare_folder(output_path)

    total = 4 + len(_COMBINATIONS)
    yield Step(0, total, _TEXT)
    model = _load_model(model_type, checkpoint_path)
    example = _make_example(model, image, label_image)
    yield Step(1, total, _TEXT)
    with temporary_path(output_path, is_folder=False) as new:
        folder = new.parent / "files"
        folder.mkdir()
        content = _write_files(folder, model, example, entries, text, covers, attach_decoder)
        description, checked = build_description(content)
        yield Step(2, total, _TEXT)
        for done, _ in enumerate(_checks(checked, example), 3):
            yield Step(done, total, _TEXT)
        write_package(description, new)
    yield Step(total, total, _TEXT)


@dataclass(frozen=True)
class _Model:
    """What is exported: `weights` is the content of the weight file, `source` says where they come from."""

    architecture: str
    spec: ModelSpec | None
    weights: Mapping[str, Any]
    adaptor: PredictorAdaptor
    source: dict[str, Any]


def _load_model(model_type: str, checkpoint_path: str | os.PathLike | None) -> _Model:
    if checkpoint_path is not None and not read_checkpoint(checkpoint_path, mmap=True).is_complete:
        raise CheckpointError(
            f"{checkpoint_path} has only the encoder and the decoder: it was trained for automatic segmentation only. "
            "Take the rest from the model that it started from, with "
            "micro_sam.training.export_instance_segmentation_model, and export what that writes."
        )
    spec = find_spec(model_type) if checkpoint_path is None else None
    predictor, state = get_sam_model(model_type, "cpu", checkpoint_path, return_state=True)
    architecture, canvas = predictor.model_type, predictor.model.image_encoder.img_size
    checkpoint = read_checkpoint(predictor.checkpoint_path, mmap=True)
    settings = {key: checkpoint.settings[key] for key in _SETTINGS if key in checkpoint.settings}
    if settings.get("scale_positions") and checkpoint.image_size:
        canvas = checkpoint.image_size  # positions are relative to the canvas of the training
    settings |= {"model_type": architecture, "image_size": canvas}
    options = {} if spec is None else default_options(model_type, "ais")
    settings |= {SEGMENTATION_OPTIONS: options} if options else {}

    weights: dict[str, Any] = dict(checkpoint.model_state)
    has_decoder = state.get("decoder_state") is not None
    told_by_weights = f"{ENCODER}pos_embed" in weights or canvas == IMAGE_SIZE
    if has_decoder or not told_by_weights or settings.get("scale_positions") or settings.get("peft"):
        weights = {"model_state": weights, "settings": settings}
    if has_decoder:
        weights |= {"decoder_state": state["decoder_state"], "decoder_settings": state.get("decoder_settings") or {}}
    adaptor = PredictorAdaptor(architecture)
    adaptor.load_state_dict(weights)
    source = {
        "micro_sam_version": __version__, "architecture": architecture, "image_size": canvas,
        "has_decoder": has_decoder, "source_hash": predictor._hash,
    }
    source |= {} if spec is None else {"source_model": spec.name}
    source |= {"source_url": spec.url} if spec is not None and spec.url is not None else {}
    return _Model(architecture, spec, weights, adaptor, source)


def _make_example(model: _Model, image: np.ndarray, label_image: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of the package by name: inputs, and what the model makes of them."""
    prompt_encoder = model.adaptor.sam.prompt_encoder
    inputs = example_inputs(image, label_image, prompt_encoder.mask_input_size[0])
    masks, scores, embeddings = model.adaptor(*(torch.from_numpy(tensor) for tensor in inputs.values()))
    if not masks.any():
        raise NoObjectsError(
            "The model finds nothing for the objects in label_image, so the package would have no example. Pass an "
            "image and objects on which the model works."
        )
    return inputs | {"embeddings": embeddings.numpy(), "masks": masks.numpy(), "scores": scores.numpy()}


def _write_files(
    folder: Path, model: _Model, example: Mapping[str, np.ndarray], entries: Mapping[str, Any], text: str | None,
    covers: list[Path] | None, attach_decoder: bool,
) -> dict[str, Any]:
    """Write the files of the package and return the content of its description."""
    prompt_encoder, spec = model.adaptor.sam.prompt_encoder, model.spec
    inputs, outputs = tensor_rows(prompt_encoder.mask_input_size[0], prompt_encoder.image_embedding_size[0])
    for row in (*inputs, *outputs):
        np.save(folder / row.file, example[row.name])
        if row.picture:
            imageio.imwrite(folder / row.picture, picture_of(example[row.name]))
    weights = folder / f"{model.architecture}.pt"
    save_checkpoint(model.weights, weights)
    (folder / "predictor_adaptor.py").write_text(ADAPTOR_SOURCE, encoding="utf-8")
    environment = yaml.safe_dump(provenance.environment(), sort_keys=False)
    (folder / "environment.yaml").write_text(environment, encoding="utf-8")

    entries = _with_defaults(entries, model)
    facts = {
        "network": f"Segment Anything with the encoder {model.architecture}",
        "canvas": f"{model.source['image_size']} pixels (longer side of the image after scaling)",
        "automatic segmentation": "yes" if model.source["has_decoder"] else "no",
        "licence": entries["license"] or "not stated", "written by": f"micro_sam {__version__}",
    }
    text = provenance.documentation(text, entries["name"], entries["description"], spec, facts)
    (folder / "documentation.md").write_text(text, encoding="utf-8")
    if covers is None:
        covers = [folder / "cover.jpeg"]
        _cover(model.adaptor, example).save(covers[0], quality=90)
    attachments = []
    if attach_decoder and model.source["has_decoder"]:
        attachments.append(folder / f"{model.architecture}_decoder.pt")
        save_checkpoint(model.weights["decoder_state"], attachments[0])
    entries |= {
        "documentation": file_entry(folder / "documentation.md"), "covers": [file_entry(path) for path in covers],
        "attachments": [file_entry(path) for path in attachments],
    }
    return description_content(
        folder, inputs, outputs, weights=weights, model_type=model.architecture,
        torch_version=torch.__version__.partition("+")[0], config=model.source, entries=entries,
    )


def _with_defaults(entries: Mapping[str, Any], model: _Model) -> dict[str, Any]:
    spec = model.spec
    purpose = f" for {spec.purpose}" if spec is not None and spec.purpose else ""
    defaults = {
        "license": None if spec is None else spec.licence,
        "description": f"Segment Anything ({model.architecture}){purpose}.",
        "authors": provenance.default_authors(spec),
        "cite": provenance.citations(model.architecture, spec),
        "tags": provenance.default_tags(spec),
    }
    entries = {key: defaults.get(key) if value is None else value for key, value in entries.items()}
    for key, consequence in (("license", "nobody may use the model"), ("authors", "nobody is named as author")):
        if not entries[key]:
            logger.warning("The package states no %s, so %s. Pass %s.", key, consequence, key)
    return entries


def _cover(adaptor: PredictorAdaptor, example: Mapping[str, np.ndarray]):
    image = torch.from_numpy(example["image"])
    instances = adaptor.instance_labels(image) if adaptor.has_decoder else None
    pixels = np.ascontiguousarray(example["image"][0].transpose(1, 2, 0))
    return provenance.cover_picture(pixels, example["masks"][0, 0, 0], example["box_prompts"][0, 0], instances)


_PROMPTS = (("box_prompts",), ("point_prompts", "point_labels"), ("mask_prompts",))
# No prompts at all comes first: the embedding is then computed, not passed along.
_COMBINATIONS = [
    tuple(itertools.chain(*chosen)) for n in range(len(_PROMPTS) + 1) for chosen in itertools.combinations(_PROMPTS, n)
]
_MISMATCHES = 1e-4  # fraction of the pixels of the masks


def _checks(description: Any, example: Mapping[str, np.ndarray]):
    """Run a package with each combination of prompts; yields after each of them.

    Raises:
        ModelError: If the outputs are not as described.
    """
    core = load_bioimageio()[1]
    axes = {row.id: row.axes for row in description.inputs}
    shape = example["image"].shape[2:]
    with closing_files():
        pipeline = core.create_prediction_pipeline(description, devices=["cpu"], weight_format="pytorch_state_dict")
    with contextlib.closing(pipeline):  # entering the pipeline itself would load the weights once more
        for names in _COMBINATIONS:
            used = ("image", *names, *(("embeddings",) if len(names) == len(_COMBINATIONS[-1]) else ()))
            members = {n: core.Tensor.from_numpy(example[n].copy(), dims=axes[n]) for n in used}
            found = pipeline.predict_sample_without_blocking(core.Sample(members=members, stat={}, id="example"))
            masks, scores = (found.members[n].to_numpy() for n in ("masks", "scores"))
            expected = example["masks"].shape if names else (*masks.shape[:3], *shape)
            problem = None
            if masks.shape != expected or scores.shape != masks.shape[:3]:
                problem = f"masks of shape {masks.shape} and scores of shape {scores.shape}"
            elif "embeddings" in used:
                different = (masks != example["masks"]).mean()
                if different > _MISMATCHES or not np.allclose(scores, example["scores"], rtol=1e-3, atol=1e-3):
                    problem = f"other masks ({different:.2%} of the pixels) or scores than the model"
            if problem is not None:
                raise ModelError(
                    f"The package was not written, because it gives {problem} for "
                    f"{' and '.join(names) or 'no prompts'}. Please report this with the model that you export."
                )
            yield
