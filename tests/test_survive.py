"""A run that is killed, stopped, out of disk or memory, or has a loss that is not finite.

Nothing is lost, and the user is told in one line. What a resumed run leaves behind is compared byte
by byte with that of a run nobody disturbed.
"""

import datetime
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
import irl
import policy
import train
from engine import checkpoint, keeper, loading
from engine.keeper import Keeper
from engine.settings import complete, parse_settings

FEW = (
    "--demonstrations 8 --extra-questions 4 --questions 2 --group 2 --eval-questions 2 "
    "--max-new-tokens 10 --device cpu"
)
ALL = f"--sft-steps 4 --fair-steps 2 --warm-up 3 --max-steps 4 --grpo-steps 4 {FEW}".split()
IRL = f"--method irl --sft-steps 2 --warm-up 2 --max-steps 3 {FEW}".split()
RESUME = ["--resume", "--name", "demo"]
KILLS = int(os.environ.get("KILLS", 10))
RUN = Path("runs/demo")


class Killed(BaseException):
    """Raised in the middle of something: to what is on disk, the same as a kill."""


def contents(folder: Path) -> dict:
    """Everything in a finished run's folder but its wall-clock seconds."""
    files = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    results = json.loads(files["results.json"])
    for method in results["methods"].values():
        method.pop("seconds", None)
    files["results.json"] = results
    files.pop("report.html")  # shows the seconds
    return files


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- killed ---------------------------------------------------------------------------------------


class Runner:
    """Runs of train.py as processes of their own, one at a time (tests/runner.py)."""

    def __init__(self):
        paths = os.pathsep.join(sys.path)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "runner.py"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )

    def start(self, cwd: Path, arguments: list[str]) -> int:
        """The process's id."""
        self.process.stdin.write(json.dumps({"cwd": str(cwd), "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Its exit status; the signal's number, negative, if one killed it."""
        return int(self.process.stdout.readline())

    def run(self, cwd: Path, arguments: list[str]) -> int:
        self.start(cwd, arguments)
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def runners():
    pair = [Runner(), Runner()]
    yield pair
    for runner in pair:
        runner.close()


@pytest.fixture(scope="module")
def undisturbed(runners, tmp_path_factory):
    """(folder of a run of all methods, another by the same seed, seconds that they took)."""
    folders = [tmp_path_factory.mktemp("undisturbed") for _ in runners]
    start = time.monotonic()

    def run(runner: Runner, folder: Path) -> int:
        return runner.run(folder, ALL)

    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(run, runners, folders))
    assert statuses == [0, 0], (folders[0] / "output").read_text()
    return folders[0] / RUN, folders[1] / RUN, time.monotonic() - start


def test_the_same_seed_gives_the_same_files_on_one_machine(undisturbed):
    assert contents(undisturbed[0]) == contents(undisturbed[1])


def kill_and_resume(runner: Runner, folder: Path, moment) -> tuple[Path, bool, int]:
    """Start a run, kill it at a moment, resume it to its end.

    moment: seconds after its start, or the number of a checkpoint: while that is being written.
    Returns (its folder, whether a checkpoint was half written, steps done when it was killed).
    """
    while True:
        folder.mkdir(parents=True)
        pid = runner.start(folder, ALL)
        start = time.monotonic()
        if isinstance(moment, int):
            half = folder / RUN / "checkpoints" / f".{moment:06d}.new"
            while not half.exists() and time.monotonic() < start + 120:
                time.sleep(0.0005)
        else:
            time.sleep(moment)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status = runner.wait()
        if status == -signal.SIGKILL:
            break
        assert status == 0, (folder / "output").read_text()
        # It was faster this time: kill another one earlier.
        folder = folder.with_name(folder.name + "-earlier")
        moment = moment * 0.8
    torn = any((folder / RUN / "checkpoints").glob(".*.new"))
    metrics = folder / RUN / "metrics.jsonl"
    steps = 0
    if metrics.exists():
        steps = metrics.read_bytes().count(b"\n")
    begun = (folder / RUN / "settings.json").exists()
    status = runner.run(folder, RESUME if begun else ALL)
    assert status == 0, (folder / "output").read_text()
    return folder, torn, steps


def test_killed_at_any_moment_a_run_ends_bit_for_bit_the_same(
    undisturbed, runners, tmp_path, capsys
):
    reference, _, seconds = undisturbed
    rng = random.Random(0)
    # Half of the kills at any time, half of them while a checkpoint is being written. This run has
    # one checkpoint per step and one per phase.
    n_torn = KILLS // 2
    n_others = KILLS - n_torn
    moments = [seconds * 0.95 * (i + rng.random()) / n_others for i in range(n_others)]
    moments = list(enumerate(moments + rng.sample(range(1, 20), n_torn)))
    expected = contents(reference)
    outcomes = []
    lock = threading.Lock()

    def work(runner):
        while True:
            with lock:
                if not moments:
                    return
                number, moment = moments.pop()
            folder, torn, steps = kill_and_resume(runner, tmp_path / str(number), moment)
            files = contents(folder / RUN)
            other = [name for name in expected | files if expected.get(name) != files.get(name)]
            outcomes.append((moment, torn, steps, other))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, runners))
    torn = sum(outcome[1] for outcome in outcomes)
    steps = sum(outcome[2] for outcome in outcomes) / len(outcomes)
    with capsys.disabled():
        print(
            f"\n{len(outcomes)} kills ({torn} while a checkpoint was being written, {steps:.1f} of "
            f"{len(lines(reference))} steps done on average)"
        )
    assert [outcome for outcome in outcomes if outcome[3]] == [] and len(outcomes) == KILLS
    assert torn >= 2  # otherwise this test has not looked where it is most likely to break


