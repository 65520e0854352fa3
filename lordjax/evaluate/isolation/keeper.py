"""The keeper: the first process of its namespace, parent of program and checker.

When it ends, the kernel kills all others in the namespace. It reports on a pipe that is closed in
its children before they run anything. No other process can take it: the keeper is not dumpable.
"""

from __future__ import annotations

import importlib
import json
import os
import signal

from lordjax.evaluate.isolation import checker, program
from lordjax.evaluate.isolation.confinement import Confinement, weaknesses
from lordjax.evaluate.isolation.peer import line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MOST = 1024  # descriptors of this package are smaller


def keep(
    request: dict[str, Any],
    spaces: bool,
    users: tuple[int, ...] | None,
    group: bool,
    pipes: dict[str, int],
) -> None:
    """Confines, runs program and checker, and reports how they ended.

    Args:
      request: the supervisor's request.
      spaces: whether namespaces are in force.
      users: a user for program, checker and keeper; None: the caller.
      group: whether this process is in a control group of its own.
      pipes: descriptors to write ``output``, ``verdict`` and ``status``.
    """
    status = pipes["status"]
    confinement = Confinement(request, spaces, users, group)
    isolation = confinement.isolation()
    if (weak := weaknesses(isolation)) and not request["weak"]:
        send(status, {"refused": weak})
        return
    send(status, {"isolation": isolation})
    if "typing" in request["program"]:
        importlib.import_module("typing")  # once for both; it takes longer than most programs run
    to_program, to_checker, alive = os.pipe(), os.pipe(), os.pipe()

    def run_program(reading: int, writing: int) -> None:
        program.run(request["program"], reading, writing)

    parts: dict[str, tuple[list[int], Callable[..., None]]] = {
        "program": ([to_program[0], to_checker[1]], run_program),
        "checker": ([to_checker[0], to_program[1], alive[0], pipes["verdict"]], checker.check),
    }
    first, second = (
        start(confinement, role, kept, part, pipes) for role, (kept, part) in parts.items()
    )
    send(status, {"groups": [first, second]})
    confinement.enter("keeper")
    close_all_but({status, alive[1]})
    # A program of the same user may send signals, of which all but two can be blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    send(status, wait(first, second, alive[1]))


def start(
    confinement: Confinement,
    role: str,
    kept: list[int],
    part: Callable[..., None],
    pipes: dict[str, int],
) -> int:
    """Starts a confined process; returns its number.

    Args:
      confinement: what confines it.
      role: "program" or "checker".
      kept: descriptors that it keeps.
      part: function that it runs with these descriptors.
      pipes: as for `keep`.
    """

    def confined() -> None:
        os.setpgid(0, 0)
        os.dup2(pipes["output"], 1)
        os.dup2(pipes["output"], 2)
        if role == "program":  # the checks are unread in standard input
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        confinement.enter(role)
        close_all_but({0, 1, 2, *kept})
        part(*kept)

    child = os.fork()
    if not child:
        guarded(confined, pipes["status"])
    os.setpgid(child, child)  # on both sides, so that the group is there when this returns
    return child


def wait(program_number: int, checker_number: int, alive: int) -> dict[str, Any]:
    """Waits until the checker ends; tells it when the program has ended.

    Returns:
      How each ended: exit code or negative signal, and seconds of CPU time; None if it has not.
    """
    ends: dict[int, list[float] | None] = {program_number: None, checker_number: None}
    while ends[checker_number] is None:
        found, status, usage = os.wait4(-1, 0)  # also returns adopted orphans
        if found in ends:
            code = os.waitstatus_to_exitcode(status)
            ends[found] = [code, usage.ru_utime + usage.ru_stime]
        if found == program_number:
            os.close(alive)
    return {"program": ends[program_number], "checker": ends[checker_number]}


def close_all_but(kept: set[int]) -> None:
    """Closes all descriptors but these."""
    last = -1
    for number in [*sorted(kept), MOST]:
        if last + 1 < number:  # an empty range that begins at 0 would be all descriptors
            os.closerange(last + 1, number)
        last = number


def guarded(part: Callable[[], None], errors: int) -> NoReturn:
    """Runs a function in a forked process and exits; never returns into the parent's code."""
    code = 0
    try:
        part()
    except BaseException as error:
        code = 1
        send(errors, {"error": line(error)})
    finally:
        os._exit(code)


def send(pipe: int, message: dict[str, Any]) -> None:
    """Writes a message as one line, short enough that writing never blocks."""
    os.write(pipe, json.dumps(message).encode() + b"\n")
