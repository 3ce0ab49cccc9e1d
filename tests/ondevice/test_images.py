"""`ondevice.images` reads a device's images correctly, or tells its owner what is wrong."""

import sys

import numpy as np
import pytest
from PIL import Image

from ondevice.images import ImageSet, Preprocess, load
from wire.errors import DataError

SHAPE = (3, 32, 32)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def good(n=12):
    return {
        "x": np.arange(n * 3072, dtype=np.uint32).astype(np.uint8).reshape(n, 32, 32, 3),
        "y": np.arange(n) % 3,
    }


# Loading


def test_npz_is_read_as_it_is(tmp_path):
    arrays = good()
    path = write(tmp_path / "d.npz", **arrays, classes=np.array(["a", "b", "c"]))
    images = load(path, input_shape=SHAPE)
    assert np.array_equal(images.x, arrays["x"])
    assert images.x.dtype == np.uint8
    assert np.array_equal(images.y, arrays["y"])
    assert images.y.dtype == np.int64
    assert images.names == ("a", "b", "c")


def test_grey_images_get_their_channel_axis(tmp_path):
    x = np.zeros((5, 28, 28), np.uint8)
    path = write(tmp_path / "d.npz", x=x, y=np.zeros(5, np.uint8))
    assert load(path, input_shape=(1, 28, 28)).x.shape == (5, 28, 28, 1)


def test_digest_names_pixels_labels_order_and_shape(tmp_path):
    arrays = good()

    def digest(shape=SHAPE, **change):
        return load(write(tmp_path / "d.npz", **arrays | change), input_shape=shape).digest

    first = digest()
    pixel = arrays["x"].copy()
    pixel[3, 4, 5, 1] ^= 1
    assert first == digest(y=arrays["y"].astype(np.uint8)), "the labels' storage type is no matter"
    others = {
        digest(x=pixel),
        digest(y=np.roll(arrays["y"], 1)),
        digest(x=arrays["x"][::-1], y=arrays["y"][::-1]),
        digest(shape=(3, 16, 64), x=arrays["x"].reshape(-1, 16, 64, 3)),
        digest(classes=np.array(["a", "b", "c"])),
        digest(classes=np.array(["a", "b", "d"])),
    }
    assert len(others | {first}) == 7
    assert first == "c89cb2cf6cd99e1f0e2584ea643be394f19e1a2cbcbe8dd3d196d539da62e3a2"


def test_loaded_samples_cannot_change_under_their_digest(tmp_path):
    images = load(write(tmp_path / "d.npz", **good()), input_shape=SHAPE)
    with pytest.raises(ValueError, match="read-only"):
        images.x[0] = 0


def test_npz_needs_no_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    path = write(tmp_path / "d.npz", **good())
    assert len(load(path, input_shape=SHAPE).y) == 12


