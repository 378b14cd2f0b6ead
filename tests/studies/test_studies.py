"""Studies: files of arms, runs that are resumed, and the tables of their page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from studies import audit, page, run
from studies.study import Study


SHIFTS = yaml.safe_load(Path("studies/shifts.yaml").read_text())
KEPT = ("base", "answer_only", "stage1", "stage2")
TINY = {
    **SHIFTS,
    "name": "tiny",
    "task_settings": {**SHIFTS["task_settings"], "lengths": [1, 2], "boards": 4, "base_boards": 4, "test_boards": 6},
    "tests": {"trained": {"samples": 4}, "longer": {"test_lengths": [3, 3], "samples": 2}},
    "controlled": 3,
    "backbone": {**SHIFTS["backbone"], "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32},
    "training": {**SHIFTS["training"], "per_device_train_batch_size": 2, "disable_tqdm": True, "logging_steps": 1},
    "arms": {
        name: {
            **SHIFTS["arms"][name],
            "settings": {**SHIFTS["arms"][name]["settings"], "max_steps": 1, "logging_steps": 1},
            "until_loss": None,
        }
        for name in KEPT
    },
    "max_new_tokens": 12,
}
TINY["training"] |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0}


@pytest.fixture
def study(tmp_path):
    return load(tmp_path, TINY)


def load(folder, content) -> Study:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return replace(Study.load(path), runs=folder / "runs", results=folder / "results")


def test_an_arm_with_rewards_is_reinforcement_learning(tmp_path):
    settings = {**SHIFTS["arms"]["grpo_recompute"]["settings"], "max_steps": 2, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 8}
    arm = {**SHIFTS["arms"]["grpo_recompute"], "task": {"lengths": [1, 2]}, "settings": settings, "watched": 1}
    study = load(tmp_path, {**TINY, "arms": {**TINY["arms"], "grpo": arm}})
    assert "rewards" not in study.definition_of("stage2", 0)["arm"]
    assert "teacher_decay" not in study.settings_of("grpo", 0)
    run.run(study, "grpo", 0)
    result = page.load(study)["grpo"][0]
    assert len(result["log"]) == 2
    assert {"reward", "rewards/accuracy/mean", "spans_per_sample"} <= set(result["log"][-1])
    trained = result["tests"]["trained"]
    assert "another_sample" in trained["controls"]
    spans = [int(number) for number in trained["spans_of_each"].split()]
    assert len(spans) == len(trained["right"]) and sum(spans) / len(spans) == pytest.approx(trained["spans"], abs=1e-3)
    assert [entry["step"] for entry in result["held_out"]] == [0, 1, 2]


def test_curves_are_means_over_seeds(study):
    def watched(seed, accuracies, emission=1.0):
        names = ("step", "eval_accuracy", "eval_swapped_accuracy", "eval_emission_rate")
        asked = [dict(zip(names, (5 * i, a, a / 2, emission))) for i, a in enumerate(accuracies)]
        log = [{"step": 5, "reward": 0.5 + seed / 4}, {"step": 7, "reward": 0.0}]
        return {**results("grpo", seed, "1"), "held_out": asked, "log": log}

    latents = {0: watched(0, [0.5, 0.75]), 1: watched(1, [0.25, 0.5])}
    words = {0: watched(0, [0.0, 1.0], emission=0.0)}
    table = page.curves_table({"grpo": latents, "words": words, "text": {0: results("text", 0, "1")}})
    assert table.splitlines()[2:] == [
        "| grpo | held out, % | 37.5 | 62.5 |",
        "| grpo | … with another sample's latents, % | 18.8 | 31.2 |",
        "| grpo | reward |  | 0.62 |",
        "| words | held out, % | 0.0 | 100.0 |",
        "| words | reward |  | 0.50 |",
    ]


def test_the_study_of_shifts_is_valid():
    study = Study.load("studies/shifts.yaml")
    assert list(study.arms)[:2] == ["base", "answer_only"] and study.settings_of("stage2", 3)["seed"] == 3
    assert study.task_of(0, "longer").test_lengths == [12, 16] and study.task_of(0).test_lengths == [4, 10]
    assert study.task_of(0).names_shifts and not study.task_of(0, arm="unnamed").names_shifts


def test_an_arm_may_train_on_other_settings_of_the_task():
    study = Study.load("studies/glyphs.yaml")
    assert study.task_of(0, arm="base1").size == 1 and study.task_of(0, arm="base").size == study.task_of(0).size == 2
    assert study.task_of(0, arm="oracle_few").lengths == [1, 2] and study.task_of(0, "trained").lengths == [2, 6]
    # The prompts are the same with and without a step 0, and so are the last span's answer and donor.
    assert study.task_of(0, arm="several").tell_first and not study.task_of(0, "trained").tell_first


def test_arms_are_trained_tested_and_left_as_they_are(study, tmp_path, monkeypatch, capsys):
    """An arm brings those that it continues; what is there is not trained again; the tables hold what was measured."""
    run.run(study, "stage2", 1)
    found = page.load(study)
    assert {arm: list(runs) for arm, runs in found.items()} == {"base": [1], "stage1": [1], "stage2": [1]}
    result = found["stage2"][1]["tests"]["trained"]
    assert len(result["right"]) == 4 and set(result["right"]) <= {"0", "1"}
    assert set(result["controls"]) >= {"own", "another_sample", "position_mean", "noise_1.0", "zeros"}
    assert all(len(right) == 3 for control, right in result["controls"].items() if control != "donor")
    assert found["stage1"][1]["log"][0]["step"] == 1 and "latent_cosine" in found["stage1"][1]["log"][0]
    monkeypatch.setattr(run, "train", None)
    (tmp_path / "results" / "tiny" / "stage2-1.json").unlink()
    run.run(study, "stage2", 1)
    assert page.load(study)["stage2"][1]["tests"] == found["stage2"][1]["tests"]
    for bound, same in ((1e9, True), (0.0, False)):  # a bound that the loss meets changes nothing
        bounded = {**study.arms, "base": replace(study.arms["base"], until_loss=bound)}
        assert replace(study, arms=bounded).is_of(found["base"][1]) == same
        assert replace(study, arms=bounded).is_of(found["stage1"][1])  # whose own loss has no bound
    study.arms["base"].settings["warmup_steps"] = 7
    with pytest.raises(ValueError, match="stage2-1.json is of another definition of stage2 than tiny has now"):
        run.run(study, "stage2", 1)
    report = page.report(study, found)
    assert f"| stage2 | {study.arms['stage2'].note} |" in report and "| 98 %" not in report
    assert "Defined and not run: answer_only.\n" in report
    assert "Defined and not run" not in page.report(study, {**found, "answer_only": found["base"]})


def test_an_arm_is_audited_on_the_questions_of_its_controls(study, monkeypatch, tmp_path):
    """The numbers are kept beside the results, for the page; the page with pictures beside the checkpoint."""
    with pytest.raises(ValueError, match="stage1 holds no trained arm"):
        audit.audit_arm(study, "stage1", 1)
    run.run(study, "stage1", 1)
    before = page.report(study, page.load(study))
    audit.audit_arm(study, "stage1", 1)
    facts = json.loads((tmp_path / "results" / "tiny" / "audit-stage1-1.json").read_text())
    (model,) = facts["models"]
    own = page.load(study)["stage1"][1]["tests"]["trained"]["controls"]
    assert facts["samples"] == len(own["own"]) == 3
    found = {"own": model["accuracy"], **{name: control["accuracy"] for name, control in model["controls"].items()}}
    for control in ("own", "another_sample", "zeros"):
        assert found[control]["value"] == own[control].count("1") / 3, control
    assert "oracle" in found
    assert (tmp_path / "runs" / "tiny" / "1" / "stage1" / "audit" / "audit.html").exists()
    after = page.report(study, page.load(study))
    assert after.startswith(f"{before}\n\n### A full audit: stage1, seed 1\n\n| in the place of the latents |")
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["audit", str(tmp_path / "study.yaml"), "stage9"])
        audit.main()


def test_the_table_of_an_audit():
    rate = {"value": 0.5, "low": 0.25, "high": 0.75, "count": 8}
    control = {"accuracy": rate, "answers_changed": 0.375, "p_adjusted": 0.0123}
    control["difference"] = {"value": 0.25, "low": 0.125, "high": 0.5}
    probe = {"accuracy": {**rate, "value": 0.625}}
    content = {"norm": 10.04, "feature_norm": 9.96, "retrieval_at_1": None, "probe": probe, "ceiling": probe}
    model = {"accuracy": rate, "controls": {"zeros": control}, "content": content}
    model["verdict"] = {"word": "used", "reasons": ["It is right.", "Zeros cost."]}
    facts = {"models": [model], "samples": 8, "commit": "abc"}
    assert page.audit_table(facts).splitlines()[2:] == [
        "| own latents | 50.0 (25.0 – 75.0) |  |  |  |",
        "| zeros | 50.0 (25.0 – 75.0) | +25.0 (+12.5 – +50.0) | 0.01 | 37.5 |",
    ]
    assert page.audit_reasons(facts).splitlines() == [
        "Verdict: **used** (8 questions, abc).",
        "It is right. Zeros cost.",
        "Latents: norms 10, of what they should hold 9.96; a linear probe reads this patch off them in 62.5 % "
        "(25.0 – 75.0), off the features in 62.5 % (25.0 – 75.0).",
    ]
    content |= {"norm": None, "probe": None}
    assert len(page.audit_reasons(facts).splitlines()) == 2


def test_an_arm_is_trained_again_until_its_loss_is_low_enough(study, monkeypatch):
    """Each round has a new optimizer and a whole schedule; three rounds, then it says that it did not get there."""
    rates, losses = [], iter([3.0, 1.0, 0.25, 3.0, 3.0, 3.0, 3.0])

    class Noted(run.ILVRTrainer):
        def train(self):
            rates.append(self.optimizer)
            return super().train()

    monkeypatch.setattr(run, "ILVRTrainer", Noted)
    monkeypatch.setattr(run, "last_loss", lambda trainer: next(losses))
    study.arms["base"] = replace(study.arms["base"], until_loss=0.5)
    assert study.definition_of("stage2", 0)["arm"]["after"]["after"]["until_loss"] == 0.5
    run.train(study, "base", 0, study.runs / "base")
    assert rates == [None, None, None]
    with pytest.raises(ValueError, match="base, seed 1: the loss is 3.000, and should be 0.5"):
        run.train(study, "base", 1, study.runs / "again")
    assert not (study.runs / "again" / "trainer_state.json").exists()


def test_a_rehearsal_runs_each_arm_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    """As large as the study's models, few steps; checkpoints and results of the study itself are not touched."""
    arms = {name: SHIFTS["arms"][name] for name in (*KEPT, "oracle", "slots_repeat", "grpo_replay")}
    content = {**TINY, "arms": arms, "training": {**SHIFTS["training"], "disable_tqdm": True}}
    here = tmp_path / "here"
    here.mkdir()
    (here / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(here)
    monkeypatch.setattr(run, "commit", lambda: "abc")
    monkeypatch.setattr("sys.argv", ["run", "study.yaml", "--rehearse"])
    run.main()
    printed = capsys.readouterr().out
    assert all(f"\n{arm}, seed 0: trained " in printed for arm in arms)
    assert [path.name for path in here.iterdir()] == ["study.yaml"]


def results(arm, seed, right, controls=None):
    trained = {"right": right, "groups": ["4 shifts"] * len(right), "tokens": 1, "spans": 1}
    longer = {"right": "1", "groups": ["12 shifts"], "tokens": 1, "spans": 1}
    tests = {"trained": {**trained, **({"controls": controls} if controls else {})}, "longer": longer}
    return {"arm": arm, "seed": seed, "commit": "abc", "device": "CPU", "seconds": 1, "log": [], "tests": tests}


def test_rules_are_judged_by_the_seeds_that_both_arms_have(study):
    controls = {"own": "1" * 200, "another_sample": "0" * 200, "donor": "1" * 85 + "0" * 15}
    found = {
        "answer_only": {0: results("answer_only", 0, "1" * 20 + "0" * 80), 1: results("answer_only", 1, "0" * 100)},
        "stage1": {0: results("stage1", 0, "1" * 98 + "00")},
        "stage2": {0: results("stage2", 0, "1" * 99 + "0", controls)},
    }
    found["oracle2"] = {0: results("oracle2", 0, "1" * 100)}
    rules = page.rules_table(page.rules_of_shifts(found), found)
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in rules.splitlines()}
    assert (
        lines["accuracy at least 98 %"][:2] == ["99.0 %", "1"] and "yes, so far" in lines["accuracy at least 98 %"][2]
    )
    assert lines["50 points above answer-only"][0].startswith("+79.0 (")
    assert "**no**" in lines["the donor of the last span is followed in 90 %"][2]
    oracle = lines["at most 1 point below the oracle"]
    assert oracle[0].startswith("+1.0 (") and "**no**" in oracle[2]  # the upper end counts
    assert lines["stage 2 at least as good as stage 1"][0].startswith("+1.0")
    assert lines["50 points above the deeper answer-only"][0] == "not run"
    assert lines["another sample's latents cost 60 points"][0] == "+100.0 (+100.0 – +100.0)"


