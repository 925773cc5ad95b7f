"""Names, defaults, docstrings, imports, and the wheel."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import sys
from doctest import DocTestFinder
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch

import ssync_loss
from api_pages import PAGES, PUBLIC, WITHOUT_ALL, public_names
from ssync_loss import functional, losses
from try_wheel import asked_for, built, contents, metadata_of, run, unfit_for_pypi

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ssync_loss"


def all_modules() -> list[str]:
    return ["ssync_loss", *(one.name for one in pkgutil.walk_packages(ssync_loss.__path__, "ssync_loss."))]


def public_objects() -> dict[str, Any]:
    """Return every public class and function by its qualified name."""
    found: dict[str, Any] = {}
    for module in PAGES:
        there = importlib.import_module(module)
        for name in public_names(module):
            one = getattr(there, name)
            if inspect.isclass(one) or inspect.isfunction(one):
                found[f"{one.__module__}.{name}"] = one
    return found


# --- names ---


def test_the_documented_names_exist() -> None:
    # users rely on these names
    names = "BoundaryRefinementLoss InteriorDenoisingLoss PseudoLabels SSyncLoss SSyncTerms __version__"
    assert set(ssync_loss.__all__) >= set(names.split())
    names = "boundary_region interior_region merge_slots neighbor_difference pseudo_labels slot_overlap"
    assert set(functional.__all__) >= {"selective_distillation_loss", *names.split()}


@pytest.mark.parametrize("name", [one for one in PUBLIC if one not in WITHOUT_ALL])
def test_every_public_name_exists_once(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    for one in module.__all__:
        assert getattr(module, one) is not None
        assert one == "__version__" or not one.startswith("_")
    star: dict[str, Any] = {}
    exec(f"from {name} import *", star)
    assert star.keys() - {"__builtins__"} == set(module.__all__)


# modules of pure functions
PURE = (
    "methods.ino.propagation",
    "methods.ino.tube_mask",
    "methods.smtc.sinkhorn",
    "ssync.functions",
    "ssync.merging",
    "ssync.regions",
)
METHODS = ("ino", "slotcurri", "slotcurri.curriculum", "smtc", "smtc.attention", "srl")


def test_every_module_is_public_private_or_exported_elsewhere() -> None:
    packages = {name for name in PUBLIC if (SOURCE / name.partition(".")[2].replace(".", "/")).is_dir()}
    # `functional` exports their names, they are for reading, or `backend` selects them
    packages |= {"ssync_loss.reference", "ssync_loss.methods", "ssync_loss.ssync", "ssync_loss.ssync.engines"}
    packages |= {f"ssync_loss.ssync.engines.{one}" for one in ("cpu", "triton", "triton.gpu")}
    packages |= {f"ssync_loss.methods.{one}" for one in METHODS}
    behind = {f"ssync_loss.{one}" for one in PURE} | packages
    for name in all_modules():
        private = any(part.startswith("_") for part in name.split("."))
        assert private or name in PUBLIC or name in behind or name.rpartition(".")[0] in packages


def test_every_pure_function_is_in_functional() -> None:
    defined = {
        name
        for module in PURE
        for name, one in vars(importlib.import_module(f"ssync_loss.{module}")).items()
        if inspect.isfunction(one) and one.__module__ == f"ssync_loss.{module}" and ">>>" in (one.__doc__ or "")
    }
    assert defined <= set(functional.__all__)


# --- arguments ---

# the name of a function is that of its module in snake case
PAIRS = [
    (getattr(losses, name), getattr(functional, re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()))
    for name in losses.__all__
    if name.endswith("Loss") and name not in ("AdaptiveSSyncLoss", "SSyncLoss")
]


@pytest.mark.parametrize(("module", "function"), PAIRS)
def test_a_module_and_its_function_take_the_same_arguments(module: Any, function: Any) -> None:
    def arguments(callable_: Any) -> dict[str, tuple[Any, Any]]:
        parameters = inspect.signature(callable_).parameters.values()
        return {one.name: (one.kind, one.default) for one in parameters if one.name != "self"}

    assert arguments(module) | arguments(module.forward) == arguments(function)
    assert not arguments(module).keys() & arguments(module.forward).keys()


SETTINGS = {
    name: one.default for name, one in inspect.signature(ssync_loss.SSyncLoss).parameters.items() if name != "grid"
}


def test_a_setting_has_the_same_default_everywhere() -> None:
    marks = {"merge_threshold", "criterion", "min_different", "max_different"}
    signatures = {name: inspect.signature(one).parameters for name, one in public_objects().items()}
    family = {name: parameters for name, parameters in signatures.items() if parameters.keys() & marks}
    assert len(family) > 8
    other = [
        (name, setting)
        for name, parameters in family.items()
        for setting, one in parameters.items()
        if setting in SETTINGS and one.default not in (SETTINGS[setting], inspect.Parameter.empty)
    ]
    # by default the premise does not merge, and the criterion of a monitor is a loss
    premise, monitor = "ssync_loss.diagnostics.verdict.premise", "ssync_loss.monitor.Monitor"
    assert other == [(premise, "merge_threshold"), (monitor, "criterion")]


@pytest.mark.parametrize("name", functional.__all__)
def test_tensors_are_positional_and_settings_keyword_only(name: str) -> None:
    for one in inspect.signature(getattr(functional, name)).parameters.values():
        if one.default is not one.empty:
            assert one.kind is one.KEYWORD_ONLY, one.name
        elif one.annotation is torch.Tensor:
            assert one.kind is one.POSITIONAL_OR_KEYWORD, one.name


# --- docstrings ---


OBJECTS = public_objects()
# targets of :func:`name`
NAMED = {name.rpartition(".")[2]: one for name, one in OBJECTS.items()}
SHAPE = re.compile(r"\((?:\.+|[A-Z]\w*)(?:, ?[\w. */+-]+)*,?\)|\bscalars?\b|\bof one shape\b")
ERRORS = re.compile(r"Raises:|same shapes and errors|\berrors(?: and results)? are\s+(?:as|those)\b")


def has_fields(one: Any) -> bool:
    return hasattr(one, "_fields") or hasattr(one, "__dataclass_fields__")


def words(one: Any) -> str:
    """Return a docstring together with those that it refers to."""
    said = f"{inspect.getdoc(one)}\n{inspect.getdoc(one.__call__) if inspect.isclass(one) else ''}"
    others = re.findall(r"(?:Module of|as in|as for|those of)\s+:(?:func|class):`(?:[\w.]+\.)?(\w+)`", said)
    return "\n".join([said, *(words(NAMED[name]) for name in others)])


class TestDocstrings:
    """A failing test lists the names of incomplete docstrings."""

    def test_doctests_check_a_value(self) -> None:
        assert len(OBJECTS) > 140
        modules = {importlib.import_module(one.__module__) for one in OBJECTS.values()}
        # what no run of the tests would find is no example
        run = {each.docstring: each.examples for module in modules for each in DocTestFinder().find(module)}
        values = {name: "".join(each.want for each in run.get(one.__doc__, [])) for name, one in OBJECTS.items()}
        assert [name for name, said in values.items() if not re.search(r"\d|True|False|'|Error", said)] == []

    def test_shapes_are_given(self) -> None:
        def takes_tensors(one: Any) -> bool:
            taken = inspect.signature(getattr(one, "forward", one)).parameters.values()
            return any("Tensor" in (kind := str(each.annotation)) and "Callable" not in kind for each in taken)

        assert [name for name, one in OBJECTS.items() if takes_tensors(one) and not SHAPE.search(words(one))] == []

    def test_errors_are_named(self) -> None:
        def said(one: Any) -> str:
            methods = inspect.getmembers(one, inspect.isroutine) if inspect.isclass(one) else []
            own = [each.__doc__ for _, each in methods if getattr(each, "__module__", None) == one.__module__]
            return "\n".join(filter(None, [one.__doc__, *own]))

        assert [name for name, one in OBJECTS.items() if not ERRORS.search(said(one))] == []

    def test_constants_are_explained_by_their_module(self) -> None:
        for module in map(importlib.import_module, PAGES):
            constants = set(public_names(module.__name__)) - {name.rpartition(".")[2] for name in OBJECTS}
            silent = {name for name in constants - {"__version__"} if name not in (module.__doc__ or "")}
            assert silent == set(), module.__name__

    def test_fields_are_explained(self) -> None:
        for name, one in OBJECTS.items():
            if has_fields(one):
                said = one.__doc__.partition("Attributes:")[2] or one.__doc__.partition("Args:")[2]
                missing = [field for field in inspect.signature(one).parameters if not re.search(rf"\b{field}\b", said)]
                assert missing == [], name


def test_every_public_method_has_a_docstring() -> None:
    silent = [
        (name, attribute)
        for name, one in public_objects().items()
        if inspect.isclass(one)
        for attribute, member in inspect.getmembers(one, inspect.isroutine)
        if getattr(member, "__module__", None) == one.__module__
        and not attribute.startswith("_")
        and not member.__doc__
    ]
    assert silent == []


# --- imports ---


def test_importing_loads_no_optional_package(tmp_path: Path) -> None:
    # one module needs hypothesis, and the first launch imports triton
    modules = [
        name
        for name in all_modules()
        if name != "ssync_loss.testing.strategies" and not name.startswith("ssync_loss.ssync.engines.triton.gpu.")
    ]
    code = """
