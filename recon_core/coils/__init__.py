"""Coil sensitivity estimation."""
