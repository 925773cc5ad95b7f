"""The API reference builds without a warning, has every public name, and no link leads nowhere."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from api_pages import PAGES, WITHOUT_ALL, Names, build, public_names

pytestmark = pytest.mark.skipif(find_spec("pdoc") is None, reason="needs pdoc")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Every page by its place."""
    folder = tmp_path_factory.mktemp("api")
    build(folder)
    return {path.relative_to(folder): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def place(module: str) -> Path:
    return Path(f"{module.replace('.', '/')}.html")


def test_every_public_name_has_its_place(pages: dict[Path, str]) -> None:
    assert set(pages) == {*map(place, PAGES), Path("index.html")}
    for module in PAGES:
        shown = {name for name in re.findall(r'<section id="([\w.]+)"', pages[place(module)]) if "." not in name}
        assert set(public_names(module)) <= shown, module
        # a helper is on no page, where a module says what it offers
        assert module in WITHOUT_ALL or shown <= set(public_names(module)), module


def test_every_page_is_linked_from_the_first_and_fits_a_phone(pages: dict[Path, str]) -> None:
    assert "./ssync_loss.html" in pages[Path("index.html")]
    for module in PAGES[1:]:
        assert f'href="{place(module)}"' in pages[place("ssync_loss")]
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in pages[place(module)]


def test_no_link_leads_nowhere(pages: dict[Path, str]) -> None:
    anchors = {path: set(re.findall(r'id="([^"]+)"', text)) for path, text in pages.items()}
    count = 0
    for path, text in pages.items():
        for target, _, anchor in (one.partition("#") for one in re.findall(r'href="([^":$]+)"', text)):
            parts: list[str] = []
            for part in (path.parent / target).parts if target else path.parts:
                parts = parts[:-1] if part == ".." else [*parts, part]
            there = Path(*parts)
            assert there in anchors, f"{path}: {target}"
            assert not anchor or anchor in anchors[there], f"{path}: {target}#{anchor}"
            count += 1
    assert count > 300


def test_references_are_links(pages: dict[Path, str]) -> None:
    for path, text in pages.items():
        assert re.findall(r":(?:func|class|mod|meth|attr):", text) == [], path
        # a name in full that is no link
        assert re.findall(r"<code>(ssync_loss\.[\w.]+)</code>", text) == [], path
    labels = pages[place("ssync_loss.functional")]
    assert '<a href="#slot_overlap">ssync_loss.functional.slot_overlap</a>' in labels


def test_what_is_written_in_full() -> None:
    names = Names()
    text = (
        "See :func:`slot_overlap`, :class:`ssync_loss.SSyncLoss`, :meth:`SSyncLoss.terms`, :mod:`ssync_loss.testing`."
    )
    assert names.prepared(text) == (
        "See `ssync_loss.functional.slot_overlap`, `ssync_loss.SSyncLoss`, `ssync_loss.SSyncLoss.terms`, "
        "`ssync_loss.testing`."
    )
    assert names.prepared("Shape: x: (B,).\nReturns: y.") == "\n**Shape.** x: (B,).\n\n**Returns.** y."
    with pytest.raises(ValueError, match="refers to 'no_such_name', which has no page"):
        names.prepared("See :func:`no_such_name`.")
