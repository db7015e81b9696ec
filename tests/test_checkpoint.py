"""Reading only what is owned: from folders with missing or spoilt parts, by byte ranges over HTTP, and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
from conftest import U_SHAPED, tiny_llama
from noren.errors import ModelError
from noren.parties.fitness import compare
from noren.partition.checkpoint import INDEX, SINGLE, FolderCheckpoint, TensorInfo
from noren.partition.plan import Plan
from noren.partition.remote_files import HEADER_GUESS, MERGE_GAP, HttpCheckpoint
from noren.partition.slices import is_tied, load_config, owned_keys
from noren.partition.stage import Stage, open_slice

PLAN = ", ".join(U_SHAPED)


def owned(folder: Path, party: str) -> set[str]:
    """Names of a party's tensors in a whole checkpoint."""
    checkpoint = FolderCheckpoint(folder)
    config, keys = load_config(checkpoint), list(checkpoint.files)
    plan = Plan.parse(PLAN, config.num_hidden_layers)
    return set(owned_keys(keys, plan, party, tied=is_tied(config, keys), model_type=config.model_type))


def infos(folder: Path) -> dict[str, TensorInfo]:
    checkpoint = FolderCheckpoint(folder)
    return checkpoint.infos(checkpoint.files)


def delete_shards_without(folder: Path, party: str) -> int:
    """Delete every shard that holds none of the party's tensors; returns how many."""
    files, mine = FolderCheckpoint(folder).files, owned(folder, party)
    useless = set(files.values()) - {files[name] for name in mine}
    for name in useless:
        (folder / name).unlink()
    return len(useless)


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        tiny_llama().save_pretrained(tmp_path / name, max_shard_size="30KB")
        return tmp_path / name

    return make


def test_a_party_reads_its_own_shards_alone(sharded: Callable[[str], Path]) -> None:
    folders = {party: sharded(party) for party in ("client", "server")}
    whole = LlamaForCausalLM.from_pretrained(folders["client"]).eval()
    for party, folder in folders.items():
        nbytes = {name: info.nbytes for name, info in infos(folder).items()}
        assert delete_shards_without(folder, party) >= 4
        part = open_slice(folder, PLAN, party, "causal-lm")
        assert part.bytes_read == sum(nbytes[name] for name in owned(folder, party)) < sum(nbytes.values())
        assert part.bytes_read == sum(tensor.nbytes for tensor in part.tensors.values())
    assert not any(compare(whole, models.connect(folders, PLAN)).values())  # bit for bit


def test_a_party_needs_its_own_shards(sharded: Callable[[str], Path]) -> None:
    folder = sharded("client")
    delete_shards_without(folder, "client")
    with pytest.raises(ModelError, match=r"shard model-\d+-of-\d+.safetensors is missing"):
        Stage.load(folder, PLAN, "server", "causal-lm")


def test_spoilt_bytes_of_others_do_not_matter(tmp_path: Path) -> None:
    """In one file, the bytes of everything that a party does not own are overwritten (as fp32: NaN)."""
    folders = {party: tmp_path / party for party in ("client", "server")}
    whole = tiny_llama()
    for party, folder in folders.items():
        whole.save_pretrained(folder)
        assert not (folder / INDEX).exists()
        mine, path, spoilt = owned(folder, party), folder / SINGLE, 0
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with path.open("r+b") as handle:
            for name, info in infos(folder).items():
                if name not in mine:
                    handle.seek(start + info.begin)
                    handle.write(b"\xff" * info.nbytes)
                    spoilt += info.nbytes
        assert spoilt > path.stat().st_size / 5
    assert any(torch.isnan(p).any() for p in LlamaForCausalLM.from_pretrained(folders["client"]).parameters())
    assert not any(compare(whole, models.connect(folders, PLAN)).values())  # bit for bit


