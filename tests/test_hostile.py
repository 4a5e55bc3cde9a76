"""Files from elsewhere cannot slow us down, run code, or confuse a terminal.

Regular expressions in linear time; weights from safetensors alone; no code of a model's author; any output encoding.
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
MODULES = sorted(str(path.relative_to(ROOT))[:-3].replace("/", ".") for room in (".", "engine", "show", "tasks")
                 for path in (ROOT / room).glob("*.py") if path.stem != "__init__")
SOURCES = sorted(path for path in ROOT.rglob("*.py") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts))

# Regular expressions -------------------------------------------------------------------------------------------

SIZE = 10_000  # characters, and twice that
UNITS = ("The answer is 1. ", "answer: a. ", "\\boxed{}", "$x$", "\\(", "\\frac{1}{", "\\text{", "\n\nQuestion:", "x=",
         "1", "1,", ",111", "1,111", "-", "$1", "1.", "1/", "1 / ", " ", "\t", "\n", "\r\n", "a", "A. ", "A.\n", "A) x ",
         "(A) ", "####", "<answer>", "</answer>", "<think>\n", "\\boxed{", "{", "}", "{}", "<", "<<", ">>", "<<1", "<<1=1>>",
         "+", "1+", "1*1=", "3*12=36\n", "(1)*", "٣", "²", "é", "_", "the ", "Explanation:", "<style", "<style>", "<metadata>",
         ' id="', 'viewBox="', '<section id="a"><h2>', "url(#", "\x00", "\u2028", "\u3000", "😀")  # fmt: skip
SHARE = 3  # of the time of a text, for one twice as long: 2 if it is linear, 4 if it is quadratic
TINY = 0.05  # seconds of processor time in which no growth is looked for: quadratic would be seconds


def adversaries(size: int) -> list[str]:
    """Texts of about that many characters, each made to be slow."""
    texts = [unit * (size // len(unit)) for unit in UNITS]
    texts += [end + text + end for text in ("1" * size, " " * size, "1 " * (size // 2)) for end in ("x", "1", "!")]
    texts += ["A. " + "x " * (size // 2) + "\x00", "1" + " " * size + "x", "A. x" + " " * size + "y", "<<" + "1" * size]
    texts += ["1,111" + ",111" * (size // 4) + "1", "\n".join(["A. x" + " " * 300 + "y"] * (size // 300))]
    return texts


def seconds(function, text: str) -> float:
    """Processor time of function(text)."""
    start = time.process_time()
    function(text)
    return time.process_time() - start


def assert_linear(function, size: int = SIZE) -> None:
    """A text twice as long takes at most SHARE times as long, whatever the machine. The least of some times counts, since
    others run beside."""
    for short, long in zip(adversaries(size), adversaries(2 * size)):
        function(short)  # what is compiled once is
        slow = seconds(function, long)
        fast = seconds(function, short)
        for _ in range(6):
            if slow <= max(SHARE * fast, TINY):
                break
            slow = min(slow, seconds(function, long))
            fast = min(fast, seconds(function, short))
        assert slow <= max(SHARE * fast, TINY), f"{fast:.3f} s, twice as long {slow:.3f} s for {long[:30]!r}..."


def source_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


@cache
def constants(module: str) -> dict[str, ast.expr]:
    """What each name in a module's source is set to (the last of them), local names included."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    return {target.id: node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip


def text_of(module: str, node: ast.expr) -> str:
    """The string that an expression of the source stands for, as far as patterns need it."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(module, part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(module, node.value)
    if isinstance(node, ast.Name):
        known = constants(module)
        return text_of(module, known[node.id]) if node.id in known else getattr(import_module(module), node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return getattr(getattr(import_module(module), node.value.id), node.attr)
    raise AssertionError(f"{module}.py:{node.lineno}: what pattern is this? Make it a plain string or a constant")


def patterns() -> list:
    """(place, method, compiled pattern) of every call of `re` in the modules, and of every compiled pattern they keep."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = node.func
                if isinstance(called.value, ast.Name) and called.value.id == "re" and called.attr != "escape":
                    flags = re.MULTILINE if "MULTILINE" in ast.dump(node) else 0
                    pattern = re.compile(text_of(module, node.args[0]), flags)
                    method = "search" if called.attr == "compile" else called.attr
                    found.append(pytest.param(method, pattern, id=f"{module}.py:{node.lineno}"))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Regex":
                pattern = re.compile(text_of(module, node.args[0]))
                found.append(pytest.param("findall", pattern, id=f"{module}.py:{node.lineno}"))
    return found


