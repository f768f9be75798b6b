"The Hub's manners: what people pass, what is fetched, what goes wrong on the way; against a stand-in on this machine"
import hashlib, inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import root, shipped
from hub_stand_in import Hub
from huggingface_hub import constants
from v2flow_nbdev.base.files import fetch, hub_settings, write_json, write_tensors
from v2flow_nbdev.base.folders import push_to_hub, resolve_folder
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.models.tokenizer import V2Flow

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A Hub of this machine alone, and an empty cache"
    with Hub() as hub:
        for name, value in dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=hub.url + '/{repo_id}/resolve/{revision}/{filename}',
                                HF_HUB_CACHE=str(tmp_path/'cache'), HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', 'mine')
        yield hub

def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

pipeline_parts = {p: d for p,d in content(shipped).items() if p.startswith(('image_tokenizer/', 'llm/', 'model_index', 'scores'))}

def cached(tmp_path): return [p for p in (tmp_path/'cache').rglob('blobs/*')]

# push and pull

def test_a_pipeline_comes_back_as_it_was_pushed(hub, pipe):
    pipe.push_to_hub('me/digits')
    back = V2FlowPipeline.from_pretrained('me/digits')
    for a, b in ((pipe.llm, back.llm), (pipe.image_tokenizer, back.image_tokenizer)):
        new = b.state_dict()
        assert all(torch.equal(t, new[n]) for n,t in a.state_dict().items() if n != 'quantizer.sums')  # codes × lengths
    draw = lambda p: p('a seven', generator=torch.Generator().manual_seed(0)).ids
    assert torch.equal(draw(pipe), draw(back)) and back.defaults == pipe.defaults
    assert back.tokenizer('a seven').input_ids == pipe.tokenizer('a seven').input_ids

def test_a_second_push_replaces_the_parameters_and_sends_only_what_changed(hub, pipe):
    tok = pipe.image_tokenizer
    hub.add('me/tokenizer', {'model.fp16.safetensors': b'old', 'notes.txt': b'mine'})
    tok.push_to_hub('me/tokenizer')
    assert {'model.safetensors', 'config.json', 'notes.txt'} <= hub.files('me/tokenizer').keys()
    assert 'model.fp16.safetensors' not in hub.files('me/tokenizer')
    hub.requests.clear(); tok.push_to_hub('me/tokenizer')
    assert not [p for m,p in hub.requests if m == 'PUT']

def test_private_needs_the_token(hub, tmp_path):
    class Note:
        def save_pretrained(self, folder): write_json(Path(folder)/'config.json', {'said': 'hello'})
    push_to_hub(Note(), 'me/secret', private=True, token='mine')
    assert json.loads((resolve_folder('me/secret', token='mine')/'config.json').read_text()) == {'said': 'hello'}
    with pytest.raises(FileNotFoundError, match='no such model on the Hub; if it is private, log in with `hf auth login`'):
        resolve_folder('me/secret', token='another', cache_dir=tmp_path/'other')

def test_a_revision_is_what_it_was(hub):
    first = hub.add('me/notes', {'config.json': b'{"n": 1}'})
    hub.add('me/notes', {'config.json': b'{"n": 1}'}, branch='v1')
    hub.add('me/notes', {'config.json': b'{"n": 2}'})
    read = lambda **how: json.loads((resolve_folder('me/notes', **how)/'config.json').read_text())['n']
    assert (read(), read(revision='v1'), read(revision=first)) == (2, 1, 1)
    with pytest.raises(FileNotFoundError, match="has no revision 'v7'; its branches and tags are at"): read(revision='v7')

