"""Types of options and arguments: every number has a finite range, every path is looked at.

An option takes one of these types, `click.Choice` or is a flag; a test holds this. So a wrong value
ends before anything is opened, as one line that names the option.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import click

SPECIAL = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
NAME_BYTES = 255 - len("..partial.99999")  # of an output's name; unfinished work adds this to it


class Integer(click.IntRange):
    """An integer in a finite range; both ends belong to it."""

    def __init__(self, low: int, high: int):
        super().__init__(low, high)

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Returns the integer."""
        return super().convert(value, param, ctx)


class Real(click.FloatRange):
    """A finite number in a finite range.

    Args:
      low: lower end.
      high: upper end; belongs to the range.
      above: whether the lower end does not belong to the range.
      below: whether the upper end does not belong to it.
    """

    def __init__(self, low: float, high: float, *, above: bool = False, below: bool = False):
        super().__init__(low, high, min_open=above, max_open=below)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Returns the number; NaN is in no range, but compares as if it were in all."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number in the range {self._describe_range()}.", param, ctx)
        return number

    def _describe_range(self) -> str:
        """The range as an interval, which click's errors and help show."""
        left, right = "(" if self.min_open else "[", ")" if self.max_open else "]"
        return f"{left}{self.min:g}, {self.max:g}{right}"


class Bytes(Integer):
    """A number of bytes, as an integer or with a unit: 60000000, 60MB, 1.5GiB."""

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Returns the number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]i?)B", str(value).strip())
        if found is None:
            return super().convert(value, param, ctx)
        base, power = 1024 if found[2].endswith("i") else 1000, " KMGT".index(found[2][0].upper())
        return super().convert(int(float(found[1]) * base**power), param, ctx)


COUNT = Integer(1, 10**9)  # how many of something are read, run or kept
LENGTH = Integer(2, 2**24)  # tokens of a sequence
SEED = Integer(0, 2**32 - 1)
BYTES = Bytes(1, 2**60)
RANK = Integer(1, 2**24)
PROCESSES = Integer(1, 10**5)
SHARE = Real(0, 1, above=True)
FRACTION = Real(0, 1)
BITS = Real(0, 64, above=True)
POSITIVE = Real(0, 1e6, above=True)
SECONDS = Real(0, 86400, above=True)


class Temperature(Real):
    """A sampling temperature: 0, or a number that float32 divides by without overflow."""

    def __init__(self) -> None:
        super().__init__(0, 1000)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Returns the temperature."""
        number = super().convert(value, param, ctx)
        if 0 < number < 1e-3:
            self.fail(f"{value} is neither 0 nor in the range [0.001, 1000].", param, ctx)
        return number


class Text(click.ParamType):
    """A text of UTF-8 without NUL, which is not empty unless ``empty`` is allowed."""

    name = "text"

    def __init__(self, *, empty: bool = False):
        self.empty = empty

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Returns the text."""
        if not (value or self.empty):
            self.fail("is empty; give a text.", param, ctx)
        try:
            value.encode()
        except UnicodeEncodeError:  # Python keeps bytes that are no UTF-8 as lone surrogates
            self.fail(f"{ascii(value)[:80]} is not UTF-8; write it in UTF-8.", param, ctx)
        if "\0" in value:
            self.fail(f"{ascii(value)[:80]} holds a NUL character; leave it out.", param, ctx)
        return value


class Listed(Text):
    """Values of one type that are separated by commas.

    Args:
      each: type of a value.
      example: list that an error shows.
      empty: whether an empty text, a list of nothing, is allowed.
    """

    def __init__(self, each: click.ParamType, example: str, *, empty: bool = False):
        super().__init__(empty=empty)
        self.each, self.example = each, example

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Returns the values as a tuple."""
        if isinstance(value, tuple):
            return value
        parts = super().convert(value, param, ctx).split(",") if value or not self.empty else []
        try:
            return tuple(self.each.convert(part.strip(), param, ctx) for part in parts)
        except click.BadParameter as error:
            self.fail(f"{value!r} is not a list like {self.example}: {error.message}", param, ctx)


class Ranks(Text):
    """Pairs PATTERN=RANK that are separated by commas, as a dict."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Returns pattern -> rank."""
        if isinstance(value, dict):
            return value
        found = {}
        for part in super().convert(value, param, ctx).split(","):
            name, _, rank = part.rpartition("=")
            if not name or not rank:
                self.fail(f"{value!r} is not like mlp/down=256,mlp/up=128", param, ctx)
            try:
                re.compile(name.strip())
            except (re.error, OverflowError, RecursionError) as error:
                self.fail(f"{name!r} is no regular expression: {error}", param, ctx)
            found[name.strip()] = RANK.convert(rank.strip(), param, ctx)
        return found


