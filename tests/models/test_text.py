"""Faster texts are the same texts: tokens equal open_clip's, features and gradients differ by rounding."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disttempnet.models import encode_texts, load_model
from disttempnet.models import text as texts
from disttempnet.models.text import Trim, WordwiseTokenizer, accept_trimmed, trimming, wordwise
from disttempnet.models.towers import open_clip
from tests import parts

PLAIN = open_clip.get_tokenizer("ViT-B-32")
FAST = wordwise(PLAIN)
PROMPTS = ["a photo of a dog.", "", "itap of the origami great white shark, a toy in a box by the sea", "café", "red"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(max_size=40) | st.text(st.characters(max_codepoint=127), max_size=400), max_size=3))
@example(["It's the dog's - A_B, 3.14 <end_of_text> x<start_of_text>y", "a&nbsp;b &lt c", " \t two\n lines \x1b[31m"])
@example(["â€œquotedâ€\x9d", "ﬁne ＡＢＣ", "word " * 200])
def test_tokens_are_those_of_open_clip(lines) -> None:
    assert torch.equal(FAST(lines), PLAIN(lines))
    assert torch.equal(FAST(lines), PLAIN(lines))  # now from memory


def test_one_text_is_a_batch_of_one() -> None:
    assert torch.equal(FAST("two words"), PLAIN("two words"))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "WORDS_KEPT", 3)
    tokenizer = WordwiseTokenizer(PLAIN)
    line = "one two three four five one"
    assert torch.equal(tokenizer(line), PLAIN(line))
    assert len(tokenizer._words) <= 3


@pytest.mark.parametrize("change", [{"clean": "canonicalize"}, {"reduction_mask": "simple"}])
def test_other_tokenizers_stay_as_they_are(change: dict) -> None:
    other = open_clip.SimpleTokenizer(context_length=16, **change)
    assert wordwise(other) is other


# Positions that nothing looks at are left out of sums in which they were zeros: what is left over is summed in another
# order at most, which moves the last bit. On most processors features are equal to the bit at multiples of eight.
ROUNDING = 1e-14


def small_clip(custom: bool, **text: Any) -> Any:
    """open_clip's own small model in float64, as it makes it; the text tower has CLIP's 77 positions."""
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16}
    text_cfg = {"context_length": 77, "width": 32, "heads": 2, "layers": 3, **text}
    made = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(16, vision, text_cfg).double()
    torch.nn.init.normal_(getattr(made, "text", made).positional_embedding)
    return made


def encoded(module: Any, tokens: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features, and the gradients of all that made them."""
    module.zero_grad()
    features = module.encode_text(tokens)
    (features * direction).sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_trimmed_texts_have_the_features_and_gradients_of_whole_ones(custom: bool, pool: str, multiple: int) -> None:
    plain = small_clip(custom, pool_type=pool, eos_id=49407)
    module = copy.deepcopy(plain)
    accept_trimmed(module)
    tokens, trim = PLAIN(PROMPTS), trimming(module)
    assert trim == Trim(49407 if pool == "eos" else None)
    direction = torch.randn(len(PROMPTS), 16, dtype=torch.float64)
    for rows, longest in (([0, 1, 2, 3, 4], 19), ([1, 4], 3)):
        short = trim(tokens[rows], multiple)
        assert short.shape[1] == math.ceil(longest / multiple) * multiple
        found, gradients = encoded(module, short, direction[rows])
        expected, wanted = encoded(plain, tokens[rows], direction[rows])
        assert (found - expected).norm() <= ROUNDING * expected.norm()
        assert gradients.keys() == wanted.keys()
        assert len(wanted) > 36
        for name, gradient in gradients.items():
            assert (gradient - wanted[name]).norm() <= ROUNDING * wanted[name].norm(), name
        unit = torch.nn.functional.normalize(expected, dim=1)
        torch.testing.assert_close(module.encode_text(short, normalize=True), unit, rtol=0, atol=ROUNDING)
        assert torch.equal(module.encode_text(tokens[rows]), expected), "whole ones are taken as ever"


def test_a_text_that_fills_all_positions_stays_whole() -> None:
    tokens = PLAIN(["word " * 200, "red", "green"])
    assert torch.equal(Trim(None)(tokens, 8), tokens)
    assert Trim(None)(tokens[1:], 8).untyped_storage().nbytes() == 2 * 8 * 8, "no view of 77 tokens"


def test_loaded_towers_take_trimmed_texts() -> None:
    """In float32 too, and so do copies of them, which must not ask the tower that they were copied from."""
    towers = load_model("demo-convnext-32")
    torch.nn.init.normal_(towers.module.positional_embedding)
    towers.module.eval()
    tokens = towers.tokenizer(PROMPTS)
    trim = trimming(towers.module)
    assert trim is not None
    assert trim.lengths(tokens).tolist() == [8, 2, 16, 3, 3]  # the third is cut off at the tower's sixteen
    with torch.no_grad():
        whole = encode_texts(towers, tokens)
        for rows in ([0], [1], [1, 4], [0, 3, 4], range(5)):
            short = encode_texts(towers, trim(tokens[list(rows)]))
            torch.testing.assert_close(short, whole[list(rows)], atol=2e-6, rtol=0)
        copied = copy.deepcopy(towers.module)
        towers.module.positional_embedding.zero_()
        torch.testing.assert_close(copied.encode_text(trim(tokens[:2]), normalize=True), whole[:2], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("custom", "text"),
    [
        (True, {"no_causal_mask": True}),
        (True, {"embed_cls": True}),
        (True, {"pool_type": "last"}),
        (False, {"pool_type": "first"}),
    ],
)
def test_towers_that_look_ahead_are_left_alone(custom: bool, text: dict) -> None:
    module = small_clip(custom, **text)
    before = module.encode_text(PLAIN(PROMPTS))
    accept_trimmed(module)
    assert trimming(module) is None
    assert not {"encode_text", "_encode_text"} & module.__dict__.keys()
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert torch.equal(module.encode_text(PLAIN(PROMPTS)), before)


def test_towers_of_hugging_face_are_left_alone(tmp_path: Path) -> None:
    folder = parts.write_text_folder(tmp_path / "text")
    towers = load_model(parts.write_architecture(tmp_path / "both"), text_pretrained=str(folder))
    assert trimming(towers.module) is None


def test_what_open_clip_did_not_make_is_left_alone() -> None:
    assert trimming(torch.nn.Identity()) is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, of any input
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_compiled_towers_meet_new_lengths_without_compiling_anew(custom: bool) -> None:
    torch.compiler.reset()
    module, graphs = small_clip(custom), []
    accept_trimmed(module)

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    (module.text if custom else module.transformer).compile(backend=backend)
    tokens = PLAIN(["word " * 200, "red"])
    for length in (8, 16, 77):
        module.encode_text(tokens[:, :length]).sum().backward()
    met = len(graphs)
    assert met > 0
    for length in (24, 32, 64, 72, 8, 77):
        module.encode_text(tokens[:, :length]).sum().backward()
    assert len(graphs) == met
