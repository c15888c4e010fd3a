# Sphinx configuration; build with: sphinx-build -W --keep-going -b html docs docs/_build/html

import lightning_bsr

project = "lightning-bsr"
author = "The lightning-bsr developers"
copyright = author
version = release = lightning_bsr.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lightning-bsr {release}"

# Google docstrings; types stand in the signature's annotations only.
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses are described in the class docstring
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # the hooks of Lightning are described by Lightning

myst_heading_anchors = 3

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
