"""DistTempNet: CLIP training with robust global contrastive losses and per-sample temperatures.

The public names are imported on first use, so that `import disttempnet` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttempnet.config import load_config as load_config
    from disttempnet.losses import OBJECTIVES as OBJECTIVES
    from disttempnet.losses import Features as Features
    from disttempnet.losses import build_loss as build_loss
    from disttempnet.losses import gather_state as gather_state
    from disttempnet.models import encode_images as encode_images
    from disttempnet.models import encode_texts as encode_texts
    from disttempnet.models import load_model as load_model
    from disttempnet.training.checkpoint import load_run as load_run

__version__ = "0.1.0"

_HOMES = {
    "Features": "disttempnet.losses",
    "OBJECTIVES": "disttempnet.losses",
    "build_loss": "disttempnet.losses",
    "encode_images": "disttempnet.models",
    "encode_texts": "disttempnet.models",
    "gather_state": "disttempnet.losses",
    "load_config": "disttempnet.config",
    "load_model": "disttempnet.models",
    "load_run": "disttempnet.training.checkpoint",
}

__all__ = [
    "OBJECTIVES",
    "Features",
    "__version__",
    "build_loss",
    "encode_images",
    "encode_texts",
    "gather_state",
    "load_config",
    "load_model",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disttempnet' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
