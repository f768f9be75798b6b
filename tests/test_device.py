"Where a pipeline computes and in which dtype: by name, by the command, and on a CUDA device that is pretended"
import math, os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from unittest.mock import patch
import pytest, torch
from conftest import root, shipped
from pretend_cuda import pretend_cuda
from v2flow_nbdev.apps import cli, commands, tokens_page
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.base.precision import resolve_device
from v2flow_nbdev.data.cache import encode_dataset
from v2flow_nbdev.data.sources import digits
from v2flow_nbdev.evaluation import alignment, emoji, judges, metrics
from v2flow_nbdev.evaluation.digits import digit_scores
from v2flow_nbdev.language.decoding import unsupported
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.language.sequences import check_packs
from v2flow_nbdev.language.text_models import small_llama, train_text_tokenizer
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.training.llm_recipes import LLMConfig

def seeds(*numbers): return [torch.Generator().manual_seed(s) for s in numbers]

def v2flow(*args):
    "The command, in this process: (exit code, stdout, stderr)"
    typed = patch('sys.argv', ['v2flow', *map(str, args)])
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, typed:
        try: cli.main(); code = 0
        except SystemExit as e: code = e.code or 0
    return code, out.getvalue().strip(), err.getvalue().strip()

def load(**settings):
    "A pipeline of its own, with few rounds and steps"
    pipe = V2FlowPipeline.from_pretrained(shipped, **settings)
    pipe.image_tokenizer.config = replace(pipe.image_tokenizer.config, n_iter=2, n_steps=2)
    return pipe

@pytest.fixture
def loaded(): return load()

def few(split):
    "A few digits, for `digit_scores`"
    return digits(split)[:20 if split == 'test' else 100]

@pytest.fixture(scope='module')
def images(): return [r['image'] for r in digits('test')[:6]]

@pytest.fixture(scope='module')
def digit(images, tmp_path_factory):
    path = tmp_path_factory.mktemp('device')/'digit.png'
    images[0].save(path)
    return path

# by name

@pytest.mark.parametrize('where', [(torch.bfloat16,), ('cpu', torch.bfloat16), (torch.bfloat16, torch.device('cpu'))])
def test_a_cast_pipeline_is_one_that_was_loaded_in_that_dtype(loaded, images, where):
    half = load(dtype=torch.bfloat16, device='cpu')
    x, exact = half.prepare(images), loaded.llm.model.rotary_emb.inv_freq.clone()
    ids = loaded.image_tokenizer.encode(x)
    assert (loaded.dtype, loaded.device.type) == (torch.float32, 'cpu') and loaded.to(*where) is loaded
    for p in (loaded, half):
        assert p.dtype == p.image_tokenizer.dtype == torch.bfloat16 and p.device == p.image_tokenizer.device
        assert torch.equal(p.llm.model.rotary_emb.inv_freq, exact) and torch.equal(p.image_tokenizer.encode(x), ids)
    a, b = (p(['a six', 'a two'], generator=seeds(0, 1)) for p in (loaded, half))
    assert torch.equal(a.ids, b.ids) and [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]
    assert loaded.to(dtype=torch.float32).dtype == torch.float32 == loaded.image_tokenizer.dtype

def test_an_image_tokenizer_is_loaded_in_a_dtype(images, pipe):
    tok = V2Flow.from_pretrained(shipped, 'image_tokenizer', dtype=torch.bfloat16, device='cpu')
    x = pipe.prepare(images)
    assert tok.dtype == torch.bfloat16 and torch.equal(tok.encode(x), pipe.image_tokenizer.encode(x))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_every_call_runs_in_half_precision(images, dtype):
    half = load(dtype=dtype)
    x, tok = half.prepare(images), half.image_tokenizer
    assert len(half('a six', 2, guidance_scale=2., decoder_guidance_scale=2.).images) == 2
    assert len(half.caption(x)) == len(half.reconstruct(images)) == 6
    if dtype == torch.float16: return
    assert 'psnr_db' in metrics.tokenizer_scores(tok, x, x) and len(tokens_page.token_mixtures(tok, x[:1])) == 16
    assert alignment.tokens_in_codes(tok, x) and math.isfinite(emoji_like(half)['psnr_db'])
    with patch('v2flow_nbdev.evaluation.digits.digits', few):
        assert digit_scores(half, 2)['caption_accuracy'] > 0.5

