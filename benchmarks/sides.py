"""The sides of each comparison: our step, its floor and the published algorithm, as functions without arguments.

A floor is the least that anybody who computes the same must compute, on the plain backbone.
"""

import copy
import time

import torch
from datasets import Dataset, Image, List
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ilvr.data import prompt_of
from ilvr.evaluation import Evaluator, Questions, run_controls
from ilvr.evaluation.controls import REPORTED
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer, make_prompts

from .model import Workload, load, make_batch, make_sample, make_trainer, whole_teacher
from .reference import reference_stage1_step, reference_stage2_step


# Latents in parallel: two refinements and, in stage 2, the gradient through the last of them.
PARALLEL = {"jacobi_iterations": 2, "jacobi_gradient_iterations": 1}


def stage_sides(folder, workload, stage: int) -> dict:
    """`ours`, `floor` and, for one sample, `reference`; each computes gradients, drops them, and returns its loss.

    Stage 1 has `cached` beside, ours with `cache_images`; stage 2 `parallel`, ours with `PARALLEL`.
    """
    model, processor = load(folder, workload.latents)
    trainer = make_trainer(model, processor, workload, stage, folder)
    batch = make_batch(trainer)
    teacher = whole_teacher(trainer) if stage == 1 else None

    def step(loss_function):
        def run() -> float:
            loss = loss_function()
            loss.backward()
            model.zero_grad()
            return loss.item()

        return run

    def reference():
        if stage == 2:
            return reference_stage2_step(model, batch)
        selection = {"top_p": trainer.args.selection_top_p, "temperature": trainer.args.selection_temperature}
        return reference_stage1_step(model, teacher, batch, **selection)[0]

    sides = {
        "ours": step(lambda: trainer.compute_loss(model, batch)),
        "floor": step(lambda: _floor(model, batch, teacher)),
    }
    if stage == 2:
        parallel = copy.copy(trainer)
        parallel.args = copy.copy(trainer.args)
        vars(parallel.args).update(PARALLEL)
        sides["parallel"] = step(lambda: parallel.compute_loss(model, batch))
    elif workload == Workload(spans=workload.spans):
        cached = make_batch(make_trainer(model, processor, workload, stage, folder, cache_images=True))
        sides["cached"] = step(lambda: trainer.compute_loss(model, cached))
    if workload.batch == 1 and workload.tokens == Workload.tokens:
        sides["reference"] = step(reference)
    return sides


def _floor(model, batch, teacher=None):
    """Vision once, one forward of the student's backbone; with a teacher, its forward and the helper images too."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    inputs = {name: batch[name] for name in names} | {"use_cache": False}
    with torch.no_grad():
        core = model.vlm.model
        features = core.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
        inputs["mm_encoder_outputs"] = {"image": features}
        if teacher is not None:
            core.get_image_features(batch["helper_pixel_values"], batch["helper_image_grid_thw"], return_dict=True)
            teacher.vlm.model(**inputs)
    columns = (batch["shift_labels"] != -100).any(0).nonzero().flatten()
    logits = model.vlm(**inputs, logits_to_keep=columns).logits
    return cross_entropy(logits.flatten(0, 1), batch["shift_labels"][:, columns].flatten())


class Script(LogitsProcessor):
    """Makes `generate` say given ids, one row (T,) for all or (B, T), so that both sides take the same steps, spans
    included."""

    def __init__(self, prompt_length: int, ids: torch.Tensor):
        self.prompt_length, self.ids = prompt_length, ids

    def __call__(self, input_ids, scores):
        ids = self.ids[..., input_ids.shape[1] - self.prompt_length].expand(len(scores))
        return torch.full_like(scores, -torch.inf).scatter_(1, ids.unsqueeze(1), 0.0)


def split_at_answer(batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of `generate` for the prompts of a batch, all as long as the first, and the first row's answer `(T,)`."""
    length = int((batch["assistant_mask"][0].cumsum(0) == 0).sum())
    prompt = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return prompt | {name: batch[name] for name in ("pixel_values", "image_grid_thw")}, batch["input_ids"][0, length:]


def generation_sides(folder, workload, num_steps: int) -> dict:
    """`ours` and `backbone` write the sample's answer, `num_steps` tokens of it; `…, 1 step` is mostly the prompt.

    `static` is ours with a static cache, `parallel` ours with the latents of each span at once.
    """
    model, processor = load(folder, workload.latents)
    trainer = make_trainer(model, processor, workload, 2, folder)
    (prompt, answer), model = split_at_answer(make_batch(trainer)), model.eval()
    script = LogitsProcessorList([Script(prompt["input_ids"].shape[1], answer)])

    def side(generator, steps, **options):
        options |= {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "logits_processor": script}
        return lambda: generator.generate(**prompt, **options)

    both = {"ours": model, "backbone": model.vlm}
    sides = {name: side(generator, num_steps) for name, generator in both.items()}
    sides["static"] = side(model, num_steps, cache_implementation="static")
    sides["parallel"] = side(model, num_steps, jacobi_iterations=PARALLEL["jacobi_iterations"])
    return sides | {f"{name}, 1 step": side(generator, 1) for name, generator in both.items()}


