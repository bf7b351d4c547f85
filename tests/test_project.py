"The project's files: those that repeat a fact agree, the style is kept, and the wheel holds the package alone."
import ast, re, subprocess, sys
from configparser import ConfigParser
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import onecycle_prune.all, pytest, yaml
from fastcore.nbio import read_nb
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).parent.parent
package = root/'onecycle_prune'
notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
cfg = ConfigParser()
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(root/'nbs').as_posix())


def read(path): return (root/path).read_text(encoding='utf-8')


def run(*cmd, cwd):
    "Run a command, and show its output if it fails"
    res = subprocess.run(cmd, cwd=cwd, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr


@pytest.fixture
def copy(tmp_path):
    "A copy of the project to build in. Its path has a space."
    ignored = ignore_patterns('.*', 'build', 'demo', '*.egg-info', '__pycache__', '_docs', '_proc')
    return copytree(root, tmp_path/'a copy', ignore=ignored)


# What `make prepare` writes

def prepared_files(folder):
    "The contents of all files that `make prepare` may write"
    paths = [folder/'README.md', *(p for d in ('nbs', 'onecycle_prune', 'index_files') for p in (folder/d).rglob('*'))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths
            if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}


def test_prepared(copy):
    "The modules and README.md agree with the notebooks, and the notebooks are clean"
    for p in (copy/'onecycle_prune').rglob('*.py'):
        # A module whose notebook was deleted must not stay. `all` is written by hand, as fastai's is.
        if p.name not in ('__init__.py', 'all.py'): p.unlink()
    (copy/'.venv').symlink_to(sys.prefix)
    run('make', 'prepare', '-o', '.venv/ready', cwd=copy)
    old, new = prepared_files(root), prepared_files(copy)
    stale = [f for f in sorted(old.keys() | new.keys()) if old.get(f) != new.get(f)]
    assert not stale, 'run `make prepare`'


# The wheel

@pytest.fixture
def wheel(copy, tmp_path):
    "The wheel of the project, built without a network"
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), '.', cwd=copy)
    return ZipFile(next(tmp_path.glob('*.whl')))


def test_wheel(wheel):
    "The wheel holds the modules, the mark that they have types, and the metadata of settings.ini"
    names = wheel.namelist()
    info = next(n.split('/')[0] for n in names if '.dist-info/' in n)
    files = {n for n in names if not n.startswith(f'{info}/')}
    assert files == {p.relative_to(root).as_posix() for p in [*package.rglob('*.py'), package/'py.typed']}
    metadata = message_from_bytes(wheel.read(f'{info}/METADATA'))
    assert metadata['Name'] == 'onecycle_prune'
    assert metadata['Version'] == onecycle_prune.__version__
    assert metadata['Summary'] == cfg['description']
    assert metadata['License-Expression'] == cfg['license']
    assert metadata['Requires-Python'] == f">={cfg['min_python']}"
    scripts = wheel.read(f'{info}/entry_points.txt').decode()
    for script in cfg['console_scripts'].split(): assert script.replace('=', ' = ') in scripts


# Facts that stand in several files

@pytest.mark.parametrize('key', ['description', 'author', 'license', 'min_python'])
def test_one_place(key):
    "Neither setup.py nor pyproject.toml repeats what settings.ini says"
    for f in ('setup.py', 'pyproject.toml'): assert cfg[key] not in read(f)


def test_citation():
    "The citation file names the version, license and links of the package, and the paper that README cites"
    cited = yaml.safe_load(read('CITATION.cff'))
    assert cited['version'] == onecycle_prune.__version__
    assert cited['license'] == cfg['license']
    assert cited['abstract'] == cfg['description']
    for link in ('repository-code', 'url'): assert f'"{cited[link]}"' in read('pyproject.toml')
    paper, readme = cited['preferred-citation'], read('README.md')
    authors = ' and '.join(f"{a['family-names']}, {a['given-names']}" for a in paper['authors'])
    for fact in (paper['title'], authors, paper['journal'], str(paper['year'])): assert f'{{{fact}}}' in readme


def test_oldest_python():
    "The workflow tests the oldest Python of settings.ini, and ruff knows that it is the oldest"
    jobs = yaml.safe_load(read('.github/workflows/test.yml'))['jobs']
    assert jobs['test']['strategy']['matrix']['python'][0] == cfg['min_python']
    assert f'''target-version = "py{cfg['min_python'].replace('.', '')}"''' in read('pyproject.toml')


# What the package needs

def imports(path):
    "The top-level names of the libraries that a module imports, also inside its functions"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (o.name.split('.')[0] for o in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


def declared():
    "The distributions that settings.ini declares for users of the package, in canonical form"
    keys = [k for k in cfg if k.endswith('requirements') and k not in ('dev_requirements', 'docs_requirements')]
    return {canonicalize_name(Requirement(r).name) for k in keys for r in cfg[k].split()}


@pytest.mark.parametrize('path', sorted(package.rglob('*.py')), ids=lambda p: p.relative_to(package).as_posix())
def test_imports(path):
    "settings.ini declares each library that a module imports"
    distributions = packages_distributions()
    for name in {*imports(path)} - {*sys.stdlib_module_names, package.name}:
        # A library that is not installed here is taken to be named as it is imported.
        providers = {canonicalize_name(d) for d in distributions.get(name, [name])}
        assert providers & declared(), f'{name} is imported and not declared'


# Style. `make test` runs ruff too, which does not tell visible cells from others.

def is_visible(cell):
    "Whether a reader of the site sees the code of this cell"
    options = cell.directives
    return not {'default_exp', 'export', 'exporti', 'hide'} & options.keys() and options.get('echo') != 'false'


@each_notebook
def test_line_length(path):
    "Code that the site shows has at most 85 characters a line, and other code at most 120"
    cells = [c for c in read_nb(path).cells if c.cell_type == 'code']
    lines = [(line, 85 if is_visible(c) else 120) for c in cells for line in c.source.splitlines()]
    assert not [line for line, allowed in lines if len(line) > allowed and not line.startswith('#|')]


@pytest.mark.parametrize('path', [p for p in notebooks if p.parent.name == 'howto'], ids=lambda p: p.name)
def test_answer_first(path):
    "The first code that a reader of a how-to sees, after the imports, is about this package"
    cells = [c for c in read_nb(path).cells if c.cell_type == 'markdown' or is_visible(c)]
    fences = [re.findall(r'```python\n(.*?)```', c.source, re.DOTALL) if c.cell_type == 'markdown' else [c.source]
              for c in cells]
    def imports(code): return all(re.match('import|from', line) for line in code.splitlines())
    code = next(code for found in fences for code in found if not imports(code))
    assert set(re.findall(r'\w+', code)) & set(onecycle_prune.all.__all__)


@each_notebook
def test_colab(path):
    "The first cell of code installs the package on Colab, unless the notebook reads files of the repository"
    cells = [c for c in read_nb(path).cells if c.cell_type == 'code']
    installs = ['/content ] && pip install' in c.source for c in cells]
    assert not any(installs[1:])
    assert installs[0] != any("'../" in c.source for c in cells)


@each_notebook
def test_kernel(path):
    "Each notebook names Python as its language, so that an editor and the site colour its code"
    assert read_nb(path).metadata['kernelspec'] == {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
