"""`davae serve` as its clients meet it: a process of its own, and OpenAI's client package."""

import base64
import io
import json
import random
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
from openai import OpenAI
from PIL import Image

from davae import load_pipeline
from davae.pipelines.sampling import sample
from server_process import ServerProcess, save_tiny_pair, traversal_probes
from trials import Trials

pytestmark = pytest.mark.timeout(900)
LONG = {"steps": 1000, "seed": 1}
"""Settings of a request that takes long enough to be cancelled on the way."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def server(pair: tuple[Path, Path]) -> Iterator[ServerProcess]:
    """One worker, four images in a batch, four requests that may wait."""
    base, upgraded = pair
    settings = ["--prompt-tokens", "32", "--steps", "4", "--queue", "4", "--max-prompt", "200", "--max-steps", "1000"]
    server = ServerProcess(str(upgraded), "--base", str(base), "--port", "0", "--device", "cpu", *settings)
    yield server.wait_until_ready()
    assert server.end() == -signal.SIGTERM


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return make_client(server)


def make_client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.url, api_key=server.token or "none", max_retries=0, timeout=120)


def read_image(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def expected_pixels(folder: Path, prompts: list[str], seed: int) -> np.ndarray:
    """What `davae generate` makes, with the settings of the fixture."""
    settings = {"steps": 4, "prompt_tokens": 32}
    return sample(load_pipeline(folder), prompts, seed=seed, **settings).permute(0, 2, 3, 1).numpy()


def test_images_are_those_of_the_verb_generate(client: OpenAI, pair: tuple[Path, Path]) -> None:
    answer = client.images.generate(
        prompt="red apple", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 7}
    )
    made = np.stack([np.asarray(read_image(image.b64_json)) for image in answer.data])
    assert np.array_equal(made, expected_pixels(pair[1], ["red apple"] * 2, 7))
    assert (answer.size, answer.output_format) == ("64x64", "png")


def test_the_base_is_another_model(client: OpenAI, pair: tuple[Path, Path]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-base"]
    answer = client.images.generate(prompt="red apple", model="tiny-base", extra_body={"seed": 7})
    made = np.asarray(read_image(answer.data[0].b64_json))
    assert np.array_equal(made, expected_pixels(pair[0], ["red apple"], 7)[0])


def test_a_seed_that_the_server_chose_repeats_the_image(client: OpenAI) -> None:
    first, other = (client.images.generate(prompt="a pear").data[0] for _ in range(2))
    again = client.images.generate(prompt="a pear", extra_body={"seed": first.seed}).data[0]
    assert again.b64_json == first.b64_json != other.b64_json


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_formats_and_their_quality(client: OpenAI, kind: str) -> None:
    settings = {"prompt": "a pear", "output_format": kind, "extra_body": {"seed": 1}}
    low, high = (client.images.generate(**settings, output_compression=quality).data[0] for quality in (5, 95))
    assert read_image(low.b64_json).format == kind.upper()
    assert len(low.b64_json) < len(high.b64_json)


def test_eight_clients_at_once_get_their_own_images(pair: tuple[Path, Path], server: ServerProcess) -> None:
    """More than may wait are told so, try again as OpenAI's client does, and all get what they would get alone."""
    prompts = [f"red apple {'abcdefgh'[number]}" for number in range(8)]

    def ask(number: int) -> np.ndarray:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=20, timeout=120)
        answer = client.images.generate(prompt=prompts[number], extra_body={"seed": number})
        return np.asarray(read_image(answer.data[0].b64_json)).astype(int)

    batches = server.metric("davae_batch_images_count")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(ask, range(8)))

    pipeline = load_pipeline(pair[1])
    for number, image in enumerate(made):
        alone = sample(pipeline, [prompts[number]], seed=number, steps=4, prompt_tokens=32)[0]
        # In a batch, kernels may sum in another order.
        assert np.abs(image - alone.permute(1, 2, 0).numpy()).max() <= 1
    assert server.metric("davae_batch_images_count") - batches <= 8


