"""The command line as a user meets it: in a process of its own."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from davae import AutoencoderDA, assets, load_pipeline, upgrade, widen_transformer
from davae.backbones import backbone_of
from davae.cli import interrupts_kept, main
from davae.cli.sources import repeat_command
from davae.method.widen import lost_directions
from davae.pipelines.inspection import describe, describe_folder
from hub_server import FolderHub, serving
from tiny import tiny_sd3_pipeline

VERBS = [
    "try",
    "demo",
    "doctor",
    "init",
    "run",
    "recipes",
    "inspect",
    "train-autoencoder",
    "upgrade",
    "import",
    "finetune",
    "generate",
    "reconstruct",
    "latents",
    "evaluate",
    "bench",
    "serve",
    "runs",
]


def davae(*arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "davae", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def test_help_is_fast_and_names_every_verb() -> None:
    began = os.times()
    answer = davae("--help")
    ended = os.times()
    # Of the processor, not of the wall: another program may be busy.
    seconds = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert answer.returncode == 0
    assert all(verb in answer.stdout for verb in [*VERBS, "cache", "data"])
    assert answer.stdout.index("Use") < answer.stdout.index("generate") < answer.stdout.index("Research")
    assert answer.stdout.index("Research") < answer.stdout.index("bench")
    assert seconds < 1.5  # 0.2 s on an idle machine


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is set before torch is imported, which reads it once."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    program = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))\n"
        "from davae.cli import main\n"
        "main(['--version'])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.split()[-2:] == [expected, "False"]


def test_inspect_reads_no_weights_and_imports_no_library_that_does() -> None:
    program = (
        "import sys\n"
        "from davae import assets\n"
        "from davae.cli import main\n"
        "try:\n    main(['inspect', str(assets.base_pipeline())])\n"
        "except SystemExit as left:\n    assert not left.code\n"
        "assert 'davae.pipelines.inspection' in sys.modules\n"
        "assert not {'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)"
    )
    began = os.times()
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    ended = os.times()
    seconds = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert seconds < 7  # 2 s on a core that others use, too; with diffusers it would be 8
    lines = ("transformer   SD3Transformer2DModel", "an upgrade    128 px -> 256 px at the same 64 tokens")
    for line in lines:
        assert line in answer.stdout


def test_short_help_and_completion() -> None:
    assert davae("generate", "-h").stdout == davae("generate", "--help").stdout
    variables = {"_DAVAE_COMPLETE": "complete_bash", "COMP_WORDS": "davae gen", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "davae"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    assert answer.stdout.split() == ["generate"]


def test_the_timeout_of_ranks_is_shown_to_ranks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--rank-timeout" not in davae("generate", "--help").stdout
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--rank-timeout" in davae("generate", "--help").stdout


def test_types_are_published() -> None:
    assert (Path(assets.__file__).parents[1] / "py.typed").is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_a_dry_run(verb: str) -> None:
    answer = davae(verb, "--help")
    assert answer.returncode == 0
    assert "--dry-run" in answer.stdout


def test_help_shows_the_names_of_extras() -> None:
    """Words in square brackets would be taken for markup."""
    assert "extra `demo`" in " ".join(davae("data", "avatars", "--help").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--budget", "tiny", "--seed", "3"], {"out": "runs/demo", "budget": "tiny", "seed": 3}),
        (["try", "a", "b", "--seed", "3"], {"prompts": ["a", "b"], "out": "runs/try", "seed": 3}),
        (["inspect", "a", "--size", "320x192"], {"pipeline": "a", "size": [320, 192]}),
        (["upgrade", "a", "b", "c"], {"pipeline": "a", "autoencoder": "b", "out": "c"}),
        (["generate", "a", "red apple", "--size", "256"], {"prompts": ["red apple"], "size": 256, "seed": 0}),
        (["generate", "a", "b", "--size", "320x192", "--adapter", "c"], {"size": [320, 192], "adapter": ["c"]}),
        (["reconstruct", "a", "b", "--limit", "4"], {"autoencoder": "a", "pictures": "b", "limit": 4, "base": None}),
        (["reconstruct", "a", "b", "--base", "c"], {"base": "c", "size": 256}),
        (["reconstruct", "a", "b", "--compare", "c", "--compare", "d"], {"compare": ["c", "d"], "patch": 2}),
        (["latents", "a", "b", "c"], {"autoencoders": ["a", "b"], "pictures": "c", "neighbours": 10}),
        (
            ["evaluate", "a", "b", "--count", "8", "--size", "320x192"],
            {"pictures": "b", "count": 8, "size": [320, 192]},
        ),
        (["init", "--pictures", "a", "--memory", "24GB"], {"pictures": "a", "out": "a.toml", "memory": "24GB"}),
        (["bench", "a", "--against", "b", "--part", "step"], {"against": "b", "parts": ["step"], "repeats": 7}),
        (["bench", "--geometry", "sd35m", "--layers", "2"], {"pipeline": None, "geometry": "sd35m", "layers": 2}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_dry_run_prints_the_resolved_arguments(arguments: list[str], expected: dict[str, object]) -> None:
    answer = davae(*arguments, "--dry-run")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout).items() >= expected.items()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    davae("demo", "--out", str(tmp_path / "run"), "--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_a_command_to_copy_has_the_settings_of_its_image(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 3, "size": (96, 48), "negative": "a b", "lora": [("x", 0.5)], "adapter": ["c"], "dtype": None}
    command = shlex.split(repeat_command("base", settings, "it's a cat", 7))
    assert command[0] == "davae"
    with pytest.raises(SystemExit):
        main([*command[1:], "--dry-run"])
    expected = {**settings, "size": [96, 48], "lora": [["x", 0.5]], "prompts": ["it's a cat"], "first_index": 7}
    assert json.loads(capsys.readouterr().out).items() >= expected.items()


def loaded_while_interrupted() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_interrupt_stays_one_whatever_a_library_makes_of_it() -> None:
    """safetensors makes a ValueError of it, diffusers an OSError of that."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_kept():
            loaded_while_interrupted()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

        with pytest.raises(ValueError, match="no interrupt"), interrupts_kept():
            raise ValueError("no interrupt")
    finally:
        signal.signal(signal.SIGINT, former)


