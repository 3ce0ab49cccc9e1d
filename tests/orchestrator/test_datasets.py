"""`python -m orchestrator.datasets` makes honest, repeatable shards."""

import gzip
import hashlib
import io
import json
import resource
import struct
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from ondevice import roofline
from orchestrator.datasets import build, files, partition, read, read_path, sources
from orchestrator.datasets.partition import stratified
from orchestrator.datasets.picture import draw
from wire.errors import DataError

LABELS = np.arange(1000) % 10


def by_class(parts, y=LABELS):
    return np.array([np.bincount(y[part], minlength=10) for part in parts])


# Dealing samples out


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
@pytest.mark.parametrize("per_device", [None, 60])
def test_no_sample_is_on_two_devices(split, per_device):
    parts = partition(LABELS, 7, split=split, per_device=per_device, seed=3)
    everything = np.concatenate(parts)
    assert len(parts) == 7
    assert len(np.unique(everything)) == len(everything)
    assert len(everything) == (1000 if per_device is None else 420)
    if per_device is not None:
        assert {len(part) for part in parts} == {60}


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
@pytest.mark.parametrize("per_device", [None, 60])
def test_a_seed_gives_one_split(split, per_device):
    def deal(seed):
        parts = partition(LABELS, 7, split=split, per_device=per_device, seed=seed)
        return b"|".join(part.tobytes() for part in parts)

    assert deal(1) == deal(1)
    assert deal(1) != deal(2)


def test_splits_are_golden():
    """A later numpy or Stillhouse must deal out the same samples for the same seed."""
    y = np.arange(40) % 4
    plain = partition(y, 2, seed=5)
    skewed = partition(y, 2, split="dirichlet", seed=5, min_samples=1)
    mixed = partition(y, 2, split="dirichlet", seed=5, per_device=8)
    assert plain[0][:6].tolist() == [20, 22, 24, 3, 23, 6]
    assert [len(part) for part in skewed] == [30, 10]
    assert skewed[0][:6].tolist() == [16, 31, 20, 19, 28, 26]
    assert mixed[0].tolist() == [6, 24, 0, 29, 1, 32, 37, 12]


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(part) for part in partition(LABELS, 7)]
    assert sorted(sizes) == [142] + [143] * 6


@pytest.mark.parametrize("per_device", [None, 100])
def test_alpha_sets_the_skew(per_device):
    y = np.arange(20_000) % 10

    def skew(alpha):
        """The commonest class's share, mean over devices: 0.1 is even, 1 is one class."""
        parts = partition(y, 20, split="dirichlet", alpha=alpha, per_device=per_device)
        counts = by_class(parts, y)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert skew(0.05) > 0.5 > skew(0.5) > 0.2 > skew(1000)


def test_dirichlet_shares_have_the_variance_of_the_distribution():
    """Dir(alpha 1_K) has Var p = (K - 1) / (K^2 (K alpha + 1)); here over 10 x 5 x 200 shares."""
    alpha, devices = 0.5, 5
    shares = []
    for seed in range(200):
        parts = partition(LABELS, devices, split="dirichlet", alpha=alpha, seed=seed, min_samples=1)
        shares.append(by_class(parts) / 100)
    expected = (devices - 1) / (devices**2 * (devices * alpha + 1))
    assert np.var(shares) == pytest.approx(expected, rel=0.05)


def test_mixtures_keep_to_the_classes_that_are_there_and_use_them_up():
    y = np.repeat([0, 2, 5], [50, 30, 20])
    parts = partition(y, 4, split="dirichlet", alpha=0.05, per_device=25)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(100))


def test_every_device_gets_its_least():
    for seed in range(20):
        parts = partition(LABELS, 8, split="dirichlet", alpha=0.1, seed=seed, min_samples=40)
        assert min(len(part) for part in parts) >= 40


def test_a_least_that_cannot_be_met_is_an_error_with_a_remedy():
    with pytest.raises(DataError, match=r"at least 120 samples .* raise alpha, use fewer devices"):
        partition(LABELS, 8, split="dirichlet", alpha=0.1, min_samples=120)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "at least 1 device"),
        ({"devices": 4, "per_device": 0}, "at least 1 sample"),
        ({"devices": 4, "per_device": 251}, "need 1004 samples, .* has 1000; .* at most 250"),
        ({"devices": 1001}, "need 1001 samples, .* ask for at most 1000 devices"),
        ({"devices": 4, "split": "dirichle"}, "expected 'iid' or 'dirichlet', got 'dirichle'"),
        ({"devices": 4, "split": "dirichlet", "alpha": 0.0}, "alpha of at least 0.01, got 0.0"),
        ({"devices": 4, "split": "dirichlet", "alpha": float("nan")}, "got nan"),
        ({"devices": 4, "seed": -1}, "seed from 0"),
    ],
)
def test_impossible_splits_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        partition(LABELS, **change)