@contextmanager
def busy_worker(client: OpenAI) -> Iterator[None]:
    """While the only worker is busy; then its request is cancelled."""
    with client.images.generate(prompt="busy", extra_body={**LONG, "progress": True}, stream=True) as events:
        assert next(iter(events)).step == 1
        yield


def test_requests_of_equal_settings_share_a_batch(client: OpenAI, server: ServerProcess) -> None:
    """While the worker is busy, three wait that fit one batch, and one of another size."""
    before = server.metric("davae_batch_images_count")
    with ThreadPoolExecutor(4) as pool:
        with busy_worker(client):
            waiting = [pool.submit(client.images.generate, prompt=f"apple {letter}") for letter in "abc"]
            waiting.append(pool.submit(client.images.generate, prompt="small", size="32x32"))
            server.wait_for("davae_queue", 4)
        assert all(answer.result().data for answer in waiting)
    assert server.metric("davae_batch_images_count") == before + 3


def test_a_full_queue_is_status_429(client: OpenAI, server: ServerProcess) -> None:
    with ThreadPoolExecutor(4) as pool:
        with busy_worker(client):
            waiting = [pool.submit(client.images.generate, prompt="a pear", n=4) for _ in range(4)]
            server.wait_for("davae_queue", 4)
            with pytest.raises(openai.RateLimitError, match="4 requests wait") as refusal:
                client.images.generate(prompt="one too many")
        assert refusal.value.response.headers["retry-after"] == "1"
        assert all(answer.result().data for answer in waiting)


def test_a_cancelled_request_that_waits_frees_its_place(client: OpenAI, server: ServerProcess) -> None:
    with ThreadPoolExecutor(1) as pool, busy_worker(client):
        headers = {"X-Client-Request-Id": "waits"}
        waiting = pool.submit(client.images.generate, prompt="a pear", extra_headers=headers)
        server.wait_for("davae_queue", 1)
        assert server.request("DELETE", "/v1/images/generations/waits")[0] == 204
        with pytest.raises(openai.APIStatusError, match="cancelled"):
            waiting.result()
        assert server.metric("davae_queue") == 0


def wait_until_running(server: ServerProcess, batches_before: float) -> None:
    server.wait_for("davae_batch_images_count", batches_before + 1)


def test_a_stream_tells_steps_and_shows_previews(client: OpenAI) -> None:
    settings = {"prompt": "red apple", "extra_body": {"seed": 7, "progress": True, "steps": 8}}
    events = list(client.images.generate(**settings, stream=True, partial_images=2))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds.count("progress") == 8
    assert kinds.count("partial_image") == 2
    assert kinds[-1] == "completed"

    # The base's decoder makes previews at half the size; the last image is that of a plain request.
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    assert [preview.partial_image_index for preview in previews] == [0, 1]
    assert [read_image(preview.b64_json).size for preview in previews] == [(32, 32)] * 2
    assert [event.step for event in events if event.type == "image_generation.progress"] == list(range(1, 9))
    plain = client.images.generate(prompt="red apple", extra_body={"seed": 7, "steps": 8})
    assert events[-1].b64_json == plain.data[0].b64_json


