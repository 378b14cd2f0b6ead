"""What all trainers of ILVR models share: whole checkpoints, exact resume, engines, the log, the card."""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ilvr.hub_cards import ILVRModelCard

from ..watching.clock import StepClock, peak_gpu_memory
from ..watching.step_log import StepLog
from .adapters import ilvr_model
from .checkpoints import CheckpointWriter, check_run, resolve_checkpoint, warn_of_earlier_run
from .optimizer_state import save_parameter_names
from .sharding import ShardingCallback, local_part, prepare_sharding


logger = logging.get_logger(__name__)

LOCK = "_run.lock"  # names that begin so are not pushed


# To a type checker the mixin is a Trainer; at run time it comes before the one that it is mixed into.
_Trainer = Trainer if TYPE_CHECKING else object


class DurableTrainer(_Trainer):
    """
    A mixin over any [`~transformers.Trainer`] of an ILVR model: `class ILVRTrainer(DurableTrainer, SFTTrainer)`.

    A run that is killed at any moment and resumed equals the run that was not. A method that keeps more than weights
    (a teacher) saves it by `save_method_state` and reads it by `load_method_state`; it logs by `record`.

    Its `args` say by `freeze_vision_tower` whether the tower is trained.
    """

    args: Any
    model: PreTrainedModel
    keeps_teacher: bool = False  # whether a second set of weights is averaged beside the trained ones

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_tokens = 0  # trained on so far, by all ranks
        self.step_logs = {training: StepLog(self.accelerator) for training in (True, False)}
        self.clock = StepClock()
        self.add_callback(self.clock)
        prepare_sharding(
            self.accelerator,
            self.student.model,
            keeps_teacher=self.keeps_teacher,
            freeze_vision_tower=self.args.freeze_vision_tower,
        )
        if self.accelerator.is_fsdp2:
            self.add_callback(ShardingCallback(self))

    @property
    def student(self) -> PreTrainedModel:
        """The ILVR model that is trained, without wrappers and adapters."""
        return ilvr_model(self.accelerator.unwrap_model(self.model))

    # ------------------------------------------------------------------------------------------- what a method adds

    def save_method_state(self, folder: str) -> None:
        """Writes what the method keeps beside weights and optimizer; called by all processes."""

    def load_method_state(self, folder: str) -> None:
        """Reads what [`save_method_state`] wrote."""

    def method_files(self) -> list[str]:
        """Names of the files that [`save_method_state`] writes, without which a run cannot go on."""
        return []

    def run_settings(self) -> dict[str, Any]:
        """What a run that resumes a checkpoint must have in common with the one that wrote it."""
        return {"latent_size": self.student.config.latent_size, "seed": self.args.seed}

    def card_settings(self) -> dict[str, Any]:
        """Rows of the card's table of settings that are the method's own."""
        return {}

    # ------------------------------------------------------------------------------------------------------ the log

    def record(self, count: int | torch.Tensor, **means: float | torch.Tensor) -> None:
        """Keeps means over `count` things of a micro-batch; the log averages over all things of all ranks."""
        self.step_logs[self.model.training].add_means(count, **means)

    def record_tokens(self, count: int | torch.Tensor) -> None:
        """Counts the tokens of a micro-batch."""
        self.step_logs[self.model.training].add_totals(tokens=count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training = self.model.training
        metrics, totals = self.step_logs[training].read()
        if metrics:
            metrics |= peak_gpu_memory(self.accelerator.device)
        if training:
            new_tokens = totals.get("tokens", 0)
            self.num_tokens += int(new_tokens)
            metrics |= self.clock.read(new_tokens) | {"num_tokens": self.num_tokens}
        logs.update({name if training else f"eval_{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    # ----------------------------------------------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Trains.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint of an earlier run, which this one then
                equals, or `True` for the newest whole one in `args.output_dir`.
            kwargs: further arguments of [`~transformers.Trainer.train`].

        Raises:
            ValueError: if the checkpoint is damaged or of a run with other settings, none is whole, or another run
                writes to `args.output_dir`.
            FloatingPointError: if the loss or a weight is no finite number.
        """
        with self._own_folder():
            if resume_from_checkpoint:
                resume_from_checkpoint = resolve_checkpoint(
                    resume_from_checkpoint, self.args.output_dir, self._files_to_resume()
                )
                check_run(resume_from_checkpoint, self.run_settings())
            elif self.args.save_strategy != "no":
                warn_of_earlier_run(self.args.output_dir)
            try:
                return super().train(resume_from_checkpoint, **kwargs)
            except KeyboardInterrupt:
                if self.is_world_process_zero():
                    logger.warning(
                        f"Stopped at step {self.state.global_step}. `train(resume_from_checkpoint=True)` goes on from "
                        f"the newest whole checkpoint in {self.args.output_dir}, if one was saved."
                    )
                raise

    @contextmanager
    def _own_folder(self) -> Generator[None]:
        """Two runs that save to one folder would mix their checkpoints."""
        saves = self.args.should_save and self.args.save_strategy != "no"
        if saves:
            os.makedirs(self.args.output_dir, exist_ok=True)
        lock = FileLock(os.path.join(self.args.output_dir, LOCK), timeout=0) if saves else nullcontext()
        try:
            lock.__enter__()
        except Timeout as error:
            raise ValueError(
                f"Another run writes to {self.args.output_dir}. Wait for its end, or choose another output_dir."
            ) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.start()  # the first thing of a step: waiting for data counts
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            loss = super().training_step(model, *args, **kwargs)
        except (ValueError, RuntimeError) as error:
            # A backbone finds its image tokens by comparing embeddings, and NaN equals nothing, itself included.
            weights = ((name, local_part(weight)) for name, weight in model.named_parameters())
            broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
            if broken is None:
                raise
            raise self._not_finite(f"The weight {broken}") from error
        if not loss.isfinite():  # `Trainer` reads it in any case
            raise self._not_finite(f"The loss ({loss.item()})")
        return loss

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} is not finite at step {self.state.global_step + 1}. Go on from an older checkpoint with a lower "
            "learning_rate or max_grad_norm, or look for the sample that breaks it."
        )

    # -------------------------------------------------------------------------------------------- saving and resume

    def _files_to_resume(self) -> list[str]:
        files = self.method_files()
        if not (self.args.save_only_model or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            files = [*files, "optimizer.pt", "scheduler.pt", "rng_state*.pth"]
        return files

    def _run_epoch(self, **kwargs: Any):
        # Trainer takes one step too many when it resumes a run that has taken all of its `max_steps` mid-epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.model.train()
            self._load_rng_state(kwargs["resume_from_checkpoint"])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any):
        folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with CheckpointWriter(self, folder, self.run_settings()) as self._checkpoint_writer:
            self.save_method_state(folder)
            if self.args.should_save and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                save_parameter_names(self.accelerator.unwrap_model(self.model), self.optimizer, folder)
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        self._checkpoint_writer.finish()
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_method_state(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any):
        # Trainer warns of weights that a checkpoint lacks, and goes on from whatever they were.
        tied = set(self.model._keys_to_ignore_on_save or ()) | set(self.model.all_tied_weights_keys)
        missing = sorted(set(load_result.missing_keys) - tied)
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the model, {missing[0]} first. It is of another "
                "model: resume with the one that it was made with."
            )
        super()._issue_warnings_after_load(load_result)

    # The sums since the last line of the log are saved with the random states, by each process its own.

    def _running_log(self, folder: str) -> Path:
        return Path(folder, f"running_log_{self.args.process_index}.json")

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        state = {
            "loss": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "tokens": self.num_tokens,
            "log": self.step_logs[True].state_dict(),
            "clock": self.clock.state_dict(),
        }
        self._running_log(output_dir).write_text(json.dumps(state), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str):
        super()._load_rng_state(checkpoint)
        file = self._running_log(checkpoint)
        if not file.is_file():  # of another trainer, or of fewer processes: the sums start anew, as Trainer's do
            return
        state = json.loads(file.read_text(encoding="utf-8"))
        self._tr_loss = torch.tensor(state["loss"], device=self.args.device)
        self._globalstep_last_logged = state["last_logged_step"]
        self.num_tokens = state["tokens"]
        self.step_logs[True].load_state_dict(state["log"])
        self.clock.load_state_dict(state["clock"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled and not _internal_call else None
        if plugin is None:
            super().save_model(output_dir, _internal_call)
            return
        # With sharded checkpoints Trainer would save nothing here (huggingface/transformers, `Trainer.save_model`).
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(kind)

    # ------------------------------------------------------------------------------------------------------ the card

    def model_card(self, model_name: str | None = None) -> ILVRModelCard:
        """The card that every saved checkpoint carries; add results and save it again when there are some."""
        args, config = self.args, self.student.config
        training = {
            "optimizer steps": self.state.global_step,
            "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning rate": args.learning_rate,
            "vision tower": "frozen" if args.freeze_vision_tower else "trained",
            "seed": args.seed,
            **self.card_settings(),
        }
        return ILVRModelCard(
            model_name=model_name or os.path.basename(os.path.normpath(args.output_dir)),
            latent_size=config.latent_size,
            repo_id=self.hub_model_id,
            base_model=config.vlm_config._name_or_path or None,
            training=training if self.state.global_step else None,
            is_adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
        )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            card = self.model_card(model_name)
            card.dataset = dataset_name
            card.save(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if folder == self.args.output_dir:  # what `push_to_hub` uploads: a pickle runs code when it is read
                Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
                self.student.config.save_pretrained(folder)  # an adapter does not say how many latents a span has
            self.model_card().save(folder)
