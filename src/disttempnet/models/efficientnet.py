"""EfficientNet's weights under the names of efficientnet-pytorch, as timm names them: `_conv_stem`, `_blocks.3._bn1`, …

Files of the family are spread under these names, on PyPI too. Tensors and shapes are those of timm's `tf_…` models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.models.weights import refusal

MARK = "_conv_stem.weight"  # a key that only such files have
PADDED_AS_IN_TENSORFLOW = "tf_"  # begins the timm models that pad as efficientnet-pytorch does
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
# The layers of a block that widens its input first, and of one that does not.
WIDENING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3", **SQUEEZE,
}  # fmt: skip
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **SQUEEZE}
OF_A_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


def with_timm_names(
    source: str, architecture: str, weights: dict[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the keys of such a state dict; another one is returned as it is.

    Args:
        source: the file, named in errors.
        architecture: of timm.
        own: the state dict of the model; its blocks are counted through in order.

    Raises:
        UserError: the model pads otherwise, or has other blocks.
    """
    if MARK not in weights:
        return weights
    if not architecture.startswith(PADDED_AS_IN_TENSORFLOW):
        raise UserError(
            f"model.image_pretrained: {source}: weights of efficientnet-pytorch, which pads as TensorFlow does: take "
            f"timm's tf_{architecture}, not {architecture}, as the architecture's timm_model_name"
        )
    blocks = list(dict.fromkeys(".".join(key.split(".")[:3]) for key in own if key.startswith("blocks.")))
    renamed = {}
    for key, value in weights.items():
        if found := OF_A_BLOCK.fullmatch(key):
            number, layer, rest = int(found[1]), found[2], found[3]
            layers = WIDENING if f"_blocks.{number}._expand_conv.weight" in weights else PLAIN
            if number >= len(blocks) or layer not in layers:
                raise refusal(source, f"its {key} has no place in timm's {architecture}")
            renamed[f"{blocks[number]}.{layers[layer]}.{rest}"] = value
        else:
            layer, _, rest = key.partition(".")
            renamed[f"{OUTSIDE.get(layer, layer)}.{rest}"] = value
    return renamed
