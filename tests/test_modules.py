"""Each module runs by itself, as `python <module>.py`, and shows its part."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWS = {  # module and arguments: what must be seen, as patterns over the whole output
    "data.py": [r"expert +\S+=\d+ \|", r"a pupil .*-> \d+", r"swap .*differs at \d+"],
    "policy.py": [r"<answer>\d+</answer> +log pi = -\d", r"largest difference from a fresh forward pass: [\d.]+e-0[5-9]"],
    "reward.py": [r"discriminator update 20: .*accuracy 0\.\d", r"expert: Ava", r"nothing suspicious; .*\n\npupil: Ava",
                  r"most suspicious: token 3 of 31, '\+' after '<think>\\n3'"],
    "irl.py": [r"iteration 3\n +rollout +length [\d.]+.*\n +discriminator loss .*\n +reward +mean .*\n +policy +loss"],
    "rerank.py": [r"best of n = ", r"majority +0\.\d", r"oracle +0\.\d", r"pass@k +0\.\d"],
    "baselines.py": [r"update 15 +loss 0\.\d", r"step 3 +mean 0\.\d+, loss -?\d"],
    "memory.py": [r"Qwen2\.5-0\.5B, --lora-rank 16 \| 1\.3 \| 1\.4 \|"],
    "logprob.py": [r"plain +[\d.]+ s +\d+ MB", r"chunked +[\d.]+ s +\d+ MB", r"from float64: log pi [\d.]+e-0[5-9]"],
    "explain.py --questions 2 --group 2 --warm-up 1 --device cpu": [r"1\. ROLLOUT", r"4\. POLICY"],
    "report.py --help": [r"--picture"],
    "pretrain.py --help": [r"--width"],
    "train.py --help": [r"--explain"],
}  # fmt: skip


@pytest.mark.parametrize("command", SHOWS, ids=lambda command: command.split()[0])
def test_it_runs_and_shows_its_part(command, capsys, monkeypatch):
    name, *arguments = command.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None)
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    for pattern in SHOWS[command]:
        assert re.search(pattern, printed), f"{pattern!r} is not in\n{printed}"


def test_none_is_forgotten():
    runs = {path.name for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert {command.split()[0] for command in SHOWS} == runs
