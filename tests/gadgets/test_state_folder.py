"""Where a server keeps what its workers use again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gadgets.state_folder import compiler_caches

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)


def test_compilers_keep_their_files_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler_caches()
    for name in VARIABLES:
        assert Path(os.environ[name]).is_dir() and Path(os.environ[name]).parent == tmp_path / "recon-gadgets"


def test_what_the_site_chose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/elsewhere")
    compiler_caches()
    assert os.environ["NUMBA_CACHE_DIR"] == "/elsewhere"


def test_a_cache_that_cannot_be_made_is_left_to_the_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler_caches()
    assert not any(name in os.environ for name in VARIABLES)
