"""The plain form of V²Flow: what one would write first, for `bench.py` to compare with.

Five choices differ from the library, and nothing else: all shares of all words at once; a one-hot codebook; the velocity at every
position, times a mask; attention dropout; guidance in two passes. Everything below has the library's weights, names and sizes"""
import torch
import torch.nn.functional as F
from einops import rearrange
from functools import partial
from v2flow_nbdev.base.random import random_tensor
from v2flow_nbdev.models.flow import euler, logit_normal_times, rf_path
from v2flow_nbdev.models.masked import Block, MaskedTransformer, at_latents, code_grid, grid_positions, random_orders, reveal, sample_mask_ratio, gather_tokens
from v2flow_nbdev.models.quantizer import VectorQuantizer
from v2flow_nbdev.models.resampler import VocabularyResampler
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining, V2FlowOutput

def resample_plain(
    features,      # (..., D)
    weight, bias,  # of the readout, (V, D) and (V,)
    vocab,         # embedding rows, (V, E)
    tau=1.,        # softmax temperature
    noise=0.,      # 1: Gumbel noise, as in training; 0: none. Nothing between
):                 # (..., E)
    "Logits of all words, their Gumbel-softmax, and the mixture of the rows"
    logits = F.linear(features, weight, bias)
    shares = F.gumbel_softmax(logits, tau=tau) if noise else (logits/tau).softmax(-1)
    return shares @ vocab

class PlainResampler(VocabularyResampler):
    "The same features and readout, with `resample_plain`"
    def forward(self, latents, vocab, tau=1., noise=0., seed=0):
        return resample_plain(self.tokens(latents), self.readout.weight, self.readout.bias, vocab, tau, noise)

class OneHotQuantizer(VectorQuantizer):
    """Codes, counts and sums by products with a one-hot matrix; every code is normalised anew. It needs a codebook
    to begin with"""
    def ids(self, x): return (F.normalize(x.float(), dim=-1) @ self.codebook.float().T).argmax(-1)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=-1)
            ids = (x.detach() @ self.codebook.T).argmax(-1)
            one_hot = F.one_hot(ids, len(self.codebook)).float()                              # (B, N, K)
            codes = one_hot @ self.codebook
            if self.training:
                flat, hits = x.detach().flatten(0, -2), one_hot.flatten(0, -2)
                self.collected.append((flat, hits.sum(0), hits.T @ flat))
            return x + (codes - x).detach(), ids, F.mse_loss(x, codes)

    @torch.no_grad()
    def update(self, generator=None):
        collected, self.collected = self.collected, []
        for x, hits, sums in collected:
            self.counts.lerp_(hits, 1 - self.decay)
            self.sums.lerp_(sums, 1 - self.decay)
            self.codebook.copy_(F.normalize(self.sums, dim=-1))
            self.revive(x, generator)

class DropoutBlock(Block):
    "The same block with dropout 0.1 in attention and after its projection, as in MAR"
    def forward(self, x):
        p = 0.1 if self.training else 0.
        q,k,v = rearrange(self.qkv(self.norm1(x)), 'b n (s h d) -> s b h n d', s=3, h=self.heads)
        x = x + F.dropout(self.proj(rearrange(F.scaled_dot_product_attention(q,k,v, dropout_p=p),
                                              'b h n d -> b n (h d)')), p)
        return x + self.mlp(self.norm2(x))

class EverywhereTransformer(MaskedTransformer):
    "The same passes, but its output is kept at every position, in the order visible, hidden: (B, N, D)"
    def forward(self, codes, latents, visible, hidden, grid, drop=None):
        dtype = self.mask_token.dtype
        def positions(grid): return grid_positions(*grid, self.dim, self.main, codes.device).to(dtype)
        pos, slots, code = positions(grid), positions(code_grid(codes.shape[1], grid)), self.code_in(codes.to(dtype))
        if drop is not None: code = torch.where(drop[:,None,None], self.null_code.to(code.dtype), code)
        seen = self.latent_in(gather_tokens(latents.to(dtype), visible)) + pos[visible] + self.is_latent
        memory = self.encoder(torch.cat([code + slots + self.is_code, seen], 1))
        holes = self.mask_token + pos[hidden] + gather_tokens(at_latents(code, grid), hidden)
        return self.decoder(torch.cat([memory, holes], 1))[:, -latents.shape[1]:]

