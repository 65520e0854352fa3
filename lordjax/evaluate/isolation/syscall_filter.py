"""A filter of system calls (seccomp): what a Python program needs is allowed, all else refused.

There is no binding here: those that exist need a library of the system, and the supervisor runs
without installed packages. The filter is a program for the kernel's packet filter (BPF): it
compares the number of the call with every entry of `syscall_table`, then looks at the arguments.

Source: seccomp(2); https://docs.kernel.org/userspace-api/seccomp_filter.html.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lordjax.evaluate.isolation.kernel_calls import call, machine
from lordjax.evaluate.isolation.syscall_table import (
    ALLOWED,
    METADATA,
    NUMBERS,
    SIGNALS,
    conditions,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lordjax.evaluate.isolation.syscall_table import Condition

LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
AUDIT_MACHINES = (0xC000003E, 0xC00000B7)  # x86-64 and aarch64, as `kernel_calls.MACHINES`
OTHER_INTERFACE = 0x40000000  # calls of x32, which x86-64 also offers
SECCOMP_OF_PRCTL, FILTER, GET_SECCOMP = 22, 2, 21


def available() -> bool:
    """Returns whether this machine has a filter."""
    if machine() is None:
        return False
    try:
        call("prctl", GET_SECCOMP, 0, 0, 0, 0)
    except OSError:
        return False
    return True


def instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """Returns an instruction; ``yes`` and ``no`` say how many to skip after a comparison."""
    return struct.pack("=HBBI", code, yes, no, value)


def program(machine_index: int, *, private_files: bool, own_processes: bool) -> bytes:
    """Returns the filter as instructions of BPF.

    Args:
      machine_index: the place of the machine in `kernel_calls.MACHINES`.
      private_files: whether the program's files are its own, so that it may change their mode.
      own_processes: whether it sees no processes but its own, so that it may signal all.
    """
    text = [
        instruction(LOAD, 4),  # the machine
        instruction(EQUAL, AUDIT_MACHINES[machine_index], 1, 0),
        instruction(RETURN, KILL),
        instruction(LOAD, 0),  # the number of the call
        instruction(AT_LEAST, OTHER_INTERFACE, 0, 1),
        instruction(RETURN, REFUSE | errno.EPERM),
    ]
    names = " ".join([ALLOWED, METADATA * private_files, SIGNALS * own_processes])
    tests: dict[str, tuple[Condition, ...]] = dict.fromkeys(names.split(), ())
    tests |= conditions(os.getpid(), own_processes)
    for name, arguments in tests.items():
        number = NUMBERS[name][machine_index]
        if number is not None:
            block = [part for argument in arguments for part in tested(argument)]
            block.append(instruction(RETURN, ALLOW))
            text += [instruction(EQUAL, number, 0, len(block)), *block]
    # The C library then uses the older call, whose flags can be tested.
    text += [instruction(EQUAL, NUMBERS["clone3"][machine_index] or 0, 0, 1)]
    text += [instruction(RETURN, REFUSE | errno.ENOSYS), instruction(RETURN, REFUSE | errno.EPERM)]
    return b"".join(text)


def tested(condition: Condition) -> list[bytes]:
    """Returns instructions that refuse the call unless a word of its arguments is as it must be."""
    word, mask, values = condition
    found = [instruction(LOAD, 16 + 4 * word), instruction(AND, mask)]
    for i, value in enumerate(values):
        found.append(instruction(EQUAL, value, len(values) - i))
    return [*found, instruction(RETURN, REFUSE | errno.EPERM)]


def install(*, private_files: bool, own_processes: bool) -> None:
    """Filters the calls of this process and of all that it starts, for ever.

    Raises:
      OSError: if the kernel has no filter; new privileges must be given up before.
    """
    index = machine()
    if index is None:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {os.uname().machine}")
    text = program(index, private_files=private_files, own_processes=own_processes)
    buffer = ctypes.create_string_buffer(text, len(text))
    size, address = len(text) // 8, ctypes.addressof(buffer)
    description = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", size, address), 16)
    call("prctl", SECCOMP_OF_PRCTL, FILTER, description, 0, 0)
