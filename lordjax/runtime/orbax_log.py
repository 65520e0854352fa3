"""Orbax logs errors that it also raises, with tracebacks; see `unlogged`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Keeps Orbax from logging tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
