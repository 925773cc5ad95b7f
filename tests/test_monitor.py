"""The monitor: its values, its sinks, and its lack of side effects."""

import csv
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from refusals import refuses
from ssync_loss import AdaptiveSSyncLoss, SSyncLoss
from ssync_loss.adapters import SlotMaps
from ssync_loss.diagnostics import premise, slots_in_use, summary
from ssync_loss.functional import pseudo_labels
from ssync_loss.monitor import VALUES, Monitor
from ssync_loss.visualize import panel

GRADIENTS = {"enc_gradient", "dec_gradient", "host_enc_gradient", "host_dec_gradient"}


def two_maps(B: int = 2, T: int = 3, S: int = 4, H: int = 5, W: int = 6, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    enc, dec = (torch.randn(B, T, S, H, W, generator=generator).requires_grad_() for _ in range(2))
    return enc, dec


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "values.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Recorder:
    """Records calls of a TensorBoard writer."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.images: dict[str, tuple[Tensor, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value, step

    def add_image(self, name: str, picture: Tensor, step: int) -> None:
        self.images[name] = picture, step


# --- values ---


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_values_equal_the_diagnostics(tmp_path: Path, is_masked: bool) -> None:
    enc, dec = two_maps()
    masks: dict[str, Any] = {}
    features, criterion = torch.randn(2, 3, 7, 5, 6), SSyncLoss(merge_threshold=0.3, max_different=1)
    if is_masked:
        masks = {"valid": torch.rand(2, 3, 5, 6) < 0.7, "slot_mask": torch.tensor([[True] * 4, [True, False] * 2])}
        features = features.masked_fill(~masks["valid"].unsqueeze(2), torch.nan)
    maps = SlotMaps(enc, dec, **masks)
    values = Monitor(criterion, to=tmp_path)(maps, step=0, loss=criterion(**maps), features=features)
    assert values is not None
    terms = criterion.terms(**maps)
    wanted = {name: one.double().mean().item() for name, one in summary(terms.labels, **masks)._asdict().items()}
    wanted |= {f"{side}_groups": wanted[f"{side}_slots"] for side in ("enc", "dec")}
    plain = pseudo_labels(enc, dec, merge_threshold=None, **masks)
    valid = masks.get("valid")
    wanted["enc_slots"] = slots_in_use(plain.enc_labels, valid=valid).double().mean().item()
    wanted["dec_slots"] = slots_in_use(plain.dec_labels, valid=valid).double().mean().item()
    asked = premise(enc, dec, features, merge_threshold=0.3, **masks)
    assert asked.merged_margin is not None
    wanted |= {"margin": asked.margin.mean().item(), "merged_margin": asked.merged_margin.mean().item()}
    assert wanted["merges"] > 0
    wanted["loss"] = terms.total.item()
    assert {name: one for name, one in values.items() if name not in GRADIENTS} == pytest.approx(wanted, abs=1e-6)
    (row,) = read_rows(tmp_path)
    assert row["step"] == "0"
    assert {name: float(one) for name, one in row.items() if one and name != "step"} == pytest.approx(values)
    assert [*row] == ["step", *VALUES]


def test_margins_skip_constant_features_and_are_nan_for_nan_maps(tmp_path: Path) -> None:
    enc, dec = two_maps()
    features = torch.randn(2, 3, 7, 5, 6)
    features[1] = 3.0
    monitor, loss = Monitor(SSyncLoss(), to=tmp_path), torch.zeros(())
    values = monitor((enc, dec), step=0, loss=loss, features=features)
    assert values is not None
    assert values["margin"] == pytest.approx(premise(enc, dec, features).margin[0].item(), abs=1e-6)
    nowhere = monitor((enc, dec), step=0, loss=loss, features=torch.ones_like(features))
    assert nowhere is not None
    assert nowhere["margin"] == nowhere["merged_margin"] == 0
    broken = monitor((enc * torch.nan, dec), step=0, loss=loss, features=features)
    assert broken is not None
    assert np.isnan(broken["margin"])


def test_gradients_of_both_losses_at_both_maps(tmp_path: Path) -> None:
    enc, dec = two_maps()
    criterion = SSyncLoss()
    loss = criterion(enc, dec)
    host_loss = 3 * enc.sum() - 4 * dec.sum()
    values = Monitor(criterion, to=tmp_path)((enc, dec), step=0, loss=loss, host_loss=host_loss)
    assert values is not None
    # the norm of a constant is its size times the root of the number of cells
    assert values["host_enc_gradient"] == pytest.approx(3 * enc.numel() ** 0.5)
    assert values["host_dec_gradient"] == pytest.approx(4 * enc.numel() ** 0.5)
    assert [one.grad for one in (enc, dec)] == [None, None]
    loss.backward()
    for name, one in (("enc_gradient", enc), ("dec_gradient", dec)):
        assert one.grad is not None
        assert values[name] == pytest.approx(one.grad.norm().item())
    assert values["host_loss"] == pytest.approx(host_loss.item())


def test_a_map_stacked_from_frames_is_traced_back_to_them(tmp_path: Path) -> None:
    # most hosts have (B, S, N) per frame, and their losses read single frames
    leaf = torch.randn(3, 2, 4, 30, requires_grad=True)
    frames = [2 * one for one in leaf]
    enc = torch.stack(frames, 1).unflatten(3, (5, 6)).to(torch.float64)
    dec = torch.cat([one.mT.unsqueeze(1) for one in frames], 1).permute(0, 1, 3, 2).reshape(2, 3, 4, 5, 6)
    criterion = SSyncLoss()
    loss, host_loss = criterion(enc, dec), 5 * (frames[0].sum() + frames[2].sum())
    values = Monitor(criterion, to=tmp_path)((enc, dec), step=0, loss=loss, host_loss=host_loss)
    assert values is not None
    # two of three frames, with 240 values each
    for side in ("enc", "dec"):
        assert values[f"host_{side}_gradient"] == pytest.approx(5 * 480**0.5)
    by_hand = torch.autograd.grad(loss, [*frames])
    assert values["enc_gradient"] == pytest.approx(torch.stack(by_hand).norm().item())


def test_a_map_sliced_from_a_tensor_is_not_traced_back(tmp_path: Path) -> None:
    whole = torch.randn(2, 3, 8, 5, 6, requires_grad=True) * 1
    enc, dec = whole[:, :, :4], whole[:, :, 4:]
    values = Monitor(SSyncLoss(), to=tmp_path)((enc, dec), step=0, loss=2 * enc.sum(), host_loss=whole.sum())
    assert values is not None
    assert values["enc_gradient"] == pytest.approx(2 * enc.numel() ** 0.5)
    assert GRADIENTS & values.keys() == {"enc_gradient"}


def test_training_is_the_same_with_a_monitor(tmp_path: Path) -> None:
    def train(monitor: Monitor | None) -> Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 6)
        optimizer, criterion = torch.optim.SGD(layer.parameters(), lr=0.1), SSyncLoss()
        inputs = torch.randn(2, 3, 4, 5, 6)
        for step in range(4):
            enc = layer(inputs)
            dec = torch.tanh(layer(enc))
            loss, host_loss = criterion(enc, dec), dec.square().sum()
            if monitor is not None:
                features, video = torch.randn(2, 3, 7, 5, 6, generator=torch.Generator()), torch.zeros(2, 3, 3, 10, 12)
                monitor(SlotMaps(enc, dec), step=step, loss=loss, host_loss=host_loss, features=features, video=video)
            optimizer.zero_grad()
            (host_loss + loss).backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(train(None), train(Monitor(SSyncLoss(), every=2, to=tmp_path)))
    assert [row["step"] for row in read_rows(tmp_path)] == ["0", "2"]
    assert sorted(one.name for one in tmp_path.glob("*.png")) == ["panel_0000000.png", "panel_0000002.png"]


def test_unavailable_gradients_are_left_out(tmp_path: Path) -> None:
    enc, dec = two_maps()
    criterion = SSyncLoss()
    monitor = Monitor(criterion, to=tmp_path)
    # the host's loss does not read this encoder map
    reached = monitor((enc, dec), step=0, loss=criterion(enc, dec), host_loss=dec.sum())
    assert reached is not None
    assert GRADIENTS - reached.keys() == {"host_enc_gradient"}
    with torch.no_grad():
        evaluated = monitor((enc, dec), step=100, loss=criterion(enc, dec))
    assert evaluated is not None
    assert not GRADIENTS & evaluated.keys()
    detached = monitor((enc.detach(), dec), step=200, loss=(dec**2).sum())
    assert detached is not None
    assert GRADIENTS & detached.keys() == {"dec_gradient"}
    assert [row["host_enc_gradient"] for row in read_rows(tmp_path)] == ["", "", ""]
    assert all(row["margin"] == "" for row in read_rows(tmp_path))


def test_the_criterion_determines_layout_and_settings(tmp_path: Path) -> None:
    enc, dec = (one.detach() for one in two_maps())
    features = torch.randn(2, 3, 7, 5, 6)
    plain = Monitor(SSyncLoss(), to=tmp_path)((enc, dec), step=0, loss=torch.zeros(()), features=features)
    flat = [one.flatten(3).transpose(2, 3).flatten(0, 1) for one in (enc, dec)]
    criterion = AdaptiveSSyncLoss(SSyncLoss(axes="(b t) (h w) s", grid=(5, 6)), features_axes="b t (h w) d")
    laid_out = Monitor(criterion, to=tmp_path)(
        (flat[0], flat[1]), step=0, loss=torch.zeros(()), features=features.flatten(3).mT, num_frames=3
    )
    of_defaults = Monitor(to=tmp_path)((enc, dec), step=0, loss=torch.zeros(()), features=features)
    assert plain is not None
    assert laid_out == pytest.approx(plain)
    assert of_defaults == plain


def test_a_schedule_uses_the_monitors_step(tmp_path: Path) -> None:
    enc, dec = two_maps()
    criterion = SSyncLoss(start_step=10, ramp_steps=5)
    values = Monitor(criterion, to=tmp_path)((enc, dec), step=0, loss=criterion(enc, dec, step=0))
    assert values is not None
    assert (values["loss"], values["enc_gradient"], values["dec_gradient"]) == (0, 0, 0)


# --- when it writes ---


def test_arguments_are_ignored_between_due_steps(tmp_path: Path) -> None:
    monitor = Monitor(SSyncLoss(), every=10, to=tmp_path / "new")
    nothing: Any = None
    assert [monitor(nothing, step=step, loss=nothing) for step in (1, 9, 11, np.int64(13))] == [None] * 4
    monitor.picture(nothing, nothing, step=5)
    assert not (tmp_path / "new").exists()
    assert [step for step in range(25) if monitor.is_due(step)] == [0, 10, 20]


def test_one_rank_writes_and_all_take_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    (enc, dec), monitor = two_maps(), Monitor(SSyncLoss(), to=tmp_path)
    for rank in (1, 0):
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr("torch.distributed.get_rank", partial(int, rank))
        values = monitor((enc, dec), step=0, loss=enc.sum())
        assert values is not None
        assert values["enc_gradient"] > 0
    assert len(read_rows(tmp_path)) == 1


def test_a_resumed_run_appends_to_its_file(tmp_path: Path) -> None:
    for step in (0, 100):
        Monitor(SSyncLoss(), to=str(tmp_path))(two_maps(), step=step, loss=torch.zeros(()))
    assert [row["step"] for row in read_rows(tmp_path)] == ["0", "100"]


# --- where it writes ---


def test_a_png_file_holds_the_panel_of_the_first_clip(tmp_path: Path) -> None:
    enc, dec = two_maps()
    video, criterion = torch.rand(2, 3, 3, 10, 12), SSyncLoss(merge_threshold=0.3, max_different=1)
    monitor = Monitor(criterion, to=tmp_path)
    monitor((enc, dec), step=200, loss=criterion(enc, dec), video=video)
    with Image.open(tmp_path / "panel_0000200.png") as image:
        image.verify()
    wanted = panel(video, enc, dec, labels=criterion.terms(enc, dec).labels)[0]
    with Image.open(tmp_path / "panel_0000200.png") as image:
        assert image.mode == "RGB"
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), wanted)


def test_picture_writes_only_the_panel(tmp_path: Path) -> None:
    enc, dec = two_maps(1)
    video = torch.rand(1, 3, 3, 10, 12)
    Monitor(SSyncLoss(), to=tmp_path).picture(SlotMaps(enc, dec), video, step=100)
    assert [one.name for one in tmp_path.iterdir()] == ["panel_0000100.png"]
    with Image.open(tmp_path / "panel_0000100.png") as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), panel(video, enc, dec)[0])


def test_tensorboard_gets_scalars_and_an_image() -> None:
    writer, (enc, dec), video = Recorder(), two_maps(), torch.rand(2, 3, 3, 10, 12)
    values = Monitor(SSyncLoss(), to=writer)((enc, dec), step=300, loss=enc.sum(), video=video)
    assert values is not None
    assert writer.scalars == {f"ssync/{name}": (value, 300) for name, value in values.items()}
    picture, step = writer.images["ssync/panel"]
    assert step == 300
    assert torch.equal(picture, panel(video, enc, dec)[0])
    # a writer without images
    numbers = SimpleNamespace(add_scalar=writer.add_scalar)
    assert Monitor(SSyncLoss(), to=numbers)((enc, dec), step=0, loss=enc.sum(), video=video)


def test_lightning_gets_a_dictionary_without_the_step() -> None:
    logged: list[dict[str, float]] = []
    module = SimpleNamespace(log=None, log_dict=logged.append)
    maps, monitor = two_maps(), Monitor(SSyncLoss(), to=module)
    values = monitor(maps, step=0, loss=torch.ones(()), video=torch.rand(2, 3, 3, 10, 12))
    assert values is not None
    assert logged == [{f"ssync/{name}": value for name, value in values.items()}]
    monitor.picture(maps, torch.rand(2, 3, 3, 10, 12), step=0)
    assert len(logged) == 1


def test_weights_and_biases_get_a_dictionary_with_the_step_and_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    run = SimpleNamespace(log=lambda told, step: logged.append((told, step)))
    maps, video = two_maps(), torch.rand(2, 3, 3, 10, 12)
    monitor = Monitor(SSyncLoss(), to=run)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda pixels: ("image", pixels)))
    values = monitor(maps, step=100, loss=torch.ones(()), video=video)
    assert values is not None
    ((told, step),) = logged
    kind, pixels = told.pop("ssync/panel")
    assert (told, step, kind) == ({f"ssync/{name}": value for name, value in values.items()}, 100, "image")
    assert np.array_equal(pixels, panel(video, *maps)[0].permute(1, 2, 0).numpy())
    # without wandb there is no image
    monkeypatch.delitem(sys.modules, "wandb")
    monitor.picture(maps, video, step=100)
    assert len(logged) == 1


# --- warnings ---


def test_a_large_gradient_warns_once_per_map(tmp_path: Path) -> None:
    enc, dec = two_maps()
    monitor = Monitor(SSyncLoss(), to=tmp_path)
    # 11 times at the decoder map is too much, 10 times at the encoder map is not
    loss, host_loss = 10 * enc.sum() + 11 * dec.sum(), enc.sum() + dec.sum()
    words = "At the decoder's map the gradient of SSync is 11 times that of the host's loss: lower `boundary_weight`"
    with pytest.warns(UserWarning, match=words) as said:
        monitor((enc, dec), step=0, loss=loss, host_loss=host_loss)
    assert len(said) == 1
    assert said[0].filename == __file__
    monitor((enc, dec), step=100, loss=loss, host_loss=host_loss)
    with pytest.warns(UserWarning, match="At the encoder's map .* lower `interior_weight` and `boundary_weight`"):
        monitor((enc, dec), step=200, loss=2 * loss, host_loss=host_loss)
    # a host loss of 0 gives no warning
    Monitor(SSyncLoss(), to=tmp_path)((enc, dec), step=0, loss=loss, host_loss=0 * host_loss)


def test_a_call_after_backward_warns(tmp_path: Path) -> None:
    enc, dec = two_maps()
    criterion = SSyncLoss(backend="torch")
    loss = criterion(enc, dec)
    loss.backward()
    monitor = Monitor(criterion, to=tmp_path)
    with pytest.warns(UserWarning, match="Call the monitor before backward") as said:
        values = monitor((enc, dec), step=0, loss=loss)
    assert said[0].filename == __file__
    assert values is not None
    assert values["loss"] == loss.item()
    assert not GRADIENTS & values.keys()
    monitor((enc, dec), step=100, loss=loss)
    assert len(read_rows(tmp_path)) == 2


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Make writes fail halfway, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_warns_and_leaves_no_partial_file(tmp_path: Path) -> None:
    maps, monitor = two_maps(), Monitor(SSyncLoss(), to=tmp_path)
    given: dict[str, Any] = {"loss": torch.zeros(()), "video": torch.rand(2, 3, 3, 10, 12)}
    monitor(maps, step=0, **given)
    table = (tmp_path / "values.csv").read_bytes()
    with warnings.catch_warnings(record=True) as said, no_file_larger_than(len(table) + 10):
        warnings.simplefilter("always")
        values = [monitor(maps, step=step, **given) for step in (100, 200)]
    assert [str(one.message).partition(":")[0] for one in said] == ["The monitor cannot write"]
    assert said[0].filename == __file__
    assert all(values)
    assert (tmp_path / "values.csv").read_bytes() == table
    # the partial picture is removed, too
    with no_file_larger_than(100):
        monitor.picture(maps, given["video"], step=300)
    assert [one.name for one in tmp_path.glob("*.png")] == ["panel_0000000.png"]
    # the disk has space again
    monitor(maps, step=400, **given)
    assert [row["step"] for row in read_rows(tmp_path)] == ["0", "400"]


def test_an_unwritable_folder_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    monitor = Monitor(SSyncLoss(), to=tmp_path / "file")
    with pytest.warns(UserWarning, match=r"The monitor cannot write: .* Training continues without it. \(Said once.\)"):
        assert monitor(two_maps(), step=0, loss=torch.zeros(()))
    assert monitor(two_maps(), step=100, loss=torch.zeros(()))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_failing_logger_only_warns() -> None:
    class Broken(Recorder):
        def add_scalar(self, name: str, value: float, step: int) -> None:
            raise OSError("Read-only file system")

    with pytest.warns(UserWarning, match="The monitor cannot write: Read-only file system"):
        assert Monitor(SSyncLoss(), to=Broken())(two_maps(), step=0, loss=torch.zeros(()))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    enc, dec = two_maps()
    loss = torch.zeros(())
    refuses(TypeError, "`criterion` must be SSyncLoss; got float.", Monitor, 0.6)
    refuses(ValueError, "`every` must be at least 1; got 0.", Monitor, SSyncLoss(), every=0)
    refuses(TypeError, "`to` must be a folder, or an object with `add_scalar`", Monitor, SSyncLoss(), to=3)
    monitor = Monitor(SSyncLoss(), to=tmp_path / "new")
    pair = "`maps` must be SlotMaps or a pair (enc_logits, dec_logits); got "
    refuses(TypeError, f"{pair}NoneType.", monitor, None, step=0, loss=loss)
    refuses(TypeError, f"{pair}3 of them.", monitor, (enc, dec, dec), step=0, loss=loss)
    refuses(TypeError, "`enc_logits` must be a tensor; got NoneType.", monitor, (None, dec), step=0, loss=loss)
    for step in (1.0, True, torch.tensor(3), None):
        refuses(TypeError, "`step` must be a Python int; got", monitor, (enc, dec), step=step, loss=loss)
    refuses(TypeError, "`loss` must be a tensor; got float.", monitor, (enc, dec), step=0, loss=0.5)
    refuses(ValueError, "`loss` must have shape (); got (1,).", monitor, (enc, dec), step=0, loss=loss[None])
    refuses(
        TypeError, "`host_loss` must be floating point;", monitor, (enc, dec), step=0, loss=loss, host_loss=loss.long()
    )
    features = torch.zeros(2, 3, 7, 4, 6)
    refuses(ValueError, "`features` must have shape", monitor, (enc, dec), step=0, loss=loss, features=features)
    refuses(ValueError, "`video` must have shape", monitor, (enc, dec), step=0, loss=loss, video=features)
    assert not (tmp_path / "new").exists()
