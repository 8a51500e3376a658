"""The errors that curate raises, each with the exit code that the command line returns for it."""

from __future__ import annotations


class CurateError(Exception):
    """A run, a file or a machine is not as it must be; the message is one clear line."""

    exit_code: int = 1


class UsageError(CurateError):
    """The recipe, the option or the data named is wrong: the user's request must change."""

    exit_code = 2


class DataError(UsageError):
    """A data set cannot be read as asked: an empty file, a missing column, repeated ids."""


class CheckFailed(CurateError):  # noqa: N818 - the name says what happened
    """A check of the results failed: a self-check, a checksum, a verification."""

    exit_code = 3