def test_of_a_subfolder_its_files_alone_are_fetched(hub):
    hub.add('me/digits', content(shipped) | {'image_tokenizer/model.bin': b'pickle', 'image_tokenizer/log.jsonl': b'{}'})
    V2Flow.from_pretrained('me/digits', subfolder='image_tokenizer')
    names = 'config.json model.safetensors vocabulary.json vocabulary.safetensors'.split()
    assert hub.got() == [f'image_tokenizer/{n}' for n in names]
    asked = lambda: [p for _, p in hub.requests if 'me/digits' in p]
    assert len(asked()) == 2 + 2*len(names)                      # commit, list of files; then head and body of each
    hub.requests.clear(); V2Flow.from_pretrained('me/digits', subfolder='image_tokenizer')
    assert len(asked()) == 1                                     # is there a newer commit?

def test_of_a_pipeline_its_parts_alone_are_fetched(hub):
    extra = {'llm/pytorch_model.bin': b'pickle', 'llm/training_args.pt': b'pickle', 'llm/flax_model.msgpack': b'x'}
    inside = {f'best/{p}': d for p,d in (content(shipped) | extra).items()}
    hub.add('me/runs', inside | {'notes.md': b'x'})
    pipe = V2FlowPipeline.from_pretrained('me/runs', subfolder='best')
    assert pipe('a one', generator=torch.Generator().manual_seed(1)).images
    assert hub.got() == sorted(f'best/{p}' for p in [*pipeline_parts, 'README.md'])

# the network off

def test_once_fetched_nothing_is_asked_for_with_the_network_off(hub, monkeypatch, tmp_path):
    hub.add('me/digits', pipeline_parts)
    V2Flow.from_pretrained('me/digits', 'image_tokenizer'); hub.requests.clear()
    V2Flow.from_pretrained('me/digits', 'image_tokenizer', local_files_only=True)
    with pytest.raises(FileNotFoundError, match='not all of it is in the cache, while local_files_only=True; fetch it once'):
        V2FlowPipeline.from_pretrained('me/digits', local_files_only=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    V2Flow.from_pretrained('me/digits', 'image_tokenizer')
    with pytest.raises(FileNotFoundError, match='while HF_HUB_OFFLINE is set; fetch it once with the network on'):
        V2Flow.from_pretrained('me/digits', 'image_tokenizer', cache_dir=tmp_path/'empty')
    assert not hub.requests

def test_the_variables_of_the_environment_are_honoured(hub, tmp_path):
    "In a process of its own: `huggingface_hub` reads them when it is imported"
    hub.add('me/notes', {'config.json': b'{"n": 1}'}); home = tmp_path/'home'
    folder = resolve_folder('me/notes', cache_dir=home/'hub'); hub.requests.clear()
    code = ('from huggingface_hub.constants import ENDPOINT\nfrom v2flow_nbdev.base.folders import resolve_folder\n'
            'print(ENDPOINT, resolve_folder("me/notes"))\n'
            'try: resolve_folder("me/nothing")\nexcept OSError as e: print(e)')
    where = {**os.environ, 'PYTHONPATH': str(root), 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=where)
    first, second = done.stdout.splitlines()
    assert first == f'{hub.url} {folder}' and 'while HF_HUB_OFFLINE is set' in second and not hub.requests

def test_where_nobody_answers(hub, monkeypatch):
    for name in ('ENDPOINT', 'HUGGINGFACE_CO_URL_TEMPLATE'):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(hub.url, 'http://127.0.0.1:9'))
    with pytest.raises(FileNotFoundError, match=r'the Hub cannot be reached \(ConnectError\); look at the network') as e:
        resolve_folder('me/digits')
    assert '\n' not in str(e.value)

# what goes wrong

def test_each_error_is_a_line_that_says_what_to_do(hub, tmp_path):
    hub.add('me/gated', {'config.json': b'{}'}, gated='another')
    hub.add('me/plain', {'config.json': b'{}', 'llm/config.json': b'{}'})
    for act, why in ((lambda: resolve_folder('me/gated'), f'me/gated: is gated; ask for access at {hub.url}/me/gated, then log in'),
                     (lambda: resolve_folder('me/nothing'), 'no such model on the Hub'),
                     (lambda: resolve_folder('me/plain', 'video'), 'no such folder in the model'),
                     (lambda: resolve_folder(shipped, 'video'), 'no such folder in the model; it has image_tokenizer, llm'),
                     (lambda: V2Flow.from_pretrained('me/plain'), 'format 1, this one reads 3'),
                     (lambda: V2FlowPipeline.from_pretrained('me/plain'), 'model_index.json: missing')):
        with pytest.raises(OSError) as e: act()
        assert why in str(e.value) and '\n' not in str(e.value), str(e.value)

