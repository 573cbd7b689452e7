"""The phase that coil maps leave in images, taken away before the network and given back after it.

Estimated coil maps are known up to a phase that varies smoothly: that of the combined images follows the estimator, not the object. The
networks were trained on images that are nearly real. Maps times the smooth phase of an image are as good as before, and their image is
nearly real.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from recon_core.methods.pinqi.model import PinqiOutput

Tensor = torch.Tensor

FINEST = 6.0
"""Cycles per field of view at which the low-pass has fallen to ``exp(-1/2)``: about what the calibration lines hold."""


def low_pass_phase(image: Tensor) -> Tensor:
    """``exp(i phase)`` of an image after a Gaussian low-pass.

    Parameters
    ----------
    image
        complex ``(batch, x, y)``, the state with the most signal.

    Returns
    -------
    complex, of the same shape, modulus 1 (also where there is no signal)
    """
    window = torch.ones((), device=image.device)
    for axis in (-2, -1):
        cycles = torch.fft.fftfreq(image.shape[axis], device=image.device) * image.shape[axis]
        gauss = torch.exp(-0.5 * (cycles / FINEST) ** 2)
        window = window * (gauss[:, None] if axis == -2 else gauss)
    low = torch.fft.ifft2(torch.fft.fft2(image) * window)
    return torch.polar(torch.ones_like(low.real), torch.angle(low))


def turned(found: PinqiOutput, turn: Tensor, names: tuple[str, ...]) -> PinqiOutput:
    """Images and M0 of a solution times ``turn`` ``(batch, x, y)``; supervised predictions, which nobody uses here, stay behind."""
    m0 = [names.index(name) for name in ("m0_real", "m0_imag")]
    density = torch.complex(found.parameters[:, m0[0]], found.parameters[:, m0[1]]) * turn
    parameters = found.parameters.clone()
    parameters[:, m0[0]], parameters[:, m0[1]] = density.real, density.imag
    return replace(found, parameters=parameters, images=found.images * turn[:, None], predictions=(parameters,))
