"""Faster texts are the same texts: tokens equal open_clip's, features differ by rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disttempnet import texts
from disttempnet.models import encode_texts, load_model, open_clip
from disttempnet.texts import WordwiseTokenizer, encode_shortened, is_causal, text_lengths, wordwise

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


def test_shortened_features_are_those_of_all_positions() -> None:
    torch.manual_seed(0)
    towers = load_model("demo-convnext-32")
    torch.nn.init.normal_(towers.module.positional_embedding)
    towers.module.eval()
    tokens = towers.tokenizer(PROMPTS)
    assert is_causal(towers.module)
    lengths = text_lengths(towers.module, tokens)
    assert lengths.tolist() == [8, 2, 16, 3, 3]  # the third is cut off at the tower's sixteen
    with torch.no_grad():
        whole = encode_texts(towers, tokens)
        for rows in ([0], [1], [1, 4], [0, 3, 4], range(5)):
            short = encode_shortened(towers.module, tokens[list(rows)])
            torch.testing.assert_close(short, whole[list(rows)], atol=2e-6, rtol=0)


def test_towers_that_look_ahead_are_left_alone() -> None:
    towers = load_model("demo-convnext-32")
    towers.module.attn_mask = None
    assert not is_causal(towers.module)
