"""Watch the loss during training, without ground truth: numbers and pictures, for any logger."""

import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ssync_loss._checks import check_floating, check_int, check_shape, check_type, has_ranks
from ssync_loss.adapters.slot_maps import SlotMaps
from ssync_loss.diagnostics.statistics import slots_in_use, summary
from ssync_loss.ssync.adaptive import AdaptiveSSyncLoss
from ssync_loss.ssync.fit import explained_shares, place_features
from ssync_loss.ssync.functions import labels_of
from ssync_loss.ssync.labels import hard_labels
from ssync_loss.ssync.maps import Maps, prepare_maps
from ssync_loss.ssync.modules import SSyncLoss, as_step
from ssync_loss.ssync.types import PseudoLabels
from ssync_loss.visualize.composition import panel

# the columns of the CSV file, in order
VALUES = (
    *("loss", "host_loss", "enc_gradient", "dec_gradient", "host_enc_gradient", "host_dec_gradient"),
    *("enc_slots", "dec_slots", "enc_groups", "dec_groups", "merges", "agreement", "enc_flips", "dec_flips"),
    *("boundary_share", "interior_share", "untaught_share", "margin", "merged_margin"),
)
# the monitor warns if SSync's gradient at a map exceeds the host's by this factor; a rule of thumb
DWARFS = 10.0
# autograd nodes that only move numbers: the norm of a gradient stays the same
_REARRANGES = frozenset(
    (
        *("AliasBackward", "CatBackward", "CloneBackward", "PermuteBackward", "ReshapeAliasBackward"),
        *("SqueezeBackward", "StackBackward", "TBackward", "ToCopyBackward", "TransposeBackward"),
        *("UnsafeViewBackward", "UnsqueezeBackward", "ViewBackward"),
    )
)
_NO_GRADIENT = """\
The gradients at the maps cannot be taken. Call the monitor before backward(). For a compiled model set \
torch._functorch.config.donated_buffer = False. For checkpoints set use_reentrant=False."""

# a sink writes the values of a step, and a picture (3, h, w) uint8 on the CPU unless it is None
Sink: TypeAlias = Callable[[dict[str, float], Tensor | None, int], None]


