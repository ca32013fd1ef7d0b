"""What a response answered, and whether that is right: strict readings, `None` where there is none.

    exact     the whole response is the answer (case, white space, quotes and a final full stop aside)
    contains  the answer occurs in the response as whole words
    numeric   the number the response ends up with equals the answer ("4.5" is never 45)
    choice    the response names one of the choices, by word or letter, and no other

A reading that is not certain is none at all, and counts as wrong: a model earns nothing by naming every
choice. Pure functions of text.
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal

Match = Literal["exact", "numeric", "choice", "contains"]
MATCHES: tuple[Match, ...] = ("exact", "numeric", "choice", "contains")

# Not a number when glued to a word before it (H2O), part of a version (1.2.3), a time or a ratio (10:30, 3/4).
_NUMBER = re.compile(
    r"(?<![\w.,:/])(?P<sign>[-+]?)[$€£]?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<rest>\.\d+)?(?P<exponent>[eE][-+]?\d+)?"
    r"(?![.,:/]?\d)"
)
_ANSWER_IS = re.compile(
    r"\b(?:answer(?:\s+to\s+[^.!?:=\n]{1,80}?)?|correct (?:option|choice))\b"
    r"(?:\s+(?:is|was|equals|would be)\b|\s*[:=])[\s:*]*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_QUOTES = " \"'`*\u2018\u2019\u201c\u201d"  # and markup
_DASHES = "\u2013\u2014\\-"
_MARK = "####"  # GSM8K
_STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_OPTION = re.compile(r"\A(?:option|choice)\s+", re.IGNORECASE)
_IS_RIGHT = re.compile(r"(?i:option|choice)\s+\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b")
_REASON = r"[,;]?\s+(?:because|since)\b"
_FUNCTION_WORDS = {"yes", "no", "maybe", "none", "all"}  # stand in sentences without being an answer
_NEGATED = r"(?:\b(?:not|no|never|nor|neither|cannot)|n['\u2019]t)\s+(?:(?:really|about|an?|the|in|of)\s+)*"


def normalised(text: str) -> str:
    """The form in which answers are compared: NFKC, case folded, white space collapsed, without quotes around it
    and without a final full stop.

    >>> normalised(' "The  Cat". ')
    'the cat'
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while text != (text := text.strip(_QUOTES).removesuffix(".")):
        pass
    return text


def read_number(response: str) -> Decimal | None:
    """The number a response ends up with: after `####`, in a box, after "the answer is", else the last one.

    Where `####` opens something else (a heading), only a box or such a phrase says what the answer is.

    >>> read_number("16 - 3 = 13, so she sells 1,300 eggs.")
    Decimal('1300')
    >>> read_number("#### 4.5")
    Decimal('4.5')
    """
    response = _STYLED.sub(r"\1", response.replace("\u2212", "-").replace("{,}", ","))
    marked = [part.strip().split("\n", 1)[0].lstrip("*_") for part in response.split(_MARK)[1:]]
    for line in reversed(marked):
        if (found := _NUMBER.match(line)) and not re.match(r"[*_]*[.):]\s*\S", line[found.end() :]):  # "1. Add them"
            return _value(found, line)
    if boxed := _BOXED.findall(response):
        result = boxed[-1].rpartition("=")[2]
        return None if "{" in result else _first_number(result)
    for phrase in reversed(list(_ANSWER_IS.finditer(response))):
        # up to the end of the sentence; of "3 * 6 = 18" the result counts
        sentence = re.split(r"[.!?](?:\s|$)|\n", response[phrase.end() :], maxsplit=1)[0]
        if (number := _first_number(sentence.rpartition("=")[2])) is not None:
            return number
    numbers = [] if marked else list(_NUMBER.finditer(response))
    return _value(numbers[-1], response) if numbers else None


def parse_number(text: str) -> Decimal | None:
    """`text` as one number and nothing else; None where it is anything else.

    >>> parse_number("$1,234.50"), parse_number("4.5 apples")
    (Decimal('1234.50'), None)
    """
    text = text.strip().replace("\u2212", "-")
    found = _NUMBER.fullmatch(text.removesuffix("%"))
    return None if found is None else _value(found, text)


