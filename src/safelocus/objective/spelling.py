"""How each token of a vocabulary is spelled, in bytes.

Two tokenizers can only be compared through text, and text only exactly through bytes: a token may be
half a character. Handles byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece-like vocabularies
(Llama 2, Gemma: `▁` for a space, `<0xAB>` for raw bytes) and WordPiece (`##` continues a word).
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def spell_vocabulary(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every token id in [0, len(tokenizer)); None for special tokens and unused ids."""
    special = set(tokenizer.all_special_ids)
    added = dict(tokenizer.added_tokens_decoder)
    special |= {i for i, token in added.items() if token.special}
    pieces: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    spell = _speller(tokenizer)
    spelled: list[bytes | None] = []
    for i, piece in enumerate(pieces):
        if piece is None or i in special:
            spelled.append(None)
        elif i in added:  # added tokens are literal text, whatever the model's alphabet
            spelled.append(piece.encode())
        else:
            spelled.append(spell(piece))
    return spelled


def join(pieces: Sequence[bytes | None]) -> tuple[str, list[tuple[int, int]]]:
    """Text of consecutive tokens and each token's character span [start, end) in it.

    Bytes that are no valid UTF-8 become U+FFFD. A token that holds only a part of a character spans
    that whole character; a special token spans nothing.
    """
    data = b"".join(piece or b"" for piece in pieces)
    text, starts = _decode(data)  # starts[i]: byte at which character i starts; one more entry at the end
    character_of = []  # byte -> character
    for i in range(len(text)):
        character_of += [i] * (starts[i + 1] - starts[i])
    spans, position = [], 0
    for piece in pieces:
        end = position + len(piece or b"")
        if end == position:
            here = character_of[position] if position < len(data) else len(text)
            spans.append((here, here))
        else:
            spans.append((character_of[position], character_of[end - 1] + 1))
        position = end
    return text, spans


def _decode(data: bytes) -> tuple[str, list[int]]:
    """UTF-8 with U+FFFD for each invalid stretch, and the byte at which each character starts."""
    text, starts, position = [], [], 0
    while position < len(data):
        try:
            valid, bad_end = data[position:].decode(), len(data)
            valid_end = len(data)
        except UnicodeDecodeError as error:
            valid, valid_end = data[position : position + error.start].decode(), position + error.start
            bad_end = position + error.end
        for character in valid:
            starts.append(position)
            text.append(character)
            position += len(character.encode())
        if bad_end > valid_end:
            starts.append(valid_end)
            text.append("\ufffd")
        position = bad_end
    return "".join(text), [*starts, len(data)]


def _speller(tokenizer: Any) -> Any:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = _kinds(state.get("decoder")) | _kinds(state.get("pre_tokenizer"))
    if "ByteLevel" in kinds:
        table = _byte_level_alphabet()
        return lambda piece: b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)
    if state["model"]["type"] == "WordPiece":
        return lambda piece: piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()

    def sentencepiece(piece: str) -> bytes:
        if match := _BYTE_TOKEN.match(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    return sentencepiece


def _kinds(part: Any) -> set[str]:
    """Types named anywhere in a (possibly sequential) tokenizer component."""
    if isinstance(part, dict):
        nested = [_kinds(value) for value in part.values()]
        return {str(part.get("type"))}.union(*nested)
    if isinstance(part, list):
        return set().union(*(_kinds(value) for value in part))
    return set()


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
