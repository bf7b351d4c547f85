"""Build the site: each notebook, as nbdev processes it, becomes a page for Sphinx. Run from the root of the project by `make docs`.

This file is also the extension of Sphinx that links names in backticks."""
import re, sys
from functools import partial
from os.path import normpath
from pathlib import Path
from shutil import copy, rmtree

from docutils import nodes
from fastcore.docments import docments, qual_name
from fastcore.nbio import fenced, mk_cell, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.processors import FilterDefaults, Processor, add_links, exec_show_docs, insert_warning
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from sphinx.cmd.build import main as sphinx_build
from torch import nn

cfg = get_config()
repo = f'{cfg.git_url}/blob/{cfg.branch}'
work, site = Path('_proc'), Path('_docs')
pages, texts = work/'pages', work/'texts'

# The sidebar: kinds of pages, and the notebooks of each, which come in the order of their file names.
kinds = {'Tutorials': 'tutorials/*', 'How-to': 'howto/*', 'Reference': '[0-9]*', 'Explanations': 'explanations/*', 'Results': 'results'}


# Names

lookup = NbdevLookup(strip_libs=f'{cfg.lib_name} fastai', ns={'nn': nn})

def url(name):
    "Where `name` is documented: here, by fastai, by PyTorch or another that nbdev knows; a bare method is a `Sparsifier`'s or a `Learner`'s"
    return lookup.doc(f'Sparsifier.{name}') or lookup.doc(name) or lookup.doc(f'Learner.{name}')


def place(name):
    "The page and the anchor of a `name` that is documented here, as `('callback', 'learner.save')`; of another, empty"
    return (url(name) or '').partition(cfg.doc_url)[2].partition('.html#')[::2]


class Api(BasicMarkdownRenderer):
    "What `show_doc` shows: a heading, the way to the source, the signature, the docstrings, and what the parameters mean"
    def __init__(self, sym, name=None, **kwargs):
        super().__init__(sym, name or qual_name(sym), **kwargs)
        self.is_property = isinstance(sym, property)

    def _repr_markdown_(self):
        return '\n\n'.join([f'### {self.nm}', f'[source]({lookup.code(self.nm)})', self._signature(), *self._docstrings(), self._meanings()])

    def _signature(self):
        sig = str(self.sig.replace(parameters=[p for p in self.sig.parameters.values() if p.name != 'self']))
        sig = re.sub(r"<(?:class '(?:\w+\.)*|function )(\w+).*?>", r'\1', sig) # classes and functions by their names alone
        return fenced(self.nm + (sig.removeprefix('()') if self.is_property else sig), 'python')

    def _docstrings(self):
        init = vars(self.sym).get('__init__') if isinstance(self.sym, type) else None
        return [d for d in (self.docs, init and init.__doc__) if d]

    def _meanings(self):
        rows = [(k.replace('return', 'returns'), v) for k, v in docments(self.sym).items() if v]
        return '\n'.join(['|parameter|meaning|', '|---|---|', *(f'|`{k}`|{v}|' for k, v in rows)]) if rows else ''


# What nbdev's processors of a notebook leave to Quarto

class show_api(exec_show_docs):
    "Execute `show_doc`, as above"
    def begin(self):
        super().begin()
        self.k.user_ns['show_doc'] = partial(show_doc, renderer=Api)


class title(Processor):
    "The front matter becomes a heading again"
    def begin(self):
        fm, path = self.nb.frontmatter_, Path(self.nb.path_).relative_to(cfg.config_path)
        self.nb.cells[0] = mk_cell(f"# {fm['title']}\n\n{fm.get('description', '')}\n\n[Notebook]({repo}/{path.as_posix()})", 'markdown')


class as_is(Processor):
    "An output that is to be shown as it is becomes a cell of Markdown"
    def begin(self): self.nb.cells = [self._markdown(c) if c.directives.get('output')=='asis' else c for c in self.nb.cells]
    def _markdown(self, cell): return mk_cell(''.join(cell.outputs[0]['data']['text/markdown']), 'markdown')


