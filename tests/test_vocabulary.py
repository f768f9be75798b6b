"The table of any language model: the right rows, out of the right file, in little memory; and one clear line where that cannot be"
import inspect, json, shutil, string, struct, subprocess, sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from conftest import shipped
from v2flow_nbdev.llm import small_llama, train_text_tokenizer
from v2flow_nbdev.vocabulary import Vocabulary, find_table, read_json, read_rows, read_tensors, resolve_folder, table_checksum, word_ids, write_json, write_tensors

texts = ['a handwritten seven', 'the digit seven, written by hand', 'a small nine']
small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
families = {  # name: (config class, its settings, type on disk, padding rows)
    'llama': ('LlamaConfig', small, torch.float32, 0),
    'smollm': ('LlamaConfig', {**small, 'tie_word_embeddings': True}, torch.bfloat16, 0),
    'qwen2': ('Qwen2Config', small, torch.bfloat16, 91),
    'qwen3': ('Qwen3Config', {**small, 'head_dim': 8, 'tie_word_embeddings': True}, torch.float16, 91),
    'phi3': ('Phi3Config', small, torch.float16, 3),
    'mistral': ('MistralConfig', small, torch.bfloat16, 0),
    'gpt2': ('GPT2Config', dict(n_embd=16, n_layer=2, n_head=2, n_positions=32), torch.float32, 1),
    'gpt2 untied': ('GPT2Config', dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False), torch.float16, 0),
    'falcon': ('FalconConfig', dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2), torch.bfloat16, 0),
}

@contextmanager
def no_model():
    "Whoever builds a model in here fails"
    def fail(*args, **kwargs): raise AssertionError('a model is being built')
    with patch('torch.nn.Module.__init__', fail): yield

@pytest.fixture(scope='module')
def text_tokenizer(): return train_text_tokenizer(texts, 300)

def build(name, tokenizer, folder, **kwargs):
    "A model of a family with random rows, and its folder"
    import transformers
    kind, settings, dtype, padding = families[name]
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(vocab_size=len(tokenizer) + padding, **special, **settings)).to(dtype)
    model.save_pretrained(folder, **kwargs); tokenizer.save_pretrained(folder)
    return model

@pytest.fixture(scope='module')
def llama(text_tokenizer, tmp_path_factory):
    "A folder to copy and spoil, and its model"
    folder = tmp_path_factory.mktemp('llama')
    return folder, build('llama', text_tokenizer, folder)