def evaluation_sides(folder, workload, num_steps: int) -> dict:
    """A batch of questions, answered with the same words: `generate` alone, `evaluate`, and `controls` beside it.

    `evaluate` is an `Evaluator`, which opens the images, reads the answers and scores them; `controls` are its run and
    those under `REPORTED`, which is what a training run reports.
    """
    model, processor = load(folder, workload.latents)
    _, answer = split_at_answer(make_batch(make_trainer(model, processor, workload, 2, folder)))
    generate = model.eval().generate

    def scripted(**inputs):
        script = LogitsProcessorList([Script(inputs["input_ids"].shape[1], answer)])
        return generate(**inputs, logits_processor=script)

    model.generate = scripted
    rows = [{**make_sample(workload, processor), "answer": "Up"}] * workload.batch
    dataset = Dataset.from_list(rows).cast_column("images", List(Image()))
    options = {"max_new_tokens": num_steps, "min_new_tokens": num_steps, "do_sample": False}
    evaluator = Evaluator(model, processor, Questions.of_dataset(dataset), batch_size=workload.batch, **options)
    inputs = processor.apply_chat_template(
        [prompt_of(row) for row in dataset],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    return {
        "generate": lambda: model.generate(**inputs, **options),
        "evaluate": evaluator.run,
        "controls": lambda: run_controls(evaluator, REPORTED),
    }


def grpo_sides(folder, workload, num_steps: int) -> dict:
    """`rollout` and `step` of `ours`, and of `trl`: its own trainer on the backbone, with as many columns a row.

    Both write the sample's answer, `num_steps` tokens of it. What are spans to ours are words to TRL's. A rollout has
    its rewards in it; a step is the loss with its gradients.
    """
    return {
        f"{name}, {part}": run
        for name, config in (("ours", ILVRGRPOConfig), ("trl", GRPOConfig))
        for part, run in _grpo_side(folder, workload, num_steps, config).items()
    }


def _grpo_side(folder, workload, num_steps: int, config: type) -> dict:
    model, processor = load(folder, workload.latents)
    _, answer = split_at_answer(make_batch(make_trainer(model, processor, workload, 2, folder)))
    sample = {**make_sample(workload, processor), "answer": ""}
    rows = make_prompts(Dataset.from_list([sample] * workload.batch).cast_column("images", List(Image())))
    model.vlm.model.visual.requires_grad_(False)
    kind, policy = (ILVRGRPOTrainer, model) if config is ILVRGRPOConfig else (GRPOTrainer, model.vlm)
    args = config(
        str(folder / "grpo"),
        per_device_train_batch_size=workload.batch,
        num_generations=workload.batch,
        max_completion_length=num_steps,
        gradient_accumulation_steps=1,
        activation_checkpointing=False,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = kind(policy, _by_number, args, train_dataset=rows, processing_class=processor)
    trainer.current_gradient_accumulation_steps = 1
    generate = policy.generate

    def scripted(**inputs):
        script = Script(inputs["input_ids"].shape[1], answer)
        processors = LogitsProcessorList([*inputs.pop("logits_processor", []), script])
        return generate(**inputs, logits_processor=processors)

    def roll_out():
        policy.generate = scripted  # anew, since our trainer puts the class's back
        policy.train()
        return trainer._generate_and_score_completions(list(rows))

    completions = roll_out()
    if (completions["completion_mask"].sum(1) != num_steps).any():
        raise ValueError(f"{kind.__name__} wrote fewer than {num_steps} tokens, so that its time says nothing.")

    def step():
        trainer.compute_loss(policy, dict(completions)).backward()
        policy.zero_grad()

    return {"rollout": roll_out, "step": step}


def _by_number(completions, **kwargs) -> list[float]:
    """Rewards that differ: where all are the same, there is no gradient."""
    return [float(i) for i in range(len(completions))]


def text_sides(folder, workload) -> dict:
    """A forward over words alone."""
    model, processor = load(folder, workload.latents)
    model.eval()
    ids = processor.tokenizer(" Right Down Left Up" * (workload.tokens // 4), return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)

    def side(module):
        def run():
            with torch.no_grad():
                module(input_ids=ids, use_cache=False)

        return run

    return {"ours": side(model), "backbone": side(model.vlm)}


class _StepTimer(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(time.perf_counter() - self.start)


def training_run(folder, workload, stage: int, num_steps: int, **settings) -> dict:
    """A run of `num_steps` optimizer steps: its wall time and the time of each step, teacher's update included."""
    model, processor = load(folder, workload.latents)
    trainer = make_trainer(
        model, processor, workload, stage, folder, copies=num_steps, max_steps=num_steps, **settings
    )
    timer = _StepTimer()
    trainer.add_callback(timer)  # after the teacher's own
    start = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "steps": timer.steps}
