"""What went wrong in a worked answer, by rules alone: equations found in prose and checked, steps counted, labels.

The labels are those of "LLMs Can Get Brain Rot!" (arXiv:2510.13928, section on failures), whose tree asks a language
model at every leaf; here every leaf is a rule on the text, so that a label is the same every time and costs nothing:

- no arithmetic at all before the answer -> ``no_thinking``, and nothing else is asked;
- fewer than two steps -> ``no_plan``; otherwise: fewer steps worked out than half of the reference's, or a numbered
  step missing or empty -> ``skipped_steps``; every equation holds and the answer is wrong even so -> ``wrong_logic``;
- in both cases: an equation that does not hold -> ``wrong_arithmetic``;
- nothing of this -> ``unexplained``.

Equations are read by a small parser into exact fractions; no text is ever run. How far the rules agree with a reader
stands in docs/reasoning.md. Whether an answer is right is decided by ``extract`` and ``is_match``, as lm-eval does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

FAILURES = ("no_thinking", "no_plan", "skipped_steps", "wrong_arithmetic", "wrong_logic", "unexplained")
INVALID = "[invalid]"  # lm-eval's word for an answer without a number
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))
"""Patterns of lm-eval's task ``gsm8k`` (version 3): what is extracted, and what an exact match overlooks."""

MAX_EXPONENT = 20
MAX_DIGITS = 30
MAX_ITEMS = 200
"""Numbers, operators and brackets of one equation; longer ones are no arithmetic of a person."""
MAX_UNIT_WORDS = 4
TOLERANCE = Fraction(1, 2000)
"""Relative error that an equation with fractions may have for rounding; one of whole numbers has to be exact."""
ABOUT_TOLERANCE = Fraction(1, 50)


# --- the final number


def extract(answer: str, *, strict: bool) -> str:
    """Return the final number of an answer as text: the first after ``####`` (strict), or the last that there is."""
    if strict:
        return found[1].strip() if (found := STRICT.search(answer)) else INVALID
    matches = [next(group for group in match.groups() if group) for match in FLEXIBLE.finditer(answer)]
    return matches[-1].strip() if matches else INVALID


def is_match(found: str, solution: str) -> bool:
    """Say whether an extracted number is that of a reference solution, as lm-eval's ``exact_match`` compares."""
    return _bare(found) == _bare(solution)


def _bare(text: str) -> str:
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


# --- numbers, operators, words


@dataclass(frozen=True)
class Number:
    """A number as written: its value, its decimals, whether a percent sign follows, and whether it counts cents."""

    value: Fraction
    decimals: int = 0
    is_percent: bool = False


Item = Number | str
"""A number, one of ``+ - * / ^ ( )``, ``neg`` for a sign, or ``=`` and ``~`` (about)."""

MARK = re.compile(r"<<([^<>=]*=[^<>]*)>>")
LATEX = (
    (re.compile(r"\\(?:d|t)?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:times|cdot)"), " * "),
    (re.compile(r"\\div"), " / "),
    (re.compile(r"\\approx"), " ≈ "),
    (re.compile(r"\\(?:left|right|,|;|!|quad)"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"[{}]"), " "),
)
SIGNS = str.maketrans({"×": "*", "✕": "*", "·": "*", "∗": "*", "÷": "/", "−": "-", "–": "-", "—": ";", "’": "'"})
HALVES = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
BULLET = re.compile(r"(?m)^\s*(?:[-*•]\s+|\(?\d+[.)]\s+|(?:step\s*)?\d+\s*:\s*)", re.IGNORECASE)
TOKEN = re.compile(
    r"""
    (?P<ordinal>\d+(?:st|nd|rd|th)\b)
  | (?P<mixed>\d{1,3}\x20\d+/\d+(?![\d/]))
  | (?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:\x20\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)
  | (?P<percent>%|percent\b)
  | (?P<perunit>/\s*(?:[A-Za-z]+))
  | (?P<power>\*\*(?=\s*\d))
  | (?P<about>≈|~=|=~)
  | (?P<equal>==?)
  | (?P<operator>[-+*/^])
  | (?P<bracket>[()])
  | (?P<word>[A-Za-z][A-Za-z']*(?:[-/][A-Za-z']+)*)
  | (?P<money>[$€£¢])
  | (?P<space>[^\S\n]+)
  | (?P<other>.|\n)
    """,
    re.VERBOSE,
)
OPERATOR_WORDS = {"times": "*", "plus": "+", "minus": "-", "multiplied": "*", "divided": "/"}
EQUAL_WORDS = {"is": "=", "equals": "=", "gives": "=", "makes": "=", "about": "~", "approximately": "~", "roughly": "~"}
LINK_WORDS = frozenset(
    {"a", "an", "the", "total", "of", "about", "only", "to", "by", "his", "her", "their", "that", "equal"}
)
"""Words that may stand between an operator or equals sign and its number."""
FRACTION_WORDS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}


