"""The outside world: MRD messages, Gadgetron configurations, sockets, disk and terminal around ``recon_core``."""

from recon_core import __version__

__all__ = ["__version__"]


def __getattr__(name: str) -> object:
    """A chain as the handler that Gadgetron's Python asks for by ``target``; exists only in the process that Gadgetron starts."""
    import gadgets.relay as relay  # `from gadgets import relay` would ask here again

    return relay.target(name)
