"""Build the documentation site. nbdev processes each notebook, and Sphinx makes a page of it.

`make docs` runs this file from the root of the project. Sphinx also loads it, as the extension
that links names in backticks to their documentation."""
import ast, atexit, re, sys
from base64 import b64decode
from fnmatch import fnmatch
from functools import cache, partial
from inspect import unwrap
from os.path import normpath
from pathlib import Path
from shutil import copy, rmtree
from urllib.parse import quote

from docutils import nodes
from fastcore.docments import docments, qual_name
from fastcore.foundation import L
from fastcore.nbio import fenced, mk_cell, nb_frontmatter, read_nb, write_nb
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob, patch_name
from nbdev.processors import FilterDefaults, Processor, add_links, exec_show_docs, insert_warning
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from sphinx import addnodes
from sphinx.cmd.build import main as sphinx_build
from torch import nn

cfg = get_config()
repo = f'{cfg.git_url}/blob/{cfg.branch}'
work, site = Path('_proc'), Path('_docs')
pages, texts = work/'pages', work/'texts'

# The captions of the sidebar, each with patterns of notebooks. Of several that match, the last one counts.
# A how-to says in its front matter under which of these it belongs, as `- group: keep a model pruned`.
questions = ['choose how much and where', 'prune your kind of model', 'keep a model pruned',
             'make it small and fast', 'do more']
