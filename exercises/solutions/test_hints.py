"""Typical wrong answers, and the hint that each must get. Runs with `pytest exercises --solutions`.

A wrong answer is a solution in which one piece of the source is replaced. The exercise's own tests
are then run on it, and the first failure has to be a hint that holds the given words.
"""

import importlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# exercise: [(what the solution says, what a student wrote instead, words of the hint)]
WRONG = {
    "1_masks": [
        ("(t < lengths[:, None])", "(tokens != 0)", "padding by its value. The end token"),
        (
            "((t >= prompt_lengths[:, None]) & (t < lengths[:, None]))",
            "(tokens != 0)",
            "and the question counts",
        ),
        ("(t >= prompt_lengths[:, None]) &", "(t >= 0) &", "the question counts as well"),
        (
            "t < lengths[:, None]",
            "t < lengths[:, None] - 1",
            "last token of every trace is missing",
        ),
        ("t < lengths[:, None]", "t <= lengths[:, None]", "one column too many at the end"),
        ("t >= prompt", "t > prompt", "first response token is missing"),
        (").float()", ")", "turn them into floats"),
        ("masked_fill(", "masked_fill_(", "written into `tokens`"),
        ("tokens.masked_fill(mask == 0, -100)", "tokens * mask.long()", "0, which is a real token"),
        ("mask == 0", "tokens == 0", "no typical mistake"),
        ("mask == 0, -100)", "mask == 0, -100).float()", "whole numbers"),
    ],
    "2_logprobs": [
        ("chosen, (1, 0)", "chosen, (0, 1)", "one column too early"),
        ("logits[:, :-1].log_softmax(-1)", "logits[:, 1:].log_softmax(-1)", "shifted by one"),
        (".log_softmax(-1)", ".softmax(-1)", "these are probabilities"),
        (".log_softmax(-1)", "", "these are logits"),
        (".log_softmax(-1)", ".log_softmax(1)", "normalise over time"),
        (" * mask", "", "the mask is missing"),
    ],
    "3_returns": [
        ("range(rewards.shape[1] - 1, -1, -1)", "range(rewards.shape[1])", "sum from the start"),
        (" + gamma * running", " + running", "gamma is not used"),
        (" + gamma * running", "", "nothing of the future"),
        (
            "(rewards[:, t] + gamma * running)",
            "gamma * (rewards[:, t] + running)",
            "r_t is discounted too",
        ),
        (" * mask[:, t]", "", "outside the response count"),
        (
            "returns = torch.zeros_like(rewards)",
            "powers = gamma ** torch.arange(rewards.shape[1])\n"
            "    return (rewards * mask * powers).flip(1).cumsum(1).flip(1) / powers * mask",
            "divide by gamma^t",
        ),
        ("= torch.zeros_like(rewards)\n", "= rewards\n", "written into `rewards`"),
    ],
    "4_baseline": [
        (
            "alive = mask.view(shape)\n",
            "alive = mask.view(group, -1, returns.shape[1])\n"
            "    grouped = (returns * mask).view(group, -1, returns.shape[1])\n"
            "    k = alive.sum(0) - alive\n"
            "    return ((grouped.sum(0) - grouped) / k.clamp(min=1)).view_as(returns) * mask\n",
            "groups are mixed up",
        ),
        ("(-1, group,", "(1, -1,", "over all questions"),
        (
            "how_many = alive.sum(1, keepdim=True) - alive",
            "how_many = alive * 0 + group - 1",
            "count as zeros. Divide",
        ),
        (
            "others /",
            "torch.where(how_many > 0, others, grouped) /",
            "gets its own return, which depends on",
        ),
        (".clamp(min=1)", "", "0/0 is nan"),
        (
            "others = grouped.sum(1, keepdim=True) - grouped\n"
            "    how_many = alive.sum(1, keepdim=True) - alive",
            "others = grouped.sum(1, True).expand_as(grouped)\n"
            "    how_many = alive.sum(1, True).expand_as(alive)",
            "the row itself is in its own mean. Then",
        ),
        (
            "(others / how_many.clamp(min=1)).view_as(returns)",
            "(returns - (others / how_many.clamp(min=1)).view_as(returns))",
            "these are advantages",
        ),
    ],
    "5_discriminator": [
        ("scores - policy_logprobs", "scores", "GAIL's logit"),
        ("scores - policy_logprobs", "scores + policy_logprobs", "the sign of log pi"),
        (
            "scores - policy_logprobs",
            "(scores - policy_logprobs).sigmoid()",
            "this is D, a probability",
        ),
        ("if is_expert", "if not is_expert", "labels are swapped"),
        (
            "1 - smoothing / 2 if is_expert else smoothing / 2",
            "float(is_expert)",
            "no label smoothing",
        ),
        (
            "1 - smoothing / 2 if is_expert else smoothing / 2",
            "1 - smoothing if is_expert else smoothing",
            "too much",
        ),
        ("logsigmoid(-logits))", "logsigmoid(-logits)).mean()", "one number came back"),
        (
            "(1 - y) * logsigmoid(-logits)",
            "(1 - y) * (1 - logits.sigmoid()).log()",
            "nan or inf at a logit of 200",
        ),
        (
            "mask.sum(1, keepdim=True).clamp(min=1) / len(mask)",
            "mask.sum()",
            "every token weighs the same",
        ),
        (" / len(mask)", "", "divide by the number of traces too"),
        (".clamp(min=1)", "", "0/0 is nan"),
    ],
    "6_ppo": [
        ("return -torch", "return torch", "this is the objective"),
        ("torch.min", "torch.max", "the maximum of the two"),
        ("logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs", "upside down"),
        (").exp()", ")", "missing its exp"),
        (
            "torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
            "(ratio.clamp(1 - clip, 1 + clip) * advantages)",
            "the clip alone",
        ),
        (
            "torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
            "(torch.min(ratio, ratio.clamp(1 - clip, 1 + clip)) * advantages)",
            "min is over the ratios",
        ),
        ("ratio.clamp(1 - clip, 1 + clip)", "ratio", "nothing is clipped"),
        ("(logprobs -", "(logprobs.detach() -", "do not detach `logprobs`"),
        ("old_logprobs.detach()", "old_logprobs", "flows into `old_logprobs`"),
        ("advantages.detach()", "advantages", "flows into `advantages`"),
    ],
    "7_expected": [
        (".sum(-1)", ".sum(0)", "summed over the batch"),
        ("policy_logprobs.exp() *", "1.0 *", "weighs 1"),
        ("- alpha * policy_logprobs", "+ alpha * policy_logprobs", "sign of the entropy term"),
        (" - alpha * policy_logprobs", "", "entropy term is missing"),
        ("alpha * policy_logprobs)", "alpha * policy_logprobs.detach())", "misses a part"),
        ("policy_logprobs.exp() *", "policy_logprobs.detach().exp() *", "misses the weights"),
        ("all_scores / alpha", "all_scores * alpha", "alpha multiplies f"),
        (
            "(all_scores / alpha).log_softmax",
            "(all_scores / alpha).softmax",
            "these are probabilities",
        ),
        ("(all_scores / alpha).log_softmax(-1)", "all_scores / alpha", "not normalised"),
    ],
    "8_rerank": [
        (
            "1 - math.comb(n - c, k) / math.comb(n, k)",
            "1 - (1 - c / n) ** k",
            "*with* putting back",
        ),
        ("1 - math.comb(n - c, k)", "math.comb(n - c, k)", "all are wrong"),
        ("1 - math.comb(n - c, k) / math.comb(n, k)", "c / n", "pass@1"),
        (", descending=True", "", "*lowest* score"),
        (
            "correct.gather(1, scores.argsort(dim=1, descending=True))",
            "correct",
            "not sorted along",
        ),
        ("(in_order * torch.tensor(chance)).sum(1)", "in_order[:, 0]", "among all N candidates"),
        ("(in_order * torch.tensor(chance)).sum(1)", "in_order[:, :n].max(1).values", "success@n"),
    ],
    "9_bug": [
        ("alpha * chosen.detach()", "alpha * chosen", "too flat"),
        ("alpha * chosen.detach()", "alpha / 2 * chosen", "bent the reward"),
        (" - alpha * chosen.detach()", "", "always says the same"),
        (
            "alpha * chosen.detach()  # [Q, count]\n",
            "alpha * chosen\n        chosen = chosen.detach()\n",
            "uniform",
        ),
        ("logits = f - log_pi.detach()", "logits = 1 * f", "Stage 2 was right"),
    ],
}


CASES = [
    pytest.param(e, *case, id=f"{e}: {case[2]}") for e, cases in WRONG.items() for case in cases
]


@pytest.mark.parametrize("exercise, right, wrong, words", CASES)
def test_a_wrong_answer_gets_its_hint(exercise, right, wrong, words, monkeypatch):
    source = (HERE / f"ex{exercise}.py").read_text(encoding="utf-8")
    assert right in source and words
    answer: dict = {"__name__": "answer"}
    exec(source.replace(right, wrong), answer)
    tests = importlib.import_module(f"test_{exercise}")
    for name, value in answer.items():
        if getattr(value, "__module__", None) == "answer":  # defined there, not imported
            monkeypatch.setattr(tests, name, value)
    with pytest.raises(pytest.fail.Exception) as failure:
        for name, test in list(vars(tests).items()):
            if name.startswith("test_"):
                test()
    assert words in str(failure.value)
