"""A run that is killed, stopped, out of disk or memory, or has a loss that is not finite: nothing is lost, and the user is
told in one line. What a resumed run leaves behind is compared byte by byte with that of a run nobody disturbed."""

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
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
import irl
import policy
import train
from engine import checkpoint, keeper, loading
from engine.errors import UserError
from engine.keeper import Keeper, Log, Signals, Stopped, in_one_line
from engine.runs import saved_settings
from engine.settings import complete, flag, parse_flags, parse_settings

EVALUATION = "--eval-questions 4 --eval-samples 1 --rerank-questions 4 --rerank-n 2 --max-new-tokens 12 --device cpu"
ALL = (f"--demonstrations 16 --extra-questions 4 --questions 4 --group 2 --sft-steps 4 --fair-steps 2 --warm-up 3 "
       f"--max-steps 4 --grpo-steps 4 --validate-every 4 --checkpoint-every 1 {EVALUATION}").split()  # fmt: skip
IRL = (f"--method irl --demonstrations 16 --extra-questions 4 --questions 4 --group 2 --sft-steps 2 --warm-up 2 "
       f"--max-steps 3 --validate-every 0 --checkpoint-every 1 {EVALUATION}").split()  # fmt: skip
RESUME = ["--resume", "--name", "demo"]
KILLS = 10
RUN = Path("runs/demo")


class Killed(BaseException):
    """Raised in the middle of something: to what is on disk, the same as a kill."""


def contents(folder: Path) -> dict:
    """Everything in a finished run's folder but its wall-clock seconds."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    results = json.loads(files["results.json"])
    for method in results["methods"].values():
        method.pop("seconds", None)
    files["results.json"] = results
    files.pop("report.html", None)  # shows the seconds
    return files


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- killed -------------------------------------------------------------------------------------------------------


class Runner:
    """Runs of train.py as processes of their own, one at a time (tests/runner.py)."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "runner.py"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
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
    """(folder of a run of all methods that nobody disturbs, another by the same seed, seconds that they took)."""
    folders = [tmp_path_factory.mktemp("undisturbed") for _ in runners]
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(lambda r, f: r.run(f, ALL), runners, folders))
    assert statuses == [0, 0], (folders[0] / "output").read_text()
    return folders[0] / RUN, folders[1] / RUN, time.monotonic() - start


def test_the_same_seed_gives_the_same_files_on_one_machine(undisturbed):
    assert contents(undisturbed[0]) == contents(undisturbed[1])


def kill_and_resume(runner: Runner, folder: Path, moment) -> tuple[Path, bool, int]:
    """Start a run, kill it at a moment (seconds after its start, or the number of a checkpoint: while it is being
    written), resume it to its end. Returns (its folder, whether a checkpoint was half written, steps done when it was killed)."""
    while True:
        folder.mkdir(parents=True)
        pid, start = runner.start(folder, ALL), time.monotonic()
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
        assert status == 0, (folder / "output").read_text()  # it was faster this time: kill another one earlier
        folder, moment = folder.with_name(folder.name + "-earlier"), moment * 0.8
    torn = any((folder / RUN / "checkpoints").glob(".*.new"))
    metrics = folder / RUN / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    begun = (folder / RUN / "settings.json").exists()
    status = runner.run(folder, RESUME if begun else ALL)
    assert status == 0, (folder / "output").read_text()
    return folder, torn, steps


def test_killed_at_any_moment_a_run_ends_bit_for_bit_the_same(undisturbed, runners, tmp_path, capsys):
    reference, _, seconds = undisturbed
    rng = random.Random(0)
    writing = rng.sample(range(1, 20), KILLS // 2)  # checkpoints of this run: one per step, one per phase
    moments = [seconds * 0.95 * (i + rng.random()) / (KILLS - len(writing)) for i in range(KILLS - len(writing))]
    moments = list(enumerate(moments + writing))
    expected, outcomes, lock = contents(reference), [], threading.Lock()

    def work(runner):
        while True:
            with lock:
                if not moments:
                    return
                number, moment = moments.pop()
            folder, torn, steps = kill_and_resume(runner, tmp_path / str(number), moment)
            found = contents(folder / RUN)
            lost = sum(a != b for a, b in zip(lines(reference), lines(folder / RUN)))
            lost += abs(len(lines(reference)) - len(lines(folder / RUN)))
            outcomes.append((moment, torn, steps, lost, [name for name in expected | found
                                                         if expected.get(name) != found.get(name)]))  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, runners))
    torn, steps, lost = (sum(outcome[i] for outcome in outcomes) for i in (1, 2, 3))
    with capsys.disabled():
        print(f"\n{len(outcomes)} kills ({torn} while a checkpoint was being written, {steps / len(outcomes):.1f} of "
              f"{len(lines(reference))} steps done on average), {len(outcomes)} resumes, {lost} lines lost")  # fmt: skip
    assert [outcome for outcome in outcomes if outcome[4]] == [] and lost == 0 and len(outcomes) == KILLS
    assert torn >= 2  # otherwise this test has not looked where it is most likely to break


