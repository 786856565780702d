"""Options for work in blocks and on clusters, shared by the commands."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInputError
from ._common import Console, Report, Result, input_choice


def add_cluster_options(parser: argparse.ArgumentParser, with_blocks: bool) -> None:
    """Add the options; `with_blocks` also those that choose blocks."""
    group = parser.add_argument_group("blocks and clusters")
    if with_blocks:
        group.add_argument(
            "--block_shape", type=int, nargs=2, metavar=("Y", "X"),
            help="segment block by block, with the memory of one block, to .zarr; default with --scheduler: 2048 2048",
        )
        group.add_argument(
            "--block_halo", type=int, nargs=2, metavar=("Y", "X"),
            help="pixels that blocks see beyond their border, half of a large object; default: 128 128",
        )
    group.add_argument(
        "--scheduler", metavar="NAME", help="work on a cluster: local, slurm, lsf or the address tcp://… of a scheduler"
    )
    group.add_argument("--workers", type=int, metavar="N", help="number of workers or jobs that are started")
    group.add_argument(
        "--job_option", action="append", default=[], metavar="NAME=VALUE",
        help="option of the jobs of slurm or lsf, for example walltime=04:00:00; may be repeated",
    )


def check_cluster_options(args: argparse.Namespace) -> None:
    """Raise `InvalidInputError` if an option of clusters was given without one."""
    for name in ("workers", "job_option"):
        if args.scheduler is None and getattr(args, name):
            raise InvalidInputError(f"--{name} belongs to a cluster. Pass --scheduler as well, or leave it out.")


def uses_blocks(args: argparse.Namespace) -> bool:
    """Whether to work block by block.

    Raises:
        InvalidInputError: If an option lacks another one, or does not go with blocks.
    """
    check_cluster_options(args)
    blocks = args.scheduler is not None or args.block_shape is not None
    if not blocks and args.block_halo is not None:
        raise InvalidInputError("--block_halo belongs to blocks. Pass --block_shape as well, or leave it out.")
    if blocks:
        for name in ("tile_shape", "halo", "embedding_path", "annotate"):
            if getattr(args, name):
                raise InvalidInputError(
                    f"--{name} is not for work in blocks, which choose their own tiles and keep no embeddings. Leave "
                    "it out, or leave out --block_shape and --scheduler."
                )
        if args.tracking and args.scheduler is None:
            raise InvalidInputError("Tracking in blocks needs --scheduler, for example --scheduler local.")
    return blocks


@contextlib.contextmanager
def cluster(args: argparse.Namespace, console: Console) -> Iterator[Any]:
    """Give a client of the chosen cluster; None if the work is done in this process."""
    if args.scheduler is None:
        yield None
        return
    from ..distributed import connect

    options = {}
    for text in args.job_option:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise InvalidInputError(f"--job_option takes NAME=VALUE, for example memory=32GB, but got {text!r}.")
        options[name] = int(value) if value.isdigit() else value
    with connect(args.scheduler, args.workers, job_options=options) as client:
        console.say(f"Cluster: {args.scheduler}; dashboard: {client.dashboard_link}")
        yield client


def segment_result(
    client: Any, result: Result, model_name: str | None, options: dict[str, Any], volume_options: dict[str, Any],
    args: argparse.Namespace, console: Console, report: Report,
) -> str:
    """Segment or track one image block by block, and return what to say about it."""
    from ..blockwise.workflow import BLOCK_SHAPE, HALO, check_output_path, segment_blockwise

    choice = {name: value for name, value in input_choice(args).items() if value is not None}
    work = {
        "block_shape": args.block_shape or BLOCK_SHAPE, "halo": args.block_halo or HALO, "checkpoint": args.checkpoint,
        "device": args.device, "precision": args.precision, "overwrite": args.overwrite, "verbose": console.show_bars,
        "image_options": choice, **options,
    }
    if args.tracking:
        from ..distributed import track
        _, lineages = track(
            client, result.input, result.output, model_name, args.mode, gap_closing=args.gap_closing,
            min_time_extent=args.min_time_extent, tracking_mode=args.tracking_mode, tracking_model=args.tracking_model,
            **work,
        )
        result.n_objects = len({i for lineage in lineages for i in lineage})
        return f"{result.input}: {result.n_objects} tracks -> {result.output}"
    engine = None
    if client is not None:
        from ..distributed import DaskEngine
        engine = DaskEngine(client)
    labels = segment_blockwise(
        result.input, check_output_path(Path(result.output)), model_name, args.mode, engine=engine, **volume_options,
        **work,
    )
    record = labels.attrs["micro_sam"]
    report.model["hash"] = record["settings"]["model_hash"]
    result.n_objects = record["n_objects"]
    return f"{result.input}: {result.n_objects} objects -> {result.output}"
