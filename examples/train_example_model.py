"""Train a small OLMoE like examples/olmoe-tiny from scratch on a JSON Lines corpus.

    python examples/train_example_model.py CORPUS.jsonl OUT_DIR

Each line of the corpus is an object with a "text" field. Trains a byte-level BPE tokenizer and then the model, with AdamW, a cosine
schedule and OLMoE's load-balancing loss. olmoe-tiny itself saw 12M tokens: 1,000 steps at a peak of 2e-3, some hours on two cores.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

END, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=length)


def new_model(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """16 experts of 256 neurons, top-4, hidden size 256, random weights."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        router_aux_loss_coef=0.01,
    )
    return OlmoeForCausalLM(config)


def train(model: OlmoeForCausalLM, tokens: torch.Tensor, options: argparse.Namespace) -> None:
    """Next-token prediction on random windows of the corpus."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    rows = max(1, options.batch_tokens // options.length)
    model.train()
    bar = tqdm(range(options.steps))
    for _ in bar:
        starts = torch.randint(len(tokens) - options.length, (rows,))
        batch = torch.stack([tokens[start : start + options.length] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", perplexity=f"{math.exp(min(20, loss.item())):.1f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    with open(options.corpus) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizer = train_tokenizer(texts, options.vocabulary, options.length)
    tokens = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    model = new_model(options, tokenizer)
    train(model, tokens, options)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
