"""The command `micro_sam.convert`: labels to and from the formats of other programs."""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInputError, MissingFileError
from ..interchange.formats import FORMAT_NAMES, FORMATS, find_format, format_to_read, output_path
from ._common import EXIT_CODES, Console, Parser, Report, Result, add_run_options, run_command, run_files

_HIDDEN = {
    "names": "names", "classes": "classes", "scale": "pixel size", "time": "that the stack is over time",
    "stack": "that the planes are a stack",
}


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("Convert labels between formats.", f"{_describe_formats()}\n\n{textwrap.fill(EXIT_CODES, 100)}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("input", nargs="+", metavar="INPUT", help="files, folders, or patterns such as 'masks/*.tif'")
    parser.add_argument(
        "-o", "--output_path", required=True, metavar="OUTPUT",
        help="the file; for several inputs the folder, or one .json with --to coco",
    )
    parser.add_argument(
        "--from", dest="from_", choices=FORMAT_NAMES, metavar="FORMAT", help="format of the input; default: found"
    )
    parser.add_argument(
        "--to", choices=[f.name for f in FORMATS if f.writable], metavar="FORMAT",
        help="format of the output; default: by its suffix, and tif for folders",
    )
    parser.add_argument(
        "--like", metavar="PATH",
        help="the image that the labels belong to, or the folder of the images, found by their names: gives image "
        "size, axes and pixel size",
    )
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help="image size instead: Y X, or Z Y X, or T Y X")
    parser.add_argument(
        "--axes", choices=("YX", "ZYX", "TYX"), type=str.upper, help="whether a stack is a volume or over time"
    )
    parser.add_argument("-k", "--key", help="which labels of a file with several: name in OME-Zarr, file name in COCO")
    parser.add_argument(
        "--classes", metavar="FILE", help="table .csv with the columns label and class, or name, for the objects"
    )
    parser.add_argument(
        "--label_name", default="segmentation", help="name of the labels if the output is an existing OME-Zarr image"
    )
    parser.add_argument("--pattern", help="which files of a folder to take; default: those of --from, or label images")
    parser.add_argument("--recursive", action="store_true", help="look into subfolders as well")
    add_run_options(parser)
    return parser


def _describe_formats() -> str:
    lines = ["formats, what each keeps, and what it cannot hold:"]
    for row in FORMATS:
        lines.append(f"  {row.name:10}{row.title}")
        for what, text in (("keeps", row.keeps), ("cannot hold", row.loses)):
            lines.append(textwrap.fill(
                f"{what}: {text}", 100, initial_indent=" " * 12, subsequent_indent=" " * 14
            ))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _run(args), args.verbose)


@dataclass(frozen=True)
class _Job:
    """One label image to convert; `key` chooses it in a file with several."""

    path: Path
    key: str | None
    output: Path

    @property
    def name(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}: {self.key}"


def _run(args: argparse.Namespace) -> int:
    if args.like is not None and args.shape is not None:
        raise InvalidInputError("--like and --shape say the same. Pass one of them.")
    console = Console(args)
    report = Report("convert", vars(args))
    jobs, is_dataset = _find_jobs(args)
    if args.classes is not None and len(jobs) > 1:
        raise InvalidInputError(f"--classes is for the objects of one label image, but there are {len(jobs)}.")
    for job in jobs:
        if job.path.resolve() == job.output.resolve():
            raise InvalidInputError(f"The output would replace the input {job.path} itself. Choose another output.")
    if is_dataset:
        return _run_dataset(args, jobs, report, console)

    from ..core.output import prepare_folder
    from ..core.progress import drain
    from ..interchange.files import is_written, write_labels_steps

    results = [Result(job.name, str(job.output)) for job in jobs]

    def work(n: int, result: Result) -> str:
        job = jobs[n]
        image = _read(args, job, result, console)
        row = output_path(job.output, args.to)[1]
        if is_written(job.output, image, row.name, name=args.label_name, overwrite=args.overwrite):
            result.status = "skipped"
            return f"{job.name}: {job.output} is there already"
        prepare_folder(job.output)
        steps = write_labels_steps(job.output, image, row.name, name=args.label_name, overwrite=True)
        result.output = str(drain(steps, verbose=console.show_bars))
        return f"{job.name}: {result.n_objects} objects -> {result.output}{_note(image, row)}"

    return run_files(results, work, report, console)


def _run_dataset(args: argparse.Namespace, jobs: Sequence[_Job], report: Report, console: Console) -> int:
    """Write all inputs into one COCO dataset; one that cannot be read stops it, as a part would pass for the whole."""
    from ..core.output import prepare_folder
    from ..core.progress import drain
    from ..interchange.files import write_coco_dataset_steps

    output = jobs[0].output
    result = Result(f"{len(jobs)} label images", str(output))

    def images() -> Iterator[tuple[str, Any]]:
        result.n_objects = 0
        for job in jobs:
            one = Result(job.name, str(output))
            image = _read(args, job, one, console)
            result.n_objects += one.n_objects
            like = _like(args, job)
            yield (like or job.path).name, image

    def work(n: int, result: Result) -> str:
        prepare_folder(output)
        drain(write_coco_dataset_steps(output, images(), overwrite=args.overwrite), verbose=console.show_bars)
        return f"{result.input}: {result.n_objects} objects -> {output}"

    return run_files([result], work, report, console)


