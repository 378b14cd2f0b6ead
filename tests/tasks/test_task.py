"""What a task is: the example of its file, trained on and scored."""

import doctest

from helpers import make_trainer

from ilvr.data import prompt_of
from ilvr.evaluation import load_metric
from ilvr.tasks import Task, task


def example() -> type[Task]:
    names = {}
    for part in doctest.DocTestParser().get_examples(task.__doc__.replace("```", "")):
        exec(part.source, names)
    return names["Strips"]


def test_the_example_of_a_task_is_one(model, processor, tmp_path):
    own = example()()
    train, test = own.dataset("train"), own.dataset("test", "answer")
    assert [len(images) for images in train["images"]] == [2, 4, 6] and [len(i) for i in test["images"]] == [1, 1]
    assert prompt_of(test[1])[0]["content"][0]["image"].size == (128, 32)
    trainer = make_trainer(model, processor, tmp_path, dataset=train, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["spans_per_sample"] == 3
    references = [own.reference(sample) for sample in test]
    scores = load_metric(own.metric).compute(predictions=["\\boxed{2}", "\\boxed{3}"], references=references)
    assert scores["accuracy"] == 0.5