def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(undisturbed, runners, tmp_path):
    metrics = tmp_path / RUN / "metrics.jsonl"
    pid = runners[0].start(tmp_path, ALL)
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 6):
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    assert runners[0].wait() == 130
    output = (tmp_path / "output").read_text()
    assert "stopped by SIGINT" in output and "Go on with: python train.py --resume --name demo" in output
    assert "Traceback" not in output
    assert runners[0].run(tmp_path, RESUME) == 0
    assert contents(tmp_path / RUN) == contents(undisturbed[0])


# --- the same in one process --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """contents() of an undisturbed run with these flags; each is made once."""
    known = {}

    def run(*flags):
        if flags not in known:
            before, folder = Path.cwd(), tmp_path_factory.mktemp("finished")
            os.chdir(folder)
            try:
                assert train.main([*IRL, *flags]) == 0
                known[flags] = contents(RUN)
            finally:
                os.chdir(before)
        return known[flags]

    return run


def at_call(monkeypatch, owner, name: str, number: int, action) -> None:
    """Let the `number`-th call of owner.name do something else."""
    calls, real = [], getattr(owner, name)

    def replacement(*args, **kwargs):
        calls.append(name)
        return action(*args, **kwargs) if len(calls) == number else real(*args, **kwargs)

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


@pytest.mark.parametrize("flags", [
    "", "--start sft", "--policy-loss ppo --kl-coef 0.1 --gamma 0.9 --epochs 2",
    "--reward head --policy-loss reinforce --logit gail --granularity sparse", "--reward-lr 0",
    "--method sft_fair,likelihood --fair-steps 2", "--lora-rank 2 --start reward --gradient-checkpointing",
    "--start reward --micro-tokens 200",
    "--lora-rank 2 --start sft --reward head --policy-loss ppo --weights bf16 --kl-coef 0.1",
    "--start reward --kl-coef 0.1", "--lora-rank 2 --start reward --kl-coef 0.1",
])  # fmt: skip
def test_every_kind_of_trainer_is_restored(here, finished, monkeypatch, flags):
    """In its warm-up, then again in the loop. What is behind is not done again."""
    interrupt(monkeypatch, *flags.split(), name="warm_up", number=2)
    asked = []
    with monkeypatch.context() as patch:
        real = irl.IRL.warm_up
        patch.setattr(irl.IRL, "warm_up", lambda self: asked.append("warm-up") or real(self))
        at_call(patch, irl.IRL, "step", 3, raises(Killed()))
        with pytest.raises(Killed):
            train.main(RESUME)
        assert len(asked) == 1
        assert train.main(RESUME) == 0 and len(asked) == 1
    assert contents(RUN) == finished(*flags.split())


def test_of_adapters_nothing_frozen_is_kept(here, monkeypatch):
    """A checkpoint holds adapters, their moments and what is small: less than the model that they are on."""
    interrupt(monkeypatch, "--lora-rank", "1")
    state, _ = checkpoint.load(RUN / "checkpoints")
    names = [name for name in state["trainer"]["policy_model"] if not name.endswith((".A", ".B"))]
    assert names == ["model.norm.weight"]  # which the policy has of its own
    tensors = numbered_tensors(RUN / "checkpoints")
    assert tensors.stat().st_size < Path(loading.BASE, "model.safetensors").stat().st_size / 2


def numbered_tensors(folder: Path) -> Path:
    return checkpoint.numbered(folder)[-1] / "tensors.safetensors"


