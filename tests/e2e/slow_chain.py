"""Chains of a site for tests of time and memory: methods whose end nobody waits for."""

from __future__ import annotations

import re
from pathlib import Path

from gadgets.chain import config_directory


def write_chain(folder: Path, name: str, method: str, fallback: str = "", **properties: object) -> None:
    """``folder/<name>.xml``, made from a shipped one, with ``method`` and no other properties than these."""
    shipped = (config_directory() / "cg_sense.xml").read_text(encoding="utf-8")
    own = {"method": method, **({"fallback": fallback} if fallback else {}), **properties}
    added = "".join(f'<property name="{key}" value="{value}"/>' for key, value in own.items())
    text = shipped.replace('target="cg_sense"', f'target="{name}"')
    text = re.sub(
        r"<configuration>\s*<property.*</configuration>(?=\s*</external>)",
        f"<configuration>{added}</configuration>",
        text,
        flags=re.S,
    )
    (folder / f"{name}.xml").write_text(text)


def site_chains(folder: Path) -> Path:
    """``endless`` computes for minutes and falls back to ``quick``, ``late`` as well, after 2 s; ``long`` takes some seconds."""
    folder.mkdir(exist_ok=True)
    write_chain(folder, "endless", "moe_dqinr", "quick", preset="paper", iterations=20000)
    # a limit of the chain's own: its stand-in may take its time on a busy machine
    write_chain(folder, "late", "moe_dqinr", "quick", preset="paper", iterations=20000, time_limit=2.0)
    write_chain(folder, "long", "llr", "quick", iterations=1200)
    write_chain(folder, "quick", "fourier")
    return folder
