"""The API reference, built from the docstrings: ``python -m tests.api_pages`` writes it to build/api.

Warnings are errors, and so is a reference to a name that has no page.
"""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

# these have a page, and what is on it is public
PUBLIC = [
    "ssync_loss",
    "ssync_loss.adapters",
    "ssync_loss.attention",
    "ssync_loss.curriculum",
    "ssync_loss.diagnostics",
    "ssync_loss.distributed",
    "ssync_loss.ema",
    "ssync_loss.env",
    "ssync_loss.functional",
    "ssync_loss.losses",
    "ssync_loss.metrics",
    "ssync_loss.testing",
    "ssync_loss.visualize",
]
# each defines one thing, which is imported by its full name
WITHOUT_ALL = {"ssync_loss.distributed": "global_mean", "ssync_loss.ema": "EmaTeacher"}
FOLDER = Path(__file__).resolve().parents[1] / "build" / "api"
ROLE = re.compile(r":(?:mod|func|class|meth|attr):`([^`]+)`")
# sections of one line, which are no sections to pdoc
SECTION = re.compile(r"^(Shape|Returns|Source|Raises|Args): (?=\S)", flags=re.MULTILINE)


def public_names(module: str) -> list[str]:
    """Return the names that a module offers."""
    return getattr(importlib.import_module(module), "__all__", None) or [WITHOUT_ALL[module]]


def places_of_names() -> dict[str, str]:
    """Return where a page has a name, in full: the first page that has it."""
    places: dict[str, str] = {}
    for module in PUBLIC:
        for name in public_names(module):
            places.setdefault(name, f"{module}.{name}")
    return places


def members_of_classes() -> set[str]:
    """Return what may be referred to by its own name in the docstring of its class."""
    objects = [getattr(importlib.import_module(module), name) for module in PUBLIC for name in public_names(module)]
    return {name for one in objects if isinstance(one, type) for name in vars(one)}


def prepared(docstring: str, places: dict[str, str]) -> str:
    """Write references in full, so that pdoc links them from every page, and sections of one line as paragraphs.

    Raises:
        ValueError: if a name is referred to that has no page.
    """

    members = members_of_classes()

    def in_full(match: re.Match[str]) -> str:
        said = match[1]
        module, _, last = said.rpartition(".")
        if said in PUBLIC or (module in PUBLIC and last in public_names(module)):
            return f"`{said}`"
        name, dot, member = said.partition(".")
        if name in members:
            return f"`{said}`"
        if name not in places:
            raise ValueError(f"a docstring refers to {said!r}, which has no page:\n{docstring}")
        return f"`{places[name]}{dot}{member}`"

    return SECTION.sub(r"\n**\1.** ", ROLE.sub(in_full, docstring))


def build(folder: Path) -> None:
    """Write a page for every public module, with search, to a folder.

    Raises:
        UserWarning: whatever pdoc warns about.
    """
    from pdoc import doc, docstrings, render

    places = places_of_names()
    for module in map(importlib.import_module, PUBLIC):
        # some names are imported when they are first asked for; pdoc does not ask
        vars(module).update({name: getattr(module, name) for name in public_names(module.__name__)})
    modules = {name: doc.Module.from_name(name) for name in PUBLIC}
    top, *others = modules.values()
    # `__all__` has no modules in it; and a module behind a public one is no page
    vars(top)["submodules"] = others
    for one in others:
        vars(one)["submodules"] = []

    convert = docstrings.convert

    def convert_prepared(docstring: str, *where: Any) -> str:
        return str(convert(prepared(docstring, places), *where))

    render.configure(docformat="google", show_source=False)
    with patch.object(docstrings, "convert", convert_prepared), warnings.catch_warnings():
        warnings.simplefilter("error")
        pages = {f"{name.replace('.', '/')}.html": render.html_module(one, modules) for name, one in modules.items()}
        pages |= {"index.html": render.html_index(modules), "search.js": render.search_index(modules)}
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    build(FOLDER)
    print(FOLDER / "index.html")
