"""`--json`: every verb prints one JSON object on stdout, and nothing else."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main
from safetensors.torch import save_file

import ldm
from davae import cli, load_autoencoder, load_pipeline, upgrade
from stages import autoencoder_recipe, finetune_recipe


class Call(NamedTuple):
    """A command, in a folder with a base, its upgrade, an autoencoder, images and recipes, and facts that it gives."""

    command: str
    facts: set[str]
    needs: str = ""
    """A library of an extra."""
    after: str = ""
    """A command before it."""


BUILD = "cache build two.toml --out runs/two"
KID = "efficientnet_lite_pytorch"
SAMPLING = "--steps 1 --device cpu --prompt-tokens 8"
CALLS = {
    "recipes": Call("recipes", {"sd35m_1024"}),
    "recipe": Call("recipes sd35m_1024", {"name", "recipe"}),
    "init": Call("init --pictures pictures --dry-run", {"pictures"}),
    "run": Call("run job.toml --dry-run", {"stages"}),
    "try": Call("try --dry-run", {"prompts"}),
    "demo": Call("demo --dry-run", {"budget"}),
    "serve": Call("serve upgraded --dry-run", {"pipeline"}),
    "inspect": Call("inspect base", {"pipeline", "tokens", "upgrade"}),
    "upgrade": Call("upgrade base upgraded/vae made", {"pipeline", "url"}),
    "train-autoencoder": Call("train-autoencoder one.toml --out runs/one", {"autoencoder", "pictures", "values"}),
    "train-autoencoder, plan": Call("train-autoencoder one.toml --dry-run", {"recipe", "budget"}),
    "cache build": Call(BUILD, {"caches"}),
    "cache build, plan": Call("cache build two.toml --dry-run", {"recipe", "caches"}),
    "cache verify": Call("cache verify runs/two/cache", {"caches", "damaged"}, after=BUILD),
    "cache prune": Call("cache prune runs/two/cache", {"freed_bytes"}, after=BUILD),
    "finetune": Call("finetune two.toml --out runs/two", {"pipeline", "values"}),
    "runs": Call("runs", {"runs"}),
    "generate": Call(f"generate upgraded cat {SAMPLING}", {"page", "images", "folder"}),
    "evaluate": Call(
        f"evaluate upgraded pictures --count 4 {SAMPLING}", {"page", "kid", "verdict"}, "efficientnet_lite_pytorch"
    ),
    "reconstruct": Call("reconstruct upgraded/vae pictures --size 64 --device cpu", {"page", "values", "tokenizers"}),
    "latents": Call("latents upgraded/vae pictures --size 64 --points 16 --device cpu", {"page"}, "sklearn"),
    "bench": Call("bench base --part decode --repeats 1 --warm-up 1 --device cpu", {"table", "cases"}),
    "import": Call("import va-vae.safetensors imported --dry-run", {"kind", "used", "left"}),
    "data inspect": Call("data inspect pictures --size 64", {"pictures", "refused", "contact_sheet"}),
    "data avatars": Call("data avatars drawn --training 2 --held-out 1 --size 64", {"folder"}, "resvg"),
}


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, picture_folder: Path, base_folder: Path, autoencoder_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("json")
    base, pictures = folder / "base", folder / "pictures"
    base.symlink_to(base_folder)
    pictures.symlink_to(picture_folder)
    pipeline = load_pipeline(base_folder)
    upgrade(pipeline, load_autoencoder(autoencoder_folder, base=pipeline.vae)).save_pretrained(folder / "upgraded")
    one = autoencoder_recipe(base, pictures, steps=1, size=64, crop=32, detail_channels=4)
    two = finetune_recipe(base, folder / "upgraded" / "vae", pictures, steps=1)
    (folder / "one.toml").write_text(one.to_toml())
    (folder / "two.toml").write_text(two.to_toml())
    sections = f"[autoencoder]\n{one.to_toml()}\n[finetune]\n{two.to_toml()}"
    (folder / "job.toml").write_text(sections.replace("[loss]", "[autoencoder.loss]"))
    save_file(ldm.VaVae().state_dict(), folder / "va-vae.safetensors")
    return folder


@pytest.mark.parametrize("name", CALLS)
def test_stdout_is_one_object_with_the_facts(name: str, places: Path, monkeypatch, capfd) -> None:
    call = CALLS[name]
    if call.needs:
        pytest.importorskip(call.needs)
    monkeypatch.chdir(places)
    for command in filter(None, (call.after, f"{call.command} --json")):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(command.split())
    printed = capfd.readouterr()
    assert ended.value.code in (None, 0), printed.err

    facts = json.loads(printed.out)
    assert isinstance(facts, dict)
    assert call.facts <= facts.keys()


def test_every_verb_has_it_and_is_tried_here() -> None:
    commands = {}
    for name, verb in typer.main.get_command(cli.app).commands.items():
        parts = getattr(verb, "commands", None)
        commands |= {f"{name} {part}": own for part, own in parts.items()} if parts else {name: verb}
    assert not [name for name, verb in commands.items() if not any("--json" in each.opts for each in verb.params)]
    tried = {name.partition(",")[0] for name in CALLS}
    assert commands.keys() - tried == {"doctor"}  # of tests/job/test_machine.py
