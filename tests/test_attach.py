"""``attach`` on a miniature of every known host: its own maps, through all that training does to a model."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from slot_attention import AdaptiveSlotWrapper, MetaSlotAttention, MultiHeadSlotAttention, SlotAttention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from limits import MAPPING_IN_A_GRAPH
from miniatures import MINIATURES, Maps, Miniature, oclf
from refusals import refuses
from ssync_loss import SSyncLoss
from ssync_loss.adapters import AttachedMaps, LogitTap, OutputTap, SlotMaps, attach
from ssync_loss.adapters.hosts import EXAMPLE, HOSTS, Dots, Found, Host, Output

B, T, S = 2, 3, 4

# the compiler looks at every tensor that a frame takes in
NO_GRAD_OF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

EVERY = pytest.mark.parametrize("name", MINIATURES)
# one of each family, and of each kind of decoder
SOME = pytest.mark.parametrize(
    "name",
    ["slotcontrast mixer", "slotcontrast dynamics", "slotcurri", "xssc", "steve", "oclf video", "spot heads"],
)


def last_channel(output: Tensor) -> Tensor:
    return output[..., -1]


def attached(name: str) -> tuple[Miniature, Any, AttachedMaps]:
    host = MINIATURES[name]
    model: Any = host.build().train()
    return host, model, attach_to(host, model)


def attach_to(host: Miniature, model: Any) -> AttachedMaps:
    if host.decoder_is_linked:
        return attach(model)
    return attach(model, dec=Output(model.decoder, last_channel))


def run(host: Miniature, model: Any, *, clips: int = B, frames: int = T) -> tuple[Tensor, Maps]:
    return host.step(model, host.batch(clips, frames if host.is_video else 1))


def assert_are(maps: SlotMaps, own: Maps) -> None:
    """The softmax over slots is the host's own."""
    for logits, probs in zip(maps, own, strict=True):
        torch.testing.assert_close(
            logits.softmax(2).flatten(3), (probs / probs.sum(2, keepdim=True)).float(), rtol=0, atol=1e-6
        )


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """The collector leaves alone what is there, which is most of what there is."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    # some objects of torch warn when they are asked for their class
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


@EVERY
class TestEveryHost:
    def test_gives_the_hosts_own_maps(self, name: str) -> None:
        host, model, maps = attached(name)
        frames = T if host.is_video else 1
        for training in (True, False, True):
            _, own = run(host, model.train(training))
            got = maps()
            assert_are(got, own)
            for one, grid in zip(got, host.grids, strict=True):
                assert one.shape == (B, frames, S, *grid)
                assert one.requires_grad
            masks = {"xssc": "valid", "smoothsa masked": "slot_mask", "oclf video masked": "slot_mask"}
            assert set(got.keys()) == {"enc_logits", "dec_logits"} | ({masks[name]} if name in masks else set())

    @pytest.mark.usefixtures("only_new_objects")
    def test_trains_for_twenty_steps_with_validation_between(self, name: str) -> None:
        host, model, maps = attached(name)
        criterion, optimizer = SSyncLoss(), torch.optim.Adam(model.parameters(), 1e-3)
        alive = []

        def validate() -> None:
            # other clips, and nobody asks for their maps, or somebody does
            with torch.inference_mode() if step % 2 else torch.no_grad():
                _, own = run(host, model.eval(), clips=3, frames=5)
                if step % 4 == 0:
                    assert_are(maps(), own)
            model.train()

        step = 0
        validate()
        for step in range(20):
            loss, own = run(host, model)
            if step >= 4:
                got = maps()
                assert_are(got, own)
                loss = loss + criterion(**got, step=step)
                del got
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            del loss, own
            if step % 5 == 4:
                alive.append(live_tensors())
                validate()
        assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())
        assert alive[1] == alive[2] == alive[3]

    def test_teaches_encoder_and_decoder(self, name: str) -> None:
        host, model, maps = attached(name)
        run(host, model)
        for one in maps():
            grads = torch.autograd.grad(
                torch.where(one.isfinite(), one, 0.0).square().sum(),
                list(model.parameters()),
                retain_graph=True,
                allow_unused=True,
            )
            assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)
            assert all(grad is None or grad.isfinite().all() for grad in grads)

    @pytest.mark.usefixtures("only_new_objects")
    def test_forgets_a_forward_that_nobody_asks_about(self, name: str) -> None:
        host, model, maps = attached(name)
        run(host, model)
        before = live_tensors()
        for _ in range(10):
            run(host, model)
        assert live_tensors() == before
        _, own = run(host, model, frames=2)
        assert_are(maps(), own)

    def test_says_what_it_tapped(self, name: str) -> None:
        host, model, maps = attached(name)
        assert "not called yet" in maps.describe()
        run(host, model)
        got = maps()
        said = maps.describe()
        assert f"encoder {tuple(got.enc_logits.shape)} with gradient" in said
        assert f"decoder {tuple(got.dec_logits.shape)} with gradient" in said
        assert ("Choose `merge_threshold` anew" in said) == ("heads" in name or "adaptive" in name)
        with torch.no_grad():
            run(host, model)
            maps()
        assert f"encoder {tuple(got.enc_logits.shape)} without gradient" in maps.describe()

    def test_lets_go(self, name: str) -> None:
        host, model, maps = attached(name)
        bare = copy.deepcopy(host.build())
        with maps:
            run(host, model)
        hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]
        assert hooks == [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in bare.modules()]
        refuses(RuntimeError, "these maps hang on no model: they were removed, or are a copy. attach() again.", maps)
        maps.remove()


class TestWhatIsMeant:
    def test_frames_of_xssc_that_were_decoded_from_others_are_invalid(self) -> None:
        host, model, maps = attached("xssc")
        sources = []
        model.m.decode.register_forward_hook(lambda _module, _args, output: sources.append(output[2]))
        for _ in range(5):
            run(host, model)
            valid = maps()["valid"]
            assert torch.equal(valid, sources[-1] == torch.arange(T))
        assert not all((one == torch.arange(T)).all() for one in sources)
        run(host, model.eval())
        assert maps()["valid"].all()

    @pytest.mark.parametrize("name", ["smoothsa masked", "oclf video masked"])
    def test_a_slot_mask_is_true_where_a_slot_is(self, name: str) -> None:
        host, model, maps = attached(name)
        run(host, model)
        got = maps()
        assert torch.equal(got["slot_mask"], torch.tensor([[True, True, True, False]] * B))
        assert maps.describe().endswith("slot mask: keeps 3 to 3 of 4 slots")
        assert (got.enc_logits[:, :, -1] == float("-inf")).all()
        loss = SSyncLoss()(**got)
        loss.backward()
        assert 0 < loss.item() < 1
        assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())

    @pytest.mark.parametrize("masked", [(0,), (1, 2)])
    def test_a_slot_mask_of_some_frames_is_of_no_others(self, masked: tuple[int, ...]) -> None:
        host, model, maps = attached("smoothsa")
        frame = count()
        present = torch.tensor([[True, True, True, False]] * B)

        def with_mask(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return *args[:2], present if next(frame) % T in masked else None, *args[3:]

        model.m.aggregat.register_forward_pre_hook(with_mask)
        for _ in range(2):
            _, own = run(host, model)
            got = maps()
            assert_are(got, own)
            gone = (got.enc_logits[:, :, -1] == float("-inf")).flatten(2).all(2)
            assert gone.tolist() == [[frame in masked for frame in range(T)]] * B
            assert got["slot_mask"].all()

    def test_slots_of_slotcurri_grow(self) -> None:
        host, model, maps = attached("slotcurri")
        for num_slots in (2, 3, 4):
            model.initializer.n_slots = num_slots
            for training in (True, False):
                _, own = run(host, model.train(training), frames=4)
                got = maps()
                assert_are(got, own)
                assert got.enc_logits.shape[:3] == (B, 4, num_slots)

    @pytest.mark.parametrize("frames", [1, 2, 5])
    @pytest.mark.parametrize("name", ["slotcurri", "slotcurri broadcast"])
    def test_the_way_back_of_slotcurri(self, name: str, frames: int) -> None:
        host, model, maps = attached(name)
        _, own = run(host, model.eval(), frames=frames)
        got = maps()
        assert_are(got, own)
        assert got.enc_logits.shape[1] == frames

    def test_a_probability_of_zero_has_no_gradient(self) -> None:
        host, model, maps = attached("oclf image")
        decoder = model.models.object_decoder
        decoder.decoder.register_forward_hook(
            lambda _module, _args, output: output.index_fill(1, torch.tensor(0), -1e4)
        )
        run(host, model)
        got = maps()
        assert got.dec_logits[:, :, 0].max() < -80
        got.dec_logits.square().sum().backward()
        assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())

    def test_a_grid_beside_is_taken_for_one_of_as_many_patches(self) -> None:
        model: Any = Loner()
        maps = attach(model, host=LONER)
        model(torch.randn(B, 36, 8), (3, 12))
        assert [tuple(one.shape[3:]) for one in maps()] == [(3, 12), (3, 12)]

    def test_n_that_is_no_square(self) -> None:
        model: Any = Loner()
        with attach(model, host=LONER) as maps:
            model(torch.randn(B, 12, 8))
            assert [tuple(one.shape) for one in maps()] == [(B, 1, S, 12)] * 2
            assert "N=12 shows no grid: give `grid`" in maps.describe()
        with attach(model, host=LONER, grid=(3, 4)) as maps:
            model(torch.randn(B, 12, 8))
            assert [tuple(one.shape) for one in maps()] == [(B, 1, S, 3, 4)] * 2
        with attach(model, host=LONER, grid=(3, 5)) as maps:
            model(torch.randn(B, 12, 8))
            refuses(ValueError, "`grid` must have the N=12 patches of `enc_logits`; got (3, 5)", maps)
        with attach(model, host=LONER, grid=((3, 4), (2, 6))) as maps:
            model(torch.randn(B, 12, 8))
            assert [tuple(one.shape[3:]) for one in maps()] == [(3, 4), (2, 6)]
        with attach(model, host=LONER, grid=((3, 4), (2, 6))) as maps:
            model(torch.randn(B, 12, 8), (3, 4))
            refuses(ValueError, "`grid` must be that of `dec_logits`, (3, 4); got (2, 6)", maps)


class Loner(nn.Module):
    """A host that nobody knows; its decoder's map may have a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(S, 8))
        self.ask, self.answer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.alpha, self.out = nn.Linear(8, 8), nn.Identity()

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        self.answer(tokens)
        slots = self.ask(self.slots.expand(len(tokens), -1, -1))
        alpha = self.alpha(slots) @ tokens.mT
        made: Tensor = self.out(alpha if grid is None else alpha.unflatten(-1, grid))
        return made


