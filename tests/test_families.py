("Any causal language model: tiny folders in the shapes of those that people use, through the whole way; and what is "
 "refused changes nothing")
import copy, json
from unittest.mock import patch
import pytest, torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from v2flow_nbdev.data.sources import digit_captions
from v2flow_nbdev.language.sequences import ImageTextSequences, check_packs, code_ids, image_to_text, image_tokens, text_to_image
from v2flow_nbdev.language.losses import TargetLoss
from v2flow_nbdev.language.visual_tokens import VisualTokens, add_visual_tokens
from v2flow_nbdev.language.text_models import (
    collate, first_id, last_id, named_ids, text_perplexity, text_sequences, train_text_tokenizer)
from v2flow_nbdev.language.generation import generate_captions, generate_image_ids, decode_caption
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.base.text import text_ids
from v2flow_nbdev.models.vocabulary import Vocabulary

texts = [c for d in range(10) for c in digit_captions(d)]
bpe = json.loads(train_text_tokenizer(texts, 300).backend_tokenizer.to_str())['model']
merged, merges = [w for w in bpe['vocab'] if w not in ('<s>', '</s>', '<pad>')], [tuple(m) for m in bpe['merges']]

# text tokenizers as the families have them

def byte_level(kind, special, **how):
    "GPT-2's alphabet, in a tokenizer class of `transformers`"
    return getattr(transformers, kind)(vocab={w: i for i,w in enumerate([*special, *merged])}, merges=merges, **how)
def fast(special, gap=0, ignore_merges=False, **how):
    "The same in a tokenizer.json that belongs to no class; the last ten ids come after a gap"
    words = [*merged, *special]
    t = Tokenizer(models.BPE({w: i + gap*(i >= len(words) - 10) for i,w in enumerate(words)}, merges,
                             ignore_merges=ignore_merges))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(tokenizer_object=t, **how)
def blanks(kind, special, **how):
    "`▁` for a blank and bytes for what is unknown, as LLaMA-2, Mistral, Phi-3 and Gemma"
    letters = sorted({c for t in texts for c in t.replace(' ', '▁')} | {'▁'})
    words = [*special, *(f'<0x{b:02X}>' for b in range(256)), *letters, '▁s', '▁se']
    return getattr(transformers, kind)(vocab={w: i for i,w in enumerate(words)}, merges=[('▁', 's'), ('▁s', 'e')],
                                       **how)
def unigram():
    "Ids are places in a list"
    t = Tokenizer(models.Unigram([('<unk>', 0.), ('<s>', 0.), ('</s>', 0.), ('▁', -2.),
                                  *((c, -4.) for c in sorted({c for t in texts for c in t} - {' '}))], unk_id=0))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
def slow():
    "In Python; with a gap in its ids"
    t = transformers.ByT5Tokenizer(extra_ids=0)
    t.added_tokens_decoder = {400: AddedToken('<|chat|>', special=True)}; t.add_tokens([])
    return t

