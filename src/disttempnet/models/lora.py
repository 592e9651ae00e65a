"""LoRA adapters on locked towers, through peft: low-rank updates of the linear maps and attentions in their blocks.

A checkpoint holds the towers with the adapters merged, which open_clip opens. Beside them lies what training goes on
with: the adapters, and the weights under them, as a merged weight cannot be taken apart to the bit.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from disttempnet.config import LoraConfig
from disttempnet.errors import UserError, unknown_name
from disttempnet.models.depth import depths
from disttempnet.models.weights import misfit, read_weights

LORA_NAME = "lora.safetensors"
ADAPTERS_MARK = {"out_proj": "1"}  # in metadata: an attention adds the update of its output projection once
OUT_PROJECTION = ".base_layer.out_proj.lora_"  # in names of adapters: peft's attention, not a linear map of that name
UNMERGED = (".base_layer.", ".lora_")  # in names of a module with adapters: what its merged form does not have


class Adapters:
    """The adapters of both towers, in place; everything that was locked before stays locked.

    Args:
        module: open_clip's model, locked.
        config: `[lora]`, with a rank.
        checkpoint: folder of a checkpoint to take them from; None = new ones, which change nothing yet.

    Raises:
        UserError: peft is not installed, a target that no block has, or a checkpoint's file that does not fit.
    """

    def __init__(self, module: open_clip.CLIP, config: LoraConfig, checkpoint: Path | None = None) -> None:
        peft = _import_peft()
        trained = [p for p in module.parameters() if p.requires_grad]
        alpha = config.alpha or config.rank
        # a pattern: peft takes names for endings of names, and text blocks are called as the ends of image blocks
        pattern = "|".join(map(re.escape, _targets(module, config)))
        wanted = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=pattern, bias="none")
        self._tuner = peft.LoraModel(module, wanted, "default")  # the modules of `module` are replaced
        for p in trained:  # heads, which peft has locked
            p.requires_grad_(True)
        for part in module.modules():
            if isinstance(part, peft.tuners.lora.layer.MultiheadAttention):
                _merge_out_projection_once(part)
                part.register_forward_pre_hook(_remember_weights)
                part.register_forward_hook(_put_weights_back, always_call=True)
        if checkpoint is not None:
            self._load(module, checkpoint / LORA_NAME)
        _refuse_wrong_merge(peft)

    def describe(self) -> str:
        """Return in one line what is trained of the towers, and what is saved."""
        parts = [p for p in self._tuner.model.parameters() if p.requires_grad]
        everything = sum(p.numel() for p in self._tuner.model.parameters())
        said = (
            f"lora.rank = {self._tuner.peft_config['default'].r}: {sum(p.numel() for p in parts):,} of {everything:,} "
            "parameters of the towers are trained; checkpoints have the adapters merged"
        )
        # open_clip's own attention, from 4.0 on, holds queries, keys and values in a parameter that is no layer; one
        # without any adapter is of a tower or of a target that was left out
        bare = sum(
            isinstance(part, open_clip.transformer.Attention)
            and any(".lora_" in name for name, _ in part.named_parameters())
            for part in self._tuner.model.modules()
        )
        if bare:
            said += f"; queries, keys and values of {bare} attentions have none with open_clip {open_clip.__version__}"
        return said

    def merged(self) -> nn.Module:
        """Return a copy of the towers with the adapters merged into their weights, under open_clip's names."""
        result: nn.Module = copy.deepcopy(self._tuner).merge_and_unload(progressbar=False)
        return result

    def save(self, checkpoint: Path) -> None:
        """Write the adapters and the weights under them, which `merged` does not have, into a checkpoint's folder."""
        state = {
            name: value.detach().cpu().contiguous()
            for name, value in self._tuner.model.state_dict().items()
            if any(part in name for part in UNMERGED)
        }
        save_file(state, checkpoint / LORA_NAME, metadata=ADAPTERS_MARK)

    @staticmethod
    def _load(module: nn.Module, path: Path) -> None:
        own = {name: value for name, value in module.state_dict().items() if any(part in name for part in UNMERGED)}
        state = read_weights(path)
        if wrong := misfit(state, own):
            raise UserError(f"{path}: not the adapters of this run: {wrong}")
        _refuse_added_twice(path, state)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])


