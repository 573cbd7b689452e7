"""Code for a GPU where there is none: a device that cannot be mixed with the CPU gives what the CPU gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

# two processes, of which each takes seconds to begin
GROUPS = ("classical moe_dqinr pinqi", "laro maps training")


@pytest.mark.parametrize("groups", GROUPS)
def test_nothing_is_left_on_the_wrong_device(groups: str) -> None:
    command = [sys.executable, "-m", "tests.recon_core.on_pretended_device", *groups.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    same = [line.partition(",")[0] for line in done.stdout.splitlines()]
    assert set(same) == {f"same: {group}" for group in groups.split()}
