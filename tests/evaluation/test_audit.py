"""The audit: its numbers by hand, its verdict rule by rule, the page, and a run over two checkpoints."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from browser import CHROMIUM, Browser
from helpers import make_image
from peft import LoraConfig, get_peft_model

from ilvr.evaluation import CONTROLS, Questions, audit, auditing
from ilvr.evaluation.audit_page import write_page
from ilvr.evaluation.audit_results import Audit, ControlResult, DonorFollowing, LatentContent, ModelAudit
from ilvr.evaluation.auditing import compare, measure_content
from ilvr.evaluation.checkpoints import score_table
from ilvr.evaluation.probes import Probe, Rate
from ilvr.evaluation.records import Record, Run
from ilvr.evaluation.statistics import Difference
from ilvr.evaluation.verdict import judge
from ilvr.tasks import load_task


def run_of(name, right, parsed=None, spans=1):
    parsed = parsed or ["x" if r else "y" for r in right]
    rows = zip(right, parsed)
    return Run(name, [Record(i, p or "", p, "x", r, spans, 5, True, 0.1) for i, (r, p) in enumerate(rows)])


def test_controls_beside_the_own_answers():
    own = run_of("own", [True] * 6 + [False] * 2)
    zeros = run_of("zeros", [False] * 8, ["y"] * 7 + [None], spans=2)
    same = run_of("no_spans", own.right, spans=0)
    questions = range(8)  # only their number counts
    found = compare(questions, {"own": own, "zeros": zeros, "no_spans": same})
    assert found["zeros"].accuracy == Rate.of(0, 8) and found["zeros"].difference.value == 0.75
    assert found["zeros"].answers_changed == 7 / 8 and found["zeros"].spans_per_sample == 2
    assert found["zeros"].without_span == 0 and found["no_spans"].without_span == 1
    assert found["zeros"].p_value == 2 / 64 and found["zeros"].p_adjusted == 4 / 64 and not found["zeros"].falls
    assert found["no_spans"].difference == (0, 0, 0) and found["no_spans"].answers_changed == 0


def test_what_latents_hold():
    """Two spans of one sample and one of another; the third latent is nearest to a wrong patch."""
    picture = torch.eye(3) * 2
    latents = [torch.tensor([[[5.0, 1, 0]], [[0, 0, 5]]]), torch.tensor([[[4.0, 0, 3]], [[1, 1, 1]]])]
    found = measure_content(latents, [[picture, picture], [picture]], patches=[[[0], [2]], [[1]]])
    assert found.retrieval_at_1 == Rate.of(2, 3) and found.patches == 3
    assert found.retrieval_by_span == [Rate.of(1, 2), Rate.of(1, 1)]
    assert found.feature_norm == 2 and found.norm == pytest.approx((26**0.5 + 5 + 5 + 3**0.5) / 4)
    assert found.norm_ratio == found.norm / 2 and found.probe.trained_on + found.probe.accuracy.count == 3
    assert found.ceiling.trained_on == found.probe.trained_on
    targets = [torch.full((1, 1, 3), 3.0)]
    assert measure_content(latents, [[picture], []], targets).feature_norm == pytest.approx(27**0.5)
    assert measure_content([torch.zeros(0, 1, 3)], [[]]) == LatentContent()


def test_each_latent_is_compared_with_its_own_patch():
    """Two of three that should hold something do; where nothing was selected there is nothing to find."""
    picture = torch.eye(4)
    found = measure_content([torch.stack([picture[[2, 3, 0, 1]]])], [[picture]], patches=[[[2, 0, 0, -1]]])
    assert found.retrieval_at_1 == Rate.of(2, 3)


def test_the_ceiling_of_the_probe():
    """Latents that are all alike hold nothing; the patches themselves say which they are."""
    picture = torch.eye(4)
    patches = [[[i % 4] * 2] for i in range(40)]
    found = measure_content([torch.ones(1, 2, 4)] * 40, [[picture]] * 40, patches=patches)
    assert found.ceiling.accuracy.value == 1 and found.probe.accuracy.value == found.probe.baseline < 0.5


def control(value, low, high, p, accuracy=0.5):
    return ControlResult(Rate.of(int(100 * accuracy), 100), 0.5, 1.0, 0.0, Difference(value, low, high), p, p)


FALLS, STAYS = control(0.8, 0.7, 0.9, 1e-9), control(0.01, -0.02, 0.04, 1.0)


@pytest.mark.parametrize(
    "word, without_span, controls",
    [
        ("used", 0.0, {"another_sample": FALLS}),
        ("used", 0.0, {"another_sample": FALLS, "position_mean": FALLS}),
        ("sensitive", 0.0, {"another_sample": FALLS, "position_mean": STAYS}),
        ("sensitive", 0.0, {"another_sample": control(0.04, 0.01, 0.07, 0.01)}),
        ("idle", 0.0, {"another_sample": STAYS, "position_mean": STAYS}),
        ("idle", 0.0, {"another_sample": STAYS, "zeros": FALLS}),
        ("open", 0.0, {"another_sample": control(0.04, -0.02, 0.1, 0.3)}),
        ("open", 0.0, {"another_sample": control(0.2, 0.01, 0.39, 0.06)}),
        ("none", 0.6, {"another_sample": FALLS}),
    ],
)
def test_verdict(word, without_span, controls):
    assert judge(Rate.of(90, 100), without_span, controls).word == word


def test_reasons():
    def said(controls, donors=None):
        return " ".join(judge(Rate.of(90, 100), 0.0, controls, donors).reasons)

    assert "90.0 % (82.6 – 94.5) right with its own latents" in said({"another_sample": STAYS})
    assert "5 points or more is ruled out" in said({"another_sample": STAYS})
    assert "something has to stand there" in said({"another_sample": STAYS, "zeros": FALLS})
    assert "something has to stand there" not in said({"another_sample": FALLS, "zeros": FALLS})
    assert "does not yet predict" in said({"another_sample": STAYS, "oracle": control(-0.3, -0.4, -0.2, 1e-4)})
    assert "Without spans it answers 50.0 %" in said({"another_sample": STAYS, "no_spans": FALLS})
    for follows, stays, words in ((90, 5, "follow what"), (5, 90, "do not hang on"), (55, 45, "neither outweighs")):
        donors = DonorFollowing(Rate.of(follows, 100), Rate.of(stays, 100))
        assert words in said({"another_sample": STAYS}, donors)
    with pytest.raises(ValueError, match="needs the control 'another_sample'"):
        said({"zeros": FALLS})


def test_the_table_of_scores_has_the_controls():
    result = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "invalid": 0.0, "count": 100}
    following = DonorFollowing(Rate.of(9, 10), Rate.of(1, 10))
    verdict = judge(Rate.of(1, 2), 0.0, {"another_sample": STAYS})
    stage = ModelAudit("s", Rate.of(1, 2), 2.0, 0.0, {"another_sample": STAYS}, LatentContent(), following, verdict)
    lines = score_table({"base": result, "s": result}, {"s": stage}).splitlines()
    assert lines[0] == (
        "| model | accuracy | invalid | own latents | another sample's | the last span's donor followed |"
    )
    assert lines[2] == "| base | 50.0 % (40.0 – 60.0) | 0.0 % |  |  |  |"
    cells = " | ".join(str(rate) for rate in (Rate.of(1, 2), Rate.of(50, 100), Rate.of(9, 10)))
    assert lines[3] == f"| s | 50.0 % (40.0 – 60.0) | 0.0 % | {cells} |"
    assert lines[5].startswith("s, 2 questions under controls: The model answers 50.0 %")


class References(HTMLParser):
    """What a page loads or links to, and its tags that were left open."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(tmp_path):
    content = LatentContent(2.0, 1.0, Rate.of(5, 9), [Rate.of(2, 3)] * 3, 9.0, None)
    verdict = judge(Rate.of(90, 100), 0.0, {"another_sample": FALLS})
    model = ModelAudit(
        "<script>alert(1)</script>", Rate.of(90, 100), 2.0, 0.0, {"another_sample": FALLS}, content, None, verdict
    )
    write_page(
        Audit("Shifts", "boxed_exact_match", 100, [model, model]),
        [None, "data:image/png;base64,AA"],
        tmp_path / "a.html",
    )
    text = (tmp_path / "a.html").read_text()
    page = References(text)
    assert not page.open and "<script" not in text and "url(" not in text
    assert all(link.startswith(("data:", "#")) for link in page.found) and "another sample&#39;s" in text
    assert "90.0 % (82.6 – 94.5)" in text and "80.0 (70.0 to 90.0)" in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(tmp_path):
    make_image("red").save(tmp_path / "latents.png")
    picture = "data:image/png;base64," + base64.b64encode((tmp_path / "latents.png").read_bytes()).decode()
    probe = Probe(Rate.of(8, 9), 0.2, 9, 30)
    content = LatentContent(2.0, 1.0, Rate.of(5, 9), [Rate.of(2, 3)] * 3, 9.0, probe, probe)
    following = DonorFollowing(Rate.of(9, 10), Rate.of(1, 10))
    controls = {"another_sample": FALLS, "zeros": STAYS}
    verdict = judge(Rate.of(90, 100), 0.0, controls, following)
    models = [ModelAudit(n, Rate.of(90, 100), 2.0, 0.0, controls, content, following, verdict) for n in ("one", "two")]
    write_page(Audit("Shifts", "boxed_exact_match", 100, models), [picture, None], tmp_path / "audit.html")
    url = (tmp_path / "audit.html").as_uri()
    with Browser() as browser:
        browser.call("Page.navigate", url=url)
        browser.wait("document.readyState == 'complete' && document.querySelector('section')")
        assert browser.run("document.querySelectorAll('section').length") == 2
        assert browser.run("document.querySelector('section img').naturalWidth") == 32
        assert "Its latents are used." in browser.run("document.body.innerText")
        bars = "[...document.querySelectorAll('svg rect')].map(bar => bar.getBoundingClientRect().width)"
        assert all(width > 0 for width in browser.run(bars))
        browser.resize(390, 844)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert not browser.complaints and all(request.startswith((url, "data:")) for request in browser.requests)