def _find_jobs(args: argparse.Namespace) -> tuple[list[_Job], bool]:
    """What to convert to where, and whether all goes into one dataset."""
    from ..core.inputs import InputFile, name_outputs
    from ..core.readers import is_zarr

    output, first = Path(args.output_path).expanduser(), Path(args.input[0]).expanduser()
    is_single = len(args.input) == 1 and first.exists() and (not first.is_dir() or is_zarr(first))
    if is_single and args.pattern is not None:
        raise InvalidInputError(f"--pattern selects files of a folder, but {first} is none.")
    files = [InputFile(first)] if is_single else _find_files(args)
    # The masks of Cellpose in a_seg.npy belong to an image a, after which the output is called.
    names = [replace(f, path=f.path.with_name(f.path.name.replace("_seg.npy", ".npy"))) for f in files]
    keys: list[str | None] = [args.key] * len(files)
    if is_single and args.key is None and (args.from_ or format_to_read(first).name) == "coco":
        from ..interchange.coco import image_names
        images = image_names(first)
        if len(images) > 1:
            is_single, files, keys = False, files * len(images), images
            names = [InputFile(Path(Path(name).name)) for name in images]  # folders in a file may lead anywhere
    is_folder = args.output_path.endswith(("/", "\\")) or (output.is_dir() and not is_zarr(output))
    if is_single and not is_folder:
        return [_Job(first, args.key, output_path(output, args.to)[0])], False
    if not is_folder and output.suffix.lower() == ".json" and args.to in (None, "coco"):
        return [_Job(f.path, key, output) for f, key in zip(files, keys)], True
    if output.is_file() or any(output.name.lower().endswith(s) for row in FORMATS for s in row.suffixes):
        raise InvalidInputError(f"For several label images the output must be a folder, but is {output}.")
    outputs = name_outputs(names, output, find_format(args.to or "tif").suffix)
    return [_Job(f.path, key, o) for f, key, o in zip(files, keys, outputs)], False


def _find_files(args: argparse.Namespace) -> list[Any]:
    """The input files; those of a folder by the pattern, or by the format of the input."""
    from ..core.inputs import find_inputs

    has_folder = any(Path(p).expanduser().is_dir() for p in args.input)
    if args.pattern is not None or args.from_ in (None, "tif") or not has_folder:
        return find_inputs(args.input, args.pattern, args.recursive)
    found = []
    for pattern in find_format(args.from_).patterns:
        try:
            found += find_inputs(args.input, pattern, args.recursive)
        except MissingFileError as error:
            missing = error
    if not found:
        raise missing
    return list({file.path.resolve(): file for file in found}.values())


def _like(args: argparse.Namespace, job: _Job) -> Path | None:
    """The image that the labels belong to."""
    if args.like is None:
        return None
    from ..core.output import label_stem
    from ..core.readers import is_zarr

    like = Path(args.like).expanduser()
    if not like.is_dir() or is_zarr(like):
        return like
    stem = label_stem(job.key or job.path).removesuffix("_seg")
    found = [p for p in sorted(like.iterdir()) if label_stem(p) == stem and p.resolve() != job.path.resolve()]
    if len(found) != 1:
        raise MissingFileError(
            f"There must be one image named {stem} in {like} for {job.name}, but there are {len(found)}. Pass the "
            "image itself as --like."
        )
    return found[0]


def _read(args: argparse.Namespace, job: _Job, result: Result, console: Console) -> Any:
    """The labels of one input, with the classes that were given."""
    from ..core.progress import drain
    from ..interchange.files import read_labels_steps
    from ..interchange.label_image import read_table

    steps = read_labels_steps(job.path, args.from_, args.shape, axes=args.axes, like=_like(args, job), key=job.key)
    image = drain(steps, verbose=console.show_bars)
    if args.classes is not None:
        names, classes = read_table(args.classes)
        image = replace(image, names={**image.names, **names}, classes={**image.classes, **classes})
    result.shape, result.n_objects = list(image.labels.shape), len(image.ids)
    return image


def _note(image: Any, row: Any) -> str:
    """What of these labels only micro_sam itself will find in the output."""
    there = {
        "names": image.names, "classes": image.classes, "scale": image.scale, "time": image.axes == "TYX",
        "stack": image.labels.ndim == 3,
    }
    hidden = [_HIDDEN[what] for what in row.private if there[what]]
    return f" (other programs will not find: {', '.join(hidden)})" if hidden else ""


if __name__ == "__main__":
    sys.exit(main())
