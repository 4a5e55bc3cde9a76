"""train.py as its users run it: whole runs in a temporary folder, and one clear line for each kind
of bad input.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import baselines
import data
import train
from engine import loading, lora, sampler
from engine.errors import UserError, exit_status
from engine.settings import Settings, parse_settings
from rerank import load_run
from show import trace as trace_of
from tasks.common import split_of

TINY = (
    "--demonstrations 16 --extra-questions 4 --questions 4 --group 4 --eval-questions 8 "
    "--max-steps 2 "
    "--grpo-steps 2 --sft-steps 3 --fair-steps 3 --warm-up 2 --device cpu"
).split()


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    """With little evaluation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "VALIDATION_QUESTIONS", 8)
    monkeypatch.setattr(train, "RERANK_CANDIDATES", 4)


def test_the_demo_writes_everything(capsys):
    assert train.main([*TINY, "--name", "demo"]) == 0
    run = Path("runs/demo")
    results = json.loads((run / "results.json").read_text())
    assert list(results["methods"]) == ["base", "sft", "sft_fair", "likelihood", "irl", "grpo"]
    for method in results["methods"].values():
        assert 0 <= method["t1_interval"][0] <= method["t1"] <= method["t1_interval"][1] <= 1
        assert (
            0
            <= method["greedy_interval"][0]
            <= method["greedy"]
            <= method["greedy_interval"][1]
            <= 1
        )
    assert 0 <= results["reward"]["auroc"] <= 1
    logprobs = {"logprob", "sft_logprob", "sft_fair_logprob"}
    assert {"random", "longest", "shortest", "majority", "reward", "oracle"} | logprobs <= set(
        results["rerank"]["4"]
    )
    assert {"reward", "chance"} | logprobs <= set(results["localise"]["natural"]["hit0"])
    assert results["settings"] == json.loads((run / "settings.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {
        "sft": 3,
        "sft_fair": 3,
        "likelihood warm-up": 2,
        "likelihood": 2,
        "warm-up": 2,
        "irl": 2,
        "grpo": 2,
    }
    assert [line["method"] for line in lines] == [
        method for method, count in steps.items() for _ in range(count)
    ]
    assert (run / "report.html").read_text().count("<svg") > 5 and json.loads(
        (run / "traces.json").read_text()
    )
    for folder in (
        "policy",
        "reward",
        "sft",
        "sft_fair",
        "likelihood",
        "grpo",
    ):  # loadable by anybody
        AutoModelForCausalLM.from_pretrained(run / folder, use_safetensors=True)
    printed = capsys.readouterr().out
    assert "\nIRL " in printed and "\nGRPO " in printed
    # and nothing is overwritten
    assert train.main([*TINY, "--name", "demo"]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--method sft --test-split validation",
        "--method irl,grpo --start sft --extra-questions 4",
        "--method irl --reward head --logit gail --policy-loss ppo --granularity sparse",
        "--method irl --granularity interval --policy-loss reinforce --kl-coef 0.01",
        "--method irl --reward-lr 0 --negatives both --epochs 2",
        "--method all --lora-rank 2 --gradient-checkpointing --micro-tokens 300 --sample-rows 20",
        "--method irl --start sft --lora-rank 2 --reward head --policy-loss ppo --weights bf16",
        "--method irl --lora-rank 2 --reward random --policy-loss ppo --gamma 0.9",
        "--method sft_fair,irl --fair-average 0 --gradient-checkpointing --micro-tokens 500",
        "--method likelihood --start sft --granularity sparse --policy-loss ppo",
        "--method all --reward head --policy-loss ppo --gamma 0.9",  # without likelihood
    ],
)
def test_other_methods_and_variants(flags):
    assert train.main([*TINY, *flags.split()]) == 0
    results = json.loads(Path("runs/demo/results.json").read_text())
    methods = parse_settings([*TINY, *flags.split()]).methods
    assert set(methods) <= set(results["methods"])
    assert "likelihood" not in results["methods"] or "reward head" not in flags
    head = any(f"--reward {kind}" in flags for kind in ("head", "random"))
    saved = {
        "policy" if method == "irl" or len(methods) == 1 else method: AutoModelForCausalLM
        for method in methods
    }
    saved |= (
        {"reward": AutoModelForTokenClassification if head else AutoModelForCausalLM}
        if "irl" in methods
        else {}
    )
    for folder, kind in saved.items():  # all of it is what plain from_pretrained expects
        _, info = kind.from_pretrained(f"runs/demo/{folder}", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def weights(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(f"runs/{folder}").state_dict()


def test_fair_sft_without_its_tricks_is_sft():
    flags = "--method sft,sft_fair --fair-average 0 --fair-temperature 1"
    flags = f"{flags} --fair-lr 1e-3 --sft-lr 1e-3".split()
    assert train.main([*TINY, *flags]) == 0
    results = json.loads(Path("runs/demo/results.json").read_text())["methods"]
    plain, fair = (
        {k: v for k, v in results[m].items() if k != "seconds"} for m in ("sft", "sft_fair")
    )
    assert plain == fair
    plain, fair = weights("demo/sft"), weights("demo/sft_fair")
    assert plain.keys() == fair.keys() and all(
        torch.equal(plain[name], fair[name]) for name in plain
    )


@pytest.mark.parametrize("adapters", [[], ["--lora-rank", "2"]])
def test_fair_sft_is_averaged_with_the_base_and_sharpened(adapters):
    flags = "--method sft,sft_fair --fair-average 0.25 --fair-temperature 0.2"
    flags = f"{flags} --fair-lr 1e-2 --sft-lr 1e-2".split()
    assert train.main([*TINY, *flags, *adapters]) == 0
    start, learnt, fair = (
        loading.load_policy(loading.BASE)[0].state_dict(),
        weights("demo/sft"),
        weights("demo/sft_fair"),
    )
    assert not torch.equal(
        start["model.layers.0.mlp.up_proj.weight"], learnt["model.layers.0.mlp.up_proj.weight"]
    )
    for name in start:
        by = 0.2 if name == "model.norm.weight" else 1.0
        torch.testing.assert_close(
            fair[name] * by, start[name].lerp(learnt[name], 0.75), atol=1e-5, rtol=1e-4
        )


def make_run(*flags) -> train.Run:
    return train.Run(parse_settings([*TINY, *flags]), device="cpu")


@pytest.mark.parametrize("kind", ["likelihood", "head"])
def test_with_adapters_there_is_one_base(kind):
    """Policy, reward, reference and the base that is evaluated are one set of frozen tensors."""
    loss = ["--policy-loss", "ppo"] if kind == "head" else []
    run = make_run(
        "--method", "irl", "--lora-rank", "2", "--reward", kind, "--kl-coef", "0.1", *loss
    )
    loop = run.make_loop()
    models = [loop.policy_model, loop.discriminator.reward_model.model, loop.reference, run.load()]
    frozen = [{p.data_ptr() for p in m.parameters() if not p.requires_grad} for m in models]
    norms = {model.base_model.norm.weight.data_ptr() for model in models}
    assert len(frozen[0]) > 10 and all(pointers - norms == frozen[0] for pointers in frozen)
    full = make_run("--method", "irl").make_loop()
    models = [full.policy_model, full.discriminator.reward_model.model]
    assert not set.intersection(*({p.data_ptr() for p in model.parameters()} for model in models))


def test_what_adapters_have_learnt_is_loaded_in_float32():
    run = make_run("--method", "irl", "--lora-rank", "2", "--weights", "bf16")
    loop = run.make_loop()
    run.save_model(loop.policy_model, "policy")
    run.save_model(loop.discriminator.reward_model.model, "reward")
    assert run.load().dtype == torch.bfloat16
    assert run.load("policy").dtype == torch.float32


def test_adapters_start_alike_whatever_was_drawn_before():
    """A resumed run has drawn less by then than one that nobody disturbed."""
    run = make_run("--method", "irl", "--lora-rank", "2")
    first = lora.trained(run.to_train())
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, lora.trained(run.to_train()), strict=True))


