"""The pocket model's own CLIP vocabulary: the 256 bytes and a merge for every word its captions use.

The files are those of any CLIP tokenizer (byte-pair encoding, "Neural machine translation of rare words with subword
units", arXiv:1508.07909), so transformers reads them; a word outside the vocabulary falls apart into letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
# Beyond the words of the drawn world: what users may reasonably write in front of or between them.
COMMON_WORDS = (
    "a an the of and with in on at by style pixel art bit picture drawing painting photo view old new big small"
)


def byte_alphabet() -> list[str]:
    """The printable stand-ins for the 256 byte values, in the order of GPT-2's table, on which CLIP's BPE works."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]


def build_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Give every word a chain of merges that ends in one token.

    Args:
        words: lower-case ASCII words; the order settles the token ids.

    Returns:
        Token -> id, and the merges in order of priority. Ids: bytes, bytes at a word's end, merges, BOS, EOS.
    """
    alphabet = byte_alphabet()
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:  # earlier merges come first when the tokenizer runs
            parts = _apply(merge, parts)
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            merges.append(merge)
            parts = _apply(merge, parts)
    tokens += [left + right for left, right in merges]
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}, merges


def _apply(merge: tuple[str, str], parts: list[str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == merge:
            out[-1] += part
        else:
            out.append(part)
    return out


def write_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write vocab.json, merges.txt and the two settings files into `folder`; return the size of the vocabulary."""
    vocabulary, merges = build_vocabulary(words)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=True) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    settings = {**special, "model_max_length": MAX_LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(vocabulary)
