"""The examples run, save and resume; on two processes they do what they do on one."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from disttempnet import Features, build_loss
from tests.examples.forks import EXAMPLES, Server, environment
from tests.losses.scenario import pairs

State = dict[str, Tensor]


def torch_file(name: str) -> Callable[[Path], State]:
    return lambda folder: torch.load(folder / name, weights_only=True)["loss"]


def of_accelerate(folder: Path) -> State:
    return torch.load(folder / "accelerate" / "custom_checkpoint_0.pkl", weights_only=True)


def of_trainer(folder: Path) -> State:
    (checkpoint,) = (folder / "trainer").glob("checkpoint-*")
    state = load_file(checkpoint / "model.safetensors")
    return {name.removeprefix("loss."): value for name, value in state.items() if name.startswith("loss.")}


def of_dcp(folder: Path) -> State:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(max(folder.glob("fsdp2-*")), folder / "plain.pt")
    state = torch.load(folder / "plain.pt", weights_only=True)["weights"]
    return {name.removeprefix("loss."): value for name, value in state.items() if name.startswith("loss.")}


# Examples for several processes → the loss's state in their checkpoint.
DISTRIBUTED = {
    "ddp": torch_file("ddp.pt"),
    "fsdp2": of_dcp,
    "with_accelerate": of_accelerate,
    "with_fabric": torch_file("fabric.ckpt"),
    "with_trainer": of_trainer,
}
SAVING = {"plain": torch_file("plain.pt"), **DISTRIBUTED}
# Two steps an epoch. Normalisers and a τ with a rate of its own, at once.
FEW = ("--samples", 300, "--objective", "fastclip-v3")
NOT_OURS = ("rho = 6.5 is not below log(N − 1)", "[transformers]")  # few samples; other epochs, other processes


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def losses(output: str) -> dict[int, float]:
    """Epoch → mean loss, as an example or Hugging Face's Trainer prints it."""
    found = re.findall(r"^epoch (\d+): loss (-?[\d.]+)", output, re.MULTILINE)
    found += [(int(epoch) - 1, loss) for loss, epoch in re.findall(r"'loss': '(\S+)'.*'epoch': '(\d+)'", output)]
    return {int(epoch): float(loss) for epoch, loss in found}


def accuracy(output: str) -> tuple[float, float]:
    """Per cent of zero-shot accuracy or nearest neighbours, and chance."""
    score, chance = re.findall(r"(?:zero-shot accuracy|same concept) ([\d.]+) % \(chance ([\d.]+) %\)", output)[-1]
    return float(score), float(chance)


def unexpected(output: str) -> list[str]:
    """Lines that a newcomer would wonder about."""
    lines = [line for line in output.splitlines() if re.search("warn|notice|deprecat", line, re.IGNORECASE)]
    return [line for line in lines if not any(known in line for known in NOT_OURS)]