@dataclass(frozen=True)
class Token:
    """A piece of text: its kind as named in ``TOKEN``, and whether a space stands before it."""

    kind: str
    text: str
    spaced: bool


def prepare(text: str) -> str:
    """Return a text without marks, mark-up, bullets and numbering, with plain signs."""
    text = MARK.sub(" ", text)
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    text = text.translate(SIGNS)
    for sign, plain in HALVES.items():
        text = re.sub(rf"(\d)?{sign}", lambda m, plain=plain: f"{m[1] or ''} {plain}", text)  # type: ignore[misc]
    text = re.sub(r"\*\*(?!\s*\d)|(?<!\d)(?<!\d )\*\*", "", text)  # bold; 2**3 stays
    return BULLET.sub("\n", text)


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of a prepared text; spaces and signs of currencies are left out."""
    found, spaced = [], False
    for match in TOKEN.finditer(text):
        kind = str(match.lastgroup)
        if kind in ("space", "money"):
            spaced = spaced or kind == "space"
            continue
        found.append(Token(kind, match[0], spaced))
        spaced = False
    return found


# --- runs of arithmetic


@dataclass
class Run:
    """A stretch of arithmetic without its words: items, with ``=`` or ``~`` between sides.

    ``is_open_left`` and ``is_open_right`` say that the first or last side goes on in words or variables ("2x + 3 =",
    "= 7 + the rest"), so that nothing can be said about it.
    """

    items: list[Item] = field(default_factory=list)
    is_open_left: bool = False
    is_open_right: bool = False
    has_cents: bool = False


def runs_of(text: str) -> list[Run]:
    """Return the stretches of arithmetic in a text."""
    return _Reader(tokens_of(prepare(text))).read()


class _Reader:
    """Reads tokens from left to right; whatever does not fit ends a run."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.runs: list[Run] = []
        self.run = Run()
        self.depth = 0
        self.n_words = 0

    def read(self) -> list[Run]:
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            getattr(self, f"_{token.kind}", self._other)(token)
            self.at += 1
        self._end()
        return self.runs

    # what the run looks like

    def _has_operand(self) -> bool:
        return bool(self.run.items) and (isinstance(self.run.items[-1], Number) or self.run.items[-1] == ")")

    def _side_has_operator(self) -> bool:
        for item in reversed(self.run.items):
            if item in ("=", "~"):
                return False
            if isinstance(item, str) and item in "+-*/^":
                return True
        return False

    def _peek(self, offset: int = 1) -> Token | None:
        place = self.at + offset
        return self.tokens[place] if place < len(self.tokens) else None

    def _end(self, *, is_open: bool = False, taints_next: bool = False) -> None:
        """Close the run; what follows an operator or a variable starts a run that is open to the left."""
        run = self.run
        while run.items and not self._has_operand():
            if run.items.pop() not in ("=", "~"):
                run.is_open_right = True
        run.is_open_right = run.is_open_right or is_open or self.depth > 0
        if run.items:
            self.runs.append(run)
        self.run, self.depth, self.n_words = Run(is_open_left=taints_next), 0, 0

    def _push(self, item: Item) -> None:
        if len(self.run.items) >= MAX_ITEMS:
            self._end(is_open=True, taints_next=True)
        self.run.items.append(item)
        self.n_words = 0

    # tokens

    def _number(self, token: Token) -> None:
        digits = re.sub(r"[, ]", "", token.text)
        if len(digits) > MAX_DIGITS:
            return self._end(is_open=True, taints_next=True)
        if self._has_operand():
            if self.run.items[-1] == ")" and not self.n_words:  # "(1/2) 278"
                self._push("*")
            else:
                self._end()
        self._push(Number(Fraction(digits), len(digits.partition(".")[2])))
        return None

    def _mixed(self, token: Token) -> None:
        if self._has_operand():
            self._end()
        whole, numerator, denominator = re.findall(r"\d+", token.text)
        if int(denominator) == 0 or max(map(len, (whole, numerator, denominator))) > MAX_DIGITS:
            return self._end(is_open=True, taints_next=True)
        self._push(Number(int(whole) + Fraction(int(numerator), int(denominator)), 2))
        return None

    def _percent(self, token: Token) -> None:
        last = self.run.items[-1] if self.run.items else None
        if isinstance(last, Number):
            self.run.items[-1] = Number(last.value, last.decimals, is_percent=True)

    def _perunit(self, token: Token) -> None:
        if not self._has_operand():
            self._end(taints_next=True)

    def _power(self, token: Token) -> None:
        self._operate("^")

    def _operator(self, token: Token) -> None:
        follower = self._peek()
        is_dash = token.text == "-" and token.spaced and follower is not None and follower.kind == "word"
        if self._has_operand():
            if is_dash and follower is not None and follower.spaced:
                return self._end()
            return self._operate(token.text)
        starts_number = token.text == "-" and follower is not None and not follower.spaced
        if starts_number and follower is not None and follower.kind in ("number", "bracket"):
            return self._push("neg")
        return self._end(is_open=True, taints_next=True)

    def _operate(self, sign: str) -> None:
        if self._has_operand():
            self._push(sign)
        else:
            self._end(is_open=True, taints_next=True)

    def _bracket(self, token: Token) -> None:
        if token.text == ")":
            if self.depth and self._has_operand():
                self.depth -= 1
                return self._push(")")
            return self._end(is_open=self.depth > 0)
        if self._has_operand():
            inside = self._words_until_bracket()
            if inside is not None:  # "(per day)"
                self.at = inside
                return None
            if self._holds_equation():
                return self._end()
            if self.n_words:
                self._end()
            else:
                self._push("*")
        self._push("(")
        self.depth += 1
        return None

    def _words_until_bracket(self) -> int | None:
        """Return where the bracket that opens here closes, if nothing but words stands in it."""
        for place in range(self.at + 1, min(self.at + 12, len(self.tokens))):
            if self.tokens[place].text == ")":
                return place
            if self.tokens[place].kind not in ("word", "perunit"):
                return None
        return None

    def _holds_equation(self) -> bool:
        """Say whether an equals sign stands in the bracket that opens here: then it is a remark."""
        for place in range(self.at + 1, min(self.at + MAX_ITEMS, len(self.tokens))):
            if self.tokens[place].text == ")":
                return False
            if self.tokens[place].kind == "equal":
                return True
        return False

    def _equal(self, token: Token, sign: str = "=") -> None:
        if self._has_operand() and not self.depth:
            self._push(sign)
        elif self.run.items and self.run.items[-1] == "=" and sign == "~":
            self.run.items[-1] = "~"
        else:
            self._end(is_open=bool(self.run.items))

    def _about(self, token: Token) -> None:
        self._equal(token, "~")

    def _word(self, token: Token) -> None:
        word = token.text.lower()
        follower = self._peek()
        is_followed = follower is not None and follower.kind in ("number", "mixed", "bracket")
        if word in ("cent", "cents"):
            self.run.has_cents = True
        if word == "x" and self._has_operand() and is_followed:
            return self._operate("*")
        if len(word) == 1 and word not in ("a", "i"):
            return self._end(is_open=True, taints_next=True)
        if word == "remainder":
            return self._end(is_open=True)
        if self._has_operand():
            return self._word_behind_operand(word, is_followed=is_followed)
        if word in FRACTION_WORDS and follower is not None and follower.text.lower() in ("of", "the"):
            return self._push(Number(FRACTION_WORDS[word]))
        if self.run.items and self.run.items[-1] in ("=", "~") and EQUAL_WORDS.get(word) == "~":
            self.run.items[-1] = "~"
            return None
        if self.run.items and word in LINK_WORDS and self.n_words < MAX_UNIT_WORDS:
            self.n_words += 1
            return None
        return self._end(is_open=bool(self.run.items), taints_next=False)

    def _word_behind_operand(self, word: str, *, is_followed: bool) -> None:
        if word in OPERATOR_WORDS and (is_followed or word in ("multiplied", "divided")):
            return self._operate(OPERATOR_WORDS[word])
        last = self.run.items[-1]
        if word == "of" and isinstance(last, Number) and (last.is_percent or last.value < 1 or self._is_fraction()):
            return self._operate("*")
        if word in EQUAL_WORDS and not self.depth:
            if self._side_has_operator() and not (word == "is" and self._is_bare_fraction()):
                return self._push(EQUAL_WORDS[word])
            return self._end()
        self.n_words += 1
        if self.n_words > MAX_UNIT_WORDS:
            return self._end()
        return None

    def _is_bare_fraction(self) -> bool:
        """Say whether the last side is nothing but a fraction: "1/5 is 6 hectares" speaks of a part of something."""
        items = self.run.items
        before = items[-4] if len(items) > 3 else "="
        return self._is_fraction() and before in ("=", "~") and (value_of(items[-3:]) or 1) < 1

    def _is_fraction(self) -> bool:
        """Say whether the last operand is the lower half of a fraction such as 1/2."""
        return len(self.run.items) >= 3 and self.run.items[-2] == "/" and isinstance(self.run.items[-3], Number)

    def _ordinal(self, token: Token) -> None:
        self._end()

    def _other(self, token: Token) -> None:
        if token.text == "¢":
            self.run.has_cents = True
            return
        self._end(is_open=self.depth > 0)


