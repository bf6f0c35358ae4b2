"""The flags that all tasks share, and those on who answers that `ask`, `chat` and `batch` have too: each written once.

Knows how they are explained; nothing is imported for them.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

INPUT_PANEL = "Input"
OUTPUT_PANEL = "Output"
SERVER_PANEL = "Who answers"

Inputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE|FOLDER|URL]...",
        help="Pictures, PDFs, folders of them, addresses; - is standard input, screen: the screen.",
    ),
]
PageRange: TypeAlias = Annotated[
    str | None,
    typer.Option("--pages", metavar="RANGE", help="Pages of PDFs, such as 1-3,7 or 5-.", rich_help_panel=INPUT_PANEL),
]
Dpi: TypeAlias = Annotated[
    float | None,
    typer.Option(
        min=10,
        max=1200,
        help="Resolution of PDF pages [default: what the model can see, at most 200]",
        rich_help_panel=INPUT_PANEL,
    ),
]
Output: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE|FOLDER",
        help="Write there; a folder (one that is there, or a name that ends with /) gets a file for each.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="A line of JSON for each: file, page, result.", rich_help_panel=OUTPUT_PANEL)
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no remarks.", rich_help_panel=OUTPUT_PANEL)
]
MaxTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer in tokens [default: the task's]", rich_help_panel=OUTPUT_PANEL),
]
BaseUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        envvar="QVL_BASE_URL",
        help="The server to ask [default: port 8000 of this machine if it answers, else none]",
        rich_help_panel=SERVER_PANEL,
    ),
]
ModelName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A name the server serves, or a checkpoint folder to load here [default: demo]",
        rich_help_panel=SERVER_PANEL,
    ),
]
ApiKey: TypeAlias = Annotated[
    str | None, typer.Option(envvar="QVL_API_KEY", help="The server's key.", rich_help_panel=SERVER_PANEL)
]
Concurrency: TypeAlias = Annotated[
    int, typer.Option(min=1, max=256, help="Pictures asked about at a time.", rich_help_panel=SERVER_PANEL)
]
