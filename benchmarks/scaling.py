"""Arithmetic from the measured model to Qwen2.5-VL-7B on 8 GPUs: operations, bytes, and the ceilings they run into.

    python -m benchmarks.scaling    # after make bench; writes docs/scaling.md

Nothing here is measured on a GPU. What the arithmetic needs from measurements is read from docs/performance.json.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from .model import WORDS_BETWEEN_SPANS
from .report import CENTRE, varied
from .sides import PARALLEL


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen2.5-VL; one image has `image_tokens` after merging four patches into one."""

    hidden: int
    layers: int
    intermediate: int
    key_value: int  # width of all keys of a token
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    vision_intermediate: int
    image_tokens: int = 256

    @property
    def decoder(self) -> int:
        """Parameters of the decoder's matrices."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.key_value
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    def forward(self, tokens: int) -> float:
        """FLOPs of the decoder over one sequence, causal attention included."""
        return 2 * self.decoder * tokens + 2 * self.layers * tokens**2 * self.hidden

    def image(self) -> float:
        """FLOPs of the vision tower and merger over one image."""
        patches, merged = 4 * self.image_tokens, 4 * self.vision_hidden
        matrices = self.vision_layers * (4 * self.vision_hidden**2 + 3 * self.vision_hidden * self.vision_intermediate)
        attention = 4 * self.vision_layers * patches**2 * self.vision_hidden
        return 2 * matrices * patches + attention + 2 * self.image_tokens * merged * (merged + self.hidden)


SMALL = Sizes(512, 8, 2048, 512, 297, 256, 4, 512)
LARGE = Sizes(3584, 28, 18944, 512, 152064, 1280, 32, 3420)
PARAMETERS = 8.29e9  # of Qwen2.5-VL-7B, all parts
TRAINED = 7.62e9  # without the vision tower and merger
H100 = {"flops": 989e12, "bytes": 3.35e12, "memory": 80e9}  # bf16 without sparsity, SXM data sheet
FRACTION = 0.4  # of a GPU's peak that training of this size commonly reaches; an assumption


def stage1(m: Sizes, S: int, T: int) -> dict[str, float]:  # noqa: N803
    """FLOPs of a sample, gradients included: backward counts two forwards."""
    ours = (S + 1) * m.image() + 4 * m.forward(T)
    images = (S + 2) + 2 * S  # the user's S + 2 times, each helper image twice
    published = images * m.image() + (S + 4) * (m.forward(T) + 2 * m.head * T)  # S + 1 forwards, and 3 with a gradient
    return {"ours": ours, "published": published}


def stage2(m: Sizes, S: int, K: int, T: int) -> dict[str, float]:  # noqa: N803
    """FLOPs of a sample, and the bytes of weights that narrow forwards and backwards read.

    The walk reads them twice a latent. In parallel, each refinement computes the columns of the spans and of the words
    between them, with the gradient three times, and reads the weights once in each direction.
    """
    prefix = T * 0.9  # mean length of the prefixes: the spans stand in the last part of a sequence
    published = m.image() + 4 * (S * K * m.forward(round(prefix)) + m.forward(T))
    ours = m.image() + 3 * m.forward(T)
    iterations, with_gradient = PARALLEL.values()
    forwards = iterations + 2 * with_gradient
    refined = S * (K + 2 + WORDS_BETWEEN_SPANS)
    return {
        "ours": ours,
        "published": published,
        "parallel": ours + forwards * 2 * m.decoder * refined,
        "reads": 2 * S * K * 2 * m.decoder,
        "parallel reads": (iterations + with_gradient) * 2 * m.decoder,
    }


def page(results: dict) -> str:
    S, K, T = (CENTRE[name] for name in ("spans", "latents", "tokens"))  # noqa: N806
    ceilings = results["ceilings"]
    rows = {stage: next(r for r in varied(results["rows"], stage, "spans") if r["spans"] == S) for stage in (1, 2)}
    seconds = {stage: statistics.median(row["times"]["ours"]["seconds"]) for stage, row in rows.items()}
    small1, small2 = stage1(SMALL, S, T), stage2(SMALL, S, K, T)
    lines = [
        "# To 7B on 8 GPUs, by arithmetic",
        "",
        "Measured: the small model's steps and the ceilings of the machine in performance.md. "
        f"Stage 1 computes {small1['ours'] / 1e9:.0f} GFLOP in {seconds[1]:.2f} s, "
        f"{small1['ours'] / seconds[1] / ceilings['flops']:.0%} of the matrix-product ceiling. "
        f"Stage 2 computes {small2['ours'] / 1e9:.0f} GFLOP and reads {2 * small2['reads'] / 1e9:.1f} GB of fp32 "
        f"weights, {small2['ours'] / ceilings['flops']:.2f} s and {2 * small2['reads'] / ceilings['bytes']:.2f} s at "
        f"the ceilings, in {seconds[2]:.2f} s.",
        "",
        f"Computed, all that follows: Qwen2.5-VL-7B, bf16, {S} spans of {K}, {T} tokens, {LARGE.image_tokens} tokens "
        f"an image, an H100's data sheet ({H100['flops'] / 1e12:.0f} TFLOP/s, {H100['bytes'] / 1e12:.2f} TB/s) and "
        f"{FRACTION:.0%} of its FLOP/s reached, which is assumed.",
        "",
        "| batch on a GPU | stage 1, s | published / ours | stage 2: FLOPs, s | weight reads, s | over the floor | "
        "published / ours | in parallel: s | over the floor |",
        "|" + "---|" * 9,
    ]
    speed, one, two = FRACTION * H100["flops"], stage1(LARGE, S, T), stage2(LARGE, S, K, T)
    for batch in (1, 2, 4, 8, 16):
        compute, reads = batch * two["ours"] / speed, two["reads"] / H100["bytes"]
        parallel = batch * two["parallel"] / speed + two["parallel reads"] / H100["bytes"]
        lines.append(
            f"| {batch} | {batch * one['ours'] / speed:.2f} | {one['published'] / one['ours']:.1f} | {compute:.2f} | "
            f"{reads:.2f} | {(compute + reads) / compute:.2f} | "
            f"{batch * two['published'] / speed / (compute + reads):.0f} | {parallel:.2f} | {parallel / compute:.2f} |"
        )
    sharded = (2 + 2 + 12) * TRAINED / 8 + 2 * (PARAMETERS - TRAINED)
    teacher = 4 * (TRAINED - LARGE.head) / 8  # its hidden states are read, not its words
    cuts = LARGE.layers * 2 * LARGE.key_value * 2 * T * S * K / 2
    lines += [
        "",
        "The floor is one forward and backward. A latent reads all weights for one column a sample, so the walk is "
        "bound by memory until a batch is large: rows of a batch share the reads, because the collator puts their "
        "spans in the same columns. Gradients of weights are taken to be made once, not at each latent. In parallel: "
        f"{PARALLEL['jacobi_iterations']} Jacobi iterations, the gradient through "
        f"{PARALLEL['jacobi_gradient_iterations']} ([error](parallel_latents.md)). Gradient "
        "checkpointing adds one forward to each side. Neither communication nor launches are counted, and launches "
        "bind the walk at batch 1: [on an H100](gpu.md) it takes 31 times its floor, with 3B.",
        "",
        "| bytes on each of 8 GPUs | GB |",
        "|---|---|",
        f"| bf16 weights and gradients, fp32 master weights and Adam, sharded over 8 | {sharded / 1e9:.0f} |",
        f"| stage 1's teacher, fp32, sharded over 8 (FSDP2; whole on each process with DDP: {8 * teacher / 1e9:.0f}) "
        f"| {teacher / 1e9:.1f} |",
        f"| activations of a sample without checkpointing, {T} tokens (34 bytes a token, layer and width) | "
        f"{34 * LARGE.layers * LARGE.hidden * T / 1e9:.1f} |",
        f"| keys and values of a sample in the walk, one copy | {LARGE.layers * 4 * LARGE.key_value * T / 1e9:.2f} |",
        f"| the same, one copy for each latent | {cuts / 1e9:.2f} |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    Path("docs/scaling.md").write_text(page(json.loads(Path("docs/performance.json").read_text())))
