"""Tokenizers of models that ship none, and the text that every model is prompted with."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from robodual.generalist.config import TokenConfig
from robodual_client.calvin.annotations import load as evaluation_sentences


def prompt_text(instruction: str) -> str:
    """OpenVLA's prompt (prismatic/models/backbones/llm/prompting/base_prompter.py)."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


def byte_tokenizer(tokens: TokenConfig) -> Tokenizer:
    """A tokenizer of one token a byte of UTF-8, for models without published tokenizer files.

    The bytes take the 256 lowest ids that no special or action token has. Like Llama's, it puts BOS in front.
    """
    names = {tokens.pad: "<pad>", tokens.bos: "<s>", tokens.eos: "</s>", tokens.separator: "<separator>"}
    taken = names.keys() | range(tokens.action_start, tokens.action_end)
    free = (token for token in range(tokens.action_end + 256) if token not in taken)
    vocabulary = {name: token for token, name in names.items()}
    vocabulary |= {character: next(free) for character in sorted(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.bos)])
    return tokenizer


def word_tokenizer(tokens: TokenConfig) -> Tokenizer:
    """A tokenizer in which every word of the prompts for CALVIN's 34 evaluation sentences is one token.

    Byte-pair encoding (arXiv 1508.07909) with merges learnt from those prompts, so that any other text is still
    encoded, by its bytes at worst. It takes the ids below the action tokens; special tokens must be the ids 0 to 3.

    Raises:
        ValueError: if they are not.
    """
    special = {tokens.pad: "<pad>", tokens.bos: "<s>", tokens.eos: "</s>", tokens.separator: "<separator>"}
    if sorted(special) != [0, 1, 2, 3]:
        raise ValueError(f"tokens: expected pad, bos, eos and separator to be 0 to 3, got {sorted(special)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompts: Sequence[str] = [prompt_text(sentence) for sentence in evaluation_sentences().values()]
    trainer = trainers.BpeTrainer(
        vocab_size=tokens.action_start,
        special_tokens=[special[token] for token in range(4)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.bos)])
    return tokenizer
