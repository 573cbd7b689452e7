"""Where the tubes of the measured MOLLI phantom are: centres ``(y, x)`` in pixels, read off its reference map."""

from __future__ import annotations

TUBES = (
    (58, 58),
    (62, 77),
    (60, 96),
    (62, 113),
    (76, 55),
    (76, 89),
    (80, 109),
    (83, 72),
    (97, 54),
    (100, 78),
    (93, 95),
    (99, 113),
)