ends = ['<s>', '</s>', '<pad>']
end = ['<|endoftext|>']
sp = ['<unk>', '<s>', '</s>']
wide = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=128)
opt = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
gpt = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)
families = {  # name: (config, its settings, text tokenizer, rows of the table beyond its ids)
    'llama': ('LlamaConfig', wide, lambda: blanks('LlamaTokenizer', sp), 0),
    'llama3': ('LlamaConfig', wide, lambda: fast(['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'],
                                                 ignore_merges=True, bos_token='<|begin_of_text|>',
                                                 eos_token='<|end_of_text|>'), 5),
    'smollm2': ('LlamaConfig', {**wide, 'tie_word_embeddings': True}, lambda: fast(['<|im_start|>', '<|im_end|>'],
        bos_token='<|im_start|>', eos_token='<|im_end|>', unk_token='<|im_start|>', pad_token='<|im_end|>'), 0),
    'qwen2': ('Qwen2Config', wide, lambda: byte_level('Qwen2Tokenizer', end), 91),
    'qwen3': ('Qwen3Config', {**wide, 'head_dim': 16, 'tie_word_embeddings': True}, lambda: byte_level('Qwen2Tokenizer',
        end), 91),
    'mistral': ('MistralConfig', {**wide, 'sliding_window': None}, lambda: blanks('LlamaTokenizer', sp), 0),
    'phi3': ('Phi3Config', {**wide, 'pad_token_id': 2}, lambda: blanks('LlamaTokenizer', sp), 3),
    'phi2': ('PhiConfig', wide, lambda: byte_level('GPT2Tokenizer', end), 40),  # its head has a bias
    'gpt2': ('GPT2Config', gpt, lambda: byte_level('GPT2Tokenizer', end), 1),
    'neox': ('GPTNeoXConfig', {k: v for k,v in wide.items() if k != 'num_key_value_heads'},
             lambda: byte_level('GPTNeoXTokenizer', end), 20),
    'opt': ('OPTConfig', opt, lambda: byte_level('GPT2Tokenizer', ends, bos_token='</s>', eos_token='</s>',
                                                 unk_token='</s>', pad_token='<pad>'), 0),
    'opt350': ('OPTConfig', {**opt, 'word_embed_proj_dim': 16, 'do_layer_norm_before': False},
               lambda: byte_level('GPT2Tokenizer', ends, bos_token='</s>', eos_token='</s>', unk_token='</s>',
                                  pad_token='<pad>'), 0),
    'gemma': ('GemmaConfig', {**wide, 'head_dim': 16},
              lambda: blanks('GemmaTokenizer', ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']), 0),
    'gemma3': ('Gemma3TextConfig', {**wide, 'head_dim': 16, 'sliding_window': 64},
               lambda: blanks('GemmaTokenizer', ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']), 6),
    'gaps': ('LlamaConfig', wide, lambda: fast(ends, gap=40, bos_token='<s>', eos_token='</s>', pad_token='<pad>'), 0),
    'gaps, padded': ('LlamaConfig', wide, lambda: fast(ends, gap=40, bos_token='<s>', eos_token='</s>',
                                                       pad_token='<pad>'), 200),
    'no bos': ('LlamaConfig', wide, lambda: fast(end, eos_token=end[0]), 0),
    'no eos': ('LlamaConfig', wide, lambda: fast(end, bos_token=end[0]), 0),
    'unigram': ('LlamaConfig', wide, unigram, 0),
    'slow': ('LlamaConfig', wide, slow, 0),
}
sharded, halves = {'llama3', 'qwen3', 'gpt2'}, {'mistral': torch.bfloat16, 'neox': torch.float16}

def made(name):
    "A model, its text tokenizer and an image tokenizer over its vocabulary, by way of a folder"
    kind, settings, tokenizer, beyond = families[name]
    tokenizer = tokenizer(); top = max(tokenizer.get_vocab().values())
    torch.manual_seed(0)
    named = {k: v for k,v in dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                  pad_token_id=tokenizer.pad_token_id).items() if k not in settings}
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(vocab_size=top + 1 + beyond, **named,
        **settings)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    return model, tokenizer
def image_tokenizer(vocabulary):
    tok = V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1, velocity_width=32, velocity_depth=1),
                 vocabulary).eval()
    tok.quantizer.initialised.fill_(True); return tok
def generators(n): return [torch.Generator().manual_seed(i) for i in range(n)]
def everything(model, tokenizer):
    "What a refusal must leave as it was"
    return ({n: (t.dtype, t.detach().contiguous().view(torch.uint8).clone()) for n,t in model.state_dict().items()},
            model.config.to_dict(), model.generation_config and model.generation_config.to_dict(),
            tokenizer.get_vocab(),
            {i: str(t) for i,t in tokenizer.added_tokens_decoder.items()}, tokenizer.all_special_tokens,
            tokenizer('the digit </s> 3 <|v3|>').input_ids,
            [id(model.get_input_embeddings()), id(model.get_output_embeddings())])
def same(a, b):
    assert a[0].keys() == b[0].keys() and all(x[0] == y[0] and torch.equal(x[1], y[1]) for x,
                                              y in zip(a[0].values(), b[0].values()))
    assert a[1:] == b[1:]

@pytest.mark.parametrize('name', families)
def test_the_whole_way(name, tmp_path):
    model, tokenizer = made(name)
    model = model.to(halves.get(name, torch.float32))
    model.save_pretrained(tmp_path/'a', **(dict(max_shard_size='20KB') if name in sharded else {}))
    tokenizer.save_pretrained(tmp_path/'a')
    assert (name in sharded) == (tmp_path/'a/model.safetensors.index.json').exists()
    vocabulary = Vocabulary.from_pretrained(tmp_path/'a')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path/'a',
                                                            dtype=torch.float32).eval(
                                                                ), AutoTokenizer.from_pretrained(tmp_path/'a')
    table, old = model.get_input_embeddings().weight.detach().clone(), tokenizer.get_vocab()
    assert torch.equal(vocabulary.embeddings, table[tokenizer.convert_tokens_to_ids(vocabulary.tokens)])
    tied, text = model.get_input_embeddings().weight is model.get_output_embeddings().weight, text_ids(tokenizer,
        texts[:40])
    batch = {k: v for k,v in collate(text_sequences(tokenizer, texts[:3])).items() if k != 'labels'}
    with torch.no_grad(): before = model(**batch).logits
    visual = add_visual_tokens(model, tokenizer, tok := image_tokenizer(vocabulary), grids=[(4, 4), (2, 3)])
    visual.check(tokenizer)                                                                       # every one of the ids
    new = tokenizer.get_vocab()
    assert {w: i for w,i in new.items() if w in old} == old and not {i for w,i in new.items()
        if w not in old} & {*old.values()} and text_ids(tokenizer, texts[:40]) == text
    with torch.no_grad(): after = model(**batch).logits
    ids = [*old.values()]
    assert (after[..., ids] - before[..., ids]).abs().max() < 1e-5
    now = model.get_input_embeddings().weight.detach()
    assert torch.equal(now[:len(table)][ids], table[ids]) and torch.allclose(now[visual.first:visual.first + 16],
        tok.codes_as_embeddings(), atol=1e-6) and len(now) == max(len(table), visual.end + 1)
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    asked = [*texts[:2], 'a sign that says </s> <|v3|><|/image|>']
    made_ids = generate_image_ids(model, tokenizer, asked, guidance_scale=3., temperature=2., generator=generators(3))
    assert made_ids.shape == (3, 16) and 0 <= made_ids.min() and made_ids.max() < 16
    said = generate_captions(model, tokenizer, made_ids.to(torch.uint8), max_new_tokens=5)
    assert len(said) == 3 and text_perplexity(model, tokenizer, texts[:3]) > 1
    rows = ImageTextSequences([dict(ids=made_ids[0].view(4, 4).to(torch.int16), captions=[asked[2]])], tokenizer, visual,
                              write_share=0.)
    prompt, target = rows[0]
    assert prompt[0] == first_id(tokenizer) and target[-1] == last_id(tokenizer) and not {*visual.new,
        last_id(tokenizer), first_id(tokenizer)} & {*target[:-1]}
    model.save_pretrained(tmp_path/'b'); tokenizer.save_pretrained(tmp_path/'b')
    again, reader = AutoModelForCausalLM.from_pretrained(
        tmp_path/'b').eval(), AutoTokenizer.from_pretrained(tmp_path/'b')
    assert VisualTokens.of(again) == visual and reader.get_vocab(
        ) == new and again.generation_config.suppress_tokens == list(visual.new)
    visual.check(reader)
    assert torch.equal(generate_image_ids(again, reader, asked, guidance_scale=3., temperature=2.,
                                          generator=generators(3)), made_ids) and generate_captions(again, reader,
                                              made_ids, max_new_tokens=5) == said
    # visual tokens are no part of the vocabulary of the next one
    assert set(vocabulary.tokens) == set(Vocabulary.from_pretrained(tmp_path/'b').tokens)