def test_a_transfer_that_is_cut_off_is_taken_up(hub):
    data = os.urandom(3000)
    hub.add('me/big', {'model.safetensors': data})
    hub.faults['model.safetensors'] = ['cut']
    assert (fetch('me/big')/'model.safetensors').read_bytes() == data
    assert hub.got() == ['model.safetensors']*2 and not hub.faults['model.safetensors']

def test_a_transfer_that_is_always_cut_off_leaves_no_half_file(hub, tmp_path, monkeypatch):
    import huggingface_hub.file_download as download
    hub.add('me/big', {'model.safetensors': b'x'})
    hub.faults['model.safetensors'] = ['cut']*20                  # a byte's first half is no byte: nothing arrives
    monkeypatch.setattr(download.time, 'sleep', lambda s: None)
    with pytest.raises(FileNotFoundError) as e: fetch('me/big')
    assert '\n' not in str(e.value) and not cached(tmp_path)
    with pytest.raises(FileNotFoundError): resolve_folder('me/big', local_files_only=True)
    hub.faults.clear()
    assert (fetch('me/big')/'model.safetensors').read_bytes() == b'x'

@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_a_file_that_was_changed_on_the_way_is_refused_and_removed(name, hub, tmp_path):
    hub.add('me/big', {name: b'{"n": 1}', 'other.json': b'{}'})
    hub.faults[name] = ['altered']
    with pytest.raises(OSError, match=f'{re.escape(name)} was changed on the way'): fetch('me/big')
    assert len(cached(tmp_path)) == 1
    assert (fetch('me/big')/name).read_bytes() == b'{"n": 1}'     # and the next time it is fetched anew
    hub.faults[name] = ['altered']
    with pytest.raises(OSError, match='was changed on the way'): fetch('me/big', force_download=True)

# what people pass

def models():
    from v2flow_nbdev.evaluation.judges import ImageClassifier
    from v2flow_nbdev.models.autoencoder import load_autoencoder
    from v2flow_nbdev.models.latents import AutoencoderLatents
    from v2flow_nbdev.models.vocabulary import Vocabulary
    from v2flow_nbdev.systems.teacher import Teacher
    from v2flow_nbdev.systems.tokenflow import TokenFlow
    from v2flow_nbdev.systems.tokenflow_pipeline import TokenFlowPipeline
    return dict(classifier=ImageClassifier, autoencoder=AutoencoderLatents, vocabulary=Vocabulary, teacher=Teacher,
                tokenflow=TokenFlow, tokenflow_pipeline=TokenFlowPipeline, v2flow=V2Flow, pipeline=V2FlowPipeline)

@pytest.mark.parametrize('kind', models())
def test_everything_takes_what_people_pass(kind, hub, tmp_path):
    "Settings reach the Hub; an old name says the new one, on the Hub and in a folder alike"
    load = models()[kind].from_pretrained
    hub.add('me/private', {'config.json': b'{}', 'x/config.json': b'{}'}, private='right')
    names = inspect.signature(load).parameters
    assert {'subfolder', 'revision', 'hub'} <= set(names) and ('device' in names) == (kind != 'vocabulary')
    with pytest.raises(FileNotFoundError, match='if it is private'): load('me/private', token='wrong', cache_dir=tmp_path/'a')
    assert not (tmp_path/'a').exists() or not list((tmp_path/'a').rglob('blobs/*'))
    with pytest.raises(OSError) as e: load('me/private', subfolder='x', token='right', cache_dir=tmp_path/'b', force_download=True)
    assert 'private' not in str(e.value).split(':')[1] and list((tmp_path/'b').rglob('blobs/*')) or kind.endswith('pipeline')
    with pytest.raises(FileNotFoundError, match='while local_files_only=True'):
        load('me/private', local_files_only=True, cache_dir=tmp_path/'c')
    for place in ('me/private', tmp_path):
        with pytest.raises(TypeError, match='torch_dtype: is called dtype here'): load(place, torch_dtype=torch.float16)
        with pytest.raises(TypeError, match='unknown; there are revision, token'): load(place, tokens='x')

