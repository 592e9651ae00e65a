"""Image and text tower as ONNX files, which need neither torch nor this package; run by onnxruntime as a check.

  image.onnx   pixels [batch, 3, s, s], uint8 from 0 to 255 → features [batch, D], of unit length
  text.onnx    tokens [batch, L], int64 → features [batch, D], of unit length
  about.json   sizes, resizing, mean and std (which image.onnx applies itself), logit scale and bias

Scaling and normalisation of pixels are inside, so that a caller only decodes, resizes and crops.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disttempnet.errors import UserError
from disttempnet.export.check import CAPTIONS, expected_features, largest_difference, sample_pixels
from disttempnet.models import Towers
from disttempnet.models.pretrained import has_hf_text
from disttempnet.sanitize import brief

MOST_IN_ONE_FILE = 1_800_000_000  # bytes; protobuf ends at 2 GiB, and larger weights lie beside the file
ONNX_ABOUT = "about.json"


class ImageTower(nn.Module):
    """Image tower with scaling and normalisation: uint8 pixels [b, 3, s, s] → unit features [b, D]."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.module = towers.module
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(1, 3, 1, 1)) for v in (towers.mean, towers.std))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module.encode_image((pixels.float() / 255 - self.mean) / self.std, normalize=True)


class TextTower(nn.Module):
    """Text tower: int64 tokens [b, L] → unit features [b, D]."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.module = towers.module

    def forward(self, tokens: Tensor) -> Tensor:
        # the class's own: that of the instance cuts trimmed tokens, whose length an export would have to follow
        return type(self.module).encode_text(self.module, tokens, normalize=True)


def write_onnx(towers: Towers, folder: Path, logit_scale: float) -> str:
    """Write both towers as ONNX files and compare onnxruntime's features with theirs.

    Args:
        towers: in evaluation mode, on the CPU.
        folder: an existing, empty one.
        logit_scale: that similarities are multiplied by; goes into about.json.

    Returns:
        What was checked, in words.

    Raises:
        UserError: a package is missing; a tower has an operation that ONNX lacks; features differ.
    """
    runtime = _runtime()
    tokens = towers.tokenizer(list(CAPTIONS))
    expected = dict(zip(("image", "text"), expected_features(towers), strict=True))
    worst = 0.0
    for kind, tower, name, rows in (
        ("image", ImageTower(towers), "pixels", sample_pixels(towers)),
        ("text", TextTower(towers), "tokens", tokens),
    ):
        file = folder / f"{kind}.onnx"
        _export(tower.eval(), name, rows, file)
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for count in (len(rows), 1, 3):  # the batch that was traced, and others
            found = torch.from_numpy(session.run(None, {name: rows[:count].numpy()})[0])
            worst = max(worst, largest_difference(file.name, expected[kind][:count], found))

    # Say what a caller has to know, and write the tokenizer's files where there are any.
    text = towers.architecture["text_cfg"]
    bias = getattr(towers.module, "logit_bias", None)  # of SigLIP alone
    about = {
        "model": towers.name,
        "embed_dim": towers.embed_dim,
        "image_size": towers.image_size,
        "resize_mode": towers.resizing.mode,
        "interpolation": towers.resizing.interpolation,
        "mean": list(towers.mean),
        "std": list(towers.std),
        "context_length": tokens.shape[1],
        "vocab_size": text.get("vocab_size"),
        "logit_scale": logit_scale,
        "logit_bias": 0.0 if bias is None else float(bias.detach()),
    }
    if has_hf_text(towers.architecture):
        towers.tokenizer.save_pretrained(str(folder))  # type: ignore[attr-defined]
    (folder / ONNX_ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return f"run by onnxruntime; features of images and captions differ by at most {worst:.1e}"


def _runtime() -> Any:
    """Return the module onnxruntime; raise UserError where it, or what the export needs, is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to onnx needs {error.name}: python -m pip install 'disttempnet[onnx]'") from None
    onnxruntime.set_default_logger_severity(3)  # its warnings are about graphs that it optimises itself
    return onnxruntime


def _export(tower: nn.Module, name: str, rows: Tensor, file: Path) -> None:
    """Write one tower, with a batch of any size."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())
    shapes = {name: {0: torch.export.Dim("batch")}}
    silence = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    before = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)  # the exporter tells of each step, also with verbose=False
        with silence[0], silence[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower,
                (rows,),
                str(file),
                dynamo=True,
                input_names=[name],
                output_names=["features"],
                dynamic_shapes=shapes,
                external_data=size > MOST_IN_ONE_FILE,
                verbose=False,
            )
    except Exception as error:  # torch.export raises of many kinds, each with pages about its cause
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--to onnx: {file.name} cannot be made of this tower: {brief(first)}") from None
    finally:
        logging.disable(before)
