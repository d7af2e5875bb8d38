#!/usr/bin/env python3
"""Writes two optimiser steps of a C2C fuser through a frozen model, as PyTorch takes them.

Job: a fuser with the modules of the published code (a Linear, RMSNorm and GELU a step, one fuser a layer and tensor), random
weights, two samples, given noise of gates and dropout; the target is the tiny Llama of make_tiny.py. Loss, gradient, its
norm, clipped gradients through torch's AdamW, and the weights after each step go into fuser_step.safetensors beside it.
Not its job: real models; the numbers mean nothing.

Packages: those of make_tiny.py. A second run gives the same bytes.

Use: fuser_step.py      writes tests/reference/fuser_step.safetensors, which tests/model/fuser.rs reads
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HERE = Path(__file__).resolve().parent
LAYERS, HEADS, HEAD_DIM, SOURCE, HIDDEN, DEPTH = 2, 2, 4, 6, 8, 4
OWN, DROPOUT, TEMPERATURE, RATE, DECAY, CLIP = 1, 0.1, 0.8, 1e-3, 0.01, 0.05
# Columns of the prefix, tokens behind it, first row that is scored.
SAMPLES = [(5, [7, 3, 11, 20, 9], 2), (3, [4, 30, 8], 1)]
STEPS = 2
WIDTH = HEADS * HEAD_DIM
MAPS = 2 * LAYERS


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = RMSNorm(HIDDEN), nn.GELU()
        self.up, self.down = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x, kept):
        return x + kept * self.down(self.act(self.up(self.norm(x))))


class Fuser(nn.Module):
    """Of keys, or of values, of one layer."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(SOURCE + WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.weigh = nn.Linear(HIDDEN, HEADS)
        self.gate = nn.Parameter(torch.tensor(0.3))

    def forward(self, source, target, gumbel, kept):
        u = self.blocks[0](self.enter(torch.cat([source, target], -1)), kept[0])
        weight = torch.sigmoid(self.weigh(self.blocks[1](u, kept[1])))
        z = u
        for block, mask in zip(self.blocks[2:], kept[2:]):
            z = block(z, mask)
        gate = torch.sigmoid((self.gate + gumbel) / TEMPERATURE)
        projected = self.leave(z).view(-1, HEADS, HEAD_DIM) * (gate * weight).unsqueeze(-1)
        return target + projected.reshape(-1, WIDTH)

    def parts(self):
        """Name and parameter, as files of bonepile name them; matrices are [inputs, outputs] there."""
        yield "in.weight", self.enter.weight
        yield "in.bias", self.enter.bias
        for index, block in enumerate(self.blocks):
            yield f"block.{index}.norm", block.norm.weight
            yield f"block.{index}.up", block.up.weight
            yield f"block.{index}.down", block.down.weight
        yield "weight.weight", self.weigh.weight
        yield "weight.bias", self.weigh.bias
        yield "out.weight", self.leave.weight
        yield "out.bias", self.leave.bias
        yield "gate", self.gate


def stacked(fusers, of):
    """[maps, inputs, outputs] of every parameter, from what `of` says about one."""
    result = {}
    for parts in zip(*(fuser.parts() for fuser in fusers)):
        values = [of(parameter).detach() for _, parameter in parts]
        values = [value.t() if value.dim() == 2 else value.reshape(1, -1) for value in values]
        result[parts[0][0]] = torch.stack(values).contiguous().clone()
    return result


def prefix_cache(model, fusers, sample, noise):
    columns = sample["base"].shape[1]
    fused = []
    for index, fuser in enumerate(fusers):
        kept = [mask[index] for mask in noise["kept"]]
        rest = fuser(sample["source"][index, OWN:], sample["base"][index, OWN:], noise["gumbel"][index], kept)
        rows = torch.cat([sample["base"][index, :OWN], rest])
        fused.append(rows.view(columns, HEADS, HEAD_DIM).transpose(0, 1).unsqueeze(0))
    cosines, sines = model.model.rotary_emb(fused[0], torch.arange(columns).unsqueeze(0))
    cache = DynamicCache()
    for layer in range(LAYERS):
        key = apply_rotary_pos_emb(fused[2 * layer], fused[2 * layer], cosines, sines)[1]
        cache.update(key, fused[2 * layer + 1], layer)
    return cache


def batch_loss(model, fusers, samples, noises):
    losses, count = [], 0
    for sample, noise, (columns, tokens, first) in zip(samples, noises, SAMPLES):
        cache = prefix_cache(model, fusers, sample, noise)
        logits = model(input_ids=torch.tensor([tokens[:-1]]), past_key_values=cache, use_cache=True,
                       cache_position=torch.arange(columns, columns + len(tokens) - 1)).logits[0, first:]
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(tokens[first + 1:]), reduction="sum"))
        count += len(tokens) - 1 - first
    return sum(losses) / count


def main():
    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny" / "llama", dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fusers = [Fuser() for _ in range(MAPS)]
    with torch.no_grad():
        for fuser in fusers:
            for block in fuser.blocks:
                block.norm.weight += 0.2 * torch.randn(HIDDEN)
            fuser.gate += 0.5 * torch.randn(())
    samples = [{"source": torch.randn(MAPS, columns, SOURCE), "base": torch.randn(MAPS, columns, WIDTH)}
               for columns, _, _ in SAMPLES]
    parameters = [parameter for fuser in fusers for parameter in fuser.parameters()]
    optimiser = torch.optim.AdamW([{"params": [p for p in parameters if p.dim() == 2], "weight_decay": DECAY},
                                   {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0}], lr=RATE)
    tensors, losses, norms = {f"start.{name}": value for name, value in stacked(fusers, lambda p: p).items()}, [], []
    for index, sample in enumerate(samples):
        tensors |= {f"sample.{index}.{name}": value for name, value in sample.items()}
    for step in range(STEPS):
        noises = []
        for index, (columns, _, _) in enumerate(SAMPLES):
            count = columns - OWN
            uniform = torch.rand(MAPS, count, HEADS)
            gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
            kept = [(torch.rand(MAPS, count, HIDDEN) > DROPOUT).float() / (1 - DROPOUT) for _ in range(DEPTH)]
            noises.append({"gumbel": gumbel, "kept": kept})
            tensors[f"noise.{step}.{index}.gumbel"] = gumbel
            tensors |= {f"noise.{step}.{index}.kept.{block}": mask for block, mask in enumerate(kept)}
        optimiser.zero_grad()
        loss = batch_loss(model, fusers, samples, noises)
        loss.backward()
        tensors |= {f"gradient.{step}.{name}": value for name, value in stacked(fusers, lambda p: p.grad).items()}
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimiser.step()
        tensors |= {f"weights.{step}.{name}": value for name, value in stacked(fusers, lambda p: p).items()}
    stated = {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "source": SOURCE, "hidden": HIDDEN, "depth": DEPTH,
              "own": OWN, "temperature": TEMPERATURE, "rate": RATE, "decay": DECAY, "clip": CLIP, "losses": losses,
              "norms": norms, "samples": [{"tokens": tokens, "first": first} for _, tokens, first in SAMPLES]}
    save_file(tensors, HERE / "fuser_step.safetensors", metadata={"step": json.dumps(stated)})
    print(f"losses {losses}, norms {norms}, {sum(p.numel() for p in parameters)} parameters")


if __name__ == "__main__":
    main()