def byte_fallback_tokenizer():
    "Spelled as sentencepiece tokenizers are: `▁` for a blank, `<0x00>` … `<0xFF>` for bytes of unknown letters; with chat marks and more added words"
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    pieces = ['<unk>', '<s>', '</s>'] + [f'<0x{b:02X}>' for b in range(256)] + ['▁', *'sevnia', 'se', 'ven', 'seven', '▁seven', '▁a']
    merges = [('s', 'e'), ('v', 'en'), ('se', 'ven'), ('▁', 'seven'), ('▁', 'a')]
    pieces.insert(-5, 'en'); merges.insert(0, ('e', 'n'))
    bpe = Tokenizer(models.BPE({p: i for i,p in enumerate(pieces)}, merges, unk_token='<unk>', byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    bpe.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>')
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    tokenizer.add_tokens(['<|v0|>', '<|v1|>', AddedToken('▁▁▁', normalized=False)])
    return tokenizer, pieces

# the right rows

@pytest.mark.parametrize('name', families)
def test_rows_are_those_of_the_model(name, text_tokenizer, tmp_path):
    model = build(name, text_tokenizer, tmp_path)
    table, tied = model.get_input_embeddings().weight, model.config.tie_word_embeddings
    assert tied == (len({t.data_ptr() for t in (table, model.get_output_embeddings().weight)}) == 1)
    with no_model(): vocab = Vocabulary.from_pretrained(tmp_path)
    ids = list(range(3, len(text_tokenizer)))                               # all but <s>, </s>, <pad>, and padding
    assert len(table) == len(text_tokenizer) + families[name][3] and table.dtype == families[name][2]
    assert vocab.embeddings.dtype == torch.float32 and torch.equal(vocab.embeddings, table.detach()[ids].float())
    assert vocab.words == text_tokenizer.convert_ids_to_tokens(ids) and 'Ġseven' in vocab.words

def test_rows_and_checksum_are_those_of_reading_everything(text_tokenizer, tmp_path):
    small_llama(text_tokenizer, 16, 1, 2, 24).save_pretrained(tmp_path); text_tokenizer.save_pretrained(tmp_path)
    whole = read_tensors(tmp_path/'model.safetensors')['model.embed_tokens.weight']
    vocab = Vocabulary.from_pretrained(tmp_path)
    assert torch.equal(vocab.embeddings, whole[3:]) and vocab.checksum == Vocabulary(vocab.words, whole[3:]).checksum
    import hashlib
    assert table_checksum(whole) == hashlib.sha256(whole.numpy().tobytes()).hexdigest()[:16]

def test_shipped_vocabulary_loads_as_before():
    vocab, config = Vocabulary.load(shipped/'image_tokenizer'), read_json(shipped/'image_tokenizer/config.json')
    assert vocab.checksum == config['vocab_checksum'] and vocab.embeddings.shape == (config['vocab_size'], config['vocab_dim'])
    tuned = Vocabulary.from_pretrained(shipped/'llm')                        # visual words are no words
    assert set(vocab.words) <= set(tuned.words) and not [w for w in tuned.words if w.startswith('<|')]

def test_one_shard_is_opened(text_tokenizer, tmp_path):
    model = build('llama', text_tokenizer, tmp_path, max_shard_size='25KB')
    shards, (path, name) = sorted(tmp_path.glob('*.safetensors')), find_table(tmp_path)
    assert len(shards) > 2 and not (tmp_path/'model.safetensors').exists()
    for other in set(shards) - {path}: other.write_bytes(b'never to be opened')
    vocab = Vocabulary.from_pretrained(tmp_path)
    assert torch.equal(vocab.embeddings, model.get_input_embeddings().weight.detach()[3:])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f'{path.name}: missing'): Vocabulary.from_pretrained(tmp_path)

# which rows are words

def test_which_rows_are_words(tmp_path):
    tokenizer, pieces = byte_fallback_tokenizer()
    model = build('phi3', tokenizer, tmp_path)
    vocab = Vocabulary.from_pretrained(tmp_path)
    assert vocab.words == pieces[259:] and len(model.get_input_embeddings().weight) == len(pieces) + 5 + 3
    assert torch.equal(vocab.embeddings, model.get_input_embeddings().weight.detach()[259:len(pieces)].float())
    assert tokenizer.tokenize('a seven') == ['▁a', '▁seven'] and tokenizer.tokenize('é')[-2:] == ['<0xC3>', '<0xA9>']
    assert word_ids(tokenizer) == list(range(259, len(pieces)))

def test_bytes_of_byte_level_tokenizers_are_words(text_tokenizer):
    from tokenizers import pre_tokenizers
    words = text_tokenizer.convert_ids_to_tokens(word_ids(text_tokenizer))
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(words) and '<s>' not in words

def test_rows_without_a_word_are_left_out():
    class Gaps:                                        # ids with holes, as some families have
        all_special_ids, added_tokens_decoder = [0], {7: '<|chat|>'}
        def get_vocab(self): return {'<s>': 0, 'a': 1, 'b': 5, '<|chat|>': 7, 'c': 9, '<0x0A>': 2, '<0xag>': 3}
    assert word_ids(Gaps()) == [1, 3, 5, 9]

# finding the table

def folder_of(folder, config, **tensors):
    if config is not None: write_json(folder/'config.json', config)
    write_tensors(folder/'model.safetensors', {n.replace('__', '.'): torch.zeros(*s) for n,s in tensors.items()})
    return folder

shape = dict(vocab_size=6, hidden_size=4)
found = {  # name: (config, tensors, the table)
    'by name': (shape, dict(model__norm=(4,), lm_head__weight=(6, 4), model__embed_tokens__weight=(6, 4)), 'model.embed_tokens.weight'),
    'without config': (None, dict(wte__weight=(6, 4), wpe__weight=(3, 4)), 'wte.weight'),
    'outermost': (shape, dict(model__a__embed_tokens__weight=(6, 4), model__embed_tokens__weight=(6, 4)), 'model.embed_tokens.weight'),
    'whole parts of names': (shape, dict(xwte__weight=(9, 4), backbone__table=(6, 4)), 'backbone.table'),
    'by shape': (shape, dict(backbone__table=(6, 4), other=(7, 4), lm_head__weight=(6, 4)), 'backbone.table'),
    'tied head': ({**shape, 'tie_word_embeddings': True}, dict(lm_head__weight=(6, 4), mlp=(4, 6)), 'lm_head.weight'),
    'rows beyond the config': (shape, dict(embed_tokens__weight=(8, 4)), 'embed_tokens.weight'),
    'nested config': (dict(vocab_size=1, hidden_size=9, text_config=shape), dict(language_model__table=(6, 4)), 'language_model.table'),
    'config of little words': (dict(text_config=dict(vocab_size=6)), dict(model__embed_tokens__weight=(6, 4)), 'model.embed_tokens.weight'),
    'gpt2 width': (dict(vocab_size=6, n_embd=4), dict(words=(6, 4), positions=(5, 4)), 'words'),
}
not_found = {  # name: (config, tensors, what the line must contain)
    'nothing alike': (shape, dict(other=(7, 4)), r'no input-embedding table found: no tensor is called embed_tokens.*and 0 have the shape \(6, 4\)'),
    'two alike': (shape, dict(a=(6, 4), b=(6, 4)), 'and 2 have the shape'),
    'head untied': (shape, dict(lm_head__weight=(6, 4)), 'and 0 have the shape'),
    'no config': (None, dict(table=(6, 4)), 'no config.json tells its shape'),
    'config without a width': (dict(vocab_size=6), dict(table=(6, 4)), 'no config.json tells its shape'),
    'too few rows': (shape, dict(wte__weight=(5, 4)), r'wte.weight is of shape \(5, 4\), but config.json says \(6, 4\)'),
    'another width': (shape, dict(wte__weight=(6, 5)), r'wte.weight is of shape \(6, 5\), but config.json says'),
    'no matrix': (shape, dict(wte__weight=(6,)), r'wte.weight is of shape \(6,\)'),
}

@pytest.mark.parametrize('name', found)
def test_table_is_found(name, tmp_path):
    config, tensors, table = found[name]
    assert find_table(folder_of(tmp_path, config, **tensors)) == (tmp_path/'model.safetensors', table)

@pytest.mark.parametrize('name', not_found)
def test_no_table_is_one_clear_line(name, tmp_path):
    config, tensors, contains = not_found[name]
    folder_of(tmp_path, config, **tensors)
    with pytest.raises(OSError, match=contains) as e: find_table(tmp_path)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

def test_read_rows(tmp_path):
    from safetensors.torch import save_file
    tables = {str(d): torch.arange(70).view(10, 7).to(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
    save_file(tables, tmp_path/'x.safetensors')
    for name, table in tables.items():
        for rows in ([], [9], [0, 3, 4, 9], [7, 0, 7, 2]):
            for block in (1, 3, 10, 1024):
                got = read_rows(tmp_path/'x.safetensors', name, rows, block)
                assert got.dtype == torch.float32 and torch.equal(got, table[rows].float()), (name, rows, block)
    for bad in ([10], [-1, 3]):
        with pytest.raises(ValueError, match='torch.float32 has 0 to 9'): read_rows(tmp_path/'x.safetensors', 'torch.float32', bad)
    with pytest.raises(OSError, match='x.safetensors: damaged'): read_rows(tmp_path/'x.safetensors', 'other', [0])

# one clear line

def emptied(folder): shutil.rmtree(folder); folder.mkdir()
def cut(folder): path = folder/'model.safetensors'; path.write_bytes(path.read_bytes()[:2000])
def index(folder, files): write_json(folder/'model.safetensors.index.json', {'weight_map': files})
def index_of_nothing(folder): index(folder, ['model.safetensors'])
def index_of_another(folder): index(folder, {'model.x.embed_tokens.weight': 'model.safetensors'})
def config_cut(folder): (folder/'config.json').write_text('{"vocab')
def tokenizer_cut(folder): (folder/'tokenizer.json').write_text('{"a":')
def quantized(folder): write_tensors(folder/'model.safetensors', {'wte.weight': torch.zeros(300, 16, dtype=torch.int8)})
def other_tokenizer(folder): train_text_tokenizer(texts + ['one two three four five six eight ten eleven twelve']*9, 340).save_pretrained(folder)
def no_tokenizer(folder): (folder/'tokenizer.json').unlink(); (folder/'tokenizer_config.json').unlink()
def pickle_only(folder):
    (folder/'model.safetensors').unlink()
    torch.save({'model.embed_tokens.weight': torch.zeros(2, 2)}, folder/'pytorch_model.bin')
def empty_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token='<s>').save_pretrained(folder)

bad = {  # how the folder is spoiled: what the line must contain
    emptied: 'model.safetensors: missing; safetensors are needed',
    pickle_only: 'model.safetensors: missing; safetensors are needed',
    cut: 'model.safetensors: damaged safetensors file',
    index_of_nothing: 'index.json: its weight_map names no files',
    index_of_another: 'model.safetensors: damaged safetensors file',
    config_cut: 'config.json: cannot be read as JSON',
    quantized: 'wte.weight is stored as I8',
    other_tokenizer: r'the text tokenizer has words up to id 3\d\d, the table \d+ rows; they are not of one model',
    no_tokenizer: 'its text tokenizer cannot be loaded',
    tokenizer_cut: 'its text tokenizer cannot be loaded',
    empty_tokenizer: 'its text tokenizer has no words',
}

@pytest.mark.parametrize('spoil', bad, ids=lambda f: f.__name__)
def test_bad_folder_is_one_clear_line(spoil, llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path/'model')); spoil(folder)
    with pytest.raises(OSError, match=bad[spoil]) as e: Vocabulary.from_pretrained(folder)
    assert str(folder) in str(e.value) and '\n' not in str(e.value)

def test_pickles_are_never_opened(llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path/'model')); pickle_only(folder)
    with patch('torch.load', side_effect=AssertionError('opened')) as load:
        with pytest.raises(OSError, match='pytorch_model.bin is a pickle'): Vocabulary.from_pretrained(folder)
    assert not load.called

