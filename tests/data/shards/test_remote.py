"""Remote shards: fetched once, whole, within the limit, whoever is killed and whatever the server does."""

import base64
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from disttempnet.cli.main import main
from disttempnet.config import SourceConfig
from disttempnet.data import (
    EpochPlan,
    PairDataset,
    PlanSampler,
    embedded_shards,
    make_loader,
    open_index,
    open_source,
    train_transform,
)
from disttempnet.data.shards import remote
from disttempnet.data.shards.credentials import Credentials, detached
from disttempnet.data.shards.names import resolve_shards
from disttempnet.data.shards.remote import RemoteStore
from disttempnet.data.shards.store import ShardState, shard_state
from disttempnet.data.tools.verify import verify
from disttempnet.errors import UserError
from tests.data.serving import Server, serving
from tests.full_disk import small_files

SIZE = 300_000  # bytes of a shard here: more than the two ends that a fingerprint reads
NAMES = [f"{n:05d}.tar" for n in range(5)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Five files of noise."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(np.random.default_rng(number).bytes(SIZE))
    with serving(folder) as server:
        yield server


@pytest.fixture
def store(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    return RemoteStore(server.url, str(tmp_path / "cache"), limit_gb=1.0)


def content(store: RemoteStore, name: str, expected: ShardState | None = None) -> bytes:
    descriptor = store.open(name, expected)
    try:
        return os.pread(descriptor, 10 * SIZE, 0)
    finally:
        os.close(descriptor)


def cached(store: RemoteStore) -> list[str]:
    return sorted(path.name for path in store.folder.rglob("*.tar"))


def begun(store: RemoteStore) -> list[Path]:
    return list(store.root.rglob("*.part"))


def test_a_shard_is_fetched_once(server: Server, store: RemoteStore) -> None:
    known = {name: shard_state(server.folder / name) for name in NAMES}
    assert store.states(NAMES) == known
    assert server.wholes == [], "a fingerprint reads two ends"
    for _ in range(2):
        for name in NAMES[:2]:
            assert content(store, name, known[name]) == (server.folder / name).read_bytes()
    again = pickle.loads(pickle.dumps(store))
    assert content(again, NAMES[0], known[NAMES[0]]) == (server.folder / NAMES[0]).read_bytes()
    assert server.wholes == NAMES[:2]
    assert not begun(store)


def test_a_server_without_ranges(server: Server, store: RemoteStore) -> None:
    server.ranges = False
    assert store.state(NAMES[0]) == shard_state(server.folder / NAMES[0])
    (server.folder / NAMES[0]).write_bytes(b"another version")
    assert store.state(NAMES[0]) == shard_state(server.folder / NAMES[0])


def test_a_compressed_body_is_neither_asked_for_nor_unpacked(server: Server, store: RemoteStore) -> None:
    """2.9 MB would grow to 2.9 GB, past every limit."""
    content(store, NAMES[0])
    assert server.accepted == {"identity"}
    (server.folder / NAMES[1]).write_bytes(bytes(50 * SIZE))
    server.gzip, server.ranges = True, False
    for open_it in (store.open, store.state):
        with pytest.raises(UserError, match=r"1\.tar: is compressed \(gzip\), .* serve the \.tar uncompressed"):
            open_it(NAMES[1])
    assert cached(store) == NAMES[:1]
    assert not begun(store)


def test_a_body_of_no_stated_size_ends_at_the_limit(server: Server, store: RemoteStore) -> None:
    server.stated = server.ranges = False
    assert content(store, NAMES[0]) == (server.folder / NAMES[0]).read_bytes()
    store.limit = 8 * 10**6
    (server.folder / NAMES[1]).write_bytes(bytes(40 * 10**6))
    with pytest.raises(UserError, match=r"1\.tar: over 8,000,000 bytes arrived, .*cache_gb allows"):
        store.open(NAMES[1])
    with pytest.raises(UserError, match=r"2\.tar: over 100 bytes arrived, more than stated"):
        store.open(NAMES[2], ShardState(100, "of another"))
    assert cached(store) == NAMES[:1]
    assert not begun(store)


def test_a_body_without_ranges_is_not_read_into_memory(server: Server, store: RemoteStore) -> None:
    """Its beginning was read whole for the fingerprint, however long it was."""
    server.ranges, server.surplus = False, 64 * 10**6
    with pytest.raises(UserError, match=r"0\.tar: over 300,000 bytes arrived, more than stated"):
        store.state(NAMES[0])
    assert server.sent < 40 * 10**6  # two bodies were begun; what is in flight was sent, too
    assert cached(store) == []


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_file_systems(server: Server, tmp_path: Path, protocol: str) -> None:
    base = f"file://{server.folder}"
    if protocol == "memory":
        base = "memory://bucket/folder"
        for name in NAMES:
            fsspec.filesystem("memory").pipe_file(f"/bucket/folder/{name}", (server.folder / name).read_bytes())
    store = RemoteStore(base, str(tmp_path / "cache"))
    assert store.names() == NAMES
    for name in NAMES:
        state = store.state(name)
        assert state == shard_state(server.folder / name)
        assert content(store, name, state) == (server.folder / name).read_bytes()
    with pytest.raises(UserError, match=r"9\.tar: no such shard"):
        store.open("9.tar")


def test_the_limit_holds_and_the_oldest_go(server: Server, store: RemoteStore) -> None:
    store.limit = int(3.5 * SIZE)
    for name in NAMES[:3]:
        content(store, name)
    content(store, NAMES[0])  # used again: now the second is the oldest
    content(store, NAMES[3])
    assert cached(store) == [NAMES[0], NAMES[2], NAMES[3]]
    held = store.open(NAMES[2])
    content(store, NAMES[4])
    content(store, NAMES[1])
    assert cached(store) == [NAMES[1], NAMES[2], NAMES[4]]
    content(store, NAMES[3])
    content(store, NAMES[0])
    assert NAMES[2] in cached(store), "a shard that is open stays"
    os.close(held)
    content(store, NAMES[1])
    assert NAMES[2] not in cached(store)


def test_several_urls_share_the_limit(server: Server, store: RemoteStore, tmp_path: Path) -> None:
    other = RemoteStore(f"file://{server.folder}", str(tmp_path / "cache"))
    assert other.root == store.root
    assert other.folder != store.folder
    content(other, NAMES[0])
    store.limit = int(1.5 * SIZE)
    content(store, NAMES[0])
    assert (cached(other), cached(store)) == ([], NAMES[:1])


def test_more_open_than_the_limit_goes_on_with_a_warning(server: Server, store: RemoteStore) -> None:
    store.limit = int(1.5 * SIZE)
    first = store.open(NAMES[0])
    with pytest.warns(UserWarning, match=r"more than the limit .* raise cache_gb"):
        second = store.open(NAMES[1])
    assert [os.pread(d, SIZE, 0) for d in (first, second)] == [(server.folder / n).read_bytes() for n in NAMES[:2]]
    os.close(first)
    os.close(second)


def test_a_shard_that_changed_is_named(server: Server, store: RemoteStore) -> None:
    name, path = NAMES[0], server.folder / NAMES[0]
    known = shard_state(path)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=rf"{server.url}/00000\.tar: this shard has changed .*its content differs"):
        store.open(name, known)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match=r"00000\.tar: this shard has changed .*it has 5 bytes, not 300,000"):
        store.open(name, known)
    assert cached(store) == []
    assert not begun(store)


