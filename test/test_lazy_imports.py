"""What must stay light: the package, the parsers, core and the table of models. Each check is a fresh process."""

import pkgutil
import subprocess
import sys
import time

import pytest

import micro_sam.cli
import micro_sam.core

HEAVY = ("torch", "napari", "qtpy", "segment_anything", "torch_em")
COMMANDS = [
    "automatic_segmentation:main", "precompute_embeddings:main", "info:main", "train:main", "replay:main",
    "annotators:main_2d", "annotators:main_3d", "annotators:main_tracking", "annotators:main_series", "convert:main",
    "evaluate:main", "benchmark_sam:main", "export_model:main", "export_model:main_import",
]


def loaded_modules(code: str) -> set[str]:
    code = f"import sys\n{code}\nprint('\\n'.join(m for m in {HEAVY} + ('numpy', 'zarr') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_check_itself_sees_torch():
    assert "torch" in loaded_modules("import micro_sam.models.tiny_vit")


@pytest.mark.parametrize(
    "module",
    ["micro_sam", "micro_sam.util", "micro_sam.models.specs", "micro_sam.models.registry"]
    + [f"micro_sam.core.{m.name}" for m in pkgutil.iter_modules(micro_sam.core.__path__)],
)
def test_light_modules(module):
    assert not loaded_modules(f"import {module}") & set(HEAVY)


def test_the_package_alone_loads_nothing():
    assert loaded_modules("import micro_sam; micro_sam.__version__") == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_light_and_quick(command):
    module, function = command.split(":")
    code = (
        f"from micro_sam.cli.{module} import {function} as main\n"
        "import contextlib, io\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])"
    )
    assert loaded_modules(code) == set(), "not even numpy is needed for a help text"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run = f"from micro_sam.cli.{module} import {function} as main; main(['--help'])"
        result = subprocess.run([sys.executable, "-c", run], capture_output=True)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
    assert min(seconds) < 0.5


def test_every_command_is_checked_here():
    modules = {m.name for m in pkgutil.iter_modules(micro_sam.cli.__path__)}
    assert {name for name in modules if not name.startswith("_")} == {c.split(":")[0] for c in COMMANDS}


def test_segment_is_found_lazily():
    code = "import micro_sam; assert callable(micro_sam.segment)"
    assert "torch" in loaded_modules(code)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = micro_sam.nothing_of_that_name