LONER = Host(
    "loner",
    ("ask", "answer", "out"),
    lambda model: Found(Dots(model.ask, model.answer, 1.0, model), Output(model.out)),
)


class Wrapper(nn.Module):
    """As a LightningModule of the user's holds its model; the step calls a method."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.other = model, nn.Linear(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class TestAsTrainingDoes:
    @SOME
    def test_inside_of_a_module_of_the_users(self, name: str) -> None:
        host = MINIATURES[name]
        model = host.build()
        maps = attach(Wrapper(model))
        _, own = run(host, model)
        assert_are(maps(), own)
        assert "at `model" in maps.describe()

    @pytest.mark.parametrize("name", ["slotcontrast mlp", "slotcontrast mixer", "slotcontrast broadcast"])
    def test_parts_inside_of_modules_of_the_users(self, name: str) -> None:
        class Outer(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, *args: Any) -> Any:
                return self.module(*args)

        host = MINIATURES[name]
        model: Any = host.build()
        model.processor, model.decoder = Outer(model.processor), Outer(model.decoder)
        maps = attach(model)
        _, own = run(host, model)
        assert_are(maps(), own)

    @SOME
    def test_autocast(self, name: str) -> None:
        host, model, maps = attached(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(host, model)
            got = maps()
            loss = SSyncLoss()(**got)
        assert got.enc_logits.dtype == torch.float32
        loss.backward()
        assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())

    @NO_GRAD_OF
    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.parametrize("name", ["slotcontrast mixer", "xssc", "steve", "lucidrains", "spot"])
    def test_compiled_in_one_graph_once(self, name: str) -> None:
        host = MINIATURES[name]
        model: Any = host.build()
        counter = CompileCounter()
        compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
        maps = attach_to(host, compiled)
        if "slotcontrast" in name:
            # its steps call forward
            model.forward, compiled = torch.compile(model.forward, backend=counter, fullgraph=True), model
        for step in range(4):
            _, own = run(host, compiled, frames=2)
            if step != 1:
                assert_are(maps(), own)
        assert counter.frame_count == 1
        assert "_orig_mod" not in maps.describe()

    @MAPPING_IN_A_GRAPH
    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.parametrize("name", ["slotcontrast broadcast", "smoothsa masked", "xssc"])
    def test_a_compiled_step(self, name: str) -> None:
        host, model, maps = attached(name)
        criterion, counter = SSyncLoss(), CompileCounter()

        @torch.compile(backend=counter, fullgraph=True)
        def step(batch: Any) -> Tensor:
            _ = model.forward(batch) if "slotcontrast" in name else model(**batch)
            return criterion(**maps())

        for _ in range(3):
            batch = host.batch(B, T)
            state = torch.get_rng_state()
            loss = step(batch)
            torch.set_rng_state(state)
            host.step(model, batch)
            assert loss.item() == pytest.approx(criterion(**maps()).item(), abs=1e-6)
        assert counter.frame_count == 1

    def test_fake_tensors(self) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            host, model, maps = attached("slotcontrast mlp")
            run(host, model)
            assert maps().enc_logits.shape == (B, T, S, 4, 4)

    @NO_GRAD_OF
    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled_parts(self) -> None:
        host = MINIATURES["slotcontrast mlp"]
        model: Any = host.build()
        model.processor = torch.compile(model.processor, backend="eager")
        model.decoder.compile(backend="eager")
        maps = attach(model)
        for _ in range(3):
            _, own = run(host, model)
            assert_are(maps(), own)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_of_parts(self, reentrant: bool) -> None:
        host, model, maps = attached("slotcontrast mlp")
        attention, mlp = model.processor.module.corrector, model.decoder.module.mlp
        attention.step = checkpointed(attention.step, reentrant)
        mlp.forward = checkpointed(mlp.forward, reentrant)
        for _ in range(3):
            loss, own = run(host, model)
            got = maps()
            assert_are(got, own)
            (loss + SSyncLoss()(**got)).backward()
            # what is recomputed in the backward is of no forward
        refuses(RuntimeError, "the maps of this forward were given already", maps)

    def test_masks_of_what_is_computed_again_are_of_no_forward(self) -> None:
        host, model, maps = attached("smoothsa masked")
        model.m.forward = checkpointed(model.m.forward, reentrant=False)
        loss, own = run(host, model)
        with set_checkpoint_early_stop(False):
            loss.backward()
        got = maps()
        assert_are(got, own)
        assert got["slot_mask"].tolist() == [[True, True, True, False]] * B

    def test_distributed(self, tmp_path: Path) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            host = MINIATURES["randsfq"]
            wrapped = DistributedDataParallel(host.build())
            maps = attach(wrapped)
            for _ in range(2):
                # accumulation: both before the backward
                with wrapped.no_sync():
                    loss, own = run(host, wrapped)
                    got = maps()
                    assert_are(got, own)
                    (loss + SSyncLoss()(**got)).backward()
            loss, _ = run(host, wrapped)
            (loss + SSyncLoss()(**maps())).backward()
            assert all(one.grad is not None for one in wrapped.parameters())
        finally:
            dist.destroy_process_group()

    def test_replicas_have_no_taps(self) -> None:
        parallel = nn.DataParallel(MINIATURES["steve"].build())
        attach(parallel)
        parallel.device_ids = [0, 1]
        refuses(ValueError, "`model` must not be an nn.DataParallel: its replicas are copies", attach, parallel)

    @pytest.mark.parametrize("name", ["slotcontrast mixer", "slotcurri", "xssc", "steve", "oclf video"])
    def test_copies_are_not_tapped(self, name: str) -> None:
        host, model, maps = attached(name)
        copies = [copy.deepcopy(model), AveragedModel(model).module]
        if "oclf" not in name:
            # whose classes are made at run time
            copies.append(pickle.loads(pickle.dumps(model)))
        for one in copies:
            run(host, one)
            refuses(RuntimeError, "no forward of ", maps)
            with attach(one) as again:
                _, own = run(host, one)
                assert_are(again(), own)
        _, own = run(host, model)
        assert_are(maps(), own)

    def test_a_copy_of_the_maps_gives_nothing(self) -> None:
        host, model, maps = attached("slotcontrast mlp")
        for one in (copy.deepcopy(maps), pickle.loads(pickle.dumps(maps))):
            run(host, model)
            refuses(RuntimeError, "these maps hang on no model: they were removed, or are a copy", one)
            refuses(RuntimeError, "these maps hang on no model", one.describe)
            one.remove()
        maps()

    def test_generation_between_steps(self) -> None:
        host, model, maps = attached("steve")
        run(host, model)
        maps()
        model.reconstruct_autoregressive(host.batch(1, 2))
        refuses(
            RuntimeError,
            "`steve_decoder.tf` has run 16 times since `steve_encoder.savi` began, so its last map is not of the "
            "encoder's forward. Take the maps right after the model's own forward. If it runs frame by frame, write an "
            "entry whose `covers` is the module that decodes the whole clip.",
            maps,
        )
        _, own = run(host, model)
        assert_are(maps(), own)


def checkpointed(forward: Callable[..., Any], reentrant: bool) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


class TestWhatIsNotOneForward:
    @SOME
    def test_before_a_forward_and_twice(self, name: str) -> None:
        host, model, maps = attached(name)
        refuses(RuntimeError, "no forward of ", maps)
        run(host, model)
        maps()
        refuses(RuntimeError, "the maps of this forward were given already: keep what the first call returned.", maps)

    def test_a_step_past_the_hooks_is_told_what_to_call(self) -> None:
        host = MINIATURES["randsfq"]
        model: Any = host.build()
        maps = attach(model)
        model.m.forward(host.batch(B, T)["batch"]["video"])
        with pytest.raises(
            RuntimeError, match=r"What must be called, and not its `.forward`, is `m`\. Or, if `m.aggregat` sees"
        ):
            maps()

    @pytest.mark.usefixtures("only_new_objects")
    @pytest.mark.parametrize("name", ["smoothsa masked", "xssc"])
    def test_a_step_past_the_hooks_keeps_nothing(self, name: str) -> None:
        host, model, _maps = attached(name)
        run(host, model)
        given = host.batch(B, T)["batch"]
        alive = []
        for _ in range(3):
            model.m.forward(*given.values())
            # the model's parts, and not it
            model.m.aggregat(torch.randn(B, 12, 8), torch.randn(B, S, 8))
            alive.append(live_tensors())
        assert alive[0] == alive[1] == alive[2]

    def test_a_step_that_is_a_method_is_told_what_it_called(self) -> None:
        host = MINIATURES["slotcontrast mlp"]
        model: Any = host.build()

        def find(model: Any) -> Found:
            attention = model.processor.module.corrector
            dots = Dots(attention.to_q, attention.to_k, attention.scale, covers=model)
            return Found(dots, Output(model.decoder.module.mlp, last_channel))

        maps = attach(model, Host("mine", ("processor",), find))
        batch = host.batch(B, T)
        wanted = (
            r"is `ObjectCentricModel`. Or, if `processor` sees whole clips, write an entry whose `covers` is that: it"
        )
        for _ in range(2):
            model.training_step(batch)
            with pytest.raises(RuntimeError, match=wanted):
                maps()
            # a call that is one changes nothing
            model(batch)
            maps()

    def test_an_encoder_without_its_decoder(self) -> None:
        host, model, maps = attached("steve")
        run(host, model)
        model.encode(host.batch(B, T))
        refuses(
            RuntimeError,
            "`steve_decoder.tf` has not run since `steve_encoder.savi` began: encoder and decoder must be of one",
            maps,
        )

    @pytest.mark.parametrize("name", ["slotcontrast mlp", "slotcontrast mixer", "slotcontrast image broadcast"])
    def test_slots_that_attend_again_beside_the_clip(self, name: str) -> None:
        """As for a loss of cycle consistency, to what was reconstructed."""
        host, model, maps = attached(name)
        processor = model.processor.module if host.is_video else model.processor

        def attend_again(*_: Any) -> None:
            processor.corrector(torch.randn(B, S, 8), torch.randn(B, 16, 8))

        model.decoder.register_forward_hook(attend_again)
        for _ in range(3):
            _, own = run(host, model)
            assert_are(maps(), own)

    def test_a_decoder_that_ran_again(self) -> None:
        host, model, maps = attached("slotcontrast mlp")
        run(host, model)
        model.decoder(torch.randn(B, T, S, 8))
        refuses(RuntimeError, "`decoder.module.mlp` has run 2 times since `processor` began", maps)

    @pytest.mark.parametrize("frames", [T, S])
    def test_an_encoder_that_is_called_frame_by_frame(self, frames: int) -> None:
        """Not even where there are as many frames as slots."""
        model: Any = MINIATURES["slotcontrast mlp"].build()
        # without what goes over time
        model.processor = model.processor.module
        maps = attach(model)
        slots = [model.processor(torch.randn(B, S, 8), torch.randn(B, 16, 8))["state"] for _ in range(frames)]
        model.decoder(torch.stack(slots, 1))
        with pytest.raises(ValueError, match=rf"`dec` must .* If it holds {frames} frames, and the encoder one in"):
            maps()

    @pytest.mark.parametrize("shape", [(B + 1, T, S), (B, T + 1, S), (B, T, S + 1)])
    def test_other_clips_frames_or_slots(self, shape: tuple[int, ...]) -> None:
        _, model, maps = attached("slotcontrast mlp")
        model.processor(torch.randn(B, S, 8), torch.randn(B, T, 16, 8))
        model.decoder(torch.randn(*shape, 8))
        with pytest.raises(ValueError, match=r"`dec` must .*B=2, T=3, S=4.* to go with `enc`; got"):
            maps()


def said_unlike(maps: Any) -> list[str]:
    """Name the maps that are not what the host shows of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maps()
    unlike = [str(one.message) for one in caught if "should have the probabilities that" in str(one.message)]
    return [text.split("`")[1] for text in unlike]


