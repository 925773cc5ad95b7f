"""Probabilities given as logits, and a slot mask with its meaning inverted, do not pass without a word."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssync_loss import AdaptiveSSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss, SSyncLoss
from ssync_loss._axes import arrange_maps
from ssync_loss.diagnostics import premise
from ssync_loss.ssync import doubts
from ssync_loss.ssync.maps import Maps, bind_maps
from ssync_loss.visualize import panel

B, T, S, H, W = 2, 3, 4, 4, 5
FEATURES, VIDEO = torch.randn(B, T, 6, H, W), torch.rand(B, T, 3, 2 * H, 2 * W)
SOME = torch.tensor([[True, True, False, False], [True, True, True, False]])

MODULES = {one.__name__: one for one in (SSyncLoss, BoundaryRefinementLoss, InteriorDenoisingLoss)}
CALLS: dict[str, Callable[..., Callable[..., object]]] = {
    **MODULES,
    "terms": lambda **settings: SSyncLoss(**settings).terms,
    "from the start on": lambda **settings: partial(SSyncLoss(start_step=9, **settings), step=9),
    "adaptive": lambda **settings: partial(AdaptiveSSyncLoss(SSyncLoss(**settings)), features=FEATURES),
    "premise": lambda **settings: partial(premise, features=FEATURES, **settings),
    "panel": lambda **settings: partial(panel, VIDEO, **settings),
}
EVERY = pytest.mark.parametrize("name", CALLS)


def maps() -> dict[str, Tensor]:
    return {name: torch.randn(B, T, S, H, W, requires_grad=True) for name in ("enc_logits", "dec_logits")}


def said(call: Callable[..., object], **given: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(**given)
    # a compiler has words of its own
    ours = [one for one in caught if str(one.message).startswith("`")]
    assert all(one.filename == __file__ for one in ours)
    return [str(one.message).removesuffix(" (Said once.)") for one in ours]


@EVERY
class TestKind:
    def test_probabilities_as_logits(self, name: str) -> None:
        given = maps()
        probs = {key: one.softmax(2) for key, one in given.items()}
        looks = "`{}` looks like probabilities, and was said to be logits."
        assert said(CALLS[name](), **given) == []
        assert said(CALLS[name](kind="probs"), **probs) == []
        both = " ".join([*map(looks.format, probs), "Is kind='probs' meant?"])
        assert said(CALLS[name](), **probs) == [both]
        mixed = {**given, "dec_logits": probs["dec_logits"]}
        assert said(CALLS[name](kind=("logits", "probs")), **mixed) == []
        assert said(CALLS[name](), **mixed) == [f"{looks.format('dec_logits')} Is kind=('logits', 'probs') meant?"]

    def test_a_mask_that_keeps_what_is_absent(self, name: str) -> None:
        given = maps()
        # the host's own softmax was without the absent slots
        given["enc_logits"] = given["enc_logits"].masked_fill(~SOME[:, None, :, None, None], float("-inf"))
        meant = "it is True where a slot is present. Is it inverted?"
        assert said(CALLS[name](), **given, slot_mask=SOME) == []
        nobody = f"`slot_mask` leaves slots that nothing belongs to: {meant}"
        assert said(CALLS[name](), **given, slot_mask=~SOME) == [nobody]
        fewer = f"`slot_mask` leaves no clip two slots, and the loss is 0: {meant}"
        for mask in (SOME & torch.tensor([True, False, False, False]), SOME & False):
            assert said(CALLS[name](), **given, slot_mask=mask) == [fewer]


def test_views_of_one_tensor_are_no_two_maps() -> None:
    enc = maps()["enc_logits"]
    twice = "`dec_logits` is `enc_logits`, in the same memory: each would teach itself."
    assert said(SSyncLoss(), enc_logits=enc, dec_logits=enc.view_as(enc)) == [twice]
    assert said(SSyncLoss(), enc_logits=enc, dec_logits=enc.clone()) == []
    assert said(SSyncLoss().eval(), enc_logits=enc.detach(), dec_logits=enc.detach()) == []


@EVERY
def test_maps_are_bound_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = Mock(wraps=arrange_maps)
    # by name it is not found where a doctest has imported the package anew
    monkeypatch.setitem(bind_maps.__globals__, "arrange_maps", bind)
    CALLS[name](axes="b t s h w")(**maps())
    bind.assert_called_once()


class TestWhatLooksLikeProbabilities:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("heads", [1, 4])
    def test_halves_means_over_heads_and_padding(self, dtype: torch.dtype, heads: int) -> None:
        probs = {name: (one.softmax(2) / heads).to(dtype) for name, one in maps().items()}
        probs = {name: torch.cat([one[..., :-1], 0 * one[..., -1:]], -1) for name, one in probs.items()}
        (text,) = said(SSyncLoss(), **probs)
        assert text.endswith("Is kind='probs' meant?")

    def test_in_another_layout_and_on_grids_of_their_own(self) -> None:
        given = maps()
        enc, dec = given["enc_logits"].softmax(2), given["dec_logits"].softmax(2)[..., ::2]
        criterion = SSyncLoss(axes=("b t h w s", "b t s h w"))
        (text,) = said(criterion, enc_logits=enc.movedim(2, -1), dec_logits=dec)
        assert text.count("looks like probabilities") == 2

    @pytest.mark.parametrize(
        "odd",
        [torch.full((B, T, S, H, W), 0.25), torch.rand(B, T, S, H, W), torch.full((B, T, S, H, W), float("nan"))],
        ids=["one number", "numbers of no one sum", "NaN"],
    )
    def test_what_could_be_logits_is_left_alone(self, odd: Tensor) -> None:
        assert said(SSyncLoss().eval(), enc_logits=odd, dec_logits=maps()["dec_logits"]) == []

    def test_one_slot_is_no_probability(self) -> None:
        ones = torch.rand(B, T, 1, H, W)
        assert said(SSyncLoss().eval(), enc_logits=ones, dec_logits=ones.clone()) == []


class TestOnce:
    def test_a_criterion_looks_at_its_first_call_only(self) -> None:
        given, criterion = maps(), SSyncLoss()
        probs = {name: one.softmax(2) for name, one in given.items()}
        assert said(criterion, **given) == []
        for one in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            assert said(one, **probs) == []

    def test_and_not_before_the_start(self) -> None:
        probs = {name: one.softmax(2) for name, one in maps().items()}
        criterion = SSyncLoss(start_step=9)
        assert said(criterion, **probs, step=8) == []
        assert len(said(criterion, **probs, step=9)) == 1

    @pytest.mark.usefixtures("fresh_compiler")
    def test_nothing_is_read_by_a_compiler(self) -> None:
        probs = {name: one.softmax(2).detach().requires_grad_() for name, one in maps().items()}
        criterion = SSyncLoss(backend="torch")
        assert said(torch.compile(criterion, fullgraph=True, backend="eager"), **probs) == []
        assert len(said(criterion, **probs)) == 1

    def test_nor_of_tensors_without_numbers(self) -> None:
        probs = {name: one.softmax(2).detach() for name, one in maps().items()}
        criterion = SSyncLoss(backend="torch").eval()
        assert said(copy.deepcopy(criterion), **{name: one.to("meta") for name, one in probs.items()}) == []
        with FakeTensorMode() as mode:
            assert said(criterion, **{name: mode.from_tensor(one) for name, one in probs.items()}) == []


class FakeEvent:
    """Stands for an event of a CUDA stream: it is done once a test says so."""

    done = False

    def record(self, stream: object) -> None:
        self.stream = stream

    def query(self) -> bool:
        return FakeEvent.done


class TestOnDevice:
    @pytest.fixture
    def pretended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doubts, "memory_of", lambda tensor: "cuda")
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
        monkeypatch.setattr(FakeEvent, "done", False)

    @pytest.mark.usefixtures("pretended")
    def test_a_later_call_speaks_of_the_first(self) -> None:
        given, criterion = maps(), SSyncLoss()
        probs = {name: one.softmax(2) for name, one in given.items()}
        assert said(criterion, **probs) == said(criterion, **given) == []
        for one in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            FakeEvent.done = True
            assert said(one, **given) == []
        (text,) = said(criterion, **given)
        assert text.endswith("Is kind='probs' meant?")
        assert said(criterion, **probs) == []

    @pytest.mark.usefixtures("pretended")
    def test_a_graph_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probs, criterion = {name: one.softmax(2) for name, one in maps().items()}, SSyncLoss()
        FakeEvent.done = True
        said(criterion, **probs)
        with monkeypatch.context() as patch:
            patch.setattr(doubts, "is_capturing", lambda: True)
            assert said(SSyncLoss(), **probs) == said(criterion, **probs) == []
        assert len(said(criterion, **probs)) == 1

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("twice", [False, True])
    def test_nothing_waits(self, twice: bool) -> None:
        enc, dec = (one.softmax(2).detach().cuda().requires_grad_() for one in maps().values())
        criterion = SSyncLoss()
        # the self-check of an engine waits
        SSyncLoss()(enc, dec)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert said(criterion, enc_logits=enc, dec_logits=enc.view_as(enc) if twice else dec) == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        (text,) = said(criterion, enc_logits=enc, dec_logits=dec)
        assert ("in the same memory" in text) == twice
        assert "Is kind='probs' meant?" in text


def test_copies_of_one_tensor_stay_one() -> None:
    enc, others = torch.randn(B, T, S, H, W, requires_grad=True), {"valid": None, "slot_mask": None}
    once = doubts.in_cpu_memory(Maps(enc, enc.view_as(enc), **others), wait=False)
    twice = doubts.in_cpu_memory(Maps(enc, enc.clone(), **others), wait=False)
    assert once.enc is once.dec
    assert twice.enc is not twice.dec
    assert twice.dec.requires_grad
