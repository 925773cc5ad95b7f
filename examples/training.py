"""The loop that every example trains with: the model's own losses, and what a run adds to them."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Protocol

import torch
from examples.checkpoint import Settings, TrainingState, batch_of_step
from examples.slot_model import SlotOutput, reconstruction_loss, slot_contrast_loss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ssync_loss import SSyncLoss

SAVE_EVERY = 100

# what a run adds to the loss of a step, by name: from the model's output, the features of the batch, and the step
Terms = Callable[[SlotOutput, Tensor, int], dict[str, Tensor]]


class Trained(Protocol):
    """What the loop needs of a run, and what it writes down there: steps, their seconds and their losses."""

    settings: Settings
    seed: int
    optimizer: torch.optim.Adam
    scheduler: LambdaLR
    step: int
    times: list[float]
    history: list[dict[str, float]]

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained."""

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model on the features of a step."""

    def after_step(self) -> None:
        """Do what is to be done after the optimizer's step."""


def train(
    run: Trained,
    features: Tensor,
    terms: Terms,
    until: int,
    *,
    title: str,
    save: Callable[[], None] = lambda: None,
    stop: Event | None = None,
) -> None:
    """Train a run up to a step, and show its losses.

    Args:
        run: goes on from its step.
        features: (B, T, D, H, W), of all training clips.
        terms: what is added to the model's own losses.
        until: the step before which it ends.
        title: of the bar.
        save: called every 100 steps and at the end.
        stop: once it is set, the training ends after the present step.
    """
    settings = run.settings
    with tqdm(total=until, initial=run.step, desc=title, dynamic_ncols=True) as bar:
        while run.step < until and not (stop is not None and stop.is_set()):
            started = time.perf_counter()
            chosen = batch_of_step(run.step, num_clips=len(features), batch_size=settings.batch_size, seed=run.seed)
            batch = features[chosen]
            output = run.forward(batch)
            own = {"reconstruction": reconstruction_loss(output, batch), "contrast": slot_contrast_loss(output.slots)}
            loss = own["reconstruction"] + settings.contrast_weight * own["contrast"]
            added = terms(output, batch, run.step)
            for term in added.values():
                loss = loss + term
            run.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.parameters(), settings.max_grad_norm)
            run.optimizer.step()
            run.scheduler.step()
            run.after_step()
            run.step += 1
            run.times.append(time.perf_counter() - started)

            run.history.append({name: value.item() for name, value in (own | added).items()})
            bar.set_postfix({name: f"{value:.3f}" for name, value in run.history[-1].items()}, refresh=False)
            bar.update()
            if run.step % SAVE_EVERY == 0:
                save()
    save()


def terms_of(state: TrainingState, criterion: SSyncLoss | None) -> Terms:
    """Return what a run adds: SSync, or the loss that asks, or neither; and dense alignment in the run that has it."""

    def terms(output: SlotOutput, features: Tensor, step: int) -> dict[str, Tensor]:
        ssync = features.new_zeros(())
        if criterion is not None:
            # ------------------------- the one line -------------------------
            ssync = criterion(output.enc_logits, output.dec_logits, step=step)
            # ----------------------------------------------------------------
        if state.adaptive is not None:
            # the same, but that it asks the features
            ssync = state.adaptive(output.enc_logits, output.dec_logits, features, step=step)
        if state.alignment is None:
            return {"ssync": ssync}
        # what the line is compared with
        return {"ssync": ssync, "dense": state.alignment(output, features, step=step)}

    return terms


@contextmanager
def stop_on_ctrl_c() -> Iterator[Event]:
    """Let the first Ctrl-C ask for a stop between two steps, and the second one have its usual effect."""
    stop = Event()
    usual = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)
