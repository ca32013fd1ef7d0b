"""Expressions that must not come: a list of them, how else they are spelled, and where a text holds one.

    file -> WordList -> `spellings`, finitely many, for what asks how likely they are
                     -> `find`, which knows any mixture of them, in a text that is there

An expression stands for itself and for, as they combine:

    case          zorbex  Zorbex  ZORBEX
    inflection    zorbexes, zorbexed, zorbexing    (English; of a last word of three or more ASCII letters)
    signs         z0rbex, zorb3x    (leetspeak; half of the letters stay what they are)
    apart         z-o-r-b-e-x  z.o.r.b.e.x  z o r b e x
    joints        red kite  red-kite  red_kite  redkite
    marks         café  cafe

`find` reads text as a person sees it: compatible forms (fullwidth letters), letters of other scripts that look the
same, invisible characters, marks of direction and terminal sequences make no difference. It finds whole words alone;
in scripts that are written without spaces any place will do, and in Hangul whatever follows.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from safelocus.errors import WordListError
from safelocus.run.identity import digest

_LONGEST = 100  # characters of an expression
_FEWEST = 3  # letters of an expression from which it may stand apart or in signs
_SIGNS = {
    "a": "4@", "b": "8", "e": "3", "g": "9", "i": "1!", "l": "1|", "o": "0", "s": "5$", "t": "7+", "z": "2",
}  # fmt: skip
_LOOKALIKES = {  # Cyrillic, Greek, Armenian
    "a": "\u0430\u03b1", "c": "\u0441\u03f2", "e": "\u0435\u03b5", "h": "\u04bb", "i": "\u0456\u03b9", "j": "\u0458",
    "k": "\u043a\u03ba", "n": "\u0578", "o": "\u043e\u03bf\u0585",
    "p": "\u0440\u03c1", "s": "\u0455", "u": "\u03c5\u057d", "v": "\u03bd", "x": "\u0445\u03c7", "y": "\u0443",
}  # fmt: skip
_LATIN = {other: letter for letter, others in _LOOKALIKES.items() for other in others}
_HYPHENS = "-_.\u00b7\u2022\u2010-\u2015\u2212"  # of a class in a pattern
_WITHIN = f"[{_HYPHENS}]?"  # between two letters of a word
_BETWEEN = rf"(?:\s{{1,3}}|[{_HYPHENS}]?)"  # between two words of an expression
_APART = rf"(?:\s{{1,3}}|\s?[{_HYPHENS}*]\s?)"  # between letters that stand apart
_JOINT = re.compile(r"[\s\-_\u2010-\u2015]+")

_TERMINAL = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|[ -/]+[0-~])")
_REVERSED = re.compile("\u202e([^\u202c\n]*)\u202c?")
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u034f\u115f\u1160\u17b4\u17b5\ufe00-\ufe0f\u20d0-\u20ff]")
_MARKS = re.compile("(?<=[a-zA-Z])[\u0300-\u036f]+")
# written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, ideographs
_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HANGUL = "\uac00-\ud7af"  # particles follow
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


@dataclass(frozen=True, kw_only=True)
class WordList:
    """Expressions that must not come. Make one with `WordList.of` or `WordList.read`.

    Attributes:
        expressions: each once, as they were written; not shown.
        lines: where each stands in its file.
        source: the file; None where they came from memory.

    Example:
        >>> words = WordList.of(["zorbex", "red kite"])
        >>> words.find("Z0rbex, not zorbexian; two red-kites")
        [0, 1]
    """

    expressions: tuple[str, ...]
    lines: tuple[int, ...]
    source: str | None = None

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a UTF-8 file with an expression on each line; empty lines and those that begin with `#` are comments.

        Raises:
            WordListError: it cannot be read, holds no expression, or one that would be found everywhere or nowhere.
        """
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            raise WordListError(
                f"{path}: the list of expressions cannot be read ({error.strerror or error}); expected a text file "
                "with one expression on each line"
            ) from error
        except UnicodeDecodeError as error:
            raise WordListError(f"{path}: not UTF-8 text ({error}); save the list of expressions as UTF-8") from error
        if _is_json(text):
            raise WordListError(f"{path}: JSON; expected a text file with one expression on each line")
        lines = enumerate(text.split("\n"), start=1)
        return cls._of([(n, line.strip()) for n, line in lines if not line.lstrip().startswith("#")], str(path))

    @classmethod
    def of(cls, expressions: Iterable[str]) -> Self:
        """A list in memory; WordListError as for `read`."""
        if isinstance(expressions, str):
            raise WordListError("expected several expressions, found one text; give a list, or read a file")
        return cls._of([(n, each.strip()) for n, each in enumerate(expressions, start=1)], None)

    @classmethod
    def _of(cls, lines: Sequence[tuple[int, str]], source: str | None) -> Self:
        kept: dict[str, tuple[str, int]] = {}
        for line, text in lines:
            if not text:
                continue
            where = f"{source or 'the list of expressions'}, line {line}"  # the expression itself may be a secret
            if len(text) > _LONGEST:
                raise WordListError(
                    f"{where}: an expression of {len(text):,} characters; expected at most {_LONGEST}, one expression "
                    "on each line"
                )
            if sum(map(str.isalnum, fold(text))) < 2:
                raise WordListError(
                    f"{where}: an expression of fewer than two letters or digits would be found everywhere or nowhere; "
                    "leave it out, or begin the line with # if it is a comment"
                )
            kept.setdefault(" ".join(_JOINT.split(fold(text))), (unicodedata.normalize("NFC", text), line))
        if not kept:
            raise WordListError(f"{source or 'the list'}: holds no expression; expected one on each line")
        return cls(
            expressions=tuple(text for text, _ in kept.values()), lines=tuple(line for _, line in kept.values()),
            source=source,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.expressions)

    def __repr__(self) -> str:
        return f"WordList({len(self)} expressions, source={self.source!r})"  # which may be secret

    @property
    def hash(self) -> str:
        """Of the expressions, whatever their order. That of a short list can be guessed."""
        return digest(sorted(self.expressions))

    @cached_property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """Of each expression the ways in which an answer may write it, itself first; each in one case after another."""
        return tuple(
            tuple(dict.fromkeys([text, *(each for each in _spell(text) if self._finds(each, number))]))
            for number, text in enumerate(self.expressions)
        )

    def find(self, text: str) -> list[int]:
        """The numbers of the expressions in a text, in its order, as often as they stand there; none within another."""
        read = fold(text)
        found = ((self._order[(match.lastindex or 0) - 1], match.group()) for match in self._pattern.finditer(read))
        return [number for number, written in found if _keeps_half(fold(self.expressions[number]), written)]

    def _finds(self, text: str, number: int) -> bool:
        return self.find(text) == [number]

    @cached_property
    def _order(self) -> list[int]:
        """Longest first: what is within another does not count by itself."""
        return sorted(range(len(self)), key=lambda number: -len(self.expressions[number]))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(f"({_pattern_of(self.expressions[number])})" for number in self._order))