import importlib, sys
import torch, torch.distributed, einops, numpy.random
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import ssync_loss
added = {name.partition('.')[0] for name in set(sys.modules) - before}
assert added - set(sys.stdlib_module_names) == {'ssync_loss'}, added
for name in sys.argv[2:]:
    importlib.import_module(name)
optional = {'av', 'hypothesis', 'kornia', 'matplotlib', 'PIL', 'pytest', 'scipy', 'sklearn', 'slot_attention',
            'torchmetrics', 'tqdm', 'triton'}
print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} & optional))
"""
    assert run(sys.executable, "-I", "-c", code, ROOT / "src", *modules, cwd=tmp_path) == "[]"


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, at any place."""
    modules = set(all_modules())
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names if one.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            # a name imported from a package may be a module
            whole = {f"{node.module}.{one.name}" for one in node.names}
            found |= (whole & modules) or {node.module}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: imports_of(Path(importlib.import_module(name).__file__ or "")) for name in all_modules()}


def test_imports_form_no_circle(graph: dict[str, set[str]]) -> None:
    # `static_order` raises on a cycle
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(graph)
    assert sum(map(len, graph.values())) > 50


# a module may import modules of earlier layers
LAYERS: list[set[str]] = [
    {"_autocast", "_checks", "_compilers", "_moved"},
    {"_autograd", "_axes", "_forks", "_inputs", "_settings"},
    {"_module", "_rows", "_vectors"},
    {"ssync", "methods"},
    {"attention", "curriculum", "ema", "losses", "reference"},
    {"distributed", "functional", "ssync_loss"},
    {"adapters", "diagnostics", "env", "metrics", "testing", "visualize"},
    {"monitor"},
]


