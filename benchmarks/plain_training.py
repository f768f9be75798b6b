"""A training step as one would write it first: `AdamW` as it comes, an average updated parameter by parameter, and every number
read on the host at once. This file is a baseline: the sha256 of its content stands beside every result that it has part in"""
import math
import torch

class PlainSteps:
    "Steps of `model(**batch).loss`: forward in bf16 on CUDA, backward, clipping, AdamW, the average; as the library's loop did them"
    def __init__(self, model, lr=1e-3, weight_decay=0.05, ema_decay=0.999):
        self.model, self.ema_decay, self.done = model.train(), ema_decay, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
        self.mean = {n: p.detach().clone() for n, p in model.named_parameters()}

    def step(self, batch):
        "Its loss, a float"
        device = next(self.model.parameters()).device.type
        if hasattr(self.model, 'before_step'): self.model.before_step(0.)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'): loss = self.model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.).item()
        if math.isfinite(norm) and math.isfinite(loss.item()):
            self.optimizer.step()
            if hasattr(self.model, 'after_step'): self.model.after_step()
            self.done += 1
            decay = min(self.ema_decay, (1 + self.done)/(10 + self.done))
            with torch.no_grad():
                for n, p in self.model.named_parameters(): self.mean[n].lerp_(p.detach(), 1 - decay)
        return loss.item()
