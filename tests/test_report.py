from __future__ import annotations

import math
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from noren.report import words
from noren.report.page import render, verdict, write_report
from noren.report.result import ClientResult, Crossing, DemoResult, Part, Sample, Side, TiersResult
from noren.report.tiers import verdict as verdict_of_tiers
from noren.report.tiers import write_tiers

STEPS = 60
NASTY = '<script>alert("x")</script> & <img src=x>'


def side(start: float, end: float, shift: float = 0.0, peak: int = 402_000_000) -> Side:
    losses = [
        end + (start - end) * math.exp(-4 * n / STEPS) + 0.07 * math.sin(2.7 * n + start) + shift for n in range(STEPS)
    ]
    return Side(losses=losses, held_out_before=start, held_out_after=end + 0.05, peak_bytes=peak)


def client(name: str, start: float, end: float, samples: list[Sample], shift: float = 1.2e-7) -> ClientResult:
    return ClientResult(
        name=name,
        site=f"{name} notes",
        split=side(start, end, shift, 391_300_000),
        whole=side(start, end, peak=402_100_000),
        largest_loss_difference=shift,
        largest_adapter_difference=3.4e-8,
        steps=STEPS,
        tokens_per_step=698.4,
        bytes_per_step=2_171_345.0,
        bytes_floor_per_step=4 * 698.4 * 192 * 4,
        round_trips_per_step=2.0,
        generated_tokens=118,
        round_trips_per_token=1.0,
        bytes_per_token=1_912.0,
        seconds=41.7,
        samples=samples,
        adapter=f"/home/ann/runs/demo/{name}/adapter",
    )


def demo(**changes: Any) -> DemoResult:
    hidden = "hidden [412, 192] f32"
    gradient = "gradient [412, 192] f32"
    result = DemoResult(
        title="Two clients, one server, one small model",
        model="embedded",
        model_parameters=3_542_208,
        hidden_size=192,
        layers=8,
        plan=["client 0:2", "server 2:6", "client 6:8"],
        dtype="float32",
        parts=[
            Part(
                party="client",
                layers=[0, 1, 6, 7],
                holds=["embedding", "norm", "head"],
                parameters=1_968_000,
                file_bytes=3_940_112,
            ),
            Part(party="server", layers=[2, 3, 4, 5], holds=[], parameters=1_574_208, file_bytes=3_150_020),
        ],
        clients=[
            client(
                "clinic",
                2.164,
                1.021,
                [
                    Sample(
                        prompt="CLN 28/08/24 | Ortega, Yusuf 51M | MRN 870-6666\nPC:",
                        before=" The patient was seen in the clinic and told to come back in two weeks.",
                        after=" nocturnal wheeze x3/7. PMHx: LRTI. NKDA.\nO/E: PEFR down. BP 112/92, SpO2 92% RA.",
                    ),
                    Sample(prompt="Imp: ", before=NASTY, after="likely GORD. Ix: H pylori stool."),
                ],
            ),
            client(
                "desk",
                2.119,
                0.874,
                [
                    Sample(
                        prompt="Hiya team!",
                        before="Hiya team! The printer was reported as broken.",
                        after="Hiya team! INC66276 for you. Got a ping from Gareth Laurent in the research office.",
                    )
                ],
            ),
        ],
        server_peak_bytes=386_900_000,
        whole_peak_bytes=402_100_000,
        crossings=[
            Crossing(
                direction="up",
                kind="hello",
                fields=["protocol", "run", "fingerprint", "plan", "task", "dtype", "lora", "seed"],
                tensors=[],
                bytes=512,
            ),
            Crossing(
                direction="down",
                kind="welcome",
                fields=["party", "trainable", "step", "incarnation"],
                tensors=[],
                bytes=141,
            ),
            Crossing(
                direction="up",
                kind="forward",
                fields=["session", "start", "lengths", "padding", "positions", "keep", "train", "update", "ended"],
                tensors=[hidden],
                bytes=317_012,
            ),
            Crossing(direction="down", kind="hidden", fields=["per_sequence"], tensors=[hidden], bytes=316_530),
            Crossing(direction="up", kind="backward", fields=["session"], tensors=[gradient], bytes=316_541),
            Crossing(direction="down", kind="gradient", fields=["square_norm"], tensors=[gradient], bytes=316_538),
        ],
        absent=["token ids", "labels", "attention masks", "logits", "any sentence of the private notes"],
        seconds=97.3,
        versions={"noren": "0.1.0", "python": "3.11.9", "torch": "2.8.0", "transformers": "5.23.0"},
        folder="/home/ann/runs/demo",
    )
    return msgspec.structs.replace(result, **changes)


