"""`qvl chat`: a conversation in the terminal.

Knows the flags. What is said to whom, and how it looks, is in `qvl.cli.talk`, which loads only for this command.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qvl.cli.tasks.flags import ApiKey, BaseUrl, ModelName


def chat(
    base_url: BaseUrl = None,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="The system message of a new conversation.")] = None,
    strategy: Annotated[
        Literal["summary", "window", "none"],
        typer.Option(help="What to do when the conversation outgrows the model: fold it, drop its oldest, or refuse."),
    ] = "summary",
    budget: Annotated[
        int | None, typer.Option(min=256, help="Most tokens of one request [default: the model's context]")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="ID", help='Go on with a conversation: its id, its name, or "last".')
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [default: the checkpoint's]")] = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to the model in the terminal, with pictures and videos: type or paste a file's path, or `/image FILE`.

    `/help` lists the commands. Ctrl-C stops an answer and keeps the conversation, Ctrl-D leaves. Everything said is
    kept on this machine and can be resumed. Piped in, every line is a turn, and the answers are plain text.
    """
    from qvl.cli.talk import Settings, talk
    from qvl.types import SamplingParams

    talk(
        Settings(
            base_url=base_url,
            model=model,
            api_key=api_key,
            system=system,
            strategy=strategy,
            budget=budget,
            resume=resume,
            sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature),
        )
    )
