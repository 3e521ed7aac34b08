"""Pages: links resolve, named commands, keys and tests exist, the API reference is complete."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from made.plugins import EXAMPLES, enable

from maskseg import config as configs
from maskseg.cli import help_text
from maskseg.config.compose import keys_of
from maskseg.errors import UserError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "SECURITY.md", *DOCS.rglob("*.md")],
    key=lambda page: str(page.relative_to(ROOT)),
)
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?(?P<target>[^)>\s]+)>?\s*\)")
# Packages whose modules are public: each has an entry in docs/api/.
PUBLIC = (
    "annotation",
    "config",
    "data",
    "engine",
    "errors",
    "evaluation",
    "files",
    "inference",
    "interop",
    "masks",
    "models",
    "ops",
    "plugins",
    "structures",
    "superpixels",
    "training",
    "variants",
    "visualization",
    "values",
)
ELLIPSIS = "..."
TEST_ID = re.compile(r"`(?P<file>tests/[^`:]+)::(?P<name>[^`]+)`")
PLACEHOLDER = re.compile(r"(?<==)(N|RADIUS)$")  # of a number
# Experiments whose checkpoints the commands of the pages are about.
TRAINED = (
    "scenes_r18",
    "scenes_keypoint_r18",
    "scenes_cfm",
    "scenes_hash_r18",
    "coco_r50_fpn_1x",
    "classify_scenes",
    "hash_bsds",
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """A page without code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    counts: Counter[str] = Counter()
    slugs = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        slugs.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_broken = not file.exists() or (anchor and anchor not in anchors(file))
        if is_broken:
            broken.append(target)
    assert not broken


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The tools that a text calls, with their arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(r"(?:python3? tools/(\w+)\.py|\bmaskseg-([\w-]+))(\s.*|$)", line)
        if match is None:
            continue
        tool = match[1] or match[2].replace("-", "_")
        arguments = []
        for word in shlex.split(match[3], comments=True):
            if re.search(r"^[>|&;]|^[A-Za-z]+$|^\w+,$", word):  # a comment without a sign, a pipe
                break
            arguments.append(word)
        overrides = [a for a in arguments if a != ELLIPSIS and not a.startswith("--")]
        yield tool, [PLACEHOLDER.sub("1", override) for override in overrides]


def documented_commands() -> list[tuple[str, str, list[str]]]:
    """Every command of the pages and help texts: where it is, its tool, its arguments."""
    found = []
    for page in PAGES:
        for fence in FENCE.finditer(page.read_text()):
            found += [(name_of(page), *command) for command in commands(fence["text"])]
    for tool in TOOLS:
        lines = "\n".join(re.findall(r"^  .*$", help_text(tool), re.MULTILINE))
        found += [(f"{tool} --help", *command) for command in commands(lines)]
    return found


# Each distinct command once.
COMMANDS = list(
    {
        (tool, *arguments): (place, tool, arguments)
        for place, tool, arguments in documented_commands()
    }.values()
)


@cache
def checkpoint_text(experiment: str) -> str:
    return configs.to_yaml(configs.compose("train", [f"experiment={experiment}"]))


def check_with_checkpoint(tool: str, arguments: list[str]) -> None:
    """Raise the first UserError unless the config of some trained model has the keys."""
    base = None
    if tool == "fit_hash":
        base = configs.group_config("model.segmenter", ["model=mask_rcnn_hash"])
    errors = []
    for experiment in TRAINED:
        try:
            configs.from_checkpoint(checkpoint_text(experiment), arguments, tool, base)
        except UserError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def check_sweep(arguments: list[str]) -> None:
    """Raise UserError for keys that no training has; values are ranges."""
    settings = [a for a in arguments if not a.startswith(("-", "hydra", "+hydra"))]
    choices = [a for a in settings if "." not in a.partition("=")[0]]
    first_choices = [re.sub(r",.*", "", choice.replace("choice(", "")) for choice in choices]
    config = configs.compose("train", first_choices)
    for argument in settings:
        key = argument.partition("=")[0]
        if "." in key and key not in set(keys_of(config)):
            raise UserError(f"no key {key}")


def check_command(tool: str, arguments: list[str]) -> None:
    """Raise UserError for arguments that the tool would refuse."""
    names = {argument.partition("=")[0] for argument in arguments}
    has_checkpoint = "checkpoint" in names
    if tool == "compare":
        assert all("=" not in a or a.startswith("output=") for a in arguments)
    elif tool == "sweep":
        check_sweep(arguments)
    elif tool == "convert":
        is_model = [re.match(r"[~+]?(model|data)[=./]", a) is not None for a in arguments]
        pairs = list(zip(is_model, arguments, strict=True))
        configs.compose("convert", [a for for_model, a in pairs if not for_model])
        configs.compose("train", [a for for_model, a in pairs if for_model])
    elif tool == "evaluate" and "experiment" in names:
        configs.compose("segments", arguments)
    elif tool in ("evaluate", "predict", "fit_svm") or (
        tool in ("propose", "fit_hash") and has_checkpoint
    ):
        assert has_checkpoint or not arguments
        check_with_checkpoint(tool, arguments)
    else:
        base = {"propose": "propose_segments", "fit_hash": "fit_backbone"}
        configs.compose(base.get(tool, tool), arguments)


