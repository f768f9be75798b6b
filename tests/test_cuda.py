("On a CUDA device: one bf16 step of both models, both directions, and the same forward as on the CPU. Needs no "
 "notebook tools")
import copy, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import root, shipped
from v2flow_nbdev.language.sequences import ImageTextSequences, pack
from v2flow_nbdev.language.visual_tokens import VisualTokens, add_visual_tokens
from v2flow_nbdev.language.text_models import collate, small_llama, train_text_tokenizer
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.language.generation import generate_captions, generate_image_ids
from v2flow_nbdev.models.resampler import add_noise, resample
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining, TokenizerTrainingConfig
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.models.vocabulary import Vocabulary

pytestmark = pytest.mark.cuda
texts = ['a handwritten seven', 'the digit 3', 'a two']

@pytest.fixture(scope='module')
def parts():
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(texts)
    llm = small_llama(tokenizer, hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    table = llm.get_input_embeddings().weight.detach().clone()
    tok = V2Flow(V2FlowConfig(codebook_size=32, dim=48, depth=1),
                 Vocabulary(tokenizer.convert_ids_to_tokens(range(len(table))), table))
    images = torch.rand(16, 1, 8, 8)*2 - 1
    return tok, llm, tokenizer, images

def test_one_step_of_each_and_both_directions(parts):
    tok, llm, tokenizer, images = parts
    step = TrainConfig(steps=2, batch_size=8, evaluate_every=0, mixed_precision='bf16')
    lesson = TokenizerTraining(copy.deepcopy(tok), TokenizerTrainingConfig(quantize_from=0.))
    tok = train(lesson, [dict(images=x) for x in images], step, progress=False).tok
    assert tok.device.type == 'cuda' and tok.quantizer.codebook.dtype == torch.float32
    ids = tok.encode(images); assert ids.device.type == 'cuda' and ids.shape == (16, 16)
    g = lambda: torch.Generator().manual_seed(0)
    for scale in (1., 2.): assert tok.decode(ids, guidance_scale=scale, generator=g()).isfinite().all()
    visual = add_visual_tokens(llm, tokenizer, tok)
    examples = ImageTextSequences([dict(ids=i.view(4, 4), captions=texts) for i in ids.cpu()], tokenizer, visual)
    llm = train(llm, examples, step, collate, progress=False)
    llm = train(llm.requires_grad_(True), examples, step, lambda examples: pack(examples, 64), progress=False)
    for scale in (1., 2.):
        written = generate_image_ids(llm, tokenizer, texts, guidance_scale=scale, generator=g())
        assert written.shape == (3, 16) and written.device.type == 'cuda'
        for how in (dict(static_cache=True), dict(compile=True)):
            assert (generate_image_ids(llm, tokenizer, texts, guidance_scale=scale, generator=g(),
                                       **how) == written).float().mean() > 0.9
    assert len(generate_captions(llm, tokenizer, ids[:2])) == 2

def test_forward_equals_the_cpu(parts):
    "float32, the same generator on both: losses, ids and images"
    tok, _, _, images = parts
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tok = copy.deepcopy(tok).eval(); tok.quantizer.initialised.fill_(True)
    for p in tok.velocity.parameters(): torch.nn.init.normal_(p, std=0.05)
    lesson = TokenizerTraining(tok).eval(); other = copy.deepcopy(lesson).cuda(); there = other.tok
    g = lambda: torch.Generator().manual_seed(0)
    a, b = lesson(images, generator=g()), other(images.cuda(), generator=g())
    for name in ('flow_loss', 'aux_loss', 'commitment_loss'):
        torch.testing.assert_close(getattr(b, name).cpu(), getattr(a, name), atol=1e-4, rtol=1e-4)
    ids = tok.encode(images)
    assert (there.encode(images).cpu() == ids).float().mean() >= 0.999
    torch.testing.assert_close(there.decode(ids, generator=g()).cpu(), tok.decode(ids, generator=g()), atol=1e-3,
                               rtol=1e-3)

@pytest.mark.parametrize('name', ['shapes', 'emoji'])
def test_ids_are_those_of_the_cpu(name):
    """With TF32 allowed, under autocast and after a cast: at least 99.9 % of the ids of 256 images are equal, the
    others near-ties"""
    import golden
    if name == 'emoji': pytest.importorskip('diffusers'); pytest.importorskip('pyarrow')
    tok = V2Flow.from_pretrained(golden.root/'data/checkpoints'/name, 'image_tokenizer')
    examples = golden.shapes('test', 256, 32,
        0) if name == 'shapes' else golden.emoji('held_out_bases') + golden.emoji('held_out_compositions')
    x = golden.to_tensor([examples[i]['image'] for i in range(min(256, len(examples)))])
    ids, there = tok.encode(x), copy.deepcopy(tok).cuda()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        plain = there.encode(x.cuda()).cpu()
        with torch.autocast('cuda', torch.bfloat16): around = there.encode(x.cuda()).cpu()
        cast = there.bfloat16().encode(x.cuda()).cpu()
    finally: torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, around) and torch.equal(plain, cast)
    other = ids != plain
    assert other.float().mean() <= 1e-3
    points = torch.nn.functional.normalize(tok.mixtures(tok.to_latents(x), tok.config.tau), dim=-1)[other]
    gap = (points*tok.quantizer.codebook[ids[other]]).sum(-1) - (points*tok.quantizer.codebook[plain[other]]).sum(-1)
    assert (gap.abs() < 1e-5).all(), gap