def masked_flow_loss_plain(
    masked, velocity,                         # an `EverywhereTransformer` and the library's `VelocityMLP`
    codes, z, grid,                           # (B, Nc, E), (B, N, C) and (h, w)
    mask_ratio_min, code_dropout, n_draws,    # see `masked_flow_loss`
    generator=None,                           # draws masks, dropped images, noise and times
):                                            # scalar
    "The velocity's error at all positions, times the mask"
    b, n, _ = z.shape
    n_hidden = max(1, round(n*sample_mask_ratio(mask_ratio_min, generator=generator)))
    orders = random_orders(b, n, generator, z.device)
    visible, hidden = orders[:, n_hidden:], orders[:, :n_hidden]
    drop = random_tensor(torch.rand, (b,), generator, z.device) < code_dropout
    cond = masked(codes, z, visible, hidden, grid, drop)                                      # (B, N, D)
    x1 = gather_tokens(z, torch.cat([visible, hidden], 1))                                             # (B, N, C)
    mask = (torch.arange(n, device=z.device) >= n - n_hidden).float().repeat(n_draws*b)       # 1: hidden
    x1, cond = x1.flatten(0,1).repeat(n_draws, 1), cond.flatten(0,1).repeat(n_draws, 1)
    x0 = random_tensor(torch.randn, x1.shape, generator, z.device)
    t = logit_normal_times(len(x1), generator=generator, device=z.device)
    xt, v = rf_path(x0, x1, t)
    return ((velocity(xt, t, cond).float() - v).square().mean(-1)*mask).sum()/mask.sum()

class PlainV2Flow(V2Flow):
    "V²Flow with the five plain choices; its weights load into `V2Flow` and back"
    def __init__(self, config, vocabulary=None):
        super().__init__(config, vocabulary)
        plain = {VocabularyResampler: PlainResampler, VectorQuantizer: OneHotQuantizer,
                 MaskedTransformer: EverywhereTransformer}
        for part in self.children(): part.__class__ = plain.get(type(part), type(part))  # same tensors, other methods
        for part in self.masked.modules():
            if type(part) is Block: part.__class__ = DropoutBlock

    def mixtures(self, latents, tau, noise=0., seed=0): return self.resampler(latents, self.vocab, tau, noise)

    @torch.no_grad()
    def decode_latents(self, ids, grid=None, n_iter=4, n_steps=20, guidance_scale=3., temperature=1., generator=None):
        """In every round the velocity of all positions, of which this round's are kept; once for the codes, once for
        the null condition"""
        (b, n), grid = ids.shape, tuple(grid or self.config.grid)
        codes = self.scale_codes(self.quantizer.codebook[ids].float())

        def draw_latents(z, visible, hidden, k):
            everybody = torch.ones(b, dtype=torch.bool, device=self.device)
            cond, null = (self.masked(codes, z, visible, hidden, grid, drop).flatten(0,1) for drop in (None, everybody))
            def guided(x, t):
                v_cond, v_null = self.velocity(x, t, cond).float(), self.velocity(x, t, null).float()
                return v_null + guidance_scale*(v_cond - v_null)
            x0 = temperature*random_tensor(torch.randn, (b*n, z.shape[-1]), generator, self.device)
            return euler(guided, x0, n_steps).unflatten(0, (b, n))[:, visible.shape[1]:][:, :k]

        z = torch.zeros(b, n, self.config.channels, device=self.device)
        return rearrange(reveal(draw_latents, z, random_orders(b, n, generator, self.device), n_iter),
                         'b (h w) c -> b c h w', h=grid[0])

class PlainTraining(TokenizerTraining):
    "A training step's forward before the codes are frozen, over a `PlainV2Flow`"
    def forward(self, images=None, latents=None, generator=None):
        tok, c = self.tok, self.config
        latents = tok.to_latents(images) if latents is None else latents
        grid, z = tuple(latents.shape[2:]), rearrange(latents, 'b c h w -> b (h w) c')
        tau, noise = (self.tau, self.noise) if self.training else (tok.config.tau, 0.)
        # the library's seed: both sides draw the same mask
        if noise: random_tensor(partial(torch.randint, 2**31), (1,), generator)
        codes, ids, commitment = tok.quantizer(tok.mixtures(latents, tau, noise))
        codes = tok.scale_codes(codes)
        aux = F.mse_loss(self.aux_decoder(codes, grid).float(), z)
        flow = masked_flow_loss_plain(tok.masked, tok.velocity, codes, z, grid, c.mask_ratio_min, c.code_dropout,
                                      c.n_draws, generator)
        return V2FlowOutput(flow + aux + commitment, flow, aux, commitment, ids)
