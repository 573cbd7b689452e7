"""Reconstruction methods: one module each, the same contract for all (see ``recon_core.types``)."""
