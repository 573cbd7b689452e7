"""MRD images -> DICOM: classic MR images, one object per plane, one DICOM series per MRD image series.

Everything that a PACS sorts and searches by comes from the MRD header (`gadgets.dicom_identity`); without one the patient is left
empty rather than invented. UIDs follow from the content, so converting the same images again gives the same objects.

Source: DICOM PS3.3 sections A.4 (MR Image IOD) and C.8.3.1 (MR Image module).
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import UID

from gadgets.dicom_identity import DicomError, Identity, make_uid, read_identity, text_value
from gadgets.dicom_modules import (
    SeriesPlan,
    acquisition_module,
    image_comment,
    pixel_modules,
    plane_module,
    shared_modules,
)
from gadgets.dicom_pixels import Survey, first, parts, plan_pixels, stated_scaling, survey
from gadgets.image_attributes import PHASE, is_preview
from gadgets.image_file import image_groups, read_images
from gadgets.meta import read_meta
from gadgets.wire.events import Image

log = logging.getLogger(__name__)

NO_HEADER = (
    "no MRD header: patient, study and scanner are EMPTY, nobody can tell whose images these are: --header CAPTURE.mrd"
)
NO_PATIENT = "the MRD header names no patient: name and id are EMPTY, nobody can tell whose images these are"


@dataclass(frozen=True)
class Conversion:
    """What was written: ``files`` in order, and for every series its folder and number of objects.

    ``unmade`` says which Parametric Maps could not be made, and why.
    """

    folder: Path
    files: tuple[Path, ...]
    series: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    unmade: tuple[str, ...] = ()


def convert(
    source: Path | str,
    out: Path | str,
    *,
    header: str | None = None,
    group: str | None = None,
    previews: bool = False,
    parametric_maps: bool = False,
) -> Conversion:
    """An MRD image file as a folder of DICOM series.

    Parameters
    ----------
    source
        The image file.
    out
        A new or empty folder; it appears when everything in it is complete.
    header
        Text of the MRD header of the scan; without it patient and study stay empty.
    group
        Which run of the file; needed when there are several.
    previews
        Convert previews as well.
    parametric_maps
        Write each map also as a Parametric Map object (16-bit), for viewers that know them; where one cannot be made, the classic images
        are written all the same.

    Raises
    ------
    DicomError
        No image, several runs, an image that DICOM cannot hold, or a folder in use.
    ImageFileError, HeaderError
        The file or the header cannot be read.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DicomError("the output folder is in use", where=str(out), expected="a new or an empty folder")
    identity = Identity() if header is None else read_identity(header)
    group = group or _only_group(source)

    def images() -> Iterator[Image]:
        return (image for image in read_images(source, group) if previews or not is_preview(image.attributes))

    plans = plan_series(survey(images()), identity)
    if not plans:
        raise DicomError("no image to convert", where=source.name, expected="at least one that is no preview")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        files: dict[int, list[Path]] = {index: [] for index in plans}
        for index, dataset in mr_datasets(images(), plans, identity):
            files[index].append(write_file(dataset, partial / plans[index].folder))
        unmade = _add_parametric_maps(partial, plans, files) if parametric_maps else ()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    series = tuple(Counter(path.parent.name for path in itertools.chain.from_iterable(files.values())).items())
    log.info("event=dicom_written series=%d objects=%d", len(series), sum(n for _, n in series))
    named = {"PatientName", "PatientID"} & set(identity.patient)
    notes: tuple[str, ...] = () if named else (NO_PATIENT if identity.mrd is not None else NO_HEADER,)
    if identity.left_out:
        log.warning("event=dicom_left_out fields=%s", ",".join(identity.left_out))
        notes += (f"left out, because DICOM cannot hold what the MRD header says: {', '.join(identity.left_out)}",)
    written = (out / path.relative_to(partial) for path in itertools.chain.from_iterable(files.values()))
    return Conversion(out, tuple(written), series, notes, unmade)


def _only_group(source: Path) -> str:
    groups = image_groups(source)
    if not groups:
        remedy = "Raw data become images first: recon run or recon replay"
        raise DicomError("no images in this file", where=source.name, expected="an image file", remedy=remedy)
    if len(groups) != 1:
        expected = "one run, or --group with its name"
        raise DicomError("which images?", where=source.name, got=", ".join(groups), expected=expected)
    return groups[0]