@pytest.mark.parametrize(
    ("place", "tool", "arguments"),
    COMMANDS,
    ids=[f"{place}: {tool} {' '.join(arguments)}"[:100] for place, tool, arguments in COMMANDS],
)
def test_commands_have_valid_keys(
    place: str, tool: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tool in TOOLS, place
    if place == "docs/extending.md":
        enable(monkeypatch, *EXAMPLES)
    if arguments != ["--help"]:
        check_command(tool, arguments)


def test_a_wrong_command_is_found() -> None:
    text = (
        "python tools/train.py trainer.max_step=5   # short\npython tools/predict.py chekpoint=x\n"
    )
    for tool, arguments in commands(text):
        with pytest.raises((UserError, AssertionError)):
            check_command(tool, arguments)
    assert list(commands("make x\nmaskseg-check-data data=custom \\\n  data.images=D  # why")) == [
        ("check_data", ["data=custom", "data.images=D"])
    ]


def all_keys() -> set[str]:
    """Every key of a training with any experiment or dataset."""
    choices = [[f"experiment={name}"] for name in configs.experiments()]
    choices += [[f"data={f.stem}"] for f in (ROOT / "configs" / "data").glob("[!_]*.yaml")]
    keys: set[str] = set()
    for choice in choices:
        keys |= set(keys_of(configs.compose("train", choice)))
    return keys


def test_keys_in_text_exist() -> None:
    known = all_keys()
    pattern = r"`(?:[~+])?((?:trainer|optimizer|scheduler|evaluation)\.\w+)(?:=[^`]*)?`"
    unknown = []
    for page in PAGES:
        if page.name == "changelog.md" or "decisions" in page.parts:
            continue
        keys = re.findall(pattern, page.read_text())
        unknown += [f"{name_of(page)}: {key}" for key in keys if key not in known]
    assert not unknown


def test_every_public_module_has_an_api_entry() -> None:
    documented: Counter[str] = Counter()
    for page in (DOCS / "api").glob("*.md"):
        documented.update(re.findall(r"automodule:: maskseg\.([\w.]+)", page.read_text()))
    modules = set()
    for package in PUBLIC:
        for path in [
            ROOT / "maskseg" / f"{package}.py",
            *(ROOT / "maskseg" / package).rglob("*.py"),
        ]:
            is_internal = path.stem.startswith("_") or "review" in path.parts
            if path.exists() and not is_internal:
                name = str(path.relative_to(ROOT / "maskseg").with_suffix(""))
                modules.add(name.replace("/", "."))
    missing = sorted(modules - set(documented))
    assert not missing, f"add these to a page in docs/api: {missing}"
    assert set(documented) <= modules
    assert max(documented.values()) == 1


def test_every_tool_is_on_the_page_of_commands() -> None:
    text = (DOCS / "command_line.md").read_text()
    assert sorted(re.findall(r"^```\{tool-help\} (\w+)$", text, re.MULTILINE)) == TOOLS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    scripts = {name.removeprefix("maskseg-").replace("-", "_") for name in project["scripts"]}
    assert scripts == set(TOOLS)
    for name in project["scripts"]:
        assert f"`{name}`" in text


def test_install_commands_name_this_folder_and_its_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = [*PAGES, *(ROOT / "maskseg").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    extras = set(project["optional-dependencies"])
    for path in sources:
        text = path.read_text()
        assert not re.search(r"pip\s+install\s+(-\S+\s+)*['\"]?maskseg", text), path
        for names in re.findall(r"pip\s+install\s+-e\s+['\"]?\.\[([a-z,]+)\]", text):
            assert set(names.split(",")) <= extras, path


SHELL_COMMAND = re.compile(r"(?:python3?|pip|torchrun|tensorboard|maskseg-[\w-]+)\s(?!=)")
SHELL_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


def unquoted_words(text: str) -> list[str]:
    """The words of shell commands that zsh refuses or expands: brackets and globs without quotes.

    A bare glob, such as `runs/*`, is meant for the shell.
    """
    words = []
    for line in text.replace("\\\n", " ").splitlines():
        if SHELL_COMMAND.match(line.strip().removeprefix("$ ")) is None:
            continue
        plain = re.sub(r"(^|\s)#.*", "", SHELL_QUOTED.sub("", line))
        for word in plain.split():
            is_glob = re.fullmatch(r"[\w./-]*\*", word) is not None
            if re.search(r"[][?*{}()]", word) and not is_glob:
                words.append(word)
    return words


def test_commands_are_quoted_as_zsh_needs() -> None:
    unquoted = []
    for page in PAGES:
        text = page.read_text()
        blocks = [f["text"] for f in FENCE.finditer(text) if f["language"] != "python"]
        for block in [*blocks, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]:
            unquoted += [f"{name_of(page)}: {word}" for word in unquoted_words(block)]
    for tool in TOOLS:
        unquoted += [f"{tool} --help: {word}" for word in unquoted_words(help_text(tool))]
    assert not unquoted


def test_an_unquoted_word_is_found() -> None:
    wrong = ["pip install -e .[dev]", "python tools/x.py a=[1]", "maskseg-predict input=d/*.png"]
    wrong += ["python tools/x.py \\\n  'a=[1]' b={c}", "$ torchrun a=b?"]
    assert len([word for line in wrong for word in unquoted_words(line)]) == len(wrong)
    right = "pip install '.[dev]'\npython a.py 'x=[1]' runs/*  # [1]\nprint(a[0])\npip = [1]"
    assert not unquoted_words(right)


def test_the_readme_names_the_environment_before_its_first_command() -> None:
    text = (ROOT / "README.md").read_text()
    activation = text.index(". .venv/bin/activate")
    first = re.search(r"^(python|pip|tensorboard|maskseg-)", text, re.MULTILINE)
    assert first is not None
    assert activation < first.start()


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) < 120
    images = [t for t in LINK.findall("\n".join(lines)) if t.endswith((".png", ".jpg"))]
    assert images
    assert all((ROOT / image).stat().st_size < 150_000 for image in images)


@cache
def named_tests(file: str) -> frozenset[str]:
    """Names of the tests that a file defines, none if there is no such file."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return frozenset(f.name for f in functions if f.name.startswith("test_"))


def missing_tests(text: str) -> list[str]:
    """The test ids of a text that do not exist."""
    return [
        match[0] for match in TEST_ID.finditer(text) if match["name"] not in named_tests(match[1])
    ]


def rows_without_a_test(text: str) -> list[str]:
    """Rows of the tables whose last column is `test`, in which it names none."""
    rows = []
    has_tests = False
    for line in text.splitlines():
        if not line.startswith("|"):
            has_tests = False
        elif line.endswith("| test |"):
            has_tests = True
        elif has_tests and not line.startswith("|---"):
            cell = line.rstrip("| ").rpartition(" | ")[2]
            ids = cell.split(", ")
            if not all(TEST_ID.fullmatch(test_id) for test_id in ids):
                rows.append(line)
    return rows


def test_tests_named_on_the_reliability_page_exist() -> None:
    text = (DOCS / "reliability.md").read_text()
    assert not missing_tests(text)
    assert not rows_without_a_test(text)
    assert text.count("tests/") == len(TEST_ID.findall(text)) > 50


def test_a_missing_test_is_found() -> None:
    own = "tests/docs/test_pages.py"
    right = f"`{own}::test_a_missing_test_is_found`"
    wrong = [f"`{own}::test_x`", f"`{own}::commands`", "`tests/x.py::test_x`"]
    assert missing_tests(f"{right}, {', '.join(wrong)}") == wrong
    header = "| what | does | test |\n|---|---|---|\n"
    rows = ["| a | b | none |", f"| a | b | {right} {right} |", f"| {right} | b | |"]
    table = header + "\n".join([f"| a | b | {right}, {right} |", *rows])
    assert rows_without_a_test(table) == rows


COMPARED = "| | ultralytics | detectron2 | torchvision | maskseg |"
ANSWER = re.compile(r"(yes|no)\b|partly: \S|\?$")


def compared_rows(text: str) -> list[list[str]]:
    """The cells of all rows of the tables that compare frameworks."""
    rows = []
    is_compared = False
    for line in text.splitlines():
        if line == COMPARED:
            is_compared = True
        elif not line.startswith("|"):
            is_compared = False
        elif is_compared and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def faults_of_row(row: list[str]) -> list[str]:
    """What is wrong with a row of the comparison."""
    if len(row) != 5 or not all(row):
        return [f"{row[0]}: not five cells"]
    answers = [re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", cell) for cell in row[1:]]
    faults = [f"{row[0]}: {answer}" for answer in answers if not ANSWER.match(answer)]
    if not answers[-1].startswith("no") and not LINK.search(row[-1]):
        faults.append(f"{row[0]}: no link")
    if answers.count("?") > 1:
        faults.append(f"{row[0]}: not verified")
    return faults


def test_the_comparison_has_44_rows_and_links_what_maskseg_has() -> None:
    text = (DOCS / "comparison.md").read_text()
    rows = compared_rows(text)
    assert len(rows) == len({row[0] for row in rows}) == 44
    assert [fault for row in rows for fault in faults_of_row(row)] == []
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) < 120
    for page in (ROOT / "README.md", DOCS / "index.md"):
        assert "comparison.md" in page.read_text()


def test_faults_of_a_comparison_are_found() -> None:
    table = [
        "| a | yes | no: x | partly: x | [yes](data.md): x |",
        "| b | yes | no | ? | yes |",
        "| c | yes | maybe | no | no |",
        "| d | yes | no | [yes](data.md) |",
        "| e | ? | ? | no | [partly](data.md): x |",
    ]
    text = "\n".join(["| a | test |", "|---|---|", "| x | y |", "", COMPARED, "|---|", *table])
    rows = compared_rows(text)
    assert [row[0] for row in rows] == list("abcde")
    faults = [fault for row in rows for fault in faults_of_row(row)]
    assert faults == ["b: no link", "c: maybe", "d: not five cells", "e: not verified"]