tags = {('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output', ('include', 'false'): 'remove-cell', ('code-fold', 'true'): 'hide-input'}

def options(cell):
    "What Quarto is told by the first lines of a cell, MyST-NB is told by its metadata"
    told = cell.directives
    cell.remove_directives()
    cell.metadata = {'tags': [tag for option, tag in tags.items() if option in told.items()]}
    if 'fig-alt' in told: cell.metadata['mystnb'] = {'image': {'alt': told['fig-alt']}}


class links(Processor):
    "Links to notebooks lead to their pages, and those to other files of the repository lead there"
    def begin(self): self.folder = Path(self.nb.path_).parent.relative_to(cfg.nbs_path)

    def cell(self, cell):
        if cell.cell_type=='markdown': cell.source = re.sub(r'(?<=\]\()(?![a-z]+:|#)[^)#]+', self._link, cell.source)

    def _link(self, m):
        if m[0].endswith('.ipynb'): return page(m[0]).as_posix()
        path = normpath(self.folder/m[0])
        outside = path.startswith('../') and (cfg.nbs_path/path).exists() # what is nowhere is left for Sphinx to complain of
        return f'{repo}/{path.removeprefix("../")}' if outside else m[0]


class Pages(FilterDefaults):
    "What nbdev does to a notebook, but for its links and its warning to the reader of a file, and what Quarto would have done"
    def base_procs(self): return [show_api if p is exec_show_docs else p for p in super().base_procs() if p not in (add_links, insert_warning)]
    def xtra_procs(self): return [title, as_is, options, links]


# The files for Sphinx

def page(path):
    "What the notebook at `path` is called on the site: as nbdev does it, without a number"
    return nbpath2html(path).with_suffix('.ipynb')


def sidebar():
    "A list of pages for each kind that has any"
    for kind, pattern in kinds.items():
        found = [page(p.relative_to(cfg.nbs_path)).with_suffix('').as_posix() for p in sorted(cfg.nbs_path.glob(f'{pattern}.ipynb'))]
        if found: yield mk_cell(fenced('\n'.join([':hidden:', f':caption: {kind}', *found]), '{toctree}'), 'markdown')


def text(nb):
    "The page as Markdown, for those who do not look at it"
    for cell in nb.cells:
        if 'remove-input' not in cell.metadata.get('tags', []):
            yield re.sub(r'(?<=\]\()(?![a-z]+:)([^)#]+)\.ipynb', r'\1.html.md', cell.source) if cell.cell_type=='markdown' else fenced(cell.source, 'python')
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            yield fenced(''.join(data.get('text/markdown') or data.get('text/plain') or out.get('text', '')))


def write(file):
    "Write the page of a notebook, or copy another file"
    path = file.relative_to(cfg.nbs_path)
    for folder in (pages, texts): (folder/path).parent.mkdir(parents=True, exist_ok=True)
    if file.suffix!='.ipynb': return copy(file, pages/path)
    nb = read_nb(file)
    Pages()(nb)
    (texts/page(path)).with_suffix('.html.md').write_text('\n\n'.join(text(nb)) + '\n', encoding='utf-8')
    if path==Path('index.ipynb'): nb.cells += sidebar()
    write_nb(nb, pages/page(path))


def build():
    "Write the files for Sphinx, run it, and put the site in its place if all went well"
    rmtree(work, ignore_errors=True)
    for file in nbglob(as_path=True, file_glob=''): write(file)
    failed = sphinx_build(['-q', '--fail-on-warning', '-c', 'docs', '-d', str(work/'doctrees'), str(pages), str(work/'html')])
    if failed: return failed
    rmtree(site, ignore_errors=True)
    (work/'html').rename(site)


# The extension

def note_names(app, doctree):
    "Note the headings that are names, and give them the anchors that nbdev links to, as `learner.save`"
    for section in doctree.findall(nodes.section):
        doc, anchor = place(section[0].astext())
        if doc!=app.env.docname: continue
        app.env.metadata[doc][anchor] = section['ids'][0]
        if anchor not in doctree.ids: section['ids'].append(anchor)


def link_names(app, doctree, docname):
    "Link names in backticks to where they are documented"
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext().partition('(')[0]
        to, (doc, anchor) = url(name), place(name)
        if not to or isinstance(code.parent, (nodes.reference, nodes.title)): continue
        if doc: to = f'{app.builder.get_relative_uri(docname, doc)}#{app.env.metadata[doc].get(anchor, "")}'
        code.replace_self(nodes.reference('', '', code.deepcopy(), refuri=to, internal=bool(doc)))


def setup(app):
    app.connect('doctree-read', note_names)
    app.connect('doctree-resolved', link_names)


if __name__=='__main__': sys.exit(build())
