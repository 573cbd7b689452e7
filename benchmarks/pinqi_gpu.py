"""The one command for a GPU machine: train PINQI (or go on where the last call stopped), then measure speed and quality.

    python -m benchmarks.pinqi_gpu --output DIR --max-minutes 8

Needs torch, NumPy, SciPy and safetensors alone. Run it again with the same ``--output`` to train further: it resumes by itself.
Options that it does not know go to the training (``--ablation h``, ``--batch 8``, ``--epochs 20``, ``--precision bfloat16``; see
``python -m recon_core.training.pinqi --help``). Weights, logs and the figures' JSON lie in ``DIR``.
A part that fails is named at the end and leaves the others; without weights speed is measured with initial ones.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

import torch

from benchmarks import pinqi, pinqi_speed
from benchmarks.common import RESULTS, each_by_itself, in_words, training_options, training_words
from recon_core.training import pinqi as training
from recon_core.training.runs import RECIPE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_options(parser, 8.0, "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=8, help="held-out slices at each acceleration; 0: no quality")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--slices", type=int, default=8, help="of the speed measurement; 0: none")
    parser.add_argument("--comparators", action="store_true", help="zero-filled, CG-SENSE and LLR too")
    parser.add_argument("--brainweb", default=None, help="folder of BrainWeb heads, for training and quality")
    options, of_training = parser.parse_known_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    where = ["--device", options.device, "--size", str(options.size)]
    heads = ["--brainweb", options.brainweb] if options.brainweb else []
    weights = options.output / f"{training.NAME}.json"
    trained = ["--weights", str(weights)]

    def train() -> None:
        training.main([*training_words(options, RECIPE), "--size", str(options.size), *heads, *of_training])

    def speed() -> None:
        precisions = ["float32", "bfloat16"] if options.device.startswith("cuda") else ["float32"]
        words = [*where, "--slices", str(options.slices), "--name", "pinqi_speed_gpu", "--precisions", *precisions]
        pinqi_speed.main([*words, *(trained if weights.is_file() else [])])
        shutil.copy(RESULTS / "pinqi_speed_gpu.json", options.output)

    def quality() -> None:
        words = [*trained, *where, *heads, "--samples", str(options.samples), "--name", "pinqi_gpu", "--no-bart"]
        pinqi.main([*words, *([] if options.comparators else ["--only-weights"])])
        shutil.copy(RESULTS / "pinqi_gpu.json", options.output)

    parts = {
        "training": (train, options.max_minutes > 0),
        "speed": (speed, options.slices),
        "quality": (quality, options.samples),
    }
    return each_by_itself({name: part for name, (part, wanted) in parts.items() if wanted})


if __name__ == "__main__":
    sys.exit(in_words(main))
