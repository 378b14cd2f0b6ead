from setuptools import setup


PACKAGE_DIR = {
    "ilvr": "modeling_ilvr",
    "ilvr.trainer": "trainer",
    "ilvr.trainer.inputs": "trainer/inputs",
    "ilvr.trainer.running": "trainer/running",
    "ilvr.trainer.watching": "trainer/watching",
    "ilvr.data": "data",
    "ilvr.tasks": "tasks",
    "ilvr.tasks.frozen_lake": "tasks/frozen_lake",
    "ilvr.tasks.frozen_lake.metric": "tasks/frozen_lake/metric",
    "ilvr.evaluation": "evaluation",
    "ilvr.hub_cards": "hub_cards",
    "ilvr.commands": "commands",
}

setup(
    # A top-level package called `trainer` or `data` would collide with others, so the folders have import names.
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"ilvr": ["py.typed"], "ilvr.hub_cards": ["*.md"]},
)