def test_no_folder_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such model folder; give a folder or a Hub id') as e: Vocabulary.from_pretrained(tmp_path/'none')
    assert '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='no such folder in the model'): Vocabulary.from_pretrained(tmp_path, 'llm')

# the Hub

class Hub:
    "A stand-in for `snapshot_download`: a repository that is a local folder, and a cache; notes what was asked for"
    def __init__(self, repository, cache): self.repository,self.cache,self.fetched,self.asked = repository,cache,[],[]
    def __call__(self, repo_id, revision=None, allow_patterns=None):
        from huggingface_hub.utils import filter_repo_objects
        self.asked.append((repo_id, revision)); self.cache.mkdir(exist_ok=True)
        files = sorted(str(p.relative_to(self.repository)) for p in self.repository.rglob('*') if p.is_file())
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            if not (self.cache/name).exists():
                (self.cache/name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repository/name, self.cache/name); self.fetched.append(name)
        return str(self.cache)

def on_hub(repository, cache): return patch('huggingface_hub.snapshot_download', Hub(repository, cache))

light = ['config.json', 'tokenizer.json', 'tokenizer_config.json']

@pytest.mark.parametrize('subfolder', [None, 'llm'])
@pytest.mark.parametrize('shards', [1, 3])
def test_hub_fetches_the_table_alone(shards, subfolder, text_tokenizer, tmp_path):
    home = tmp_path/'repository'/(subfolder or ''); home.mkdir(parents=True)
    model = build('llama', text_tokenizer, home, **({} if shards == 1 else dict(max_shard_size='25KB')))
    for extra in ('pytorch_model.bin', 'README.md', 'onnx/model.onnx', 'onnx/model.safetensors', 'original/weights.safetensors'):
        (tmp_path/'repository'/extra).parent.mkdir(exist_ok=True); (tmp_path/'repository'/extra).write_text('large')
    path, _ = find_table(home)
    with on_hub(tmp_path/'repository', tmp_path/'cache') as hub: vocab = Vocabulary.from_pretrained('org/model', subfolder, 'v1')
    prefix = f'{subfolder}/' if subfolder else ''
    several = [] if shards == 1 else ['model.safetensors.index.json']
    assert len(list(home.glob('*.safetensors'))) >= shards and hub.asked == [('org/model', 'v1')]*2
    assert hub.fetched[-1] == prefix + path.name                                          # the weights come last, and alone
    assert sorted(hub.fetched) == sorted(prefix + n for n in light + several + [path.name])
    assert torch.equal(vocab.embeddings, model.get_input_embeddings().weight.detach()[3:])

