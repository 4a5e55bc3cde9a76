"""A lecture (train.py --explain) shows what training does: the same stages, numbers and weights."""

import re
from pathlib import Path

import pytest
import torch

import train
from engine.settings import Settings, parse_settings
from show import explain

SMALL = (
    "--explain --demonstrations 16 --extra-questions 4 --questions 4 --group 4 "
    "--rollouts-per-expert 2 --warm-up 3 --device cpu"
).split()
VARIANTS = {
    "default": "",
    "discounted": "--policy-loss reinforce --gamma 0.9",
    "head": "--reward head --policy-loss ppo --gamma 0.9",
    "interval": "--reward head --policy-loss ppo --granularity interval --gamma 0.9",
    "segments": "--policy-loss ppo --granularity interval --gamma 0.5",
    "gail": "--logit gail --policy-loss ppo",
    "adapters": "--lora-rank 4 --kl-coef 0.01 --policy-loss ppo",
    "frozen": "--reward-lr 0 --kl-coef 0.01 --reward-clip 2 --policy-loss reinforce",
}


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lecture(flags: str = "") -> explain.Lecture:
    return train.Run(parse_settings([*SMALL, *flags.split()]), device="cpu").make_loop(
        explain.Lecture
    )


def tables(printed: str) -> list[dict[int, dict[str, float | None]]]:
    """{t: {column: value}} of every table of tokens that was printed."""
    parsed = []
    for line in printed.splitlines():
        cells = re.split(r"  +", line.strip())
        if cells[:2] == ["t", "token"]:
            names = cells[2:]
            parsed.append({})
        elif (
            parsed and re.match(r" *\d+ +\S+ +[-.\d]", line) and len(line.split()) == len(names) + 2
        ):
            t, _, *values = line.split()
            numbers = [None if value == "." else float(value) for value in values]
            parsed[-1][int(t)] = dict(zip(names, numbers))
    return parsed


def check_agreement(s: Settings, printed: str) -> None:
    """In every table the logit is f, or f - log pi, D its sigmoid, r_t = f - alpha log pi, and
    returns add up."""
    checked = 0
    airl = s.logit == "airl"
    for rows in tables(printed):
        for t, cell in rows.items():
            if cell["f"] is None:
                continue
            log_pi = cell["log pi"] if airl else 0.0
            assert cell["logit"] == pytest.approx(cell["f"] - log_pi, abs=2e-4)
            if "D" in cell:
                d = torch.tensor(cell["logit"]).sigmoid().item()
                assert cell["D"] == pytest.approx(d, abs=1e-4)
            else:
                expected = cell["f"] - s.entropy_coef * log_pi
                if s.reward_clip:
                    expected = max(-s.reward_clip, min(s.reward_clip, expected))
                assert cell["r_t"] == pytest.approx(expected, abs=2e-4)
                following = rows.get(t + 1, {"return": 0.0})["return"]
                assert cell["return"] == pytest.approx(cell["r_t"] + s.gamma * following, abs=3e-4)
            checked += 1
    assert checked >= 9  # an expert's trace and a sample, and the sample again


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_a_lecture_is_an_iteration(flags, capsys):
    """It leaves the weights, the random numbers and the replay that a silent iteration would have
    left, and what it has said in between adds up."""
    told = lecture(flags)
    told.give()
    run = train.Run(parse_settings([*SMALL, *flags.split()]), device="cpu")
    silent = run.make_loop(reward_lr=told.settings.reward_lr)
    for _ in range(min(explain.WARM_UP, silent.settings.warm_up)):
        silent.warm_up()
    metrics = silent.step()
    for a, b in (
        (told.policy_model, silent.policy_model),
        (told.discriminator.reward_model, silent.discriminator.reward_model),
    ):
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert told.rng.random() == silent.rng.random() and told.replay.past == silent.replay.past
    assert torch.equal(told.generator.get_state(), silent.generator.get_state())
    printed = capsys.readouterr().out
    in_one_line = " ".join(printed.split())
    assert f"gradient norm {metrics['policy']['grad_norm']:.3f}" in in_one_line
    assert f"mean r_t {metrics['reward']['mean']:.4f}" in in_one_line
    assert f"D of experts {metrics['discriminator']['d_expert']:.4f}" in in_one_line
    check_agreement(told.settings, printed)
    assert not Path("runs").exists()
    assert printed.isascii() and max(map(len, printed.splitlines())) <= explain.WIDTH