def test_a_stream_for_plain_clients_has_openais_events_only(client: OpenAI) -> None:
    events = client.images.generate(prompt="red apple", stream=True, partial_images=1)
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_request_ends_at_once_and_has_no_image(client: OpenAI, server: ServerProcess, stream: bool) -> None:
    before, images = server.metric("davae_batch_images_count"), server.metric("davae_images_total")
    received = []

    def ask() -> None:
        headers = {"X-Client-Request-Id": f"mine-{stream}"}
        answer = client.images.generate(prompt="long", extra_body=LONG, extra_headers=headers, stream=stream)
        received.extend(answer if stream else answer.data)

    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(ask)
        wait_until_running(server, before)
        assert server.request("DELETE", f"/v1/images/generations/mine-{stream}")[0] == 204
        with pytest.raises(openai.APIError, match="cancelled"):
            request.result()
    assert received == []
    assert server.request("DELETE", f"/v1/images/generations/mine-{stream}")[0] == 404

    # The worker is free again, and has thrown away what it had.
    assert client.images.generate(prompt="next").data
    assert server.metric("davae_images_total") == images + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(client: OpenAI, server: ServerProcess, stream: bool) -> None:
    before = server.metric("davae_batch_images_count")
    images, stopped = server.metric("davae_images_total"), server.metric("davae_stopped_batches_total")
    if stream:
        with client.images.generate(prompt="long", extra_body={**LONG, "progress": True}, stream=True) as events:
            next(iter(events))
    else:
        body = json.dumps({"prompt": "long", **LONG}).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            wait_until_running(server, before)
    server.wait_for("davae_stopped_batches_total", stopped + 1)
    assert server.metric("davae_images_total") == images


def test_one_of_a_batch_leaves_and_the_other_gets_its_image(client: OpenAI, server: ServerProcess) -> None:
    settings = {"steps": 200, "seed": 5}
    with ThreadPoolExecutor(2) as pool:
        with busy_worker(client):
            headers = {"X-Client-Request-Id": "leaves"}
            leaving = pool.submit(client.images.generate, prompt="long", extra_body=settings, extra_headers=headers)
            staying = pool.submit(client.images.generate, prompt="a pear", extra_body=settings)
            server.wait_for("davae_queue", 2)
            before = server.metric("davae_batch_images_count")
        wait_until_running(server, before)
        assert server.request("DELETE", "/v1/images/generations/leaves")[0] == 204
        with pytest.raises(openai.APIStatusError, match="cancelled"):
            leaving.result()
        kept = np.asarray(read_image(staying.result().data[0].b64_json)).astype(int)
    alone = client.images.generate(prompt="a pear", extra_body=settings)
    assert np.abs(kept - np.asarray(read_image(alone.data[0].b64_json))).max() <= 1


def test_a_second_request_of_one_name_is_refused(client: OpenAI, server: ServerProcess) -> None:
    headers = {"X-Client-Request-Id": "twice"}
    with client.images.generate(prompt="long", extra_body=LONG, extra_headers=headers, stream=True):
        with pytest.raises(openai.BadRequestError, match="twice is under way"):
            client.images.generate(prompt="a pear", extra_headers=headers)


