"Sphinx's settings for the site; `build.py` writes the pages that it reads"
import re, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from book import settings

s = settings()
project, author, copyright = s['title'], s['author'], s['copyright']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.githubpages']
exclude_patterns = ['extra', '_static']
root_doc = 'index'

# notebooks as they are committed
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'gfm'
nb_ipywidgets_js = {}
myst_enable_extensions = ['dollarmath', 'colon_fence', 'fieldlist']
myst_heading_anchors = 4
def jupyter_anchor(title): return title.replace(' ', '-')
myst_heading_slug_func = 'conf.jupyter_anchor'
# an aside is a heading of the fourth level, wherever it stands; and an example may hold an ellipsis
suppress_warnings = ['myst.header', 'misc.highlighting_failure']

python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = 'hide'

html_theme = 'sphinx_book_theme'
html_title = 'V²Flow in notebooks'
html_baseurl = s['doc_host'] + s['doc_baseurl'] + '/'
html_favicon = 'icon.svg'
html_css_files = ['style.css']
# opened as files, pages cannot be fetched for excerpts: results are titles then
html_js_files = [(None, dict(body="if (location.protocol == 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false"))]
html_copy_source = False
html_show_sourcelink = False
html_domain_indices = False
html_use_index = False
html_last_updated_fmt = None
html_theme_options = dict(
    repository_url=s['git_url'], repository_branch=s['branch'], use_repository_button=True,
    use_download_button=False, use_fullscreen_button=False, show_toc_level=2, navbar_persistent=[], max_navbar_depth=1,
    show_navbar_depth=1, pygments_light_style='github-light', pygments_dark_style='github-dark',
    secondary_sidebar_items={'**': ['page-toc'], 'index': []})
copybutton_exclude = '.linenos, .gp, .go'

def setup(app):
    "Equations become MathML while the page is built: they need no script, and a screen reader reads them"
    from docutils.nodes import SkipNode
    from math_core import LatexToMathML
    from sphinx.util import logging
    convert, log = LatexToMathML(fancy_error=False).convert_with_local_state, logging.getLogger(__name__)
    def draw(writer, node, wide):
        try: writer.body.append(convert(node.astext(), displaystyle=wide))
        except Exception as e: log.warning('an equation that cannot be drawn: %s: %s', node.astext(), e, location=node)
    def inline(writer, node):
        draw(writer, node, False)
        raise SkipNode
    def block(writer, node):
        writer.body.append('<div class="v2-equation" tabindex="0">')
        draw(writer, node, True)
        writer.body.append('</div>')
        raise SkipNode
    def arguments(app, page, template, context, tree):
        "Sphinx writes a long signature's arguments as a list of definitions without terms; spans are what may stand there"
        def spans(m):
            lines = m[2].replace('<dd>', '<span class="v2-argument">').replace('</dd>', '</span>')
            return f'{m[1]}<span class="v2-arguments">{lines}</span>'
        if 'body' in context:
            context['body'] = re.sub(r'(<span class="sig-paren">\(</span>\s*)<dl>(.*?)</dl>', spans, context['body'], flags=re.S)
    app.connect('html-page-context', arguments)
    app.add_html_math_renderer('mathml', (inline, None), (block, None))
html_math_renderer = 'mathml'
