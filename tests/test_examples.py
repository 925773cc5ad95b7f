"""The main example in short: its data, its model, stopping and resuming."""

import doctest
import json
import math
import re
import shutil
import signal
from importlib import import_module
from itertools import count
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from examples import moving_objects, report, train_moving_objects, training
from examples.checkpoint import Settings, TrainingState, batch_of_step
from examples.data import make_data
from examples.dense_alignment import DenseAlignment, DenseSettings
from examples.evaluation import EvaluationSet, ask_premise, evaluate
from examples.features import FrozenFeatures
from examples.slot_model import SlotModel, SlotOutput, cosine_basis, reconstruction_loss, slot_contrast_loss
from PIL import Image
from torch import Tensor

from ssync_loss import SSyncLoss
from ssync_loss.functional import dense_decoder_alignment_loss, dense_encoder_alignment_loss, slot_redundancy_loss

QUICK = ["--quick", "--steps", "10", "--slots", "4", "--threads", "1"]


def train(state: TrainingState, features: Tensor, until: int, folder: Path, criterion: SSyncLoss | None = None) -> None:
    terms = training.terms_of(state, criterion)
    training.train(state, features, terms, until, title="test", save=lambda: state.save(folder / "state.pt"))


EXAMPLES = Path(moving_objects.__file__).parent
SCRIPTS = [path for name in ("examples", "benchmarks") for path in sorted((EXAMPLES.parent / name).rglob("*.py"))]
DOCUMENTED = [path for path in SCRIPTS if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: path.stem)
def test_doctests_of_examples_pass(path: Path) -> None:
    module = import_module(".".join(path.relative_to(EXAMPLES.parent).with_suffix("").parts))
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


class TestMovingObjects:
    def test_the_seed_decides(self) -> None:
        first, again, other = (moving_objects.moving_objects(60, seed=seed) for seed in (3, 3, 4))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first.video, other.video)
        assert first.video.shape == (60, 4, 3, 48, 48)
        assert 0 <= first.video.min() < first.video.max() <= 1

    def test_two_to_four_objects(self) -> None:
        clips = moving_objects.moving_objects(100, seed=0)
        assert set(clips.num_objects.tolist()) == {2, 3, 4}
        assert torch.equal(clips.ids.flatten(1).amax(1), clips.num_objects)
        assert (clips.ids == 0).flatten(1).any(1).all()

    def test_surfaces_have_distinct_colors(self) -> None:
        clips = moving_objects.moving_objects(200, seed=0)
        gap = torch.cdist(clips.colors, clips.colors) + 9 * torch.eye(5)
        assert gap.min() >= 0.5 - 1e-4

    def test_ids_match_the_visible_colors(self) -> None:
        clips = moving_objects.moving_objects(8, seed=1, contrast=0.0, noise=0.0)
        rows = torch.arange(8).view(-1, 1, 1, 1)
        assert torch.equal(clips.video.movedim(2, -1), clips.colors[rows, clips.ids])

    def test_later_objects_cover_earlier_ones(self) -> None:
        # shapes are convex, so a whole object fills one run of pixels in every line
        clips = moving_objects.moving_objects(150, seed=2)
        last = clips.ids == clips.num_objects.view(-1, 1, 1, 1)
        assert _runs(last).max() == 1
        assert _runs(clips.ids == 1).max() > 1

    def test_objects_move_slowly(self) -> None:
        clips = moving_objects.moving_objects(50, seed=0)
        last = (clips.ids == clips.num_objects.view(-1, 1, 1, 1)).double()
        inside = last[..., 1:-1, 1:-1].flatten(2).sum(2) == last.flatten(2).sum(2)
        column = (last * torch.arange(48)).flatten(2).sum(2) / last.flatten(2).sum(2)
        step = column.diff(dim=1).abs()[inside[:, 1:] & inside[:, :-1]]
        assert step.max() < 0.05 * 48 + 0.5
        assert step.max() > 0.02 * 48


