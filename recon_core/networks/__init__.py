"""Convolutional networks that more than one method may use."""
