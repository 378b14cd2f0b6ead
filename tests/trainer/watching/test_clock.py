"""Time and memory of steps."""

import pytest
import torch
from helpers import make_trainer

from ilvr.trainer.watching.clock import StepClock, peak_gpu_memory


def test_clock_counts_steps_and_not_what_lies_between(monkeypatch):
    now = iter([0.0, 2.0, 100.0, 104.0])  # start and end of two steps, with a long evaluation in between
    monkeypatch.setattr("ilvr.trainer.watching.clock.time.perf_counter", lambda: next(now))
    clock = StepClock()
    for _ in range(2):
        clock.start()
        clock.on_step_end(None, None, None)
    assert clock.read(60) == {"step_time": 3.0, "tokens_per_second": 10.0}
    assert clock.read(0) == {}


def test_gpu_memory_is_the_peak_since_the_last_log(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    assert peak_gpu_memory(torch.device("cuda")) == {"gpu_memory_gib": 1.5} and len(resets) == 1
    assert peak_gpu_memory(torch.device("cpu")) == {} and len(resets) == 1


@pytest.mark.gpu
def test_gpu_memory_is_logged(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path, max_steps=1, use_cpu=False)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["gpu_memory_gib"] < 2