def plan_series(seen: Mapping[int, Survey], identity: Identity) -> dict[int, SeriesPlan]:
    """The DICOM series for each MRD series index; all of them belong to one study.

    Without a study UID in the header, the study is the measurement: one study for each scan.
    """
    content = [one.digest.hexdigest() for one in seen.values()]
    scan = (identity.mrd.measurement_id if identity.mrd is not None else None) or "".join(content)
    study = identity.study.get("StudyInstanceUID") or make_uid("study", scan, *_when_and_where(identity, content))
    frame = identity.frame_of_reference or make_uid("frame of reference", study)
    plans = {}
    for (index, one), digest in zip(seen.items(), content, strict=True):
        label = first(one.meta, "SeriesDescriptionAdditional", "SequenceDescriptionAdditional", "SeriesDescription")
        label = label or first(one.meta, "GADGETRON_SeqDescription").lstrip("_") or "images"
        if int(one.image.header["image_type"]) == PHASE and "phase" not in label.lower():
            label += "_phase"
        pixels = plan_pixels(one)
        plans[index] = SeriesPlan(
            number=100 * identity.initial_series + index,
            uid=make_uid("series", study, scan, index, digest),
            study_uid=study,
            frame_of_reference=frame,
            description=text_value(64)(_short(label)) or "images",
            pixels=next(iter(pixels.values())),
            scalings=pixels,
            moments=tuple(sorted(one.moments)),
            n_contrasts=len(one.contrasts),
        )
    return plans


def _short(label: str) -> str:
    """At most 64 characters; which map it is, and whether something is missing, stands at the end."""
    return label if len(label) <= 64 else f"{label[:31]}..{label[-31:]}"


def _when_and_where(identity: Identity, content: Sequence[str]) -> tuple[str, ...]:
    """What tells a measurement from others of the same id: some converters call every one "1", and two patients must not share a study."""
    about = {**identity.equipment, **identity.series, **identity.study}
    moment = [about.get(word, "") for word in ("StudyDate", "StudyTime", "SeriesDate", "SeriesTime")]
    place = [identity.frame_of_reference or "", about.get("DeviceSerialNumber", "")]
    known = place[0] or all(moment[:2]) or all(moment[2:])
    return (*place, *moment) if known else (*place, *moment, *content)


def mr_datasets(
    images: Iterable[Image], plans: Mapping[int, SeriesPlan], identity: Identity
) -> Iterator[tuple[int, Dataset]]:
    """MR Image objects with the series index that they belong to, plane by plane.

    Parameters
    ----------
    images
        The images that ``plans`` was made from, in any order.

    Raises
    ------
    DicomError
        An image with several channels.
    """
    for image in parts(images):
        index = int(image.header["image_series_index"])
        plan, meta = plans[index], read_meta(image.attributes)
        pixels = plan.scalings.get(stated_scaling(meta), plan.pixels)
        codes = pixels.encode(image.data[0])
        for z in range(len(codes)):
            dataset = shared_modules(plan, identity)
            instance = _instance_number(plan, int(image.header["image_index"]), z, len(codes))
            dataset.InstanceNumber = instance
            dataset.SOPInstanceUID = UID(make_uid("object", plan.uid, instance))
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            acquisition_module(dataset, image.header, meta, plan, identity, planes=len(codes))
            plane_module(dataset, image.header, meta, z)
            pixel_modules(dataset, codes[z], pixels)
            if said := text_value(1000)(image_comment(meta)):
                dataset.ImageComments = said
            yield index, dataset


def write_file(dataset: Dataset, folder: Path) -> Path:
    """Write one object as ``<folder>/<instance number>.dcm``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{int(dataset.InstanceNumber):06d}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def _instance_number(plan: SeriesPlan, image_index: int, z: int, n_planes: int) -> int:
    wanted = (image_index - 1) * n_planes + z + 1
    if wanted < 1 or wanted in plan.used:  # foreign files repeat indices or leave them 0
        wanted = max(plan.used, default=0) + 1
    plan.used.add(wanted)
    return wanted


def _add_parametric_maps(partial: Path, plans: Mapping[int, SeriesPlan], files: Mapping[int, list[Path]]) -> tuple[str, ...]:
    from gadgets.parametric_map import parametric_map

    unmade = []
    for index, plan in plans.items():
        if plan.pixels.role:
            try:
                dataset = parametric_map(files[index], plan)
            except DicomError as error:
                unmade.append(str(error))
            else:
                files[index].append(write_file(dataset, partial / f"{plan.folder}_parametric_map"))
    return tuple(unmade)
