"""One image serves a fleet; an image that cannot work on a device is refused before writing."""

import hashlib
import json
import lzma
import stat

import pytest

from hardware.image.__main__ import main
from hardware.image.build import SCRIPT, UNIT, about, build
from hardware.image.disk import ImageError, MountedBoot, open_disk
from hardware.image.personal import Identity, boot_of, personalize, read_devices
from orchestrator.main import app
from tests.hardware import images

pytestmark = pytest.mark.skipif(
    bool(images.missing()), reason="sudo apt install fdisk mtools e2fsprogs"
)


@pytest.fixture(scope="module")
def boot_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boot")
    (folder / "cmdline.txt").write_text("console=tty1 root=PARTUUID=1-02 rootwait\n")
    (folder / "config.txt").write_text("arm_64bit=1\n")
    (folder / "overlays").mkdir()
    (folder / "overlays/README").write_text("of the vendor\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, boot_files):
    folder = tmp_path_factory.mktemp("base")
    return images.make(folder / "raspios.img", images.system(folder / "root"), boot_files)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return images.package(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def fleet_image(tmp_path_factory, base, package):
    out = tmp_path_factory.mktemp("fleet") / "fleet.img"
    build(base, package, out, "mill")
    return out


@pytest.fixture
def image(tmp_path, fleet_image):
    copy = tmp_path / "mine.img"
    copy.write_bytes(fleet_image.read_bytes())
    return copy


@pytest.fixture
def kit(tmp_path):
    """The files that `orchestrator enroll` writes for two devices."""
    folder = tmp_path / "kits"
    folder.mkdir()
    (folder / "run.toml").write_text(
        f'name = "run"\nfleet = "mill"\nruns = "{tmp_path}/runs"\nheldout = "heldout.npz"\n'
        '[device]\nmodel = "resnet8"\nclasses = 10\n'
    )
    for device in ("pi-1", "pi_2.b"):
        app(
            ["enroll", device, "--config", str(folder / "run.toml"), "--packaged",
             "--out", str(folder / f"{device}.toml"), "--url", "mqtt://hub.example"],
            standalone_mode=False,
        )  # fmt: skip
    return folder


def change(kit, device, *pairs):
    path = kit / f"{device}.toml"
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_holds_package_and_first_boot_and_the_base_is_as_it_was(
    packed, base, package, tmp_path
):
    source = base
    if packed:
        source = tmp_path / "raspios.img.xz"
        source.write_bytes(lzma.compress(base.read_bytes(), preset=0))
    before = digest(source)
    out = tmp_path / "fleet.img"
    assert main(["build", "--base", str(source), "--deb", str(package), "--out", str(out)]) == 0
    assert digest(source) == before
    boot, root = open_disk(out)
    assert boot.read(f"stillhouse/{package.name}") == package.read_bytes()
    assert boot.read("cmdline.txt") == b"console=tty1 root=PARTUUID=1-02 rootwait\n"
    told = about(boot, out)
    assert told.system == "Debian GNU/Linux 12 (bookworm)"
    assert (told.package, told.init_format) == ("0.1.0+py311", "systemd")
    assert root.read(SCRIPT).startswith(b"#!/bin/sh")
    shown = images.run("debugfs", "-R", f"stat {SCRIPT}", f"{out}?offset={root.offset}")
    assert "Mode:  0755" in shown
    assert "User:     0   Group:     0" in shown
    wants = f"/etc/systemd/system/multi-user.target.wants/{UNIT}"
    shown = images.run("debugfs", "-R", f"stat {wants}", f"{out}?offset={root.offset}")
    assert f'Fast link dest: "/etc/systemd/system/{UNIT}"' in shown
    assert "[Install]" in root.read(f"/etc/systemd/system/{UNIT}").decode()
    images.run("e2fsck", "-fn", f"{out}?offset={root.offset}")


def test_a_kit_lands_on_an_image_and_on_a_mounted_partition_alike(image, kit, tmp_path):
    identity = Identity("pi_2.b", wifi="a;b", wifi_password="x\\yz;1234", country="DE")
    personalize(image, identity, kit)
    mounted = tmp_path / "bootfs"
    (mounted / "stillhouse").mkdir(parents=True)
    (mounted / "stillhouse/image.json").write_bytes(boot_of(image).read("stillhouse/image.json"))
    personalize(mounted, identity, kit)
    for name in ("etc/agent.toml", "hostname", "country"):
        here = (mounted / "stillhouse/device" / name).read_bytes()
        assert boot_of(image).read(f"stillhouse/device/{name}") == here
    assert (mounted / "stillhouse/device/hostname").read_text() == "pi-2-b\n"
    settings = (mounted / "stillhouse/device/etc/agent.toml").read_bytes()
    assert settings == (kit / "pi_2.b.toml").read_bytes()
    wifi = (mounted / "stillhouse/device/wifi.nmconnection").read_text().splitlines()
    assert r"ssid=a\\;b" in wifi
    assert r"psk=x\\yz;1234" in wifi


def test_a_mounted_card_that_is_given_another_device_forgets_the_first(image, kit, tmp_path):
    mounted = tmp_path / "bootfs"
    (mounted / "stillhouse").mkdir(parents=True)
    about_it = boot_of(image).read("stillhouse/image.json")
    (mounted / "stillhouse/image.json").write_bytes(about_it)
    personalize(mounted, Identity("pi-1", wifi="barn", country="DE"), kit)
    personalize(mounted, Identity("pi_2.b"), kit)
    device = mounted / "stillhouse/device"
    assert "pi_2.b" in (device / "etc/agent.toml").read_text()
    assert not (device / "wifi.nmconnection").exists()
    assert sorted(path.name for path in device.parent.iterdir()) == ["device", "image.json"]


def test_an_image_keeps_no_deleted_password_since_it_takes_one_kit(image, kit):
    personalize(image, Identity("pi-1"), kit)
    before = digest(image)
    with pytest.raises(ImageError, match="holds a device's kit already; begin with"):
        personalize(image, Identity("pi_2.b"), kit)
    assert digest(image) == before


def test_what_holds_a_password_is_its_owners(fleet_image, kit, tmp_path):
    out = tmp_path / "pi-1.img"
    told = main(["personalize", str(fleet_image), "--device", "pi-1", "--kit", str(kit), "--out",
                 str(out)])  # fmt: skip
    assert told == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert stat.S_IMODE(fleet_image.stat().st_mode) == 0o644


def test_pem_files_travel_with_the_settings_that_name_them(image, kit):
    change(kit, "pi-1", ("mqtt://hub", "mqtts://hub"),
           ("[broker]\n", '[broker]\nca_file = "/etc/stillhouse/ca.pem"\n'))  # fmt: skip
    with pytest.raises(ImageError, match=r"ca_file: no .*ca\.pem to go with it"):
        personalize(image, Identity("pi-1"), kit)
    (kit / "ca.pem").write_text("a certificate")
    personalize(image, Identity("pi-1"), kit)
    assert boot_of(image).read("stillhouse/device/etc/ca.pem") == b"a certificate"


def test_a_fleet_is_an_image_a_device_and_a_list_for_the_imager(fleet_image, kit, tmp_path):
    csv = tmp_path / "devices.csv"
    csv.write_text("device,wifi\npi-1,\npi_2.b,barn\n")
    out, listed = tmp_path / "images", tmp_path / "os_list.json"
    before = digest(fleet_image)
    assert main(["fleet", str(csv), "--image", str(fleet_image), "--kit", str(kit), "--out",
                 str(out), "--country", "DE", "--wifi", "hall", "--list",
                 str(listed)]) == 0  # fmt: skip
    assert digest(fleet_image) == before
    for device, name in (("pi-1", "hall"), ("pi_2.b", "barn")):
        wifi = boot_of(out / f"{device}.img").read("stillhouse/device/wifi.nmconnection")
        assert f"ssid={name}\n" in wifi.decode()
    entries = json.loads(listed.read_text())["os_list"]
    assert [entry["name"] for entry in entries] == ["pi-1", "pi_2.b"]
    for entry in entries:
        image = out / f"{entry['name']}.img"
        assert entry["extract_sha256"] == digest(image)
        assert entry["extract_size"] == image.stat().st_size
        assert entry["url"] == image.as_uri()
        assert entry["init_format"] == "systemd"


def test_a_fleet_of_folders_is_what_a_personalized_image_holds(image, kit, tmp_path, fleet_image):
    csv = tmp_path / "devices.csv"
    csv.write_text("device\npi-1\n")
    out = tmp_path / "folders"
    told = main(["fleet", str(csv), "--image", str(fleet_image), "--kit", str(kit), "--out",
                 str(out), "--folders"])  # fmt: skip
    assert told == 0
    personalize(image, Identity("pi-1"), kit)
    for path in (out / "pi-1").rglob("*"):
        if path.is_file():
            assert boot_of(image).read(str(path.relative_to(out / "pi-1"))) == path.read_bytes()
    assert (out / "pi-1/stillhouse/device/etc/agent.toml").exists()


@pytest.fixture
def wrong_base(tmp_path, boot_files, base):
    def make(what):
        path = tmp_path / "wrong.img"
        root = tmp_path / "wrong-root"
        if what == "no table":
            path.write_bytes(b"\0" * images.MIB)
        elif what == "cut short":
            path.write_bytes(base.read_bytes()[: -images.MIB])
        elif what == "32-bit":
            images.make(path, images.system(root, architecture="armhf"), boot_files)
        elif what == "Trixie":
            images.make(path, images.system(root, python="3.13"), boot_files)
        elif what == "no Debian":
            root.mkdir()
            images.make(path, root, boot_files)
        elif what == "no systemd":
            images.make(path, images.system(root, units=False), boot_files)
        elif what == "no ext4":
            images.make(path, images.system(root), boot_files, root_type="")
        elif what == "two Linux":
            images.make(path, images.system(root), boot_files, kinds=("83", "83"))
        elif what == "small boot":
            images.make(path, images.system(root), boot_files, boot_mib=4)
        elif what == "full root":
            images.system(root)
            images.make(path, root, boot_files)
            _, disk = open_disk(path)
            full = tmp_path / "full"
            full.write_bytes(b"\1" * 70 * images.MIB)
            images.run("debugfs", "-w", "-R", f"write {full} /full", f"{path}?offset={disk.offset}")
        return path

    return make


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no table", "expected an image of Raspberry Pi OS"),
        ("cut short", "cut short: .* download it again"),
        ("32-bit", r"for armhf, but .* is for arm64; take the 64-bit image"),
        ("Trixie", r"has no python3\.11, .* it has python3\.13: make deb TARGET_PYTHON=3\.13"),
        ("no Debian", "its second partition holds no Debian"),
        ("no systemd", "expected one with systemd"),
        ("no ext4", "not an ext4 file system"),
        ("two Linux", "it has partitions of types 83, 83"),
        ("small boot", "boot partition is too small: .* take an image"),
        ("full root", "full or damaged"),
    ],
)
def test_a_wrong_base_is_refused_and_nothing_is_left(what, message, wrong_base, package, tmp_path):
    path = wrong_base(what)
    before = digest(path)
    with pytest.raises(ImageError, match=message):
        build(path, package, tmp_path / "out.img")
    assert digest(path) == before
    assert not list(tmp_path.glob("out.img*"))