def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(undisturbed, runners, tmp_path):
    metrics = tmp_path / RUN / "metrics.jsonl"
    pid = runners[0].start(tmp_path, ALL)
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    assert runners[0].wait() == 130
    output = (tmp_path / "output").read_text()
    assert "stopped by SIGINT: what was saved stands. Go on with: python train.py" in output
    assert "Traceback" not in output
    assert runners[0].run(tmp_path, RESUME) == 0
    assert contents(tmp_path / RUN) == contents(undisturbed[0])


# --- the same in one process ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A checkpoint after every step, little evaluation, and no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", int)
    monkeypatch.setattr(keeper, "SAVE_SECONDS", 0)
    monkeypatch.setattr(keeper, "SAVE_RATIO", 0)
    monkeypatch.setattr(train, "VALIDATION_QUESTIONS", 4)
    monkeypatch.setattr(train, "RERANK_CANDIDATES", 2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def known_contents():
    return {}


@pytest.fixture
def finished(known_contents, tmp_path_factory, monkeypatch):
    """contents() of an undisturbed run with these flags; each is made once."""

    def run(*flags):
        if flags not in known_contents:
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("finished"))
                assert train.main([*IRL, *flags]) == 0
                known_contents[flags] = contents(RUN)
        return known_contents[flags]

    return run


