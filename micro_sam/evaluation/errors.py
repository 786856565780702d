"""Errors of the evaluation that callers of the earlier functions catch as `AssertionError`."""

from ..core.errors import InvalidInputError, MissingFileError


class UnfitInputsError(InvalidInputError, AssertionError):
    """Truth and prediction do not fit to each other: their numbers, names or shapes differ, or a key is missing."""


class MissingInputError(MissingFileError, AssertionError):
    """A file that is to be evaluated does not exist."""
