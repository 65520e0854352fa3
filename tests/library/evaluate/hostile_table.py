"""Runs all hostile programs and prints what each one could do.

``python tests/library/evaluate/hostile_table.py`` prints a row per program and a column per user,
with and without namespaces. Started by root, it also runs as a user without privileges. ``--only
TEXT`` runs programs with this text in their name. ``--without NAME`` (several times) takes
mechanisms away in all columns. ``--json`` prints all results.

``+`` is contained; ``-`` is not contained and the result says so by the value that is shown; ``!``
is not contained and the result does not say so.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import hostile_programs

from lordjax.evaluate.isolation.confinement import WEAK
from lordjax.evaluate.sandbox import PASSED, Checks, Limits, run

NOBODY = 65534
LIMITS = Limits(seconds=20, cpu_seconds=4, memory=2**28, file_bytes=2**20, output=4000)
CHECKS = Checks("assert f(3) == 4", ("f",))
# Values that say that a thing is not contained, besides those that need a second flag.
SAID = {**WEAK, "memory": ("per process",), "process_limit": ("none", "per user")}


@contextlib.contextmanager
def surroundings():
    """Makes what the programs attack: a process, files and sockets of the caller."""
    token = "t" + secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lordjax-victim-")))
        public = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        public.chmod(0o777)
        (folder / "secret").write_text(token)
        (folder / "secret").chmod(0o600)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        servers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        servers[0].bind(str(public / "socket"))
        (public / "socket").chmod(0o777)
        servers[1].bind("\0" + token)
        for server in (tcp, *servers):
            server.listen()
        victim = subprocess.Popen(
            ["/bin/sleep", "100000"], env={"TOKEN": token}, start_new_session=True
        )
        names = {
            "token": token,
            "secret": str(folder / "secret"),
            "target": str(public / "target"),
            "unix": str(public / "socket"),
            "abstract": token,
            "port": tcp.getsockname()[1],
            "victim": victim.pid,
            "shared": secrets.randbelow(2**30),
        }
        try:
            yield names, victim, folder / "secret", public / "target"
        finally:
            victim.kill()
            victim.wait()
            for place in ("/tmp", "/dev/shm", "/var/tmp", os.path.dirname(os.__file__)):
                for file in Path(place).glob(token + "*") if os.access(place, os.W_OK) else ():
                    file.unlink()


def harmed(victim, secret, target):
    """Returns whether a program harmed the caller's process or files."""
    if victim.poll() is not None or target.exists() or not secret.exists():
        return True
    state = Path(f"/proc/{victim.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    limit = resource.prlimit(victim.pid, resource.RLIMIT_CPU)[0]
    return state == "T" or limit == 0 or secret.stat().st_size == 0


def outcome(program, key, without):
    """Runs a program among fresh surroundings; returns a sign and what the result says."""
    with surroundings() as (names, *things):
        key, source = hostile_programs.programs(names)[program]
        try:
            result = run(source, LIMITS, checks=CHECKS, weak=True, without=without)
        except OSError as error:  # it broke the sandbox
            return {"sign": "!", "said": "nothing", "outcome": "", "error": str(error)}
        free = "ESCAPED" in result.output or result.outcome == PASSED or harmed(*things)
    said = result.isolation.get(key, "unknown")
    sign = "+" if not free else "-" if said in SAID.get(key, ()) else "!"
    return {"sign": sign, "said": said, "outcome": result.outcome, "error": result.error}


def python_for_all():
    """Returns a Python that every user may run, or None."""
    found = [
        sys.executable,
        *(shutil.which(f"python3.{n}", path="/usr/bin") for n in range(11, 20)),
    ]
    for path in filter(None, found):
        folders = Path(path).resolve().parents
        if all(folder.stat().st_mode & 1 for folder in folders):
            return path
    return None


def column(without, only):
    """Runs all programs; returns their results by name."""
    return {
        name: outcome(name, key, without)
        for key, group in hostile_programs.GROUPS.items()
        for name in group
        if only in name
    }


def as_user(user, work):
    """Returns what ``work()`` returns in a process of a user; None: nobody can run Python here."""
    python = python_for_all() if user == "user" and not os.getuid() else sys.executable
    if python is None:
        return None
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            if user == "user" and not os.getuid():
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            sys.executable = python
            found = work()
            with open(writing, "w") as file:
                json.dump(found, file)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the programs could not be run; see above")
    return json.loads(text)


def columns(run, without=()):
    """Returns ``{column: run(mechanisms to leave out)}`` by user, with and without namespaces."""
    users = ("user",) if os.getuid() else ("root", "user")
    found = {}
    for user in users:
        for name, less in {"namespaces": (), "none": ("namespaces",)}.items():
            result = as_user(user, functools.partial(run, sorted({*without, *less})))
            if result is not None:
                found[f"{user}, {name}"] = result
    return found


def table(without=(), only=""):
    """Returns ``{column: {program: result}}``."""
    return columns(lambda less: column(less, only), without)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--without", action="append", default=[])
    arguments = parser.parse_args()
    found = table(arguments.without, arguments.only)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| program |", " | ".join(found), "|\n|---|", "---|" * len(found), sep="")
    for name in next(iter(found.values())):
        cells = [rows[name] for rows in found.values()]
        shown = [c["sign"] + (f" {c['said']}" if c["sign"] != "+" else "") for c in cells]
        print(f"| {name} |", " | ".join(shown), "|")
    for name, rows in found.items():
        signs = [row["sign"] for row in rows.values()]
        print(f"{name}: {len(signs)} programs,", {s: signs.count(s) for s in "+-!"})


if __name__ == "__main__":
    main()
