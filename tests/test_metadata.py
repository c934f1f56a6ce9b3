"""What is published agrees with itself: version, dependencies, address and Python versions, wherever they are written."""

import re
import tomllib
from pathlib import Path

import pytest

import partime_mcmc

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def yaml_of(path):
    """A YAML file; Jinja's settings are put in, its other expressions stay words."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / path).read_text(encoding="utf-8")
    settings = dict(re.findall(r'{% set (\w+) = "(.*?)" %}', text))
    text = re.sub(r"{%.*?%}\n", "", text)
    text = re.sub(r"{{ (\w+).*?}}", lambda found: settings.get(found[1], found[1]), text)
    return yaml.safe_load(text)


def requirement(text):
    """Name and version bounds of a requirement, as pip or conda writes it."""
    name, bounds = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?\s*(.*)", text).groups()
    return name.lower().replace("_", "-"), frozenset(bounds.replace(" ", "").split(","))


def test_the_version_is_one():
    version = PROJECT["version"]
    assert partime_mcmc.__version__ == version
    assert yaml_of("CITATION.cff")["version"] == version
    assert yaml_of("recipe/meta.yaml")["package"]["version"] == version
    newest, date = re.search(r"^## (\S+) \((.*?)\)", CHANGELOG, re.MULTILINE).groups()
    assert newest == version
    assert str(yaml_of("CITATION.cff")["date-released"]) == date
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\d|never released", date)
        for date in re.findall(r"^## \S+ \((.*?)\)", CHANGELOG, re.MULTILINE)
    )


def test_the_recipe_has_the_dependencies_of_pip():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["mcmc"]]
    wanted += [one for one in extras["numpyro"] if not one.startswith("partime_mcmc")]
    python = f"python {PROJECT['requires-python']}"
    recipe = yaml_of("recipe/meta.yaml")
    assert set(map(requirement, recipe["requirements"]["run"])) == {
        requirement(one) for one in (*wanted, python)
    }
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert set(map(requirement, build["requires"])) <= set(
        map(requirement, recipe["requirements"]["host"])
    )
    scripts = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert recipe["build"]["entry_points"] == scripts


def test_the_address_is_one():
    address = PROJECT["urls"]["Repository"]
    assert all(one.startswith(address) for one in PROJECT["urls"].values())
    assert yaml_of("recipe/meta.yaml")["about"]["home"] == address
    assert yaml_of("CITATION.cff")["repository-code"] == address
    assert f"repo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_python_that_is_claimed_is_tested():
    if not (ROOT / ".github").exists():
        pytest.skip("a source archive, not a checkout")
    claimed = {
        one.rpartition(" ")[2]
        for one in PROJECT["classifiers"]
        if re.search(r":: Python :: 3\.\d+$", one)
    }
    jobs = yaml_of(".github/workflows/tests.yml")["jobs"]
    assert set(jobs["tests"]["strategy"]["matrix"]["python"]) == claimed
    assert min(claimed, key=lambda one: int(one[2:])) == PROJECT["requires-python"][2:]


def test_the_documentation_is_built_with_what_the_extra_brings():
    if not (ROOT / ".github").exists():
        pytest.skip("a source archive, not a checkout")
    wanted = " ".join(f'"{one}"' for one in PROJECT["optional-dependencies"]["docs"])
    for name in ("tests", "release"):
        text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
        assert f"pip install {wanted}\n" in text, name


def test_every_package_is_in_the_sites_menu():
    """Their pages are generated, and a page that no menu shows is not found."""
    listed = re.findall(r"api/(\w+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    packages = {path.parent.name for path in (ROOT / "partime_mcmc").glob("*/__init__.py")}
    assert sorted(listed) == sorted({"index", *packages})


def test_the_start_of_the_api_lists_what_the_package_exports():
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert set(partime_mcmc.__all__) <= set(re.findall(r"\[`(\w+)`\]\[", text))