def test_a_cached_shard_of_an_older_version_is_fetched_again(server: Server, store: RemoteStore) -> None:
    name, path = NAMES[0], server.folder / NAMES[0]
    content(store, name)
    path.write_bytes(path.read_bytes()[::-1])
    assert content(store, name, store.state(name)) == path.read_bytes()
    assert server.wholes == [name, name]
    (store.folder / name).write_bytes(b"damaged")
    assert content(store, name, store.state(name)) == path.read_bytes()


def test_passing_faults_are_tried_again(server: Server, store: RemoteStore) -> None:
    server.failures, server.cut = 2, 2
    expected = shard_state(server.folder / NAMES[0])
    assert content(store, NAMES[0], expected) == (server.folder / NAMES[0]).read_bytes()
    assert server.wholes == NAMES[:1] * 3
    assert not begun(store)


def test_lasting_faults_name_the_url(server: Server, store: RemoteStore) -> None:
    server.cut = 99
    with pytest.raises(UserError, match=rf"{server.url}/00000\.tar: the download failed 5 times: "):
        store.open(NAMES[0])
    assert len(server.wholes) == 5
    with pytest.raises(UserError, match=rf"{server.url}/nowhere\.tar: no such shard"):
        store.open("nowhere.tar")
    assert cached(store) == []
    assert not begun(store)


