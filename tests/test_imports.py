"""The architecture, enforced from the source: imports point down, libraries stay where they belong, files and functions stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_TOOL_LINES, MOST_FUNCTION_LINES = 300, 60, 50

# Lower rows never import higher ones. `load()`, the config and the command line join the parts of a model and may use all of them.
ROWS = (
    {"errors", "files", "geometry", "masks", "ops", "segment_masks", "structures"},
    {"interfaces"},
    {"bottomup", "modules", "rcnn"},
    {"variants"},
    {"data", "engine", "evaluation", "inference", "interop"},
    {
        "__init__",
        "annotating",
        "annotation_study",
        "benchmarks",
        "cli",
        "config",
        "conversion",
        "export",
        "pipeline",
        "proposing",
        "reviewing",
        "run_folder",
        "segment_making",
        "segment_proposing",
        "segmenting",
        "svm_fitting",
        "sweeps",
        "trained",
    },
    {"tools"},
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
ACROSS = {("inference", "evaluation"), ("inference", "interop")}  # the only imports between the folders of the upper row
HOMES = {
    "hydra": {"tools", "config"},
    "omegaconf": {"tools", "config"},
    "pycocotools": {"masks", "data", "evaluation", "benchmarks"},
    "tensorboard": {"engine"},
    "cv2": {"bottomup"},
    "scipy": {"bottomup"},
    "fastapi": {"inference"},
    "uvicorn": {"reviewing"},
    "torch.utils.tensorboard": {"engine"},
}


def part_of(file: str) -> str:
    """`maskseg/ops/nms.py` -> `ops`; `maskseg/rcnn.py` -> `rcnn`; `tools/train.py` -> `tools`."""
    pieces = Path(file).with_suffix("").parts
    return pieces[0] if pieces[0] == "tools" else pieces[1]


def imported(source: str, file: str) -> set[str]:
    """Every dotted name that a file imports, anywhere in it, relative ones resolved."""
    package = [p for p in Path(file).with_suffix("").parts if p != "__init__"]
    package = package if Path(file).name == "__init__.py" else package[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__"):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def own_part(name: str) -> str | None:
    """The part of the project that a dotted name lies in, None for another library (and for the version, a plain string)."""
    pieces = name.split(".")
    if pieces[0] == "tools" or pieces[:2] == ["maskseg", "tools"]:
        return "tools"
    if pieces[0] != "maskseg" or name == "maskseg.__version__":
        return None
    return pieces[1] if len(pieces) > 1 and pieces[1] in ROW else "__init__"


def breaches(source: str, file: str) -> list[str]:
    """What a file imports against the rules."""
    here = part_of(file)
    if here not in ROW:
        return [f"{file}: {here} has no row in the architecture"]
    found = []
    for name in sorted(imported(source, file)):
        there = own_part(name)
        if there is None:
            homes = [h for library, h in HOMES.items() if f"{name}.".startswith(f"{library}.")]
            if homes and here not in homes[0]:
                found.append(f"{file}: {name} belongs in {', '.join(sorted(homes[0]))} only")
        elif ROW[there] > ROW[here]:
            found.append(f"{file}: {name} is above {here}")
        elif here != there and here in ROWS[4] and there in ROWS[4] and (here, there) not in ACROSS:
            found.append(f"{file}: {here} and {there} do not import each other")
        elif here == "rcnn" and ROW[there] >= ROW["rcnn"]:
            found.append(f"{file}: the parts are handed to rcnn, {name} must not be imported")
    return found


def too_long(source: str, file: str) -> list[str]:
    """Files and functions over the limits."""
    most = MOST_TOOL_LINES if part_of(file) == "tools" else MOST_LINES
    lines = len(source.splitlines())
    found = [f"{file}: {lines} lines, at most {most}"] if lines > most else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                found.append(f"{file}:{node.lineno}: {node.name} has {length} lines, at most {MOST_FUNCTION_LINES}")
    return found


def sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in ("maskseg", "tools") for p in (ROOT / folder).rglob("*.py"))


def test_all_sources_are_seen() -> None:
    assert {"maskseg/rcnn.py", "maskseg/ops/boxes.py", "maskseg/modules/rpn.py", "maskseg/interop/torchvision.py"} <= set(sources())


@pytest.mark.parametrize("file", sources())
def test_imports_point_down(file: str) -> None:
    assert breaches((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize("file", sources())
def test_files_and_functions_are_short(file: str) -> None:
    assert too_long((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("maskseg/ops/boxes.py", "from maskseg.interfaces import Features"),
        ("maskseg/masks.py", "def f():\n    import maskseg.modules.fpn"),
        ("maskseg/modules/fpn.py", "from maskseg.variants.cfm import CFM"),
        ("maskseg/modules/fpn.py", "from ..variants import cfm"),
        ("maskseg/modules/fpn.py", "from .. import variants"),
        ("maskseg/modules/fpn.py", "from maskseg import load"),
        ("maskseg/modules/fpn.py", "import maskseg"),
        ("maskseg/modules/__init__.py", "from ..data import coco"),
        ("maskseg/variants/cfm.py", "import importlib\nimportlib.import_module('maskseg.engine.loop')"),
        ("maskseg/rcnn.py", "from maskseg.modules.fpn import FPN"),
        ("maskseg/rcnn.py", "if TYPE_CHECKING:\n    from maskseg.bottomup import grabcut"),
        ("maskseg/data/coco.py", "from maskseg.evaluation.coco import rows"),
        ("maskseg/engine/train.py", "from maskseg.data import coco"),
        ("maskseg/evaluation/coco.py", "from maskseg.inference import predictor"),
        ("maskseg/inference/predictor.py", "from maskseg.config import build"),
        ("maskseg/config.py", "from maskseg.tools.train import main"),
        ("maskseg/config.py", "import tools.train"),
        ("maskseg/engine/train.py", "from omegaconf import DictConfig"),
        ("maskseg/cli.py", "import hydra"),
        ("maskseg/modules/mask_head.py", "from pycocotools import mask"),
        ("maskseg/ops/runs.py", "import pycocotools.mask"),
        ("maskseg/inference/predictor.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("maskseg/inference/predictor.py", "from torch.utils import tensorboard"),
        ("maskseg/stray/new.py", "import torch"),
    ],
)
def test_breaches_are_found(file: str, source: str) -> None:
    assert len(breaches(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("maskseg/structures.py", "from maskseg.masks import Masks\nimport torch"),
        ("maskseg/modules/rpn.py", "from maskseg.ops import boxes\nfrom maskseg.interfaces import Losses\nfrom .anchors import AnchorGenerator"),
        ("maskseg/variants/cfm.py", "from maskseg.modules.fpn import FPN\nfrom maskseg.bottomup import superpixels"),
        ("maskseg/inference/predictor.py", "from maskseg.evaluation import rows\nfrom maskseg.interop import torchvision"),
        ("maskseg/config.py", "from omegaconf import OmegaConf\nfrom maskseg.engine import loop"),
        ("maskseg/engine/log.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("tools/train.py", "import hydra\nfrom maskseg.config import build\nfrom maskseg import load"),
    ],
)
def test_what_is_allowed_is_no_breach(file: str, source: str) -> None:
    assert breaches(source, file) == []


def test_long_code_is_found() -> None:
    function = "def f():\n" + "    pass\n" * 50
    assert too_long(function, "maskseg/ops/x.py") == ["maskseg/ops/x.py:1: f has 51 lines, at most 50"]
    assert too_long(function.replace("    pass\n", "", 1), "maskseg/ops/x.py") == []
    assert too_long("x = 1\n" * 301, "maskseg/ops/x.py") == ["maskseg/ops/x.py: 301 lines, at most 300"]
    assert too_long("x = 1\n" * 61, "tools/x.py") == ["tools/x.py: 61 lines, at most 60"]