def read_choice(response: str, choices: Sequence[str], *, letters: bool = False) -> str | None:
    """The one choice that a response names.

    Of a box what it holds; else in order: what "the answer is" names; what the response opens with; the only choice
    named anywhere, but for one behind a "not" and for words such as "no", which sentences hold without an answer.
    Words always count; letters ("B", "(B)", "B.") where `letters` says that the prompt offered them.

    >>> read_choice("Sports. The article is about tennis.", ["World", "Sports"])
    'Sports'
    >>> read_choice("Not World but Sports", ["World", "Sports"]) is None
    True
    """
    text = _STYLED.sub(r"\1", unicodedata.normalize("NFKC", response)).strip()
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    for phrase in reversed(list(_ANSWER_IS.finditer(text))):
        said = text[phrase.end() :]
        for each in (said, _OPTION.sub("", said)):
            if (choice := _opening(each, choices, letters)) is not None:
                return choice
    if (choice := _opening(text, choices, letters)) is not None:
        return choice
    if letters and (found := _IS_RIGHT.match(text)) and ord(found[1]) - 65 < len(choices):
        return choices[ord(found[1]) - 65]
    named = {choice for choice in choices if re.search(_word(choice), text, re.IGNORECASE)}
    # "New York" names no "York": a choice inside a longer one that is named does not count by itself
    for longer in sorted(named, key=len, reverse=True):
        rest = re.sub(_word(longer), " ", text, flags=re.IGNORECASE)
        named -= {other for other in named if other != longer and not re.search(_word(other), rest, re.IGNORECASE)}
    if letters:
        named |= {choices[ord(letter) - 65] for letter in re.findall(_letters(len(choices)), text)}
    if len(named) != 1 or (only := named.pop()).casefold() in _FUNCTION_WORDS:
        return None
    written = rf"(?:(?i:{_word(only)})|\({chr(65 + list(choices).index(only))}\))"
    return None if re.search(rf"(?i:{_NEGATED}){written}", text) else only


def extract(
    response: str, *, match: Match, answer: str, choices: Sequence[str] = (), letters: bool = False
) -> str | None:
    """What the response answered, as text, by the kind of `match`; None where it cannot be told."""
    if match == "numeric":
        number = read_number(response)
        return None if number is None else format(number, "f")
    if match == "choice":
        return read_choice(response, choices, letters=letters)
    if match == "contains":
        pattern = rf"(?<!\w){re.escape(normalised(answer))}(?!\w)"
        return (
            answer if re.search(pattern, " ".join(unicodedata.normalize("NFKC", response).casefold().split())) else None
        )
    return normalised(response) or None


def is_right(extracted: str | None, *, match: Match, answer: str) -> bool:
    """Whether what was extracted equals the answer."""
    if extracted is None:
        return False
    if match == "numeric":
        return parse_number(extracted) == parse_number(answer)
    return normalised(extracted) == normalised(answer)


def _first_number(text: str) -> Decimal | None:
    found = _NUMBER.search(text)
    return None if found is None else _value(found, text)


def _value(found: re.Match[str], text: str) -> Decimal | None:
    sign = found["sign"]
    # "10 -3" and "(2)-3" subtract; a sign belongs to the number only where no operand stands before it
    if sign and text[: found.start()].rstrip()[-1:] in set("0123456789)]%"):
        sign = ""
    digits = found["digits"].replace(",", "")
    try:
        return Decimal(f"{sign}{digits}{found['rest'] or ''}{found['exponent'] or ''}")
    except InvalidOperation:  # an exponent beyond reason
        return None


def _word(choice: str) -> str:
    """The choice as whole words, whatever stands between them ("Sci/Tech", "Sci-Tech")."""
    parts = re.findall(r"\w+", choice)
    if not parts:
        return re.escape(choice)
    return r"(?<!\w)" + r"\W{0,3}".join(map(re.escape, parts)) + r"(?!\w)"


def _letters(num_choices: int) -> str:
    last = chr(64 + num_choices)
    return rf"(?:(?<=\()|(?<=\*\*))([A-{last}])(?=\)|\*\*)"


def _opening(text: str, choices: Sequence[str], letters: bool) -> str | None:
    """The choice that `text` starts with, if a mark, a reason or the end follows: "No doubt" does not open with No."""
    text = text.lstrip(f"{_QUOTES}\t\n([")
    ends = rf"(?=\s*(?:$|[\n.,;:!?)\]{_DASHES}{_QUOTES.strip()}])|{_REASON})"
    for choice in sorted(choices, key=len, reverse=True):
        if found := re.match(_word(choice) + ends, text, re.IGNORECASE):
            # "Yes, no or maybe" lists the choices
            rest = text[found.end() :].split("\n", 1)[0]
            other = [c for c in choices if c != choice]
            listed = re.match(rf"\W*(?:(?:or|and)\s+)?(?:{'|'.join(map(_word, other)) or '(?!)'})", rest, re.IGNORECASE)
            return None if listed else choice
    last = chr(64 + len(choices))
    # "A dog" opens with an article, and "A) or (B)" with two choices
    if letters and (
        found := re.match(rf"([A-{last}])(?=$|[\n.):\]*]|{_REASON})(?!\W*(?:or|and)\b\W*[A-{last}]\b)", text)
    ):
        return choices[ord(found[1]) - 65]
    return None
