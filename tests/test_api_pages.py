"""The API reference builds without a warning, has every public name, and has no broken link."""

import re
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from api_pages import PAGES, WITHOUT_ALL, Names, build, public_names
from api_pages.formulas import is_formula, to_mathml
from api_pages.tables import to_markdown

needs_pdoc = pytest.mark.skipif(find_spec("pdoc") is None, reason="needs pdoc")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Return the text of every page by its path."""
    folder = tmp_path_factory.mktemp("api")
    build(folder)
    return {path.relative_to(folder): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


def place(module: str) -> Path:
    return Path(f"{module.replace('.', '/')}.html")


@needs_pdoc
class TestPages:
    def test_pages_have_all_public_names(self, pages: dict[Path, str]) -> None:
        assert set(pages) == {*map(place, PAGES), Path("index.html")}
        for module in PAGES:
            shown = {name for name in re.findall(r'<section id="([\w.]+)"', pages[place(module)]) if "." not in name}
            assert set(public_names(module)) - {"__version__"} <= shown, module
            # a module with `__all__` shows no helpers
            assert module in WITHOUT_ALL or shown <= set(public_names(module)), module

    def test_every_page_is_linked_and_fits_a_phone(self, pages: dict[Path, str]) -> None:
        assert "./ssync_loss.html" in pages[Path("index.html")]
        for module in PAGES[1:]:
            assert f'href="{place(module)}"' in pages[place("ssync_loss")]
            assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in pages[place(module)]

    def test_no_link_is_broken(self, pages: dict[Path, str]) -> None:
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

    def test_references_are_links(self, pages: dict[Path, str]) -> None:
        for path, text in pages.items():
            assert re.findall(r":(?:func|class|mod|meth|attr):", text) == [], path
            # a full name without a link
            assert re.findall(r"<code>(ssync_loss\.[\w.]+)</code>", text) == [], path
        labels = pages[place("ssync_loss.functional")]
        assert '<a href="#slot_overlap">ssync_loss.functional.slot_overlap</a>' in labels

    def test_formulas_and_tables_are_formatted(self, pages: dict[Path, str]) -> None:
        whole = "".join(pages.values())
        drawn = re.findall(r'<span class="formula">.*?</span>', whole)
        assert len(drawn) > 100
        for one in drawn:
            # Markdown must not change the markup of formulas
            ElementTree.fromstring(re.sub("<wbr>|&(?!lt|gt)[a-z]+;", "", one))
        assert to_mathml("P = softmax_s(logits / temperature)") in whole
        assert "====" not in whole
        assert "<th>level</th>" in whole

    def test_pages_load_nothing_from_a_network(self, pages: dict[Path, str]) -> None:
        for path, text in pages.items():
            assert re.findall(r'(?:src|<link[^>]*href)="http[^"]*"', text) == [], path


def test_references_become_full_names() -> None:
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


def test_a_table() -> None:
    rule = "=====  ====\n"
    text = f"Before.\n\n{rule}name   what\n{rule}a      one\n       two\nb      more than fits\n{rule}\nAfter."
    assert to_markdown(text) == (
        "Before.\n\n| name | what |\n|---|---|\n| a | one two |\n| b | more than fits |\n\nAfter."
    )


def math(markup: str) -> str:
    return f'<span class="formula"><math><mrow>{markup}</mrow></math></span>'


class TestFormulas:
    @pytest.mark.parametrize(
        "code", ["e", "n < warmup", "-log P_y", "|s_i|", "floor(r N)", "O_t[p] O'_j[e(p)]", "c1 = k1^2", "Σ_b M_b"]
    )
    def test_formulas(self, code: str) -> None:
        assert is_formula(code)

    @pytest.mark.parametrize(
        "code",
        [
            "step",
            "top_k",
            '"mse"',
            "b=1",
            "forward(s_pat)",
            "x.sum() / 2",
            "window**3",
            "start_step + ramp_steps",
            "()",
        ],
    )
    def test_code(self, code: str) -> None:
        assert not is_formula(code)

    @pytest.mark.parametrize(
        ("code", "markup"),
        [
            ("-log a", '<mo form="prefix">&minus;</mo><mi>log</mi><mspace width="0.25em"/><mi>a</mi>'),
            ("P_y", "<msub><mrow><mi>P</mi></mrow><mrow><mi>y</mi></mrow></msub>"),
            ("1e-8", "<mrow><msup><mn>10</mn><mn>&minus;8</mn></msup></mrow>"),
            (
                "2 (a + b) / tau",
                '<mfrac><mrow><mn>2</mn><mspace width="0.25em"/><mrow><mo>(</mo><mi>a</mi><mo form="infix">+</mo>'
                "<mi>b</mi><mo>)</mo></mrow></mrow><mrow><mi>&tau;</mi></mrow></mfrac>",
            ),
            (
                "(a) / |b|",
                "<mfrac><mrow><mi>a</mi></mrow><mrow><mrow><mo>|</mo><mi>b</mi><mo>|</mo></mrow></mrow></mfrac>",
            ),
            ("A^t_i", "<msubsup><mrow><mi>A</mi></mrow><mrow><mi>i</mi></mrow><mrow><mi>t</mi></mrow></msubsup>"),
            ("x'", "<msup><mrow><mi>x</mi></mrow><mrow><mo>&prime;</mo></mrow></msup>"),
            ("sum_{u,v}", "<msub><mrow><mo>&sum;</mo></mrow><mrow><mi>u</mi><mo>,</mo><mi>v</mi></mrow></msub>"),
            ("floor(a)", "<mo>&lfloor;</mo><mrow><mi>a</mi></mrow><mo>&rfloor;</mo>"),
            ("sqrt(a)", "<msqrt><mrow><mi>a</mi></mrow></msqrt>"),
            ("mean of x", "<mi>mean</mi><mtext>&nbsp;of&nbsp;</mtext><mi>x</mi>"),
        ],
    )
    def test_markup(self, code: str, markup: str) -> None:
        assert to_mathml(code) == math(markup)

    def test_long_formulas_can_be_broken(self) -> None:
        written = to_mathml("loss = mean over all frames of a_k * l - momentum")
        assert re.sub(r"<(?!/?math|wbr)[^>]*>", "", written) == (
            "<math>loss</math><wbr><math>=mean</math> over <math>all</math> <math>frames</math> of "
            "<math>ak</math> <math>&middot;</math> <math>l</math><wbr><math>&minus;momentum</math>"
        )

    def test_a_long_product_is_divided_on_one_line(self) -> None:
        assert "mfrac" in to_mathml("share of patches / 2")
        assert "mfrac" not in to_mathml("(a_1 + a_2 + a_3) (b_1 + b_2 + b_3) (c_1 + c_2 + c_3) / 2")

    @pytest.mark.parametrize("code", ["(a", "a)", "a / ", "/ b", "|a", "a_", "a ! b", "{a]"])
    def test_invalid_formulas_are_refused(self, code: str) -> None:
        with pytest.raises(ValueError, match=re.escape(code)):
            to_mathml(code)
