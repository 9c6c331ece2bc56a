"""Tokenizers made on the spot: a closed vocabulary of whole words, or byte-level BPE trained on text.

Both carry the ChatML template and its special tokens, and are saved and loaded in hub format.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agentgym.errors import ModelError
from agentgym.modeling.build import check_folder
from agentgym.modeling.templates import CHATML, MARKS, ROLES

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|im_end|>"
SPECIAL = (PAD, UNKNOWN, "<|im_start|>", END)
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Any one of these makes a folder hold a tokenizer; without one, transformers would quietly make an empty one."""


def closed_vocabulary(words: Iterable[str], *, punctuation: bool = False) -> Any:
    """A tokenizer with one token for each word; text splits at white space, other words become <unk>.

    Ids follow the order of `words` (repetitions are dropped) after special tokens, marks and role names. Decoding
    joins words with single blanks, so line breaks do not survive. `punctuation` also splits at ASCII punctuation.
    """
    known = dict.fromkeys((*SPECIAL, *MARKS, *ROLES, *words))
    broken = [w for w in known if not w or w.split() != [w]]
    if broken:
        raise ModelError(f"a word of a closed vocabulary is not empty and holds no white space; got {broken[0]!r}")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=UNKNOWN))
    splits = [pre_tokenizers.WhitespaceSplit(), *([pre_tokenizers.Punctuation()] if punctuation else [])]
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return _wrap(core)


def train_bpe(texts: Iterable[str], size: int) -> Any:
    """Byte-level BPE of at most `size` tokens trained on `texts`: no unknown words, any text survives a round trip."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL) + len(MARKS)
    if size < least:
        raise ModelError(f"a byte-level vocabulary needs at least {least} tokens (every byte, every mark); got {size}")
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(MARKS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _wrap(core)


def _wrap(core: Tokenizer) -> Any:
    """As a transformers tokenizer: marks are whole tokens but ordinary text, special tokens are neither."""
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def load(path: str | Path) -> Any:
    """The tokenizer of a folder in hub format; one clear error where there is none."""
    folder = check_folder(path)
    if not any((folder / name).is_file() for name in FILES):
        raise ModelError(f"{str(path)!r} holds no tokenizer ({', '.join(FILES)}); save one with the model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(path)!r} holds no tokenizer that can be read: {error}") from error
