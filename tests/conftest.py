"""Fixtures that several test files share. No test needs a network."""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import data
import irl
import policy
from engine import loading
from engine.loading import BASE
from engine.settings import Settings, parse_settings

collect_ignore = ["runner.py"]  # a program that test_survive.py starts, no test
SHARED = Path(__file__).parents[2] / "shared"  # real data beside the project, where there is any


LINES = pytest.StashKey[list]()


def report_line(config, text: str) -> None:
    """Have pytest print this line after the tests: for figures that a reader of the log should see,
    such as counts.
    """
    config.stash.setdefault(LINES, []).append(text)


def pytest_terminal_summary(terminalreporter):
    for line in terminalreporter.config.stash.get(LINES, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shipped():
    """(base model, tokenizer) that ship with the repository. Tests that train take a copy."""
    return loading.load_policy(BASE)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The real Qwen2.5 tokenizer."""
    folder = SHARED / "qwen2-tokenizer"
    if not folder.exists():
        pytest.skip(
            "the real Qwen2.5 tokenizer is not beside this checkout (../shared/qwen2-tokenizer)"
        )
    return loading.PreTrainedTokenizerFast.from_pretrained(folder)


def examples_of(tokenizer, task, split, count, seed=0, **problems):
    """Tokenised examples of an embedded task."""
    return data.tokenize(tokenizer, data.load_examples(task, split, count, seed, **problems))


def demonstrations(tokenizer, examples, device="cpu"):
    """Examples as a batch, whether they have been tokenised or not."""
    return data.demonstration_batch(data.tokenize(tokenizer, examples), device)


def sft_loss(model, batch):
    """-log pi of the response tokens, summed: SFT's loss before it is divided by their number."""
    return -policy.token_logprobs(model, batch).sum()


def discriminator_update(
    discriminator,
    optimizer,
    policy_model,
    comparison,
    label_smoothing=0.1,
    reward_nll=0.0,
    micro_batch=64,
    temperature=1.0,
    micro_tokens=0,
    discriminator_coef=1.0,
):
    """irl.IRL.discriminator_step on a comparison, without the rest of a loop."""
    loop = irl.IRL.__new__(irl.IRL)
    loop.settings = SimpleNamespace(
        logit=discriminator.logit,
        label_smoothing=label_smoothing,
        reward_nll=reward_nll,
        micro_batch=micro_batch,
        temperature=temperature,
        micro_tokens=micro_tokens,
        discriminator_coef=discriminator_coef,
    )
    loop.discriminator = discriminator
    loop.reward_model = discriminator.reward_model
    loop.reward_optimizer = optimizer
    loop.policy_model = policy_model
    return loop.discriminator_step(comparison)


def all_logprobs(model, batch):
    """log pi(a|s_t) of every action at each response token, [N, V], by a forward pass of its own:
    no shared prompts, no
    tiles. What the fast functions are compared with."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask).logits
    return logits[:, :-1][batch.response_mask[:, 1:].bool()].log_softmax(-1)


# Of a tiny decision process: end (0) or go on (1); then one of two last tokens
TRACES = ((0,), (1, 0), (1, 1))


def all_groups(log_pi, rewards, group: int):
    """Every group of traces that a policy log_pi [2, 2] (by step and action) can write in the
    process with the rewards
    [2, 2]: (its probability, mask [G, 2], rewards [G, 2], log pi of the chosen tokens [G, 2]).
    For exact expectations."""
    for traces in itertools.product(TRACES, repeat=group):
        mask = torch.tensor([[1.0, float(len(trace) == 2)] for trace in traces])
        chosen = torch.tensor([[trace[0], trace[-1]] for trace in traces])
        steps = torch.arange(2).expand_as(chosen)
        logprobs = log_pi[steps, chosen] * mask
        yield logprobs.detach().sum().exp(), mask, rewards[steps, chosen] * mask, logprobs


def true_gradient(theta, rewards, gamma=1.0):
    """Of E[r_0 + gamma r_1] under the policy softmax(theta), [2, 2], by theta[0]; by theta[1] of
    E[r_1], what is left when
    it is reached: as nearly everybody does, a step's own return is not discounted by the steps
    before it."""

    def gradient(gamma):
        groups = all_groups(theta.log_softmax(-1), rewards, 1)
        value = sum(
            logprobs.sum().exp() * (r[0, 0] + gamma * r[0, 1]) for _, _, r, logprobs in groups
        )
        return torch.autograd.grad(value, theta)[0]

    return torch.stack([gradient(gamma)[0], gradient(1.0)[1]])


def changed(settings, **changes):
    """Settings with other values; those that have no flag (temperature, ppo_clip, ..), too."""
    fields = Settings.__dataclass_fields__
    changed = replace(settings, **{name: x for name, x in changes.items() if name in fields})
    constants = {name: x for name, x in changes.items() if name not in fields}
    # They are attributes of the class: these settings get a class of their own.
    changed.__class__ = type("Changed", (Settings,), constants)
    return changed


@pytest.fixture
def settings():
    """Settings small enough for a test: change with `changed`."""
    flags = "--demonstrations 16 --extra-questions 0 --questions 4 --group 4 --eval-questions 8 "
    flags += "--max-steps 2 --grpo-steps 2 --sft-steps 4 --warm-up 2"
    return parse_settings(flags.split())