def emoji_like(pipe):
    "The scores of emoji, of digits"
    examples = [dict(r, split=s, image=r['image'].convert('RGB')) for s in emoji.splits for r in digits('test')[:40]]
    tok = pipe.image_tokenizer
    with patch.object(emoji, 'to_tensor', lambda images, channels: to_tensor([i.convert('L') for i in images], 1)):
        with patch.object(emoji, 'plain_codes', lambda z, k, seed: metrics.plain_codes(z, 32, seed)):
            return emoji.emoji_reconstruction_scores(tok, examples)

# by the command

@pytest.mark.parametrize('typed, why', [
    (('generate', 'a six', '--device', 'gpu'), 'use auto, cpu, cuda, cuda:N or mps'),
    (('generate', 'a six', '--device', 'cuda:'), 'use auto, cpu, cuda, cuda:N or mps'),
    (('caption', 'DIGIT', '--device', 'cuda'), 'no such device on this machine; use auto or cpu'),
    (('encode', 'DIGIT', '--device', 'mps'), 'no such device on this machine; use auto or cpu'),
    (('evaluate', '--device', 'cuda:1'), 'no such device on this machine; use auto or cpu'),
    (('app', '--device', 'cuda'), 'no such device on this machine; use auto or cpu'),
    (('demo', '--dtype', 'int4'), "'auto', 'float32', 'bfloat16', 'float16', 'int8'"),
    (('encode', 'DIGIT', '--dtype', 'float16'), 'No such option'),
    (('train-llm', '--config', 'configs/digits-llm.yaml', '--device', 'mps'), "'auto', 'cpu', 'cuda'"),
    (('train-llm', '--config', 'configs/digits-llm.yaml', '--out', 'runs/never', '--device', 'cuda'),
     'use auto or cpu')])
def test_a_wrong_device_is_one_line_and_exit_code_2(typed, why, digit, monkeypatch):
    monkeypatch.chdir(root)
    typed = [str(digit) if t == 'DIGIT' else t for t in typed]
    with patch('torch.cuda.is_available', lambda: False), patch('torch.backends.mps.is_available', lambda: False):
        code, out, err = v2flow(*typed)
    assert (code, out) == (2, '') and why in err and '\n' not in err, err

def test_a_cpu_in_bfloat16_by_the_command(digit, tmp_path):
    how = ('--model', shipped, '--device', 'cpu')
    code, ids, err = v2flow('encode', digit, *how); assert code == 0, err
    (tmp_path/'ids.json').write_text(ids)
    for typed in (('generate', 'a six'), ('reconstruct', digit), ('decode', tmp_path/'ids.json')):
        code, out, err = v2flow(*typed, '--out', tmp_path/f'{typed[0]}.png', '--dtype', 'bfloat16', *how)
        assert code == 0 and (tmp_path/f'{typed[0]}.png').stat().st_size, err
    code, text, err = v2flow('caption', digit, '--dtype', 'float16', *how); assert code == 0 and text, err

def test_a_training_can_be_kept_on_the_cpu(monkeypatch):
    from accelerate.state import AcceleratorState, PartialState
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.processes import start_processes
    monkeypatch.setitem(os.environ, 'ACCELERATE_USE_CPU', '')
    commands.place_training('cpu')
    AcceleratorState._reset_state(True)
    with patch('torch.cuda.is_available', lambda: True): assert start_processes(TrainConfig()).device.type == 'cpu'
    AcceleratorState._reset_state(True)

# attention

def test_attention_is_what_was_asked_for_or_a_sentence(loaded):
    eager = V2FlowPipeline.from_pretrained(shipped, attn_implementation='eager')
    assert eager.llm.config._attn_implementation == 'eager' and 'eager' in unsupported(eager.llm)
    assert loaded.llm.config._attn_implementation == 'sdpa' and not unsupported(loaded.llm)
    for p in (eager, loaded): check_packs(p.llm)
    assert torch.equal(*(p('a six', 2, temperature=0).ids for p in (eager, loaded)))
    for name in ('flash_attention_2', 'flash'):
        for give in (lambda: V2FlowPipeline.from_pretrained(shipped, attn_implementation=name),
                     lambda: LLMConfig(pretrained='x', attention=name),
                     lambda: small_llama(train_text_tokenizer(['a']), attention=name)):
            with pytest.raises(ValueError, match='sdpa'): give()
    made = small_llama(train_text_tokenizer(['a']), 16, 1, 2, 16, attention='eager')
    assert made.config._attn_implementation == 'eager'

# on a device that is pretended

pretended = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a real one: test_cuda')

