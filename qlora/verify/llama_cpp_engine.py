"""Serves a GGUF file by llama.cpp in this process, as its server does."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora.errors import ConfigError, DataError
from qlora.text import brief_text
from qlora.verify.engine import Served
from qlora.verify.openai_server import OpenAIServer

MAGIC = b"GGUF"
FULL = 4096
"""Vocabularies up to this size are compared whole."""


class LlamaCppEngine(OpenAIServer):
    """llama.cpp's own server on a free port of the loopback, for the time of the comparison."""

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lora: Path | None,
        top: int,
        vocabulary: int,
        context: int,
    ) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise ConfigError(
                "verify.engine=llama-cpp needs the package xllamacpp, which is not installed: pip install "
                "'qlora[gguf]', or start llama-server and give its address as verify.engine"
            ) from error
        for key, file in {"verify.path": path, "verify.lora": lora}.items():
            if file is not None:
                check_gguf(file, key)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.hostnames = context, 1, 0, ["127.0.0.1"]
        params.warmup, params.verbosity, params.use_jinja = False, 0, True
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:
            raise DataError(
                f"verify.path={path}: llama.cpp cannot load it ({brief_text(str(error), 160)}); export it again"
            ) from error
        super().__init__(self._server.listening_address, tokenizer, top=vocabulary if vocabulary <= FULL else top)
        details = {"lora": None if lora is None else str(lora)}
        self.served = Served("llama-cpp", str(path), self.served.precision, 0.1 if lora is not None else None, details)

    def close(self) -> None:
        """Ends the server."""
        del self._server


def check_gguf(path: Path, key: str) -> None:
    """Raises `DataError` for a file that is not there or no GGUF."""
    if not path.is_file():
        raise DataError(f"{key}={path}: no such file; qlora export writes one")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{key}={path}: this is no GGUF file; qlora export writes one")