# --- equations


@dataclass(frozen=True)
class Equation:
    """Two sides that a text says are equal, and whether they are. ``n_operators`` counts both sides."""

    left: Fraction | None
    right: Fraction | None
    holds: bool
    n_operators: int


def equations(text: str) -> list[Equation]:
    """Return the arithmetic equations that a text states, those inside ``<<...>>`` marks included.

    Left out: sides with variables or words in them, and equations without an operator ("1 hour = 60 minutes"). A chain
    such as "3 + 4 = 7 * 2 = 14", which says "... = 7, and 7 * 2 = 14", holds.
    """
    found = [equation for run in runs_of(text) for equation in _equations_of(run)]
    return found + [e for mark in MARK.findall(text) for run in runs_of(mark) for e in _equations_of(run)]


def expressions(text: str) -> int:
    """Return how many sides with at least one operator a text has: its arithmetic, right or not."""
    return sum(_n_operators(side) > 0 for run in runs_of(MARK.sub(" ", text)) for side, _ in _sides(run))


def _sides(run: Run) -> Iterator[tuple[list[Item], str]]:
    """Yield the sides of a run and the sign before each."""
    side: list[Item] = []
    sign = ""
    for item in run.items:
        if item in ("=", "~"):
            yield side, sign
            side, sign = [], str(item)
        else:
            side.append(item)
    yield side, sign