@pytest.mark.parametrize("example", SAVING)
def test_a_resumed_run_is_that_of_one_process_without_a_stop(server: Server, example: str, tmp_path: Path) -> None:
    """Two processes make the first epoch where the example takes several; one makes the second."""
    several = example in DISTRIBUTED

    def run(folder: str, *more: object, processes: int = 1) -> str:
        arguments = (*FEW, "--out", tmp_path / folder, *more)
        return server.run(f"{example}.py", *arguments, processes=processes, torchrun=example in ("ddp", "fsdp2"))

    alone = run("alone", "--epochs", 2)
    first = run("stopped", "--epochs", 1, processes=2 if several else 1)
    second = run("stopped", "--epochs", 2, "--resume")

    # every epoch is made once, with the loss of the run that did not stop
    expected = losses(alone)
    assert expected.keys() == {0, 1}
    assert losses(first).keys() == {0}
    assert losses(second).keys() == {1}
    assert losses(first) | losses(second) == pytest.approx(expected, abs=2e-4)

    # so are normalisers, temperatures, steps and epochs
    stopped, whole = SAVING[example](tmp_path / "stopped"), SAVING[example](tmp_path / "alone")
    assert stopped["_extra_state"].tolist() == whole["_extra_state"].tolist()
    assert {"state.log_u", "temperature.logit_scale"} <= stopped.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(stopped[name], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    for output in (alone, first, second):
        assert accuracy(output)[1] == 1.2
        assert not unexpected(output)


def test_unimodal_trains_on_two_views(server: Server) -> None:
    output = server.run("unimodal.py", "--samples", 300, "--epochs", 2)
    assert losses(output)[1] < losses(output)[0]
    assert re.findall(r"(before|after) training: same concept", output) == ["before", "after"]
    assert not unexpected(output)


def test_views_stacked_crosswise_are_sogclr_of_all_views() -> None:
    """Each of 2 B views is compared with both views of the B − 1 other images (arXiv 2202.12387), u shared by a pair.

    The plain form, in the first visit: τ log of the mean over both anchors of a sample of their mean e^(d/τ).
    """
    views = torch.stack(pairs(5, seed=1)).requires_grad_()
    first, second = views
    ids, tau, rows = torch.tensor([7, 2, 4, 0, 9]), 0.3, len(first)
    loss = build_loss("sogclr", num_samples=10, embed_dim=views.shape[2], temperature=tau).double()
    out = loss(Features.unit(torch.cat([first, second]), torch.cat([second, first])), ids.repeat(2))
    (found,) = torch.autograd.grad(out.total, views)

    terms = []
    for i in range(rows):
        others = torch.cat([view[torch.arange(rows) != i] for view in views])  # [2 (B − 1), D]
        positive = first[i] @ second[i]
        means = torch.stack([((others @ view[i] - positive) / tau).exp().mean() for view in views])
        terms.append(tau * (means.mean().detach().log() + (means / means.mean().detach()).mean() - 1))
    expected = torch.stack(terms).mean()
    (gradient,) = torch.autograd.grad(expected, views)
    torch.testing.assert_close(out.total, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-12)


def sources() -> list[Path]:
    return sorted(EXAMPLES.glob("*.py"))


def test_every_example_is_tested_and_is_short() -> None:
    assert {path.stem for path in sources()} == {*SAVING, "unimodal", "emoji_pairs"}
    for path in sources():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert 40 <= sum(bool(line.strip()) for line in lines) <= 80, path.name


def test_no_example_has_the_name_of_a_module() -> None:
    """A script's folder comes first on sys.path: accelerate.py would import itself."""
    assert [path.name for path in sources() if importlib.util.find_spec(path.stem)] == []


def commands(example: str) -> list[str]:
    """Commands of an example's header that start it."""
    header = ast.get_docstring(ast.parse((EXAMPLES / f"{example}.py").read_text(encoding="utf-8"))) or ""
    return [line.partition(" #")[0].strip() for line in header.splitlines() if f"examples/{example}.py" in line]


@pytest.mark.parametrize("example", [*SAVING, "unimodal"])
def test_headers_have_commands(example: str) -> None:
    first, *others = commands(example)
    starts = "torchrun --nproc_per_node 2" if example in {*DISTRIBUTED} - {"with_fabric"} else "python"
    assert first.startswith(f"{starts} examples/{example}.py")
    assert ["--resume" in command for command in others] == [True] * (example in SAVING)


@pytest.mark.slow
@pytest.mark.parametrize("example", [*SAVING, "unimodal"])
def test_the_commands_of_a_header_train_above_chance(example: str, tmp_path: Path) -> None:
    """At full length, as they stand, in shells of their own."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands(example):
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment() | paths, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found, (score, chance) = losses(done.stdout), accuracy(done.stdout)
        assert len(found) == (2 if "--resume" in command else 3 if example == "unimodal" else 6)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert score > 4 * chance
