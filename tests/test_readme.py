"""The README's code runs, its commands, numbers and figure match their sources, and all links are valid."""

import re
from pathlib import Path

import pytest
from examples import method_figure

import quotes
from miniatures import MINIATURES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "examples", "src", "tests")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) == 3
    assert "criterion(enc_logits, dec_logits)  # <- the line" in BLOCKS[0]


def test_code_blocks_run_one_after_the_other() -> None:
    # the names that a user of a known model has
    host = MINIATURES["slotcontrast mlp"]
    given = {"model": host.build(), "batch": host.batch(2, 3), "step": 0}
    given["training_step"] = lambda model, batch: host.step(model, batch)[0]
    names = {"__name__": "readme", **given}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), names)


def test_commands_match_ci() -> None:
    main_job, tests = (command.strip() for command in COMMANDS)
    assert main_job.endswith("python examples/train_moving_objects.py")
    assert "\n" not in main_job + tests
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert re.search(r"^torch==\d", (ROOT / "tests" / "constraints.txt").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("readme", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(readme: Path) -> None:
    links = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', readme.read_text(encoding="utf-8"))
    for target in map("".join, links):
        path, _, heading = target.partition("#")
        page = readme.parent / path if path else readme
        assert page.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_numbers_match_their_sources() -> None:
    for page in quotes.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert quotes.again(text) == text
    # the pages contain numbers to compare
    assert [len(quotes.QUOTE.findall((ROOT / page).read_text(encoding="utf-8"))) for page in quotes.PAGES] == [2, 3]
    assert len(quotes.COST.findall(README)) > 10


def test_outdated_numbers_are_rewritten() -> None:
    old = re.sub(r"[\d.]+ ± [\d.]+", "9.9 ± 9.9", README)
    old = re.sub(r"(?<=: )[\d.]+x, \w+", "<99x, cubic", old)
    assert old.count("9.9 ± 9.9") > 10
    assert old.count("<99x, cubic") > 10
    assert quotes.again(old) == README
    table = "<!-- quotes: benchmarks/README.md, ### What must be shown -->\n| | limit |\n|---|---|\n"
    for unknown in (f"{table}| no such row | 1 |\n", "| no such row: 1x, linear |"):
        with pytest.raises(KeyError, match="no such row"):
            quotes.again(unknown)


def test_the_figure_matches_its_script() -> None:
    assert (ROOT / "examples" / "method.svg").read_text(encoding="utf-8") == method_figure.figure()
