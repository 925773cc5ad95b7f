"""Taps that meet forwards nobody told them about: validation, unpopped ones, checkpointing, copies, generation."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ssync_loss.adapters import LogitTap, OutputTap, SlotMaps

B, S, N, D = 2, 4, 6, 8


class Out(NamedTuple):
    """What a model gives, its own maps among it, for comparison."""

    decoded: Tensor
    enc_logits: Tensor
    dec_logits: Tensor


class Corrector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, slots: Tensor, features: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        key = self.to_k(features)
        for _ in range(iterations):
            dots = self.to_q(slots) @ key.mT * D**-0.5
            slots = slots + dots.softmax(1) @ features
        return slots, dots


class Processor(nn.Module):
    """Slot attention frame by frame, with more iterations on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.corrector = Corrector()
        self.slots = nn.Parameter(torch.randn(S, D))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        slots: Tensor = self.slots.expand(len(features), S, D)
        clip, logits = [], []
        for t, frame in enumerate(features.unbind(1)):
            slots, dots = self.corrector(slots, frame, 2 if t else 3)
            clip.append(slots)
            logits.append(dots)
        return torch.stack(clip, 1), torch.stack(logits, 1)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(N, D))
        self.mlp = nn.Linear(D, D + 1)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        out = self.mlp(slots.flatten(0, 1)[:, :, None] + self.position)
        alpha = out[..., -1]
        decoded = (out[..., :-1] * alpha.softmax(1)[..., None]).sum(1)
        return decoded, alpha.reshape(*slots.shape[:3], N)


def call(module: nn.Module, *args: Tensor) -> Any:
    return module(*args)


class Model(nn.Module):
    """Its step calls the model, its ``forward``, or methods of it; ``part`` wraps what runs its parts."""

    def __init__(self, part: Callable[..., Any] = call) -> None:
        super().__init__()
        self.processor, self.decoder = Processor(), Decoder()
        self.part = part

    def forward(self, features: Tensor) -> Out:
        return self.decode(*self.encode(features))

    def encode(self, features: Tensor) -> Any:
        return self.part(self.processor, features)

    def decode(self, slots: Tensor, enc_logits: Tensor) -> Out:
        decoded, dec_logits = self.part(self.decoder, slots)
        return Out(decoded, enc_logits, dec_logits)

    def training_step(self, features: Tensor, way: str) -> Out:
        if way == "methods":
            return self.decode(*self.encode(features))
        out: Out = self(features) if way == "call" else self.forward(features)
        return out

    @torch.no_grad()
    def generate(self, features: Tensor, steps: int = 9) -> None:
        """Go on from the last frame, without any module that sees a clip."""
        slots: Tensor = self.processor.slots.expand(len(features), S, D)
        for _ in range(steps):
            slots, _ = self.processor.corrector(slots, features[:, -1], 2)
            self.decoder.mlp(slots)


WAYS = ["call", "forward", "methods"]


class Setup(NamedTuple):
    model: Model
    enc: LogitTap
    dec: OutputTap
    way: str
    frames: int

    def step(self, batch: int = B) -> Out:
        return self.model.training_step(features(batch, self.frames), self.way)

    def assert_pops(self, out: Out) -> SlotMaps:
        maps = SlotMaps.join(self.enc, self.dec)
        torch.testing.assert_close(maps.enc_logits, out.enc_logits)
        assert torch.equal(maps.dec_logits, out.dec_logits)
        return maps

    def train(self) -> None:
        out = self.step()
        maps = self.assert_pops(out)
        assert all(one.requires_grad for one in maps)
        self.backward(out, maps)

    def backward(self, out: Out, maps: SlotMaps) -> None:
        loss = out.decoded.square().mean() + sum(one.log_softmax(2).square().mean() for one in maps)
        torch.autograd.backward(loss)


def features(batch: int = B, frames: int = 3) -> Tensor:
    return torch.randn(batch, frames, N, D)


def alpha(out: Tensor) -> Tensor:
    return out[..., -1]


def set_up(way: str, frames: int, model: Model | None = None, hosts: str = "called") -> Setup:
    """Tap a model: of hosts that are called, of the model whether it is or not, or without any."""
    model = Model() if model is None else model
    whole = hosts == "model" or way == "call"
    enc_host, dec_host = (model, model) if whole else (model.processor, model.decoder)
    corrector, mlp = model.processor.corrector, model.decoder.mlp
    if hosts == "none":
        enc = LogitTap(corrector.to_q, corrector.to_k, D**-0.5, num_frames=frames)
        return Setup(model, enc, OutputTap(mlp, alpha, num_frames=1), way, frames)
    enc = LogitTap(corrector.to_q, corrector.to_k, D**-0.5, host=enc_host)
    return Setup(model, enc, OutputTap(mlp, alpha, host=dec_host), way, frames)


