"""Count the lines of code of a file."""

import ast
import io
import tokenize
from pathlib import Path


def own_code(path: Path) -> int:
    """Count the lines that hold code, without blank lines, comments and docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {line for one in tokens if one.type not in nothing for line in range(one.start[0], one.end[0] + 1)}
    return len(code - docstrings)
