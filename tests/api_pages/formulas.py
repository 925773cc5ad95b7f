"""The formulas of the docstrings as MathML, which browsers draw by themselves.

A docstring holds formulas in code marks, as one types them: ``P_i = softmax_j(x_i y_j / temperature)``. ``/`` divides
the product before it by the product after it; a word such as "of" ends a product. A long formula is broken into lines,
in front of an operator or at a word.
"""

import re
from typing import NamedTuple

FUNCTION = re.compile("argmax|cos|exp|floor|log|log_softmax|logsumexp|max|mean|min|relu|softmax|sqrt|sum|unit")
GREEK = re.compile("beta|eps|mu|nu|sigma|tau")
# words that end a product
GLUE = re.compile(r"\w+'s|and|between|for|from|in|is|no|of|or|over|than|the|times|to|where|with")
OPERATORS = {
    "<-": "&larr;",
    "->": "&rarr;",
    "<=": "&le;",
    ">=": "&ge;",
    "!=": "&ne;",
    "==": "=",
    "-": "&minus;",
    "+": "+",
    "=": "=",
    "<": "&lt;",
    ">": "&gt;",
}
PUNCTUATION = (",", ":", ";")
# an opening and a closing bar
BARS = "⎸⎹"
CLOSING = {"(": ")", "[": "]", "{": "}", BARS[0]: BARS[1]}
AROUND = {
    "floor": lambda inside: Piece(f"<mo>&lfloor;</mo>{_row(inside)}<mo>&rfloor;</mo>", _width(inside) + 2),
    "sqrt": lambda inside: Piece(f"<msqrt>{_row(inside)}</msqrt>", _width(inside) + 1),
}
# products that are written out; `@` is a product of matrices
SIGNS = {"*": "<mo>&middot;</mo>", "@": "", "#": "<mo>#</mo>"}
# in characters; a line may end in a longer group, and a longer product is not drawn as a fraction
LONG = 32
# in characters; a formula that is not longer stays in one line
SHORT = 16

# strings, methods, keywords, slices, calls of modules
CODE = re.compile(r"""["&\\]|\*\*|//|\.\.\.|\.\w+\(|\)\.|\w\.[a-z]|\w=\S|\[:|\(\)|^forward\(""")
# an operator, an index, a letter, a function, an absolute value
MATH = re.compile(rf" ([-+*/=<>@]|[<>!=]=|->|<-) |\^|_\{{|'_|Σ|^\w$|^-?log \w|^\|\w+\||\b({FUNCTION.pattern})(_\w+)?\(")
NAME = re.compile(r"[^\W\d_][^\W_]*(?:_[^\W_]+)*")
TOKEN = re.compile(rf"( ?)(\d+(?:\.\d+)?(?:e-?\d+)?|\w+'s\b|{NAME.pattern}|[<>!=]=|<-|->|.)")


class Piece(NamedTuple):
    """A part of a formula that stays in one line.

    Attributes:
        markup: MathML; plain text, if it is glue.
        width: about how many characters it has.
        kind: "factor", "gap", "operator" or "glue". A line may end in a gap, before an operator, and around glue.
    """

    markup: str
    width: int
    kind: str = "factor"


GAP = Piece('<mspace width="0.25em"/>', 1, "gap")


def is_formula(code: str) -> bool:
    """Tell a formula from a name, a value or a call."""
    names = NAME.findall(code)
    return bool(MATH.search(code) and not CODE.search(code) and not (names and all(map(_is_of_program, names))))


def to_mathml(code: str) -> str:
    """Write a formula as HTML.

    Raises:
        ValueError: if brackets do not match, or a product beside a `/` is empty.
    """
    pieces = _Reader(code).pieces("")
    if _width(pieces) <= SHORT:
        return f'<span class="formula"><math>{_row(pieces)}</math></span>'
    written = "<math>"
    for piece in pieces:
        if piece.kind == "glue":
            written += f"</math> {piece.markup} <math>"
        elif piece.kind == "gap":
            written += "</math> <math>"
        elif piece.kind == "operator":
            written += f"</math><wbr><math>{piece.markup}"
        else:
            written += piece.markup
    return f'<span class="formula">{written}</math></span>'.replace("<math></math>", "")


