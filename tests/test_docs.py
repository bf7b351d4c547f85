"The documentation site: its pages are complete, its links work, and a reader finds what they look for."
import ast, re, shutil, subprocess, sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from inspect import signature
from pathlib import Path
from threading import Thread
from urllib.parse import urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup
from fastcore.nbio import nb_frontmatter, read_nb
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
folder = urlsplit(cfg.doc_url).path
pytestmark = pytest.mark.slow

# The captions of the sidebar, each with a page that belongs there.
captions = {
    'Tutorials': 'tutorials/first.html',
    'How to choose how much and where': 'howto/sparsity.html',
    'How to prune your kind of model': 'howto/pretrained.html',
    'How to keep a model pruned': 'howto/resume.html',
    'How to make it small and fast': 'howto/small_and_fast.html',
    'How to do more': 'howto/move_over.html',
    'Results': 'results.html',
    'Explanations': 'explanations/one_cycle.html',
    'Reference: callback and sparsifier': 'callback.html',
    'Reference: which weights, when and where': 'granularity.html',
    'Reference: small and fast': 'deploy/speed_up.html',
    'Reference: other methods': 'methods/distill.html',
    'Reference: experiments': 'experiments/grid.html',
    'Reference: internals': 'select/core.html',
    'Questions, words, changes': 'faq.html',
}

# What a reader types into the search, the page that answers, and words of its first screen. A page that answers
# a question of its own has a row here. If the search does not find it, the page needs a keyword.
questions = [
    ('how do I make it faster', 'howto/small_and_fast.html', 'speed_up'),
    ('what sparsity', 'howto/sparsity.html', 'sparsity_find'),
    ('keep zeros when fine-tuning later', 'howto/copies.html', 'masks'),
    ('prune only the body', 'howto/pretrained.html', 'layers='),
    ('batch norm after pruning', 'batchnorm.html', 'estimates the statistics again'),
    ('why is accuracy low during training', 'faq.html', 'Why is the'),
    ('text classifier', 'howto/text.html', 'SparsifyCallback(.9)'),
    ('U-Net', 'howto/unet.html', 'unet_learner'),
    ('export to ONNX', 'howto/onnx.html', 'onnx'),
    ('resume', 'howto/resume.html', 'SaveModelCallback'),
    ('two GPUs', 'tutorials/many_gpus.html', 'accelerate'),
    ('custom criterion', 'tutorials/your_own.html', 'criterion'),
    ('2:4', 'tutorials/n_m.html', 'of every four'),
    ('inference speed', 'howto/small_and_fast.html', 'speed_up'),
    ('timm', 'howto/timm.html', 'timm'),
    ('unet', 'howto/unet.html', 'unet_learner'),
    ('onnx', 'howto/onnx.html', 'onnx'),
    ('Hugging Face', 'howto/transformers.html', 'logits'),
    ('log layer sparsity', 'howto/masks.html', 'masks'),
    ('SparsifyCallback', 'callback.html', 'SparsifyCallback(sparsity'),
]


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


notebooks = [p for p in sorted(cfg.nbs_path.rglob('[!._]*.ipynb')) if '.ipynb_checkpoints' not in p.parts]


def test_sidebar(pages):
    "The sidebar has the page of each notebook once, and each how-to under the question that its front matter names"
    listed = {c.text.strip(): [a['href'] for a in c.find_next('ul')('a')]
              for c in pages['index.html'].select('.sidebar-tree .caption')}
    assert [*listed] == [*captions]
    for caption, page in captions.items(): assert page in listed[caption]
    for p in notebooks:
        if p.parent.name != 'howto': continue
        group = nb_frontmatter(read_nb(p)).get('group', 'do more')
        assert html(p) in listed[f'How to {group}']
    every = sorted({html(p) for p in notebooks} - {'index.html'})
    others = {'tutorials/index.html', 'changelog.html', 'genindex.html', cfg.git_url}
    assert sorted(page for group in listed.values() for page in group if page not in others) == every


def is_test(node):
    "Whether a statement only checks"
    if isinstance(node, ast.With | ast.For): return all(map(is_test, node.body))
    return isinstance(node, ast.Assert) or ast.unparse(node).startswith('test_')