def test_hub_fetches_all_shards_for_a_table_of_unknown_name(text_tokenizer, tmp_path):
    home, V = tmp_path/'repository', len(text_tokenizer); home.mkdir()
    text_tokenizer.save_pretrained(home); write_json(home/'config.json', dict(vocab_size=V, hidden_size=4))
    write_tensors(home/'one.safetensors', {'backbone.words': torch.rand(V, 4)}); write_tensors(home/'two.safetensors', {'x': torch.zeros(3)})
    write_json(home/'model.safetensors.index.json', {'weight_map': {'backbone.words': 'one.safetensors', 'x': 'two.safetensors'}})
    with on_hub(home, tmp_path/'cache') as hub: vocab = Vocabulary.from_pretrained('org/model')
    assert {'one.safetensors', 'two.safetensors'} <= set(hub.fetched) and vocab.embeddings.shape == (V - 3, 4)

def test_hub_without_safetensors_is_one_clear_line(llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path/'repository')); pickle_only(folder)
    with on_hub(folder, tmp_path/'cache') as hub, pytest.raises(OSError, match='safetensors are needed'): Vocabulary.from_pretrained('org/model')
    assert sorted(hub.fetched) == light

def test_resolve_folder_fetches_everything_unless_told(llama, tmp_path):
    import huggingface_hub
    assert {'repo_id', 'revision', 'allow_patterns'} <= set(inspect.signature(huggingface_hub.snapshot_download).parameters)   # the stand-in does not lie
    (tmp_path/'repository/llm').mkdir(parents=True)
    for name in ('llm/a.json', 'a.json', 'b.bin'): (tmp_path/'repository'/name).touch()
    for patterns, subfolder, fetched in ((None, None, ['a.json', 'b.bin', 'llm/a.json']), (['a.*'], None, ['a.json']), (['*.json'], 'llm', ['llm/a.json'])):
        cache = tmp_path/f'cache-{len(fetched)}-{subfolder}'
        with on_hub(tmp_path/'repository', cache) as hub: folder = resolve_folder('org/model', subfolder, patterns=patterns)
        assert hub.fetched == fetched and folder == cache/(subfolder or '')
    assert resolve_folder(llama[0], patterns=['none']) == llama[0]                        # a local folder is what it is

