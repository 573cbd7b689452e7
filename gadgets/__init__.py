"""The outside world: MRD messages, Gadgetron configurations, sockets, disk and terminal around ``recon_core``."""

from recon_core import __version__

__all__ = ["__version__"]