def test_cells(pages):
    "A page shows each line of the visible cells of its notebook, and folds the tests away from example and outcome"
    hidden = {'default_exp', 'export', 'exporti', 'hide'}
    for p in notebooks:
        cells = [c for c in read_nb(p).cells if c.cell_type == 'code' and not c.directives.keys() & hidden]
        cells = [c for c in cells if c.directives.get('echo') != 'false']
        for c in cells: c.remove_directives()
        shown = pages[html(p)].select('.cell_input')
        lines = [line for c in cells for line in c.source.splitlines() if line.strip()]
        assert sorted(line for e in shown for line in e.text.splitlines() if line.strip()) == sorted(lines)
        for cell in pages[html(p)].select('.cell'):
            code = cell.select_one('.cell_input')
            body = ast.parse(re.sub(r'(?m)^[%!].*', '', code.text)).body if code else []
            is_folded = 'tag_hide-cell' in cell['class']
            if is_folded: assert all(map(is_test, body))
            elif cell.select_one('.cell_output') and body: assert not is_test(body[-1])
            elif body: assert not all(map(is_test, body))


def test_metadata(pages):
    "Each page of a notebook has its description and its keywords as metadata, and links to the notebook"
    for p in notebooks:
        page, matter = pages[html(p)], nb_frontmatter(read_nb(p))
        path = p.relative_to(root).as_posix()
        meta = {m.get('name') or m.get('property'): m['content'] for m in page.select('meta[content]')}
        assert meta['description'] == meta['og:description'] == matter['description']
        assert meta['og:title'] in (matter['title'], cfg.title)
        assert meta.get('keywords', '').startswith(matter.get('keywords', ''))
        links = {a.text: a['href'] for a in page.select('.page-links a')}
        assert links['Notebook'] == repo + path
        assert {'Edit', 'Report an issue'} < {*links}
        # A notebook that reads files of the repository needs all of it, so it does not run on Colab.
        reads_files = any("'../" in c.source for c in read_nb(p).cells)
        assert ('Open in Colab' in links) != reads_files


def test_cards(pages):
    "The front page and the page of all tutorials have cards; those of tutorials show their first picture"
    front = [a['href'] for a in pages['index.html'].select('.cards li strong a')]
    assert front == ['tutorials/first.html', 'howto/small_and_fast.html', 'results.html']
    cards = pages['tutorials/index.html'].select('.cards li')
    tutorials = [p for p in notebooks if p.parent.name == 'tutorials']
    assert [card.strong.a['href'] for card in cards] == [html(p).removeprefix('tutorials/') for p in tutorials]
    assert [bool(card.img) for card in cards] == ['"image/png"' in p.read_text(encoding='utf-8') for p in tutorials]


def test_changelog(pages):
    "The changelog is a page"
    newest = re.search(r'^## (.*)', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)[1]
    assert pages['changelog.html'].h2.contents[0] == newest


def test_index(pages):
    "The page of all names has each public name of the package, and the keywords of the pages"
    entries = {a.text.split(' (')[0] for a in pages['genindex.html'].select('.genindextable a')}
    modules = [import_module(m) for m in _modidx.d['syms']]
    assert entries >= {'2:4', 'SparsifyCallback', 'Recorder.plot_sparsity'}
    assert entries >= {name for m in modules for name in m.__all__ if callable(getattr(m, name))} & documented()


def documented():
    "The names that nbdev documents, without their modules"
    return {name.removeprefix(f'{m}.') for m, names in _modidx.d['syms'].items() for name in names}


def test_links(pages, site):
    "Each link within the site, and each picture, leads to a file that exists and to an anchor in it"
    anchors = {path: {t['id'] for t in page(id=True)} for path, page in pages.items()}
    def is_dead(path, to):
        to = urlsplit(urljoin(path, to))
        if to.scheme: return False
        to = to._replace(path=to.path.removeprefix(folder)) # 404.html has absolute links
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


def test_names_of_others(pages):
    "A name that fasterai shares with this package is linked where it means ours, and not where it means fasterai's"
    page = pages['howto/move_over.html']
    assert not page.select_one('p:has(> a[href*="fasterai"]) > a > code')
    rows = [row('td') for row in page.select_one('table')('tr') if row('td')]
    assert rows and not any(theirs('a') for theirs, ours in rows) and all(ours('a') for theirs, ours in rows)


chromium = shutil.which('chromium') or shutil.which('google-chrome')
has_browser = chromium and shutil.which('chromedriver')
needs_browser = pytest.mark.skipif(not has_browser, reason='needs chromium and chromium-driver, from apt-get install')