def plain(name='llama'):
    model, tokenizer = made(name)
    ids = sorted(set(tokenizer.get_vocab().values()) - {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids})
    return model, tokenizer, image_tokenizer(Vocabulary(tokenizer.convert_ids_to_tokens(ids),
                                                        model.get_input_embeddings().weight.detach()[ids]))

def no_first_token(m, t, v): t.bos_token = t.eos_token = None
def named_before(m, t, v): t.add_tokens(['<|v3|>']); m.resize_token_embeddings(len(t), mean_resizing=False)
def another_tables(m, t, v): t.add_tokens([f'x{i}' for i in range(99)])
def quantized(m, t, v):
    m.get_input_embeddings().weight = torch.nn.Parameter(m.get_input_embeddings().weight.to(torch.int8),
                                                         requires_grad=False)
def quantized_head(m, t, v):
    m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.to(torch.uint8), requires_grad=False)
def eight_bits(m, t, v):
    m.get_input_embeddings().weight.data = m.get_input_embeddings().weight.data.to(torch.float8_e4m3fn)
def another_head(m, t, v): m.lm_head = torch.nn.Linear(16, len(m.lm_head.weight), bias=False)
def not_finite(m, t, v): m.lm_head.weight.data[7, 3] = torch.nan
def damaged_table(m, t, v): m.model.embed_tokens.weight.data[0, 3] = torch.inf
def no_vocabulary(m, t, v): v.vocabulary = None
refused = {no_first_token: ('neither a begin-of-text nor an end-of-text token', {}),
           named_before: ('has visual tokens already .*v3', {}), another_tables: ('they do not belong together', {}),
           quantized: ('input embeddings are torch.int8', {}), quantized_head: ('output embeddings are torch.uint8',
               {}), eight_bits: ('float8_e4m3fn', {}), another_head: ('the same for both', {}),
               not_finite: ('not finite', {}),
           damaged_table: ('not finite', {}), no_vocabulary: ('without its vocabulary', {}),
           'start': ("start='warm'", dict(start='warm')), 'head_start': ("start='warm'", dict(head_start='warm')),
           'twice': ('each once', dict(grids=[(2, 2), (2, 2)])), 'odd': ('at least one grid', dict(grids=[(2, 2.5)])),
           'long': ('too long', dict(grids=[(40, 40)]))}

