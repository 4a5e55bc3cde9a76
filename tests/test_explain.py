"""A lecture (train.py --explain) shows what training does: the same stages, the same numbers, the same weights after."""

import re
from pathlib import Path

import pytest
import torch

import train
from engine.settings import Settings, parse_settings
from show import explain

SMALL = ("--explain --demonstrations 16 --extra-questions 4 --questions 4 --group 4 --rollouts-per-expert 2 --warm-up 3 "
         "--device cpu").split()  # fmt: skip
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
    return train.Run(parse_settings([*SMALL, *flags.split()]), device="cpu").make_loop(explain.Lecture)


def tables(printed: str) -> list[tuple[list[str], dict[int, list[float | None]]]]:
    """(names of the columns, {t: values}) of every table of tokens that was printed."""
    found = []
    for line in printed.splitlines():
        if re.match(r"\s+t  token ", line):
            found.append(([line[start : start + 11].strip() for start in range(22, len(line), 11)], {}))
        row = re.match(r"  ([ \d]{4})  (\S+) +((?:-?\d+\.\d{4}|\.| )+)$", line)
        if row and found:
            found[-1][1][int(row[1])] = [None if x == "." else float(x) for x in row[3].split()]
    return found


def check_agreement(s: Settings, printed: str) -> None:
    """In every table: f - log pi is the difference of its columns, D its sigmoid, r_t = f - alpha log pi, and returns
    add up."""
    checked = 0
    for names, rows in tables(printed):
        for t, values in rows.items():
            assert len(values) == len(names), (t, names, values)
            cell = dict(zip(names, values))
            if cell.get("D") is None:
                continue
            logit = cell["f - log pi"] if s.logit == "airl" else cell.get("logit", cell["f"])
            assert logit == pytest.approx(cell["f"] - (cell["log pi"] if s.logit == "airl" else 0), abs=2e-4)
            assert cell["D"] == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=1e-4)
            if "r_t" in cell:
                expected = cell["f"] - (s.entropy_coef * cell["log pi"] if s.logit == "airl" else 0)
                expected = max(-s.reward_clip, min(s.reward_clip, expected)) if s.reward_clip else expected
                assert cell["r_t"] == pytest.approx(expected, abs=2e-4)
                following = rows.get(t + 1, [0.0] * len(names))[names.index("return")]
                assert cell["return"] == pytest.approx(cell["r_t"] + s.gamma * following, abs=3e-4)
            checked += 1
    assert checked >= 9  # an expert's trace and a sample, and the sample again


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_a_lecture_is_an_iteration(flags, capsys):
    """It leaves the weights, the random numbers and the replay that a silent iteration would have left, and what it
    has said in between adds up."""
    told = lecture(flags)
    told.give()
    silent = train.Run(parse_settings([*SMALL, *flags.split()]), device="cpu").make_loop(reward_lr=told.settings.reward_lr)
    for _ in range(min(explain.WARM_UP, silent.settings.warm_up)):
        silent.warm_up()
    metrics = silent.step()
    for a, b in ((told.policy_model, silent.policy_model),
                 (told.discriminator.reward_model, silent.discriminator.reward_model)):  # fmt: skip
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert told.rng.random() == silent.rng.random() and told.replay.past == silent.replay.past
    assert torch.equal(told.generator.get_state(), silent.generator.get_state())
    printed = capsys.readouterr().out
    assert f"gradient norm {metrics['policy']['grad_norm']:.3f}" in printed
    assert f"mean r_t {metrics['reward']['mean']:.4f}" in printed
    check_agreement(told.settings, printed)
    assert not Path("runs").exists()
    assert printed.isascii() and max(map(len, printed.splitlines())) <= explain.WIDTH


