"""The teacher: the average, its schedule, buffers, checkpoints, wrappers, errors."""

import copy
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ssync_loss.ema import EmaTeacher


class Student(nn.Module):
    """A model with two layers, batch norm, tied weights and dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 4)
        self.tied = self.head
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.tied(self.head(self.drop(self.norm(self.encoder(x)))))
        return hidden


def learn(student: nn.Module, steps: int = 1) -> None:
    """Change parameters and buffers by training steps."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for _ in range(steps):
        student.train()
        optimizer.zero_grad()
        noise = sum(((one * torch.randn_like(one)).sum() for one in student.parameters()), torch.zeros(()))
        (student(torch.randn(8, 3)).square().mean() + noise).backward()
        optimizer.step()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    both = [*module.named_parameters(), *module.named_buffers()]
    return {name: one.detach().clone() for name, one in both}


# --- the average ---


@settings(max_examples=20)
@given(momentum=st.floats(0.0, 1.0), updates=st.integers(1, 4))
@example(momentum=0.0, updates=1)
@example(momentum=1.0, updates=1)
def test_parameters_are_the_moving_average_of_the_student(momentum: float, updates: int) -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=momentum)
    expected = {name: one.double() for name, one in tensors(student).items()}
    for _ in range(updates):
        learn(student)
        before = tensors(student)
        teacher.update(student)
        # the student does not change
        assert all(torch.equal(one, before[name]) for name, one in tensors(student).items())
        for name, moved in student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * moved.detach().double()
    assert teacher.num_updates == updates
    for name, average in teacher.model.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_it_starts_as_a_copy_and_changes_only_by_updates() -> None:
    student = Student()
    teacher = EmaTeacher(student)
    assert teacher.current_momentum() == 0.999
    before = tensors(student)
    learn(student)
    assert all(torch.equal(one, before[name]) for name, one in tensors(teacher.model).items())
    assert {one.data_ptr() for one in teacher.parameters()}.isdisjoint(one.data_ptr() for one in student.parameters())
    teacher.update(student)
    changed = {name for name, one in tensors(teacher.model).items() if not torch.equal(one, before[name])}
    assert changed == dict(student.named_parameters()).keys()
    assert teacher.current_momentum() == 0.999
    assert student.training
    assert all(one.requires_grad for one in student.parameters())


def test_tied_weights_stay_tied_and_are_averaged_once() -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=0.5)
    inner = teacher.model
    assert isinstance(inner, Student)
    assert inner.tied is inner.head
    before = inner.head.weight.clone()
    learn(student)
    teacher.update(student)
    torch.testing.assert_close(inner.head.weight, (before + student.head.weight) / 2)


# --- the schedule ---


def test_the_momentum_rises_along_half_a_cosine() -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=0.9, final_momentum=1.0, num_steps=4)
    momenta = []
    for _ in range(6):
        momenta.append(teacher.current_momentum())
        teacher.update(student)
    expected = [0.9, 0.95 - 0.05 * math.sqrt(0.5), 0.95, 0.95 + 0.05 * math.sqrt(0.5), 1.0, 1.0]
    assert momenta == pytest.approx(expected, abs=1e-12)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"momentum": 0.5, "final_momentum": 1.0, "num_steps": 10}
    student = Student()
    teacher = EmaTeacher(student, **knobs)
    for _ in range(3):
        learn(student)
        teacher.update(student)
    resumed = EmaTeacher(Student(seed=1), **knobs)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    resumed.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True), strict=True)
    assert resumed.num_updates == 3
    learn(student)
    for one in (teacher, resumed):
        one.update(student)
    expected = tensors(teacher)
    assert all(torch.equal(one, expected[name]) for name, one in tensors(resumed).items())


# --- buffers, skipped names ---


def test_buffers_are_copied_only_if_asked() -> None:
    student = Student()
    copying, published = EmaTeacher(student, copy_buffers=True), EmaTeacher(student)
    before = tensors(copying.model)
    learn(student, steps=3)
    student.get_buffer("scale").fill_(7.0)
    for teacher, wanted in ((copying, dict(student.named_buffers())), (published, before)):
        teacher.update(student)
        buffers = dict(teacher.model.named_buffers())
        assert set(buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "scale"}
        assert all(torch.equal(one, wanted[name]) for name, one in buffers.items())
    assert not torch.equal(student.get_buffer("norm.running_mean"), before["norm.running_mean"])


