"""The command `micro_sam.replay`: labels and tracks from the journal of an annotation session, without the model."""

import argparse
import sys
import time
from collections.abc import Sequence

from ..core.errors import InvalidInputError
from ._common import FAILED, OK, Console, Parser, print_error, run_command

_EXIT_CODES = (
    "exit codes: 0 done; 1 the journal is damaged or does not fit together, or the output cannot be written; 2 the "
    "command cannot be run as given (options, no such session, output exists); 130 stopped with Ctrl-C"
)
_LAYERS = ("committed_objects", "current_object", "auto_segmentation")


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "Rebuild the labels of an annotation session from its journal. Without a journal, list the known sessions.",
        _EXIT_CODES,
    )
    parser.add_argument("session", nargs="?", metavar="SESSION", help="the journal, a file *.jsonl")
    parser.add_argument(
        "-o", "--output", metavar="PATH", help="the label image to write (tif, zarr); with --tracks a folder"
    )
    parser.add_argument("--layer", choices=_LAYERS, default=_LAYERS[0], help=f"which labels; default: {_LAYERS[0]}")
    parser.add_argument(
        "--until", type=int, metavar="N", help="carry out only the first N records, with the numbers of --list"
    )
    parser.add_argument(
        "--tracks", choices=("ctc", "geff"),
        help="for a time series: write the tracks with their lineage, for the Cell Tracking Challenge or as GEFF",
    )
    parser.add_argument("--list", action="store_true", help="list what was done")
    parser.add_argument("--until_damage", action="store_true", help="stop before the first damaged line")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds something else")
    parser.add_argument("-v", "--verbose", action="store_true", help="show progress bars and tracebacks of errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _run(args), args.verbose)


def _run(args: argparse.Namespace) -> int:
    if args.session is None:
        if args.output is not None:
            raise InvalidInputError("--output needs a session. Pass a journal; without one, the known ones are listed.")
        return _list_sessions()
    if args.output is None and not args.list:
        raise InvalidInputError("Nothing to do: pass --output to write labels, or --list to see what was done.")

    from ..annotation.journal import JournalDamageError
    from ..core.errors import OutputWriteError
    from ..editing.history import EditConflictError

    try:
        if args.list:
            _list_records(args)
        if args.output is not None:
            _write(args)
    except (JournalDamageError, EditConflictError, OutputWriteError) as error:
        print_error(error, args.verbose)
        return FAILED
    return OK


def _write(args: argparse.Namespace) -> None:
    from ..annotation.replay import write_replay

    written = write_replay(
        args.session, args.output, layer=args.layer, until=args.until, tracks=args.tracks, overwrite=args.overwrite,
        until_damage=args.until_damage, verbose=Console(args).show_bars,
    )
    if written.was_there:
        print(f"{args.session}: is in {written.path} already")
    else:
        print(f"{args.session}: {written.n_objects} {'tracks' if args.tracks else 'objects'} -> {written.path}")


def _list_sessions() -> int:
    from ..annotation.journal import find_journals, is_open, session_folder, summary

    paths = find_journals(include_open=True)
    if not paths:
        print(f"There are no sessions in {session_folder()}.")
        return OK
    rows = [("changed", "mode", "image", "actions", "objects", "state", "session")]
    for path in paths:
        found = summary(path)
        state = "open" if is_open(path) else "saved" if found.is_finished else "not saved"
        if found.damage is not None:
            state = f"{state}, line {found.damage.line} damaged"
        rows.append((
            _moment(found.last_change), found.header["mode"], found.image_name or "-", str(found.n_actions),
            str(found.n_objects), state, str(path),
        ))
    _print_table(rows)
    return OK


def _list_records(args: argparse.Namespace) -> None:
    from ..annotation.journal import read_journal

    header, records = read_journal(args.session, until_damage=args.until_damage)
    image = header["image"]
    shape = " x ".join(map(str, image["shape"]))
    print(f"{args.session}: {header['mode']}, image {image.get('name') or '-'} ({shape}), {len(records)} records")
    rows = [("number", "time", "action", "changes", "how")]
    rows += [(str(number), *_describe(record)) for number, record in enumerate(records, 1)]
    _print_table(rows)


def _describe(record: object) -> tuple[str, str, str, str]:
    from ..annotation.journal import Entry, Note

    moment = _moment(record.time)
    if isinstance(record, Note):
        return moment, "note", "", _arguments(record)
    if not isinstance(record, Entry):
        return moment, type(record).__name__.lower(), "", ""
    changes = []
    for layer, delta in record.deltas.items():
        counts = (("+", delta.created), ("-", delta.removed), ("~", delta.changed))
        text = " ".join(f"{sign}{len(ids)}" for sign, ids in counts if ids)
        changes.append(f"{layer} {text}".strip())
    if record.prompts is not None:
        after = record.prompts[1]
        changes.append(f"prompts {len(after.points)} points, {len(after.shapes)} shapes")
    return moment, record.name, "; ".join(changes), _arguments(record.args)


def _arguments(values: dict) -> str:
    text = ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _moment(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
