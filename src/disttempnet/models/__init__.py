"""The two towers.

towers.py              by an open_clip name, from checkpoints and into checkpoints that open_clip opens
origin.py              names → architecture and file of weights
hub.py                 whether the Hugging Face Hub can be reached
weights.py             files of weights → state dicts, without running code from them
transformers_clip.py   CLIPModel folders of transformers under open_clip's names
efficientnet.py        efficientnet-pytorch's names of weights → timm's
pretrained.py          a timm image tower, a Hugging Face text tower, from checkpoints of their own
package.py             weights inside an installed Python package
text.py                captions → features, short sequences cut
locks.py               locked layers
lora.py                adapters of low rank, merged in checkpoints
activations.py         blocks that are computed again in the backward pass
depth.py               layers below and above each parameter
batch_norm.py          BatchNorm with the statistics of the global batch, or frozen
architectures/         the package's own, one JSON each
trunk.py               the locked trunk of a tower and its head
"""

from disttempnet.models.towers import (
    AS_CLIP,
    CONFIG_NAME,
    MODEL_FOLDER,
    WEIGHTS_NAME,
    Resizing,
    Towers,
    encode_images,
    encode_texts,
    is_random,
    load_model,
    read_target,
    save_model,
)

__all__ = [
    "AS_CLIP",
    "CONFIG_NAME",
    "MODEL_FOLDER",
    "WEIGHTS_NAME",
    "Resizing",
    "Towers",
    "encode_images",
    "encode_texts",
    "is_random",
    "load_model",
    "read_target",
    "save_model",
]
