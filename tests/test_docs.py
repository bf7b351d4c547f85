"Documentation: the site is whole, and a reader finds what they look for."
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
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

root = Path(__file__).parent.parent
cfg = get_config(root)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a copy of the project at a path with a space"
    copy = shutil.copytree(root, tmp_path_factory.mktemp('docs')/'a copy', ignore=shutil.ignore_patterns('.*', '_docs', '_proc', 'demo', '__pycache__'))
    (copy/'.venv').symlink_to(sys.prefix)
    res = subprocess.run(['make', 'docs', '-o', '.venv/ready'], cwd=copy, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return copy/'_docs'


@pytest.fixture(scope='module')
def pages(site):
    "The pages of the site, parsed, by their paths in it"
    return {p.relative_to(site).as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in site.rglob('*.html')}


@pytest.mark.parametrize('kind, folder', [('Tutorials', 'tutorials'), ('How-to', 'howto'), ('Reference', '.'), ('Explanations', 'explanations')])
def test_sidebar(pages, kind, folder):
    "The sidebar has the page of each notebook, among those of its kind, in the order of the files"
    caption = pages['index.html'].find(class_='caption', string=kind)
    listed = [a['href'] for a in caption.find_next('ul')('a')] if caption else []
    assert listed == [nbpath2html(p.relative_to(cfg.nbs_path)).as_posix() for p in sorted((cfg.nbs_path/folder).glob('*.ipynb')) if p.stem not in ('index', 'results')]


def test_cells(pages):
    "A page shows the code that its notebook shows, without what is meant for nbdev"
    for p in cfg.nbs_path.rglob('[!._]*.ipynb'):
        cells = [c for c in read_nb(p).cells if c.cell_type == 'code' and not c.directives.keys() & {'default_exp', 'export', 'exporti', 'hide'}]
        cells = [c for c in cells if c.directives.get('echo') != 'false']
        for c in cells: c.remove_directives()
        page = pages[nbpath2html(p.relative_to(cfg.nbs_path)).as_posix()]
        assert [e.text.strip() for e in page.select('.cell_input')] == [c.source.strip() for c in cells]


def test_links(pages, site):
    "Each link and picture of the site that does not lead away from it leads to a file, and to an anchor of it"
    anchors = {path: {t['id'] for t in page(id=True)} for path, page in pages.items()}
    def dead(path, to):
        to = urlsplit(urljoin(path, to))
        return not to.scheme and not ((site/to.path).is_file() and (not to.fragment or to.fragment in anchors[to.path]))
    assert not [(path, to) for path, page in pages.items() for t in page.select('[href], [src]') if dead(path, to := t.get('href') or t.get('src'))]


def test_texts(site):
    "Each page as Markdown that llms.txt or another points to is there"
    for p in [site/'llms.txt', *site.rglob('*.md')]:
        for to in re.findall(r'\]\(([^)#]+\.html\.md)', p.read_text(encoding='utf-8')):
            assert (p.parent/to.replace(cfg.doc_url, f'{site}/')).is_file(), (p, to)


@pytest.mark.parametrize('module', _modidx.d['syms'])
def test_reference(pages, module):
    "Each public function and class has its heading, and each heading of a name the anchor that nbdev links to"
    names = {name.removeprefix(f'{module}.'): where.split('#') for name, (where, _) in _modidx.d['syms'][module].items()}
    headed = {n for n, (page, _) in names.items() if any(h.contents[0]==n for h in pages[page](['h2', 'h3']))}
    assert headed >= names.keys() & {*import_module(module).__all__}
    for page, anchor in map(names.get, headed): assert pages[page].find(id=anchor), anchor


def test_names(pages):
    "Names in backticks lead to their documentation, here and elsewhere"
    linked = {(a.text, a['href']) for page in pages.values() for a in page.select('a.reference:has(> code)')}
    assert linked >= {('SparsifyCallback', 'callback.html#sparsifycallback'), ('fit_one_cycle', 'https://docs.fast.ai/callback.schedule.html#learner.fit_one_cycle')}
    assert any(to.startswith('https://pytorch.org/docs/') for _, to in linked)


chromium = shutil.which('chromium') or shutil.which('google-chrome')
needs_browser = pytest.mark.skipif(not (chromium and shutil.which('chromedriver')), reason='needs Chromium and its driver: apt-get install chromium chromium-driver')


@pytest.fixture(scope='module')
def address(site):
    "Where the site is served"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('localhost', 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://localhost:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module', params=[1280, 390], ids=['desktop', 'phone'])
def browser(request):
    "A browser as wide as a desk or a phone"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for arg in ('--headless', '--no-sandbox', '--disable-dev-shm-usage'): options.add_argument(arg)
    options.add_experimental_option('mobileEmulation', {'deviceMetrics': {'width': request.param, 'height': 844, 'pixelRatio': 1.}})
    options.set_capability('goog:loggingPrefs', {'browser': 'SEVERE'})
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver'))) as driver: yield driver


def see(browser, css, text=None):
    "The first of these elements that is shown, with this text if one is given, as soon as there is one"
    def found(_): return next((e for e in browser.find_elements(By.CSS_SELECTOR, css) if e.is_displayed() and text in (None, e.text)), None)
    element = WebDriverWait(browser, 10).until(found, f'{css} {text}')
    browser.execute_script('arguments[0].scrollIntoView({behavior: "instant", block: "center"})', element)
    return element


def open_sidebar(browser):
    "A phone hides it behind a button"
    for button in browser.find_elements(By.CSS_SELECTOR, '.mobile-header label[for=__navigation]'):
        if button.is_displayed(): button.click()


@needs_browser
def test_reader(browser, address):
    "A reader goes by the sidebar to a page, searches for a name, and finds its signature and what its parameters mean"
    browser.get(address)
    assert see(browser, 'mjx-container')
    open_sidebar(browser)
    see(browser, '.sidebar-tree a', 'sparsifier').click()
    assert see(browser, 'h1', 'sparsifier')
    open_sidebar(browser)
    see(browser, 'input[name=q]').send_keys('SparsifyCallback\n')
    # By the keyboard: summaries that arrive later move the results away from under a pointer.
    see(browser, '#search-results a', 'callback > SparsifyCallback').send_keys('\n')
    section = see(browser, '#sparsifycallback, section:has(> #sparsifycallback)')
    assert section.find_element(By.CSS_SELECTOR, 'pre').text.startswith('SparsifyCallback(sparsity=None, ')
    assert [e.text for e in section.find_elements(By.CSS_SELECTOR, 'td:first-child')] == list(signature(SparsifyCallback).parameters)


@needs_browser
def test_no_errors(browser, address, pages):
    "No page logs an error, asks another host, or is wider than the screen"
    for page in pages:
        browser.get(address + page)
        assert browser.get_log('browser') == [], page
        assert browser.execute_script('return performance.getEntriesByType("resource").every(r => r.name.startsWith(arguments[0]))', address), page
        assert browser.execute_script('let e = document.querySelector(".content"); return e.scrollWidth <= e.clientWidth'), page
