"The configuration of Sphinx. tools/docs.py writes the pages that it reads."
from importlib.metadata import metadata
from pathlib import Path
from urllib.parse import urlsplit

from nbdev.config import get_config

cfg = get_config()
project = html_title = cfg.title
html_baseurl = cfg.doc_url
copyright = metadata(cfg.lib_name)['Author']

# 'docs' is tools/docs.py.
extensions = ['myst_nb', 'docs', 'sphinx-mathjax-offline', 'sphinx_copybutton', 'sphinxext.opengraph',
              'notfound.extension']
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
smartquotes = False  # docstrings quote code, whose quotation marks must stay
nb_execution_mode = 'off'  # the pages show the stored outputs; the tests run the notebooks
nb_render_markdown_format = 'gfm'
nb_merge_streams = True
suppress_warnings = ['myst.header']  # a heading of `show_doc` may come directly after the title, two levels below it

html_theme = 'furo'
html_theme_options = {'top_of_page_buttons': []}
pygments_dark_style = 'github-dark'
html_favicon = 'favicon.svg'
html_static_path = ['static']
html_css_files = ['site.css']
html_extra_path = ['../nbs/llms.txt', '../_proc/texts']
html_copy_source = html_show_sphinx = False
html_search_scorer = str(Path(__file__).with_name('scorer.js'))

copybutton_selector = '.highlight:not(.cell_output *) > pre'  # code, not what it prints

# The pages are shared with a title, a description and the picture of the front page.
ogp_site_url = cfg.doc_url
ogp_image = f'{cfg.doc_url}card.png'
ogp_social_cards = {'enable': False}
ogp_enable_meta_description = False

# A page that does not exist is answered by 404.html, whose links must not depend on the folder.
notfound_urls_prefix = urlsplit(cfg.doc_url).path
notfound_context = {'title': 'Page not found', 'body': """<h1>Page not found</h1>
<p>The search of this site knows all names and pages. Perhaps the page has another name now.</p>"""}
