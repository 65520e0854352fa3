"""The benchmark of a GPU: its time limit, what it keeps, and a dry run at toy shapes."""

import json
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from lordjax.scripts.benchmarks.gpu import __main__ as command
from lordjax.scripts.benchmarks.gpu import jobs, products, sizes
from lordjax.scripts.benchmarks.gpu.lines import Deadline, Line, markdown, row, run_lines

FACTS = {"environment": {"device": "a toy"}, "settings": {}}


def run(lines, out, minutes=1.0):
    return run_lines(lines, Deadline(60 * minutes), FACTS, out, show=None)


def test_every_line_is_written_before_the_next_one_runs(tmp_path):
    out, seen = tmp_path / "gpu.json", []

    def look(seconds):
        seen.append([line["status"] for line in json.loads(out.read_text())["lines"]])
        return [row("speed", 2.0, "GB/s")]

    found = run([Line("first", 1, look), Line("second", 1, look)], out)
    assert seen == [["cut by the time limit"], ["measured", "cut by the time limit"]]
    assert json.loads(out.read_text()) == found
    assert "| second | speed | 2 GB/s |  |" in markdown(found)


def test_a_line_that_does_not_fit_is_skipped_and_named(tmp_path):
    lines = [Line("long", 1000, lambda seconds: pytest.fail("it was run"))]
    lines += [Line("short", 1, lambda seconds: [row("speed", 1.0, "GB/s", "a note")])]
    found = run(lines, tmp_path / "gpu.json")
    assert [line["status"] for line in found["lines"]][1] == "measured"
    assert "- long: skipped: needs 1000 s, 5" in markdown(found)


def test_a_line_that_fails_is_named_and_the_others_run(tmp_path):
    def broken(seconds):
        raise ValueError("a wrong kernel")

    lines = [Line("broken", 1, broken), Line("next", 1, lambda seconds: [row("x", 1.0, "s")])]
    found = run(lines, tmp_path / "gpu.json")
    assert found["lines"][0]["status"] == "failed: ValueError: a wrong kernel"
    assert found["lines"][1]["rows"]


def test_numbers_that_are_not_finite_are_written_and_shown(tmp_path):
    out = tmp_path / "gpu.json"
    run([Line("broken", 1, lambda seconds: [row("speed", float("nan"), "GB/s")])], out)
    assert "| broken | speed | not finite |  |" in markdown(json.loads(out.read_text()))


def test_a_wrong_kernel_is_an_error(monkeypatch):
    monkeypatch.setattr(products, "_errors", lambda *given: {"1 rows": 0.5})
    with pytest.raises(ValueError, match=r"nf4 in bfloat16: 1 rows .* 5\.00e-01; expected less"):
        products.correctness(sizes.toy(), interpret=True).run(60)


def test_seconds_of_all_blocks_are_marked():
    seconds = {"gradients": 2.0, "factors": 3.0, "statistics and factors": 4.0}
    rows = {each["what"]: each for each in jobs._rows(seconds, 2, 32)}
    assert rows["all stages"]["value"] == 6 * 16
    assert rows["factors"]["note"] == "2 of 32 blocks; extrapolated"
    assert jobs._rows(seconds, 2, 2)[0]["note"] == "2 of 2 blocks"


HANGING = """
import sys, time
from pathlib import Path
from lordjax.scripts.benchmarks.gpu.lines import Deadline, Line, row, run_lines, show
lines = [Line("fast", 0, lambda seconds: [row("x", 1.0, "s")])]
lines += [Line("hanging", 0, lambda seconds: time.sleep(1000))]
facts = {"environment": {"device": "a toy"}}
run_lines(lines, Deadline(7), facts, Path(sys.argv[1]), show)
"""


@pytest.mark.full
def test_the_time_limit_is_kept_by_a_line_that_hangs(tmp_path):
    out, start = tmp_path / "gpu.json", time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(out)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and time.monotonic() - start < 100
    assert "| fast | x | 1 s |" in done.stdout
    assert "- hanging: cut by the time limit" in done.stdout
    assert json.loads(out.read_text())["lines"][0]["rows"]


def call(*arguments):
    return CliRunner().invoke(command.main, [str(a) for a in arguments])


def test_without_a_gpu_the_command_says_what_to_do(tmp_path):
    result = call("--out", tmp_path / "gpu.json")
    assert result.exit_code == 2 and "give --toy" in result.output
    assert not (tmp_path / "gpu.json").exists()


def test_a_file_is_shown_again_or_refused(tmp_path):
    good, bad = tmp_path / "gpu.json", tmp_path / "bad.json"
    run([Line("one", 1, lambda seconds: [row("x", 1.0, "s")])], good)
    assert "| one | x | 1 s |" in call("--show", good).output
    bad.write_text("{}")
    result = call("--show", bad)
    assert result.exit_code == 2 and f"--show {bad}: expected a file" in result.output


def test_the_most_valuable_lines_come_first():
    names = [line.name for line in command.all_lines(sizes.toy(), interpret=True)]
    assert len(set(names)) == len(names)
    ordered = [
        "correctness",
        "attention",
        "NF4 product",
        "decoding, dense, batch 1",
        "LoRD",
        "MoDeGPT",
        "LQ",
    ]
    places = [next(i for i, name in enumerate(names) if name.startswith(n)) for n in ordered]
    assert places == sorted(places)


@pytest.mark.full
def test_a_dry_run_measures_every_line(tmp_path):
    out = tmp_path / "gpu.json"
    result = call("--toy", "--minutes", 60, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert {line["status"] for line in found["lines"]} == {"measured"}, result.output
    assert all(line["rows"] for line in found["lines"])
    assert "Not measured" not in result.output
