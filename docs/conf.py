"""How `make docs` builds the site: Markdown by MyST, and nothing that a reader's browser fetches from elsewhere."""

project = "tuneproof"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "tuneproof"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
# `page.md#heading` is checked down to this level.
myst_heading_anchors = 4
nitpicky = True
# JSON with `…` in it is there to be read.
suppress_warnings = ["misc.highlighting_failure"]
