"""The files of a Space that shows a checkpoint of the Hub in `ilvr demo`."""

from importlib.metadata import version


APP = '''"""The demo of {repo_id}."""

import os
import sys

from ilvr_commands.main import main


sys.exit(main([*{arguments!r}, "--host", os.environ.get("HOST", "0.0.0.0"), "--port", os.environ.get("PORT", "7860")]))
'''
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
models:
- {repo_id}
license: apache-2.0
---

Ask [{repo_id}](https://huggingface.co/{repo_id}) about a picture, look into each span of its latents, and see what the
answer becomes with something else in its place. The page is `ilvr demo`.
"""


def space_files(
    repo_id: str, package: str | None = None, task: str | None = None, settings: str = "{}"
) -> dict[str, str]:
    """Texts of the files, by name.

    Args:
        repo_id (`str`): of the model.
        package (`str`, *optional*, defaults to this version on PyPI): what `pip` installs ILVR from.
        task (`str`, *optional*), settings (`str`): a task to choose examples from, and its settings as JSON.
    """
    arguments = ["demo", repo_id]
    if task is not None:
        arguments += ["--task", task, "--task_settings", settings]
    pins = [f"{name}=={version(name)}" for name in ("transformers", "torch", "gradio", "gymnasium")]
    requirements = [package or f"ilvr[demo]=={version('ilvr')}", *pins]
    return {
        "README.md": README.format(title=repo_id.partition("/")[2], repo_id=repo_id, gradio=version("gradio")),
        "app.py": APP.format(repo_id=repo_id, arguments=arguments),
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
    }