def test_unknown_protocols(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gopher://host/x: cannot be opened: .*gopher"):
        RemoteStore("gopher://host/x", str(tmp_path)).open("0.tar")


def test_a_full_disk_is_one_line(server: Server, store: RemoteStore) -> None:
    reason = r"00000\.tar: cannot be written: File too large; make room, set"
    with small_files(SIZE // 2), pytest.raises(UserError, match=reason):
        store.open(NAMES[0])
    assert server.wholes == NAMES[:1], "not a fault of the server: no further attempt"
    assert not begun(store)
    assert len(content(store, NAMES[0])) == SIZE


def _read(store: RemoteStore, names: list[str], sizes: "multiprocessing.Queue[int]") -> None:
    for name in names:
        sizes.put(len(content(store, name)))


def start(store: RemoteStore, names: list[str]) -> tuple[multiprocessing.Process, "multiprocessing.Queue[int]"]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([remote.__name__])
    sizes = context.Queue()
    process = context.Process(target=_read, args=(store, names, sizes))
    process.start()
    return process, sizes


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


def test_two_processes_fetch_a_shard_once(server: Server, store: RemoteStore) -> None:
    server.pause = 0.02
    processes = [start(store, NAMES) for _ in range(2)]
    for process, sizes in processes:
        assert [sizes.get(timeout=300) for _ in NAMES] == [SIZE] * len(NAMES)
        process.join()
        assert process.exitcode == 0
    assert sorted(server.wholes) == NAMES


def test_a_killed_download_leaves_nothing_half(server: Server, store: RemoteStore) -> None:
    server.pause = 0.2
    killed, sizes = start(store, NAMES[:1])
    wait_for(lambda: any(part.stat().st_size for part in begun(store)))
    os.kill(killed.pid or 0, signal.SIGKILL)
    killed.join()
    server.pause = 0.0
    assert len(begun(store)) == 1
    assert cached(store) == []
    store.limit = int(1.5 * SIZE)
    content(store, NAMES[1])  # no room is kept for what a killed process began
    assert not begun(store)
    assert content(store, NAMES[0]) == (server.folder / NAMES[0]).read_bytes()
    sizes.close()


def test_a_killed_reader_holds_nothing(server: Server, store: RemoteStore) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_hold, args=(store, NAMES[0]))
    process.start()
    wait_for(lambda: cached(store) == NAMES[:1])
    time.sleep(0.2)
    store.limit = int(1.5 * SIZE)
    with pytest.warns(UserWarning, match="more than the limit"):
        content(store, NAMES[1])
    assert cached(store) == NAMES[:2]
    process.kill()
    process.join()
    content(store, NAMES[2])
    assert cached(store) == NAMES[2:3]


def _hold(store: RemoteStore, name: str) -> None:
    store.open(name)
    time.sleep(60)


# how many shards two workers hold open at a time is a matter of who is quicker
@pytest.mark.filterwarnings("ignore:.*open shards take")
def test_training_data_from_a_server(tmp_path: Path) -> None:
    """Indexed through the cache, read by loader workers with less room than the data take, verified."""
    local = embedded_shards("emoji/train")
    names = sorted(path.name for path in local.glob("*.tar"))
    taken = sum((local / name).stat().st_size for name in names)
    pattern = f"{{{names[0][:5]}..{names[-1][:5]}}}.tar"
    expected = open_index("embedded:emoji/train", progress=False)
    with serving(local) as server:
        spec, limit = f"{server.url}/{pattern}", taken / 1.2e9
        source = SourceConfig(path=spec, cache=str(tmp_path), cache_gb=limit)
        index = open_index(spec, "", False, "", str(tmp_path), limit)
        assert index.digest == expected.digest
        assert sorted(server.wholes) == names
        assert index.path.is_relative_to(tmp_path)
        kept = sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
        assert kept <= limit * 1e9 < taken
        assert "http://127.0.0.1" in index.where
        for sample in (0, 17, len(index) - 1):
            assert index.image_bytes(sample) == expected.image_bytes(sample)
        index.close()
        dataset = PairDataset(index, train_transform("open_clip", 32), seed=0)
        plan = EpochPlan(index, 64, lanes=4, seed=0)
        loader = make_loader(dataset, PlanSampler(plan), tokens, workers=2)
        ids = np.concatenate([batch.ids.numpy() for batch in islice(loader, 10)])
        assert ids.tolist() == np.concatenate([plan.local_batch(0, step, 0, 1) for step in range(10)]).tolist()
        del loader
        index.close()
        assert verify(source, workers=1, count=50, progress=False).faults == []
        changed = local / names[0]
        original = changed.read_bytes()
        try:
            changed.write_bytes(original[::-1])
            with pytest.raises(UserError, match=rf"{server.url}/{names[0]}: this shard has other content"):
                open_source([source], progress=False)
        finally:
            changed.write_bytes(original)


def tokens(captions: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 4, dtype=torch.int64)


# ---- credentials ----


def test_credentials_are_taken_off_a_url_and_put_back() -> None:
    plain, credentials = detached("https://user:${PW}@host/a/{0..9}.tar?sig=${SIG}&v=1")
    assert plain == "https://host/a/{0..9}.tar"
    assert credentials == Credentials("user:${PW}", "sig=${SIG}&v=1")
    for url in ("s3://bucket/x@y.tar", "hf://datasets/a/b@main/x.tar", "https://host/@x.tar", "s3://b/{0..9}.tar?x"):
        assert detached(url) == (url, Credentials())
    assert detached("sftp://me:pw@host/x.tar") == ("sftp://host/x.tar", Credentials("me:pw"))


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS_PW", "hunter2")
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert Credentials("u:${SHARDS_PW}", "sig=${SHARDS_PW}").applied("https://h/0.tar") == (
        "https://u:hunter2@h/0.tar?sig=hunter2"
    )
    with pytest.raises(UserError, match=r"u:\$\{NOT_THERE\}@h/0.tar: the environment has no variable NOT_THERE"):
        Credentials("u:${NOT_THERE}").applied("https://h/0.tar")
    for kept in (Credentials("***"), Credentials("", "v=1&sig=***")):  # as a run's config.toml has them
        with pytest.raises(UserError, match=r"h/0.tar: its credentials are not stored in a run's files: give"):
            kept.applied("https://h/0.tar")


@pytest.mark.parametrize(
    "url",
    ["s3://AKIA:ab/cd+ef@bucket/{0..9}.tar", "s3://AKIA:a b@bucket/x.tar", 's3://AKIA:a"b/c@bucket/x.tar'],
)
def test_passwords_that_end_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match=r"^s3://\*\*\*@bucket/.*\.tar: .* is written with %2F for /") as refused:
        resolve_shards(url)
    assert "AKIA" not in str(refused.value)


