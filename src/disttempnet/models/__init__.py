"""The two towers.

towers.py        by an open_clip name, from checkpoints and into checkpoints that open_clip opens
pretrained.py    a timm image tower, a Hugging Face text tower, from checkpoints of their own
text.py          captions → features, short sequences cut
locking.py       locked layers; where BatchNorm takes its statistics from
architectures/   the package's own, one JSON each
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