@pytest.mark.parametrize("flags", ["", VARIANTS["head"]], ids=["likelihood", "head"])
def test_the_printed_numbers_are_those_of_the_models(flags, capsys):
    """log pi and f of the followed sample, computed anew by hand from plain forward passes of the models."""
    told = lecture(flags)
    seen = {}

    def rollout(questions, group):
        result = explain.Lecture.rollout(told, questions, group)
        if told.speaking:
            seen["batch"], seen["row"] = result[0].batch, told.row
            one = seen["batch"][[told.row]]
            with torch.no_grad():
                logits = told.policy_model(input_ids=one.tokens).logits[0].log_softmax(-1)
                seen["log pi"] = logits[:-1].gather(1, one.tokens[0, 1:, None]).squeeze(1)  # of token t at t - 1
                output = told.discriminator.reward_model.model(input_ids=one.tokens).logits[0]
                scores = output[:-1].log_softmax(-1).gather(1, one.tokens[0, 1:, None]) if not flags else output[1:]
                seen["f"] = scores.squeeze(1)
        return result

    told.rollout = rollout
    told.give()
    printed = capsys.readouterr().out
    names, rows = tables(printed)[1]  # the second table: the policy's sample, before the update
    first, last = int(seen["batch"].prompt_lengths[seen["row"]]), int(seen["batch"].lengths[seen["row"]])
    assert sorted(rows) == list(range(first, last))  # every response token, the end token included
    for t, values in rows.items():
        for name in ("log pi", "f"):
            assert dict(zip(names, values))[name] == pytest.approx(float(seen[name][t - 1]), abs=1e-4)
    for name, tensor in (("tokens", seen["batch"].tokens), ("response_mask", seen["batch"].response_mask),
                         ("prompt_lengths", seen["batch"].prompt_lengths)):  # fmt: skip
        assert re.search(rf"{name} +{re.escape(str(list(tensor.shape)))} ", printed)
    mask = seen["batch"].response_mask[seen["row"]]
    padding = len(mask) - last
    assert f"0 x {first} (prompt), 1 x {int(mask.sum())} (response), 0 x {padding} (padding)" in printed


def test_the_lowest_token_is_one_of_the_response(capsys):
    """Where every reward is above 0, the lowest of the row would be the 0 of a prompt token."""
    told, plain = lecture(), explain.Lecture.rewards

    def rewards(rollout):
        rewards, hidden, metrics = plain(told, rollout)
        return rewards + 100 * rollout.batch.response_mask, hidden, metrics

    told.rewards = rewards
    told.give()
    column = int(re.search(r"The state before token (\d+),", capsys.readouterr().out)[1])
    assert told.shown.response_mask[told.row, column] == 1


def test_the_update_is_seen_to_move_d(capsys):
    """On one fixed comparison the loss falls, and D of experts and negatives part; at a rate of all but 0 they stay."""

    def before_and_after(flags):
        lecture(flags).give()
        printed = capsys.readouterr().out
        return {k: (float(a), float(b)) for k, a, b in re.findall(r"(\w+) +(-?\d\.\d{4}) -> +(-?\d\.\d{4}) ", printed)}

    moved = before_and_after("--reward-lr 1e-3")
    assert moved["loss"][1] < moved["loss"][0]
    assert moved["d_expert"][1] - moved["d_negative"][1] > moved["d_expert"][0] - moved["d_negative"][0]
    still = before_and_after("--reward-lr 1e-12")
    assert still["loss"][1] == still["loss"][0] and still["d_expert"][1] == still["d_expert"][0]
    assert before_and_after("--reward-lr 0") == before_and_after("--reward-lr 3e-4")  # stands still: the warm-up's last


def test_one_command_and_nothing_written(capsys, monkeypatch):
    assert train.main(["--explain", "--device", "cpu"]) == 0  # the shipped base with all its defaults
    printed = capsys.readouterr().out
    stages = ["THE QUESTION", "1. ROLLOUT", "2. DISCRIMINATOR", "3. REWARD", "4. POLICY", "WHAT TRAINING NEVER SAW"]
    places = [printed.index(stage) for stage in stages]
    assert places == sorted(places) and not Path("runs").exists()


def test_a_run_of_that_name_is_in_nobodys_way(capsys):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/results.json").write_text("{}")
    assert train.main(SMALL) == 0
    assert [p.name for p in Path("runs/demo").iterdir()] == ["results.json"]


@pytest.mark.parametrize("flags", ["--method sft", "--method grpo", "--start sft", "--reward random"])
def test_what_is_no_iteration_of_irl_is_refused(flags, capsys):
    assert train.main([*SMALL, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert "--explain" in error and error.count("\n") == 1


def test_other_data_and_long_traces(capsys):
    """A file of one's own, whose traces are longer than a table."""
    line = '{"question": "Ava has %d pens. How many pens?", "trace": "%s", "answer": "3"}\n'
    Path("mine.jsonl").write_text("".join(line % (i, "1+1=2\\n" * 15) for i in range(60)))
    assert train.main([*SMALL, "--data", "mine.jsonl", "--extra-questions", "0", "--eval-questions", "2"]) == 0
    assert re.search(r"\.\.\.  \d+ more", capsys.readouterr().out)


def test_tokens_and_lines_are_one_printable_word(shipped, capsys):
    tokenizer = shipped[1]
    for token in range(len(tokenizer)):
        word = explain.piece(tokenizer, token)
        assert word and word.isascii() and word.isprintable() and " " not in word and len(word) <= 13
    assert explain.piece(tokenizer, tokenizer.eos_token_id).startswith("<|")
    explain.say("\n  a\nb")
    assert capsys.readouterr().out == "\n  a | b\n"
