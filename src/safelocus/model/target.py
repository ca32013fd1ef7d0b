"""The target: the causal LM under study, with its tokenizer, chat format and layout.

`load` takes a folder, a hub id, `organism:NAME` or `smollm2` and checks everything that can be checked before
weights are read: the folder, its configuration, tokenizer and weight files (safetensors only; no
pickle is ever loaded), and afterwards that no weight was missing and silently initialised.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from safelocus import distributed
from safelocus.errors import ModelError, ResourceError, first_line, some
from safelocus.model import autocast
from safelocus.model.autocast import Autocast
from safelocus.model.chat import ChatFormat, chat_format
from safelocus.model.fingerprint import Fingerprint, dtype_name
from safelocus.model.layout import Layout, canonical_name, is_adapter
from safelocus.model.layout.sizes import auto_class
from safelocus.model.quantised import Quantisation
from safelocus.model.trial import try_text

_QUICK_BYTES = 1 << 30  # weights below this load in a moment
_ADAPTER_BESIDE = (
    "an adapter (adapter_config.json) comes with the model, and transformers applies it on top. Where it is merged "
    "already, move adapter_* away; else load the model and the adapter apart, and save them merged into another folder"
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Thinking = Literal["on", "off"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A causal (or encoder-decoder) LM ready to be scored.

    Attributes:
        name: the path or hub id it came from, for provenance.
        model: a transformers model (PEFT-wrapped or sharded ones too), in evaluation mode.
        tokenizer: its tokenizer; must have a padding or end-of-text token.
        chat: how prompts become token ids.
        layout: how its tensors divide into logical matrices.
        autocast: what its products are computed in, where that is not the weights' own type.
        origin: (folder or hub id, revision) that it was loaded from; None for a model that was in memory.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    layout: Layout
    autocast: Autocast | None = None
    origin: tuple[str, str | None] | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        layout: Path | None = None,
        skip_unknown: bool = False,
        system: str | None = None,
        template: str | None = None,
        thinking: Thinking | None = None,
    ) -> "Target":
        """Wrap a model that is already in memory. `layout`, `skip_unknown`, `thinking`: as for `load`."""
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ModelError(
                    "the tokenizer has neither a padding nor an end-of-text token; batches cannot be padded. "
                    "Set `tokenizer.pad_token` before wrapping it"
                )
            tokenizer.pad_token_id = tokenizer.eos_token_id
        embedding = model.get_input_embeddings().weight
        if tokenizer.pad_token_id >= (rows := getattr(embedding, "ds_shape", embedding.shape)[0]):
            raise ModelError(
                f"the tokenizer pads with token {tokenizer.pad_token_id} ({tokenizer.pad_token}), but the model has "
                f"{rows} embeddings. Set `tokenizer.pad_token` to a token that it knows ({tokenizer.eos_token}, say), "
                "or enlarge its embedding: model.resize_token_embeddings(len(tokenizer))"
            )
        if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise ModelError(
                f"{len(absent)} tensors hold no values, first of them {absent[0]!r}: accelerate offloaded them to "
                "the CPU or to disk because the devices are full. Load with offload=True (--offload), on more devices, "
                "or with device='cpu'; `safelocus plan` says what fits"
            )
        model.eval()
        distributed.reshard_after_use(model)
        return cls(
            name=name or getattr(model.config, "_name_or_path", "") or type(model).__name__,
            model=model,
            tokenizer=tokenizer,
            chat=chat_format(
                tokenizer,
                system=system,
                template=template,
                thinking=_whether(thinking),
                generation_config=getattr(model, "generation_config", None),
                reads_apart=bool(model.config.is_encoder_decoder),
            ),
            layout=Layout.of(model, file=layout, skip_unknown=skip_unknown),
        )

    @property
    def device(self) -> torch.device:
        """Where input ids go: where the input embedding is, or is used where it waits in the host's memory."""
        return distributed.used_on(self.model.get_input_embeddings().weight)

    @property
    def is_sharded(self) -> bool:
        """Whether its weights are spread over the processes, all of which must use it together."""
        return distributed.any_sharded(dict(self.model.named_parameters()))

    @property
    def dtype(self) -> str:
        """Of its weights, and of its products where that is another: "float32", "float32, bfloat16 products"."""
        weights = dtype_name(self.model.dtype)
        return weights if self.autocast is None else f"{weights}, {dtype_name(self.autocast.dtype)} products"

    def talking_as(self, chat: Mapping[str, Any]) -> "Target":
        """The same, talked to in another way: what `ChatFormat.to_json` said of it."""
        if chat == self.chat.to_json():
            return self
        form = chat_format(
            self.tokenizer, system=chat["system"], template=chat["template"], thinking=chat["thinking"],
            generation_config=getattr(self.model, "generation_config", None), reads_apart=self.chat.reads_apart,
            **chat["template_kwargs"],
        )  # fmt: skip
        return replace(self, chat=form)

    def identity(self) -> dict[str, Any]:
        """All that its answers depend on, to the bit."""
        parameters = [(canonical_name(name), parameter) for name, parameter in self.model.named_parameters()]
        adapters = Fingerprint.of_tensors(self.model.config, [each for each in parameters if is_adapter(each[0])])
        saved = self.model.state_dict()
        # DeepSeek-V3's say where tokens are routed
        buffers = [
            (canonical_name(name), buffer)
            for name, buffer in self.model.named_buffers()
            if name in saved and buffer.is_floating_point()
        ]
        return {
            "dtype": self.dtype,
            "weights": self.fingerprint().id,
            "adapters": adapters.id if adapters.tensors else None,
            **({"buffers": Fingerprint.of_tensors(self.model.config, buffers).id} if buffers else {}),
            **self.chat.identity(),
        }

    def fingerprint(self, *, like: Mapping[str, Any] | None = None) -> Fingerprint:
        """Digest of configuration and weights as they are now; reads every weight once.

        Args:
            like: of a model that this one may be in another dtype; see `fingerprint.check_made_for`.
        """
        return Fingerprint.of(self.model, self.layout, like=like)


