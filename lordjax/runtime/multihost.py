"""Several processes that work on one job, each with its own devices and files.

All processes run the same program with the same arguments. A process holds those shards of a global
array (`mesh`) that lie on its own devices. Each process stores its own finished results. Before
they start, and after one of them has died, the processes agree on the results that all of them
have.
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

AUTO = "auto"  # in place of an address: JAX asks the launcher
CONNECT_TIMEOUT = 300.0  # seconds that a process waits for process 0
CHUNK_BYTES = 2**28  # bytes that processes exchange in one call
# Words in the errors of Gloo, NCCL and gRPC when another process makes a collective fail.
COLLECTIVE_ERROR = re.compile(
    r"gloo|nccl|coordination|connection|unavailable|heartbeat|barrier|remote", re.I
)


def process_count() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def process_index() -> int:
    """Returns the index of this process, from 0."""
    return jax.process_index()


def is_primary() -> bool:
    """Returns whether this is process 0, which writes the results."""
    return process_index() == 0


@contextlib.contextmanager
def joined_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> Iterator[None]:
    """Connects this process to the others, if there is a coordinator.

    Must be entered before JAX looks for devices. A process that fails exits at once, so that the
    others fail too instead of waiting for it.

    Args:
      coordinator: ``HOST:PORT`` of process 0; ``auto`` reads it from the launcher's environment
        (Slurm, Open MPI, Kubernetes, Cloud TPU); None means that there is one process.
      process_id: index of this process, from 0. Required with an address.
      num_processes: number of processes. Required with an address.

    Raises:
      ConnectionError: if another process cannot be reached, or ended.
      ValueError: if the arguments contradict each other.
    """
    _check_arguments(coordinator, process_id, num_processes)
    if coordinator is None:
        yield
        return
    try:
        with _quiet_stdout():
            _initialize(coordinator, process_id, num_processes)
            yield
    except jax.errors.JaxRuntimeError as error:
        _exit_without_waiting()
        if COLLECTIVE_ERROR.search(str(error)) is None:
            raise
        raise ConnectionError(
            "another process of this job ended or cannot be reached; read its error, then start "
            f"all processes again to resume from finished work ({str(error).splitlines()[0]})"
        ) from error
    except BaseException:
        _exit_without_waiting()
        raise


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Redirects stdout to stderr: Gloo prints its connections, and stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _check_arguments(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> None:
    """Raises ValueError if the arguments of `joined_processes` contradict each other."""
    given = [number is not None for number in (process_id, num_processes)]
    if coordinator is None or coordinator == AUTO:
        if any(given):
            raise ValueError(
                "--process-id and --num-processes go with --coordinator HOST:PORT, the address of "
                "process 0; give all three or none of them"
            )
        return
    if re.fullmatch(r"\S+:\d+", coordinator) is None:
        raise ValueError(f"--coordinator {coordinator!r}: expected HOST:PORT or {AUTO}")
    if process_id is None or num_processes is None:
        raise ValueError(
            f"--coordinator {coordinator} needs --process-id and --num-processes as well"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id {process_id} with --num-processes {num_processes}: expected a number "
            f"from 0 to {num_processes - 1}"
        )


def _initialize(coordinator: str, process_id: int | None, num_processes: int | None) -> None:
    # Its handler of SIGTERM would replace that of the command line, and end nothing.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator != AUTO:
        _check_address(coordinator, process_id == 0)
        jax.distributed.initialize(
            coordinator, num_processes, process_id, cluster_detection_method="deactivate"
        )
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--coordinator {AUTO}: this process was not started by a launcher that JAX knows "
            f"({error}); give --coordinator HOST:PORT, --process-id and --num-processes"
        ) from error


def _check_address(coordinator: str, own: bool) -> None:
    """Raises ConnectionError if an address is unreachable or, being our own, already in use.

    Without this check JAX would end the process.
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
                    f"({error}); choose another port, the same for all processes"
                ) from error
        return
    end = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"--coordinator {coordinator}: process 0 cannot be reached at this address "
                    f"({error}); check that it runs, and that the address is right"
                ) from error
        time.sleep(0.1)


def _exit_without_waiting() -> None:
    """Makes this process exit once its error is printed, without waiting for the others."""

    def exit_now() -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    atexit.register(exit_now)  # runs before JAX's own exit handler, which waits for minutes


def all_gather_bytes(data: bytes) -> list[bytes]:
    """Returns the bytes that each process passed, by process index."""
    size_words = _all_gather_rows(
        np.array(divmod(len(data), 1 << 16), np.uint32)
    )  # JAX has no 64-bit integers by default
    lengths = [int(high) << 16 | int(low) for high, low in size_words]
    found = [bytearray() for _ in lengths]
    for start in range(0, max(lengths), CHUNK_BYTES):
        sizes = [min(max(length - start, 0), CHUNK_BYTES) for length in lengths]
        # Padded to a power of 2, because every length is compiled separately.
        padded = np.zeros(1 << max(8, (max(sizes) - 1).bit_length()), np.uint8)
        piece = np.frombuffer(data[start : start + CHUNK_BYTES], np.uint8)
        padded[: len(piece)] = piece
        for own, row, size in zip(found, _all_gather_rows(padded), sizes, strict=True):
            own += row[:size].tobytes()
    return [bytes(own) for own in found]


def _all_gather_rows(array: np.ndarray) -> np.ndarray:
    """Returns the vectors of all processes as rows; all must have the same length."""
    return np.asarray(multihost_utils.process_allgather(array)).reshape(process_count(), -1)


def all_gather_json(value: Any) -> list[Any]:
    """Returns the JSON value that each process passed, by process index."""
    if process_count() == 1:
        return [value]
    return [json.loads(text) for text in all_gather_bytes(json.dumps(value).encode())]


def barrier() -> None:
    """Waits until every process has called this function."""
    all_gather_json(None)
