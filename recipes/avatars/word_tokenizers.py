"""Tokenizers of whole words for the avatars' captions: one token for each word that names something.

Letters in other case, punctuation, synonyms and unknown words are dealt with before the words are looked up: a synonym
becomes the word that it stands for, and any other word vanishes. So every prompt gets tokens that the models know.
"""

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from davae.data.avatar_captions import SYNONYMS, read_words, vocabulary

PROMPT_TOKENS = 20
"""The length of both tokenizers' prompts; the longest caption has 16 words, and special tokens are two at most."""

CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
T5_SPECIAL = ("<pad>", "</s>")


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Words between a start and an end, as CLIP's text encoders want them; the end is the padding, too."""
    start, end = CLIP_SPECIAL
    words = _word_tokenizer(CLIP_SPECIAL, unknown=end)
    words.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=PROMPT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Words before an end, as T5's encoder wants them."""
    padding, end = T5_SPECIAL
    words = _word_tokenizer(T5_SPECIAL, unknown=padding)
    words.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=end,
        pad_token=padding,
        unk_token=padding,
        clean_up_tokenization_spaces=False,
    )


def token_ids(prompts: Sequence[str], t5_tokens: int) -> tuple[Tensor, Tensor]:
    """The padded tokens that the two tokenizers give, CLIP's and T5's, in a tenth of their time."""
    first = len(CLIP_SPECIAL)  # both tokenizers have two special tokens before the words
    numbers = {word: number for number, word in enumerate(vocabulary(), first)}
    start, end, padding = 0, 1, 0

    clip = torch.full((len(prompts), PROMPT_TOKENS), end)
    t5 = torch.full((len(prompts), t5_tokens), padding)
    for row, prompt in enumerate(prompts):
        words = [numbers[word] for word in read_words(prompt)[0]]
        clip_row = [start, *words[: PROMPT_TOKENS - 2], end]
        t5_row = [*words[: t5_tokens - 1], end]
        clip[row, : len(clip_row)] = torch.tensor(clip_row)
        t5[row, : len(t5_row)] = torch.tensor(t5_row)
    return clip, t5


def _word_tokenizer(special: tuple[str, str], *, unknown: str) -> Tokenizer:
    """The special tokens first, then the vocabulary in its order."""
    tokens = [*special, *vocabulary()]
    words = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=unknown))

    synonyms = [normalizers.Replace(Regex(rf"\b{word}\b"), replacement) for word, replacement in SYNONYMS.items()]
    known = "|".join(vocabulary())
    words.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z]+"), " "),
            *synonyms,
            normalizers.Replace(Regex(rf"\b(?!(?:{known})\b)[a-z]+\b"), " "),
        ]
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words