class InputPath(Text):
    """A path that is read, or a name that may be no path (a model of the hub).

    Whether it exists is for its reader to say, which knows what is expected there.
    """

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Returns the path as it was given."""
        value = super().convert(value, param, ctx)
        try:
            check_kind(value)
        except (OSError, ValueError) as error:
            self.fail(str(error), param, ctx)
        return value

    def paths(self, value: str) -> list[str]:
        """Returns the paths in a value."""
        return [value]


class Calibration(InputPath):
    """Calibration data: a path, or a mixture of paths and words with shares."""

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Returns the text as it was given."""
        for path in self.paths(value):
            super().convert(path, param, ctx)
        return value

    def paths(self, value: str) -> list[str]:
        """Returns the paths of the parts, see `lordjax.data.mixtures`; of a wrong text itself."""
        parts = [
            part if os.path.exists(part) else part.rpartition(":")[0] or part
            for part in value.split(",")
        ]
        return [value] if os.path.exists(value) or not all(parts) else parts


def check_kind(name: str | os.PathLike[str]) -> None:
    """Checks that a path is no FIFO, socket or device, if it is there.

    Of a directory the entries are checked as well, because reading a FIFO would wait for ever.

    Raises:
      ValueError: if it is; says what was expected.
      OSError: if the path cannot be looked at.
    """
    path = Path(name).expanduser()
    for each in [path, *(path.iterdir() if path.is_dir() else [])]:
        if each.exists():
            mode = each.stat().st_mode
            kind = next((text for test, text in SPECIAL.items() if test(mode)), None)
            if kind is not None:
                raise ValueError(f"{each}: is {kind}; expected a file or a directory")


class OutputPath(Text):
    """A path that is written: a directory, or with ``file`` a file.

    Whether it is free is for its writer to say, because unfinished work may be resumed.
    """

    name = "path"

    def __init__(self, *, file: bool = False):
        super().__init__()
        self.file = file

    def paths(self, value: str) -> list[str]:
        """Returns the path, as `InputPath` does."""
        return [value]

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Returns the path as it was given."""
        value = super().convert(value, param, ctx)
        try:
            self._check(Path(value).expanduser(), value)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a circle of links
            self.fail(str(error), param, ctx)
        return value

    def _check(self, given: Path, value: str) -> None:
        path = given.resolve()
        if os.path.ismount(path) or path == Path.cwd():
            raise ValueError(
                f"{value}: is a mount point or the working directory; name a new "
                f"{'file' if self.file else 'directory'} inside it"
            )
        if len(os.fsencode(path.name)) > NAME_BYTES:
            raise ValueError(f"the name has more than {NAME_BYTES} bytes; choose a shorter one")
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ValueError(f"{value}: is a FIFO, a socket or a device; choose another output")
        if self.file and path.is_dir():
            raise ValueError(f"{value}: is a directory; name a file in it")
        there = next(parent for parent in path.parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"{value}: cannot be created, {there} is not a writable directory; choose another"
            )
        for parent in path.parents:
            if is_model(parent):
                raise ValueError(f"{value}: lies inside {parent}, which is a model; name another")


def is_model(directory: Path) -> bool:
    """Returns whether a directory holds a model, or the unfinished work on one."""
    if not directory.is_dir() or not os.access(directory, os.R_OK | os.X_OK):
        return False
    weights = ("*.safetensors", "pytorch_model*.bin", "adapter_model.*")
    config = any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))
    unfinished = (directory / "run.json").is_file() and (directory / "entries").is_dir()
    return unfinished or (config and any(any(directory.glob(each)) for each in weights))
