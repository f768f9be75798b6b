"""The site of the book. What needs no tools runs with all tests; `make test-docs` builds the pages and reads them in headless
Chromium, in an environment of their own (so it takes no conftest, and imports nothing of the library)."""
import ast, functools, http.server, importlib.util, json, os, re, shutil, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'docs/site'))
import book

def load(name):
    "A module of docs/site under a name that no package has"
    spec = importlib.util.spec_from_file_location(f'site_{name}', root/f'docs/site/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def build(): return load('build')

# ---- without tools: is everything there?

def test_every_notebook_is_a_chapter_of_the_navigation_in_reading_order(build, tmp_path):
    stage = build.Stage(tmp_path)
    build.stage_front(stage)
    front = ''.join(c['source'] for c in json.loads((tmp_path/'index.ipynb').read_text(encoding='utf-8'))['cells'])
    listed = re.findall(r'<(\w+/\d\d_\w+)>$', front, re.M)
    here = sorted((p for p in (root/'nbs').glob('*/[0-9]*.ipynb')), key=lambda p: p.name)
    assert listed == [f'{p.parent.name}/{p.stem}' for p in here]
    assert {page for page in re.findall(r'\((\w+/\d\d_\w+)\.ipynb\)', front)} >= set(listed), 'nor is one left out of the table'
    pages = {p.relative_to(root).as_posix() for folder in ('docs', 'data', 'benchmarks') for p in (root/folder).rglob('*.md')}
    assert pages <= set(stage.guides) and all(page in front for page in stage.guides.values())

def test_the_reference_has_the_names_that_modules_offer():
    for c in book.chapters():
        tree = ast.parse((root/'v2flow_nbdev'/c.shelf/f'{c.path.stem[3:]}.py').read_text(encoding='utf-8'))
        offered = next(ast.literal_eval(n.value) for n in tree.body if getattr(getattr(n, 'targets', [None])[0], 'id', '') == '__all__')
        defined = {getattr(n, 'name', '') for n in tree.body}  # a value, as the command's `app`, has no docstring
        assert {n.name for n in c.names if n.public} == set(offered) & defined, c.page

def test_remarks_on_arguments_are_read_as_nbdev_reads_them():
    code = 'def f(\n    a,        # (B, N)\n    b:int=3,  # a count\n    *more,    # others\n)->int:       # their sum\n    "Adds"\n    return a'
    node = ast.parse(code).body[0]
    assert book.arguments(node, code) == ([('a', '(B, N)'), ('b', 'a count'), ('*more', 'others')], 'their sum')
    assert book.signature(node) == '(a, b: int=3, *more) -> int'
    code = 'class C:\n    def f(self, x):  # not x: it is the whole line\n        return x\n    y:int=0  # a field'
    assert book.arguments(ast.parse(code).body[0], code)[0] == [('y', 'a field')]

def test_links_and_names_are_led_to_pages(build, tmp_path):
    stage = build.Stage(tmp_path)
    def prose(text, known=(set(), set())): return stage.prose(text, 'nbs/models/14_resampler.ipynb', 'models/14_resampler', known)
    assert prose('[x](../evaluation/50_metrics.ipynb#A-floor)') == '[x](../evaluation/50_metrics.ipynb#A-floor)'
    assert prose('[x](../../data/emoji/README.md)') == '[x](../guide/data-emoji.md)'
    assert prose('[x](../../settings.ini)') == f"[x]({book.settings()['git_url']}/blob/main/settings.ini)"
    assert prose('`V2Flow` and `train`') == '{py:obj}`V2Flow <v2flow_nbdev.models.tokenizer.V2Flow>` and `train`'
    assert 'py:obj' in prose('`train`', (set(), {'train'})), 'a plain word is a name where the chapter imports it'
    assert prose('# `V2Flow`') == '# `V2Flow`' and prose('```\n`V2Flow`\n```') == '```\n`V2Flow`\n```'

# ---- the pages, in a browser

needs = pytest.mark.site

class Page(HTMLParser):
    "Links, ids and what a page loads"
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.loads, self.path = [], set(), [], path
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag != 'a' and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') not in ('canonical', 'search'): self.loads.append(a['href'])

@pytest.fixture(scope='module')
def html(build):
    "Built anew, or what `SITE=_docs/html` names"
    if os.environ.get('SITE'): return root/os.environ['SITE']
    pytest.importorskip('sphinx', reason='the site needs its tools: make test-docs')
    assert build.main() == 0
    return root/'_docs/html'

@pytest.fixture(scope='module')
def pages(html):
    return {p.relative_to(html).as_posix(): Page(p) for p in sorted(html.rglob('*.html')) if '_static' not in p.parts}

@pytest.fixture(scope='module')
def address(html):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if not chromium: pytest.skip('no chromium here (Debian: apt-get install chromium)')
    with sync_api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield found
        found.close()

@pytest.fixture
def reader(browser, address):
    "Opens pages; all that they ask for must come from the site, and no script may fail"
    contexts, asked, faults = [], [], []
    def come(width=1280, height=800, scheme='light', base=address):
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(240_000)
        page.on('request', lambda r: asked.append(r.url))
        page.on('pageerror', lambda e: faults.append(f'{page.url}: {e}'))
        page.on('response', lambda r: r.status >= 400 and faults.append(f'{r.status} {r.url}'))
        return page, lambda name: page.goto(base + name, wait_until='load')
    yield come
    for c in contexts: c.close()
    assert not faults
    assert {u for u in asked if not u.startswith((address, 'data:', 'blob:', 'file:'))} == set()

@needs
def test_every_link_and_anchor_leads_somewhere(html, pages):
    broken, outside, count = [], set(), 0
    git = book.settings()['git_url']
    colab = git.replace('github.com', 'colab.research.google.com/github')
    for name, page in pages.items():
        for link in page.links:
            count += 1
            if link.startswith((git, colab)):
                path = urlsplit(link).path.split('/main/')[-1] if '/main/' in link else ''
                if not (root/unquote(path)).exists(): broken.append(f'{name}: {link}')
            elif re.match(r'https?:|mailto:', link): outside.add(link)
            else:
                parts = urlsplit(urljoin(name, link))
                target = unquote(parts.path) or name
                if not (html/target).is_file(): broken.append(f'{name}: {link}')
                elif parts.fragment and target.endswith('.html') and unquote(parts.fragment) not in pages[target].ids:
                    broken.append(f'{name}: {link}')
    assert not broken, '\n'.join(broken)
    print(f'{count} links of {len(pages)} pages; {len(outside)} lead to other sites')

@needs
def test_pages_load_nothing_from_elsewhere(html, pages):
    for name, page in pages.items():
        for link in page.loads:
            assert not re.match('(https?:)?//', link), f'{name}: {link}'
            assert link.startswith('data:') or (html/urlsplit(urljoin(name, link)).path).is_file(), f'{name}: {link}'
    for style in html.rglob('*.css'):
        assert not re.search(r'(url\(|@import)\s*["\']?(https?:)?//', style.read_text(encoding='utf-8')), style

@needs
def test_a_chapter_can_be_opened_downloaded_and_edited(html, pages):
    git = book.settings()['git_url']
    for c in book.chapters():
        page, source = pages[c.page + '.html'], c.path.relative_to(root).as_posix()
        assert f"{git.replace('github.com', 'colab.research.google.com/github')}/blob/main/{source}" in page.links
        assert f'{git}/edit/main/{source}' in page.links and f'../notebooks/{c.path.name}' in page.links
        assert (html/'notebooks'/c.path.name).read_bytes() == c.path.read_bytes(), 'as it was committed'

@needs
def test_names_lead_to_their_cells_and_back(pages):
    for c in book.chapters():
        for n in c.names:
            reference = f'reference/{c.shelf}.html'
            assert n.anchor in pages[c.page + '.html'].ids and f'../{c.page}.html#{n.anchor}' in pages[reference].links, n.full
            if n.public: assert n.full in pages[reference].ids and f'../{reference}#{n.full}' in pages[c.page + '.html'].links

@needs
@pytest.mark.parametrize('width, height', [(1280, 800), (390, 844)])
def test_the_first_screen_shows_what_the_model_draws(reader, width, height):
    page, go = reader(width, height)
    go('index.html')
    image = page.locator('.v2-drawn img')
    box = image.bounding_box()
    assert image.evaluate('i => i.complete && i.naturalWidth > 500') and height - box['y'] > 200 and box['height'] > 200

@needs
def test_search_finds_gumbel(reader, address):
    page, go = reader()
    go('index.html')
    page.keyboard.press('Control+k')
    page.keyboard.type('Gumbel')
    page.keyboard.press('Enter')
    page.wait_for_url('**/search.html?q=Gumbel*')
    found = page.locator('#search-results li a', has_text='Visual vocabulary resampler').first
    found.wait_for()
    page.wait_for_selector('#search-results li .context')
    found.click()
    page.wait_for_url('**/models/14_resampler.html*')
    assert page.locator('mark, .highlighted').count() or 'Gumbel' in page.inner_text('article')

@needs
def test_the_pages_work_as_files(reader, html):
    page, go = reader(base=html.as_uri() + '/')
    go('search.html?q=Gumbel')
    page.locator('#search-results li a', has_text='Visual vocabulary resampler').first.wait_for()
    go('models/16_flow.html')
    assert page.evaluate('document.fonts.load("16px \'STIX Two Math\'").then(f => f.length)') == 1

def equations(c):
    text = '\n'.join(''.join(x['source']) for x in c.cells if x['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
    return len(re.findall(r'\$\$.*?\$\$|\$[^$\n]+\$', text, re.S))

@needs
def test_equations_are_drawn(reader):
    page, go = reader()
    with_some = [c for c in book.chapters() if equations(c)]
    assert len(with_some) > 8
    for c in with_some:
        go(c.page + '.html')
        page.evaluate('document.fonts.ready')
        boxes = page.evaluate('[...document.querySelectorAll("article math")].map(m => [m.getBoundingClientRect().width, '
                              'm.getBoundingClientRect().height])')
        assert len(boxes) == equations(c) and all(w > 3 and h > 5 for w, h in boxes), c.page
        assert not re.search(r'\$\$|\\(frac|sum|operatorname|lVert)', page.inner_text('article')), c.page
        assert page.evaluate('[...document.fonts].some(f => f.family.includes("STIX") && f.status == "loaded")')

@needs
def test_light_and_dark(reader):
    def light(page): return sum(map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3]))
    for scheme in ('light', 'dark'):
        page, go = reader(scheme=scheme)
        go('models/16_flow.html')
        assert (light(page) > 600) == (scheme == 'light')
        page.locator('button.theme-switch-button:visible').click()
        page.locator(f'button.theme-change-button[data-mode={"dark" if scheme == "light" else "light"}]:visible').click()
        page.wait_for_timeout(400)
        assert (light(page) > 600) == (scheme == 'dark')

@needs
def test_a_phone_shows_pages_without_scrolling_sideways(reader):
    page, go = reader(390, 844)
    for name in ['index.html', 'reference/index.html', 'reference/models.html', 'guide/training.html',
                 *(c.page + '.html' for c in book.chapters())]:
        go(name)
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, name
    page.locator('button.primary-toggle:visible').click()
    page.locator('#pst-primary-sidebar-modal a, .bd-sidebar-primary a', has_text='16 · Rectified flow').locator('visible=true').click()
    page.wait_for_url('**/models/16_flow.html')

def looked_at():
    "The pages that axe reads: one of each kind, and of each shelf the chapter with most equations and images"
    shelves = {}
    for c in book.chapters():
        def shown(c): return equations(c) + sum('image/png' in o.get('data', {}) for x in c.cells for o in x.get('outputs', []))
        if c.shelf not in shelves or shown(c) > shown(shelves[c.shelf]): shelves[c.shelf] = c
    return ['index', 'search', 'reference/index', 'reference/models', 'guide/training', 'guide/data-checkpoints-emoji',
            *(c.page for c in shelves.values())]

@needs
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_axe_finds_no_serious_fault(reader, scheme):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    page, go = reader(scheme=scheme)
    # in the dark nothing but the colours is another; `preload` would ask for style sheets at addresses of its own making
    options = dict(resultTypes=['violations'], preload=False) | (dict(runOnly=['color-contrast']) if scheme == 'dark' else {})
    serious = []
    for name in looked_at():
        go(name + '.html')
        found = axe.run(page, options=options)
        serious += [f"{name}: {v['id']} ({v['impact']}): {len(v['nodes'])} × {v['nodes'][0]['html'][:150]}"
                    for v in found.response['violations'] if v['impact'] in ('serious', 'critical')]
    assert not serious, '\n'.join(serious)