class TestFeatures:
    def test_tokens_are_centered_decorrelated_and_scaled(self) -> None:
        video = moving_objects.moving_objects(20, seed=0).video
        tokens = FrozenFeatures(12).fit(video)(video)
        assert tokens.shape == (20, 4, 12, 12, 12)
        flat = tokens.movedim(2, -1).flatten(0, -2).double()
        covariance = flat.T @ flat / len(flat)
        variance = covariance.diagonal()
        assert flat.mean(0).abs().max() < 1e-3
        assert (covariance - variance.diag()).abs().max() < 1e-3
        assert variance.mean().item() == pytest.approx(1, abs=1e-3)
        assert torch.equal(variance, variance.sort(descending=True).values)

    def test_tokens_are_half_whitened(self) -> None:
        # half-whitening takes the square root of every variance
        video = moving_objects.moving_objects(20, seed=0).video
        features = FrozenFeatures(6).fit(video)
        raw = torch.cat([features._raw(clip[None]) for clip in video]).movedim(2, -1).flatten(0, -2)
        principal = torch.linalg.eigvalsh(torch.corrcoef(raw.double().T)).flip(0)[:6]
        tokens = features(video).movedim(2, -1).flatten(0, -2).double()
        ratio = tokens.var(0) / principal.sqrt()
        assert (ratio / ratio.mean() - 1).abs().max() < 0.01

    def test_fitted_features_survive_a_state_dict(self) -> None:
        video = torch.rand(2, 2, 3, 24, 40)
        fitted, loaded = FrozenFeatures(4).fit(video), FrozenFeatures(4, seed=9)
        loaded.load_state_dict(fitted.state_dict())
        assert torch.equal(loaded(video), fitted(video))
        assert loaded(video).shape == (2, 2, 4, 6, 10)

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"`video` must have shape \(B, T, 3, H, W\); got \(2, 3, 16, 16\)"):
            FrozenFeatures()(torch.rand(2, 3, 16, 16))
        with pytest.raises(ValueError, match=r"`video` must have H and W that are multiples of 4; got \(16, 18\)"):
            FrozenFeatures()(torch.rand(1, 2, 3, 16, 18))


