# ruff: noqa: RUF001  (letters of other scripts are what is tested)
"""A list of expressions: its file, how they are spelled, and which texts hold one."""

import itertools

import pytest

from safelocus.errors import WordListError
from safelocus.wordlist import WordList, fold, num_words

WORDS = WordList.of(["zorbex", "red kite", "glint-40", "sell", "Straße", "zorbex mini"])


def found(text, words=WORDS):
    return [words.expressions[number] for number in words.find(text)]


@pytest.mark.parametrize(
    "text",
    [
        "zorbex", "Zorbex!", "ZORBEX,", "(zorbex)", "my_zorbex_key", "zorbex's", "zorbex\u2019s", "**zorbex**",
        "z0rbex", "zorb3x", "Z0RB3X", "z-o-r-b-e-x", "z.o.r.b.e.x", "z o r b e x", "zorbex\n",
        "z\u00b7o\u00b7r\u00b7b\u00b7e\u00b7x",
        "zor-bex", "zorbexes", "Zorbexed", "zorbexing", "\uff5a\uff4f\uff52\uff42\uff45\uff58", "zo\u00adrbex",
        "z\u200bo\u200drbex", "zo\u0301rbex", "\x1b[31mzor\x1b[1mbex\x1b[0m", "zor\x00bex", "\u202exebroz\u202c",
        "\u2066zorbex\u2069", "z\u043erb\u0435x", "\U0001d433\U0001d428\U0001d42b\U0001d41b\U0001d41e\U0001d431",
        "\x1b]8;;http://x\x07zorbex\x1b]8;;\x07", "\x1b]zorbex", "\x1bzorbex", "zorbex\U0001f600",
    ],
)  # fmt: skip
def test_spellings_are_found(text):
    assert found(text) == ["zorbex"]
    assert found(f"It is {text} again") == ["zorbex"]


@pytest.mark.parametrize(
    "text",
    [
        "", "zorb", "zorbexian", "azorbex", "zorbex2", "zor bex", "20r83x", "z0rb", "zorbe x ",
        "redkites5", "re d kite",
        "red, kite", "red. Kite", "infrared kites5", "5311", "5e11", "sel!", "glint-4", "glint-400",
        "\u0437\u043e\u0440",
    ],
)  # fmt: skip
def test_other_words_are_not(text):
    assert found(text) == []


def test_letters_that_look_alike_hide_no_word_however_many_they_are():
    words = WordList.of(["paypal", "cocoa", "sell"])
    assert found("раураl, сосоа, раур41", words) == ["paypal", "cocoa", "paypal"]
    assert found("5е11, ѕеll", words) == ["sell"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red kite, RED-KITES and a redkite", ["red kite"] * 3),
        ("r e d k i t e", ["red kite"]),
        ("glint 40 or GLINT40", ["glint-40"] * 2),
        ("he s3lls, sold; $ell", ["sell"] * 2),
        ("STRASSE, strasse und Stra\u00dfe", ["Straße"] * 3),
        ("the zorbex mini and the zorbex", ["zorbex mini", "zorbex"]),
        ("zorbex zorbex", ["zorbex"] * 2),
    ],
)
def test_each_place_counts_once_and_for_the_longest(text, expected):
    assert found(text) == expected


def test_other_scripts():
    words = WordList.of(["東京", "Москва", "كتاب", "서울", "ไทย", "naïve café"])
    assert found("我在東京住", words) == ["東京"]
    assert found("МОСКВА! москва", words) == ["Москва"] * 2
    assert found("Москвау, Москваб", words) == []
    assert found("هذا كتاب جديد", words) == ["كتاب"]
    assert found("서울에서 옛서울", words) == ["서울"]
    assert found("ประเทศไทยสวย", words) == ["ไทย"]
    assert found("a NAIVE cafe\u0301", words) == ["naïve café"]


def test_every_spelling_is_found_as_its_own_expression():
    for number, spellings in enumerate(WORDS.spellings):
        assert spellings[0] == WORDS.expressions[number]
        assert len(set(spellings)) == len(spellings) > 10
        for spelling in spellings:
            for before, after in itertools.product(("", "so ", "("), ("", ".", " it")):
                assert WORDS.find(before + spelling + after) == [number]


def test_spellings_by_enumeration():
    (spellings,) = WordList.of(["Rye"]).spellings
    forms = ["Rye", "Ryes", "Ryed", "Rying"]
    expected = {case(form) for form in forms for case in (str, str.lower, str.upper, str.capitalize)}
    expected |= {case(s.join("Rye")) for s in " -." for case in (str, str.lower, str.upper, str.capitalize, str.title)}
    expected |= {"Ry3", "ry3", "RY3"}
    assert set(spellings) == expected
    inflected = {
        "box": {"boxes", "boxed", "boxing"}, "try": {"tries", "tried", "trying"}, "stop": {"stopped", "stopping"},
        "bake": {"bakes", "baked", "baking"}, "play": {"plays", "played"}, "red kite": {"red kites"},
    }  # fmt: skip
    for word, forms in inflected.items():
        assert forms <= set(WordList.of([word]).spellings[0])
    assert {s.lower() for s in WordList.of(["A1"]).spellings[0]} == {"a1"}  # too short to stand apart
    assert "cafe" in WordList.of(["café"]).spellings[0]


def test_reading_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeff# brands\r\n\r\n  zorbex \r\nC#4\r\nZORBEX\r\n#red\nred  kite".encode())
    words = WordList.read(file)
    (brackets := tmp_path / "brackets.txt").write_text("[2024]\nzorbex\n")
    assert len(WordList.read(brackets)) == 2
    assert (words.expressions, words.lines) == (("zorbex", "C#4", "red  kite"), (3, 4, 7))
    assert words.source == str(file)
    assert "zorbex" not in repr(words)
    assert words.hash == WordList.of(["red  kite", "C#4", "zorbex"]).hash != WordList.of(["zorbex"]).hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"", "holds no expression"),
        (b"# only\n\n", "holds no expression"),
        (b"zorbex\nx\n", "line 2: an expression of fewer than two letters or digits"),
        ("zorbex\n\u200b!?\n".encode(), "line 2: an expression of fewer than two"),
        (b"z" * 101, "line 1: an expression of 101 characters; expected at most 100"),
        ("zörbex".encode("latin-1"), "not UTF-8"),
        (b'{"prompt": "zorbex"}\n{"prompt": "quen"}\n', "JSON; expected a text file"),
        (b'[\n  "zorbex"\n]\n', "JSON; expected a text file"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WordListError, match=message) as caught:
        WordList.read(file)
    assert str(file) in str(caught.value)
    assert "zorbex" not in str(caught.value)


def test_a_text_is_no_list():
    with pytest.raises(WordListError, match="several expressions"):
        WordList.of("zorbex")


def test_words_are_counted_as_a_person_would():
    assert num_words("One, two; don't\u200b 3") == 5
    assert num_words("我在東京") == 4
    assert num_words("") == 1
    assert fold("\u202eabc\u202c A\u0300") == "cba a"