def load(
    name: str | Path,
    *,
    dtype: Dtype = "auto",
    device: str | None = None,
    layout: Path | None = None,
    skip_unknown: bool = False,
    system: str | None = None,
    template: str | None = None,
    thinking: Thinking | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    shard: bool = False,
    offload: bool = False,
) -> Target:
    """Load a target from a folder, a hub id, `organism:NAME` or `smollm2`.

    Args:
        name: where the model is.
        dtype: the weights' type in memory; "auto" keeps the checkpoint's on an accelerator, and on a CPU takes fp32,
            with products in bf16 where those are quicker (see `autocast`).
        device: "cuda", "cpu", ... or "auto" to place over several devices; default: the accelerator if any.
        layout: TOML file that describes an architecture unknown here (`safelocus inspect` prints one).
        skip_unknown: leave tensors that are not understood out of everything (`Layout.left_out` says which) instead of
            refusing the model.
        system: system prompt put before every request; folded into the request where the chat
            template has no system role.
        template: plain template with `{prompt}`, instead of the tokenizer's chat template.
        thinking: whether the model is to think before it answers, where its chat template lets one choose; by default
            it does where the template opens a thought of itself. What it thinks is never judged.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model. Off unless you ask.
        shard: spread the weights over the processes of the current group (FSDP2); each reads its rows only.
        offload: keep the weights in the host's memory, from where each layer comes to the accelerator when it is used;
            for a model that is larger than that. Several processes shard it too. Nothing happens without accelerator.

    Raises:
        ModelError: missing or damaged files, pickle-only weights, missing tensors, weights quantised for good; a model
            that cannot read text alone, or sees what follows a token.
        LayoutError: an architecture that is not understood; the message shows how to describe it.
        ResourceError: there is no such device, or too little memory.
        PromptError: a template that is not one; thinking is asked of a chat template that knows of none.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense")
        >>> target.layout.family
        'llama'
    """
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, **hub)
    chat_format(tokenizer, system=system, template=template, thinking=_whether(thinking))  # before the weights are read
    # the latter says what it does not know, and runs code that is asked for
    auto = auto_class(config) or AutoModelForCausalLM
    several, offload = distributed.world_size() > 1, offload and default_device().type != "cpu"
    if (offload or (shard and several)) and device is not None:
        raise ModelError(f"{name}: a model that is sharded or offloaded has its place already; leave out the device")
    if offload and several and not shard:
        raise ModelError(f"{name}: several processes offload a model that they share; shard it too (--shard)")
    if (quantised := Quantisation.of(config)) is not None:
        quantised.prepare(config, name, shard=shard and several)
    layers = _layers(config, layout, skip_unknown) if offload or shard else []
    sharding = _sharding(layers, offload=offload) if shard and several else {}
    on_host = offload and not several
    kind = dtype_on(device, dtype)  # where it computes: one that waits on the host does so elsewhere
    model = load_model(auto, name, config=config, dtype=kind, device="cpu" if on_host else device, **sharding, **hub)
    if quantised is not None:
        model = quantised.settle(model, None if kind == "auto" else getattr(torch, kind))
    if on_host:
        distributed.keep_on_host(model, [layer for prefix in layers for layer in model.get_submodule(prefix)])
    target = Target.of(
        model, tokenizer, name=str(name), layout=layout, skip_unknown=skip_unknown, system=system, template=template,
        thinking=thinking,
    )  # fmt: skip
    with _enough_memory(name):
        try_text(name, model, tokenizer)
    target = replace(target, origin=(str(name), revision))
    quicker = autocast.quicker(config) if kind != dtype else None  # on a CPU, and nothing else was asked for
    return target if quicker is None else replace(target, autocast=Autocast.attach(model, quicker))