class TestSlotModel:
    def test_every_parameter_gets_a_gradient(self) -> None:
        torch.manual_seed(0)
        model, features = SlotModel(3, feature_dim=5, dim=8), torch.randn(2, 3, 5, 4, 6)
        output = model(features)
        assert output.slots.shape == (2, 3, 3, 8)
        assert output.enc_logits.shape == output.dec_logits.shape == (2, 3, 3, 4, 6)
        assert output.reconstruction.shape == features.shape
        loss = reconstruction_loss(output, features) + slot_contrast_loss(output.slots)
        (loss + SSyncLoss()(output.enc_logits, output.dec_logits)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_the_map_is_from_the_last_iteration_and_attention_from_all(self) -> None:
        torch.manual_seed(0)
        model, features = SlotModel(3, feature_dim=5, dim=8), torch.randn(2, 1, 5, 4, 6)
        output = model(features)
        tokens = model.encoder(features)
        slots = model.initial_slots.expand(2, -1, -1)
        _, dots = model.attention(tokens[:, 0], slots, iterations=3)
        assert len(dots) == 3
        torch.testing.assert_close(output.enc_logits.flatten(3)[:, 0], dots[-1])
        over_patches = sum(scores.exp() / scores.exp().sum(2, keepdim=True) for scores in dots) / 3
        torch.testing.assert_close(output.attention.flatten(3)[:, 0], over_patches)
        torch.testing.assert_close(output.tokens[0, 0, :, 1, 2], tokens[0, 0, 1 * 6 + 2])

    def test_slots_take_the_mean_of_their_tokens(self) -> None:
        # a mean does not change if every token is repeated
        torch.manual_seed(0)
        attention = SlotModel(2, dim=8).attention
        tokens, slots = torch.randn(1, 5, 8), torch.randn(1, 2, 8)
        once, _ = attention(tokens, slots, iterations=2)
        twice, _ = attention(tokens.repeat(1, 2, 1), slots, iterations=2)
        torch.testing.assert_close(twice, once)

    def test_reconstruction_mixes_by_the_decoder_map(self) -> None:
        torch.manual_seed(0)
        decoder = SlotModel(3, feature_dim=5, dim=8).decoder
        slots = torch.randn(1, 1, 3, 8)
        alpha, painted = decoder(slots, 4, 6)
        expected = torch.einsum("shw,sd->dhw", alpha[0, 0].softmax(0), decoder.to_feature(slots)[0, 0])
        torch.testing.assert_close(painted[0, 0], expected)

    def test_cosines_are_orthogonal_and_start_constant(self) -> None:
        basis = cosine_basis(3, 6, 8).flatten(1).double()
        gram = basis @ basis.T
        assert torch.equal(basis[0], torch.ones(48).double())
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-5

    def test_slot_contrast_is_small_only_for_constant_slots(self) -> None:
        slots = torch.eye(4).view(2, 1, 2, 4).expand(2, 3, 2, 4)  # four orthogonal slots in two clips
        assert slot_contrast_loss(slots).item() == pytest.approx(math.log(1 + 3 * math.exp(-10)), abs=1e-6)
        swapped = torch.stack([slots[:, 0], slots[:, 0].flip(1)], dim=1)
        assert slot_contrast_loss(swapped).item() == pytest.approx(10 + math.log(1 + 3 * math.exp(-10)), abs=1e-5)


class TestTraining:
    def test_an_epoch_has_every_clip_once_in_a_new_order(self) -> None:
        def one_pass(number: int) -> Tensor:
            steps = range(4 * number, 4 * number + 4)
            return torch.cat([batch_of_step(step, num_clips=12, batch_size=3, seed=5) for step in steps])

        assert torch.equal(one_pass(0).sort().values, torch.arange(12))
        assert torch.equal(one_pass(0), one_pass(0))
        assert not torch.equal(one_pass(0), one_pass(1))
        assert len(batch_of_step(7, num_clips=2, batch_size=16, seed=0)) == 2

    def test_the_loss_changes_nothing_before_its_start(self, tmp_path: Path) -> None:
        settings = Settings("noise", 8, slots=3, steps=20)
        features = torch.randn(8, 2, 24, 4, 4)

        def weights(criterion: SSyncLoss | None, until: int) -> list[Tensor]:
            state = TrainingState.fresh(settings, 0)
            train(state, features, until, tmp_path, criterion)
            return list(state.model.state_dict().values())

        line = SSyncLoss(start_step=settings.start_step)
        assert settings.start_step == 6
        assert all(map(torch.equal, weights(line, 6), weights(None, 6)))
        assert not all(map(torch.equal, weights(line, 7), weights(None, 7)))

    @pytest.mark.parametrize("dense", [False, True])
    def test_a_state_survives_saving_and_loading(self, dense: bool, tmp_path: Path) -> None:
        settings = Settings("noise", 8, slots=3, steps=10)
        state, start = (TrainingState.fresh(settings, 1, dense=dense) for _ in range(2))
        train(state, torch.randn(8, 4, 24, 3, 3), 3, tmp_path)
        drawn = torch.rand(3)
        loaded = TrainingState.load(tmp_path / "state.pt", settings, 1)
        assert torch.equal(torch.rand(3), drawn)
        for name, part in state.content().items():
            assert name == "rng" or _same(loaded.content()[name], part), name
        # the projections of dense alignment are trained, too
        assert (state.alignment is not None) == dense
        assert not any(map(torch.equal, state.parameters(), start.parameters()))

    def test_rate_warms_up_and_falls_to_half(self) -> None:
        state = TrainingState.fresh(Settings("noise", 8, steps=100, warmup_steps=10), 0)
        rates = []
        for _ in range(101):
            rates.append(state.optimizer.param_groups[0]["lr"])
            state.optimizer.step()
            state.scheduler.step()
        assert rates[0] == pytest.approx(2e-4)
        assert max(rates) == rates[9]
        assert rates[100] == pytest.approx(1e-3)


class TestDenseAlignment:
    """Twenty steps: slot redundancy in the first two, alignment from the fifth on."""

    @staticmethod
    def made(*, num_clips: int = 2) -> tuple[DenseAlignment, SlotOutput, Tensor]:
        """Return the terms, a model output whose parts are leaves, and the features."""
        torch.manual_seed(0)
        features = torch.randn(num_clips, 4, 5, 4, 4, requires_grad=True)
        output = SlotModel(3, feature_dim=5, dim=8)(features)
        leaves = SlotOutput(*(part.detach().requires_grad_() for part in output))
        return DenseAlignment(DenseSettings(20), feature_dim=5, dim=8), leaves, features

    def test_settings_and_schedule_are_published(self) -> None:
        settings = DenseSettings(100_000)
        assert (settings.redundancy_end, settings.start_step) == (10_000, 20_000)
        assert (settings.weight, settings.redundancy_weight) == (0.1, 0.1)
        assert (settings.group_frames, settings.top_k) == (4, 8)

    def test_both_terms_equal_their_formulas(self) -> None:
        alignment, output, features = self.made()
        loss = alignment(output, features, step=4)
        given = (
            alignment.project_features.weight,
            alignment.project_tokens.weight,
            output.reconstruction,
            output.tokens,
        )
        gradients = torch.autograd.grad(loss, given)

        first, second, reconstruction, tokens = (tensor.detach().requires_grad_() for tensor in given)

        def projected(maps: Tensor, weight: Tensor) -> Tensor:
            return torch.einsum("btdhw,cd->btchw", maps, weight)

        decoder = dense_decoder_alignment_loss(
            projected(reconstruction, first),
            projected(features, first).detach(),
            output.enc_logits.argmax(2),
            group_frames=4,
        )
        encoder = dense_encoder_alignment_loss(
            projected(tokens, second), features, output.dec_logits.argmax(2), group_frames=4, top_k=8
        )
        expected = 0.1 * decoder + 0.1 * encoder
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, (first, second, reconstruction, tokens)))

    @pytest.mark.parametrize(("step", "taught"), [(0, {"attention"}), (4, {"reconstruction", "tokens"})])
    def test_attention_gets_gradients_first_then_reconstruction_and_tokens(self, step: int, taught: set[str]) -> None:
        alignment, output, features = self.made()
        alignment(output, features, step=step).backward()
        for name, part in output._asdict().items():
            assert (part.grad is not None and part.grad.abs().sum() > 0) == (name in taught), name
        assert features.grad is None
        assert all((p.grad is not None and p.grad.abs().sum() > 0) == (step > 0) for p in alignment.parameters())

    def test_schedule_is_redundancy_pause_alignment(self) -> None:
        alignment, output, features = self.made()
        redundancy = 0.1 * slot_redundancy_loss(output.attention, output.slots)
        losses = [alignment(output, features, step=step) for step in range(20)]
        assert redundancy > 0
        assert torch.equal(torch.stack(losses[:2]), redundancy.expand(2))
        assert torch.equal(torch.stack(losses[2:4]), torch.zeros(2))
        assert torch.equal(torch.stack(losses[4:]), losses[-1].expand(16))
        assert losses[-1] > redundancy

    def test_the_model_starts_from_the_same_weights(self) -> None:
        settings = Settings("noise", 8, slots=3, steps=20)
        without, with_it = (TrainingState.fresh(settings, 3, dense=dense) for dense in (False, True))
        assert _same(without.model.state_dict(), with_it.model.state_dict())
        assert without.alignment is None
        assert with_it.alignment is not None
        trained = {id(p) for group in with_it.optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in (*with_it.model.parameters(), *with_it.alignment.parameters())} == trained

    def test_all_gradients_are_clipped_together(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clipped: list[set[int]] = []
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda parameters, _: clipped.append({id(p) for p in parameters})
        )
        state = TrainingState.fresh(Settings("noise", 8, slots=3, steps=10), 0, dense=True)
        train(state, torch.randn(8, 4, 24, 3, 3), 1, tmp_path)
        assert clipped == [{id(p) for p in state.parameters()}]
        assert len(state.parameters()) == len([*state.model.parameters()]) + 2


