#!/usr/bin/env python3
"""Writes tiny random models of every family, and what transformers computes with them.

Job: for each family a directory in Hugging Face's layout, the same weights as a GGUF file, and a reference: keys before
and after RoPE, values, logits, token ids, and one gradient. The weights mean nothing; all are numbers that bf16 and f16
both hold exactly, so the two files are the same model.
Not its job: real models (make_reference.py).

Packages (CPython 3.11; any CPU build of torch will do):
    pip install torch transformers==4.57.6 tokenizers==0.22.2 gguf==0.19.0 numpy safetensors==0.8.0

A second run gives the same bytes. llama.cpp reads the GGUF files too and gives the same logits to its own rounding (f16 in
the cache): 1e-3 relative, for Mistral up to its window, which llama.cpp does not apply to architecture `llama`.

Use:
    python make_tiny.py OUT      writes OUT/NAME/{config.json, ..., model.gguf, reference.safetensors, reference.json}
"""
import json, os, shutil, sys

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

LENGTH = 20  # longer than every window below
SPLIT = 8  # the gradient is taken with respect to this many injected columns
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXTS = ["", "a cat and a hat", "the  theatre\nat ten", "<|im_start|>", "it's 2026, 314"]

COMMON = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.3)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)

# name: (configuration, type of numbers in the safetensors, bytes a shard)
CASES = {
    "llama": (LlamaConfig(**COMMON, rope_theta=1e4, tie_word_embeddings=False), torch.float32, None),
    "llama3": (LlamaConfig(**COMMON, rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True), torch.float16, None),
    "mistral": (MistralConfig(**COMMON, head_dim=8, rope_theta=1e6, sliding_window=6), torch.bfloat16, None),
    "qwen2": (Qwen2Config(**COMMON, rope_theta=1e6, tie_word_embeddings=True), torch.bfloat16, None),
    "qwen3": (Qwen3Config(**COMMON, head_dim=8, rope_theta=1e6), torch.bfloat16, 8000),
    "gemma3": (Gemma3TextConfig(**{**COMMON, "num_hidden_layers": 3}, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                                layer_types=["sliding_attention", "sliding_attention", "full_attention"], rope_theta=1e6,
                                rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0),
                                hidden_activation="gelu_pytorch_tanh"), torch.bfloat16, None),
}


