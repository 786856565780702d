"""The command `micro_sam.automatic_segmentation`: images in, label images out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import EmbeddingMismatchError, InvalidInputError, UnsupportedError
from ._common import (
    EXIT_CODES,
    Console,
    Parser,
    Report,
    Result,
    add_input_options,
    add_model_options,
    add_run_options,
    input_choice,
    note_first_usable,
    parse_extra,
    parse_tile_shape,
    run_command,
    run_files,
)

_FORMATS = {"tif": ".tif", "zarr": ".zarr", "ome-zarr": ".ome.zarr"}


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "Segment the objects in one or more images. All options of the chosen mode can be given as well, for example "
        "--min_size 50 or --points_per_side=16; see doc/cli.md.", EXIT_CODES,
    )
    parser.add_argument(
        "-i", "--input_path", nargs="+", required=True, metavar="PATH",
        help="images (tif, png, jpg, OME-Zarr, zarr, hdf5, mrc, czi …), folders, or patterns such as 'data/*.tif'",
    )
    parser.add_argument(
        "-o", "--output_path", required=True, metavar="PATH",
        help="the label image (.tif, .zarr or .ome.zarr; .tif is appended if missing); for several images a folder",
    )
    parser.add_argument(
        "-e", "--embedding_path", metavar="PATH", help="keep the embeddings here (zarr); for several images a folder"
    )
    parser.add_argument(
        "--mode", default="auto", choices=("auto", "ais", "apg", "amg"), type=str.lower,
        help="ais and apg need a model with decoder; auto takes ais if there is one, else amg",
    )
    parser.add_argument(
        "--output_format", choices=tuple(_FORMATS), default="tif", help="format for several images; default: tif"
    )
    parser.add_argument(
        "--label_name", default="segmentation", help="name of the labels if the output is an existing OME-Zarr image"
    )
    parser.add_argument("--annotate", action="store_true", help="not part of this version yet")
    parser.add_argument("--tracking", action="store_true", help="not part of this version yet")
    add_input_options(parser)
    add_model_options(parser, "vit_b_lm if it was downloaded before, else vit_t_lite, which comes with the package")
    add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = get_parser()
    args, extra = parser.parse_known_args(argv)
    return run_command(lambda: _run(parser, args, extra), args.verbose)


def _paths(args: argparse.Namespace) -> tuple[list[Path], list[Path], list[Path | None]]:
    """Inputs, outputs and embeddings."""
    from ..core.inputs import find_inputs, has_pattern, name_outputs
    from ..core.output import label_path, label_stem
    from ..core.readers import is_zarr

    first = Path(args.input_path[0]).expanduser()
    output, embeddings = Path(args.output_path).expanduser(), args.embedding_path
    embeddings = None if embeddings is None else Path(embeddings).expanduser()
    if len(args.input_path) == 1 and first.exists() and (not first.is_dir() or is_zarr(first)):
        if args.pattern is not None:
            raise InvalidInputError(f"--pattern selects files of a folder, but {first} is none.")
        if args.output_path.endswith(("/", "\\")) or (output.is_dir() and not is_zarr(output)):
            output = output / f"{label_stem(first)}{_FORMATS[args.output_format]}"
        output = label_path(output)
        # Labels may go into an OME-Zarr image, next to the pixels.
        if output.resolve() == first.resolve() and not output.name.lower().endswith(".ome.zarr"):
            raise InvalidInputError(f"The labels would replace the image {first} itself. Choose another output.")
        return [first], [output], [embeddings]
    if len(args.input_path) == 1 and first.is_dir() and args.key is not None and has_pattern(args.key):
        raise UnsupportedError(
            f"The folder {first} with the key {args.key!r} is a stack, and volumes are not part of this version yet. "
            f"To segment its images one by one, pass --pattern {args.key!r} instead of the key."
        )
    inputs = find_inputs(args.input_path, args.pattern, args.recursive)
    images = [f.path for f in inputs]
    if output.is_file():
        raise InvalidInputError(f"For several images the output must be a folder, but {output} is a file.")
    folder = output.with_suffix("") if output.suffix in (".tif", ".tiff") else output
    outputs = name_outputs(inputs, folder, _FORMATS[args.output_format])
    same = {p.resolve() for p in images} & {p.resolve() for p in outputs}
    if same:
        raise InvalidInputError(f"The labels of {min(same)} would replace the image itself. Choose another folder.")
    if embeddings is None:
        return images, outputs, [None] * len(inputs)
    folder = embeddings.with_suffix("") if embeddings.suffix == ".zarr" else embeddings
    return images, outputs, list(name_outputs(inputs, folder, ".zarr"))


def _open(args: argparse.Namespace, result: Result) -> Any:
    """Open an image and check what can be checked before the work."""
    from ..automatic_segmentation import check_2d
    from ..core.image import open_image
    from ..core.output import prepare_folder

    image = open_image(result.input, **input_choice(args))
    check_2d(image)
    prepare_folder(Path(result.output))
    result.shape = list(image.data.shape)
    return image


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything is imported or opened."""
    for name in ("tracking", "annotate"):
        if getattr(args, name):
            raise UnsupportedError(
                f"--{name} is not part of this version yet. Automatic segmentation of 2D images works: leave it out."
            )
    if args.batch_size < 1:
        raise InvalidInputError(f"--batch_size must be a positive integer, but is {args.batch_size}.")
    if args.halo is not None and parse_tile_shape(args.tile_shape, None) is None:
        raise InvalidInputError("--halo belongs to tiles. Pass --tile_shape as well, or leave out --halo.")