@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_resampler_in_blocks_equals_the_plain_form(dtype, tolerance):
    "Output and gradients, with noise, against float64; and memory that does not grow with the vocabulary"
    torch.backends.cuda.matmul.allow_tf32 = False
    def made(*shape, std=1.): return (std*torch.randn(*shape, device='cuda')).to(dtype)
    torch.manual_seed(0)
    x, weight, bias, vocab, g = made(70, 32), made(5000, 32, std=0.2), made(5000, std=0.3), made(5000, 48), made(70, 48)
    noise = torch.zeros(70, 5000, device='cuda', dtype=torch.promote_types(dtype, torch.float32))
    add_noise(noise, 1., 3, 0, 0)                                                      # by the kernel, but for float64
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - torch.pi**2/6) < 0.05
    def with_gradients(f, inputs):
        inputs = [t.requires_grad_() for t in inputs]; out = f(*inputs)
        return out, *torch.autograd.grad(out, inputs, g.to(out.dtype))
    exact = with_gradients(lambda x,w,b: (torch.nn.functional.linear(x, w, b) + noise).softmax(-1) @ vocab.double(),
                           [t.double() for t in (x, weight, bias)])
    for block in (512, 2048):
        ours = with_gradients(lambda x,w,b: resample(x, w, b, vocab, 1., 1., 3, block=block), [x, weight, bias])
        for a,b in zip(ours, exact): assert (a.double() - b).norm()/b.norm() < tolerance
    kept = []
    for V in (8192, 65_536):
        w, b, t = made(V, 32).requires_grad_(), made(V), made(V, 48)
        before = torch.cuda.memory_allocated()
        out = resample(x, w, b, t, 1., 1., 3)
        kept.append(torch.cuda.memory_allocated() - before); del out
    assert kept[1] <= 1.1*kept[0], kept

def test_a_resumed_run_on_cuda_is_the_same_run(tmp_path):
    "With deterministic algorithms, as on the CPU; CUBLAS wants a workspace of fixed size for that"
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    class Killed(Exception): pass
    def fresh():
        torch.manual_seed(0)
        return V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1, velocity_width=32),
                      Vocabulary([f'w{i}' for i in range(40)], torch.randn(40, 16)))
    data = [dict(images=torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i))*2 - 1) for i in range(64)]
    config = TrainConfig(steps=20, batch_size=16, checkpoint_every=4, evaluate_every=10, deterministic=True,
                         trackers=[])
    def deadly(m): raise Killed
    whole = train(fresh(), data, config, evaluate=lambda m: {}, out=tmp_path/'whole', progress=False)
    with pytest.raises(Killed): train(fresh(), data, config, evaluate=deadly, out=tmp_path/'killed', progress=False)
    again = train(fresh(), data, config, evaluate=lambda m: {}, out=tmp_path/'killed', resume=True, progress=False)
    for (n, a), b in zip(whole.state_dict().items(), again.state_dict().values()): assert torch.equal(a, b), n

# What `test_device.py` asks of a pretended device, on a real one

def seeds(*numbers): return [torch.Generator().manual_seed(n) for n in numbers]

