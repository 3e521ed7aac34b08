"""The architecture, enforced from the source: imports point down, and libraries stay where they
belong.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lower rows never import higher ones. What stands in one row are units of their own, which never
# import each other.
ROWS: tuple[set[str], ...] = (
    {"errors"},
    {"plugins", "values"},
    {"files"},
    {"ops"},
    {"masks"},
    {"structures"},
    {"superpixels"},
    {"models"},
    {"data"},
    {"engine"},
    {"evaluation"},
    {"interop"},
    {"visualization"},
    {"inference"},
    {"config"},
    {"variants.hash", "variants.cfm", "annotation"},
    {"commands"},
    {"benchmarks", "training"},
    {"__init__", "cli"},
    {"tools"},
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
# The command that runs the benchmarks, which call other commands.
ALLOWED = {
    ("maskseg/commands/benchmark.py", f"maskseg.benchmarks.report.{name}")
    for name in ("chart", "table")
}
HOMES = {
    "hydra": {"config", "commands"},
    "omegaconf": {"config", "commands"},
    "pycocotools": {"masks", "data", "evaluation", "benchmarks"},
    "tensorboard": {"engine"},
    "torch.utils.tensorboard": {"engine"},
    "cv2": {"superpixels"},
    "scipy": {"superpixels"},
    "fastapi": {"annotation"},
    "uvicorn": {"annotation"},
}


def part_of(file: str) -> str:
    """`maskseg/ops/nms.py` -> `ops`; `maskseg/variants/cfm/net.py` -> `variants.cfm`;
    `tools/train.py` -> `tools`.
    """
    pieces = Path(file).with_suffix("").parts
    if pieces[0] == "tools":
        return "tools"
    return ".".join(pieces[1:3]) if pieces[1] == "variants" and len(pieces) > 3 else pieces[1]


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
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            names |= {
                a.value
                for a in node.args[:1]
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            }
    return names


def own_part(name: str) -> str | None:
    """The part of the project that a dotted name lies in, None for another library."""
    pieces = name.split(".")
    if pieces[0] == "tools":
        return "tools"
    if pieces[0] != "maskseg":
        return None
    part = ".".join(pieces[1:3]) if pieces[1:2] == ["variants"] else ".".join(pieces[1:2])
    return part if part in ROW else "__init__"


def breaches(source: str, file: str) -> list[str]:
    """What a file imports against the rules."""
    here = part_of(file)
    if file == "maskseg/variants/__init__.py":
        return (
            []
            if not imported(source, file) - {"__future__.annotations"}
            else [f"{file} imports nothing"]
        )
    if here not in ROW:
        return [f"{file}: {here} has no row in the architecture"]
    found = []
    for name in sorted(imported(source, file)):
        there = own_part(name)
        if there is None:
            homes = [h for library, h in HOMES.items() if f"{name}.".startswith(f"{library}.")]
            if homes and here not in homes[0]:
                found.append(f"{file}: {name} belongs in {', '.join(sorted(homes[0]))} only")
        elif (file, name) in ALLOWED:
            continue
        elif ROW[there] > ROW[here] or (ROW[there] == ROW[here] and there != here):
            found.append(f"{file}: {name} is above or beside {here}")
        elif (
            file == "maskseg/models/rcnn.py"
            and there == "models"
            and not name.startswith("maskseg.models.interfaces.")
        ):
            found.append(f"{file}: the stages are handed to the model, {name} must not be imported")
    return found


def sources() -> list[str]:
    return sorted(
        str(p.relative_to(ROOT))
        for folder in ("maskseg", "tools")
        for p in (ROOT / folder).rglob("*.py")
    )


def test_all_sources_are_seen() -> None:
    assert {
        "maskseg/models/rcnn.py",
        "maskseg/ops/boxes.py",
        "maskseg/variants/cfm/net.py",
        "tools/train.py",
    } <= set(sources())


@pytest.mark.parametrize("file", sources())
def test_imports_point_down(file: str) -> None:
    assert breaches((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("maskseg/ops/boxes.py", "from maskseg.models.interfaces import Backbone"),
        ("maskseg/masks/base.py", "def f():\n    import maskseg.models.backbones.fpn"),
        ("maskseg/models/backbones/fpn.py", "from maskseg.variants.cfm.net import CFMNet"),
        ("maskseg/models/backbones/fpn.py", "from ...variants.cfm import net"),
        ("maskseg/models/backbones/fpn.py", "from ... import variants"),
        ("maskseg/models/backbones/fpn.py", "from maskseg import load"),
        ("maskseg/models/backbones/fpn.py", "import maskseg"),
        ("maskseg/models/__init__.py", "from ..data import collate"),
        (
            "maskseg/variants/cfm/classifier.py",
            "import importlib\nimportlib.import_module('maskseg.variants.hash.layer')",
        ),
        ("maskseg/variants/cfm/classifier.py", "from maskseg.annotation import grabcut"),
        ("maskseg/annotation/annotate.py", "from maskseg.variants.cfm import store"),
        ("maskseg/annotation/annotate.py", "from maskseg.commands import train"),
        ("maskseg/models/rcnn.py", "from maskseg.models.backbones.fpn import FPN"),
        ("maskseg/models/rcnn.py", "if TYPE_CHECKING:\n    from maskseg.annotation import grabcut"),
        ("maskseg/data/collate.py", "from maskseg.evaluation.coco import rows"),
        ("maskseg/evaluation/coco.py", "from maskseg.inference import predictor"),
        ("maskseg/inference/predictor.py", "from maskseg.config import build"),
        ("maskseg/config/build.py", "from maskseg.commands.train import main"),
        ("maskseg/config/build.py", "import tools.train"),
        ("maskseg/engine/loop.py", "from omegaconf import DictConfig"),
        ("maskseg/cli.py", "import hydra"),
        ("maskseg/models/mask_head.py", "from pycocotools import mask"),
        ("maskseg/ops/rle.py", "import pycocotools.mask"),
        ("maskseg/inference/predictor.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("maskseg/inference/predictor.py", "from torch.utils import tensorboard"),
        ("maskseg/stray/new.py", "import torch"),
        ("maskseg/variants/new.py", "import torch"),
    ],
)
def test_breaches_are_found(file: str, source: str) -> None:
    assert len(breaches(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("maskseg/structures.py", "from maskseg.masks.base import Masks\nimport torch"),
        (
            "maskseg/models/rpn.py",
            "from maskseg.ops import boxes\nfrom maskseg import ops\nfrom .anchors import A",
        ),
        ("maskseg/models/rcnn.py", "from maskseg.models.interfaces import Backbone"),
        (
            "maskseg/variants/cfm/net.py",
            "from maskseg.models.rpn import RPN\nfrom maskseg.variants.cfm import mask_nms",
        ),
        (
            "maskseg/inference/predictor.py",
            "from maskseg.evaluation import coco_results\nfrom maskseg.interop import torchvision",
        ),
        (
            "maskseg/config/build.py",
            "from omegaconf import OmegaConf\nfrom maskseg.engine import loop",
        ),
        ("maskseg/engine/logs.py", "from torch.utils.tensorboard import SummaryWriter"),
        (
            "maskseg/commands/train.py",
            "from maskseg.config import build\nfrom maskseg.variants.cfm import prepare",
        ),
        ("tools/train.py", "from maskseg.cli import run_tool"),
    ],
)
def test_what_is_allowed_is_no_breach(file: str, source: str) -> None:
    assert breaches(source, file) == []


FRESH = """
import sys
import numpy as np
import torch
from maskseg import config as configs
from maskseg.commands import train
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.structures import Batch, Categories, Targets