# memory

def sparse_file(path, **tensors):
    "A valid safetensors file of zeros that takes no room on the disk"
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2*shape[0]*shape[1]
        header[name.replace('__', '.')] = dict(dtype='BF16', shape=shape, data_offsets=[at, at := at + size])
    front = json.dumps(header).encode()
    with open(path, 'wb') as f: f.write(struct.pack('<Q', len(front)) + front); f.truncate(8 + len(front) + at)
    return {name: path.name for name in header}

def large_tokenizer(size):
    "As many words as a LLaMA has, merged from letters"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = string.ascii_letters[:32]
    words = [''.join(w) for n in (1, 2, 3) for w in product(letters, repeat=n)][:size - 3]
    bpe = Tokenizer(models.BPE({w: i for i,w in enumerate(['<unk>', '<s>', '</s>'] + words)}, [(w[:-1], w[-1]) for w in words if len(w) > 1], unk_token='<unk>'))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token='<unk>', bos_token='<s>', eos_token='</s>')

measure = '''
import sys
from pathlib import Path
from v2flow_nbdev.vocabulary import Vocabulary, find_table, load_text_tokenizer, read_tensors, word_ids
def peak():                                                                  # of this process alone: ru_maxrss begins with its parent's
    return 1024*int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
def plain(folder):
    path, name = find_table(Path(folder))
    return read_tensors(path, [name])[name].float()[word_ids(load_text_tokenizer(folder))]
small, large = sys.argv[1:]
Vocabulary.from_pretrained(small)                                            # now everything is imported
base = peak()
for read in (lambda folder: Vocabulary.from_pretrained(folder).embeddings, plain):
    rows = read(large); print(*rows.shape, (peak() - base)/(4*rows.numel())); del rows
'''

