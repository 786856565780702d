"""The commands that open napari: `micro_sam.annotator_2d`, `annotator_3d`, `annotator_tracking`, and
`micro_sam.image_series_annotator`. What can be checked is checked before napari is loaded.
"""

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.errors import InvalidInputError, MissingFileError, MissingPackageError, UnsupportedError
from ..core.settings import PRECISION_VARIABLE
from ._common import OK, Parser, add_precision_option, input_choice, parse_tile_shape, run_command

_EXIT_CODES = (
    "exit codes: 0 napari was closed; 2 the command cannot be run as given (options, input, no napari or screen); "
    "3 the model or the device cannot be used"
)
_KEYS = "Keys: S segments, C commits, T switches between positive and negative points, Shift-C clears"


def get_parser_2d() -> Parser:
    """Return the parser of `micro_sam.annotator_2d`."""
    parser = _image_parser(f"Annotate an image (Y, X), also in colour, in napari. {_KEYS}.", "an image")
    _add_segmentation_options(parser)
    _add_model_options(parser)
    parser.set_defaults(ndim=2)
    return parser


def get_parser_3d() -> Parser:
    """Return the parser of `micro_sam.annotator_3d`."""
    parser = _image_parser(
        f"Annotate a volume (Z, Y, X) in napari. {_KEYS}, Shift-S segments all planes.",
        "a volume, or a folder of planes with --key '*.tif'",
    )
    _add_segmentation_options(parser)
    _add_model_options(parser)
    parser.set_defaults(ndim=3)
    return parser


def get_parser_tracking() -> Parser:
    """Return the parser of `micro_sam.annotator_tracking`."""
    parser = _image_parser(
        f"Track objects in a time series (T, Y, X) in napari. {_KEYS}, Shift-S segments all frames.",
        "a time series, or a folder of frames with --key '*.tif'", has_time=False,
    )
    _add_model_options(parser, has_decoder_choice=False)
    parser.set_defaults(ndim=3, time=None)
    return parser