class Monitor:
    """Watch the loss during training: write numbers at every k-th step, and a picture of one clip.

    Call it with the arguments of the loss, **before** ``backward()``::

        monitor = Monitor(criterion, every=500)
        ...
        loss = criterion(**maps, step=step)
        monitor(maps, step=step, loss=loss, host_loss=host_loss, features=features, video=video)
        (host_loss + loss).backward()

    The monitor writes at steps that ``every`` divides; other steps cost nothing. It writes means over the batch:

    - ``enc_slots``, ``dec_slots``: number of slots that win a patch, before merging; ``enc_groups``, ``dec_groups``:
      the same after merging; ``merges``: number of slots that merging renames. A single group is a collapse: raise the
      merge threshold;
    - ``agreement``, ``enc_flips``, ``dec_flips``, ``boundary_share``, ``interior_share``, ``untaught_share``: the
      values of ``diagnostics.summary``, for merged labels;
    - ``margin``, ``merged_margin``: the margins of ``diagnostics.premise``, if ``features`` are given. If the merged
      margin is below 0, the target explains less than the decoder at this threshold;
    - ``loss``, ``host_loss``; ``enc_gradient``, ``dec_gradient``: norm of the gradient of ``loss`` at each map;
      ``host_enc_gradient``, ``host_dec_gradient``: norm of the gradient of ``host_loss``. If SSync's gradient is more
      than ten times the host's, a warning says once which setting to lower. Ten is a rule of thumb.

    Values that are not available are left out, and their cells in the file are empty. A gradient is missing if the loss
    does not use that map, as when a tap computes a copy of the host's map, or a compiled model returns both maps. If a
    map is stacked, joined or reshaped from other tensors, the gradient is taken at these. Scale both losses alike.

    The picture is ``visualize.panel`` of the first clip of the batch, if ``video`` is given. To watch one fixed clip,
    run the model on it if ``is_due(step)``, and pass its maps and video to :meth:`picture`.

    A logged step waits for the device and takes two more backward passes, from the losses to the maps. These keep the
    graph and do not change ``.grad`` of parameters. If torch refuses them (after ``backward()``, in a compiled model
    with donated buffers, under reentrant checkpoints), a warning says so once, and gradients are left out. In a process
    group all ranks must call the monitor; rank 0 writes the values of its clips. For an ``AdaptiveSSyncLoss`` the
    settings of its criterion apply.

    Args:
        criterion: the loss to watch, with its merge threshold, layout and settings; None means ``SSyncLoss()``.
        every: write at steps that this number divides.
        to: a folder (``values.csv``, and a PNG file per picture), to which a resumed run appends; or an object with
            ``add_scalar`` and, for pictures, ``add_image`` (TensorBoard); with ``log_dict`` (a LightningModule, no
            pictures and Lightning's own steps); with ``log`` (a run of Weights & Biases). Names begin with ``ssync/``.
        features_axes: layout of the features, as in ``AdaptiveSSyncLoss``.

    If a folder cannot be written to, as on a full disk, a warning says so once and training continues.

    Raises: TypeError, ValueError on a wrong argument, at logged steps.

    >>> import tempfile
    >>> enc = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]).view(1, 1, 2, 1, 4).requires_grad_()
    >>> dec = torch.tensor([[9.0, 9.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]]).view(1, 1, 2, 1, 4).requires_grad_()
    >>> criterion = SSyncLoss()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     monitor = Monitor(criterion, every=10, to=folder)
    ...     values = monitor((enc, dec), step=20, loss=criterion(enc, dec))
    ...     print(sorted(one.name for one in Path(folder).iterdir()), monitor.is_due(21))
    ['values.csv'] False
    >>> values["agreement"], values["enc_groups"]  # the maps differ on one patch of four
    (0.75, 2.0)
    """

    def __init__(
        self,
        criterion: SSyncLoss | AdaptiveSSyncLoss | None = None,
        *,
        every: int = 100,
        to: Any = "ssync_monitor",
        features_axes: str | None = None,
    ) -> None:
        if isinstance(criterion, AdaptiveSSyncLoss):
            features_axes = criterion.features_axes if features_axes is None else features_axes
            criterion = criterion.criterion
        criterion = SSyncLoss() if criterion is None else criterion
        check_type("criterion", criterion, SSyncLoss)
        check_int("every", every, 1)
        self.criterion, self.every, self.features_axes = criterion, every, features_axes
        self._sink = _sink_of(to)
        self._said: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Tell whether to write at this step.

        Raises: TypeError if the step is neither a Python integer nor a NumPy integer.
        """
        return not as_step(step) % self.every

    def __call__(
        self,
        maps: SlotMaps | tuple[Tensor, Tensor],
        *,
        step: int,
        loss: Tensor,
        host_loss: Tensor | None = None,
        features: Tensor | None = None,
        video: Tensor | None = None,
        num_frames: int | None = None,
    ) -> dict[str, float] | None:
        """Write and return the values if :meth:`is_due`, else return None.

        Args:
            maps: the maps of the loss, ``SlotMaps`` or (encoder's, decoder's); masks come with ``SlotMaps``.
            step: the training step.
            loss: the value of the criterion, a scalar.
            host_loss: the model's own loss, a scalar.
            features: (B, T, D, H, W) on the encoder's grid, or as ``features_axes`` says.
            video: (B, T, 3, h, w), floating point within [0, 1], or uint8.
            num_frames: as in the criterion.
        """
        if not self.is_due(step):
            return None
        for name, one in (("loss", loss), ("host_loss", host_loss)):
            if one is not None:
                check_shape(name, one, "")
                check_floating(name, one)
        enc, dec, given = self._take_apart(maps, num_frames)
        seen, labels = self._look(enc, dec, given)
        values = self._measure(seen, labels, features) | self._gradients("", loss, enc, dec)
        if host_loss is not None:
            values |= self._gradients("host_", host_loss, enc, dec)
        self._compare(values)
        picture = None if video is None else panel(video, enc, dec, labels=labels, **given)[0].cpu()
        values = {name: values[name] for name in VALUES if name in values}
        self._write(values, picture, int(step))
        return values

    def picture(
        self, maps: SlotMaps | tuple[Tensor, Tensor], video: Tensor, *, step: int, num_frames: int | None = None
    ) -> None:
        """Write the panel of a batch's first clip if :meth:`is_due`; arguments as in a call."""
        if self.is_due(step):
            enc, dec, given = self._take_apart(maps, num_frames)
            labels = self._look(enc, dec, given)[1]
            self._write({}, panel(video, enc, dec, labels=labels, **given)[0].cpu(), int(step))

    def _take_apart(self, maps: object, num_frames: int | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return both maps, and their layout and masks as keyword arguments."""
        if not isinstance(maps, (tuple, list)) or len(maps) != 2:
            got = f"{len(maps)} of them" if isinstance(maps, (tuple, list)) else type(maps).__name__
            raise TypeError(f"`maps` must be SlotMaps or a pair (enc_logits, dec_logits); got {got}.")
        given: dict[str, Any] = {name: getattr(self.criterion, name) for name in ("kind", "grid", "axes")}
        if isinstance(maps, SlotMaps):
            given |= {"valid": maps.valid, "slot_mask": maps.slot_mask}
        return maps[0], maps[1], given | {"num_frames": num_frames}

    @torch.no_grad()
    def _look(self, enc: Tensor, dec: Tensor, given: dict[str, Any]) -> tuple[Maps, PseudoLabels]:
        maps = prepare_maps(enc, dec, **given)
        # without a step there is no ramp
        return maps, labels_of(maps, self.criterion.settings_at(None, maps.enc), self.criterion.backend)

    @torch.no_grad()
    def _measure(self, maps: Maps, labels: PseudoLabels, features: Tensor | None) -> dict[str, float]:
        plain = hard_labels(maps)
        found = summary(labels, valid=maps.valid, slot_mask=maps.slot_mask)._asdict()
        for side, one in zip(("enc", "dec"), plain, strict=True):
            found[f"{side}_groups"] = found[f"{side}_slots"]
            found[f"{side}_slots"] = slots_in_use(one, valid=maps.counted)
        means = {name: one.double().mean() for name, one in found.items()}
        if features is not None:
            features = place_features(features, self.features_axes, maps.enc)
            num_slots = maps.enc.shape[2]
            shares, variance = explained_shares(features, *plain, num_slots, maps.counted, labels.representative)
            # clips with constant features do not count; maps with NaN have labels, too, but no margin
            weight = maps.spoil() / (variance != 0).sum().clamp_min(1)
            means["margin"] = (shares[0] - shares[1]).sum() * weight
            means["merged_margin"] = (shares[2] - shares[1]).sum() * weight
        # one wait for the device
        return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))

    def _gradients(self, prefix: str, loss: Tensor, enc: Tensor, dec: Tensor) -> dict[str, float]:
        """Return a loss and the norms of its gradient at the maps that it reaches."""
        values = {f"{prefix}loss": loss.item()}
        edges = {side: _sources(one) for side, one in (("enc", enc), ("dec", dec)) if one.requires_grad}
        if loss.requires_grad and edges:
            try:
                flat = [one for at in edges.values() for one in at]
                found = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                self._say("gradient", f"{_NO_GRADIENT} Torch says: {error} (Said once.)")
                return values
            gradients = iter(found)
            for side, at in edges.items():
                parts = [one.double().square().sum() for _, one in zip(at, gradients, strict=False) if one is not None]
                if parts:
                    values[f"{prefix}{side}_gradient"] = torch.stack(parts).sum().sqrt().item()
        return values

    def _compare(self, values: dict[str, float]) -> None:
        """Warn once for each map if SSync's gradient dwarfs the host's."""
        # the gradient of the boundary term also reaches the encoder, through the decoded slots
        both, boundary = "`interior_weight` and `boundary_weight`", "`boundary_weight`"
        for side, name, weights in (("enc", "encoder", both), ("dec", "decoder", boundary)):
            ours, theirs = values.get(f"{side}_gradient", 0.0), values.get(f"host_{side}_gradient", 0.0)
            if ours > DWARFS * theirs > 0:
                self._say(
                    side,
                    f"At the {name}'s map the gradient of SSync is {ours / theirs:.0f} times that of the host's loss: "
                    f"lower {weights}, start later (`start_step`) or more slowly (`ramp_steps`). (Said once.)",
                )

    def _write(self, values: dict[str, float], picture: Tensor | None, step: int) -> None:
        # all ranks run the backward passes, which may contain collectives; only rank 0 writes
        if has_ranks() and dist.get_rank() > 0:
            return
        try:
            self._sink(values, picture, step)
        except OSError as error:
            self._say("disk", f"The monitor cannot write: {error}. Training continues without it. (Said once.)")

    def _say(self, what: str, words: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(words, stacklevel=4)


def _sources(maps: Tensor) -> list[GradientEdge]:
    """Return the nodes that computed a map's numbers: the host's loss may use frames before they are stacked."""
    found: dict[GradientEdge, None] = {}
    left = [get_gradient_edge(maps)]
    while left:
        edge = left.pop()
        if edge.node.name().rstrip("0123456789") in _REARRANGES:
            left += [GradientEdge(node, number) for node, number in edge.node.next_functions if node is not None]
        else:
            found[edge] = None
    return list(found)


def _sink_of(to: Any) -> Sink:
    if isinstance(to, (str, Path)):
        return partial(_to_folder, Path(to))
    for method, sink in (("add_scalar", _to_board), ("log_dict", _to_module), ("log", _to_run)):
        if callable(getattr(to, method, None)):
            return partial(sink, to)
    raise TypeError(
        "`to` must be a folder, or an object with `add_scalar` (TensorBoard), `log_dict` (Lightning) or `log` "
        f"(Weights & Biases); got {type(to).__name__}."
    )


def _to_folder(folder: Path, values: dict[str, float], picture: Tensor | None, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if values:
        cells = [f"{values[name]:.9g}" if name in values else "" for name in VALUES]
        _append(folder / "values.csv", ",".join(["step", *VALUES]), ",".join([str(step), *cells]))
    if picture is not None:
        path = folder / f"panel_{step:07d}.png"
        try:
            path.write_bytes(_png(picture))
        except OSError:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise


def _append(path: Path, header: str, line: str) -> None:
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n" if size else f"{header}\n{line}\n")
    except OSError:
        # a full disk may have left a part of the line
        with suppress(OSError):
            os.truncate(path, size)
        raise


def _to_board(writer: Any, values: dict[str, float], picture: Tensor | None, step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(f"ssync/{name}", value, step)
    if picture is not None and hasattr(writer, "add_image"):
        writer.add_image("ssync/panel", picture, step)


def _to_module(module: Any, values: dict[str, float], _: Tensor | None, __: int) -> None:
    if values:
        module.log_dict({f"ssync/{name}": value for name, value in values.items()})


def _to_run(run: Any, values: dict[str, float], picture: Tensor | None, step: int) -> None:
    told: dict[str, Any] = {f"ssync/{name}": value for name, value in values.items()}
    # a run exists, so wandb is imported
    wandb = sys.modules.get("wandb")
    if picture is not None and wandb is not None:
        told["ssync/panel"] = wandb.Image(picture.permute(1, 2, 0).numpy())
    if told:
        run.log(told, step=step)


def _png(picture: Tensor) -> bytes:
    """Encode a picture (3, h, w) uint8."""
    _, height, width = picture.shape
    # every row begins with the number of its filter; 0 is no filter
    rows = F.pad(picture.permute(1, 2, 0).reshape(height, 3 * width), (1, 0)).numpy().tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
