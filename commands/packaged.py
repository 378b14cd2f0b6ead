"""Files that come with the package, by their names."""

from pathlib import Path


def packaged_file(name: str, folder: str, what: str) -> Path:
    """A YAML file, or that of the package's folder `recipes` or `accelerate` which has the name, without its ending.

    Raises:
        ValueError: says which names there are of `what`.
    """
    known = {file.stem: file for file in sorted((Path(__file__).parent / folder).glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise ValueError(f"There is no {what} {name}: no such file, and none of {', '.join(known)}.")
    return known[name]