REFUSALS = {
    "response_format": ({"response_format": "url"}, "keeps no images"),
    "n": ({"n": 5}, "n=5: this server allows 4"),
    "size": ({"size": "1024x1024"}, "allows 64x64"),
    "size of no multiple": ({"size": "63x32"}, "multiples of"),
    "steps": ({"steps": 1001}, "allows 1000"),
    "prompt": ({"prompt": "a" * 201}, "201 characters: this server allows 200"),
    "no prompt": ({"prompt": None}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "NUL": ({"prompt": "a\0b"}, "code 0"),
    "stream": ({"stream": True, "n": 2}, "a stream is of one image"),
    "partial_images": ({"partial_images": 2}, "only a stream"),
    "seed": ({"seed": -1}, "seed"),
    "seed as text": ({"seed": "7"}, "seed"),
    "quality": ({"quality": "hd"}, "quality='hd'"),
    "unknown": ({"negativ": "blur"}, "there is no such field; allowed are prompt"),
    "compression": ({"output_compression": 5}, "PNG is lossless"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_allowed_is_refused_by_name(server: ServerProcess, case: str) -> None:
    change, message = REFUSALS[case]
    status, answer = server.post(json.dumps({"prompt": "red apple", **change}).encode())
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]
    assert error["param"] in change


def test_an_unknown_model_is_status_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has tiny, tiny-base") as refusal:
        client.images.generate(prompt="red apple", model="dall-e-3")
    assert refusal.value.code == "model_not_found"


VALID = json.dumps({"prompt": "red apple", "steps": 1, "n": 1, "size": "32x32", "seed": 1}).encode()
FIELDS = ["prompt", "n", "size", "seed", "steps", "guidance_scale", "stream", "partial_images", "response_format"]
VALUES = ["[]", "{}", "-1", "1e999", "NaN", '"\\ud800"', "9" * 5000, '"' + "x" * 5000 + '"', "0.5", '"\\u0000"']
BODIES = [b"", b"[", b"null", b"[]", b'"text"', b"\xff\xfe", b"{}", b"[" * 20_000, b'{"prompt"', b"x" * 70_000]
KINDS = ["text/plain", "application/xml", "multipart/form-data", "application/x-www-form-urlencoded", "a" * 999]
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
NO_HTTP = [
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01",
    b"A" * 100_000,
    POST.replace(b"1.1", b"9.9") + b"\r\n",
    POST + b"Content-Length: -5\r\n\r\n",
    POST + b"Content-Length: 99999999999\r\n\r\nshort",
    POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    POST + b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n" + VALID,
]


def send_malformed(server: ServerProcess, choose: random.Random) -> int:
    """Send something that no server should answer with an image; the status, or 400 for a closed connection."""
    match choose.randrange(5):
        case 0:
            return server.post(choose.choice(BODIES))[0]
        case 1:  # a field of the wrong kind, or out of its bounds
            change = f', "{choose.choice(FIELDS)}": {choose.choice(VALUES)}, "{choose.random()}": 1}}'
            return server.post(VALID[:-1] + change.encode())[0]
        case 2:
            return server.post(VALID[: choose.randrange(1, len(VALID) - 1)])[0]
        case 3:
            return server.post(VALID, {"Content-Type": choose.choice(KINDS)})[0]
        case _:
            answer = server.send_raw(choose.choice(NO_HTTP))
            return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/") else 400


@pytest.mark.soak("R13", ci=200, full=5000)
def test_malformed_requests_are_refused_and_the_server_goes_on(
    client: OpenAI, server: ServerProcess, trials: Trials
) -> None:
    images = server.metric("davae_images_total")
    for choose in trials:
        assert 400 <= send_malformed(server, choose) < 500
    assert server.metric("davae_images_total") == images
    assert client.images.generate(prompt="red apple").data


def test_no_path_leads_to_a_file(server: ServerProcess) -> None:
    probes = traversal_probes()
    assert len(set(probes)) >= 60
    for probe in probes:
        status, answer = server.get(probe)
        assert status in (400, 404, 405), probe
        assert b"root:" not in answer
        assert b"PATH=" not in answer


def test_it_listens_on_loopback_only(server: ServerProcess) -> None:
    listening = [c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_pages_of_other_sites_are_not_answered(server: ServerProcess, headers: dict[str, str]) -> None:
    """A name of the attacker's that leads to this machine, and a page that sends a form."""
    assert server.post(b'{"prompt": "red apple"}', headers)[0] in (400, 403)


def measure_memory(server: ServerProcess, client: OpenAI, rounds: int) -> int:
    """Bytes after some rounds of work of all kinds."""

    def ask(number: int) -> None:
        try:
            client.images.generate(prompt=f"pear {'abcd'[number % 4]}", n=number % 4 + 1)
        except openai.RateLimitError:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8 * rounds)))
    for _ in range(rounds):
        with client.images.generate(prompt="long", extra_body={**LONG, "progress": True}, stream=True) as events:
            next(iter(events))
    server.wait_for("davae_queue", 0)
    return server.memory()


def test_memory_comes_back_to_its_baseline(server: ServerProcess, client: OpenAI) -> None:
    baseline = measure_memory(server, client, 2)
    assert measure_memory(server, client, 4) <= 1.05 * baseline


