"""Mutates valid files, reads them, and counts what happens.

::

    python tests/fuzz/campaign.py --cases 1000000 [--seed 0] [--formats gguf,npy]

Every case is made of the seed, the format, the kind of mutation and its number, so each can be run
again alone: ``--formats gguf --kind lengths --case 17``. Cases run in processes that the campaign
watches: one that takes more than 10 s, more than 1 GB more than before, or crashes is counted.
"""

# ruff: noqa: E402 (paths and settings come before what they are for)

import argparse
import collections
import hashlib
import importlib.util
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

for _folder in ("support", "library/storage"):
    sys.path.append(str(Path(__file__).parents[1] / _folder))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
from corpus import FORMATS
from mutations import generator

SECONDS, BYTES = 10, 10**9  # most that a case may take
# Outcomes; all but the first three are faults.
ERROR, SAME, OTHER = "error", "same", "other values"
SILENT, TRACEBACK, NAMELESS = "silently different", "traceback", "error without path"
HANG, MEMORY, OUTSIDE, CRASH = "hang", "memory", "write outside", "crash"
OUTCOMES = (ERROR, SAME, OTHER, SILENT, TRACEBACK, NAMELESS, HANG, MEMORY, OUTSIDE, CRASH)
FAULTS = OUTCOMES[3:]
_PANIC = "PanicException"


class Bench:
    """A format's valid files, and a directory in which one of them is mutated at a time."""

    def __init__(self, name, root):
        self.name, self.format = name, FORMATS[name]
        folder = Path(root) / name.replace(" ", "-")
        self.valid, self.trial, self.outside = (folder / n for n in ("valid", "trial", "outside"))
        self.valid.mkdir(parents=True)
        self.outside.mkdir()
        (self.outside / "victim").write_text("precious\n")
        self.format.build(self.valid)
        self._restore()
        found = self.format.read(self.trial)
        self.digest, self._config = digest(found), config_of(found)

    def run(self, kind, seed, number):
        """Runs a case; returns its outcome and what is known about a fault."""
        self._restore()
        rng = generator(seed, self.name, kind, number)
        self.format.kinds[kind](rng, self.trial)
        start, before = time.monotonic(), _peak()
        outcome, detail = self._outcome()
        if outcome == OTHER and kind in self.format.checked:
            outcome = SILENT
        seconds, grown = time.monotonic() - start, _peak() - before
        if seconds > SECONDS:
            return HANG, f"{seconds:.0f} s; {outcome}: {detail}"
        if grown > BYTES:
            return MEMORY, f"{grown / 1e9:.1f} GB; {outcome}: {detail}"
        if self._outside_changed():
            return OUTSIDE, f"{outcome}: {detail}"
        return outcome, detail

    def _outcome(self):
        try:
            found = self.format.read(self.trial)
        except (ValueError, OSError) as error:
            text = str(error)
            named = str(self.trial) in text and _printable(text)
            return (ERROR, text) if named else (NAMELESS, _told(error))
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            return TRACEBACK, _told(error)
        if digest(found) == self.digest:
            return SAME, ""
        if self.format.says is None or config_of(found) != self._config:
            return OTHER, ""
        try:
            same = numbers(self.format.says(self.trial)) == numbers(
                jax.tree.leaves(found["params"])
            )
        except Exception as error:
            return SILENT, f"another program refuses the file: {_told(error)}"
        return (OTHER, "") if same else (SILENT, "another program reads other numbers")

    def _restore(self):
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(self.valid, self.trial)

    def _outside_changed(self):
        """Whether a file beside the directory was written or removed; puts it back."""
        victim = self.outside / "victim"
        there = [path.name for path in self.outside.iterdir()] == ["victim"]
        if there and victim.read_text() == "precious\n":
            return False
        shutil.rmtree(self.outside)
        self.outside.mkdir()
        victim.write_text("precious\n")
        return True


def _told(error):
    return "".join(traceback.format_exception(error)[-6:])[-1500:]


def _shown(text):
    return text.encode("utf-8", "backslashreplace").decode()


