("The page as a user meets it: the real command, a real browser, two people at once, wrong input, and nothing left "
 "behind")
import base64, http.client, io, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from conftest import root, shipped

pytest.importorskip('gradio', reason="the page needs gradio (the extra 'app')")
sync_api = pytest.importorskip('playwright.sync_api', reason='playwright steers the browser')
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
needs_browser = pytest.mark.skipif(not chromium, reason='no chromium here (Debian: apt-get install chromium)')

# the same command, where a run of sixteen rounds stays in its second until it is stopped: however fast the machine
held = """
import time
from v2flow_nbdev.apps import app
from v2flow_nbdev.apps.cli import main
follow = app.follow
def held(work, sign):
    def wait(tell, output):
        tell(output)
        while 'round 2 of 16' in output[0]: time.sleep(0.2); tell(output)
    return follow(lambda tell: work(lambda output: wait(tell, output)), sign)
app.follow = held
main()
"""

def v2flow_app(*args, folder, code=('-m', 'v2flow_nbdev.apps.cli'), **kw):
    "The command, with a folder of its own for temporary files"
    return subprocess.Popen([sys.executable, *code, 'app', *map(str, args)], cwd=root,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1',
                                 'TMPDIR': str(folder)}, **kw)

def files_in(folder): return [p for p in Path(folder).rglob('*') if p.is_file()]

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tmp')
    process = v2flow_app('--model', shipped, '--port', 0, folder=folder, code=('-c', held))
    line = process.stderr.readline()
    port = int(re.fullmatch(r'v2flow: http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n', line).group(1))
    yield port, folder
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, '', ''), err
    # Ctrl-C is the normal end, and takes everything with it
    assert not files_in(folder) and not list(folder.glob('v2flow-app-*'))

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield found
        found.close()

@pytest.fixture
def user(server, browser):
    "Opens the page, each time as another user; whatever it asks for must come from our server"
    port, contexts, asked = server[0], [], []
    def come():
        contexts.append(browser.new_context(viewport=dict(width=1200, height=860)))
        page = contexts[-1].new_page()
        page.set_default_timeout(240_000)
        page.on('request', lambda r: asked.append(r.url))
        page.goto(f'http://127.0.0.1:{port}/')
        page.wait_for_selector('#v2-generate')
        return page
    yield come
    for c in contexts: c.close()
    assert {u for u in asked if not u.startswith((f'http://127.0.0.1:{port}/', 'data:', 'blob:'))} == set()

def generate(page, caption, **settings):
    for label, value in settings.items():
        page.get_by_label(f'number input for {label.capitalize()}').locator('visible=true').fill(str(value))
    page.fill('#v2-caption textarea', caption)
    page.click('#v2-generate')

def until(page, where, text, seconds=60):
    "Wait for a text, and give the whole of what is there"
    page.wait_for_function('([where, text]) => document.querySelector(where)?.innerText.includes(text)',
                           arg=[where, text], timeout=1000*seconds)
    return page.inner_text(where)

def shown_images(page, where='#v2-generated'):
    sources = page.eval_on_selector_all(f'{where} img', 'all => all.map(i => i.src)')
    return [Image.open(io.BytesIO(base64.b64decode(s.partition(',')[2]))).convert('L') for s in sources]

def spread(image): return image.getextrema()[1] - image.getextrema()[0]

def upload(page, file):
    page.click('[role=tab]:has-text("Image → tokens")')
    page.set_input_files('#v2-picker input', file)

@needs_browser
def test_a_caption_becomes_images(user):
    page = user()
    generate(page, 'a handwritten seven', images=3)
    assert until(page, '#v2-generate-status', 'each') == '“a handwritten seven”: 3 images, 16 tokens each.'
    made = shown_images(page)
    assert len(made) == 3 and all(i.size == (8, 8) and spread(i) > 100 for i in made)
    assert not page.locator('footer').locator('visible=true').count()
    # and the first of them goes on to the other tab
    page.click('[role=tab]:has-text("Image → tokens")'); page.click('#v2-last')
    until(page, '#v2-encode-status', '16 tokens')
    assert spread(shown_images(page, '#v2-answer')[0]) > 100

def test_the_image_appears_as_its_tokens_arrive(pipe, monkeypatch):
    "Previews come before the first mask round, grey where nothing is written, and change neither ids nor images"
    import threading, torch
    from v2flow_nbdev.apps import app
    def all_told(work, sign): told = []; told.append(work(told.append)); return told
    monkeypatch.setattr(app, 'follow', all_told)
    def run(): return list(app.generate_images(pipe, threading.Event(), 'a handwritten seven', 2, seed=4))
    state, outputs = torch.get_rng_state(), run()
    assert torch.equal(torch.get_rng_state(), state)                               # a preview draws nothing
    def pixels(html): return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x))))
                              for x in re.findall('src="data:image/png;base64,([^"]+)', html)]
    early = [html for status, html in outputs if 'Writing token' in status]
    assert len(early) == 16 and not early[0] and len(set(early)) > 1
    first, second = pixels(early[1])                                               # two tokens: 2×2 pixels each
    for image in (first, second):
        assert image.shape == (8, 8) and (image[2:] == 128).all() and (image[:2, 4:] == 128).all()
        assert (image[:2, :4] != 128).any()
    with_previews = outputs[-1]
    monkeypatch.setattr(app, 'previews', lambda tok, grid: lambda ids: None)
    without = run()
    assert without[-1] == with_previews and not any(html for status, html in without if 'Writing' in status)

