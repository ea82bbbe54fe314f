"""Reading checkpoints: a network without adapters, and its tokenizer."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from klkit.models.hf import window_of
from klkit.models.rounding import round_weights
from klkit.models.spec import ModelSpec, locate

library: Any = transformers  # its own annotations are partial


def read_window(spec: ModelSpec) -> int | None:
    """The window of ``spec``, from its configuration alone.

    Raises:
        ValueError, OSError: as :func:`read_network`.
    """
    source = locate(spec.path)
    local = Path(source).is_dir()
    if local:
        _check_folder(spec, Path(source))
    with explained(spec.path):
        config = library.AutoConfig.from_pretrained(
            source,
            revision=spec.revision or "main",
            trust_remote_code=spec.trust_remote_code,
            local_files_only=local,
        )
    return window_of(config.get_text_config(decoder=True))


def read_network(spec: ModelSpec) -> tuple[Any, tuple[str, ...]]:
    """The causal language model of ``spec``, its weights rounded but without adapter, and notes on how it was read.

    Raises:
        ValueError: weights are missing from the checkpoint, or it is no causal language model.
        OSError: it cannot be found.
        ImportError: a library for quantisation or placement is missing.
    """
    source = locate(spec.path)
    local = Path(source).is_dir()
    if local:
        _check_folder(spec, Path(source))
    device = _device(spec.device)
    common = {
        "revision": spec.revision or "main",
        "trust_remote_code": spec.trust_remote_code,
        "local_files_only": local,
    }
    settings: dict[str, Any] = {"use_safetensors": spec.safetensors, "output_loading_info": True}
    with explained(spec.path):
        config = library.AutoConfig.from_pretrained(source, **common)
        quantized = spec.quantization is not None or getattr(config, "quantization_config", None) is not None
        settings["dtype"] = spec.dtype or ("auto" if quantized else "float32")
        if spec.attn is not None:
            settings["attn_implementation"] = spec.attn
        if spec.quantization is not None:
            settings["quantization_config"] = _quantization(spec.quantization)
            settings["device_map"] = spec.device_map or {"": spec.device}
        elif spec.device_map is not None:
            _require("accelerate", "device_map")
            settings["device_map"] = spec.device_map
        network, info = library.AutoModelForCausalLM.from_pretrained(source, config=config, **common, **settings)
    missing = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"expected all weights of {type(network).__name__} in {spec.path!r}, got a checkpoint that lacks "
            f"{len(missing)} ({', '.join(missing[:3])}); random numbers would stand in: complete the checkpoint"
        )
    if "device_map" not in settings:
        network = network.to(device)
    unused = sorted(info["unexpected_keys"])
    notes: tuple[str, ...] = (
        (f"{len(unused)} weights of {spec.path} are not used, such as {unused[0]}",) if unused else ()
    )
    if spec.round is not None:
        notes += (round_weights(network, *spec.rounding()),)
    return network, notes


def read_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer of ``spec``: the named one, else one that lies beside the adapter, else the model's."""
    beside_adapter = spec.peft is not None and (Path(locate(spec.peft)) / "tokenizer_config.json").is_file()
    place = spec.tokenizer or (spec.peft if beside_adapter else None) or spec.path
    source = locate(place)
    with explained(place):
        return library.AutoTokenizer.from_pretrained(
            source,
            revision=(spec.revision if place == spec.path else None) or "main",
            trust_remote_code=spec.trust_remote_code,
            local_files_only=Path(source).is_dir(),
        )


def _check_folder(spec: ModelSpec, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"expected a checkpoint folder with config.json, got {spec.path!r}, which holds {listing(folder)}; "
            f"name the folder that save_pretrained wrote"
        )
    if spec.safetensors and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise ValueError(
            f"expected weights in safetensors format in {spec.path!r}, got pickled ones (*.bin), which can run code; "
            f"if you trust them, add safetensors=false"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"expected a device such as cpu, cuda, cuda:1 or mps, got {name!r}; name one of these"
        ) from None
    ready = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not ready.get(device.type, True):
        raise ValueError(
            f"expected a device that this torch can use, got {name!r}, for which it was not built or finds nothing; "
            f"leave device=... out to run on the CPU"
        )
    return device


def _quantization(kind: str) -> Any:
    _require("bitsandbytes", f"quantization={kind}")
    _require("accelerate", f"quantization={kind}")
    return library.BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")


def _require(library: str, option: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ImportError(
            f"expected the library {library} for {option}, got an environment without it; pip install {library}, or "
            f"name a checkpoint that is quantised already"
        )


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what transformers raises for an unreachable or unreadable checkpoint into one clear message."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        text = str(error)
        if text.startswith("expected"):
            raise
        if "trust_remote_code" in text:
            raise ValueError(
                f"expected a model that transformers knows, got {place!r}, which brings its own code; "
                f"read that code, and if you trust it add trust_remote_code=true"
            ) from None
        unreachable = isinstance(error, OSError) or "Can't find" in text
        if Path(place).expanduser().is_dir() or not unreachable:
            raise ValueError(
                f"expected a causal language model that transformers can read, got {place!r}: {first_line(error)}; "
                f"check the files of the checkpoint"
            ) from None
        raise FileNotFoundError(
            f"expected a model in the local cache or on the Hugging Face Hub, got {place!r}, which neither provides: "
            f"{first_line(error)} Check the name; without a network (or with HF_HUB_OFFLINE=1) fetch it elsewhere, by "
            f"'hf download {place} --local-dir FOLDER', and name that folder; for a gated model run 'hf auth login'."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log lines of transformers and of the Hub's client, and put their settings back."""
    logging, hub_logging = library.utils.logging, huggingface_hub.utils.logging
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of what an exception says."""
    return str(error).strip().split("\n", maxsplit=1)[0]


def listing(folder: str | Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(entry.name for entry in Path(folder).iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
