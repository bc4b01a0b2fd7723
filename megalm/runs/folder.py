"""What lies in a run's folder, ``runs/<run.name>/``: the name of every file and folder in it. No torch.

config.yaml                the resolved config of the newest start
attempts/N.yaml            the resolved config of start N
metrics.jsonl              the record: a row per start, step, validation and checkpoint
checkpoints/step-00000200  the complete checkpoints
tokenizer.json             the tokenizer of the data, and its settings beside it
logs/rank-0.log            what each rank wrote
asked/logs/rank-0.log      what each rank of a launcher wrote while the model was asked (generate, evaluate)
tensorboard/, wandb/       what those loggers keep; wandb_id is the run's id there
loss.png                   the loss curve, drawn when the run ends
layout_certificate.json    what ``megalm verify`` found
results/                   what ``megalm evaluate --task`` found: a .json of each result, a .jsonl of its items
"""

from __future__ import annotations

from pathlib import Path

from megalm.checkpoint.store import CHECKPOINTS_FOLDER
from megalm.config.compose import CONFIG_FILE
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE
from megalm.launch.logs import LOGS_FOLDER

ASKED_FOLDER = "asked"
ATTEMPTS_FOLDER = "attempts"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id"
LOSS_CURVE_FILE = "loss.png"
CERTIFICATE_FILE = "layout_certificate.json"
RESULTS_FOLDER = "results"

__all__ = [
    "ASKED_FOLDER",
    "ATTEMPTS_FOLDER",
    "CERTIFICATE_FILE",
    "CHECKPOINTS_FOLDER",
    "CONFIG_FILE",
    "LOGS_FOLDER",
    "LOSS_CURVE_FILE",
    "METRICS_FILE",
    "RESULTS_FOLDER",
    "TENSORBOARD_FOLDER",
    "TOKENIZER_FILE",
    "WANDB_ID_FILE",
    "run_folder_of",
]


def run_folder_of(run: str | Path) -> Path:
    """The folder of a run that is given as one, or by its name where that is no folder but ``runs/NAME`` is."""
    folder, by_name = Path(run), Path("runs") / run
    return by_name if not folder.exists() and by_name.is_dir() else folder
