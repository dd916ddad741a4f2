"""Train one network: python scripts/train.py --config configs/digits_xnor.py --workdir runs/mine --optimizer dfw

Started again with the same arguments it resumes from the newest good checkpoint.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from bnn_jax.errors import exit_code_of
from bnn_jax.training.config import Settings, parse
from bnn_jax.training.loop import train
from bnn_jax.training.programs import use_compilation_cache
from bnn_jax.training.progress import progress_display


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = Path("configs/digits_xnor.py")
    """Python file with get_config()."""
    workdir: Path | None = None
    """Folder of the run; by default runs/<name>_<optimizer>_seed<seed>."""
    optimizer: str | None = None
    """Start from the settings that the config keeps for this optimizer."""


def main() -> None:
    arguments = parse(Arguments)
    config = arguments.settings
    workdir = arguments.workdir or Path("runs") / f"{config.name}_{config.optim.name}_seed{config.seed}"
    use_compilation_cache()
    with progress_display(f"{config.name} {config.optim.name}") as on_progress:
        result = train(config, workdir, on_progress=on_progress)
    print(f"test accuracy {100 * result['test_accuracy_last']:.2f} % at the last epoch, ", end="")
    print(f"{100 * result['test_accuracy_best']:.2f} % at epoch {result['best_epoch']}, the best in validation")
    print(f"{workdir}: config.json, metrics.jsonl, checkpoints, result.json")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
