"""The tube mask: its number of patches, its distribution, its probability and its generator."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssync_loss import CenteredCrossEntropy
from ssync_loss.functional import affinity_consistency_loss, clip_mask, masked_token_loss


def draw(seed: int, num_patches: int = 50, **given: Any) -> Tensor:
    return clip_mask(num_patches, generator=torch.Generator().manual_seed(seed), **given)


@given(
    seed=st.integers(0, 2**31),
    num_patches=st.integers(0, 60),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_number_of_patches_is_within_the_ratio(seed: int, num_patches: int, shares: tuple[float, float]) -> None:
    low, high = sorted(shares)
    mask = draw(seed, num_patches, ratio=(low, high), prob=1.0)
    assert mask.shape == (num_patches,)
    assert mask.dtype == torch.bool
    assert int(low * num_patches) <= mask.sum() <= int(high * num_patches)


@pytest.mark.parametrize(
    ("num_patches", "share", "expected"), [(10, 0.45, 4), (784, 0.1, 78), (784, 0.5, 392), (10, 1.0, 10), (10, 0.0, 0)]
)
def test_a_fixed_ratio_is_rounded_down(num_patches: int, share: float, expected: int) -> None:
    assert draw(0, num_patches, ratio=(share, share), prob=1.0).sum() == expected


def test_half_of_the_iterations_mask_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([clip_mask(100, generator=generator).sum() for _ in range(4000)])
    # four standard deviations of a coin
    assert abs((counts == 0).double().mean().item() - 0.5) < 4 * 0.5 / 4000**0.5
    drawn = counts[counts > 0]
    assert drawn.min() == 10
    assert drawn.max() == 49
    # the numbers are uniform over 10 .. 49
    assert abs(drawn.double().mean().item() - 29.5) < 4 * (1600 / 12 / len(drawn)) ** 0.5


@pytest.mark.parametrize(("prob", "expected"), [(0.0, 0), (1.0, 300)])
def test_probabilities_of_zero_and_one(prob: float, expected: int) -> None:
    assert sum(int(draw(seed, prob=prob).any()) for seed in range(300)) == expected


def test_all_patches_are_equally_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([clip_mask(20, ratio=(0.25, 0.25), prob=1.0, generator=generator) for _ in range(4000)])
    assert (masks.sum(1) == 5).all()
    assert (masks.double().mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    # all pairs are equally likely, too
    together = (masks[:, :-1] & masks[:, 1:]).double().mean(0)
    assert (together - 0.25 * 4 / 19).abs().max() < 4 * (0.0526 / 4000) ** 0.5


def test_only_the_generator_determines_the_mask() -> None:
    for seed in range(20):
        expected = draw(seed)
        torch.rand(7)
        assert torch.equal(draw(seed), expected)
    assert any(not torch.equal(draw(seed), draw(seed + 1)) for seed in range(20))


def test_the_generator_always_advances_equally() -> None:
    states = []
    for prob, ratio in ((0.0, (0.1, 0.5)), (1.0, (0.1, 0.5)), (1.0, (0.0, 0.0))):
        generator = torch.Generator().manual_seed(3)
        clip_mask(50, ratio=ratio, prob=prob, generator=generator)
        states.append(generator.get_state())
    assert all(torch.equal(one, states[0]) for one in states)


def test_the_default_generator_is_torchs() -> None:
    torch.manual_seed(4)
    expected = clip_mask(50, prob=1.0)
    torch.manual_seed(4)
    assert torch.equal(clip_mask(50, prob=1.0), expected)
    assert not torch.equal(clip_mask(50, prob=1.0), expected)


def test_no_tensor_is_read_on_the_host() -> None:
    with FakeTensorMode():
        assert clip_mask(50).shape == (50,)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_it_works_with_the_losses(prob: float) -> None:
    s, t = (torch.randn(2, 3, 5, 2, 4) for _ in range(2))
    mask = draw(0, 8, ratio=(0.5, 0.5), prob=prob).view(2, 4).expand(2, 3, 2, 4)
    affinity = affinity_consistency_loss(s, t, mask=mask)
    tokens = masked_token_loss(s, t, mask, CenteredCrossEntropy(5))
    assert (affinity > 0) == (tokens > 0) == (prob > 0)
    kept = mask[0, 0].flatten().nonzero().squeeze(1)
    listed = [one.flatten(3).mT[:, :, kept] for one in (s, t)]
    torch.testing.assert_close(affinity_consistency_loss(listed[0], listed[1]), affinity)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"N": -1}, ValueError, r"`N` must be at least 0; got -1"),
        ({"N": 4.0}, TypeError, r"`N` must be an integer; got float"),
        ({"ratio": 0.5}, ValueError, r"`ratio` must be a pair \(smallest, largest\); got 0.5"),
        ({"ratio": (0.1, 0.2, 0.3)}, ValueError, r"`ratio` must be a pair \(smallest, largest\); got"),
        ({"ratio": "ab"}, ValueError, r"`ratio` must be a pair \(smallest, largest\); got 'ab'"),
        ({"ratio": (0.5, 0.1)}, ValueError, r"`ratio` must be within \[0.5, 1.0\]; got 0.1"),
        ({"ratio": (-0.1, 0.5)}, ValueError, r"`ratio` must be within \[0.0, 1.0\]; got -0.1"),
        ({"ratio": (0.1, 1.5)}, ValueError, r"`ratio` must be within \[0.1, 1.0\]; got 1.5"),
        ({"ratio": ("a", 0.5)}, TypeError, r"`ratio` must be a number; got str"),
        ({"prob": 1.5}, ValueError, r"`prob` must be within \[0.0, 1.0\]; got 1.5"),
        ({"prob": None}, TypeError, r"`prob` must be a number; got NoneType"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_mask(**{"N": 10, **wrong})


def test_wrong_generators_are_refused() -> None:
    wrong: Any = 0
    with pytest.raises(TypeError, match="`generator` must be Generator; got int"):
        clip_mask(4, generator=wrong)
