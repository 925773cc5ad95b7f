"""The simple tables of the docstrings as Markdown: columns under rules of ``=``."""

import re

LINES = r"(?:.+\n)+?"
TABLE = re.compile(
    rf"^(?P<rule>=+(?: +=+)+)\n(?P<head>{LINES})(?P=rule)\n(?P<body>{LINES})(?P=rule)$", flags=re.MULTILINE
)


def to_markdown(docstring: str) -> str:
    """Write every table in Markdown."""
    return TABLE.sub(_written, docstring)


def _written(table: re.Match[str]) -> str:
    columns = [slice(rule.start(), rule.end()) for rule in re.finditer("=+", table["rule"])]
    # text of the last column may be longer than its rule
    columns[-1] = slice(columns[-1].start, None)
    rows: list[list[str]] = []
    for line in [*table["head"].splitlines(), *table["body"].splitlines()]:
        cells = [line[column].strip() for column in columns]
        if cells[0]:
            rows.append(cells)
        else:
            # the same row
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|---" * len(columns) + "|", *body])