def test_every_regular_expression_is_found():
    calls = sum(
        len(re.findall(r"\bre\.[a-z]+\(|\bRegex\(", source_of(m).read_text(encoding="utf-8"))) for m in MODULES
    )
    assert len(patterns()) == calls > 15
    assert not any(
        re.search(r"from re import|import re as", source_of(m).read_text(encoding="utf-8")) for m in MODULES
    )


@pytest.mark.parametrize("method, pattern", patterns())
def test_regular_expressions_take_linear_time(method, pattern):
    def apply(text):
        found = pattern.sub("", text) if method == "sub" else getattr(pattern, method)(text)
        return list(found) if method == "finditer" else found

    assert_linear(apply)


def test_a_quadratic_pattern_is_noticed():
    with pytest.raises(AssertionError, match="twice as long"):
        assert_linear(re.compile(r"\s+x").findall, 4000)


def medreason(text):
    return records.from_medreason({"question": "?", "options": text, "reasoning": "", "answer": text})


def broken(kind):
    return lambda text: negatives.perturb(Example("?", text, text), random.Random(0), kind)


USES = {
    "extract_answer": extract_answer,
    "same_answer": lambda text: (
        same_answer(text, text),
        same_answer("1", text),
        same_answer(text, "1"),
    ),
    "is_correct": lambda text: data.is_correct(Example("?", "", text), text),
    "from_record": lambda text: records.from_record({"question": "?", "trace": text, "answer": f"1{text}"}),
    "from_gsm8k": lambda text: records.from_record({"question": "?", "answer": f"{text}#### 1"}),
    "from_medreason": medreason,
    **{f"perturb: {kind}": broken(kind) for kind in [*negatives.BROKEN, "carried"]},
    "first_error": lambda text: data.first_error(Example("?", "1+1=2", "2", task="words"), text),
    "same_answer: options": lambda text: same_answer(text, "B", ("Mitral valve", text)),
    "odd_answers": lambda text: odd_answers([text, "1"]),
    "answer_keys": lambda text: rerank.answer_keys([[text, None]], [()]),
    "printable": printable,
    "report": lambda text: page_with(traces=[{"question": text, "tokens": [text], "rewards": [0.5]}]),
}


@pytest.mark.parametrize("name", USES)
def test_functions_take_linear_time(name):
    assert_linear(USES[name])


# Weights and code ----------------------------------------------------------------------------------------------


def copy_of_base(tmp_path) -> Path:
    return Path(shutil.copytree(loading.BASE, tmp_path / "model"))


