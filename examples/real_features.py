"""Train the slot model on features of a pretrained network: own losses, + SSync, + adaptive SSync.

    pip install -e ".[real-features]"
    python examples/real_features.py                      # both data sets, 160 clips each, one seed
    python examples/real_features.py --data composites --clips 1500 --seeds 0 1 2
    python examples/real_features.py --features random    # the hand-made features on the same clips
    python examples/real_features.py --table runs/real_features/sprites/results.json

Both data sets have ground truth. `sprites` are the moving objects of the main example, drawn at 224 x 224.
`composites` are objects cut from photographs that move over another photograph. Training and scoring use different
photographs. Features are computed once and kept in --cache. All runs of a seed share the first 30 % of the steps.
Ctrl-C keeps all finished work; `--resume` continues from there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lets this file run as a script

from examples.arguments import Bounded, add_training_options, at_least, explained, num_cpus
from examples.checkpoint import Settings
from examples.data import Data
from examples.evaluation import Asked
from examples.pieces import default_cache
from examples.real_data import FIT, KINDS, PIECE, real_clips
from examples.report import Report, table
from examples.train_moving_objects import look_into, stages_of, train_all

COMPARE = "adaptive"
# training clips, and fresh clips, for the premise
NUM_ASKED = 100


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small video slot model on pretrained features, with and without SSync.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_training_options(parser, steps=1500, slots=9)
    add("--data", choices=KINDS, nargs="+", default=list(KINDS), help="data sets, one after the other")
    # the principal axes come from this many clips, which must all be training clips
    rules = [at_least(FIT * PIECE)]
    add("--clips", type=int, default=160, action=Bounded, rules=rules, help="clips to train on")
    made = "features of a pretrained network or of random filters"
    add("--features", choices=["pretrained", "random"], default="pretrained", help=made)
    add("--cache", type=Path, default=default_cache(), help="folder for clips and features")
    add("--out", type=Path, default=Path("runs/real_features"), help="where everything else is written")
    add("--resume", action="store_true", help="continue the run in --out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 130 when Ctrl-C cut it short."""
    options = parse(arguments)
    if options.table is not None:
        with explained():
            print(table(Report.load(options.table)))
        return 0
    for kind in options.data:
        with explained():
            num_checkpoints = len(stages_of(COMPARE)) * len(options.seeds)
            look_into(options.out / kind, resume=options.resume, num_checkpoints=num_checkpoints)
    torch.set_num_threads(options.threads)

    num_train, steps = options.clips, options.steps
    num_scored = max(40, min(160, num_train // 4))
    if options.quick:
        num_train, num_scored, steps = FIT * PIECE, PIECE, min(steps, 40)
    for kind in options.data:
        try:
            with explained():
                clips = real_clips(
                    kind,
                    num_train=num_train,
                    num_scored=num_scored,
                    cache=options.cache,
                    hand_made=options.features == "random",
                    threads=num_cpus(),
                )
        except KeyboardInterrupt:
            print(f"\nstopped; what was computed is kept in {options.cache}, and the same command goes on from here")
            return 130
        # the premise needs no ground truth, so it may use the clips to score
        data = Data(
            f"{kind}, {'random filters' if options.features == 'random' else 'pretrained features'}",
            clips.features,
            Asked(clips.features[:NUM_ASKED]),
            Asked(clips.fresh.features[:NUM_ASKED]),
            clips.fresh,
        )
        settings = Settings(data=data.description, num_clips=num_train, slots=options.slots, steps=steps)
        code = train_all(
            data,
            settings,
            options.seeds,
            compare=COMPARE,
            out=options.out / kind,
            resume=options.resume,
            again=" and the same options",
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
