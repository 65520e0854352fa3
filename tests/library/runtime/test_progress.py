"""`peak_rss` measures the current process, not its parent."""

import subprocess
import sys

import numpy as np

from lordjax.runtime.progress import peak_rss


def test_a_process_does_not_inherit_the_peak_of_its_parent():
    size = 400 * 2**20
    held = np.ones(size, np.uint8)
    before = peak_rss()
    assert before > size
    code = "from lordjax.runtime.progress import peak_rss; print(peak_rss())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    del held  # until here
    assert int(child.stdout) < before
