"""Configuration of the documentation site (`make docs`)."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent / "extensions"))

from maskseg import __version__  # noqa: E402

project = "maskseg"
author = "the maskseg authors"
copyright = "the maskseg authors, Apache-2.0"
version = __version__
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",  # docs/extensions
    "pages",
]
exclude_patterns = ["_build", "extensions"]

# Pages are Markdown. Headings get GitHub's anchors, so that a link works on both sites.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
highlight_language = "text"
smartquotes = False  # they would change "..." and quotes in keys

# The API reference shows members in the order of the source, with the types of the signature.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autoclass_content = "both"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False

# Every reference that cannot be resolved is an error, except:
nitpicky = True
nitpick_ignore_regex = [
    # Types of other packages: their inventories would have to be downloaded at each build.
    (r"py:.*", r"(torch|torchvision|numpy|np|PIL|hydra|omegaconf|matplotlib|tqdm)\..*"),
    (r"py:.*", r"(pandas|supervision)\..*"),
    (
        r"py:.*",
        r"(abc|argparse|collections|concurrent|contextlib|http|io|pathlib|types|typing|urllib)\..*",
    ),
    (r"py:.*", r"(nn|optim)\..*"),
    # Private base classes.
    (r"py:class", r"maskseg\..*\._\w+"),
    # Names in annotations that exist for the type checker only; references in pages have dots.
    (r"py:class", r"[^.]+"),
    # Bounds in annotations, such as `Annotated[float, Range(ge=0, le=0.5)]`.
    (r"py:class", r"\d+\.\d+"),
]

html_theme = "furo"
html_title = f"maskseg {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f5fa8",
        "color-brand-content": "#1f5fa8",
        "font-stack": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        "font-stack--monospace": "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7fb2ec",
        "color-brand-content": "#7fb2ec",
    },
}
copybutton_exclude = ".linenos, .gp, .go"