def _is_json(text: str) -> bool:
    """Whether a text, or its first line, is an object of JSON, or an array of more than numbers."""
    for part in (text, text.lstrip().split("\n", 1)[0]):
        try:
            found = json.loads(part)
        except ValueError:
            continue
        return isinstance(found, dict) or (
            isinstance(found, list) and any(isinstance(x, str | list | dict) for x in found)
        )
    return False


def fold(text: str) -> str:
    """Text as it is compared: as a person sees it, without case and accents."""
    text = _REVERSED.sub(lambda match: match[1][::-1], _TERMINAL.sub("", text))
    if not text.isascii():
        text = "".join(character for character in text if unicodedata.category(character) != "Cf")
        text = without_marks(unicodedata.normalize("NFKC", text))
    return _CONTROL.sub("", text).casefold()


def without_marks(text: str) -> str:
    """Letters of the Latin alphabet without their accents; those of other scripts are letters of their own."""
    return unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", text)))


def num_words(text: str) -> int:
    """Words, or characters of scripts that are written without spaces; at least one."""
    return max(1, len(_WORD.findall(fold(text))))


def _inflected(text: str) -> list[str]:
    """The text and, where its last word is of three or more ASCII letters, that word inflected."""
    word = _JOINT.split(text)[-1]
    if not (word.isascii() and word.isalpha() and len(word) >= _FEWEST):
        return [text]
    lower, start = word.lower(), text
    if lower.endswith("e"):
        endings = [(0, "s"), (0, "d"), (1, "ing")]
    elif re.search("[^aeiou]y$", lower):
        endings = [(1, "ies"), (1, "ied"), (0, "ing")]
    else:
        endings = [(0, "es" if re.search("(?:[sxz]|[cs]h)$", lower) else "s"), (0, "ed"), (0, "ing")]
        if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", lower):  # stop, stopped
            endings += [(0, f"{lower[-1]}ed"), (0, f"{lower[-1]}ing")]
    return [text, *(start[: len(start) - cut] + ending for cut, ending in endings)]