@needs_browser
def test_an_image_becomes_tokens_and_a_caption(user, server, tmp_path):
    from v2flow_nbdev.data.sources import digits
    digits('test')[0]['image'].resize((200, 120)).save(tmp_path/'digit.png')
    page = user()
    upload(page, tmp_path/'digit.png')
    until(page, '#v2-encode-status', '16 tokens')
    cells = page.locator('.v2-cell')
    assert cells.count() == 16 and spread(shown_images(page,
                                                   '#v2-answer')[
                                                       0]) > 100 and len(page.inner_text('#v2-answer blockquote')) > 10
    def shown(): return [i for i in range(16) if cells.nth(i).locator('.v2-card').is_visible()]
    assert shown() == [10]                                                         # one is chosen from the first
    cells.nth(2).hover(); assert shown() == [2, 10]
    cells.nth(5).click(); page.mouse.move(5, 5); assert shown() == [5]
    text = cells.nth(5).locator('.v2-card').inner_text()
    assert 'row 2, column 2' in text and 'Mixture of text tokens' in text and re.search(r'␣\w+',
        text) and '%' in text
    assert not files_in(server[1])                                                 # the upload never was a file

@needs_browser
def test_wrong_input_is_answered_in_sentences(user, server, tmp_path):
    page = user()
    for caption, why in (('', 'The caption is empty'),
                         ('seven '*100, 'The caption has 600 characters; this page takes 500'),
                         ('7 '*200, 'tokens is too long')):
        generate(page, caption)
        assert why in until(page, '#v2-generate-status .v2-error', why) and not shown_images(page)
    whole = io.BytesIO(); Image.effect_noise((64, 64), 50).save(whole, 'PNG')
    Image.new('1', (20_000, 20_000)).save(tmp_path/'bomb.png')
    for name, content, why in (('broken.png', whole.getvalue()[:500], 'damaged or truncated'),
                               ('text.png', b'not an image', 'not an image'), ('empty.png', b'', 'the file is empty'),
                               ('big.png', bytes(21*2**20), 'larger than 20 MB'), ('bomb.png', None, 'far too large')):
        if content is not None: (tmp_path/name).write_bytes(content)
        upload(page, tmp_path/name)
        assert until(page, '#v2-encode-status .v2-error', why).startswith('The image cannot be used: ')
    assert not page.locator('.v2-cell').count() and not files_in(server[1])

@needs_browser
def test_two_at_once_a_third_waits_and_all_can_stop(user):
    slow = dict(images=2, rounds=16)
    first, second, third = user(), user(), user()
    generate(first, 'the digit 3', **slow); until(first, '#v2-generate-status', 'Decoding')
    generate(second, 'a six', images=1); until(second, '#v2-generate-status', '1 image,')
    # still at it, and what there is can be seen
    assert 'Decoding' in first.inner_text('#v2-generate-status') and len(shown_images(first)) == 2
    generate(second, 'the digit 8', **slow); until(second, '#v2-generate-status', 'Decoding')
    generate(third, 'a two', images=1); assert 'Waiting' in until(third, '#v2-generate-status', 'Waiting')
    first.click('#v2-generate-stop'); until(first, '#v2-generate-status', 'Stopped.')
    until(third, '#v2-generate-status', '1 image,')                               # its place was free at once:
    assert 'Decoding' in second.inner_text('#v2-generate-status')                  # the other is still at its work
    second.close()                                                                 # whoever leaves stops too
    generate(first, 'a one', images=1, rounds=4); until(first, '#v2-generate-status', '“a one”: 1 image,')

def test_the_server_takes_no_files_and_no_floods(server):
    def post(path, headers, body=b''):
        connection = http.client.HTTPConnection('127.0.0.1', server[0], timeout=20)
        connection.putrequest('POST', path)
        for h in headers.items(): connection.putheader(*h)
        connection.endheaders(body)
        return connection.getresponse().status
    assert post('/gradio_api/upload', {'Content-Length': '3'}, b'abc') == 404
    assert post('/gradio_api/queue/join', {'Content-Length': str(10**9)}) == 413
    assert post('/gradio_api/queue/join', {'Transfer-Encoding': 'chunked'}, b'0\r\n\r\n') == 413
    assert not files_in(server[1])

def test_a_folder_that_is_no_model_ends_the_command(tmp_path):
    "At once: no thread of the page's framework is waited for"
    process = v2flow_app('--model', tmp_path, '--port', 0, folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count('\n') == 1 and 'model_index.json: missing' in err and not out, err

def test_a_port_that_cannot_be_had(server, tmp_path):
    for port, code, why in ((server[0], 1, f'127.0.0.1:{server[0]}: cannot be listened on (address already in use); '
                                           f'choose another with --port'), (99999, 2, '--port')):
        process = v2flow_app('--port', port, folder=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and why in err and err.count(
            '\n') == 1 and not out and not files_in(tmp_path), err