def _n_operators(side: Sequence[Item]) -> int:
    return sum(isinstance(item, str) and item in "+-*/^" for item in side)


def _equations_of(run: Run) -> list[Equation]:
    sides = list(_sides(run))
    if run.is_open_left:
        sides = sides[1:]
    if run.is_open_right:
        sides = sides[:-1]
    if len(sides) > 2 and not _n_operators(sides[0][0]) and _n_operators(sides[1][0]):
        sides = sides[1:]  # "Lynn ran 3 miles less = 20 - 3 = 17": the first number belongs to the words
    found = []
    for place in range(1, len(sides)):
        (left, _), (right, sign) = sides[place - 1], sides[place]
        if n := _n_operators(left) + _n_operators(right):
            holds = any(_holds(left, right, sign, percent=p, has_cents=run.has_cents) for p in (True, False))
            found.append(Equation(value_of(left), value_of(right), holds, n))
    return found


def _holds(left: Sequence[Item], right: Sequence[Item], sign: str, *, percent: bool, has_cents: bool) -> bool:
    """Compare two sides, percent signs read as hundredths or as a unit."""
    a, b = value_of(left, percent=percent), value_of(right, percent=percent)
    if a is None or b is None:
        return False
    rights = [b]
    if _n_operators(right):  # "3 + 4 = 7 * 2": the 7 is what the left side comes to
        first = next((item for item in right if isinstance(item, Number)), None)
        rights += [] if first is None else [first.value]
    if has_cents:
        rights += [b * 100, b / 100]
    numbers = [item for item in (*left, *right) if isinstance(item, Number)]
    is_whole = all(n.value.denominator == 1 and not n.is_percent for n in numbers) and "/" not in (*left, *right)
    if is_whole and sign == "=":
        return a in rights
    decimals = max([n.decimals for n in right if isinstance(n, Number)], default=0)
    step = Fraction(1, 10**decimals) if decimals else Fraction(0)
    relative = ABOUT_TOLERANCE if sign == "~" else TOLERANCE
    near = max(step, abs(a) * relative, Fraction(1) if sign == "~" and not decimals else Fraction(0))
    return any(abs(a - other) <= near for other in rights)


def value_of(side: Sequence[Item], *, percent: bool = True) -> Fraction | None:
    """Return the value of one side by the usual precedence; None where it has none: division by zero, huge powers."""
    try:
        parser = _Parser(side, percent=percent)
        value = parser.total()
    except (ZeroDivisionError, ValueError):
        return None
    return value if parser.at == len(side) else None