def _printable(text):
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def digest(tree):
    """The SHA-256 of all arrays and plain values of a tree."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        value = leaf
        if hasattr(leaf, "dtype"):
            value = np.ascontiguousarray(leaf)
            found.update(f"{value.dtype}{value.shape}".encode())
            value = value.tobytes()
        found.update(f"{path}".encode())
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()


def config_of(found):
    """The config of a model that was read; None of other files."""
    return found.get("config") if isinstance(found, dict) else None


def numbers(arrays):
    """Digests of the sorted numbers of every array: equal for equal arrays in any layout."""
    flat = (np.sort(np.asarray(array, np.float32), axis=None) for array in arrays)
    return collections.Counter(hashlib.sha256((array + 0.0).tobytes()).digest() for array in flat)


def installed(name):
    """Whether the packages are there that a format needs."""
    needs = FORMATS[name].needs
    return needs is None or importlib.util.find_spec(needs) is not None


def cases(count, formats, kind=None):
    """``count`` cases, shared out evenly: format, kind and number of each."""
    pairs = [(name, k) for name in formats for k in FORMATS[name].kinds if kind in (None, k)]
    for number in range(-(-count // len(pairs))):
        for name, each in pairs[: count - number * len(pairs)]:
            yield name, each, number


def _work(connection, root, seed):
    """Runs the cases that come, in a process of its own."""
    warnings.simplefilter("ignore")
    os.fsync = lambda handle: None  # half of the time of a case, and nothing is pulled out here
    os.chdir(root)
    benches = {}
    while (case := connection.recv()) is not None:
        name, kind, number = case
        if name not in benches:
            benches[name] = Bench(name, tempfile.mkdtemp(dir=root))
            connection.send(None)
        connection.send(benches[name].run(kind, seed, number))


class Worker:
    """A process that runs cases, and is replaced when a case takes it down."""

    def __init__(self, root, seed):
        self._root, self._seed, self._known = root, seed, set()
        self._start()

    def _start(self):
        self._known.clear()
        self._pipe, theirs = multiprocessing.Pipe()
        work = multiprocessing.get_context("spawn").Process
        self._process = work(target=_work, args=(theirs, self._root, self._seed), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, case):
        """Outcome and detail of a case."""
        self._pipe.send(case)
        try:
            if case[0] not in self._known:
                self._wait(600)
                self._known.add(case[0])
            return self._wait(3 * SECONDS)
        except (EOFError, ConnectionResetError, TimeoutError) as error:
            self._process.kill()
            self._process.join()
            self._start()
            hung = isinstance(error, TimeoutError)
            return (HANG, "no end") if hung else (CRASH, f"exit code {self._process.exitcode}")

    def _wait(self, seconds):
        if not self._pipe.poll(seconds):
            raise TimeoutError
        return self._pipe.recv()

    def close(self):
        self._pipe.send(None)
        self._process.join()


def table(counts):
    """Markdown: a row per format and kind of mutation, a column per outcome."""
    rows = [f"| format | mutation | {' | '.join(OUTCOMES)} |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for (name, kind), found in counts.items():
        rows.append(f"| {name} | {kind} | {' | '.join(str(found[o]) for o in OUTCOMES)} |")
    total = sum(counts.values(), collections.Counter())
    rows.append(f"| all | {total.total()} cases | {' | '.join(str(total[o]) for o in OUTCOMES)} |")
    return "\n".join(rows)


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--cases", type=int, default=10_000)
    parse.add_argument("--seed", default="0")
    there = [name for name in FORMATS if installed(name)]
    for name in FORMATS.keys() - there:
        print(f"{name}: left out, because {FORMATS[name].needs} is not installed")
    parse.add_argument("--formats", default=",".join(there))
    parse.add_argument("--kind")
    parse.add_argument("--case", type=int, help="run this number of a format and kind alone")
    asked = parse.parse_args()
    names, counts = asked.formats.split(","), collections.defaultdict(collections.Counter)
    chosen = cases(asked.cases, names, asked.kind)
    if asked.case is not None:
        chosen = [(names[0], asked.kind, asked.case)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _run(chosen, asked, counts)
    finally:
        print(table(counts))
    sys.exit(any(found[fault] for found in counts.values() for fault in FAULTS))


def _run(chosen, asked, counts):
    """Runs the cases and counts their outcomes; shows the first faults of each kind."""
    shown = collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        worker = Worker(root, asked.seed)
        for done, case in enumerate(chosen, 1):
            outcome, detail = worker.run(case)
            if done % 10_000 == 0:
                print(
                    f"{done} cases: {dict(sum(counts.values(), collections.Counter()))}", flush=True
                )
            counts[case[:2]][outcome] += 1
            key = (outcome, detail.strip().splitlines()[-1][:60] if detail else "")
            shown[key] += outcome in FAULTS
            if asked.case is not None or (outcome in FAULTS and shown[key] <= 2):
                print(f"{outcome}: {' / '.join(map(str, case))}\n{_shown(detail)}", flush=True)
        worker.close()


if __name__ == "__main__":
    main()
