"""Several devices give the same statistics, plans and outputs as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.full
def test_functions_on_emulated_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    file = Path(__file__).with_name("meshed_functions.py")
    found = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "functions on 8 devices" in found.stdout
