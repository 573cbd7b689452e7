"""Scan-specific neural comparators from the papers' tables, written anew and simple; none needs weights or training data.

Each module has the shape of a method of ``recon_core.methods`` (``NAME``, ``SUMMARY``, ``Settings``, ``reconstruct``), but is not
one: a chain cannot name it. Iterations and sizes are far below the publications', so that a cell takes one to two minutes on
two CPU cores; the tables quote the iterations beside every figure.
"""

from __future__ import annotations

from benchmarks.comparators import fmlp, st_inr, tddip
from recon_core.methods import Method

COMPARATORS: dict[str, Method] = {module.NAME: module for module in (fmlp, st_inr, tddip)}