def get_parser_series() -> Parser:
    """Return the parser of `micro_sam.image_series_annotator`."""
    parser = Parser("Annotate the images of a folder in napari, one after the other. N goes to the next.", _EXIT_CODES)
    parser.add_argument("-i", "--input_folder", required=True, metavar="FOLDER", help="the folder with the images")
    parser.add_argument(
        "-o", "--output_folder", required=True, metavar="FOLDER",
        help="where the label images go, as <name of the image>.tif; with those that are there the work goes on",
    )
    parser.add_argument("-p", "--pattern", default="*", help="which files to take, as '*.tif'; default: all images")
    parser.add_argument(
        "--initial_segmentation_folder", metavar="FOLDER", help="label images to start from, named like the images"
    )
    parser.add_argument(
        "--initial_segmentation_pattern", default="*", metavar="PATTERN", help="which files of that folder to take"
    )
    parser.add_argument("--is_volumetric", action="store_true", help="the images are volumes (Z, Y, X)")
    parser.add_argument("--no_skip", action="store_true", help="show images that are done as well, to correct them")
    parser.add_argument("--skip_segmented", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-e", "--embedding_path", metavar="FOLDER", help="keep the embeddings in this folder")
    _add_model_options(parser, has_decoder_path=False)
    return parser


def _image_parser(description: str, what: str, has_time: bool = True) -> Parser:
    parser = Parser(description, _EXIT_CODES)
    group = parser.add_argument_group("input")
    group.add_argument("-i", "--input", required=True, metavar="PATH", help=what)
    group.add_argument(
        "-k", "--key", help="name of the image in an hdf5 or zarr file; or, for a folder, the pattern of a stack"
    )
    group.add_argument("--axes", help="names of the axes if the file is unclear, one of TCZYXS each, for example CYX")
    group.add_argument("--channel", type=int, help="which channel to take, counted from 0")
    if has_time:
        group.add_argument("--time", type=int, help="which time point to take, counted from 0")
    group.add_argument("--level", type=int, help="which level of a pyramid to take; 0 is the full resolution")
    group.add_argument("--series", type=int, help="which image to take of a file with several, counted from 0")
    group.add_argument(
        "-e", "--embedding_path", metavar="PATH", help="keep the embeddings in this zarr folder, or take them from it"
    )
    return parser


def _add_segmentation_options(parser: Parser) -> None:
    group = parser.add_argument_group("segmentation to correct")
    group.add_argument("-s", "--segmentation_result", metavar="PATH", help="a label image to start from")
    group.add_argument("-sk", "--segmentation_key", metavar="KEY", help="its name in an hdf5 or zarr file")


def _add_model_options(parser: Parser, has_decoder_path: bool = True, has_decoder_choice: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model_type", help="name of the model, see micro_sam.info; default: vit_b_lm if it was downloaded "
        "before, else vit_t_lite, which comes with the package",
    )
    group.add_argument("-c", "--checkpoint", metavar="PATH", help="a checkpoint of your own, not a published model")
    if has_decoder_path:
        group.add_argument("--decoder_path", metavar="PATH", help="a file with the weights of the decoder alone")
    if has_decoder_choice:
        group.add_argument("--no_decoder", action="store_true", help="segment automatically without the decoder")
        group.add_argument("--prefer_decoder", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("-d", "--device", help="cuda, cuda:1, mps or cpu; default: the best one")
    add_precision_option(group)
    group.add_argument("--tile_shape", nargs="+", metavar="N", help="tile shape in pixels: Y X; default: no tiles")
    group.add_argument("--halo", nargs="+", metavar="N", help="overlap of the tiles in pixels: Y X")
    group.add_argument(
        "--precompute_amg_state", action="store_true",
        help="compute all that automatic segmentation needs at once, and keep it with the embeddings",
    )
    group = parser.add_argument_group("run")
    group.add_argument("-v", "--verbose", action="store_true", help="show news and tracebacks of errors")
    group.add_argument("--version", action="version", version=__version__)


def main_2d(argv: Sequence[str] | None = None) -> int:
    """Run `micro_sam.annotator_2d` and return its exit code."""
    return _main(get_parser_2d(), argv, lambda args: _run_image(args, "annotator_2d"))


def main_3d(argv: Sequence[str] | None = None) -> int:
    """Run `micro_sam.annotator_3d` and return its exit code."""
    return _main(get_parser_3d(), argv, lambda args: _run_image(args, "annotator_3d"))


def main_tracking(argv: Sequence[str] | None = None) -> int:
    """Run `micro_sam.annotator_tracking` and return its exit code."""
    return _main(get_parser_tracking(), argv, lambda args: _run_image(args, "annotator_tracking"))


def main_series(argv: Sequence[str] | None = None) -> int:
    """Run `micro_sam.image_series_annotator` and return its exit code."""
    return _main(get_parser_series(), argv, _run_series)


def _main(parser: Parser, argv: Sequence[str] | None, run: Callable[[argparse.Namespace], int]) -> int:
    args = parser.parse_args(argv)

    def body() -> int:
        _check_options(args)
        _require_gui()
        if args.precision is not None:
            # The launch functions keep their documented signatures; and so it also holds for models loaded later.
            os.environ[PRECISION_VARIABLE] = args.precision
        return run(args)

    return run_command(body, args.verbose)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, and take the older names of options, before anything is imported or opened."""
    for old, new in (("prefer_decoder", "no_decoder"), ("skip_segmented", "no_skip")):
        if getattr(args, old, False):
            warnings.warn(
                f"--{old} does the opposite of what its name says: it still means --{new}. Use that instead.",
                FutureWarning, stacklevel=1,
            )
            setattr(args, new, True)
    args.tile_shape = parse_tile_shape(args.tile_shape, None)
    if args.tile_shape == "auto":
        raise InvalidInputError("--tile_shape auto is for segmentation. Pass two integers (Y X), or leave it out.")
    if args.halo is not None:
        args.halo = _parse_halo(args.halo)
        if args.tile_shape is None:
            raise InvalidInputError("--halo belongs to tiles. Pass --tile_shape as well, or leave out --halo.")
    if args.precompute_amg_state and args.embedding_path is None:
        raise InvalidInputError(
            "--precompute_amg_state keeps what it computes with the embeddings. Pass --embedding_path as well."
        )
    if getattr(args, "segmentation_key", None) is not None and args.segmentation_result is None:
        raise InvalidInputError("--segmentation_key belongs to --segmentation_result. Pass that as well.")
    for name in ("checkpoint", "decoder_path"):
        if getattr(args, name, None) is not None:
            path = Path(getattr(args, name)).expanduser()
            if not path.is_file():
                raise MissingFileError(f"There is no file {path}. Check --{name}.")
            setattr(args, name, str(path))


def _parse_halo(values: Sequence[str]) -> tuple[int, int]:
    try:
        halo = tuple(int(v) for v in values)
    except ValueError:
        halo = ()
    if len(halo) != 2 or min(halo) < 0:
        raise InvalidInputError(f"--halo takes two integers of at least 0 (Y X), but got {' '.join(values)!r}.")
    return halo


def _require_gui() -> None:
    """Raise an error if napari is not installed or there is no screen, without loading either."""
    missing = [name for name in ("napari", "qtpy", "magicgui", "superqt") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"The annotation tools need {', '.join(missing)}, which is not installed. Install it with: "
            'pip install "micro_sam[gui]"'
        )
    platform = os.environ.get("QT_QPA_PLATFORM", "xcb")
    needs_screen = platform.partition(":")[0] in ("", "xcb", "wayland", "wayland-egl")
    if sys.platform == "linux" and needs_screen and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))):
        raise UnsupportedError(
            "There is no screen: neither DISPLAY nor WAYLAND_DISPLAY is set. Run this on a desktop, or over a remote "
            "desktop. Without a screen, micro_sam.automatic_segmentation and micro_sam.precompute_embeddings work."
        )


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Check model and device, and return the arguments of the launch functions about them."""
    from ..core.settings import get_device
    from ..models.registry import find_spec
    from ..segmentation.workflow import resolve_model

    model_type = resolve_model(args.model_type, args.checkpoint)
    if model_type is None:  # the checkpoint tells what it is
        from ..models.checkpoints import read_checkpoint
        model_type = read_checkpoint(args.checkpoint, mmap=True).architecture
    elif args.checkpoint is None:
        find_spec(model_type)
        if args.model_type is None:
            print(f"Model: {model_type} (choose another one with -m, see micro_sam.info)", flush=True)
    get_device(args.device)
    given = {
        "model_type": model_type, "checkpoint_path": args.checkpoint, "device": args.device,
        "tile_shape": args.tile_shape, "halo": args.halo, "precompute_amg_state": args.precompute_amg_state,
    }
    if hasattr(args, "decoder_path"):
        given["decoder_path"] = args.decoder_path
    if hasattr(args, "no_decoder"):
        given["prefer_decoder"] = not args.no_decoder
    return given


def _embedding_store(path: str | None) -> str | None:
    """The zarr folder of the embeddings, by the name that `micro_sam.precompute_embeddings` gives it."""
    from ..core.output import prepare_folder
    from ..core.readers import is_zarr

    if path is None:
        return None
    store = Path(path).expanduser()
    if store.suffix != ".zarr" and not is_zarr(store):
        store = store.with_name(f"{store.name}.zarr")
    if store.is_file():
        raise InvalidInputError(f"{store} is a file, but embeddings are kept in a zarr folder. Choose another path.")
    if not store.exists():
        prepare_folder(store)
    return str(store)


def _run_image(args: argparse.Namespace, launcher: str) -> int:
    from ..core.image import open_image
    from ..core.tiling import TileSpec

    image = open_image(args.input, **input_choice(args))
    if args.tile_shape is not None:
        TileSpec.create(image.shape[-2:], args.tile_shape, args.halo)
    given: dict[str, Any] = {"embedding_path": _embedding_store(args.embedding_path)}
    if getattr(args, "segmentation_result", None) is not None:
        from ..annotation.series import read_label_image
        given["segmentation_result"] = read_label_image(
            args.segmentation_result, args.ndim, image.shape, "the labels of --segmentation_result",
            key=args.segmentation_key,
        )
    given |= _model_arguments(args)

    from .. import sam_annotator
    # Stacks stay on disk until a plane is shown.
    getattr(sam_annotator, launcher)(image.read() if args.ndim == 2 else image.data, **given)
    return OK


def _run_series(args: argparse.Namespace) -> int:
    from ..annotation.series import plan_series

    series = plan_series(
        args.input_folder, args.output_folder, pattern=args.pattern, is_volumetric=args.is_volumetric,
        initial_folder=args.initial_segmentation_folder, initial_pattern=args.initial_segmentation_pattern,
        embedding_folder=args.embedding_path, skip_segmented=not args.no_skip,
    )
    for note in series.notes:
        print(note)
    counts = series.counts()
    print(f"{len(series)} images, {counts['done']} of them done.", flush=True)
    for entry in series:
        if entry.status == "unreadable":
            print(f"warning: {entry.name} is left out: {entry.note}", file=sys.stderr, flush=True)
    if series.first_open() is None:
        if not counts["done"]:
            raise InvalidInputError(f"No image in {args.input_folder} can be read. Check the files.")
        print(f"Nothing is left to do: all is in {args.output_folder}. --no_skip shows it again.", flush=True)
        return OK
    given = _model_arguments(args)

    from ..sam_annotator import image_folder_annotator
    image_folder_annotator(
        args.input_folder, args.output_folder, pattern=args.pattern,
        initial_segmentation_folder=args.initial_segmentation_folder,
        initial_segmentation_pattern=args.initial_segmentation_pattern, embedding_path=args.embedding_path,
        is_volumetric=args.is_volumetric, skip_segmented=not args.no_skip, **given,
    )
    return OK
