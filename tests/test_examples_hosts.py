"""Every example that registers the loss runs on a miniature of its host."""

import copy
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples.hosts import plain_loop, slotcontrast_loss
from examples.hosts.genera1z_metric import for_host, ssync_term
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ddp_of_hosts
import lightning_stand_in
from miniatures import MINIATURES, Miniature, genera1z, oclf
from miniatures.slotcontrast import losses, models, train
from own_code import own_code
from ssync_loss import SSyncLoss
from ssync_loss.adapters import OutputTap, attach

HOSTS = Path(plain_loop.__file__).parent
ROOT = HOSTS.parents[1]
PATHS = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", ROOT)))}


@pytest.mark.parametrize("name", sorted(one.name for one in HOSTS.iterdir() if one.suffix in {".py", ".yaml"}))
def test_an_example_is_short_and_in_the_table(name: str) -> None:
    assert own_code(HOSTS / name) < 40
    assert f"`{name}`" in (HOSTS / "README.md").read_text()


def loss_of(host: Miniature) -> Any:
    return lambda model, batch: host.step(model, batch)[0]


def batches_of(host: Miniature, number: int) -> list[Any]:
    return [host.batch(2, 3 if host.is_video else 1) for _ in range(number)]


def test_a_users_entry_finds_both_maps(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(HOSTS / "own_model.py"), run_name="__main__")
    encoder, decoder, call = capsys.readouterr().out.splitlines()[1:]
    assert encoder == "encoder: dots of `to_q` (slots) and `to_k` (patches), scale 0.3536, 1 head"
    assert decoder == "decoder: output of `alpha`: logits"
    assert call.count("with gradient") == 2


