"""The command `micro_sam.info`: versions, devices, cache and models; what is missing and how to get it."""

import argparse
import json
import sys
from collections.abc import Sequence

from ._common import EXIT_CODES, FAILED, OK, Parser, run_command


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "Show versions, devices, the cache directory and the models, and what is missing; or download models.",
        EXIT_CODES,
    )
    parser.add_argument(
        "--download", nargs="+", metavar="NAME",
        help="download these models and their decoders; 'models' (or 'all') for all published ones",
    )
    parser.add_argument("--no_verify", action="store_true", help="do not check the hashes of the model files (faster)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _run(args), args.verbose)


def _run(args: argparse.Namespace) -> int:
    if args.download is not None:
        return _download(args.download, args.json)

    from ..models.doctor import collect_info, format_info
    info = collect_info(verify=not args.no_verify)
    print(json.dumps(info, indent=2) if args.json else format_info(info))
    return OK


def _download(names: Sequence[str], as_json: bool) -> int:
    from ..core.errors import MicroSamError
    from ..models.doctor import download_models
    from ..models.registry import find_spec
    from ..models.specs import MODELS

    # `--download models [NAME…]` is the older form.
    if names[0].lower() in ("models", "model", "all"):
        names = names[1:] or [spec.name for spec in MODELS if spec.files]
    for name in names:
        find_spec(name)  # all names are checked before the first download

    from tqdm import tqdm

    def bar(name: str) -> tqdm:
        return tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024)

    paths, errors = {}, {}
    for name in names:
        try:
            paths |= download_models([name], bar)
            if not as_json:
                print(f"{name}: ready ({', '.join(str(p) for p in paths[name].values() if p)})", flush=True)
        except MicroSamError as error:
            errors[name] = str(error)
            print(f"error: {name}: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"models": paths, "errors": errors}, indent=2, default=str))
    return FAILED if errors else OK


if __name__ == "__main__":
    sys.exit(main())