def test_the_bar_of_glyphs():
    """Over all lengths and at six moves, of both recipes; of the small steps also whether their latents are used."""
    controls = {"own": "1" * 200, "another_sample": "0" * 150 + "1" * 50, "donor": "1" * 85 + "0" * 15}
    for latents, words, judged in (("oracle2", "text_equal2", 0), ("several2", "words_several2", 2)):
        found = {latents: {0: results(latents, 0, "1" * 50 + "1" * 30 + "0" * 20, controls)}}
        found[words] = {0: results(words, 0, "1" * 10 + "0" * 40 + "1" * 18 + "0" * 32)}
        for runs in found.values():
            runs[0]["tests"]["trained"]["groups"] = ["2 moves"] * 50 + ["6 moves"] * 50
        lines = page.rules_table(page.rules_of_glyphs(found), found).splitlines()[2:]
        every, six = lines[judged : judged + 2]
        assert "+52.0 (" in every and "yes, so far" in every
        assert "+24.0 (" in six and "**no**" in six  # the lower end counts
        assert [number for number, line in enumerate(lines) if "not run" in line] == ([2, 3, 4, 5], [0, 1])[judged > 0]
    assert "+75.0 (" in lines[4] and "yes, so far" in lines[4]
    assert "85.0 %" in lines[5] and "**no**" in lines[5]