def test_ports_and_paths_are_no_passwords() -> None:
    for url in ("http://127.0.0.1:8080/a@b.tar", "http://[::1]:8080/a@b.tar", "s3://bucket/a:b@c.tar"):
        assert detached(url) == (url, Credentials())
    assert detached("https://u:p%2Fq@h/a@b.tar") == ("https://h/a@b.tar", Credentials("u:p%2Fq"))


@pytest.mark.parametrize("path", ["${TOK}/{0..1}.tar", "a/${TOK}.tar", "${TOK}"])
def test_the_environment_is_not_asked_for_paths(path: str) -> None:
    with pytest.raises(UserError, match=r"^http://host/.*: \$\{TOK\} is replaced in the credentials of a URL only"):
        resolve_shards(f"http://host/{path}")


def test_passwords_of_the_environment_are_quoted_and_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS_PW", "ab/cd+e f")
    credentials = Credentials("u:${SHARDS_PW}", "code=${SHARDS_PW}&v=1")
    assert credentials.applied("https://h/0.tar") == "https://u:ab%2Fcd+e%20f@h/0.tar?code=ab/cd+e f&v=1"
    for form in ("ab/cd+e f", "ab%2Fcd+e%20f", "ab%2Fcd%2Be%20f", "ab/cd%2Be%20f"):
        assert credentials.hidden(f"v1: {form} is wrong") == "v1: *** is wrong"