class _Reader:
    def __init__(self, code: str) -> None:
        self.code = code
        marks = iter(BARS * code.count("|"))
        told_apart = re.sub(r"\|", lambda _: next(marks), code)
        # the next token is the last one; an empty one is the end
        self.tokens: list[tuple[str, str]] = [("", ""), *reversed(TOKEN.findall(told_apart))]

    def take(self) -> tuple[str, str]:
        """Return the next token and the space before it."""
        if self.tokens[-1] == ("", ""):
            raise ValueError(f"{self.code!r} ends too early")
        return self.tokens.pop()

    def pieces(self, end: str) -> list[Piece]:
        """Read up to a closing bracket, or all."""
        done: list[Piece] = []
        product: list[Piece] = []
        while (token := self.tokens[-1][1]) != end:
            if token == "/":
                self.tokens.pop()
                product = self.fraction(product)
            elif token in OPERATORS:
                self.tokens.pop()
                form = "infix" if product else "prefix"
                done += [*product, Piece(f'<mo form="{form}">{OPERATORS[token]}</mo>', 3, "operator")]
                product = []
            elif GLUE.fullmatch(token):
                self.tokens.pop()
                done += [*product, Piece(token, len(token), "glue")]
                product = []
            elif token in PUNCTUATION:
                self.tokens.pop()
                done += [*product, Piece(f"<mo>{token}</mo>", 1)]
                product = []
            else:
                product += self.factor(is_first=not product)
        return done + product

    def fraction(self, above: list[Piece]) -> list[Piece]:
        """Read what is below the line."""
        below: list[Piece] = []
        ends = ("", "/", "*", *PUNCTUATION, *OPERATORS, *CLOSING.values())
        while self.tokens[-1][1] not in ends and not GLUE.fullmatch(self.tokens[-1][1]):
            below += self.factor(is_first=not below)
        if not above or not below:
            raise ValueError(f"{self.code!r}: a product beside `/` is empty")
        if max(_width(above), _width(below)) > LONG:
            return [*above, Piece("<mo>/</mo>", 1), *below]
        return [Piece(f"<mfrac>{_bare(above)}{_bare(below)}</mfrac>", max(_width(above), _width(below)))]

    def factor(self, *, is_first: bool) -> list[Piece]:
        """Read a name, a number, a sign or a group, and what stands below and above it."""
        space, token = self.take()
        gap = [GAP] if space and not is_first else []
        index = ""
        if NAME.fullmatch(token):
            name, index = _split(token)
            if name in AROUND and self.tokens[-1] == ("", "("):
                self.tokens.pop()
                base = [AROUND[name](self.inside("("))]
            else:
                base = [_named(name)]
        elif token in CLOSING:
            left, right = token.replace(BARS[0], "|"), CLOSING[token].replace(BARS[1], "|")
            base = [Piece(f"<mo>{left}</mo>", 1), *self.inside(token), Piece(f"<mo>{right}</mo>", 1)]
            if _width(base) <= LONG:
                base = [Piece(_row(base), _width(base))]
        elif token[0].isdigit():
            base = [_number(token)]
        elif token in SIGNS:
            return [*gap, Piece(SIGNS[token], 1)] if SIGNS[token] else gap
        else:
            raise ValueError(f"{self.code!r}: {token!r} has no place")
        return gap + self.with_scripts(base, _letters(index))

    def inside(self, bracket: str) -> list[Piece]:
        """Read the rest of a group."""
        pieces = self.pieces(CLOSING[bracket])
        self.tokens.pop()
        return pieces

    def with_scripts(self, base: list[Piece], below: list[Piece]) -> list[Piece]:
        """Read what stands above and below."""
        above: list[Piece] = []
        while self.tokens[-1][1] in ("'", "^", "_", "²"):
            _, mark = self.tokens.pop()
            if mark in "'²":
                above.append(Piece("<mo>&prime;</mo>" if mark == "'" else "<mn>2</mn>", 1))
            elif mark == "^":
                above += self.script()
            else:
                below = self.script()
        if not above and not below:
            return base
        tag = "msubsup" if above and below else "msub" if below else "msup"
        scripts = "".join(_row(one) for one in (below, above) if one)
        return [Piece(f"<{tag}>{_row(base)}{scripts}</{tag}>", sum(map(_width, (base, below, above))))]

    def script(self) -> list[Piece]:
        """Read a letter, a number or a group in braces."""
        _, token = self.take()
        if token == "{":
            return self.inside(token)
        # in A^t_i the index is that of A
        token, underscore, rest = token.partition("_")
        if underscore:
            self.tokens += [("", rest), ("", "_")]
        return _letters(token)