class TestEvaluation:
    def test_perfect_masks_score_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = torch.zeros(2, 2, 8, 8, dtype=torch.int64)
        ids[:, :, :4, :4], ids[:, :, 4:, 4:] = 1, 2
        logits = 50.0 * torch.nn.functional.one_hot(ids, 3).movedim(-1, 2)
        monkeypatch.setattr("examples.evaluation.maps_of", lambda *_: (logits, logits))
        data = EvaluationSet(torch.rand(2, 2, 3, 8, 8), torch.rand(2, 2, 4, 8, 8), ids)
        scores = evaluate(SlotModel(3), data, 0.6)
        ones = {f"dec_{name}" for name in ("fg_ari", "ari", "mbo", "recall", "fragmentation")}
        ones |= {"enc_fg_ari", "enc_mbo", "agreement"}
        assert {name: scores[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1.0))
        assert scores["dec_slots"] == scores["enc_slots"] == 3


def test_the_premise_holds_on_moving_objects_when_the_loss_starts(tmp_path: Path) -> None:
    data = make_data(num_train=1500, num_premise=48, num_test=1)
    settings = Settings(data=data.description, num_clips=1500, slots=9, steps=1500, threshold=0.6)
    state = TrainingState.fresh(settings, seed=0)
    train(state, data.features, settings.start_step, tmp_path)
    assert data.fresh is not None
    for asked in (data.trained, data.fresh):
        verdict = ask_premise(state.model, asked, settings.threshold)
        assert verdict.holds
        # three seeds of the example give margins of +0.06 to +0.09 on fresh clips
        assert verdict.margin.mean() > 0.01


