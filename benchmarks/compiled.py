"""Time of a compiled one-token step of `generate`, beside the eager one and beside the backbone's own.

    python -m benchmarks.compiled

A static cache, `torch.compile(fullgraph=True)` by transformers' own `CompileConfig`, and rows that go through words
and spans in different phases. The backbone writes the same ids, to which latents are words.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import CompileConfig, LogitsProcessorList

from . import measure
from .model import Workload, build_backbone, load, make_batch, make_trainer
from .sides import Script, split_at_answer


NUM_TOKENS = 97


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="that are generated")
    options = parser.parse_args()
    measure.prepare(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        build_backbone(Path(folder))
        for batch in (1, 8):
            print("\n".join(compare(Path(folder), Workload(batch=batch), options)), flush=True)


def compare(folder: Path, workload: Workload, options) -> list[str]:
    """Lines of a table: tokens a second of each side, and its time over that of the backbone's same side."""
    sides = generation_sides(folder, workload, options.tokens)
    times = measure.alternate(sides, rounds=options.rounds)  # its warm-up compiles
    steps = {
        name: [a - b for a, b in zip(times[name]["seconds"], times[f"{name}, 1 token"]["seconds"])]
        for name in sides
        if not name.endswith("1 token")
    }
    lines = []
    for name, seconds in steps.items():
        rate = workload.batch * (options.tokens - 1) / sorted(seconds)[len(seconds) // 2]
        other = steps[name.replace("ours", "backbone")]
        lines.append(f"| {workload.batch} | {name} | {rate:.1f} | {measure.ratio(seconds, other):.3f} |")
    return lines


def generation_sides(folder: Path, workload: Workload, num_tokens: int) -> dict:
    """`ours` and `backbone`, each `eager` and `compiled`, write `num_tokens` tokens, or one, which is the prompt."""
    model, processor = load(folder, workload.latents)
    prompt, answer = split_at_answer(make_batch(make_trainer(model, processor, workload, 2, folder)))
    model, length = model.eval(), prompt["input_ids"].shape[1]
    # Each row is a word behind the one before.
    late = [torch.cat([answer[:1].expand(row), answer])[: len(answer)] for row in range(workload.batch)]
    script = LogitsProcessorList([Script(length, torch.stack(late))])
    compiled = CompileConfig(fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True  # transformers compiles on accelerators alone, else
    kinds = {"eager": {"disable_compile": True}, "compiled": {"compile_config": compiled}}

    def side(generator, tokens, kind):
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "logits_processor": script}
        options |= {"cache_implementation": "static", "max_cache_len": length + num_tokens}
        return lambda: generator.generate(**prompt, **options, **kinds[kind])

    return {
        f"{name}, {kind}{more}": side(generator, tokens, kind)
        for name, generator in {"ours": model, "backbone": model.vlm}.items()
        for kind in kinds
        for tokens, more in ((num_tokens, ""), (1, ", 1 token"))
    }


if __name__ == "__main__":
    main()
