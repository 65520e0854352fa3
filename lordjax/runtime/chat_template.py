"""Runs the chat template of a tokenizer, which is a program that came with the model.

It may loop for ever, or write without end. So it has `SECONDS` and `BYTES`, and its text a length.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lordjax.runtime.input_files import reading

SECONDS, BYTES = 5.0, 7 * 10**8  # most that a template takes
AGAIN = 0.1  # seconds after which the time limit is said again, if the template swallowed it
# Characters of a text: so many, or so many times those of the messages if they are long.
LENGTH, GROWTH = 2**22, 4
STATUS = Path("/proc/self/statm")


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, problem: str, **options: Any
) -> str:
    """Returns messages as the text that the chat template makes of them.

    Args:
      tokenizer: a tokenizer of transformers.
      messages: messages with role and content.
      where: the model or the data, for error messages.
      problem: what an error says about it.
      **options: other arguments of ``apply_chat_template``.

    Raises:
      ValueError: if the template raises an error, does not end, takes too much memory, or makes too
        long a text.
    """
    with reading(where, problem, "correct it"):
        with limited(SECONDS, BYTES):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        given = sum(len(str(message)) for message in messages)
        if not isinstance(text, str):
            raise TypeError(f"it makes a {type(text).__name__} of the messages")
        if len(text) > (most := max(LENGTH, GROWTH * given)):
            raise ValueError(f"a text of {len(text):,} characters, more than {most:,}")
        return text


@contextlib.contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Limits the time and the memory of Python code, where the system can.

    The time is limited in the main thread of a POSIX system only, by a signal. The memory is that
    of the whole process, and limited on Linux only.

    Args:
      seconds: most seconds that the block may take.
      memory: most bytes that it may take more than before.

    Raises:
      TimeoutError: if time is up.
      MemoryError: if there is no more memory.
    """
    with contextlib.ExitStack() as stack:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            stack.enter_context(_limited_time(seconds))
        if STATUS.exists():
            stack.enter_context(_limited_memory(memory))
        yield


@contextlib.contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s")

    before, collects = signal.signal(signal.SIGALRM, end), gc.isenabled()
    # Python prints and drops an error that is raised while it collects garbage.
    gc.disable()
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if collects:
            gc.enable()


@contextlib.contextmanager
def _limited_memory(memory: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(STATUS.read_text("utf-8").split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + memory
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