def test_the_names_of_the_settings_are_those_of_huggingface_hub():
    import huggingface_hub
    assert set(hub_settings) <= set(inspect.signature(huggingface_hub.snapshot_download).parameters)

# model cards

licences = 'apache-2.0 mit bsd-3-clause cc-by-4.0 cc-by-sa-4.0 llama2 llama3 other unknown'.split()  # some of the Hub's

def card_of(text):
    "Read as the Hub reads it, and held to its documented fields"
    from huggingface_hub import ModelCard
    card = ModelCard(text)
    known = {'license', 'license_name', 'license_link', 'library_name', 'pipeline_tag', 'tags', 'datasets', 'base_model', 'language',
             'model_name', 'eval_results'}
    told = {k for k,v in vars(card.data).items() if v is not None and k != 'ignore_metadata_errors'}
    assert told <= known and card.data.license in licences and card.data.library_name == 'v2flow_nbdev', told
    assert card.data.pipeline_tag in ('text-to-image', 'image-feature-extraction', 'image-classification')
    return card

def usage(card): return re.search(r'```python\n(.*?)```', card.content, re.S)[1]

def test_a_card_tells_the_hub_what_it_documents_and_its_usage_runs(hub, pipe):
    pipe.push_to_hub('me/digits', card=dict(license='apache-2.0', datasets=['me/data'], base_model='org/llama', language='en',
                                            tags=['digits'], trained_on='1,500 digits.'))
    card = card_of(hub.files('me/digits')['README.md'].decode())
    assert hub.cards and 'image_tokenizer/README.md' not in hub.files('me/digits')
    assert (card.data.license, card.data.datasets, card.data.base_model) == ('apache-2.0', ['me/data'], 'org/llama')
    assert {'text-to-image', 'image-to-text'} & {card.data.pipeline_tag, *card.data.tags} and 'digits' in card.data.tags
    for part in ('## Usage', '## Scores', '## Training data\n\n1,500 digits.', '## Limits', 'Of this model: apache-2.0'):
        assert part in card.content, part
    names = {}
    exec(usage(card), names)
    assert names['image'].size == (8, 8) and isinstance(names['caption'], str)

def test_scores_go_with_the_parameters_they_are_of(hub, pipe, tmp_path):
    written = json.loads((shipped/'scores.json').read_text())
    pipe.push_to_hub('me/digits')
    card = card_of(hub.files('me/digits')['README.md'].decode())
    told = {e.metric_name: (e.metric_type, e.metric_value) for e in card.data.eval_results}
    assert told['generation_accuracy'] == ('accuracy', written['generation_accuracy']) and told['psnr_db'][0] == 'psnr'
    assert {n for n in written if not n.endswith('_n')} == set(told) and card.data.eval_results[0].task_type == 'text-to-image'
    again = V2FlowPipeline.from_pretrained('me/digits')                           # and they travel on with it
    again.save_pretrained(tmp_path/'copy')
    assert 'generation_accuracy' in (tmp_path/'copy/README.md').read_text()
    with torch.no_grad(): again.llm.lm_head.weight[0, 0] += 1                     # another model, never scored
    again.save_pretrained(tmp_path/'copy'); again.push_to_hub('me/other')
    assert not card_of((tmp_path/'copy/README.md').read_text()).data.eval_results
    assert b'None are stored' in hub.files('me/other')['README.md'] and 'scores.json' not in hub.files('me/other')

