"""What is said of settings before a run starts."""

import pytest
import torch
from helpers import make_trainer


X86, WITH_BF16, ARM = {"avx512_f": True, "avx512_bf16": False}, {"avx512_bf16": True}, {"neon": True, "bf16": True}


@pytest.mark.parametrize(
    ("capabilities", "dtype", "bf16", "remedies"),
    [
        (X86, torch.float32, True, ["bf16=False"]),
        (X86, torch.bfloat16, False, ["dtype=torch.float32"]),
        (X86, torch.bfloat16, True, ["bf16=False", "dtype=torch.float32"]),
        (X86, torch.float32, False, []),
        (WITH_BF16, torch.bfloat16, True, []),
        ({"amx_bf16": True}, torch.float32, True, []),
        (ARM, torch.float32, True, []),
    ],
)
def test_bf16_on_a_cpu_without_it_is_warned_of(
    model, processor, tmp_path, monkeypatch, capabilities, dtype, bf16, remedies
):
    messages = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("ilvr.trainer.running.checks.logger.warning_once", messages.append)
    make_trainer(model.to(dtype), processor, tmp_path, bf16=bf16)
    assert len(messages) == bool(remedies)
    for remedy in ("bf16=False", "dtype=torch.float32"):
        assert any(remedy in message for message in messages) == (remedy in remedies)
