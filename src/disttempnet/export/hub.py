"""A run as a repository of the Hugging Face Hub that open_clip opens: its folder, and the upload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from disttempnet.errors import UserError
from disttempnet.export.check import expected_features, largest_difference, sample_pixels
from disttempnet.export.clip_model import clip_tokenizer
from disttempnet.models import CONFIG_NAME, Towers, encode_images, load_model, save_model
from disttempnet.models.hub import hub_fault
from disttempnet.models.transformers_clip import VOCABULARY
from disttempnet.sanitize import brief

CARD = "README.md"


def checked_repository(name: str) -> str:
    """Return `ORG/NAME`.

    Raises:
        UserError: the Hub would not take the name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: not a name of a repository: {brief(error)}") from None
    if name.count("/") != 1:
        raise UserError(f"{name}: name the repository as ORG/NAME")
    return name


def write_hub_folder(towers: Towers, folder: Path, repository: str, card: str, ema: float = 0.0) -> list[str]:
    """Write what open_clip opens as `hf-hub:ORG/NAME`, and compare the features of the written weights.

    Args:
        towers: in evaluation mode, on the CPU.
        folder: an existing, empty one.
        repository: ORG/NAME, which replaces names of local folders in the architecture.
        card: the text of README.md.
        ema: decay of the moving average that the weights are (train.ema); 0 = they are none.

    Returns:
        Lines for the reader: what was checked, what is left out.

    Raises:
        UserError: features differ.
    """
    lines = []
    save_model(towers, folder, float(towers.module.logit_scale.detach().exp()), ema=ema)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["model_cfg"] = _without_places(config["model_cfg"], repository)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")

    # A Hugging Face text tower has its tokenizer's files already; CLIP's vocabulary gets those that others expect.
    if hasattr(towers.tokenizer, "save_pretrained"):
        towers.tokenizer.save_pretrained(str(folder))
    elif towers.architecture["text_cfg"].get("vocab_size", VOCABULARY) == VOCABULARY:
        try:
            clip_tokenizer(towers).save_pretrained(folder)
        except UserError as error:
            lines.append(f"left out: the tokenizer's files, which open_clip has itself ({error})")

    again = load_model(f"local-dir:{folder}")
    again.module.eval()
    with torch.inference_mode():
        found = encode_images(again, sample_pixels(again))
    difference = largest_difference("the folder", expected_features(towers)[0], found)
    return [*lines, f"checked: opened again; features of images differ by at most {difference:.1e}"]


def _without_places(value: Any, repository: str) -> Any:
    """Return an architecture in which the repository stands for folders of this machine."""
    if isinstance(value, dict):
        return {key: _without_places(inner, repository) for key, inner in value.items()}
    is_place = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".")))
    return repository if is_place or (isinstance(value, str) and value and Path(value).exists()) else value


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Make the repository where it is missing, upload the folder as one commit, and return its URL.

    Raises:
        UserError: nobody is logged in, or the Hub refuses; the repository is public, and `private` is set.
    """
    from huggingface_hub import HfApi, errors

    # of its HTTP client; before version 1 that was requests, whose errors are OSErrors
    network: type[Exception] = getattr(errors, "HTTPError", OSError)

    api = HfApi(library_name="disttempnet")
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        # One that was there before stays as it is, and everybody would read what is uploaded.
        if private and not api.repo_info(repository).private:
            raise UserError(
                f"{repository}: --private, but this repository exists and is public: nothing was uploaded; make it "
                f"private in its settings, or name another one; the folder is {folder}"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[".*"],
        )
    except errors.OfflineModeIsEnabled:
        why = hub_fault() or "the Hub's client is offline"
        raise UserError(f"{repository}: nothing was uploaded: {why}; the folder is {folder}") from None
    except (network, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a file, with its cause
        status = getattr(getattr(error, "response", None), "status_code", 0)
        hint = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        why = f"{brief(error, 300)}{f' {brief(error.__cause__, 300)}' if error.__cause__ else ''}{hint}"
        raise UserError(f"{repository}: not uploaded: {why}; the folder is {folder}") from None
    return str(url)
