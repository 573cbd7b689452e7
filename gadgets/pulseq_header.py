"""The MRD header that belongs to an exported sequence: scanners' converters write the matrix of a protocol that knows nothing of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ismrmrd.xsd as xsd

from recon_core.sampling.mask_files import SamplingMask
from recon_core.simulation.signal import GYROMAGNETIC_RATIO

if TYPE_CHECKING:
    from gadgets.pulseq import SequenceFacts, SequenceSettings


def header_text(mask: SamplingMask, s: SequenceSettings, facts: SequenceFacts) -> str:
    """The MRD header as XML: sizes of the full grid, echo times as played; nothing about a patient or a scanner's coils."""
    n_echoes, n_k2, n_k1 = mask.mask.shape
    z, y, x = (length * 1e3 for length in s.fov)

    def space(n_x: int, fov_x: float) -> Any:
        return xsd.encodingSpaceType(
            matrixSize=xsd.matrixSizeType(x=n_x, y=n_k1, z=n_k2),
            fieldOfView_mm=xsd.fieldOfViewMm(x=round(fov_x, 6), y=round(y, 6), z=round(z, 6)),
        )

    def limit(n: int, centre: int) -> Any:
        return xsd.limitType(minimum=0, maximum=n - 1, center=centre)

    single = {name: limit(1, 0) for name in ("average", "slice", "phase", "repetition", "set", "segment")}
    limits = xsd.encodingLimitsType(
        kspace_encoding_step_0=limit(s.n_adc, s.n_adc // 2),
        kspace_encoding_step_1=limit(n_k1, n_k1 // 2),
        kspace_encoding_step_2=limit(n_k2, n_k2 // 2),
        contrast=limit(n_echoes, 0),
        **single,
    )
    parallel = xsd.parallelImagingType(
        accelerationFactor=xsd.accelerationFactorType(
            kspace_encoding_step_1=max(1, round(mask.acceleration)), kspace_encoding_step_2=1
        ),
        calibrationMode=xsd.calibrationModeType.EMBEDDED,
    )
    header = xsd.ismrmrdHeader(
        measurementInformation=xsd.measurementInformationType(
            patientPosition=xsd.patientPositionType.HFS, protocolName=s.name
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(systemFieldStrength_T=s.field_strength),
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(GYROMAGNETIC_RATIO * s.field_strength)
        ),
        encoding=[
            xsd.encodingType(
                encodedSpace=space(s.n_adc, x * s.oversampling),
                reconSpace=space(s.matrix_x, x),
                encodingLimits=limits,
                trajectory=xsd.trajectoryType.CARTESIAN,
                parallelImaging=parallel if mask.acceleration > 1 else None,
            )
        ],
        sequenceParameters=xsd.sequenceParametersType(
            TR=[round(facts.repetition_time * 1e3, 6)],
            TE=[round(t * 1e3, 6) for t in facts.echo_times],
            flipAngle_deg=[round(math.degrees(s.flip_angle), 6)],
            sequence_type="Flash",
        ),
    )
    return str(xsd.ToXML(header))