@pytest.fixture(scope='module')
def address(site):
    "The address at which a local server serves the site, in the same folder as the public one"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def translate_path(self, path): return super().translate_path(path.removeprefix(folder[:-1]))
    with ThreadingHTTPServer(('localhost', 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://localhost:{server.server_port}{folder}'
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


# What a reader cannot read on a page: code that is cut off, anything that is wider than its box and does not
# scroll, and text whose contrast is less than WCAG's level AA.
unreadable = """
const found = [], content = document.querySelector('.content'), edge = content.getBoundingClientRect().right + 1;
const name = e => `${e.tagName}.${e.className} ${(e.textContent || e.src || '').trim().slice(0, 60)}`;
const scrolls = e => e && e !== content &&
  (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
for (const e of content.querySelectorAll('pre'))
  if (e.scrollWidth > e.clientWidth + 1) found.push(`cut off: ${name(e)}`);
for (const e of content.querySelectorAll('p, pre, table, img, li, h1, h2, h3, dl, summary, mjx-container'))
  if (e.getBoundingClientRect().right > edge && !scrolls(e)) found.push(`too wide: ${name(e)}`);
if (content.scrollWidth > content.clientWidth) found.push('the page scrolls sideways');

const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
const over = (top, below) => [0, 1, 2].map(i => top[i]*top[3] + below[i]*(1 - top[3])).concat(1);
const backgrounds = new Map(), seen = new Map();
function background(e) {
  if (!e) return [255, 255, 255, 1];
  if (!backgrounds.has(e)) {
    const own = rgba(getComputedStyle(e).backgroundColor);
    backgrounds.set(e, own[3] === 1 ? own : over(own, background(e.parentElement)));
  }
  return backgrounds.get(e);
}
const light = c => { const [r, g, b] = c.map(v => v/255).map(v => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4);
                     return .2126*r + .7152*g + .0722*b; };
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const e = texts.currentNode.parentElement, shown = e.checkVisibility({visibilityProperty: true});
  if (!texts.currentNode.data.trim() || !shown || e.closest('svg, mjx-container')) continue;
  const style = getComputedStyle(e), below = background(e), size = parseFloat(style.fontSize);
  const key = style.color + below + (size >= 24 || size >= 18.66 && style.fontWeight >= 700);
  if (seen.has(key)) continue;
  const [a, b] = [light(over(rgba(style.color), below)), light(below)].sort((x, y) => y - x);
  const contrast = (a + .05)/(b + .05);
  seen.set(key, contrast);
  if (contrast < (key.endsWith('true') ? 3 : 4.5)) found.push(`contrast ${contrast.toFixed(2)}: ${name(e)}`);
}
return found"""


@needs_browser
def test_readable(browser, address, pages):
    "No page logs an error or loads from another host. In both themes, nothing is cut off and the contrast is enough."
    for page in pages:
        browser.get(address + page)
        assert browser.get_log('browser') == [], page
        loaded = browser.execute_script('return performance.getEntriesByType("resource").map(r => r.name)')
        assert not [name for name in loaded if not name.startswith(address)], page
        for theme in ('light', 'dark'):
            browser.execute_script('document.body.dataset.theme = arguments[0]', theme)
            assert browser.execute_script(unreadable) == [], (page, theme)


# The text of what a reader sees without scrolling
first_screen = """
return [...document.querySelectorAll('.content :is(h1, h2, h3, p, pre, li, td)')].filter(e => {
  const {top, bottom} = e.getBoundingClientRect(); return bottom > 0 && top < innerHeight;
}).map(e => e.innerText).join(' ')"""


@needs_browser
@pytest.mark.parametrize('browser', [1280], ids=['desktop'], indirect=True)
@pytest.mark.parametrize('question, page, answer', questions, ids=[q for q, *_ in questions])
def test_search(browser, address, question, page, answer):
    "A reader's question leads to a page that answers it: one of the first three results, and its first screen"
    browser.get(address + 'results.html')
    find(browser, 'input[name=q]').send_keys(f'{question}\n')
    find(browser, '.search-summary:not(:empty)')
    links = [a.get_attribute('href') for a in browser.find_elements(By.CSS_SELECTOR, '#search-results li > a')[:3]]
    found = [to for to in links if urlsplit(to).path == folder + page]
    assert found, links
    browser.get(found[0])
    WebDriverWait(browser, 10).until(lambda b: answer in b.execute_script(first_screen), answer)
