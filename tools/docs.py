"""Build the documentation site. nbdev processes each notebook, and Sphinx makes a page of it.

`make docs` runs this file from the root of the project. Sphinx also loads it, as the extension
that links names in backticks to their documentation."""
import ast, re, sys
from functools import cache, partial
from inspect import unwrap
from os.path import normpath
from pathlib import Path
from shutil import copy, rmtree

from docutils import nodes
from fastcore.docments import docments, qual_name
from fastcore.foundation import L
from fastcore.nbio import fenced, mk_cell, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob, patch_name
from nbdev.processors import FilterDefaults, Processor, add_links, exec_show_docs, insert_warning
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from sphinx.cmd.build import main as sphinx_build
from torch import nn

cfg = get_config()
repo = f'{cfg.git_url}/blob/{cfg.branch}'
work, site = Path('_proc'), Path('_docs')
pages, texts = work/'pages', work/'texts'

# The sidebar has a group of pages for each of these captions, with the notebooks that match its patterns.
groups = {
    'Tutorials': 'tutorials/*',
    'How-to': 'howto/*',
    'Reference': ['0[1-9]*', '[12]*'],
    'Reference: selection': 'select/*',
    'Reference: deployment': 'deploy/*',
    'Reference: methods': 'methods/*',
    'Reference: experiments': 'experiments/*',
    'Reference: internals': '00*',
    'Explanations': 'explanations/*',
    'Results': 'results',
}


# Names

lookup = NbdevLookup(strip_libs=f'{cfg.lib_name} fastai', ns={'nn': nn})

def url(name):
    """The address of the documentation of `name`: ours, fastai's, PyTorch's or another that nbdev knows.

    A method without its class is one of `Sparsifier` or `Learner`."""
    return lookup.doc(f'Sparsifier.{name}') or lookup.doc(name) or lookup.doc(f'Learner.{name}')


def page_and_anchor(address):
    "A page of this site and an anchor on it, such as `('select/core', 'select')`; two empty strings for another site"
    return (address or '').partition(cfg.doc_url)[2].partition('.html#')[::2]


@cache
def documented():
    "The names that nbdev documents on this site: {(page, name): anchor}"
    found = {}
    for module, symbols in lookup.entries[cfg.lib_name]['syms'].items():
        for name, (address, *_) in symbols.items():
            page, anchor = page_and_anchor(address)
            found[page, name.removeprefix(f'{module}.')] = anchor
    return found


@cache
def line_numbers(path):
    "The lines of a module that define functions, classes and methods: {name: line number}"
    lines = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        lines.update(dict.fromkeys(L(patch_name(node)), node.lineno)) # a patch of several classes has several names
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, ast.FunctionDef): lines[f'{node.name}.{part.name}'] = part.lineno
    return lines


def source(module, name):
    "The address of the line that defines `name` in `module`, such as `select.core`"
    path = f"{cfg.lib_name}/{module.replace('.', '/')}.py"
    return f'{repo}/{path}#L{line_numbers(path).get(name, 1)}'


class Api(BasicMarkdownRenderer):
    "The output of `show_doc`: heading, link to the source, signature, docstrings and a table of the parameters"
    def __init__(self, sym, name=None, module='', **kwargs):
        super().__init__(sym, name or qual_name(sym), **kwargs)
        self.module = module
        self.is_property = isinstance(sym, property)

    def _repr_markdown_(self):
        heading = [f'### {self.nm}', f'[source]({source(self.module, self.nm)})']
        return '\n\n'.join([*heading, self._signature(), *self._docstrings(), self._parameters()])

    def _signature(self):
        sig = str(self.sig.replace(parameters=[p for p in self.sig.parameters.values() if p.name != 'self']))
        sig = re.sub(r"<(?:class '(?:\w+\.)*|function )(\w+).*?>", r'\1', sig) # of classes and functions, the names
        return fenced(self.nm + (sig.removeprefix('()') if self.is_property else sig), 'python')

    def _docstrings(self):
        # A decorator may list the arguments in the docstring of `__init__`. Here a table does.
        init = unwrap(vars(self.sym).get('__init__')) if isinstance(self.sym, type) else None
        return [d for d in (self.docs, init and init.__doc__) if d]

    def _parameters(self):
        # a row of a table is one line
        rows = [(k.replace('return', 'returns'), ' '.join(v.split())) for k, v in docments(self.sym).items() if v]
        if not rows: return ''
        return '\n'.join(['|parameter|meaning|', '|---|---|', *(f'|`{k}`|{v}|' for k, v in rows)])


# Processors of a notebook, for what nbdev leaves to Quarto