def test_a_seed_out_of_range_is_refused_where_a_source_is_cut_by_it(tmp_path):
    with pytest.raises(DataError, match="expected a seed from 0 to 4294967295, got -1"):
        build("digits", tmp_path, devices=2, seed=-1)


def test_stratified_cut_keeps_the_proportion_of_each_class():
    y = np.repeat([0, 1, 2], [100, 50, 10])
    rest, held = stratified(y, 0.2, seed=1)
    assert np.bincount(y[held]).tolist() == [20, 10, 2]
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(160))


# Sources


def plain_npz(path, n=60, side=6, **more):
    x = np.random.RandomState(n).randint(0, 256, (n, side, side, 3)).astype(np.uint8)
    np.savez(path, **{"x": x, "y": np.arange(n) % 3} | more)
    return path


def idx(path, array):
    """An array in MNIST's file format: magic 0, 0, type 8 (uint8), dimensions; sizes; bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def torchvision_files(root, images, labels, prefix=("train-", "t10k-")):
    for part in prefix:
        idx(root / f"{part}images-idx3-ubyte", images)
        idx(root / f"{part}labels-idx1-ubyte", labels)


def test_digits_are_cut_by_class_and_brought_to_colour():
    train, test = read("digits")
    assert train.x.shape == (1438, 32, 32, 3)
    assert test.x.shape == (359, 32, 32, 3)
    assert train.x.max() == 255
    assert train.x.min() == 0
    assert all(35 <= n <= 37 for n in test.counts())
    seen = {image.tobytes() for image in train.x}
    assert not any(image.tobytes() in seen for image in test.x)


def test_half_a_file_of_fashion_mnist_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    """torchvision looks for names alone, so what a full disk left would fail for ever."""
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(5000)))
    monkeypatch.setattr(sources, "DEBIAN_FASHION", tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            read("fashion-mnist", cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.glob("cache/**/*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_torchvision_sets_are_read_from_their_files(tmp_path, name, folder):
    images = np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    torchvision_files(tmp_path / folder / "raw", images, labels)
    train, test = read(name, cache=tmp_path)
    for half in (train, test):
        assert np.array_equal(half.x, images[..., None])
        assert np.array_equal(half.y, labels)
    assert len(train.classes) == 10
    assert train.classes[1] == {"mnist": "one", "fashion-mnist": "Trouser"}[name]


def test_emnist_letters_stand_upright(tmp_path):
    images = np.zeros((62, 28, 28), np.uint8)
    images[:, 2, 20] = 255  # EMNIST's files hold (column, row)
    torchvision_files(
        tmp_path / "EMNIST" / "raw",
        images,
        np.arange(62, dtype=np.uint8),
        ("emnist-byclass-train-", "emnist-byclass-test-"),
    )
    train, _ = read("emnist", cache=tmp_path)
    assert np.argwhere(train.x[0]).tolist() == [[20, 2, 0]]
    assert "".join(train.classes[9:12]) == "9AB"


def test_failed_download_says_what_else_one_can_do(tmp_path, monkeypatch):
    read_mnist = tmp_path / "MNIST" / "raw"
    torchvision_files(read_mnist, np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8))
    read("mnist", cache=tmp_path)  # torchvision is imported now
    from torchvision.datasets import mnist

    def offline(*_args, **_options):
        raise URLError("no route to host")

    monkeypatch.setattr(mnist, "download_and_extract_archive", offline)
    with pytest.raises(DataError, match=r"MNIST: .*no route to host.*; connect this machine"):
        read("mnist", cache=tmp_path / "empty")


def test_packed_strips_and_single_pictures_give_the_same_pixels(tmp_path):
    x = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)

    def packed(name, pictures):
        blobs = []
        for picture in pictures:
            with io.BytesIO() as buffer:
                Image.fromarray(picture).save(buffer, "webp", lossless=True)
                blobs.append(buffer.getvalue())
        np.savez(
            tmp_path / name,
            webp=np.frombuffer(b"".join(blobs), np.uint8),
            offsets=np.cumsum([0, *map(len, blobs)]),
            y=np.arange(12, dtype=np.uint8) % 3,
            classes=np.array(["a", "b", "c"]),
        )
        return read_path(tmp_path / name)

    strips = packed("strips.npz", x.reshape(3, 32, 8, 3))
    singles = packed("singles.npz", x)
    assert np.array_equal(strips.x, x)
    assert np.array_equal(singles.x, x)
    assert strips.classes == ("a", "b", "c")


def pictures(folder, sizes, mode="RGB"):
    for label, name in enumerate(["cat", "dog"]):
        (folder / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            colour = (0, 255 * label, 0) if mode == "RGB" else 255 * label
            Image.new(mode, size, colour).save(folder / name / f"{i}.png")
    return folder


def test_folder_of_images_is_a_source(tmp_path):
    pictures(tmp_path, [(20, 10)] * 5)
    train, test = read(str(tmp_path))
    assert train.classes == ("cat", "dog")
    assert train.x.shape == (8, 10, 20, 3)
    assert test.counts() == [1, 1]
    assert (train.x[train.y == 1] == (0, 255, 0)).all()
    assert read(str(tmp_path), size=(4, 5), channels=1)[0].x.shape == (8, 4, 5, 1)


def test_grey_pictures_stay_grey(tmp_path):
    assert read(str(pictures(tmp_path, [(20, 10)] * 5, "L")))[0].x.shape == (8, 10, 20, 1)


def test_pictures_of_several_sizes_want_a_size(tmp_path):
    pictures(tmp_path, [(40, 50), (40, 50), (64, 48), (65, 48), (66, 48), (66, 48)])
    told = r"one size, got 4: 50x40 \(4\), 48x66 \(4\), 48x64 \(2\), \.\.\.; choose .* --size 32x32"
    with pytest.raises(DataError, match=told):
        read(str(tmp_path))
    assert read(str(tmp_path), size=(32, 32))[0].x.shape == (10, 32, 32, 3)


def test_pictures_too_large_to_take_as_they_are_want_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match=r"10 pictures of 10x20 \(10\) take .* --size 10x10"):
        read(str(pictures(tmp_path, [(20, 10)] * 5)))


BAD_FILES = {
    "no labels": ({"y": None}, r"expected arrays 'x' and 'y' \(or webp, offsets and y\), got x"),
    "float": ({"x": np.zeros((60, 6, 6, 3))}, "expected uint8 .* got float64"),
    "lengths": ({"y": np.zeros(59, np.int64)}, "got 60 images and 59 labels"),
    "labels": ({"classes": np.array(["a", "b"])}, "from 0 to 1, got 0 to 2"),
    "pickled": ({"x": np.array([{}] * 60, object)}, "without pickled objects"),
    "strips": (
        {"x": None, "webp": np.zeros(9, np.uint8), "offsets": np.array([0, 9])},
        "expected strips of square images, got none at picture 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_unfit_files_are_refused_by_name(tmp_path, change, message):
    arrays = {"x": np.zeros((60, 6, 6, 3), np.uint8), "y": np.arange(60) % 3} | change
    path = tmp_path / "d.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError, match=message) as caught:
        read_path(path)
    assert str(path) in str(caught.value)


def test_unfit_sources_are_refused(tmp_path):
    train = plain_npz(tmp_path / "train.npz")
    other = plain_npz(tmp_path / "other.npz", classes=np.array(["x", "y", "z"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "cat").mkdir(parents=True)
    (tmp_path / "cats" / "cat" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "text.npz").write_text("hello")
    cases = [
        ({"source": "cifra10"}, "expected one of digits, .* got a name"),
        ({"source": "digits", "heldout": train}, "brings its own held-out set"),
        (
            {"source": str(train), "heldout": other},
            "'x', 'y', 'z'; expected names among '0', '1', '2'",
        ),
        (
            {"source": str(train), "heldout": tmp_path / "no.npz"},
            "got nothing there; check the path",
        ),
        ({"source": str(tmp_path / "empty")}, "0 sub-folders and no picture"),
        ({"source": str(tmp_path / "cats")}, r"got 1 of 1: cat/broken\.png"),
        ({"source": str(tmp_path / "text.npz")}, "does not read"),
        ({"source": str(plain_npz(tmp_path / "few.npz", n=3))}, "too few to hold out 20%"),
    ]
    for arguments, message in cases:
        with pytest.raises(DataError, match=message):
            read(**arguments)


# Building


def test_build_writes_what_it_says(tmp_path):
    source, out = plain_npz(tmp_path / "s.npz"), tmp_path / "out"
    heldout = plain_npz(tmp_path / "h.npz", n=30, side=12)
    made = build(str(source), out, devices=4, seed=2, size=(8, 10), channels=1, heldout=heldout,
                 heldout_samples=9)  # fmt: skip
    record = json.loads((out / "split.json").read_text())
    assert record["source"] == "s.npz"
    assert record["shape"] == [8, 10, 1]
    assert record["alpha"] is None
    assert [shard["samples"] for shard in record["devices"]] == [15] * 4
    assert made.heldout.samples == 9
    for shard in [*made.devices, made.heldout]:
        assert hashlib.sha256((out / shard.file).read_bytes()).hexdigest() == shard.sha256
        with np.load(out / shard.file, allow_pickle=False) as arrays:
            assert arrays["x"].shape == (shard.samples, 8, 10, 1)
            assert arrays["x"].dtype == np.uint8
            assert np.bincount(arrays["y"], minlength=3).tolist() == shard.counts
            assert arrays["classes"].tolist() == ["0", "1", "2"]
    with Image.open(out / "split.png") as picture:
        assert picture.width > 1000


def test_same_arguments_write_the_same_bytes(tmp_path):
    source = plain_npz(tmp_path / "s.npz")
    runs = []
    for name in ("a", "b"):
        build(str(source), tmp_path / name, devices=3, split="dirichlet", seed=4, min_samples=2)
        runs.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert runs[0] == runs[1]
    assert len(runs[0]) == 6


@pytest.mark.parametrize("number", [10, 200])
def test_class_names_are_drawn_as_they_stand(tmp_path, number):
    """Names are neither formulas nor several lines; a missing glyph would warn, an error here."""
    odd = ["$5 bill", "a$b$c", "$\\frac", "new\nline", "emoji \N{GRINNING FACE}", "\u65e5\u672c",
           "_unknown_", "\x1b[31m", "W" * 90, "caf\u00e9"]  # fmt: skip
    names = tuple((odd * 20)[:number])
    draw(np.ones((3, number), np.int64), names, "$5 photos_1$ on 3 devices", tmp_path / "split.png")
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")
    assert [roofline.label(name, 18, "class 5") for name in odd] == [
        r"\$5 bill", r"a\$b\$c", r"\$\frac", "new line", "emoji \N{GRINNING FACE}", "class 5",
        "\N{ZERO WIDTH SPACE}_unknown_", "[31m", "WWWWWWWWWWWW\N{HORIZONTAL ELLIPSIS}WWWWW",
        "caf\u00e9",
    ]  # fmt: skip


@pytest.mark.parametrize(("devices", "classes"), [(1, 2), (3, 62), (120, 10), (9, 100)])
def test_any_split_can_be_drawn(tmp_path, devices, classes):
    n = max(600, 3 * classes)
    x = np.zeros((n, 2, 2, 1), np.uint8)
    names = np.array([f"a class of a rather long name {c}" for c in range(classes)])
    np.savez(tmp_path / "s.npz", x=x, y=np.arange(n) % classes, classes=names)
    source = str(tmp_path / "s.npz")
    build(source, tmp_path, devices=devices, heldout=tmp_path / "s.npz")
    with Image.open(tmp_path / "split.png") as picture:
        assert picture.height < 2400


def test_shards_of_a_larger_split_are_not_left_among_the_new_ones(tmp_path):
    source = plain_npz(tmp_path / "s.npz")
    build(str(source), tmp_path / "out", devices=3)
    with pytest.raises(DataError, match=r"device-2\.npz.*; remove them"):
        build(str(source), tmp_path / "out", devices=2)


def test_refused_builds_write_nothing(tmp_path):
    source = str(plain_npz(tmp_path / "s.npz"))
    for arguments in ({"channels": 2}, {"per_device": 50}, {"heldout_samples": 0}):
        with pytest.raises(DataError):
            build(source, tmp_path / "out", devices=2, **arguments)
    assert not (tmp_path / "out").exists()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.datasets", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_line_builds_and_reports(tmp_path):
    source, out = plain_npz(tmp_path / "s.npz"), tmp_path / "out"
    done = command("--source", source, "--devices", 2, "--out", out, "--size", "8x8",
                   "--held-out", 5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 devices with 24 samples of 8x8x3, 5 held out" in done.stdout
    assert (out / "device-1.npz").exists()


def test_command_line_exits_with_2_and_the_remedy(tmp_path):
    done = command("--source", tmp_path / "gone.npz", "--devices", 2, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "expected one of digits" in done.stderr
    assert "Traceback" not in done.stderr
    done = command("--source", "digits", "--devices", 2, "--out", tmp_path / "o", "--size", "8")
    assert done.returncode == 2
    assert "HEIGHTxWIDTH" in done.stderr
