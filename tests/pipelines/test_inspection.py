"""What `davae inspect` reads of a folder is what the loaded pipeline has."""

import json
from pathlib import Path

import pytest

import tiny_pipelines
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.inspection import describe, describe_folder, tabulate
from tiny_upgrades import upgrade_tiny


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_configs_and_headers_tell_what_the_pipeline_tells(name: str, tmp_path: Path) -> None:
    base = tiny_pipelines.PIPELINES[name]()
    base.save_pretrained(tmp_path)
    assert describe_folder(tmp_path) == describe(base)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_upgraded_folder_tells_it_too(name: str, tmp_path: Path) -> None:
    upgraded = upgrade_tiny(tiny_pipelines.PIPELINES[name]())
    upgraded.save_pretrained(tmp_path)
    assert describe_folder(tmp_path, 64) == describe(upgraded, 64)
    assert ("state", "upgraded by davae") in tabulate(describe_folder(tmp_path))


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    tiny_pipelines.sd3().save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({key: whole[key] for key in whole if key != "patch_size"}))
    with pytest.raises(CheckpointError, match="cannot be loaded as a pipeline: 'patch_size'"):
        describe_folder(tmp_path)

    config.write_text(json.dumps({**whole, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(SettingsError, match="UNet2DConditionModel is no backbone that davae knows"):
        describe_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(SettingsError, match="DDPMPipeline has no transformer and no vae"):
        describe_folder(tmp_path)
