"""Files from elsewhere cannot slow us down, run code, or confuse a terminal.

Regular expressions in linear time; weights from safetensors alone; no code of a model's author; any
output encoding.
"""

import ast
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuzz import SETTINGS
from test_report import page_with

import data
import negatives
import rerank
import reward
from data import Example
from engine import loading
from engine.errors import UserError, exit_status, printable
from show import report, trace
from tasks import records
from tasks.answers import extract_answer, odd_answers, same_answer

ROOT = Path(data.__file__).parent
MODULES = sorted(
    str(path.relative_to(ROOT))[:-3].replace("/", ".")
    for room in (".", "engine", "show", "tasks")
    for path in (ROOT / room).glob("*.py")
    if path.stem != "__init__"
)
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)
)

# Regular expressions ------------------------------------------------------------------------------

SIZE = 5_000  # characters, and twice that
UNITS = (
    *("The answer is 1. ", "answer: a. ", "\\boxed{}", "$x$", "\\(", "\\frac{1}{", "\\text{", "x="),
    *("\n\nQuestion:", "1", "1,", ",111", "1,111", "-", "$1", "1.", "1/", "1 / ", " ", "\t", "\n"),
    *("\r\n", "a", "A. ", "A.\n", "A) x ", "(A) ", "####", "<answer>", "</answer>", "<think>\n"),
    *("\\boxed{", "{", "}", "{}", "<", "<<", ">>", "<<1", "<<1=1>>", "+", "1+", "1*1=", "(1)*"),
    *("3*12=36\n", "٣", "²", "é", "_", "the ", "Explanation:", "<style", "<style>", "<metadata>"),
    *(' id="', 'viewBox="', '<section id="a"><h2>', "url(#", "\x00", "\u2028", "\u3000", "😀"),
)
SHARE = 3  # of the time of a text, for one twice as long: 2 if it is linear, 4 if it is quadratic
TINY = 0.05  # seconds in which no growth is looked for: quadratic would be many