def test_rates_of_adapters():
    plain, adapted = (
        parse_settings([*TINY, *flags]) for flags in ([], ["--lora-rank", "8", "--sft-lr", "0.5"])
    )
    for rate in ("policy_lr", "reward_lr", "warm_up_lr", "grpo_lr"):
        assert getattr(adapted, rate) == pytest.approx(10 * getattr(plain, rate))
    assert adapted.sft_lr == 0.5


def test_as_many_rows_are_sampled_at_once_as_asked_for(monkeypatch):
    seen, real = [], sampler.sample_chunk
    monkeypatch.setattr(
        sampler,
        "sample_chunk",
        lambda model, prompts, end, new, group, *rest: (
            seen.append(len(prompts) * group) or real(model, prompts, end, new, group, *rest)
        ),
    )
    flags = "--method irl --eval-questions 5 --sample-rows 16".split()
    assert train.main([*TINY, *flags]) == 0
    assert max(seen) == 16


def test_a_policy_that_is_never_right_still_gets_its_table(capsys, monkeypatch):
    monkeypatch.setattr(data, "is_correct", lambda example, response: False)
    assert train.main([*TINY, "--method", "irl"]) == 0
    assert json.loads(Path("runs/demo/results.json").read_text())["reward"]["auroc"] is None
    shown = capsys.readouterr().out
    assert "best of 4" in shown


