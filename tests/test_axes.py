"""Layouts in einops' words: any of them is read as (B, T, S, H, W) is, by a view; and what is refused."""

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from refusals import refuses
from ssync_loss import AdaptiveSSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss, SSyncLoss
from ssync_loss._axes import arrange, parse
from ssync_loss.diagnostics import premise
from ssync_loss.distributed import global_mean
from ssync_loss.functional import boundary_refinement_loss, interior_denoising_loss, pseudo_labels
from ssync_loss.ssync.maps import bind_maps
from ssync_loss.testing import assert_close_loss, assert_same_labels
from ssync_loss.visualize import panel

ENGINES = pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
MODULES = [SSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss]
ORDER = "b t s h w"
# layouts of known hosts: an image, slots last, frames and slots in the batch
LAYOUTS = [
    "b t s h w",
    "b t s (h w)",
    "b t (h w) s",
    "(b t) s h w",
    "(b t s) h w",
    "(b t s) 1 h w",
    "h w s t b",
    "b (t h w) s",
    "(s b) (w t) h",
]
SIZE = {"b": 2, "t": 3, "s": 4, "h": 3, "w": 5}


def draw_map(size: dict[str, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A map whose means are exact in any order of summation, so that labels do not depend on strides."""
    generator = torch.Generator().manual_seed(seed)
    shape = [size[letter] for letter in "btshw"]
    return (torch.randint(-16, 16, shape, generator=generator) / 8).to(dtype)


def laid_out(maps: Tensor, axes: str) -> Tensor:
    """Give a map (B, T, S, H, W) the layout of a pattern, in memory of its own, by einops."""
    full = " ".join(letter if letter in axes else "1" for letter in ORDER.split())
    return rearrange(maps, f"{full} -> {axes}").contiguous()


class Pair(NamedTuple):
    """Two maps (B, T, S, H, W), each on its grid, and a pattern for each."""

    enc: Tensor
    dec: Tensor
    axes: tuple[str, str]

    @property
    def grid(self) -> Any:
        return tuple(self.enc.shape[3:]), tuple(self.dec.shape[3:])

    def laid_out(self) -> tuple[Tensor, Tensor]:
        return laid_out(self.enc, self.axes[0]), laid_out(self.dec, self.axes[1])


@st.composite
def patterns(draw: st.DrawFn, size: dict[str, int]) -> str:
    """Draw an order, a grouping, axes of size 1 that are left out, and some that are put in."""
    letters = [one for one in "btshw" if not (one in "bt" and size[one] == 1 and draw(st.booleans()))]
    words = list(draw(st.permutations(letters)))
    groups: list[str] = []
    while words:
        count = draw(st.sampled_from((1, 1, 1, 2, 2, 3, 5)))
        group, words = words[:count], words[count:]
        groups.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
    if draw(st.integers(0, 3)) == 0:
        groups.insert(draw(st.integers(0, len(groups))), "1")
    return draw(st.sampled_from((" ", "  "))).join(groups)


@st.composite
def pairs(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Pair:
    size = {letter: draw(st.sampled_from((1, 2, 3))) for letter in "bts"}
    maps, axes = [], []
    for seed in range(2):
        own = {**size, "h": draw(st.sampled_from((1, 2, 4))), "w": draw(st.sampled_from((1, 3, 5)))}
        maps.append(draw_map(own, dtype, seed=draw(st.integers(0, 99)) + 100 * seed))
        axes.append(draw(patterns(own)))
    return Pair(maps[0], maps[1], (axes[0], axes[1]))


def solutions(pair: Pair, num_frames: int | None) -> int:
    """Count the possible B, T and S by trying all, if both grids are given."""
    numbers = torch.arange(1, 28)
    frames = numbers if num_frames is None else numbers[num_frames - 1 : num_frames]
    found = torch.cartesian_prod(numbers, frames, numbers)
    size = dict(zip("bts", found.unbind(1), strict=True))
    fits = torch.ones(len(found), dtype=torch.bool)
    for axes, tensor, (height, width) in zip(pair.axes, pair.laid_out(), pair.grid, strict=True):
        size |= {"h": torch.tensor(height), "w": torch.tensor(width)}
        for letter in "bt":
            fits &= (size[letter] == 1) | (letter in axes)
        for group, wanted in zip(groups_of(axes), tensor.shape, strict=True):
            fits &= prod(size.get(letter, torch.tensor(1)) for letter in group) == wanted
    return int(fits.sum())


def read(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Call a function; None if it reports an open size."""
    try:
        return call(*given, **named)
    except ValueError as error:
        if " open." not in str(error):
            raise
        return None


def groups_of(axes: str) -> list[str]:
    """The letters on each axis, independent of the library's parser."""
    groups, rest = [], axes.replace(" ", "")
    while rest:
        group, _, rest = rest[1:].partition(")") if rest[0] == "(" else (rest[0], "", rest[1:])
        groups.append(group)
    return groups


# --- values ---


@settings(max_examples=300)
@given(pair=pairs(), frames_given=st.booleans())
def test_any_pattern_is_read_as_einops_writes_it_or_leaves_more_than_one_reading(
    pair: Pair, frames_given: bool
) -> None:
    num_frames = pair.enc.shape[1] if frames_given else None
    given_ones = pair.laid_out()
    maps = read(bind_maps, *given_ones, grid=pair.grid, axes=pair.axes, num_frames=num_frames)
    if maps is None:
        # size 1 proves nothing for other sizes
        assert solutions(pair, num_frames) > 1 or 1 in pair.enc.shape[:3]
        return
    assert solutions(pair, num_frames) == 1
    for view, tensor, wanted in zip((maps.enc, maps.dec), given_ones, pair[:2], strict=True):
        assert torch.equal(view, wanted)
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@settings(max_examples=150)
@given(data=st.data())
def test_one_pattern_is_arranged_as_einops_would(data: st.DataObject) -> None:
    size = {letter: data.draw(st.sampled_from((1, 2, 3)), letter) for letter in "btshw"}
    axes = data.draw(patterns(size))
    maps = draw_map(size)
    grid = (size["h"], size["w"]) if data.draw(st.booleans(), "grid given") else None
    tensor = laid_out(maps, axes)
    actual = read(arrange, "maps", tensor, axes, grid=grid, num_frames=size["t"], num_slots=size["s"])
    if actual is None:
        # h and w are separated, or reversed, in a merged axis
        assert grid is None
        return
    assert torch.equal(actual, maps if actual.dim() == 5 else maps.flatten(3))
    # without a grid, h and w in one axis stay there
    assert (actual.dim() == 4) == (grid is None and any({"h", "w"} <= set(group) for group in groups_of(axes)))
    assert actual.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def step(criterion: SSyncLoss, enc: Tensor, dec: Tensor, *leaves: Tensor, **given: Any) -> Any:
    """Terms, the loss, and its gradients at the leaves."""
    terms, loss = criterion.terms(enc, dec, **given), criterion(enc, dec, **given)
    return terms, loss, torch.autograd.grad(loss, leaves)


def assert_same_step(actual: Any, expected: Any) -> None:
    assert_same_labels(actual[0].labels, expected[0].labels)
    for got, wanted in zip((*actual[0][:5], actual[1]), (*expected[0][:5], expected[1]), strict=True):
        assert_close_loss(got, wanted)
    for got, wanted in zip(actual[2], expected[2], strict=True):
        eps = max(1e-6, torch.finfo(wanted.dtype).eps)
        torch.testing.assert_close(got, wanted, rtol=2 * eps, atol=1e-9)


@ENGINES
@settings(max_examples=60)
@given(pair=pairs(), criterion=st.sampled_from(("mse", "cross_entropy")), masked=st.booleans())
def test_losses_labels_and_gradients_are_those_of_whole_maps(
    backend: Any, pair: Pair, criterion: Any, masked: bool
) -> None:
    enc, dec = (one.requires_grad_() for one in pair[:2])
    B, T, S, H, W = enc.shape
    masks: dict[str, Any] = {}
    if masked:
        mask = torch.arange(B * T * H * W).view(B, T, H, W) % 5 > 0
        masks = {"valid": mask, "slot_mask": torch.arange(B * S).view(B, S) % 3 < 2}
    loss = SSyncLoss(max_different=4, criterion=criterion, backend=backend)
    expected = step(loss, enc, dec, enc, dec, **masks)
    loss = SSyncLoss(max_different=4, criterion=criterion, backend=backend, grid=pair.grid, axes=pair.axes)
    actual = read(step, loss, *pair.laid_out(), enc, dec, **masks, num_frames=T)
    assume(actual is not None)
    assert_same_step(actual, expected)


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axes", LAYOUTS)
def test_every_precision_in_every_layout(axes: str, dtype: torch.dtype, backend: Any) -> None:
    enc, dec = (draw_map(SIZE, dtype, seed).requires_grad_() for seed in range(2))
    knobs: dict[str, Any] = {"max_different": 8, "backend": backend, "kind": ("logits", "logits")}
    expected = step(SSyncLoss(**knobs), enc, dec, enc, dec)
    loss = SSyncLoss(**knobs, grid=(3, 5), axes=(axes, "b t s h w"))
    actual = step(loss, laid_out(enc, axes), dec, enc, dec)
    assert expected[0].num_boundary > 0
    assert expected[0].num_interior > 0
    assert_same_step(actual, expected)
    assert actual[2][0].dtype == dtype


def test_probabilities_in_a_layout_of_their_own() -> None:
    enc, dec = draw_map(SIZE), draw_map({**SIZE, "h": 6}, seed=1).softmax(2)
    expected = SSyncLoss(kind=("logits", "probs")).eval()(enc, dec)
    loss = SSyncLoss(kind=("logits", "probs"), axes=("b t s (h w)", "(b t) h w s"), grid=(3, 5)).eval()
    assert_close_loss(loss(enc.flatten(3), laid_out(dec, "(b t) h w s")), expected)


def test_an_image_is_a_clip_of_one_frame_without_an_axis_for_it() -> None:
    enc, dec = (torch.randn(2, 7, 16, 16) for _ in range(2))
    expected = SSyncLoss().eval()(enc[:, None], dec[:, None])
    assert expected > 0
    assert_close_loss(SSyncLoss(axes="b s h w").eval()(enc, dec), expected)
    assert_close_loss(SSyncLoss(axes="b s (h w)").eval()(enc.flatten(2), dec.flatten(2)), expected)
    assert_close_loss(SSyncLoss(axes="b (h w) s").eval()(enc.flatten(2).mT, dec.flatten(2).mT), expected)
    labels = pseudo_labels(enc, dec, axes="b s h w", valid=torch.ones(2, 1, dtype=torch.bool))
    assert labels.enc_labels.shape == (2, 1, 16, 16)
    # and one clip needs no axis either
    assert_close_loss(SSyncLoss(axes="t s h w").eval()(enc, dec), SSyncLoss().eval()(enc[None], dec[None]))


# --- what comes from where ---


def shapes(enc: Sequence[int], dec: Sequence[int], axes: Any, **given: Any) -> list[tuple[int, ...]]:
    maps = bind_maps(torch.zeros(*enc), torch.zeros(*dec), axes=axes, **given)
    return [tuple(maps.enc.shape), tuple(maps.dec.shape)]


def test_a_grid_is_given_or_shown_or_square() -> None:
    flat, rows = "b t s (h w)", "b t (w h) s"
    assert shapes((2, 3, 4, 36), (2, 3, 4, 36), flat) == [(2, 3, 4, 6, 6)] * 2
    assert shapes((2, 3, 4, 36), (2, 3, 4, 36), flat, grid=(4, 9)) == [(2, 3, 4, 4, 9)] * 2
    assert shapes((2, 3, 4, 36), (2, 3, 4, 4, 9), (flat, ORDER)) == [(2, 3, 4, 4, 9)] * 2
    assert shapes((2, 3, 4, 4, 9), (2, 3, 36, 4), (ORDER, rows)) == [(2, 3, 4, 4, 9)] * 2
    assert shapes((2, 3, 36, 4), (2, 3, 4, 36), (rows, flat), grid=(4, 9)) == [(2, 3, 4, 4, 9)] * 2
    # a decoder map with a grid of its own keeps it
    assert shapes((2, 3, 4, 36), (24, 2, 2), (flat, "(b t s) h w"), grid=(4, 9))[1] == (2, 3, 4, 2, 2)
    pair = {"grid": ((4, 9), (2, 8))}
    assert shapes((2, 3, 4, 36), (24, 16), (flat, "(b t s) (h w)"), **pair)[1] == (2, 3, 4, 2, 8)
    assert shapes((2, 3, 4, 4, 9), (24, 16), (ORDER, "(b t s) (h w)"))[1] == (2, 3, 4, 4, 4)


def test_an_axis_that_is_merged_comes_from_the_other_map_or_from_num_frames() -> None:
    whole = [(2, 3, 4, 5, 6)] * 2
    for axes, given_one in (("(b t) s h w", (6, 4, 5, 6)), ("(b t s) h w", (24, 5, 6)), ("b (t s) h w", (2, 12, 5, 6))):
        assert shapes((2, 3, 4, 5, 6), given_one, (ORDER, axes)) == whole
        assert shapes(given_one, (2, 3, 4, 5, 6), (axes, ORDER)) == whole
        if axes != "(b t s) h w":
            assert shapes(given_one, given_one, axes, num_frames=3) == whole
    # sizes become known in turn: B, T, S, then the grid
    chain = ("(b t) (s h w)", "b (t s) h w")
    assert shapes((6, 100), (2, 12, 5, 5), chain) == [(2, 3, 4, 5, 5)] * 2
    assert shapes((0, 4, 5, 6), (0, 4, 5, 6), "(b t) s h w", num_frames=3) == [(0, 3, 4, 5, 6)] * 2


def test_the_number_of_frames_is_checked_where_it_is_not_needed() -> None:
    enc, dec = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6)
    assert SSyncLoss().eval()(enc, dec, num_frames=3).shape == ()
    wanted = "`enc_logits` must have shape (B, T=2, S, H, W); got (2, 3, 4, 5, 6)."
    refuses(ValueError, wanted, SSyncLoss().eval(), enc, dec, num_frames=2)
    wanted = "`enc_logits` must have shape (b, t, s, h, w) with t=2, as axes 'b t s h w' say; got (2, 3, 4, 5, 6)."
    refuses(ValueError, wanted, SSyncLoss(axes=ORDER).eval(), enc, dec, num_frames=2)
    refuses(ValueError, "`num_frames` must be at least 1; got 0.", pseudo_labels, enc, dec, num_frames=0)
    refuses(TypeError, "`num_frames` must be an integer; got float.", pseudo_labels, enc, dec, num_frames=3.0)


# --- without axes ---


def test_flat_maps_that_may_be_images_are_refused() -> None:
    maps = torch.randn(2, 7, 16, 16), torch.randn(2, 7, 16, 16)
    wanted = (
        "`axes` must tell whether maps of four axes are images: 'b s h w' reads (2, 7, 16, 16) as S=7 slots on a grid "
        "of 16 x 16, 'b t s (h w)' as T=7 frames of S=16 slots on N=16 patches; got enc_logits of shape "
        "(2, 7, 16, 16) and dec_logits of shape (2, 7, 16, 16)."
    )
    refuses(ValueError, wanted, SSyncLoss().eval(), *maps)
    refuses(ValueError, wanted, SSyncLoss(start_step=9).eval(), *maps, step=0)
    refuses(ValueError, wanted, SSyncLoss().eval().terms, *maps)
    for call in (pseudo_labels, boundary_refinement_loss, interior_denoising_loss):
        refuses(ValueError, wanted, call, *maps)
    refuses(ValueError, wanted, premise, *maps, torch.randn(2, 7, 5, 4, 4))
    refuses(ValueError, wanted, panel, torch.zeros(2, 7, 3, 8, 8), *maps)
    # each of the two readings can be chosen
    clips = [one.unflatten(3, (4, 4)) for one in maps]
    images = [one[:, None] for one in maps]
    values = [SSyncLoss().eval()(*one) for one in (clips, images)]
    assert values[0] != values[1]
    for axes, value in zip(("b t s (h w)", "b s h w"), values, strict=True):
        assert_close_loss(SSyncLoss(axes=axes).eval()(*maps), value)
    assert_close_loss(SSyncLoss(grid=(4, 4)).eval()(*maps), values[0])


@pytest.mark.parametrize(
    ("enc", "dec", "refused"),
    [
        ((1, 2, 8, 4), (1, 2, 8, 4), True),
        ((1, 2, 9, 4), (1, 2, 9, 4), False),
        ((1, 2, 8, 16), (1, 2, 8, 16), True),
        ((1, 2, 7, 16), (1, 2, 7, 16), False),
        ((4, 4, 11, 576), (4, 4, 11, 576), False),
        # images on two grids, one without a square number of columns
        ((1, 2, 16, 16), (1, 2, 32, 32), True),
        # the decoder's map cannot be an image, so neither is the encoder's
        ((1, 2, 16, 16), (1, 2, 16, 100), False),
        ((1, 2, 16, 16), (1, 2, 16, 4, 4), False),
        ((1, 2, 16, 2, 8), (1, 2, 16, 16), False),
    ],
)
def test_which_maps_may_be_images(enc: Sequence[int], dec: Sequence[int], refused: bool) -> None:
    if refused:
        refuses(ValueError, "`axes` must tell", shapes, enc, dec, None)
        assert shapes(enc, enc, None, grid=(1, enc[-1])) == [(*enc[:-1], 1, enc[-1])] * 2
    else:
        actual = shapes(enc, dec, None)
        assert all(one[:3] == tuple(enc[:3]) for one in actual)


def test_an_image_beside_a_clip_of_one_frame_is_decided_by_it() -> None:
    clip, image = torch.randn(2, 1, 7, 16, 16), torch.randn(2, 7, 16, 16)
    assert_close_loss(SSyncLoss().eval()(clip, image), SSyncLoss().eval()(clip, image[:, None]))
    assert_close_loss(SSyncLoss().eval()(image, clip), SSyncLoss().eval()(image[:, None], clip))
    # another grid, not square
    assert shapes((2, 7, 4, 6), (2, 1, 7, 8, 12), None) == [(2, 1, 7, 4, 6), (2, 1, 7, 8, 12)]
    # flat clips of one frame, or of one slot, are still read
    assert shapes((2, 1, 7, 24), (2, 1, 7, 4, 6), None) == [(2, 1, 7, 4, 6)] * 2
    assert shapes((2, 1, 1, 24), (2, 1, 1, 4, 6), None) == [(2, 1, 1, 4, 6)] * 2


def test_a_flat_image_is_told_its_axes() -> None:
    image = torch.randn(2, 7, 16)
    wanted = "`enc_logits` must have shape (B, T, S, H, W), or (B, T, S, N); got (2, 7, 16). An image's (B, S, N) takes"
    refuses(ValueError, wanted, SSyncLoss().eval(), image, image)
    assert SSyncLoss(axes="b s (h w)").eval()(image, image.clone()) >= 0


def test_one_tensor_as_both_maps_is_refused() -> None:
    one = torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    wanted = "`dec_logits` must be the decoder's own map; got the tensor that is `enc_logits`."
    for criterion in (SSyncLoss(), SSyncLoss(start_step=9), BoundaryRefinementLoss(), InteriorDenoisingLoss()):
        refuses(ValueError, wanted, criterion, one, one, **({"step": 0} if isinstance(criterion, SSyncLoss) else {}))
    refuses(ValueError, wanted, SSyncLoss().terms, one, one)
    refuses(ValueError, wanted, AdaptiveSSyncLoss(SSyncLoss()), one, one, features=torch.randn(2, 3, 8, 5, 5))
    assert SSyncLoss()(one, one.clone()) >= 0


def test_no_square_says_that_it_may_be_an_image() -> None:
    with pytest.raises(ValueError, match=r"no square: pass grid=\(H, W\); got \(2, 7, 8, 12\).*axes='b s h w'"):
        SSyncLoss().eval()(torch.zeros(2, 7, 8, 12), torch.zeros(2, 7, 8, 12))


# --- a setting ---


@pytest.mark.parametrize("module", MODULES)
def test_axes_are_remembered_shown_and_checked(module: Any) -> None:
    assert "axes" not in repr(module())
    for axes in ("b t (h w) s", ("b t s (h w)", "(b t s) 1 h w"), ["b s h w", "b s (h w)"]):
        criterion = module(axes=axes)
        assert criterion.axes == axes
        assert criterion.settings["axes"] == axes
        assert f"axes={axes!r}" in repr(criterion)
        assert copy.deepcopy(criterion).axes == pickle.loads(pickle.dumps(criterion)).axes == axes
    for wrong, error, message in PATTERNS:
        refuses(error, message, module, axes=wrong)


def test_what_takes_both_maps_takes_axes() -> None:
    enc, dec = (draw_map(SIZE, torch.float32, seed) for seed in range(2))
    given_ones = [laid_out(enc, "b t (h w) s"), laid_out(dec, "(b t s) h w")]
    axes: Any = ("b t (h w) s", "(b t s) h w")
    video, features = torch.rand(2, 3, 3, 12, 20), torch.randn(2, 3, 6, 3, 5)
    functions: list[Callable[..., Any]] = [
        pseudo_labels,
        boundary_refinement_loss,
        interior_denoising_loss,
        lambda enc, dec, **more: premise(enc, dec, features, **more),
        lambda enc, dec, **more: panel(video, enc, dec, **more),
        *(lambda enc, dec, module=module, **more: module(**more).eval()(enc, dec) for module in MODULES),
        lambda enc, dec, **more: SSyncLoss(**more).eval().terms(enc, dec),
        lambda enc, dec, **more: SSyncLoss(**more, start_step=9).eval()(enc, dec, step=0),
        lambda enc, dec, **more: global_mean(SSyncLoss(**more).eval(), enc, dec),
    ]
    for function in functions:
        torch.testing.assert_close(function(*given_ones, axes=axes, grid=(3, 5)), function(enc, dec))
    flat = [laid_out(one, "(b t) s h w") for one in (enc, dec)]
    whole: list[Callable[..., Any]] = [
        pseudo_labels,
        boundary_refinement_loss,
        interior_denoising_loss,
        lambda enc, dec, **more: premise(enc, dec, features, **more),
        lambda enc, dec, **more: panel(video, enc, dec, **more),
        *(
            lambda enc, dec, module=one, axes=None, **more: module(axes=axes).eval()(enc, dec, **more)
            for one in MODULES
        ),
        lambda enc, dec, axes=None, **more: SSyncLoss(axes=axes).eval().terms(enc, dec, **more),
        lambda enc, dec, axes=None, **more: global_mean(SSyncLoss(axes=axes).eval(), enc, dec, **more),
    ]
    for function in whole:
        torch.testing.assert_close(function(*flat, axes="(b t) s h w", num_frames=3), function(enc, dec))
    # all public functions of both maps must be in this test
    for one in (pseudo_labels, boundary_refinement_loss, interior_denoising_loss, premise, panel):
        assert {"axes", "num_frames"} <= inspect.signature(one).parameters.keys()


@pytest.mark.parametrize("axes", ["b t (h w) d", "(b t) d h w", "d (h w) t b", "b t d h w", "b t (w h) 1 d"])
def test_features_in_any_layout(axes: str) -> None:
    enc, dec, features = draw_map(SIZE), draw_map(SIZE, seed=1), torch.randn(2, 3, 6, 3, 5)
    given_one = rearrange(features, f"b t d h w -> {axes}")
    torch.testing.assert_close(premise(enc, dec, given_one, features_axes=axes), premise(enc, dec, features))


def test_features_of_images() -> None:
    enc, dec, features = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    expected = premise(enc[:, None], dec[:, None], features[:, None])
    actual = premise(enc, dec, features.flatten(2).mT, axes="b s h w", features_axes="b (h w) d")
    torch.testing.assert_close(actual, expected)


def test_wrong_features_are_refused() -> None:
    maps = [draw_map(SIZE), draw_map(SIZE, seed=1)]
    wanted = (
        "`features` must have shape (B=2, T=3, D, H=3, W=5), or another that `features_axes` tells, such as "
        "'b t (h w) d'; got (2, 3, 15, 6)."
    )
    refuses(ValueError, wanted, premise, *maps, torch.zeros(2, 3, 15, 6))
    for shape, axes, message in (
        ((2, 3, 16, 6), "b t (h w) d", "`features` must have shape (b, t, h*w, d) with b=2, t=3, h=3, w=5, as axes"),
        ((2, 15, 6), "b (h w) d", "`features` must have t=3; got axes 'b (h w) d' without 't'."),
        ((2, 3, 15, 6), "b t (h w) s", "`features_axes` must name b, t, d, h, w once each"),
        ((2, 3, 15, 6), "b t (h w) d d", "`features_axes` must name b, t, d, h, w once each"),
        ((2, 3, 15, 0), "b t (h w) d", "`features` must have D >= 1"),
    ):
        refuses(ValueError, message, premise, *maps, torch.zeros(*shape), features_axes=axes)
    refuses(TypeError, "`features_axes` must be a pattern", premise, *maps, torch.zeros(2, 3, 15, 6), features_axes=5)
    refuses(TypeError, "`features` must be a tensor", premise, *maps, None, features_axes="b t (h w) d")


# --- bad input ---

NAMES = "`axes` must name b, t, s, h, w once each, of which b and t may be left out; got "
PATTERNS: list[tuple[Any, type[Exception], str]] = [
    ("b t s s (h w)", ValueError, NAMES + "'b t s s (h w)', with 's' twice."),
    ("b t h w", ValueError, NAMES + "'b t h w', with no 's'."),
    ("b t s", ValueError, NAMES + "'b t s', with no 'h' and no 'w'."),
    ("", ValueError, NAMES + "'', with no 's' and no 'h' and no 'w'."),
    ("b t s n", ValueError, NAMES + "'b t s n', with an unknown 'n' and no 'h' and no 'w'."),
    ("b t s hw", ValueError, NAMES + "'b t s hw', with an unknown 'hw' and no 'h' and no 'w'."),
    ("b t s h w 2", ValueError, NAMES + "'b t s h w 2', with an unknown '2'."),
    ("... s h w", ValueError, NAMES + "'... s h w', with an unknown '...'."),
    ("B T S H W", ValueError, NAMES + "'B T S H W', with an unknown 'B' and an unknown 'T'"),
    ("b t s h w -> b t", ValueError, NAMES),
    ("b t s (h w", ValueError, "`axes` must close each parenthesis; got 'b t s (h w'."),
    ("b (t (s) h w)", ValueError, "`axes` must close each parenthesis before the next; got 'b (t (s) h w)'."),
    ("b t s h w)", ValueError, "`axes` must close each parenthesis before the next; got 'b t s h w)'."),
    (("b t s h w", "b t s"), ValueError, NAMES + "'b t s', with no 'h' and no 'w'."),
    (("b t s h w", None), TypeError, "`axes` must be a pattern such as 'b t s (h w)'; got NoneType."),
    (
        ("b t s h w",),
        ValueError,
        "`axes` must be a pattern such as 'b t s (h w)', or a pair of them (encoder, decoder)",
    ),
    (5, ValueError, "`axes` must be a pattern such as 'b t s (h w)', or a pair of them (encoder, decoder); got 5."),
    ({"enc": "b s h w"}, ValueError, "`axes` must be a pattern such as 'b t s (h w)', or a pair of them"),
]


@pytest.mark.parametrize(("axes", "error", "message"), PATTERNS)
def test_wrong_patterns_are_refused(axes: Any, error: type[Exception], message: str) -> None:
    maps = torch.zeros(2, 3, 4, 5, 5)
    for call in (pseudo_labels, boundary_refinement_loss, interior_denoising_loss):
        refuses(error, message, call, maps, maps, axes=axes)


@pytest.mark.parametrize(
    ("enc", "dec", "axes", "message"),
    [
        (
            (2, 3, 4, 25),
            (2, 3, 4, 25),
            "b t s h w",
            "`enc_logits` must have shape (b, t, s, h, w), as axes 'b t s h w' say; got (2, 3, 4, 25).",
        ),
        (
            (2, 3, 4, 5, 5),
            (24, 5, 5),
            ("b t s h w", "(b t s) 1 h w"),
            "`dec_logits` must have shape (b*t*s, 1, h, w) with b=2, t=3, s=4, as axes '(b t s) 1 h w' say; "
            "got (24, 5, 5).",
        ),
        (
            (2, 3, 4, 5, 5),
            (24, 3, 5, 5),
            ("b t s h w", "(b t s) 1 h w"),
            "`dec_logits` must have shape (b*t*s, 1, h, w) with b=2, t=3, s=4, as axes",
        ),
        (
            (2, 3, 4, 5, 5),
            (2, 3, 5, 5, 5),
            "b t s h w",
            "`dec_logits` must have shape (b, t, s, h, w) with b=2, t=3, s=4, as axes 'b t s h w' say; "
            "got (2, 3, 5, 5, 5).",
        ),
        (
            (2, 3, 4, 5, 5),
            (25, 5, 5),
            ("b t s h w", "(b t s) h w"),
            "`dec_logits` must have shape (b*t*s, h, w) with b=2, t=3, s=4, as axes '(b t s) h w' say; got (25, 5, 5).",
        ),
        (
            (7, 4, 5, 5),
            (2, 3, 4, 5, 5),
            ("(b t) s h w", "b t s h w"),
            "`enc_logits` must have shape (b*t, s, h, w) with b=2, t=3, s=4, as axes '(b t) s h w' say; "
            "got (7, 4, 5, 5).",
        ),
        (
            (2, 3, 4, 5, 5),
            (2, 4, 5, 5),
            ("b t s h w", "b s h w"),
            "`dec_logits` must have t=3; got axes 'b s h w' without",
        ),
        (
            (2, 4, 5, 5),
            (2, 3, 4, 5, 5),
            ("b s h w", "b t s h w"),
            "`dec_logits` must have shape (b, t, s, h, w) with b=2, t=1, s=4, as axes",
        ),
        (
            (6, 4, 5, 5),
            (6, 4, 5, 5),
            "(b t) s h w",
            "`enc_logits` of shape (6, 4, 5, 5) and axes '(b t) s h w' leaves b and t open. Give `num_frames`.",
        ),
        (
            (24, 5, 5),
            (24, 5, 5),
            "(b t s) h w",
            "`enc_logits` of shape (24, 5, 5) and axes '(b t s) h w' leaves b and t and s open. Give `num_frames`. "
            "Give s an axis of its own, by `unflatten`.",
        ),
        (
            (2, 12, 5, 5),
            (2, 12, 5, 5),
            "b (s 1) h w",
            None,
        ),
        (
            (2, 3, 4, 24),
            (2, 3, 4, 24),
            "b t s (h w)",
            "`enc_logits` has h*w=24 patches, which is no square: pass grid=(H, W); got (2, 3, 4, 24) with axes 'b t s",
        ),
        (
            (2, 3, 100),
            (2, 3, 100),
            "b t (s h w)",
            "`enc_logits` of shape (2, 3, 100) and axes 'b t (s h w)' leaves s and h and w open. Give `grid`.",
        ),
        ((2, 0, 4, 5, 5), (2, 0, 4, 5, 5), "b t s h w", "`enc_logits` must have T >= 1; got T=0."),
        ((2, 3, 4, 0), (2, 3, 4, 0), "b t s (h w)", "`enc_logits` must have H >= 1; got H=0."),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    enc: Sequence[int], dec: Sequence[int], axes: Any, message: str | None
) -> None:
    if message is None:
        assert shapes(enc, dec, axes) == [(2, 1, 12, 5, 5)] * 2
    else:
        refuses(ValueError, message, shapes, enc, dec, axes)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    maps = torch.zeros(2, 3, 4, 24), torch.zeros(2, 3, 4, 24)
    wanted = "`enc_logits` must have shape (b, t, s, h*w) with h=5, w=5, as axes 'b t s (h w)' say; got (2, 3, 4, 24)."
    refuses(ValueError, wanted, pseudo_labels, *maps, axes="b t s (h w)", grid=(5, 5))
    wanted = "`dec_logits` must have shape (b, t, s, h*w) with b=2, t=3, s=4, h=4, w=5, as axes 'b t s (h w)' say; got"
    refuses(ValueError, wanted, pseudo_labels, *maps, axes="b t s (h w)", grid=((4, 6), (4, 5)))


def test_a_grid_for_the_encoder_is_one_for_a_flat_decoder_map() -> None:
    maps = torch.zeros(2, 3, 4, 24), torch.zeros(24, 25)
    wanted = "`dec_logits` must have shape (b*t*s, h*w) with b=2, t=3, s=4, h=4, w=6, as axes '(b t s) (h w)' say; got"
    refuses(ValueError, wanted, pseudo_labels, *maps, axes=("b t s (h w)", "(b t s) (h w)"), grid=(4, 6))


@pytest.mark.parametrize(
    ("shape", "axes", "leaves", "after"),
    [
        ((8, 5, 5), "(b s) h w", "b and s open. Give s an axis of its own, by `unflatten`.", "b s h w"),
        ((8, 5, 5), "(s b) h w", "b and s open. Give b an axis of its own, by `unflatten`.", "s b h w"),
        (
            (24, 5, 5),
            "(b t s) h w",
            "b and t and s open. Give `num_frames`. Give s an axis of its own, by `unflatten`.",
            "(b t) s h w",
        ),
        ((2, 12, 5, 5), "b (t s) h w", "t and s open. Give `num_frames`.", "b (t s) h w"),
        (
            (40, 5),
            "(b s h) w",
            "b and s and h open. Give `grid`. Give s an axis of its own, by `unflatten`.",
            "(b h) s w",
        ),
    ],
)
def test_an_open_size_has_a_remedy(shape: Sequence[int], axes: str, leaves: str, after: str) -> None:
    known, maps = {"b": 2, "t": 3 if "t" in axes else 1, "s": 4, "h": 5, "w": 5}, torch.zeros(*shape)
    wanted = f"`enc_logits` of shape {tuple(shape)} and axes {axes!r} leaves {leaves}"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        bind_maps(maps, maps, axes=axes)
    sizes = [prod(known[letter] for letter in group) for group in parse(after)]
    given: dict[str, Any] = {"num_frames": 3} if "num_frames" in leaves else {}
    given |= {"grid": (5, 5)} if "grid" in leaves else {}
    bound = bind_maps(torch.zeros(sizes), torch.zeros(sizes), axes=after, **given)
    assert bound.enc.shape == tuple(known.values())


def test_sizes_that_do_not_divide_are_refused() -> None:
    maps = torch.zeros(7, 4, 5, 5)
    wanted = "`enc_logits` must have shape (b*t, s, h, w) with t=3, as axes '(b t) s h w' say; got (7, 4, 5, 5)."
    refuses(ValueError, wanted, pseudo_labels, maps, maps, axes="(b t) s h w", num_frames=3)
    wanted = "`maps` must have shape (s*b, t, h*w) with s=3, as axes '(s b) t (h w)' say; got (7, 2, 25)."
    refuses(ValueError, wanted, arrange, "maps", torch.zeros(7, 2, 25), "(s b) t (h w)", num_slots=3)


def test_what_is_no_dense_tensor_is_refused() -> None:
    maps = torch.zeros(2, 3, 4, 24)
    for name, given_ones in (("enc_logits", (None, maps)), ("dec_logits", (maps, None))):
        refuses(TypeError, f"`{name}` must be a tensor; got NoneType.", pseudo_labels, *given_ones, axes="b t s (h w)")
    sparse = maps.to_sparse()
    refuses(TypeError, "`enc_logits` must be a dense tensor", pseudo_labels, sparse, maps, axes="b t s (h w)")
    wanted = "`enc_logits` must be floating point; got torch.int32."
    refuses(TypeError, wanted, pseudo_labels, maps.int(), maps, axes="b t s (h w)", grid=(4, 6))


# --- compilers ---


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("dynamic", "given_frames"), [(None, True), (True, False)])
def test_one_graph_under_a_compiler(dynamic: bool | None, given_frames: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    axes = ("(b t) (h w) s", "(b t) (h w) s" if given_frames else "b t s h w")
    criterion = SSyncLoss(axes=axes, max_different=8)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=dynamic, backend=counter)
    for clips, frames, side in ((2, 3, 4), (3, 2, 4), (4, 5, 4), (4, 5, 6)):
        enc, dec = (draw_map({"b": clips, "t": frames, "s": 3, "h": side, "w": side}, seed=seed) for seed in range(2))
        maps = [laid_out(one, pattern).requires_grad_() for one, pattern in zip((enc, dec), axes, strict=True)]
        more: dict[str, Any] = {"num_frames": frames} if given_frames else {}
        expected, actual = (call(*maps, **more) for call in (criterion, compiled))
        assert expected > 0
        assert_close_loss(actual, expected)
        for one, other in zip(torch.autograd.grad(actual, maps), torch.autograd.grad(expected, maps), strict=True):
            torch.testing.assert_close(one, other)
    # a compiler makes a size symbolic when it varies; an inferred grid is a constant
    assert counter.frame_count <= 4


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_a_compiler_refuses_what_is_refused_without_one(dynamic: bool | None) -> None:
    images, clips = torch.randn(2, 2, 7, 16, 16), torch.randn(2, 4, 4, 11, 576)
    criterion = SSyncLoss().eval()
    whole = torch.compile(criterion, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_close_loss(whole(*clips), criterion(*clips))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(*images)
    torch._dynamo.reset()
    loose = torch.compile(criterion, dynamic=dynamic, backend="aot_eager")
    refuses(ValueError, "`axes` must tell whether maps of four axes are images", loose, *images)


def test_fake_tensors_and_meta() -> None:
    axes: Any = ("(b t) (h w) s", "(b t s) 1 h w")
    with FakeTensorMode():
        maps = torch.zeros(6, 25, 4, requires_grad=True), torch.zeros(24, 1, 5, 5, requires_grad=True)
        loss = SSyncLoss(axes=axes)(*maps, num_frames=3)
        assert [one.shape for one in torch.autograd.grad(loss, maps)] == [one.shape for one in maps]
        labels = pseudo_labels(*maps, axes=axes, num_frames=3)
        assert labels.boundary.shape == (2, 3, 5, 5)
    meta = [one.shape for one in maps]
    loss = SSyncLoss(axes=axes).eval()(*(torch.zeros(one, device="meta") for one in meta), num_frames=3)
    assert loss.device.type == "meta"