def _refuse_added_twice(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError if a run may have been trained with W + 2Δ in output projections: here it would be W + Δ."""
    if not any(OUT_PROJECTION in name for name in state):
        return
    with safe_open(path, "pt") as file:
        mark = file.metadata() or {}
    if mark.get("out_proj") != ADAPTERS_MARK["out_proj"]:
        raise UserError(
            f"{path}: made by an earlier version, which added the adapters of attentions' out_proj twice: resume with "
            f"that version, or start a new run from its merged towers, model.pretrained={path.parent}"
        )


def _remember_weights(attention: Any, _: object) -> None:
    """Keep the locked weights of an attention of peft, which forgets them while it computes."""
    base = attention.base_layer
    attention.weights_before = (base.in_proj_weight, base.out_proj.base_layer.weight)


def _put_weights_back(attention: Any, _: object, __: object) -> None:
    """Give an attention of peft its locked weights back: peft's own are (W + Δ) − Δ, a rounding off at every pass."""
    base = attention.base_layer
    base.in_proj_weight, base.out_proj.base_layer.weight = attention.weights_before
    del attention.weights_before


def _merge_out_projection_once(attention: Any) -> None:
    """Have an attention of peft add the update of its output projection once.

    peft's attention writes W + Δ there itself, and then asks the projection to merge, which adds Δ again, out of
    autograd's sight. Here the projection only notes that it is merged.
    """

    def merge(projection: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        projection.merged_adapters.extend(adapter_names or projection.active_adapters)

    def unmerge(projection: Any) -> None:
        projection.merged_adapters.clear()

    # bound methods: a copy of the attention gets its own
    projection = attention.base_layer.out_proj
    projection.merge, projection.unmerge = MethodType(merge, projection), MethodType(unmerge, projection)


def _refuse_wrong_merge(peft: ModuleType) -> None:
    """Raise UserError if an attention of this peft does not merge to W + Δ: another version may do it another way."""
    with torch.random.fork_rng(devices=[]):  # an adapter's random start is the run's
        holder = nn.ModuleDict({"attn": nn.MultiheadAttention(2, 1)})
        peft.LoraModel(holder, peft.LoraConfig(r=1, target_modules=["attn"]), "default")
    attention: Any = holder["attn"]
    _merge_out_projection_once(attention)
    parts = {"in_proj_weight": attention, "out_proj.weight": attention.base_layer.out_proj}
    with torch.no_grad():
        for part in parts.values():
            part.lora_B["default"].weight.fill_(1.0)
        expected = {
            name: part.get_base_layer().get_parameter("in_proj_weight" if part is attention else "weight")
            + part.scaling["default"] * part.lora_B["default"].weight @ part.lora_A["default"].weight
            for name, part in parts.items()
        }
        merged = attention.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    if not all(torch.allclose(merged.get_parameter(name), value) for name, value in expected.items()):
        raise UserError(
            f"[lora] peft {version('peft')} merges adapters of attentions in a way that is not known here: "
            "python -m pip install 'peft==0.21.2'"
        )


def _import_peft() -> ModuleType:
    if importlib.util.find_spec("peft") is None:
        raise UserError("[lora] needs peft: python -m pip install 'disttempnet[lora]'")
    import peft

    return peft


def _targets(module: open_clip.CLIP, config: LoraConfig) -> list[str]:
    """Return the names of the modules that get adapters: between embeddings and heads of the towers that are named.

    Raises:
        UserError: a target that none of them is called.
    """
    place = depths(module)
    found = []
    for name, part in module.named_modules():
        weight: dict[Any, str] = {nn.Linear: "weight", nn.MultiheadAttention: "out_proj.weight"}
        if type(part) not in weight or 0 in place[f"{name}.{weight[type(part)]}"]:
            continue
        if ("image" if name.startswith("visual.") else "text") in config.towers:
            found.append(name)
    known = {name.rpartition(".")[2] for name in found}
    for target in config.targets:
        if target not in known:
            raise UserError(f"[lora] {unknown_name('target', target, known)}")
    chosen = [name for name in found if not config.targets or name.rpartition(".")[2] in config.targets]
    if not chosen:
        raise UserError("[lora] the towers have no linear maps between embeddings and heads: leave it out")
    return chosen