def test_skipped_names_do_not_change() -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=0.5, copy_buffers=True, skip=("encoder", "running"))
    before = tensors(teacher.model)
    learn(student)
    teacher.update(student)
    changed = {name for name, one in tensors(teacher.model).items() if not torch.equal(one, before[name])}
    assert changed == {"norm.weight", "norm.bias", "norm.num_batches_tracked", "head.weight", "head.bias"}


# --- no gradient, evaluation ---


def test_it_has_no_gradient() -> None:
    student = Student()
    teacher = EmaTeacher(student)
    out = teacher(torch.randn(8, 3, requires_grad=True))
    assert not out.requires_grad
    assert not any(one.requires_grad for one in teacher.parameters())
    learn(student)
    teacher.update(student)
    assert all(one.grad is None and one.is_leaf for one in teacher.parameters())


def test_it_stays_in_evaluation_mode() -> None:
    teacher = EmaTeacher(Student().train())
    x = torch.randn(8, 3)
    before = tensors(teacher)
    assert teacher.train() is teacher
    assert not any(one.training for one in teacher.modules())
    host = nn.ModuleList([teacher])
    host.train()
    assert not any(one.training for one in teacher.modules())
    assert torch.equal(teacher(x), teacher(x))
    assert all(torch.equal(one, before[name]) for name, one in tensors(teacher).items())


def test_arguments_and_results_pass_through() -> None:
    class Host(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> dict[str, Tensor]:
            return {"out": x * scale}

    assert EmaTeacher(Host())(torch.ones(1), scale=3.0)["out"].item() == 3


# --- wrappers, devices, types ---


@pytest.fixture
def _one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # without this, gloo looks up the machine's name
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_data_parallel_students_are_unwrapped_without_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student()
    wrapped = DistributedDataParallel(student)
    teacher, plain = EmaTeacher(wrapped, momentum=0.5), EmaTeacher(student, momentum=0.5)
    assert isinstance(teacher.model, Student)
    learn(wrapped)
    for name in ("all_reduce", "broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, None)
    teacher.update(wrapped)
    plain.update(student)
    assert teacher.state_dict().keys() == plain.state_dict().keys()
    for name, one in tensors(teacher).items():
        assert torch.equal(one, tensors(plain)[name])


@pytest.mark.usefixtures("_one_process")
def test_a_data_parallel_model_may_contain_a_teacher() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = Student()
            self.teacher = EmaTeacher(self.student, momentum=0.5)

        def forward(self, x: Tensor) -> Tensor:
            difference: Tensor = self.student(x) - self.teacher(x)
            return difference

    wrapped = DistributedDataParallel(Host())
    learn(wrapped)
    wrapped.module.teacher.update(wrapped.module.student)
    assert wrapped.module.teacher.num_updates == 1


def test_compiled_and_replicated_students_are_unwrapped() -> None:
    student = Student()
    for wrapped in (torch.compile(student, backend="eager"), DataParallel(student)):
        assert isinstance(wrapped, nn.Module)
        teacher = EmaTeacher(student, momentum=0.0, copy_buffers=True)
        assert EmaTeacher(wrapped).state_dict().keys() == teacher.state_dict().keys()
        learn(student)
        teacher.update(wrapped)
        assert all(torch.equal(one, tensors(student)[name]) for name, one in tensors(teacher.model).items())


@pytest.mark.usefixtures("fresh_compiler")
def test_the_teacher_compiles_to_one_graph() -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=0.5)
    x = torch.randn(8, 3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(teacher, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), teacher(x))
        learn(student)
        teacher.update(student)
    assert counter.frame_count == 1


def test_a_student_in_half_precision_is_averaged_in_float32() -> None:
    student = nn.Linear(3, 4)
    teacher = EmaTeacher(student, momentum=0.999)
    before = teacher.model.get_parameter("weight").clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.update(student.to(torch.bfloat16))
    moved = teacher.model.get_parameter("weight") - before
    assert teacher.model.get_parameter("weight").dtype == torch.float32
    torch.testing.assert_close(moved, torch.full((4, 3), 0.001), rtol=0.05, atol=0)


def test_copies_are_equal_and_settings_are_shown() -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=0.9, final_momentum=1.0, num_steps=5, skip=["encoder"])
    teacher.update(student)
    shown = "momentum=0.9, final_momentum=1.0, num_steps=5, copy_buffers=False, skip=('encoder',)"
    assert shown in repr(teacher)
    x = torch.randn(8, 3)
    for twin in (pickle.loads(pickle.dumps(teacher)), copy.deepcopy(teacher)):
        assert twin.num_updates == 1
        assert torch.equal(twin(x), teacher(x))
        twin.update(student)
        assert twin.num_updates == 2
    assert teacher.num_updates == 1