def _whether(thinking: Thinking | None) -> bool | None:
    if thinking not in (None, "on", "off"):
        raise ModelError(f"thinking is {thinking!r}; expected 'on', 'off' or None")
    return None if thinking is None else thinking == "on"


def _layers(config: Any, layout: Path | None, skip_unknown: bool) -> list[str]:
    """`model.layers` and the like, whose parts are gathered, used and freed one by one."""
    tensors = Layout.from_config(config, file=layout, skip_unknown=skip_unknown).tensors.values()
    return sorted({t.name.split(f".{t.layer}.")[0] for t in tensors if t.layer is not None})


def _sharding(layers: list[str], *, offload: bool) -> dict[str, Any]:
    """Options with which transformers loads a model sharded by rows, layer after layer."""
    from transformers.distributed import DistributedConfig

    plan = {f"{prefix}.*": "free_full_weight" for prefix in layers}
    config = DistributedConfig(fsdp_size=distributed.world_size(), fsdp_plan=plan, fsdp_cpu_offload=offload)
    return {"distributed_config": config}


def resolve(name: str | Path) -> str:
    """The folder or hub id behind `name`; a folder is checked for what a model needs."""
    text = str(name)
    if text.startswith("organism:"):
        from safelocus import organism  # only who asks for an organism pays for it

        return str(organism.resolve_model(text.removeprefix("organism:")))
    if text.partition(":")[0] == "smollm2" and not Path(text).exists():
        from safelocus import smollm2

        return str(smollm2.resolve(text))
    path = Path(text).expanduser()
    looks_like_path = text.startswith((".", "/", "~")) or path.exists() or text.count("/") > 1
    if not looks_like_path and text.count("/") == 1:
        return text
    if not path.is_dir():
        parent = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir() if p.is_dir()], n=3)
        hint = f" Did you mean {', '.join(str(parent / n) for n in near)}?" if near else ""
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"{text}: {what}; expected a model folder, a hub id such as `org/model`, `organism:NAME` or `smollm2`."
            f"{hint}"
        )
    if (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors")):
        raise ModelError(
            f"{path}: an adapter, not a model. Merge it into its base first: "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OTHER)"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in this folder; expected a Hugging Face model folder")
    return str(path)