@pytest.mark.parametrize("name", MINIATURES)
class TestPlainLoop:
    def run(self, name: str, start_step: int) -> tuple[Tensor, nn.Module]:
        torch.manual_seed(3)
        host = MINIATURES[name]
        model: Any = host.build()
        batches = batches_of(host, 4)
        dec = None if host.decoder_is_linked else OutputTap(model.decoder, lambda out: out[..., -1])
        return plain_loop.train(model, batches, loss_of(host), start_step=start_step, dec=dec), model

    def test_before_the_start_training_is_unchanged(self, name: str) -> None:
        torch.manual_seed(3)
        host = MINIATURES[name]
        model = host.build()
        batches = batches_of(host, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
        plain = []
        for batch in batches:
            loss, _ = host.step(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            plain.append(loss.detach())
        never, untaught = self.run(name, start_step=4)
        assert torch.equal(never, torch.stack(plain))
        for one, other in zip(model.parameters(), untaught.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_after_the_start_the_weights_change(self, name: str) -> None:
        never, untaught = self.run(name, start_step=4)
        some, taught = self.run(name, start_step=2)
        assert torch.equal(some[:2], never[:2])
        assert some[2] > never[2]
        assert some.isfinite().all()
        assert any(not torch.equal(*pair) for pair in zip(untaught.parameters(), taught.parameters(), strict=True))


MSE = {"loss_featrec": {"name": "MSELoss"}}
SSYNC = {"loss_ssync": {"name": "SSync", "merge_threshold": 0.7, "start_step": 2}}


def config_of(decoder: str, input_type: str, fns: dict[str, Any], **settings: Any) -> dict[str, Any]:
    weights = {"loss_featrec": 1.0, "loss_ssync": 0.5}
    named = {"losses": fns, "loss_weights": {name: weights[name] for name in fns}}
    return {"seed": 0, "max_steps": 4, "model": {"decoder": decoder, "input_type": input_type, **named, **settings}}


class TestSlotContrastLoss:
    @pytest.fixture
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models, "build", models.build)
        monkeypatch.setattr(losses, "SSync", None, raising=False)
        slotcontrast_loss.register("miniatures.slotcontrast")

    def said(self, capsys: pytest.CaptureFixture[str], folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        path = folder / "config.json"
        path.write_text(json.dumps(config))
        train.main(str(path))
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    @pytest.mark.parametrize("input_type", ["video", "image"])
    @pytest.mark.parametrize("decoder", list(models.DECODERS))
    @pytest.mark.usefixtures("registered")
    def test_it_trains(self, decoder: str, input_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plain = self.said(capsys, tmp_path, config_of(decoder, input_type, MSE))
        taught = self.said(capsys, tmp_path, config_of(decoder, input_type, {**MSE, **SSYNC}))
        assert taught["train"][:2] == plain["train"][:2]
        assert taught["train"][2] > plain["train"][2]
        assert taught["val"][0] == plain["val"][0]
        assert taught["state"] == plain["state"]

    @pytest.mark.usefixtures("registered")
    def test_its_value_is_computed_from_the_dots(self) -> None:
        model = models.build(config_of("SlotMixerDecoder", "video", {**MSE, **SSYNC})["model"])
        model.global_step = 2
        corrector: Any = model.get_submodule("processor.module.corrector")
        dots: list[Tensor] = []
        step = corrector.step

        def noted(slots: Tensor, keys: Tensor, values: Tensor) -> Any:
            dots.append(corrector.to_q(corrector.norm_slots(slots)) @ keys.mT * corrector.scale)
            return step(slots, keys, values)

        batch = {"video": torch.randn(2, 3, 8, 4, 4)}
        outputs = model.forward(batch)
        total, each = model.compute_loss(outputs)
        corrector.step = noted
        model.forward(batch)
        # the last of 3, 2 and 2 iterations
        enc = torch.stack([dots[index] for index in (2, 4, 6)], 1)
        expected = SSyncLoss(merge_threshold=0.7)(enc, outputs["decoder"]["masks"].log())
        torch.testing.assert_close(each["loss_ssync"], expected)
        torch.testing.assert_close(total, each["loss_featrec"] + 0.5 * expected)

    @pytest.mark.usefixtures("registered")
    def test_growing_slots_and_cyclic_validation(self) -> None:
        config = config_of("MLPDecoder", "video", {**MSE, "loss_ssync": {"name": "SSync"}}, cycle=True, n_slots=7)
        model = models.build(config["model"])
        initializer: Any = model.initializer
        for slots in (2, 3, 7):
            initializer.n_slots = slots
            model.train().training_step({"video": torch.randn(2, 3, 8, 4, 4)}).backward()
            with torch.no_grad():
                assert model.eval().validation_step({"video": torch.randn(1, 5, 8, 4, 4)}).isfinite()

    @pytest.mark.usefixtures("registered")
    def test_an_old_checkpoint_loads(self) -> None:
        old = models.build(config_of("MLPDecoder", "video", MSE)["model"])
        new = models.build(config_of("MLPDecoder", "video", {**MSE, **SSYNC})["model"])
        new.load_state_dict(old.state_dict(), strict=True)
        copy.deepcopy(new)

    def test_the_hosts_script_trains_from_the_command_line(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config_of("MLPDecoder", "video", {**MSE, **SSYNC})))
        environment = {**os.environ, **PATHS, "RUN": "miniatures.slotcontrast.train", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HOSTS / "slotcontrast_loss.py"), str(path)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert ran.returncode == 0, ran.stderr
        assert len(json.loads(ran.stdout)["train"]) == 4

    def test_the_hosts_script_alone_does_not_know_the_loss(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config_of("MLPDecoder", "video", {**MSE, **SSYNC})))
        monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
        with pytest.raises(ValueError, match="Unknown loss `SSync`"):
            runpy.run_path(train.__file__, run_name="__main__")


SSyncMetric, SSyncMaps = for_host(genera1z)


class TestGenera1ZMetric:
    def run(self, name: str, term: dict[str, Any], *, epochs: int = 1) -> tuple[list[Any], dict[str, Any]]:
        torch.manual_seed(0)
        host = MINIATURES[name]
        model = host.build()
        recon = {
            "metric": {"type": genera1z.MSELoss},
            "map": {"input": "output.recon", "target": "output.feature"},
        }
        config = genera1z.build_from_config({"loss_fn": {"recon": recon, **term}, "callbacks": [{"type": SSyncMaps}]})
        pack = {
            **config,
            "model": model,
            "loss_fn": genera1z.MetricWrap(**config["loss_fn"]),
            "optimiz": torch.optim.Adam(model.parameters()),
            "gscale": torch.amp.GradScaler("cpu"),
            "step_count": 0,
        }
        batches = [host.batch(2, 4)["batch"] for _ in range(3)]
        said = []
        for _ in range(epochs):
            said += genera1z.run_epoch(pack, batches)
            said += genera1z.run_epoch(pack, batches[:1], isval=True)
        return said, pack

    @pytest.mark.parametrize("name", ["randsfq", "smoothsa", "smoothsa masked", "xssc"])
    def test_it_trains_and_validates(self, name: str) -> None:
        said, pack = self.run(name, {"ssync": ssync_term(SSyncMetric, weight=2.0, start_step=2)}, epochs=2)
        values = [one["ssync"] for one in said]
        # two epochs of three steps and a validation
        assert values[:2] == [0, 0]
        assert all(0 < value < 10 for value in values[2:])
        assert pack["step_count"] == 6
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in pack["model"].modules())

    @pytest.mark.parametrize("name", ["smoothsa masked", "xssc"])
    def test_its_value_uses_the_masks(self, name: str) -> None:
        _, pack = self.run(name, {"ssync": ssync_term(SSyncMetric, weight=2.0)})
        genera1z.run_epoch(pack, [MINIATURES[name].batch(2, 4)["batch"]])
        output = pack["output"]
        masks = {key: output.get(key) for key in ("valid", "slot_mask")}
        mask = masks["slot_mask" if name == "smoothsa masked" else "valid"]
        assert mask is not None
        assert not mask.all()
        value = SSyncLoss()(output["enc_logits"], output["dec_logits"], **masks)
        loss, valid = pack["loss_fn"](**pack)["ssync"]
        assert torch.equal(loss, 2.0 * value[None])
        assert valid.tolist() == [True]


def parsed(text: str) -> dict[str, Any]:
    """Parse nested mappings in YAML whose scalars are numbers or strings."""
    tree: dict[str, Any] = {}
    open_at: list[tuple[int, dict[str, Any]]] = [(-1, tree)]
    for line in text.splitlines():
        if not line.strip() or line.strip().startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        key, _, value = line.strip().partition(":")
        while open_at[-1][0] >= indent:
            open_at.pop()
        if value.strip():
            try:
                open_at[-1][1][key] = json.loads(value)
            except json.JSONDecodeError:
                open_at[-1][1][key] = value.strip()
        else:
            open_at[-1][1][key] = {}
            open_at.append((indent, open_at[-1][1][key]))
    return tree


class TestOCLFConfiguration:
    @pytest.mark.parametrize("n_heads", [1, 2])
    @pytest.mark.parametrize("decoder", [None, oclf.AUTOREGRESSIVE], ids=["patches", "autoregressive"])
    @pytest.mark.parametrize("input_type", ["video", "image"])
    def test_it_trains(self, input_type: str, decoder: Any, n_heads: int) -> None:
        config = parsed((HOSTS / "oclf.yaml").read_text())[input_type]["losses"]
        trainer = SimpleNamespace(global_step=29_999)
        is_video = input_type == "video"
        if is_video and decoder is not None:
            config["ssync"]["axes"] = ["b t s (h w)", "(b t) s (h w)"]
        model = oclf.build(video=is_video, n_heads=n_heads, decoder=decoder, losses=config, trainer=trainer)
        data = MINIATURES[f"oclf {input_type}"].batch(2, 3)
        outputs = model(data)
        assert model.losses["ssync"](inputs=outputs) == 0
        trainer.global_step = 30_000
        value = model.losses["ssync"](inputs=outputs)
        enc, dec = outputs["perceptual_grouping"].feature_attributions, outputs["object_decoder"].masks
        enc, dec = (one.reshape(2, 3 if is_video else 1, 4, 16) for one in (enc, dec))
        expected = SSyncLoss(kind="probs", merge_threshold=config["ssync"]["merge_threshold"])(enc, dec)
        assert torch.equal(value, expected)
        assert value > 0
        model.training_step(data).backward()
        assert all(one.grad is not None for one in model.parameters())


class TestLightningModule:
    @pytest.fixture
    def lightning(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Return Lightning if it is installed, or else the stand-in."""
        try:
            return importlib.import_module("lightning")
        except ModuleNotFoundError:
            monkeypatch.setitem(sys.modules, "lightning", lightning_stand_in)
            return lightning_stand_in

    # Lightning warns about few workers and deprecations
    @pytest.mark.filterwarnings("default")
    def test_it_fits(self, lightning: Any) -> None:
        module = runpy.run_path(str(HOSTS / "lightning_module.py"))["SSyncModule"]
        host = MINIATURES["slotcontrast mlp"]
        seen: list[tuple[int, float]] = []

        class Watched(module):  # type: ignore[misc, valid-type]
            def training_step(self, batch: Any) -> Tensor:
                total: Tensor = super().training_step(batch)
                seen.append((self.global_step, total.item()))
                return total

        torch.manual_seed(0)
        model = Watched(host.build(), loss_of(host), start_step=2)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=2, accumulate_grad_batches=2, accelerator="cpu", **quiet)
        # Lightning would take a list for several loaders
        training, validation = (loader(batches) for batches in (batches_of(host, 4), [host.batch(1, 5)]))
        trainer.fit(model, training, validation)
        # two epochs of two steps with two parts
        assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
        # the second epoch repeats the batches, so only SSync raises the loss
        assert all(later > 1.02 * earlier for (_, earlier), (_, later) in zip(seen[:4], seen[4:], strict=True))
        assert not any(name.startswith(("maps", "criterion")) for name in model.state_dict())
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def loader(batches: Any) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the weights of two processes, by precision."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1", ddp_of_hosts.__file__, str(folder)]
    environment = {**os.environ, **PATHS, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert ran.returncode == 0, ran.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


class TestDataParallel:
    @pytest.mark.parametrize("precision", ddp_of_hosts.PRECISIONS)
    def test_ranks_have_equal_weights(self, precision: str, ranks: list[Any]) -> None:
        first, second = (rank[precision] for rank in ranks)
        before = ddp_of_hosts.scene(precision)[0].state_dict()
        for name, one in first.items():
            assert torch.equal(one, second[name])
        assert any(not torch.equal(one, before[name]) for name, one in first.items())

    def test_two_processes_train_as_one(self, ranks: list[Any]) -> None:
        """The expected weights come from a loop with the whole batch."""
        model, batches = ddp_of_hosts.scene("float64")
        maps, criterion = attach(model), SSyncLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
        for parts in batches:
            for part in parts:
                loss = ddp_of_hosts.host_loss(model, part)
                ((loss + criterion(**maps())) / len(parts)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        for name, one in model.state_dict().items():
            torch.testing.assert_close(ranks[0]["float64"][name], one, rtol=0, atol=1e-12)
