"""What `Trainer` and TRL have summed up since the last line of the log: kept in checkpoints, so that a run which is
resumed between two lines logs the same next line."""

import json
import os

import torch


def _file(trainer, folder: str) -> str:
    return os.path.join(folder, f"running_log_{trainer.args.process_index}.json")


def save_running_log(trainer, folder: str):
    """Writes this process's sums; also TRL's count of tokens, which it starts anew otherwise."""
    sums = {
        "loss": trainer._tr_loss.item(),
        "last_logged_step": trainer._globalstep_last_logged,
        "metrics": trainer._metrics["train"],
        "tokens": trainer._total_train_tokens,
    }
    with open(_file(trainer, folder), "w", encoding="utf-8") as file:
        json.dump(sums, file)


def load_running_log(trainer, folder: str):
    """Restores them; a checkpoint without them, or of fewer processes, starts them anew as `Trainer` does."""
    if not os.path.isfile(_file(trainer, folder)):
        return
    with open(_file(trainer, folder), encoding="utf-8") as file:
        sums = json.load(file)
    trainer._tr_loss = torch.tensor(sums["loss"], device=trainer.args.device)
    trainer._globalstep_last_logged = sums["last_logged_step"]
    trainer._metrics["train"].update(sums["metrics"])
    trainer._total_train_tokens = sums["tokens"]