config = configs.compose("train", ["experiment=scenes_r18"])
configs.set_categories(config, Categories(("disc", "box"), (1, 2)))
model = configs.build_model(config)
trainer = configs.build(config.trainer)
optimizer = configs.build_optimizer(config, trainer, model)
index = torch.zeros(1, dtype=torch.int64)
triangle = np.array([[8.0, 8.0], [40.0, 8.0], [40.0, 40.0]])
masks = AnnotatedMasks.from_file([Polygons((triangle,))], 64, 64)
targets = Targets(torch.tensor([[8.0, 8.0, 40.0, 40.0]]), index, index, index.bool(), masks)
size = torch.tensor([[64, 64]])
batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), size, size, [1], ["a.jpg"], targets)
model.train()
torch.stack(list(model(batch).values())).sum().backward()
optimizer.step()
unwanted = ("maskseg.variants.", "maskseg.annotation", "cv2", "scipy", "fastapi")
print([name for name in sys.modules if f"{name}.".startswith(unwanted)])
"""


def test_a_training_imports_no_variant() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_package_is_imported_without_its_libraries() -> None:
    # The loader processes import it, and must not wait for torch.
    code = "import sys, maskseg; print(sorted({n.partition('.')[0] for n in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    imported_names = set(ast.literal_eval(result.stdout))
    assert not imported_names & {"torch", "numpy", "PIL", "hydra", "omegaconf", "pycocotools"}