def test_without_any_checkpoint_a_run_starts_again(here, finished, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", raises(Killed()))
        with pytest.raises(Killed):
            train.main(IRL)
    assert train.main(RESUME) == 0 and "no checkpoint yet: from the beginning" in capsys.readouterr().out
    assert contents(RUN) == finished()


def test_lines_after_the_last_checkpoint_and_a_torn_one_are_written_anew(here, finished, monkeypatch):
    interrupt(monkeypatch)
    with open(RUN / "metrics.jsonl", "a") as file:
        file.write('{"method": "irl", "step": 3, "policy/loss": 1}\n{"method": "ir')
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


def flip_a_byte(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file, damage", [("tensors.safetensors", flip_a_byte), ("tensors.safetensors", cut),
                                          ("state.json", flip_a_byte), ("checksums.json", cut),
                                          ("checksums.json", os.remove)])  # fmt: skip
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(here, finished, monkeypatch, capsys, file, damage):
    interrupt(monkeypatch)
    older, newest = checkpoint.numbered(RUN / "checkpoints")
    damage(newest / file)
    if (file, damage) == ("tensors.safetensors", flip_a_byte):  # one of these goes to the end
        assert train.main(RESUME) == 0
        assert contents(RUN) == finished()
        error = capsys.readouterr().err
    else:
        assert checkpoint.load(RUN / "checkpoints")[1] == older.name
        error = capsys.readouterr().err
        damage(older / file)
        assert train.main(RESUME) == 2
        assert "can be read: remove runs/demo and start again" in capsys.readouterr().err
    assert f"checkpoint {newest} is damaged" in error


def test_two_checkpoints_are_kept_and_none_in_the_end(here, monkeypatch):
    interrupt(monkeypatch)
    assert len(list((RUN / "checkpoints").iterdir())) == 2
    assert train.main(RESUME) == 0 and not (RUN / "checkpoints").exists()


def test_no_pickle(here, monkeypatch):
    interrupt(monkeypatch)
    files = {file.name for file in (RUN / "checkpoints").rglob("*") if file.is_file()}
    assert files == {"tensors.safetensors", "state.json", "checksums.json"}
    code = "".join((Path(train.__file__).parent / name).read_text() for name in ("engine/checkpoint.py", "train.py"))
    assert "torch.save" not in code and "torch.load" not in code and "import pickle" not in code


# --- stopped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_during_evaluation_a_signal_does_not_wait(here, finished, monkeypatch, capsys, number, status):
    waited = []

    def evaluation(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)
        waited.append(1)

    with monkeypatch.context() as patch:
        at_call(patch, train, "evaluate", 2, evaluation)  # 1: the base, 2: the policy
        assert train.main(IRL) == status
    assert not waited
    assert "Go on with: python train.py --resume --name demo" in capsys.readouterr().err
    assert signal.getsignal(number) is not None and "Signals" not in repr(signal.getsignal(number))  # given back
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


def test_a_step_is_finished_first_and_a_second_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # nothing happens in the middle of a step
        with pytest.raises(Stopped) as stopped:
            signals.check()
        assert stopped.value.args[0] == 143
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert left.value.code == 130


# --- no room ------------------------------------------------------------------------------------------------------

FULL = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]  # fmt: skip


@pytest.mark.parametrize("owner, name, number, error", [
    *((checkpoint, "save_file", 4, error) for error in FULL), (checkpoint, "sync", 12, FULL[0]),
    (checkpoint.os, "rename", 3, OSError(errno.EACCES, "Permission denied")),
    (Log, "size", 4, FULL[0]),
])  # fmt: skip
def test_when_the_disk_is_full_the_old_checkpoint_stands(
    here, finished, monkeypatch, capsys, owner, name, number, error
):
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, raises(error))
        assert train.main(IRL) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1 and told.splitlines()[-1].startswith("error: cannot write to runs/demo (")
    assert "go on with python train.py --resume --name demo" in told and "Traceback" not in told
    assert checkpoint.numbered(RUN / "checkpoints") and not list((RUN / "checkpoints").glob(".*"))
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