@pytest.mark.parametrize('how', refused, ids=lambda h: getattr(h, '__name__', h))
def test_a_refusal_changes_nothing(how):
    model, tokenizer, tok = plain(); contains, settings = refused[how]
    if callable(how): how(model, tokenizer, tok)
    if how is another_tables: assert max(tokenizer.get_vocab().values()) >= len(model.get_input_embeddings().weight)
    before = everything(model, tokenizer)
    with pytest.raises(ValueError, match=contains): add_visual_tokens(model, tokenizer, tok, **settings)
    same(before, everything(model, tokenizer))

def other_kinds():
    small = dict(vocab_size=300, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    yield transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    yield transformers.GPT2Model(transformers.GPT2Config(vocab_size=300, **gpt, bos_token_id=0, eos_token_id=0))
    yield transformers.LlamaForSequenceClassification(transformers.LlamaConfig(vocab_size=300, **wide, pad_token_id=0))

@pytest.mark.parametrize('i', range(3))
def test_models_that_write_no_text_are_refused(i):
    _, tokenizer, tok = plain(); model = list(other_kinds())[i]
    before = {n: t.clone() for n,t in model.state_dict().items()}, model.config.to_dict(), tokenizer.get_vocab()
    with pytest.raises(ValueError, match='need a causal language model'): add_visual_tokens(model, tokenizer, tok)
    assert all(torch.equal(t, before[0][n]) for n,t in model.state_dict().items()) and (model.config.to_dict(),
        tokenizer.get_vocab()) == before[1:]

@pytest.mark.parametrize('name', ['llama', 'qwen3', 'qwen2', 'phi2', 'opt350'])
@pytest.mark.parametrize('where', ['_get_resized_embeddings', '_get_resized_lm_head', 'tie_weights',
                                   'set_output_embeddings', 'check', 'entry', 'interrupt'])
def test_a_failure_on_the_way_changes_nothing(name, where):
    "Whatever breaks while the tables grow, or after"
    model, tokenizer, tok = plain(name)
    before, batch = everything(model, tokenizer), {k: v for k,
                                                   v in collate(text_sequences(tokenizer, texts[:2])).items()}
    with torch.no_grad(): loss = model(**batch).loss
    def fail(*args, **kw): raise (KeyboardInterrupt if where == 'interrupt' else RuntimeError)('broken')
    target = VisualTokens if where in ('check', 'entry') else model
    if where in ('_get_resized_embeddings', 'interrupt') and name == 'qwen2': return  # its padded table does not grow
    with patch.object(target, 'tie_weights' if where == 'interrupt' else where, fail), pytest.raises(KeyboardInterrupt
        if where == 'interrupt' else ValueError, match='broken'):
        add_visual_tokens(model, tokenizer, tok)
    same(before, everything(model, tokenizer))
    with torch.no_grad(): assert torch.equal(model(**batch).loss, loss)
    visual = add_visual_tokens(model, tokenizer, tok); visual.check(tokenizer)  # and it can be done after all
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (name in ('qwen3',
        'opt350'))

@pytest.mark.parametrize('wrong', ['raises', 'moves'])
def test_a_text_tokenizer_that_takes_no_tokens_is_refused(wrong):
    "Whatever it does: ids are looked at before anything is changed"
    model, tokenizer, tok = plain(); before, kind = everything(model, tokenizer), type(tokenizer)
    class Odd(kind):
        def add_tokens(self, new, special_tokens=False):
            if wrong == 'raises': raise NotImplementedError('no room')
            return super().add_tokens(new, special_tokens)
        def get_vocab(self):
            return {w: i + (wrong == 'moves' and w == '<|v3|>') for w,i in super().get_vocab().items()} 
    tokenizer.__class__ = Odd
    with pytest.raises(ValueError, match='18 tokens with ids in one row'): add_visual_tokens(model, tokenizer, tok)
    tokenizer.__class__ = kind; same(before, everything(model, tokenizer))

@pytest.mark.parametrize('name', ['llama', 'unigram', 'slow', 'gaps'])
def test_rows_that_the_config_speaks_of_are_not_taken(name):
    "A table with rows for which the text tokenizer has no token, one of them the model's end of text"
    model, tokenizer, tok = plain(name); top = max(tokenizer.get_vocab().values())
    model.resize_token_embeddings(top + 50, mean_resizing=False)
    model.generation_config.eos_token_id, model.generation_config.suppress_tokens = [tokenizer.eos_token_id,
        top + 9], [top + 3]
    used = model.get_input_embeddings().weight.detach()[top + 9].clone()
    assert top + 9 in named_ids(model)
    visual = add_visual_tokens(model, tokenizer, tok); visual.check(tokenizer)
    assert visual.first == (260 if name == 'slow' else top
                           + 10) and torch.equal(model.get_input_embeddings().weight.detach()[top + 9],
                                                 used) and {top + 3,
                                                            *visual.new} == {*model.generation_config.suppress_tokens}
    assert copy.deepcopy(tokenizer).get_vocab() == tokenizer.get_vocab(
        ) and len(model.get_input_embeddings().weight) == top + 50

def test_ends_of_text():
    t = fast(ends, bos_token='<s>', eos_token='</s>', pad_token='<pad>')
    s, e = t.convert_tokens_to_ids(['<s>', '</s>'])
    assert (first_id(t), last_id(t)) == (s, e)
    t.bos_token = None; assert (first_id(t), last_id(t)) == (e, e)
    t.bos_token, t.eos_token = '<s>', None
    assert (first_id(t), last_id(t)) == (s, s) and text_sequences(t, ['a'])[0][1][-1] == s
    t.bos_token = '<nowhere>'
    for f in (first_id, last_id):
        with pytest.raises(ValueError, match='neither a begin-of-text nor an end-of-text'): f(t)
    t.add_special_tokens({'unk_token': '<pad>'}); t.eos_token = '<never added>'  # what is unknown is no end
    with pytest.raises(ValueError, match='neither'): last_id(t)

def test_what_was_written_is_read_up_to_its_end():
    "A model without a padding token is padded by id 0, which is a letter; text that spells a mark is text"
    t = byte_level('GPT2Tokenizer', end); e = t.eos_token_id; bang = t.convert_tokens_to_ids('!')
    assert decode_caption(t, [[*text_ids(t, ['a six!'])[0], e, bang, bang], [bang, bang], [e, bang]]) == ['a six!',
        '!!', '']
    t.add_special_tokens({'pad_token': '!'}); said = 'no <|endoftext|> here!'
    assert decode_caption(t, [[*text_ids(t, [said])[0], e, bang]]) == [said]
    model, tokenizer, tok = plain('no bos'); visual = add_visual_tokens(model, tokenizer, tok)
    said = torch.tensor([[*text_ids(tokenizer, ['a six'])[0], *[last_id(tokenizer)]*2, 0]])
    there, zeros = 'v2flow_nbdev.language.generation.', torch.zeros(1, 16).int()
    with patch(there + 'generate_tokens', lambda model, tokenizer, batch, *a, **k: torch.cat((batch['input_ids'], said), 1)):
        assert generate_captions(model, tokenizer, zeros, static_cache=False) == ['a six']
    with patch(there + 'decode_text', lambda *a, **k: said): assert generate_captions(model, tokenizer, zeros) == ['a six']

def test_captions_and_ids_are_checked():
    model, tokenizer, tok = plain(); visual = add_visual_tokens(model, tokenizer, tok)
    for captions, how, why in (([], {}, 'at least one text'), ('a six', {}, 'at least one text'),
                               ([3], {}, 'need a list of text'), (['a', None], {}, 'need a list of text'),
                               (['a', 'b'], dict(generator=generators(3)), '3 generators for 2'),
                               (['a'], dict(generator=[]), '0 generators for 1')):
        with pytest.raises(ValueError, match=why): generate_image_ids(model, tokenizer, captions, **how)
    ids = torch.randint(16, (2, 16))
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        assert generate_captions(model, tokenizer, ids.to(kind), max_new_tokens=3) == generate_captions(model,
            tokenizer, ids, max_new_tokens=3)
    # 8 bits do not run over
    large = VisualTokens(300, 250, (550,), 551, ((4, 4),), 'x')
    assert image_tokens(large, torch.full((4, 4), 249, dtype=torch.uint8))[1:-1] == [549]*16
    for bad in (ids.float(), ids.bool(), ids + 16, ids - 17):
        with pytest.raises(ValueError, match='must be integers|the codebook has 0 to 15'):
            generate_captions(model, tokenizer, bad)
        with pytest.raises(ValueError, match='must be integers|the codebook has 0 to 15'):
            image_tokens(visual, bad[0].view(4, 4))
        with pytest.raises(ValueError, match='must be integers|the codebook has 0 to 15'):
            ImageTextSequences([dict(ids=bad[0].view(4, 4), captions=['a'])], tokenizer, visual)[0]
    with pytest.raises(ValueError, match='no ids'): generate_captions(model, tokenizer, ids[:0])
    for shape in ((16,), (2, 2, 4)):
        with pytest.raises(ValueError, match='visual tokens'): image_tokens(visual, torch.zeros(shape).int())
    assert code_ids(ids.numpy().astype('uint16'),
                    16).equal(ids) and len(ImageTextSequences([dict(ids=ids[0].view(4, 4).byte(), captions=['a'])]*3,
                                                              tokenizer, visual, write_noise=.5, write_share=1.)[0]) == 3

def test_damaged_and_newer_entries_of_the_config_are_one_line():
    model, tokenizer, tok = plain(); visual = add_visual_tokens(model, tokenizer, tok); entry = model.config.v2flow
    assert entry['version'] == 1 and json.loads(json.dumps(entry)) and VisualTokens.of(model) == visual
    for change, why in ((dict(version=2, new=3),
                         r'written by a newer version of this library \(format 2, this one reads up to 1\): update it'),
                         (dict(new=3), 'damaged'), (dict(first='300'), 'damaged'), (dict(first=-1), 'damaged'),
                         (dict(codebook_size=0), 'damaged'),
                        (dict(begins=[]), 'damaged'), (dict(begins=None), 'damaged'), (dict(begins=3), 'damaged'),
                        (dict(grids=[[4, 4], [2, 2]]), 'damaged'), (dict(grids=[[4]]), 'damaged'),
                        (dict(grids=[4]), 'damaged'), (dict(end=5), 'damaged'), (dict(end=None), 'damaged'),
                        (dict(codebook=None), 'damaged'), (dict(first=2**20, begins=[2**21], end=2**22),
                                                           'damaged.*rows')):
        model.config.v2flow = {**entry, **change}
        with pytest.raises(ValueError, match=why) as e: VisualTokens.of(model)
        assert '\n' not in str(e.value)
    for broken in ('yes', [1], {'first': 3}):
        model.config.v2flow = broken
        with pytest.raises(ValueError, match='damaged'): VisualTokens.of(model)
    model.config.v2flow = {k: v for k,v in entry.items() if k != 'version'}; assert VisualTokens.of(model) == visual
    with pytest.raises(ValueError, match="another model's"): visual.check(plain()[1])

@pytest.mark.parametrize('name', ['opt350', 'gemma', 'gemma2', 'gpt2', 'neox', 'phi2'])
def test_the_loss_on_targets_is_the_models_own_or_refused(name):
    "Narrow tables, scaled embeddings, biased and tied heads; a head whose scores are capped is refused in words"
    families['gemma2'] = ('Gemma2Config', {**wide, 'head_dim': 16}, families['gemma'][2], 0)
    model, tokenizer, tok = plain(name); visual = add_visual_tokens(model, tokenizer, tok)
    if name == 'gemma2':
        with pytest.raises(ValueError, match='leave text_weight and visual_softmax out'): TargetLoss(model)
        return
    batch = collate([image_to_text(visual, first_id(tokenizer), torch.randint(16, (4, 4)),
                                   text_ids(tokenizer, texts[:1])[0]), text_to_image(visual, first_id(tokenizer), [],
                                       torch.randint(16, (4, 4)))])
    with torch.no_grad():
        torch.testing.assert_close(TargetLoss(model, visual_softmax=False)(**batch).loss, model(**batch).loss)
    TargetLoss(model)(**batch).loss.backward()
    # OPT counts positions in its own way, and is found out
    if name != 'opt350': check_packs(model.requires_grad_(False)); return
    with pytest.raises(ValueError, match='does not keep packed rows apart'): check_packs(model)
