"""Files of weights as people have them: what loads equals the original, what does not is named in one line."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.models import Towers, load_model
from disttempnet.models.weights import misfit, read_weights, without_prefix

NAME = "demo-vit-32"


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(3)
    return load_model(NAME)


@pytest.fixture(scope="module")
def state(towers: Towers) -> dict[str, Tensor]:
    return dict(towers.module.state_dict())


def assert_loads(path: Path, state: dict[str, Tensor], name: str = NAME) -> Towers:
    loaded = load_model(name, str(path))
    found = loaded.module.state_dict()
    for key, value in state.items():
        assert torch.equal(found[key], value), key
    return loaded


def assert_reads(path: Path, state: dict[str, Tensor]) -> None:
    """The same without building towers."""
    found = without_prefix(path, read_weights(path), state)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def refused(path: Path, name: str = NAME) -> str:
    with pytest.raises(UserError) as raised:
        load_model(name, str(path))
    message = str(raised.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert str(path) in message
    return message


RECORDS: dict[str, Callable[[], Any]] = {
    "arguments": lambda: argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("runs")),
    "numpy": lambda: {"best": np.float64(0.3), "epoch": np.int64(3), "curve": np.arange(4.0), "name": np.str_("a")},
    "default dict": lambda: collections.defaultdict(int, seen=3),
    "counts and dates": lambda: [collections.Counter("aab"), datetime.timedelta(1), collections.OrderedDict(a=1)],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("records", RECORDS)
def test_records_beside_the_weights(records: str, zipped: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"state_dict": state, "beside": RECORDS[records](), "epoch": 3}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert_reads(tmp_path / "w.pt", state)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "clip.", "module.module.", "a.b.c."],
)
def test_prefixes_of_wrappers(prefix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pt")
    assert_reads(tmp_path / "w.pt", state)


def test_what_a_module_around_the_model_has_of_its_own(state: dict[str, Tensor], tmp_path: Path) -> None:
    beside = {"loss.tau": torch.ones(3), "epoch": torch.tensor(3)}
    torch.save({f"module.towers.{key}": value for key, value in state.items()} | beside, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", state)


def test_wrappers_inside_of_names(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Layers that were compiled, checkpointed or sharded one by one."""
    wrapped = {
        key.replace("resblocks.0.", "resblocks.0._orig_mod._checkpoint_wrapped_module."): value
        for key, value in state.items()
    }
    assert wrapped.keys() != state.keys()
    torch.save(wrapped, tmp_path / "w.pt")
    assert_loads(tmp_path / "w.pt", state)


@pytest.mark.parametrize(
    "layout",
    [
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"model_state_dict": s, "epoch": 3, "loss": torch.tensor(1.0)},
        lambda s: {"module": s, "ds_version": "0.14"},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"teacher": s, "epoch": 3},  # the only one, whatever its name
        lambda s: {
            "state_dict": {f"model.{key}": value for key, value in s.items()},
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 1e-3},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
        },
    ],
    ids=["model", "model_state_dict", "deepspeed", "nested", "only one", "lightning"],
)
def test_layouts_of_trainers(layout: Callable[[dict], dict], state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(layout(state), tmp_path / "w.ckpt")
    assert_reads(tmp_path / "w.ckpt", state)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_that_the_architecture_lacks(shape: tuple[int, ...], state: dict[str, Tensor], tmp_path: Path) -> None:
    """open_clip's --siglip."""
    torch.save({"state_dict": state | {"logit_bias": torch.full(shape, -9.5)}}, tmp_path / "w.pt")
    loaded = assert_loads(tmp_path / "w.pt", state)
    assert loaded.module.logit_bias.item() == -9.5
    assert loaded.architecture["init_logit_bias"] == -9.5


def test_what_a_file_is_counts_not_its_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.bin")
    assert_loads(tmp_path / "w.bin", state)
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "w.safetensors")
    assert_loads(tmp_path / "w.safetensors", {key: value.half().float() for key, value in state.items()})