def adversaries(size: int) -> list[str]:
    """Texts of about that many characters, each made to be slow."""
    texts = [unit * (size // len(unit)) for unit in UNITS]
    for text in ("1" * size, " " * size, "1 " * (size // 2)):
        texts += [end + text + end for end in ("x", "1", "!")]
    texts += [
        "A. " + "x " * (size // 2) + "\x00",
        "1" + " " * size + "x",
        "A. x" + " " * size + "y",
    ]
    texts += ["<<" + "1" * size, "1,111" + ",111" * (size // 4) + "1"]
    return [*texts, "\n".join(["A. x" + " " * 300 + "y"] * (size // 300))]


def seconds(function, text: str) -> float:
    """Processor time of function(text)."""
    start = time.process_time()
    function(text)
    return time.process_time() - start


def assert_linear(function, size: int = SIZE) -> None:
    """A text twice as long takes at most SHARE times as long, whatever the machine. The least of
    some times counts, since others run beside."""
    for short, long in zip(adversaries(size), adversaries(2 * size)):
        function(short)  # what is compiled once is
        slow = seconds(function, long)
        fast = seconds(function, short)
        for _ in range(6):
            if slow <= max(SHARE * fast, TINY):
                break
            slow = min(slow, seconds(function, long))
            fast = min(fast, seconds(function, short))
        message = f"{fast:.3f} s, twice as long {slow:.3f} s for {long[:30]!r}..."
        assert slow <= max(SHARE * fast, TINY), message


def source_of(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


@cache
def constants(module: str) -> dict[str, ast.expr]:
    """What each name in a module's source is set to (the last of them), local names included."""
    found = {}
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.Assign):
            found |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
    return found


def text_of(module: str, node: ast.expr) -> str:
    """The string that an expression of the source stands for, as far as patterns need it."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(module, part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(module, node.value)
    if isinstance(node, ast.Name) and node.id in constants(module):
        return text_of(module, constants(module)[node.id])
    if isinstance(node, ast.Name):
        return getattr(import_module(module), node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return getattr(getattr(import_module(module), node.value.id), node.attr)
    raise AssertionError(
        f"{module}.py:{node.lineno}: make the pattern a plain string or a constant"
    )


def patterns() -> list:
    """(method, compiled pattern) of every call of `re` in the modules."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse(source_of(module))):
            called = getattr(node, "func", None)
            of_re = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
            if of_re and called.value.id == "re" and called.attr != "escape":
                flags = re.MULTILINE if "MULTILINE" in ast.dump(node) else 0
                pattern = re.compile(text_of(module, node.args[0]), flags)
                method = "search" if called.attr == "compile" else called.attr
                found.append(pytest.param(method, pattern, id=f"{module}.py:{node.lineno}"))
    return found


def test_every_regular_expression_is_found():
    sources = "\n".join(source_of(module) for module in MODULES)
    calls = re.findall(r"\bre\.(?!escape)[a-z]+\(", sources)
    assert len(patterns()) == len(calls) > 15
    assert not re.search(r"from re import|import re as", sources)


@pytest.mark.parametrize("method, pattern", patterns())
def test_regular_expressions_take_linear_time(method, pattern):
    def apply(text):
        found = pattern.sub("", text) if method == "sub" else getattr(pattern, method)(text)
        return list(found) if method == "finditer" else found

    assert_linear(apply)


def test_a_quadratic_pattern_is_noticed():
    with pytest.raises(AssertionError, match="twice as long"):
        assert_linear(re.compile(r"\s+x").findall, 4000)


def broken(kind):
    return lambda text: negatives.perturb(Example("?", text, text), random.Random(0), kind)


def from_record(**record):
    return records.from_record({"question": "?"} | record)


def from_medreason(text):
    row = {"question": "?", "options": text, "reasoning": "", "answer": text}
    return records.from_medreason(row)


def page_of_trace(text):
    return page_with(traces=[{"question": text, "tokens": [text], "rewards": [0.5]}])


EXPERT = Example("?", "1+1=2", "2", task="words")
USES = {
    "extract_answer": extract_answer,
    "same_answer": lambda text: same_answer(text, text),
    "same_answer: of one": lambda text: (same_answer("1", text), same_answer(text, "1")),
    "same_answer: options": lambda text: same_answer(text, "B", ("Mitral valve", text)),
    "is_correct": lambda text: data.is_correct(Example("?", "", text), text),
    "from_record": lambda text: from_record(trace=text, answer=f"1{text}"),
    "from_gsm8k": lambda text: from_record(answer=f"{text}#### 1"),
    "from_medreason": from_medreason,
    **{f"perturb: {kind}": broken(kind) for kind in [*negatives.BROKEN, "carried", "length"]},
    "first_error": lambda text: data.first_error(EXPERT, text),
    "odd_answers": lambda text: odd_answers([text, "1"]),
    "answer_keys": lambda text: rerank.answer_keys([[text, None]], [()]),
    "printable": printable,
    "report": page_of_trace,
}


@pytest.mark.parametrize("name", USES)
def test_functions_take_linear_time(name):
    assert_linear(USES[name])


# Weights and code ---------------------------------------------------------------------------------


def copy_of_base(tmp_path) -> Path:
    return Path(shutil.copytree(loading.BASE, tmp_path / "model"))


def load_head(name):
    return reward.load_reward("head", name)


LOADERS = (loading.load_policy, load_head)


def messages(folder: Path) -> str:
    """What both loaders say of a folder that they must refuse: a line each."""
    lines = []
    for load in LOADERS:
        with pytest.raises(UserError) as error:
            load(str(folder))
        assert "\n" not in str(error.value)
        lines.append(str(error.value))
    return "\n".join(lines)


@pytest.fixture
def no_pickle(monkeypatch):
    """Opening a pickle fails the test, even with torch's restricted unpickler."""

    def refuse(*arguments, **options):
        raise AssertionError("a pickle was opened")

    for module in (torch, torch.serialization, pickle):
        monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)


class Touch:
    """Unpickling one of these creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "pytorch_model.pt", "model.pkl", "part.bin"]
)
def test_pickled_weights_are_refused_and_never_opened(tmp_path, no_pickle, name, index):
    """Nor where an index leads to them."""
    folder = copy_of_base(tmp_path)
    mark = tmp_path / "HACKED"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weight": Touch(mark)}))
    content = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}})
    expected = f"names '{name}'" if index else "save_pretrained"
    if index:
        for kind in ("model.safetensors", "pytorch_model.bin"):
            (folder / f"{kind}.index.json").write_text(content)
    assert messages(folder).count(expected) == len(LOADERS)
    assert not mark.exists()


INDICES = ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}')
INDICES += ('{"weight_map": {"a": "../model.safetensors"}}',)
HEADS = (b"\xff" * 8, b"\x10" + b"\x00" * 7 + b"{" * 16, (2**40).to_bytes(8, "little"))


@pytest.mark.parametrize("damage", [*INDICES, *HEADS, 0, 4, 100, 5000, -1])
def test_broken_weights_are_one_line(tmp_path, damage):
    """An index that is none, a head that is none, a file that is cut off."""
    folder = copy_of_base(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    if isinstance(damage, str):
        (folder / "model.safetensors.index.json").write_text(damage)
    elif isinstance(damage, bytes):
        file.write_bytes(damage + whole[len(damage) :])
    else:
        file.write_bytes(whole[:damage])
    assert messages(folder).count(str(folder)) >= len(LOADERS)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_when_it_is_loaded(tmp_path, value):
    folder = copy_of_base(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert messages(folder).count("q_proj.weight holds NaN or infinity") == len(LOADERS)


def test_weights_in_several_files_load(tmp_path, shipped):
    folder = copy_of_base(tmp_path)
    (folder / "model.safetensors").unlink()
    shipped[0].save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert not (folder / "model.safetensors").exists()
    again = loading.load_policy(str(folder))[0]
    pairs = zip(again.parameters(), shipped[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("model_type", ["qwen2", "evil"])
def test_code_in_a_model_folder_is_not_run(tmp_path, model_type):
    """Whether transformers knows the architecture (then its own class is taken) or not (then it is
    refused)."""
    folder = copy_of_base(tmp_path)
    mark = tmp_path / "HACKED"
    source = f"open({str(mark)!r}, 'w')\n"
    for name in ("Config", "Model", "Tokenizer"):
        source += f"class Evil{name}: pass\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__"):
        (folder / f"{name}.py").write_text(source)
    classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForTokenClassification")
    of_model = {"AutoConfig": "configuration_evil.EvilConfig"}
    of_model |= dict.fromkeys(classes, "modeling_evil.EvilModel")
    of_tokenizer = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer"] * 2}
    changes = {
        "config.json": {
            "model_type": model_type,
            "architectures": ["EvilModel"],
            "auto_map": of_model,
        },
        "tokenizer_config.json": {"tokenizer_class": "EvilTokenizer", "auto_map": of_tokenizer},
    }
    for file, change in changes.items():
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | change))
    before = list(sys.path)
    if model_type == "evil":
        assert messages(folder).count("cannot load") == len(LOADERS)
    else:
        for load in LOADERS:
            load(str(folder))
    assert not mark.exists() and sys.path == before
    assert not [name for name in sys.modules if name.endswith("_evil")]


# Calls that turn data into code, and libraries whose files are code.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.jit", "torch.hub", "np.load", "numpy.load"}
FORBIDDEN_ATTRIBUTES |= {"os.system", "os.popen", "pd.read_pickle"}
SAFE = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True}


def dangers(source: str) -> list[str]:
    """The calls and imports in a Python source that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            found += {module} & FORBIDDEN_MODULES
            found += {f"{module}.{alias.name}" for alias in node.names} & FORBIDDEN_ATTRIBUTES
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += {node.func.id} & FORBIDDEN_CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += {f"{node.value.id}.{node.attr}"} & FORBIDDEN_ATTRIBUTES
        elif isinstance(node, ast.keyword) and node.arg in SAFE:
            if getattr(node.value, "value", None) is not SAFE[node.arg]:
                found.append(node.arg)
    return found


EXCUSED = {
    "tests/test_hostile.py": ["pickle"],  # made here, to show that nobody opens it
    "tests/test_parallel.py": ["torch.load"],  # of what its own processes have just saved
    "exercises/solutions/test_hints.py": ["exec"],  # of our own source, with a mistake put in
}


def test_no_source_runs_what_a_file_says():
    found = {}
    for path in SOURCES:
        in_source = dangers(path.read_text(encoding="utf-8"))
        if in_source:
            found[path.relative_to(ROOT).as_posix()] = in_source
    assert found == EXCUSED


@pytest.mark.parametrize(
    "source",
    [
        *("eval('1')", "import pickle", "from yaml import load", "torch.load('x')"),
        *("from torch import load", "f(trust_remote_code=True)", "f(trust_remote_code=yes)"),
        *("f(shell=True)", "f(weights_only=False)", "os.system('ls')"),
    ],
)
def test_the_search_for_such_calls_finds_them(source):
    assert dangers(source)
    assert not dangers("model.eval(); re.compile('a'); f(trust_remote_code=False)")


def test_every_model_is_loaded_from_safetensors_without_remote_code():
    loaders = {}
    for module in MODULES:
        names = re.findall(r"(\w+)\.from_pretrained\(", source_of(module))
        models = [name for name in names if "Tokenizer" not in name]
        if models:
            loaders[module] = models
    assert loaders == {"engine.loading": ["kind"]}
    source = source_of("engine.loading")
    assert source.count("use_safetensors=True") == source.count("trust_remote_code=False") == 1


# Terminals ----------------------------------------------------------------------------------------


@pytest.fixture
def inside(monkeypatch):
    """Run one of our programs in this process, on a terminal of some encoding: (status, what it
    printed, its errors)."""

    def program(main, *flags: str, encoding="utf-8"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["program.py", *flags])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            status = exit_status(main)
            for stream in streams:
                stream.flush()
        return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return program


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a run whose reward and policy are the base."""
    folder = tmp_path_factory.mktemp("terminal") / "ré⏎"
    for name in ("reward", "policy"):
        shutil.copytree(loading.BASE, folder / name)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


QUESTION = "Ava has 24 pens. Ava loses 9. How many pens?"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_fits_any_terminal(finished_run, inside, encoding):
    newline = "⏎" if encoding == "utf-8" else "\\u23ce"
    run = str(finished_run)
    flags = ("--run", run, "--question", QUESTION, "--trace", "24-9=15")
    status, shown, _ = inside(trace.main, *flags, encoding=encoding)
    assert status == 0 and "suspicious" in shown and newline in shown
    status, shown, _ = inside(report.main, run, encoding=encoding)
    assert status == 0 and newline in shown  # the folder's name
    flags = ("--run", run, "--candidates", "⏎.jsonl")
    status, _, error = inside(rerank.main, *flags, encoding=encoding)
    assert status == 2 and error.startswith("error: cannot read")
    assert newline in error and error.count("\n") == 1
    assert inside(data.main, encoding=encoding)[0] == 0


def test_an_error_on_an_ascii_terminal_is_one_line(tmp_path):
    """The whole way: a process of its own, a folder with a name that ASCII lacks, weights that are
    none."""
    folder = copy_of_base(tmp_path).rename(tmp_path / "⏎")
    (folder / "model.safetensors").write_bytes(b"no weights")
    flags = ("--model", str(folder), "--data", "words", "--device", "cpu")
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        timeout=300,
        capture_output=True,
        text=True,
        encoding="ascii",
    )
    assert result.returncode == 2 and result.stderr.startswith("error: cannot load model")
    assert "\\u23ce" in result.stderr and result.stderr.count("\n") == 1


def test_a_candidate_cannot_command_the_terminal(finished_run, inside, tmp_path):
    text = "\x1b]0;owned\x07\x1b[2J\u202e<think>\n1+1=2\n</think>\n<answer>2</answer>"
    row = {"question": "Ava has 2 pens. How many pens?", "candidates": [text]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row))
    flags = ("--run", str(finished_run), "--candidates", str(file))
    status, shown, _ = inside(rerank.main, *flags)
    assert status == 0 and "\\x1b]0;owned\\x07" in shown and "\\u202e" in shown
    assert not set("\x1b\x07\u202e") & set(shown)


def test_a_trace_cannot_command_the_terminal():
    shown = trace.show([("\x1b[2J", -1.0), ("\u202e", 0.5), ("\n", 1.0)])
    assert "\\x1b[2J" in shown and "\u202e" not in shown and "⏎\n" in shown
    assert re.fullmatch(r"[^\x1b]*", re.sub(r"\x1b\[[0-9;]*m", "", shown))


@pytest.mark.parametrize("lines", [1, 10**5])
def test_a_reader_that_has_read_enough_is_no_error(lines):
    """`| head -1`: nothing on stderr, whether the pipe breaks amid the output or at its end."""
    program = "from engine.errors import exit_status; "
    program += f"exit_status(lambda: [print('x' * 80) for _ in range({lines})])"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=buffered, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()
