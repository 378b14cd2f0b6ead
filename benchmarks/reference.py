"""The published algorithm of ILVR (arXiv 2512.05665), written plainly: the other side of the benchmark.

Only the amount of work follows the published code; formulas are ours where `trainer/selection.py` says that they
differ, so that both sides have the same targets, loss and gradients, and what is compared is work. Batch 1 only, as
published. What the published step computes, and therefore this one:

- stage 1: S + 1 teacher forwards over the whole sequence, one for u and one for each span, though all are the same;
  each encodes the user's images again and computes all logits. The helper images are encoded twice, by the teacher
  and, for nothing, by the student. Then the student's forward, which encodes the user's images once more.
- stage 2: a forward over the whole prefix for each latent, S * K in all, each checkpointed as a whole, and a last one
  over the whole sequence. The published trainer also runs stage 1's teacher here; its result is not used and its time
  not counted.

Shapes: T sequence, S spans, K latents a span, N candidates, D hidden.
"""

import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.checkpoint import checkpoint


def reference_stage1_step(student, teacher, batch, *, top_p: float, temperature: float, max_candidates: int = 256):
    """Loss of one sample and its targets, a list of one (K*, D) for each span.

    Args:
        student, teacher ([`ILVRForConditionalGeneration`]): only their backbones are run.
        batch (`dict`): one sample, as the trainer's collator makes it.
        top_p (`float`), temperature (`float`), max_candidates (`int`): of the selection.
    """
    with torch.no_grad():
        targets = _select_targets(teacher, batch, top_p, temperature, max_candidates)
        _encode_images(student, batch, "helper_")

    embeds, positions = _embed(student, batch)
    starts = _columns(batch, student.config.latent_start_token_id)
    latent_columns = [start + 1 + i for start, chosen in zip(starts, targets) for i in range(len(chosen))]
    values = torch.cat(targets)  # (latents in use, D)
    embeds = embeds.index_copy(1, torch.tensor(latent_columns, device=embeds.device), values.unsqueeze(0))
    states = _decode(student, embeds, positions)
    ce = _cross_entropy(student, states, batch)
    before = states[0, [column - 1 for column in latent_columns]]
    predicted = student.model.latent_head(before)
    return ce + 1 - cosine_similarity(predicted, values, dim=-1).mean(), targets


def reference_stage2_step(model, batch):
    """Loss of one sample. Each latent recomputes all that comes before it."""
    embeds, positions = _embed(model, batch)
    for column in _columns(batch, model.config.latent_pad_token_id):
        states = checkpoint(_decode, model, embeds[:, :column], positions[..., :column], use_reentrant=False)
        latent = model.model.latent_head(states[:, -1:])
        embeds = torch.cat([embeds[:, :column], latent, embeds[:, column + 1 :]], dim=1)
    states = checkpoint(_decode, model, embeds, positions, use_reentrant=False)
    return _cross_entropy(model, states, batch)


# ---------------------------------------------------------------------------------------------------- targets, stage 1


def _select_targets(teacher, batch, top_p, temperature, max_candidates) -> list[torch.Tensor]:
    ids, said = batch["input_ids"][0], batch["assistant_mask"][0]
    is_image = ids == teacher.config.image_token_id
    in_prompt = said.cumsum(0) == 0

    states = _teacher_states(teacher, batch)  # (T, D)
    prompt, image = states[in_prompt & ~is_image], states[in_prompt & is_image]
    weights = (prompt @ image.T / states.shape[-1] ** 0.5).softmax(-1).mean(0)  # (image tokens,)
    u = (weights @ image + prompt.mean(0)) / 2

    helper_features = _encode_images(teacher, batch, "helper_")
    starts, ends = (
        _columns(batch, teacher.config.latent_start_token_id),
        _columns(batch, teacher.config.latent_end_token_id),
    )
    targets, text_start = [], int(said.nonzero()[0])
    for features, start, end in zip(helper_features, starts, ends):
        states = _teacher_states(teacher, batch)
        query = [u]
        if text_start < start:
            query.append(states[text_start:start].mean(0))
        if targets:
            query.append(targets[-1].mean(0))
        query = torch.stack(query).mean(0)

        groups = features.tensor_split(max_candidates) if len(features) > max_candidates else features.split(1)
        candidates = torch.stack([group.mean(0) for group in groups])  # (N, D)
        probabilities = (cosine_similarity(candidates, query, dim=-1) / temperature).softmax(0)
        mass, chosen = 0.0, []
        for index in probabilities.argsort(descending=True).tolist()[: teacher.config.latent_size]:
            chosen.append(index)
            mass += probabilities[index].item()
            if mass >= top_p:
                break
        targets.append(candidates[chosen])
        text_start = end + 1
    return targets


def _teacher_states(teacher, batch):
    """The whole model, vision tower and logits included, for its last hidden states (T, D)."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    outputs = teacher.vlm(**{n: batch[n] for n in names}, output_hidden_states=True, use_cache=False)
    return outputs.hidden_states[-1][0]


# -------------------------------------------------------------------------------------------------- parts of a forward


def _columns(batch, token_id) -> list[int]:
    return (batch["input_ids"][0] == token_id).nonzero().flatten().tolist()


def _encode_images(model, batch, prefix=""):
    """Features of the user's or the helper images, one (N, D) each. The vision tower is frozen."""
    with torch.no_grad():
        outputs = model.vlm.model.get_image_features(
            batch[prefix + "pixel_values"], batch[prefix + "image_grid_thw"], return_dict=True
        )
    return outputs.pooler_output


def _embed(model, batch):
    """Input embeddings (1, T, D), with the features of the user's images, and positions (3, 1, T)."""
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(is_image, torch.cat(_encode_images(model, batch)))
    positions, _ = model.vlm.model.get_rope_index(
        ids,
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    return embeds, positions


def _decode(model, embeds, positions):
    decoder = model.vlm.model.language_model
    return decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


def _cross_entropy(model, states, batch):
    logits = model.get_output_embeddings()(states[0]).float()  # all T columns, as published
    return cross_entropy(logits, batch["shift_labels"][0])
