"""`qvl ask`: one question about pictures, from the command line.

Knows the flags. Does not know where an answer comes from: that is `qvl.cli.answer`, which loads only for this command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvl.cli.tasks.flags import ApiKey, BaseUrl, ModelName, Quiet

DEFAULT_MAX_TOKENS = 1024


def ask(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The question; - reads it from standard input.")],
    media: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|URL]...",
            help="Pictures and videos; - is standard input, screen: the screen, screen:left,top,right,bottom a part.",
        ),
    ] = None,
    base_url: BaseUrl = None,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [default: the checkpoint's]")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    api_key: ApiKey = None,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON schema that the answer keeps to, checked here too.")
    ] = None,
    image_detail: Annotated[
        Literal["auto", "low", "high"],
        typer.Option(help="low: pictures are seen at no more than 512 x 512 pixels, which is faster."),
    ] = "auto",
    fps: Annotated[
        float | None, typer.Option(min=0.01, max=60, help="Frames per second seen of videos [default: the model's]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")] = False,
    quiet: Quiet = False,
) -> None:
    """Ask one question about pictures or videos and stream the answer.

    Text piped in is added to the question when no file is named: `cat page.txt | qvl ask "Summarise this."`
    """
    from qvl.cli.answer import Look, answer
    from qvl.cli.who import Who
    from qvl.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    who = Who(base_url, model, api_key)
    answer(
        text, media or [], system, sampling, who, Look(image_detail, fps), schema=schema, as_json=as_json, quiet=quiet
    )
