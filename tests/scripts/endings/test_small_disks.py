"""Whole commands on disks that are too small, and on inputs that belong to somebody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("small_disks.py")


def may_mount():
    """Whether this process may have a disk of its own."""
    code = "from small_disks import own_mounts; own_mounts()"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=False)
    return done.returncode == 0


@pytest.mark.full
@pytest.mark.parametrize("job", ["convert", "export"])
def test_a_command_without_room_ends_in_one_line_and_goes_on_later(job):
    if sys.platform != "linux" or os.getuid() or not may_mount():
        pytest.skip("needs root on Linux, and the right to mount")
    command = [sys.executable, str(SCRIPT), "--jobs", job, "--shares", "0.4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.strip().endswith("| none |")
