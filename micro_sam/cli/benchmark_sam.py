"""The command `micro_sam.benchmark_sam`: a model on public datasets, or on own ones."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.errors import InvalidInputError
from ._common import FAILED, INTERRUPTED, OK, Console, Parser, print_error, run_command

_MODES = ("ais", "apg", "amg")
_RETAINED = ("data", "crops", "automatic", "interactive")
_METHODS = ("all", "automatic", "interactive")
_STATUS = {
    "there": "is there", "archive": "will be unpacked", "download": "will be downloaded",
    "missing": "has to be placed by hand",
}


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "Score a model on public datasets, which are downloaded where possible, or on own images with labels: "
        "automatic segmentation, and prompts from the ground truth that are corrected (images) or followed (volumes). "
        "See doc/evaluation.md.",
        "exit codes: 0 all done; 1 at least one dataset could not be evaluated; 2 the command cannot be run as given "
        "(options, unknown model or dataset); 3 the model or the device cannot be used; 130 stopped with Ctrl-C, and "
        "the same command goes on",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "-i", "--input_folder", required=True, metavar="FOLDER",
        help="folder of the datasets, each in a folder of its name; they are downloaded to there",
    )
    group.add_argument(
        "-d", "--dataset_choice", nargs="+", metavar="NAME",
        help="which datasets; default: the own ones, or else all; --dry_run lists them",
    )
    group.add_argument(
        "--own", nargs=3, action="append", default=[], metavar=("NAME", "IMAGES", "LABELS"),
        help="an own dataset: a name, a file, folder or pattern of images, and one of labels; may be repeated",
    )
    group.add_argument("--image_key", help="name of the image in own hdf5 or zarr files")
    group.add_argument("--label_key", help="name of the labels in own hdf5 or zarr files")
    group.add_argument("--no_download", action="store_true", help="use only what is there already")
    group.add_argument(
        "--dry_run", action="store_true", help="list which datasets are there and which are missing, and stop"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model_type",
        help="name of the model, see micro_sam.info; default: vit_b_lm if it was downloaded before, else vit_t_lite",
    )
    group.add_argument(
        "-c", "--checkpoint_path", "--checkpoint", metavar="FILE", help="a checkpoint, instead of a published model"
    )
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the best one")
    _add_run_options(parser)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "-o", "--output_folder", metavar="FOLDER", help="where to write; default: benchmark in the input folder"
    )
    group.add_argument(
        "--evaluate", choices=_METHODS, default="all", help="what to evaluate; default: all"
    )
    group.add_argument(
        "--segmentation_mode", choices=_MODES,
        help="a further automatic mode, beside ais (or amg for models without decoder)",
    )
    group.add_argument(
        "--amg", dest="segmentation_mode", action="store_const", const="amg", help="the same as --segmentation_mode amg"
    )
    group.add_argument(
        "--retain", nargs="+", choices=_RETAINED, metavar="WHAT",
        help=f"what to keep beside the results: {', '.join(_RETAINED)}; data are removed only if this run downloaded "
        "them",
    )
    group.add_argument(
        "--n_crops", type=int, default=10, metavar="N", help="parts to look at per image or volume; default: 10"
    )
    group.add_argument(
        "--n_iterations", type=int, default=8, metavar="N",
        help="predictions per object in images: the first one, and those after corrections; default: 8",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace results of another model or of other data"
    )
    group.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write a JSON report; without FILE to the standard output"
    )
    group.add_argument("-v", "--verbose", action="store_true", help="show progress bars, news and tracebacks of errors")
    group.add_argument("--version", action="version", version=__version__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _run(args), args.verbose)


def _run(args: argparse.Namespace) -> int:
    from ..evaluation.benchmark_catalogue import choose_datasets, own_dataset

    if not args.own and (args.image_key or args.label_key):
        raise InvalidInputError("--image_key and --label_key are for own datasets. Pass --own as well.")
    for name in ("n_crops", "n_iterations"):
        if getattr(args, name) < 1:
            raise InvalidInputError(f"--{name} must be a positive integer, but is {getattr(args, name)}.")
    console = Console(args)
    report: dict[str, Any] = {"command": "benchmark_sam", "version": __version__, "arguments": vars(args)}
    own = [own_dataset(*row, image_key=args.image_key, label_key=args.label_key) for row in args.own]
    rows = choose_datasets(args.dataset_choice, own)
    code = INTERRUPTED
    try:
        code = _list(rows, args, console, report) if args.dry_run else _benchmark(rows, own, args, console, report)
    finally:
        _write_report(args.json, report, code)
    return code


def _list(rows: Sequence[Any], args: argparse.Namespace, console: Console, report: dict[str, Any]) -> int:
    """Say of each dataset whether it is there, and of the others what has to be placed where."""
    from ..evaluation.benchmark_catalogue import describe_source, find_status

    found = {row.name: find_status(row, args.input_folder) for row in rows}
    report["datasets"] = found
    width = max(len(name) for name in found)
    for row in rows:
        status = found[row.name]
        console.say(f"{row.name:{width}}  {row.ndim}D  {_STATUS[status]}")
        by_hand = status == "missing" or (args.no_download and status == "download")
        if by_hand and not row.is_own:
            console.say(f"{'':{width}}      {describe_source(row, args.input_folder)}")
    n_there = sum(status == "there" for status in found.values())
    console.say(f"{n_there} of {len(found)} datasets are there. This was a dry run: nothing was computed.")
    return OK


def _benchmark(
    rows: Sequence[Any], own: Sequence[Any], args: argparse.Namespace, console: Console, report: dict[str, Any]
) -> int:
    from ..core.progress import drain
    from ..evaluation.benchmark_datasets import OUTPUT_NAME, benchmark_steps

    folder = Path(args.output_folder or Path(args.input_folder) / OUTPUT_NAME).expanduser()
    result = drain(benchmark_steps(
        args.input_folder, [row.name for row in rows], args.model_type, folder, args.checkpoint_path,
        args.segmentation_mode, args.retain, args.evaluate, own_datasets=own, device=args.device,
        n_crops=args.n_crops, n_iterations=args.n_iterations, download=not args.no_download, overwrite=args.overwrite,
    ), verbose=console.show_bars)
    report["failed"] = {name: str(error) for name, error in result.failed.items()}
    report["datasets"] = [] if result.table.empty else result.table["dataset"].unique().tolist()
    for error in result.failed.values():
        print_error(error, args.verbose)
    if not result.table.empty:
        report["report"] = str(folder / "report.md")
        console.say((folder / "report.md").read_text(encoding="utf-8"))
        console.say(f"Report: {folder / 'report.md'}")
    return FAILED if result.failed else OK


def _write_report(target: str | None, report: dict[str, Any], code: int) -> None:
    if target == "-":
        print(json.dumps({**report, "exit_code": code}, indent=2))
    elif target is not None:
        from ..core.output import write_json
        write_json(target, {**report, "exit_code": code})


if __name__ == "__main__":
    sys.exit(main())