def test_what_a_maker_said_stays_with_the_parameters(hub, pipe, tmp_path):
    pipe.push_to_hub('me/digits', card=dict(license='mit', datasets=['me/data'], trained_on='Digits.', tags=['eight pixels']))
    again = V2FlowPipeline.from_pretrained('me/digits')
    again.save_pretrained(tmp_path/'copy'); again.push_to_hub('me/copy', card=dict(datasets=['me/other']))
    for text, data in (((tmp_path/'copy/README.md').read_text(), 'me/data'), (hub.files('me/copy')['README.md'].decode(), 'me/other')):
        card = card_of(text)
        assert (card.data.license, card.data.datasets) == ('mit', [data]) and '\n\nDigits.\n\n' in card.content
        assert 'eight pixels' in card.data.tags
    with torch.no_grad(): again.llm.lm_head.weight[0, 0] += 1
    again.push_to_hub('me/other')                                                 # further training: who knows on what
    card = card_of(hub.files('me/other')['README.md'].decode())
    assert card.data.license == 'unknown' and not card.data.datasets and 'Not stated' in card.content

def test_a_card_that_a_person_wrote_stays(hub, pipe, tmp_path):
    tok, mine = pipe.image_tokenizer, '# Written by hand'
    tok.save_pretrained(tmp_path/'tok'); (tmp_path/'tok/README.md').write_text(mine); tok.save_pretrained(tmp_path/'tok')
    assert (tmp_path/'tok/README.md').read_text() == mine
    hub.add('me/tok', {'README.md': mine.encode()}); tok.push_to_hub('me/tok')
    assert hub.files('me/tok')['README.md'].decode() == mine and 'model.safetensors' in hub.files('me/tok')
    tok.push_to_hub('me/new'); first = hub.files('me/new')['README.md']
    tok.push_to_hub('me/new', card=dict(license='mit'))
    assert hub.files('me/new')['README.md'] != first                              # ours is replaced

def test_a_wrong_field_of_a_card_leaves_no_repository(hub, pipe):
    with pytest.raises(ValueError, match='card: unknown licence; there are license'):
        pipe.image_tokenizer.push_to_hub('me/tok', card=dict(licence='mit'))
    assert 'me/tok' not in hub.repos

def test_every_saved_model_gets_a_card_whose_usage_runs(hub, pipe, tmp_path):
    from v2flow_nbdev.systems.tokenflow import TokenFlow, TokenFlowConfig
    pipe.image_tokenizer.push_to_hub('me/v2flow')
    tok = TokenFlow(TokenFlowConfig(image_size=(32, 32), sides=(1, 2, 4), codebook_size=32, width=16, project_width=16)).eval()
    tok.quantizer.initialised.fill_(True)
    tok.push_to_hub('me/tokenflow')
    for name in ('me/v2flow', 'me/tokenflow'):
        card, names = card_of(hub.files(name)['README.md'].decode()), {}
        exec(usage(card), names)
        assert names['back'].shape == names['images'].shape and card.data.tags[0] == 'image-tokenizer'

def test_a_processor_comes_alone(hub, pipe):
    from v2flow_nbdev.language.processor import V2FlowProcessor
    hub.add('me/digits', content(shipped)); V2FlowProcessor.of(pipe).push_to_hub('me/processor')
    for name in ('me/digits', 'me/processor'):
        hub.requests.clear()
        assert V2FlowProcessor.from_pretrained(name)('a six')['input_ids'].tolist() == V2FlowProcessor.of(pipe)('a six')[
            'input_ids'].tolist()
        assert not [f for f in hub.got() if f.endswith('safetensors')]

# every kind of model, there and back

checkpoints = root/'data/checkpoints'

def noise(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))*2 - 1