def at_call(monkeypatch, owner, name: str, number: int, action) -> None:
    """Let the `number`-th call of owner.name do something else."""
    calls = []
    real = getattr(owner, name)

    def replacement(*args, **kwargs):
        calls.append(name)
        return (action if len(calls) == number else real)(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


def raises(error: BaseException):
    def action(*_args, **_kwargs):
        raise error

    return action


def interrupt(monkeypatch, *flags, name="step", number=3) -> None:
    """A run that is cut off inside a call of IRL's step or warm_up."""
    with monkeypatch.context() as patch:
        at_call(patch, irl.IRL, name, number, raises(Killed()))
        with pytest.raises(Killed):
            train.main([*IRL, *flags])


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--start sft --reward-lr 0",
        "--policy-loss ppo --kl-coef 0.1 --gamma 0.9 --epochs 2",
        "--reward head --policy-loss reinforce --logit gail --granularity sparse",
        "--method sft_fair,likelihood --fair-steps 2",
        "--start reward --kl-coef 0.1 --micro-tokens 200",
        "--lora-rank 2 --start reward --kl-coef 0.1",
        "--lora-rank 2 --start reward --gradient-checkpointing",
        "--lora-rank 2 --start sft --reward head --policy-loss ppo --weights bf16 --kl-coef 0.1",
    ],
)
def test_every_kind_of_trainer_is_restored(here, finished, monkeypatch, flags):
    """In its warm-up, then again in the loop. What is behind is not done again."""
    interrupt(monkeypatch, *flags.split(), name="warm_up", number=2)
    warm_ups = []
    real = irl.IRL.warm_up

    def warm_up(self):
        warm_ups.append(1)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(irl.IRL, "warm_up", warm_up)
        at_call(patch, irl.IRL, "step", 3, raises(Killed()))
        with pytest.raises(Killed):
            train.main(RESUME)
        assert len(warm_ups) == 1
        assert train.main(RESUME) == 0 and len(warm_ups) == 1
    assert contents(RUN) == finished(*flags.split())


def test_of_adapters_nothing_frozen_is_kept(here, monkeypatch):
    """A checkpoint holds adapters, their moments and what is small: less than the model."""
    interrupt(monkeypatch, "--lora-rank", "1")
    state = checkpoint.load(RUN / "checkpoints")
    names = [name for name in state["trainer"]["policy_model"] if not name.endswith((".A", ".B"))]
    assert names == ["model.norm.weight"]  # which the policy has of its own
    tensors = checkpoint.numbered(RUN / "checkpoints")[-1] / "tensors.safetensors"
    assert tensors.stat().st_size < Path(loading.BASE, "model.safetensors").stat().st_size / 2