def _spell(text: str) -> Iterable[str]:
    """Candidates, of which those are spellings that can be found."""
    bases = dict.fromkeys([text, without_marks(text)])
    for base in bases:
        for form in _inflected(base):
            for joint in (" ", "-", "_", "") if len(_JOINT.split(form)) > 1 else (None,):
                yield from _cases(form if joint is None else joint.join(_JOINT.split(form)))
        letters = [letter for letter in base if not _JOINT.fullmatch(letter)]
        for separator in (" ", "-", "."):
            yield from _cases(separator.join(letters))
        present = [letter for letter in _SIGNS if letter in base.lower()]
        for tables in (
            *({one: sign} for one in present for sign in _SIGNS[one]),
            {one: _SIGNS[one][0] for one in present},
        ):
            table = str.maketrans({case: sign for one, sign in tables.items() for case in (one, one.upper())})
            yield from _cases(base.translate(table))


def _cases(text: str) -> list[str]:
    capitals = re.sub(r"[^\W\d_]+", lambda word: word[0][:1].upper() + word[0][1:], text.lower())
    return [text, text.lower(), text.upper(), text[:1].upper() + text[1:].lower(), capitals]


def _pattern_of(expression: str) -> str:
    forms = sorted(dict.fromkeys(map(fold, _inflected(expression))), key=len, reverse=True)
    first, last = forms[-1][0], forms[-1][-1]
    before = "" if re.match(f"[{_UNSPACED}]", first) else r"(?<![^\W_])"
    after = "" if re.match(f"[{_UNSPACED}{_HANGUL}]", last) else r"(?![^\W_])"
    written = [each for form in forms for each in (_written(form), _written_apart(form)) if each]
    return f"{before}(?:{'|'.join(written)}){after}"


def _written(form: str) -> str:
    plain = sum(map(str.isalpha, form)) < _FEWEST
    words = [word for word in _JOINT.split(form) if word]
    letters = [[re.escape(letter) if plain else _sign(letter) for letter in word] for word in words]
    letters[-1][-1] = re.escape(words[-1][-1]) if plain else _sign(words[-1][-1], at_end=True)
    return _BETWEEN.join(("" if plain else _WITHIN).join(word) for word in letters)


def _written_apart(form: str) -> str | None:
    letters = [letter for word in _JOINT.split(form) for letter in word]
    return _APART.join(map(_sign, letters)) if len(letters) >= _FEWEST else None


def _sign(letter: str, *, at_end: bool = False) -> str:
    """A letter and what stands for it; at the end of a word no mark does: that is the sentence's."""
    signs = [sign for sign in _SIGNS.get(letter, "") if not at_end or sign.isalnum()]
    others = "".join(map(re.escape, [letter, *signs, *_LOOKALIKES.get(letter, "")]))
    return re.escape(letter) if len(others) == 1 else f"[{others}]" if letter.isalpha() else re.escape(letter)


def _keeps_half(expression: str, written: str) -> bool:
    """Whether at least half of the letters are the expression's own or look so, and no signs: 5311 is no "sell"."""
    letters = [letter for letter in expression if letter.isalpha()]
    return 2 * sum(letter in letters or _LATIN.get(letter) in letters for letter in written) >= len(letters)
