"""Does alignment help a pretrained model? The starts are what they say, the fast body computes what `transformers` and
`peft` do, and a miniature goes through the whole benchmark"""
import json
import numpy as np, pytest, torch, torch.nn.functional as F
from benchmarks import pretrained_alignment as pa
from v2flow_nbdev.data.sources import digits
from v2flow_nbdev.language.losses import TargetLoss
from v2flow_nbdev.language.pipeline import load_llm
from v2flow_nbdev.language.text_models import collate
from v2flow_nbdev.language.visual_tokens import add_visual_tokens

close = torch.testing.assert_close

@pytest.fixture(scope='module')
def task(small_pretrained): return small_task(small_pretrained)

def small_task(folder):
    return pa.make_task('digits', folder/'tok', folder/'llm', folder/'cache', compiled=False, dtype=torch.float32,
                        steps=2, batch_size=8, examples=dict(train=digits('train')[:24], test=digits('test')[:11]))

def table_and_codes():
    "Tokens in an ellipsoid away from zero, and codes that lie along its long axes"
    g = torch.Generator().manual_seed(0)
    turn, wide = torch.linalg.qr(torch.randn(12, 12, generator=g)).Q, torch.logspace(0.5, -1.5, 12)
    table = torch.randn(4000, 12, generator=g)*wide @ turn + 0.7
    return table, F.normalize(torch.randn(60, 12, generator=g)*wide @ turn, dim=-1)

def from_mean(start, seed=0, **more):
    table, codes = table_and_codes()
    return pa.starting_embeddings(start, codes, table, seed, **more) - table.mean(0)

def inside(x):
    "Mean squared Mahalanobis distance from the tokens"
    table, _ = table_and_codes()
    return (x.double() @ pa.covariance_roots(table)[2]).square().sum(1).mean().item()

def test_a_rotation_keeps_the_gram_matrix_and_each_seed_has_another():
    codes, one, two = from_mean('codebook'), from_mean('rotated'), from_mean('rotated', 1)
    for turned in (one, two): close(turned @ turned.T, codes @ codes.T, atol=1e-4, rtol=1e-4)
    assert F.cosine_similarity(one, codes).abs().mean() < 0.5 and F.cosine_similarity(one, two).abs().mean() < 0.5
    assert inside(one) > 10*inside(codes)                                  # it leaves the space that tokens live in