@pytest.mark.parametrize("bytes, file", [(300, "metrics.jsonl"), (2_000_000, "checkpoints")])
def test_a_file_that_the_system_refuses_to_grow(here, finished, capsys, bytes, file):
    """The real thing, as far as it can be had without a disk of one's own: a limit on the size of files."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file == "metrics.jsonl":
        RUN.mkdir(parents=True)
        log = Log(RUN / file)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, limits[1]))
    try:
        if file == "metrics.jsonl":
            with pytest.raises(UserError, match="cannot write to"), in_one_line(parse_settings(IRL)):
                for step in range(100):
                    log.write("irl", step, {"policy/loss": 0.5}, keeper.tqdm(disable=True))
            return
        assert train.main(IRL) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "error: cannot write to runs/demo (" in capsys.readouterr().err
    assert train.main(RESUME) == 0
    assert contents(RUN) == finished()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])  # fmt: skip
def test_out_of_memory_says_what_to_turn(here, monkeypatch, capsys, error):
    with monkeypatch.context() as patch:
        at_call(patch, irl.IRL, "step", 2, raises(error))
        assert train.main(IRL) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: out of memory: ") and "--micro-batch helps (96 now)" in told
    assert train.main([*RESUME, "--micro-batch", "5"]) == 0
    results = json.loads((RUN / "results.json").read_text())
    assert results["settings"]["micro_batch"] == 5 and results["changed"][0]["settings"] == {"micro_batch": [96, 5]}
    assert results["changed"][0]["after_steps"] == {"warm-up": 2, "irl": 1}


def test_other_errors_keep_their_traceback(here, monkeypatch):
    monkeypatch.setattr(irl.IRL, "step", raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train.main(IRL)


# --- not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, gradient", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_an_update_that_is_not_finite_changes_nothing(loss, gradient):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = policy.make_optimizer(torch.nn.ParameterList([weight]), 0.1)
    weight.grad = torch.ones(3)
    assert policy.optimizer_step(optimizer, 1.0)["skipped"] == 0 and not torch.equal(weight, torch.ones(3))
    before = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    weight.grad = torch.tensor([1.0, gradient, 1.0])
    assert policy.optimizer_step(optimizer, loss)["skipped"] == 1
    assert torch.equal(weight, before[0]) and weight.grad is None
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.state[weight].items())
    weight.grad = torch.ones(3)
    assert policy.optimizer_step(optimizer, 1.0)["skipped"] == 1 and not torch.equal(weight, before[0])


def make_nan(patch, steps, stage="policy"):
    """Let the loss of these steps of IRL be NaN."""
    real_step, now = irl.IRL.step, []
    patch.setattr(irl.IRL, "step", lambda self: now.append(self.steps_done + 1) or real_step(self))
    policy_losses = ((irl.IRL, "policy_loss"),)
    for owner, name in policy_losses if stage == "policy" else ((train.reward, "discriminator_loss"),):
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, real=real: real(*args) * (float("nan") if now and now[-1] in steps else 1.0))


def test_two_bad_steps_are_counted_and_survived(here, monkeypatch):
    make_nan(monkeypatch, (1, 3))
    assert train.main(IRL) == 0
    rows = [row for row in lines(RUN) if row["method"] == "irl"]
    assert [row["policy/skipped"] for row in rows] == [1, 1, 2]
    assert rows[0]["policy/loss"] is None and rows[1]["policy/loss"] is not None  # JSON has no NaN


@pytest.mark.parametrize("stage, rate, flags", [
    ("policy", "policy_lr", ["--policy-loss", "ppo"]), ("policy", "policy_lr", []), ("discriminator", "reward_lr", []),
])  # fmt: skip
def test_three_bad_steps_in_a_row_end_the_run_with_a_diagnosis(here, monkeypatch, capsys, stage, rate, flags):
    interrupt(monkeypatch, *flags, number=1)
    with monkeypatch.context() as patch:
        make_nan(patch, (1, 2, 3), stage)
        capsys.readouterr()
        assert train.main([*RESUME, "--checkpoint-every", "1000"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: irl: the {stage}'s loss or gradient was not finite in three steps in a row (step 3")
    half = f"{flag(rate)} {getattr(parse_settings(IRL), rate) / 2:g}" + " --reward-clip 10" * bool(flags)
    assert told.endswith(f"python train.py --resume --name demo {half}")
    state, _ = checkpoint.load(RUN / "checkpoints")
    saved = state["trainer"]["policy_model" if stage == "policy" else "discriminator.reward_model"]
    assert all(torch.isfinite(value).all() for value in saved.values()) and state["progress"]["steps"]["irl"] == 3
    assert train.main(told.split("train.py ")[1].split()) == 0  # the advice can be followed as it stands


# --- what --resume is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--group 4", "--group 4 contradicts runs/demo/settings.json, which says 2"),
    ("--policy-loss ppo", "--policy-loss ppo contradicts runs/demo/settings.json, which says exact"),
    ("--explain", "--explain True contradicts"), ("--gamma 0.5", "--gamma 0.5 contradicts"),
    ("--name elsewhere", "nothing to resume: there is no runs/elsewhere/settings.json"),
    ("--micro-batch 0", "--micro-batch must be from 1 to"), ("--resmue", "did you mean '--resume'?"),
])  # fmt: skip
def test_flags_that_cannot_be_resumed_with(here, monkeypatch, capsys, flags, message):
    RUN.mkdir(parents=True)
    settings = parse_settings(IRL)
    (RUN / "settings.json").write_text(json.dumps(vars(settings)))
    assert train.main([*RESUME, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_keeps_its_date(here, monkeypatch):
    """What a chat template tells about today is the day of the run's start, however late it goes on."""
    given = parse_flags(["--name", "dated", "--date", "2001-02-03"])
    Path("runs/dated").mkdir(parents=True)
    Path("runs/dated/settings.json").write_text(json.dumps(asdict(complete(given))))
    assert saved_settings({"name": "dated"}).date == "2001-02-03"
    assert complete({}).date == datetime.date.today().isoformat()


