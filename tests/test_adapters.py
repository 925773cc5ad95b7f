"""Taps on three kinds of hosts: recurrent over time, keys once per clip, and the `slot-attention` package."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from einops import rearrange, repeat
from examples.slot_model import SlotModel
from slot_attention import MultiHeadSlotAttention, SlotAttention
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ssync_loss import SSyncLoss
from ssync_loss.adapters import LogitTap, OutputTap, SlotMaps

B, T, S, N, D = 2, 3, 4, 6, 8


class Corrector(nn.Module):
    """Slot attention on one frame, or on all frames in the batch; records its last dots, for comparison."""

    def __init__(self, heads: int = 1, joint: bool = False) -> None:
        super().__init__()
        self.to_q = nn.Linear(D, D, bias=False)
        self.to_k = nn.Linear(D, D)
        self.update = nn.Linear(D, D)
        self.heads, self.joint = heads, joint
        self.scale = (D // heads) ** -0.5
        self.dots: list[Tensor] = []
        self.attention: list[Tensor] = []

    def forward(self, slots: Tensor, features: Tensor, iterations: int) -> Tensor:
        key = rearrange(self.to_k(features), "... n (h d) -> ... h n d", h=self.heads)
        for _ in range(iterations):
            query = rearrange(self.to_q(slots), "... s (h d) -> ... h s d", h=self.heads)
            dots = torch.einsum("...sd,...nd->...sn", query, key) * self.scale
            attention = _softmax_over(dots, self.joint).mean(-3)
            slots = slots + self.update(attention @ features)
        self.dots.append(dots)
        self.attention.append(attention)
        return slots


def _softmax_over(dots: Tensor, joint: bool) -> Tensor:
    if not joint:
        return dots.softmax(-2)
    together = rearrange(dots, "... h s n -> ... (h s) n").softmax(-2)
    return rearrange(together, "... (h s) n -> ... h s n", h=dots.shape[-3])


class Decoder(nn.Module):
    """An MLP on flattened frames, whose last channel is alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(N, D))
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D + 1))
        self.alpha: list[Tensor] = []

    def forward(self, slots: Tensor) -> Tensor:
        out = self.mlp(slots[:, :, None] + self.position)
        alpha = out[..., -1]
        self.alpha.append(alpha)
        mixed: Tensor = (out[..., :-1] * alpha.softmax(1)[..., None]).sum(1)
        return mixed


class VideoModel(nn.Module):
    """Frame after frame, with more iterations on the first; the decoder sees all frames at once."""

    def __init__(self, first: int = 3, later: int = 2, heads: int = 1, joint: bool = False) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(S, D))
        self.corrector = Corrector(heads, joint)
        self.predictor = nn.Linear(D, D)
        self.decoder = Decoder()
        self.first, self.later = first, later

    def forward(self, features: Tensor) -> Tensor:
        # the records of the corrector and the decoder belong to one forward
        self.corrector.dots, self.corrector.attention, self.decoder.alpha = [], [], []
        slots = repeat(self.slots, "s d -> b s d", b=features.shape[0])
        clip = []
        for t in range(features.shape[1]):
            slots = self.corrector(slots, features[:, t], self.later if t else self.first)
            clip.append(slots)
            slots = slots + self.predictor(slots)
        decoded: Tensor = self.decoder(rearrange(torch.stack(clip, 1), "b t s d -> (b t) s d"))
        return rearrange(decoded, "(b t) n d -> b t n d", t=features.shape[1])

    def dots(self) -> Tensor:
        """The dots of one head, (B, T, S, N)."""
        return torch.stack([dots.squeeze(-3) for dots in self.corrector.dots], 1)

    def attention(self) -> Tensor:
        return torch.stack(self.corrector.attention, 1)

    def alpha(self) -> Tensor:
        return self.decoder.alpha[0]


class KeysOnceModel(nn.Module):
    """Keys of all frames in one call, then queries frame by frame."""

    def __init__(self, first: int = 2, later: int = 2) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(S, D))
        self.project_q = nn.Linear(D, D, bias=False)
        self.project_k = nn.Linear(D, D, bias=False)
        self.scale = D**-0.5
        self.first, self.later = first, later
        self.logits: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.logits = []
        slots: Tensor = repeat(self.slots, "s d -> b s d", b=features.shape[0])
        key = self.scale * self.project_k(features)
        for t in range(features.shape[1]):
            for _ in range(self.later if t else self.first):
                logits = torch.bmm(key[:, t], self.project_q(slots).mT)
                attention = logits.softmax(-1)
                slots = slots + attention.mT @ features[:, t]
            self.logits.append(logits)
        return slots

    def dots(self) -> Tensor:
        return torch.stack(self.logits, 1).mT


class ImageModel(nn.Module):
    """Slot attention on flattened frames, or on frames in the batch: frames are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(S, D))
        self.corrector = Corrector()

    def forward(self, features: Tensor) -> Tensor:
        self.corrector.dots = []
        slots = self.slots.expand(*features.shape[:-2], S, D)
        out: Tensor = self.corrector(slots, features, 3)
        return out


class SoftmaxInputs(TorchFunctionMode):
    """Record the input of every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.softmax, torch.softmax, torch.nn.functional.softmax):
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


def features(batch: int = B, frames: int = T, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, frames, N, D, dtype=dtype)


def tap_of(model: VideoModel | ImageModel | KeysOnceModel, **settings: Any) -> LogitTap:
    if isinstance(model, KeysOnceModel):
        return LogitTap(model.project_q, model.project_k, model.scale, frames_in_key=True, **settings)
    corrector = model.corrector
    return LogitTap(corrector.to_q, corrector.to_k, corrector.scale, **settings)