def test_a_tokenizer_brings_its_autoencoder(hub):
    tok, images = V2Flow.from_pretrained(checkpoints/'emoji', 'image_tokenizer'), noise(2, 3, 64, 64)
    tok.push_to_hub('me/emoji-tokenizer')
    back = V2Flow.from_pretrained('me/emoji-tokenizer')
    ids = tok.encode(images)
    assert torch.equal(back.encode(images), ids) and 'autoencoder/config.json' in hub.got()
    draw = lambda t: t.decode(ids, generator=torch.Generator().manual_seed(0), n_iter=1, n_steps=1)
    assert torch.equal(draw(back), draw(tok))

def test_settings_reach_what_a_model_names_on_the_hub(hub, tmp_path):
    "A tokenizer whose autoencoder is a private repository: the token is passed on"
    folder = shutil.copytree(checkpoints/'emoji/image_tokenizer', tmp_path/'tok')
    shutil.move(folder/'autoencoder', tmp_path/'vae'); hub.add('me/vae', content(tmp_path/'vae'), private='right')
    config = json.loads((folder/'config.json').read_text()) | dict(autoencoder='me/vae')
    (folder/'config.json').write_text(json.dumps(config))
    tok, images = V2Flow.from_pretrained(folder, token='right'), noise(1, 3, 64, 64)
    assert torch.equal(tok.encode(images), V2Flow.from_pretrained(checkpoints/'emoji', 'image_tokenizer').encode(images))
    with pytest.raises(FileNotFoundError, match='me/vae: .*no such autoencoder on the Hub; if it is private'):
        V2Flow.from_pretrained(folder, token='wrong', cache_dir=tmp_path/'empty')

def test_a_table_of_embeddings_comes_without_the_rest(hub):
    from v2flow_nbdev.models.vocabulary import Vocabulary
    there = content(checkpoints/'digits/llm')
    hub.add('me/llm', there | {'pytorch_model.bin': b'pickle', 'onnx/model.onnx': b'x'})
    vocabulary = Vocabulary.from_pretrained('me/llm', revision='main')
    assert torch.equal(vocabulary.embeddings, Vocabulary.from_pretrained(checkpoints/'digits/llm').embeddings)
    assert hub.got() == sorted(set(there) - {'generation_config.json'})

def test_autoencoder_judge_and_teacher_come_back(hub):
    from v2flow_nbdev.evaluation.judges import ImageClassifier
    from v2flow_nbdev.models.latents import AutoencoderLatents
    from v2flow_nbdev.systems.teacher import Teacher
    sha = hub.add('me/emoji', content(checkpoints/'emoji')); hub.add('me/teacher', content(checkpoints/'teacher'))
    images = noise(2, 3, 64, 64)
    latents = AutoencoderLatents.from_pretrained('me/emoji', subfolder='image_tokenizer/autoencoder', device='cpu')
    own = AutoencoderLatents.from_pretrained(checkpoints/'emoji/image_tokenizer/autoencoder')
    assert torch.equal(latents.encode(images), own.encode(images)) and latents.revision == sha
    judge = ImageClassifier.from_pretrained('me/emoji', 'judge', device='cpu')
    assert torch.equal(judge.features(images), ImageClassifier.from_pretrained(checkpoints/'emoji', 'judge').features(images))
    teacher = Teacher.from_pretrained('me/teacher', device='cpu')
    assert torch.equal(teacher.embed_images(images), Teacher.from_pretrained(checkpoints/'teacher').embed_images(images))
    assert hub.got('me/emoji') == ['image_tokenizer/autoencoder/config.json',
        'image_tokenizer/autoencoder/diffusion_pytorch_model.safetensors', 'judge/config.json', 'judge/model.safetensors']
    assert hub.got('me/teacher') == ['config.json', 'model.safetensors']

