("The table of any language model: the right rows, out of the right file, in little memory; and one clear line where "
 "that cannot be")
import inspect, json, re, shutil, string
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from benchmarks.table import E, V, large_model
from conftest import shipped
from v2flow_nbdev.language.text_models import small_llama, train_text_tokenizer
from v2flow_nbdev.base.text import control_tokens, text_ids, text_token_ids
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.base.files import open_tensors, read_json, read_tensors, write_json, write_tensors
from v2flow_nbdev.base.folders import config_from_dict, push_to_hub, resolve_folder, weights_variant
from v2flow_nbdev.base.tables import find_table, read_embeddings, table_checksum

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
    'gpt2 untied': ('GPT2Config', dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False),
                    torch.float16, 0),
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
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(vocab_size=len(tokenizer)
            + padding, **special, **settings)).to(dtype)
    model.save_pretrained(folder, **kwargs); tokenizer.save_pretrained(folder)
    return model

@pytest.fixture(scope='module')
def llama(text_tokenizer, tmp_path_factory):
    "A folder to copy and spoil, and its model"
    folder = tmp_path_factory.mktemp('llama')
    return folder, build('llama', text_tokenizer, folder)

def byte_fallback_tokenizer():
    """Spelled as sentencepiece tokenizers are: `▁` for a blank, `<0x00>` … `<0xFF>` for bytes of unknown letters;
    with chat marks and more added words"""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    pieces = ['<unk>', '<s>', '</s>'] + [f'<0x{b:02X}>' for b in range(256)] + ['▁', *'sevnia', 'se', 'ven', 'seven',
        '▁seven', '▁a']
    merges = [('s', 'e'), ('v', 'en'), ('se', 'ven'), ('▁', 'seven'), ('▁', 'a')]
    pieces.insert(-5, 'en'); merges.insert(0, ('e', 'n'))
    bpe = Tokenizer(models.BPE({p: i for i,p in enumerate(pieces)}, merges, unk_token='<unk>', byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    bpe.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>', eos_token='</s>', unk_token='<unk>',
                                        pad_token='</s>')
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
    assert vocab.tokens == text_tokenizer.convert_ids_to_tokens(ids) and 'Ġseven' in vocab.tokens

def test_rows_and_checksum_are_those_of_reading_everything(text_tokenizer, tmp_path):
    small_llama(text_tokenizer, 16, 1, 2, 24).save_pretrained(tmp_path); text_tokenizer.save_pretrained(tmp_path)
    whole = read_tensors(tmp_path/'model.safetensors')['model.embed_tokens.weight']
    vocab = Vocabulary.from_pretrained(tmp_path)
    assert torch.equal(vocab.embeddings, whole[3:]) and vocab.checksum == Vocabulary(vocab.tokens, whole[3:]).checksum
    import hashlib
    assert table_checksum(whole) == hashlib.sha256(whole.numpy().tobytes()).hexdigest()[:16]

def test_shipped_vocabulary_loads_as_before():
    vocab, config = Vocabulary.load(shipped/'image_tokenizer'), read_json(shipped/'image_tokenizer/config.json')
    assert vocab.checksum == config['vocab_checksum'] and vocab.embeddings.shape == (config['vocab_size'],
        config['vocab_dim'])
    tuned = Vocabulary.from_pretrained(shipped/'llm')                        # visual tokens are no words
    assert set(vocab.tokens) <= set(tuned.tokens) and not [w for w in tuned.tokens if w.startswith('<|')]

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
    assert vocab.tokens == pieces[259:] and len(model.get_input_embeddings().weight) == len(pieces) + 5 + 3
    assert torch.equal(vocab.embeddings, model.get_input_embeddings().weight.detach()[259:len(pieces)].float())
    assert tokenizer.tokenize('a seven') == ['▁a', '▁seven'] and tokenizer.tokenize('é')[-2:] == ['<0xC3>', '<0xA9>']
    assert text_token_ids(tokenizer) == list(range(259, len(pieces)))

def test_bytes_of_byte_level_tokenizers_are_words(text_tokenizer):
    from tokenizers import pre_tokenizers
    words = text_tokenizer.convert_ids_to_tokens(text_token_ids(text_tokenizer))
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(words) and '<s>' not in words

def test_rows_without_a_word_are_left_out():
    class Gaps:                                        # ids with holes, as some families have
        all_special_ids, added_tokens_decoder = [0], {7: '<|chat|>'}
        def get_vocab(self): return {'<s>': 0, 'a': 1, 'b': 5, '<|chat|>': 7, 'c': 9, '<0x0A>': 2, '<0xag>': 3}
    assert text_token_ids(Gaps()) == [1, 3, 5, 9]

# finding the table

def folder_of(folder, config, **tensors):
    if config is not None: write_json(folder/'config.json', config)
    write_tensors(folder/'model.safetensors', {n.replace('__', '.'): torch.zeros(*s) for n,s in tensors.items()})
    return folder

shape = dict(vocab_size=6, hidden_size=4)
found = {  # name: (config, tensors, the table)
    'by name': (shape, dict(model__norm=(4,), lm_head__weight=(6, 4), model__embed_tokens__weight=(6, 4)),
                'model.embed_tokens.weight'),
    'without config': (None, dict(wte__weight=(6, 4), wpe__weight=(3, 4)), 'wte.weight'),
    'outermost': (shape, dict(model__a__embed_tokens__weight=(6, 4), model__embed_tokens__weight=(6, 4)),
                  'model.embed_tokens.weight'),
    'whole parts of names': (shape, dict(xwte__weight=(9, 4), backbone__table=(6, 4)), 'backbone.table'),
    'by shape': (shape, dict(backbone__table=(6, 4), other=(7, 4), lm_head__weight=(6, 4)), 'backbone.table'),
    'tied head': ({**shape, 'tie_word_embeddings': True}, dict(lm_head__weight=(6, 4), mlp=(4, 6)), 'lm_head.weight'),
    'rows beyond the config': (shape, dict(embed_tokens__weight=(8, 4)), 'embed_tokens.weight'),
    'nested config': (dict(vocab_size=1, hidden_size=9, text_config=shape), dict(language_model__table=(6, 4)),
                      'language_model.table'),
    'config of little words': (dict(text_config=dict(vocab_size=6)), dict(model__embed_tokens__weight=(6, 4)),
                               'model.embed_tokens.weight'),
    'gpt2 width': (dict(vocab_size=6, n_embd=4), dict(words=(6, 4), positions=(5, 4)), 'words'),
}
not_found = ({  # name: (config, tensors, what the line must contain)
    'nothing alike': (shape, dict(other=(7, 4)),
                      r'no input-embedding table found: no tensor is called embed_tokens.*and 0 have the shape \(6, 4\)'),
    'two alike': (shape, dict(a=(6, 4), b=(6, 4)), 'and 2 have the shape'),
    'head untied': (shape, dict(lm_head__weight=(6, 4)), 'and 0 have the shape'),
    'no config': (None, dict(table=(6, 4)), 'no config.json tells its shape'),
    'config without a width': (dict(vocab_size=6), dict(table=(6, 4)), 'no config.json tells its shape'),
    'too few rows': (shape, dict(wte__weight=(5, 4)),
                     r'wte.weight is of shape \(5, 4\), but config.json says \(6, 4\)'),
    'another width': (shape, dict(wte__weight=(6, 5)), r'wte.weight is of shape \(6, 5\), but config.json says'),
    'no matrix': (shape, dict(wte__weight=(6,)), r'wte.weight is of shape \(6,\)'),
})

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
    tables = {str(d): torch.arange(70).view(10, 7).to(d) for d in (torch.float32, torch.bfloat16, torch.float16,
        torch.float64)}
    save_file(tables, tmp_path/'x.safetensors')
    for name, table in tables.items():
        for rows in ([], [9], [0, 3, 4, 9], [7, 0, 7, 2]):
            for block in (1, 3, 10, 1024):
                got = read_embeddings(tmp_path/'x.safetensors', name, rows, block)
                assert got.dtype == torch.float32 and torch.equal(got, table[rows].float()), (name, rows, block)
    for bad in ([10], [-1, 3]):
        with pytest.raises(ValueError, match='torch.float32 has 0 to 9'):
            read_embeddings(tmp_path/'x.safetensors', 'torch.float32', bad)
    with pytest.raises(OSError, match='x.safetensors: damaged'): read_embeddings(tmp_path/'x.safetensors', 'other', [0])

# one clear line

def emptied(folder): shutil.rmtree(folder); folder.mkdir()
def cut(folder): path = folder/'model.safetensors'; path.write_bytes(path.read_bytes()[:2000])
def index(folder, files): write_json(folder/'model.safetensors.index.json', {'weight_map': files})
def shard(folder): (folder/'model.safetensors').rename(folder/'model-1.safetensors')
def index_of_nothing(folder): shard(folder); index(folder, ['model-1.safetensors'])
def index_of_another(folder): shard(folder); index(folder, {'model.x.embed_tokens.weight': 'model-1.safetensors'})
def index_of_elsewhere(folder): shard(folder); index(folder, {'model.embed_tokens.weight': '../model-1.safetensors'})
def shard_missing(folder): shard(folder); index(folder, {'model.embed_tokens.weight': 'model-2.safetensors'})
def no_index(folder): shard(folder)
def mistral_layout(folder): (folder/'model.safetensors').rename(folder/'consolidated.safetensors')
def adapter_only(folder): (folder/'model.safetensors').rename(folder/'adapter_model.safetensors')
def gguf_only(folder): (folder/'model.safetensors').rename(folder/'model.Q4.gguf')
def two_variants(folder):
    shutil.copy(folder/'model.safetensors', folder/'model.fp16.safetensors')
    (folder/'model.safetensors').rename(folder/'model.bf16.safetensors')
def not_finite(folder):
    tensors = read_tensors(folder/'model.safetensors'); tensors['model.embed_tokens.weight'][9, 3] = torch.nan
    write_tensors(folder/'model.safetensors', tensors)
def config_cut(folder): (folder/'config.json').write_text('{"vocab')
def tokenizer_cut(folder): (folder/'tokenizer.json').write_text('{"a":')
def quantized(folder): write_tensors(folder/'model.safetensors', {'wte.weight': torch.zeros(300, 16, dtype=torch.int8)})
def other_tokenizer(folder):
    train_text_tokenizer(texts + ['one two three four five six eight ten eleven twelve']*9, 340).save_pretrained(folder)
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
    index_of_another: 'model-1.safetensors: damaged safetensors file',
    index_of_elsewhere: 'its weight_map names no files of the folder',
    shard_missing: 'model-2.safetensors: missing',
    no_index: 'model.safetensors: missing.*model-1.safetensors is there under another name',
    mistral_layout: 'consolidated.safetensors is in the layout of Mistral',
    adapter_only: 'adapter_model.safetensors is an adapter: merge it',
    gguf_only: 'model.Q4.gguf is for llama.cpp',
    two_variants: 'holds the variants bf16, fp16 and no model.safetensors; say which with variant=',
    not_finite: 'model.embed_tokens.weight: .*not finite',
    config_cut: 'config.json: cannot be read as JSON',
    quantized: 'wte.weight is stored as I8',
    other_tokenizer: r'the text tokenizer has tokens up to id 3\d\d, the table \d+ embeddings; they are not of one model',
    no_tokenizer: 'its text tokenizer cannot be loaded',
    tokenizer_cut: 'its text tokenizer cannot be loaded',
    empty_tokenizer: 'its text tokenizer has no tokens',
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
    with pytest.raises(FileNotFoundError, match='no such model folder; give a folder or a Hub id') as e:
        Vocabulary.from_pretrained(tmp_path/'none')
    assert '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='no such folder in the model'):
        Vocabulary.from_pretrained(tmp_path, 'llm')

# which file

def test_one_file_comes_before_an_index(text_tokenizer, tmp_path):
    "As in `transformers`: both are there after two uploads to one repository"
    from transformers import AutoModelForCausalLM
    model = build('llama', text_tokenizer, tmp_path, max_shard_size='25KB')
    old = {p.name: p.read_bytes() for p in tmp_path.glob('model*')}
    with torch.no_grad(): model.get_input_embeddings().weight.neg_()
    model.save_pretrained(tmp_path)
    for name, content in old.items(): (tmp_path/name).write_bytes(content)
    assert (tmp_path/'model.safetensors').exists() and (tmp_path/'model.safetensors.index.json').exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight.detach()
    ours = Vocabulary.from_pretrained(tmp_path).embeddings
    assert torch.equal(ours, theirs[3:]) and torch.equal(ours, model.get_input_embeddings().weight.detach()[3:])

def renamed(folder, variant, how):
    "The same checkpoint as a variant, in one of the spellings that are in use"
    if how == 'one': (folder/'model.safetensors').rename(folder/f'model.{variant}.safetensors'); return
    content = read_json(folder/'model.safetensors.index.json'); (folder/'model.safetensors.index.json').unlink()
    for name in {*content['weight_map'].values()}:
        (folder/name).rename(folder/name.replace('.safetensors', f'.{variant}.safetensors'))
    content['weight_map'] = {k: v.replace('.safetensors', f'.{variant}.safetensors') for k,
                             v in content['weight_map'].items()}
    write_json(folder/(f'model.safetensors.index.{variant}.json'
                       if how == 'transformers' else f'model.{variant}.safetensors.index.json'), content)

@pytest.mark.parametrize('how', ['one', 'transformers', 'diffusers'])
def test_a_variant_alone_is_read(how, text_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM
    home = tmp_path/'repository'; home.mkdir()
    model = build('llama', text_tokenizer, home, **({} if how == 'one' else dict(max_shard_size='25KB')))
    renamed(home, 'fp16', how)
    rows = model.get_input_embeddings().weight.detach()[3:]
    assert weights_variant(home) == 'fp16' and torch.equal(Vocabulary.from_pretrained(home).embeddings,
                                                           rows) and torch.equal(Vocabulary.from_pretrained(home,
                                                               variant='fp16').embeddings, rows)
    if how != 'diffusers':
        assert torch.equal(AutoModelForCausalLM.from_pretrained(home,
                                                                variant=weights_variant(
                                                                    home)).get_input_embeddings().weight.detach()[3:],
                                                                    rows)
    with pytest.raises(FileNotFoundError, match='model.bf16.safetensors: missing'):
        Vocabulary.from_pretrained(home, variant='bf16')
    with on_hub(home, tmp_path/'cache') as hub:
        assert torch.equal(Vocabulary.from_pretrained('org/model').embeddings, rows)
    assert how == 'one' or len([n for n in hub.fetched if n.endswith('.safetensors')]) == 1
    build('mistral', text_tokenizer, home)  # with plain files beside it, these count
    assert weights_variant(home) is None and not torch.equal(Vocabulary.from_pretrained(home).embeddings,
                                                             rows) and torch.equal(Vocabulary.from_pretrained(home,
                                                                 variant='fp16').embeddings, rows)

def test_the_config_may_name_the_file(llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path/'model'))
    (folder/'model.safetensors').rename(folder/'mine.safetensors')
    write_json(folder/'config.json', {**read_json(folder/'config.json'), 'transformers_weights': 'mine.safetensors'})
    assert find_table(folder)[0].name == 'mine.safetensors'

def test_a_table_narrower_than_what_follows(text_tokenizer, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM
    model = OPTForCausalLM(OPTConfig(vocab_size=len(text_tokenizer), hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
                                     num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
                                     do_layer_norm_before=False))
    model.save_pretrained(tmp_path); text_tokenizer.save_pretrained(tmp_path)
    assert torch.equal(Vocabulary.from_pretrained(tmp_path).embeddings,
                       model.get_input_embeddings().weight.detach()[3:])

# the Hub

class Hub:
    "A stand-in for `snapshot_download`: a repository that is a local folder, and a cache; notes what was asked for"
    def __init__(self, repository, cache): self.repository,self.cache,self.fetched,self.asked = repository,cache,[],[]
    def __call__(self, repo_id, revision=None, allow_patterns=None, ignore_patterns=None):
        from huggingface_hub.utils import filter_repo_objects
        self.asked.append((repo_id, revision)); self.cache.mkdir(exist_ok=True)
        files = sorted(str(p.relative_to(self.repository)) for p in self.repository.rglob('*') if p.is_file())
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
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
    for extra in ('pytorch_model.bin', 'README.md', 'onnx/model.onnx', 'onnx/model.safetensors',
                  'original/weights.safetensors'):
        (tmp_path/'repository'/extra).parent.mkdir(exist_ok=True); (tmp_path/'repository'/extra).write_text('large')
    path, _ = find_table(home)
    with on_hub(tmp_path/'repository', tmp_path/'cache') as hub:
        vocab = Vocabulary.from_pretrained('org/model', subfolder, 'v1')
    prefix = f'{subfolder}/' if subfolder else ''
    several = [] if shards == 1 else ['model.safetensors.index.json']
    assert len(list(home.glob('*.safetensors'))) >= shards and hub.asked == [('org/model', 'v1')]*2
    assert hub.fetched[-1] == prefix + path.name  # the weights come last, and alone
    assert sorted(hub.fetched) == sorted(prefix + n for n in light + several + [path.name])
    assert torch.equal(vocab.embeddings, model.get_input_embeddings().weight.detach()[3:])

def test_hub_fetches_all_shards_for_a_table_of_unknown_name(text_tokenizer, tmp_path):
    home, V = tmp_path/'repository', len(text_tokenizer); home.mkdir()
    text_tokenizer.save_pretrained(home); write_json(home/'config.json', dict(vocab_size=V, hidden_size=4))
    write_tensors(home/'one.safetensors', {'backbone.tokens': torch.rand(V, 4)})
    write_tensors(home/'two.safetensors', {'x': torch.zeros(3)})
    write_json(home/'model.safetensors.index.json',
               {'weight_map': {'backbone.tokens': 'one.safetensors', 'x': 'two.safetensors'}})
    with on_hub(home, tmp_path/'cache') as hub: vocab = Vocabulary.from_pretrained('org/model')
    assert {'one.safetensors', 'two.safetensors'} <= set(hub.fetched) and vocab.embeddings.shape == (V - 3, 4)

def test_hub_without_safetensors_is_one_clear_line(llama, tmp_path):
    folder = Path(shutil.copytree(llama[0], tmp_path/'repository')); pickle_only(folder)
    with on_hub(folder, tmp_path/'cache') as hub, pytest.raises(OSError, match='safetensors are needed'):
        Vocabulary.from_pretrained('org/model')
    assert sorted(hub.fetched) == light

def test_resolve_folder_fetches_everything_but_pickles_unless_told(llama, tmp_path):
    import huggingface_hub
    # the stand-in does not lie
    assert {'repo_id', 'revision',
        'allow_patterns'} <= set(inspect.signature(huggingface_hub.snapshot_download).parameters)
    (tmp_path/'repository/llm/b').mkdir(parents=True)
    for name in ('llm/a.json', 'a.json', 'b.bin', 'llm/b/c.json'): (tmp_path/'repository'/name).touch()
    for patterns, subfolder, fetched in ((None, None, ['a.json', 'llm/a.json', 'llm/b/c.json']),
                                         (['a.*'], None, ['a.json']), (['a.json'], 'llm', ['llm/a.json']),
                                         (None, 'llm', ['llm/a.json', 'llm/b/c.json'])):
        cache = tmp_path/f'cache-{len(fetched)}-{subfolder}'
        with on_hub(tmp_path/'repository', cache) as hub:
            folder = resolve_folder('org/model', subfolder, patterns=patterns)
        assert hub.fetched == fetched and folder == cache/(subfolder or '')
    assert resolve_folder(llama[0], patterns=['none']) == llama[0]                        # a local folder is what it is
    with pytest.raises(FileNotFoundError, match='is a file; give the model'): resolve_folder(llama[0]/'config.json')

def test_an_upload_replaces_a_model_and_a_failure_leaves_nothing():
    with patch('huggingface_hub.HfApi') as api:
        class Broken:
            def save_pretrained(self, folder): raise ValueError('not finished')
        with pytest.raises(ValueError, match='not finished'): push_to_hub(Broken(), 'me/notes')
        assert not api().create_repo.called and not api().upload_folder.called
        class Note:
            def save_pretrained(self, folder): write_json(Path(folder)/'note.json', {})
        push_to_hub(Note(), 'me/notes', private=True, token='t', commit_message='first')
        api().create_repo.assert_called_once_with('me/notes', exist_ok=True, private=True, token='t')
        given = api().upload_folder.call_args.kwargs
        assert given['commit_message'] == 'first' and given[
            'token'] == 't' and 'private' not in given and '*.safetensors' in given['delete_patterns']
    import huggingface_hub
    for name in ('create_repo', 'upload_folder'):
        assert {'token', 'repo_type'} <= set(inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters)

# configs

def test_a_config_of_a_newer_version_says_so():
    class V2: format_version = 2
    @dataclass
    class New(V2): steps:int=3; note:str='x'
    @dataclass
    class Old: steps:int=3
    for content in (dict(steps=4), dict(steps=4, format_version=1), dict(steps=4, format_version=2)):
        assert config_from_dict(New, content) == New(4)
    newer = re.escape('written by a newer version of this library (format 3, this one reads up to 2): update it')
    for section in ('', 'tokenizer'):
        with pytest.raises(ValueError, match=newer): config_from_dict(New, dict(step=4, format_version=3), section)
    with pytest.raises(ValueError, match='format 2, this one reads up to 1'):
        config_from_dict(Old, dict(format_version=2))
    with pytest.raises(ValueError, match='unknown settings step;'):
        config_from_dict(New, dict(step=4, format_version=2))
    with pytest.raises(ValueError, match='unknown settings step, wide;'): config_from_dict(New, dict(step=4, wide=1))
    for bad in ('2', None, True, 2.5):
        with pytest.raises(ValueError, match='format_version=.*whole number'):
            config_from_dict(New, dict(format_version=bad))
    for bad in (dict(steps=float('inf')), dict(steps=None), dict(note=None)):
        with pytest.raises(ValueError, match='needs to be'): config_from_dict(New, bad)

# the object

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_rows_of_any_float_type_are_kept_as_float32(dtype, tmp_path):
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    made, same = Vocabulary(list('abcde'), torch.nn.Parameter(rows)), Vocabulary(tuple('abcde'), rows.float())
    assert (made.embeddings.dtype == torch.float32 and not made.embeddings.requires_grad
            and made.checksum == same.checksum == table_checksum(rows.float()))
    made.save(tmp_path); assert Vocabulary.load(tmp_path).checksum == made.checksum
    assert len(made.neighbours('a', 2)) == 2 and made.code_scale > 0

def test_half_precision_codebooks_keep_their_checksum():
    import hashlib
    half = torch.arange(6.).view(2, 3).half()
    # what the shipped models hold
    assert table_checksum(half) == hashlib.sha256(half.numpy().tobytes()).hexdigest()[:16]
    assert table_checksum(half.bfloat16()) == table_checksum(
        half.float()) == table_checksum(half.float().T.contiguous().T)

@pytest.mark.parametrize('rows', [torch.zeros(2, 3), torch.zeros(3), torch.zeros(3, 3).long(), torch.zeros(3, 0),
                                  torch.full((3, 2), torch.nan), torch.full((3, 2), torch.inf), torch.zeros(3, 2, 1)])
def test_a_vocabulary_checks_what_it_is_made_of(rows):
    with pytest.raises(ValueError, match='embeddings'): Vocabulary(['a', 'b', 'c'], rows)
    with pytest.raises(ValueError, match='need floats, one embedding'): Vocabulary([], torch.zeros(0, 3))

def test_a_stored_vocabulary_whose_halves_differ(tmp_path):
    Vocabulary(['a', 'b'], torch.zeros(2, 3)).save(tmp_path); write_json(tmp_path/'vocabulary.json', {'tokens': ['a']})
    with pytest.raises(OSError, match='vocabulary.safetensors: 1 tokens for 2 embeddings'): Vocabulary.load(tmp_path)

# text is text

def unigram():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pieces = [('<unk>', 0.), ('<s>', 0.), ('</s>', 0.), ('<|im_end|>', 0.), ('▁', -2.), ('▁sign', -3.),
              *((c, -4.) for c in sorted(set(string.printable) - set(string.whitespace)))]
    t = Tokenizer(models.Unigram(pieces, unk_id=0))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
def word_piece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pieces = ['[UNK]', '[CLS]', '[SEP]', '<|im_end|>', 'sign', *sorted(set(string.printable) - set(string.whitespace)),
              *(f'##{c}' for c in string.ascii_letters + string.digits)]
    t = Tokenizer(models.WordPiece({p: i for i,p in enumerate(pieces)}, unk_token='[UNK]'))
    t.pre_tokenizer, t.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='[CLS]', eos_token='[SEP]', unk_token='[UNK]')
def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({p: i for i,
                                    p in enumerate(['<unk>', '</s>', '<|v3|>', 'a', 'sign', 'that', 'says', 'and'])},
                                    unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='</s>', unk_token='<unk>')
def whole_pieces():
    "As LLaMA-3 does it: a piece that is a token is taken without merging"
    t = train_text_tokenizer(texts, 300)
    content = json.loads(t.backend_tokenizer.to_str()); content['model']['ignore_merges'] = True
    return type(t)(tokenizer_object=type(t.backend_tokenizer).from_str(json.dumps(content)), bos_token='<s>',
                   eos_token='</s>', pad_token='<pad>')
def always_begins():
    "Puts `<s>` in front even where it is told not to"
    t = train_text_tokenizer(texts, 300)
    class Stubborn(type(t)):
        def __call__(self, text, **how):
            out = super().__call__(text, **how); out['input_ids'] = [[0] + r for r in out['input_ids']]; return out
    t.__class__ = Stubborn; return t
def padded_by_a_letter():
    t = train_text_tokenizer(texts, 300); t.pad_token = '!'; t.add_special_tokens({'pad_token': '!'}); return t
def slow():
    from transformers import ByT5Tokenizer
    return ByT5Tokenizer()
def slow_with_marks():
    "Its own model knows a mark: one that only breaking apart keeps out"
    from transformers import ByT5Tokenizer
    class Odd(ByT5Tokenizer):
        def _tokenize(self, text):
            return [x for part in re.split('(</s>)', text)
                    for x in ([part] if part == '</s>' else super(Odd, self)._tokenize(part))]
    return Odd()
def metaspace(): return byte_fallback_tokenizer()[0]

kinds = [train_text_tokenizer, metaspace, unigram, word_piece, word_level, whole_pieces, padded_by_a_letter, slow,
         slow_with_marks]
ordinary = ['a sign', ' a  sign ', '', 'a\nsign', 'a sign that says <b>no</b> & more!', 'Ünïcode ☂ 日本', '▁seven Ġseven',
            's', '[a] {b} <c> < d>', 'what?! 1+1=2 </a> <|no|>', 'a '*40]
spelled = ['</s>', '<s>', 'a sign that says </s> and <|v3|>', '<|v3|><|image_4x4|><|/image|>', '<|im_end|>', 'a<pad>b',
           '<unk> [UNK] [SEP]', '</s></s>', ' </s> ', '<<|v3|>>', '<|v3<|v3|>|>']

@pytest.mark.parametrize('kind', kinds, ids=lambda f: f.__name__)
def test_text_is_text(kind):
    """What spells a token is letters, what spells none has the ids it always had, and what a tokenizer can give back
    it still can"""
    t = kind(texts, 300) if kind is train_text_tokenizer else kind()
    t.add_tokens([f'<|v{i}|>' for i in range(5)])
    t.add_special_tokens({'additional_special_tokens': ['<|im_end|>', '<|image_4x4|>', '<|/image|>']},
                         replace_extra_special_tokens=False)
    plain = t(ordinary, add_special_tokens=False).input_ids
    assert text_ids(t, ordinary) == plain and [text_ids(t, [o])[0] for o in ordinary] == plain
    marks = {*control_tokens(t).values()}
    assert t.convert_tokens_to_ids('<|v3|>') in marks and t.eos_token_id in marks and t.unk_token_id in {*marks, None}
    lossless = all(t.decode(ids).strip() == o.strip() for ids,o in zip(plain[3:5], ordinary[3:5]))
    assert lossless == (kind in (train_text_tokenizer, metaspace, whole_pieces, padded_by_a_letter, slow,
                                 slow_with_marks))
    for s in spelled:
        ids = text_ids(t, [s])[0]
        assert not (marks - {t.unk_token_id}) & {*ids}, (s, t.convert_ids_to_tokens(ids))
        if lossless: assert t.decode(ids).strip() == s.strip()
    assert text_ids(t, spelled + ordinary) == [text_ids(t, [s])[0] for s in spelled
                                               + ordinary] and marks & {*t('a </s> <|v3|>',
                                                   add_special_tokens=False).input_ids}

def test_text_of_a_tokenizer_that_adds_something():
    t = always_begins(); assert t(['a'], add_special_tokens=False).input_ids[0][0] == 0
    assert text_ids(t, ['a seven', '</s>']) == text_ids(train_text_tokenizer(texts, 300), ['a seven', '</s>'])

def test_text_after_the_tokenizer_changed():
    t = train_text_tokenizer(texts, 300)
    assert text_ids(t, ['a <|x|> </s>']) and t.decode(text_ids(t, ['a <|x|>'])[0]) == ' a <|x|>'
    t.add_tokens(['<|x|>']); assert t.convert_tokens_to_ids('<|x|>') not in text_ids(t, ['a <|x|> </s>'])[0]
    # a word somebody taught the model
    t.add_tokens(['covid']); assert t.convert_tokens_to_ids('covid') in text_ids(t, ['a covid seven'])[0]
    assert t.convert_tokens_to_ids('covid') in text_ids(t, ['a covid </s>'])[0]
    t.add_special_tokens({'eos_token': 'Ġseven'}); assert t.eos_token_id not in text_ids(t, ['a seven'])[0]
    for bad in ('a seven', [1], [None], [b'a']):
        with pytest.raises(ValueError, match='need a list of text'): text_ids(t, bad)
    assert text_ids(t, []) == [] and t.decode(text_ids(t, ['a \ud800'])[0]) == ' a ?'

def test_words_seen_beside_marks():
    t = train_text_tokenizer(texts, 300)
    vocab = Vocabulary(t.convert_ids_to_tokens(range(3, len(t))), torch.randn(len(t) - 3, 4))
    assert vocab.seen_in(['a seven </s>'], t).tokens == [w for w in vocab.tokens if w in {'Ġa', 'Ġseven', 'Ġ', '<', '/',
        's', '>'}]
    assert vocab.seen_in((x for x in texts), t).tokens == vocab.seen_in({*texts}, t).tokens

# memory
def test_memory_stays_near_the_table(tmp_path, monkeypatch):
    """Of a table of 32,000 rows, in a file with other weights and beside another: what is read is counted, for a
    peak of memory hangs on the machine"""
    large_model(tmp_path)
    opened, read = [], []
    class Slice:
        def __init__(self, part): self.part = part
        def __getitem__(self, rows): found = self.part[rows]; read.append(len(found)); return found
        def __getattr__(self, name): return getattr(self.part, name)
    class File:
        def __init__(self, file): self.file = file
        def get_slice(self, name): return Slice(self.file.get_slice(name))
        def get_tensor(self, name): raise AssertionError(f'{name} was read as a whole')
        def __getattr__(self, name): return getattr(self.file, name)
    @contextmanager
    def counted(path):
        with open_tensors(path) as f: opened.append(path.name); yield File(f)
    monkeypatch.setattr('v2flow_nbdev.base.tables.open_tensors', counted)
    vocab = Vocabulary.from_pretrained(tmp_path)
    assert vocab.embeddings.shape == (V - 3, E) and set(opened) == {'one.safetensors'}
    # a block at a time, the file mapped anew for each
    assert max(read) == 1024 and sum(read) == V and len(opened) >= len(read)

# neighbours

def test_neighbours():
    rows = torch.tensor([[2., 0], [1, 0.1], [0, 1], [-1, 0], [-2, -1.1]]) + 5      # the mean is 5
    vocab = Vocabulary(['Ġseven', 'seven', 'Ġnine', '▁ten', 'zero'], rows)
    near = vocab.neighbours('seven', 2)
    assert [w for w,_ in near] == ['Ġseven',
                                   'Ġnine'] and near[
                                       0][1] == pytest.approx(
                                           1/1.01**0.5) and near[1][1] == pytest.approx(0.1/1.01**0.5)
    assert [w for w,_ in vocab.neighbours('Ġseven', 1)] == ['seven']  # as spelled comes before the mark of the blank
    assert vocab.neighbours('nine') == vocab.neighbours('Ġnine') and vocab.neighbours('ten') == vocab.neighbours('▁ten')
    assert len(vocab.neighbours('zero')) == 4 and len(vocab.neighbours('zero', 99)) == 4
    cosines = [c for _,c in vocab.neighbours('zero')]
    assert cosines == sorted(cosines, reverse=True) and all(-1 <= c <= 1 for c in cosines)
    with pytest.raises(ValueError, match="token='eight': not one of the 5 tokens"): vocab.neighbours('eight')
    with pytest.raises(ValueError, match='n=0: needs to be at least 1'): vocab.neighbours('zero', 0)