# --- errors ---


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"momentum": 1.1}, ValueError, r"`momentum` must be within \[0.0, 1.0\]; got 1.1"),
        ({"momentum": "0.9"}, TypeError, r"`momentum` must be a number; got str"),
        ({"final_momentum": 1.0}, ValueError, r"`final_momentum` and `num_steps` must be given together; got .*=None"),
        ({"num_steps": 5}, ValueError, r"`final_momentum` and `num_steps` must be given together; got final_.*=None"),
        ({"final_momentum": 2.0, "num_steps": 5}, ValueError, r"`final_momentum` must be within \[0.0, 1.0\]; got 2.0"),
        ({"final_momentum": 1.0, "num_steps": 0}, ValueError, r"`num_steps` must be at least 1; got 0"),
        ({"skip": "encoder"}, TypeError, r"`skip` must be a sequence of names; got the string 'encoder'"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EmaTeacher(nn.Linear(1, 1), **wrong)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a module; got dict"):
        EmaTeacher({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`model` must be a module; got NoneType"):
        EmaTeacher(nn.Linear(1, 1)).update(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    message = rf"`model` must have parameters of 32 or 64 bits to be averaged; got {dtype} in weight"
    with pytest.raises(TypeError, match=message):
        EmaTeacher(nn.Linear(1, 1).to(dtype))
    teacher = EmaTeacher(nn.Linear(1, 1)).to(dtype)
    with pytest.raises(TypeError, match=message):
        teacher.update(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(2, 2), r"for weight shape \(2, 3\); got \(2, 2\)"),
        (nn.Linear(3, 2, bias=False), r"for bias shape \(2,\); got None"),
        (nn.Bilinear(2, 3, 2), r"for weight shape \(2, 3\); got \(2, 2, 3\)"),
        (nn.Sequential(nn.Linear(3, 2)), r"for weight shape \(2, 3\); got None"),
    ],
)
def test_another_model_is_refused_without_changes(other: nn.Module, message: str) -> None:
    teacher = EmaTeacher(nn.Linear(3, 2), momentum=0.0)
    before = tensors(teacher)
    with pytest.raises(ValueError, match=r"`model` must have the tensors of the teacher, " + message):
        teacher.update(other)
    assert teacher.num_updates == 0
    assert all(torch.equal(one, before[name]) for name, one in tensors(teacher).items())


# --- tensors of every kind ---


class Kinds(nn.Module):
    """Parameters and buffers of many types. The first one is an integer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(5) + int(value), requires_grad=False)
        self.flags = nn.Parameter(torch.full((2,), value > 0), requires_grad=False)
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.wide = nn.Parameter(torch.full((2,), value, dtype=torch.float64))
        self.complex = nn.Parameter(torch.full((2,), value * 1j, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.kernel = nn.Parameter(torch.full((2, 3, 2, 2), value).to(memory_format=torch.channels_last))
        self.shared = self.kernel
        self.expanded = nn.Parameter(torch.full((1,), value).expand(3))
        self.register_buffer("halves", torch.full((2,), value * 1e4, dtype=torch.float16))
        self.register_buffer("short", torch.full((2,), value).to(torch.float8_e5m2))
        self.register_buffer("count", torch.tensor(int(value)))
        self.register_buffer("tiled", torch.full((1,), value).expand(3))


@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
def test_floats_are_averaged_and_other_types_copied(momentum: float) -> None:
    teacher = EmaTeacher(Kinds(0.0), momentum=momentum, copy_buffers=True)
    student = Kinds(4.0)
    teacher.update(student)
    inner, wanted = dict(teacher.model.named_parameters()), dict(student.named_parameters())
    assert torch.equal(inner["order"], torch.arange(5) + 4)
    assert inner["flags"].all()
    for name in ("frozen", "wide", "complex", "empty", "kernel", "expanded"):
        torch.testing.assert_close(inner[name], wanted[name].detach() * (1 - momentum), rtol=0, atol=0)
    assert inner["kernel"].is_contiguous(memory_format=torch.channels_last)
    for name, one in teacher.model.named_buffers():
        assert torch.equal(one.float(), student.get_buffer(name).float())
    assert teacher.num_left_out == 0


def test_nonfinite_values_of_the_student_are_skipped() -> None:
    student = Student()
    teacher = EmaTeacher(student, momentum=0.5, copy_buffers=True)
    before = tensors(teacher.model)
    with torch.no_grad():
        for value, number in ((math.nan, 0), (math.inf, 1), (-math.inf, 2)):
            student.encoder.weight.view(-1)[number] = value
        student.encoder.weight.view(-1)[3] += 1.0
        student.get_buffer("norm.running_mean")[0] = math.nan
    teacher.update(student)
    after = tensors(teacher.model)
    assert all(one.isfinite().all() for one in after.values())
    moved = (after["encoder.weight"] - before["encoder.weight"]).flatten()
    assert moved[3].item() == pytest.approx(0.5)
    assert moved.count_nonzero() == 1
    assert teacher.num_left_out == 2
    assert not any("num_left_out" in name for name in teacher.state_dict())
    teacher.update(Student())
    assert teacher.num_left_out == 2


def test_infinities_of_the_teacher_stay() -> None:
    student = nn.ParameterList([torch.tensor([-math.inf, 1.0])])
    teacher = EmaTeacher(student)
    teacher.update(student)
    assert next(teacher.model.parameters()).tolist() == [-math.inf, 1.0]


# --- reparametrization, sharding ---


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normed", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_a_student_with_normalized_weights_has_a_teacher(normed: Any) -> None:
    student = nn.Sequential(normed(nn.Linear(3, 3)), nn.ReLU())
    x = torch.randn(2, 3)
    student(x).sum().backward()
    teacher = EmaTeacher(student, momentum=0.0)
    torch.testing.assert_close(teacher(x), student.eval()(x))
    with torch.no_grad():
        for one in student.parameters():
            one.mul_(2.0)
    teacher.update(student)
    torch.testing.assert_close(teacher(x), student(x))
    assert not teacher(x).requires_grad


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    student = nn.Linear(2, 2)
    student.kept = [student(torch.ones(2))]  # type: ignore[assignment]
    for model in (student, nn.LazyLinear(2)):
        with pytest.raises(TypeError, match=r"^`model` must be a module that can be copied, before it is sharded; "):
            EmaTeacher(model)


@pytest.mark.parametrize("inference", ["student", "teacher", "update"])
def test_inference_mode_may_create_or_update_a_teacher(inference: str) -> None:
    with torch.inference_mode(inference == "student"):
        student = Student()
    with torch.inference_mode(inference == "teacher"):
        teacher = EmaTeacher(student, momentum=0.0, copy_buffers=True)
    with torch.inference_mode(inference == "update"):
        teacher.update(Student(seed=1))
    teacher.update(Student(seed=2))
    wanted = tensors(Student(seed=2))
    assert all(torch.equal(one, wanted[name]) for name, one in tensors(teacher.model).items())


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("teacher_too", [False, True])
def test_a_sharded_student_is_gathered(*, teacher_too: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    student, plain = Student(), Student()
    teacher, wanted = EmaTeacher(student, momentum=0.5), EmaTeacher(plain, momentum=0.5)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(student, mesh=mesh)
    if teacher_too:
        fully_shard(teacher.model, mesh=mesh)
    with torch.no_grad():
        for parameter in (*student.parameters(), *plain.parameters()):
            parameter.add_(1.0)
    teacher.update(student)
    wanted.update(plain)
    for parameter, other in zip(teacher.model.parameters(), wanted.model.parameters(), strict=True):
        whole: Any = parameter
        torch.testing.assert_close(whole.full_tensor() if teacher_too else whole, other, rtol=0, atol=0)
    message = r"^`model` must be a module that can be copied, before it is sharded; FSDPStudent cannot: "
    with pytest.raises(TypeError, match=message):
        EmaTeacher(student)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"copy_buffers": "no"}, r"`copy_buffers` must be True or False; got str"),
        ({"skip": [None]}, r"`skip` must be a sequence of names; got \[None\]"),
        ({"skip": 5}, r"`skip` must be a sequence of names; got 5"),
    ],
)
def test_a_setting_of_another_type_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        EmaTeacher(nn.Linear(1, 1), **wrong)


def test_skipped_names_may_have_half_precision() -> None:
    student = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))
    teacher = EmaTeacher(student, skip=["0."], momentum=0.0)
    teacher.update(student)
    assert teacher.model.get_parameter("0.weight").dtype == torch.float16
