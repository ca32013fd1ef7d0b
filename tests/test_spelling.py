from itertools import pairwise

import pytest

from safelocus.objective.spelling import join, spell_vocabulary
from tiny_targets import TEXT, byte_level, metaspace


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte-level", "metaspace"])
def test_pieces_spell_the_text(tokenizer):
    spelled = spell_vocabulary(tokenizer)
    for text in TEXT:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined, spans = join([spelled[i] for i in ids])
        assert joined.lstrip() == text
        assert len(spans) == len(ids)
        # spans cover the text, in order
        assert spans[0][0] == 0
        assert spans[-1][1] == len(joined)
        assert all(left <= right for left, right in spans)
        assert all(later[0] <= earlier[1] for earlier, later in pairwise(spans))


def test_special_tokens_have_no_spelling():
    tokenizer = byte_level()
    assert spell_vocabulary(tokenizer)[tokenizer.eos_token_id] is None


def test_half_a_character_spans_the_whole_character():
    pieces = [b"a", "😀".encode()[:2], "😀".encode()[2:], None, b"b"]
    assert join(pieces) == ("a😀b", [(0, 1), (1, 2), (1, 2), (2, 2), (2, 3)])


def test_invalid_bytes_become_one_replacement_character():
    text, spans = join([b"a", b"\xff", b"b", "é".encode()[:1]])
    assert text == "a\ufffdb\ufffd"
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4)]
