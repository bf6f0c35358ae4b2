"""The commands of the tasks: their own flags, and what they print. The bundled checkpoint answers where it can."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qvl.backends.local import LocalBackend
from qvl.cli.app import run
from qvl.engine.options import EngineOptions
from tests.client.misbehaving import STREAM, misbehaving, reply
from tests.server.live import Live, live

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = ROOT / "samples"
Answering = Callable[..., tuple[int, str, str, list[str]]]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(LocalBackend(EngineOptions(model="demo", num_threads=1))) as running:
        yield running


@pytest.fixture
def told(server: Live, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints whose questions the bundled checkpoint answers."""

    def run_it(*arguments: str) -> str:
        assert run([*arguments, "--base-url", server.url]) == 0
        return capsys.readouterr().out

    return run_it


@pytest.fixture
def answering(capsys: pytest.CaptureFixture[str]) -> Iterator[Answering]:
    """The exit code, both streams and the prompts of a command whose server gives the answers it was told to."""

    def run_it(answers: list[str], *arguments: str) -> tuple[int, str, str, list[str]]:
        streams = [reply("200 OK", STREAM.replace(b'"yes"', json.dumps(text).encode())) for text in answers]
        with misbehaving([reply("404 Not Found"), *streams]) as scripted:
            code = run([*arguments, "--base-url", scripted.url, "--model", "m"])
            bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in scripted.requests[1:]]
        out, err = capsys.readouterr()
        return code, out, err, [body["messages"][-1]["content"][-1]["text"] for body in bodies]

    return run_it


def test_ocr_in_three_forms(told: Callable[..., str]) -> None:
    path = str(SAMPLES / "open.png")
    assert (
        told("ocr", path)
        == told("ocr", path, "--lang", "zh")
        == told("ocr", path, "--to", "layout")
        == "OPEN\n8 to 17\n"
    )
    lines = json.loads(told("ocr", path, "--to", "json"))
    assert [line["text"] for line in lines] == ["OPEN", "8 to 17"]
    assert all(0 <= line["box"][0] < line["box"][2] and 0 <= line["box"][1] < line["box"][3] for line in lines)


def test_table_in_four_forms(told: Callable[..., str]) -> None:
    path = str(SAMPLES / "table.png")
    rows = [["Item", "Price", "Count"], ["Apples", "240", "6"], ["Bread", "315", "1"], ["Milk", "129", "2"]]
    assert told("table", path).splitlines()[2] == "| Apples | 240   | 6     |"
    assert list(csv.reader(io.StringIO(told("table", path, "--to", "csv")))) == rows
    assert [list(record.values()) for record in json.loads(told("table", path, "--to", "json"))] == rows[1:]
    assert told("table", path, "--to", "html").count("<td>") == 9


def test_several_tables_as_csv_stand_apart_and_as_json_on_lines(told: Callable[..., str]) -> None:
    path = str(SAMPLES / "table.png")
    assert [text.count("\n") for text in told("table", path, path, "--to", "csv").split("\n\n")] == [3, 4]
    lines = told("table", path, path, "--to", "json").splitlines()
    assert [json.loads(line)["result"][0]["Item"] for line in lines] == ["Apples", "Apples"]


def test_describe(told: Callable[..., str]) -> None:
    assert "triangle" in told("describe", str(SAMPLES / "shapes.png"))


def test_describe_short_and_in_another_language(answering: Answering) -> None:
    code, out, _, prompts = answering(
        ["Un chat."], "describe", str(SAMPLES / "open.png"), "--length", "short", "--lang", "fr"
    )
    assert (code, out) == (0, "Un chat.\n")
    assert prompts == ["Describe this image in one sentence. Answer in French."]


def test_translate_a_picture(answering: Answering) -> None:
    code, out, _, prompts = answering(["营业中"], "translate", "--to", "zh", str(SAMPLES / "open.png"))
    assert (code, out) == (0, "营业中\n")
    assert "into Chinese" in prompts[0]


def test_translate_piped_text() -> None:
    with misbehaving([reply("200 OK", STREAM)]) as scripted:
        command = [
            sys.executable,
            "-m",
            "qvl",
            "translate",
            "--to",
            "zh",
            "--model",
            "m",
            "--base-url",
            scripted.url,
        ]
        done = subprocess.run(
            command, cwd=ROOT, input="Grüße\n".encode(), capture_output=True, timeout=120, check=False
        )
        body = json.loads(scripted.requests[-1].partition(b"\r\n\r\n")[2])
    assert (done.returncode, done.stdout) == (0, b"yes\n"), done.stderr
    assert body["messages"][0]["content"].endswith("Grüße")


def test_solve(answering: Answering) -> None:
    arguments = ["solve", str(SAMPLES / "open.png")]
    code, out, err, prompts = answering(["2 + 2\n\\boxed{4}"], *arguments)
    assert (code, out, err) == (0, "2 + 2\n\\boxed{4}\n", "")
    assert "\\boxed{}" in prompts[0]
    assert answering(["2 + 2\n\\boxed{4}"], *arguments, "--answer-only")[1] == "4\n"
    line = json.loads(answering(["2 + 2\n\\boxed{4}"], *arguments, "--json")[1])
    assert line["result"] == {"answer": "4", "steps": "2 + 2\n\\boxed{4}"}
    assert "no final answer" in answering(["Hm."], *arguments)[2]


def test_extract(told: Callable[..., str], tmp_path: Path) -> None:
    schema = tmp_path / "sign.json"
    sign = {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"]}
    schema.write_text(json.dumps({**sign, "additionalProperties": False}))
    pictures = [str(SAMPLES / name) for name in ("open.png", "closed.png")]
    assert isinstance(json.loads(told("extract", "--schema", str(schema), pictures[0]))["open"], bool)
    lines = told("extract", "--schema", str(schema), *pictures).splitlines()
    assert [isinstance(json.loads(line)["result"]["open"], bool) for line in lines] == [True, True]


def test_extract_fields_by_name(answering: Answering) -> None:
    code, out, _, prompts = answering(
        ['{"date": "1 May", "total": null}'], "extract", str(SAMPLES / "open.png"), "--fields", "date,total"
    )
    assert (code, json.loads(out)) == (0, {"date": "1 May", "total": None})
    assert '"required": ["date", "total"]' in prompts[0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["extract", "x.png"], "--schema FILE or with --fields"),
        (["extract", "x.png", "--schema", "a", "--fields", "b"], "--schema FILE or with --fields"),
        (["extract", "x.png", "--fields", " , "], "at least one field"),
        (["extract", "x.png", "--schema", "nowhere.json"], "cannot read the schema"),
        (["translate", "x.png", "--to", "zz"], "no language"),
        (["describe", "x.png", "--lang", "?"], "no language"),
        (["describe", "x.png", "--length", "huge"], "'--length': 'huge' is not one of"),
        (["ground", str(SAMPLES / "shapes.png")], "what to find comes before it"),
        (["watch", str(SAMPLES / "shapes.png")], "is a picture, and this task takes videos"),
        (["table", "x.png", "--to", "xls"], "--to"),
        (["ocr", "x.png", "--lang", "fr"], "--lang"),
        (["ocr", str(SAMPLES / "words.mp4")], "is a video, and this task takes pictures and PDFs"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1


def test_an_answer_that_is_no_table_is_exit_code_1(answering: Answering) -> None:
    code, out, err, _ = answering(["I see no table."], "table", str(SAMPLES / "open.png"))
    assert (code, out) == (1, "")
    assert err == f'qvl: {SAMPLES / "open.png"}: the answer is no table: "I see no table."\n'