def test_a_tokenflow_pipeline_comes_back(hub):
    from v2flow_nbdev.language.text_models import first_id, toy_llama
    from v2flow_nbdev.systems.tokenflow import TokenFlow, TokenFlowConfig
    from v2flow_nbdev.systems.tokenflow_pipeline import TokenFlowPipeline
    from v2flow_nbdev.systems.understanding import TokenFlowLLM
    tok = TokenFlow(TokenFlowConfig(image_size=(32, 32), sides=(1, 2, 4), codebook_size=32, width=16, project_width=16)).eval()
    tok.quantizer.initialised.fill_(True)
    llm, text = toy_llama(['a cat', 'a dog'])
    made = TokenFlowPipeline(tok, TokenFlowLLM(llm, tok.quantizer, first_id(text), 'map'), text, dict(passes=2))
    made.push_to_hub('me/tokenflow', card=dict(license='mit'))
    back = TokenFlowPipeline.from_pretrained('me/tokenflow')
    draw = lambda p: p('a cat', generator=torch.Generator().manual_seed(0)).ids
    assert torch.equal(draw(back), draw(made)) and back.defaults == made.defaults
    assert card_of(hub.files('me/tokenflow')['README.md'].decode()).data.license == 'mit'
    names = {}; exec(usage(card_of(hub.files('me/tokenflow')['README.md'].decode())), names)
    assert names['image'].size == (32, 32)

def test_a_push_that_is_refused_is_a_line(hub, pipe, monkeypatch):
    tok = pipe.image_tokenizer
    with pytest.raises(PermissionError, match=r'other/tok: the Hub refuses to write there \(403\); log in with') as e:
        tok.push_to_hub('other/tok')
    assert '\n' not in str(e.value) and not hub.repos
    monkeypatch.delenv('HF_TOKEN'); monkeypatch.setattr(constants, 'HF_TOKEN_PATH', '/nowhere')
    with pytest.raises(PermissionError, match=r'refuses to write there \(401\)'): tok.push_to_hub('me/tok')
    monkeypatch.setenv('HF_TOKEN', 'mine'); hub.add('me/tok', {'a.txt': b'a'})
    with pytest.raises(FileNotFoundError, match='has no such branch; make it first'): tok.push_to_hub('me/tok', revision='v2')
    hub.add('me/tok', {}, branch='v2'); tok.push_to_hub('me/tok', revision='v2')
    assert 'model.safetensors' in hub.files('me/tok', 'v2') and 'model.safetensors' not in hub.files('me/tok')

# data of the project, where there is no clone

@pytest.fixture
def elsewhere(hub, monkeypatch, tmp_path):
    "A folder without a clone, a package outside of one, and a Hub that has the project's smaller data"
    from v2flow_nbdev.base import files
    place = tmp_path/'empty'; place.mkdir()
    monkeypatch.chdir(place); monkeypatch.setattr(files, '__file__', str(tmp_path/'site-packages/files.py'))
    known, revision = files.known_data()
    hub.add(files.hub_repository, {'data/emoji/train.parquet': b'of another revision'})
    hub.add(files.hub_repository, {n: (root/n).read_bytes() for n, (size, _) in known.items() if size < 3e6}, branch=revision)
    files.fetch_data.cache_clear()
    yield hub
    files.fetch_data.cache_clear()

def test_data_come_from_the_hub_by_name_and_once(elsewhere, monkeypatch):
    from v2flow_nbdev.base import files
    found = files.find_data('keywords')
    assert elsewhere.got() == ['data/keywords/keywords.json'] and content(found) == {'keywords.json': (root/'data/keywords/keywords.json').read_bytes()}
    assert files.find_data('configs/digits-llm.yaml').read_text() == (root/'configs/digits-llm.yaml').read_text()
    assert files.find_data('benchmarks/words.json').is_file() and len(elsewhere.got()) == 3
    files.find_data('keywords', force_download=True); assert len(elsewhere.got()) == 4
    files.fetch_data.cache_clear(); elsewhere.requests.clear(); monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert files.find_data('keywords') == found and files.find_data('configs/digits-llm.yaml') and not elsewhere.requests