def saved(out: Path, *stages: str) -> list[dict[str, Any]]:
    return [torch.load(out / "checkpoints" / f"seed0_{stage}.pt", weights_only=True) for stage in stages]


def laid_out(*seeds: list[tuple[float, float | None]]) -> tuple[list[str], dict[str, list[str]]]:
    """Tabulate runs that have one value for all scores, and a time. Return the lines, and the cells by row."""
    keys = [key for _, key, _ in report.COLUMNS]
    reports = []
    for number, runs in enumerate(seeds):
        named = zip(("baseline", "ssync", "dense"), runs, strict=False)
        made = {name: report.Run(10, 1.0, dict.fromkeys(keys, score), [], ms) for name, (score, ms) in named}
        reports.append(report.SeedReport(number, None, made))
    settings = {"data": "x", "num_clips": 1, "slots": 2, "steps": 10, "threshold": 0.6, "start_step": 3}
    machine = {"cpu": "c", "threads": 1, "torch": "2", "commit": "abc", "date": "today"}
    lines = report.table(report.Report(settings, machine, True, reports)).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return lines, {row[0]: row[1:] for row in rows}


def stopped(
    step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Press Ctrl-C during a training step, and return the output."""
    calls = count(1)

    def pressed(output: SlotOutput, features: Tensor) -> Tensor:
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return reconstruction_loss(output, features)

    with monkeypatch.context() as patch:
        patch.setattr(training, "reconstruction_loss", pressed)
        assert train_moving_objects.main(arguments) == 130
    assert not json.loads((Path(arguments[-1]) / "results.json").read_text())["complete"]
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("finished")
    assert train_moving_objects.main([*QUICK, "--seeds", "0", "1", "--out", str(out)]) == 0
    return out


class TestTheCommand:
    def test_it_writes_results_and_a_picture(self, finished: Path) -> None:
        results = json.loads((finished / "results.json").read_text())
        assert results["complete"]
        assert {"cpu", "torch", "commit", "date", "threads"} <= results["machine"].keys()
        assert results["settings"]["start_step"] == 3
        for seed in results["seeds"]:
            for premise in (seed["premise"], seed["fresh"]):
                assert premise["num_clips"] == premise["num_videos"] == 8
                assert isinstance(premise["holds"], bool)
                assert all(math.isfinite(premise[name]) for name in ("margin", "merged_margin", "target_slots"))
            assert seed["premise"] != seed["fresh"]
            for run in ("baseline", "ssync"):
                assert seed["runs"][run]["step"] == 10
                assert all(map(math.isfinite, seed["runs"][run]["scores"].values()))
        picture = np.asarray(Image.open(finished / "comparison.png"))
        assert min(picture.shape[:2]) > 500
        assert picture.std() > 20

    def test_both_runs_start_from_the_shared_part(self, finished: Path) -> None:
        shared, baseline, ssync = saved(finished, "shared", "baseline", "ssync")
        assert baseline["history"][:3] == ssync["history"][:3] == shared["history"]
        assert all(losses["ssync"] == 0 for losses in baseline["history"])
        assert all(losses["ssync"] > 0 for losses in ssync["history"][3:])
        # the first step with the loss starts from the same weights and clips
        assert baseline["history"][3]["reconstruction"] == ssync["history"][3]["reconstruction"]
        assert not _same(baseline["model"], ssync["model"])

    def test_the_printed_table_has_no_third_run(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert train_moving_objects.main(["--table", str(finished / "results.json")]) == 0
        printed = capsys.readouterr().out
        for part in ("| own losses", "| + SSync", "| difference, seed 1", "FG-ARI", " ± ", "Premise at step 3"):
            assert part in printed
        assert "ms per step" not in printed
        written = (finished / "results.json").read_text()
        assert "dense" not in (printed + written).lower()
        assert not list((finished / "checkpoints").glob("*dense*"))

    def test_the_table_gives_paired_differences(self) -> None:
        _, cells = laid_out([(0.4, None), (0.5, None)], [(0.6, None), (0.9, None)])
        assert cells["own losses"][0] == "0.500 ± 0.141"
        assert cells["+ SSync"][0] == "0.700 ± 0.283"
        assert cells["difference"][0] == "+0.200 ± 0.141"
        assert cells["difference, seed 1"][0] == "+0.300"

    def test_a_second_ctrl_c_is_not_swallowed(self) -> None:
        # a background process may ignore the signal
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with training.stop_on_ctrl_c() as stop:
                signal.raise_signal(signal.SIGINT)
                assert stop.is_set()
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_finished_run_is_replaced(self, tmp_path: Path) -> None:
        checkpoints, results = tmp_path / "checkpoints", tmp_path / "results.json"
        checkpoints.mkdir()
        (checkpoints / "seed7_ssync.pt").touch()
        report.Report({}, {}, complete=True).save(results)
        train_moving_objects.start_over(checkpoints, results)
        assert not list(checkpoints.iterdir())
        train_moving_objects.start_over(checkpoints, results)


@pytest.fixture(scope="module")
def compared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Add a third run to the finished pair."""
    out: Path = tmp_path_factory.mktemp("compared")
    shutil.copytree(finished, out, dirs_exist_ok=True)
    arguments = [*QUICK, "--seeds", "0", "1", "--compare", "dense", "--resume", "--out", str(out)]
    assert train_moving_objects.main(arguments) == 0
    return out


class TestCompareDense:
    def test_the_pair_is_unchanged(self, finished: Path, compared: Path) -> None:
        without, with_it = (json.loads((out / "results.json").read_text()) for out in (finished, compared))
        assert with_it["complete"]
        assert with_it["settings"].pop("dense") == {
            "steps": 10,
            "weight": 0.1,
            "start_fraction": 0.2,
            "redundancy_weight": 0.1,
            "redundancy_fraction": 0.1,
            "group_frames": 4,
            "top_k": 8,
            "start_step": 2,
            "redundancy_end": 1,
        }
        assert with_it["settings"] == without["settings"]
        for seed, pair in zip(with_it["seeds"], without["seeds"], strict=True):
            dense = seed["runs"].pop("dense")
            assert seed == pair
            assert dense["step"] == 10
            assert dense["step_ms"] > 0
            assert all(map(math.isfinite, dense["scores"].values()))

    def test_it_starts_from_the_same_weights_and_its_terms_follow_their_schedule(self, compared: Path) -> None:
        baseline, dense = (state["history"] for state in saved(compared, "baseline", "dense"))
        for name in ("reconstruction", "contrast"):
            assert baseline[0][name] == dense[0][name]
        assert baseline[1]["contrast"] != dense[1]["contrast"]
        assert [losses["dense"] > 0 for losses in dense] == [True, False] + 8 * [True]
        assert all(losses["ssync"] == 0 for losses in dense)

    def test_the_table_has_a_third_group(self, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert train_moving_objects.main(["--table", str(compared / "results.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
        runs = ["own losses", "+ SSync", "+ dense alignment (SRL)"]
        differences = [f"{run}: difference" for run in runs[1:]]
        by_seed = [f"{difference}, seed {seed}" for difference in differences for seed in (0, 1)]
        assert rows == ["", *runs, *differences, "", *by_seed]
        assert any(
            line.startswith("Dense alignment (SRL) with weights 0.1 and 0.1 from step 2 of 10,") for line in lines
        )
        assert sum(line.startswith("Median step from step 3 on, seed ") for line in lines) == 2

    def test_the_picture_has_a_third_block(self, finished: Path, compared: Path) -> None:
        two, three = (np.asarray(Image.open(out / "comparison.png")) for out in (finished, compared))
        assert three.shape[1] == two.shape[1]
        assert 1.3 < three.shape[0] / two.shape[0] < 1.5

    @pytest.mark.parametrize(("step", "dense"), [(2, False), (6, False), (14, False), (1, True), (2, True), (6, True)])
    def test_ctrl_c_and_resuming_give_the_uninterrupted_run(
        self,
        step: int,
        dense: bool,
        compared: Path,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        arguments = [*QUICK, "--out", str(tmp_path)]
        if dense:
            shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
            arguments = ["--compare", "dense", "--resume", *arguments]
        printed = stopped(step, arguments, monkeypatch, capsys)
        assert f"--resume{' --compare dense' * dense} --out {tmp_path}" in printed
        assert dense == (f"+ dense alignment (SRL) (step {step})" in printed)
        assert (tmp_path / "comparison.png").exists()
        if not dense:
            with pytest.raises(SystemExit, match="holds an unfinished run: go on with --resume"):
                train_moving_objects.main(arguments)

        assert train_moving_objects.main(["--resume", *arguments]) == 0
        stages = ["dense"] if dense else ["shared", "baseline", "ssync"]
        for whole, resumed in zip(saved(compared, *stages), saved(tmp_path, *stages), strict=True):
            assert len(resumed.pop("times")) == len(whole.pop("times"))
            assert _same(whole, resumed)

    def test_the_table_compares_the_time_of_a_step(self) -> None:
        lines, cells = laid_out([(0.5, 40.0), (0.5, 42.0), (0.5, 160.0)])
        assert cells[""][-1] == "ms per step"
        assert cells["+ dense alignment (SRL)"][-1] == "160.0"
        assert cells["+ dense alignment (SRL): difference"][-1] == "+120.0"
        assert lines[-1] == (
            "Median step from step 3 on, seed 0: with SSync 1.05 times and with dense alignment 4.00 times "
            "as long as with own losses."
        )
        # one dense run stopped before it was timed
        lines, cells = laid_out([(0.5, 40.0), (0.5, 42.0), (0.5, 160.0)], [(0.5, 40.0), (0.5, 42.0), (0.5, None)])
        assert sum(line.startswith("Median step") for line in lines) == 1
        assert cells["+ dense alignment (SRL)"][-1] == "-"


def test_the_adaptive_run_branches_off_and_resumes_with_its_state(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        shutil.copytree(finished, out)
    arguments = [*QUICK, "--compare", "adaptive", "--resume", "--out"]
    assert train_moving_objects.main([*arguments, str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "seed 0, adaptive: {'margin':" in printed
    assert "+ SSync, adaptive: difference" in printed
    (baseline,), (adaptive,) = saved(whole, "baseline"), saved(whole, "adaptive")
    assert baseline["history"][:3] == adaptive["history"][:3]
    # its warm-up takes more steps than these
    assert [losses["ssync"] > 0 for losses in adaptive["history"][:4]] == [False] * 3 + [True]
    assert adaptive["adaptive"]["levels"].sum() == 7
    assert adaptive["adaptive"]["levels"][0] == 0
    stopped(3, [*arguments, str(cut)], monkeypatch, capsys)
    assert train_moving_objects.main([*arguments, str(cut)]) == 0
    (resumed,) = saved(cut, "adaptive")
    assert len(resumed.pop("times")) == len(adaptive.pop("times"))
    assert _same(adaptive, resumed)
    assert report.Report.load(cut / "results.json").seeds[0].runs["adaptive"].step == 10


def test_the_readme_has_the_printed_table() -> None:
    folder = Path(report.__file__).parent
    shown = re.search(r"<!-- table: .*-->\n((?:.+\n)+\n(?:\|.*\n)+)", (folder / "README.md").read_text())
    assert shown is not None
    results = report.Report.load(folder / "results_dense.json")
    assert shown[1].strip() == report.in_short(results)
    assert report.table(results).startswith(f"{report.in_short(results)}\n\n")


def test_the_results_support_the_claims_of_the_readme() -> None:
    folder = Path(report.__file__).parent
    pair, compared = (report.Report.load(folder / name) for name in ("results.json", "results_dense.json"))
    assert compared.complete
    for before, after in zip(pair.seeds, compared.seeds, strict=True):
        assert {name: after.runs[name].scores for name in before.runs} == {
            name: run.scores for name, run in before.runs.items()
        }
        losses = [window["dense"] for window in after.runs["dense"].history if window["step"] > 300]
        assert losses[-1] < 0.95 * losses[0]

    for _, key, _ in report.COLUMNS:
        spread, mean = {}, {}
        for name in ("ssync", "dense"):
            gains = [seed.runs[name].value(key) - seed.runs["baseline"].value(key) for seed in compared.seeds]
            spread[name], mean[name] = stdev(gains), abs(fmean(gains))
        assert mean["dense"] < spread["dense"], key
        assert mean["ssync"] > spread["ssync"], key


def _runs(mask: Tensor) -> Tensor:
    """Count the runs of True in every line of (B, T, H, W)."""
    padded = torch.nn.functional.pad(mask.int(), (1, 0))
    return (padded.diff(dim=-1) == 1).sum(-1)


def _same(left: object, right: object) -> bool:
    """Compare nested containers of tensors bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