@pytest.fixture
def checkpoints(model, processor, tmp_path):
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    return [tmp_path / "one", tmp_path / "two"]


def test_audit_of_two_checkpoints(checkpoints, processor, tmp_path):
    questions = Questions.of_task(load_task("shifts", boards=1, test_boards=4, lengths=[2, 3]))
    settings = {"max_new_tokens": 14, "sequence_bias": [[[processor.latent_token_ids[0]], 6.0]]}
    found = audit(checkpoints, questions, output=tmp_path / "out", pictured=1, **settings)
    assert [list(model.controls) for model in found.models] == [list(CONTROLS)] * 2
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    one, two = written["models"]
    assert one["model"].endswith("one") and {**one, "model": ""} == {**two, "model": ""}
    assert one["controls"]["zeros"]["difference"].keys() == {"value", "low", "high"} and one["verdict"]["word"]
    assert one["content"]["retrieval_at_1"]["count"] > 0 and one["content"]["norm_ratio"] > 0
    assert written["rules"] == {"significant": 0.05, "relevant": 0.05, "rare": 0.5}
    page = (tmp_path / "out" / "audit.html").read_text()
    assert len(re.findall("data:image/png;base64,", page)) == 2
    assert len(list((tmp_path / "out" / "answers" / "1-two").glob("*.jsonl"))) == len(CONTROLS) + 2  # own, and donors


