"""The npm package of icons: downloaded and checked against its digest, or given as a .tgz or a folder.

A package holds collections.json (each vendor's title, author and licence) and json/VENDOR.json (the drawings).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from disttempnet.data.icons.release import Release
from disttempnet.errors import UserError
from disttempnet.io.files import WRITING, atomic
from disttempnet.io.progress import Meter

REGISTRY = "https://registry.npmjs.org"
REGISTRY_VARIABLES = ("npm_config_registry", "NPM_CONFIG_REGISTRY")
TIMEOUT = 60  # seconds without an answer
DOWNLOAD_BYTES = 1 << 20  # bytes
WANTED = re.compile(r"package/((?:json/[\w.-]+|collections|package)\.json)")
OPEN_LICENCES = {
    "MIT", "Apache-2.0", "CC-BY-4.0", "CC0-1.0", "ISC", "CC-BY-3.0", "Unlicense", "MPL-2.0", "BSD-3-Clause",
}  # fmt: skip
# Emoji are a data set of their own, which would be trained on twice.
EMOJI = {
    "emojione", "emojione-monotone", "emojione-v1", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast",
    "fxemoji", "meteocons", "noto", "noto-v1", "openmoji", "streamline-emojis", "twemoji",
}  # fmt: skip


class Vendor(NamedTuple):
    """One set of icons in the package.

    Attributes:
        name: its prefix, which names its file.
        title, author, licence: as the package states them; the licence as SPDX.
        icons: how many there are, about.
    """

    name: str
    title: str
    author: str
    licence: str
    icons: int

    def __str__(self) -> str:
        return self.name


def unpack(given: Path | None, folder: Path, release: Release) -> Path:
    """Return a folder with the package's files: the given one, or FOLDER/package, made where it is not there yet.

    Args:
        given: a folder or a .tgz; None = download.
        folder: where to download and unpack to.

    Raises:
        UserError: another version, a damaged tarball, or no answer from the registry.
    """
    if given is not None and given.is_dir():
        _refuse_other_version(given, release)
        return given
    unpacked = folder / "package"
    if unpacked.is_dir():
        return unpacked
    tarball = given or download(folder, release)
    try:
        _refuse_damaged(tarball, release)
    except UserError:
        if given is None:
            tarball.unlink(missing_ok=True)  # the same command downloads it again
        raise
    temporary = folder / f"{WRITING}package"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "json").mkdir(parents=True)
    try:
        with tarfile.open(tarball, "r|gz") as archive:
            for member in archive:
                if (wanted := WANTED.fullmatch(member.name)) and (content := archive.extractfile(member)):
                    with content, (temporary / wanted[1]).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{tarball}: cannot be unpacked: {error}") from None
    _refuse_other_version(temporary, release)
    os.replace(temporary, unpacked)
    if given is None:
        tarball.unlink()
    return unpacked


def download(folder: Path, release: Release) -> Path:
    """Download the tarball into a folder, unless it lies there already; its digest is not looked at here.

    Raises:
        UserError: the registry gives none.
    """
    name = f"{release.package.rpartition('/')[2]}-{release.version}.tgz"
    registry = next(filter(None, map(os.environ.get, REGISTRY_VARIABLES)), REGISTRY).rstrip("/")
    url, path = f"{registry}/{release.package}/-/{name}", folder / name
    if path.is_file():
        return path
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
            Meter(f"downloading {release.name}", int(answer.headers.get("Content-Length") or 0), sizes=True) as meter,
            atomic(path) as temporary,
            temporary.open("wb") as file,
        ):
            while piece := answer.read(DOWNLOAD_BYTES):
                file.write(piece)
                meter.advance(len(piece))
            if meter.done < meter.total:
                raise OSError(f"the answer ended after {meter.done:,} of {meter.total:,} bytes")
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors are of the first two kinds
        raise UserError(
            f"{url}: cannot be downloaded: {getattr(error, 'reason', None) or error}; set {REGISTRY_VARIABLES[0]} to "
            f"your npm registry, or get the file by `npm pack {release.name}` and give it with --package"
        ) from None
    return path


def _refuse_damaged(tarball: Path, release: Release) -> None:
    """Raise UserError where a tarball is not that of the release."""
    kind, _, expected = release.integrity.partition("-")
    try:
        with tarball.open("rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, kind).digest()).decode()
    except OSError as error:
        raise UserError(f"{tarball}: cannot be read: {error.strerror}") from None
    if found != expected:
        raise UserError(
            f"{tarball}: its {kind} is {found[:12]}…, that of {release.name} is {expected[:12]}…: it is damaged or "
            f"another version; delete it, and get it anew (npm pack {release.name})"
        )


def _refuse_other_version(folder: Path, release: Release) -> None:
    version = read_json(folder / "package.json").get("version")
    if version != release.version:
        raise UserError(
            f"{folder}: is version {version} of the icons, and the data set is made from {release.version}: "
            f"npm pack {release.name}"
        )


def vendors_of(package: Path) -> list[Vendor]:
    """The vendors with an open licence that are no emoji, in the order of their files. Raises UserError."""
    collections = read_json(package / "collections.json")
    found = []
    for path in sorted((package / "json").glob("*.json")):
        info = collections.get(path.stem, {})
        licence, category = info.get("license", {}).get("spdx"), info.get("category") or ""
        if licence in OPEN_LICENCES and path.stem not in EMOJI and "Emoji" not in category and "Flags" not in category:
            author = info.get("author", {}).get("name", "")
            found.append(Vendor(path.stem, info.get("name", path.stem), author, licence, info.get("total", 0)))
    if not found:
        raise UserError(f"{package}: holds no icons (json/VENDOR.json, described in collections.json)")
    return found


def read_json(path: Path) -> Mapping[str, Any]:
    """The object of a file of the package. Raises UserError: there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; is this the folder of the npm package?") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}; unpack the npm package anew") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no object; unpack the npm package anew")
    return value