def run_in_pieces(decoder: Any, rows: int) -> None:
    """Let a decoder of SlotContrast see so many rows of its batch at a time."""
    decode = decoder.forward

    def in_pieces(slots: Tensor) -> dict[str, Tensor]:
        made = [decode(piece) for piece in slots.split(rows)]
        return {key: torch.cat([one[key] for one in made]) for key in made[0]}

    decoder.forward = in_pieces


class TestWhatTheHostShows:
    """The maps are compared with what the host makes of them."""

    @pytest.mark.parametrize("name", [name for name, host in MINIATURES.items() if host.decoder_is_linked])
    def test_dots_of_another_scale_are_warned_of_in_training_and_in_evaluation(self, name: str) -> None:
        host = MINIATURES[name]
        model: Any = host.build()
        maps = attach(model, scale=20.0)
        for training, times in ((True, 1), (True, 0), (False, 1), (False, 0)):
            run(host, model.train(training))
            assert said_unlike(maps) == times * ["enc_logits"]

    def test_a_temperature_that_the_host_keeps_to_itself(self) -> None:
        host = MINIATURES["slotcontrast mixer"]
        model: Any = host.build()
        maps = attach(model)
        model.decoder.module.scale = 5.0
        run(host, model)
        assert said_unlike(maps) == ["dec_logits"]

    def test_a_decoder_in_pieces_that_could_be_frames(self) -> None:
        """There are T pieces of B rows, in the order of clips."""
        host = MINIATURES["slotcontrast mixer"]
        model: Any = host.build()
        run_in_pieces(model.decoder.module, B)
        maps = attach(model)
        run(host, model)
        assert said_unlike(maps) == ["dec_logits"]

    @pytest.mark.parametrize("name", ["slotcontrast mlp", "slotcontrast broadcast"])
    @pytest.mark.parametrize("rows", [1, 2, 3, 4])
    def test_a_decoder_in_pieces_is_told_what_to_tap(self, name: str, rows: int) -> None:
        host = MINIATURES[name]
        model: Any = host.build()
        run_in_pieces(model.decoder.module, rows)
        with attach(model) as maps:
            run(host, model)
            with pytest.raises(RuntimeError, match=r"If it runs in pieces, tap what puts them together: `dec=Output\("):
                maps()
        # as told
        maps = attach(model, dec=Output(model.decoder, lambda out: out["masks"], "probs"))
        _, own = run(host, model)
        assert_are(maps(), own)

    @pytest.mark.parametrize("name", ["slotcontrast mlp", "slotcontrast broadcast", "slotcontrast mixer"])
    @pytest.mark.parametrize("frames", [T, S])
    def test_a_decoder_frame_by_frame_takes_an_entry(self, name: str, frames: int) -> None:
        host = MINIATURES[name]
        model: Any = host.build()
        decode = model.decoder.module

        def by_frame(clip: Tensor) -> dict[str, Tensor]:
            made = [decode(slots) for slots in clip.unbind(1)]
            return {key: torch.stack([one[key] for one in made], 1) for key in made[0]}

        def find(model: Any) -> Found:
            found = HOSTS[0].find(model)
            return replace(found, dec=replace(found.dec, covers=model.decoder))  # type: ignore[type-var]

        model.decoder.forward = by_frame
        maps = attach(model, Host("mine", HOSTS[0].marks, find))
        _, own = run(host, model, frames=frames)
        assert_are(maps(), own)

    def test_a_decoder_of_the_users_is_not_the_hosts(self) -> None:
        host = MINIATURES["slotcontrast mixer"]
        model: Any = host.build()
        maps = attach(model, dec=lambda: torch.randn(B, T, S, 16, requires_grad=True))
        run(host, model)
        assert said_unlike(maps) == []


