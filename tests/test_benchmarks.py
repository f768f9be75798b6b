("The benchmarks are fair and their table is what was measured: plain and ours compute the same, wherever no chance "
 "divides them")
import json
import pytest, torch
import v2flow_nbdev.models.flow as flow
from benchmarks import bench, generation, plain, plain_generation, probes, training
from conftest import shipped
from v2flow_nbdev.language.generation import generate_captions, generate_image_ids
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.models.quantizer import VectorQuantizer
from v2flow_nbdev.models.resampler import resample
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining
from v2flow_nbdev.models.vocabulary import Vocabulary

assert_close = torch.testing.assert_close
def seed(n=0): return torch.Generator().manual_seed(n)

@pytest.fixture
def pair():
    "A small tokenizer in both forms, of equal weights, with a velocity that is not zero"
    torch.manual_seed(0)
    config = V2FlowConfig(codebook_size=40, dim=32, depth=2, resampler_width=32, velocity_width=32)
    ours = V2Flow(config, Vocabulary([f'w{i}' for i in range(90)], torch.randn(90, 16)))
    ours.quantizer.initialised.fill_(True)
    for p in ours.velocity.parameters(): torch.nn.init.normal_(p, std=0.1)
    both = ours.eval(), plain.PlainV2Flow(ours.config, ours.vocabulary).eval()
    both[1].load_state_dict(ours.state_dict())
    return both

def test_resampler_and_its_gradients():
    torch.manual_seed(0)
    x, weight, bias, vocab = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 8), (1300, 8),
        (1300,), (1300, 6)))
    a, b = plain.resample_plain(x, weight, bias, vocab.detach(), 0.7), resample(x, weight, bias, vocab.detach(), 0.7)
    assert_close(b, a)
    for theirs, ours in zip(*(torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (a, b))):
        assert_close(ours, theirs)

def test_quantizer_codes_gradient_and_updated_codebook():
    torch.manual_seed(0)
    ours, theirs = VectorQuantizer(50, 8, initialised=True), plain.OneHotQuantizer(50, 8, initialised=True)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(8):  # long enough for codes to die and be revived
        x = torch.randn(2, 9, 8, requires_grad=True)
        (a, i, loss_a), (b, j, loss_b) = ours(x), theirs(x)
        assert (i == j).all() and (ours.ids(x) == theirs.ids(x)).all()
        assert_close(b, a); assert_close(loss_b, loss_a)
        assert_close(*(torch.autograd.grad(out.sum() + loss, x)[0] for out, loss in ((b, loss_b), (a, loss_a))))
        for q in (ours, theirs): q.update(seed())
        for name in ('counts', 'sums', 'codebook'): assert_close(getattr(theirs, name), getattr(ours, name))

def test_training_forward(pair, monkeypatch):
    """No dropout and no Gumbel noise (eval); x0 = 0 and t = ½, since the plain form draws more of them; a part of
    the latents hidden"""
    real = flow.random_tensor
    def random_tensor(kind, shape, *args, **kwargs):
        return torch.zeros(shape) if kind is torch.randn else real(kind, shape, *args, **kwargs)
    for module in (flow, plain): monkeypatch.setattr(module, 'random_tensor', random_tensor)
    latents, losses = torch.randn(3, 4, 4, 4, generator=seed()), []
    lessons = TokenizerTraining(pair[0]).eval(), plain.PlainTraining(pair[1]).eval()
    lessons[1].load_state_dict(lessons[0].state_dict())
    for lesson in lessons:
        out = lesson(latents=latents, generator=seed(1))
        out.loss.backward()
        losses.append([out.flow_loss, out.aux_loss, out.commitment_loss, *(p.grad for p in lesson.parameters())])
    for a, b in zip(*losses): assert_close(b, a)