@pytest.fixture(params=[1, 3])
def frames(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=WAYS)
def setup(request: pytest.FixtureRequest, frames: int) -> Setup:
    return set_up(request.param, frames)


def num_alive() -> int:
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def validate(setup: Setup, mode: Callable[[], Any], batch: int, frames: int) -> None:
    with mode():
        setup.model.training_step(features(batch, frames), setup.way)


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("mode", MODES)
class TestValidation:
    def test_before_between_and_after_steps(self, setup: Setup, mode: Callable[[], Any]) -> None:
        # as a sanity check before step 0, with other sizes and with those of a step
        for batch, frames in ((1, 5), (B, setup.frames)):
            validate(setup, mode, batch, frames)
            setup.train()
        for _ in range(2):
            validate(setup, mode, B, setup.frames)
            validate(setup, mode, 3, 1)
        setup.train()

    def test_is_popped_too(self, setup: Setup, mode: Callable[[], Any]) -> None:
        setup.train()
        with mode():
            setup.assert_pops(setup.model.training_step(features(3, 5), setup.way))
        setup.train()

    def test_that_calls_the_model_is_no_step(self, mode: Callable[[], Any], frames: int) -> None:
        # the model's own hooks see the validation, but not the step
        setup = set_up("forward", frames, hosts="model")
        with mode():
            setup.model(features(B, frames))
        setup.step()
        for one in (setup.enc, setup.dec):
            with pytest.raises(RuntimeError, match=r"ran outside of a call of `host`.*give `host=model\.(proc|dec)"):
                one.pop()


class TestUnpopped:
    def test_forwards_hold_no_more_than_one(self, setup: Setup) -> None:
        setup.step()
        before = num_alive()
        for _ in range(100):
            setup.step()
        assert num_alive() <= before
        setup.train()

    def test_forwards_of_no_host_hold_no_more_than_one(self, frames: int) -> None:
        setup = set_up("methods", frames, hosts="none")
        setup.step()
        before = num_alive()
        for _ in range(100):
            setup.step()
        assert num_alive() <= before
        setup.train()

    @pytest.mark.parametrize("way", ["forward", "methods"])
    def test_forwards_of_a_host_that_is_not_called_hold_nothing(self, way: str, frames: int) -> None:
        setup = set_up(way, frames, hosts="model")
        before = num_alive()
        for _ in range(100):
            setup.step()
        assert num_alive() <= before

    def test_images_make_no_clip(self, setup: Setup) -> None:
        for unpopped in (1, 0, 2, 0):
            for _ in range(unpopped):
                setup.step()
            setup.assert_pops(setup.step())

    def test_images_of_no_host_make_no_clip(self) -> None:
        setup = set_up("methods", 1, hosts="none")
        for unpopped in (1, 0, 2, 0):
            for _ in range(unpopped):
                setup.step()
            assert setup.assert_pops(setup.step()).enc_logits.shape == (B, 1, S, N)

    def test_forwards_that_break_leave_nothing_open(self, frames: int) -> None:
        setup = set_up("call", frames)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            setup.model(torch.randn(B, frames, N, D + 1))
        # what runs now runs outside
        setup.model.generate(features())
        with pytest.raises(RuntimeError, match="ran outside of a call of `host`"):
            setup.enc.pop()
        setup.train()


class TestHostThatIsNotCalled:
    @pytest.mark.parametrize("way", ["forward", "methods"])
    def test_is_told_which_is(self, way: str, frames: int) -> None:
        setup = set_up(way, frames, hosts="model")
        for one, path in ((setup.enc, "processor"), (setup.dec, "decoder")):
            for _ in range(2):
                setup.step()
                with pytest.raises(RuntimeError) as error:
                    one.pop()
                assert f"Instead of this `host`, give `host=model.{path}`, which was called" in str(error.value)
                with pytest.raises(RuntimeError, match="has not run since"):
                    one.pop()
        # as told
        set_up(way, frames, setup.model).train()

    def test_and_no_other_that_sees_both(self, frames: int) -> None:
        setup = set_up("forward", frames, hosts="model")
        model, enc, dec, *_ = setup
        # what was called before the last pop does not count
        setup.assert_pops(model(features(B, frames)))
        corrector = model.processor.corrector
        for frame in features(B, frames).unbind(1):
            corrector.to_q(torch.randn(B, S, D)), corrector.to_k(frame)
        with pytest.raises(
            RuntimeError, match=r"\(processor.corrector.to_k\) ran .*Instead of this `host`, give `num_fra"
        ):
            enc.pop()
        model.decoder.mlp(torch.randn(B, S, D))
        with pytest.raises(RuntimeError, match=r"give `host=model.decoder.mlp`, which was called, or, .*`num_frames`"):
            dec.pop()
        # as told: what is tapped may be its own host
        own = OutputTap(model.decoder.mlp, alpha, host=model.decoder.mlp)
        for _ in range(2):
            out = model.decoder.mlp(torch.randn(B, S, D))
        assert torch.equal(own.pop(), alpha(out))

    def test_once_called_counts(self, frames: int) -> None:
        setup = set_up("forward", frames, hosts="model")
        setup.step()
        setup.assert_pops(setup.model(features(B, frames)))


