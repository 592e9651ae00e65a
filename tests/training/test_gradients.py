"""A batch in chunks has the gradient of the whole batch: every objective, any number of chunks, one process or two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from disttempnet.config import CONFIG_FOLDER, Config, load_config
from disttempnet.errors import UserError
from disttempnet.training.gradients import InChunks, WholeBatch
from disttempnet.training.model import Contrast, ContrastiveModel
from disttempnet.training.run_folder import list_checkpoints
from disttempnet.training.trainer import Trainer
from tests.gloo import Pools
from tests.losses.scenario import EVERY, D, GlobalBatch, every_objective, kept, local_rows, make, stream

CPU = torch.device("cpu")
DEBUG = CONFIG_FOLDER / "debug.toml"


class SmallTowers(nn.Module):
    """Two layers an image, one a text, in float64; each row by itself."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, D)).double()
        self.text = nn.Sequential(nn.Linear(D, D), nn.Dropout(dropout)).double()

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images), self.text(tokens)


def small_model(recipe: dict, dropout: float = 0.0) -> ContrastiveModel:
    return ContrastiveModel(SmallTowers(dropout), Contrast(make(recipe), None))


def descend(recipe: dict, batches: list[GlobalBatch], chunks: int) -> list[dict[str, Tensor]]:
    """Steps of gradient descent on towers and objective; after each: value, metrics, gradients, and what is kept."""
    model = small_model(recipe)
    gradients = WholeBatch(model, CPU) if chunks == 1 else InChunks(model, CPU, chunks)
    steps = []
    for batch in batches:
        model.zero_grad()
        model.contrast.loss.set_epoch(batch.epoch)
        output = gradients(*(local_rows(rows) for rows in (batch.x, batch.y, batch.ids)))
        found = {"total": output.total.detach()}
        found |= {f"metric {name}": value for name, value in output.metrics.items()}
        found |= {f"gradient {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"kept {name}": value for name, value in kept(model.contrast.loss, batch.ids).items()}
        steps.append(found)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.3 * parameter.grad
    return steps


def assert_same(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.keys() == e.keys()
        for name in e:
            torch.testing.assert_close(
                a[name], e[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=number, w=name: f"step {n}, {w}: {m}"
            )


@pytest.mark.parametrize("chunks", [2, 3, 8])
@every_objective
def test_chunks_give_the_gradient_of_the_batch(recipe: dict, chunks: int) -> None:
    """Also where chunks are of unequal size (3), and of one row (8)."""
    batches = stream(4, seed=3)
    assert_same(descend(recipe, batches, chunks), descend(recipe, batches, 1))


@pytest.mark.parametrize("chunks", [1, 2, 4])
@every_objective
def test_chunks_on_two_ranks_give_the_gradient_of_one_process(gloo: Pools, recipe: dict, chunks: int) -> None:
    batches = stream(4, seed=3)
    expected = descend(recipe, batches, 1)
    for rank in gloo(2, descend, recipe, batches, chunks):
        assert_same(rank, expected)


def test_the_comparison_would_see_another_gradient() -> None:
    """Accumulation over small batches, each with its own loss, is far off: what the chunks above are not."""
    (batch,) = stream(1, seed=3)
    (whole,) = descend(EVERY["clip"], [batch], 1)
    model = small_model(EVERY["clip"])
    for rows in (slice(0, 4), slice(4, 8)):
        (model(batch.x[rows], batch.y[rows], batch.ids[rows]).total / 2).backward()
    wrong = model.encoder.image[0].weight.grad - whole["gradient encoder.image.0.weight"]
    assert wrong.norm() > 0.05 * whole["gradient encoder.image.0.weight"].norm()


def test_dropout_is_the_same_in_both_passes() -> None:
    """Against one graph over the same chunks, embedded once."""
    (batch,) = stream(1, seed=3)
    oracle, model = (small_model(EVERY["disttempnet-v1"], dropout=0.5) for _ in range(2))
    torch.manual_seed(11)
    pieces = [oracle.encoder(x, y) for x, y in zip(batch.x.split(2), batch.y.split(2), strict=True)]
    image, text = (torch.cat(side) for side in zip(*pieces, strict=True))
    after = torch.get_rng_state()
    oracle.contrast(image, text, batch.ids).total.backward()
    torch.manual_seed(11)
    InChunks(model, CPU, 4)(batch.x, batch.y, batch.ids)
    assert torch.equal(torch.get_rng_state(), after), "a step draws as often as it did before"
    for (name, ours), (_, theirs) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_locked_tower_stays(side: str) -> None:
    (batch,) = stream(1, seed=3)
    models = [small_model(EVERY["sogclr"]) for _ in range(2)]
    for model in models:
        getattr(model.encoder, side).requires_grad_(False)
    WholeBatch(models[0], CPU)(batch.x, batch.y, batch.ids)
    InChunks(models[1], CPU, 4)(batch.x, batch.y, batch.ids)
    for (name, whole), (_, ours) in zip(*(model.named_parameters() for model in models), strict=True):
        assert (ours.grad is None) == (whole.grad is None) == name.startswith(f"encoder.{side}.")
        if whole.grad is not None:
            torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-10, atol=1e-10)


# ---- in the trainer ----


def debug(out: Path, *overrides: str) -> Config:
    return load_config(DEBUG, [f"out={json.dumps(str(out))}", "eval.tasks=[]", *overrides])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_in_chunks_follows_the_curve_and_goes_on_in_others(tmp_path: Path) -> None:
    Trainer(debug(tmp_path / "whole", "train.stop_after_steps=8"), CPU).run()
    Trainer(debug(tmp_path / "chunks", "train.stop_after_steps=4", "train.accumulate=4"), CPU).run()
    Trainer(debug(tmp_path / "chunks", "train.stop_after_steps=8", "train.accumulate=2"), CPU, "auto").run()
    whole, chunks = (tmp_path / name / "debug" for name in ("whole", "chunks"))
    assert losses(chunks) == pytest.approx(losses(whole), rel=2e-4)
    states = [
        torch.load(list_checkpoints(run)[-1] / "shard-00000-of-00001.pt", weights_only=True)["state"]["state.log_u"]
        for run in (chunks, whole)
    ]
    assert torch.equal(states[0].isinf(), states[1].isinf()), "written for the samples that were seen, and once"
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)


def test_frozen_towers_are_embedded_in_chunks(tmp_path: Path) -> None:
    Trainer(debug(tmp_path / "towers", "train.stop_after_steps=1"), CPU).run()
    frozen = ["train.freeze=towers", f"model.pretrained={json.dumps(str(tmp_path / 'towers' / 'debug'))}"]
    frozen += ["train.stop_after_steps=3"]
    Trainer(debug(tmp_path / "whole", *frozen), CPU).run()
    Trainer(debug(tmp_path / "chunks", *frozen, "train.accumulate=4"), CPU).run()
    assert losses(tmp_path / "chunks" / "debug") == pytest.approx(losses(tmp_path / "whole" / "debug"), rel=1e-5)


def test_what_cannot_be_in_chunks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.accumulate = 33 is more than the 32 rows of a process"):
        Trainer(debug(tmp_path, "train.accumulate=33"), CPU)
    with pytest.raises(UserError, match="has BatchNorm, and a chunk's statistics are not those of the batch"):
        Trainer(debug(tmp_path, "train.accumulate=2", "model.name=RN50"), CPU)


def towers_gradients(chunks: int, half: bool) -> dict[str, Tensor]:
    """Of this rank after a step in float32."""
    model, batch = small_model(EVERY["sogclr"]).float(), stream(1)[0]
    kind = WholeBatch(model, CPU, half) if chunks == 1 else InChunks(model, CPU, chunks, half)
    kind(*(local_rows(rows) for rows in (batch.x.float(), batch.y.float(), batch.ids)))
    return {name: p.grad for name, p in model.encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunks", [1, 2])
def test_gradients_are_exchanged_in_bf16(gloo: Pools, chunks: int) -> None:
    """Float32 numbers that bf16 holds, the same on both ranks, within its rounding of the exact ones."""
    exact, rounded = (gloo(2, towers_gradients, chunks, half) for half in (False, True))
    assert rounded[0].keys() == exact[0].keys()
    for name, gradient in rounded[0].items():
        assert torch.equal(gradient, rounded[1][name]), name
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradient.bfloat16().float()), name
        assert 0 < (gradient - exact[0][name]).norm() < 2**-7 * exact[0][name].norm(), name