def test_encode_and_decode(pair):
    "The decoder without noise: the plain form draws it for every position"
    latents = torch.randn(3, 4, 4, 4, generator=seed())
    ours, theirs = pair
    ids = ours.encode(latents=latents)
    assert (theirs.encode(latents=latents) == ids).all()
    how = dict(n_iter=3, n_steps=2, guidance_scale=3., temperature=0.)
    assert_close(theirs.decode_latents(ids, generator=seed(), **how), ours.decode_latents(ids, generator=seed(), **how))

def test_dropout_is_the_only_difference_of_a_block(pair):
    x = torch.randn(2, 5, 32, generator=seed())
    a, b = (tok.masked.encoder[0] for tok in pair)
    assert_close(b(x), a(x))
    assert not torch.allclose(b.train()(x), a.train()(x))

def test_results_and_the_table_made_of_them():
    rows, readme = (json.loads((bench.here/'results.json').read_text()), (bench.here/'README.md').read_text())
    for r in rows:
        assert list(r)[:5] == ['name', 'metric', 'plain', 'ours', 'ratio'] and r['plain'] > 0 and r['ours'] > 0
        assert r['ratio'] == pytest.approx(r['ours']/r['plain'], rel=2e-3)
    names = {(r['name'], r['metric']) for r in rows}
    assert len(names) == len(rows) and set(bench.targets) <= names, set(bench.targets) - names
    assert bench.measured_tables(rows) in readme

def test_generation_compares_equals():
    """The plain form and ours give the same ids from one seed and the same captions, with and without guidance, and so do
    two passes; what a baseline is made of stands beside each result"""
    pipe = V2FlowPipeline.from_pretrained(shipped)
    model, tokenizer, grid, captions = pipe.llm, pipe.tokenizer, (4, 4), ['a seven', 'the digit 3', 'a handwritten 0']
    for scale in (1., 2.):
        def ours(n=0): return generate_image_ids(model, tokenizer, captions, scale, generator=seed(n))
        assert (plain_generation.image_ids(model, tokenizer, captions, grid, scale, seed()) == ours()).all()
        assert (ours() != ours(1)).any()
    assert (plain_generation.two_passes(model, tokenizer, captions, grid, 2., seed()) == ours()).all()
    said = tokenizer.batch_decode(plain_generation.captions(model, tokenizer, ours(), grid), skip_special_tokens=True)
    assert [s.strip() for s in said] == generate_captions(model, tokenizer, ours())
    for name, plain, form in generation.cases(pipe):
        if 'one' in name: plain(); form()
    rows = json.loads((bench.here/'results.json').read_text())
    for r in rows:
        for file, sha in r.get('baseline', {}).items():
            if file.startswith('plain'): assert sha == generation.baseline().get(file, training.baseline().get(file))
    assert sum('baseline' in r for r in rows) == 15

def test_a_probe_finds_what_is_there_and_no_more():
    g = seed()
    labels, asked = torch.randint(4, (300,), generator=g), torch.randint(4, (200,), generator=g)
    centres = torch.randn(4, 30, generator=g)
    def made(y): return centres[y] + 0.3*torch.randn(len(y), 30, generator=g)
    x, z = made(labels), made(asked)
    assert probes.probe(*probes.kernels(x, z), labels, asked).float().mean() > 0.98
    assert probes.probe(*probes.kernels(x, z[torch.randperm(200, generator=g)]), labels, asked).float().mean() < 0.4     # features of others: chance
    assert not probes.probe(*probes.kernels(x, z), labels, torch.full_like(asked, -1)).any()                             # a class that training has not
    assert_close(*(probes.kernels(s*x + 3, s*z + 3)[1] for s in (1, 7)), atol=1e-5, rtol=1e-4)          # units do not count
    assert probes.numbered(['b', 'z', 'a'], ['a', 'b', 'b']).tolist() == [1, -1, 0]
    assert probes.counts(torch.tensor([[0, 2, 2]]), 4).tolist() == [[1, 0, 2, 0]]
