"""The command `micro_sam.automatic_segmentation`: images, volumes and time series in, labels and tracks out."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import EmbeddingMismatchError, InvalidInputError
from ._blocks import add_cluster_options, cluster, segment_result, uses_blocks
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
        "Segment the objects in one or more images or volumes, or track those in time series. All options of the "
        "chosen mode can be given as well, for example --min_size 50 or --points_per_side=16; see doc/cli.md.",
        EXIT_CODES,
    )
    parser.add_argument(
        "-i", "--input_path", nargs="+", required=True, metavar="PATH",
        help="images (tif, png, jpg, OME-Zarr, zarr, hdf5, mrc, czi …), folders, or patterns such as 'data/*.tif'",
    )
    parser.add_argument(
        "-o", "--output_path", required=True, metavar="PATH",
        help="the label image (.tif, .zarr or .ome.zarr; .tif is appended if missing); for several images, and for "
        "tracks, a folder",
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
    parser.add_argument(
        "--annotate", action="store_true", help="correct the labels of each image in napari before they are written"
    )
    volumes = parser.add_argument_group("volumes and time series")
    volumes.add_argument("--tracking", action="store_true", help="track objects over time; writes CTC files")
    volumes.add_argument(
        "--gap_closing", type=int, metavar="N", help="close gaps of objects in up to 2 N planes or frames"
    )
    volumes.add_argument("--min_z_extent", type=int, metavar="N", help="volumes: remove objects in fewer planes")
    volumes.add_argument("--beta", type=float, help="volumes: above 0.5 objects merge more readily, below less")
    volumes.add_argument(
        "--neck_penalty", type=float, metavar="X", help="volumes: how strongly necks separate objects; default: 10"
    )
    volumes.add_argument("--min_time_extent", type=int, metavar="N", help="tracking: remove tracks in fewer frames")
    volumes.add_argument(
        "--tracking_mode", choices=("greedy", "greedy_nodiv", "ilp"), default="greedy",
        help="with divisions, without, or the best solution over all frames; default: greedy",
    )
    volumes.add_argument(
        "--tracking_model", default="general_2d", metavar="NAME",
        help="a model of trackastra, the folder of one, or a linker that needs no model; see doc/cli.md",
    )
    add_input_options(parser)
    add_model_options(parser, "vit_b_lm if it was downloaded before, else vit_t_lite, which comes with the package")
    add_cluster_options(parser, with_blocks=True)
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
        if args.tracking:
            return [first], [_without_suffix(output)], [embeddings]
        if args.output_path.endswith(("/", "\\")) or (output.is_dir() and not is_zarr(output)):
            output = output / f"{label_stem(first)}{_FORMATS[args.output_format]}"
        output = label_path(output)
        # Labels may go into an OME-Zarr image, next to the pixels.
        if output.resolve() == first.resolve() and not output.name.lower().endswith(".ome.zarr"):
            raise InvalidInputError(f"The labels would replace the image {first} itself. Choose another output.")
        return [first], [output], [embeddings]
    if len(args.input_path) == 1 and first.is_dir() and args.key is not None and has_pattern(args.key):  # one stack
        return [first], [_without_suffix(output) if args.tracking else label_path(output)], [embeddings]
    inputs = find_inputs(args.input_path, args.pattern, args.recursive)
    images = [f.path for f in inputs]
    if output.is_file():
        raise InvalidInputError(f"For several images the output must be a folder, but {output} is a file.")
    folder = output.with_suffix("") if output.suffix in (".tif", ".tiff") else output
    outputs = name_outputs(inputs, folder, "" if args.tracking else _FORMATS[args.output_format])
    same = {p.resolve() for p in images} & {p.resolve() for p in outputs}
    if same:
        raise InvalidInputError(f"The labels of {min(same)} would replace the image itself. Choose another folder.")
    if embeddings is None:
        return images, outputs, [None] * len(inputs)
    folder = embeddings.with_suffix("") if embeddings.suffix == ".zarr" else embeddings
    return images, outputs, list(name_outputs(inputs, folder, ".zarr"))


def _without_suffix(folder: Path) -> Path:
    """The folder for tracks, whose name is not that of a file."""
    from ..core.output import LABEL_SUFFIXES
    return folder.with_suffix("") if folder.suffix.lower() in LABEL_SUFFIXES else folder


def _open(args: argparse.Namespace, result: Result) -> Any:
    """Open an image and check what can be checked before the work."""
    from ..core.image import open_image
    from ..core.output import prepare_folder
    from ..volume.images import split_options

    image = open_image(result.input, **{**input_choice(args), **({"ndim": 3} if args.tracking else {})})
    if not args.tracking:
        split_options(_volume_options(args), image.ndim)
    prepare_folder(Path(result.output))
    result.shape = list(image.data.shape)
    return image


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything is imported or opened."""
    if args.annotate and args.tracking:
        raise InvalidInputError(
            "--annotate is for images and volumes. Correct tracks in micro_sam.annotator_tracking, which imports them."
        )
    misplaced = ("min_z_extent", "beta", "neck_penalty") if args.tracking else ("min_time_extent",)
    for name in misplaced:
        if getattr(args, name) is not None:
            raise InvalidInputError(f"--{name} is for {'volumes' if args.tracking else 'tracking'}. Leave it out.")
    if args.batch_size < 1:
        raise InvalidInputError(f"--batch_size must be a positive integer, but is {args.batch_size}.")
    if args.halo is not None and parse_tile_shape(args.tile_shape, None) is None:
        raise InvalidInputError("--halo belongs to tiles. Pass --tile_shape as well, or leave out --halo.")


