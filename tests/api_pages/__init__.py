"""The API reference, built from the docstrings: ``python -m tests.api_pages`` writes it to build/api.

Warnings are errors, and so is a reference to a name that has no page. Formulas are drawn by the browser, without a
script: the pages need no network.
"""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .formulas import is_formula, to_mathml
from .tables import to_markdown

# each has a page; what is on it is public
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
    "ssync_loss.monitor",
    "ssync_loss.testing",
    "ssync_loss.visualize",
]
# each defines one name, which is imported in full
WITHOUT_ALL = {"ssync_loss.distributed": "global_mean", "ssync_loss.ema": "EmaTeacher", "ssync_loss.monitor": "Monitor"}
# the parts of an entry for a host of your own
HOSTS = "ssync_loss.adapters.hosts"
PAGES = [*PUBLIC, HOSTS]
FOLDER = Path(__file__).resolve().parents[2] / "build" / "api"
ROLE = re.compile(r":(?:mod|func|class|meth|attr):`([^`]+)`")
CODE = re.compile(r"``(.+?)``", flags=re.DOTALL)
# sections of one line, which pdoc does not read as sections
SECTION = re.compile(r"^(Shape|Returns|Source|Raises|Args): (?=\S)", flags=re.MULTILINE)
STYLE = """<style>
.formula { font-size: 1.1em; font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", math, serif; }
.formula math { font-family: inherit; math-style: normal; }
/* a long name goes on below the button of the menu */
@media (max-width: 769px) { h1.modulename { padding-right: 60px; overflow-wrap: anywhere; } }
</style>"""


def public_names(module: str) -> list[str]:
    """Return the names that a module offers."""
    there = importlib.import_module(module)
    return getattr(there, "__all__", None) or [WITHOUT_ALL[module]]


class Names:
    """The names that have a place on a page.

    Attributes:
        places: public names, each with its full name on the first page that has it.
        full: the full names of modules, of their names, and of members of classes.
        members: the short names of members. A class's docstring may use them alone; pdoc finds them there.
    """

    def __init__(self) -> None:
        self.places: dict[str, str] = {}
        self.full = set(PAGES)
        self.members: set[str] = set()
        for module in PAGES:
            for name in public_names(module):
                one = getattr(importlib.import_module(module), name)
                members = {member for member in vars(one) if member[0] != "_"} if isinstance(one, type) else set()
                self.places.setdefault(name, f"{module}.{name}")
                self.full |= {f"{module}.{name}", *(f"{module}.{name}.{member}" for member in members)}
                self.members |= members

    def prepared(self, docstring: str) -> str:
        """Write what pdoc can read: references in full, formulas as MathML, tables, sections of one line as paragraphs.

        Raises:
            ValueError: if a name is referred to that has no page.
        """
        linked = ROLE.sub(lambda match: f"`{self._in_full(match[1])}`", to_markdown(docstring))
        return SECTION.sub(r"\n**\1.** ", CODE.sub(drawn, linked))

    def _in_full(self, said: str) -> str:
        name, dot, member = said.partition(".")
        for full in (said, f"{self.places.get(name)}{dot}{member}"):
            if full in self.full:
                return full
        if said in self.members:
            return said
        raise ValueError(f"a docstring refers to {said!r}, which has no page")


def drawn(match: re.Match[str]) -> str:
    """Draw the code between marks, if it is a formula."""
    code = " ".join(match[1].split())
    return to_mathml(code) if is_formula(code) else match[0]


def finished(page: str) -> str:
    """Add the style. A link to an inherited member that has no place leads to the class."""
    page = page.replace("</head>", f"{STYLE}</head>")
    anchors = set(re.findall(r'id="([\w.]+)"', page))
    return re.sub(
        r'href="#(\w+)\.(\w+)"', lambda link: link[0] if link[0][7:-1] in anchors else f'href="#{link[1]}"', page
    )


def build(folder: Path) -> None:
    """Write a page for every public module, with search, to a folder.

    Raises:
        UserWarning: whatever pdoc warns about.
    """
    from pdoc import doc, docstrings, render

    names = Names()
    for module in map(importlib.import_module, PAGES):
        # some names are imported at their first use, and pdoc does not use them
        vars(module).update({name: getattr(module, name) for name in public_names(module.__name__)})
    modules = {name: doc.Module.from_name(name) for name in PAGES}
    top, *others = modules.values()
    # `__all__` has no modules, and a private module has no page
    vars(top)["submodules"] = others
    for one in others:
        vars(one)["submodules"] = []

    convert = docstrings.convert

    def convert_prepared(docstring: str, *where: Any) -> str:
        return str(convert(names.prepared(docstring), *where))

    render.configure(docformat="google", show_source=False)
    with patch.object(docstrings, "convert", convert_prepared), warnings.catch_warnings():
        warnings.simplefilter("error")
        pages = {
            f"{name.replace('.', '/')}.html": finished(render.html_module(one, modules))
            for name, one in modules.items()
        }
        pages |= {"index.html": render.html_index(modules), "search.js": render.search_index(modules)}
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