# --- over HTTP ---------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """A folder behind HTTP. `asked` logs each request: file, first byte, end (None: no range), bytes of the body."""

    folder: Path
    ranges: bool = True
    names_size: bool = True
    asked: list[tuple[str, int | None, int | None, int]] = field(default_factory=list)
    url: str = ""

    @property
    def sent(self) -> int:
        return sum(row[3] for row in self.asked)


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    running: list[ThreadingHTTPServer] = []

    def start(folder: Path, **how: bool) -> Site:
        site = Site(folder, **how)

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = site.folder / self.path.lstrip("/")
                if not path.is_file():
                    site.asked.append((path.name, None, None, 0))
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body, wanted = path.read_bytes(), self.headers.get("Range")
                size, first, end = len(body), None, None
                if wanted and site.ranges:
                    first, end = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
                    end = min(end + 1, size)
                    body = body[first:end]
                site.asked.append((path.name, first, end, len(body)))
                self.send_response(200 if first is None else 206)
                if first is not None:
                    self.send_header("Content-Range", f"bytes {first}-{end}/{size if site.names_size else '*'}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the reader has seen enough

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        site.url = f"http://127.0.0.1:{server.server_address[1]}"
        return site

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 16 MB, as one file and as shards; its layers are far larger than the gaps that are read over."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=320, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model, place = LlamaForCausalLM(config), tmp_path_factory.mktemp("large")
    model.save_pretrained(place / "single")
    model.save_pretrained(place / "sharded", max_shard_size="1MB")
    return {"single": place / "single", "sharded": place / "sharded"}


@pytest.mark.parametrize("party", ["client", "server"])
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_only_ranges_of_owned_tensors_are_fetched(
    form: str, party: str, large: dict[str, Path], serve: Callable[..., Site]
) -> None:
    folder = large[form]
    site, where, mine = serve(folder), infos(folder), owned(folder, party)
    part, local = (open_slice(place, PLAN, party, "causal-lm") for place in (site.url, folder))
    assert part.tensors.keys() == local.tensors.keys()
    for name, tensor in part.tensors.items():
        assert tensor.dtype == local.tensors[name].dtype and torch.equal(tensor, local.tensors[name]), name
    assert part.fingerprint == local.fingerprint
    assert part.bytes_read == local.bytes_read == sum(where[name].nbytes for name in mine)
    foreign = sum(info.nbytes for name, info in where.items() if name not in mine)
    assert foreign > 20 * MERGE_GAP  # or else the following would say little

    shards = {where[name].file for name in mine}
    assert {row[0] for row in site.asked if row[1] is not None} == shards  # no shard of others alone is even opened
    leaked = headers = 0
    for file, first, end, _ in site.asked:
        if first is None or end is None:
            assert file in ("config.json", "generation_config.json", INDEX)
            continue
        start = 8 + int.from_bytes((folder / file).read_bytes()[:8], "little")
        header = (first, end) == (0, min(HEADER_GUESS, (folder / file).stat().st_size))
        headers += header
        for name, info in where.items():
            overlap = min(end, start + info.end) - max(first, start + info.begin)
            if info.file == file and name not in mine and overlap > 0:
                assert header or overlap <= MERGE_GAP, (name, overlap)
                leaked += overlap
    assert headers <= 1 + len(shards)  # of a single file twice: for the names, then for the places
    assert leaked <= HEADER_GUESS * len(shards) + MERGE_GAP * len(mine)
    assert leaked < foreign / 3
    # All bytes sent: the tensors, a header's guess a shard, the small files, and no more than the gaps between.
    small = sum(row[3] for row in site.asked if row[1] is None)
    assert site.sent <= part.bytes_read + HEADER_GUESS * headers + leaked + small


def test_every_fetched_byte_is_counted(large: dict[str, Path], serve: Callable[..., Site]) -> None:
    site = serve(large["sharded"])
    checkpoint = HttpCheckpoint(site.url + "/")
    names = [name for name in checkpoint.files if ".layers.3." in name]
    assert checkpoint.bytes_read == 0
    tensors = checkpoint.read(names)
    assert checkpoint.bytes_read == sum(t.nbytes for t in tensors.values())
    assert checkpoint.bytes_fetched == site.sent > checkpoint.bytes_read
    assert checkpoint.text("no-such-file") is None


def test_a_long_header_is_fetched_in_a_second_range(tmp_path: Path, serve: Callable[..., Site]) -> None:
    header = {f"{'n' * 200}{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(400)}
    text = json.dumps(header).encode()
    assert len(text) > HEADER_GUESS
    values = torch.arange(400.0)
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
    site = serve(tmp_path)
    checkpoint = HttpCheckpoint(site.url)
    name = f"{'n' * 200}37"
    assert checkpoint.read([name])[name].tolist() == [37.0]
    assert site.asked[2][1:3] == (HEADER_GUESS, 8 + len(text))  # what the first range lacked, and not all again


def test_split_over_http_equals_whole(large: dict[str, Path], serve: Callable[..., Site]) -> None:
    whole = LlamaForCausalLM.from_pretrained(large["single"]).eval()
    site = serve(large["single"])
    split = models.connect({"client": site.url, "server": site.url}, PLAN)  # type: ignore[dict-item]
    batch = models.padded("right")
    with torch.no_grad():
        a, b = (model(**batch).logits[batch["attention_mask"].bool()] for model in (whole, split))
    assert torch.equal(a, b)


# --- what cannot be read -----------------------------------------------------------------------------------------


def absurd(folder: Path) -> None:
    (folder / SINGLE).write_bytes((1 << 62).to_bytes(8, "little") + (folder / SINGLE).read_bytes()[8:])


def truncated(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def torn_header(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:8] + b"[" + data[9:])


def tiny(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"abc")


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def bad_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weights": {}}')


def missing_in_shard(folder: Path) -> None:
    names = [*FolderCheckpoint(folder).files, "model.layers.0.mlp.extra.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))


def missing_shard(folder: Path) -> None:
    files = dict.fromkeys(FolderCheckpoint(folder).files, SINGLE) | {"model.norm.weight": "gone.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def missing_tensor(folder: Path) -> None:
    files = dict.fromkeys(FolderCheckpoint(folder).files, SINGLE)
    del files["model.layers.1.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "own-code"}')


BROKEN = {
    absurd: "is not a safetensors file, or is cut short",
    truncated: "is cut short: .* bytes of .*, by its own header; download it again",
    torn_header: "has a broken safetensors header",
    tiny: "is not a safetensors file, or is cut short .3 bytes",
    no_config: "no config.json; is this a Hugging Face model folder?",
    no_json: "config.json is not JSON",
    bad_index: "is not an index of shards",
    missing_in_shard: "the index names tensor 'model.layers.0.mlp.extra.weight', the shard does not hold it",
    missing_shard: "shard gone.safetensors is missing",
    missing_tensor: "1 tensors are missing, e.g. 'model.layers.1.mlp.up_proj.weight'",
    unknown_type: "transformers has no architecture 'own-code' of its own, and code that comes with a model is not run",
}


@pytest.mark.parametrize("over", ["folder", "http"])
@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_a_broken_model_is_refused_in_words(
    harm: Callable[[Path], None], over: str, tmp_path: Path, serve: Callable[..., Site]
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    harm(tmp_path)
    place = tmp_path if over == "folder" else serve(tmp_path).url
    with pytest.raises(ModelError, match=BROKEN[harm]):
        models.connect({"client": place, "server": place}, PLAN)  # type: ignore[dict-item]


def test_pickled_weights_are_not_read(tmp_path: Path, serve: Callable[..., Site]) -> None:
    tiny_llama().save_pretrained(tmp_path)
    pickled(tmp_path)
    with pytest.raises(
        ModelError, match="model.safetensors is missing; convert pytorch_model.bin to safetensors first"
    ):
        open_slice(tmp_path, PLAN, None, "causal-lm")
    with pytest.raises(ModelError, match="shard model.safetensors is missing .HTTP 404"):
        open_slice(serve(tmp_path).url, PLAN, None, "causal-lm")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"ranges": False}, "the server ignores byte ranges, so a slice cannot be fetched alone"),
        ({"names_size": False}, "the server's Content-Range names no size"),
    ],
)
def test_a_server_without_proper_ranges_is_refused(
    how: dict[str, bool], words: str, large: dict[str, Path], serve: Callable[..., Site]
) -> None:
    site = serve(large["single"], **how)
    with pytest.raises(ModelError, match=words):
        open_slice(site.url, PLAN, None, "causal-lm")
    assert [row[0] for row in site.asked if row[0].endswith("safetensors")] == [SINGLE]  # not tried again


# --- memory ------------------------------------------------------------------------------------------------------

WIDTH, INNER = 512, 1152
CLIENT_PROGRAM = """
import resource, sys
import torch
from noren.partition.client import build_client
from noren.partition.checkpoint import FolderCheckpoint
from noren.partition.stage import open_slice

if sys.argv[2] == "client":
    part = open_slice(sys.argv[1], "client :1, server 1:-1, client -1:", None, "causal-lm")
    build_client(part, lambda message: message)
else:
    from pathlib import Path
    checkpoint = FolderCheckpoint(Path(sys.argv[1]))
    kept = [tensor.sum() for tensor in checkpoint.read(checkpoint.files).values()]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


def write_llama(folder: Path, middle: int) -> int:
    """Write a Llama of `middle` + 2 layers, all from one random block; returns bytes of the middle."""
    layer = {
        **{f"self_attn.{k}_proj.weight": (WIDTH, WIDTH) for k in "qkvo"},
        **{f"mlp.{k}_proj.weight": (INNER, WIDTH) for k in ("gate", "up")}, "mlp.down_proj.weight": (WIDTH, INNER),
        "input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (200, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (200, WIDTH)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(middle + 2) for name, shape in layer.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text, block = json.dumps(header).encode(), torch.rand(WIDTH * INNER).numpy().tobytes()
    folder.mkdir()
    with (folder / SINGLE).open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            handle.write(block[: 4 * torch.Size(shape).numel()])
    LlamaConfig(
        vocab_size=200, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=middle + 2, num_attention_heads=8
    ).save_pretrained(folder)
    return middle * sum(4 * torch.Size(shape).numel() for shape in layer.values())


def peak(folder: Path, what: str) -> int:
    """Peak resident bytes of a process of its own that loads a part of a model.

    Between is a process that has little in memory: a child's peak starts at the size of the one that started it.
    """
    program = [sys.executable, "-c", CLIENT_PROGRAM, str(folder), what]
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *program], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout.split()[-1]) * unit


def test_a_clients_memory_does_not_grow_with_the_middle(tmp_path: Path) -> None:
    sizes = {middle: write_llama(tmp_path / str(middle), middle) for middle in (5, 20)}
    assert sizes[5] > 50e6 and sizes[20] == 4 * sizes[5]
    peaks = {middle: peak(tmp_path / str(middle), "client") for middle in sizes}
    # 10 % of the process is some 50 MB; reading the middle as well would add 170 MB.
    assert abs(peaks[20] - peaks[5]) <= 0.1 * peaks[5], peaks
    # That the measure can tell: a process that reads all of the larger model, and builds nothing, peaks higher.
    assert peak(tmp_path / "20", "all") > peaks[20] + 0.5 * (sizes[20] - sizes[5])