def one_line(call, *arguments) -> str:
    """The message of the UserError that a call must raise."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def no_pickle(monkeypatch):
    """Opening a pickle fails the test, even with torch's restricted unpickler."""

    def refuse(*arguments, **options):
        raise AssertionError("a pickle was opened")

    for module, name in ((torch, "load"), (torch.serialization, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)


LOADERS = (loading.load_policy, lambda name: reward.load_reward("likelihood", name),
           lambda name: reward.load_reward("head", name))  # fmt: skip


class Touch:
    """Unpickling one of these creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.pt", "model.pkl"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, no_pickle, name):
    folder, mark = copy_of_base(tmp_path), tmp_path / "HACKED"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weight": Touch(mark)}))
    for load in LOADERS:
        message = one_line(load, str(folder))
        assert "no model.safetensors" in message and "save_pretrained" in message
    assert not mark.exists()


def test_an_index_cannot_lead_to_pickles(tmp_path, no_pickle):
    folder, mark = copy_of_base(tmp_path), tmp_path / "HACKED"
    (folder / "model.safetensors").unlink()
    (folder / "part.bin").write_bytes(pickle.dumps({"weight": Touch(mark)}))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / name).write_text(json.dumps(index))
    for load in LOADERS:
        assert "names 'part.bin'" in one_line(load, str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 5}}',
                                   '{"weight_map": {"a": "../model.safetensors"}}'])  # fmt: skip
def test_a_broken_index_is_one_line(tmp_path, index):
    folder = copy_of_base(tmp_path)
    (folder / "model.safetensors.index.json").write_text(index)
    for load in LOADERS:
        one_line(load, str(folder))


def test_weights_in_several_files_load(tmp_path, shipped):
    folder = copy_of_base(tmp_path)
    (folder / "model.safetensors").unlink()
    shipped[0].save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").exists() and not (folder / "model.safetensors").exists()
    again = loading.load_policy(str(folder))[0]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), shipped[0].parameters()))


@pytest.mark.parametrize("model_type", ["qwen2", "evil"])
def test_code_in_a_model_folder_is_not_run(tmp_path, model_type):
    """Whether transformers knows the architecture (then its own class is taken) or not (then it is refused)."""
    folder, mark = copy_of_base(tmp_path), tmp_path / "HACKED"
    source = f"open({str(mark)!r}, 'w')\nclass EvilConfig: pass\nclass EvilModel: pass\nclass EvilTokenizer: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(source)
    config = json.loads((folder / "config.json").read_text())
    classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForTokenClassification")
    config |= {"model_type": model_type, "architectures": ["EvilModel"], "auto_map": {
        "AutoConfig": "configuration_evil.EvilConfig"} | dict.fromkeys(classes, "modeling_evil.EvilModel")}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer"] * 2},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    before = list(sys.path)
    for load in LOADERS:
        if model_type == "evil":
            assert "cannot load" in one_line(load, str(folder))
        else:
            load(str(folder))
    assert not mark.exists() and sys.path == before
    assert not [name for name in sys.modules if name.endswith("_evil")]


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_cut_off_weights_are_one_line(tmp_path, keep):
    folder = copy_of_base(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    for load in LOADERS:
        assert str(folder) in one_line(load, str(folder))


@pytest.mark.parametrize("head", [b"\xff" * 8, b"\x10" + b"\x00" * 7 + b"{" * 16, (2**40).to_bytes(8, "little")])
def test_broken_weights_are_one_line(tmp_path, head):
    folder = copy_of_base(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(head + content[len(head) :])
    for load in LOADERS:
        assert str(folder) in one_line(load, str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_when_it_is_loaded(tmp_path, shipped, value):
    folder = copy_of_base(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in LOADERS:
        message = one_line(load, str(folder))
        assert "q_proj.weight holds NaN or infinity" in message and str(folder) in message


# Calls that turn data into code, and libraries whose files are code.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "jit"), ("torch", "hub"), ("np", "load"), ("numpy", "load"),
                        ("os", "system"), ("os", "popen"), ("pd", "read_pickle")}  # fmt: skip


def dangers(source: str) -> list[str]:
    """The calls and imports in a Python source that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            named = {((node.module or "").split(".")[0], alias.name) for alias in node.names}
            found += [
                module
                for module, name in named
                if module in FORBIDDEN_MODULES or (module, name) in FORBIDDEN_ATTRIBUTES
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] * ((node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES)
        elif isinstance(node, ast.keyword) and node.arg in (
            "trust_remote_code",
            "shell",
            "allow_pickle",
            "weights_only",
        ):
            safe = isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")
            found += [] if safe else [node.arg]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path):
    excused = {
        "tests/test_hostile.py": ["pickle"],  # made here, to show that nobody opens it
        "tests/test_parallel.py": ["torch.load"],  # of what the test's own processes have just saved
        "exercises/solutions/test_hints.py": ["exec"],
    }  # of our own source, with a mistake put in
    assert dangers(path.read_text(encoding="utf-8")) == excused.get(path.relative_to(ROOT).as_posix(), [])


def test_the_search_for_such_calls_finds_them():
    for source in ("eval('1')", "import pickle", "from yaml import load", "torch.load('x')", "from torch import load",
                   "f(trust_remote_code=True)", "f(shell=True)", "f(weights_only=False)", "os.system('ls')"):  # fmt: skip
        assert dangers(source), source
    assert not dangers("model.eval(); re.compile('a'); f(trust_remote_code=False)")


def test_every_model_is_loaded_from_safetensors_without_remote_code():
    sources = {module: source_of(module).read_text(encoding="utf-8") for module in MODULES}
    calls = {module: re.findall(r"(\w+)\.from_pretrained\(", source) for module, source in sources.items()}
    loaders = {module: [who for who in found if "Tokenizer" not in who] for module, found in calls.items()}
    assert {module: found for module, found in loaders.items() if found} == {"engine.loading": ["kind"]}
    assert all(sources["engine.loading"].count(how) == 1 for how in ("use_safetensors=True", "trust_remote_code=False"))


# Terminals -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inside(monkeypatch):
    """Run one of our programs in this process, on a terminal of some encoding: (status, what it printed, its errors)."""

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
    from test_fuzz import SETTINGS

    folder = tmp_path_factory.mktemp("terminal") / "ré⏎"
    for name in ("reward", "policy"):
        shutil.copytree(loading.BASE, folder / name)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


QUESTION = "Ava has 24 pens. Ava loses 9. How many pens?"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_fits_any_terminal(finished_run, inside, encoding):
    newline = "⏎" if encoding == "utf-8" else "\\u23ce"
    flags = ("--run", str(finished_run), "--question", QUESTION, "--trace", "24-9=15")
    status, shown, _ = inside(trace.main, *flags, encoding=encoding)
    assert status == 0 and "suspicious" in shown and newline in shown
    status, shown, _ = inside(report.main, str(finished_run), encoding=encoding)
    assert status == 0 and newline in shown  # the folder's name
    status, _, said = inside(rerank.main, "--run", str(finished_run), "--candidates", "⏎.jsonl", encoding=encoding)
    assert status == 2 and said.startswith("error: cannot read") and newline in said and said.count("\n") == 1
    assert inside(data.main, encoding=encoding)[0] == 0


def test_an_error_on_an_ascii_terminal_is_one_line(tmp_path):
    """The whole way: a process of its own, a model folder with a name that ASCII lacks, weights that are none."""
    folder = copy_of_base(tmp_path).rename(tmp_path / "⏎")
    (folder / "model.safetensors").write_bytes(b"no weights")
    flags = ("--model", str(folder), "--data", "words", "--device", "cpu")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, env=environment, timeout=300,
                          capture_output=True, text=True, encoding="ascii", check=False)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: cannot load model") and "\\u23ce" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_candidate_cannot_command_the_terminal(finished_run, inside, tmp_path):
    text = "\x1b]0;owned\x07\x1b[2J\u202e<think>\n1+1=2\n</think>\n<answer>2</answer>"
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"question": "Ava has 2 pens. How many pens?", "candidates": [text]})
    )
    status, shown, _ = inside(rerank.main, "--run", str(finished_run), "--candidates", str(tmp_path / "mine.jsonl"))
    assert status == 0 and "\\x1b]0;owned\\x07" in shown and "\\u202e" in shown
    assert not set("\x1b\x07\u202e") & set(shown)


def test_a_trace_cannot_command_the_terminal():
    shown = trace.show([("\x1b[2J", -1.0), ("\u202e", 0.5), ("\n", 1.0)])
    assert "\\x1b[2J" in shown and "\u202e" not in shown and "⏎\n" in shown
    assert re.fullmatch(r"[^\x1b]*", re.sub(r"\x1b\[[0-9;]*m", "", shown))


@pytest.mark.parametrize("lines", [1, 10**5])
def test_a_reader_that_has_read_enough_is_no_error(lines):
    """`| head -1`: nothing on stderr, whether the pipe breaks amid the output or at its end."""
    program = f"from engine.errors import exit_status; exit_status(lambda: [print('x' * 80) for _ in range({lines})])"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=buffered, **pipes)
    done.stdout.close()
    assert done.stderr.read() == b"" and done.wait() == 0
    done.stderr.close()