def test_whether_latents_are_used():
    """The lower end of what another sample's cost counts; without a donor there is nothing to follow."""
    for cost, donor, holds in ((190, 95, ["yes", "yes"]), (128, 85, ["**no**", "**no**"])):
        controls = {"own": "1" * 200, "another_sample": "1" * (200 - cost) + "0" * cost}
        controls["donor"] = "1" * donor + "0" * (100 - donor)
        found = {"stage2": {0: results("stage2", 0, "1", controls)}}
        lines = page.rules_table(page.rules_of_use(found, "stage2"), found).splitlines()[2:]
        assert f"+{cost / 2:.1f} (" in lines[0] and f"{donor}.0 %" in lines[1]
        assert all(verdict in line for verdict, line in zip(holds, lines))
    del controls["donor"]
    assert "not run" in page.rules_table(page.rules_of_use(found, "stage2"), found).splitlines()[3]


def test_what_an_arm_loses_without_an_ingredient():
    """Over the boards of the seeds that both arms have; ten points are what the interval has to clear."""
    found = {
        "stage1": {seed: results("stage1", seed, "1" * 1000) for seed in (0, 1, 3, 4)},
        "query": {0: results("query", 0, "1" * 200 + "0" * 800), 2: results("query", 2, "1" * 1000)},
        "identity": {seed: results("identity", seed, "1" * 900 + "0" * 100) for seed in (0, 3, 4)},
        "given_latents": {1: results("given_latents", 1, "1" * 999 + "0")},
    }
    lines = page.ingredients_table(page.INGREDIENTS["shifts"], found).splitlines()[2:]
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in lines}
    assert list(cells) == ["query", "given_latents", "identity"]
    assert cells["query"][2:4] == ["0", "stage1"] and cells["query"][4].startswith("+80.0 (+77")
    assert [cells[arm][-1] for arm in cells] == ["yes, so far", "no, so far", "open"]
    assert cells["given_latents"][4].startswith("+0.1") and cells["given_latents"][5] == "1"
    assert float(cells["identity"][5]) < 1e-20  # two times 2 ** -99 or less