def _split(name: str) -> tuple[str, str]:
    """Split a name from its index."""
    if re.fullmatch(r"[^\W\d_]\d", name):
        return name[0], name[1]
    if name.startswith("log_softmax_"):
        return "log_softmax", name[12:]
    head, _, tail = name.partition("_")
    # not those of arguments, such as min_different
    has_index = len(head) <= 2 or len(tail) == 1 or GREEK.fullmatch(head) or head in ("mean", "softmax", "sum")
    return (head, tail) if has_index and "_" not in tail else (name, "")


def _is_of_program(name: str) -> bool:
    """Say whether a name is that of an argument, such as `max_steps`."""
    return "_" in _split(name)[0] and not FUNCTION.fullmatch(name)


def _named(name: str) -> Piece:
    if name in ("sum", "Σ"):
        return Piece("<mo>&sum;</mo>", 1)
    if GREEK.fullmatch(name):
        return Piece(f"<mi>&{name.replace('eps', 'epsilon')};</mi>", 1)
    if FUNCTION.fullmatch(name) or len(name) == 1:
        return Piece(f"<mi>{name.replace('_', ' ')}</mi>", len(name))
    return Piece(f"<mtext>{name}</mtext>", len(name))


def _number(digits: str) -> Piece:
    mantissa, _, exponent = digits.partition("e")
    if not exponent:
        return Piece(f"<mn>{digits}</mn>", len(digits))
    factor = "" if mantissa == "1" else f"<mn>{mantissa}</mn><mo>&middot;</mo>"
    power = f"<msup><mn>10</mn><mn>{exponent.replace('-', '&minus;')}</mn></msup>"
    return Piece(f"<mrow>{factor}{power}</mrow>", len(digits))


def _letters(index: str) -> list[Piece]:
    """Write an index: a word, or a letter for each of the sets that it runs over."""
    if len(index) > 2:
        return [Piece(f"<mtext>{index}</mtext>", len(index))]
    return [_number(one) if one.isdigit() else _named(one) for one in index]


def _width(pieces: list[Piece]) -> int:
    return sum(piece.width for piece in pieces)


def _row(pieces: list[Piece]) -> str:
    markup = "".join(f"<mtext>&nbsp;{one.markup}&nbsp;</mtext>" if one.kind == "glue" else one.markup for one in pieces)
    return f"<mrow>{markup}</mrow>"


def _bare(product: list[Piece]) -> str:
    """Write a product without the parentheses around all of it."""
    start, end = "<mrow><mo>(</mo>", "<mo>)</mo></mrow>"
    markup = product[0].markup
    if len(product) == 1 and markup.startswith(start) and markup.endswith(end):
        return f"<mrow>{markup[len(start) : -len(end)]}</mrow>"
    return _row(product)