class TestRefusals:
    def test_an_unknown_model_shows_what_to_write(self) -> None:
        with pytest.raises(ValueError, match="`model` must be or contain a known host; got Loner") as caught:
            attach(Loner())
        said = str(caught.value)
        assert all(f"{host.name}: {', '.join(host.marks)}" in said for host in HOSTS)
        assert said.endswith(EXAMPLE)
        assert "Closest" not in said

    def test_a_model_that_is_almost_known(self) -> None:
        model = oclf.build(video=True)
        model.models["perceptual_grouping"] = nn.Linear(2, 2)
        with pytest.raises(
            ValueError, match=r"Closest is oclf, but `models` lacks perceptual_grouping.slot_attention.to_q\."
        ):
            attach(model)

    def test_the_example_runs(self) -> None:
        model: Any = nn.Module()
        model.encoder, model.decoder = nn.Module(), nn.Module()
        model.slot_attention = model.encoder.slot_attention = SlotAttention(S, 8)
        model.encoder.forward = model.slot_attention.forward
        model.decoder.mlp = nn.Linear(8, 9)
        model.decoder.forward = lambda slots, positions: model.decoder.mlp(slots[:, :, None] + positions)
        scope = {"attach": attach, "model": model}
        exec(EXAMPLE, scope)
        maps: Any = scope["maps"]
        model.decoder(model.encoder(torch.randn(B, 16, 8)), torch.randn(16, 8))
        assert [tuple(one.shape) for one in maps()] == [(B, 1, S, 4, 4)] * 2

    def test_two_hosts_in_one(self) -> None:
        pair = nn.ModuleDict({"teacher": MINIATURES["randsfq"].build(), "student": MINIATURES["xssc"].build()})
        refuses(
            ValueError,
            "`model` must contain one host; got `teacher.m` (genera1z), `student.m` (genera1z). Give attach() the one",
            attach,
            pair,
        )
        attach(pair["student"])

    def test_masks_that_are_the_encoders(self) -> None:
        model = oclf.build(video=False, decoder={**oclf.AUTOREGRESSIVE, "use_decoder_masks": False})
        refuses(
            ValueError,
            "`model`, a Combined, shows no map of the decoder: with use_decoder_masks=False the masks that the decoder "
            "gives are the encoder's map.",
            attach,
            model,
        )

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("halves", [False, True])
    def test_a_map_that_turns_out_to_be_the_encoders(self, training: bool, halves: bool) -> None:
        host = MINIATURES["slotcontrast mlp"]
        model: Any = host.build().train(training)
        seen: list[Tensor] = []
        model.processor.register_forward_hook(lambda _module, _args, out: seen.append(out["corrector"]["masks"]))
        maps = attach(model, dec=lambda: seen[-1], dec_kind="probs")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halves):
            run(host, model)
            refuses(ValueError, "`dec` must be a map of the decoder; got the encoder's own", maps)

    def test_probabilities_for_logits_and_the_reverse(self) -> None:
        host = MINIATURES["lucidrains"]
        model: Any = host.build()
        given = nn.Identity()
        for kind, other, values in (
            ("logits", "probs", torch.randn(B, S, 16).softmax(1)),
            ("probs", "logits", torch.randn(B, S, 16)),
        ):
            with attach(model, dec=given, dec_kind=kind) as maps:  # type: ignore[arg-type]
                run(host, model)
                given(values.requires_grad_())
                refuses(ValueError, f"`dec_kind` must be '{other}' for this `dec`; got '{kind}', but the map", maps)

    def test_projections_of_the_encoder_as_decoder(self) -> None:
        model: Any = MINIATURES["slotcontrast mlp"].build()
        attention = model.processor.module.corrector
        message = "`dec` must be of the decoder; got a projection of the encoder's slot attention."
        tap = LogitTap(attention.to_q, attention.to_k, attention.scale)
        for dec in (tap, attention.to_k, Dots(attention.to_q, attention.to_k, 1.0, model.processor)):
            refuses(ValueError, message, attach, model, dec=dec)

    def test_shuffled_cross_attention(self) -> None:
        model: Any = MINIATURES["spot"].build()
        cross = model.dec.blocks[-1].encoder_decoder_attn
        taps = [
            LogitTap(cross.proj_k, cross.proj_q, 0.5, heads=2),
            OutputTap(cross.attn_dropout, lambda out: out.sum(1).mT),
            Output(cross.attn_dropout, lambda out: out.sum(1).mT, covers=model, kind="probs"),
            cross.attn_dropout,
        ]
        for dec in taps:
            refuses(ValueError, "`dec` must have its patches in the encoder's order; got", attach, model, dec=dec)

    def test_a_decoder_of_another_kind(self) -> None:
        model: Any = MINIATURES["slotcontrast mlp"].build()
        model.decoder.module = nn.Linear(8, 8)
        with pytest.raises(ValueError, match="the decoder, a Linear, has neither `to_q` and `to_k`"):
            attach(model)
        maps = attach(model, dec=model.decoder.module)
        assert "output of `decoder.module`: logits" in maps.describe()

    def test_slots_that_are_masked_where_no_hook_sees_it(self) -> None:
        model: Any = MINIATURES["randsfq"].build()
        model.m.aggregat.vq = nn.Embedding(8, 8)
        refuses(ValueError, "`aggregat` must attend with all of its slots; got one with a codebook", attach, model)

    def test_marks_without_what_maps_are_made_of(self) -> None:
        model: Any = MINIATURES["steve"].build()
        model.steve_decoder.tf.blocks = nn.ModuleList([nn.Linear(2, 2)])
        message = "`model` has the marks of steve, but not what its maps are made of: 'Linear' object has no attribute"
        refuses(ValueError, message, attach, model)

    def test_an_entry_that_finds_nothing_or_covers_another(self) -> None:
        model: Any = MINIATURES["lucidrains"].build()
        attention = model.slot_attn
        nothing: Any = lambda _: None  # noqa: E731
        refuses(TypeError, "`find` must be Found; got NoneType", attach, model, Host("x", ("slot_attn",), nothing))
        dots = Dots(attention.to_q, attention.to_k, 1.0, covers=model.decoder)
        entry = Host("x", ("slot_attn",), lambda _: Found(dots, Output(model.decoder)))
        refuses(ValueError, "`covers` must contain `slots`; this ", attach, model, entry)

    @pytest.mark.parametrize(
        "third", [torch.zeros(B, T), torch.zeros(B, T, 5), torch.tensor(1.0), torch.zeros(B, 4, dtype=torch.long), None]
    )
    def test_what_else_a_decoder_of_the_family_returns_is_no_mask(self, third: Tensor | None) -> None:
        host = MINIATURES["smoothsa"]
        model: Any = host.build()
        decode = model.m.decode.forward
        model.m.decode.forward = lambda *args: (*decode(*args), third)
        maps = attach(model)
        # the rest of the miniature takes two; the hooks of the maps see three
        model.m.decode.register_forward_hook(lambda _module, _args, output: output[:2])
        host.step(model, host.batch(B, T))
        assert maps().valid is None

    def test_arguments(self) -> None:
        model: Any = MINIATURES["lucidrains"].build()
        wrong: Any = "decoder"
        refuses(TypeError, "`model` must be a module; got str.", attach, wrong)
        refuses(ValueError, "`host` must be one of 'auto', 'slotcontrast', 'genera1z', 'steve'", attach, model, "slots")
        refuses(ValueError, "`model` must be or contain a known host; got UsersModel", attach, model, "spot")
        refuses(ValueError, "`model`, a SlotAttention, shows no map of the decoder: the decoder is your", attach, model)
        refuses(TypeError, "`dec` must be a module, a tap or a function without", attach, model, dec=wrong)
        refuses(TypeError, "`dec` must be a module, a tap or a function without", attach, model, dec=3)
        refuses(ValueError, "`dec_kind` must be one of 'logits', 'probs'", attach, model, dec=list, dec_kind="odds")
        refuses(ValueError, "`dec_kind` must be None without `dec`; got 'probs'.", attach, model, dec_kind="probs")
        refuses(ValueError, "`grid` must be (H, W) or ((H, W), (H_d, W_d))", attach, model, dec=list, grid=(4,))
        refuses(ValueError, "`scale` must be finite and above 0", attach, model, dec=list, scale=0.0)
        refuses(ValueError, "`heads` must be at least 1; got 0", attach, model, dec=list, heads=0)
        refuses(ValueError, "`head_softmax` must be one of", attach, model, dec=list, head_softmax="both")
        stray = Output(nn.Linear(2, 2), last_channel, covers=model)
        refuses(ValueError, "`covers` must contain `module`; this UsersModel does", attach, model, dec=stray)
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
        with attach(model, dec=lambda: wrong) as maps:
            run(MINIATURES["lucidrains"], model)
            refuses(TypeError, "`dec` must be a tensor; got str.", maps)


