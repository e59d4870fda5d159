"""Errors that a user can act on.

The command line prints the message of a :class:`DetokError` without a traceback and
exits with its ``exit_code``. Every message names the file or option, says what is wrong
(both values where two disagree) and what to do. Anything else is a defect of ours and
keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class DetokError(Exception):
    """Base of all errors that a user can act on; ``exit_code`` is the process's exit code."""

    exit_code = 2


class ConfigError(DetokError):
    """An option, preset or configuration key is unknown, has a bad value, or disagrees."""


class InputError(DetokError):
    """Images or other input data are missing, empty or unreadable."""


class CacheError(DetokError):
    """A latent cache or sample store is missing, unfinished, damaged or of another version."""


class MismatchError(DetokError):
    """Two artefacts do not belong together (tokenizer and cache, cache and generator, ...)."""


class CheckpointError(DetokError):
    """A checkpoint is missing, cut short, or of another model."""


class WeightsError(DetokError):
    """Published weights or statistics cannot be found, or their checksum is wrong."""


class StorageError(DetokError):
    """Writing failed: the disk is full, or the target is read-only."""


class LockedError(DetokError):
    """Another process uses this directory."""


class NonFiniteError(DetokError):
    """A loss, gradient or latent is not finite."""


class Interrupted(DetokError):
    """Stopped by a signal after the work so far was saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@contextmanager
def input_errors(problem: str) -> Iterator[None]:
    """Turns whatever the reader of a damaged file raises into an InputError: ``problem``, then
    the reader's own words."""
    try:
        yield
    except DetokError:  # Interrupted, by a signal, among them
        raise
    except Exception as error:  # numpy, zipfile, PIL and safetensors raise errors of any kind
        raise InputError(f"{problem}: {type(error).__name__}: {error}") from error
