"""The training loop of every example: the model's own losses, and the terms that a run adds to them."""

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

# the terms that a run adds to its loss, by name, given the model's output, the features of the batch and the step
Terms = Callable[[SlotOutput, Tensor, int], dict[str, Tensor]]


class Trained(Protocol):
    """A run that the loop can train. The loop records steps, seconds and losses in it."""

    settings: Settings
    seed: int
    optimizer: torch.optim.Adam
    scheduler: LambdaLR
    step: int
    times: list[float]
    history: list[dict[str, float]]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters to train."""

    def forward(self, features: Tensor) -> SlotOutput:
        """Run the model on the features of a step."""

    def after_step(self) -> None:
        """Update the run after the optimizer's step."""


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
        run: the run; training continues from its step.
        features: (B, T, D, H, W), of all training clips.
        terms: the terms to add to the model's own losses.
        until: the step before which training ends.
        title: title of the progress bar.
        save: called every 100 steps and at the end.
        stop: once set, it ends the training after the current step.
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
    """Return the terms of a run: SSync, adaptive SSync or neither, and dense alignment if the run has it."""

    def terms(output: SlotOutput, features: Tensor, step: int) -> dict[str, Tensor]:
        ssync = features.new_zeros(())
        if criterion is not None:
            # ------------------------- the one line -------------------------
            ssync = criterion(output.enc_logits, output.dec_logits, step=step)
            # ----------------------------------------------------------------
        if state.adaptive is not None:
            # the adaptive loss also takes the features
            ssync = state.adaptive(output.enc_logits, output.dec_logits, features, step=step)
        if state.alignment is None:
            return {"ssync": ssync}
        return {"ssync": ssync, "dense": state.alignment(output, features, step=step)}

    return terms


@contextmanager
def stop_on_ctrl_c() -> Iterator[Event]:
    """Turn the first Ctrl-C into a stop between two steps. A second Ctrl-C has its usual effect."""
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