BAD_ARRAYS = {
    "no y": ({"y": None}, "expected arrays 'x' and 'y' .*, got x"),
    "no x": ({"x": None}, "expected arrays 'x' and 'y' .*, got y"),
    "float pixels": ({"x": np.zeros((12, 32, 32, 3))}, "uint8 .* got float64"),
    "flat pixels": ({"x": np.zeros((12, 3072), np.uint8)}, r"got uint8 \(12, 3072\)"),
    "float labels": ({"y": np.zeros(12)}, "expected integers .* got float64"),
    "one-hot labels": ({"y": np.zeros((12, 3), np.int64)}, r"got int64 \(12, 3\)"),
    "fewer labels": ({"y": np.zeros(11, np.int64)}, "got 12 images and 11 labels"),
    "empty": ({"x": np.zeros((0, 32, 32, 3), np.uint8), "y": np.zeros(0, np.int64)}, "got none"),
    "negative label": ({"y": np.arange(12) - 1}, "labels from 0, got -1 to 10"),
    "label beyond names": ({"classes": np.array(["a", "b"])}, "from 0 to 1, got 0 to 2"),
    "label beyond the run's": ({"y": np.arange(12)}, r"0 to 2 \(3 classes .*got 11 at sample 11"),
    "other classes": (
        {"classes": np.array(list("abcd"))},
        r"expected 3 classes, got 4 \('a', 'b', 'c', 'd'\): the run knows classes by number",
    ),
    "equal names": (
        {"classes": np.array(["a", "\u00fc", "u\u0308"])},
        "'\u00fc' is there twice; name each once .* rename it",
    ),
    "names of objects": ({"classes": np.array(["a", "b", "c"], object)}, "without pickled objects"),
    "names in a table": ({"classes": np.array([["a"], ["b"], ["c"]])}, r"got <U1 \(3, 1\)"),
    "names of floats": ({"classes": np.arange(3.0)}, "one name for each class, got float64"),
    "names of bytes in Latin 1": ({"classes": np.array([b"a", b"b", b"\xfc"])}, "names in UTF-8"),
    "an empty name": ({"classes": np.array(["a", "", "c"])}, "1 to 256 printable .* got ''"),
    "a name of a line break": ({"classes": np.array(["a", "b", "c\nd"])}, "printable .*'c.nd'"),
    "channels first": (
        {"x": np.zeros((12, 3, 32, 32), np.uint8)},
        "expected 32x32 images with 3 channels, got 3x32 with 32",
    ),
    "wrong size": ({"x": np.zeros((12, 28, 28, 3), np.uint8)}, "expected 32x32 .* got 28x28"),
    "grey for colour": ({"x": np.zeros((12, 32, 32), np.uint8)}, "got 32x32 with 1"),
    "pickled": ({"x": np.array([{}] * 12, object)}, "without pickled objects"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_unfit_npz_is_refused_with_its_name_and_the_remedy(tmp_path, change, message):
    arrays = {k: v for k, v in (good() | change).items() if v is not None}
    path = write(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(path, input_shape=SHAPE).labelled(3)
    assert str(path) in str(caught.value)
    assert ";" in str(caught.value), "a remedy"


@pytest.mark.parametrize("damage", ["text", "truncated", "bare npy", "empty file"])
def test_damaged_npz_is_refused(tmp_path, damage):
    path = write(tmp_path / "d.npz", **good())
    if damage == "bare npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        whole = path.read_bytes()
        path.write_bytes({"text": b"hello", "truncated": whole[:-200], "empty file": b""}[damage])
    with pytest.raises(DataError, match="does not read"):
        load(path, input_shape=SHAPE)


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: expected an \.npz file or a folder"):
        load(tmp_path / "nowhere", input_shape=SHAPE)


# Folders of images


@pytest.fixture
def folder(tmp_path):
    for name in ("dog", "cat", "zebra", ".hidden"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (64, 48), (255, 0, 0)).save(tmp_path / "cat" / "b.png")
    Image.new("L", (16, 16), 200).save(tmp_path / "cat" / "a.BMP")
    Image.new("RGB", (640, 480), (0, 0, 255)).save(tmp_path / "dog" / "c.jpg")
    Image.new("RGBA", (32, 32), (0, 255, 0, 255)).save(tmp_path / "dog" / "d.webp", lossless=True)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / "._d.png").write_text("no image either")
    return tmp_path


def test_folder_gives_sorted_classes_and_resized_colour_images(folder):
    images = load(folder, input_shape=SHAPE)
    assert images.names == ("cat", "dog", "zebra"), "zebra is empty and keeps its number"
    assert images.y.tolist() == [0, 0, 1, 1]
    assert images.x.shape == (4, 32, 32, 3)
    middle = images.x[:, 16, 16].astype(int)
    expected = [(200, 200, 200), (255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert np.abs(middle - expected).max() <= 3  # JPEG is lossy


def test_folder_gives_grey_images_to_a_grey_model(folder):
    images = load(folder, input_shape=(1, 28, 20))
    assert images.x.shape == (4, 28, 20, 1)
    assert (images.x[0] == 200).all()


def test_camera_pictures_are_turned_upright(tmp_path):
    (tmp_path / "a").mkdir()
    picture = Image.fromarray(np.repeat(np.uint8([[0], [255]]), 16, 0).repeat(32, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    picture.save(tmp_path / "a" / "p.png", exif=exif)
    images = load(tmp_path, input_shape=(1, 32, 32))
    assert images.x[0, 0, 0, 0] == 255
    assert images.x[0, -1, 0, 0] == 0


def test_a_damaged_image_is_left_out_and_named(folder):
    (folder / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    images = load(folder, input_shape=SHAPE)
    assert images.y.tolist() == [0, 0, 1, 1]
    assert "1 of 5 pictures left out as damaged: dog/broken.png (" in images.remarks[0].what
    with pytest.raises(DataError, match=r"got 1 of 5: dog/broken\.png \(.*\); replace or remove"):
        load(folder, input_shape=SHAPE, bad_share=0)


def test_folder_with_another_number_of_classes_is_refused(folder):
    with pytest.raises(DataError, match=r"expected 10 classes, got 3 \('cat', 'dog', 'zebra'\)"):
        load(folder, input_shape=SHAPE).labelled(10)


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="got 1 sub-folders and no picture"):
        load(tmp_path, input_shape=SHAPE)


def test_folder_serves_only_grey_and_colour_models(folder):
    with pytest.raises(DataError, match="1 or 3 input channels, got 4"):
        load(folder, input_shape=(4, 32, 32))


# Labels in the run's numbering of classes

NFC, NFD = "Schl\u00fcssel", "Schlu\u0308ssel"


def named(*names):
    """One image of each class."""
    x = np.zeros((len(names), 4, 4, 3), np.uint8)
    return ImageSet(x, np.arange(len(names)), "ab" * 32, names, "images")


@pytest.mark.parametrize(
    "stored",
    [
        np.array(["bolt", NFD, "10", "1"]),
        np.array(["bolt", NFC, "10", "1"]),
        np.array([b"bolt", NFD.encode(), b"10", b"1"]),
    ],
    ids=["text, form D", "text, form C", "bytes"],
)
def test_labels_go_by_name_however_the_name_is_stored(tmp_path, stored):
    path = write(tmp_path / "d.npz", **good(4) | {"y": np.arange(4)}, classes=stored)
    images = load(path, input_shape=SHAPE)
    assert images.names == ("bolt", NFC, "10", "1")
    ours = images.labelled(6, ("1", "10", "nut", NFC, "bolt", "pin"))
    assert ours.y.tolist() == [4, 3, 1, 0], "it lacks two of the six"
    assert ours.digest == images.digest, "the hold-out is drawn by it, by device and server"
    assert np.array_equal(ours.x, images.x)


def test_integers_are_names_too(tmp_path):
    images = load(
        write(tmp_path / "d.npz", **good(), classes=np.array([10, 1, 7])), input_shape=SHAPE
    )
    assert images.labelled(3, ("1", "7", "10")).y.tolist() == [2, 0, 1] * 4


def test_a_macs_copy_of_a_folder_gives_the_same_labels(tmp_path):
    for base, name in (("here", NFC), ("mac", NFD)):
        for each in ("bolt", name, "tee \N{TEACUP WITHOUT HANDLE}", "nut"):
            (tmp_path / base / each).mkdir(parents=True)
            Image.new("L", (8, 8), len(each.encode())).save(tmp_path / base / each / "a.png")
    here, mac = (load(tmp_path / base, input_shape=(1, 8, 8)) for base in ("here", "mac"))
    known = ("nut", "tee \N{TEACUP WITHOUT HANDLE}", "bolt", NFC, "pin")
    assert sorted(here.labelled(5, known).y) == sorted(mac.labelled(5, known).y) == [0, 1, 2, 3]
    assert set(here.names) == set(mac.names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Bolt", r"'Bolt' \('bolt' differs in capitals only\)"),
        ("bolt ", r"'bolt ' \('bolt' differs in capitals, spaces, '_' or '-' only\)"),
        ("Hex-Nut", r"'Hex-Nut' \('hex_nut' differs in capitals, spaces"),
        ("blot", r"'blot' \(the nearest is 'bolt'\)"),
        ("00", r"'00' \(the nearest is '0'\)"),
        ("screw", "'screw'; expected names among"),
    ],
)
def test_a_class_that_the_run_does_not_know_is_refused_with_both_lists(name, said):
    with pytest.raises(DataError, match=f"^images: a class is not known: {said}") as caught:
        named("pin", name).labelled(4, ("bolt", "0", "hex_nut", "pin"))
    assert f"among 'bolt', '0', 'hex_nut', 'pin', got 'pin', {name!r}; rename" in str(caught.value)


def test_numbers_alone_are_places_in_the_runs_list():
    images = ImageSet(np.zeros((8, 4, 4, 3), np.uint8), np.arange(8) % 4, "digest")
    ours = images.labelled(5, tuple("abcde"))
    assert np.array_equal(ours.y, images.y)
    with pytest.raises(DataError, match="labels from 0 to 2"):
        images.labelled(3, tuple("abc"))


# Normalisation


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocess_normalises_every_pixel_value(channels):
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(channels, 3)
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.247, 0.2435, 0.2616)[:channels]
    out = np.empty((4, channels, 8, 8), np.float32)
    Preprocess(mean, std)(pixels, out=out)
    exact = (pixels / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(out, exact.transpose(0, 3, 1, 2), rtol=0, atol=5e-7)


def test_preprocess_refuses_a_zero_deviation():
    with pytest.raises(ValueError, match="positive deviations"):
        Preprocess((0.5,), (0.0,))
