from setuptools import setup


PACKAGE_DIR = {
    "ilvr": "modeling_ilvr",
    "ilvr.trainer": "trainer",
    "ilvr.data": "data",
    "ilvr.evaluation": "evaluation",
    "ilvr.hub_cards": "hub_cards",
    "ilvr.commands": "commands",
}

setup(
    # A top-level package called `trainer` or `data` would collide with others, so the folders have import names.
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"ilvr.evaluation": ["*/*.py", "*/README.md"], "ilvr.hub_cards": ["*.md"]},
)
