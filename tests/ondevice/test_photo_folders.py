"""Which files of a folder or an archive are read, and which are left out and counted."""

import contextlib
import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from ondevice import photos
from tests.ondevice.test_photos import SHAPE, folder, plain, remarks
from wire.errors import DataError

# Folders


def test_system_folders_are_no_classes(tmp_path):
    root = folder(tmp_path, a=1)
    for name in ("lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "__MACOSX",
                 ".Trashes", ".Spotlight-V100", "#recycle", "found.000", "FOUND.001", "LOST.DIR",
                 "a/@eaDir"):  # fmt: skip
        (root / name).mkdir()
        plain().save(root / name / "thumb.png")
    (root / "a" / "Thumbs.db").touch()
    (root / "a" / "desktop.ini").touch()
    read = photos.read(root, SHAPE)
    assert read.counts == {"a": 1}
    told = remarks(read)
    assert "system folders are not classes: #recycle, $RECYCLE.BIN, @eaDir" in told
    assert "suffix" not in told


def test_what_is_left_out_is_counted(tmp_path):
    text = [("b/a.txt", b""), ("b/b.TXT", b""), ("a/x.heic", b""), ("a/README", b""),
            ("a/._x.png", b""), ("a/more/x.png", b""), ("loose.jpg", b"")]  # fmt: skip
    root = folder(tmp_path, text, c=12, d=3)
    read = photos.read(root, SHAPE)
    assert read.counts == {"a": 0, "b": 0, "c": 12, "d": 3}
    assert read.summary == "15 images of 4 classes: a 0, b 0, c 12, d 3"
    found = dict(read.remarks())
    assert found == {
        "few images of some classes: d 3": "give each 10 or more",
        "files left out by their suffix: .txt 2, none 1, .heic 1":
            "convert the pictures to JPEG or PNG",
        "1 folder inside class folders left out: a/more":
            "move their pictures up into the class folder, or the folders away",
        "1 picture beside the class folders left out":
            "move them into the folders of their classes",
        "1 name with a dot in front left out": "",
    }  # fmt: skip


def test_names_are_composed_sorted_and_merged(tmp_path):
    composed = "M\u00fcll"
    apart = unicodedata.normalize("NFD", composed)
    root = folder(tmp_path, **{composed: 2, apart: 3, "Zug": 1, "Ente": 1})
    read = photos.read(root, SHAPE)
    assert read.counts == {"Ente": 1, composed: 5, "Zug": 1}
    assert read.names == ("Ente", composed, "Zug")
    assert f"class names that two folders share: {composed}" in remarks(read)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_names_that_cannot_be_sent_or_shown_are_refused(tmp_path, name):
    root = folder(tmp_path, a=1)
    Path(os.fsdecode(os.fsencode(root) + b"/" + name)).mkdir()
    with pytest.raises(DataError, match="expected a class name in UTF-8") as caught:
        photos.read(root, SHAPE)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_file_names_that_cannot_be_shown_are_escaped(tmp_path):
    root = folder(tmp_path, a=20)
    Path(os.fsdecode(os.fsencode(root) + b"/a/caf\xe9\n.png")).touch()
    assert "a/caf\\udce9\\n.png (is empty)" in remarks(photos.read(root, SHAPE))


WRONG = {
    "pictures without sub-folders": (["a.jpg", "b.jpg"], r"itself \(2 of them\); make"),
    "archives": (["split.jpg", "heldout.npz"], r"got \.npz files; name .*heldout\.npz"),
    "one level more": (["train/bolt/a.jpg", "train/nut/b.jpg"], r"in .*bolt; name .*train "),
    "two levels more": (["x/train/bolt/a.jpg"], r"deeper, in .*bolt; name .*/x/train "),
    "others": (["a/x.heic", "b/y.heic"], "got 2 sub-folders and no picture in them, 2 .heic;"),
    "nothing": ([], "got 0 sub-folders and no picture"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), WRONG.values(), ids=WRONG)
def test_folders_of_another_form_are_refused_with_the_remedy(tmp_path, files, message):
    root = folder(tmp_path / "photos", [(name, b"") for name in files])
    root.mkdir(exist_ok=True)
    with pytest.raises(DataError, match=message):
        photos.read(root, SHAPE)


@contextlib.contextmanager
def as_somebody():
    """Drops root's right to read everything, if we have it."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_unreadable_files_and_folders_are_named(open_folder):
    root = folder(open_folder / "photos", a=30, b=1)
    (root / "a" / "3.png").chmod(0)
    with as_somebody():
        assert "a/3.png (Permission denied)" in remarks(photos.read(root, SHAPE))
    (root / "lost+found").mkdir(mode=0)
    (root / "b").chmod(0)
    try:
        with (
            as_somebody(),
            pytest.raises(DataError, match=r"/b: this folder cannot be read .*a\+rx"),
        ):
            photos.read(root, SHAPE)
        (root / "b").chmod(0o755)
        with as_somebody():
            assert photos.read(root, SHAPE).names == ("a", "b")
        open_folder.chmod(0)
        with as_somebody(), pytest.raises(DataError, match="photos: cannot be read"):
            photos.read(root, SHAPE)
    finally:
        open_folder.chmod(0o755)
        (root / "b").chmod(0o755)


# Archives


def archive(path, **change):
    arrays = {"x": np.zeros((3, 4, 4, 3), np.uint8), "y": np.arange(3)} | change
    np.savez(path, **arrays)
    return path


def test_names_of_an_archive_are_kept_in_their_order(tmp_path):
    apart = unicodedata.normalize("NFD", "M\u00fcll")
    path = archive(tmp_path / "a.npz", classes=np.array(["Zug", apart, "Ente"]))
    assert photos.read(path, SHAPE).names == ("Zug", "M\u00fcll", "Ente")
    path = archive(tmp_path / "b.npz", classes=np.array([b"bolt", b"nut", b"tap"]))
    assert photos.read(path, SHAPE).names == ("bolt", "nut", "tap")


@pytest.mark.parametrize(
    "classes",
    [np.array("abc"), np.zeros((3, 2), "U3"), np.zeros(3), np.array([]), np.array(["a", "b", "a"]),
     np.array([b"\xff", b"a", b"b"])],
    ids=["one", "table", "floats", "none", "twice", "no utf-8"],
)  # fmt: skip
def test_names_that_are_none_are_refused(tmp_path, classes):
    path = archive(tmp_path / "a.npz", classes=classes)
    with pytest.raises(DataError, match=r"classes: expected|there twice"):
        photos.read(path, SHAPE)


def test_a_declared_size_of_an_archive_is_no_traceback(tmp_path):
    path = archive(tmp_path / "a.npz")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(3, 4, 4, 3), }", b"(9999999999,)} "))
    with pytest.raises(DataError, match="does not read"):
        photos.read(path, SHAPE)