def _parse_options(parser: Parser, args: argparse.Namespace, extra: Sequence[str], spec: Any) -> dict[str, Any]:
    """The options of the mode; if only the checkpoint knows the mode, those of all modes."""
    from ..segmentation.factory import SEGMENTER_CLASSES
    from ..segmentation.settings import generate_options, init_options

    if args.mode != "auto":
        modes = [args.mode]
    elif spec is not None and spec.path is None:
        modes = ["ais" if spec.has_decoder else "amg"]
    else:
        modes = list(SEGMENTER_CLASSES)
    known = {
        name: parameter for mode in modes for tiled in (False, True)
        for name, parameter in {**init_options(mode, tiled), **generate_options(mode, tiled)}.items()
    }
    own = [action.option_strings[-1].lstrip("-") for action in parser._actions]
    # Tiles and batches have options of their own.
    return parse_extra(extra, {name: p for name, p in known.items() if name not in own}, own)


def _run(parser: Parser, args: argparse.Namespace, extra: Sequence[str]) -> int:
    _check_arguments(args)
    # Published models keep what they always did, unless the user asks for tiles.
    tile_shape = parse_tile_shape(args.tile_shape, "default")
    paths, outputs, embedding_paths = _paths(args)
    console = Console(args)

    from ..segmentation.workflow import find_model, load_model, output_settings, plan_image, resolve_model

    model_name = resolve_model(args.model_type, args.checkpoint)
    spec = find_model(model_name, args.checkpoint, args.mode)
    options = _parse_options(parser, args, extra, spec)
    if tile_shape == "default":
        tile_shape = "auto" if spec is not None and spec.resource is not None else None

    results = [Result(str(p), str(o)) for p, o in zip(paths, outputs)]
    report = Report("automatic_segmentation", {**vars(args), "options": options})
    if not note_first_usable(results, lambda result: _open(args, result), console):
        return run_files(results, lambda n, r: "", report, console)
    if args.model_type is None and args.checkpoint is None:
        console.say(f"Model: {model_name} (choose another one with -m, see micro_sam.info)")
    model = load_model(model_name, args.checkpoint, args.device, args.mode)
    report.model = {"name": model_name, "checkpoint": args.checkpoint, "mode": model.mode}

    def work(n: int, result: Result) -> str:
        from ..core.output import is_done, write_labels

        image, output = _open(args, result), Path(result.output)
        plan = plan_image(model, image.shape, tile_shape, args.halo, options, None if spec is None else spec.name)
        data = image.data if plan.work["tile_shape"] is not None else image.read()
        settings = output_settings(plan.model.predictor, plan.segmenter, data, **plan.work)
        report.model["hash"] = settings["model_hash"]
        if is_done(output, settings, args.overwrite, args.label_name):
            result.status = "skipped"
            return f"{image.name}: nothing to do, {output} was made with the same settings"
        _warn_of_memory(plan, image, embedding_paths[n] is not None)
        labels = _segment(plan, data, embedding_paths[n], args, console)
        target = write_labels(output, labels, settings, scale=image.scale, name=args.label_name)
        result.output, result.n_objects = str(target), _count(labels)
        return f"{image.name}: {result.n_objects} objects -> {target}"

    return run_files(results, work, report, console)


def _segment(plan: Any, data: Any, embedding_path: Path | None, args: argparse.Namespace, console: Console) -> Any:
    """Segment one image; embeddings of other settings are replaced only with `--overwrite`."""
    from ..core.progress import drain
    from ..segmentation.workflow import segmentation_steps

    def run(**more: Any) -> Any:
        work = {**plan.work, "embedding_options": {**(plan.work["embedding_options"] or {}), **more}}
        steps = segmentation_steps(
            plan.model.predictor, plan.segmenter, data, embedding_path=embedding_path, batch_size=args.batch_size,
            **work,
        )
        return drain(steps, verbose=console.show_bars)[0]

    try:
        return run()
    except EmbeddingMismatchError:
        if not args.overwrite:
            raise
        return run(overwrite=True)


def _warn_of_memory(plan: Any, image: Any, on_disk: bool) -> None:
    import psutil

    from ..segmentation.workflow import estimate_memory

    needed, free = estimate_memory(plan, image.shape, on_disk), psutil.virtual_memory().available
    if needed > free:
        remedy = "Choose a lower resolution (--level)" if on_disk else "Keep the embeddings on disk (-e)"
        print(
            f"warning: {image.name} needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free. "
            f"{remedy}, or free some memory.", file=sys.stderr, flush=True,
        )


def _count(labels) -> int:
    import numpy as np
    return int((np.unique(labels) != 0).sum())


if __name__ == "__main__":
    sys.exit(main())