def byte_char(byte):
    """How GPT-2 writes a byte."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    return chr(byte) if byte in printable else chr(256 + sum(b not in printable for b in range(byte)))


def vocabulary(space, newline, specials):
    letters = [space, newline] + list("abcdefghijklmnopqrstuvwxyz") + list("0123456789',.-:")
    merged = ["th", "the", space + "t", space + "a", "at", "an", "and", "en", space + "the"]
    return specials + letters + merged, [("t", "h"), ("th", "e"), (space, "t"), (space, "a"), ("a", "t"), ("a", "n"),
                                         ("an", "d"), ("e", "n"), (space, "the")]


def make_tokenizer(name, folder):
    """Byte-level BPE as SmolLM, Llama 3 and Qwen have it; for Gemma BPE on characters. Returns what GGUF must say."""
    if name == "gemma3":
        specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]
        tokens, merges = vocabulary("\u2581", "\n", specials)
        vocab = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        kind = dict(model="llama", pre="default")
        roles = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    else:
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens, merges = vocabulary(byte_char(32), byte_char(10), specials)
        vocab = {token: index for index, token in enumerate(tokens)}
        whole_words = name == "llama3"
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
        contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        byte_level = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
        if name in ("llama3", "qwen2", "qwen3"):
            digits = r"\p{N}{1,3}" if name == "llama3" else r"\p{N}"
            split = pre_tokenizers.Split(Regex(contraction + digits + rest), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level(False)])
            kind = dict(model="gpt2", pre="llama-bpe" if name == "llama3" else "qwen2")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)])
            kind = dict(model="gpt2", pre="smollm")
        if name in ("qwen2", "qwen3"):
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        roles = dict(bos_token="<|endoftext|>", eos_token="<|im_end|>")
    adds_bos = name in ("gemma3", "llama3")
    if adds_bos:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=specials, **roles)
    if name != "gemma3":
        fast.chat_template = CHATML
    # Older directories keep the template in tokenizer_config.json: one of ours does too.
    fast.save_pretrained(folder, save_jinja_files=name != "llama")
    return dict(kind, tokens=tokens, merges=merges, specials=specials, adds_bos=adds_bos,
                bos=vocab[roles["bos_token"]], eos=vocab[roles["eos_token"]])


def make_model(name, config, dtype, folder, vocab, shard):
    config.vocab_size = vocab["size"]
    config.bos_token_id, config.eos_token_id = vocab["bos"], vocab["eos"]
    torch.manual_seed(sum(name.encode()))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("norm.weight"):
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif key.endswith("bias"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
            # Numbers of bf16 that are normal in f16 too.
            rounded = tensor.to(torch.bfloat16).float()
            tensor.copy_(torch.where(rounded.abs() < 2.0 ** -14, 0.0, rounded))
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))


class Taps:
    """Keeps K before RoPE of every layer."""

    def __init__(self, model):
        self.k_pre = {}
        for layer, block in enumerate(model.model.layers):
            attention = block.self_attn
            normed = hasattr(attention, "k_norm")
            (attention.k_norm if normed else attention.k_proj).register_forward_hook(self.hook(layer, model.config))

    def hook(self, layer, config):
        shape = (-1, config.num_key_value_heads, config.head_dim)

        def keep(_module, _inputs, output):
            # k_proj gives [B, T, H * D], Qwen 3's k_norm [B, T, H, D], Gemma 3's [B, H, T, D].
            if config.model_type == "gemma3_text":
                self.k_pre[layer] = output[0].detach().clone()
            else:
                self.k_pre[layer] = output.reshape(shape).transpose(0, 1).detach().clone()

        return keep


def reference(name, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if getattr(model.config, "head_dim", None) is None:
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = [(index * 37 + 11) % model.config.vocab_size for index in range(LENGTH)]
    taps, cache = Taps(model), DynamicCache()
    logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]
    tensors = {"logits": logits}
    for layer in range(model.config.num_hidden_layers):
        tensors[f"k_pre.{layer}"] = taps.k_pre[layer]
        tensors[f"k_post.{layer}"] = cache.layers[layer].keys[0]
        tensors[f"v.{layer}"] = cache.layers[layer].values[0]
    tensors.update(gradients(model, ids, cache))
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()},
              os.path.join(folder, "reference.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    document = {"ids": ids, "split": SPLIT, "texts": {text: tokenizer.encode(text) for text in TEXTS if "<" not in text}}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a hat"}, {"role": "assistant", "content": "the cat"}]
        document["chat"] = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    with open(os.path.join(folder, "reference.json"), "w", encoding="utf-8") as sink:
        json.dump(document, sink, ensure_ascii=False, separators=(",", ":"))


def gradients(model, ids, whole):
    """d loss / d K and V of the first SPLIT columns of every layer, for the mean cross-entropy of the rest's next tokens."""
    cache, leaves = DynamicCache(), {}
    for layer, entry in enumerate(whole.layers):
        k = entry.keys[:, :, :SPLIT].detach().clone().requires_grad_(True)
        v = entry.values[:, :, :SPLIT].detach().clone().requires_grad_(True)
        leaves[f"grad_k.{layer}"], leaves[f"grad_v.{layer}"] = k, v
        cache.update(k, v, layer)
    rest = torch.tensor([ids[SPLIT:]])
    logits = model(input_ids=rest, past_key_values=cache, use_cache=True,
                   cache_position=torch.arange(SPLIT, len(ids))).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], rest[0, 1:])
    loss.backward()
    return {"loss": loss.reshape(1), **{key: leaf.grad[0] for key, leaf in leaves.items()}}


def permuted(weight, heads):
    """Rows of q and k for rotation of adjacent pairs, as llama.cpp's converter orders them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(name, folder, vocab):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    architecture = {"llama3": "llama", "mistral": "llama"}.get(name, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(os.path.join(folder, "model.gguf"), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if name in ("mistral", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma3":
        writer.add_array("gemma3.attention.sliding_window_pattern",
                         [kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
    add_vocabulary(writer, vocab, name)
    if name == "llama3":
        scaling = model.model.rotary_emb.inv_freq
        plain = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaling).numpy().astype(np.float32))
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
         "gemma3": gguf.MODEL_ARCH.GEMMA3}[architecture], config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "llama" and ".q_proj." in key:
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in key:
            values = permuted(values, config.num_key_value_heads)
        if architecture == "gemma3" and key.endswith("norm.weight"):
            values = values + 1
        kind = np.float16 if values.ndim == 2 else np.float32
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values.astype(kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer, vocab, name):
    types = [3 if token in vocab["specials"] else 1 for token in vocab["tokens"]]
    writer.add_tokenizer_model(vocab["model"])
    writer.add_tokenizer_pre(vocab["pre"])
    writer.add_token_list(vocab["tokens"])
    writer.add_token_types(types)
    if vocab["model"] == "llama":
        order = {left + right: -float(rank) for rank, (left, right) in enumerate(vocab["merges"])}
        writer.add_token_scores([order.get(token, -1000.0 - index) for index, token in enumerate(vocab["tokens"])])
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in vocab["merges"]])
        writer.add_chat_template(CHATML)
    writer.add_bos_token_id(vocab["bos"])
    writer.add_eos_token_id(vocab["eos"])
    writer.add_add_bos_token(vocab["adds_bos"])


def main():
    out = sys.argv[1]
    torch.set_num_threads(1)
    for name, (config, dtype, shard) in CASES.items():
        folder = os.path.join(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        vocab = make_tokenizer(name, folder)
        vocab["size"] = len(vocab["tokens"])
        make_model(name, config, dtype, folder, vocab, shard)
        reference(name, folder)
        write_gguf(name, folder, vocab)


if __name__ == "__main__":
    main()
