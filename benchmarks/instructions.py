"""Count the instructions that the hot paths execute, where seconds are too noisy to see a regression.

    python benchmarks/instructions.py -k "merge or tracking" --save before.json
    python benchmarks/instructions.py -k "merge or tracking" --compare before.json

The benchmarks of `test_hot_paths.py` run in callgrind (valgrind, a package of the operating system) on one thread: a
call to warm up, and one that is counted. Counts do not depend on what else the machine does, but they are no seconds:
waiting for memory or files is not in them, and networks use other kernels, as valgrind has no AVX-512.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def control(*command: str) -> None:
    """Send a command to the callgrind that this process runs in."""
    subprocess.run(["callgrind_control", *command, str(os.getpid())], check=True, capture_output=True)


class Counter:
    """Takes the place of the fixture of pytest-benchmark, which would call a function until its time is known."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, function, *args, **kwargs):
        return self.pedantic(function, setup=lambda: (args, kwargs))

    def pedantic(self, function, setup=lambda: ((), {}), **_):
        args, kwargs = setup()
        function(*args, **kwargs)
        args, kwargs = setup()
        control("--instr=on")
        control("--zero")
        result = function(*args, **kwargs)
        control(f"--dump={self.name}")
        control("--instr=off")
        return result


@pytest.fixture
def benchmark(request):
    return Counter(request.node.name)


def count(expression: str) -> dict[str, int]:
    """Run the chosen benchmarks in callgrind; returns the instructions of each, by the name of its test."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out", "--quiet",
                sys.executable, "-m", "pytest", FOLDER, "-p", "no:benchmark", "-p", "instructions", "-k", expression,
            ],
            env={**os.environ, "PYTHONPATH": str(FOLDER), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            sys.exit("The benchmarks did not run, see above: a test failed, or -k fits none of them.")
        counts = {}
        for path in Path(folder).iterdir():
            text = path.read_text()
            if name := re.search(r"^desc: Trigger: dump (.+)$", text, re.M):
                counts[name[1]] = int(re.search(r"^totals: (\d+)$", text, re.M)[1])
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which benchmarks, as for pytest; default: all")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the counts as JSON")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="fail if a count grew against those of this file")
    parser.add_argument("--limit", type=float, default=0.05, help="growth that --compare allows; default: 0.05")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        parser.error("valgrind is missing; install it with the package manager of the system.")

    before = json.loads(args.compare.read_text()) if args.compare else {}
    counts = count(args.k)
    if before and not before.keys() & counts.keys():
        sys.exit(f"{args.compare} has none of {', '.join(counts)}. Save a file with the same -k first.")
    grown = []
    for name, n in counts.items():
        growth = n / before[name] - 1 if name in before else None
        print(f"{name:35} {n / 1e6:12.2f} million" + ("" if growth is None else f" {growth:+8.2%}"))
        if growth is not None and growth > args.limit:
            grown.append(name)
    if args.save:
        args.save.write_text(json.dumps(counts, indent=1) + "\n")
    if grown:
        sys.exit(f"More than {args.limit:.0%} above {args.compare}: {', '.join(grown)}")


if __name__ == "__main__":
    main()