groups = {
    'Tutorials': ['tutorials/*'],
    **{f'How to {question}': [] for question in questions},
    'Results': ['results', 'comparisons'],
    'Explanations': ['explanations/*'],
    'Reference: callback and sparsifier': [f'??_{name}' for name in (
        'callback', 'sparsifier', 'finder', 'report', 'batchnorm', 'checkpoint')],
    'Reference: which weights, when and where': [f'??_{name}' for name in (
        'schedule', 'criteria', 'at_init', 'granularity', 'structured', 'layers', 'pools', 'distributions', 'regrow')],
    'Reference: small and fast': [f'deploy/??_{name}' for name in (
        'speed_up', 'compress', 'shrink', 'costs', 'columns', 'attention')],
    'Reference: other methods': ['methods/*'],
    'Reference: experiments': ['experiments/*'],
    'Reference: internals': [], # all others
    'Questions, words, changes': ['faq', 'glossary'],
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
        sig = re.sub(r"<(?:class '|function )([\w.]+).*?>", r'\1', sig) # of classes and functions, the names
        sig = re.sub(r"('.*?')|\b(?:[A-Za-z_]\w*\.)+", lambda m: m[1] or '', sig) # without their modules
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

    def end(self):
        super().end()
        # At exit, the shell of each notebook would collect garbage. That took longer than all else.
        atexit.unregister(self.k.atexit_operations)
        self.k.close()


def keywords_of(matter):
    "The keywords of a page's front matter, such as `- keywords: 2:4, inference speed`: a list of strings"
    return [k.strip() for k in str(matter.get('keywords', '')).split(',') if k.strip()]


def words_of(keywords):
    "The words of keywords that are more than a word"
    return [word for k in keywords for word in re.findall(r'\w+', k) if word!=k]


def page_links(nb, path):
    "Links from a page to its notebook"
    name = quote(path)
    if not any("'../" in c.source for c in nb.cells): # a notebook that reads files of the repository needs all of it
        colab = cfg.git_url.replace('github.com', 'colab.research.google.com/github')
        yield f'[Open in Colab]({colab}/blob/{cfg.branch}/{name})'
    yield f'[Notebook]({repo}/{name})'
    yield f'[Edit]({cfg.git_url}/edit/{cfg.branch}/{name})'
    yield f'[Report an issue]({cfg.git_url}/issues/new?title={name})'


class title(Processor):
    "Make a heading of the front matter, with metadata for search engines and the search of the site, and links"
    def begin(self):
        matter = self.nb.frontmatter_
        path = Path(self.nb.path_).relative_to(cfg.config_path).as_posix()
        description, keywords = matter.get('description', ''), keywords_of(matter)
        # Sphinx's search finds a keyword by its words only if they also stand alone.
        meta = dict(description=description, keywords=', '.join([*keywords, *words_of(keywords)]))
        self.nb.metadata['myst'] = {'html_meta': {k: v for k, v in meta.items() if v}}
        links = f':::{{container}} page-links\n{" ".join(page_links(self.nb, path))}\n:::'
        blocks = [f"# {matter['title']}", description, links]
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


def is_test(node):
    "Whether a statement only checks: an assertion, a call of fastcore's `test_...`, or a block of nothing else"
    if isinstance(node, (ast.With, ast.For)): return all(map(is_test, node.body))
    name = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return isinstance(node, ast.Assert) or isinstance(name, ast.Name) and name.id.startswith('test_')


def split_tests(source):
    """Divide the source of a cell into its example and its tests: two strings.

    The tests are those at the end, or directly before the expression that the cell displays."""
    try: body = ast.parse(source).body
    except SyntaxError: return source, '' # a magic command
    end = len(body) if not body or is_test(body[-1]) else len(body)-1
    start = end
    while start and is_test(body[start-1]): start -= 1
    lines, first, last = source.splitlines(), body[start-1].end_lineno if start else 0, body[end-1].end_lineno
    shares_line = any(a.end_lineno==b.lineno for a,b in zip(body, body[1:]))
    if start==end or shares_line or end<len(body) and not isinstance(body[-1], ast.Expr): return source, ''
    return '\n'.join(lines[:first] + lines[last:]).strip(), '\n'.join(lines[first:last]).strip()


class fold_tests(Processor):
    """Fold the tests of a cell, so that a reader sees the example and its outcome.

    The tests of a cell without an output stay in it, since they are its outcome, unless it has nothing else."""
    def begin(self): self.nb.cells = [c for cell in self.nb.cells for c in self._fold(cell)]

    def _fold(self, cell):
        example, test = split_tests(cell.source) if self._is_shown(cell) else (cell.source, '')
        if test and example and not cell.outputs: test = ''
        if test: cell.source = example
        if example or not test: yield cell
        if test: yield mk_cell(test, 'code', metadata={
            'tags': ['hide-cell'], 'mystnb': {'code_prompt_show': 'Test', 'code_prompt_hide': 'Test'}})

    def _is_shown(self, cell):
        hidden = {'remove-input', 'remove-cell', 'hide-input'}
        return cell.cell_type=='code' and not hidden & {*cell.metadata.get('tags', [])}


def cards(source):
    "Lists under the comment `<!-- cards -->` are shown as cards. Where the comment is unknown, they stay lists."
    return re.sub(r'<!-- cards -->\n+((?:- .*\n?)+)', r':::{container} cards\n\1\n:::\n', source)


class links(Processor):
    "Link to the pages of notebooks on this site, and to other files of the repository on GitHub"
    def begin(self): self.folder = Path(self.nb.path_).parent.relative_to(cfg.nbs_path)

    def cell(self, cell):
        if cell.cell_type!='markdown': return
        cell.source = cards(re.sub(r'(?<=\]\()(?![a-z]+:|#)[^)#]+', self._link, cell.source))

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

    def xtra_procs(self): return [title, as_is, options, fold_tests, links]


# The files for Sphinx

def page(path):
    "The path of a notebook's page. As nbdev does it, the number is left out."
    return nbpath2html(path).with_suffix('.ipynb')


@cache
def front_matter(file): return nb_frontmatter(read_nb(file))


def group(file):
    "The caption of the sidebar for a notebook, and the place of the pattern that it matches"
    path = file.relative_to(cfg.nbs_path).with_suffix('').as_posix()
    found = [(caption, i) for caption, patterns in groups.items() for i, p in enumerate(patterns) if fnmatch(path, p)]
    if found: return found[-1]
    if file.parent.name!='howto': return 'Reference: internals', 0
    question = front_matter(file).get('group', questions[-1])
    if question not in questions:
        raise ValueError(f'{path}: unknown group {question!r}. Allowed: {", ".join(questions)}')
    return f'How to {question}', 0


@cache
def notebooks():
    "The notebooks of each caption, in the order of its patterns and of the file names"
    files = [f for f in nbglob(as_path=True) if f.stem!='index']
    ordered = sorted((group(f)[1], f) for f in files)
    return {caption: [f for _, f in ordered if group(f)[0]==caption] for caption in groups}


# Pages that no notebook writes, as entries of the sidebar
before = {'Tutorials': ['All tutorials <tutorials/index>']}
after = {'Questions, words, changes': ['Changes <changelog>', 'All names and keywords <genindex>',
                                       f'Source code <{cfg.git_url}>']}


def sidebar():
    "A table of contents for each caption"
    for caption, files in notebooks().items():
        listed = [page(f.relative_to(cfg.nbs_path)).with_suffix('').as_posix() for f in files]
        listed = [*before.get(caption, []), *listed, *after.get(caption, [])]
        toctree = fenced('\n'.join([':hidden:', f':caption: {caption}', *listed]), '{toctree}')
        if listed: yield mk_cell(toctree, 'markdown')


def first_picture(file):
    "The first picture that a notebook stores, as bytes, or None"
    outputs = (out for cell in read_nb(file).cells for out in cell.get('outputs', []))
    pictures = (out['data']['image/png'] for out in outputs if 'image/png' in out.get('data', {}))
    return next(map(b64decode, pictures), None)


def tutorials():
    "Write the page of all tutorials: cards with their first pictures"
    folder = pages/'tutorials'
    def item(file):
        name, picture = page(file.name), first_picture(file)
        if picture: (folder/name).with_suffix('.png').write_bytes(picture)
        image = f'[![]({name.with_suffix(".png")})]({name}) ' if picture else ''
        return f'- {image}**[{front_matter(file)["title"]}]({name})** {front_matter(file).get("description", "")}'
    listed = '\n'.join(map(item, notebooks()['Tutorials']))
    text = f'# Tutorials\n\nLearn by doing, from the first sparse learner on\n\n<!-- cards -->\n{listed}\n'
    (folder/'index.md').write_text(cards(text), encoding='utf-8')


def changelog():
    "Write the page of CHANGELOG.md"
    text = (cfg.config_path/'CHANGELOG.md').read_text(encoding='utf-8')
    (pages/'changelog.md').write_text(text, encoding='utf-8')


def text(nb):
    "The blocks of a page as plain Markdown, which llms.txt lists for language models"
    for cell in nb.cells:
        if cell.cell_type=='markdown':
            source = re.sub(r'(?m)^:::.*\n?', '', cell.source) # containers are for Sphinx
            yield re.sub(r'(?<=\]\()(?![a-z]+:)([^)#]+)\.ipynb', r'\1.html.md', source)
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
    tutorials()
    changelog()
    (texts/'card.png').write_bytes(first_picture(cfg.nbs_path/'index.ipynb'))
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
        add_to_index(app, section[0].astext(), section['ids'][0])


def add_to_index(app, text, anchor=''):
    "List an anchor of the page that is read in the index, and return the entry"
    entry = 'single', text, anchor, 'main', None
    app.env.domains.index_domain.entries.setdefault(app.env.docname, []).append(entry)
    return entry


def note_metadata(app, doctree):
    "Use a page's keywords in the index and in the search, and its description for previews in other sites"
    for meta in list(doctree.findall(nodes.meta)):
        if meta['name']=='description': app.env.metadata[app.env.docname]['og:description'] = meta['content']
        if meta['name']!='keywords': continue
        keywords = meta['content'].split(', ')
        entries = [add_to_index(app, k) for k in keywords if k not in words_of(keywords)]
        doctree.append(addnodes.index(entries=entries)) # a search for one of them shows the page first


def of_another(code):
    """Whether a name in backticks is another package's, although it may be ours too.

    So it is in *fasterai's `Schedule`*, and in a table that has a column `here`, in the other columns."""
    sentence = ''.join(n.astext() for n in code.parent[:code.parent.index(code)])
    if re.search(r"fasterai('s| has an?) $", sentence): return True
    entry = code.parent.parent
    if not isinstance(entry, nodes.entry): return False
    heads = [e.astext() for e in next(entry.parent.parent.parent.findall(nodes.thead))[0]]
    return 'here' in heads and heads[entry.parent.index(entry)]!='here'


def link_names(app, doctree, docname):
    "Link names in backticks to their documentation"
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext().partition('(')[0]
        address = None if name.startswith('_') else url(name)
        if not address or isinstance(code.parent, (nodes.reference, nodes.title)) or of_another(code): continue
        page, anchor = page_and_anchor(address)
        if page: address = f'{app.builder.get_relative_uri(docname, page)}#{app.env.metadata[page].get(anchor, "")}'
        code.replace_self(nodes.reference('', '', code.deepcopy(), refuri=address, internal=bool(page)))


def setup(app):
    app.connect('doctree-read', note_names)
    app.connect('doctree-read', note_metadata)
    app.connect('doctree-resolved', link_names)


if __name__=='__main__': sys.exit(build())
