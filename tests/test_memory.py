"""Memory: weights that processes share, heaps that give back, and what `noren plan` says beforehand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers

from conftest import U_SHAPED
from models import save
from noren.adapters.lora import Lora
from noren.metrics import Heap, current_memory
from noren.partition.sources import open_checkpoint
from noren.partition.stage import Frame, Stage
from noren.training.footprint import footprints
from noren.training.passes import Passes
from noren.training.span_trainer import SpanTrainer

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HOLDER = """
import sys
import torch
from noren.adapters.lora import Lora
from noren.metrics import private_memory
from noren.partition.stage import Frame, Stage
from noren.training.passes import Passes
from noren.training.span_trainer import SpanTrainer

def train(stage):
    trainer = SpanTrainer(Passes(stage, 1 << 30), Lora(r=2, targets=["q_proj"]), "a", 0)
    frame = Frame(torch.randn(4, stage.hidden_size).to(stage.dtype), [4], "left")
    trainer.backward("1.0", trainer.forward("1.0", frame, dropout=False))
    trainer.close()

torch.set_num_threads(1)
folder, plan, dtype = sys.argv[1:]
train(Stage.load(folder + "-small", plan, "server", "causal-lm", getattr(torch, dtype)))
before = private_memory()
stage = Stage.load(folder, plan, "server", "causal-lm", getattr(torch, dtype))
train(stage)
print("held", before, flush=True)
sys.stdin.readline()
print(private_memory() - before, flush=True)
sys.stdin.readline()
"""


def write_llama(folder: Path, width: int) -> Path:
    """A random Llama in fp32; of the width 512 each of its layers has 12.6 MB."""
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def weights_of(folder: Path, layers: range) -> int:
    """Bytes of some layers in fp32."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    return 4 * sum(p.numel() for layer in layers for p in model.model.layers[layer].parameters())


@linux
def test_processes_on_one_machine_share_the_weights(tmp_path: Path) -> None:
    """Two servers of one span that train: what one has read costs the other nothing, and nobody writes to it."""
    folder = write_llama(tmp_path / "m", 512)
    write_llama(tmp_path / "m-small", 64)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with ExitStack() as stack:
        held = []
        for dtype in ("float32", "float32", "bfloat16"):
            arguments = [sys.executable, "-W", "ignore", "-c", HOLDER, str(folder), ", ".join(U_SHAPED), dtype]
            process = stack.enter_context(
                subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.terminate)
            held.append(process)
        private = []
        for ask in (False, True):
            for process in held:
                assert process.stdin is not None and process.stdout is not None
                if ask:
                    process.stdin.write("\n")
                    process.stdin.flush()
                private.append(process.stdout.readline())
    size = weights_of(folder, range(2, 6))
    first, second, converted = map(int, private[3:])
    assert max(first, second) < 0.3 * size, (private, size)
    assert converted > 0.4 * size, (private, size)  # another type than the file's cannot be shared
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == digest


@linux
def test_a_heap_gives_back_what_is_free() -> None:
    heap = Heap(slack=8 << 20)
    heap.trim()
    before = current_memory()
    kept = []
    for _ in range(400):  # small ones that stay between large ones that go: 100 kB each, below what is mapped by itself
        gone = [torch.ones(25_000) for _ in range(2)]
        kept.append(torch.ones(100))
        kept.append(gone)  # type: ignore[arg-type]
    kept = kept[::2]
    assert current_memory() - before > 60 << 20
    heap.trim()
    assert current_memory() - before < 20 << 20 and len(kept) == 400


def test_a_step_is_counted_as_it_is(tmp_path: Path) -> None:
    """What `noren plan` works out without values is what a stage keeps, to 10 %; twice the clients, twice of it."""
    folder = write_llama(tmp_path / "m", 64)
    lora = Lora(r=2, targets=["q_proj", "v_proj"])
    stage = Stage.load(folder, U_SHAPED, "server", "causal-lm")
    passes = Passes(stage, 1 << 30)
    trainer = SpanTrainer(passes, lora, "a", 0)
    trainer.forward("1.0", Frame(torch.randn(4 * 32, 64), [32] * 4, "left"), dropout=False)
    checkpoint = open_checkpoint(str(folder))
    said = {"lora": lora, "base": 1000, "batch": 4, "length": 32}
    client, server = footprints(checkpoint, U_SHAPED, **said)  # type: ignore[arg-type]
    assert server.activations == pytest.approx(passes.nbytes, rel=0.1)
    frozen = sum(p.nbytes for p in stage.model.layers.parameters()) - 4 * trainer.trainable
    assert server.weights == server.shared == frozen
    assert client.activations > client.weights - client.shared and client.peak > client.base == 1000
    _, two = footprints(checkpoint, U_SHAPED, clients=2, **said)  # type: ignore[arg-type]
    assert (
        two.activations == 2 * server.activations and two.weights == server.weights and two.adapters > server.adapters
    )
    _, tight = footprints(checkpoint, U_SHAPED, clients=8, graph_bytes=passes.nbytes * 2, **said)  # type: ignore[arg-type]
    assert tight.activations <= passes.nbytes * 2
    _, converted = footprints(checkpoint, U_SHAPED, dtype="bfloat16", **said)  # type: ignore[arg-type]
    assert not converted.shared and converted.weights >= server.weights // 2


def test_what_cannot_be_told_is_not_told(tmp_path: Path) -> None:
    """Where experts are chosen by their input, a step without values cannot be run."""
    save(tmp_path / "m", "mixtral")
    lora = Lora(targets=["q_proj"])
    told = footprints(
        open_checkpoint(str(tmp_path / "m")), ["client :1", "server 1:-1", "client -1:"], lora=lora, base=0
    )
    assert told == ()