class TestOverrides:
    @pytest.mark.parametrize("module", [False, True])
    @pytest.mark.parametrize("kind", ["logits", "probs"])
    def test_a_decoder_of_the_users(self, kind: Any, module: bool) -> None:
        host = MINIATURES["lucidrains"]
        model: Any = host.build()
        alpha: list[Tensor] = []
        given = nn.Identity()
        given.register_forward_hook(lambda _module, _args, output: alpha.append(output))
        maps = attach(model, dec=given if module else lambda: alpha[-1], dec_kind=kind)
        _, own = run(host, model)
        probs = own[1][:, 0].clone().requires_grad_()
        given(probs.log() if kind == "logits" else probs)
        assert_are(maps(), own)

    @pytest.mark.parametrize("covered", [False, True])
    def test_a_tap_of_the_users_that_nobody_empties(self, covered: bool) -> None:
        host = MINIATURES["lucidrains"]
        model: Any = host.build()
        tap = OutputTap(model.decoder, last_channel, host=model if covered else None)
        with attach(model, dec=tap) as maps:
            for _ in range(3):
                _, own = run(host, model)
            assert_are(maps(), own)
            assert "your own OutputTap: logits" in maps.describe()
        # what the user hung stays
        run(host, model)
        assert tap.pop().shape == (B, S, 16)

    def test_scale_and_heads(self) -> None:
        host = MINIATURES["lucidrains heads"]
        model: Any = host.build()
        dec = Output(model.decoder, last_channel)
        for settings in ({"scale": 2.0}, {"heads": 2}, {"head_softmax": "joint"}):
            attention = model.slot_attn
            kept: Any = {"scale": attention.scale, "heads": 4, "head_softmax": "per_head", **settings}
            with (
                attach(model, dec=dec, **settings) as maps,
                LogitTap(attention.to_q, attention.to_k, host=model, **kept) as tap,
            ):
                run(host, model)
                assert torch.equal(maps().enc_logits.flatten(3), tap.pop())

    @SOME
    def test_the_name_of_a_family(self, name: str) -> None:
        family = {"slotcurri": "slotcontrast", "xssc": "genera1z"}.get(name, name.split(maxsplit=1)[0])
        maps = attach(MINIATURES[name].build(), family)
        assert f"({family}" in maps.describe().splitlines()[0]


