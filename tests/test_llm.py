"The language-model half with the families that people use, and through the real commands"
import copy, json
import pytest, torch
from conftest import shipped, v2flow
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from v2flow_nbdev.data.sources import digit_captions
from v2flow_nbdev.language.visual_tokens import VisualTokens, add_visual_tokens
from v2flow_nbdev.language.sequences import check_packs, pack, text_to_image
from v2flow_nbdev.base.files import read_json, write_json
from v2flow_nbdev.language.adapters import choose_trained, merge, with_adapter
from v2flow_nbdev.language.text_models import collate, train_text_tokenizer
from v2flow_nbdev.language.generation import generate_captions, generate_image_ids
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.vocabulary import Vocabulary

texts = [c for d in range(10) for c in digit_captions(d)]
families = dict(llama=(LlamaConfig, {}), tied_llama=(LlamaConfig, dict(tie_word_embeddings=True)),
                qwen2=(Qwen2Config, dict(tie_word_embeddings=True)), qwen3=(Qwen3Config, dict(head_dim=16)),
                mistral=(MistralConfig, dict(sliding_window=None)), phi3=(Phi3Config, dict(pad_token_id=2)),
                gpt2=(GPT2Config, {}))

def made(name, padding=7):
    "A small model of the family, with a larger table than its tokenizer has tokens, and an image tokenizer over its vocabulary"
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(texts, 300)
    kind, more = families[name]
    shape = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64) if name == 'gpt2' else dict(hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer) + padding, bos_token_id=0, eos_token_id=1,
                                                  **shape, **more)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.05) if p.dim() > 1 else None
    tok = V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1),
                 Vocabulary(tokenizer.convert_ids_to_tokens(range(3, len(tokenizer))),
                            model.get_input_embeddings().weight.detach()[3:len(tokenizer)].clone()))
    return model, tokenizer, tok

@pytest.mark.parametrize('name', families)
def test_a_family_gets_visual_tokens(name, tmp_path):
    """Text is read as before to the bit, tied tables stay tied, images are generated of visual tokens alone, packed sequences
    are alone, and a plain folder says it all"""
    model, tokenizer, tok = made(name)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    batch = tokenizer(texts[:3], return_tensors='pt', padding=True, padding_side='right')
    with torch.no_grad(): before = model(**batch, output_hidden_states=True)
    size = len(model.get_input_embeddings().weight)
    visual = add_visual_tokens(model, tokenizer, tok, grids=[(4, 4), (2, 3)])
    with torch.no_grad(): after = model(**batch, output_hidden_states=True)
    assert all(torch.equal(a, b) for a,b in zip(before.hidden_states, after.hidden_states))
    assert (after.logits[..., :visual.first] - before.logits[..., :visual.first]).abs().max() < 1e-5
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings(
        ).weight) and len(model.get_input_embeddings().weight) == max(size, len(tokenizer))
    g = lambda n: [torch.Generator().manual_seed(i) for i in range(n)]
    ids = generate_image_ids(model, tokenizer, texts[:3], guidance_scale=3., temperature=2., generator=g(3))
    assert ids.shape == (3, 16) and 0 <= ids.min() and ids.max() < 16 and torch.equal(generate_image_ids(model,
        tokenizer, texts[:1], guidance_scale=3., temperature=2., generator=g(1)), ids[:1])
    assert len(generate_captions(model, tokenizer, ids, max_new_tokens=4)) == 3
    examples = [text_to_image(visual, 0, tokenizer(t).input_ids, torch.randint(16, grid)) for t in texts[:4]
            for grid in visual.grids]
    with torch.no_grad(): assert abs(model(**pack(examples, 64)).loss - model(**collate(examples)).loss) < 1e-5
    model.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    # AutoTokenizer makes any folder of a Qwen2 a Qwen2 tokenizer, which this is not
    load = type(tokenizer) if name == 'qwen2' else AutoTokenizer
    again, text = AutoModelForCausalLM.from_pretrained(tmp_path), load.from_pretrained(tmp_path)
    assert VisualTokens.of(again) == visual and torch.equal(generate_image_ids(again, text, texts[:3], guidance_scale=3.,
        temperature=2., generator=g(3)), ids)