class show_api(exec_show_docs):
    "Run the cells of `show_doc` with `Api`"
    def begin(self):
        super().begin()
        module = next((c.directives['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives), '')
        self.k.user_ns['show_doc'] = partial(show_doc, renderer=partial(Api, module=module))


class title(Processor):
    "Make a heading of the front matter, and add a link to the notebook"
    def begin(self):
        matter = self.nb.frontmatter_
        path = Path(self.nb.path_).relative_to(cfg.config_path).as_posix()
        blocks = [f"# {matter['title']}", matter.get('description', ''), f'[Notebook]({repo}/{path})']
        self.nb.cells[0] = mk_cell('\n\n'.join(blocks), 'markdown')


class as_is(Processor):
    "Replace a cell whose option is `output: asis` by its output, as a cell of Markdown"
    def begin(self):
        self.nb.cells = [self._markdown(c) if c.directives.get('output')=='asis' else c for c in self.nb.cells]

    def _markdown(self, cell): return mk_cell(''.join(cell.outputs[0]['data']['text/markdown']), 'markdown')


# Quarto reads a cell's options from its first lines. MyST-NB reads tags from its metadata.
tags = {
    ('echo', 'false'): 'remove-input',
    ('output', 'false'): 'remove-output',
    ('include', 'false'): 'remove-cell',
    ('code-fold', 'true'): 'hide-input',
}

def options(cell):
    "Translate the options of a cell for MyST-NB"
    given = cell.directives
    cell.remove_directives()
    cell.metadata = {'tags': [tag for option, tag in tags.items() if option in given.items()]}
    if 'fig-alt' in given: cell.metadata['mystnb'] = {'image': {'alt': given['fig-alt']}}


class links(Processor):
    "Link to the pages of notebooks on this site, and to other files of the repository on GitHub"
    def begin(self): self.folder = Path(self.nb.path_).parent.relative_to(cfg.nbs_path)

    def cell(self, cell):
        if cell.cell_type!='markdown': return
        cell.source = re.sub(r'(?<=\]\()(?![a-z]+:|#)[^)#]+', self._link, cell.source)

    def _link(self, m):
        if m[0].endswith('.ipynb'): return page(m[0]).as_posix()
        path = normpath(self.folder/m[0])
        outside = path.startswith('../') and (cfg.nbs_path/path).exists() # Sphinx complains about a link to no file
        return f'{repo}/{path.removeprefix("../")}' if outside else m[0]


class Pages(FilterDefaults):
    "nbdev's processors of a notebook, with the ones above in place of its links and its warning"
    def base_procs(self):
        kept = [p for p in super().base_procs() if p not in (add_links, insert_warning)]
        return [show_api if p is exec_show_docs else p for p in kept]

    def xtra_procs(self): return [title, as_is, options, links]


# The files for Sphinx

def page(path):
    "The path of a notebook's page. As nbdev does it, the number is left out."
    return nbpath2html(path).with_suffix('.ipynb')


def sidebar():
    "A table of contents for each group that has notebooks, in the order of their file names"
    for caption, patterns in groups.items():
        files = sorted(f for pattern in L(patterns) for f in cfg.nbs_path.glob(f'{pattern}.ipynb'))
        listed = [page(f.relative_to(cfg.nbs_path)).with_suffix('').as_posix() for f in files]
        toctree = fenced('\n'.join([':hidden:', f':caption: {caption}', *listed]), '{toctree}')
        if listed: yield mk_cell(toctree, 'markdown')


def text(nb):
    "The blocks of a page as plain Markdown, which llms.txt lists for language models"
    for cell in nb.cells:
        if cell.cell_type=='markdown': yield re.sub(r'(?<=\]\()(?![a-z]+:)([^)#]+)\.ipynb', r'\1.html.md', cell.source)
        elif 'remove-input' not in cell.metadata.get('tags', []): yield fenced(cell.source, 'python')
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            yield fenced(''.join(data.get('text/markdown') or data.get('text/plain') or out.get('text', '')))


def write(file):
    "Write the page of a notebook, or copy a file that is none"
    path = file.relative_to(cfg.nbs_path)
    for folder in (pages, texts): (folder/path).parent.mkdir(parents=True, exist_ok=True)
    if file.suffix!='.ipynb':
        copy(file, pages/path)
        return
    nb = read_nb(file)
    Pages()(nb)
    (texts/page(path)).with_suffix('.html.md').write_text('\n\n'.join(text(nb)) + '\n', encoding='utf-8')
    if path==Path('index.ipynb'): nb.cells += sidebar()
    write_nb(nb, pages/page(path))


def build():
    "Write the files for Sphinx and run it. Replace the site if there was no warning, and return Sphinx's exit code."
    rmtree(work, ignore_errors=True)
    for file in nbglob(as_path=True, file_glob=''): write(file)
    flags = ['-q', '--fail-on-warning', '-c', 'docs', '-d', str(work/'doctrees')]
    failed = sphinx_build([*flags, str(pages), str(work/'html')])
    if not failed:
        rmtree(site, ignore_errors=True)
        (work/'html').rename(site)
    return failed


# The extension of Sphinx

def note_names(app, doctree):
    "Give the heading of a documented name the anchor that nbdev links to, such as `sparsifier.prune`"
    page = app.env.docname
    for section in doctree.findall(nodes.section):
        anchor = documented().get((page, section[0].astext()))
        if not anchor: continue
        app.env.metadata[page][anchor] = section['ids'][0]
        if anchor not in doctree.ids: section['ids'].append(anchor)


def link_names(app, doctree, docname):
    "Link names in backticks to their documentation"
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext().partition('(')[0]
        address = None if name.startswith('_') else url(name)
        if not address or isinstance(code.parent, (nodes.reference, nodes.title)): continue
        page, anchor = page_and_anchor(address)
        if page: address = f'{app.builder.get_relative_uri(docname, page)}#{app.env.metadata[page].get(anchor, "")}'
        code.replace_self(nodes.reference('', '', code.deepcopy(), refuri=address, internal=bool(page)))


def setup(app):
    app.connect('doctree-read', note_names)
    app.connect('doctree-resolved', link_names)


if __name__=='__main__': sys.exit(build())
