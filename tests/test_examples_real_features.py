"""The example with real features: its photographs and composites, its cache, its command; photographs are made up."""

import hashlib
from pathlib import Path

import pytest
import torch
from examples import photographs
from examples.composites import MAX_OBJECTS, MIN_OBJECTS, composites
from examples.photographs import Photograph, load_photographs, split
from PIL import Image


def made_up(number: int) -> list[Photograph]:
    """Pictures of one color each: who is seen where can be read off them."""
    sizes = torch.Size([3, 40, 50]), torch.Size([3, 64, 45])
    return [
        Photograph(f"made-up/{k}", f"{k:016x}", torch.full(sizes[k % 2], 5 * k, dtype=torch.uint8))
        for k in range(number)
    ]


class TestComposites:
    def test_the_seed_decides_and_fewer_clips_are_the_first_ones(self) -> None:
        pictures = made_up(9)
        many, few = (composites(number, seed=3, photographs=pictures, size=32) for number in (6, 2))
        other = composites(2, seed=4, photographs=pictures, size=32)
        assert all(torch.equal(a[:2], b) for a, b in zip(many, few, strict=True))
        assert not torch.equal(few.video, other.video)

    def test_ids_say_whose_photograph_is_seen(self) -> None:
        clips = composites(20, seed=0, photographs=made_up(25), size=48)
        colors = 5 / 255 * clips.photographs.double()
        rows = torch.arange(20).view(-1, 1, 1, 1)
        wanted = colors[rows, clips.ids].unsqueeze(2).expand(-1, -1, 3, -1, -1)
        torch.testing.assert_close(clips.video.double(), wanted, atol=1e-5, rtol=0)

    def test_three_to_five_objects_of_different_photographs_move(self) -> None:
        clips = composites(40, seed=1, photographs=made_up(9), size=32)
        assert set(clips.num_objects.tolist()) == set(range(MIN_OBJECTS, MAX_OBJECTS + 1))
        for sources, number in zip(clips.photographs.tolist(), clips.num_objects.tolist(), strict=True):
            assert len(set(sources[: 1 + number])) == 1 + number
            assert set(sources[1 + number :]) <= {-1}
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
    def test_folds_keep_every_photograph_once_and_train_on_no_other(self) -> None:
        pictures = made_up(42)
        folds = [split(pictures, fold) for fold in range(3)]
        assert sorted(one.name for fold in folds for one in fold.test) == sorted(one.name for one in pictures)
        assert all(len(fold.train) == 28 and len(fold.test) == 14 for fold in folds)
        assert all(not {one.name for one in fold.train} & {one.name for one in fold.test} for fold in folds)
        with pytest.raises(ValueError, match="`fold` must be 0, 1 or 2; got 3"):
            split(pictures, 3)

    def test_another_file_and_a_missing_package_are_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