class Outline(HTMLParser):
    """Collects what a reader and a browser take from a page, and checks that tags nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render(demo())


def test_result_round_trips_through_json() -> None:
    result = demo()
    assert msgspec.json.decode(msgspec.json.encode(result), type=DemoResult) == result


def test_page_fetches_nothing(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "embed", "image"}
    references = [a for _, attrs in outline.tags for n, a in attrs.items() if n in {"src", "href", "xlink:href"}]
    assert references
    assert all(str(reference).startswith("#") for reference in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_page_is_accessible(page: str) -> None:
    outline = Outline(page)
    ids = [str(attrs["id"]) for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert set(targets) <= set(ids)
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table")
    drawings = [attrs for tag, attrs in outline.tags if tag == "svg"]
    assert len(drawings) == 5  # the cut, two of losses, traffic, memory
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert all("#0102" not in part for part in page.split("<svg")[1:])  # no stand-in colour is left


def test_text_of_the_run_is_escaped(page: str) -> None:
    assert NASTY not in page
    assert NASTY in Outline(page).text
    changes: dict[str, Any] = {"title": NASTY, "folder": NASTY, "absent": [NASTY], "model": NASTY}
    first = demo().clients[0]
    changes["clients"] = [msgspec.structs.replace(first, name=name, adapter=NASTY) for name in (NASTY, "<$b$>")]
    for plan in (["client 0:2", "server 2:6", "client 6:8"], [NASTY]):
        hostile = render(demo(plan=plan, **changes))
        assert "<script" not in hostile
        assert "<img" not in hostile
        Outline(hostile)


def test_numbers_are_on_the_page(page: str) -> None:
    text = Outline(page).text
    for shown in ("3.54 million parameters", "2.164", "1.071", "2.17 MB", "2.15 MB", "391 MB", "387 MB", "1.91 kB"):
        assert shown in text
    for shown in ("1.2 × 10⁻⁷", "1 min 37 s", "0–1, 6–7", "layer 5", "token ids", "incarnation", "torch 2.8.0"):  # noqa: RUF001
        assert shown in text
    assert "PeftModel.from_pretrained(base, '/home/ann/runs/demo/clinic/adapter')" in text
    assert "not encrypted" in text
    assert "No guard was active" in text


def test_verdict_agrees() -> None:
    said = verdict(demo())
    assert said.agree
    assert said.sentence.startswith("Split and whole agree: the largest difference is 1.2 × 10⁻⁷")  # noqa: RUF001
    same = client("clinic", 2.1, 1.0, [], shift=0.0)
    exact = verdict(demo(clients=[msgspec.structs.replace(same, largest_adapter_difference=0.0)]))
    assert exact.agree
    assert "exactly" in exact.sentence


@pytest.mark.parametrize("value", [0.0123, math.nan, math.inf])
@pytest.mark.parametrize("field", ["largest_loss_difference", "largest_adapter_difference"])
def test_verdict_warns_when_they_differ(field: str, value: float) -> None:
    first, second = demo().clients
    result = demo(clients=[first, msgspec.structs.replace(second, **{field: value})])
    said = verdict(result)
    assert not said.agree
    assert "do not agree" in said.sentence
    assert "desk" in said.sentence


def test_verdict_looks_at_the_losses_themselves() -> None:
    first = demo().clients[0]
    off = msgspec.structs.replace(first.split, losses=[*first.split.losses[:-1], math.nan])
    assert not verdict(demo(clients=[msgspec.structs.replace(first, split=off)])).agree
    held_out = msgspec.structs.replace(first.split, held_out_after=3.0)
    assert not verdict(demo(clients=[msgspec.structs.replace(first, split=held_out)])).agree
    short = msgspec.structs.replace(first.split, losses=first.split.losses[:-1])
    assert not verdict(demo(clients=[msgspec.structs.replace(first, split=short)])).agree
    assert not verdict(demo(clients=[])).agree


def test_warning_is_on_top_of_the_page() -> None:
    first = msgspec.structs.replace(demo().clients[0], largest_loss_difference=0.5)
    text = Outline(render(demo(clients=[first]))).text
    assert text.index("Warning. Split and whole do not agree: they differ by 0.5") < text.index("The cut")
    assert "Warning." not in Outline(render(demo())).text


@pytest.mark.parametrize(
    "plan",
    [
        ["client 0:2", "server 2:8"],
        ["client 0:2", "alpha 2:4", "beta 4:7", "client 7:8"],
        ["client 0:1", "server 1:48"],
    ],
)
def test_other_cuts(plan: list[str]) -> None:
    text = Outline(render(demo(plan=plan, clients=demo().clients[:1]))).text
    assert "labels, loss" in text
    assert ("output of the head" in text) == (not plan[-1].startswith("client"))


def test_bare_results_still_give_a_page() -> None:
    Outline(render(demo(clients=[], parts=[], crossings=[], absent=[], server_peak_bytes=0, whole_peak_bytes=0)))
    bare = msgspec.structs.replace(
        client("clinic", 2.0, 1.0, []), split=side(2, 1, peak=0), bytes_floor_per_step=0.0, bytes_per_step=0.0
    )
    assert "not measured" in Outline(render(demo(clients=[bare]))).text


def test_same_result_gives_the_same_page(page: str) -> None:
    assert render(demo()) == page


def test_report_replaces_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(demo(), path) == path
    assert path.read_text(encoding="utf-8") == page
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        write_report(demo(title="another"), path)
    assert path.read_text(encoding="utf-8") == page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_words() -> None:
    assert [words.size(n) for n in (0, 999, 1000, 152_340, 7_092_368, 2e9)] == [
        "not measured",
        "999 B",
        "1 kB",
        "152 kB",
        "7.09 MB",
        "2 GB",
    ]
    assert [words.duration(n) for n in (0.0381, 4.2, 200.4)] == ["38.1 ms", "4.2 s", "3 min 20 s"]
    assert [words.difference(n) for n in (0.0, 0.0123, 2.4e-7)] == ["0", "0.0123", "2.4 × 10⁻⁷"]  # noqa: RUF001
    assert words.ranges([7, 0, 1, 2]) == "0–2, 7"  # noqa: RUF001
    assert words.listed(["a", "b", "c"]) == "a, b and c"


def tiers(**changes: Any) -> TiersResult:
    """A run over tiers in which all went well, but for the changes."""
    user: dict[str, Any] = {
        "name": "<b>ann</b>", "edge": "edge-a", "later": "edge-b", "moved_at": 2, "losses": [2.0, 1.5, 1.0],
        "undisturbed": [2.0, 1.5, 1.0], "held_out_before": 2.1, "held_out_after": 1.2, "steps": [1, 2, 3],
        "adapter": "a",
    } | changes.get("user", {})  # fmt: skip
    values: dict[str, Any] = {
        "title": "Tiers", "model": "embedded", "plan": ["client 0:2", "edge 2:4"], "every": 2, "killed": "edge-a",
        "largest_loss_difference": 0.0, "largest_adapter_difference": 0.0, "users_agree": True,
        "peak_bytes": {"cloud": 5_000_000}, "seconds": 3.0, "folder": "/f",
    } | {name: value for name, value in changes.items() if name != "user"}  # fmt: skip
    return msgspec.convert(values | {"users": [user]}, TiersResult)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"user": {"steps": [1, 3]}}, "Steps are missing, or were made twice"),
        ({"user": {"steps": [1, 2, 2, 3]}}, "Steps are missing, or were made twice"),
        ({"largest_adapter_difference": 0.5}, "does not agree with the undisturbed one"),
        ({"largest_adapter_difference": float("nan")}, "does not agree with the undisturbed one"),
        ({"largest_loss_difference": float("nan")}, "does not agree with the undisturbed one"),
        ({"users_agree": False}, "did not end with the same adapters"),
    ],
    ids=["good", "lost", "twice", "apart", "nan adapter", "nan loss", "users apart"],
)
def test_the_page_of_tiers_says_what_the_numbers_say(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    result = tiers(**changes)
    found, page = verdict_of_tiers(result), write_tiers(result, tmp_path / "report.html").read_text(encoding="utf-8")
    assert found.agree == (not words) and words in found.sentence
    assert ("Warning." in page) == bool(words) and "<b>ann</b>" not in page
    assert not re.search(r"(src|href)=.https?:", page), "nothing is fetched"
