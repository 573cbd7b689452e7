"""The MRD header that belongs to an exported sequence, and its way into raw data.

Scanners' converters write the matrix, the field of view and the echo times of a protocol that knows nothing of the sequence.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import ismrmrd.xsd as xsd
import numpy as np
from numpy.typing import NDArray

from gadgets.errors import HeaderError, RawFileError
from gadgets.mask_check import DIGEST_PARAMETER, NAME_PARAMETER
from gadgets.wire.dtypes import Flag, has_flag
from recon_core.hdf5_input import why_unreadable
from recon_core.sampling.agreement import pattern_digest
from recon_core.sampling.mask_files import SamplingMask
from recon_core.simulation.signal import GYROMAGNETIC_RATIO

if TYPE_CHECKING:
    from gadgets.pulseq_settings import SequenceFacts, SequenceSettings


def header_text(mask: SamplingMask, s: SequenceSettings, facts: SequenceFacts, mask_name: str) -> str:
    """The MRD header as XML: sizes of the full grid, echo times as played, the mask; nothing about a patient or a scanner's coils."""
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
            kspace_encoding_step_1=math.ceil(mask.acceleration - 1e-9), kspace_encoding_step_2=1
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
        userParameters=xsd.userParametersType(
            userParameterString=[
                xsd.userParameterStringType(name=NAME_PARAMETER, value=mask_name),
                xsd.userParameterStringType(name=DIGEST_PARAMETER, value=pattern_digest(mask.mask)),
            ]
        ),
    )
    return str(xsd.ToXML(header))


def attach_header(raw: Path, side: Path, out: Path, group: str = "dataset") -> str:
    """Copy a raw file with what ``side`` says of the sequence in place of what the scanner's protocol says; whole or not at all.

    From ``side``: the encoding, the sequence's parameters, the mask. From the raw file: everything else (measurement, scanner, frequency,
    coils, patient, waveforms, other user parameters).

    Returns
    -------
    str
        Whether the readouts are those that the sequence plays, in words: a header of another sequence has other echo times.

    Raises
    ------
    RawFileError
        The raw file cannot be read, ``out`` is one of the others, or the readouts are not as long as the sequence's.
    HeaderError
        One of the headers is no MRD header, or ``side`` is not that of a sequence.
    """
    if out.exists() and any(given.exists() and out.samefile(given) for given in (raw, side)):
        raise RawFileError("would be overwritten", where=out.name, remedy="Name another file")
    told = _sequence_header(side)
    try:
        with h5py.File(raw, "r") as file:
            text = file[group]["xml"][0]
            heads = file[group]["data"].fields("head")[:]
            noise = has_flag(heads, Flag.ACQ_IS_NOISE_MEASUREMENT)  # may be as long as the sequence's, whatever the scan
            lengths = np.unique(heads["number_of_samples"][~noise])
    except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise RawFileError("no MRD raw data", where=f"{raw.name}, group {group}", got=why_unreadable(error)) from None
    expected = told.encoding[0].encodedSpace.matrixSize.x
    if expected not in lengths.tolist():
        raise RawFileError(
            "not a scan of this sequence", where=raw.name, got=f"readouts of {lengths.tolist()} samples", expected=expected
        )
    header = _parsed(text.decode() if isinstance(text, bytes) else str(text), raw.name)
    header.encoding, header.sequenceParameters = told.encoding, told.sequenceParameters
    user = header.userParameters or xsd.userParametersType()
    names = {parameter.name for parameter in told.userParameters.userParameterString}
    user.userParameterString = [
        *(parameter for parameter in user.userParameterString if parameter.name not in names),
        *told.userParameters.userParameterString,
    ]
    header.userParameters = user
    part = out.with_name(f".{out.name}.part")  # a copy that still has the scanner's header would be believed
    try:
        shutil.copyfile(raw, part)
        with h5py.File(part, "r+") as file:
            del file[group]["xml"]
            kind = h5py.special_dtype(vlen=bytes)
            file[group].create_dataset("xml", data=np.array([str(xsd.ToXML(header)).encode()], dtype=object), dtype=kind)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return _compared(heads[~noise & (heads["number_of_samples"] == expected)]["idx"], told)


def _compared(counters: NDArray[Any], told: Any) -> str:
    encoding, named = told.encoding[0], {p.name: p.value for p in told.userParameters.userParameterString}
    matrix, contrast = encoding.encodedSpace.matrixSize, encoding.encodingLimits.contrast
    shape = (1 if contrast is None else contrast.maximum + 1), matrix.z, matrix.y
    at = np.stack([counters[name] for name in ("contrast", "kspace_encode_step_2", "kspace_encode_step_1")], axis=1)
    outside = int((at >= np.array(shape)).any(axis=1).sum())
    where = f"the mask {named[NAME_PARAMETER]!r}, {shape[0]} echoes of {shape[1]} x {shape[2]} (k2 x k1)"
    if outside:
        return f"{outside} of {len(at)} readouts lie outside {where}: another sequence, or counted from 1"
    sampled = np.zeros(shape, dtype=bool)
    sampled[tuple(at.T)] = True
    if pattern_digest(sampled) == named[DIGEST_PARAMETER]:
        return f"the {int(sampled.sum())} samples are those of {where}"
    return f"the {int(sampled.sum())} samples are not those of {where}: another sequence, or some are missing"


def _sequence_header(side: Path) -> Any:
    """The header that was written with a sequence."""
    try:
        told = _parsed(side.read_text(encoding="utf-8"), side.name)
    except OSError as error:
        expected = "the .mrd.xml beside the sequence"
        raise HeaderError("cannot be read", where=side.name, got=error.strerror, expected=expected) from None
    except UnicodeDecodeError:
        raise HeaderError(
            "not an MRD header", where=side.name, got="no text", expected="the .mrd.xml of a sequence"
        ) from None
    user = told.userParameters
    names = {parameter.name for parameter in user.userParameterString} if user is not None else set()
    if len(told.encoding) != 1 or told.sequenceParameters is None or not {NAME_PARAMETER, DIGEST_PARAMETER} <= names:
        raise HeaderError(
            "not the header of a sequence",
            where=side.name,
            got=f"{len(told.encoding)} encodings, user parameters {', '.join(sorted(names)) or 'none'}",
            expected=f"one encoding, sequence parameters, and the mask ({NAME_PARAMETER}, {DIGEST_PARAMETER})",
            remedy="Take the .mrd.xml that recon mask export wrote beside the sequence",
        )
    return told


def _parsed(text: str, where: str) -> Any:
    try:
        return xsd.CreateFromDocument(text)
    except Exception as error:  # the parser has no error of its own
        raise HeaderError("not an MRD header", where=where, got=type(error).__name__) from None
