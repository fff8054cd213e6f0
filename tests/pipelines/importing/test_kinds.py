"""The verb: which layout a file has, what is written where, and that nothing is half-written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
from davae.cli import main
from davae.errors import CheckpointError, SettingsError, StorageError
from davae.pipelines.importing.kinds import KINDS, detect_kind, import_checkpoint
from davae.pipelines.importing.reading import ForeignCheckpoint

MARKS = {
    "va-vae": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"],
    "lightningdit": ["x_embedder.proj.weight", "blocks.0.attn.qkv.weight"],
    "imagenet-da-vae": ["base_encoder.conv_in.weight", "da.encoder.conv_in.weight", "da.da_up.conv.weight"],
    "sd3-da-vae": ["vae.encoder.conv_in.weight", "dc_down.conv.weight", "dc_up.conv.weight"],
    "sd35-stage-two": ["transformer.tokenizer_patch_embed.proj.base_conv.weight", "project_out.base_linear.bias"],
}
"""Keys of each layout."""


def having(keys: list[str]) -> ForeignCheckpoint:
    return ForeignCheckpoint(Path("f.pt"), "", dict.fromkeys(keys, torch.zeros(1)))


def test_a_kind_is_found_by_its_keys() -> None:
    assert MARKS.keys() == KINDS.keys()
    for kind, keys in MARKS.items():
        assert detect_kind(having(keys)) == kind
    assert detect_kind(having(["base_encoder.conv_in.weight", "dc.dc_up.conv.weight"])) == "imagenet-da-vae"
    with pytest.raises(
        CheckpointError, match=r"no layout that davae knows.*none of va-vae.*features\.0\.weight.*--kind"
    ):
        detect_kind(having(["features.0.weight"]))
    with pytest.raises(CheckpointError, match="va-vae, lightningdit of"):
        detect_kind(having(MARKS["va-vae"] + MARKS["lightningdit"]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(ldm.VaVae((32, 32), 1).state_dict(), tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_key_is_on_the_screen_and_in_the_report(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_returns(["import", str(file), str(file.parent / "out")])
    shown = capsys.readouterr().out
    written = json.loads((file.parent / "out" / "import.json").read_text())
    keys = set(ldm.VaVae((32, 32), 1).state_dict())

    assert {row["key"] for row in written["used"]} | {row["key"] for row in written["left"]} == keys
    assert all(f" {key} " in shown for key in keys)
    assert "used     encoder.conv_in.weight" in shown
    assert "left     loss.logvar" in shown
    assert "missing  latents_mean, latents_std" in shown
    assert (written["kind"], written["file"], written["format_version"]) == ("va-vae", "f.safetensors", 1)

    linear = next(row for row in written["used"] if row["key"] == "encoder.mid.attn_1.q.weight")
    assert linear == {
        "key": "encoder.mid.attn_1.q.weight",
        "target": "encoder.mid_block.attentions.0.to_q.weight",
        "shape": [32, 32, 1, 1],
        "dtype": "float32",
        "change": "a linear layer",
    }


def main_returns(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert (left.value.code or 0) == code


def test_a_dry_run_reports_and_writes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_returns(["import", str(file), str(file.parent / "out"), "--dry-run"])
    assert "used     encoder.conv_in.weight" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["f.safetensors"]


def test_another_kinds_file_is_refused_by_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_returns(["import", str(file), str(file.parent / "out"), "--kind", "sd3-da-vae"], 4)
    assert "first mismatch is dc_up.conv.weight: found none" in capsys.readouterr().err
    assert [path.name for path in file.parent.iterdir()] == ["f.safetensors"]


def test_what_an_import_wrote_is_replaced_and_nothing_else(file: Path) -> None:
    out = file.parent / "out"
    import_checkpoint(file, out)
    before = tree(out)
    import_checkpoint(file, out)
    after = tree(out)

    assert before.keys() == after.keys()
    assert all(after[name] > before[name] for name in before)

    (file.parent / "mine").mkdir()
    for folder, message in ((file.parent / "mine", "not davae's to replace"), (file.parent, "would be replaced")):
        with pytest.raises(SettingsError, match=message):
            import_checkpoint(file, folder)
    with pytest.raises(SettingsError, match="allowed are va-vae, lightningdit"):
        import_checkpoint(file, out, kind="vae")
    with pytest.raises(SettingsError, match="--base does not belong to va-vae, which takes --stats"):
        import_checkpoint(file, out, base="somewhere")


def test_a_failed_write_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = file.parent / "out"
    import_checkpoint(file, out)
    before = tree(out)

    def fails(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("davae.pipelines.importing.kinds.write_json", fails)
    with pytest.raises(StorageError, match="No space left"):
        import_checkpoint(file, out)
    assert tree(out) == before
