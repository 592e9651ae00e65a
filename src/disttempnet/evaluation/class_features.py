"""Class features, embedded once: kept in memory over all tasks, and on disk over all evaluations of the same towers.

ImageNet and its variants have 288,000 prompts between them, most of them equal. A class is known by its templates and
its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disttempnet import distributed
from disttempnet.data.builtin.cache import cache_folder
from disttempnet.errors import UserError
from disttempnet.evaluation.encoder import FeatureEncoder, ProgressCallback
from disttempnet.evaluation.protocols import classifier, prompts
from disttempnet.evaluation.tasks import Head
from disttempnet.io.files import atomic
from disttempnet.terminal import say

KEPT_IN = "text"  # in the user's cache
PROMPTS_AT_ONCE = 8192  # bounds the memory that prompts take before they are averaged


class ClassFeatures:
    """Features of classes by templates and name.

    Args:
        folder: keeps those of one model in one precision; None = in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def features(
        self,
        head: Head,
        encoder: FeatureEncoder,
        progress: ProgressCallback | None = None,
        wanted: dict[str, Tensor | None] | None = None,
    ) -> Tensor:
        """Return a classifier, unit rows [C, D] on the encoder's device; every rank calls this and gets the same.

        Args:
            wanted: texts whose features [D] are filled in where they are embedded here as prompts.
        """
        if head.templates not in self._known:  # one rank's files decide: others may see them later
            read = self._read(head.templates) if distributed.is_main() else {}
            self._known[head.templates] = distributed.gather_objects(read)[0]
        known = self._known[head.templates]
        missing = [name for name in dict.fromkeys(head.names) if name not in known]
        step = max(1, PROMPTS_AT_ONCE // len(head.templates))
        for start in range(0, len(missing), step):
            names = missing[start : start + step]
            texts = prompts(names, head.templates)
            table = self._embed(texts, encoder, progress)
            if wanted:
                wanted |= {text: table[i] for i, text in enumerate(texts) if text in wanted}
            rows = classifier(table, len(head.templates))
            known |= dict(zip(names, rows.cpu(), strict=True))
            if self.folder is not None and distributed.is_main():  # at once: a stop loses one piece of the work
                self._write(head.templates, known)
        return torch.stack([known[name] for name in head.names]).to(encoder.device)

    def _embed(self, texts: Sequence[str], encoder: FeatureEncoder, progress: ProgressCallback | None) -> Tensor:
        """Return unit features [t, D] of prompts. Raises UserError where they are not finite."""
        table = distributed.all_sum(distributed.together(lambda: encoder.texts(texts, progress)))
        if not table.isfinite().all():
            raise UserError("the text tower gives features that are not finite")
        return table

    def _path(self, templates: Sequence[str]) -> Path | None:
        digest = hashlib.blake2b(json.dumps(templates).encode(), digest_size=12).hexdigest()
        return self.folder / f"{digest}.safetensors" if self.folder is not None else None

    def _read(self, templates: Sequence[str]) -> dict[str, Tensor]:
        path = self._path(templates)
        if path is None or not path.is_file():
            return {}
        try:
            with safe_open(path, "pt") as file:
                facts, rows = file.metadata(), file.get_tensor("features")
            if json.loads(facts["templates"]) != list(templates):
                return {}
            return dict(zip(json.loads(facts["names"]), rows, strict=True))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return {}  # damaged: embed them again

    def _write(self, templates: Sequence[str], known: dict[str, Tensor]) -> None:
        path = self._path(templates)
        assert path is not None
        facts = {"templates": json.dumps(templates), "names": json.dumps(list(known))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                save_file({"features": torch.stack(list(known.values()))}, temporary, metadata=facts)
        except (OSError, SafetensorError) as error:  # a full disk is either
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            say(f"disttempnet: {path}: text features are not kept: {why}", error=True)
            self.folder = None


def kept_class_features(checkpoint: str, dtype: torch.dtype | None = None) -> ClassFeatures:
    """Return class features that are kept in the user's cache.

    Args:
        checkpoint: digest of the towers, see `checkpoint_hash`.
        dtype: of the texts' autocast; None = that of the weights.
    """
    kept = f"{checkpoint}-{str(dtype or torch.float32).removeprefix('torch.')}"
    return ClassFeatures(cache_folder() / KEPT_IN / kept)
