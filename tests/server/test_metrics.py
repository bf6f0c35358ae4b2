"""What /metrics says after requests that are known exactly."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from qvl.backends.echo import EchoBackend
from tests.server.live import Live, live

CHAT = "/v1/chat/completions"


def numbers(server: Live) -> dict[str, float]:
    """Every line of /metrics, as a Prometheus server reads it."""
    values = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert (sample.name, labels) not in values, "a line is there twice"
            values[sample.name, labels] = sample.value
    return {f"{name}{{{labels}}}" if labels else name: value for (name, labels), value in values.items()}


def test_everything_is_counted_once() -> None:
    def body(text: str, **more: object) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": text}], **more}

    with live(EchoBackend()) as server:
        server.post(CHAT, body("hello"))
        server.post(CHAT, body("hello", stream=True, max_tokens=2))
        server.post(CHAT, body("a", n=3))
        server.post(CHAT, body("x", temperature=-1))
        server.post("/v1/completions", {"prompt": ["ab", "cd"]})
        server.post("/somewhere/else", {})
        server.get("/v1/models")
        server.service.metrics.media_stage("image", "decode", 0.25)
        seen = numbers(server)

    def requests(method: str, route: str, status: int) -> float:
        return seen[f"qvl_http_requests_total{{method={method},route={route},status={status}}}"]

    assert requests("POST", CHAT, 200) == 3
    assert requests("POST", CHAT, 400) == 1
    assert requests("POST", "/v1/completions", 200) == 1
    assert requests("POST", "unmatched", 404) == 1
    assert requests("GET", "/v1/models", 200) == 1
    assert seen["qvl_prompt_tokens_total"] == 5 + 5 + 1 + 4
    assert seen["qvl_generation_tokens_total"] == 5 + 2 + 3 + 4
    assert seen["qvl_answers_total{finish_reason=stop}"] == 1 + 3 + 2
    assert seen["qvl_answers_total{finish_reason=length}"] == 1
    assert seen["qvl_time_to_first_token_seconds_count"] == 4
    assert seen["qvl_request_seconds_count"] == 4
    assert seen["qvl_time_per_output_token_seconds_count"] == 4
    assert seen["qvl_media_stage_seconds_sum{kind=image,stage=decode}"] == 0.25
    assert seen["qvl_request_stage_seconds_count{stage=receive}"] == 4
    assert seen["qvl_request_stage_seconds_count{stage=parse}"] == 4
    assert seen["qvl_request_stage_seconds_sum{stage=parse}"] > 0
    assert (seen["qvl_requests_in_flight"], seen["qvl_ready"], seen["qvl_engine_running"]) == (0, 1, 0)


def test_strangers_make_no_series_of_their_own() -> None:
    """Paths and methods come from outside: counting each would let anybody fill the memory."""
    with live(EchoBackend()) as server:
        before = len(numbers(server))
        for n in range(20):
            server.get(f"/nothing/{n}")
            server.get(f"/v1/models/unknown-{n}")
        assert (
            len(numbers(server)) <= before + 2 * 2 + 2
        )  # two new series with their times of creation, and /metrics itself
