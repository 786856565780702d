"""Loading `bioimageio.spec` and `bioimageio.core`, which are an optional part of the installation."""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any

from ..core.errors import MissingPackageError, UnsupportedError


def load_bioimageio() -> tuple[Any, Any]:
    """Return the modules `bioimageio.spec` and `bioimageio.core`.

    Raises:
        MissingPackageError: If they are not installed.
        UnsupportedError: If their versions do not work together.
    """
    try:
        import bioimageio.core
        import bioimageio.spec
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Packages for bioimage.io need {error.name}, which is not installed: "
            "pip install \"micro_sam[bioimageio]\"."
        ) from error
    _check_serializers(bioimageio.spec)
    return bioimageio.spec, bioimageio.core


@contextlib.contextmanager
def closing_files() -> Iterator[None]:
    """Close the files that `bioimageio` opened and left open; some systems cannot delete them otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        finally:
            gc.collect()


def _check_serializers(spec: Any) -> None:
    """Raise `UnsupportedError` for `bioimageio.spec` 0.5.12 with pydantic 2.14, which cannot build any description.

    The extra `bioimageio` does not install this pair, but another package may have updated pydantic.
    """
    from pydantic import TypeAdapter
    from pydantic_core import PydanticSerializationError

    try:
        from bioimageio.spec._internal.io_packaging import FileDescr_package
    except ImportError:  # another version
        return
    adapter = TypeAdapter(FileDescr_package)
    with spec.ValidationContext(perform_io_checks=False):
        try:
            adapter.dump_python(adapter.validate_python({"source": "a.txt"}), mode="json")
        except PydanticSerializationError as error:
            raise UnsupportedError(
                f"bioimageio.spec {spec.__version__} does not work with the installed version of pydantic. Install "
                "another one: pip install \"pydantic<2.14\"."
            ) from error
