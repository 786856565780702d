"""The command `micro_sam.evaluate`: score predictions, or a model, against ground truth."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.errors import InvalidInputError
from ._common import (
    INTERRUPTED,
    OK,
    Console,
    Parser,
    add_precision_option,
    parse_extra,
    parse_tile_shape,
    run_command,
)

_PROMPTS = ("point", "box", "point_masks", "box_masks")
_MODES = ("ais", "apg", "amg")


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "Score label images (--labels and --predictions), or a model (--images and --labels): its automatic "
        "segmentation, and prompts with corrections. Options of the segmenters can be given as well, for example "
        "--min_size 50. See doc/evaluation.md.",
        "exit codes: 0 done; 2 the command cannot be run as given (options, files, unknown model); 3 the model or the "
        "device cannot be used; 130 stopped with Ctrl-C, and the same command goes on",
    )
    parser.add_argument(
        "--labels", nargs="+", required=True, metavar="PATH", help="the ground truth: label images, or folders of them"
    )
    parser.add_argument("--label_key", help="its name in hdf5 or zarr files; for folders a pattern, '*.tif'")
    parser.add_argument(
        "-o", "--output_path", metavar="PATH",
        help="a .csv file for the means of predictions; else a folder for a report with tables, per image and per "
        "group, and plots. A model needs a folder",
    )
    parser.add_argument(
        "--group_by", metavar="HOW",
        help="form groups of images for the report: folder (sub-folders), prefix (the name up to the last underscore), "
        "or a regular expression for the beginning of the names",
    )
    parser.add_argument("--recursive", action="store_true", help="look into subfolders as well")
    _add_prediction_options(parser)
    _add_model_options(parser)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write a JSON report; without FILE to the standard output"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show progress bars, news and tracebacks of errors"
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _add_prediction_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("to score predictions")
    group.add_argument("--predictions", nargs="+", metavar="PATH", help="label images, or folders of them")
    group.add_argument("--prediction_key", help="like --label_key")
    group.add_argument(
        "--threshold", nargs="+", type=float, metavar="IOU",
        help="IoU thresholds of the mean segmentation accuracy; default: 0.5 to 0.95 in steps of 0.05",
    )
    group.add_argument(
        "--label_components", action="store_true", default=None,
        help="make each connected component of the ground truth an object, for truth that is a binary mask",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("to score a model")
    group.add_argument("--images", nargs="+", metavar="PATH", help="images, or folders of them")
    group.add_argument("--image_key", help="like --label_key")
    group.add_argument(
        "-m", "--model", "--model_type", dest="model_type",
        help="name of the model, see micro_sam.info; default: vit_b_lm if it was downloaded before, else vit_t_lite",
    )
    group.add_argument("-c", "--checkpoint", help="a checkpoint of your own, instead of a published model")
    group.add_argument("-d", "--device", help="cuda, cuda:1, mps or cpu; default: the best one")
    add_precision_option(group)
    group.add_argument(
        "--modes", nargs="+", choices=(*_MODES, "none"), type=str.lower, metavar="MODE",
        help=f"automatic segmentation: {', '.join(_MODES)}, or none; default: all modes of the model",
    )
    group.add_argument(
        "--prompts", nargs="+", choices=(*_PROMPTS, "none"), type=str.lower, metavar="PROMPT",
        help="start of the prompts: point, box, point_masks, box_masks (with the last mask as a further prompt), or "
        "none; default: all, but for volumes none",
    )
    group.add_argument(
        "--iterations", type=int, metavar="N",
        help="predictions per object: the first one, and those after corrections; default: 8",
    )
    group.add_argument("--objects", type=int, metavar="N", help="prompt at most N objects per image; default: all")
    group.add_argument("--tile_shape", nargs="+", metavar="N", help="tile shape in pixels: Y X; or auto, or none")
    group.add_argument("--halo", nargs=2, type=int, metavar="N", help="overlap of the tiles in pixels: Y X")
    group.add_argument("--batch_size", type=int, help="tiles or planes per call of the network; default: 1")
    group.add_argument(
        "--overwrite", action="store_true", default=None,
        help="replace the evaluation of another model, or with other settings",
    )


_PREDICTION_OPTIONS = ("predictions", "prediction_key", "threshold", "label_components")
_MODEL_OPTIONS = (
    "images", "image_key", "model_type", "checkpoint", "device", "precision", "modes", "prompts", "iterations",
    "objects", "tile_shape", "halo", "batch_size", "overwrite",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = get_parser()
    args, extra = parser.parse_known_args(argv)
    return run_command(lambda: _run(parser, args, extra), args.verbose)


def _run(parser: Parser, args: argparse.Namespace, extra: Sequence[str]) -> int:
    if (args.predictions is None) == (args.images is None):
        raise InvalidInputError(
            "Give either --predictions to score label images, or --images to score a model, with --labels."
        )
    of_predictions = args.predictions is not None
    others, name = (_MODEL_OPTIONS, "predictions") if of_predictions else (_PREDICTION_OPTIONS, "images")
    misplaced = [option for option in others if getattr(args, option) is not None]
    if misplaced:
        raise InvalidInputError(f"--{misplaced[0]} does not go with --{name}. Leave it out.")
    console = Console(args)
    return _score_predictions(parser, args, extra, console) if of_predictions else _score_model(
        parser, args, extra, console
    )


def _score_predictions(parser: Parser, args: argparse.Namespace, extra: Sequence[str], console: Console) -> int:
    parse_extra(extra, {}, _own(parser))
    from ..core.progress import drain
    from ..evaluation.evaluation import check_replaceable, mean_scores, score_pairs_steps, write_csv
    from ..evaluation.pairing import group_names, pair_paths
    from ..evaluation.report import summarise, summary_text, write_report

    as_file = args.output_path is not None and args.output_path.lower().endswith(".csv")
    if as_file:
        check_replaceable(args.output_path)
    patterns, keys = zip(*(_split_key(key) for key in (args.label_key, args.prediction_key)))
    pairs = pair_paths(args.labels, args.predictions, ("ground truths", "predictions"), patterns, args.recursive)
    groups = group_names([truth for truth, _ in pairs], args.group_by)
    steps = score_pairs_steps(pairs, args.threshold, label_components=bool(args.label_components), keys=keys)
    table = drain(steps, verbose=console.show_bars)
    if args.group_by is not None:
        table.insert(0, "modality", groups)
    if as_file:
        write_csv(mean_scores(table), args.output_path, index=False)
    elif args.output_path is not None:
        settings = {"threshold": args.threshold, "label_components": bool(args.label_components)}
        write_report(table, args.output_path, title="Evaluation of predictions", settings=settings)
    summary = summarise(table)
    console.say(summary_text(summary))
    if args.output_path is not None:
        console.say(f"\n{len(pairs)} images -> {args.output_path}")
    _write_json(args, summary, table)
    return OK


def _split_key(key: str | None) -> tuple[str | None, str | None]:
    """The pattern for the files of folders, and the name inside of containers, that a key means."""
    from ..core.inputs import has_pattern

    return (key, None) if key is not None and has_pattern(key) else (None, key)


def _score_model(parser: Parser, args: argparse.Namespace, extra: Sequence[str], console: Console) -> int:
    if args.output_path is None or args.output_path.lower().endswith(".csv"):
        raise InvalidInputError("The evaluation of a model is written to a folder. Name it with --output_path.")
    if args.halo is not None and parse_tile_shape(args.tile_shape, None) is None:
        raise InvalidInputError("--halo belongs to tiles. Pass --tile_shape as well, or leave out --halo.")
    modes, prompts = _chosen(args.modes, "modes"), _chosen(args.prompts, "prompts")
    if modes == [] and prompts == []:
        raise InvalidInputError("With --modes none and --prompts none there is nothing to score.")
    (image_pattern, image_key), (label_pattern, label_key) = _split_key(args.image_key), _split_key(args.label_key)
    tile_shape = parse_tile_shape(args.tile_shape, "default")

    from ..evaluation.model_evaluation import evaluate_model
    from ..evaluation.model_tasks import known_options
    from ..evaluation.report import summarise, summary_text

    known, own = known_options(_MODES if modes is None else modes), _own(parser)
    options = parse_extra(extra, {name: p for name, p in known.items() if name not in own}, own)
    try:
        table = evaluate_model(
            args.images, args.labels, args.output_path, args.model_type, args.checkpoint, modes=modes, prompts=prompts,
            n_iterations=8 if args.iterations is None else args.iterations, n_objects=args.objects,
            group_by=args.group_by, image_key=image_key, label_key=label_key, patterns=(image_pattern, label_pattern),
            recursive=args.recursive, tile_shape=tile_shape, halo=args.halo,
            batch_size=1 if args.batch_size is None else args.batch_size, device=args.device,
            precision=args.precision, options=options,
            overwrite=bool(args.overwrite), verbose=console.show_bars,
        )
    except KeyboardInterrupt:
        console.say("Stopped. What is finished is kept: the same command goes on from here.")
        return INTERRUPTED
    summary = summarise(table)
    console.say(summary_text(summary))
    console.say(f"\n{table['image'].nunique()} images -> {Path(args.output_path) / 'report.md'}")
    _write_json(args, summary, table)
    return OK


def _own(parser: Parser) -> list[str]:
    return [action.option_strings[-1].lstrip("-") for action in parser._actions]


def _chosen(values: Sequence[str] | None, name: str) -> list[str] | None:
    if values is None:
        return None
    if "none" in values and len(values) > 1:
        raise InvalidInputError(f"--{name} takes none alone, but got {' '.join(values)!r}.")
    return [value for value in dict.fromkeys(values) if value != "none"]


def _write_json(args: argparse.Namespace, summary: Any, table: Any) -> None:
    if args.json is None:
        return
    from ..core.output import write_json
    from ..evaluation.report import records

    content = {
        "command": "evaluate", "version": __version__, "arguments": vars(args), "summary": records(summary),
        "results": records(table), "exit_code": OK,
    }
    if args.json == "-":
        print(json.dumps(content, indent=2))
    else:
        write_json(args.json, content)


if __name__ == "__main__":
    sys.exit(main())
