"Write README.md from nbs/index.ipynb. nbdev-readme would do the same, but it needs Quarto."
import re
from base64 import b64decode
from pathlib import Path
from posixpath import normpath
from shutil import rmtree
from textwrap import indent

from fastcore.nbio import read_nb

figures = Path('index_files')


def output(out, figure, alt):
    """One output of a cell as Markdown. A picture is written to the file `figure`.

    HTML is left out, because GitHub drops its styles."""
    data = out.get('data', {})
    if 'image/png' in data:
        figures.mkdir(exist_ok=True)
        figure.write_bytes(b64decode(data['image/png']))
        return f'![{alt}]({figure.as_posix()})'
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    return indent(''.join(data.get('text/plain') or out.get('text', '')).rstrip(), '    ')


def links_from_root(source):
    "Links of the index notebook, as seen from the root of the project"
    return re.sub(r'\]\((?![a-z]+:|#)([^)]*)', lambda m: f"]({normpath('nbs/'+m[1])}", source)


def blocks(cell):
    "The Markdown of a cell: its source, and each of its outputs"
    options = cell.directives
    if 'hide' in options: return
    cell.remove_directives()
    if cell.cell_type == 'markdown': yield links_from_root(cell.source)
    elif options.get('echo') != 'false': yield f'```python\n{cell.source.strip()}\n```'
    for i, out in enumerate(cell.get('outputs', [])):
        yield output(out, figures/f'{cell.id}-{i}.png', options.get('fig-alt', ''))


rmtree(figures, ignore_errors=True)
cells = read_nb('nbs/index.ipynb').cells
text = '\n\n'.join(b for cell in cells for b in blocks(cell) if b.strip())
header = '<!-- Written from nbs/index.ipynb by `make prepare` -->'
Path('README.md').write_text(f'{header}\n\n{text}\n', encoding='utf-8')
