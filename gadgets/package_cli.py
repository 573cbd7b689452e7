"""``recon manifest`` and ``recon package``: chains as consoles want to have them described and delivered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gadgets.outputs import check_folder
from recon_core.errors import SettingError

FORMATS = ("openrecon", "fire", "gadgetron", "markdown")

package_app = typer.Typer(help="Packages for scanners.", no_args_is_help=True)


@package_app.callback()
def package() -> None:
    """Packages for scanners."""  # a callback keeps the subcommand's name, as long as there is only one


def manifest(
    chain: Annotated[str, typer.Argument(help="A chain that recon chains lists.")],
    form: Annotated[str, typer.Option("--format", "-f", help=", ".join(FORMATS) + ".")] = "openrecon",
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
) -> None:
    """What a console shows of a chain: OpenRecon's label, FIRE's JSON, Gadgetron's XML, or a table."""
    from gadgets.chain import require_chains
    from gadgets.manifest import manifest as described_by
    from gadgets.manifest_formats import fire_json, gadgetron_xml, markdown
    from gadgets.openrecon_label import label, text_of

    if form not in FORMATS:
        raise SettingError("no such format", where="--format", got=form, expected=", ".join(FORMATS))
    require_chains(configs)
    if form == "markdown":
        print(markdown([chain], directory=configs), end="")
        return
    described = described_by(chain, directory=configs)
    print({"openrecon": lambda: text_of(label(described)) + "\n", "fire": lambda: fire_json(described),
           "gadgetron": lambda: gadgetron_xml(described)}[form](), end="")  # fmt: skip


@package_app.command()
def openrecon(
    chain: Annotated[str, typer.Argument(help="A chain that recon chains lists.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT of the reconstruction server, as seen from the scanner's computer.")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Let the container reconstruct on its CPU when no server answers.")
    ] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authority (PEM) of the server's certificate: speak TLS to it.", exists=True)
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The image's own certificate (PEM), if asked for.", exists=True)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its key (PEM). Whoever has the image has the key.", exists=True)
    ] = None,
    vendor: Annotated[str, typer.Option(help="Letters and digits; part of all names.")] = "recongadgets",
    version: Annotated[str | None, typer.Option(help="Three numbers; scanners never install one version twice.")] = None,
    injector: Annotated[
        str, typer.Option(help="compleximage or image: where images enter the scanner's chain.")
    ] = "compleximage",
    image: Annotated[
        Path | None, typer.Option(help="Image that build.sh saved: check it and make the zip.", exists=True, dir_okay=False)
    ] = None,
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
) -> None:
    """Write what a Siemens OpenRecon image is built from, or (with --image) the zip that a scanner installs."""
    from gadgets.chain import require_chains
    from gadgets.manifest import manifest as described_by
    from gadgets.openrecon_image import Package, PackageOptions, write_context, write_zip

    require_chains(configs)
    check_folder(output)
    options = PackageOptions(
        mode="cpu" if cpu else "forward", server=server, vendor=vendor, injector=injector, configs=configs,
        tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key,
        **({} if version is None else {"version": version}),
    )  # fmt: skip
    made = Package(described_by(chain, directory=configs), options)
    if image is not None:
        print(write_zip(made, output, image))
        return
    n_files = len(list(write_context(made, output)))
    print(f"{n_files} files in {output}; the image and the zip are made by (Docker older than 25)")
    print(output / "build.sh")
