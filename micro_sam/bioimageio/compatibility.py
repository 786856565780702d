"""Loading `bioimageio.spec` and `bioimageio.core`, which are an optional part of the installation."""

import contextlib
import gc
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..core.errors import MissingPackageError


def load_bioimageio() -> tuple[Any, Any]:
    """Return the modules `bioimageio.spec` and `bioimageio.core`.

    Raises:
        MissingPackageError: If they are not installed.
    """
    try:
        import bioimageio.core
        import bioimageio.spec
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"Packages for bioimage.io need {error.name}, which is not installed: "
            "pip install \"micro_sam[bioimageio]\"."
        ) from error
    _repair_serializers(bioimageio.spec)
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


def _repair_serializers(spec: Any) -> None:
    """Make `bioimageio.spec` 0.5.12 work with pydantic 2.14, a combination that `bioimageio.core` 0.11 allows.

    Two serializers of the former pass `info` as second argument to the handler that pydantic gives them. Before 2.14
    it was ignored; since then it is refused, so that no description can be built, read or tested. Where they
    work, nothing is changed.
    """
    try:
        from bioimageio.spec._internal.io_packaging import FileDescr_package, package_file_descr_serializer
        from bioimageio.spec.model.v0_4 import package_weights
    except ImportError:  # a later version
        return
    from pydantic import TypeAdapter
    from pydantic_core import PydanticSerializationError

    adapter = TypeAdapter(FileDescr_package)
    with spec.ValidationContext(perform_io_checks=False):
        example = adapter.validate_python({"source": "a.txt"})
        try:
            adapter.dump_python(example, mode="json")
        except PydanticSerializationError:
            _drop_second_argument(package_file_descr_serializer)
            _drop_second_argument(package_weights)


def _drop_second_argument(serializer: Callable) -> None:
    """Let a serializer call its handler with the value only. Pydantic holds the function, so its code is replaced."""
    names = serializer.__globals__
    names["_unrepaired"] = types.FunctionType(serializer.__code__, names)
    serializer.__code__ = _repaired.__code__


def _repaired(value, handler, info):
    return _unrepaired(value, lambda value, _=None: handler(value), info)  # noqa: F821 (in the module of the serializer)