@pytest.mark.parametrize("flags", ["", VARIANTS["head"]], ids=["likelihood", "head"])
def test_the_printed_numbers_are_those_of_the_models(flags, capsys, monkeypatch):
    """log pi and f of the followed sample, computed anew from plain forward passes."""
    told = lecture(flags)
    seen = {}
    plain_update = explain.Lecture.update_discriminator

    def update_discriminator(examples, rollout, group):
        if told.speaking:
            one = rollout.batch[[told.row]]
            seen["batch"] = one
            tokens = one.tokens[0, 1:, None]
            with torch.no_grad():
                logits = told.policy_model(input_ids=one.tokens).logits[0].log_softmax(-1)
                output = told.reward_model.model(input_ids=one.tokens).logits[0]
            # token t is chosen at t - 1; a head reads it at t
            seen["log pi"] = logits[:-1].gather(1, tokens).squeeze(1)
            seen["f"] = output[1:].squeeze(1)
            if not flags:
                seen["f"] = output[:-1].log_softmax(-1).gather(1, tokens).squeeze(1)
        return plain_update(told, examples, rollout, group)

    told.update_discriminator = update_discriminator
    told.give()
    printed = capsys.readouterr().out
    rows = tables(printed)[1]  # the second table: the policy's sample, before the update
    first = int(seen["batch"].prompt_lengths)
    last = int(seen["batch"].lengths)
    assert sorted(rows) == list(range(first, last))  # the end token included
    for t, cell in rows.items():
        for name in ("log pi", "f"):
            assert cell[name] == pytest.approx(float(seen[name][t - 1]), abs=1e-4)
    assert f"0 x {first} (prompt), 1 x {last - first} (response" in printed


def test_the_wrong_token_is_the_lowest_of_the_response(capsys):
    """Where every reward is above 0, the lowest of the row would be the 0 of a prompt token."""
    told = lecture()
    plain = explain.Lecture.rewards

    def rewards(rollout):
        rewards, hidden, metrics = plain(told, rollout)
        told.batch = rollout.batch
        return rewards + 100 * rollout.batch.response_mask, hidden, metrics

    told.rewards = rewards
    told.give()
    column = int(re.search(r"Token (\d+), ", capsys.readouterr().out)[1])
    assert told.batch.response_mask[told.row, column] == 1


def test_the_update_is_seen_to_move_d(capsys):
    """D of the expert's trace rises more than the sample's; at a rate near 0 neither moves."""

    def moves(flags):
        lecture(flags).give()
        expert, sample = tables(capsys.readouterr().out)[:2]
        return [
            sum(cell["D after"] - cell["D"] for cell in rows.values()) / len(rows)
            for rows in (expert, sample)
        ]

    expert, sample = moves("--reward-lr 1e-3")
    assert expert > sample
    assert moves("--reward-lr 1e-12") == [0, 0]


def test_one_command_and_nothing_written(capsys):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/results.json").write_text("{}")
    # the shipped base with all its defaults; a run of that name is in nobody's way
    assert train.main(["--explain", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    stages = ("THE QUESTION", "1. ROLLOUT", "2. DISC", "3. REWARD", "4. POLICY", "WHAT TRAINING")
    places = [printed.index(stage) for stage in stages]
    assert places == sorted(places)
    assert [p.name for p in Path("runs/demo").iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "flags", ["--method sft", "--method grpo", "--start sft", "--reward random"]
)
def test_what_is_no_iteration_of_irl_is_refused(flags, capsys):
    assert train.main([*SMALL, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert "--explain" in error and error.count("\n") == 1


def test_other_data_and_long_traces(capsys):
    """A file of one's own, whose traces are longer than a table."""
    line = '{"question": "Ava has %d pens. How many pens?", "trace": "%s", "answer": "3"}\n'
    Path("mine.jsonl").write_text("".join(line % (i, "1+1=2\\n" * 15) for i in range(60)))
    flags = "--data mine.jsonl --extra-questions 0 --eval-questions 2"
    assert train.main([*SMALL, *flags.split()]) == 0
    assert re.search(r"\n *\.\. +\.\.\. +\.\.\. ", capsys.readouterr().out)


def test_tokens_and_lines_are_one_printable_word(shipped, capsys):
    tokenizer = shipped[1]
    for token in range(len(tokenizer)):
        word = explain.piece(tokenizer, token)
        assert word.isascii() and word.isprintable() and " " not in word and 0 < len(word) <= 13
    assert explain.piece(tokenizer, tokenizer.eos_token_id).startswith("<|")
    explain.say("\n  a\nb")
    assert capsys.readouterr().out == "\n  a | b\n"
