"""The manual in an OpenRecon package: a PDF with what the chain does, its parameters, and what its messages mean."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from io import BytesIO

from gadgets.manifest import Manifest, Parameter

LINES_PER_PAGE, COLUMNS = 58, 92
A4_INCHES = (8.27, 11.69)

_MESSAGES = (
    ("DBG llr 43 %, about 25 s left", "how far the reconstruction is"),
    ("INF ...", "a scan is done: how many images, how long it took"),
    ("WRN ...", "images come, but not quite as asked for: what is different, and why"),
    (
        "WRN ... failed ...; its images come from ...",
        "another method stood in; these images say so in comment and series name",
    ),
    ("ERROR SettingError: ...", "a parameter is not valid: which one, and what is"),
    ("ERROR ...", "no images (or no more): why. Raw data stay on the server, the scan can be repeated from them"),
)


def manual_pdf(described: Manifest, mode: str, server: str | None) -> bytes:
    """The manual, the same bytes for the same chain."""
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    lines = list(_lines(described, mode, server))
    buffer = BytesIO()
    fixed = {"CreationDate": None, "ModDate": None, "Title": described.chain.name}
    with PdfPages(buffer, metadata=fixed) as pages:
        for start in range(0, len(lines), LINES_PER_PAGE):
            page = Figure(figsize=A4_INCHES)
            text = "\n".join(lines[start : start + LINES_PER_PAGE])
            page.text(0.08, 0.95, text, family="monospace", fontsize=8, va="top", parse_math=False)
            pages.savefig(page)
    return buffer.getvalue()


def _lines(described: Manifest, mode: str, server: str | None) -> Iterator[str]:
    chain = described.chain
    yield from (chain.name, "=" * len(chain.name), "")
    yield from _wrapped(f"{chain.summary}. Research software, not a medical device: not for diagnosis.")
    yield ""
    where = f"the server {server}" if server is not None else "this container, on its CPU"
    yield from _wrapped(f"Reconstructed by {where}.")
    if server is not None and mode == "cpu":
        yield from _wrapped(
            "When the server does not answer, the container reconstructs on its CPU, which takes longer; a warning says so."
        )
    if chain.fallback is not None:
        yield from _wrapped(f"When the method fails, {chain.fallback} makes the images; they are marked.")
    yield from ("", "Parameters", "----------", "")
    for parameter in described.parameters:
        yield f"{parameter.label} [{parameter.id}] = {parameter.default}"
        yield from _wrapped(f"{parameter.help}. {_allowed(parameter)}".strip(), indent="    ")
    yield from ("", "Messages", "--------", "")
    for line, meaning in _MESSAGES:
        yield line
        yield from _wrapped(meaning, indent="    ")


def _allowed(parameter: Parameter) -> str:
    if parameter.choices:
        return "One of: " + ", ".join(parameter.choices) + "."
    if parameter.low is None or parameter.high is None:
        return ""
    return f"{parameter.low:.12g} to {parameter.high:.12g} {parameter.unit}".strip() + "."


def _wrapped(text: str, *, indent: str = "") -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=indent)