def test_audit_of_plain_questions(checkpoints, processor, tmp_path):
    """Without a task nothing says what latents should hold: no oracle, no probe; or the model selects it itself."""
    lake = Questions.of_task(load_task("frozen_lake", maps={3: 1}, test_maps={3: 2}))
    plain = Questions(lake.dataset, lake.references, "frozen_lake")
    (model,) = audit(checkpoints[:1], plain, output=tmp_path / "out", max_new_tokens=4, pictured=0).models
    assert list(model.controls) == [name for name in CONTROLS if name != "oracle"]
    assert model.donor_following is None and model.content.probe is None and model.verdict.word == "none"
    oracle = {"controls": ["another_sample", "oracle"], "max_new_tokens": 30, "pictured": 0}
    oracle["sequence_bias"] = [[[processor.latent_token_ids[0]], 6.0]]
    with pytest.raises(ValueError, match="Pass targets="):
        audit(checkpoints[:1], plain, output=tmp_path / "o", **oracle)
    selection = {"selection_method": "answer_gradient"}
    (model,) = audit(checkpoints[:1], plain, output=tmp_path / "o", selection=selection, **oracle).models
    assert list(model.controls) == ["another_sample", "oracle"] and model.content.retrieval_at_1.count > 0
    assert json.loads((tmp_path / "o" / "audit.json").read_text())["settings"]["selection"] == selection


def test_a_task_says_what_the_model_asks_of_helper_images(checkpoints, tmp_path):
    task = load_task("shifts", boards=1, test_boards=2, lengths=[2, 2])
    settings = {"controls": ["another_sample"], "selection": {"selection_method": "answer_gradient"}}
    audit(checkpoints[:1], Questions.of_task(task), output=tmp_path, pictured=0, max_new_tokens=4, **settings)
    used = json.loads((tmp_path / "audit.json").read_text())["settings"]["selection"]
    assert used == {"helper_question": task.helper_question, "selection_method": "answer_gradient"}


def test_adapters_are_merged(model, processor, tmp_path, monkeypatch):
    """The oracle and the pictures look into the model, where an adapter is in the way."""
    processor.save_pretrained(tmp_path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: weight.clone() for name, weight in adapted.state_dict().items() if "q_proj.base" in name}
    monkeypatch.setattr(auditing.ILVRForConditionalGeneration, "from_pretrained", lambda *_, **__: adapted)
    merged, _ = auditing.load_checkpoint(tmp_path)
    assert type(merged).__name__ == "ILVRForConditionalGeneration" and merged.model.core is not None
    weights = [weight for name, weight in merged.state_dict().items() if "q_proj.weight" in name]
    assert weights and not any(torch.equal(weight, own) for weight, own in zip(weights, before.values()))
