"""The commands `micro_sam.export_model` and `micro_sam.import_model`: exchange of models with other programs."""

import argparse
import sys
from collections.abc import Callable, Sequence

from ..core.errors import InvalidInputError, OutputExistsError, OutputWriteError
from ._common import FAILED, OK, Console, Parser, print_error, run_command

_EXIT_CODES = (
    "exit codes: 0 done; 1 the output exists or cannot be written; 2 the command cannot be run as given (options, "
    "unknown model, images); 3 the model cannot be used; 130 stopped with Ctrl-C"
)


def get_parser() -> Parser:
    """Return the parser of `micro_sam.export_model`."""
    parser = Parser("Export a model for other programs.", _EXIT_CODES)
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="the file to write, such as model.zip")
    parser.add_argument("--format", choices=tuple(_FORMATS), default="bioimageio", help="default: bioimageio")
    parser.add_argument("-m", "--model_type", help="name of the model, see micro_sam.info")
    parser.add_argument("-c", "--checkpoint", help="a checkpoint of your own, instead of a published model")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("-v", "--verbose", action="store_true", help="show progress bars and tracebacks of errors")
    group = parser.add_argument_group("bioimageio", "a package for bioimage.io: weights, description, examples")
    group.add_argument("-i", "--image", help="an example image")
    group.add_argument("--labels", help="label image of its objects: their prompts become the example")
    group.add_argument("--name", help="how the package is called, at least five characters")
    group.add_argument("--license", help="SPDX identifier, for example CC-BY-4.0; default: that of the published model")
    group.add_argument("--author", action="append", metavar="NAME", help="who made the model; can be repeated")
    group.add_argument("--maintainer", action="append", metavar="USER", help="GitHub user who looks after the package")
    group.add_argument("--description", help="one or two sentences; default: what the published model is for")
    group.add_argument("--documentation", metavar="FILE", help="text about the model, a .md file")
    group.add_argument("--cover", action="append", metavar="FILE", help="picture to show; default: one is made")
    group.add_argument("--attach_decoder", action="store_true", help="add the decoder as a file of its own as well")
    return parser


def get_import_parser() -> Parser:
    """Return the parser of `micro_sam.import_model`."""
    parser = Parser("Make the model of a bioimage.io package available by name.", _EXIT_CODES)
    parser.add_argument("package", metavar="PACKAGE", help="a zip, a folder with its files, or its rdf.yaml")
    parser.add_argument("--name", help="how the model is to be called; default: the name in the package")
    parser.add_argument("--overwrite", action="store_true", help="replace a local model of that name")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export a model and return the exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _writing(args, _FORMATS[args.format]), args.verbose)


def main_import(argv: Sequence[str] | None = None) -> int:
    """Import a model and return the exit code."""
    args = get_import_parser().parse_args(argv)
    return run_command(lambda: _writing(args, _import), args.verbose)


def _writing(args: argparse.Namespace, work: Callable[[argparse.Namespace], None]) -> int:
    try:
        work(args)
    except (OutputExistsError, OutputWriteError) as error:
        print_error(error, args.verbose)
        return FAILED
    return OK


def _export_bioimageio(args: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("image", "labels", "name") if getattr(args, name) is None]
    if missing:
        raise InvalidInputError(f"A package for bioimage.io needs {' and '.join(missing)}.")

    from ..bioimageio.model_export import export_sam_model
    from ..core.image import open_image
    from ..segmentation.workflow import resolve_model

    model_type = resolve_model(args.model_type, args.checkpoint)
    if model_type is None:
        from ..models.checkpoints import read_checkpoint
        model_type = read_checkpoint(args.checkpoint, mmap=True).architecture
    export_sam_model(
        *(open_image(path, ndim=2).data[...] for path in (args.image, args.labels)), model_type, args.name, args.output,
        args.checkpoint,
        license=args.license, description=args.description, documentation=args.documentation,
        authors=args.author and [{"name": name} for name in args.author],
        maintainers=args.maintainer and [{"github_user": user} for user in args.maintainer],
        covers=args.cover, attach_decoder=args.attach_decoder, overwrite=args.overwrite,
        verbose=Console(args).show_bars,
    )
    print(f"{model_type if args.checkpoint is None else args.checkpoint} -> {args.output}")


def _import(args: argparse.Namespace) -> None:
    from ..bioimageio.model_import import import_model

    spec = import_model(args.package, args.name, overwrite=args.overwrite)
    print(f"{args.package} -> model {spec.name} ({', '.join(spec.modes)}): {spec.path}")


# Format -> what writes it.
_FORMATS: dict[str, Callable[[argparse.Namespace], None]] = {"bioimageio": _export_bioimageio}


if __name__ == "__main__":
    sys.exit(main())