@pretended
def test_what_is_pretended_refuses_what_cuda_refuses():
    with pretend_cuda():
        x = torch.ones(2, device='cuda')
        assert x.device.type == 'cuda' and (x + 1).sum().item() == 4 and type(x.cpu()) is torch.Tensor
        for wrong in (lambda: x + torch.ones(2), lambda: torch.ones(3)[x.long()], lambda: x.numpy(),
                      lambda: torch.rand(2, device='cuda', generator=seeds(0)[0])):
            with pytest.raises((RuntimeError, TypeError), match='cuda'): wrong()

@pretended
@pytest.mark.parametrize('generators, settings', [
    (lambda: seeds(0, 1), {}), (lambda: seeds(0)[0], dict(top_k=5, top_p=0.9, min_p=0.01, decoder_guidance_scale=2.,
                                                         decoder_temperature=1., static_cache=True)),
    (lambda: seeds(0)[0], dict(temperature=0., guidance_scale=1.)), (lambda: None, {})])
def test_the_same_images_on_another_device(loaded, generators, settings):
    make = lambda: loaded('a six', 2, generator=generators(), **settings)
    torch.manual_seed(0); a = make()
    with pretend_cuda():
        loaded.to('cuda')
        torch.manual_seed(0); b = make()
        assert b.ids.device.type == 'cuda' and torch.equal(a.ids, b.ids.cpu())
        assert [i.tobytes() for i in a.images] == [i.tobytes() for i in b.images]

def close(a, b):
    "Equal, numbers up to rounding"
    if isinstance(a, dict): return a.keys() == b.keys() and all(close(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-3) if isinstance(a, float) else a == b

@pretended
def test_the_same_captions_ids_and_scores_on_another_device(loaded, images, tmp_path):
    def everything(p):
        tok, x = p.image_tokenizer, p.prepare(images)
        examples = [dict(image=i, captions=['a digit']) for i in images]
        with patch('v2flow_nbdev.evaluation.digits.digits', few):
            scores = digit_scores(p, 2)
        quick = metrics.tokenizer_scores(tok, x, x); quick.pop('reconstructions')
        cached = encode_dataset(examples, tok, tmp_path/p.device.type, progress=False)
        return (p.caption(x), tok.encode(x).cpu().tolist(), scores, quick, tokens_page.token_mixtures(tok, x[:1]),
                alignment.tokens_in_codes(tok, x), emoji_like(p), [e['ids'].tolist() for e in cached])
    here = everything(loaded)
    with pretend_cuda(): there = everything(loaded.to('cuda'))
    for a, b in zip(here, there): assert close(a, b), (a, b)

@pretended
def test_a_judge_gives_its_features_back_where_the_images_are():
    torch.manual_seed(0)
    judge = judges.ImageClassifier(dict(base=['a', 'b']), 4, 8).eval()
    x = torch.rand(6, 3, 16, 16)*2 - 1
    ask = lambda: (judge.features(x), judge.predict(x),
                   judges.top1_retrieval(x, x, range(6), [[0, 1, i] for i in range(6)], judge.features, cosine=True))
    here = ask()
    with pretend_cuda():
        judge.to('cuda'); there = ask()
        assert type(there[0]) is torch.Tensor and torch.equal(there[0], here[0]) and there[1] == here[1]
        assert torch.equal(there[2], here[2])

@pretended
def test_the_command_on_another_device(digit, tmp_path):
    before = torch.get_float32_matmul_precision()
    V2FlowPipeline.from_pretrained(shipped)  # all imports are done
    code, ids, err = v2flow('encode', digit, '--model', shipped, '--device', 'cpu')
    used, real = [], V2FlowPipeline.from_pretrained.__func__
    def spy(cls, *args, **kwargs): used.append(kwargs); return real(cls, *args, **kwargs)
    try:
        with pretend_cuda(), patch.object(V2FlowPipeline, 'from_pretrained', classmethod(spy)):
            assert resolve_device().type == 'cuda'
            code, out, err = v2flow('generate', 'a six', '--model', shipped, '--out', tmp_path/'x.png')
            assert code == 0 and (tmp_path/'x.png').stat().st_size, err
            assert [(k['device'].type, k['dtype']) for k in used] == [('cuda', torch.bfloat16)]
            assert torch.get_float32_matmul_precision() == 'high'
            torch.set_float32_matmul_precision(before); commands.place_training('auto')
            assert torch.get_float32_matmul_precision() == 'high'
            code, there, err = v2flow('encode', digit, '--model', shipped)
            assert (code, there) == (0, ids), err
            code, text, err = v2flow('caption', digit, '--model', shipped, '--dtype', 'float32', '--device', 'cuda:0')
            assert code == 0 and text and used[-1] == dict(device=torch.device('cuda:0'), dtype=torch.float32), err
    finally: torch.set_float32_matmul_precision(before)
