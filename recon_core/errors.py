"""Every error that a reconstruction may raise: what happened, where, what was got, what was expected, and the remedy."""

from __future__ import annotations

MAX_CHARACTERS = 4000
"""Of an error's text."""

MAX_GOT_CHARACTERS = 500
"""Of an offending value in it, which often comes from a peer or a file."""


def plain(text: str, most: int = MAX_CHARACTERS) -> str:
    """A text as one line that can stand in a log and on a terminal: what is not printable as an escape, and not too long.

    Line breaks would forge lines of a log, escape sequences would steer the terminal of who reads it, and directional marks
    would show a name that it is not.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


class ReconError(Exception):
    """Base of all typed errors of this product.

    Parameters
    ----------
    what
        One clause that names the problem.
    where
        The place: a message, a field, a slice, a file.
    got, expected
        The offending value and what would have been right; left out of the text when ``None``.
    remedy
        What the operator can do about it.

    Never put patient data into any of them: the text goes to logs and to the console.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.remedy = what, where, got, expected, remedy
        text = f"{where}: {what}" if where else what
        if got is not None:
            text += f"; got {plain(str(got), MAX_GOT_CHARACTERS)}"
        if expected is not None:
            text += f"; expected {expected}"
        if remedy:
            text += f". {remedy}"
        super().__init__(plain(text))

    def __reduce__(self) -> tuple[object, ...]:
        # the default would call cls(text) in the receiving process and lose the keyword-only parts
        return (_rebuild, (type(self), self.what, self.where, self.got, self.expected, self.remedy))


def _rebuild(cls: type[ReconError], what: str, where: str, got: object, expected: object, remedy: str) -> ReconError:
    return cls(what, where=where, got=got, expected=expected, remedy=remedy)


class SettingError(ReconError):
    """A setting is unknown, cannot be parsed or is out of its range."""


class DataError(ReconError):
    """K-space, masks or maps do not fit together: wrong shape, NaN, nothing sampled."""


class CalibrationError(ReconError):
    """Coil maps or a temporal subspace cannot be estimated from the calibration lines at hand."""


class NumericalError(ReconError):
    """A solver diverged or returned values that are not finite."""


class UnknownMethod(ReconError):
    """No method of that name exists."""


class WriteError(ReconError):
    """A file cannot be written: a full disk, a folder that is read-only."""