def v2flow(*args):
    "The command as it is typed, where it sees the GPU"
    done = subprocess.run([Path(sys.executable).with_name('v2flow'), *map(str, args)], capture_output=True, text=True,
                          cwd=root, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_a_pipeline_on_cuda_has_the_ids_of_the_cpu_and_makes_images(dtype):
    "Loaded there, or moved: images, captions, restored images; the ids of encode as on the CPU, but near-ties"
    from v2flow_nbdev.data.sources import digits
    here = V2FlowPipeline.from_pretrained(shipped)
    images = [r['image'] for r in digits('test')[:64]]
    ids = here.image_tokenizer.encode(here.prepare(images))
    for there in (V2FlowPipeline.from_pretrained(shipped, dtype=dtype, device='cuda'),
                  V2FlowPipeline.from_pretrained(shipped).to('cuda', dtype)):
        assert (there.device.type, there.dtype, there.image_tokenizer.dtype) == ('cuda', dtype, dtype)
        assert (there.image_tokenizer.encode(there.prepare(images)).cpu() == ids).float().mean() >= 0.999
        for g in (None, seeds(0)[0], seeds(0, 1), [torch.Generator('cuda').manual_seed(i) for i in range(2)]):
            made = there('a six', 2, generator=g)
            assert len(made.images) == 2 and made.ids.device.type == 'cuda'
        assert len(there.caption(images)) == len(there.reconstruct(images)) == 64
    if dtype == torch.float32:  # a CPU generator draws the same numbers wherever the model is
        a, b = (p(['a six', 'a two']*4, generator=seeds(*range(8))).ids.cpu() for p in (here, there))
        assert (a == b).float().mean() > 0.9

@pytest.mark.parametrize('data, more', [('digits', ('--per-digit', 4)), ('shapes', ('--n', 4))])
def test_evaluations_run_on_cuda(data, more):
    if data == 'digits': pytest.importorskip('sklearn')
    pytest.importorskip('torchmetrics')
    scores = json.loads(v2flow('evaluate', '--data', data, *more, '--json', '--device', 'cuda'))
    assert scores['psnr_db'] > 18

def test_emoji_scores_run_on_cuda():
    for name in ('diffusers', 'pyarrow', 'sklearn', 'torchmetrics', 'psutil'): pytest.importorskip(name)
    scores = json.loads(v2flow('evaluate', '--data', 'emoji', '--n', 16, '--json'))
    assert scores['psnr_db'] > 20 and scores['psnr_db_plain_codes'] > 15 and scores['seconds_for_one'] > 0

@pytest.mark.parametrize('dtype', ['auto', 'float32', 'float16'])
def test_the_command_on_cuda(dtype, tmp_path):
    from v2flow_nbdev.data.sources import digits
    digits('test')[0]['image'].save(tmp_path/'digit.png')
    model, how = ('--model', shipped), ('--device', 'cuda', '--dtype', dtype)
    ids = json.loads(v2flow('encode', tmp_path/'digit.png', *model, '--device', 'cuda'))
    cpu = json.loads(v2flow('encode', tmp_path/'digit.png', *model, '--device', 'cpu'))
    assert len(ids) == 16 and sum(a != b for a, b in zip(ids, cpu)) <= 1
    (tmp_path/'ids.json').write_text(json.dumps(ids))
    for typed in (('generate', 'a six', '--num-images', 4), ('reconstruct', tmp_path/'digit.png'),
                  ('decode', tmp_path/'ids.json')):
        v2flow(*typed, '--out', tmp_path/f'{typed[0]}.png', *model, *how)
        assert (tmp_path/f'{typed[0]}.png').stat().st_size
    assert v2flow('caption', tmp_path/'digit.png', *model, *how)

def test_a_latent_cache_on_cuda_is_that_of_the_cpu(tmp_path):
    from v2flow_nbdev.data.cache import encode_dataset
    from v2flow_nbdev.data.sources import digits
    here = V2Flow.from_pretrained(shipped, 'image_tokenizer')
    there = V2Flow.from_pretrained(shipped, 'image_tokenizer', dtype=torch.bfloat16, device='cuda')
    a, b = (encode_dataset(digits('test'), tok, tmp_path/n, progress=False) for n, tok in (('a', here), ('b', there)))
    same = torch.stack([x['ids'] == y['ids'] for x, y in zip(a, b)]).float().mean()
    assert same >= 0.999

def test_flash_attention_is_had_or_refused():
    from transformers.utils import is_flash_attn_2_available
    load = lambda: V2FlowPipeline.from_pretrained(shipped, dtype=torch.bfloat16, device='cuda',
                                                  attn_implementation='flash_attention_2')
    if is_flash_attn_2_available(): assert len(load().caption(torch.zeros(1, 1, 8, 8))) == 1
    else:
        with pytest.raises(ValueError, match='flash-attn'): load()
