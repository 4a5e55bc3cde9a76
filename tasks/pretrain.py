"""Make the small base models that ship here: what a pretrained language model is to GSM8K, for `words` and `countdown`.

A Qwen2 of 3 layers and width 64, trained from random weights; nothing is downloaded. For words it reads traces by the
*pupil* of data.py, who has misconceptions and slips: the base can reason, but is confidently wrong, as real models are,
greedy decoding is worse than sampling, and its own log-probability cannot tell right from wrong. For countdown it reads
graded attempts (tasks/countdown.py): it can judge, and cannot plan.

    python pretrain.py --task words --out base                            (about 10 minutes on 2 cores; committed)
    python pretrain.py --task countdown --steps 3500 --out tasks/countdown-base        (the same)

This file is apart from train.py because it stands for the work of somebody else: whoever pretrained Qwen.
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import data
from tasks import countdown, words
from tasks.common import split_of

# A piece is a tag, a word with its spaces, one digit, one operator or one newline. Pieces joined give the text back
# exactly, so that what is scored is what was sampled.
PIECE = r"</?think>\n?|</?answer>| ?[A-Za-z]+ ?|\d|[.?] ?|[-+*/=]|>|\n"
END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
GRADES = ("right", "wrong")


def build_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is every piece that the problems, pupils and perturbations can hold."""
    split = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    rng = random.Random("vocabulary")
    pieces = set("0123456789+-*/=\n") | (set(GRADES) if task == "countdown" else set())
    for number in range(5000):
        if task == "words":
            example = words.solve(words.make_problem(rng, steps=1 + number % 4))
        else:
            example = data.Example(countdown.question_of(*countdown.make_problem(rng)), "", "0")
        text = example.question + "\n" + data.response_text(example.trace, example.answer)
        pieces.update(piece for piece, _ in split.pre_tokenize_str(text))
    vocabulary = {piece: i for i, piece in enumerate([END, PAD, UNKNOWN] + sorted(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def build_model(vocabulary: int, end_token: int, width: int, layers: int, context: int = 256) -> Qwen2ForCausalLM:
    """Qwen2.5's architecture, small: the same code path as the 0.5B model, tied embeddings too."""
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True,
        eos_token_id=end_token, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def pupil_corpus(count: int, seed: int, pupil: words.Pupil) -> list[data.Example]:
    """`count` traces by the pupil, on problems of 2 to 4 steps from the train split."""
    rng = random.Random(f"pupil {seed}")
    corpus = []
    while len(corpus) < count:
        problem = words.make_problem(rng, steps=rng.choice((2, 3, 3, 4)))
        if split_of(problem.question) == "train":
            corpus.append(words.solve(problem, pupil, rng))
    return corpus


def graded_corpus(tokenizer, count: int, seed: int) -> data.Batch:
    """`count` attempts at countdown, each with its grade behind the end token. Of a stranger's the grade alone is learnt:
    the base shall know what a careless trace looks like, and not write any."""
    grade = dict(zip(GRADES, tokenizer.convert_tokens_to_ids(list(GRADES))))
    prompts, responses = [], []
    for question, trace, last, graded, stranger in countdown.graded_attempts(count, seed):
        prompt = data.prompt_ids(tokenizer, question)
        attempt = data.response_ids(tokenizer, data.response_text(trace, last))
        prompts.append(prompt + attempt * stranger)
        responses.append(attempt * (not stranger) + [grade[graded]])
    return data.make_batch(prompts, responses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=data.EMBEDDED, default="words")
    parser.add_argument("--out", default="base")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--groups", type=float, default=words.Pupil.groups, help="see words.Pupil")
    parser.add_argument("--borrow", type=float, default=words.Pupil.borrow)
    parser.add_argument("--slip", type=float, default=words.Pupil.slip)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.task)
    model = build_model(len(tokenizer), tokenizer.eos_token_id, args.width, args.layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    count, pupil = args.steps * args.batch, words.Pupil(args.groups, args.borrow, args.slip)
    if args.task == "words":
        corpus = data.demonstration_batch(tokenizer, pupil_corpus(count, args.seed, pupil))
    else:
        corpus = graded_corpus(tokenizer, count, args.seed)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    bar = tqdm(range(args.steps))
    for step in bar:
        batch = corpus[step * args.batch : (step + 1) * args.batch]  # every trace is read once
        logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits[:, :-1]  # [B, T-1, V]
        targets = batch.tokens[:, 1:].masked_fill(batch.response_mask[:, 1:] == 0, -100)  # only the response
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}/", sum(f.stat().st_size for f in Path(args.out).iterdir()) // 1000, "kB")


if __name__ == "__main__":
    main()