def test_what_arms_logged_of_their_alignment_last():
    """A mean over seeds; a target that is a mean of patches is no patch, and some tasks know none that is followed."""
    last = {"followed_share": 0.5, "retrieval_at_1": 0.75, "latent_cosine": 0.5, "latent_norm_ratio": 1.5}

    def logged(method, *logs):
        definition = {"arm": {"settings": {"selection_method": method}}}
        found = {seed: results("stage1", seed, "1") for seed in range(len(logs))}
        return {seed: {**own, "log": [{}, logs[seed]], "definition": definition} for seed, own in found.items()}

    found = {
        "stage1": logged("answer_gradient", last, {**last, "followed_share": 1.0}),
        "mirage": logged("mean_pool", last),
        "unknown": logged("query_top_p", {name: value for name, value in last.items() if name != "followed_share"}),
        "text": {0: {**results("text", 0, "1"), "log": [{"loss": 1.0}]}},
    }
    assert page.alignment_table(found).splitlines()[2:] == [
        "| stage1 | 0.50 | 1.50 | 75.0 | 75.0 |",
        "| mirage | 0.50 | 1.50 |  |  |",
        "| unknown | 0.50 | 1.50 | 75.0 |  |",
    ]


def test_the_bar_of_frozen_lake():
    for right, verdict in (("1" * 9 + "0", "yes"), ("1" * 8 + "00", "**no**")):
        found = {"stage2": {0: results("stage2", 0, right)}}
        assert verdict in page.rules_table(page.rules_of_frozen_lake(found), found).splitlines()[2]