@pytest.mark.parametrize('name', ['llama', 'tied_llama', 'gpt2'])
def test_adapters_train_merge_and_are_kept(name, tmp_path):
    """New rows alone, and with LoRA: what may learn does, nothing else moves; merged it is the same function in an
    ordinary model; the adapter can be loaded by peft"""
    from peft import PeftModel
    model, tokenizer, tok = made(name)
    visual = add_visual_tokens(model, tokenizer, tok)
    batch = collate([text_to_image(visual, 0, tokenizer(t).input_ids, torch.randint(16, (4, 4))) for t in texts[:4]])
    for how in ('new', 'lora'):
        begun = copy.deepcopy(model); student = choose_trained(copy.deepcopy(model), how, rank=2)
        learning = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, 0.1)
        for _ in range(3): student(**batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
        whole = merge(student)
        with torch.no_grad():
            torch.testing.assert_close(whole(**batch).logits, student(**batch).logits, atol=1e-4, rtol=1e-3)
        for a, b in ((m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (whole,)):
            old, new = slice(0, visual.first), slice(visual.first, visual.end + 1)
            assert torch.equal(a[old], begun.get_input_embeddings().weight[old]) and not torch.equal(a[new],
                begun.get_input_embeddings().weight[new])
            assert torch.equal(b[old], begun.get_output_embeddings().weight[old]) and not torch.equal(b[new],
                begun.get_output_embeddings().weight[new])
            assert (name != 'llama') == torch.equal(a, b)
        moved = [n for n,p in whole.named_parameters() if not torch.equal(p, dict(begun.named_parameters())[n])]
        assert (len(moved) > 2) == (how == 'lora'), moved
        student.save_pretrained(tmp_path/how)
        with torch.no_grad():
            torch.testing.assert_close(PeftModel.from_pretrained(begun, tmp_path/how)(**batch).logits,
                                       student(**batch).logits, atol=1e-5, rtol=1e-4)
        added = with_adapter(copy.deepcopy(model), tmp_path/how)                   # without peft: the same numbers
        for n, p in added.named_parameters(): torch.testing.assert_close(p, whole.get_parameter(n), atol=1e-6, rtol=1e-6)
    config = read_json(tmp_path/'lora/adapter_config.json')
    write_json(tmp_path/'lora/adapter_config.json', config | dict(use_rslora=True))  # no plain one: alpha/√rank
    with_peft = with_adapter(copy.deepcopy(model), tmp_path/'lora')
    layer = next(n for n in moved if 'attn' in n)
    by = [m.get_parameter(layer) - model.get_parameter(layer) for m in (with_peft, whole)]
    torch.testing.assert_close(by[0], by[1]*2**0.5, atol=1e-5, rtol=1e-3)

def test_rows_beyond_the_words_are_taken_for_new_ones():
    "A padded table is not made longer than it has to be"
    model, tokenizer, tok = made('llama', padding=40)
    size = len(model.get_input_embeddings().weight)
    visual = add_visual_tokens(model, tokenizer, tok)
    assert len(model.get_input_embeddings().weight) == size and visual.end < size

def test_the_command_teaches_two_grids_with_adapters_and_packing(tmp_path):
    """train-llm with LoRA by Muon: an ordinary folder comes out that needs no peft, the adapter lies beside it, text
    is measured, and both sizes can be asked for"""
    from test_bad_input import own_llm
    own_llm(tmp_path/'text')
    done = v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/'run',
                 f'image_tokenizer={shipped}/image_tokenizer', f'llm.pretrained={tmp_path}/text', 'data.copies=0',
                 'llm.train=lora', 'llm.rank=2',
                 'llm.grids=[[4,4],[2,2]]', 'llm.pack=64', 'llm.text_share=0.2', 'llm.text_weight=4', 'llm.rare=label',
                 'training.optimizer=muon', 'training.steps=2', 'training.batch_size=16', 'training.evaluate_every=0',
                 'training.trackers=[]')
    assert done.returncode == 0 and 'perplexity of plain text before' in done.stderr, done.stderr[-2000:]
    line = json.loads((tmp_path/'run/log.jsonl').read_text().splitlines()[-1])
    assert line['text_perplexity'] > 1 < line['text_perplexity_before'] and sorted(p.name
        for p in (tmp_path/'run/ids').iterdir()) == ['4x4', '8x8']
    llm = AutoModelForCausalLM.from_pretrained(tmp_path/'run/model/llm')
    assert VisualTokens.of(llm).grids == ((4, 4), (2, 2)) and not any('lora' in n
        for n in llm.state_dict()) and (tmp_path/'run/adapter/adapter_model.safetensors').exists()
    from PIL import Image
    for size in (8, 4):
        done = v2flow('generate', 'a six', '--model', tmp_path/'run/model', '--size', size, size, '--out',
                     tmp_path/'x.png')
        assert done.returncode == 0 and Image.open(tmp_path/'x.png').size == (size, size), done.stderr

def test_a_family_that_cannot_be_packed_is_found_out():
    from transformers import BloomConfig, BloomForCausalLM
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    with pytest.raises(ValueError, match='does not keep packed rows apart'): check_packs(model)
    assert check_packs(made('qwen3')[0]) is None

def test_marks_of_a_chat_survive():
    "Special tokens that the tokenizer had stay special, and text is cut as before"
    model, tokenizer, tok = made('llama')
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>']})
    before = tokenizer('<|im_start|>the digit 3').input_ids
    add_visual_tokens(model, tokenizer, tok)
    assert '<|im_start|>' in tokenizer.all_special_tokens and tokenizer('<|im_start|>the digit 3').input_ids == before

def test_the_pipeline_generates_by_the_loop_and_as_generate_does():
    "What a user calls is what was made fast; a setting of `generate` goes through it, and gives the same image and caption"
    from unittest.mock import patch
    import v2flow_nbdev.language.generation as generation
    from v2flow_nbdev.language.pipeline import V2FlowPipeline
    pipe = V2FlowPipeline.from_pretrained(shipped)
    def made(**kw): return pipe('a handwritten seven', generator=torch.Generator().manual_seed(0), **kw)
    with patch.object(generation, 'generate_tokens', side_effect=AssertionError('not by the loop')):
        image = made(); text = pipe.caption(image.images[0])
    with patch.object(generation, 'decode_ids', side_effect=AssertionError), patch.object(generation, 'decode_text',
                                                                                         side_effect=AssertionError):
        assert made(static_cache=True).ids.equal(image.ids)
        assert pipe.caption(image.images[0], static_cache=True) == text

def test_the_loop_samples_what_generate_samples_up_to_a_near_tie(monkeypatch):
    """The same noise: the first place at which ids differ, if any, is one where the two best noised scores lie within
    1e-4"""
    import v2flow_nbdev.language.generation as generation
    from v2flow_nbdev.language.pipeline import V2FlowPipeline
    from v2flow_nbdev.models.resampler import gumbel
    pipe, gaps, real = V2FlowPipeline.from_pretrained(shipped), [], generation.sample_codes
    def watched(logits, temperature, top_k, top_p, generator):
        same = torch.Generator().set_state(generator.get_state())
        best = (logits/temperature + gumbel(logits.shape, same, logits.device)).topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        return real(logits, temperature, top_k, top_p, generator)
    captions = texts[::8]
    def ids(**how):
        return generate_image_ids(pipe.llm, pipe.tokenizer, captions, 1.5, min_p=0.02, generator=torch.Generator().manual_seed(0),
                                  **how)
    with monkeypatch.context() as patch:
        patch.setattr(generation, 'sample_codes', watched)
        ours = ids()
    gaps, differ = torch.stack(gaps, 1), ours != ids(static_cache=False)              # (B, N)
    assert gaps.shape == ours.shape and gaps.min() > 0 and gaps.median() > 0.01       # noise was really drawn
    for row in differ.any(1).nonzero().flatten(): assert gaps[row, differ[row].int().argmax()] < 1e-4

def test_int8_is_for_the_loop_alone():
    "Images and captions come out, near those of float32; a model that the loop cannot run says so, with what to do"
    from v2flow_nbdev.language.pipeline import V2FlowPipeline
    pipe, rounded = (V2FlowPipeline.from_pretrained(shipped, dtype=d) for d in (torch.float32, torch.int8))
    def image(pipe):
        return pipe(['a handwritten seven', 'the digit 3'], temperature=0., generator=torch.Generator().manual_seed(0))
    a, b = image(pipe), image(rounded)
    assert (a.ids == b.ids).float().mean() > 0.5 and rounded.dtype == torch.float32
    assert pipe.caption(a.images) == rounded.caption(a.images)
    from unittest.mock import patch
    import v2flow_nbdev.language.decoding as decoding
    with patch.object(decoding.torch, '_weight_int8pack_mm', side_effect=AssertionError('int8')):
        with pytest.raises(AssertionError, match='int8'): image(rounded)               # what was asked for is what runs
        image(pipe)
    model, tokenizer, tok = made('gpt2'); add_visual_tokens(model, tokenizer, tok)
    with pytest.raises(ValueError, match='gpt2 is not one of .*: use `model.generate`'):
        generate_image_ids(model, tokenizer, ['a seven'], int8=True)
