"""Make the small base models that ship here: what a pretrained language model is to GSM8K, for
`words` and `countdown`.

A Qwen2 of 3 layers and width 64, trained from random weights; nothing is downloaded. For words it
reads traces by the *pupil* of tasks/words.py, who has misconceptions and slips: the base can
reason, but is confidently wrong, as real models are. For countdown it reads graded attempts
(tasks/countdown.py): it can judge, and cannot plan. Each 10 minutes on 2 cores:

    python -m tasks.pretrain --task words --out tasks/words-base
    python -m tasks.pretrain --task countdown --steps 3500 --out tasks/countdown-base
"""

import argparse
import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
from engine.loading import load_tokenizer
from tasks import countdown, words
from tasks.common import split_of

BATCH = 128
SEED = 0
LEARNING_RATE = 3e-3


def pupil_corpus(tokenizer, count: int, seed: int) -> data.Batch:
    """`count` traces by the pupil, on problems of 2 to 4 steps from the train split."""
    rng = random.Random(f"pupil {seed}")
    corpus = []
    while len(corpus) < count:
        problem = words.make_problem(rng, steps=rng.choice((2, 3, 3, 4)))
        if split_of(problem.question) == "train":
            corpus.append(data.Example(*words.solve(problem, words.Pupil(), rng)))
    return data.demonstration_batch(data.tokenize(tokenizer, corpus))


def graded_corpus(tokenizer, count: int, seed: int) -> data.Batch:
    """`count` attempts at countdown, each with its grade behind the end token."""
    prompts = []
    responses = []
    for question, trace, last, grade, stranger in countdown.graded_attempts(count, seed):
        prompt = data.prompt_ids(tokenizer, question)
        attempt = data.response_ids(tokenizer, data.response_text(trace, last))
        grade = [tokenizer.convert_tokens_to_ids(grade)]
        # Of a stranger's attempt the grade alone is learnt: the base shall know what a careless
        # trace looks like, and not write any.
        prompts.append(prompt + attempt if stranger else prompt)
        responses.append(grade if stranger else attempt + grade)
    return data.make_batch(prompts, responses)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=data.EMBEDDED, default="words")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=4500, help="default 4500")
    parser.add_argument("--width", type=int, default=64, help="default 64")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    # Its tokens ship with the base: a tag, a word with its spaces, a digit, an operator, a newline.
    tokenizer = load_tokenizer(str(Path(__file__).parent / f"{args.task}-base"))
    config = Qwen2Config(
        # the same code path as Qwen2.5-0.5B, tied embeddings too
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    make_corpus = {"words": pupil_corpus, "countdown": graded_corpus}[args.task]
    corpus = make_corpus(tokenizer, args.steps * BATCH, SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=args.steps, pct_start=0.05
    )
    for step in tqdm(range(args.steps)):
        # every trace is read once, and only its response is learnt
        batch = corpus[step * BATCH : (step + 1) * BATCH]
        targets = batch.tokens.masked_fill(batch.response_mask == 0, -100)[:, 1:]
        logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
        # [B, T-1, V] against [B, T-1]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