@pytest.mark.parametrize("name", ["shifts", "glyphs", "frozen_lake"])
def test_the_page_says_what_the_results_say(name):
    """The tables that are committed are those of the results that are."""
    study = Study.load(Path(f"studies/{name}.yaml"))
    found = page.load(study)
    assert f"<!-- results: {name} -->\n{page.report(study, found)}\n<!-- /results" in page.PAGE.read_text()
    assert all(study.is_of(result) for runs in found.values() for result in runs.values())


def test_arms_come_after_those_that_they_continue(tmp_path):
    arms = {name: TINY["arms"][name] for name in ("stage1", "base")}
    with pytest.raises(ValueError, match="Arm stage1 continues 'base', which does not come before it"):
        load(tmp_path, {**TINY, "arms": arms})
    wrong = {**TINY["arms"]["base"], "settings": {"stage": 3}}
    with pytest.raises(ValueError, match=r"Arm base \(with `training`\): `stage` must be 1"):
        load(tmp_path, {**TINY, "arms": {"base": wrong}})


def test_the_page_is_rewritten_between_its_marks(study, tmp_path, monkeypatch):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- results: tiny -->\nold\n<!-- /results: tiny -->\nafter\n")
    monkeypatch.setattr(page, "PAGE", document)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "studies" / "results" / "tiny"
    folder.mkdir(parents=True)
    (folder / "base-0.json").write_text(json.dumps(results("base", 0, "10")))
    monkeypatch.setattr("sys.argv", ["page", str(tmp_path / "study.yaml")])
    page.main()
    text = document.read_text()
    assert text.startswith("before\n<!-- results: tiny -->\nCommits abc, on CPU.") and text.endswith(
        "<!-- /results: tiny -->\nafter\n"
    )
    assert "| base |" in text and "**50.0**" in text


def test_arms_are_run_in_several_processes(study, tmp_path, monkeypatch, capfd):
    """Each after the one that it continues; one that fails takes those with it that continue it, and no others."""
    run.run_at_once(study, ["stage2", "answer_only"], [0, 1], processes=3)
    assert {arm: sorted(runs) for arm, runs in page.load(study).items()} == dict.fromkeys(KEPT, [0, 1])
    others = replace(study, runs=tmp_path / "others", results=tmp_path / "others")
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure", fails_for_stage1)
        with pytest.raises(RuntimeError, match=r"Failed: \[\('stage1', 0\)\]; not run: \[\('stage2', 0\)\]"):
            run.run_at_once(others, ["stage2", "answer_only"], [0], processes=2)
        assert sorted(file.name for file in (tmp_path / "others" / "tiny").glob("*.json")) == [
            "answer_only-0.json",
            "base-0.json",
        ]
    assert "stage1, seed 0, failed: ValueError('unreadable')" in capfd.readouterr().out


def fails_for_stage1(study, name, seed, folder):
    if name == "stage1":
        raise ValueError("unreadable")
    return {"arm": name, "seed": seed, "tests": {}, "definition": study.definition_of(name, seed)}
