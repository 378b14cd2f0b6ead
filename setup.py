from pathlib import Path

from setuptools import setup


ROOMS = ("trainer", "data", "tasks", "evaluation", "hub_cards")
folders = [file.parent for room in ROOMS for file in sorted(Path(room).rglob("__init__.py"))]
# A top-level package called `trainer` or `data` would collide with others, so the folders have import names.
package_dir = {"ilvr": "modeling_ilvr", **{".".join(["ilvr", *folder.parts]): folder.as_posix() for folder in folders}}
package_dir["ilvr_commands"] = "commands"  # beside `ilvr`, whose import takes seconds: `ilvr --help` does not wait
package_dir |= {"ilvr_commands.recipes": "examples/recipes", "ilvr_commands.accelerate": "examples/accelerate"}

setup(
    packages=list(package_dir),
    package_dir=package_dir,
    package_data={
        "ilvr": ["py.typed"],
        "ilvr.hub_cards": ["*.md"],
        "ilvr.evaluation": ["*.html"],
        "ilvr_commands.recipes": ["*.yaml"],
        "ilvr_commands.accelerate": ["*.yaml"],
    },
)