def reentrant(module: nn.Module, *args: Tensor) -> Any:
    return checkpoint(module, *(arg.requires_grad_() for arg in args), use_reentrant=True)


def not_reentrant(module: nn.Module, *args: Tensor) -> Any:
    return checkpoint(module, *args, use_reentrant=False)


class TestCheckpointing:
    def test_gives_the_same_gradients(self, setup: Setup) -> None:
        twin = set_up(setup.way, setup.frames, copy.deepcopy(setup.model))
        twin.model.part = not_reentrant
        for _ in range(2):
            clip = features(B, setup.frames)
            for one in (setup, twin):
                one.model.zero_grad()
                out = one.model.training_step(clip, one.way)
                one.backward(out, one.assert_pops(out))
            for got, wanted in zip(twin.model.parameters(), setup.model.parameters(), strict=True):
                torch.testing.assert_close(got.grad, wanted.grad)
            # what the backward computes again is not collected
            for tap in (twin.enc, twin.dec):
                with pytest.raises(RuntimeError, match="has not run since the last pop"):
                    tap.pop()

    @pytest.mark.parametrize("part", [reentrant, not_reentrant])
    @pytest.mark.parametrize("hosted", [True, False])
    def test_again_in_the_backward_adds_nothing(self, part: Callable[..., Any], hosted: bool, frames: int) -> None:
        setup = set_up("methods", frames, Model(part), hosts="called" if hosted else "none")
        for _ in range(2):
            out = setup.step()
            torch.autograd.backward(out.decoded.square().mean())
            # popped late, and still the forward's
            maps = setup.assert_pops(out)
            # the projections ran without gradients in the first place
            assert maps.enc_logits.requires_grad == (part is not_reentrant)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_of_the_host_itself(self, use_reentrant: bool, frames: int) -> None:
        setup = set_up("call", frames)
        for _ in range(2):
            clip = features(B, frames).requires_grad_()
            out = Out(*checkpoint(setup.model, clip, use_reentrant=use_reentrant))
            torch.autograd.backward(out.decoded.square().mean())
            setup.assert_pops(out)


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), AveragedModel],
    )
    def test_are_not_tapped_and_may_be(self, setup: Setup, duplicate: Callable[[Model], Any]) -> None:
        out = setup.step()
        twin = duplicate(setup.model)
        twin(features(3, 5))
        with torch.no_grad():
            twin(features())
        maps = setup.assert_pops(out)
        setup.backward(out, maps)
        if isinstance(twin, AveragedModel):
            twin.update_parameters(setup.model)
            twin = twin.module
        for _ in range(2):
            set_up(setup.way, setup.frames, twin).train()
        setup.train()

    def test_of_a_tap_say_so(self, setup: Setup) -> None:
        twins = pickle.loads(pickle.dumps(setup)), copy.deepcopy(setup)
        for twin in twins:
            twin.step()
            for pop in (twin.enc.pop, twin.dec.pop, lambda: SlotMaps.join(twin.enc, twin.dec)):  # noqa: B023
                with pytest.raises(RuntimeError, match="hangs on no module: it was removed or is a copy"):
                    pop()

    def test_that_share_modules_and_no_hooks_are_named(self, frames: int) -> None:
        setup = set_up("call", frames)
        shell = Model()
        shell.processor, shell.decoder = setup.model.processor, setup.model.decoder
        shell(features(B, frames))
        with pytest.raises(RuntimeError, match=r"outside of a call of `host`.*`host=model.processor`"):
            setup.enc.pop()