def zipped(names: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"hello\n", "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 605000000\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b'{"weight_map": {}}', "JSON"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"\x80\x04K\x01.", "torch.save did not write it"),
        (pickle.dumps({"a": 1}, 2), "torch.save did not write it"),
        (zipped({"a.npy": b""}), "NumPy"),
        (zipped({"a.txt": b""}), "zip archive"),
        (bytes([200, 1, 3]) * 50, "neither safetensors nor"),
        ((1 << 20).to_bytes(8, "little") + b'{"visual', "cut off or damaged"),
        (b"\x1b[31m\x07 red", "neither safetensors nor"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_file_of_weights(content: bytes, what: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert what in refused(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_an_interrupted_copy(zipped: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pt").read_bytes()
    for length in (20, 600, len(content) // 2, len(content) - 1):
        (tmp_path / "w.pt").write_bytes(content[:length])
        assert "cut off or damaged" in refused(tmp_path / "w.pt"), length


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickle_protocols(zipped: bool, tmp_path: Path) -> None:
    """Two are read; of others the line says what is wrong with them."""
    path, weights = tmp_path / "w.pt", {"a": torch.ones(2)}
    for protocol in (2, 3, 4, 5, *((1,) if zipped else ())):  # of 1 and before torch 1.6 there is no file to be met
        torch.save(weights, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        if protocol in (2, 3):
            assert torch.equal(read_weights(path)["a"], weights["a"])
        else:
            told = f"is written with pickle protocol {protocol}; save it again with torch.save's default protocol"
            assert refused(path).endswith(told)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "no weights: an empty dict"),
        ([1], "a list, not a state dict"),
        (torch.ones(3), "one tensor, not a state dict"),
        ({"state_dict": None}, "no weights, only state_dict"),
        ({"epoch": 3, "args": {"lr": 1}}, "no weights, only epoch, args"),
        ({"ema": {"a": torch.ones(1)}, "online": {"a": torch.ones(1)}}, "several state dicts (ema, online)"),
    ],
)
def test_what_holds_no_state_dict(content: Any, what: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert what in refused(tmp_path / "w.pt")


def test_two_models_in_a_file_are_not_chosen_from(state: dict[str, Tensor], tmp_path: Path) -> None:
    both = {f"{which}.{key}": value for which in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "w.pt")
    assert "holds the model 2 times, below student., teacher." in refused(tmp_path / "w.pt")


def test_torchscript_is_not_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what OpenAI's files are
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pt")
    assert "TorchScript" in refused(tmp_path / "w.pt")
    assert "torch.jit.load" in refused(tmp_path / "w.pt")


def test_another_architecture_names_keys_of_both_sides(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt", "demo-convnext-32")
    assert "lacks visual.trunk.stem.0.weight, " in message
    assert "; has visual.class_embedding, " in message
    assert " and 52 more" in message
    torch.save({"encoder.\x1b[31mred": torch.ones(1)} | {f"layer.{i}": torch.ones(1) for i in range(9)}, tmp_path / "x")
    message = refused(tmp_path / "x")
    assert "has encoder.red, layer.0, layer.1 and 7 more" in message


def test_another_width_names_both_shapes(state: dict[str, Tensor]) -> None:
    wide = dict(state, **{"visual.proj": torch.zeros(128, 64), "logit_scale": torch.zeros(2)})
    assert misfit(wide, state) == (
        "other shapes: logit_scale of 2 (the model: one number), visual.proj of 128×64 (the model: 64×64)"
    )
    assert misfit(state, state) == ""
    assert misfit({**state, "visual.proj": state["visual.proj"].to(torch.int8)}, state) == (
        "quantised to integers: visual.proj"
    )
    with pytest.raises(UserError, match="no such file"):
        read_weights("nowhere.pt")


def test_keys_that_are_hardly_those_of_the_model_keep_their_names() -> None:
    found = without_prefix("f", {"a.weight": torch.ones(1), "a.x": torch.ones(1)}, ["weight", "bias", "scale"])
    assert list(found) == ["a.weight", "a.x"]


class Touches:
    """A harmless payload: unpickling it would make a file."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = str(path), how

    def __reduce__(self) -> tuple[Any, ...]:
        return {
            "system": (os.system, (f"touch {self.path}",)),
            "open": (open, (self.path, "w")),
            "exec": (exec, (f"open({self.path!r}, 'w')",)),
            "method": (pathlib.Path.touch, (pathlib.Path(self.path),)),
        }[self.how]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("how", ["system", "open", "exec", "method"])
def test_code_in_a_file_is_not_run(how: str, zipped: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    made, file = tmp_path / "made", tmp_path / "w.pt"
    for content in ({"state_dict": state, "beside": Touches(made, how)}, Touches(made, how)):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        message = refused(file)
        assert not made.exists()
        assert "Python objects, such as " in message
    with file.open("rb") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(opened, weights_only=False)
    assert made.exists(), "the payload works where nothing stops it"


def test_a_whole_model_is_named(towers: Towers, tmp_path: Path) -> None:
    torch.save(towers.module, tmp_path / "w.pt")
    assert "such as open_clip.model.CLIP, " in refused(tmp_path / "w.pt")
