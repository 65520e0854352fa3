"""Several processes that do one job together, each with devices and files of its own.

All run the same program on the same arguments; arrays over all devices (`mesh`) have their parts in
the processes whose devices hold them. What is finished is kept by every process for itself, so
that before they begin, and after one has died, they agree on what all of them have.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTO = "auto"  # in place of an address: the launcher knows
PATIENCE = 300.0  # seconds that a process waits for the first one
PIECE = 2**28  # bytes that processes exchange at a time
# What a runtime says when a collective fails because of others: Gloo, NCCL, gRPC.
BROKEN = re.compile(r"gloo|nccl|coordination|connection|unavailable|heartbeat|barrier|remote", re.I)


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def process() -> int:
    """Which of them this is, from 0."""
    return jax.process_index()


def is_primary() -> bool:
    """Whether this is the process that writes results: the first one."""
    return process() == 0


@contextlib.contextmanager
def joined_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> Iterator[None]:
    """Joins other processes, if there is a coordinator; to be called before JAX looks for devices.

    A process that fails takes its leave at once, so that the others fail too, and do not wait.

    Args:
      coordinator: ``HOST:PORT`` of the first process; ``auto``: the launcher's environment says it
        (Slurm, Open MPI, Kubernetes, Cloud TPU); None: this process is alone.
      process_id: from 0; with an address.
      num_processes: with an address.

    Raises:
      ConnectionError: if the others cannot be reached, or one of them ended.
      ValueError: if the arguments do not go together.
    """
    _check(coordinator, process_id, num_processes)
    if coordinator is None:
        yield
        return
    try:
        with _quiet_stdout():
            _join(coordinator, process_id, num_processes)
            yield
    except jax.errors.JaxRuntimeError as error:
        _leave_at_once()
        if BROKEN.search(str(error)) is None:
            raise
        raise ConnectionError(
            "another process of this job ended, or cannot be reached; see what it said, then start "
            f"all of them again to go on with what is finished ({str(error).splitlines()[0]})"
        ) from error
    except BaseException:
        _leave_at_once()
        raise


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """What is printed goes to stderr: Gloo prints who is connected, and stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _check(coordinator: str | None, process_id: int | None, num_processes: int | None) -> None:
    """Raises ValueError if the arguments of `job` do not go together."""
    given = [number is not None for number in (process_id, num_processes)]
    if coordinator is None or coordinator == AUTO:
        if any(given):
            raise ValueError(
                "--process-id and --num-processes go with --coordinator HOST:PORT, which is the "
                "address of process 0"
            )
        return
    if re.fullmatch(r"\S+:\d+", coordinator) is None:
        raise ValueError(f"--coordinator {coordinator!r}: expected HOST:PORT or {AUTO}")
    if process_id is None or num_processes is None:
        raise ValueError("--coordinator HOST:PORT needs --process-id and --num-processes")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id {process_id} of --num-processes {num_processes}: expected a number from "
            f"0 to {num_processes - 1}"
        )


def _join(coordinator: str, process_id: int | None, num_processes: int | None) -> None:
    if coordinator != AUTO:
        _reach(coordinator, process_id == 0)
        jax.distributed.initialize(
            coordinator, num_processes, process_id, cluster_detection_method="deactivate"
        )
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--coordinator {AUTO}: no launcher that JAX knows has started this process ({error}); "
            "give HOST:PORT, --process-id and --num-processes"
        ) from error


def _reach(coordinator: str, own: bool) -> None:
    """Raises ConnectionError if there is nobody at an address; of one's own, if there is somebody.

    JAX ends the process instead.
    """
    host, port = coordinator.rsplit(":", 1)
    if own:
        with socket.socket() as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                there.bind(("", int(port)))
            except OSError as error:
                raise ConnectionError(
                    f"--coordinator {coordinator}: port {port} of this machine cannot be used "
                    f"({error}); choose another one for all processes"
                ) from error
        return
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"--coordinator {coordinator}: process 0 cannot be reached there ({error})"
                ) from error
        time.sleep(0.1)


def _leave_at_once() -> None:
    """Has this process end, once its error is printed, without waiting for the others."""

    def leave() -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    atexit.register(leave)  # runs before what JAX has registered, which waits for minutes


def gather(data: bytes) -> list[bytes]:
    """What every process gave, in their order."""
    halves = _rows(np.array(divmod(len(data), 1 << 16), np.uint32))  # jax has no 64 bits
    lengths = [int(high) << 16 | int(low) for high, low in halves]
    found = [bytearray() for _ in lengths]
    for start in range(0, max(lengths), PIECE):
        sizes = [min(max(length - start, 0), PIECE) for length in lengths]
        # Of few lengths, as each is compiled for.
        padded = np.zeros(1 << max(8, (max(sizes) - 1).bit_length()), np.uint8)
        piece = np.frombuffer(data[start : start + PIECE], np.uint8)
        padded[: len(piece)] = piece
        for own, row, size in zip(found, _rows(padded), sizes, strict=True):
            own += row[:size].tobytes()
    return [bytes(own) for own in found]


def _rows(array: np.ndarray) -> np.ndarray:
    """The vectors of all processes, which have one length."""
    return np.asarray(multihost_utils.process_allgather(array)).reshape(count(), -1)


def all_gather_json(value: Any) -> list[Any]:
    """JSON of every process, in their order."""
    if count() == 1:
        return [value]
    return [json.loads(text) for text in gather(json.dumps(value).encode())]


def barrier() -> None:
    """Until every process is here: what they did before has been done by all."""
    all_gather_json(None)
