"""The verb that serves a pipeline to clients over HTTP."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from davae.cli import options
from davae.cli.options import choose_device, give, say, with_dry_run
from davae.errors import SettingsError

TOKEN_VARIABLE = "DAVAE_SERVE_TOKEN"


@with_dry_run
def serve(
    pipeline: options.PipelinePath,
    revision: options.Revision = None,
    adapter: options.Adapter = [],
    base: Annotated[
        str | None, typer.Option(help="A pipeline to serve beside it; by default the one that an adapter is for.")
    ] = None,
    name: Annotated[str, typer.Option(help="What clients call the model; by default the folder's name.")] = "",
    host: Annotated[str, typer.Option(help="Where it listens; others than this machine need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token that clients send; or set {TOKEN_VARIABLE}.")
    ] = None,
    device: Annotated[list[str], typer.Option(help="Where it runs, such as cuda:1. Repeatable: a worker each.")] = [],
    dtype: options.Dtype = None,
    steps: options.Steps = 28,
    guidance_scale: options.GuidanceScale = 4.0,
    prompt_tokens: options.PromptTokens = 256,
    max_steps: Annotated[int, typer.Option(min=1, help="Most steps of a request.")] = 100,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Width x height is this squared at most; by default the pipeline's own.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most images of a request, and of a batch.")] = 4,
    max_prompt: Annotated[int, typer.Option(min=1, help="Most characters of a prompt.")] = 2000,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get status 429.")] = 16,
    ui: Annotated[bool, typer.Option("--ui", help="Add a page to try it in a browser. Needs the extra `ui`.")] = False,
) -> None:
    """Serve a pipeline: images by the API that OpenAI's clients speak. Needs the extra `serve`; see docs/serving.md."""
    from davae.pipelines.folders import check_reads_prompts
    from davae.pipelines.places import pin

    _check_extras(ui)
    pinned = pin(pipeline, revision)
    check_reads_prompts(pinned)
    from davae.serving.settings import Address, Defaults, Limits

    # Refuse before anything is loaded.
    address = Address(host, port, _read_token(token_file))
    limits = Limits(max_steps, max_side, batch, max_prompt, queue)
    defaults = Defaults(steps, guidance_scale, prompt_tokens)
    address.bind().close()
    if steps > max_steps:
        raise SettingsError(f"--steps {steps} is more than --max-steps {max_steps}")
    devices = [choose_device(place) for place in device] or [choose_device(None)]

    from davae.pipelines.placement import choose_dtype
    from davae.serving.server import Server, Source

    on_gpu = any(place.startswith("cuda") for place in devices)
    weights = choose_dtype(dtype, "cuda" if on_gpu else "cpu")
    source = Source(pinned, adapter, base, name, weights)
    server = Server(source, devices, address, limits, defaults, ui)

    def announce(url: str) -> None:
        page = f"{url}/ui" if ui else None
        say(f"serving {pipeline} at {url}/v1{f'; its page is {page}' if page else ''}; Ctrl+C ends it")
        give({"url": f"{url}/v1", "page": page})

    server.run(announce)


def _check_extras(ui: bool) -> None:
    if find_spec("fastapi") is None or find_spec("uvicorn") is None or find_spec("prometheus_client") is None:
        raise SettingsError("serving needs FastAPI and uvicorn, which are not installed: pip install 'davae[serve]'")
    if ui and find_spec("gradio") is None:
        raise SettingsError("--ui needs Gradio, which is not installed: pip install 'davae[ui]'")


def _read_token(path: Path | None) -> str:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--token-file {path} cannot be read ({error}): give a file with one line") from error
    if not token:
        raise SettingsError(f"--token-file {path} is empty: put a token into it, such as by openssl rand -hex 24")
    return token
