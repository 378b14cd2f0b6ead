"""Publishing: the card, and push and load with the real client against a local server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from helpers import NO_ILVR, encode, make_sample, make_trainer
from hub_server import HubServer
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig

from ilvr.hub_cards import ILVRModelCard, Result


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_card_of_measured_results():
    card = ILVRModelCard(
        model_name="ilvr-7b",
        latent_size=8,
        repo_id="lab/ilvr-7b",
        base_model="Qwen/Qwen2.5-VL-7B-Instruct",
        training={"stage": 2, "learning rate": 1e-5},
        results=[Result("FrozenLake planning 3x3", "end_on_goal", 0.815, 400, 0.774, 0.85), Result("x", "y", 0.5, 2)],
    ).render()
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (
        "| FrozenLake planning 3x3 | end_on_goal | 81.5 % | 77.4 – 85.0 % | 400 |\n| x | y | 50.0 % |  | 2 |"
        in card.text
    )
    assert "| learning rate | 1e-05 |" in card.text and '"lab/ilvr-7b", trust_remote_code=True' in card.text
    matter = front_matter(str(card))
    assert matter["pipeline_tag"] == "image-text-to-text" and "license" not in matter
    assert matter["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.815


def test_card_of_a_model_whose_latents_were_replaced():
    """In a table of the text, and not among the results that the Hub reads."""
    card = ILVRModelCard(
        model_name="m",
        latent_size=2,
        results=[Result("Shifts", "accuracy", 0.9, 500, 0.88, 0.92)],
        controls=[Result("own latents", "accuracy", 0.9, 300), Result("zeros", "accuracy", 0.1, 300, 0.05, 0.15)],
    ).render()
    assert (
        "| own latents | accuracy | 90.0 % |  | 300 |\n| zeros | accuracy | 10.0 % | 5.0 – 15.0 % | 300 |" in card.text
    )
    assert "in the second table above" in card.text and "an open question" not in card.text
    assert len(front_matter(str(card))["model-index"][0]["results"]) == 1
    assert "an open question" in ILVRModelCard(model_name="m", latent_size=2).render().text


def test_results_keep_their_names_on_the_hub():
    """huggingface_hub reads two results of one data set, config and split as one, under the name of the first."""
    results = [
        Result(
            f"Planning {size}", "end_on_goal", value, 9, dataset="Planning", dataset_config=size, dataset_split="test"
        )
        for size, value in (("3x3", 0.9), ("4x4", 0.5))
    ]
    results += [Result("Counting", "accuracy", 0.3, 9), Result("Naming", "accuracy", 0.4, 9)]
    matter = front_matter(str(ILVRModelCard(model_name="m", latent_size=2, results=results).render()))
    _, read = model_index_to_eval_results(matter["model-index"])
    assert {(r.task_name, r.metric_value) for r in read} == {(r.task, r.value) for r in results}
    assert (read[1].dataset_name, read[1].dataset_config, read[1].dataset_split) == ("Planning", "4x4", "test")
    assert {r.dataset_type for r in read} == {"unknown"}  # none of them is on the Hub


def test_card_of_an_adapter():
    card = ILVRModelCard(
        model_name="a", latent_size=2, repo_id="lab/a", base_model="none/such", license="mit", is_adapter=True
    ).render()
    assert card.data.library_name == "peft" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.license == "mit" and "pip install ilvr" in card.text and "trust_remote_code" not in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'ILVRForConditionalGeneration.from_pretrained("lab/a")' in code


def test_card_of_a_finetuned_model_has_the_license_of_its_base(tmp_path):
    """Read from the base model's card; nothing where there is no such card, and nothing without the Hub."""
    terms = {"license": "other", "license_name": "qwen-research", "license_link": "https://x.org/LICENSE"}
    server = HubServer()
    server.repos["lab/base"] = {"README.md": f"---\n{yaml.safe_dump(terms)}---\n# Base\n".encode()}
    server.repos["lab/bare"] = {"config.json": b"{}"}
    script = """
import json
from huggingface_hub import constants
from ilvr.hub_cards import ILVRModelCard
from ilvr.hub_cards.model_card import license_of
def show(base):
    print(json.dumps(ILVRModelCard(model_name="m", latent_size=2, base_model=base).render().data.to_dict()))
for base in ("lab/base", "lab/bare", "lab/missing", "not a repo id/at/all"):
    show(base)
license_of.cache_clear()
constants.HF_HUB_OFFLINE = True
show("lab/base")
"""
    with server as url:
        cards = [json.loads(line) for line in run_clean(script, url, tmp_path / "home").splitlines()]
    assert {name: cards[0][name] for name in terms} == terms and len(cards) == 5
    assert all(card["base_model_relation"] == "finetune" for card in cards)
    assert not any(name in card for card in cards[1:] for name in terms)


def test_card_without_results_says_so():
    text = ILVRModelCard(model_name="new", latent_size=4).render().text
    assert "Not measured yet." in text and "Not trained yet" in text and "from [" not in text