def test_imports_run_one_way(graph: dict[str, set[str]]) -> None:
    level = {name: height for height, names in enumerate(LAYERS) for name in names}

    def unit(module: str) -> str:
        return module.split(".")[1] if "." in module else module

    assert {unit(one) for one in graph} <= level.keys()
    for module, imported in graph.items():
        for one in imported:
            assert unit(module) == unit(one) or level[unit(module)] > level[unit(one)], f"{module} imports {one}"


def test_private_modules_are_imported_only_within_their_package(graph: dict[str, set[str]]) -> None:
    for module, imported in graph.items():
        for one in imported:
            package, _, name = one.rpartition(".")
            assert not name.startswith("_") or module.startswith(package), f"{module} imports {one}"


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))[1]


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    version = ssync_loss.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", version)
    assert wheel.name == f"ssync_loss-{version}-py3-none-any.whl"
    assert f"\nVersion: {version}\n" in metadata_of(wheel)
    newest = re.findall(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[0]
    assert newest == version


def test_pypi_can_show_the_description(wheel: Path) -> None:
    assert unfit_for_pypi(wheel) == []


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {one for one in contents(wheel) if ".dist-info/" not in one}
    licenses = [one for one in contents(wheel) if one.endswith("licenses/LICENSE")]
    # the wheel includes the READMEs of the folders
    files = [*SOURCE.rglob("*.py"), *SOURCE.rglob("README.md")]
    expected = {f"ssync_loss/{one.relative_to(SOURCE).as_posix()}" for one in files}
    assert names == expected | {"ssync_loss/py.typed", "ssync_loss/ssync/engines/cpu/engine.c"}
    assert len(licenses) == 1


def test_the_wheel_needs_torch_einops_kornia_and_numpy(wheel: Path) -> None:
    assert sorted(re.split(r"\W", one)[0] for one in asked_for(wheel)) == ["einops", "kornia", "numpy", "torch"]
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", metadata_of(wheel), flags=re.MULTILINE))
    assert extras >= {"examples", "test"}


def test_the_wheel_names_the_tested_versions_of_python(wheel: Path) -> None:
    rows = json.loads((ROOT / "tests" / "versions.json").read_text(encoding="utf-8"))
    named = re.findall(
        r"^Classifier: Programming Language :: Python :: (3\.\d+)$", metadata_of(wheel), flags=re.MULTILINE
    )
    assert set(named) == {".".join(row["python"].split(".")[:2]) for row in rows}
    assert f"\nRequires-Python: >={min(named, key=lambda one: int(one[2:]))}\n" in metadata_of(wheel)


def test_the_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    quiet = [
        "--no-deps",
        "--no-index",
        "--no-compile",
        "-q",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    run(sys.executable, "-I", "-m", "pip", "install", *quiet, "--target", target, wheel, cwd=tmp_path)
    code = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
import torch
from ssync_loss import SSyncLoss
torch.manual_seed(0)
enc_logits, dec_logits = (torch.randn(2, 3, 4, 6, 6, requires_grad=True) for _ in range(2))
loss = SSyncLoss(merge_threshold=0.6)(enc_logits, dec_logits)
loss.backward()
print(loss.item(), (pathlib.Path(sys.argv[1]) / 'ssync_loss' / 'py.typed').exists())
"""
    modules = [one for one in all_modules() if one != "ssync_loss.testing.strategies"]
    printed = run(sys.executable, "-I", "-c", code, target, *modules, cwd=tmp_path)
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 4, 6, 6) for _ in range(2)]
    loss = ssync_loss.SSyncLoss(merge_threshold=0.6).eval()(*maps)
    value, has_marker = printed.split()
    assert float(value) == pytest.approx(loss.item())
    assert has_marker == "True"
