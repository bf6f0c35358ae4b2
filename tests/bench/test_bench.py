"""The benchmarks: true shapes, fair turns, exact arithmetic, and one JSON object as the last line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qvl.bench import cpu_limit
from qvl.bench.measure import Figures, Prompt, Workload, measure, ratios
from qvl.bench.shape import SHAPES, write_shape
from qvl.bench.stages import Stages
from qvl.cli.app import run
from qvl.cli.bench import longest_request
from qvl.engine.config import resolve
from qvl.engine.device import read_facts
from qvl.engine.locate import demo_folder
from qvl.engine.options import EngineOptions
from qvl.errors import ConfigError, RequestFailed
from qvl.specs import ProcessorSpec, load_spec
from qvl.tokenizer import Tokenizer


class Ticking:
    """Takes `first` seconds for the first token and `step` for every other, on a clock of its own."""

    def __init__(self, name: str, first: float, step: float) -> None:
        self.name, self._first, self._step = name, first, step
        self.asked: list[Prompt] = []

    def generate(self, prompt: Prompt, num_tokens: int) -> list[float]:
        self.asked.append(prompt)
        first = self._first * (10 if len(self.asked) <= 2 else 1) + (1.0 if prompt.picture is not None else 0.0)
        return [first + self._step * i for i in range(num_tokens)]


def test_medians_leave_the_warm_up_out_and_turns_are_fair() -> None:
    one, other = Ticking("one", 0.5, 0.25), Ticking("other", 1.0, 0.125)
    figures = measure([one, other], Workload(8, 5, (28, 56), repeats=3), range(100), lambda _: None)
    assert figures["one"] == Figures(0.5, 0.25, 1.5)
    assert figures["other"] == Figures(1.0, 0.125, 2.0)
    quotients = {"prefill": 0.5, "time_per_token": 2.0, "picture_ttft": 0.75, "step_together": None}
    assert ratios(figures["one"], figures["other"]) == quotients
    assert [p.token_ids for p in one.asked] == [p.token_ids for p in other.asked]
    assert len({p.token_ids for p in one.asked}) == 8  # 4 rounds of a text and a picture, nothing twice
    assert [p.picture is not None for p in one.asked] == [False, True] * 4
    assert one.asked[1].picture is not None
    assert one.asked[1].picture.shape == (28, 56, 3)


def test_the_limit_is_bytes_and_operations_over_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_limit, "MATRIX_BYTES", 1 << 20)
    spec = load_spec(demo_folder())
    limit = cpu_limit.CpuLimit(spec, torch.bfloat16)
    assert limit.bandwidth() > 0
    assert limit.rate(3) > 0
    monkeypatch.setattr(limit, "bandwidth", lambda: 1e6)
    monkeypatch.setattr(limit, "rate", lambda rows: 1e9 * rows)
    text = spec.text
    step = 2 * (text.num_layers * text.layer_matrix_parameters + text.vocab_size * text.hidden_size) / 1e6
    first = spec.prefill_flops(7) / 7e9
    assert limit.generate(Prompt(tuple(range(7))), 3) == pytest.approx([first, first + step, first + 2 * step])
    picture = Prompt(tuple(range(7)), np.zeros((224, 280, 3), dtype=np.uint8))
    tokens = 7 + 2 + 8 * 10
    expected = (spec.prefill_flops(tokens) + spec.vision_flops(320)) / (1e9 * tokens)
    assert limit.generate(picture, 1) == pytest.approx([expected])


def test_the_limit_stands_beside_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_limit, "MATRIX_BYTES", 1 << 20)
    flags = ["--prompt-tokens", "8", "--output-tokens", "3", "--picture", "56x56", "--repeats", "1"]
    assert run(["bench", "engine", "demo", "--device", "cpu", "--dtype", "bfloat16", "--against", "limit", *flags]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record["seconds"]) == {"qvl", "limit"}
    assert all(value is None or value > 0 for value in record["seconds"]["limit"].values())


def test_without_a_picture_there_is_no_figure_for_it() -> None:
    figures = measure([Ticking("one", 1.0, 1.0)], Workload(picture=None), range(9), lambda _: None)
    assert figures["one"].picture_ttft is None
    assert ratios(figures["one"], figures["one"])["picture_ttft"] is None


@pytest.mark.parametrize(("name", "billions"), [("2b", 2.209), ("7b", 8.291), ("72b", 73.406)])
def test_shapes_are_the_published_ones(tmp_path: Path, name: str, billions: float) -> None:
    """Parameter counts and control tokens as the published checkpoints have them."""
    spec = load_spec(write_shape(name, tmp_path / name))
    assert spec.num_parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    assert (spec.ids.pad, spec.ids.im_start, spec.ids.eos) == (151643, 151644, (151645, 151643))
    assert (spec.ids.vision_start, spec.ids.vision_end, spec.ids.vision_pad) == (151652, 151653, 151654)
    assert (spec.ids.image_pad, spec.ids.video_pad) == (151655, 151656)
    tokenizer = Tokenizer.from_folder(spec.folder, spec.ids)
    assert tokenizer.vocab_size < spec.text.vocab_size == SHAPES[name].vocab_size


def test_a_shape_never_overwrites_weights(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="holds weights"):
        write_shape("2b", checkpoint)


def test_side_by_side_with_transformers(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "12", "--output-tokens", "4", "--picture", "112x56", "--repeats", "1", "--threads", "1"]
    kind = ["--dtype", "float32", "--load-format", "dummy"]
    code = run(["bench", "engine", str(checkpoint), "--against", "transformers", *sizes, *kind])
    out, err = capsys.readouterr()
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert set(record["seconds"]) == {"qvl", "transformers 4.57.6"}
    for figures in record["seconds"].values():
        assert figures.pop("step_together") is None
        assert all(seconds > 0 for seconds in figures.values())
    assert record["workload"]["picture"] == [56, 112]
    assert record["threads"] == 1
    assert "qvl / peer" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "vllm"], "--against knows transformers"),
        (["--stages", "--against", "limit"], "leave --against out"),
        (["--batches", "1,8"], "--batches goes with --stages"),
        (["--stages", "--batches", "0"], "--batches takes numbers"),
        (["--picture", "10x9000"], "at most 200 times"),
        (
            ["--prompt-tokens", "5000"],
            "this takes 5,032 tokens in one request, and the checkpoint was trained for 4,096",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "engine", str(checkpoint), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("side", "tokens"), [(56, 4), (448, 256), (3584, 16_384), (9000, 16_384)])
def test_an_engine_has_room_for_the_picture_as_it_is_shown(side: int, tokens: int) -> None:
    """However large the file is, the checkpoint takes 16,384 tokens of it."""
    longest = longest_request(Workload(2, 2, (side, side)), ProcessorSpec())
    assert tokens + 20 < longest <= tokens + 64
    assert longest_request(Workload(900, 2, (56, 56)), ProcessorSpec()) == 902


def test_stages_end_with_an_error_rather_than_wait_for_an_answer_that_ended(checkpoint: Path) -> None:
    options = EngineOptions(model=str(checkpoint), device="cpu", dtype="float32", max_model_len=16, max_num_seqs=3)
    config = resolve(options, read_facts("cpu"))
    stages = Stages(config, Workload(12, 2, None, repeats=1), [5, 6, 7], lambda _: None)
    with pytest.raises(RequestFailed, match="of 3 answers some ended"):
        stages.measure([3])


def test_quantised_beside_unquantised_alone_and_together(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "12", "--output-tokens", "4", "--picture", "56x56", "--repeats", "1", "--threads", "1"]
    what = ["--dtype", "bfloat16", "--quantization", "int8", "--against", "unquantised", "--streams", "3"]
    code = run(["bench", "engine", str(checkpoint), *what, *sizes])
    out, err = capsys.readouterr()
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert set(record["seconds"]) == {"qvl int8", "qvl bfloat16"}
    assert all(seconds > 0 for figures in record["seconds"].values() for seconds in figures.values())
    assert (record["quantization"], record["workload"]["streams"]) == ("int8", 3)
    assert "step together" in out
    assert run(["bench", "engine", str(checkpoint), "--against", "unquantised"]) == 2


def test_where_the_time_goes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "12", "--picture", "56x56", "--repeats", "1", "--threads", "1", "--batches", "1,3"]
    code = run(["bench", "engine", str(checkpoint), "--stages", "--device", "cpu", "--dtype", "float32", *sizes])
    out, err = capsys.readouterr()
    assert code == 0, err
    *table, last = out.splitlines()
    record = json.loads(last)
    stages = [line["stage"] for line in record["stages"]]
    assert all(line.startswith(stage) for line, stage in zip(table, stages, strict=True))
    wanted = {
        "preprocess 56x56",
        "vision tower 56x56",
        "prompt of 12",
        "decode step of 3, eager",
        "choice of 1, greedy",
    }
    assert wanted <= set(stages)
    assert all(line["ms"] > 0 for line in record["stages"])
    assert run(["bench", "engine", str(checkpoint), "--stages", "--batches", "1,x"]) == 2


def test_both_subjects_compute_the_same_tokens(checkpoint: Path) -> None:
    """A comparison means something only when both do the same work: same prompt length, same answer."""
    import numpy as np
    import torch

    from qvl.bench.ours import QvlSubject
    from qvl.bench.transformers_peer import TransformersSubject

    options = EngineOptions(model=str(checkpoint), device="cpu", dtype="float32", max_model_len=256, num_threads=1)
    ours = QvlSubject(resolve(options, read_facts("cpu")))
    theirs = TransformersSubject(load_spec(checkpoint), dtype=torch.float32, device=torch.device("cpu"), dummy=False)
    theirs._model.generation_config.suppress_tokens = sorted(load_spec(checkpoint).ids.never_sampled)
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for prompt in (Prompt((5, 6, 7, 8)), Prompt((5, 6, 7, 8), noise)):
        for subject in (ours, theirs):
            times = subject.generate(prompt, 6)
            assert len(times) == 6
            assert times == sorted(times)
        assert ours.last_tokens == theirs.last_tokens
