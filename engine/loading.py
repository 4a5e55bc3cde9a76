"""Models and tokenizers by name, from safetensors only; what cannot work is refused at once."""

import json
import os.path
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engine.errors import UserError, nearest

TASKS = Path(__file__).parents[1] / "tasks"
# The small bases that ship with this repository (tasks/pretrain.py made them).
SHIPPED = {"base": str(TASKS / "words-base"), "countdown-base": str(TASKS / "countdown-base")}
BASE = SHIPPED["base"]
OWNERS = {  # on the hub: of the paper's models and their neighbours
    "Qwen": "Qwen2.5-0.5B Qwen2.5-1.5B Qwen2.5-3B Qwen2.5-7B Qwen2.5-14B Qwen2.5-0.5B-Instruct "
    "Qwen2.5-1.5B-Instruct Qwen2.5-3B-Instruct Qwen2.5-7B-Instruct Qwen2.5-14B-Instruct "
    "Qwen3-0.6B Qwen3-1.7B Qwen3-4B Qwen3-8B",
    "meta-llama": "Llama-3.2-1B Llama-3.2-3B Llama-3.1-8B Llama-3.2-1B-Instruct "
    "Llama-3.2-3B-Instruct Llama-3.1-8B-Instruct",
}
SHORT_NAMES = {name: f"{owner}/{name}" for owner in OWNERS for name in OWNERS[owner].split()}

# Names --------------------------------------------------------------------------------------------


def resolve_model(name: str) -> str:
    """'base' and 'countdown-base' ship here, a short name gets its owner, a folder or an owner/name
    for the hub stays."""
    if name in SHIPPED:
        return SHIPPED[name]
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name that no folder can have
        if not (Path(name) / "config.json").exists():
            raise UserError(f"folder {name} holds no model: config.json is missing")
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    if name not in SHORT_NAMES:
        raise UserError(
            f"no model '{name}'{nearest(name, SHORT_NAMES)}: give a folder, a hub name owner/model "
            f"or one of {', '.join(SHORT_NAMES)}"
        )
    return SHORT_NAMES[name]


@contextmanager
def in_one_line(name: str):
    """Whatever goes wrong while loading `name` becomes one line that says how to mend it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError; tokenizers raises bare ones
        why = str(error).strip().split("\n")[0]
        if not os.path.isdir(resolve_model(name)):
            why += ". Without a network, give a folder: --model DIR"
        raise UserError(f"cannot load model '{name}': {why}") from None


# Tokenizers ---------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """What tokenizer.json says. AutoTokenizer would give any Qwen2 model, ours included, the
    pre-tokenizer of Qwen2."""
    with in_one_line(name):
        return PreTrainedTokenizerFast.from_pretrained(resolve_model(name))


def check_same_tokenizer(tokenizer, other: str) -> None:
    """The reward scores the very token ids that the policy sampled: text that is tokenised anew
    shifts by a token."""
    if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer of '{other}' differs from that of the model it is to work with: policy "
            "and reward must be of one family. What another model wrote can be judged as text: "
            "rerank.py --candidates FILE"
        )


# Models -------------------------------------------------------------------------------------------


def load_policy(name: str, device="cpu", dtype=torch.float32):
    """(model, tokenizer). Refused is what would go wrong silently later."""
    model = load_causal(name, device, dtype)
    tokenizer = load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{name}' has no end token (eos_token): a policy could never stop"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of '{name}' has {len(tokenizer)} tokens, its model {rows} embeddings"
        )
    return model, tokenizer


def load_causal(name: str, device="cpu", dtype=torch.float32):
    """The model of `load_policy` alone."""
    model = load_model(name, AutoModelForCausalLM, dtype).to(device)
    check_output_layer(model, name)
    return model


def load_model(name: str, kind: type, dtype=torch.float32, **options):
    """What kind.from_pretrained makes of a folder or hub name, without dropout (eval).

    Weights come from safetensors files only, and no code of the model's author is run.
    """
    path = resolve_model(name)
    with in_one_line(name):
        check_weights(path)
        loaded = kind.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    # With output_loading_info: (model, info).
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    # One NaN makes every number of a run NaN, which the run would say at its end.
    for tensor_name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"the weights of '{name}' are damaged: {tensor_name} holds NaN or infinity. Fetch "
                "or save that model anew"
            )
    return loaded


def check_weights(folder: str) -> None:
    """Refuse a folder (not a hub's name) whose weights are not safetensors: a pickle (.bin, .pt)
    can run code when it is opened."""
    index = Path(folder, "model.safetensors.index.json")
    if os.path.isfile(index):  # transformers opens whatever file an index names
        for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if not str(file).endswith(".safetensors") or os.path.basename(file) != file:
                raise UserError(
                    f"{index} names {file!r}: weights must be .safetensors files beside it"
                )
    elif os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model.safetensors")):
        raise UserError(
            f"folder {folder} holds no model.safetensors: other weights (.bin, .pt) are not "
            "opened, they can run code. Save them anew with transformers: save_pretrained"
        )


def output_layer(model) -> tuple[torch.Tensor, float]:
    """(output matrix W [V, H], softcap): logits are softcap * tanh(W h / softcap), or W h where
    softcap is 0."""
    softcap = getattr(model.config, "final_logit_softcapping", None) or 0.0
    return model.get_output_embeddings().weight, softcap


@torch.no_grad()
def check_output_layer(model, name: str) -> None:
    """Refuse a model whose logits are not softcap(W h), which is all that logprob.py knows: a bias
    or a scale after W would make every log-probability wrong, silently."""
    tokens = ordinary_tokens(model)  # [1, n]
    weight, softcap = output_layer(model)
    logits = model.get_decoder()(tokens).last_hidden_state.float() @ weight.float().T  # [1, n, V]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = model(tokens).logits.float()
    if not expected.norm() > 0:  # NaN is not, either
        raise UserError(
            f"'{name}' gives the same logit, 0, to every token: its weights are empty or damaged"
        )
    if logits.shape != expected.shape or (logits - expected).norm() > 0.05 * expected.norm():
        raise UserError(
            f"the output layer of '{name}' is not of the kind known here, a matrix without bias or "
            "scale"
        )


def ordinary_tokens(model, count: int = 16) -> torch.Tensor:
    """[1, count] token ids, spread over the vocabulary: at both its ends are special tokens, and
    padding, whose embedding may be 0, shows nothing."""
    last = model.get_input_embeddings().num_embeddings - 1
    return torch.linspace(0, last, count + 2, device=model.device)[1:-1].long()[None]


def context_length(model) -> int:
    """The longest sequence the model was made for."""
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))


# Devices and lines --------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """'auto' is CUDA where there is one, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"device '{name}' cannot be used here ({why}): --device auto takes what there is"
        ) from None
    return torch.device(name)


def quiet() -> None:
    """Silence the libraries' progress bars and advice, which would bury our own lines."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
