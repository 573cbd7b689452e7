"""Parametric maps from image series."""