def test_an_image_is_never_written_over(base, package, tmp_path):
    (tmp_path / "out.img").write_text("mine")
    with pytest.raises(ImageError, match="is there already"):
        build(base, package, tmp_path / "out.img")
    with pytest.raises(ImageError, match="is there already"):
        build(base, package, base)
    assert (tmp_path / "out.img").read_text() == "mine"


def test_a_packed_base_that_is_damaged_is_refused(base, package, tmp_path):
    packed = tmp_path / "raspios.img.xz"
    packed.write_bytes(lzma.compress(base.read_bytes(), preset=0)[:-100])
    with pytest.raises(ImageError, match="cannot be unpacked"):
        build(packed, package, tmp_path / "out.img")
    assert not list(tmp_path.glob("out.img*"))


def test_another_package_is_refused(base, tmp_path):
    with pytest.raises(ImageError, match="expected the package stillhouse-edge-agent, got other"):
        build(base, images.package(tmp_path, name="other"), tmp_path / "out.img")


def test_kits_of_others_are_refused_and_the_card_stays_as_it_was(image, base, kit):
    before = digest(image)
    change(kit, "pi-1", ('fleet = "mill"', 'fleet = "farm"'))
    with pytest.raises(ImageError, match="a kit of the fleet farm, but the image is of mill"):
        personalize(image, Identity("pi-1"), kit)
    (kit / "pi-3.toml").write_text((kit / "pi_2.b.toml").read_text())
    with pytest.raises(ImageError, match=r"a kit of pi_2\.b, but pi-3 was asked for"):
        personalize(image, Identity("pi-3"), kit)
    with pytest.raises(ImageError, match=r"pi-4\.toml: No such file.*orchestrator enroll pi-4"):
        personalize(image, Identity("pi-4"), kit)
    change(kit, "pi_2.b", ("/var/lib/stillhouse/state", "state"))
    with pytest.raises(ImageError, match="enroll with --packaged"):
        personalize(image, Identity("pi_2.b"), kit)
    assert digest(image) == before
    with pytest.raises(ImageError, match=r"not an image that .* build` made"):
        personalize(base, Identity("pi_2.b"), kit)