def test_a_rotation_within_the_covariance_stays_in_the_ellipsoid_and_loses_the_alignment():
    codes, turned = from_mean('codebook'), from_mean('rotated_covariance')
    assert inside(turned) < 2*inside(codes)
    assert F.cosine_similarity(turned, codes).mean() < 0.3
    close(turned.norm(dim=1), codes.norm(dim=1))
    table, _ = table_and_codes()
    _, root, inverse = pa.covariance_roots(table)
    close(root @ inverse, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    close(root @ root, torch.cov(table.double().T))

def test_shuffles_keep_the_set():
    codes, shuffled = from_mean('codebook'), from_mean('shuffled', 3)
    assert not torch.allclose(codes, shuffled)
    close(shuffled[torch.cdist(codes, shuffled).argmin(1)], codes, atol=1e-5, rtol=1e-5)
    assert torch.cdist(codes, shuffled).argmin(1).unique().numel() == 60
    meaning = torch.randn(60, 12)
    own, other = (from_mean(s, meaning=meaning) for s in ('semantic', 'semantic_shuffled'))
    close(own.sum(0), other.sum(0), atol=1e-3, rtol=1e-3); assert not torch.allclose(own, other)

def test_a_code_means_the_tokens_it_goes_with():
    "Code i is in images of caption token i; tokens 10 and 11 are in all captions"
    labels = torch.arange(200) % 4
    ids = torch.stack([labels, labels, torch.full_like(labels, 4)], 1)     # code 4 is everywhere, code 5 nowhere
    at, weights = pa.pointwise_weights(ids, [[[10, i, 11], [i, 10]] for i in labels.tolist()], 6, 12)
    assert at.tolist() == [0, 1, 2, 3, 10, 11] and (weights[:4, :4].argmax(1) == torch.arange(4)).all()
    assert (weights[:4, 4:] < 1e-6).all() and (weights[4:] < 1e-6).all() and weights.min() >= 0
    table, codes = table_and_codes()
    directions = weights @ (table[at] - table.mean(0)).double()
    rows = pa.starting_embeddings('semantic', codes[:6], table, 0, meaning=directions)
    near = F.cosine_similarity((rows - table.mean(0))[:4, None], (table[:12] - table.mean(0))[None], dim=-1)
    assert (near.argmax(1) == torch.arange(4)).all()
    close(rows[5], table.mean(0))

def test_gaussian_has_the_tables_mean_and_covariance():
    table, codes = table_and_codes()
    many = pa.starting_embeddings('gaussian', codes.repeat(500, 1), table, 0)
    assert ((many.mean(0) - table.mean(0)).abs() < 0.05*table.std(0)).all()
    close(torch.cov(many.T), torch.cov(table.T), atol=0.05*table.var(0).max().item(), rtol=0.1)

def test_plain_codes_are_means_of_latents_at_the_tokens_norm():
    ids = torch.tensor([[0, 1], [1, 2]])
    latents = torch.randn(2, 2, 2, 4)                                         # 2 channels, 2×4 latents: tokens of 2×2
    means = pa.code_latents(latents, ids, 4)
    assert means.shape == (4, 8) and (means[3] == 0).all()
    patch = lambda b, x: latents[b, :, :, 2*x:2*x + 2].flatten()
    expected = torch.stack([patch(0, 0), (patch(0, 1) + patch(1, 0))/2, patch(1, 1)])
    close(means[:3].float(), expected - expected.mean(0))
    table, codes = table_and_codes()
    rows = pa.starting_embeddings('plain', codes[:4], table, 5, plain=means) - table.mean(0)
    close(rows[:3].norm(dim=1), (table - table.mean(0)).norm(dim=1).mean().expand(3))
    with pytest.raises(ValueError, match="start='zeros': use one of"): pa.starting_embeddings('zeros', codes, table, 0)

def test_the_body_computes_what_transformers_and_peft_do(small_pretrained, task):
    "Loss, and the gradients of LoRA and of the new embeddings"
    from peft import LoraConfig, get_peft_model
    from v2flow_nbdev.models.tokenizer import V2Flow
    llm, text = load_llm(small_pretrained/'llm')
    visual = add_visual_tokens(llm, text, V2Flow.from_pretrained(small_pretrained/'tok'))
    rows = pa.new_embeddings(task, 'codebook', 0)
    close(llm.get_input_embeddings().weight[visual.first:-2], rows[:-2])  # for begin and end it counts <s> too
    with torch.no_grad(): llm.get_input_embeddings().weight[visual.first:] = rows
    rows.requires_grad_()
    ids, captions = task.train[0][:5], [c[i] for i, c in enumerate(task.train[1][:5])]
    sequences = [([task.bos, *c, visual.begins[0]], (visual.first + x).tolist()) for x,c in zip(ids, captions)]
    mean = lambda **how: task.losses(rows, *task.batch(ids, captions), **how).mean()
    close(mean(), TargetLoss(llm)(**collate(sequences)).loss)
    low = task.body.adapters(0)
    theirs = TargetLoss(get_peft_model(llm, LoraConfig(r=pa.rank, lora_alpha=pa.alpha, target_modules='all-linear',
                                                       task_type='CAUSAL_LM')))
    def own(n): return [theirs.llm.get_submodule(f'base_model.model.model.layers.1.{n}.lora_{x}.default').weight
                        for x in 'AB']
    names = [('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'), ('self_attn.o_proj',),
             ('mlp.gate_proj', 'mlp.up_proj'), ('mlp.down_proj',)]
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for (a, bs), group in zip(low[1], names):
            for part, b, name in zip(a.chunk(len(bs)), bs, group):
                b.copy_(0.1*torch.randn(b.shape, generator=g))
                for p, q in zip(own(name), (part, b)): p.copy_(q)
    ours, other = mean(low=low), theirs(**collate(sequences)).loss
    ours.backward(); other.backward(); close(ours, other)
    for (a, bs), group in zip(low[1], names):
        for part, b, name in zip(a.grad.chunk(len(bs)), bs, group):
            close(part, own(name)[0].grad, atol=1e-5, rtol=1e-3); close(b.grad, own(name)[1].grad, atol=1e-5, rtol=1e-3)

def test_a_miniature_goes_all_the_way(small_pretrained, task, tmp_path, monkeypatch, capsys):
    """Screening, the test, the table and the plot; what is there is not run again, and a run is the same after the
    model was loaded anew"""
    results = tmp_path/'found.json'
    monkeypatch.setattr(pa, 'rates', dict(lora=[(1e-3, 4e-3), (1e-3, 1e-3)], rows=[(0., 4e-3)], all=[(1e-4, 1e-3)]))
    monkeypatch.setattr(pa, 'one_run', seen := Counted(pa.one_run))
    pa.screen(task, results, ['lora', 'rows', 'all'], ['codebook', 'random'], 2)
    assert seen.n == 2*3 + 2*2 + 2*2
    pa.screen(task, results, ['lora', 'rows', 'all'], ['codebook', 'random'], 2); assert seen.n == 14
    runs = json.loads(results.read_text()); first = runs[0]
    assert len(first['dev']) == len(first['report']) == 2 and first['report'][1] != first['report'][0]
    again = pa.one_run(small_task(small_pretrained), 'codebook', 'lora', 0, 1e-3, 4e-3)
    assert all(again[k] == first[k] for k in first if 'seconds' not in k)
    with pytest.raises(ValueError, match='semantic: 2 learning rates are not tried'): pa.test(task, results, 'lora')
    pa.screen(task, results, ['lora'], pa.starts[1:3] + pa.starts[-2:], 1)
    pa.test(task, results, 'lora', [10, 11])
    rows = [r for r in pa.summary(pa.read_results(results)) if r['phase'] == 'test']
    assert [r['start'] for r in rows[:3]] == ['codebook', 'rotated', 'rotated_covariance'] and len(rows) == 4
    assert all(len(r['differences']) == 2 for r in rows[1:])
    pa.main(['table', '--results', str(results)]); pa.main(['plot', '--results', str(results)])
    assert 'test, 2 seeds | rotated' in capsys.readouterr().out and results.with_suffix('.png').stat().st_size > 2000

class Counted:
    def __init__(self, f): self.f, self.n = f, 0
    def __call__(self, *a, **k): self.n += 1; return self.f(*a, **k)

def test_sequences_saved_and_the_interval():
    curve = [4., 3., 2.5, 2.2]
    assert pa.sequences_saved(curve, [4., 3.5, 3.2, 3.], 40, 32) == 32*20  # what the other has at 40
    assert pa.sequences_saved([4., 3.5, 3.2, 3.], curve, 40, 32) == -32*20
    mean, half = pa.interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.3027*1/3**.5, rel=1e-4)    # t of 2 degrees of freedom
    assert np.isnan(pa.interval([1.])[1])