@pytest.mark.slow
def test_memory_stays_at_its_baseline_for_long(server: ServerProcess, client: OpenAI) -> None:
    baseline = measure_memory(server, client, 10)
    assert measure_memory(server, client, 400) <= 1.05 * baseline


def test_killed_and_started_again_it_serves_from_the_same_port(pair: tuple[Path, Path]) -> None:
    """Also: with a token, two workers, and an end by Ctrl+C that lets a running request finish."""
    token = "a-token-of-24-characters"
    settings = [str(pair[1]), "--device", "cpu", "--device", "cpu", "--prompt-tokens", "32"]
    server = ServerProcess(*settings, "--port", "0", token=token).wait_until_ready()
    client = make_client(server)
    answer = client.images.generate(prompt="red apple", extra_body={"seed": 7, "steps": 4})
    assert np.array_equal(
        np.asarray(read_image(answer.data[0].b64_json)), expected_pixels(pair[1], ["red apple"], 7)[0]
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.images.generate, prompt="red apple", extra_body={"steps": 100})
        server.wait_for("davae_batch_images_count", 2)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(openai.APIConnectionError):
            running.result()

    again = ServerProcess(*settings, "--port", str(server.port), token=token).wait_until_ready()
    try:
        check_token(again)
        two_at_once(again, pair[1])
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(make_client(again).images.generate, prompt="red apple", extra_body={"steps": 100})
            again.wait_for("davae_batch_images_count", 3)
            again.process.send_signal(signal.SIGINT)
            assert running.result().data
        assert again.process.wait(60) == 0
    finally:
        again.end(signal.SIGKILL)


def test_a_second_signal_ends_what_runs_and_says_so(pair: tuple[Path, Path]) -> None:
    settings = ["--port", "0", "--device", "cpu", "--prompt-tokens", "32", "--max-steps", "1000000"]
    server = ServerProcess(str(pair[0]), *settings).wait_until_ready()
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.post, b'{"prompt": "red apple", "steps": 1000000}')
            server.wait_for("davae_batch_images_count", 1)
            server.process.send_signal(signal.SIGTERM)
            server.wait_until_closed()
            server.process.send_signal(signal.SIGINT)
            status, answer = running.result()
        assert (status, json.loads(answer)["error"]["code"]) == (503, "server_ends")
        assert server.process.wait(60) == -signal.SIGTERM
        assert "Traceback" not in server.process.stderr.read()
    finally:
        server.end(signal.SIGKILL)


def check_token(server: ServerProcess) -> None:
    """Only /healthz is for all."""
    assert server.get("/healthz")[0] == 200
    wrong = ["", "Bearer wrong", "Basic !!!", f"Bearer {server.token}x", f"Bearer {server.token[:-1]}", "Bearer \xff"]
    for authorization in wrong:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert server.get(path, {"Authorization": authorization})[0] == 401, authorization
        assert server.post(b'{"prompt": "a"}', {"Authorization": authorization})[0] == 401
    browser = base64.b64encode(f"anybody:{server.token}".encode()).decode()
    assert server.get("/v1/models", {"Authorization": f"Basic {browser}"})[0] == 200


def two_at_once(server: ServerProcess, folder: Path) -> None:
    """Each worker makes one image, both with the shared weights and its own scheduler."""
    client, answers = make_client(server), {}

    def ask(seed: int, steps: int) -> None:
        settings = {"seed": seed, "steps": steps}
        answers[seed] = client.images.generate(prompt="red apple", extra_body=settings).data[0].b64_json

    with ThreadPoolExecutor(2) as pool:
        for request in [pool.submit(ask, seed, 4 + 16 * seed) for seed in (0, 1)]:
            request.result()
    assert np.array_equal(np.asarray(read_image(answers[0])), expected_pixels(folder, ["red apple"], 0)[0])
    assert server.metric("davae_batch_images_count") == 2
