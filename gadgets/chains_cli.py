"""``recon chains`` and ``recon simulate``: what can be asked for, and scans to try it with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gadgets.jobs_cli import name_value_pairs
from gadgets.outputs import check_file
from gadgets.terminal import err, make_table, out


def simulate(
    kind: Annotated[str, typer.Argument(help="cine, molli, satrec or mgre.")],
    output: Annotated[Path, typer.Argument(help="MRD raw file to write; the truth goes beside it.")] = Path("simulated.h5"),
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; repeat for several.")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="List this kind's settings and stop.")] = False,
) -> None:
    """Write a full MRD raw file of a simulated scan, with the ground truth beside it."""
    from gadgets.simulate import simulate as run_simulation
    from recon_core.simulation.options import settings_for

    values = settings_for(kind, name_value_pairs(settings or []))
    if describe:
        _print_settings(kind, values)
        return
    check_file(output)
    summary = run_simulation(kind, output, values)
    for key, value in asdict(summary).items():
        print(f"{key:<16}  {value}")


def _print_settings(kind: str, values: Any) -> None:
    """The settings that say something to this kind of scan, with their values."""
    from recon_core.settings import describe
    from recon_core.simulation.options import USED_BY

    rows = make_table("setting", "type", "default", "range", "help", title=f"simulate {kind}")
    for info in describe(type(values)):
        if kind not in USED_BY.get(info.name, (kind,)):
            continue
        rows.add_row(info.name, info.kind.__name__, str(getattr(values, info.name)), _range(info), info.help)
    out.print(rows)


def _range(info: Any) -> str:
    if info.choices:
        return " | ".join(info.choices)
    if info.low is None and info.high is None:
        return info.unit
    low = "" if info.low is None else f"{info.low:g}"
    high = "" if info.high is None else f"{info.high:g}"
    return f"{low} .. {high} {info.unit}".strip()


def chains(
    name: Annotated[str | None, typer.Argument(help="One chain; without it, all.")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="List every setting.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    docs: Annotated[bool, typer.Option("--docs", help="The page docs/chains.md.")] = False,
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
) -> None:
    """List the chains that a scanner can ask for, and their settings."""
    from gadgets.chain import chain_faults, chain_names, describe_chain, load_chain, require_chains

    require_chains(configs)
    if docs:
        from gadgets.manifest_formats import markdown

        print(markdown([name] if name else None, directory=configs), end="")
        return

    names = [name] if name else list(chain_names(configs))
    loaded = [load_chain(n, directory=configs) for n in names]
    if as_json:
        document = [
            {
                "name": c.name, "summary": c.summary, "method": c.method, "fallback": c.fallback,
                "settings": {
                    group: [{**asdict(info), "kind": info.kind.__name__} for info in infos]
                    for group, infos in describe_chain(c.name, directory=configs).items()
                },
            }
            for c in loaded
        ]  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    rows = make_table("chain", "method", "fallback", "what it does")
    for c in loaded:
        rows.add_row(c.name, c.method, c.fallback or "-", c.summary)
    out.print(rows)
    for faulty, fault in chain_faults(configs) if configs and not name else ():
        err.print(f"WRN {faulty}: {fault}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if describe:
        for c in loaded:
            _print_chain_settings(c.name, describe_chain(c.name, directory=configs))


def _print_chain_settings(name: str, groups: Any) -> None:
    rows = make_table("group", "setting", "type", "default", "range", "help", title=f"settings of {name}")
    for group, infos in groups.items():
        for info in infos:
            rows.add_row(group, info.name, info.kind.__name__, str(info.default), _range(info), info.help)
    out.print(rows)