class TestSteps:
    def test_accumulate_gradients(self, setup: Setup) -> None:
        clips = [features(B, setup.frames) for _ in range(3)]
        kept = []
        for clip in clips:
            out = setup.model.training_step(clip, setup.way)
            kept.append((out, setup.assert_pops(out)))
        for out, maps in kept:
            setup.backward(out, maps)
        together = [parameter.grad for parameter in setup.model.parameters()]
        setup.model.zero_grad()
        for clip in clips:
            out = setup.model.training_step(clip, setup.way)
            setup.backward(out, setup.assert_pops(out))
        torch.testing.assert_close(together, [parameter.grad for parameter in setup.model.parameters()])

    def test_with_generation_between(self, setup: Setup) -> None:
        for _ in range(2):
            setup.model.generate(features())
            setup.train()
        before = num_alive()
        setup.model.generate(features())
        assert num_alive() <= before

    def test_with_generation_between_forward_and_pop_are_refused(self, setup: Setup) -> None:
        setup.step()
        setup.model.generate(features())
        for tap in (setup.enc, setup.dec):
            with pytest.raises(RuntimeError, match=r"If it ran after the forward to be popped, pop\(\) before that"):
                tap.pop()
        setup.train()

    def test_with_slots_that_attend_again_after_the_decoder(self, frames: int) -> None:
        """As for a loss of cycle consistency, to what was decoded."""
        setup = set_up("methods", frames)
        model, clip = setup.model, features(B, frames)
        for _ in range(2):
            out = setup.step()
            for _ in range(2):
                model.processor.corrector(torch.randn(B, S, D), out.decoded[-B:, :, :D], 1)
            setup.assert_pops(out)
        # the maps of a step whose encoder the tap does not see are not those of the step before
        setup.step()
        model.decode(*model.processor.forward(clip))
        with pytest.raises(RuntimeError, match=r"ran outside of a call of `host`.* or join it with the decoder's tap"):
            SlotMaps.join(setup.enc, setup.dec)
        setup.train()

    def test_of_no_host_with_generation_between(self, frames: int) -> None:
        setup = set_up("methods", frames, hosts="none")
        for _ in range(2):
            setup.model.generate(features())
            setup.train()


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # einops looks for torch at its first call, which graphs depend on
    rearrange(torch.zeros(1), "one -> one 1")


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


# torch's compiler looks at the .grad of all it is given
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_compiler")
class TestCompile:
    def test_of_the_model(self, frames: int) -> None:
        setup = set_up("call", frames)
        compiled = torch.compile(setup.model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            compiled(features(B, frames))
            out = compiled(features(B, frames))
            setup.backward(out, setup.assert_pops(out))
        assert num_graphs() == 1

    def test_of_a_model_with_checkpointing(self, frames: int) -> None:
        setup = set_up("call", frames, Model(not_reentrant))
        compiled = torch.compile(setup.model, backend="aot_eager")
        for _ in range(2):
            out = compiled(features(B, frames))
            setup.backward(out, setup.assert_pops(out))

    @pytest.mark.parametrize("way", ["forward", "methods"])
    def test_of_parts(self, way: str, frames: int) -> None:
        setup = set_up(way, frames)
        for module in (setup.model.processor, setup.model.decoder):
            module.compile(fullgraph=True, backend="aot_eager")
        for _ in range(3):
            setup.step()
            setup.train()
        assert num_graphs() == 2

    def test_of_inner_parts_with_all_that_is_around_steps(self, frames: int) -> None:
        setup = set_up("call", frames)
        for module in (setup.model.processor.corrector, setup.model.decoder.mlp):
            module.compile(fullgraph=True, backend="aot_eager")
        for _ in range(3):
            validate(setup, torch.no_grad, B, frames)
            setup.model.generate(features())
            setup.step()
            setup.train()
        graphs = num_graphs()
        for _ in range(3):
            validate(setup, torch.no_grad, B, frames)
            setup.model.generate(features())
            setup.train()
        assert num_graphs() == graphs

    def test_of_parts_of_a_host_that_is_not_called(self, frames: int) -> None:
        setup = set_up("forward", frames, hosts="model")
        for module in (setup.model.processor, setup.model.decoder):
            module.compile(fullgraph=True, backend="aot_eager")
        for _ in range(20):
            setup.step()
        assert num_graphs() == 2
        for one, path in ((setup.enc, "processor"), (setup.dec, "decoder")):
            with pytest.raises(RuntimeError, match=f"give `host=model.{path}`, which was called"):
                one.pop()

    def test_of_parts_without_a_host(self, frames: int) -> None:
        setup = set_up("methods", frames, hosts="none")
        for module in (setup.model.processor, setup.model.decoder):
            module.compile(fullgraph=True, backend="aot_eager")
        for _ in range(20):
            setup.step()
        setup.train()
        assert num_graphs() <= 4
