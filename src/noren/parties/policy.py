"""The client's own policy: a file on its machine that wins over anything a run document or a server asks.

    [policy]                       every line is optional
    models = ["9f8c..."]           fingerprints of the models that may be used
    first_layers = 2               at least so many first layers stay here (0: embeddings may leave as they are)
    last_layers = 2                at least so many last layers, and the head, stay here
    adapter_layers = "0:12"        layers that may get adapters
    least_noise = 0.5              least standard deviation of the noise on what leaves
    most_clip = 10.0               largest norm of a vector that leaves
    most_epochs = 3.0              passes over the data in one run
    most_vectors = 1000000         vectors (hidden states and gradients of tokens) that may leave in one run
    labels_stay = true             no loss is made elsewhere from labels that are sent there
    debug = false                  whether a peer may write contents into its logs
    protocol = 2                   oldest protocol that is spoken

It is `$NOREN_POLICY`, or `policy.toml` in the user's configuration folder. What it forbids is refused before a tensor
leaves.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
from platformdirs import user_config_path

from noren.adapters.lora import Lora
from noren.errors import ConfigError, PolicyRefused
from noren.partition.blocks import BLOCK_KEY
from noren.partition.plan import Plan
from noren.types import PROTOCOL, Amount, Count, Noise, Terms, Welcome

LARGEST = 1 << 20
"""No layer is wider."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """What this party allows; see the module's text. A refusal names the file and the key that it is by."""

    models: list[str] = []
    first_layers: Count = 0
    last_layers: Count = 0
    adapter_layers: Annotated[str, msgspec.Meta(pattern=r"^(\d+:\d+)?$")] = ""
    least_noise: Amount = 0.0
    most_clip: Amount = 0.0
    most_epochs: Amount = 0.0
    most_vectors: Count = 0
    labels_stay: bool = False
    debug: bool = False
    protocol: Count = PROTOCOL

    def __post_init__(self) -> None:
        for name in ("least_noise", "most_clip", "most_epochs"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number")

    def where(self, key: str) -> str:
        """Say where a rule stands."""
        file = self.__dict__.get("file")
        return f"({key} in {file})" if file else f"({key}, by default: there is no policy file)"

    def _refuse(self, key: str, sentence: str) -> NoReturn:
        raise PolicyRefused(f"{sentence} {self.where(key)}")

    def check_run(self, plan: Plan, fingerprint: str, noise: Noise) -> None:
        """Raise PolicyRefused if a run document asks for what is forbidden. Nothing has been connected yet."""
        mine = plan.kept(plan.client)
        first = next((i for i, layer in enumerate(mine) if layer != i), len(mine))
        last = len(mine) - first if plan.u_shaped else 0
        if first < self.first_layers:
            self._refuse(
                "first_layers", f"the plan leaves {first} first layers here, the policy wants {self.first_layers}"
            )
        if last < self.last_layers:
            self._refuse("last_layers", f"the plan leaves {last} last layers here, the policy wants {self.last_layers}")
        self._check_model(fingerprint)
        self._check_noise(noise)

    def check_labels(self, loss_at: str) -> None:
        """Raise PolicyRefused if a run would send its labels away."""
        if self.labels_stay and loss_at != "client":
            self._refuse("labels_stay", f'loss_at = "{loss_at}" sends the labels of every batch away')

    def check_epochs(self, epochs: float) -> None:
        """Raise PolicyRefused if a run would go over the data too often."""
        if self.most_epochs and epochs > self.most_epochs + 1e-9:
            self._refuse("most_epochs", f"{epochs:.4g} passes over the data, the policy allows {self.most_epochs:g}")

    def check_own_adapter(self, names: Iterable[str]) -> None:
        """Raise PolicyRefused if this party would train an adapter in a layer that may not get one.

        `names`: of the adapter's tensors, in the whole model.
        """
        if not self.adapter_layers:
            return
        low, high = map(int, self.adapter_layers.split(":"))
        for match in filter(None, map(BLOCK_KEY.match, names)):
            if not low <= int(match[2]) < high:
                self._refuse(
                    "adapter_layers", f"this party would train an adapter in layer {match[2]}, which the policy forbids"
                )

    def check_welcome(self, asked: Terms, welcome: Welcome, plan: Plan) -> None:
        """Raise PolicyRefused if a server answers a hello with other terms than were asked for, or forbidden ones."""
        peer, terms = welcome.party, welcome.terms
        if welcome.protocol < self.protocol:
            self._refuse("protocol", f"{peer!r} speaks protocol {welcome.protocol}, the policy wants {self.protocol}")
        if welcome.protocol != PROTOCOL:
            raise PolicyRefused(f"{peer!r} speaks protocol {welcome.protocol}, this client {PROTOCOL}; update one")
        if terms.logs == "debug" and not self.debug:
            self._refuse("debug", f"{peer!r} writes contents into its logs, which the policy forbids")
        self._check_model(terms.fingerprint)
        self._check_noise(terms.noise)
        for name in Terms.__struct_fields__:
            if name != "logs" and getattr(terms, name) != getattr(asked, name):
                raise PolicyRefused(
                    f"{peer!r} wants another {name} than was asked for: {getattr(terms, name)!r} instead of "
                    f"{getattr(asked, name)!r}"
                )
        self._check_adapter(asked, welcome, plan)

    def _check_model(self, fingerprint: str) -> None:
        if self.models and fingerprint not in self.models:
            self._refuse("models", f"the model {fingerprint} is not among those that the policy names")

    def _check_noise(self, noise: Noise) -> None:
        if noise.scale < self.least_noise:
            self._refuse(
                "least_noise", f"noise of {noise.scale:g} on what leaves, the policy wants {self.least_noise:g}"
            )
        if self.most_clip and not 0 < noise.clip <= self.most_clip:
            self._refuse(
                "most_clip", f"vectors of norm {noise.clip or 'inf'} may leave, the policy wants {self.most_clip:g}"
            )

    def _check_adapter(self, asked: Terms, welcome: Welcome, plan: Plan) -> None:
        """The remote parties train what they were asked to train, and of that what the policy allows."""
        if not welcome.adapter:
            return
        if not asked.lora:
            raise PolicyRefused(f"{welcome.party!r} trains adapters, and none were asked for")
        lora = msgspec.json.decode(asked.lora, type=Lora)
        holder = {i: s.party for s in plan.remote if lora.trained_by(s.party) for i in range(s.start, s.end)}
        low, high = map(int, (self.adapter_layers or f"0:{plan.layers}").split(":"))
        for name, shape in welcome.adapter.items():
            match = BLOCK_KEY.match(name)
            if match is None:
                if plan.u_shaped:
                    raise PolicyRefused(f"{welcome.party!r} trains {name[:120]!r}, which is not in its layers")
                continue
            layer = int(match[2])
            what = f"{welcome.party!r} trains {name[:120]!r}, a layer that may not get an adapter"
            if layer not in holder:
                raise PolicyRefused(what)
            if not low <= layer < high:
                self._refuse("adapter_layers", what)
            if not _asked_for(name, shape, lora, holder[layer]):
                raise PolicyRefused(f"{welcome.party!r} trains {name[:120]!r} {shape}, which was not asked for")


def _asked_for(name: str, shape: list[int], lora: Lora, party: str) -> bool:
    """Whether a tensor is a LoRA factor of a module that the settings name, of the rank that a party has."""
    module, _, factor = name.removesuffix(".weight").rpartition(".")
    if factor not in ("lora_A", "lora_B") or len(shape) != 2 or max(shape) > LARGEST:
        return False
    known = not lora.targets or any(module == t or module.endswith(f".{t}") for t in lora.targets)
    return known and shape[0 if factor == "lora_A" else 1] == lora.rank(party)


def read_policy(path: Path | None = None) -> Policy:
    """Return the policy of this machine's user; one that forbids nothing if there is no file.

    Raises ConfigError if the file cannot be read as a policy, or `$NOREN_POLICY` names none.
    """
    named = os.environ.get("NOREN_POLICY")
    place = path or (Path(named) if named else user_config_path("noren") / "policy.toml")
    if not place.is_file():
        if path or named:
            raise ConfigError(f"{place}: no such policy file")
        return Policy()
    try:
        values = tomllib.loads(place.read_text(encoding="utf-8"))
        if beside := sorted(values.keys() - {"policy"} if "policy" in values else ()):
            raise ConfigError(f"{place} is not a policy: {beside[0]!r} stands outside of [policy]; move it inside")
        policy = msgspec.convert(values.get("policy", values), Policy)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{place} is not a policy: {error}") from error
    policy.__dict__["file"] = place
    return policy
