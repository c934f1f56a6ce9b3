"""A hook of MkDocs': one page of the API for every package in `partime_mcmc`, with all modules in it."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).resolve().parent.parent / "partime_mcmc"


def page_of(folder: Path) -> str:
    """The page of a package: what its docstring says, then its modules."""
    name = f"{PACKAGE.name}.{folder.name}"
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    summary = f"# {name}\n\n::: {name}\n    options:\n      members: false\n      show_root_heading: false\n"
    return "\n".join([summary, *(f"::: {name}.{module}\n" for module in modules)])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages `api/PACKAGE.md`."""
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        files.append(File.generated(config, f"api/{folder.name}.md", content=page_of(folder)))
    return files
