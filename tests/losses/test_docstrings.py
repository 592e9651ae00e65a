"""Examples in the docstrings of the losses run as written, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import disttempnet.losses

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(disttempnet.losses.__path__, "disttempnet.losses.")
    if not module.ispkg and module.name != "disttempnet.losses.contrast.triton"  # imports triton
)
WITH_EXAMPLE = {  # what users build, and what they build it from
    "build_loss", "gather_state", "Features", "SampleState", "GlobalContrastiveLoss", "SigLipLoss", "CyClipLoss",
    "VicRegLoss", "OnlineClrLoss", "ConstantTemperature", "LearnableTemperature", "PerSampleTemperature",
    "NetworkTemperature", "PrototypeNormaliser", "Popularity",
    "AmortisedPartition", "AmorLipLoss", "ConstantGamma", "CosineGamma", "ScentGamma",
    "Learner.parameter_groups",
}  # fmt: skip


def examples(module: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder().find(importlib.import_module(module))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run_as_written(module: str) -> None:
    for test in examples(module):
        torch.manual_seed(0)
        report: list[str] = []
        result = doctest.DocTestRunner().run(test, out=report.append)
        assert result.failed == 0, "".join(report)


def test_every_loss_temperature_and_schedule_has_an_example() -> None:
    names = {test.name.removeprefix(f"{module}.") for module in MODULES for test in examples(module)}
    assert names >= WITH_EXAMPLE