def test_a_run_can_be_used_afterwards(capsys, monkeypatch):
    assert train.main([*TINY, "--method", "irl"]) == 0
    discriminator, tokenizer, settings = load_run(Path("runs/demo"))
    assert settings["reward"] == "likelihood" and discriminator.granularity == "dense"
    question = ["--question", "Ava has 24 pens. Ava buys 3 bags of 12. Ava loses 9. How many pens?"]
    for trace in (
        ["3+12=15\\n24+15=39\\n39-9=30"],
        ["3*12=36\\n24+36=60\\n60-9=51", "--answer", "51"],
    ):
        monkeypatch.setattr(
            "sys.argv", ["trace", "--run", "runs/demo", *question, "--trace", *trace]
        )
        assert exit_status(trace_of.main) == 0
    assert "suspicious" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--modle base", "unrecognized arguments: --modle base"),
        ("--model Qwen2.5-0.5", "did you mean 'Qwen2.5-0.5B'"),
        ("--data gsm8", "did you mean 'gsm8k'"),
        ("--data gsm8k", "--data DIR"),
        ("--model Qwen2.5-0.5B", "--model DIR"),
        ("--group many", "invalid int value"),
        ("--eval-questions 0", "--eval-questions must be from 1 to 1,000,000,000, not 0"),
        ("--group 1", "--group must be from 2 to"),
        ("--method ppo", "no method 'ppo'"),
        ("--reward head --policy-loss exact", "--policy-loss exact sums"),
        ("--granularity sparse --policy-loss exact", "--policy-loss exact sums"),
        *(
            (f"--start reward {flags}", "--start reward takes --reward likelihood")
            for flags in (
                "--gamma 0.5",
                "--granularity sparse --gamma 0",
                "--granularity interval --gamma 0",
                "--reward-nll 0",
                "--entropy-coef 0",
                "--logit gail",
                "--reward head",
            )
        ),
        ("--max-new-tokens 9999", "fits the model's context"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--name ../elsewhere", "--name"),
        ("--lora-rank -1", "--lora-rank must be from 0 to"),
        ("--micro-tokens -5", "--micro-tokens must be from 0 to"),
        ("--policy-loss wgan", "must be one of exact, reinforce, ppo, not 'wgan'"),
        ("--weights bf17", "must be one of auto, float32, bf16, not 'bf17'"),
        ("--weights bf16", "--weights bf16 is for a frozen base, with --lora-rank"),
        ("--fair-average 1.5", "--fair-average must be from 0 to 1"),
        ("--fair-temperature 0", "--fair-temperature must be from 0.01 to"),
        (
            "--method likelihood --reward head --policy-loss ppo",
            "--method likelihood trains the likelihood alone, which takes",
        ),
        ("--method likelihood --reward-nll 0", "--method likelihood trains the likelihood alone"),
        ("--granularity sparse --gamma 0", "--gamma 0 pays each token for its own score alone"),
        ("--policy-loss reinforce --epochs 2", "--epochs 2 takes --policy-loss ppo"),
        ("--gamma 0.9 --epochs 2", "--epochs 2 takes --policy-loss ppo"),
        ("--logit gail --entropy-coef 0.5", "--entropy-coef changes nothing beside --logit gail"),
        (
            "--replay 8 --rollouts-per-expert 1",
            "--replay changes nothing beside --rollouts-per-expert 1",
        ),
        (
            "--rollouts-per-expert 0 --perturbed 0",
            "--rollouts-per-expert 0 and --perturbed 0 leave the discriminator no negatives",
        ),
        ("--reward-clip 5", "--reward-clip changes nothing beside --policy-loss exact"),
        # before SFT is trained, not after
        (
            "--method sft,irl --reward-model countdown-base",
            "the tokenizer of 'countdown-base' diff",
        ),
        ("--reward random --reward-lr 1e-4", "--reward-lr changes nothing beside --reward random"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flags, message, capsys):
    assert train.main([*TINY, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not Path("runs").exists()  # nothing left behind


OUT = {
    "gamma": "2 -0.1",
    "kl_coef": "-1",
    "entropy_coef": "-0.2",
    "reward_average": "1.5",
    "reward_clip": "-5",
    "warm_up": "-1",
    "policy_lr": "-1e-4",
    "reward_nll": "-1",
    "perturbed": "-2",
    "seed": "-1",
    "max_new_tokens": "0",
}
OUT_OF_RANGE = [(name, value) for name, values in OUT.items() for value in values.split()]
OUT_OF_RANGE += [
    (f.name, value) for f in fields(Settings) if f.type is float for value in ("nan", "inf")
]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_numbers_out_of_range_are_one_line_and_status_2(name, value, capsys):
    assert train.main([f"--{name.replace('_', '-')}={value}"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: --{name.replace('_', '-')} must be from ")
        and error.count("\n") == 1
    )
    assert not Path("runs").exists()


def test_bad_files_are_one_line_and_status_2(capsys):
    Path("mine.jsonl").write_text('{"question": "a", "trace": "b", "answer": "c"}\nnot json\n')
    assert train.main([*TINY, "--data", "mine.jsonl"]) == 2
    assert "mine.jsonl:2:" in capsys.readouterr().err


def test_examples_that_do_not_fit_are_counted(capsys):
    rows = [
        data.Example(e.question, e.trace, e.answer)
        for split in ("train", "validation")
        for e in data.load_examples("words", split, 60)
    ]
    rows += [
        data.Example(f"Ava has {i} pens. How many pens?", "1+1=2\n" * 100, "2") for i in range(5)
    ]
    Path("mine.jsonl").write_text("\n".join(json.dumps(vars(row)) for row in rows))
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text(Path("mine.jsonl").read_text())
    Path("folder/test.jsonl").write_text(
        "\n".join(json.dumps(vars(e)) for e in data.load_examples("words", "test", 12))
    )
    assert (
        train.main([*TINY, "--data", "folder", "--method", "sft", "--demonstrations", "1000"]) == 0
    )
    printed = capsys.readouterr().out
    assert (
        "examples of train are longer than the model's context" in printed
        and "are there, not 1000" in printed
    )


@pytest.mark.parametrize("model, source", [("base", "countdown"), ("countdown-base", "words")])
def test_problems_that_the_tokenizer_cannot_write_are_refused(model, source, capsys):
    assert train.main([*TINY, "--model", model, "--data", source]) == 2
    error = capsys.readouterr().err
    assert (
        "this model's tokenizer has no tokens for" in error
        and "need another --model" in error
        and error.count("\n") == 1
    )
    assert not Path("runs").exists()


def test_different_tokenizers_are_refused(capsys, shipped):
    Path("other").mkdir()
    shipped[0].save_pretrained("other")
    other = loading.PreTrainedTokenizerFast.from_pretrained(loading.BASE)
    other.add_tokens(["extra"])
    other.save_pretrained("other")
    with pytest.raises(UserError, match="the tokenizer of .* differs"):
        loading.check_same_tokenizer(shipped[1], "other")


def test_gsm8k_through_the_real_tokenizer(qwen_tokenizer):
    """GSM8K's text, Qwen's tokenizer and chat template, a small random Qwen2: the path of `--model
    Qwen2.5-0.5B`.
    """
    if not (SHARED / "data" / "gsm8k").exists():
        pytest.skip("GSM8K is not beside this checkout (../shared/data/gsm8k)")
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained("model")
    qwen_tokenizer.save_pretrained("model")
    flags = "--demonstrations 8 --questions 2 --group 2 --eval-questions 3 --max-steps 1 "
    flags += "--sft-steps 1 --warm-up 1 "
    flags += "--max-new-tokens 12 --micro-batch 2 --device cpu"
    assert (
        train.main(["--model", "model", "--data", str(SHARED / "data" / "gsm8k"), *flags.split()])
        == 0
    )
    results = json.loads(Path("runs/demo/results.json").read_text())
    assert set(results["methods"]) == {"base", "sft", "irl"} and results["localise"] == {}
    AutoTokenizer.from_pretrained("runs/demo/policy")


@pytest.mark.parametrize(
    "flags, updates",
    [
        ("--demonstrations 64", 60),
        ("", 64),
        ("--demonstrations 1024", 256),
        ("--warm-up 7", 7),
        ("--reward random", 0),
    ],
)
def test_the_warm_up_takes_four_passes_over_the_demonstrations_60_updates_at_least(flags, updates):
    flags += " --policy-loss ppo" if "random" in flags else ""
    assert parse_settings(flags.split()).warm_up == updates


@pytest.mark.parametrize("start, methods", [("sft", "grpo"), ("base", "grpo"), ("reward", "grpo")])
def test_grpo_starts_where_irl_does(start, methods, monkeypatch):
    """At SFT, which is trained first though nobody asked for it, or at the base; reward is a start
    of IRL's own.
    """
    kept, real = [], baselines.GRPO.__post_init__

    def remember(self):
        kept.append(
            {name: weight.clone() for name, weight in self.policy_model.state_dict().items()}
        )
        real(self)

    monkeypatch.setattr(baselines.GRPO, "__post_init__", remember)
    few = ["--eval-questions", "2"]
    assert train.main([*TINY, *few, "--method", methods, "--start", start, "--sft-lr", "1e-2"]) == 0
    expected = (
        weights("demo/sft") if start == "sft" else loading.load_policy(loading.BASE)[0].state_dict()
    )
    assert all(torch.equal(kept[0][name], expected[name]) for name in expected)
    assert ("sft" in json.loads(Path("runs/demo/results.json").read_text())["methods"]) == (
        start == "sft"
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", ("reward", "exact", 0.0)),
        ("--gamma 0.9", ("base", "exact", 0.9)),
        ("--reward-nll 0", ("base", "exact", 0.0)),
        ("--reward head", ("base", "ppo", 0.0)),
        ("--logit gail", ("base", "ppo", 0.0)),
        ("--granularity sparse", ("base", "ppo", 1.0)),
        ("--granularity interval", ("base", "ppo", 1.0)),
        ("--granularity sparse --gamma 0.5", ("base", "ppo", 0.5)),
        ("--granularity interval --policy-loss reinforce --gamma 0.5", ("base", "reinforce", 0.5)),
        ("--model Qwen2.5-0.5B", ("sft", "exact", 0.0)),
        ("--model Qwen2.5-0.5B --explain", ("base", "exact", 0.0)),
    ],
)
def test_defaults_follow_what_the_reward_can_do(flags, expected):
    """Start, loss and gamma: where only some tokens have a reward, the others learn from what
    follows.
    """
    s = parse_settings(flags.split())
    assert (s.start, s.policy_loss, s.gamma) == expected


def test_every_shortfall_is_said_and_what_was_used_is_counted(settings, capsys):
    """Of countdown's problems 515 are for test, whatever is asked for."""
    s = replace(
        settings,
        data="countdown",
        model="countdown-base",
        reward_model="countdown-base",
        eval_questions=600,
        extra_questions=10,
        max_new_tokens=40,
    )
    run = train.Run(s, device="cpu")
    printed = capsys.readouterr().out
    assert "test: only 515 are there, not 600" in printed
    assert printed.count("only") == 1
    expected = {
        "demonstrations": 16,
        "extra_questions": 10,
        "validation": 8,
        "test": 515,
        "reranked": 250,
    }
    assert run.counts == expected and len(run.test) == 515


def test_five_rows_and_a_test_file_are_a_run(settings, tmp_path, monkeypatch, capsys):
    """None of these rows is for validation: then there is no curve, and results all the same."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"Ava has {i} pens. How many pens?", "trace": "1+1=2", "answer": "2"}
        for i in range(90)
    ]
    of = {
        name: [row for row in rows if split_of(row["question"]) == name]
        for name in ("train", "test")
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, of["train"][:5])))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, of["test"][:4])))
    flags = "--method sft --sft-steps 1 --demonstrations 16 --extra-questions 3 --device cpu "
    flags += "--max-new-tokens 8"
    assert train.main([*flags.split(), "--data", str(folder)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "demonstrations: only 5",
        "extra questions: only 0",
        "validation: only 0",
        "test: only 4",
    ):
        assert line in printed
    results = json.loads((tmp_path / "runs/demo/results.json").read_text())
    assert results["counts"]["demonstrations"] == 5 and results["counts"]["test"] == 4


COUNTDOWN = {
    "reward": "head",
    "logit": "gail",
    "granularity": "sparse",
    "policy_loss": "ppo",
    "gamma": 1.0,
    "reward_clip": 0.1,
    "advantage_scale": "group",
    "perturbed": 4,
    "reward_lr": 0.0,
    "extra_questions": 3000,
}


@pytest.mark.parametrize(
    "flags, expected",
    [
        # what the task asks of the method, for any model; what the size of the model asks
        (
            "--data countdown",
            {"model": "countdown-base", "policy_lr": 6e-4, "max_new_tokens": 40, "group": 8},
        ),
        (
            "--data countdown --model DIR",
            {"policy_lr": 2e-6, "max_new_tokens": 48, "micro_batch": 2, "start": "sft"},
        ),
        ("--data countdown --model DIR --lora-rank 4", {"policy_lr": 2e-5, "reward_lr": 0.0}),
        ("--model countdown-base", {"data": "countdown", "demonstrations": 64}),
    ],
)
def test_a_task_asks_the_same_of_every_model(flags, expected):
    s = parse_settings(flags.split())
    for name, value in (COUNTDOWN | expected).items():
        assert getattr(s, name) == pytest.approx(value), name


def test_there_are_at_most_50_settings_and_help_says_what_each_does(capsys):
    names = [f.name for f in fields(Settings)]
    assert len(names) <= 50
    with pytest.raises(SystemExit):
        train.main(["--help"])
    page = capsys.readouterr().out
    assert page.startswith("usage: train.py [flags]\n") and max(map(len, page.splitlines())) <= 100
    headings = ("what to train:", "data:", "reward:", "policy:", "memory", "evaluation:")
    places = [page.index(f"\n{heading}") for heading in headings]
    assert places == sorted(places)
    for name in names:
        assert f"\n  --{name.replace('_', '-')}" in page