def load_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration alone: no weights are read or downloaded."""
    try:
        return AutoConfig.from_pretrained(resolve(name), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers raises for what it cannot read
        raise ModelError(f"{name}: the configuration cannot be loaded: {first_line(error)}") from error


def load_tokenizer(name: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer; ModelError where there is none or it is not a fast one (offsets are needed)."""
    where = resolve(name)
    if Path(where).is_dir() and not any(
        (Path(where) / file).is_file()
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    ):
        raise ModelError(f"{name}: no tokenizer in this folder; expected tokenizer.json beside config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **hub)
        tokenizer("a", truncation=True)  # some settings show only then that they are none
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _processors_template(where, hub)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise ModelError(f"{name}: the tokenizer cannot be loaded: {first_line(error)}") from error
    templates = tokenizer.chat_template
    if not all(
        isinstance(each, str | None) for each in (templates.values() if isinstance(templates, dict) else [templates])
    ):
        raise ModelError(f"{name}: the tokenizer's chat template is no text: {str(templates)[:60]}")
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: only a slow tokenizer exists; a fast one (tokenizer.json) is needed for offsets")
    return tokenizer


def _processors_template(where: str, hub: Mapping[str, Any]) -> Any:
    """The chat template of older models that see images (LLaVA-NeXT, Idefics2), which is their processor's; or None."""
    for name in ("chat_template.json", "processor_config.json"):
        file = cached_file(
            where, name, revision=hub.get("revision"), _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        found = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
        if (template := found.get("chat_template")) is not None:
            return template
    return None


def load_model(auto: Any, name: str | Path, *, dtype: Dtype = "auto", device: str | None = None, **options: Any) -> Any:
    """`auto.from_pretrained` with checks around it: the model in evaluation mode on its device.

    Raises:
        ModelError: the weights cannot be loaded, or not all of them are there.
        ResourceError: there is no such device, or too little memory.
    """
    if device != "auto":
        check_device(device)
    where = resolve(name)
    if Path(where).is_dir():
        _check_weight_files(Path(where))
    placement = {"device_map": "auto"} if device == "auto" else {}
    try:
        with _enough_memory(name), _quiet(where):
            model, report = auto.from_pretrained(
                where,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **placement,
                **options,
            )
    except ResourceError:
        raise
    except Exception as error:  # whatever transformers raises for what it cannot read
        raise ModelError(f"{name}: the weights cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} tensors are missing from the checkpoint and would be random: {some(missing)}"
        )
    if mismatched := report.get("mismatched_keys"):
        raise ModelError(f"{name}: tensors of another shape than the configuration says: {sorted(mismatched)[:5]}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name}: {_ADAPTER_BESIDE}")
    if device != "auto" and "distributed_config" not in options:
        with _enough_memory(name):
            model.to(device or default_device())
    return model.eval()


@contextmanager
def _enough_memory(name: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_exhausted(error):
            raise
        raise ResourceError(
            f"{name}: out of memory while it is loaded. Try --dtype bfloat16, --offload or --device cpu; `safelocus "
            "plan` says what fits"
        ) from error


def is_exhausted(error: BaseException) -> bool:
    """Whether memory ran out, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def dtype_on(device: str | torch.device | None, dtype: Dtype) -> Dtype:
    """What "auto" means there: fp32 on a CPU, the checkpoint's own type elsewhere."""
    place = default_device() if device in (None, "auto") else device
    return "float32" if dtype == "auto" and str(place).partition(":")[0] == "cpu" else dtype


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def check_device(device: str | torch.device | None, option: str = "device") -> None:
    """Raise ResourceError, naming the option, where this machine has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # as torch was built
        raise ResourceError(
            f"{option} {str(device)!r}: there is no such device here ({first_line(error)}); expected one such as "
            f"{default_device()}"
        ) from error


def _check_weight_files(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: {_ADAPTER_BESIDE}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"}]
        if pickles:
            raise ModelError(
                f"{folder}: only pickled weights ({', '.join(pickles[:3])}); these can run code and are never "
                "loaded. Convert them to safetensors first"
            )
        raise ModelError(f"{folder}: no weights in this folder; expected *.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass  # opening compares the header with the file's size: a truncated file is found in no time
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a complete safetensors file ({first_line(error)}); download or copy it again"
            ) from error


@contextmanager
def _quiet(where: str) -> Iterator[None]:
    """Silence transformers while it loads: what matters of its remarks becomes our own errors.

    Its progress bar stays for models that take a while.
    """
    logger, bar = logging.getLogger("transformers"), transformers.utils.logging
    level, shown = logger.level, bar.is_progress_bar_enabled()
    size = sum(file.stat().st_size for file in Path(where).glob("*.safetensors")) if Path(where).is_dir() else None
    try:
        logger.setLevel(logging.ERROR)
        if not distributed.is_main() or (size is not None and size < _QUICK_BYTES):
            bar.disable_progress_bar()
        yield
    finally:
        logger.setLevel(level)
        if shown:
            bar.enable_progress_bar()
