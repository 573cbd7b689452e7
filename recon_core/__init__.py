"""Arrays in, arrays out: MR reconstruction without a scanner, a socket or a file format.

This package imports torch, numpy, scipy and h5py only; it never imports ``gadgets``, ``ismrmrd`` or ``pydicom``.
"""

__version__ = "0.1.0"