class _Parser:
    """Recursive descent over items; raises ValueError where they are no expression."""

    def __init__(self, items: Sequence[Item], *, percent: bool) -> None:
        self.items = items
        self.percent = percent
        self.at = 0

    def _next(self) -> Item | None:
        return self.items[self.at] if self.at < len(self.items) else None

    def total(self) -> Fraction:
        value = self.product()
        while (sign := self._next()) in ("+", "-"):
            self.at += 1
            other = self.product()
            value = value + other if sign == "+" else value - other
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while (sign := self._next()) in ("*", "/"):
            self.at += 1
            other = self.signed()
            value = value * other if sign == "*" else value / other
        return value

    def signed(self) -> Fraction:
        if self._next() == "neg":
            self.at += 1
            return -self.signed()
        return self.power()

    def power(self) -> Fraction:
        value = self.operand()
        if self._next() != "^":
            return value
        self.at += 1
        exponent = self.signed()
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT or abs(value) > 10**MAX_DIGITS:
            raise ValueError("no power that a person works out")
        return value ** int(exponent)

    def operand(self) -> Fraction:
        item = self._next()
        self.at += 1
        if isinstance(item, Number):
            return item.value / 100 if item.is_percent and self.percent else item.value
        if item == "(":
            value = self.total()
            if self._next() != ")":
                raise ValueError("a bracket is open")
            self.at += 1
            return value
        raise ValueError("no operand")


# --- steps and labels

FINAL = re.compile(r"(?im)^\s*(?:####|(?:so|thus|therefore|hence)?,?\s*the (?:final )?answer (?:is|:)).*$")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])|\n+")
NUMBERED = re.compile(r"(?im)^[^\S\n]*(?:\*\*)?(?:step\s*)?(\d{1,2})(?:[.):]|(?:\*\*))[^\S\n]*(.*)$")


def body_of(answer: str) -> str:
    """Return a worked answer up to ``####``, without lines that only say what the answer is."""
    return FINAL.sub("", answer.split("####")[0])


def steps_of(answer: str) -> list[str]:
    """Return the different sentences and lines of an answer's body that state a quantity."""
    pieces = (piece.strip() for piece in SENTENCE_END.split(body_of(answer)))
    return list(dict.fromkeys(piece for piece in pieces if re.search(r"\d", NUMBERED.sub(r"\2", piece))))


def lacks_numbered_step(answer: str) -> bool:
    """Say whether numbered steps have a gap or an empty one; lists of one step do not count."""
    found = [(int(number), rest.strip()) for number, rest in NUMBERED.findall(body_of(answer))]
    numbers = {number for number, _ in found}
    if len(numbers) < 2 or 1 not in numbers:
        return False
    followed = {number for number, rest in found if rest} | _followed_by_text(answer)
    return numbers != set(range(1, max(numbers) + 1)) or bool(numbers - followed)


def _followed_by_text(answer: str) -> set[int]:
    """Return the numbered lines that are empty but have text in the lines behind them."""
    found = set()
    lines = [line.strip() for line in body_of(answer).split("\n")]
    for place, line in enumerate(lines):
        match = NUMBERED.match(line)
        behind = next((other for other in lines[place + 1 :] if other), "")
        if match and behind and not NUMBERED.match(behind):
            found.add(int(match[1]))
    return found


@dataclass(frozen=True)
class Findings:
    """What a wrong answer fails by (several may hold), and how many different equations it states, and wrong ones."""

    failures: frozenset[str]
    n_equations: int
    n_wrong: int


def reference_steps(solution: str) -> int:
    """Return the steps of a reference solution: its ``<<...>>`` marks, or the equations of one without."""
    return len(MARK.findall(solution)) or len(equations(solution.split("####")[0])) or 1


def examine(answer: str, solution: str, *, is_right: bool) -> Findings:
    """Return the labels of a worked answer against a reference solution; a right answer has none."""
    body = body_of(answer)
    stated = set(equations(body))  # an answer that goes round in circles states each once
    n_wrong = sum(not equation.holds for equation in stated)
    if is_right:
        return Findings(frozenset(), len(stated), n_wrong)
    labels: set[str] = set()
    n_expressions = expressions(body) + len(MARK.findall(body))
    if not n_expressions:
        labels.add("no_thinking")
    else:
        if n_wrong:
            labels.add("wrong_arithmetic")
        if len(steps_of(answer)) < 2:
            labels.add("no_plan")
        else:
            if 2 * _n_worked(body) < reference_steps(solution) or lacks_numbered_step(answer):
                labels.add("skipped_steps")
            if stated and not n_wrong:
                labels.add("wrong_logic")
    return Findings(frozenset(labels or {"unexplained"}), len(stated), n_wrong)


def _n_worked(body: str) -> int:
    """Return how many different steps an answer works out: expressions, each counted once however often it stands."""
    sides = {tuple(side) for run in runs_of(body) for side, _ in _sides(run) if _n_operators(side)}
    return len(sides)
