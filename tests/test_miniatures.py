"""Every miniature trains, and has the quirks of its host."""

from typing import Any

import pytest
import torch
from torch import Tensor

from miniatures import MINIATURES, genera1z, spot, steve


@pytest.mark.parametrize("name", MINIATURES)
class TestEveryMiniature:
    def test_it_trains(self, name: str) -> None:
        host = MINIATURES[name]
        model = host.build().train()
        before = [one.detach().clone() for one in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss, _ = host.step(model, host.batch(2, 3 if host.is_video else 1))
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize("training", [True, False])
    def test_its_maps(self, name: str, training: bool) -> None:
        host, T = MINIATURES[name], 3 if MINIATURES[name].is_video else 1
        model = host.build().train(training)
        with torch.set_grad_enabled(training):
            _, maps = host.step(model, host.batch(2, T))
        for one, (H, W) in zip(maps, host.grids, strict=True):
            assert one.shape == (2, T, 4, H * W)
            assert not one.requires_grad
            total = one.sum(2)
            if name == "xssc" and one is maps[1]:
                assert (total < 1).all()
            else:
                torch.testing.assert_close(total, torch.ones_like(total))


class Counter:
    """Counts the calls of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


@pytest.mark.parametrize(("training", "frames"), [(True, 4), (False, 7)])
def test_the_validation_of_slotcurri_is_cyclic(training: bool, frames: int) -> None:
    host = MINIATURES["slotcurri"]
    model: torch.nn.Module = host.build().train(training)
    keys = Counter(model.get_submodule("processor.module.corrector.to_k"))
    queries = Counter(model.get_submodule("processor.module.corrector.to_q"))
    host.step(model, host.batch(2, 4))
    assert (keys.calls, queries.calls) == (frames, 3 + 2 * (frames - 1))


def test_hooks_on_a_slotcontrast_model_never_fire() -> None:
    host = MINIATURES["slotcontrast mlp"]
    model: Any = host.build()
    whole, part = Counter(model), Counter(model.processor)
    model.training_step(host.batch(2, 3))
    model.validation_step(host.batch(1, 5))
    assert (whole.calls, part.calls) == (0, 2)


def test_xssc_returns_the_source_of_every_frame() -> None:
    model = MINIATURES["xssc"].build().train()
    decode = model.get_submodule("m.decode")
    _, _, fsti = decode(torch.randn(2, 5, 12, 8), torch.randn(2, 5, 4, 8))
    now = torch.arange(5)
    assert ((fsti == now) | (fsti == now - 1)).all()
    assert (fsti != now).any()


def test_generation_calls_the_decoder_once_per_patch() -> None:
    model = steve.STEVE()
    calls = Counter(model.steve_decoder.tf)
    assert model.reconstruct_autoregressive(torch.randn(2, 3, 3, 16, 16)).shape == (6, 16)
    assert calls.calls == 16


def test_the_dots_of_spot_match_its_map_and_squeeze_a_single_image() -> None:
    model = spot.SPOT()
    _, enc, *_, dots = model(torch.randn(2, 3, 4, 4))
    assert dots.shape == (2, 16, 4)
    torch.testing.assert_close(dots.softmax(-1).mT, enc.flatten(-2))
    assert model(torch.randn(1, 3, 4, 4))[-1].shape == (16, 4)


def test_the_cross_attention_of_spot_is_shuffled() -> None:
    model = spot.SPOT().train()
    seen: list[Tensor] = []
    attention = model.get_submodule("dec.blocks.0.encoder_decoder_attn")
    dropout = attention.get_submodule("attn_dropout")
    dropout.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    maps = model(torch.randn(2, 3, 4, 4))[2].flatten(-2).mT
    raw = seen[0].sum(1) / seen[0].sum(1).sum(-1, keepdim=True)
    assert not torch.equal(raw, maps)
    torch.testing.assert_close(raw.sort(1).values, maps.sort(1).values)


def test_an_epoch_with_configured_metrics() -> None:
    model = genera1z.build(genera1z.BroadcastMLPDecoder)
    config = {
        "recon": {
            "metric": {"type": genera1z.MSELoss},
            "map": {"input": "output.recon", "target": "output.feature"},
            "weight": 2.0,
        }
    }
    loss_fn = genera1z.MetricWrap(**genera1z.build_from_config(config))
    optimizer = torch.optim.Adam(model.parameters())
    pack = {"model": model, "loss_fn": loss_fn, "optimiz": optimizer, "callbacks": [], "step_count": 0}
    pack["gscale"] = torch.amp.GradScaler("cpu")
    batches = [{"video": torch.randn(2, 3, 8, 3, 4)}] * 5
    said = genera1z.run_epoch(pack, batches)
    assert said[-1]["recon"] < said[0]["recon"]
    assert pack["step_count"] == 5
    genera1z.run_epoch(pack, batches, isval=True)
    assert pack["step_count"] == 5
