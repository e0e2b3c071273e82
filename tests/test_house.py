"""What the repository says of itself is true: version and changelog, lock and ranges, README and commands."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ftune

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = {
    requirement.name.lower(): requirement
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
RANGES = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


def test_the_changelog_tells_of_this_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == ftune.__version__


def test_the_lock_pins_exact_versions() -> None:
    for requirement in LOCK.values():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], str(requirement)
        assert "+" not in str(requirement.specifier), f"{requirement} is one machine's build"


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_the_lock_satisfies_every_range(wanted: Requirement) -> None:
    (pinned,) = LOCK[wanted.name.lower()].specifier
    assert wanted.specifier.contains(pinned.version), f"{wanted} does not allow the tested {pinned.version}"


def readme_commands() -> list[str]:
    """The lines of README's code blocks that a reader would type, without the shell's prompt."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\./)?scripts/|ftune ", line)]


def test_the_readme_shows_commands() -> None:
    assert any(line.startswith("scripts/quickstart") for line in readme_commands())


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_in_the_readme_exists(command: str) -> None:
    first, *rest = command.split()
    if first.startswith(("scripts/", "./scripts/")):
        script = ROOT / first
        assert script.is_file(), f"README names {first}"
        assert script.stat().st_mode & 0o111, f"{first} is not executable"
        return
    from typer.main import get_command

    from ftune.cli import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    verb = next((word for word in rest if not word.startswith("-")), "")
    assert not verb or verb in verbs, f"README names `ftune {verb}`"
    options = {option for parameter in verbs[verb].params for option in parameter.opts} if verb else {"--help"}
    used = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--help"}
    assert used <= options, f"`ftune {verb}` has no {sorted(used - options)}"
