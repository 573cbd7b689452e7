"""Code for a GPU where there is none: a device that cannot be mixed with the CPU gives what the CPU gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

GROUPS = ("classical", "moe_dqinr", "pinqi", "laro", "maps", "training")


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_is_left_on_the_wrong_device(group: str) -> None:
    command = [sys.executable, "-m", "tests.recon_core.on_pretended_device", group]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("same: ")
