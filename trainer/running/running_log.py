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
        "metrics": {name: pair.tolist() for name, (pair,) in trainer._metrics["train"].items()},
        "tokens": trainer._total_train_tokens,
        "seconds": trainer.clock.seconds,
        "steps": trainer.clock.steps,
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
    metrics = {name: [torch.tensor(pair, device=trainer.args.device)] for name, pair in sums["metrics"].items()}
    trainer._metrics["train"].update(metrics)
    trainer._total_train_tokens = sums["tokens"]
    trainer.clock.seconds, trainer.clock.steps = sums["seconds"], sums["steps"]
