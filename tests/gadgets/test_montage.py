"""Pictures: the right number, the right values behind them, something on them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import torch

from gadgets.geometry import AXIAL, Geometry
from gadgets.image_file import ImageFile, read_images
from gadgets.images import ImageWriter, OutputSettings
from gadgets.meta import write_meta
from gadgets.montage import display_values, write_montages
from gadgets.wire.events import Image
from gadgets.wire.header import Encoding, MrdHeader
from recon_core.types import ImageSeries, ParameterMap, Result, ScanInfo

REAL = Path(__file__).parent.parent / "data" / "gadgetron-reference" / "gadgetron_default_images.h5"
MATRIX, FOV = (1, 48, 64), (0.005, 0.24, 0.24)


def disc() -> torch.Tensor:
    y, x = np.mgrid[-1:1:48j, -1:1:64j]
    return torch.from_numpy((x**2 + y**2 < 0.6).astype(np.float32))[None]


def scan(n_states: int = 6) -> list[Image]:
    header = MrdHeader((Encoding("cartesian", MATRIX, FOV, MATRIX, FOV),), field_strength=3.0)
    writer = ImageWriter(header, "demo", OutputSettings(phase=True, pixel_type="uint16"))
    images = []
    for number in range(2):
        info = ScanInfo(MATRIX, FOV, MATRIX, FOV, slice_index=number, state_counters=[{"phase": p} for p in range(n_states)])
        frames = torch.stack([disc() * (0.4 + 0.1 * p) * torch.exp(torch.tensor(0.3j * p)) for p in range(n_states)])
        ramp = torch.linspace(0.6, 2.4, 64).expand(MATRIX) * disc()
        maps = (
            ParameterMap("T1", ramp, "s", disc() > 0),
            ParameterMap("chi", (ramp - 1.5) * 0.1, "ppm", disc() > 0),
        )
        geometry = Geometry((0.0, 0.0, 5.0 * number), *AXIAL)
        images += list(writer.events(Result((ImageSeries("image", frames),), maps), info, geometry))
    return images


def test_one_picture_per_series_from_images_and_from_a_file(tmp_path: Path) -> None:
    images = scan()
    direct = write_montages(iter(images), tmp_path / "a")
    assert [p.name for p in direct] == [
        "series001_demo.png",
        "series002_demo_phase.png",
        "series003_demo_T1.png",
        "series004_demo_QSM.png",
    ]
    with ImageFile(tmp_path / "x.h5", "run") as file:
        for image in images:
            file.append(image)
    stored = write_montages(tmp_path / "x.h5", tmp_path / "b", group="run")
    assert [p.name for p in stored] == [f"run_{p.name}" for p in direct]
    for a, b in zip(direct, stored, strict=True):
        assert a.read_bytes() == b.read_bytes()  # the file holds all that a picture needs
        picture = matplotlib.image.imread(a)
        assert picture.shape[0] > 150 and picture.shape[1] > 300 and picture[..., :3].std() > 0.05


def test_displayed_values_are_in_the_units_of_the_quantity() -> None:
    t1 = next(i for i in scan() if "GADGETRON_DataRole" in i.attributes and ">T1<" in i.attributes)
    shown = display_values(t1)
    assert np.isnan(shown[0, 0, 0])
    np.testing.assert_allclose(shown[0, 24, 32], 1000 * np.linspace(0.6, 2.4, 64)[32], atol=0.6)


def test_the_real_clients_file_without_attributes_is_drawn(tmp_path: Path) -> None:
    (path,) = write_montages(REAL, tmp_path)
    assert path.name == "series000.png"
    (image,) = list(read_images(REAL))[:1]
    label = write_meta({"SequenceDescriptionAdditional": "$\\frac{T$ map"})  # no formula
    assert write_montages([Image(0, image.header, label, image.data)], tmp_path / "dollars")


def test_a_long_series_and_a_slab_are_thinned_out(tmp_path: Path) -> None:
    matrix = (70, 16, 16)
    header = MrdHeader((Encoding("cartesian", matrix, (0.14, 0.1, 0.1), matrix, (0.14, 0.1, 0.1)),))
    data = torch.linspace(0, 1, 70)[None, :, None, None].expand(1, *matrix).to(torch.float32)
    info = ScanInfo(matrix, (0.14, 0.1, 0.1), matrix, (0.14, 0.1, 0.1))
    images = ImageWriter(header, "slab").events(Result((ImageSeries("image", data),)), info, Geometry((0, 0, 0), *AXIAL))
    (path,) = write_montages(images, tmp_path)
    assert matplotlib.image.imread(path).shape[0] < 3000


def test_an_empty_image_is_drawn(tmp_path: Path) -> None:
    info = ScanInfo(MATRIX, FOV, MATRIX, FOV)
    header = MrdHeader((Encoding("cartesian", MATRIX, FOV, MATRIX, FOV),))
    blank = Result((ImageSeries("image", torch.zeros(1, *MATRIX)),))
    assert len(write_montages(ImageWriter(header, "blank").events(blank, info, Geometry((0, 0, 0), *AXIAL)), tmp_path)) == 1