def _volume_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options for volumes that were given."""
    given = {name: getattr(args, name) for name in ("gap_closing", "min_z_extent", "beta", "neck_penalty")}
    return {name: value for name, value in given.items() if value is not None}


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
    blocks = uses_blocks(args)
    # Published models keep what they always did, unless the user asks for tiles.
    tile_shape = parse_tile_shape(args.tile_shape, "default")
    paths, outputs, embedding_paths = _paths(args)
    console = Console(args)

    from ..segmentation.workflow import find_model, load_model, plan_image, resolve_model

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
    if blocks:
        report.model = {"name": model_name, "checkpoint": args.checkpoint, "mode": args.mode}
        with cluster(args, console) as client:
            return run_files(results, lambda n, result: segment_result(
                client, result, model_name, options, _volume_options(args), args, console, report
            ), report, console)
    model = load_model(model_name, args.checkpoint, args.device, args.mode, args.precision)
    report.model = {"name": model_name, "checkpoint": args.checkpoint, "mode": model.mode}

    def work(n: int, result: Result) -> str:
        image = _open(args, result)
        name = None if spec is None else spec.name
        plan = plan_image(model, image.shape[-2:], tile_shape, args.halo, options, name, embedding_paths[n])
        run = _track if args.tracking else _segment
        return run(plan, image, result, embedding_paths[n], args, console, report)

    return run_files(results, work, report, console)


def _segment(
    plan: Any, image: Any, result: Result, embedding_path: Path | None, args: argparse.Namespace, console: Console,
    report: Report,
) -> str:
    """Segment one image or volume, write the labels, and return what to say about it."""
    from ..automatic_segmentation import describe_stack
    from ..core.output import is_done
    from ..volume.images import image_settings, image_steps

    output, of_volume = Path(result.output), _volume_options(args)
    settings = image_settings(plan.model.predictor, plan.segmenter, image, of_volume, plan.work)
    report.model["hash"] = settings["model_hash"]
    if is_done(output, settings, args.overwrite, args.label_name):
        result.status = "skipped"
        return f"{image.name}: nothing to do, {output} was made with the same settings"
    if note := describe_stack(image):
        console.say(note)
    _warn_of_memory(plan, image, embedding_path is not None)
    labels = _drain(plan.work, args, console, lambda work: image_steps(
        plan.model.predictor, plan.segmenter, image, of_volume, work, embedding_path=embedding_path,
        batch_size=args.batch_size,
    ))[0]
    target = _correct_and_write(plan, image, labels, output, settings, args)
    result.output, result.n_objects = str(target), _count(labels)
    return f"{image.name}: {result.n_objects} objects -> {target}"


def _correct_and_write(
    plan: Any, image: Any, labels: Any, output: Path, settings: Any, args: argparse.Namespace
) -> Path:
    """Write labels; with `--annotate` the user corrects them first."""
    from ..core.output import write_labels

    def write(final: Any) -> Path:
        return write_labels(output, final, settings, scale=image.scale, name=args.label_name)

    if not args.annotate:
        return write(labels)
    from ..automatic_segmentation import automatic_path, find_correction
    correct_labels = find_correction()
    write_labels(automatic_path(output), labels, settings, scale=image.scale)
    correct_labels(image.data, labels, plan.model, write, has_channels=image.has_channels, name=image.name)
    return output


def _track(
    plan: Any, image: Any, result: Result, embedding_path: Path | None, args: argparse.Namespace, console: Console,
    report: Report,
) -> str:
    """Track the objects of one time series, write CTC files, and return what to say about it."""
    from ..core.output import is_same, write_json
    from ..segmentation.workflow import output_settings
    from ..tracking.ctc import RECORD_NAME
    from ..tracking.linking import get_linker
    from ..tracking.motile_linker import MotileLinker
    from ..tracking.workflow import automatic_tracking_steps

    output = Path(result.output)
    linker = get_linker(args.tracking_model, args.tracking_mode, plan.model.predictor.device)
    # Who links, not who was asked to: the record must tell when another one has become available.
    tracking_model = linker.name if isinstance(linker, MotileLinker) else args.tracking_model
    settings = output_settings(plan.model.predictor, plan.segmenter, image.data, **plan.work)
    settings["tracking"] = {name: getattr(args, name) for name in ("gap_closing", "min_time_extent", "tracking_mode")}
    settings["tracking"]["tracking_model"] = tracking_model
    report.model["hash"] = settings["model_hash"]
    if not args.overwrite and is_same(output / RECORD_NAME, settings):
        result.status = "skipped"
        return f"{image.name}: nothing to do, {output} was made with the same settings"
    _, forest, _ = _drain(plan.work, args, console, lambda work: automatic_tracking_steps(
        image.data, plan.model.predictor, plan.segmenter, embedding_path=embedding_path, gap_closing=args.gap_closing,
        min_time_extent=args.min_time_extent, mode=args.tracking_mode, tracking_model=tracking_model,
        batch_size=args.batch_size, output_folder=output, overwrite=args.overwrite, **work,
    ))
    write_json(output / RECORD_NAME, {"micro_sam": {"settings": settings}})
    result.n_objects = len(forest)
    return f"{image.name}: {result.n_objects} tracks -> {output}"


def _drain(work: dict[str, Any], args: argparse.Namespace, console: Console, start: Callable[[dict], Any]) -> Any:
    """Run the steps that `start` makes; embeddings of other settings are replaced only with `--overwrite`."""
    from ..core.progress import drain

    try:
        return drain(start(work), verbose=console.show_bars)
    except EmbeddingMismatchError:
        if not args.overwrite:
            raise
        options = {**(work["embedding_options"] or {}), "overwrite": True}
        return drain(start({**work, "embedding_options": options}), verbose=console.show_bars)


def _warn_of_memory(plan: Any, image: Any, on_disk: bool) -> None:
    import psutil

    from ..segmentation.workflow import estimate_memory

    needed, free = estimate_memory(plan, image.shape[-2:], on_disk), psutil.virtual_memory().available
    if image.ndim == 3:
        needed += 8 * math.prod(image.shape)
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
