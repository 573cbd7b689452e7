"""Cartesian sampling masks."""