def test_version() -> None:
    assert davae("--version").stdout.startswith("davae 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a", "red apple", "--steps", "0"],
        ["generate", "a", "red apple", "--size", "320x"],
        ["generate", "a", "red apple", "--size", "0x64"],
        ["generate", "a", "red apple", "--seed", "-1"],
        ["evaluate", "a"],
        ["fly"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_leave_with_2_and_no_traceback(arguments: list[str]) -> None:
    answer = davae(*arguments)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_a_missing_pipeline_is_one_error_without_a_traceback(tmp_path: Path) -> None:
    answer = davae("inspect", str(tmp_path / "nowhere"))
    assert answer.returncode in {2, 4}
    assert "nowhere" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_inspect_tells_what_a_pipeline_is_and_what_an_upgrade_would_change(tmp_path: Path) -> None:
    tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
    answer = davae("inspect", str(tmp_path / "base"), "--json")
    assert answer.returncode == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert not facts["upgraded"]
    assert (facts["downsample_factor"], facts["latent_channels"], facts["default_size"]) == (4, 4, 32)
    assert facts["tokens"] == {"16": 4, "32": 16, "64": 64}
    assert facts["upgrade"]["default_size"] == [32, 64]
    assert facts["upgrade"]["tokens_at_default_size"] == [16, 16]


def test_inspect_of_a_name_fetches_json_and_the_headers_of_weights_alone(tmp_path: Path) -> None:
    base, cache = tmp_path / "base", tmp_path / "cache"
    load_pipeline(assets.base_pipeline()).save_pretrained(base, max_shard_size="8MB")
    shards = sorted((base / "transformer").glob("*.safetensors"))
    assert len(shards) > 1

    with serving(FolderHub(base)) as hub:
        # A download that was cut short after a shard is not taken for the whole.
        kept = cache / "hub" / "models--someone--tiny" / "snapshots" / hub.commit / "transformer"
        kept.mkdir(parents=True)
        shutil.copy(shards[0], kept)
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        answer = davae(
            "inspect", hub.name, "--json", HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(cache), HF_TOKEN=""
        )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == describe_folder(base)

    # Of each file of weights, what a header takes; nothing of the other parts.
    weights = {name: count for name, count in hub.sent.items() if not name.endswith(".json")}
    assert {name.partition("/")[0] for name in weights} == {"transformer", "vae"}
    assert all(count <= 100_001 < (base / name).stat().st_size for name, count in weights.items())
    assert [path.name for path in cache.rglob("*.safetensors")] == [shards[0].name]


def test_inspect_knows_an_upgraded_pipeline() -> None:
    base = tiny_sd3_pipeline()
    upgraded = upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=8))
    before, after = describe(base), describe(upgraded)
    assert after["upgraded"]
    assert after["upgrade"] is None
    assert (after["base_channels"], after["detail_channels"], after["latent_channels"]) == (4, 8, 12)
    assert after["tokens"]["64"] == before["tokens"]["32"]
    assert after["default_size"] == 2 * before["default_size"]


def test_inspect_predicts_the_parameters_that_an_upgrade_adds() -> None:
    base = tiny_sd3_pipeline()
    upgraded = upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=base.vae.config.latent_channels))
    added = describe(upgraded)["transformer_parameters"] - describe(base)["transformer_parameters"]
    assert describe(base)["upgrade"]["added_transformer_parameters"] == added


def test_inspect_says_how_many_detail_channels_a_transformers_width_holds() -> None:
    base = load_pipeline(assets.base_pipeline())
    most = describe(base)["upgrade"]["most_detail_channels"]
    for more, loses in ((0, False), (1, True)):
        widened = widen_transformer(base.transformer, base_channels=16, detail_channels=most + more)
        assert bool(lost_directions(widened, backbone_of(widened).ports)) == loses
    assert describe(tiny_sd3_pipeline())["upgrade"]["most_detail_channels"] == 0  # the base fills its width


RECIPES = ["train-autoencoder", "finetune"]


@pytest.mark.parametrize("verb", RECIPES)
@pytest.mark.parametrize("option", ["--set", "file"])
def test_unknown_recipe_key_leaves_with_2_and_suggests_the_nearest(tmp_path: Path, verb: str, option: str) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text("sede = 3\n" if option == "file" else "")
    answer = davae(verb, str(recipe), "--dry-run", *(["--set", "sede=3"] if option == "--set" else []))
    assert answer.returncode == 2
    assert "sede" in answer.stderr
    assert "seed" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("verb", RECIPES)
def test_missing_recipe_leaves_with_2(tmp_path: Path, verb: str) -> None:
    answer = davae(verb, str(tmp_path / "none.toml"))
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr


def test_an_upgrade_never_replaces_what_it_reads(tmp_path: Path) -> None:
    tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "base").rglob("*"))
    autoencoder = Path(__file__).parents[1] / "fixtures" / "0.1.0" / "upgraded" / "vae"
    for out in (tmp_path / "base", tmp_path):
        answer = davae("upgrade", str(tmp_path / "base"), str(autoencoder), str(out))
        assert answer.returncode == 2
        assert "would be replaced" in answer.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "base").rglob("*")) == before
