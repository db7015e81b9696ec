"""The run document: one TOML file that says what is cut how, who is where, what is learned from which data.

Each section is a frozen dataclass beside its owner; here they are composed, read, checked and written. Unknown keys
are errors that name the nearest known one. The resolved document is saved with the run.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from noren.adapters.lora import Lora
from noren.embedded import MODEL_DIR
from noren.errors import ConfigError
from noren.parties.edges import Edges
from noren.parties.server import Limits
from noren.training.data import Data
from noren.training.loop import Training
from noren.types import Noise, Together, joins
from noren.wire.settings import DELTA, Doors, Wire

Task = Literal["causal-lm", "sequence-classification", "question-answering"]
Dtype = Literal["float32", "bfloat16"]
Base = Literal["plain", "int8", "nf4"]
EMBEDDED = "embedded"
DEFAULT_PLAN = ["client :2", "server 2:-2", "client -2:"]
Address = Annotated[str, msgspec.Meta(pattern=r"^[^\s/]+:\d{1,5}$")]


class Keys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where this party's certificate is: `dir/ca.crt`, `dir/NAME.crt`, `dir/NAME.key` (`noren keys`)."""

    dir: str = "keys"
    name: str = ""  # of the certificate; empty: the party's name in the plan


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run document. Relative paths start at the folder of the document."""

    model: str  # a folder, a hub id, a URL, or "embedded"
    name: str = "run"  # of the run at the servers; unique among an owner's runs
    task: Task = "causal-lm"
    plan: list[str] = msgspec.field(default_factory=lambda: list(DEFAULT_PLAN))
    dtype: Dtype = "float32"
    base: Base = "plain"  # how the remote parties hold their frozen weights: in `dtype`, or in 8 or 4 bits
    device: str = "auto"  # of this party's layers: "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one
    seed: int = 0
    out: str = "runs/{name}"  # where the run is kept
    links: dict[str, Address | list[Address]] = {}  # remote party -> "host:port"; a list: any of them will do
    keys: Keys = Keys()
    data: Data | None = None
    adapter: Lora | None = None
    training: Training = Training()
    serve: Limits = Limits()
    doors: Doors = Doors()
    wire: Wire = Wire()
    noise: Noise = Noise()
    together: Together = Together()
    loss_at: Literal["client", "cloud"] = "client"  # "cloud": the last party, of a head-tail plan; labels leave
    edges: Edges = Edges()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError(f"name {self.name!r} must be 1 to 64 letters, digits, '.', '_' or '-'")
        for key in ("accumulate", "micro_batches"):
            if joins(self.together) and getattr(self.training, key) > 1:
                raise ValueError(
                    f'training.{key} must be 1 with together.mode = "client-batch" or cloud_adapter = "shared": the '
                    "clients' batches are joined instead"
                )
        self._check_links()
        self._check_loss()
        parties = {line.split()[0] for line in self.plan if line.split()}
        adapter = self.adapter or Lora()
        for where, named in (
            ("links", self.links),
            ("adapter.parties", adapter.parties),
            ("adapter.rank_of", adapter.rank_of),
        ):
            if unknown := sorted(set(named) - parties):
                raise ValueError(f"{where} names {unknown[0]!r}; the plan's parties are {', '.join(sorted(parties))}")

    def _check_loss(self) -> None:
        names = [line.split()[0] for line in self.plan if line.split()]
        if self.loss_at == "client":
            return
        if names[-1] == names[0]:
            raise ValueError(f'loss_at = "cloud" needs a plan that ends at another party than {names[0]!r}')
        if self.task != "causal-lm":
            raise ValueError(f'loss_at = "cloud" is for task = "causal-lm", not {self.task!r}; leave it at "client"')
        if self.wire.activations == DELTA:
            raise ValueError('loss_at = "cloud" goes with any codec of activations but "delta"')

    def _check_links(self) -> None:
        """Only the party that clients connect to can be one of several, each with a replica of the adapter."""
        names = [line.split()[0] for line in self.plan if line.split()]
        for party, where in self.links.items():
            if isinstance(where, str):
                continue
            if not where:
                raise ValueError(f"links.{party} is empty; give an address, or several")
            if len(where) > 1 and party != names[min(1, len(names) - 1)]:
                raise ValueError(
                    f"links.{party} has several addresses; only the first party after the client can have more than one"
                )
            if len(where) > 1 and len(set(names)) > 3:
                raise ValueError(
                    f"links.{party} has several addresses, and {len(set(names)) - 1} parties hold layers after the "
                    "client; with several, there can be one more party after them"
                )
            if len(where) > 1 and self.wire.activations == DELTA:
                raise ValueError(
                    f'links.{party} has several addresses, and activations = "delta" builds on what one party holds; '
                    'take another codec, e.g. "int8-group"'
                )
            if len(where) > 1 and self.together.mode not in ("alone", "server-hierarchical"):
                raise ValueError(
                    f"links.{party} has several addresses, which cannot share one adapter; with them together.mode "
                    'is "server-hierarchical" or "alone"'
                )


class Document:
    """A run document and the folder that its paths start from."""

    def __init__(self, run: Run, base: Path) -> None:
        self.run, self.base = run, base

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read a TOML file. Raises ConfigError that names the file, the place and the remedy."""
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: no such run document{hint}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        return cls.of(values, path.resolve().parent, str(path))

    @classmethod
    def of(cls, values: dict[str, Any], base: Path, where: str = "run document") -> Document:
        """Check values as a file would hold them. Raises ConfigError."""
        try:
            return cls(msgspec.convert(values, Run), base)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {_explain(str(error), values)}") from error

    def path(self, text: str) -> Path:
        """Return a path of the document, made absolute."""
        return (self.base / Path(text).expanduser()).resolve()

    @property
    def model(self) -> str:
        """The model's place: the embedded one's folder, an absolute folder, or a hub id or URL as it stands."""
        if self.run.model == EMBEDDED:
            return str(MODEL_DIR)
        local = self.path(self.run.model)
        return str(local) if local.is_dir() or self.run.model.startswith((".", "/", "~")) else self.run.model

    def addresses(self, party: str) -> list[str]:
        """Where a party can be reached; [] if the document does not say."""
        where = self.run.links.get(party, [])
        return [where] if isinstance(where, str) else list(where)

    @property
    def out(self) -> Path:
        """Where the run is kept."""
        return self.path(self.run.out.replace("{name}", self.run.name))

    def to_toml(self) -> str:
        """The document with every value filled in, as TOML; paths are absolute."""
        import tomli_w

        run = msgspec.structs.replace(self.run, model=self.model, out=str(self.out))
        values = msgspec.to_builtins(run)
        values["keys"]["dir"] = str(self.path(self.run.keys.dir))
        if self.run.data is not None and self.path(self.run.data.path).exists():
            values["data"]["path"] = str(self.path(self.run.data.path))
        return tomli_w.dumps(_without_none(values))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _explain(sentence: str, values: dict[str, Any]) -> str:
    """Add to msgspec's sentence the place in TOML's words, and the nearest known key."""
    place = re.search(r" - at `\$?\.?([^`]*)`", sentence)
    section = f" in [{place[1]}]" if place and place[1] else ""
    text = sentence[: place.start()] if place else sentence
    unknown = re.search(r"unknown field `([^`]+)`", text)
    if unknown is None:
        return f"{text}{section}"
    known = _fields(place[1] if place else "")
    near = difflib.get_close_matches(unknown[1], known, 1)
    return f"unknown key '{unknown[1]}'{section}; " + (
        f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
    )


def _fields(place: str) -> list[str]:
    owner: Any = {
        "": Run,
        "data": Data,
        "adapter": Lora,
        "training": Training,
        "serve": Limits,
        "keys": Keys,
        "doors": Doors,
        "wire": Wire,
        "noise": Noise,
        "together": Together,
        "edges": Edges,
    }.get(place)
    if owner is None:
        return []
    return [field.name for field in msgspec.structs.fields(owner)]