def test_a_model_of_the_project_loads_by_its_name(elsewhere):
    from v2flow_nbdev.apps.commands import find_model, read_yaml
    tok = V2Flow.from_pretrained('data/checkpoints/digits', subfolder='image_tokenizer')
    assert all(n.startswith('data/checkpoints/digits/image_tokenizer/') for n in elsewhere.got())
    assert tok.config == V2Flow.from_pretrained(shipped, subfolder='image_tokenizer').config
    assert (find_model('data/checkpoints/digits')/'model_index.json').is_file()
    assert read_yaml(Path('configs/digits-llm.yaml'))['image_tokenizer'] == 'runs/digits-tokenizer/model'

def test_a_folder_that_is_named_is_taken_as_it_is(elsewhere):
    from v2flow_nbdev.apps.commands import find_model
    shutil.copytree(shipped, 'data/checkpoints/digits')
    V2Flow.from_pretrained('data/checkpoints/digits', subfolder='image_tokenizer')
    assert find_model('data/checkpoints/digits') == 'data/checkpoints/digits' and not elsewhere.requests

def test_data_that_are_not_those_of_this_package_are_refused_and_removed(elsewhere, tmp_path):
    from v2flow_nbdev.base import files
    revision = files.known_data()[1]
    elsewhere.add(files.hub_repository, {'data/prose/persuasion.txt': b'Pride and Prejudice'}, branch=revision)
    for _ in range(2):  # the second time the damage is met in the cache, or comes again
        with pytest.raises(OSError, match='^data/prose/persuasion.txt: .* gave another file than this version of the package knows') as e:
            files.find_data('prose')
        assert '\n' not in str(e.value) and not [p for p in cached(tmp_path) if p.read_bytes().startswith(b'Pride')]
    elsewhere.add(files.hub_repository, {'data/prose/persuasion.txt': (root/'data/prose/persuasion.txt').read_bytes()}, branch=revision)
    found = files.find_data('prose')/'persuasion.txt'
    found.resolve().write_bytes(b'damaged on the disk'); files.fetch_data.cache_clear()
    with pytest.raises(OSError, match='it was removed; fetch it again'): files.find_data('prose')
    assert files.find_data('prose/persuasion.txt').read_bytes() == (root/'data/prose/persuasion.txt').read_bytes()

def test_what_stands_in_the_way_of_data_is_one_line(elsewhere, monkeypatch):
    from v2flow_nbdev.base import files
    def said(name='prose', **how):
        with pytest.raises(FileNotFoundError) as e: files.find_data(name, **how)
        assert '\n' not in str(e.value); return str(e.value)
    assert said('checkpoints/emojis').endswith('there are digits, emoji, shapes, smollm2, teacher') and not elsewhere.requests
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'while HF_HUB_OFFLINE is set' in said() and f'`git clone {files.repository}`' in said()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(files, 'hub_repository', 'me/nothing')
    assert 'no such data on the Hub' in said()
    elsewhere.add('me/nothing', {})
    assert 'has no revision' in said()

def test_what_is_pushed_is_what_is_found(hub, monkeypatch, tmp_path):
    "`data/manifest.py --push`, with READMEs and licences; a second time nothing is sent"
    from huggingface_hub import HfApi
    from v2flow_nbdev.base import files
    monkeypatch.syspath_prepend(str(root/'data'))
    import manifest
    names = ['data/prose/README.md', 'data/prose/persuasion.txt', 'data/smollm2/tokens.safetensors']
    monkeypatch.setattr(manifest, 'tracked', lambda: names)
    for module in (files, manifest): monkeypatch.setattr(module, 'hub_repository', 'me/data')
    monkeypatch.setattr(files, '__file__', str(tmp_path/'files.py')); monkeypatch.chdir(tmp_path); files.fetch_data.cache_clear()
    revision = manifest.push(HfApi(endpoint=hub.url, token='mine'))
    assert hub.files('me/data', revision).keys() == {*names, 'LICENSE', 'NOTICE'}
    for name in ('prose', 'smollm2'): assert content(files.find_data(name)).keys() < {Path(n).name for n in names}
    hub.requests.clear(); manifest.push(HfApi(endpoint=hub.url, token='mine'))
    assert not [p for m,p in hub.requests if m == 'PUT']
    files.fetch_data.cache_clear()
