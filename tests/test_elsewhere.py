"""README's "The reward elsewhere": its own lines score texts as this project's reward does, with
plain transformers alone, and TRL's GRPOTrainer takes them as a reward function."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
import reward
from engine import loading, lora

README = Path(data.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The module that README shows, and the folder of the head that it loads."""
    folder = tmp_path_factory.mktemp("reward")
    base, tokenizer = loading.load_policy("countdown-base")
    head = lora.with_head(base, random=True)
    lora.save(head, folder)
    tokenizer.save_pretrained(folder)
    section = README.read_text(encoding="utf-8").split("## The reward elsewhere")[1]
    source = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert source.count('"runs/countdown/reward"') == 1
    file = folder / "elsewhere.py"
    file.write_text(source.replace("runs/countdown/reward", folder.as_posix()), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("elsewhere", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, folder


def examples_and_texts(tokenizer, count):
    examples = data.tokenize(tokenizer, data.load_examples("countdown", "test", count))
    prompts = [tokenizer.decode(example.prompt) for example in examples]
    return examples, prompts, [data.response_text(e.trace, e.answer) for e in examples]


def test_it_scores_texts_as_our_reward_does(elsewhere):
    module, folder = elsewhere
    tokenizer = loading.load_tokenizer(str(folder))
    examples, prompts, texts = examples_and_texts(tokenizer, 6)
    batch = data.demonstration_batch(examples, "cpu")
    with torch.no_grad():
        scores = reward.load_reward("head", str(folder)).scores(batch)  # [B, T]
    at_the_end = scores.gather(1, batch.lengths[:, None] - 1).squeeze(1)
    assert at_the_end.std() > 0.1
    assert_close(torch.tensor(module.reward(prompts, texts)), at_the_end, atol=1e-4, rtol=1e-4)


def test_trl_takes_it(elsewhere, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install trl: GRPOTrainer was not tried")
    import datasets

    module, folder = elsewhere
    model, tokenizer = loading.load_policy("countdown-base")
    tokenizer.padding_side = "left"
    _, prompts, _ = examples_and_texts(tokenizer, 4)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=module.reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )
    trainer.train()
    assert any("reward" in line for line in trainer.state.log_history)
