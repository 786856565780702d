"""The command `micro_sam.precompute_embeddings`: embeddings, and segmentation states, for later annotation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import EmbeddingMismatchError, InvalidInputError
from ._blocks import add_cluster_options, check_cluster_options, cluster
from ._common import (
    Console,
    Parser,
    Report,
    Result,
    add_input_options,
    add_model_options,
    add_run_options,
    input_choice,
    note_first_usable,
    parse_tile_shape,
    run_command,
    run_files,
)


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("Compute the embeddings of images or stacks (volumes, time series) and keep them in zarr folders.")
    parser.add_argument(
        "-i", "--input_path", required=True, metavar="PATH",
        help="an image or stack, a folder, or a quoted pattern; a folder with a pattern as --key is one stack",
    )
    parser.add_argument(
        "-e", "--embedding_path", required=True, metavar="PATH",
        help="the zarr folder (.zarr is appended if missing); for several images the folder for them",
    )
    parser.add_argument(
        "-p", "--precompute_amg_state", action="store_true",
        help="compute the segmentation state as well: of the decoder if the model has one, else of the mask generator",
    )
    add_input_options(parser)
    add_model_options(parser, "vit_b_lm")
    add_cluster_options(parser, with_blocks=False)
    add_run_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _run(args), args.verbose)


def _run(args: argparse.Namespace) -> int:
    tile_shape = parse_tile_shape(args.tile_shape, None)
    if tile_shape == "auto":
        raise InvalidInputError("--tile_shape auto is for segmentation. Pass two integers (Y X), or leave it out.")
    if args.halo is not None and tile_shape is None:
        raise InvalidInputError("--halo belongs to tiles. Pass --tile_shape as well, or leave out --halo.")
    if args.batch_size < 1:
        raise InvalidInputError(f"--batch_size must be a positive integer, but is {args.batch_size}.")
    check_cluster_options(args)
    if args.scheduler is not None and args.precompute_amg_state:
        raise InvalidInputError("--precompute_amg_state is not for clusters. Leave it out, or leave out --scheduler.")

    from ..core.image import open_image
    from ..core.output import prepare_folder
    from ..models.specs import DEFAULT_MODEL
    from ..precompute_state import precompute_steps, store_paths

    inputs, stores = store_paths(args.input_path, args.embedding_path, args.pattern, args.key, args.recursive)
    console = Console(args)

    from ..core.progress import drain
    from ..segmentation.workflow import find_model, load_model

    # A checkpoint tells its architecture itself.
    name = args.model_type or (None if args.checkpoint else DEFAULT_MODEL)
    find_model(name, args.checkpoint, None)
    results = [Result(str(file.path), str(store)) for file, store in zip(inputs, stores)]
    report = Report("precompute_embeddings", vars(args))

    def open_(result: Result):
        image = open_image(result.input, **input_choice(args))
        prepare_folder(Path(result.output))
        result.shape = list(image.data.shape)
        return image

    if not note_first_usable(results, open_, console):
        return run_files(results, lambda n, r: "", report, console)
    if args.scheduler is not None:
        report.model = {"name": name, "checkpoint": args.checkpoint}
        with cluster(args, console) as client:
            return run_files(
                results,
                lambda n, result: _run_on_cluster(client, open_(result), result, name, tile_shape, args, console),
                report, console,
            )
    model = load_model(name, args.checkpoint, args.device, precision=args.precision)
    report.model = {"name": name, "checkpoint": args.checkpoint, "hash": model.predictor._hash}

    def work(n: int, result: Result) -> str:
        image = open_(result)

        def steps(overwrite: bool):
            return precompute_steps(
                model, image, result.output, tile_shape=tile_shape, halo=args.halo,
                with_state=args.precompute_amg_state, batch_size=args.batch_size, overwrite=overwrite,
            )

        try:
            drain(steps(False), verbose=console.show_bars)
        except EmbeddingMismatchError:
            if not args.overwrite:
                raise
            drain(steps(True), verbose=console.show_bars)
        return f"{result.input}: {image.axes} {tuple(image.data.shape)} -> {result.output}"

    return run_files(results, work, report, console)


def _run_on_cluster(
    client: Any, image: Any, result: Result, name: str | None, tile_shape: Any, args: argparse.Namespace,
    console: Console,
) -> str:
    from ..distributed import precompute_embeddings

    choice = {key: value for key, value in input_choice(args).items() if value is not None}
    precompute_embeddings(
        client, result.input, result.output, name, checkpoint=args.checkpoint, precision=args.precision,
        tile_shape=tile_shape, halo=args.halo, batch_size=args.batch_size, image_options=choice,
        overwrite=args.overwrite, verbose=console.show_bars,
    )
    return f"{result.input}: {image.axes} {tuple(image.data.shape)} -> {result.output}"


if __name__ == "__main__":
    sys.exit(main())
