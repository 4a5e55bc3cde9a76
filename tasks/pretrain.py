"""Make the small base models that ship here: what a pretrained language model is to GSM8K, for `words` and `countdown`.

A Qwen2 of 3 layers and width 64, trained from random weights; nothing is downloaded. For words it reads traces by the
*pupil* of tasks/words.py, who has misconceptions and slips: the base can reason, but is confidently wrong, as real models
are. For countdown it reads graded attempts (tasks/countdown.py): it can judge, and cannot plan. Each 10 minutes on 2 cores:

    python -m tasks.pretrain --task words --out tasks/words-base
    python -m tasks.pretrain --task countdown --steps 3500 --out tasks/countdown-base
"""

import argparse
import random
from dataclasses import asdict

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import data
from tasks import countdown, words
from tasks.common import split_of

# A tag, a word with its spaces, a digit, an operator or a newline. Joined they give the text back: what is scored was sampled.
PIECE = r"</?think>\n?|</?answer>| ?[A-Za-z]+ ?|\d|[.?] ?|[-+*/=]|>|\n"
END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
DEFAULTS = {"steps": 4500, "batch": 128, "lr": 3e-3, "width": 64, "layers": 3, "seed": 0} | asdict(words.Pupil())


def build_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose vocabulary is every piece that the problems, pupils and perturbations can hold."""
    split, rng = pre_tokenizers.Split(Regex(PIECE), behavior="isolated"), random.Random("vocabulary")
    pieces = {*"0123456789+-*/=\n", *(("right", "wrong") if task == "countdown" else ())}
    for number in range(5000):
        if task == "words":
            question = words.make_problem(rng, steps=1 + number % 4).question
        else:
            question = countdown.question_of(*countdown.make_problem(rng))
        text = question + "\n" + data.response_text("", "0")
        pieces.update(piece for piece, _ in split.pre_tokenize_str(text))
    vocabulary = {piece: i for i, piece in enumerate([END, PAD, UNKNOWN] + sorted(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN,
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def pupil_corpus(tokenizer, count: int, seed: int, pupil: words.Pupil) -> data.Batch:
    """`count` traces by the pupil, on problems of 2 to 4 steps from the train split."""
    rng, corpus = random.Random(f"pupil {seed}"), []
    while len(corpus) < count:
        problem = words.make_problem(rng, steps=rng.choice((2, 3, 3, 4)))
        if split_of(problem.question) == "train":
            corpus.append(words.solve(problem, pupil, rng))
    return data.demonstration_batch(data.tokenize(tokenizer, corpus))


def graded_corpus(tokenizer, count: int, seed: int) -> data.Batch:
    """`count` attempts at countdown, each with its grade behind the end token. Of a stranger's the grade alone is learnt:
    the base shall know what a careless trace looks like, and not write any."""
    prompts, responses = [], []
    for question, trace, last, grade, stranger in countdown.graded_attempts(count, seed):
        attempt = data.response_ids(tokenizer, data.response_text(trace, last))
        prompts.append(data.prompt_ids(tokenizer, question) + attempt * stranger)
        responses.append(attempt * (not stranger) + [tokenizer.convert_tokens_to_ids(grade)])
    return data.make_batch(prompts, responses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=data.EMBEDDED, default="words")
    parser.add_argument("--out", required=True, help="the folder to write")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.task)
    model = Qwen2ForCausalLM(Qwen2Config(  # the same code path as Qwen2.5-0.5B, tied embeddings too
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None))  # fmt: skip
    how, pupil = (tokenizer, args.steps * args.batch, args.seed), words.Pupil(args.groups, args.borrow, args.slip)
    corpus = pupil_corpus(*how, pupil) if args.task == "words" else graded_corpus(*how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    for step in (bar := tqdm(range(args.steps))):
        batch = corpus[step * args.batch : (step + 1) * args.batch]  # every trace is read once
        logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits[:, :-1]  # [B, T-1, V]
        targets = batch.tokens[:, 1:].masked_fill(batch.response_mask[:, 1:] == 0, -100)  # only the response
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