def test_a_boot_partition_that_cannot_be_read_is_told_from_one_that_is_another(image, kit):
    boot, _ = open_disk(image)
    with image.open("r+b") as card:
        card.seek(boot.offset)
        card.write(b"\xff" * 512)  # where the FAT records its size
    with pytest.raises(ImageError, match="its boot partition cannot be read: init"):
        personalize(image, Identity("pi-1"), kit)
    with pytest.raises(ImageError, match=r"cannot be read: .*Not a directory"):
        about(MountedBoot(kit / "pi-1.toml"), kit)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("device\npi/1\n", "line 2: device name 'pi/1': use 1 to 64 letters"),
        ("device\npi-1\npi-1\n", "line 3: pi-1 is there twice"),
        ("device\npi_1\npi.1\n", r"pi\.1 and pi_1 have one host name, pi-1"),
        ("name\npi-1\n", "expected columns out of device, wifi"),
        ("device,wfi\npi-1,x\n", "expected columns out of"),
        ("device\npi-1,x\n", "line 2: expected 1 values"),
        ("device\n", "no devices in it"),
        ("device,wifi\npi-1,home\n", "line 2: wifi and country"),
        ("device,wifi,country\npi-1,home,de\n", "line 2: country 'de'"),
        ("device,wifi,country,wifi_password\npi-1,home,DE,short\n", "line 2: wifi_password"),
        ("device\n\n\npi/1\n", "line 4: device name"),
    ],
)
def test_a_line_that_cannot_be_is_named(line, message, tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text(line)
    with pytest.raises(ImageError, match=message):
        read_devices(path, {})


def test_a_network_of_a_line_never_gets_anothers_password(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("device,wifi\npi-1,open\npi-2,\n")
    barn = {"wifi": "barn", "wifi_password": "barnsecret", "country": "DE"}
    first, second = read_devices(path, barn)
    assert (first.wifi, first.wifi_password) == ("open", "")
    assert (second.wifi, second.wifi_password) == ("barn", "barnsecret")


def test_a_long_name_is_a_host_name_still():
    assert Identity("a" * 62 + "-x").hostname == "a" * 62
