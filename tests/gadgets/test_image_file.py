"""Image files against one that the real client wrote."""

from __future__ import annotations

from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.errors import ImageFileError
from gadgets.image_file import ImageFile, image_groups, read_images
from gadgets.wire.dtypes import DATA_TYPE_CODES, IMAGE_HEADER
from gadgets.wire.events import Image

REAL = Path(__file__).parent.parent / "data" / "gadgetron-reference" / "gadgetron_default_images.h5"


def image(data: NDArray[np.generic], series: int = 1, index: int = 1, attributes: str = "") -> Image:
    header = np.zeros(1, IMAGE_HEADER)
    header["matrix_size"], header["channels"] = data.shape[:0:-1], data.shape[0]
    header["data_type"] = DATA_TYPE_CODES[data.dtype]
    header["image_series_index"], header["image_index"] = series, index
    return Image(0, header[0], attributes, data)


def layout(path: Path) -> dict[str, object]:
    """Everything that a reader of the HDF5 file could stumble over."""
    found: dict[str, object] = {}

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            kind = item.id.get_type()
            text = (
                (kind.get_cset(), kind.get_strpad(), kind.is_variable_str())
                if isinstance(kind, h5py.h5t.TypeStringID)
                else ()
            )
            found[name] = (item.shape, item.maxshape, item.chunks, item.dtype, text)
        else:
            found[name] = "group"

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return found


def test_a_copy_of_the_real_clients_file_has_its_layout_and_content(tmp_path: Path) -> None:
    with ImageFile(tmp_path / "copy.h5", "images") as copy:
        for one in read_images(REAL):
            copy.append(one)
    assert copy.n_images == 2
    assert layout(tmp_path / "copy.h5") == layout(REAL)
    with h5py.File(REAL) as theirs, h5py.File(tmp_path / "copy.h5") as ours:
        for part in ("header", "attributes", "data"):
            a, b = theirs[f"images/image_0/{part}"][:], ours[f"images/image_0/{part}"][:]
            assert a.tobytes() == b.tobytes() if part != "attributes" else (a == b).all()


@pytest.mark.parametrize("dtype", sorted(DATA_TYPE_CODES, key=str), ids=str)
def test_every_pixel_type_comes_back_bit_exactly(tmp_path: Path, dtype: np.dtype[np.generic]) -> None:
    rng = np.random.default_rng(0)
    data = (rng.integers(0, 4000, (2, 3, 4, 5)) * (1 + 0.5j if dtype.kind == "c" else 1)).astype(dtype)
    with ImageFile(tmp_path / "x.h5") as file:
        file.append(image(data, attributes="<a>\0é</a>"))
    (back,) = read_images(tmp_path / "x.h5")
    assert back.data.dtype == dtype and np.array_equal(back.data, data) and back.attributes == "<a>é</a>"
    assert back.header.tobytes() == image(data).header.tobytes()


def test_complex_pixels_are_the_compound_that_ismrmrd_expects(tmp_path: Path) -> None:
    with ImageFile(tmp_path / "x.h5", "run") as file:
        file.append(image(np.full((1, 1, 2, 2), 1 + 2j, np.complex64), series=0))
    with h5py.File(tmp_path / "x.h5") as raw:
        assert raw["run/image_0/data"].id.get_type().get_member_name(1) == b"imag"
    outside = ismrmrd.Dataset(str(tmp_path / "x.h5"), "run", mode="r")
    assert outside.read_image("image_0", 0).data[0, 0, 1, 1] == 1 + 2j


def test_appending_to_a_file_that_exists(tmp_path: Path) -> None:
    for number in (1, 2):
        with ImageFile(tmp_path / "x.h5", "a") as file:
            file.append(image(np.full((1, 1, 2, 3), number, np.float32), index=number))
    with ImageFile(tmp_path / "x.h5", "b") as file:
        file.append(image(np.zeros((1, 1, 4, 4), np.uint16)))
    assert image_groups(tmp_path / "x.h5") == ["a", "b"]
    assert [int(i.data[0, 0, 0, 0]) for i in read_images(tmp_path / "x.h5", "a")] == [1, 2]
    assert len(list(read_images(tmp_path / "x.h5"))) == 3


@pytest.mark.parametrize(
    "second", [np.zeros((1, 1, 4, 6), np.float32), np.zeros((2, 1, 4, 5), np.float32), np.zeros((1, 1, 4, 5), np.uint16)]
)
def test_a_series_with_two_matrices_or_types_is_refused_and_the_file_stays_good(
    tmp_path: Path, second: NDArray[np.generic]
) -> None:
    with ImageFile(tmp_path / "x.h5") as file:
        file.append(image(np.ones((1, 1, 4, 5), np.float32)))
        with pytest.raises(ImageFileError, match="image_1: images of one series differ"):
            file.append(image(second, index=2))
        file.append(image(second, series=2))
    assert [i.data.shape for i in read_images(tmp_path / "x.h5")] == [(1, 1, 4, 5), second.shape]


def test_series_are_read_in_numerical_order(tmp_path: Path) -> None:
    with ImageFile(tmp_path / "x.h5") as file:
        for series in (10, 2):
            file.append(image(np.zeros((1, 1, 2, 2), np.uint16), series=series))
    assert [int(i.header["image_series_index"]) for i in read_images(tmp_path / "x.h5")] == [2, 10]


def test_a_header_that_lies_about_its_data_is_refused(tmp_path: Path) -> None:
    good = image(np.zeros((1, 1, 4, 5), np.float32))
    with ImageFile(tmp_path / "x.h5") as file, pytest.raises(ImageFileError, match="disagree"):
        file.append(Image(0, good.header, "", np.zeros((1, 1, 5, 4), np.float32)))


def test_what_is_no_image_file_is_refused_by_type(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ImageFileError):
        list(read_images(tmp_path / "text.h5"))
    with pytest.raises(ImageFileError):
        ImageFile(tmp_path / "text.h5")
    with pytest.raises(ImageFileError, match="images"):
        list(read_images(REAL, "other"))
