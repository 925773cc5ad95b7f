"""The README's code runs, its commands are what CI runs, and its table is the one the script prints."""

import re
from pathlib import Path

import pytest
from benchmarks import bars
from benchmarks.add_on_tables import in_short
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


def test_the_cost_is_the_limits_that_the_benchmarks_hold() -> None:
    paragraph = " ".join(README[README.index("**Cost.**") :].split("\n\n")[0].split())
    small, large = bars.MAX_EXPONENTIALS.values()
    for said in (
        f"at most {large:g} times as long as `torch.exp` of both maps at 64 MOVi-C clips, {small:g} times at 4,",
        f"two threads at least {bars.MIN_THREADS_SPEEDUP:g} times as fast as one at 64 clips",
        f"less than {100 * bars.MAX_EXAMPLE_SHARE:g} % of the example's training step",
        f"{100 * bars.MAX_SHARE['cpu']:g} % at published sizes",
        f"at most {bars.MAX_FIRST_USE_SECONDS:g} s once, when the engine is compiled",
        f"at most {bars.MAX_WAITING_MAPS:g} map beside the gradients waits for the backward",
    ):
        assert said in paragraph, said


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