def test_zero_is_a_value():
    assert parse_flags(["--gamma", "0", "--extra-questions", "0"]) == {"gamma": 0.0, "extra_questions": 0}


def test_an_unfinished_run_is_not_started_again_and_a_finished_one_not_resumed(here, monkeypatch, capsys):
    interrupt(monkeypatch)
    capsys.readouterr()
    assert train.main(IRL) == 2
    assert "already holds a run: go on with it (python train.py --resume --name demo)" in capsys.readouterr().err
    assert train.main([*RESUME, *IRL]) == 0  # the same flags again contradict nothing
    capsys.readouterr()
    assert train.main(RESUME) == 0
    told = capsys.readouterr().out
    assert "runs/demo is finished: its report is runs/demo/report.html" in told and "To run anew" in told
    assert train.main(IRL) == 2
    assert "go on with it" not in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_demo_goes_on_where_it_was(tmp_path):
    """Its commands, as make prints them: a run is begun where none is, else it goes on (or tells that it is finished)."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(Path(train.__file__).parent / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ready").touch()
    begin = ["train.py", "train.py --data countdown --name countdown"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # `make test` may be what runs this
    for there in ((), ("demo",), ("demo", "countdown")):
        for name in there:
            (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / name / "settings.json").touch()
        told = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, env=alone, capture_output=True, text=True, check=True).stdout
        expected = [f"{flags}{' --resume' * (name in there)}" for flags, name in zip(begin, ("demo", "countdown"))]
        assert [line.strip() for line in told.splitlines()] == [f".venv/bin/python {flags}" for flags in expected]


@pytest.mark.skipif(checkpoint.fcntl is None, reason="this system has no locks on folders")
def test_two_processes_do_not_go_on_with_one_run(here, finished, monkeypatch, capsys):
    interrupt(monkeypatch)
    before = {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    capsys.readouterr()
    with checkpoint.locked(RUN):
        assert train.main([*RESUME, "--policy-lr", "1e-5"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: another process is writing runs/demo")
    assert before == {file: file.read_bytes() for file in RUN.rglob("*") if file.is_file()}
    assert train.main(RESUME) == 0 and contents(RUN) == finished()


def test_other_examples_are_refused(here, monkeypatch, capsys):
    interrupt(monkeypatch)
    real = data.load_examples
    monkeypatch.setattr(data, "load_examples", lambda *args, **options: real(*args, **options)[::-1])
    assert train.main(RESUME) == 2
    assert "the examples of words are not those that runs/demo was started with" in capsys.readouterr().err


# --- checkpoint.py ------------------------------------------------------------------------------------------------


def test_tied_weights_are_kept_once_and_come_back(tmp_path, shipped):
    state = shipped[0].state_dict()
    checkpoint.save(tmp_path / "c", {"model": state, "other": {"x": [1, None, "a", 0.1, torch.arange(3)]}})
    found, name = checkpoint.load(tmp_path / "c")
    assert name == "000001" and all(torch.equal(found["model"][key], value) for key, value in state.items())
    assert found["other"]["x"][:4] == [1, None, "a", 0.1] and found["other"]["x"][4].tolist() == [0, 1, 2]
    size = sum(p.numel() * 4 for p in shipped[0].parameters())
    assert (tmp_path / "c" / "000001" / "tensors.safetensors").stat().st_size < size * 1.2


def test_a_folder_is_there_complete_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(Killed):
        with checkpoint.new_folder(path) as new:
            save_file({"x": torch.ones(2)}, new / "x.safetensors")
            raise Killed
    assert list(tmp_path.iterdir()) == []
    for text in "ab":  # the second replaces the first
        with checkpoint.new_folder(path) as new:
            (new / text).write_text(text)
    assert [file.name for file in path.iterdir()] == ["b"]


def test_saving_by_the_clock_takes_a_fiftieth_of_the_time(monkeypatch):
    run = object.__new__(Keeper)
    run.s, run.saved_at, run.save_seconds = parse_settings([]), 100.0, 2.0
    for now, due in ((116.0, False), (199.0, False), (201.0, True)):
        monkeypatch.setattr(keeper.time, "monotonic", lambda now=now: now)
        assert run.save_is_due(1) is due
    run.save_seconds = 0.01
    assert run.save_is_due(1)
    run.s.checkpoint_every = 10
    assert [step for step in range(1, 31) if run.save_is_due(step)] == [10, 20, 30]
