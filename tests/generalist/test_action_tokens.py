"""Actions as tokens, repairs, prompts."""

from __future__ import annotations

import numpy as np
import pytest

from robodual.generalist.config import GeneralistConfig, ImageConfig, TokenConfig
from robodual.generalist.processor import Processor
from robodual.generalist.tokenizer import byte_tokenizer, prompt_text, word_tokenizer
from robodual.generalist.tokens import decode_actions, encode_actions
from robodual_client.calvin.annotations import load as evaluation_sentences

PUBLISHED = TokenConfig()


def test_token_is_the_bin_counted_down_from_32000() -> None:
    # Edges linspace(-1, 1, 256): 255 bins of 2 / 255, token 31999 is the lowest and 31744 (and 31745) the highest.
    ids = encode_actions(np.zeros((8, 7)), PUBLISHED)
    ids[:5] = [31999, 31998, 31745, 31744, 31872]
    actions, malformed = decode_actions(ids, PUBLISHED)
    assert malformed == 0
    np.testing.assert_allclose(actions[0, :5], [-254 / 255, -252 / 255, 254 / 255, 254 / 255, 0], atol=1e-7)


def test_chunk_is_seven_actions_and_a_separator_eight_times_with_the_end_last() -> None:
    ids = encode_actions(np.zeros((8, 7)), PUBLISHED).reshape(8, 8)
    assert ids[:7, 7].tolist() == [29871] * 7
    assert ids[7, 7] == 2
    assert set(ids[:, :7].ravel().tolist()) == {31872}


def test_encoding_then_decoding_errs_by_half_a_bin_at_most() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 7))
    actions[0] = [-1, 1, -3, 3, 0, 0.5, -0.5]
    decoded, malformed = decode_actions(encode_actions(actions, PUBLISHED), PUBLISHED)
    assert malformed == 0
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, np.clip(actions, -1, 1), atol=1 / 255 + 1e-6)


def test_token_that_is_no_action_repeats_the_action_before_and_is_still_in_the_first() -> None:
    ids = encode_actions(np.full((8, 7), 0.6), PUBLISHED)
    ids[1] = 29871  # first action, second value
    ids[8 + 2] = 2  # second action, third value
    ids[16 + 2] = 31743  # third action, third value: one below the action tokens
    actions, malformed = decode_actions(ids, PUBLISHED)
    assert malformed == 3
    assert actions[0, 1] == 0
    assert actions[1, 2] == actions[2, 2] == actions[0, 2] == pytest.approx(0.6, abs=0.004)
    assert actions[1, 1] == pytest.approx(0.6, abs=0.004)


def test_wrong_separator_and_end_are_counted_and_change_nothing() -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (8, 7))
    ids = encode_actions(actions, PUBLISHED)
    expected, _ = decode_actions(ids, PUBLISHED)
    ids[7], ids[63] = 31900, 29871
    decoded, malformed = decode_actions(ids, PUBLISHED)
    assert malformed == 2
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("token", [0, 31743, 32000, 32063])
def test_any_sequence_decodes(token: int) -> None:
    actions, malformed = decode_actions(np.full(64, token), PUBLISHED)
    assert malformed == 64
    assert not actions.any()


def test_prompt_is_the_published_text_between_begin_and_separator() -> None:
    tokens = GeneralistConfig.toy().tokens
    tokenizer = byte_tokenizer(tokens)
    ids = Processor(ImageConfig(), tokens, tokenizer).prompt("Push the Red block")
    assert (ids[0], ids[-1]) == (tokens.bos, tokens.separator)
    assert tokenizer.decode(ids[1:-1]) == "In: What action should the robot take to push the red block?\nOut:"


@pytest.mark.parametrize("config", [GeneralistConfig.toy(), GeneralistConfig.published()], ids=["toy", "published"])
def test_byte_tokens_keep_clear_of_special_and_action_tokens(config: GeneralistConfig) -> None:
    tokens = config.tokens
    text = "".join(chr(code) for code in range(1, 0x250)) + "机器人 🤖"
    tokenizer = byte_tokenizer(tokens)
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokens.bos
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids[1:]) == text
    reserved = {tokens.bos, tokens.eos, tokens.pad, tokens.separator, *range(tokens.action_start, tokens.action_end)}
    assert not reserved & set(ids[1:])
    assert max(tokenizer.get_vocab().values()) < config.language.vocabulary


def test_word_tokens_make_short_prompts_of_the_evaluations_sentences_and_still_know_any_text() -> None:
    tokens = GeneralistConfig.playtable().tokens
    tokenizer = word_tokenizer(tokens)
    assert word_tokenizer(tokens).to_str() == tokenizer.to_str()
    assert max(tokenizer.get_vocab().values()) < tokens.action_start
    processor = Processor(ImageConfig(), tokens, tokenizer)
    for sentence in evaluation_sentences().values():
        ids = processor.prompt(sentence)
        assert (ids[0], ids[-1]) == (tokens.bos, tokens.separator)
        words = len(prompt_text(sentence).replace("?", " ?").replace(":", " :").split())
        assert len(ids) == words + 3  # begin, the new line, separator
        assert tokenizer.decode(ids[1:-1]) == prompt_text(sentence)
    odd = "Wipe the café's Größe, 机器人 🤖"
    assert tokenizer.decode(tokenizer.encode(odd).ids[1:]) == odd


def test_word_tokens_need_their_special_ids() -> None:
    with pytest.raises(ValueError, match="expected pad, bos, eos and separator to be 0 to 3"):
        word_tokenizer(GeneralistConfig.published().tokens)
