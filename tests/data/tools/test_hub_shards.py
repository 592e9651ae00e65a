"""`data download --from hub` against a stand-in of the hub: every byte, after faults and stops, and nothing twice."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from disttempnet.cli.main import main
from disttempnet.config.schema import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.tools import hub_shards
from disttempnet.data.tools.hub_shards import list_hub_shards, missing_shards
from tests.data.pictures import encoded, gradient
from tests.hub import Hub, serving_hub

REPOSITORY = "pixparse/cc3m-wds"


def shard(number: int) -> bytes:
    """A tar of two samples and noise, large enough to be cut in the middle."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key in range(2):
            noise = np.random.default_rng(number).bytes(30_000)
            parts = {"jpg": encoded(gradient(40 + number + key), "JPEG"), "txt": b"a caption", "bin": noise}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{number:04d}{key:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_shards, "HUB_PAUSE", 0.001)
    with serving_hub(monkeypatch) as hub:
        files = {f"cc3m-train-{number:04d}.tar": shard(number) for number in range(3)}
        hub.files[REPOSITORY] = {"README.md": b"x", "cc3m-validation-0000.tar": shard(9), **files}
        yield hub


def wanted(hub: Hub) -> dict[str, bytes]:
    return {name: content for name, content in hub.files[REPOSITORY].items() if "-train-" in name}


def download(*more: str) -> int:
    return main(["data", "download", "cc3m", "--from", "hub", "--out", "out", "--processes", "1", *more])


def found() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").glob("*.tar")}


def test_every_shard_of_the_train_split(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert download("--dry-run") == 0
    plan = capsys.readouterr().out
    assert "3 shards" in plan
    for name, content in wanted(hub).items():
        assert f"  {name}  {len(content):>15,} bytes\n" in plan
    whole = sum(map(len, wanted(hub).values()))
    assert f"would download {whole:,} bytes (0.0 GB), and compare 0 bytes that are there" in plan
    assert "too little" not in plan
    assert not Path("out").exists()
    assert download() == 0
    shown = capsys.readouterr().out
    assert f"train on it: data.train={Path('out').resolve()}" in shown
    assert found() == wanted(hub)
    assert len(open_source((SourceConfig(path="out"),))) == 6, "training reads the folder"

    # a second command asks for no shard again; a shard that has changed is fetched anew
    before = hub.sent
    assert download() == 0
    assert "3 of them are in" in capsys.readouterr().out
    assert hub.sent == before
    first = Path("out", "cc3m-train-0000.tar")
    first.write_bytes(bytes(len(first.read_bytes())))
    assert download() == 0
    assert found() == wanted(hub)
    assert hub.sent - before == first.stat().st_size


def test_faults_and_a_connection_that_breaks_off(hub: Hub) -> None:
    hub.failures, hub.cut = 2, 1
    assert download() == 0
    assert found() == wanted(hub)
    assert hub.sent < 1.6 * sum(map(len, wanted(hub).values())), "a part that is there is not fetched again"


def test_content_that_is_not_the_hubs(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API says one sha256 and the files have another: never kept."""
    listed = list_hub_shards("cc3m")
    shards = tuple(one._replace(sha256="f" * 64) for one in listed.shards)
    other = hub_shards.HubShards(REPOSITORY, listed.revision, shards)
    monkeypatch.setattr(hub_shards, "list_hub_shards", lambda name: other)
    assert download() == 2
    error = capsys.readouterr().err
    assert "cc3m-train-0000.tar: its content is not the hub's after 4 attempts" in error
    assert found() == {}


def test_shards_that_lie_there_already_are_compared_and_kept(hub: Hub) -> None:
    Path("out").mkdir()
    for name, content in wanted(hub).items():
        Path("out", name).write_bytes(content)
    assert len(missing_shards(list_hub_shards("cc3m"), Path("out"))) == 3
    assert download() == 0
    assert hub.sent == 0
    assert missing_shards(list_hub_shards("cc3m"), Path("out")) == []


def test_the_plan_tells_shards_to_compare_from_those_to_download(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard is there unchecked, one is cut off. Free space is needed for the download, not a byte more."""
    Path("out").mkdir()
    (first, content), (second, whole), (_, third) = wanted(hub).items()
    Path("out", first).write_bytes(content)
    Path("out", second).write_bytes(whole[:100])
    need = len(whole) + len(third)
    for free, word in ((need, ""), (need - 1, ": too little free space")):
        monkeypatch.setattr(hub_shards.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        assert download("--dry-run") == 0
        plan = capsys.readouterr().out
        assert f"  {first}  {len(content):>15,} bytes, there: to compare\n  {second}  {len(whole):>15,} bytes\n" in plan
        assert f"would download {need:,} bytes (0.0 GB), and compare {len(content):,} bytes that are there" in plan
        assert plan.endswith(f"; {free:,} bytes (0.0 GB) are free for out{word}\n")
    assert download() == 2
    assert "are missing, and 0.0 GB are free" in capsys.readouterr().err
    assert hub.sent == 0
    monkeypatch.setattr(hub_shards.shutil, "disk_usage", lambda _: type("Usage", (), {"free": need}))
    assert download() == 0
    assert (found(), hub.sent) == (wanted(hub), need)


def test_messages(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert download("--tsv", "x.tsv") == 2
    assert "--tsv goes with --from links" in capsys.readouterr().err
    assert main(["data", "download", "cc12m", "--from", "hub", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("disttempnet: pixparse/cc12m-wds: ")
    assert error.count("\n") == 1
    monkeypatch.setattr(hub_shards.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert download() == 2
    error = capsys.readouterr().err
    assert "are missing, and 0.0 GB are free: free some space, or name a folder on a larger disk with --out" in error
    assert hub.sent == 0
    del hub.files[REPOSITORY]["cc3m-train-0000.tar"], hub.files[REPOSITORY]["cc3m-train-0001.tar"]
    del hub.files[REPOSITORY]["cc3m-train-0002.tar"]
    assert download() == 2
    assert "holds no cc3m-train-*.tar" in capsys.readouterr().err


@pytest.mark.slow
def test_worker_processes_and_the_endpoint_of_the_environment(hub: Hub) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "disttempnet", "data", "download", "cc3m", "--from", "hub", "--out", "out"]
    subprocess.run([*command, "--processes", "2"], env=environment, check=True, timeout=600)
    assert found() == wanted(hub)
