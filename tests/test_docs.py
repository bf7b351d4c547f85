"The documentation site: its pages are complete, its links work, and a reader finds what they look for."
import re, shutil, subprocess, sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from inspect import signature
from pathlib import Path
from threading import Thread
from urllib.parse import urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from onecycle_prune import _modidx
from onecycle_prune.callback import SparsifyCallback
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

root = Path(__file__).parent.parent
cfg = get_config(root)
repo = f'{cfg.git_url}/blob/{cfg.branch}/'
pytestmark = pytest.mark.slow

# The captions of the sidebar, and the notebooks of each.
groups = {
    'Tutorials': 'tutorials/*.ipynb',
    'How-to': 'howto/*.ipynb',
    'Reference': '[0-2][0-9]_*.ipynb',
    'Reference: selection': 'select/*.ipynb',
    'Reference: deployment': 'deploy/*.ipynb',
    'Reference: methods': 'methods/*.ipynb',
    'Reference: experiments': 'experiments/*.ipynb',
    'Reference: internals': '00_*.ipynb',
    'Explanations': 'explanations/*.ipynb',
    'Results': 'results.ipynb',
}


def html(notebook):
    "The path in the site of a notebook's page"
    return nbpath2html(notebook.relative_to(cfg.nbs_path)).as_posix()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a copy of the project whose path has a space"
    ignored = shutil.ignore_patterns('.*', '_docs', '_proc', 'demo', '__pycache__')
    copy = shutil.copytree(root, tmp_path_factory.mktemp('docs')/'a copy', ignore=ignored)
    (copy/'.venv').symlink_to(sys.prefix)
    res = subprocess.run(['make', 'docs', '-o', '.venv/ready'], cwd=copy, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return copy/'_docs'


@pytest.fixture(scope='module')
def pages(site):
    "The parsed pages of the site: {path: page}"
    files = site.rglob('*.html')
    return {p.relative_to(site).as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in files}


def test_sidebar(pages):
    "The sidebar has the page of each notebook under the caption of its kind, in the order of the files"
    captions = pages['index.html'].select('.sidebar-tree .caption')
    listed = {c.text.strip(): [a['href'] for a in c.find_next('ul')('a')] for c in captions}
    expected = {caption: [html(p) for p in sorted(cfg.nbs_path.glob(pattern))] for caption, pattern in groups.items()}
    expected['Reference'] = [p for p in expected['Reference'] if p not in expected['Reference: internals']]
    assert list(listed.items()) == [(caption, pages) for caption, pages in expected.items() if pages]
    every = {html(p) for p in cfg.nbs_path.rglob('[!._]*.ipynb')}
    assert {page for group in listed.values() for page in group} == every - {'index.html'}


def test_cells(pages):
    "A page shows the visible cells of its notebook, without their lines of options"
    hidden = {'default_exp', 'export', 'exporti', 'hide'}
    for p in cfg.nbs_path.rglob('[!._]*.ipynb'):
        cells = [c for c in read_nb(p).cells if c.cell_type == 'code' and not c.directives.keys() & hidden]
        cells = [c for c in cells if c.directives.get('echo') != 'false']
        for c in cells: c.remove_directives()
        assert [e.text.strip() for e in pages[html(p)].select('.cell_input')] == [c.source.strip() for c in cells]


def test_links(pages, site):
    "Each link within the site, and each picture, leads to a file that exists and to an anchor in it"
    anchors = {path: {t['id'] for t in page(id=True)} for path, page in pages.items()}
    def is_dead(path, to):
        to = urlsplit(urljoin(path, to))
        if to.scheme: return False
        return not (site/to.path).is_file() or bool(to.fragment) and to.fragment not in anchors[to.path]
    tags = [(path, t) for path, page in pages.items() for t in page.select('[href], [src]')]
    links = [(path, t.get('href') or t.get('src')) for path, t in tags]
    assert not [link for link in links if is_dead(*link)]


def test_texts(site):
    "Each page in Markdown that llms.txt or another page in Markdown links to exists"
    for p in [site/'llms.txt', *site.rglob('*.md')]:
        for to in re.findall(r'\]\(([^)#]+\.html\.md)', p.read_text(encoding='utf-8')):
            assert (p.parent/to.replace(cfg.doc_url, f'{site}/')).is_file(), (p, to)


@pytest.mark.parametrize('module', _modidx.d['syms'])
def test_reference(pages, module):
    "Each public function and class has a heading, with the anchor that nbdev links to"
    symbols = _modidx.d['syms'][module].items()
    names = {name.removeprefix(f'{module}.'): address.split('#') for name, (address, _) in symbols}
    headed = {n for n, (page, _) in names.items() if any(h.contents[0]==n for h in pages[page](['h2', 'h3']))}
    assert headed >= names.keys() & {*import_module(module).__all__}
    for page, anchor in map(names.get, headed): assert pages[page].find(id=anchor), anchor


def test_source(pages):
    "The link under the heading of a function or class leads to the line that defines it"
    links = [a for page in pages.values() for a in page.find_all('a', string='source')]
    assert len(links) > 50
    for a in links:
        name = a.find_previous(['h2', 'h3']).contents[0].split('.')[-1]
        file, line = a['href'].removeprefix(repo).split('#L')
        code = (root/file).read_text(encoding='utf-8').splitlines()[int(line)-1]
        assert re.match(rf'\s*(def|class) {name}\b', code), (a['href'], name)


def test_names(pages):
    "Names in backticks lead to their documentation: on this site, at fastai's and at PyTorch's"
    links = [a for page in pages.values() for a in page.select('a.reference:has(> code)')]
    linked = {(a.text, a['href']) for a in links}
    assert ('SparsifyCallback', 'callback.html#sparsifycallback') in linked
    assert ('SparsifyCallback', '../callback.html#sparsifycallback') in linked
    assert ('fit_one_cycle', 'https://docs.fast.ai/callback.schedule.html#learner.fit_one_cycle') in linked
    assert any(to.startswith('https://pytorch.org/docs/') for _, to in linked)
    assert not [name for name, _ in linked if name.startswith('_')]


chromium = shutil.which('chromium') or shutil.which('google-chrome')
has_browser = chromium and shutil.which('chromedriver')
needs_browser = pytest.mark.skipif(not has_browser, reason='needs chromium and chromium-driver, from apt-get install')


@pytest.fixture(scope='module')
def address(site):
    "The address at which a local server serves the site"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('localhost', 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://localhost:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module', params=[1280, 390], ids=['desktop', 'phone'])
def browser(request):
    "A browser with the width of a desktop or of a phone"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for arg in ('--headless', '--no-sandbox', '--disable-dev-shm-usage'): options.add_argument(arg)
    metrics = {'width': request.param, 'height': 844, 'pixelRatio': 1.}
    options.add_experimental_option('mobileEmulation', {'deviceMetrics': metrics})
    options.set_capability('goog:loggingPrefs', {'browser': 'SEVERE'})
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver'))) as driver: yield driver


def find(browser, css, text=None, act=None):
    """Wait for the first visible element that matches `css` and has this `text`. Return it, or do `act` with it.

    While a page loads, elements are replaced and move, so both are tried again until they succeed."""
    def attempt(_):
        visible = (e for e in browser.find_elements(By.CSS_SELECTOR, css) if e.is_displayed())
        element = next((e for e in visible if text in (None, e.text)), None)
        if element is None: return None
        browser.execute_script('arguments[0].scrollIntoView({behavior: "instant", block: "center"})', element)
        if act: act(element)
        return element
    retried = (StaleElementReferenceException, ElementClickInterceptedException)
    return WebDriverWait(browser, 30, ignored_exceptions=retried).until(attempt, f'{css} {text}')


def click(element): element.click()


def open_sidebar(browser):
    "Open the sidebar on a phone, where a button hides it"
    for button in browser.find_elements(By.CSS_SELECTOR, '.mobile-header label[for=__navigation]'):
        if button.is_displayed(): button.click()


@needs_browser
def test_reader(browser, address):
    "A reader opens a page by the sidebar, searches for a name, and finds its signature and its parameters"
    browser.get(address)
    assert find(browser, 'mjx-container')
    open_sidebar(browser)
    find(browser, '.sidebar-tree a', 'sparsifier', click)
    assert find(browser, 'h1', 'sparsifier')
    open_sidebar(browser)
    find(browser, 'input[name=q]').send_keys('SparsifyCallback\n')
    # Summaries that load later move the results away from under a pointer. The keyboard still finds them.
    find(browser, '#search-results a', 'callback > SparsifyCallback', lambda e: e.send_keys('\n'))
    section = find(browser, '#sparsifycallback, section:has(> #sparsifycallback)')
    assert section.find_element(By.CSS_SELECTOR, 'pre').text.startswith('SparsifyCallback(sparsity')
    parameters = [e.text for e in section.find_elements(By.CSS_SELECTOR, 'td:first-child')]
    assert parameters == list(signature(SparsifyCallback).parameters)


@needs_browser
def test_no_errors(browser, address, pages):
    "No page logs an error, loads from another host, or is wider than the screen"
    for page in pages:
        browser.get(address + page)
        assert browser.get_log('browser') == [], page
        loaded = browser.execute_script('return performance.getEntriesByType("resource").map(r => r.name)')
        assert not [name for name in loaded if not name.startswith(address)], page
        widths = 'let e = document.querySelector(".content"); return [e.scrollWidth, e.clientWidth]'
        content, screen = browser.execute_script(widths)
        assert content <= screen, page