def test_memory_stays_near_the_table(llama, tmp_path, record_property):
    "A table of 32,000 rows in bfloat16, other weights in its own file and another large file beside it"
    if not Path('/proc/self/status').exists(): pytest.skip('peak memory is read from /proc')
    V, E, rest = 32_000, 2048, [125_000, 2048]                               # 131 MB on disk, 262 MB in float32; 512 MB each
    files = {**sparse_file(tmp_path/'one.safetensors', model__embed_tokens__weight=[V, E], model__layers__0__weight=rest),
             **sparse_file(tmp_path/'two.safetensors', model__layers__1__weight=rest, lm_head__weight=[V, E])}
    index(tmp_path, files); write_json(tmp_path/'config.json', dict(model_type='llama', vocab_size=V, hidden_size=E))
    large_tokenizer(V).save_pretrained(tmp_path)
    for _ in range(3):                                                       # what else the machine does can only add to a peak
        done = subprocess.run([sys.executable, '-P', '-c', measure, llama[0], tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (*shape, ours), (*_, plain) = (map(float, line.split()) for line in done.stdout.splitlines())
        if ours < 1.3: break
    record_property('peak_over_table', ours); print(f'peak memory: {ours:.2f} × the table, read plainly {plain:.2f}')
    assert shape == [V - 3, E] and 0.9 < ours < 1.3
    assert plain > 1.8                                                       # so the gauge shows what it should

# neighbours

def test_neighbours():
    rows = torch.tensor([[2., 0], [1, 0.1], [0, 1], [-1, 0], [-2, -1.1]]) + 5      # the mean is 5
    vocab = Vocabulary(['Ġseven', 'seven', 'Ġnine', '▁ten', 'zero'], rows)
    near = vocab.neighbours('seven', 2)
    assert [w for w,_ in near] == ['Ġseven', 'Ġnine'] and near[0][1] == pytest.approx(1/1.01**0.5) and near[1][1] == pytest.approx(0.1/1.01**0.5)
    assert [w for w,_ in vocab.neighbours('Ġseven', 1)] == ['seven']                # as spelled comes before the mark of the blank
    assert vocab.neighbours('nine') == vocab.neighbours('Ġnine') and vocab.neighbours('ten') == vocab.neighbours('▁ten')
    assert len(vocab.neighbours('zero')) == 4 and len(vocab.neighbours('zero', 99)) == 4
    cosines = [c for _,c in vocab.neighbours('zero')]
    assert cosines == sorted(cosines, reverse=True) and all(-1 <= c <= 1 for c in cosines)
    with pytest.raises(ValueError, match="word='eight': not one of the 5 words"): vocab.neighbours('eight')
    with pytest.raises(ValueError, match='n=0: needs to be at least 1'): vocab.neighbours('zero', 0)
