"""The README's code runs, its commands are what CI runs, and its table is the one the script prints."""

import re
from pathlib import Path

import pytest
from benchmarks.add_on_tables import in_short
from benchmarks.bars import MAX_EXPONENTIALS, step_in_exponentials
from benchmarks.results import Results

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) == 5
    assert "criterion(enc_logits, dec_logits)  # <- the line" in BLOCKS[0]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_block_runs(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "readme"})


def test_two_commands_set_everything_up() -> None:
    assert len(COMMANDS) == 2
    main_job, tests = (command.strip() for command in COMMANDS)
    assert main_job.endswith("python examples/train_moving_objects.py")
    assert "\n" not in main_job + tests
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_is_the_one_that_the_script_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.report import Report, table

    printed = table(Report.load(ROOT / "examples" / "results.json"))
    shown = re.search(r"<!-- table: .*?-->\n(.*?)<!-- end of table -->", README, flags=re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == printed.strip()


def test_the_cost_is_the_measured_one_and_what_misses_its_limit_is_named() -> None:
    measured = Results.load(ROOT / "benchmarks" / "results" / "cpu.json")
    said, missed = [], []
    for compiled in (False, True):
        steps = step_in_exponentials(measured, compiled=compiled)
        ratios = {clips: steps[clips].number("over_exp") for clips in (64, 4)}
        said += [f"{ratio:.1f}" for ratio in ratios.values()]
        missed += [(clips, compiled) for clips, ratio in ratios.items() if ratio > MAX_EXPONENTIALS[clips]]
    sentence = (
        r"takes (\S+) times as long as `torch.exp` of both\s+maps at 64.*? (\S+) times at 4; "
        r"in\s+`torch.compile`, (\S+)\s+and\s+(\S+) times. Its limits are (\S+) and\s+(\S+) times: "
        r"64 clips miss theirs without a compiler."
    )
    found = re.search(sentence, README)
    assert found is not None
    assert list(found.groups()) == [*said, *(f"{MAX_EXPONENTIALS[clips]:.0f}" for clips in (64, 4))]
    assert missed == [(64, False)]


def test_the_costs_of_add_ons_are_the_measured_ones() -> None:
    said = in_short(Results.load(ROOT / "benchmarks" / "results" / "cpu.json"))
    rows = [line for line in README.splitlines() if line.startswith("| `") and line.count("|") == 6]
    entries = {
        "SlotRedundancyLoss": ["SlotRedundancyLoss", "TemporalSlotContrastLoss"],
        "StructureAwareLoss": ["StructureAwareLoss, own filters", "StructureAwareLoss, kornia's filters"],
        "curriculum.SlotCurriculum": ["SlotCurriculum, elsewhere", "SlotCurriculum, at a milestone"],
        "SemanticConsistencyLoss": [
            "SemanticConsistencyLoss, pair by pair",
            "SemanticConsistencyLoss, pooled to 144",
            "MaskDiversityLoss",
            "InstanceConsistencyLoss, P=4",
        ],
        "AffinityConsistencyLoss": ["AffinityConsistencyLoss", "MaskedTokenLoss, Kp=256", "OutGenerativeLoss"],
        "functional.propagate_labels": ["propagate_labels, 64 patches at once"],
    }
    for first, names in entries.items():
        (row,) = (row for row in rows if row.startswith(f"| `{first}`"))
        shown = re.findall(r"<?\d[\d,.]*x, \w+", row.split("|")[5])
        assert shown == [said[name] for name in names], first


def test_versions_are_pinned() -> None:
    pins = (ROOT / "tests" / "constraints.txt").read_text()
    assert re.search(r"^torch==\d", pins, flags=re.MULTILINE)
