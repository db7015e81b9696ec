"""`noren slice`: write each party's part of a model as a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from noren.cli.show import AsJson, Model, Task, TaskName, bytes_of, place_of, say


def slice(
    model: Model,
    cut: Annotated[str, typer.Option("--plan", help='The cut, e.g. "client :2, server 2:-2, client -2:".')],
    out: Annotated[Path, typer.Option("--out", help="Folder in which each party gets a folder.")],
    party: Annotated[list[str] | None, typer.Option(help="Only this party; repeat it. Default: all.")] = None,
    task: Task = TaskName.causal_lm,
    digest: Annotated[
        bool,
        typer.Option(help="Let the handshake compare a digest of all weights: every party must use a slice then."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write each party's layers as an ordinary small model folder, which is all that the party needs."""
    from noren.errors import ConfigError, ModelError
    from noren.partition.estimate import holds
    from noren.partition.plan import Plan
    from noren.partition.slices import MANIFEST, load_config, weights_digest, write_slice
    from noren.partition.sources import open_checkpoint

    checkpoint = open_checkpoint(place_of(model))
    plan = Plan.parse(cut, int(load_config(checkpoint).num_hidden_layers))
    parties = list(dict.fromkeys(party or plan.parties))
    for name in parties:
        plan.kept(name)
        if (out / name).exists():
            raise ModelError(f"{out / name} exists already; give another --out or remove it first")
    strange = sorted(p.name for p in out.iterdir() if not (p / MANIFEST).is_file()) if out.is_dir() else []
    if strange:
        raise ConfigError(
            f"--out: {out} is not empty, and {strange[0]!r} in it is no slice; name another folder, e.g. {out}/slices"
        )
    mark = weights_digest(checkpoint) if digest else ""
    written = []
    for name in parties:
        manifest = write_slice(checkpoint, plan, name, out / name, task=task.value, digest=mark)
        files = {path.name: path.stat().st_size for path in sorted((out / name).iterdir())}
        record = {
            "party": name, "folder": str(out / name), "layers": plan.kept(name),
            "embedding": plan.holds_embedding(name), "head": plan.holds_head(name),
            "fingerprint": manifest.fingerprint, "files": files,
        }  # fmt: skip
        written.append(record)
        if not as_json:
            _print(out / name, holds(plan, name), files)
    if as_json:
        typer.echo(json.dumps({"plan": plan.lines(), "slices": written}))
    else:
        say(f"fingerprint {manifest.fingerprint}: every party must have the same")


def _print(folder: Path, holds: tuple[str, ...], files: dict[str, int]) -> None:
    say(f"{folder}: {', '.join(holds)}")
    for name, size in files.items():
        say(f"  {name}  {bytes_of(size)}")
