"""What the documents tell people to type works: commands compose, Python runs, links lead somewhere."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import compose

from pipeline.cli.main import main
from pipeline.cli.overrides import split_options, to_overrides
from pipeline.cli.verbs import VERBS
from pipeline.images import transforms
from pipeline.store.reader import SCHEMA_VERSION
from pipeline.visualization import objectives

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "studies"))

from plan import read_plan  # noqa: E402

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "jobs").rglob("*.md")])


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            found.append((page.name, block))
    return found


COMMANDS = sorted(
    {
        line.partition(" #")[0].strip()
        for _, block in blocks("bash")
        for line in block.splitlines()
        if line.startswith(("scripts/atlas", "scripts/study"))
    }
)


def _overrides(verb: str, arguments: list[str]) -> list[str]:
    own = VERBS[verb]
    _, rest = split_options(verb, arguments, own.keys, own.flags)
    return to_overrides(rest, own.on_folder)


def study_arguments(words: list[str]) -> tuple[str, list[str]]:
    """Return the verb and the arguments of the first run of a study."""
    name, *settings = [word for word in words if word != "--plan"]
    plan = read_plan(name)
    first = next(iter(plan.conditions))
    return plan.verb, [*plan.overrides(plan.network_names[0], first), *settings]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    verb, *arguments = shlex.split(command)[1:]
    if command.startswith("scripts/study"):
        if verb == "--status":
            return
        verb, arguments = study_arguments([verb, *arguments])
    assert verb in VERBS
    overrides = [a for a in _overrides(verb, arguments) if not a.startswith("--")]
    # A sweep over several values is composed with the first of them.
    overrides = [re.sub(r"^([\w./]+=[\w.]+),[\w.,]+$", r"\1", o) for o in overrides]
    compose([o.replace("$HOME", "/somewhere") for o in overrides])


def test_there_are_commands_and_python() -> None:
    assert len(COMMANDS) >= 6 and len(blocks("python")) >= 2


def test_python_runs_as_printed(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "efficientnet_lite0-distill"
    overrides = [o for o in tiny_run if not o.startswith("run.")]
    overrides += ["also=[naive]", "also.naive.steps=2", "also.naive.size=32"]
    assert main(["run", *overrides, f"run.root={tmp_path}/runs", f"run.name={name}"]) == 0
    monkeypatch.chdir(tmp_path)
    for page, block in blocks("python"):
        if page == "your-own-network.md":
            continue  # a test of its own types it as it stands
        exec(compile(block, page, "exec"), {})
    assert "layers" in capsys.readouterr().out


def test_the_examples_of_extensions_run_as_printed() -> None:
    """The classes of docs/architecture.md, in the names of the modules that they are to be added to."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    classes = {}
    for name, module in (("SmoothPeak", objectives), ("Brightness", transforms)):
        code = re.search(rf"((?:^    @[^\n]*\n)+    class {name}.*?\n)(?=\n\S)", page, re.DOTALL | re.MULTILINE)
        assert code is not None, name
        registry = re.search(r'@(\w+)\.add\("(\w+)"\)', code[1])
        assert registry is not None and registry[2] not in getattr(module, registry[1])
        source = re.sub(r"^@\w+\.add.*$", "", textwrap.dedent(code[1]), flags=re.MULTILINE)
        names = dict(vars(module))
        exec(compile(source, name, "exec"), names)
        classes[name] = names[name]
    maps = torch.randn(2, 5, 4, 4)
    activations = objectives.Activations(maps, torch.tensor([3, 1]), torch.zeros(2, dtype=torch.long), 1)
    expected = torch.stack([maps[0, 3], maps[1, 1]]).flatten(1).logsumexp(dim=1)
    assert torch.equal(classes["SmoothPeak"]().value(activations), expected)
    images, brightness = torch.rand(2, 3, 8, 8), classes["Brightness"](0.1)
    shifted = transforms.apply_transforms(images, (brightness,), torch.tensor([[0.0], [0.75]]), (8, 8))
    assert torch.allclose(shifted - images, torch.tensor([-0.1, 0.05]).view(2, 1, 1, 1).expand_as(images), atol=1e-6)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_first_screen_says_how() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[:25]
    text = "\n".join(first)
    assert "scripts/atlas run" in text and "scripts/test" in text and "docs/images/home.jpg" in text


@pytest.mark.long
def test_your_own_network_in_five_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guide, typed as it stands in an empty folder; only the work is made smaller."""
    text = (ROOT / "docs" / "your-own-network.md").read_text()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None
        (tmp_path / name[1]).write_text(block)
    subprocess.run([sys.executable, "save.py"], cwd=tmp_path, check=True)
    small = ["render.steps=2", "layers.channels='0:2'", "data.limit=12", "engine=inline"]
    commands = [line for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in b.splitlines()]
    # The last one shows a table of the default network for photographs of one's own.
    assert [c.split()[1] for c in commands] == ["plan", "run", "plan", "run"] and "PHOTOGRAPHS" in commands.pop()
    for i, command in enumerate(commands):
        _, verb, *arguments = shlex.split(command)
        own = ["run.root=looks", f"run.name=look{i}"] if verb == "plan" else []
        assert main([verb, *arguments, *small, *own]) == 0, command
    out = capsys.readouterr().out
    assert "0.2.0" in out and "body" not in out
    assert (tmp_path / "runs" / "my_net-distill" / "site" / "index.html").is_file()


def test_each_line_of_the_threat_model_has_its_test() -> None:
    rows = [
        line for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines() if "tests/" in line
    ]
    assert len(rows) > 20
    for row in rows:
        proof = row.rstrip(" |").rpartition("| ")[2]
        for part in proof.split("tests/")[1:]:
            path = ROOT / "tests" / part.partition(".py")[0].strip()
            source = path.with_suffix(".py").read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", part):
                assert re.search(rf"def test_\w*{name}", source), (path.name, name)


def test_the_changelog_names_the_schema_version_that_is_written() -> None:
    for page in ("CHANGELOG.md", "docs/store.md"):
        assert f"schema version {SCHEMA_VERSION}" in (ROOT / page).read_text(encoding="utf-8"), page