def test_every_checkpoint_has_a_card_and_its_code_runs(model, processor, tmp_path):
    trainer = make_trainer(model, processor, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in ("", "checkpoint-1", "checkpoint-2"):
        text = (tmp_path / "run" / folder / "README.md").read_text()
        assert "| selection | query_top_p, top-p 0.9, tau 0.05 |" in text and "| stage | 1 |" in text
    code = text.split("```python\n")[1].split("```")[0]
    make_sample(["x"])["images"][0].save(tmp_path / "picture.png")
    code = code.replace("max_new_tokens=256", "max_new_tokens=4").replace('"run"', repr(str(tmp_path / "run")))
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "assistant" not in done.stdout and "What happens next" not in done.stdout  # the answer, without the prompt


def run_clean(script: str, url: str, home) -> str:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def answer(image) -> str:
    """Code that prints the ids with which `model` answers a question about an image."""
    return f"""
content = [{{"type": "image", "path": {str(image)!r}}}, {{"type": "text", "text": "Plan"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def test_push_and_load_by_repo_id(model, processor, tmp_path):
    """Model, processor and card go up with `push_to_hub`; a process without `ilvr` loads them by repository id."""
    trainer = make_trainer(model, processor, tmp_path / "saved", max_steps=1)
    trainer.train()
    trainer.save_model()
    inputs = encode(processor, [make_sample(["x"])], prompt_only=True)
    image = tmp_path / "image.png"
    make_sample(["x"])["images"][0].save(image)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    server = HubServer()
    with server as url:
        run_clean(
            f"""
from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from huggingface_hub import ModelCard
folder = {str(tmp_path / "saved")!r}
ILVRForConditionalGeneration.from_pretrained(folder).push_to_hub("user/tiny-ilvr")
ILVRProcessor.from_pretrained(folder).push_to_hub("user/tiny-ilvr")
ModelCard.load(folder + "/README.md").push_to_hub("user/tiny-ilvr")
""",
            url,
            tmp_path / "pusher",
        )
        files = server.repos["user/tiny-ilvr"]
        assert {
            "model.safetensors",
            "config.json",
            "modeling_ilvr.py",
            "processing_ilvr.py",
            "README.md",
        } <= files.keys()
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
        assert b"latent visual" in files["README.md"]
        out = run_clean(
            f"""
{NO_ILVR}
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("user/tiny-ilvr", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("user/tiny-ilvr", trust_remote_code=True)
{answer(image)}
""",
            url,
            tmp_path / "loader",
        )
    assert str(expected) in out


def test_the_trainer_pushes_itself(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tests = Path(__file__).parents[1]
    script = f"""
import sys
sys.path[:0] = {[str(tests), str(tests.parent / "examples")]!r}
from datasets import Dataset, Image, List
from helpers import make_sample
from ilvr import *
from ilvr.trainer import *
folder = {str(tmp_path / "model")!r}
data = Dataset.from_list([make_sample(["Right", "Up"])] * 4).cast_column("images", List(Image()))
args = ILVRTrainingConfig({str(tmp_path / "out")!r}, max_steps=1, bf16=False, use_cpu=True, report_to="none",
    push_to_hub=True, hub_model_id="user/pushed", disable_tqdm=True, save_strategy="no")
trainer = ILVRTrainer(ILVRForConditionalGeneration.from_pretrained(folder), args, train_dataset=data,
    processing_class=ILVRProcessor.from_pretrained(folder))
trainer.train()
trainer.push_to_hub()
"""
    server = HubServer()
    with server as url:
        run_clean(script, url, tmp_path / "home")
    files = server.repos["user/pushed"]
    assert {"model.safetensors", "modeling_ilvr.py", "processor_config.json", "README.md"} <= files.keys()
    assert not any(name.endswith(".bin") for name in files)
    assert b'"user/pushed", trust_remote_code=True' in files["README.md"]


def test_an_adapter_pushes_and_loads_by_repo_id(model, processor, tmp_path):
    """What is pushed is the adapter and its processor, and in a new process it answers as the trained model does."""
    model.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(model, processor, tmp_path / "run", max_steps=1, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    image = tmp_path / "image.png"
    make_sample(["x"])["images"][0].save(image)
    inputs = encode(processor, [make_sample(["x"])], prompt_only=True)
    expected = trainer.model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    server = HubServer()
    with server as url:
        out = run_clean(
            f"""
from peft import PeftModel
from transformers import AutoProcessor
from ilvr import ILVRForConditionalGeneration
base = ILVRForConditionalGeneration.from_pretrained({str(tmp_path / "base")!r})
PeftModel.from_pretrained(base, {str(tmp_path / "run")!r}).push_to_hub("user/adapter")
AutoProcessor.from_pretrained({str(tmp_path / "run")!r}).push_to_hub("user/adapter")
base = ILVRForConditionalGeneration.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, "user/adapter").eval()
processor = AutoProcessor.from_pretrained("user/adapter", trust_remote_code=True)
{answer(image)}
""",
            url,
            tmp_path / "home",
        )
    assert str(expected) in out
    files = server.repos["user/adapter"]
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json"} <= files.keys()
    assert "model.safetensors" not in files