class TestWarning:
    def test_of_detached_attention_comes_once_and_in_training(self) -> None:
        host = MINIATURES["slotcontrast mlp"]
        model: Any = host.build().requires_grad_(False)
        model.decoder.requires_grad_(True)
        maps = attach(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(host, model.eval())
            maps()
            with torch.no_grad():
                run(host, model.train())
                maps()
        run(host, model)
        with pytest.warns(UserWarning, match=r"`enc_logits` \(taught by the interior term\) carries no gradient"):
            maps()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(host, model)
            maps()
        assert "without gradient, decoder" in maps.describe()

    def test_of_a_teachers_forward_after_the_students(self) -> None:
        host, model, maps = attached("slotcontrast mlp")
        for _ in range(2):
            with torch.no_grad():
                run(host, model)
            _, own = run(host, model)
            assert_are(maps(), own)
        with torch.no_grad():
            run(host, model)
            maps()
            run(host, model)
        with pytest.warns(UserWarning, match=r"`processor` last ran without gradient.* take the maps before it"):
            maps()

    def test_of_frames_that_are_forwards_of_their_own(self) -> None:
        host = MINIATURES["lucidrains"]
        model: Any = host.build()
        maps = attach_to(host, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # steps before the loss starts, with validation between; then accumulation
            for _ in range(3):
                with torch.no_grad():
                    run(host, model)
                run(host, model)[0].backward()
                optimizer.step()
            for _ in range(3):
                run(host, model)
                maps()
            # what does not learn at all may run as often as it likes
            frozen: Any = host.build().requires_grad_(False)
            frozen_maps = attach_to(host, frozen.eval())
            run(host, frozen), run(host, frozen)
            frozen_maps()
            # a forward or two beside a step
            run(host, model), run(host, model)
            maps()
        for _ in range(3):
            run(host, model)
        with pytest.warns(UserWarning, match=r"`slot_attn` has run 3 times since the last step, and these maps are of"):
            assert maps().enc_logits.shape[:2] == (B, 1)


class TestThePackage:
    """The package of lucidrains itself."""

    @pytest.mark.parametrize("heads", [1, 4])
    @pytest.mark.parametrize("adaptive", [False, True])
    def test_slot_attention(self, heads: int, adaptive: bool) -> None:
        attention: Any = SlotAttention(S, 8) if heads == 1 else MultiHeadSlotAttention(S, 8, heads=heads, dim_head=3)
        model = nn.ModuleDict({"slots": AdaptiveSlotWrapper(attention) if adaptive else attention})
        model["alpha"] = nn.Linear(8, 16)
        maps = attach(model, dec=model["alpha"])
        with LogitTap(attention.to_q, attention.to_k, attention.scale, heads=heads, host=attention) as tap:
            for clips in (2, 6):
                slots = model["slots"](torch.randn(clips, 16, 8))
                model["alpha"](slots[0] if adaptive else slots)
                got = maps()
                assert torch.equal(got.enc_logits.flatten(3), tap.pop())
                assert got.dec_logits.shape == (clips, 1, S, 4, 4)

    @pytest.mark.parametrize("renamed", [False, True])
    def test_slots_that_are_reordered_are_refused(self, renamed: bool) -> None:
        meta = MetaSlotAttention(SlotAttention(S, 8), codebook_size=8)
        if renamed:
            # as a copy in a user's own code
            meta.__class__ = type("Pruned", (nn.Module,), {"forward": MetaSlotAttention.forward})
        model = nn.ModuleDict({"slots": meta, "alpha": nn.Linear(8, 16)})
        refuses(
            ValueError, "`model` must keep its slots in order; got what looks like a", attach, model, dec=model["alpha"]
        )

    def test_a_codebook_beside_slot_attention_reorders_nothing(self) -> None:
        class Quantized(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.slot_attention, self.vq, self.alpha = SlotAttention(S, 8), nn.Linear(8, 8), nn.Linear(8, 16)

            def forward(self, tokens: Tensor) -> Any:
                # patches without an order
                tokens = tokens[:, torch.rand(tokens.shape[1]).argsort()]
                return self.alpha(self.vq(self.slot_attention(tokens)))

        model = Quantized()
        maps = attach(model, dec=model.alpha)
        assert "(lucidrains, at `slot_attention`)" in maps.describe()
        model(torch.randn(B, 16, 8))
        assert maps().enc_logits.shape == (B, 1, S, 4, 4)


def test_a_model_that_is_gone_is_let_go() -> None:
    model = MINIATURES["randsfq"].build()
    maps = attach(model)
    gone = weakref.ref(model)
    del model, maps
    gc.collect()
    assert gone() is None