def test_faults_of_a_server_do_not_show_the_url_that_was_opened(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of fsspec and aiohttp quote it."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("TOK", "topsecret")
    server.query, server.failures = "x=topsecret", 1000
    store = resolve_shards(f"{server.url}/{{00000..00001}}.tar?x=${{TOK}}", str(tmp_path / "cache")).store
    for look in (store.state, store.open):
        with pytest.raises(UserError, match=r"00000\.tar: the download failed 5 times: 503") as caught:
            look(NAMES[0])
        assert "topsecret" not in str(caught.value)


def test_a_server_that_wants_credentials_and_nobody_else_sees_them(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By user and password, and by a parameter: in no name, no message and no file of the cache."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("SHARDS_PW", "hunter2")
    server.authorization = "Basic " + base64.b64encode(b"user:hunter2").decode()
    server.query = "sig=hunter2"
    address = server.url.replace("://", "://user:${SHARDS_PW}@") + "/{00000..00004}.tar?sig=${SHARDS_PW}"
    shards = resolve_shards(address, str(tmp_path / "cache"))
    assert shards.names == tuple(NAMES)
    assert shards.folder == resolve_shards(f"{server.url}/{NAMES[0]}", str(tmp_path / "cache")).folder
    store = pickle.loads(pickle.dumps(shards.store))
    assert content(store, NAMES[1]) == (server.folder / NAMES[1]).read_bytes()
    assert store.state(NAMES[2]) == shard_state(server.folder / NAMES[2])
    assert store.where(NAMES[1]) == f"{server.url}/{NAMES[1]}"
    with pytest.raises(UserError) as caught:
        store.open("99999.tar")
    assert str(caught.value) == f"{server.url}/99999.tar: no such shard"
    monkeypatch.setenv("SHARDS_PW", "wrong-one")
    with pytest.raises(UserError) as refused:
        store.open(NAMES[3])
    assert "wrong-one" not in str(refused.value)
    assert server.url in str(refused.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if "hunter2" in str(path)]


def test_a_run_keeps_no_credentials_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written out: no file of the run has them, and the same command resumes. By ${NAME}: its own config does."""
    monkeypatch.setenv("SHARDS_PW", "hunter2")
    with serving(embedded_shards("emoji/train")) as server:
        server.authorization = "Basic " + base64.b64encode(b"user:hunter2").decode()
        for name, written in (("literal", "hunter2"), ("named", "${SHARDS_PW}")):
            where = server.url.replace("://", f"://user:{written}@") + "/00000.tar"
            cache = tmp_path / f"cache-{name}"
            source = f'data.train=[{{path = "{where}", cache = "{cache}"}}]'
            given = ["train", "debug", f"name={name}", f"out={tmp_path}", source, "eval.tasks=[]", "data.workers=0"]
            given += ["data.limit=0", "train.log_every=1"]
            monkeypatch.setattr(sys, "argv", ["disttempnet", *given])
            assert main([*given, "train.stop_after_steps=1"]) == 0, capsys.readouterr().err
            kept = [path for path in [*(tmp_path / name).rglob("*"), *cache.rglob("*")] if path.is_file()]
            assert not [path for path in kept if b"hunter2" in path.read_bytes()]
            assert main([*given, "--resume", "auto", "train.stop_after_steps=2"]) == 0, capsys.readouterr().err
            own = ["train", str(tmp_path / name / "config.toml"), "--resume", "auto", "train.stop_after_steps=3"]
            printed = capsys.readouterr()
            assert "hunter2" not in printed.err + printed.out
            assert main(own) == (2 if name == "literal" else 0)
            printed = capsys.readouterr()
            assert ("its credentials are not stored in a run's files" in printed.err) == (name == "literal"), (
                printed.err
            )