def fed(key: Tensor, query: Tensor, **settings: Any) -> LogitTap:
    """Return a tap on projections with these outputs."""
    to_q, to_k = nn.Identity(), nn.Identity()
    tap = LogitTap(to_q, to_k, 1.0, **settings)
    to_k(key)
    to_q(query)
    return tap


def last_channel(out: Tensor) -> Tensor:
    return out[..., -1]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True))


def assert_same_gradients(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    assert any(one is not None and one.abs().max() > 1e-3 for one in wanted)
    torch.testing.assert_close(got, wanted)


class TestDots:
    @pytest.mark.parametrize(("first", "later"), [(1, 1), (2, 2), (3, 2), (3, 1)])
    @pytest.mark.parametrize("frames", [1, 2, 4])
    def test_are_the_hosts_own_of_every_last_iteration(self, first: int, later: int, frames: int) -> None:
        model = VideoModel(first, later)
        tap = tap_of(model)
        model(features(frames=frames))
        got = tap.pop()
        assert got.shape == (B, frames, S, N)
        torch.testing.assert_close(got, model.dots(), rtol=0, atol=1e-6)

    def test_carry_the_hosts_gradients(self) -> None:
        model = VideoModel().double()
        tap = tap_of(model)
        model(features(dtype=torch.float64))
        got, own = tap.pop(), model.dots()
        torch.testing.assert_close(got, own, rtol=0, atol=1e-14)
        weight = torch.randn_like(own)
        got_gradients = gradients(model, (weight * got).sum())
        assert_same_gradients(got_gradients, gradients(model, (weight * own).sum()))
        # slots of later frames depend on earlier ones: the whole encoder is taught, the decoder is not
        for (name, _), gradient in zip(model.named_parameters(), got_gradients, strict=True):
            assert (gradient is None) == name.startswith("decoder")

    def test_of_flattened_frames_are_taken_apart(self) -> None:
        model = ImageModel()
        tap = tap_of(model)
        clip = features()
        model(rearrange(clip, "b t n d -> (b t) n d"))
        own = model.corrector.dots[0].reshape(B, T, S, N)
        torch.testing.assert_close(tap.pop(num_frames=T), own, rtol=0, atol=1e-6)
        model(rearrange(clip, "b t n d -> (b t) n d"))
        assert tap.pop().shape == (B * T, 1, S, N)

    @pytest.mark.parametrize("num_frames", [None, T])
    def test_of_frames_side_by_side_stay(self, num_frames: int | None) -> None:
        model = ImageModel()
        tap = tap_of(model)
        model(features())
        torch.testing.assert_close(
            tap.pop(num_frames=num_frames), model.corrector.dots[0].squeeze(-3), rtol=0, atol=1e-6
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_halves_come_in_float32(self, dtype: torch.dtype) -> None:
        model = VideoModel()
        tap = tap_of(model)
        with torch.autocast("cpu", dtype=dtype):
            model(features())
            got = tap.pop()
        assert model.dots().dtype == dtype
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, model.dots().float(), rtol=2e-2, atol=2e-2)

    def test_of_halves_are_multiplied_in_float32(self) -> None:
        ones = torch.ones(1, 1, 300, dtype=torch.bfloat16)
        # 1 + 2 + 298 * 3; bfloat16 has no 897
        assert fed(ones, ones.cumsum(-1).clamp_max(3.0)).pop().item() == 897.0

    def test_of_two_dtypes_come_in_the_wider_one(self) -> None:
        ones = torch.ones(1, 1, 2, dtype=torch.float64)
        assert fed(ones, ones.half()).pop().dtype == torch.float64

    def test_under_inference_mode(self) -> None:
        model = VideoModel()
        tap = tap_of(model)
        with torch.inference_mode():
            model(features())
            torch.testing.assert_close(tap.pop(), model.dots(), rtol=0, atol=1e-6)


class TestHeads:
    @pytest.mark.parametrize("heads", [1, 2, 4])
    @pytest.mark.parametrize("joint", [False, True])
    def test_softmax_is_the_hosts_attention(self, heads: int, joint: bool) -> None:
        model = VideoModel(heads=heads, joint=joint)
        tap = tap_of(model, heads=heads, head_softmax="joint" if joint else "per_head")
        model(features())
        # the host averages over heads; its joint softmax then sums to 1 / heads over slots
        own = model.attention() * (heads if joint else 1)
        torch.testing.assert_close(tap.pop().softmax(2), own, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("head_softmax", "wanted"), [("per_head", log(0.625)), ("joint", log(4.0))])
    def test_values_by_hand(self, head_softmax: Any, wanted: float) -> None:
        # dots of slot 0: log 3, 0 in the two heads; of slot 1: 0, 0. so p of slot 0 is 3/4 and 1/2
        query = torch.tensor([[[log(3.0), 0.0], [0.0, 0.0]]])
        tap = fed(torch.ones(1, 1, 2), query, heads=2, head_softmax=head_softmax)
        torch.testing.assert_close(tap.pop()[0, 0, 0, 0], torch.tensor(wanted))


class TestPackage:
    def test_one_head(self) -> None:
        host = SlotAttention(num_slots=S, dim=D, iters=3)
        tap = LogitTap(host.to_q, host.to_k, host.scale, host=host)
        with SoftmaxInputs() as softmax:
            host(torch.randn(B, N, D))
        assert len(softmax.seen) == 3
        torch.testing.assert_close(tap.pop(), softmax.seen[-1][:, None], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("heads", [1, 4])
    def test_several_heads(self, heads: int) -> None:
        host = MultiHeadSlotAttention(num_slots=S, dim=D, heads=heads, dim_head=5, iters=3)
        tap = LogitTap(host.to_q, host.to_k, host.scale, heads=heads, host=host)
        with SoftmaxInputs() as softmax:
            host(torch.randn(B, N, D))
        dots = softmax.seen[-1]
        assert dots.shape == (B, heads, S, N)
        got = tap.pop()
        torch.testing.assert_close(got.softmax(2)[:, 0], dots.softmax(-2).mean(1), rtol=0, atol=1e-6)
        if heads == 1:
            torch.testing.assert_close(got, dots, rtol=0, atol=1e-6)


class TestKeysOnce:
    @pytest.mark.parametrize("frames", [1, 2, 4])
    @pytest.mark.parametrize("iterations", [1, 3])
    def test_counts_iterations_out(self, frames: int, iterations: int) -> None:
        model = KeysOnceModel(iterations, iterations).double()
        tap = tap_of(model)
        model(features(frames=frames, dtype=torch.float64))
        got = tap.pop(num_frames=frames)
        torch.testing.assert_close(got, model.dots(), rtol=0, atol=1e-14)
        weight = torch.randn_like(got)
        assert_same_gradients(gradients(model, (weight * got).sum()), gradients(model, (weight * model.dots()).sum()))

    @pytest.mark.parametrize(("first", "later"), [(2, 2), (3, 2), (4, 1), (2, 1)])
    def test_leaves_the_rest_to_the_first_frame(self, first: int, later: int) -> None:
        model = KeysOnceModel(first, later)
        tap = tap_of(model, iterations=later)
        model(features())
        torch.testing.assert_close(tap.pop(), model.dots(), rtol=0, atol=1e-6)


ONE, TWO = [(B, T)], [(B, T), (B, T)]


@pytest.mark.parametrize(
    ("make", "settings", "clips", "num_frames", "error", "message"),
    [
        (VideoModel, {}, [], None, RuntimeError, r"`key_projection` \(Linear\) has not run"),
        (partial(KeysOnceModel, 3, 2), {}, ONE, None, RuntimeError, r"7 queries do not divide .* 3 .*`iterations`"),
        (partial(KeysOnceModel, 4, 2), {"iterations": 3}, ONE, None, RuntimeError, r"=3 take at least 9.*got 8"),
        (partial(KeysOnceModel, 4, 2), {"iterations": 7}, ONE, None, RuntimeError, r"=7 take at least 21.*got 8"),
        (KeysOnceModel, {}, TWO, None, RuntimeError, r"`key_projection` \(Linear\) gave 2 clips.*`host`"),
        (KeysOnceModel, {}, ONE, 6, RuntimeError, r"gave 3 frames of 2 samples.*`num_frames`=6"),
        (VideoModel, {"frames_in_key": True}, [(B, 1)], None, ValueError, r"\(B, T, N, D\).*got \(2, 6, 8\)"),
        (VideoModel, {"heads": 3}, ONE, None, ValueError, r"`heads` must divide D=8; got 3"),
        (VideoModel, {}, ONE, 2, RuntimeError, "gave 3 frames of 2 samples"),
        # left by earlier forwards
        (
            VideoModel,
            {},
            [(1, T), (B, T)],
            None,
            RuntimeError,
            r"3 calls of shape \(1, 4, 6\) and 3 calls of .*\(2, 4, 6\).*earlier",
        ),
        (VideoModel, {}, TWO, T, RuntimeError, r"gave 6 frames of 2 samples.*`num_frames`=3.*earlier"),
        (ImageModel, {}, TWO, None, RuntimeError, r"gave 2 clips, one is wanted"),
    ],
)
def test_a_pop_that_is_refused_empties_too(
    make: Any, settings: Any, clips: Any, num_frames: Any, error: Any, message: str
) -> None:
    model = make()
    tap = tap_of(model, **settings)
    for size in clips:
        model(features(*size))
    with pytest.raises(error, match=message):
        tap.pop(num_frames=num_frames)
    with pytest.raises(RuntimeError, match="has not run since the last pop"):
        tap.pop()


class TestCalls:
    def test_an_output_tap_names_its_module(self) -> None:
        model = VideoModel()
        tap = OutputTap(model.decoder.mlp, last_channel, host=model)
        with pytest.raises(RuntimeError, match=r"`module` \(decoder.mlp\) has not run"):
            tap.pop()
        tap = OutputTap(model.decoder.mlp, last_channel)
        model(features(batch=1))
        model(features())
        with pytest.raises(RuntimeError, match=r"`module` \(Sequential\) made no clip of 1 call of.*earlier"):
            tap.pop()

    def test_pop_empties(self) -> None:
        model = VideoModel()
        taps = tap_of(model), OutputTap(model.decoder.mlp, last_channel)
        model(features())
        for tap in taps:
            tap.pop()
            with pytest.raises(RuntimeError, match="has not run since the last pop"):
                tap.pop()

    def test_query_must_follow_key(self) -> None:
        to_q, to_k = nn.Identity(), nn.Identity()
        tap = LogitTap(to_q, to_k, 1.0)
        for _ in range(2):
            to_q(torch.ones(1, 1, 2))
            to_k(torch.ones(1, 1, 2))
        with pytest.raises(RuntimeError, match=r"`query_projection` \(Identity\) has not .* call 2 of 2"):
            tap.pop()

    @pytest.mark.parametrize("make", [VideoModel, KeysOnceModel])
    def test_a_swap_is_asked_about(self, make: Any) -> None:
        model = make()
        q, k = (
            (model.corrector.to_q, model.corrector.to_k) if make is VideoModel else (model.project_q, model.project_k)
        )
        tap = LogitTap(k, q, 1.0, frames_in_key=make is KeysOnceModel)
        model(features())
        with pytest.raises(RuntimeError, match=r"queries slots\. Are the two the other way round\? Swap them\."):
            tap.pop()

    def test_many_are_counted_and_not_listed(self) -> None:
        module = nn.Identity()
        tap = OutputTap(module)
        for length in range(1, 65):
            module(torch.zeros(2, 7, length))
        with pytest.raises(RuntimeError) as error:
            tap.pop()
        assert "made no clip of 64 calls of 64 shapes, (2, 7, 1) to (2, 7, 64): is an earlier" in str(error.value)
        whole = OutputTap(module, axes="b t s (h w)", host=(host := nn.Sequential(*[module] * 64)))
        host(torch.zeros(2, 3, 7, 24))
        with pytest.raises(RuntimeError, match=r"gave 64 clips, one is wanted \(64 calls of shape \(2, 3, 7, 24\)\)"):
            whole.pop()

    @pytest.mark.parametrize("make", [KeysOnceModel, ImageModel])
    def test_of_a_forward_with_several_clips_are_told(self, make: Any) -> None:
        model = make()
        host = nn.ModuleList([model])
        host.forward = lambda clip: (model(clip), model(clip))
        tap = tap_of(model, host=host)
        host(features())
        with pytest.raises(RuntimeError, match=r"gave 2 clips.*does one forward of `host` make several clips\?"):
            tap.pop()

    @pytest.mark.parametrize(
        ("query", "key"), [((2, 4, 8), (2, 6, 7)), ((2, 4, 8), (3, 6, 8)), ((2, 4, 8), (2, 3, 6, 8)), ((4, 8), (6, 8))]
    )
    def test_shapes_must_go_together(self, query: tuple[int, ...], key: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"must give \(B, S, D\) and \(B, N, D\).*`frames_in_key`"):
            fed(torch.ones(key), torch.ones(query)).pop()

    def test_outputs_must_be_tensors(self) -> None:
        gru = nn.GRU(D, D)
        LogitTap(gru, nn.Identity(), 1.0)
        key = LogitTap(nn.Identity(), gru, 1.0)
        with pytest.raises(TypeError, match=r"`key_projection` \(GRU\) must give a tensor; got tuple"):
            gru(torch.ones(1, 1, D))
        key.remove()
        tap = OutputTap(gru, lambda out: out)
        with pytest.raises(TypeError, match=r"`select` on `module` \(GRU\) must give a tensor; got tuple"):
            gru(torch.ones(1, 1, D))
        tap.remove()
        tap = OutputTap(gru, lambda out: out[0])
        out, _ = gru(torch.ones(1, 1, D))
        assert torch.equal(tap.pop(), out)

    def test_keeps_only_the_last_iteration_of_a_frame(self) -> None:
        model = VideoModel(first=5, later=4)
        tap = tap_of(model)
        outputs: list[weakref.ref[Tensor]] = []
        model.corrector.to_q.register_forward_hook(lambda *call: outputs.append(weakref.ref(call[-1])))
        with torch.no_grad():
            model(features())
        gc.collect()
        assert [ref() is not None for ref in outputs] == [False] * 4 + [True] + ([False] * 3 + [True]) * 2
        tap.pop()
        gc.collect()
        assert not any(ref() is not None for ref in outputs)


class TestLeftovers:
    def test_host_starts_the_tap_afresh(self) -> None:
        model = VideoModel()
        enc, dec = tap_of(model, host=model), OutputTap(model.decoder.mlp, last_channel, host=model)
        with torch.no_grad():
            model(features(frames=5))
        model(features())
        torch.testing.assert_close(enc.pop(), model.dots(), rtol=0, atol=1e-6)
        assert torch.equal(dec.pop(), model.alpha())

    def test_host_clears_after_a_broken_forward(self) -> None:
        model = VideoModel()
        tap = tap_of(model, host=model)
        with pytest.raises(RuntimeError), torch.no_grad():
            model(torch.randn(B, T, N + 1, D)[..., :, : D - 1])
        model(features())
        assert tap.pop().shape == (B, T, S, N)

    def test_reset_forgets(self) -> None:
        model = VideoModel()
        tap = tap_of(model)
        model(features())
        tap.reset()
        model(features())
        torch.testing.assert_close(tap.pop(num_frames=T), model.dots(), rtol=0, atol=1e-6)

    def test_of_validation_warn(self) -> None:
        model = VideoModel()
        tap = tap_of(model)
        with torch.no_grad():
            model(features())
        model(features())
        with pytest.warns(UserWarning, match=r"3 of 6 frames of `key_projection`.*no gradient.*`host`"):
            tap.pop()


class TestInPlaceWrites:
    def test_to_a_projection_are_an_error(self) -> None:
        for name in ("query_projection", "key_projection"):
            to_q, to_k = nn.Linear(2, 2), nn.Linear(2, 2)
            tap = LogitTap(to_q, to_k, 1.0)
            with torch.no_grad():
                key, query = to_k(torch.ones(1, 1, 2)), to_q(torch.ones(1, 1, 2))
                (query if name == "query_projection" else key).mul_(0.5)
            with pytest.raises(RuntimeError, match=rf"wrote to the output of `{name}` \(Linear\) in place"):
                tap.pop()

    def test_to_an_output_are_an_error_unless_it_is_cloned(self) -> None:
        mlp = nn.Linear(2, 2)
        view, clone = OutputTap(mlp, last_channel), OutputTap(mlp, lambda out: out[..., -1].clone())
        with torch.no_grad():
            out = mlp(torch.ones(1, 1, 2))
            wanted = out[..., -1].clone()
            out.zero_()
        with pytest.raises(RuntimeError, match=r"wrote to the output of `select` on `module` \(Linear\)"):
            view.pop()
        assert torch.equal(clone.pop(), wanted)


class TestRemoval:
    def test_leaves_no_hook(self) -> None:
        model = VideoModel()
        taps = tap_of(model, host=model), OutputTap(model.decoder.mlp, last_channel, host=model)
        model(features())
        for tap in taps:
            tap.remove()
            tap.remove()
        hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
        assert not any(hooks)
        model(features())
        for tap in taps:
            with pytest.raises(RuntimeError, match="this tap hangs on no module: it was removed"):
                tap.pop()

    def test_reaches_code_that_was_compiled_before(self) -> None:
        model = VideoModel()
        enc, dec = tap_of(model), OutputTap(model.decoder.mlp, last_channel, host=model.decoder)
        mlp, out = model.decoder.mlp, torch.zeros(2, 3)
        hooks = [*model.corrector.to_k._forward_hooks.values(), *mlp._forward_hooks.values()]
        starts: Any = list(model.decoder._forward_pre_hooks.values())
        enc.remove()
        dec.remove()
        # as such code would
        starts[0](model, ())
        for hook in hooks:
            hook(mlp, (), out)
        assert not enc._calls
        assert not dec._calls

    def test_leaves_other_taps(self) -> None:
        model = VideoModel()
        first, second = tap_of(model), tap_of(model)
        first.remove()
        model(features())
        assert second.pop().shape == (B, T, S, N)

    def test_at_the_end_of_a_context_or_at_an_error_in_it(self) -> None:
        model = VideoModel()
        with tap_of(model) as enc, OutputTap(model.decoder.mlp, last_channel) as dec:
            model(features())
            SlotMaps.join(enc, dec)
        with pytest.raises(ZeroDivisionError), tap_of(model):
            _ = 1 / 0
        assert not model.corrector.to_q._forward_hooks
        assert not model.decoder.mlp._forward_hooks


class TestTheHostStaysItself:
    def test_state_dict_is_untouched(self) -> None:
        model, plain = VideoModel(), VideoModel()
        tap = tap_of(model, host=model)
        model(features())
        assert model.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(model.state_dict())
        model.load_state_dict(plain.state_dict())
        assert tap.pop().shape == (B, T, S, N)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("tapped", ["whole", "host"])
    def test_copies_are_not_tapped(self, duplicate: Callable[[Any], Any], tapped: str) -> None:
        model = VideoModel()
        enc = tap_of(model, host=model)
        dec = OutputTap(model.decoder.mlp, lambda out: out[..., -1], host=model)
        clip = features()
        model(clip)
        # the host's records are no leaves and cannot be copied; the taps' records must not matter
        own = model.dots()
        model.corrector.dots, model.corrector.attention, model.decoder.alpha = [], [], []
        if tapped == "whole":
            twin, twin_enc, twin_dec = duplicate((model, enc, dec))
            for tap in (twin_enc, twin_dec):
                with pytest.raises(RuntimeError, match="this tap hangs on no module: it was removed"):
                    tap.pop()
                tap.remove()
        else:
            twin = duplicate(model)
        assert torch.equal(twin(clip), model(clip))
        twin(features(batch=5))
        torch.testing.assert_close(enc.pop(), own, rtol=0, atol=0)
        assert dec.pop().shape == (B * T, S, N)
        with tap_of(twin, host=twin) as fresh:
            twin(clip)
            torch.testing.assert_close(fresh.pop(), own, rtol=0, atol=0)


class Step(nn.Module):
    """A training step in one piece: forward, pop, loss."""

    def __init__(self, model: nn.Module, take: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.take = take

    def forward(self, clip: Tensor) -> Tensor:
        out = self.model(clip)
        loss: Tensor = out.square().mean() + self.take().log_softmax(2).square().mean()
        return loss


def pop_of(tap: LogitTap) -> Callable[[], Tensor]:
    # torch 2.6 does not trace the tap's own method where it is an attribute of a module
    return lambda: tap.pop()  # noqa: PLW0108


def tapped_host(kind: str) -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    """A host, a function that pops its taps, and a short clip."""
    clip = features(frames=2)
    if kind == "keys_once":
        keys_once = KeysOnceModel(first=2, later=1)
        return keys_once, pop_of(tap_of(keys_once, iterations=1, host=keys_once)), clip
    if kind == "package":
        package = MultiHeadSlotAttention(num_slots=S, dim=D, heads=2, dim_head=4, iters=2)
        # the initial slots are random; without spread they are the mean
        nn.init.constant_(package.slots_logsigma, -1e4)
        tap = LogitTap(package.to_q, package.to_k, package.scale, heads=2, host=package)
        return package, pop_of(tap), clip[:, 0]
    model = VideoModel(first=2, later=1)
    host = model if kind == "reset_by_host" else None
    enc, dec = tap_of(model, host=host), OutputTap(model.decoder.mlp, last_channel, host=host)
    return model, lambda: torch.cat(SlotMaps.join(enc, dec), -1), clip


def compile_whole(model: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # einops looks for torch at its first call, and graphs depend on that
    rearrange(torch.zeros(1), "one -> one 1")


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize("kind", ["reset_by_host", "keys_once"])
    def test_host_alone(self, kind: str) -> None:
        model, take, clip = tapped_host(kind)
        compiled = compile_whole(model)
        for call in range(3):
            # a forward that is not popped must not affect the next one
            compiled(clip - 1)
            compiled(clip + call)
            got = take()
            got_gradients = gradients(model, got.square().sum())
            model(clip + call)
            own = take()
            torch.testing.assert_close(got, own)
            torch.testing.assert_close(got_gradients, gradients(model, own.square().sum()), rtol=1e-4, atol=1e-4)
        assert num_graphs() == 1

    @pytest.mark.parametrize("kind", ["popped", "keys_once", "package"])
    def test_whole_step(self, kind: str) -> None:
        model, take, clip = tapped_host(kind)
        step = Step(model, take)
        compiled = compile_whole(step)
        for call in range(3):
            got = compiled(clip + call)
            got_gradients = gradients(model, got)
            own = step(clip + call)
            torch.testing.assert_close(got, own)
            torch.testing.assert_close(got_gradients, gradients(model, own), rtol=1e-4, atol=1e-5)
        assert num_graphs() == 1

    # inductor imports modules that torch has deprecated
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_whole_step_with_inductor(self) -> None:
        model = KeysOnceModel(first=1, later=1)
        step = Step(model, pop_of(tap_of(model, host=model)))
        compiled = torch.compile(step, fullgraph=True)
        for clip in (features(frames=1), features(frames=1)):
            torch.testing.assert_close(compiled(clip), step(clip), rtol=1e-4, atol=1e-5)
        assert num_graphs() == 1

    # torch's compiler reads the .grad of all inputs
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize("in_place", [False, True])
    def test_compiled_host_starts_the_tap_afresh(self, in_place: bool) -> None:
        model = nn.Sequential(nn.Linear(D, D))
        compiled = model if in_place else compile_whole(model)
        tap = OutputTap(model[0], last_channel, host=compiled)
        if in_place:
            model.compile(fullgraph=True, backend="aot_eager")
        for _ in range(3):
            out = compiled(torch.randn(B, D))
        assert torch.equal(tap.pop(), out[..., -1])
        assert num_graphs() == 1

    def test_attached_too_late_says_so(self) -> None:
        mlp = nn.Linear(D, D)
        compiled = compile_whole(mlp)
        compiled(torch.randn(B, D))
        tap = OutputTap(mlp, last_channel)
        compiled(torch.randn(B, D))
        with pytest.raises(RuntimeError, match="attach the tap before the model's first call"):
            tap.pop()

    def test_removed_tap_holds_nothing(self) -> None:
        mlp = nn.Linear(D, D)
        tap = OutputTap(mlp, last_channel)
        compiled = compile_whole(mlp)
        compiled(torch.randn(B, D))
        assert len(tap._calls) == 1
        tap.remove()
        compiled(torch.randn(B, D))
        assert tap._calls == []


class TestCheckpointing:
    def run(self, model: VideoModel, tap: LogitTap, clip: Tensor, reentrant: bool | None) -> Tensor:
        out = model(clip) if reentrant is None else checkpoint(model, clip, use_reentrant=reentrant)
        loss: Tensor = out.square().mean() + tap.pop(num_frames=T).square().mean()
        return loss

    @pytest.mark.parametrize("hosted", [True, False])
    def test_gives_the_same_gradients_twice(self, hosted: bool) -> None:
        model = VideoModel()
        tap = tap_of(model, host=model if hosted else None)
        for _ in range(2):
            clip = features()
            model.zero_grad()
            torch.autograd.backward(self.run(model, tap, clip, None))
            wanted = [parameter.grad for parameter in model.parameters()]
            model.zero_grad()
            torch.autograd.backward(self.run(model, tap, clip, False))
            assert_same_gradients([parameter.grad for parameter in model.parameters()], wanted)
            with pytest.raises(RuntimeError, match="has not run since the last pop"):
                tap.pop()

    def test_with_reentry_gives_no_gradient(self) -> None:
        model = VideoModel()
        tap = tap_of(model, host=model)
        checkpoint(model, features().requires_grad_(), use_reentrant=True)
        assert not tap.pop().requires_grad


def test_distributed_wrapper_needs_nothing(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = VideoModel()
        wrapped = DistributedDataParallel(model)
        enc = tap_of(model, host=wrapped)
        dec = OutputTap(model.decoder.mlp, last_channel, host=wrapped)
        for _ in range(2):
            wrapped(features())
            out = wrapped(features())
            maps = SlotMaps.join(enc, dec)
            torch.testing.assert_close(maps.enc_logits, model.dots(), rtol=0, atol=1e-6)
            torch.autograd.backward([out.square().mean(), *(one.square().mean() for one in maps)])
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


class TestOutputTap:
    def test_of_one_call_gives_the_tensor(self) -> None:
        model = VideoModel()
        tap = OutputTap(model.decoder.mlp, last_channel)
        out = model(features())
        got = tap.pop()
        assert torch.equal(got, model.alpha())
        weight = torch.randn_like(got)
        assert_same_gradients(gradients(model, (weight * got).sum()), gradients(model, (weight * model.alpha()).sum()))
        assert out.shape == (B, T, N, D)

    def test_of_several_calls_stacks_frames(self) -> None:
        decoder = Decoder()
        tap = OutputTap(decoder.mlp, last_channel)
        for _ in range(T):
            decoder(torch.randn(B, S, D))
        assert torch.equal(tap.pop(), torch.stack(decoder.alpha, 1))

    @pytest.mark.parametrize(
        "select", [lambda out: out.log(), lambda out: out.log().mT.mT, lambda out: out.log().unsqueeze(1)[:, 0]]
    )
    def test_refuses_the_logarithm_of_a_zero(self, select: Any) -> None:
        """Its gradient is NaN, though the loss is finite."""
        relu = nn.ReLU()
        tap = OutputTap(relu, select)
        positive = torch.rand(2, 3, 4, requires_grad=True) + 0.1
        relu(positive)
        assert tap.pop().isfinite().all()
        with_zero = positive.clone()
        with_zero[0, 0, 0] = 0.0
        relu(with_zero)
        with pytest.raises(
            ValueError, match=r"^`select` on `module` \(ReLU\) must give .* log\(\) of a probability of 0"
        ):
            tap.pop()
        # without a gradient nothing can be NaN
        with torch.no_grad():
            relu(with_zero)
        assert tap.pop().isneginf().any()

    def test_takes_absent_slots_and_the_logarithm_of_a_softmax(self) -> None:
        def absent(out: Tensor) -> Tensor:
            return out.log_softmax(1).masked_fill(torch.tensor([False, False, True])[:, None], float("-inf"))

        module = nn.Identity()
        for select in (absent, lambda out: out.clamp_min(1e-30).log()):
            tap = OutputTap(module, select)
            module(torch.zeros(2, 3, 4, requires_grad=True))
            tap.pop()
            tap.remove()


class TestJoin:
    def test_of_a_video_model_feeds_a_criterion(self) -> None:
        model = VideoModel()
        enc, dec = tap_of(model, host=model), OutputTap(model.decoder.mlp, last_channel, host=model)
        model(features())
        maps = SlotMaps.join(enc, dec)
        torch.testing.assert_close(maps.enc_logits, model.dots(), rtol=0, atol=1e-6)
        assert torch.equal(maps.dec_logits, model.alpha().reshape(B, T, S, N))
        torch.autograd.backward(SSyncLoss(grid=(2, 3))(*maps))
        assert model.corrector.to_q.weight.grad is not None
        assert model.corrector.to_k.weight.grad is not None
        assert model.decoder.position.grad is not None


class TestArguments:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"scale": 0.0}, ValueError, "`scale` must be finite and above 0"),
            ({"scale": "1"}, TypeError, "`scale` must be a number; got str"),
            ({"heads": 0}, ValueError, "`heads` must be at least 1; got 0"),
            ({"heads": 2.0}, TypeError, "`heads` must be an integer; got float"),
            ({"head_softmax": "slots"}, ValueError, "`head_softmax` must be one of 'per_head', 'joint'; got"),
            ({"iterations": 2}, ValueError, "`iterations` must be None without `frames_in_key`; got 2"),
            ({"iterations": 0, "frames_in_key": True}, ValueError, "`iterations` must be at least 1; got 0"),
            ({"query_projection": 1}, TypeError, "`query_projection` must be a module; got int"),
            ({"key_projection": None}, TypeError, "`key_projection` must be a module; got NoneType"),
            ({"host": "model"}, TypeError, "`host` must be a module; got str"),
            ({"host": nn.ReLU()}, ValueError, "`host` must contain `query_projection`; this ReLU does not"),
        ],
    )
    def test_of_a_logit_tap(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        to_q, to_k = nn.Identity(), nn.Identity()
        arguments: dict[str, Any] = {"query_projection": to_q, "key_projection": to_k, "scale": 1.0}
        with pytest.raises(error, match=message):
            LogitTap(**{**arguments, **settings})
        assert not to_q._forward_hooks
        assert not to_k._forward_hooks

    def test_one_module_cannot_be_both_projections(self) -> None:
        shared = nn.Identity()
        with pytest.raises(ValueError, match="`query_projection` and `key_projection` must be two modules"):
            LogitTap(shared, shared, 1.0)

    def test_of_an_output_tap(self) -> None:
        mlp = nn.Identity()
        wrong: Any = -1
        with pytest.raises(TypeError, match="`select` must be callable; got int"):
            OutputTap(mlp, wrong)
        with pytest.raises(ValueError, match="`host` must contain `module`; this ReLU does not"):
            OutputTap(mlp, last_channel, host=nn.ReLU())
        assert not mlp._forward_hooks


@pytest.mark.parametrize(("num_frames", "error"), [(0, ValueError), (2.0, TypeError)])
def test_a_wrong_number_of_frames_is_named(num_frames: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`num_frames` must be"):
        fed(torch.ones(1, 1, 2), torch.ones(1, 1, 2)).pop(num_frames=num_frames)


class TestNumFrames:
    """A tap without a host."""

    def test_keeps_the_last_frames(self) -> None:
        model = VideoModel()
        taps = tap_of(model, num_frames=T), tap_of(model, num_frames=T - 1)
        for _ in range(3):
            model(features())
        for tap in taps:
            assert [len(tap._calls), len(tap._queries)] == [tap._num_frames] * 2
        torch.testing.assert_close(taps[0].pop(num_frames=T), model.dots(), rtol=0, atol=1e-6)
        torch.testing.assert_close(taps[1].pop(), model.dots()[:, 1:], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("make", [KeysOnceModel, ImageModel])
    def test_keeps_the_last_call_that_is_a_clip(self, make: Any) -> None:
        model = make()
        tap = tap_of(model, num_frames=T)
        for _ in range(3):
            model(features())
        assert len(tap._calls) == len(tap._queries) == 1
        own = model.dots() if make is KeysOnceModel else model.corrector.dots[0].squeeze(-3)
        torch.testing.assert_close(tap.pop(), own, rtol=0, atol=1e-6)
        model(features(frames=2))
        with pytest.raises(RuntimeError, match=r"gave 2 frames where `num_frames`=3\.$"):
            tap.pop()

    def test_of_flattened_frames_is_one(self) -> None:
        model = ImageModel()
        tap, wrong = tap_of(model, num_frames=1), tap_of(model, num_frames=T)
        model(rearrange(features(), "b t n d -> (b t) n d"))
        with pytest.raises(RuntimeError, match=r"gave 1 frames where `num_frames`=3.*in the batch.*`num_frames`=1"):
            wrong.pop(num_frames=T)
        model(rearrange(features(), "b t n d -> (b t) n d"))
        own = model.corrector.dots[0].reshape(B, T, S, N)
        torch.testing.assert_close(tap.pop(num_frames=T), own, rtol=0, atol=1e-6)

    def test_of_outputs(self) -> None:
        module = nn.Identity()
        tap, whole = OutputTap(module, num_frames=2), OutputTap(module, axes="(b t) s (h w)", num_frames=3)
        frames = torch.randn(5, B * T, S, N)
        for frame in frames:
            module(frame)
        assert len(tap._calls) == 2
        assert torch.equal(tap.pop(), frames[3:].transpose(0, 1))
        assert len(whole._calls) == 1
        assert torch.equal(whole.pop(), frames[4].reshape(B, T, S, N))
        module(frames[0])
        with pytest.raises(RuntimeError, match=r"`module` \(Identity\) gave 1 frames where `num_frames`=2"):
            tap.pop()

    @pytest.mark.parametrize(
        "make", [OutputTap, lambda module, **settings: LogitTap(module[0], module[1], 1.0, **settings)]
    )
    def test_is_wrong_beside_a_host_or_below_one(self, make: Any) -> None:
        module = nn.Sequential(nn.Identity(), nn.Identity())
        with pytest.raises(ValueError, match="`num_frames` must be None with `host`, whose forward is a clip; got 3"):
            make(module, host=module, num_frames=3)
        with pytest.raises(ValueError, match="`num_frames` must be at least 1; got 0"):
            make(module, num_frames=0)
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


class TestAxes:
    @pytest.mark.parametrize(
        ("axes", "written", "num_frames", "num_slots"),
        [
            ("(b t) s (h w)", "b t s n -> (b t) s n", T, None),
            ("b (h w) t s", "b t s n -> b n t s", None, None),
            ("(b t s) h w", "b t s h w -> (b t s) h w", T, S),
            ("b t h w s", "b t s h w -> b t h w s", T, S),
            ("t s h w", "1 t s h w -> t s h w", None, None),
        ],
    )
    def test_are_read(self, axes: str, written: str, num_frames: int | None, num_slots: int | None) -> None:
        module = nn.Identity()
        tap = OutputTap(module, axes=axes)
        wanted = torch.randn(1 if written[0] == "1" else B, T, S, *((N,) if " n " in written else (2, 3)))
        module(rearrange(wanted, written))
        assert torch.equal(tap.pop(num_frames=num_frames, num_slots=num_slots), wanted)

    def test_without_t_make_calls_frames(self) -> None:
        module = nn.Identity()
        frames = torch.randn(T, B, S, 2, 3)
        tap = OutputTap(module, lambda out: out.mT, axes="b s w h", host=(host := nn.Sequential(module)))
        with pytest.raises(RuntimeError, match="has not run"):
            tap.pop()
        host.append(module)
        host(frames[0])
        assert torch.equal(tap.pop(num_frames=2, num_slots=S), frames[0][:, None].expand(-1, 2, -1, -1, -1))
        host(frames[1])
        with pytest.raises(RuntimeError, match=r"gave 2 frames where `num_frames`=3"):
            tap.pop(num_frames=3)

    def test_that_are_wrong_are_named(self) -> None:
        module: Any = nn.Identity()
        with pytest.raises(ValueError, match=r"`axes` must name .*got 'b t h w', with no 's'"):
            OutputTap(module, axes="b t h w")
        wrong: Any = 3
        with pytest.raises(TypeError, match="`axes` must be a pattern"):
            OutputTap(module, axes=wrong)
        tap = OutputTap(module, axes="(b t) s h w")
        module(torch.zeros(B * T, S, 2, 3))
        with pytest.raises(ValueError, match=r"`module` of shape \(6, 4, 2, 3\) .* Give `num_frames`"):
            tap.pop()
        sizes = OutputTap(module, axes="(b t s) h w")
        module(torch.zeros(B * T * S, 2, 3))
        with pytest.raises(ValueError, match=r"leaves b and t and s open\. Give `num_frames`\. Give `num_slots`\.$"):
            sizes.pop()
        sizes.remove()
        module(torch.zeros(B * T, S, 6))
        with pytest.raises(ValueError, match=r"`module` must have shape \(b\*t, s, h, w\).*got \(6, 4, 6\)"):
            tap.pop(num_frames=T)
        plain = OutputTap(module)
        for size in ({"num_frames": 3}, {"num_slots": 3}):
            with pytest.raises(ValueError, match=r"`num_\w+` must be None without `axes`; got 3"):
                plain.pop(**size)


def test_taps_on_the_model_of_the_examples_give_its_own_maps() -> None:
    model = SlotModel(num_slots=5, feature_dim=6, dim=16)
    attention = model.attention
    enc = LogitTap(attention.to_query, attention.to_key, attention.scale, host=model)
    dec = OutputTap(model.decoder, lambda output: output[0], host=model)
    output = model(torch.randn(2, 3, 6, 4, 5))
    maps = SlotMaps.join(enc, dec)
    torch.testing.assert_close(maps.enc_logits.unflatten(3, (4, 5)), output.enc_logits)
    assert torch.equal(maps.dec_logits, output.dec_logits)