def test_without_any_checkpoint_a_run_starts_again(here, finished, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", raises(Killed()))
        with pytest.raises(Killed):
            train.main(IRL)
    assert train.main(RESUME) == 0
    assert "no checkpoint yet: from the beginning" in capsys.readouterr().out
    assert contents(RUN) == finished()


def test_lines_after_the_last_checkpoint_and_a_torn_one_are_written_anew(
    here, finished, monkeypatch
):
    interrupt(monkeypatch)
    with open(RUN / "metrics.jsonl", "a") as file:
        file.write('{"method": "irl", "step": 3, "policy/loss": 1}\n{"method": "ir')
    assert len(list((RUN / "checkpoints").iterdir())) == 2  # so many are kept
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()  # and none in the end


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "file, damage",
    [
        ("tensors.safetensors", flip_a_byte),
        ("tensors.safetensors", cut),
        ("state.json", flip_a_byte),
        ("checksums.json", cut),
        ("checksums.json", os.remove),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    here, finished, monkeypatch, capsys, file, damage
):
    interrupt(monkeypatch)
    older, newest = checkpoint.numbered(RUN / "checkpoints")
    damage(newest / file)
    if (file, damage) == ("tensors.safetensors", flip_a_byte):  # one of these goes to the end
        assert train.main(RESUME) == 0
        assert contents(RUN) == finished()
        error = capsys.readouterr().err
    else:
        assert (
            checkpoint.load(RUN / "checkpoints")["progress"] == checkpoint.read(older)["progress"]
        )
        error = capsys.readouterr().err
        damage(older / file)
        assert train.main(RESUME) == 2
        assert "can be read: remove runs/demo and start again" in capsys.readouterr().err
    assert f"checkpoint {newest} is damaged" in error


def test_no_pickle(here, monkeypatch):
    interrupt(monkeypatch)
    files = {file.name for file in (RUN / "checkpoints").rglob("*") if file.is_file()}
    assert files == {"tensors.safetensors", "state.json", "checksums.json"}
    root = Path(train.__file__).parent
    code = "".join((root / name).read_text() for name in ("engine/checkpoint.py", "train.py"))
    assert "torch.save" not in code and "torch.load" not in code and "import pickle" not in code


# --- stopped --------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, even where a shell has started the tests in the background: it then has
    them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_during_evaluation_ctrl_c_does_not_wait(here, finished, monkeypatch, capsys, ctrl_c):
    waited = []

    def evaluation(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        waited.append(1)

    with monkeypatch.context() as patch:
        at_call(patch, train, "evaluate", 2, evaluation)  # 1: the base, 2: the policy
        with pytest.raises(SystemExit) as left:
            train.main(IRL)
        assert left.value.code == 130
    assert not waited
    assert "Go on with: python train.py --resume --name demo" in capsys.readouterr().err
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


def test_a_step_is_finished_first_and_a_second_signal_does_not_wait(
    here, finished, monkeypatch, capsys
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    real = irl.IRL.step

    def step(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # nothing happens in the middle of a step
        return real(self)

    def impatient_step(self):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(irl.IRL, "step", step)
        with pytest.raises(SystemExit) as left:
            train.main(IRL)
        assert left.value.code == 143
        assert lines(RUN)[-1]["step"] == 1
        patch.setattr(irl.IRL, "step", impatient_step)
        patch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
        with pytest.raises(SystemExit) as left:
            train.main(RESUME)
        assert left.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


# --- no room --------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "owner, name, number, error",
    [
        (checkpoint, "save_file", 4, FULL),
        (checkpoint, "save_file", 4, SafetensorError("while serializing: no space")),
        (checkpoint, "sync", 12, FULL),
        (checkpoint.os, "rename", 3, OSError(errno.EACCES, "Permission denied")),
        (Keeper, "log", 3, FULL),
    ],
)
def test_when_the_disk_is_full_the_old_checkpoint_stands(
    here, finished, monkeypatch, capsys, owner, name, number, error
):
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, raises(error))
        assert train.main(IRL) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert told.splitlines()[-1].startswith(f"error: {error}: what was saved in runs/demo stands")
    assert "go on with python train.py --resume --name demo" in told and "Traceback" not in told
    assert checkpoint.numbered(RUN / "checkpoints")
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


def test_a_file_that_the_system_refuses_to_grow(here, finished, capsys):
    """The real thing, as far as it can be had without a disk of one's own."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        assert train.main(IRL) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "what was saved in runs/demo stands" in capsys.readouterr().err
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_says_what_to_turn(here, monkeypatch, capsys, error):
    with monkeypatch.context() as patch:
        at_call(patch, irl.IRL, "step", 2, raises(error))
        assert train.main(IRL) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: out of memory: ") and "--micro-batch helps (96 now)" in told
    assert train.main([*RESUME, "--micro-batch", "5"]) == 0
    results = json.loads((RUN / "results.json").read_text())
    assert results["settings"]["micro_batch"] == 5
    assert results["changed"][0]["settings"] == {"micro_batch": [96, 5]}
    assert results["changed"][0]["after_steps"] == {"warm-up": 2, "irl": 1}


def test_other_errors_keep_their_traceback(here, monkeypatch):
    monkeypatch.setattr(irl.IRL, "step", raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train.main(IRL)


# --- not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, gradient",
    [
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (1.0, float("nan")),
        (1.0, float("inf")),
    ],
)
def test_an_update_that_is_not_finite_changes_nothing(loss, gradient):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = policy.make_optimizer(torch.nn.ParameterList([weight]), 0.1)
    weight.grad = torch.ones(3)
    assert policy.optimizer_step(optimizer, 1.0)["skipped"] == 0
    assert not torch.equal(weight, torch.ones(3))
    before = weight.detach().clone()
    states = {name: value.clone() for name, value in optimizer.state[weight].items()}
    weight.grad = torch.tensor([1.0, gradient, 1.0])
    assert policy.optimizer_step(optimizer, loss)["skipped"] == 1
    assert torch.equal(weight, before) and weight.grad is None
    assert all(torch.equal(optimizer.state[weight][name], states[name]) for name in states)
    weight.grad = torch.ones(3)
    assert policy.optimizer_step(optimizer, 1.0)["skipped"] == 1
    assert not torch.equal(weight, before)


def make_nan(patch, steps, stage="policy"):
    """Let the loss of these steps of IRL be NaN."""
    real_step = irl.IRL.step
    now = []

    def step(self):
        now.append(self.steps_done + 1)
        return real_step(self)

    patch.setattr(irl.IRL, "step", step)
    losses = [(irl.IRL, "policy_loss")]
    if stage == "discriminator":
        losses = [(train.reward, "discriminator_loss")]
    for owner, name in losses:
        real = getattr(owner, name)

        def loss(*args, real=real):
            return real(*args) * (float("nan") if now and now[-1] in steps else 1.0)

        patch.setattr(owner, name, loss)


def test_two_bad_steps_are_counted_and_survived(here, monkeypatch):
    make_nan(monkeypatch, (1, 3))
    assert train.main(IRL) == 0
    rows = [row for row in lines(RUN) if row["method"] == "irl"]
    assert [row["policy/skipped"] for row in rows] == [1, 1, 2]
    assert rows[0]["policy/loss"] is None and rows[1]["policy/loss"] is not None  # no NaN in JSON


@pytest.mark.parametrize(
    "stage, flags", [("policy", ["--policy-loss", "ppo"]), ("policy", []), ("discriminator", [])]
)
def test_three_bad_steps_in_a_row_end_the_run_with_a_diagnosis(
    here, monkeypatch, capsys, stage, flags
):
    interrupt(monkeypatch, *flags, number=1)
    with monkeypatch.context() as patch:
        make_nan(patch, (1, 2, 3), stage)
        capsys.readouterr()
        assert train.main(RESUME) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: irl: a loss or gradient was not finite in three steps in a row")
    assert "a lower rate" in told and told.endswith("python train.py --resume --name demo")
    state = checkpoint.load(RUN / "checkpoints")
    part = "policy_model" if stage == "policy" else "discriminator.reward_model"
    assert all(torch.isfinite(value).all() for value in state["trainer"][part].values())
    assert state["progress"]["steps"]["irl"] == 3
    assert train.main([*RESUME, "--policy-lr", "1e-6"]) == 0  # as it says


# --- what --resume is given -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--group 4", "--group 4 contradicts runs/demo, which has 2"),
        ("--policy-loss ppo", "--policy-loss ppo contradicts runs/demo, which has exact"),
        ("--gamma 0.5", "--gamma 0.5 contradicts"),
        ("--name elsewhere", "no run folder runs/elsewhere"),
        ("--micro-batch 0", "--micro-batch must be from 1 to"),
        ("--resmue", "unrecognized arguments: --resmue"),
    ],
)
def test_flags_that_cannot_be_resumed_with(here, capsys, flags, message):
    RUN.mkdir(parents=True)
    kept = asdict(parse_settings(IRL)) | {"date": "2001-02-03"}
    (RUN / "settings.json").write_text(json.dumps(kept))
    assert train.main([*RESUME, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_keeps_its_date(here, finished, monkeypatch):
    """A chat template is told the day of the run's start, however late it goes on."""
    today = datetime.date.today().isoformat()
    assert train.Run(parse_settings(IRL), device="cpu").date == today
    interrupt(monkeypatch, "--date", "2001-02-03")
    dates = []
    real = train.set_date

    def set_date(tokenizer, date):
        dates.append(date)
        real(tokenizer, date)

    monkeypatch.setattr(train, "set_date", set_date)
    assert train.main(RESUME) == 0
    assert dates == ["2001-02-03"]
    assert json.loads((RUN / "results.json").read_text())["settings"]["date"] == "2001-02-03"


def test_an_unfinished_run_is_not_started_again_and_a_finished_one_not_resumed(
    here, monkeypatch, capsys
):
    interrupt(monkeypatch)
    capsys.readouterr()
    assert train.main(IRL) == 2
    told = capsys.readouterr().err
    assert "already holds a run: go on with it (python train.py --resume --name demo)" in told
    assert train.main([*RESUME, *IRL]) == 0  # the same flags again contradict nothing
    # A kill may come before the report is there, or while the checkpoints are removed.
    (RUN / "report.html").unlink()
    (RUN / "checkpoints" / "000007").mkdir(parents=True)
    capsys.readouterr()
    assert train.main(RESUME) == 0
    told = capsys.readouterr().out
    assert "runs/demo is finished" in told and "report:  runs/demo/report.html" in told
    assert (RUN / "report.html").exists() and not (RUN / "checkpoints").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_demo_goes_on_where_it_was(tmp_path):
    """Its commands, as make prints them: a run is begun where none is, else it goes on."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(Path(train.__file__).parent / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ready").touch()
    begin = {"demo": "train.py", "countdown": "train.py --data countdown --name countdown"}
    # `make test` may be what runs this
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for there in ((), ("demo",), ("demo", "countdown")):
        for name in there:
            (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / name / "settings.json").touch()
        made = subprocess.run(
            ["make", "-n", "demo"], cwd=tmp_path, env=alone, capture_output=True, text=True
        )
        expected = [
            f".venv/bin/python {flags}{' --resume' * (name in there)}"
            for name, flags in begin.items()
        ]
        assert [line.strip() for line in made.stdout.splitlines()] == expected


def test_two_processes_do_not_go_on_with_one_run(here, finished, monkeypatch, capsys):
    interrupt(monkeypatch)
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    capsys.readouterr()
    with FileLock(RUN / ".lock-0"):
        assert train.main([*RESUME, "--policy-lr", "1e-5"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: another process is writing runs/demo")
    assert before == {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    assert train.main(RESUME) == 0 and contents(RUN) == finished()


def test_other_examples_are_refused(here, monkeypatch, capsys):
    interrupt(monkeypatch)
    real = data.load_examples

    def backwards(*args, **options):
        return real(*args, **options)[::-1]

    monkeypatch.setattr(data, "load_examples", backwards)
    assert train.main(RESUME) == 2
    assert "runs/demo was started with other examples" in capsys.readouterr().err


# --- checkpoint.py --------------------------------------------------------------------------------


def test_tied_weights_are_kept_once_and_come_back(tmp_path, shipped):
    state = shipped[0].state_dict()
    plain = [1, None, "a", 0.1, torch.arange(3)]
    checkpoint.save(tmp_path / "c", {"model": state, "other": {"x": plain}})
    loaded = checkpoint.load(tmp_path / "c")
    assert all(torch.equal(loaded["model"][key], value) for key, value in state.items())
    assert loaded["other"]["x"][:4] == plain[:4]
    assert loaded["other"]["x"][4].tolist() == [0, 1, 2]
    size = sum(p.numel() * 4 for p in shipped[0].parameters())
    assert (tmp_path / "c" / "000001" / "tensors.safetensors").stat().st_size < size * 1.2


def test_a_folder_is_there_complete_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(Killed):
        with checkpoint.new_folder(path) as new:
            save_file({"x": torch.ones(2)}, new / "x.safetensors")
            raise Killed
    assert not path.exists()
    for text in "ab":  # the second replaces the first
        with checkpoint.new_folder(path) as new:
            (new / text).write_text(text)
    assert [file.name for file in path.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [path]


def test_saving_by_the_clock_takes_a_fiftieth_of_the_time(monkeypatch):
    monkeypatch.setattr(keeper, "SAVE_SECONDS", 15)
    monkeypatch.setattr(keeper, "SAVE_RATIO", 50)
    run = object.__new__(Keeper)
    run.saved_at = 100.0
    run.save_seconds = 2.0
    for now, due in ((116.0, False), (199.0, False), (201.0, True)):
        monkeypatch.setattr(keeper.time, "monotonic", lambda now=now: now)
        assert run.save_is_due() is due
    run.save_seconds = 0.01
    assert run.save_is_due()


def test_zero_is_a_value():
    given = train.parse_flags(["--gamma", "0", "--extra-questions", "0"]).given
    assert given == {"gamma": 0.0, "extra_questions": 0}
    assert complete(given).gamma == 0.0
