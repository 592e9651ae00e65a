"""The npm package is taken from a registry, a .tgz or a folder, and only as it was published."""

from pathlib import Path

import pytest

from disttempnet.data.icons.package import read_json, unpack, vendors_of
from disttempnet.errors import UserError
from tests.data.icons.scenario import release, tarball_of
from tests.data.serving import serving

NAME = "json-2.2.535.tgz"


def files(folder: Path) -> dict[str, bytes]:
    """What the builder reads."""
    paths = [folder / "package.json", folder / "collections.json", *(folder / "json").iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def tarball(package: Path) -> bytes:
    return tarball_of(package)


def test_a_tarball_gives_the_folder(package: Path, tarball: bytes, tmp_path: Path) -> None:
    (tmp_path / "given.tgz").write_bytes(tarball)
    unpacked = unpack(tmp_path / "given.tgz", tmp_path, release(package, tarball))
    assert files(unpacked) == files(package)
    assert sorted(path.name for path in unpacked.iterdir()) == ["collections.json", "json", "package.json"]
    (tmp_path / "given.tgz").unlink()
    assert unpack(None, tmp_path, release(package, tarball)) == unpacked  # once is enough


@pytest.mark.parametrize("variable", ["npm_config_registry", "NPM_CONFIG_REGISTRY"])
def test_the_registry_of_the_environment_is_asked(
    variable: str, package: Path, tarball: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served" / "@iconify" / "json" / "-"
    served.mkdir(parents=True)
    (served / NAME).write_bytes(tarball)
    out = tmp_path / "out"
    out.mkdir()
    with serving(tmp_path / "served") as server:
        monkeypatch.setenv(variable, f"{server.url}/")
        assert files(unpack(None, out, release(package, tarball))) == files(package)
    assert [path.name for path in out.iterdir()] == ["package"]


def test_no_answer_is_one_line(package: Path, tarball: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:
        monkeypatch.setenv("npm_config_registry", server.url)
        with pytest.raises(UserError, match=r"json-2\.2\.535\.tgz: cannot be downloaded: Not Found; set npm_config"):
            unpack(None, tmp_path, release(package, tarball))
    with pytest.raises(UserError, match=r"cannot be downloaded: .*refused.*npm pack @iconify/json@2\.2\.535"):
        unpack(None, tmp_path, release(package, tarball))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_is_not_kept(
    package: Path, tarball: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served" / "@iconify" / "json" / "-"
    served.mkdir(parents=True)
    (served / NAME).write_bytes(tarball[:-9])
    out = tmp_path / "out"
    out.mkdir()
    with serving(tmp_path / "served") as server:
        monkeypatch.setenv("npm_config_registry", server.url)
        with pytest.raises(UserError, match="damaged"):
            unpack(None, out, release(package, tarball))
        assert list(out.iterdir()) == []
        (served / NAME).write_bytes(tarball)
        assert files(unpack(None, out, release(package, tarball))) == files(package)


def test_a_damaged_tarball_is_refused(package: Path, tarball: bytes, tmp_path: Path) -> None:
    right = release(package, tarball)
    given = tmp_path / "given.tgz"
    given.write_bytes(tarball[:-1] + bytes([tarball[-1] ^ 1]))
    with pytest.raises(UserError, match=r"given\.tgz: its sha512 is .*…, that of @iconify/json@2\.2\.535 is .*damaged"):
        unpack(given, tmp_path, right)
    given.write_bytes(tarball[:1000])
    with pytest.raises(UserError, match="its sha512 is"):
        unpack(given, tmp_path, right)
    with pytest.raises(UserError, match=r"given\.tgz: cannot be unpacked"):
        unpack(given, tmp_path, release(package, tarball[:1000]))
    given.unlink()
    with pytest.raises(UserError, match=r"given\.tgz: cannot be read: No such file"):
        unpack(given, tmp_path, right)


def test_another_version_is_refused(package: Path, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"version": "2.2.999"}')
    with pytest.raises(UserError, match=r"is version 2\.2\.999 of the icons, and the data set is made from 2\.2\.535"):
        unpack(tmp_path, tmp_path, release(package))
    (tmp_path / "package.json").write_text("{")
    with pytest.raises(UserError, match=r"package\.json: is damaged: .*; unpack the npm package anew"):
        unpack(tmp_path, tmp_path, release(package))
    (tmp_path / "package.json").unlink()
    with pytest.raises(UserError, match="is this the folder of the npm package"):
        unpack(tmp_path, tmp_path, release(package))


def test_vendors_come_in_the_order_of_their_files(package: Path, tmp_path: Path) -> None:
    vendors = vendors_of(package)
    assert [vendor.name for vendor in vendors] == sorted(
        (path.stem for path in (package / "json").iterdir() if path.stem not in ("closed", "twemoji")),
        key=lambda name: f"{name}.json",
    )
    charm = next(vendor for vendor in vendors if vendor.name == "charm")
    assert charm[1:] == ("Charm Icons", "Jay Newey", "MIT", 13)
    assert len(read_json(package / "json" / "charm.json")["icons"]) == 13
    (tmp_path / "collections.json").write_text("{}")
    with pytest.raises(UserError, match="holds no icons"):
        vendors_of(tmp_path)
