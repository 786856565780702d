"""What the commands share: options, typed extra options, messages, reports and exit codes. Light at import."""

import argparse
import contextlib
import inspect
import json
import logging
import os
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .._version import __version__
from ..core.errors import DeviceError, InvalidInputError, MicroSamError, ModelError, nearest_names
from ..core.settings import PRECISION_VARIABLE, PRECISIONS

OK, FAILED, USAGE, SETUP, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = (
    "exit codes: 0 all done; 1 at least one image failed; 2 the command cannot be run as given (options, unknown "
    "model, no input); 3 the model or the device cannot be used; 130 stopped with Ctrl-C"
)


class Parser(argparse.ArgumentParser):
    """Takes `--tile-shape` for `--tile_shape`, and no abbreviations."""

    def __init__(self, description: str, epilog: str = EXIT_CODES):
        super().__init__(description=description, epilog=epilog, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        args = [_with_underscores(a) for a in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which images to read, and how."""
    group = parser.add_argument_group("input")
    group.add_argument("--pattern", help="which files of a folder to take, for example '*.tif'; default: all images")
    group.add_argument("--recursive", action="store_true", help="look into subfolders as well")
    group.add_argument(
        "-k", "--key", help="name of the image in an hdf5 or zarr file; or, for a folder, the pattern of a stack"
    )
    group.add_argument(
        "-n", "--ndim", type=int, choices=(2, 3), help="dimensions without channels, if the file is unclear"
    )
    group.add_argument("--axes", help="names of the axes if the file is unclear, one of TCZYXS each, for example CYX")
    group.add_argument("--channel", type=int, help="which channel to take, counted from 0")
    group.add_argument("--time", type=int, help="which time point to take, counted from 0")
    group.add_argument("--level", type=int, help="which level of a pyramid to take; 0 is the full resolution")
    group.add_argument("--series", type=int, help="which image to take of a file with several, counted from 0")


def add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Options of model and computation."""
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model_type", help=f"name of the model, see micro_sam.info; default: {default}")
    group.add_argument("-c", "--checkpoint", help="a checkpoint of your own, instead of a published model")
    group.add_argument("-d", "--device", help="cuda, cuda:1, mps or cpu; default: the best one")
    add_precision_option(group)
    group.add_argument("--tile_shape", nargs="+", metavar="N", help="tile shape in pixels: Y X; or auto, or none")
    group.add_argument("--halo", nargs=2, type=int, metavar="N", help="overlap of the tiles in pixels: Y X")
    group.add_argument("--batch_size", type=int, default=1, help="tiles or planes per call of the network; default: 1")


def add_precision_option(group: argparse._ArgumentGroup) -> None:
    """The option that says in which precision the model computes."""
    group.add_argument(
        "--precision", choices=PRECISIONS, type=str.lower,
        help=f"auto: half precision where the device is faster in it, which changes masks a little; default: "
        f"${PRECISION_VARIABLE}, else what is chosen in the settings, else float32",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of how the command behaves."""
    group = parser.add_argument_group("run")
    group.add_argument("--overwrite", action="store_true", help="replace outputs that were made with other settings")
    group.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write a JSON report; without FILE to the standard output"
    )
    group.add_argument("-v", "--verbose", action="store_true", help="show progress bars, news and tracebacks of errors")
    group.add_argument("--version", action="version", version=__version__)


def input_choice(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_image`, but for the path."""
    return {name: getattr(args, name) for name in ("key", "axes", "channel", "time", "level", "series", "ndim")}


def parse_tile_shape(values: Sequence[str] | None, default: Any) -> Any:
    """Two integers, `auto` or None."""
    if values is None:
        return default
    if len(values) == 1 and values[0].lower() in ("auto", "none"):
        return "auto" if values[0].lower() == "auto" else None
    try:
        shape = tuple(int(v) for v in values)
    except ValueError:
        shape = ()
    if len(shape) != 2 or min(shape) < 1:
        raise InvalidInputError(
            f"--tile_shape takes two positive integers (Y X), auto or none, but got {' '.join(values)!r}."
        )
    return shape


# --- extra options, typed by the signatures of the segmenters ---


def parse_extra(extra: Sequence[str], known: Mapping[str, inspect.Parameter], own: Sequence[str]) -> dict[str, Any]:
    """Convert `--name value`, `--name=value` and `--flag` by the types in signatures.

    Args:
        extra: What the parser did not know.
        known: Name -> parameter.
        own: The options of the parser itself, to suggest them for typing errors.

    Raises:
        InvalidInputError: For unknown names, with the nearest ones, and for values of a wrong type.
    """
    options: dict[str, list[str]] = {}
    name = None
    for token in extra:
        if token.startswith("-") and not _is_number(token):
            name, equals, value = token.lstrip("-").partition("=")
            if not token.startswith("--") or name not in known:
                names = [f"--{n}" for n in [*known, *own]]
                raise InvalidInputError(f"There is no option {token.partition('=')[0]}. {nearest_names(token, names)}")
            if name in options:
                raise InvalidInputError(f"The option --{name} was given twice.")
            options[name] = [value] if equals else []
        elif name is None:
            raise InvalidInputError(f"The argument {token!r} belongs to no option.")
        else:
            options[name].append(token)
    return {name: convert(name, values, known[name]) for name, values in options.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def convert(name: str, values: Sequence[str], parameter: inspect.Parameter) -> Any:
    """Convert the text of one option by the annotation of its parameter, or the type of its default."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        annotation = type(parameter.default)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    if not values:
        if bool in kinds:
            return True
        raise InvalidInputError(f"The option --{name} needs a value.")
    if len(values) == 1 and type(None) in kinds and values[0].lower() == "none":
        return None
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            parts = values if len(values) > 1 else values[0].split(",")
            with contextlib.suppress(ValueError):
                return tuple(int(v) for v in parts)
    if len(values) == 1:
        text = values[0]
        if bool in kinds and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        for kind in (int, float, str):
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(text)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "none"}
    expected = [names.get(k) or ("integers" if typing.get_origin(k) is tuple else None) for k in kinds]
    expected = [e for e in expected if e]
    if not set(expected) - {"none"}:
        raise InvalidInputError(f"The option --{name} can only be used from Python.")
    raise InvalidInputError(f"The option --{name} takes {' or '.join(expected)}, but got {' '.join(values)!r}.")


# --- messages, results and exit codes ---


@dataclass
class Result:
    """What became of one image: `status` is done, skipped, failed or not started."""

    input: str
    output: str
    status: str = "not started"
    seconds: float | None = None
    n_objects: int | None = None
    shape: list[int] | None = None
    error: str | None = None
    error_type: str | None = None


@dataclass
class Report:
    """What the JSON report holds."""

    command: str
    arguments: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    files: list[Result] = field(default_factory=list)
    interrupted: bool = False
    version: str = __version__

    def content(self, exit_code: int) -> dict[str, Any]:
        counts = dict.fromkeys(("done", "skipped", "failed", "not started"), 0)
        for result in self.files:
            counts[result.status] += 1
        return {**asdict(self), "summary": counts, "exit_code": exit_code}


class Console:
    """Prints messages; to the standard error if the report goes to the standard output."""

    def __init__(self, args: argparse.Namespace):
        self.verbose = getattr(args, "verbose", False)
        self._json = getattr(args, "json", None)
        self.show_bars = self.verbose or sys.stderr.isatty()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self._json == "-" else sys.stdout, flush=True)

    def write_report(self, report: Report, exit_code: int) -> None:
        if self._json is None:
            return
        content = report.content(exit_code)
        if self._json == "-":
            print(json.dumps(content, indent=2))
        else:
            from ..core.output import write_json
            write_json(self._json, content)


def print_error(error: BaseException, verbose: bool, prefix: str = "error: ") -> None:
    """One readable paragraph on the standard error; with the traceback if that was asked for."""
    if verbose or os.environ.get("MICROSAM_DEBUG"):
        import traceback
        traceback.print_exception(error)
    text = str(error)
    if not isinstance(error, MicroSamError):
        text = f"{type(error).__name__}: {text}. This was not expected; --verbose shows where it happened."
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _plain_warnings(verbose: bool) -> Iterator[None]:
    """Warnings and news as one line each, without the place in the code."""
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"micro_sam")
            warnings.showwarning = lambda message, *args, **kwargs: print(f"warning: {message}", file=sys.stderr)
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
        yield


def run_command(function: Callable[[], int], verbose: bool = False) -> int:
    """Run the body of a command and turn errors into messages and exit codes."""
    try:
        with _plain_warnings(verbose):
            return function()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED
    except MicroSamError as error:
        print_error(error, verbose)
        return SETUP if isinstance(error, ModelError | DeviceError) else USAGE


def run_files(results: Sequence[Result], work: Callable[[int, Result], str], report: Report, console: Console) -> int:
    """Process the images one after the other; one that fails does not stop the others.

    Args:
        results: One entry per image; those that failed already are left out.
        work: Called with the number of the image and its entry; returns what to say about it.
        report: The report; it is complete afterwards, also after Ctrl-C.
        console: Where messages go.

    Returns:
        The exit code.
    """
    report.files = list(results)
    open_results = [(n, r) for n, r in enumerate(results) if r.status != "failed"]
    start, computed, code = time.perf_counter(), 0, OK
    try:
        for position, (n, result) in enumerate(open_results):
            begin = time.perf_counter()
            try:
                message = work(n, result)
                if result.status == "not started":
                    result.status = "done"
                    computed += 1
            except Exception as error:
                if not isinstance(error, MicroSamError) and len(open_results) == 1 and console.verbose:
                    print_error(error, True)
                fail(result, error, console)
                continue
            finally:
                result.seconds = round(time.perf_counter() - begin, 3)
            left = len(open_results) - position - 1
            eta = ""
            if left and computed and result.status == "done":
                eta = f", about {duration((time.perf_counter() - start) / computed * left)} left"
            number = f"[{position + 1}/{len(open_results)}] " if len(open_results) > 1 else ""
            console.say(f"{number}{message}{eta}")
    except KeyboardInterrupt:
        report.interrupted, code = True, INTERRUPTED
        console.say("Stopped. What is finished is kept: the same command goes on from here.")
    failed = [r for r in results if r.status == "failed"]
    if failed and len(results) > 1:
        names = ", ".join(r.input for r in failed[:10]) + (" …" if len(failed) > 10 else "")
        print(f"error: {len(failed)} of {len(results)} images failed: {names}", file=sys.stderr)
    code = code or (FAILED if failed else OK)
    console.write_report(report, code)
    return code


def note_first_usable(results: Sequence[Result], check: Callable[[Result], None], console: Console) -> bool:
    """Check images until one can be used, before the model is loaded; those that cannot are noted as failed.

    Returns:
        Whether there is one.
    """
    for result in results:
        try:
            check(result)
            return True
        except MicroSamError as error:
            fail(result, error, console)
    return False


def fail(result: Result, error: Exception, console: Console) -> None:
    """Note and print that an image failed."""
    result.status, result.error, result.error_type = "failed", str(error), type(error).__name__
    text = str(error)
    print_error(error, console.verbose, "error: " if result.input in text else f"error: {result.input}: ")


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
