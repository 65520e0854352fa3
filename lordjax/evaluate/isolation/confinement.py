"""What confines a program on this machine, as far as it can be had."""

from __future__ import annotations

import math
import os
import resource
import signal

from lordjax.evaluate.isolation import kernel_calls, landlock, private_root, syscall_filter
from lordjax.evaluate.isolation.kernel_calls import prctl, set_capabilities
from lordjax.evaluate.isolation.python_files import DEVICES, readable, readable_by_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# Normal systems have no accounts in this range; systemd takes its dynamic users from it, too.
FIRST_USER, USERS = 61184, 4336
ROLES = ("program", "checker", "keeper")
NULL = "/dev/null"
TRUNCATES = 3  # the version of Landlock that knows all ways to change a file
WEAK = {
    "network": ("namespace", "socket module"),
    "files": ("those of its user", "all readable"),
    "processes": ("orphans adopted",),
    "process_limit": ("none",),
    "system_calls": ("all",),
}


def own_users() -> tuple[int, ...] | None:
    """Returns a user for every role, which no account has; None without the right to change."""
    first = FIRST_USER + os.getpid() % (USERS // 3) * 3
    users = tuple(range(first, first + 3))
    needed = kernel_calls.CHANGE_USER
    if os.getuid() or kernel_calls.capabilities() & needed != needed:
        return None
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            ranges = [[int(word) for word in line.split()] for line in file]
        if not any(start <= users[0] and users[-1] < start + n for start, _, n in ranges):
            return None
    return users


class Confinement:
    """What confines the processes of a program.

    Args:
      request: the supervisor's request.
      spaces: whether namespaces are in force.
      users: the user of every role; None: the caller.
      group: whether a control group is in force.

    The constructor enters a root directory of its own, if possible.
    """

    def __init__(
        self, request: dict[str, Any], spaces: bool, users: tuple[int, ...] | None, group: bool
    ):
        self.limits, self.spaces, self.users, self.group = request["limits"], spaces, users, group
        without, directory = request["without"], request["directory"]
        self.filter = "filter" not in without and syscall_filter.available()
        has_landlock = "landlock" not in without and landlock.version() > 0
        readable_python = readable_by_all()
        self.private = spaces and private_root.enter(directory, self.limits["file_bytes"])
        if not self.private:
            os.chdir(directory)  # before the change of user, who may not be able to reach it
        read = ["/"] if self.private else [*readable(), *DEVICES, directory]
        write = [NULL, *private_root.WRITABLE] if self.private else [NULL]
        self.rules = landlock.ruleset(read, write) if has_landlock else None
        self.unwritten = self.filter and has_landlock and landlock.version() >= TRUNCATES
        # Where only root can reach Python's files, a program needs root's right to read.
        right = kernel_calls.READ_EVERYTHING & kernel_calls.capabilities()
        self.kept = 0 if readable_python or self.private or os.getuid() else right
        if users is not None:
            if not (readable_python or self.private or self.kept):
                self.users = None
            elif not self.private:
                os.chown(directory, users[0], users[0])

    def isolation(self) -> dict[str, str]:
        """Returns what is in force, see `sandbox`."""
        network = {
            (True, True): "namespace and filter",
            (False, True): "filter",
            (True, False): "namespace",
            (False, False): "socket module",
        }[self.spaces, self.filter]
        files = "those of its user"
        if self.private:
            files = "private"
        elif self.unwritten:
            files = "none written"
        elif self.kept and self.rules is None:
            files = "all readable"
        alone = self.users is not None or self.spaces
        limit = "own" if alone else "per user"
        return {
            "network": network,
            "processes": "namespace"
            if self.spaces
            else "filter"
            if self.unwritten
            else "orphans adopted",
            "files": files,
            "user": "caller" if self.users is None else "own",
            "process_limit": "none" if self.users is None and not os.getuid() else limit,
            "memory": "cgroup" if self.group else "per process",
            "system_calls": "filter" if self.filter else "all",
        }

    def enter(self, role: str) -> None:
        """Confines this process, for ever.

        Args:
          role: "program", "checker" or "keeper"; the keeper is trusted, and only gives up its user
            and privileges.
        """
        keeper = role == "keeper"
        if not keeper:
            self.limit()
        prctl(kernel_calls.NO_NEW_PRIVILEGES, 1)
        if not keeper and self.rules is not None:
            landlock.restrict(self.rules)
        if self.users is not None:
            prctl(kernel_calls.KEEP_CAPABILITIES, 1)
            user = self.users[ROLES.index(role)]
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        set_capabilities(0 if keeper else self.kept)
        prctl(kernel_calls.DUMPABLE, 0)
        prctl(kernel_calls.DEATH_SIGNAL, signal.SIGKILL)  # here, as a change of user clears it
        if not keeper and self.filter:
            syscall_filter.install(private_files=self.private, own_processes=self.spaces)
        elif not keeper and not self.spaces:
            close_sockets()

    def limit(self) -> None:
        """Sets the limits that the kernel enforces per process."""
        # Where it is the caller's user, supervisor, keeper and checker count as its processes.
        processes = self.limits["processes"] + (3 if self.users is None else 0)
        cpu = math.ceil(self.limits["cpu_seconds"])
        memory, size, files = (self.limits[k] for k in ("memory", "file_bytes", "open_files"))
        wanted = {
            resource.RLIMIT_AS: (memory, memory),
            resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, then SIGKILL
            resource.RLIMIT_FSIZE: (size, size),
            resource.RLIMIT_NOFILE: (files, files),
            resource.RLIMIT_NPROC: (processes, processes),
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_MEMLOCK: (0, 0),
        }
        for kind, pair in wanted.items():
            most = resource.getrlimit(kind)[1]
            soft, hard = (v if most == resource.RLIM_INFINITY else min(v, most) for v in pair)
            resource.setrlimit(kind, (soft, hard))


def weaknesses(isolation: dict[str, str]) -> dict[str, str]:
    """Returns those entries that leave a way out to a hostile program."""
    return {key: value for key, value in isolation.items() if value in WEAK.get(key, ())}


def close_sockets() -> None:
    """Makes Python's socket module refuse; protects against accidents, not against intent."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise PermissionError("no network in the sandbox")

    for owner, name in ((socket.socket, "__init__"), (socket, "getaddrinfo")):
        setattr(owner, name, refuse)
